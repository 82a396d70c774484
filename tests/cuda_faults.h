/* What the tests in which every driver call fails have in common: which call failed, and what the library may make of it. */
#ifndef CUDA_FAULTS_H
#define CUDA_FAULTS_H

#include "cuda_host.h"

/* "cuMemAlloc_v2" without its version, until the next call of this function. */
static const char *failed_call(void) {
    static char name[64];
    snprintf(name, sizeof name, "%s", fake.fake_cuda_failed_call());
    if (strstr(name, "_v2") != NULL) *strstr(name, "_v2") = '\0';
    return name;
}

static int is_one_of(const char *name, const char *const *names) {
    for (; *names != NULL; names++)
        if (strcmp(name, *names) == 0) return 1;
    return 0;
}

/* A failure of these leaves what was done as it is, with a line instead of a status. */
static const char *const noted[] = {"cuCtxPopCurrent", "cuModuleUnload", "cuDevicePrimaryCtxRelease", NULL};
/* And of these too when they end something. */
static const char *const noted_at_the_end[] = {"cuCtxPushCurrent", "cuMemFree", NULL};
/* A cubin that does not load is a cubin refused: its PTX is next. */
static const char *const loading[] = {"cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", NULL};

/* A life from context to context ended with `status` after the call `name` failed ("": none did). Was it told as it should be: a
   line that holds `words` and all else went on, or one sentence that does and the status `expected`? */
static enum greatest_test_res failure_is_told(const char *name, const char *words, fqla_status expected, fqla_status status) {
    if (name[0] == '\0') {
        ASSERT_EQ(FQLA_OK, status);
        ASSERT_EQ(0, host.errors + host.infos);
    } else if (status == FQLA_OK) {
        ASSERTm(name, is_one_of(name, noted) || is_one_of(name, noted_at_the_end) || is_one_of(name, loading));
        ASSERTm(name, strstr(host.infos_text, words) != NULL);
        ASSERT_EQm(name, 0, host.errors);
    } else {
        const int refusal = strcmp(name, "cuInit") == 0 || is_one_of(name, loading);
        ASSERTm(name, !is_one_of(name, noted));
        ASSERTm(name, strstr(host.error, words) != NULL);
        ASSERTm(name, status == expected || (refusal && status == FQLA_ERROR_NO_CUDA));
        ASSERT_EQm(name, 1, host.errors);
    }
    PASS();
}

#endif
