/* The oracle itself: against golden files that were made elsewhere, and its reverse against central differences of its forward. The
   golden files then go through the library too. */
#include "../tools/safetensors.h"
#include "case.h"
#include "greatest.h"
#include "oracle.h"
#include <math.h>
#include <stdlib.h>

static const char *const golden_files[] = { "one_token", "same_keys", "mixed_gate" };

/* ---- golden files */

static bool golden_open(const char *name, safetensors *file) {
    char path[128], error[ERROR_SIZE];
    snprintf(path, sizeof path, "tests/golden/%s.safetensors", name);
    if (safetensors_read(path, file, error)) return true;
    printf("\n%s: %s\n", path, error);
    return false;
}

/* A tensor as doubles; NULL where there is none. */
static double *golden_read(const safetensors *file, const char *name) {
    const safetensors_tensor *t = safetensors_find(file, name);
    const size_t count = t != NULL ? (size_t)safetensors_elements(t) : 0;
    float *values = (float *)malloc(count * sizeof *values + 1);
    double *out = (double *)malloc(count * sizeof *out + 1);
    size_t i;
    if (t == NULL) return free(values), free(out), NULL;
    safetensors_to_float(t, values);
    for (i = 0; i < count; i++) out[i] = (double)values[i];
    free(values);
    return out;
}

static double relative_error(const double *expected, const double *got, int64_t count) {
    double error = 0.0, norm = 0.0;
    int64_t i;
    for (i = 0; i < count; i++) {
        error += (got[i] - expected[i]) * (got[i] - expected[i]);
        norm += expected[i] * expected[i];
    }
    return norm > 1e-12 ? sqrt(error / norm) : sqrt(error);
}

/* All these files: one sequence, head map div, states [K, V], gates as logs, dims 128. */
TEST oracle_gives_golden(const char *name) {
    static const char *const outputs[] = { "o", "ht", "dq", "dk", "dv", "dg", "dbeta", "dh0" };
    double *got[8];
    safetensors file;
    oracle p = { .scale = 0.0 };
    const safetensors_tensor *q, *v;
    int i;
    ASSERT(golden_open(name, &file));
    q = safetensors_find(&file, "q");
    v = safetensors_find(&file, "v");
    ASSERT(q != NULL && v != NULL);
    p.len = (int)q->shape[0], p.heads_qk = (int)q->shape[1], p.dim_k = (int)q->shape[2];
    p.heads_v = (int)v->shape[1], p.dim_v = (int)v->shape[2];
    p.scale = strtod(safetensors_metadata(&file, "scale"), NULL);
    p.q = golden_read(&file, "q"), p.k = golden_read(&file, "k"), p.v = golden_read(&file, "v");
    p.g = golden_read(&file, "g"), p.beta = golden_read(&file, "beta"), p.do_ = golden_read(&file, "do");
    p.h0 = golden_read(&file, "h0"), p.dht = golden_read(&file, "dht");
    for (i = 0; i < 8; i++) {
        ASSERT(safetensors_find(&file, outputs[i]) != NULL);
        got[i] = (double *)calloc((size_t)safetensors_elements(safetensors_find(&file, outputs[i])), sizeof *got[i]);
    }
    p.o = got[0], p.ht = got[1], p.dq = got[2], p.dk = got[3], p.dv = got[4], p.dg = got[5], p.dbeta = got[6], p.dh0 = got[7];
    oracle_forward(&p);
    oracle_backward(&p);
    for (i = 0; i < 8; i++) {
        double *expected = golden_read(&file, outputs[i]);
        const int64_t count = safetensors_elements(safetensors_find(&file, outputs[i]));
        ASSERT_IN_RANGEm(outputs[i], 0.0, relative_error(expected, got[i], count), 1.0e-7); /* what float32 rounding leaves */
        free(expected), free(got[i]);
    }
    free((void *)p.q), free((void *)p.k), free((void *)p.v), free((void *)p.g), free((void *)p.beta), free((void *)p.do_);
    free((void *)p.h0), free((void *)p.dht);
    safetensors_free(&file);
    PASS();
}

