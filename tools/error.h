/* Errors of the command line's modules: one line of plain text in a buffer of ERROR_SIZE bytes. */
#ifndef ERROR_H
#define ERROR_H

#include <stdbool.h>

enum { ERROR_SIZE = 512 };

/* Write the line, with ? for whatever would not print: files' names and keys may hold anything. False, always. */
bool fail(char *error, const char *format, ...);

#endif
