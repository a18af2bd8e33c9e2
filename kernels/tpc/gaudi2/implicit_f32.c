#include "../include/implicit.h"
