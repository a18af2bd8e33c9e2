#define HISTORY
#include "../include/sinkhorn.h"
