#define BFLOAT16
#include "../include/implicit.h"
