#define BFLOAT16
#include "../include/sinkhorn.h"
