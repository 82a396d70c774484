#include "command.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void complain(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("flashqla: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
}

// >>options

bool misuse(const char *command, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "flashqla %s: ", command);
    vfprintf(stderr, format, args);
    fprintf(stderr, "; see flashqla %s --help\n", command);
    va_end(args);
    return false;
}

static bool parse_backend(const char *command, const char *text, fqla_backend *backend) {
    if (strcmp(text, "auto") == 0) *backend = FQLA_BACKEND_AUTO;
    else if (strcmp(text, "cpu") == 0) *backend = FQLA_BACKEND_CPU;
    else if (strcmp(text, "cuda") == 0) *backend = FQLA_BACKEND_CUDA;
    else return misuse(command, "--backend is \"%s\"; auto, cpu or cuda", text);
    return true;
}

static bool parse_threads(const char *command, const char *text, int32_t *threads) {
    char *end;
    const long value = strtol(text, &end, 10);
    if (end == text || *end != '\0' || value < 1 || value > 1024) return misuse(command, "--threads is \"%s\"; 1 to 1024", text);
    *threads = (int32_t)value;
    return true;
}

static void append(text_list *list, const char *text) {
    const char **items = realloc(list->items, (size_t)(list->count + 1) * sizeof *items);
    if (items == NULL) {
        complain("out of memory");
        exit(FAILURE);
    }
    list->items = items;
    list->items[list->count++] = text;
}

/* Is argument the option `name`, alone or as name=value? */
static bool matches(const char *argument, const char *name) {
    const size_t length = strlen(name);
    if (strncmp(argument, name, length) != 0) return false;
    return argument[length] == '\0' || (argument[length] == '=' && strncmp(name, "--", 2) == 0);
}

static bool parse(int argc, char **argv, const char *usage, const option *options, arguments *args, bool *help) {
    const char *command = argv[0], *backend = NULL, *threads = NULL;
    const option common[] = { { "--help", help, NULL, NULL }, { "-h", help, NULL, NULL }, { "--backend", NULL, &backend, NULL },
                              { "--threads", NULL, &threads, NULL }, { NULL, NULL, NULL, NULL } };
    bool only_files = false;
    int i;
    for (i = 1; i < argc; i++) {
        const char *argument = argv[i], *value;
        const option *o = common;
        if (only_files || argument[0] != '-' || argument[1] == '\0') {
            append(&args->files, argument);
            continue;
        }
        if (strcmp(argument, "--") == 0) {
            only_files = true;
            continue;
        }
        while (o->name != NULL && !matches(argument, o->name)) o++;
        if (o->name == NULL)
            for (o = options; o->name != NULL && !matches(argument, o->name);) o++;
        if (o->name == NULL) return misuse(command, "unknown option %s", argument);
        value = strchr(argument, '=');
        if (o->flag != NULL) {
            if (value != NULL) return misuse(command, "%s takes no value", o->name);
            *o->flag = true;
            if (o->flag == help) {
                fputs(usage, stdout);
                return false;
            }
            continue;
        }
        if (value != NULL) value++;
        else if (i + 1 < argc) value = argv[++i];
        else return misuse(command, "%s needs a value", o->name);
        if (o->list != NULL) {
            append(o->list, value);
        } else {
            if (*o->text != NULL) return misuse(command, "%s is given twice", o->name);
            *o->text = value;
        }
    }
    return (backend == NULL || parse_backend(command, backend, &args->backend)) &&
           (threads == NULL || parse_threads(command, threads, &args->threads));
}

bool parse_arguments(int argc, char **argv, const char *usage, const option *options, arguments *args, int *exit_code) {
    bool help = false;
    memset(args, 0, sizeof *args);
    if (parse(argc, argv, usage, options, args, &help)) return true;
    *exit_code = help ? SUCCESS : MISUSE;
    free_arguments(args, options);
    return false;
}

void free_arguments(arguments *args, const option *options) {
    free(args->files.items);
    for (; options->name != NULL; options++)
        if (options->list != NULL) free(options->list->items);
}

// >>library

static void keep_message(fqla_log_level level, const char *message, void *user) {
    library *lib = user;
    if (level == FQLA_LOG_ERROR) snprintf(lib->message, sizeof lib->message, "%s", message);
}

bool library_open(library *lib, fqla_backend backend, int32_t threads) {
    fqla_context_desc desc;
    fqla_status status;
    memset(lib, 0, sizeof *lib);
    memset(&desc, 0, sizeof desc);
    desc.backend = backend;
    desc.num_threads = threads;
    desc.log = keep_message;
    desc.log_user = lib;
    status = fqla_context_create(&desc, &lib->context);
    if (status == FQLA_OK) status = fqla_context_info(lib->context, &lib->summary);
    return status == FQLA_OK;
}

void library_close(library *lib) {
    fqla_context_destroy(lib->context);
    lib->context = NULL;
}
