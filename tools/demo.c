/* What `sh tools/setup.sh demo` shows: a prefill of 8192 tokens at heads 16/32, then 200 decode steps that go on from its state,
   timed, and two of the heads held against the token recurrence in float64, over all 8392 tokens. */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#endif
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define FLASHQLA_IMPLEMENTATION
#include "../flashqla.h"

enum { PROMPT = 8192, STEPS = 200, T = PROMPT + STEPS, HEADS_QK = 16, HEADS_V = 32, D = 128, PREFILLS = 5 };

/* A layer's tensors for prompt and answer together; on a GPU a struct of these is good for addresses alone. */
typedef struct tensors {
    uint16_t q[T][HEADS_QK][D], k[T][HEADS_QK][D], v[T][HEADS_V][D], o[T][HEADS_V][D]; /* bfloat16 */
    float g[T][HEADS_V], beta[T][HEADS_V];
    float state[HEADS_V][D][D];
} tensors;

static void must(fqla_status status) {
    if (status == FQLA_OK) return;
    fprintf(stderr, "demo: %s: %s\n", fqla_status_name(status), fqla_status_string(status));
    exit(1);
}

static double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec;
}

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Uniform in [0, 1), the same numbers on every machine. */
static float uniform(void) {
    static uint64_t x = 1;
    x = x * 6364136223846793005u + 1442695040888963407u;
    return (float)(x >> 40) / 16777216.0f;
}

static uint16_t to_bf16(float x) { uint32_t bits; memcpy(&bits, &x, 4); return (uint16_t)((bits + 0x8000u) >> 16); }
static float from_bf16(uint16_t x) { uint32_t bits = (uint32_t)x << 16; float y; memcpy(&y, &bits, 4); return y; }

static void fill(uint16_t *x, size_t count) {
    for (size_t i = 0; i < count; i++) x[i] = to_bf16(2 * uniform() - 1);
}

/* x / sqrt(sum x^2 + 1e-6), as the plan's l2norm does. */
static void normalised(double *y, const uint16_t *x) {
    double sum = 1e-6;
    for (int d = 0; d < D; d++) sum += (double)from_bf16(x[d]) * from_bf16(x[d]);
    for (int d = 0; d < D; d++) y[d] = from_bf16(x[d]) / sqrt(sum);
}

typedef struct error {
    double difference, norm; /* sums of squares */
} error;

static void compare(error *e, double value, double reference) {
    e->difference += (value - reference) * (value - reference);
    e->norm += reference * reference;
}

static double relative(error e) { return sqrt(e.difference / e.norm); }

/* The recurrence of one v-head as flashqla.h states it, in float64; adds up how far o and the last state are from it. */
static void check_head(const tensors *x, int h, error *prefill_o, error *decode_o, error *state) {
    static double S[D][D];
    memset(S, 0, sizeof S);
    for (int t = 0; t < T; t++) {
        const double alpha = exp((double)x->g[t][h]), beta = (double)x->beta[t][h];
        double q[D], k[D], w[D] = { 0 }, o[D] = { 0 };
        normalised(q, x->q[t][h / (HEADS_V / HEADS_QK)]);
        normalised(k, x->k[t][h / (HEADS_V / HEADS_QK)]);
        for (int i = 0; i < D; i++)
            for (int j = 0; j < D; j++) w[j] += k[i] * (S[i][j] *= alpha);
        for (int j = 0; j < D; j++) w[j] = beta * (from_bf16(x->v[t][h][j]) - w[j]);
        for (int i = 0; i < D; i++)
            for (int j = 0; j < D; j++) o[j] += q[i] * (S[i][j] += k[i] * w[j]);
        for (int j = 0; j < D; j++) compare(t < PROMPT ? prefill_o : decode_o, from_bf16(x->o[t][h][j]), o[j] / sqrt((double)D));
    }
    for (int i = 0; i < D; i++)
        for (int j = 0; j < D; j++) compare(state, (double)x->state[h][i][j], S[i][j]);
}

