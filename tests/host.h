/* What a test stands on: contexts whose allocator counts, poisons and can fail, and whose logger remembers. */
#ifndef HOST_H
#define HOST_H

#include "flashqla.h"
#include <stdatomic.h>
#include <stdbool.h>

typedef struct test_host {
    atomic_long live, calls;  /* blocks not freed; allocations asked for */
    atomic_long fail_at;      /* the allocation that fails, counted from 1 as calls are; 0: none */
    atomic_long errors;       /* sentences at level FQLA_LOG_ERROR */
    char message[512];        /* the last of them */
} test_host;

/* The backend under test and the CPU level it was asked for, from the command line. */
extern fqla_backend test_backend;
extern fqla_cpu_level test_cpu_level;

static inline bool test_on_cuda(void) { return test_backend == FQLA_BACKEND_CUDA; }

/* A desc of the backend under test that allocates from and logs to host, which is reset. */
fqla_context_desc test_desc(test_host *host);
/* A context of that desc; aborts with a word where there is none. num_threads 0: two. */
fqla_context *test_open(test_host *host, int32_t num_threads);
/* The one context that most tests share, and its host. */
extern test_host test_shared_host;
fqla_context *test_shared(void);
const char *test_shared_close(void); /* NULL, or what still lives */

/* Did a call that returned `status` fail as expected: this status, a new sentence that names `field` and shows `value` (either may
   be NULL)? NULL, or what is wrong. Clears the host's count of errors. */
const char *test_refusal(test_host *host, fqla_status expected, fqla_status status, const char *field, const char *value);

/* In a test: a check that says nothing (NULL), or what is wrong. */
#define ASSERT_SILENT(check)                                    \
    do {                                                        \
        const char *said_ = (check);                            \
        ASSERTm(said_, said_ == NULL);                          \
    } while (0)

#endif