/* The file's inputs instead of a case's random ones. */
static void set_from_golden(test_case *c, const safetensors *file, const char *name, case_tensor_name tensor) {
    double *values = golden_read(file, name);
    const case_tensor *t = &c->t[tensor];
    int64_t r, h, i;
    if (values == NULL || t->buffer == NULL) return;
    for (r = 0; r < t->rows; r++)
        for (h = 0; h < t->heads; h++)
            for (i = 0; i < t->dim; i++) case_set(c, tensor, r, h, i, values[(r * t->heads + h) * t->dim + i]);
    free(values);
}

TEST library_gives_golden(const char *name) {
    static test_case c;
    safetensors file;
    case_spec spec = { .name = name, .plan = { .backward = 1 }, .same_keys = strcmp(name, "same_keys") == 0 };
    ASSERT(golden_open(name, &file));
    spec.plan.heads_qk = (int32_t)safetensors_find(&file, "q")->shape[1];
    spec.plan.heads_v = (int32_t)safetensors_find(&file, "v")->shape[1];
    spec.plan.scale = strtof(safetensors_metadata(&file, "scale"), NULL);
    spec.lens[0] = (int32_t)safetensors_find(&file, "q")->shape[0];
    spec.no_h0 = safetensors_find(&file, "h0") == NULL;
    ASSERT_EQ(FQLA_OK, case_open(&c, test_shared(), &test_shared_host, &spec));
    set_from_golden(&c, &file, "q", T_Q);
    set_from_golden(&c, &file, "k", T_K);
    set_from_golden(&c, &file, "v", T_V);
    set_from_golden(&c, &file, "g", T_G);
    set_from_golden(&c, &file, "beta", T_BETA);
    set_from_golden(&c, &file, "h0", T_H0);
    set_from_golden(&c, &file, "do", T_DO);
    set_from_golden(&c, &file, "dht", T_DHT);
    ASSERT_EQ(FQLA_OK, case_run(&c));
    ASSERT_SILENT(case_compare(&c)); /* with the oracle, which equals the file: see above */
    ASSERT_EQ(FQLA_OK, case_run_backward(&c));
    ASSERT_SILENT(case_compare_backward(&c));
    case_close(&c);
    safetensors_free(&file);
    PASS();
}

/* ---- central differences */

enum { LEN = 5, HQK = 2, HV = 4, DK = 3, DV = 2, MOST = LEN * HV * DK * DV };

typedef struct tiny {
    double q[LEN * HQK * DK], k[LEN * HQK * DK], v[LEN * HV * DV], g[LEN * HV], beta[LEN * HV], A_log[HV], dt_bias[HV],
        h0[HV * DK * DV], do_[LEN * HV * DV], dht[HV * DK * DV];
    double o[LEN * HV * DV], ht[HV * DK * DV];
    oracle p;
} tiny;

static double loss(tiny *t) {
    double sum = 0.0;
    int i;
    oracle_forward(&t->p);
    for (i = 0; i < LEN * HV * DV; i++) sum += t->o[i] * t->do_[i];
    for (i = 0; i < HV * DK * DV; i++) sum += t->ht[i] * t->dht[i];
    return sum;
}

static void fill(double *values, int count, double size, uint64_t *random) {
    int i;
    for (i = 0; i < count; i++) values[i] = size * case_normal(random);
}

