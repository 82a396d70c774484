// >>cpu_pool: helper threads that take tasks 0 .. count - 1 of one job at a time

/*
    A caller opens a gate and works on its job together with the helpers that come in; when no task is left it shuts the gate and
    waits for those who are still inside. A helper who comes later finds it shut: nobody ever waits for a thread to wake.
    After a job helpers look out for the next one for some microseconds before they sleep, which spares the calls of a
    model's consecutive layers the wake-up. Mutexes are only for those who sleep or wake sleepers.
*/

/* A task works on part `task` of a job; slot (0 .. num_threads - 1) is the thread's own piece of workspace. */
typedef void (*fqla__task)(void *job, int64_t task, int32_t slot);

enum {
    FQLA__SPINS = 4000,       /* 40 to 160 us */
    FQLA__GATE_OPEN = 1 << 20 /* more than there are threads */
};

typedef struct fqla__pool fqla__pool;

typedef struct fqla__helper {
    fqla__pool *pool;
    int32_t slot; /* 1 .. num_threads - 1; slot 0 is the caller's */
    fqla__thread thread;
} fqla__helper;

struct fqla__pool {
    int32_t num_threads;
    int32_t spins;         /* looks at a counter before a thread sleeps; 0 where threads outnumber cores */
    fqla__helper *helpers; /* [num_threads - 1]; NULL without any */
    fqla__mutex busy;      /* held by the caller whose job it is */

    fqla__task task;       /* the job: written while the gate is shut and nobody inside */
    void *job;
    int64_t count;

    int64_t gate;          /* counter: helpers inside, and FQLA__GATE_OPEN while it is open */
    int64_t next;          /* counter: the first task that nobody has taken */
    int64_t jobs;          /* counter: jobs posted so far */
    int64_t sleeping;      /* counter: helpers that wait for `posted` */
    int64_t waiting;       /* counter: callers that wait for `left`, 0 or 1 */
    fqla__mutex counting;  /* guards the counters where the compiler has no atomics */

    fqla__mutex mutex;     /* of the two conditions; guards stop */
    fqla__condition posted, left;
    bool stop;
};

/* Add to a counter, which may be shared; the value before. */
static int64_t fqla__counter_add(fqla__pool *pool, int64_t *counter, int64_t change) {
#if defined(__GNUC__) && !defined(__TINYC__)
    (void)pool;
    return __atomic_fetch_add(counter, change, __ATOMIC_SEQ_CST);
#else
    int64_t value;
    fqla__mutex_lock(&pool->counting);
    value = *counter;
    *counter += change;
    fqla__mutex_unlock(&pool->counting);
    return value;
#endif
}

static int64_t fqla__counter_get(fqla__pool *pool, int64_t *counter) {
#if defined(__GNUC__) && !defined(__TINYC__)
    (void)pool;
    return __atomic_load_n(counter, __ATOMIC_SEQ_CST);
#else
    return fqla__counter_add(pool, counter, 0);
#endif
}

/* Once round a loop that watches a counter. Every so often somebody else gets the core: it may be the thread that is watched. */
static void fqla__pool_spin(int32_t spin) {
    if (spin % 64 == 63) fqla__thread_yield();
#if FLASHQLA__X86
    else _mm_pause();
#endif
}

/* Tasks run in one floating-point mode whatever the caller's: nearest even, no traps, and denormal numbers are zero (a state that
   fades away would otherwise take 100 times as long). The caller's mode, to be put back. */
static uint32_t fqla__float_mode_enter(void) {
#if FLASHQLA__X86
    const uint32_t mode = _mm_getcsr();
    _mm_setcsr(0x9fc0);
    return mode;
#else
    return 0;
#endif
}

static void fqla__float_mode_leave(uint32_t mode) {
#if FLASHQLA__X86
    _mm_setcsr(mode);
#else
    (void)mode;
#endif
}

static void fqla__pool_work(fqla__pool *pool, int32_t slot) {
    int64_t i;
    while ((i = fqla__counter_add(pool, &pool->next, 1)) < pool->count) pool->task(pool->job, i, slot);
}

/* Leave the gate that one has entered, open or not. */
static void fqla__pool_leave(fqla__pool *pool) {
    if (fqla__counter_add(pool, &pool->gate, -1) != 1 || fqla__counter_get(pool, &pool->waiting) == 0) return;
    fqla__mutex_lock(&pool->mutex);
    fqla__condition_signal_all(&pool->left);
    fqla__mutex_unlock(&pool->mutex);
}

/* Until there is a job beyond those seen. False: stop instead. */
static bool fqla__pool_await_job(fqla__pool *pool, int64_t seen) {
    int32_t spin;
    bool stop;
    for (spin = 0; spin < pool->spins; spin++) {
        if (fqla__counter_get(pool, &pool->jobs) != seen) return true;
        fqla__pool_spin(spin);
    }
    fqla__mutex_lock(&pool->mutex);
    fqla__counter_add(pool, &pool->sleeping, 1);
    while (!pool->stop && fqla__counter_get(pool, &pool->jobs) == seen) fqla__condition_wait(&pool->posted, &pool->mutex);
    fqla__counter_add(pool, &pool->sleeping, -1);
    stop = pool->stop;
    fqla__mutex_unlock(&pool->mutex);
    return !stop;
}

