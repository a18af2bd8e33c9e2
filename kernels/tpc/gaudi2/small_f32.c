#include "../include/small.h"