int main(void) {
    static tensors host;
    fill(&host.q[0][0][0], sizeof host.q / 2);
    fill(&host.k[0][0][0], sizeof host.k / 2);
    fill(&host.v[0][0][0], sizeof host.v / 2);
    for (int t = 0; t < T; t++)
        for (int h = 0; h < HEADS_V; h++) {
            host.g[t][h] = h % 4 == 0 ? 0.0f : -0.1f * uniform(); /* a quarter of the heads never forgets */
            host.beta[t][h] = uniform();
        }

    fqla_context *context;
    fqla_context_summary machine;
    fqla_plan *plan;
    fqla_plan_summary runs;
    const int32_t cu_seqlens[2] = { 0, PROMPT };
    must(fqla_context_create(&(fqla_context_desc){ 0 }, &context));
    must(fqla_context_info(context, &machine));
    must(fqla_plan_create(context, &(fqla_plan_desc){ .heads_qk = HEADS_QK, .heads_v = HEADS_V, .num_seqs = 1,
                                                      .cu_seqlens = cu_seqlens, .l2norm = 1 }, &plan));
    must(fqla_plan_info(plan, &runs));
    if (machine.backend == FQLA_BACKEND_CUDA) printf("on      %s\n", machine.device_name);
    else printf("on      the CPU, %d threads (CUDA: %s)\n", (int)machine.num_threads, machine.cuda_status);
    printf("code    prefill: %s; decode: %s\n", runs.forward, runs.decode);

    void *memory;
    must(fqla_alloc(context, sizeof host, &memory));
    must(fqla_upload(context, memory, &host, sizeof host, NULL));
    tensors *x = memory;

    double prefill_ms[PREFILLS], step_ms[STEPS];
    for (int i = -1; i < PREFILLS; i++) { /* one to warm up */
        const double start = now_ms();
        must(fqla_forward(plan, &(fqla_forward_args){ .q = x->q, .k = x->k, .v = x->v, .g = x->g, .beta = x->beta, .o = x->o,
                                                      .ht = x->state }, NULL));
        must(fqla_synchronize(context, NULL));
        if (i >= 0) prefill_ms[i] = now_ms() - start;
    }
    for (int i = 0; i < STEPS; i++) {
        const int t = PROMPT + i;
        const double start = now_ms();
        must(fqla_decode(plan, &(fqla_decode_args){ .q = x->q[t], .k = x->k[t], .v = x->v[t], .g = x->g[t], .beta = x->beta[t],
                                                    .o = x->o[t], .h0 = x->state, .ht = x->state }, NULL));
        must(fqla_synchronize(context, NULL));
        step_ms[i] = now_ms() - start;
    }
    must(fqla_download(context, &host, memory, sizeof host, NULL));
    qsort(prefill_ms, PREFILLS, sizeof prefill_ms[0], by_value);
    qsort(step_ms, STEPS, sizeof step_ms[0], by_value);
    printf("prefill %d tokens, heads %d/%d, bfloat16: %.2f ms (median of %d), %.0f tokens a second\n", PROMPT, HEADS_QK, HEADS_V,
           prefill_ms[PREFILLS / 2], PREFILLS, 1e3 * PROMPT / prefill_ms[PREFILLS / 2]);
    printf("decode  %d steps of one token: median %.1f us, worst %.1f us, each waited for\n", STEPS, 1e3 * step_ms[STEPS / 2],
           1e3 * step_ms[STEPS - 1]);

    error prefill_o = { 0, 0 }, decode_o = { 0, 0 }, state = { 0, 0 };
    check_head(&host, 0, &prefill_o, &decode_o, &state);
    check_head(&host, HEADS_V - 1, &prefill_o, &decode_o, &state);
    printf("exact   relative L2 error against float64, heads 0 and %d: o of the prefill %.1e, o of the decode %.1e (bfloat16 rounding\n"
           "        alone: 1.7e-03), state after %d tokens %.1e\n", HEADS_V - 1, relative(prefill_o), relative(decode_o), T,
           relative(state));

    must(fqla_free(context, memory));
    fqla_plan_destroy(plan);
    must(fqla_context_destroy(context));
    if (relative(prefill_o) < 1e-2 && relative(decode_o) < 1e-2 && relative(state) < 1e-2) return 0;
    fprintf(stderr, "demo: an error is over 1e-2: the results are wrong\n");
    return 1;
}
