#include "../include/unroll.h"
