#define BFLOAT16
#include "../include/survey.h"