static FLASHQLA__THREAD_RETURN fqla__helper_main(void *argument) {
    const fqla__helper *helper = (const fqla__helper *)argument;
    fqla__pool *pool = helper->pool;
    int64_t seen = 0;
    fqla__float_mode_enter();
    while (fqla__pool_await_job(pool, seen)) {
        seen = fqla__counter_get(pool, &pool->jobs);
        if (fqla__counter_add(pool, &pool->gate, 1) >= FQLA__GATE_OPEN) fqla__pool_work(pool, helper->slot);
        fqla__pool_leave(pool);
    }
    return 0;
}

/* Stop and join the helpers. Also right for a pool of zeros that never started. */
static void fqla__pool_stop(fqla__pool *pool, const fqla_context_desc *desc) {
    int32_t i;
    if (pool->helpers == NULL) return;
    fqla__mutex_lock(&pool->mutex);
    pool->stop = true;
    fqla__mutex_unlock(&pool->mutex);
    fqla__condition_signal_all(&pool->posted);
    for (i = 0; i < pool->num_threads - 1; i++) fqla__thread_join(pool->helpers[i].thread);
    fqla__condition_destroy(&pool->left);
    fqla__condition_destroy(&pool->posted);
    fqla__mutex_destroy(&pool->mutex);
    fqla__mutex_destroy(&pool->counting);
    fqla__mutex_destroy(&pool->busy);
    fqla__host_free(desc, pool->helpers);
    pool->helpers = NULL;
}

/* Start num_threads - 1 helpers. pool: zeros. On failure nothing runs. */
static fqla_status fqla__pool_start(fqla__pool *pool, const fqla_context_desc *desc, int32_t num_threads) {
    int32_t i;
    pool->num_threads = num_threads;
    if (num_threads == 1) return FQLA_OK;
    pool->helpers = (fqla__helper *)fqla__host_alloc_zeroed(desc, (size_t)(num_threads - 1) * sizeof *pool->helpers);
    if (pool->helpers == NULL)
        return fqla__fail(desc, FQLA_ERROR_OUT_OF_MEMORY, "no memory for %d helper threads", (int)num_threads - 1);
    pool->spins = num_threads <= fqla__core_count() ? FQLA__SPINS : 0;
    fqla__mutex_init(&pool->busy);
    fqla__mutex_init(&pool->counting);
    fqla__mutex_init(&pool->mutex);
    fqla__condition_init(&pool->posted);
    fqla__condition_init(&pool->left);
    for (i = 0; i < num_threads - 1; i++) {
        fqla__helper *helper = &pool->helpers[i];
        helper->pool = pool;
        helper->slot = i + 1;
        if (!fqla__thread_start(&helper->thread, fqla__helper_main, helper)) {
            pool->num_threads = i + 1; /* those that did start */
            fqla__pool_stop(pool, desc);
            return fqla__fail(desc, FQLA_ERROR_THREAD, "helper thread %d of %d could not be started", (int)i + 1,
                              (int)num_threads - 1);
        }
    }
    return FQLA_OK;
}

/* Post a job, and work on it until it is done. */
static void fqla__pool_share(fqla__pool *pool, fqla__task task, void *job, int64_t count) {
    int32_t spin;
    pool->task = task, pool->job = job, pool->count = count;
    pool->next = 0;
    fqla__counter_add(pool, &pool->gate, FQLA__GATE_OPEN);
    fqla__counter_add(pool, &pool->jobs, 1);
    if (fqla__counter_get(pool, &pool->sleeping) > 0) {
        fqla__mutex_lock(&pool->mutex);
        fqla__condition_signal_all(&pool->posted);
        fqla__mutex_unlock(&pool->mutex);
    }
    fqla__pool_work(pool, 0);
    fqla__counter_add(pool, &pool->gate, -FQLA__GATE_OPEN);
    for (spin = 0; spin < pool->spins; spin++) {
        if (fqla__counter_get(pool, &pool->gate) == 0) return;
        fqla__pool_spin(spin);
    }
    fqla__mutex_lock(&pool->mutex);
    fqla__counter_add(pool, &pool->waiting, 1);
    while (fqla__counter_get(pool, &pool->gate) > 0) fqla__condition_wait(&pool->left, &pool->mutex);
    fqla__counter_add(pool, &pool->waiting, -1);
    fqla__mutex_unlock(&pool->mutex);
}

/* Run all tasks of a job and return when the last is done. Which thread takes a task is open; a caller who finds the helpers
   busy with another caller's job works alone, in slot 0. */
static void fqla__pool_run(fqla__pool *pool, fqla__task task, void *job, int64_t count) {
    const uint32_t mode = fqla__float_mode_enter();
    int64_t i;
    if (pool->num_threads > 1 && count > 1 && fqla__mutex_try_lock(&pool->busy)) {
        fqla__pool_share(pool, task, job, count);
        fqla__mutex_unlock(&pool->busy);
    } else {
        for (i = 0; i < count; i++) task(job, i, 0);
    }
    fqla__float_mode_leave(mode);
}
