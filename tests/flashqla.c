/* The implementation under test, compiled once. */
#define FLASHQLA_IMPLEMENTATION
#include "flashqla.h"
