/* Every allocation and every thread start fails in turn: the right status and one sentence, nothing leaks, nothing is set, and the
   next attempt works. */
#include "case.h"
#include "greatest.h"
#include <pthread.h>

/* The linker hands the library's pthread_create to this one (-Wl,--wrap=pthread_create). */
int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*function)(void *), void *argument);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*function)(void *), void *argument);
static int thread_starts, failing_start; /* 0: none fails */

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*function)(void *), void *argument) {
    if (++thread_starts == failing_start) return 11; /* EAGAIN */
    return __real_pthread_create(thread, attributes, function, argument);
}

/* Everything that allocates; what got made is destroyed. The failing call's status. */
static fqla_status everything(const fqla_context_desc *desc, const char **wrong) {
    static const int32_t cu[4] = { 0, 5, 70, 70 };
    fqla_context *context = NULL;
    fqla_plan *plan = NULL, *owner = NULL;
    void *memory = NULL;
    fqla_plan_desc plan_desc = { .heads_qk = 1, .heads_v = 2, .num_seqs = 3, .cu_seqlens = cu, .pool_size = 7,
                                 .checkpoint_every = 1 };
    fqla_status status = fqla_context_create(desc, &context);
    *wrong = NULL;
    if (status != FQLA_OK) {
        if (context != NULL) *wrong = "a context was set";
        return status;
    }
    status = fqla_plan_create(context, &plan_desc, &plan);
    if (status != FQLA_OK && plan != NULL) *wrong = "a plan was set";
    if (status == FQLA_OK) {
        plan_desc.pool_size = 0;
        plan_desc.backward = 1;
        status = fqla_plan_create(context, &plan_desc, &owner);
        if (status != FQLA_OK && owner != NULL) *wrong = "a plan was set";
    }
    if (status == FQLA_OK) {
        status = fqla_alloc(context, 100, &memory);
        if (status != FQLA_OK && memory != NULL) *wrong = "a pointer was set";
    }
    if (fqla_free(context, memory) != FQLA_OK) *wrong = "fqla_free failed";
    fqla_plan_destroy(owner);
    fqla_plan_destroy(plan);
    if (fqla_context_destroy(context) != FQLA_OK) *wrong = "the context is still in use";
    return status;
}

TEST every_allocation(void) {
    static test_host host;
    const char *wrong;
    long calls, n;
    fqla_context_desc desc = test_desc(&host);
    desc.num_threads = 3;
    ASSERT_EQ(FQLA_OK, everything(&desc, &wrong));
    calls = atomic_load(&host.calls);
    ASSERT(calls >= 4);
    for (n = 1; n <= calls; n++) {
        desc = test_desc(&host);
        desc.num_threads = 3;
        atomic_store(&host.fail_at, n);
        ASSERT_SILENT(test_refusal(&host, FQLA_ERROR_OUT_OF_MEMORY, everything(&desc, &wrong), "memory", NULL));
        ASSERT_SILENT(wrong);
        ASSERT_EQ_FMT(0L, atomic_load(&host.live), "%ld");
    }
    desc = test_desc(&host);
    desc.num_threads = 3;
    atomic_store(&host.fail_at, calls + 1); /* the one after the last: nothing fails */
    ASSERT_EQ(FQLA_OK, everything(&desc, &wrong));
    ASSERT_EQ_FMT(calls, atomic_load(&host.calls), "%ld");
    ASSERT_EQ_FMT(0L, atomic_load(&host.live), "%ld");
    PASS();
}

TEST every_thread_start(void) {
    static test_host host;
    int n;
    for (n = 1; n <= 6; n++) {
        const char *wrong;
        fqla_context_desc desc = test_desc(&host);
        desc.num_threads = 7;
        thread_starts = 0;
        failing_start = n;
        ASSERT_SILENT(test_refusal(&host, FQLA_ERROR_THREAD, everything(&desc, &wrong), "thread", NULL));
        ASSERT_SILENT(wrong);
        ASSERT_EQ_FMT(0L, atomic_load(&host.live), "%ld");
        failing_start = 0;
        ASSERT_EQ(FQLA_OK, everything(&desc, &wrong));
    }
    PASS();
}

SUITE(failures) {
    RUN_TEST(every_allocation);
    if (!test_on_cuda()) RUN_TEST(every_thread_start);
}
