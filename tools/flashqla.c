/* flashqla: the library's command line. */
#include "command.h"

#include <stdio.h>
#include <string.h>

static const char usage[] =
    "usage: flashqla COMMAND [options]        (flashqla COMMAND --help says more)\n"
    "\n"
    "The gated delta rule on this machine's GPU or CPU.\n"
    "  info     what this machine can run, and why not\n"
    "  run      compute the tensors of a safetensors file\n"
    "  check    compare against the outputs that a file holds\n"
    "  bench    time shapes, beside a floor and beside peers\n"
    "\n"
    COMMON_OPTIONS
    "\n"
    "Exit codes: 0 success, 1 failure, 2 misuse.\n";

static const struct {
    const char *name;
    int (*run)(int argc, char **argv);
} commands[] = { { "info", info_command }, { "run", run_command }, { "check", check_command }, { "bench", bench_command } };

int main(int argc, char **argv) {
    size_t i;
    int exit_code = MISUSE;
    if (argc < 2) {
        fputs(usage, stderr);
        return MISUSE;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0) {
        fputs(usage, stdout);
        exit_code = SUCCESS;
    } else {
        for (i = 0; i < sizeof commands / sizeof commands[0] && strcmp(argv[1], commands[i].name) != 0;) i++;
        if (i == sizeof commands / sizeof commands[0]) {
            fprintf(stderr, "flashqla: \"%s\" is no command; info, run, check or bench (see flashqla --help)\n", argv[1]);
            return MISUSE;
        }
        exit_code = commands[i].run(argc - 1, argv + 1);
    }
    if (fflush(stdout) != 0 || ferror(stdout)) { /* a full disk is a failure too */
        complain("the output cannot be written");
        return FAILURE;
    }
    return exit_code;
}