static void tiny_make(tiny *t, fqla_gate gate, fqla_beta beta, int negative, int l2norm, fqla_head_map map) {
    uint64_t random = 42;
    int i;
    memset(t, 0, sizeof *t);
    fill(t->q, LEN * HQK * DK, 0.6, &random), fill(t->k, LEN * HQK * DK, 0.6, &random), fill(t->v, LEN * HV * DV, 1.0, &random);
    fill(t->beta, LEN * HV, 1.0, &random), fill(t->A_log, HV, 0.5, &random), fill(t->dt_bias, HV, 0.5, &random);
    fill(t->h0, HV * DK * DV, 1.0, &random), fill(t->do_, LEN * HV * DV, 1.0, &random), fill(t->dht, HV * DK * DV, 1.0, &random);
    fill(t->g, LEN * HV, 1.0, &random);
    for (i = 0; i < LEN * HV; i++) {
        if (gate == FQLA_GATE_LOG) t->g[i] = -fabs(t->g[i]);
        if (beta == FQLA_BETA_PLAIN) t->beta[i] = 1.0 / (1.0 + exp(-t->beta[i]));
    }
    t->p = (oracle){ .len = LEN, .heads_qk = HQK, .heads_v = HV, .dim_k = DK, .dim_v = DV, .head_map = map, .gate = gate,
                     .beta_form = beta,
                     .negative_eigenvalues = negative, .l2norm = l2norm, .scale = 0.7, .q = t->q, .k = t->k, .v = t->v, .g = t->g,
                     .beta = t->beta, .A_log = t->A_log, .dt_bias = t->dt_bias, .h0 = t->h0, .do_ = t->do_, .dht = t->dht,
                         .o = t->o, .ht = t->ht };
}

TEST reverse_is_the_gradient(fqla_gate gate, fqla_beta beta, int negative, int l2norm, fqla_head_map map) {
    static tiny t;
    static double gradients[8][MOST];
    const double step = 1.0e-5;
    struct { const char *name; double *input, *gradient; int count; } inputs[8];
    int which, i;
    tiny_make(&t, gate, beta, negative, l2norm, map);
    memset(gradients, 0, sizeof gradients);
    t.p.dq = gradients[0], t.p.dk = gradients[1], t.p.dv = gradients[2], t.p.dg = gradients[3], t.p.dbeta = gradients[4];
    t.p.dh0 = gradients[5], t.p.dA_log = gradients[6], t.p.ddt_bias = gradients[7];
    oracle_backward(&t.p);
    inputs[0].name = "dq", inputs[0].input = t.q, inputs[0].count = LEN * HQK * DK;
    inputs[1].name = "dk", inputs[1].input = t.k, inputs[1].count = LEN * HQK * DK;
    inputs[2].name = "dv", inputs[2].input = t.v, inputs[2].count = LEN * HV * DV;
    inputs[3].name = "dg", inputs[3].input = t.g, inputs[3].count = LEN * HV;
    inputs[4].name = "dbeta", inputs[4].input = t.beta, inputs[4].count = LEN * HV;
    inputs[5].name = "dh0", inputs[5].input = t.h0, inputs[5].count = HV * DK * DV;
    inputs[6].name = "dA_log", inputs[6].input = t.A_log, inputs[6].count = gate == FQLA_GATE_RAW ? HV : 0;
    inputs[7].name = "ddt_bias", inputs[7].input = t.dt_bias, inputs[7].count = gate == FQLA_GATE_RAW ? HV : 0;
    for (which = 0; which < 8; which++)
        for (i = 0; i < inputs[which].count; i++) {
            const double value = inputs[which].input[i];
            double above, below;
            inputs[which].input[i] = value + step, above = loss(&t);
            inputs[which].input[i] = value - step, below = loss(&t);
            inputs[which].input[i] = value;
            ASSERT_IN_RANGEm(inputs[which].name, (above - below) / (2.0 * step), gradients[which][i], 1.0e-8);
        }
    PASS();
}

