/* The memory of 64 agents in a game or a robot's fleet: each has one gated-delta-rule layer whose state is all it remembers.

   - What they lived through so far, of different lengths, is read in one packed call into a pool of states.
   - Then every tick one call decodes one token of all agents, the states updated in place.
   - An agent owns two slots of the pool, one it lives in and one that keeps a snapshot. Taking a snapshot copies nothing:
     for one tick the agent reads its slot and writes the other; what it leaves behind is the snapshot. Rolling back is the
     same with the roles exchanged.

   Half-way every agent is rolled back and lives the last ticks again, on the same inputs: it must do the same, to the bit.

        cc -O2 agents.c -ldl -lpthread -lm && ./a.out [--backend auto|cpu|cuda]              (on Windows no -ldl) */
#if !defined(_WIN32) && !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#endif
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define FLASHQLA_IMPLEMENTATION
#include "../flashqla.h"

enum {
    AGENTS = 64, HEADS_QK = 2, HEADS_V = 4, D = 128,
    MAX_ROWS = AGENTS * 200, /* the histories together: 10 to 199 tokens each */
    TICKS = 400, SNAPSHOT_TICK = 180, ROLLBACK_TICK = 200 /* at this tick's start all go back to that tick's start */
};

/* A batch of tokens as the layer's projections make them: g and beta are raw, softplus, sigmoid and l2norm happen inside. */
typedef struct batch {
    uint16_t q[MAX_ROWS][HEADS_QK][D], k[MAX_ROWS][HEADS_QK][D], v[MAX_ROWS][HEADS_V][D]; /* bfloat16 */
    uint16_t a[MAX_ROWS][HEADS_V], b[MAX_ROWS][HEADS_V];
    uint16_t o[MAX_ROWS][HEADS_V][D];
} batch;

typedef struct slots {
    int32_t in[AGENTS], out[AGENTS];
} slots;

typedef struct weights {
    float A_log[HEADS_V], dt_bias[HEADS_V];
} weights;

static void must(fqla_status status) {
    if (status == FQLA_OK) return;
    fprintf(stderr, "%s: %s\n", fqla_status_name(status), fqla_status_string(status));
    exit(1);
}

static void log_line(fqla_log_level level, const char *message, void *user) {
    (void)level, (void)user;
    fprintf(stderr, "%s\n", message);
}

static fqla_backend backend_of(int argc, char **argv) {
    if (argc == 1) return FQLA_BACKEND_AUTO;
    if (argc == 3 && strcmp(argv[1], "--backend") == 0) {
        if (strcmp(argv[2], "auto") == 0) return FQLA_BACKEND_AUTO;
        if (strcmp(argv[2], "cpu") == 0) return FQLA_BACKEND_CPU;
        if (strcmp(argv[2], "cuda") == 0) return FQLA_BACKEND_CUDA;
    }
    fprintf(stderr, "usage: %s [--backend auto|cpu|cuda]\n", argv[0]);
    exit(2);
}

static double now_us(void) {
#if defined(_WIN32)
    LARGE_INTEGER count, frequency;
    QueryPerformanceCounter(&count);
    QueryPerformanceFrequency(&frequency);
    return 1e6 * (double)count.QuadPart / (double)frequency.QuadPart;
#else
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e6 * (double)t.tv_sec + 1e-3 * (double)t.tv_nsec;
#endif
}

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Fill `rows` rows with what the agents see at `tick`: made of the tick's number alone, so that a tick can be lived again. */
static void observe(batch *x, size_t rows, uint32_t tick) {
    uint16_t *tensors[] = { &x->q[0][0][0], &x->k[0][0][0], &x->v[0][0][0], &x->a[0][0], &x->b[0][0] };
    const size_t widths[] = { HEADS_QK * D, HEADS_QK * D, HEADS_V * D, HEADS_V, HEADS_V };
    uint32_t random = 0x9e3779b9u * (tick + 1);
    for (int i = 0; i < 5; i++)
        for (size_t j = 0; j < rows * widths[i]; j++) {
            random = random * 1664525u + 1013904223u;
            const float value = (float)(random >> 8) / 8388608.0f - 1.0f; /* uniform in [-1, 1) */
            uint32_t bits;
            memcpy(&bits, &value, 4);
            tensors[i][j] = (uint16_t)(bits >> 16);
        }
}

