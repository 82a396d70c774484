/* The header's implementation, for the command-line program. */
#define FLASHQLA_IMPLEMENTATION
#include "flashqla.h"
