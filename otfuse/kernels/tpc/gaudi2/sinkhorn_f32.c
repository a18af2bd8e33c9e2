#include "../include/sinkhorn.h"
