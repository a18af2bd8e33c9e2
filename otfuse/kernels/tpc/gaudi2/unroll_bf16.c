#define BFLOAT16
#include "../include/unroll.h"
