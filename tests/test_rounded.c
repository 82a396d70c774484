/* What says how much 16-bit operands cost (rounded.h): its algebra is the oracle's, its roundings are those of the types. */
#include "case.h"
#include "greatest.h"
#include "rounded.h"
#include <math.h>
#include <stdlib.h>

enum { LEN = 130, HEADS_QK = 1, HEADS_V = 2, DIM = 128, STATE = HEADS_V * DIM * DIM };

TEST rounds_to_nearest_even(void) {
    ASSERT(rounded(1.0 + 0x1p-8, FQLA_DTYPE_BF16) == 1.0 && rounded(1.0 + 3 * 0x1p-8, FQLA_DTYPE_BF16) == 1.0 + 0x1p-6);
    ASSERT(rounded(-1.0 - 0x1p-11, FQLA_DTYPE_FP16) == -1.0 && rounded(1.0 + 3 * 0x1p-11, FQLA_DTYPE_FP16) == 1.0 + 0x1p-9);
    ASSERT(rounded(0x1p-25, FQLA_DTYPE_FP16) == 0.0 && rounded(3 * 0x1p-25, FQLA_DTYPE_FP16) == 0x1p-23); /* its smallest is 2^-24 */
    ASSERT(isinf(rounded(65520.0, FQLA_DTYPE_FP16)) && rounded(65519.0, FQLA_DTYPE_FP16) == 65504.0);
    ASSERT(rounded(0.1, FQLA_DTYPE_FP32) == 0.1 && rounded(0.0, FQLA_DTYPE_BF16) == 0.0);
    PASS();
}

static double *numbers(uint64_t *random, size_t count, double size) {
    double *out = (double *)calloc(count, sizeof *out);
    size_t i;
    if (out == NULL) abort();
    for (i = 0; i < count; i++) out[i] = size * case_normal(random);
    return out;
}

/* |a - b| / |b| */
static double apart(const double *a, const double *b, size_t count) {
    double error = 0.0, norm = 0.0;
    size_t i;
    for (i = 0; i < count; i++) error += (a[i] - b[i]) * (a[i] - b[i]), norm += b[i] * b[i];
    return sqrt(error / norm);
}

/* Two chunks and a part of one, of two heads of one q/k head. */
TEST nothing_rounded_is_the_oracle(fqla_gate gate, fqla_beta beta, int l2norm) {
    enum { QK = LEN * HEADS_QK * DIM, V = LEN * HEADS_V * DIM, GATES = LEN * HEADS_V };
    static const size_t counts[] = { V, STATE, QK, QK, V, GATES, GATES, STATE, HEADS_V, HEADS_V };
    enum { RESULTS = sizeof counts / sizeof counts[0] };
    uint64_t random = 77;
    double *q = numbers(&random, QK, 0.08), *k = numbers(&random, QK, 0.08), *v = numbers(&random, V, 1.0), *g = numbers(&random, GATES, 1.0),
           *b = numbers(&random, GATES, 1.0), *h0 = numbers(&random, STATE, 1.0), *dht = numbers(&random, STATE, 0.125),
           *grad_o = numbers(&random, V, 1.0), A_log[HEADS_V] = { -1.0, -3.0 }, dt_bias[HEADS_V] = { 0.5, -0.5 }, *results[2][RESULTS];
    size_t i;
    int way;
    for (i = 0; i < GATES; i++) {
        if (gate == FQLA_GATE_LOG) g[i] = -0.05 * fabs(g[i]);
        if (beta == FQLA_BETA_PLAIN) b[i] = 1.0 / (1.0 + exp(-b[i]));
    }
    if (beta == FQLA_BETA_PLAIN) b[5] = 1e-5; /* too small to divide by */
    for (way = 0; way < 2; way++) {
        double **const to = results[way];
        oracle p = { .len = LEN, .heads_qk = HEADS_QK, .heads_v = HEADS_V, .dim_k = DIM, .dim_v = DIM, .gate = gate, .beta_form = beta,
                     .l2norm = l2norm, .scale = -0.75, .q = q, .k = k, .v = v, .g = g, .beta = b, .A_log = A_log, .dt_bias = dt_bias, .h0 = h0,
                     .do_ = grad_o, .dht = dht };
        for (i = 0; i < RESULTS; i++) to[i] = numbers(&random, counts[i], 1.0);
        p.o = to[0], p.ht = to[1], p.dq = to[2], p.dk = to[3], p.dv = to[4], p.dg = to[5], p.dbeta = to[6], p.dh0 = to[7];
        p.dA_log = to[8], p.ddt_bias = to[9];
        if (way == 0) oracle_forward(&p), oracle_backward(&p);
        else rounded_forward(&p, FQLA_DTYPE_FP32), rounded_backward(&p, FQLA_DTYPE_FP32);
    }
    for (i = 0; i < (gate == FQLA_GATE_RAW ? RESULTS : RESULTS - 2); i++) ASSERT(apart(results[1][i], results[0][i], counts[i]) < 1e-10);
    for (way = 0; way < 2; way++)
        for (i = 0; i < RESULTS; i++) free(results[way][i]);
    free(q), free(k), free(v), free(g), free(b), free(h0), free(dht), free(grad_o);
    PASS();
}

SUITE(roundings) {
    RUN_TEST(rounds_to_nearest_even);
    greatest_set_test_suffix("plain");
    RUN_TESTp(nothing_rounded_is_the_oracle, FQLA_GATE_LOG, FQLA_BETA_PLAIN, 0);
    greatest_set_test_suffix("fused");
    RUN_TESTp(nothing_rounded_is_the_oracle, FQLA_GATE_RAW, FQLA_BETA_SIGMOID, 1);
}
