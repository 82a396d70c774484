#include "host.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

fqla_backend test_backend = FQLA_BACKEND_CPU;
fqla_cpu_level test_cpu_level = FQLA_CPU_AUTO;
test_host test_shared_host;
static fqla_context *shared;

enum { HEADER = 16, POISON = 0xff }; /* keeps malloc's alignment; NaN in every float format */

static void *host_alloc(size_t bytes, void *user) {
    test_host *host = (test_host *)user;
    const long call = atomic_fetch_add(&host->calls, 1) + 1;
    unsigned char *block;
    if (call == atomic_load(&host->fail_at)) return NULL;
    block = (unsigned char *)malloc(bytes + HEADER);
    if (block == NULL) return NULL;
    memcpy(block, &bytes, sizeof bytes);
    memset(block + HEADER, POISON, bytes);
    atomic_fetch_add(&host->live, 1);
    return block + HEADER;
}

static void host_free(void *pointer, void *user) {
    test_host *host = (test_host *)user;
    unsigned char *block = (unsigned char *)pointer - HEADER;
    size_t bytes;
    memcpy(&bytes, block, sizeof bytes);
    memset(block, POISON, bytes + HEADER);
    free(block);
    atomic_fetch_sub(&host->live, 1);
}

static void host_log(fqla_log_level level, const char *message, void *user) {
    test_host *host = (test_host *)user;
    if (level != FQLA_LOG_ERROR) return;
    atomic_fetch_add(&host->errors, 1);
    snprintf(host->message, sizeof host->message, "%s", message);
}

fqla_context_desc test_desc(test_host *host) {
    memset(host, 0, sizeof *host);
    return (fqla_context_desc){ .backend = test_backend,
                                .cpu_level = test_cpu_level,
                                .alloc = host_alloc,
                                .free = host_free,
                                .alloc_user = host,
                                .log = host_log,
                                .log_user = host };
}

fqla_context *test_open(test_host *host, int32_t num_threads) {
    fqla_context_desc desc = test_desc(host);
    fqla_context *context = NULL;
    desc.num_threads = num_threads > 0 ? num_threads : 2;
    if (fqla_context_create(&desc, &context) != FQLA_OK) {
        fprintf(stderr, "no context to test: %s\n", host->message);
        exit(EXIT_FAILURE);
    }
    return context;
}

fqla_context *test_shared(void) {
    if (shared == NULL) shared = test_open(&test_shared_host, 0);
    return shared;
}

const char *test_shared_close(void) {
    static char wrong[600];
    if (shared != NULL && fqla_context_destroy(shared) != FQLA_OK) {
        snprintf(wrong, sizeof wrong, "the shared context is not destroyed: %s", test_shared_host.message);
        return wrong;
    }
    shared = NULL;
    snprintf(wrong, sizeof wrong, "%ld blocks of the shared context leaked", atomic_load(&test_shared_host.live));
    return atomic_load(&test_shared_host.live) != 0 ? wrong : NULL;
}

const char *test_refusal(test_host *host, fqla_status expected, fqla_status status, const char *field, const char *value) {
    static char wrong[1024];
    const long errors = atomic_exchange(&host->errors, 0);
    if (status != expected)
        snprintf(wrong, sizeof wrong, "%s expected, got %s (%s)", fqla_status_name(expected), fqla_status_name(status),
                 errors > 0 ? host->message : "nothing logged");
    else if (errors != 1)
        snprintf(wrong, sizeof wrong, "%s logged %ld sentences, 1 expected", fqla_status_name(status), errors);
    else if ((field != NULL && strstr(host->message, field) == NULL) || (value != NULL && strstr(host->message, value) == NULL))
        snprintf(wrong, sizeof wrong, "\"%s\" should name %s and %s", host->message, field, value != NULL ? value : "no value");
    else
        return NULL;
    return wrong;
}
