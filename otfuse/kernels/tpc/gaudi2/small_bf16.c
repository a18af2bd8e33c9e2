#define BFLOAT16
#include "../include/small.h"
