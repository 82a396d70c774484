/* A unit with a private copy, beside the program's public one. */
#define FLASHQLA_STATIC
#define FLASHQLA_IMPLEMENTATION
#include "flashqla.h"

const char *private_copy_status(fqla_status status);
const char *private_copy_status(fqla_status status) { return fqla_status_name(status); }