/* Every v-head alone, with the q/k head that the map names, gives what it gives among the others. */
TEST head_maps(fqla_head_map map) {
    static tiny t, one;
    double v[LEN * DV], q[LEN * DK], k[LEN * DK], g[LEN], beta[LEN];
    int h, at, i;
    tiny_make(&t, FQLA_GATE_LOG, FQLA_BETA_PLAIN, 0, 0, map);
    oracle_forward(&t.p);
    for (h = 0; h < HV; h++) {
        const int from = map == FQLA_HEAD_MAP_DIV ? h / 2 : h % 2;
        tiny_make(&one, FQLA_GATE_LOG, FQLA_BETA_PLAIN, 0, 0, map);
        for (at = 0; at < LEN; at++) {
            for (i = 0; i < DV; i++) v[at * DV + i] = t.v[(at * HV + h) * DV + i];
            for (i = 0; i < DK; i++) {
                q[at * DK + i] = t.q[(at * HQK + from) * DK + i];
                k[at * DK + i] = t.k[(at * HQK + from) * DK + i];
            }
            g[at] = t.g[at * HV + h], beta[at] = t.beta[at * HV + h];
        }
        one.p.heads_qk = one.p.heads_v = 1;
        one.p.q = q, one.p.k = k, one.p.v = v, one.p.g = g, one.p.beta = beta, one.p.h0 = t.h0 + h * DK * DV;
        oracle_forward(&one.p);
        for (at = 0; at < LEN; at++)
            for (i = 0; i < DV; i++) ASSERT_EQ_FMT(t.o[(at * HV + h) * DV + i], one.o[at * DV + i], "%.17g");
    }
    PASS();
}

/* Linear alpha is the exponential of log alpha; two snapshots out of five tokens are the states of shorter runs. */
TEST linear_gates_and_snapshots(void) {
    static tiny t, linear;
    double snapshots[2 * HV * DK * DV];
    int i;
    tiny_make(&t, FQLA_GATE_LOG, FQLA_BETA_PLAIN, 0, 1, FQLA_HEAD_MAP_DIV);
    tiny_make(&linear, FQLA_GATE_LINEAR, FQLA_BETA_PLAIN, 0, 1, FQLA_HEAD_MAP_DIV);
    for (i = 0; i < LEN * HV; i++) linear.g[i] = exp(t.g[i]);
    t.p.snapshot_every = 2;
    t.p.snapshots = snapshots;
    oracle_forward(&t.p);
    oracle_forward(&linear.p);
    ASSERT_MEM_EQ(t.o, linear.o, sizeof t.o);
    linear.p.len = 2;
    oracle_forward(&linear.p);
    ASSERT_MEM_EQ(snapshots, linear.ht, sizeof linear.ht);
    linear.p.len = 4;
    oracle_forward(&linear.p);
    ASSERT_MEM_EQ(snapshots + HV * DK * DV, linear.ht, sizeof linear.ht);
    PASS();
}

SUITE(oracle_and_golden) {
    size_t i;
    for (i = 0; i < sizeof golden_files / sizeof golden_files[0]; i++) {
        greatest_set_test_suffix(golden_files[i]);
        RUN_TESTp(oracle_gives_golden, golden_files[i]);
        greatest_set_test_suffix(golden_files[i]);
        RUN_TESTp(library_gives_golden, golden_files[i]);
    }
    RUN_TESTp(reverse_is_the_gradient, FQLA_GATE_LOG, FQLA_BETA_PLAIN, 0, 0, FQLA_HEAD_MAP_DIV);
    RUN_TESTp(reverse_is_the_gradient, FQLA_GATE_LOG, FQLA_BETA_SIGMOID, 0, 1, FQLA_HEAD_MAP_MOD);
    RUN_TESTp(reverse_is_the_gradient, FQLA_GATE_RAW, FQLA_BETA_PLAIN, 0, 1, FQLA_HEAD_MAP_DIV);
    RUN_TESTp(reverse_is_the_gradient, FQLA_GATE_RAW, FQLA_BETA_SIGMOID, 1, 0, FQLA_HEAD_MAP_MOD);
    RUN_TESTp(head_maps, FQLA_HEAD_MAP_DIV);
    RUN_TESTp(head_maps, FQLA_HEAD_MAP_MOD);
    RUN_TEST(linear_gates_and_snapshots);
}
