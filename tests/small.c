/* A user's program, small enough for every compiler: C99 and C++11, one unit or two, with threads. A forward is checked against the
   token recurrence; a decode against that forward; a backward by what it must be worth: o and ht are linear in v and h0, so
   <do, o> + <dht, ht> = <dv, v> + <dh0, h0>. */
#include "flashqla.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HQK = 2, HV = 4, DK = 16, DV = 24, TOKENS = 100, FIRST = 70, STATE = HV * DK * DV };

static float q[TOKENS * HQK * DK], k[TOKENS * HQK * DK], v[TOKENS * HV * DV], g[TOKENS * HV], beta[TOKENS * HV], h0[2 * STATE];
static float o[TOKENS * HV * DV], ht[2 * STATE], grad_o[TOKENS * HV * DV], dht[2 * STATE];
static float dq[TOKENS * HQK * DK], dk[TOKENS * HQK * DK], dv[TOKENS * HV * DV], dg[TOKENS * HV], dbeta[TOKENS * HV],
    dh0[2 * STATE];

static void require(int true_, const char *what) {
    if (true_) return;
    printf("small: %s\n", what);
    exit(1);
}

static void log_to_stdout(fqla_log_level level, const char *message, void *user) {
    (void)level, (void)user;
    printf("    %s\n", message);
}

/* In [-size, size). */
static void fill(float *values, int count, float size) {
    static unsigned int state = 1;
    int i;
    for (i = 0; i < count; i++) {
        state = state * 1664525u + 1013904223u;
        values[i] = size * ((float)(state >> 8) / 8388608.0f - 1.0f);
    }
}

