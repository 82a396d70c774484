#include "error.h"

#include <stdarg.h>
#include <stdio.h>

bool fail(char *error, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(error, ERROR_SIZE, format, args);
    va_end(args);
    for (; *error != '\0'; error++)
        if (*error < ' ' || *error > '~') *error = '?';
    return false;
}