/* Copy the first `rows` rows of a batch to where the backend reads them. `to` is on a GPU good for addresses alone. */
static void upload(fqla_context *context, batch *to, const batch *from, size_t rows) {
    must(fqla_upload(context, to->q, from->q, rows * sizeof from->q[0], NULL));
    must(fqla_upload(context, to->k, from->k, rows * sizeof from->k[0], NULL));
    must(fqla_upload(context, to->v, from->v, rows * sizeof from->v[0], NULL));
    must(fqla_upload(context, to->a, from->a, rows * sizeof from->a[0], NULL));
    must(fqla_upload(context, to->b, from->b, rows * sizeof from->b[0], NULL));
}

static void *allocate(fqla_context *context, size_t bytes) {
    void *pointer;
    must(fqla_alloc(context, bytes, &pointer));
    return pointer;
}

typedef struct world {
    fqla_context *context;
    fqla_plan *plan;
    int32_t live[AGENTS], saved[AGENTS]; /* the slot that an agent lives in, and the slot of its snapshot */
    float *pool;                         /* [2 * AGENTS, HEADS_V, D, D]; this and the next three lie where the backend works */
    batch *x;
    slots *s;
    weights *w;
} world;

/* All agents read their histories at once: rows as cu_seqlens has them, each from nothing (-1) into its slot. */
static void remember(world *u, const batch *seen, size_t rows) {
    const batch *x = u->x;
    slots s;
    for (int n = 0; n < AGENTS; n++) {
        s.in[n] = -1;
        s.out[n] = u->live[n];
    }
    upload(u->context, u->x, seen, rows);
    must(fqla_upload(u->context, u->s, &s, sizeof s, NULL));
    must(fqla_forward(u->plan, &(fqla_forward_args){ .q = x->q, .k = x->k, .v = x->v, .g = x->a, .beta = x->b, .o = u->x->o,
                                                     .A_log = u->w->A_log, .dt_bias = u->w->dt_bias, .h0 = u->pool, .ht = u->pool,
                                                     .state_in = u->s->in, .state_out = u->s->out }, NULL));
    must(fqla_synchronize(u->context, NULL));
}

typedef enum how { IN_PLACE, TAKE_SNAPSHOT, FROM_SNAPSHOT } how;

/* One token of every agent: row n is agent n's. What it does about it comes back in the batch's o. */
static void live_a_tick(world *u, batch *seen, how tick) {
    const batch *x = u->x;
    slots s;
    for (int n = 0; n < AGENTS; n++) {
        if (tick == TAKE_SNAPSHOT) { /* leave the state where it is, live on in the other slot */
            const int32_t left = u->live[n];
            u->live[n] = u->saved[n];
            u->saved[n] = left;
        }
        s.in[n] = tick == IN_PLACE ? u->live[n] : u->saved[n];
        s.out[n] = u->live[n];
    }
    upload(u->context, u->x, seen, AGENTS);
    must(fqla_upload(u->context, u->s, &s, sizeof s, NULL));
    must(fqla_decode(u->plan, &(fqla_decode_args){ .q = x->q, .k = x->k, .v = x->v, .g = x->a, .beta = x->b, .o = u->x->o,
                                                   .A_log = u->w->A_log, .dt_bias = u->w->dt_bias, .h0 = u->pool, .ht = u->pool,
                                                   .state_in = u->s->in, .state_out = u->s->out }, NULL));
    must(fqla_download(u->context, seen->o, x->o, AGENTS * sizeof x->o[0], NULL)); /* waits for the decode */
}