static double dot(const float *a, const float *b, int count) {
    double sum = 0.0;
    int i;
    for (i = 0; i < count; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}

/* The recurrence for one head of tokens first .. last - 1; the worst difference to o and ht. */
static double head_error(int h, int first, int last, const float *from, const float *to) {
    double S[DK * DV], worst = 0.0;
    int t, i, j;
    for (i = 0; i < DK * DV; i++) S[i] = (double)from[h * DK * DV + i];
    for (t = first; t < last; t++) {
        const float *key = k + (t * HQK + h / 2) * DK, *query = q + (t * HQK + h / 2) * DK;
        const double alpha = exp((double)g[t * HV + h]), b = (double)beta[t * HV + h];
        for (j = 0; j < DV; j++) {
            double error = (double)v[(t * HV + h) * DV + j], out = 0.0;
            for (i = 0; i < DK; i++) error -= alpha * S[i * DV + j] * (double)key[i];
            for (i = 0; i < DK; i++) {
                S[i * DV + j] = alpha * S[i * DV + j] + b * (double)key[i] * error;
                out += S[i * DV + j] * (double)query[i] * 0.25;
            }
            worst = fmax(worst, fabs(out - (double)o[(t * HV + h) * DV + j]));
        }
    }
    for (i = 0; i < DK * DV; i++) worst = fmax(worst, fabs(S[i] - (double)to[h * DK * DV + i]));
    return worst;
}

static void run(int32_t num_threads) {
    static const int32_t cu_seqlens[3] = { 0, FIRST, TOKENS };
    fqla_context_desc context_desc;
    fqla_context *context = NULL;
    fqla_plan_desc plan_desc;
    fqla_plan *plan = NULL;
    fqla_plan_summary summary;
    fqla_forward_args forward;
    fqla_backward_args backward;
    double worth, gradient;
    int n, h;
    memset(&context_desc, 0, sizeof context_desc);
    context_desc.backend = FQLA_BACKEND_CPU;
    context_desc.num_threads = num_threads;
    context_desc.log = log_to_stdout;
    require(fqla_context_create(&context_desc, &context) == FQLA_OK, "no context");
    memset(&plan_desc, 0, sizeof plan_desc);
    plan_desc.heads_qk = HQK, plan_desc.heads_v = HV, plan_desc.dim_k = DK, plan_desc.dim_v = DV;
    plan_desc.num_seqs = 2, plan_desc.cu_seqlens = cu_seqlens;
    plan_desc.dtype = FQLA_DTYPE_FP32;
    plan_desc.backward = 1;
    require(fqla_plan_create(context, &plan_desc, &plan) == FQLA_OK, "no plan");
    require(fqla_plan_info(plan, &summary) == FQLA_OK, "no summary");
    memset(&forward, 0, sizeof forward);
    forward.q = q, forward.k = k, forward.v = v, forward.g = g, forward.beta = beta, forward.h0 = h0, forward.o = o,
        forward.ht = ht;
    require(fqla_forward(plan, &forward, NULL) == FQLA_OK, "the forward failed");
    for (n = 0; n < 2; n++)
        for (h = 0; h < HV; h++)
            require(head_error(h, cu_seqlens[n], cu_seqlens[n + 1], h0 + n * STATE, ht + n * STATE) < 1.0e-5,
                    "the forward is wrong");
    memset(&backward, 0, sizeof backward);
    backward.q = q, backward.k = k, backward.v = v, backward.g = g, backward.beta = beta, backward.h0 = h0;
    backward.do_ = grad_o, backward.dht = dht;
    backward.dq = dq, backward.dk = dk, backward.dv = dv, backward.dg = dg, backward.dbeta = dbeta, backward.dh0 = dh0;
    require(fqla_backward(plan, &backward, NULL) == FQLA_OK, "the backward failed");
    worth = dot(grad_o, o, TOKENS * HV * DV) + dot(dht, ht, 2 * STATE);
    gradient = dot(dv, v, TOKENS * HV * DV) + dot(dh0, h0, 2 * STATE);
    require(fabs(worth - gradient) < 1.0e-4 * (1.0 + fabs(worth)), "the backward is wrong");
    forward.q = NULL;
    require(fqla_forward(plan, &forward, NULL) == FQLA_ERROR_NULL_POINTER, "a NULL was taken");
    printf("%s with %d threads: o[0] %.9g, <do, o> + <dht, ht> %.9g\n", summary.forward, (int)num_threads, (double)o[0], worth);
    fqla_plan_destroy(plan);
    require(fqla_context_destroy(context) == FQLA_OK, "the context is not destroyed");
}

/* Eight tokens of one sequence in one decode: the forward's first eight rows. */
static void decode(void) {
    static const int32_t cu_seqlens[2] = { 0, 0 };
    static float out[8 * HV * DV];
    fqla_context *context = NULL;
    fqla_context_desc context_desc;
    fqla_plan_desc plan_desc;
    fqla_decode_args args;
    fqla_plan *plan = NULL;
    int i;
    memset(&context_desc, 0, sizeof context_desc);
    memset(&plan_desc, 0, sizeof plan_desc);
    memset(&args, 0, sizeof args);
    context_desc.backend = FQLA_BACKEND_CPU;
    require(fqla_context_create(&context_desc, &context) == FQLA_OK, "no context");
    plan_desc.heads_qk = HQK, plan_desc.heads_v = HV, plan_desc.dim_k = DK, plan_desc.dim_v = DV;
    plan_desc.num_seqs = 1, plan_desc.cu_seqlens = cu_seqlens;
    plan_desc.dtype = FQLA_DTYPE_FP32;
    require(fqla_plan_create(context, &plan_desc, &plan) == FQLA_OK, "no plan");
    args.num_tokens = 8;
    args.q = q, args.k = k, args.v = v, args.g = g, args.beta = beta, args.h0 = h0, args.o = out;
    require(fqla_decode(plan, &args, NULL) == FQLA_OK, "the decode failed");
    for (i = 0; i < 8 * HV * DV; i++) require(fabs((double)out[i] - (double)o[i]) < 1.0e-5, "the decode is wrong");
    fqla_plan_destroy(plan);
    require(fqla_context_destroy(context) == FQLA_OK, "the context is not destroyed");
}

int main(void) {
    fqla_context_desc context_desc;
    static float single[TOKENS * HV * DV];
    fqla_context *context = NULL;
    fqla_context_summary summary;
    int i;
    memset(&context_desc, 0, sizeof context_desc);
    fill(q, TOKENS * HQK * DK, 0.4f), fill(k, TOKENS * HQK * DK, 0.4f), fill(v, TOKENS * HV * DV, 1.0f), fill(h0, 2 * STATE, 1.0f);
    fill(g, TOKENS * HV, 0.5f), fill(beta, TOKENS * HV, 0.5f), fill(grad_o, TOKENS * HV * DV, 1.0f), fill(dht, 2 * STATE, 1.0f);
    for (i = 0; i < TOKENS * HV; i++) g[i] -= 0.5f, beta[i] += 0.5f;
    run(1);
    for (i = 0; i < TOKENS * HV * DV; i++) single[i] = o[i];
    run(3);
    for (i = 0; i < TOKENS * HV * DV; i++) require(single[i] >= o[i] && single[i] <= o[i], "threads change the bits");
    decode();
    require(fqla_context_create(&context_desc, &context) == FQLA_OK, "the default context fails"); /* a GPU, or the CPU and why */
    require(fqla_context_info(context, &summary) == FQLA_OK, "no summary");
    printf("CUDA: %s\n", summary.cuda_status);
    require(fqla_context_destroy(context) == FQLA_OK, "the context is not destroyed");
    return 0;
}
