#include "../include/survey.h"