int main(int argc, char **argv) {
    static batch seen;
    static uint16_t first_time[ROLLBACK_TICK - SNAPSHOT_TICK][AGENTS][HEADS_V][D]; /* o of the ticks that are lived twice */
    static double tick_us[TICKS];
    static const weights layer = { { 0.0f, -1.0f, -2.0f, -3.0f }, { 0.5f, 0.0f, -0.5f, -1.0f } };
    const size_t pool_bytes = (size_t)2 * AGENTS * HEADS_V * D * D * sizeof(float);
    int32_t cu_seqlens[AGENTS + 1] = { 0 };
    bool rolled_back = false, same = true;
    fqla_context_summary summary;
    world u;

    must(fqla_context_create(&(fqla_context_desc){ .backend = backend_of(argc, argv), .log = log_line }, &u.context));
    must(fqla_context_info(u.context, &summary));
    for (int n = 0; n < AGENTS; n++) {
        cu_seqlens[n + 1] = cu_seqlens[n] + 10 + n * 71 % 190;
        u.live[n] = n;
        u.saved[n] = AGENTS + n;
    }
    /* One plan serves the histories and the ticks: a decode takes num_seqs tokens whatever cu_seqlens says. */
    must(fqla_plan_create(u.context, &(fqla_plan_desc){ .heads_qk = HEADS_QK, .heads_v = HEADS_V, .num_seqs = AGENTS,
                                                        .cu_seqlens = cu_seqlens, .pool_size = 2 * AGENTS, .gate = FQLA_GATE_RAW,
                                                        .beta = FQLA_BETA_SIGMOID, .l2norm = 1 }, &u.plan));
    u.pool = allocate(u.context, pool_bytes);
    u.x = allocate(u.context, sizeof *u.x);
    u.s = allocate(u.context, sizeof *u.s);
    u.w = allocate(u.context, sizeof *u.w);
    must(fqla_upload(u.context, u.w, &layer, sizeof layer, NULL));
    printf("%d agents, heads %d/%d, %.0f MiB of states, on the ", AGENTS, HEADS_QK, HEADS_V, (double)pool_bytes / 1048576);
    if (summary.backend == FQLA_BACKEND_CUDA) printf("GPU\n");
    else printf("CPU, %d threads\n", (int)summary.num_threads);

    const size_t rows = (size_t)cu_seqlens[AGENTS];
    observe(&seen, rows, TICKS);
    double start = now_us();
    remember(&u, &seen, rows);
    printf("histories of 10 to 199 tokens, %d in all, in one call: %.2f ms\n", (int)rows, (now_us() - start) / 1e3);

    for (int tick = 0; tick < TICKS; tick++) {
        if (tick == ROLLBACK_TICK && !rolled_back) {
            tick = SNAPSHOT_TICK;
            rolled_back = true;
        }
        observe(&seen, AGENTS, (uint32_t)tick);
        start = now_us();
        live_a_tick(&u, &seen, tick != SNAPSHOT_TICK ? IN_PLACE : rolled_back ? FROM_SNAPSHOT : TAKE_SNAPSHOT);
        tick_us[tick] = now_us() - start;
        if (tick < SNAPSHOT_TICK || tick >= ROLLBACK_TICK) continue;
        if (!rolled_back) memcpy(first_time[tick - SNAPSHOT_TICK], seen.o, sizeof first_time[0]);
        else same = same && memcmp(first_time[tick - SNAPSHOT_TICK], seen.o, sizeof first_time[0]) == 0;
    }
    printf("rolled back from tick %d to %d and lived on: %s\n", ROLLBACK_TICK, SNAPSHOT_TICK,
           same ? "the same bits" : "OTHER BITS");

    qsort(tick_us, TICKS, sizeof tick_us[0], by_value);
    printf("a tick of all agents, copies in and out included: median %.0f us, worst %.0f us of %d\n", tick_us[TICKS / 2],
           tick_us[TICKS - 1], TICKS);

    void *all[] = { u.pool, u.x, u.s, u.w };
    for (int i = 0; i < 4; i++) must(fqla_free(u.context, all[i]));
    fqla_plan_destroy(u.plan);
    must(fqla_context_destroy(u.context));
    return same ? 0 : 1;
}
