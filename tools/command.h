/* What the subcommands share: words to the user, options, and a context of the library. */
#ifndef COMMAND_H
#define COMMAND_H

#include <stdbool.h>
#include <stdint.h>

#include "flashqla.h"

enum { SUCCESS = 0, FAILURE = 1, MISUSE = 2 }; /* exit codes */

int info_command(int argc, char **argv);
int run_command(int argc, char **argv);
int check_command(int argc, char **argv);
int bench_command(int argc, char **argv);

/* "flashqla: ..." and a newline on stderr. */
void complain(const char *format, ...);
/* The same about how `command` was called, with a hint at its --help. False, always. */
bool misuse(const char *command, const char *format, ...);

// >>options

typedef struct text_list {
    const char **items;
    int count;
} text_list;

/* An option of a subcommand, and where it goes: exactly one of the three pointers is set. A table ends with a NULL name. */
typedef struct option {
    const char *name;  /* "--rows" */
    bool *flag;
    const char **text; /* takes a value, at most once */
    text_list *list;   /* takes a value, any number of times */
} option;

/* Options that every subcommand has, and what is no option. */
typedef struct arguments {
    fqla_backend backend;
    int32_t threads;
    text_list files;
} arguments;

/* Parse argv[1] and on. usage: what --help prints. True: go on. False: leave with *exit_code. */
bool parse_arguments(int argc, char **argv, const char *usage, const option *options, arguments *args, int *exit_code);
void free_arguments(arguments *args, const option *options);

/* The lines of --help about the options that every subcommand has. */
#define COMMON_OPTIONS                                                                          \
    "  --backend B   auto (default: a GPU that can run it, else the CPU), cpu or cuda\n"        \
    "  --threads N   CPU threads; default one a core\n"                                         \
    "  --help        print this\n"

// >>library

typedef struct library {
    fqla_context *context;
    fqla_context_summary summary;
    char message[512]; /* the last error in words */
} library;

/* Make a context. False: message holds the reason. */
bool library_open(library *lib, fqla_backend backend, int32_t threads);
void library_close(library *lib);

#endif
