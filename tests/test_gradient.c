/* The backward of the CPU is the gradient of its forward: central differences of a number that depends on every output,
   L = <do, o> + <dht, ht>, through whole float32 forwards, L summed in float64. No oracle has a part in it. */
#include "case.h"
#include "greatest.h"
#include <math.h>

static const struct {
    case_tensor_name input, gradient;
    const char *name;
} inputs[] = { { T_Q, T_DQ, "dq" }, { T_K, T_DK, "dk" }, { T_V, T_DV, "dv" }, { T_G, T_DG, "dg" }, { T_BETA, T_DBETA, "dbeta" },
               { T_H0, T_DH0, "dh0" }, { T_A_LOG, T_DA_LOG, "dA_log" }, { T_DT_BIAS, T_DDT_BIAS, "ddt_bias" } };

static const case_spec specs[] = {
    { .name = "log", .plan = { .heads_qk = 1, .heads_v = 2, .num_seqs = 3, .scale = 0.6f }, .lens = { 70, 0, 3 }, .seed = 1 },
    { .name = "raw", .plan = { .heads_qk = 2, .heads_v = 4, .num_seqs = 2, .scale = -0.6f, .head_map = FQLA_HEAD_MAP_MOD,
                               .gate = FQLA_GATE_RAW, .beta = FQLA_BETA_SIGMOID, .negative_eigenvalues = 1, .l2norm = 1,
                               .state_layout = FQLA_STATE_VK }, .lens = { 5, 20 }, .rows = ROWS_GAPPED, .seed = 2 },
};

/* Copy a tensor's buffer to the backend, or back. */
static void upload(test_case *c, case_tensor_name name) {
    const case_buffer *buffer = c->t[name].buffer;
    if (fqla_upload(c->context, buffer->memory, buffer->before, buffer->size, NULL) != FQLA_OK) abort();
}

static void download(test_case *c, case_tensor_name name) {
    const case_buffer *buffer = c->t[name].buffer;
    if (fqla_download(c->context, buffer->after, buffer->memory, buffer->size, NULL) != FQLA_OK) abort();
}

/* <input, output>, of tensors of one shape. */
static double product(const test_case *c, case_tensor_name input, case_tensor_name output) {
    const case_tensor *t = &c->t[output];
    double sum = 0.0;
    int64_t r, h, i;
    for (r = 0; r < t->rows; r++)
        for (h = 0; h < t->heads; h++)
            for (i = 0; i < t->dim; i++) sum += case_input(c, input, r, h, i) * case_get(c, output, r, h, i);
    return sum;
}

/* L where one element is `value`. */
static double loss_at(test_case *c, case_tensor_name name, int64_t r, int64_t h, int64_t i, double value) {
    const fqla_forward_args args = case_forward_args(c);
    case_set(c, name, r, h, i, value);
    upload(c, name);
    if (fqla_forward(c->plan, &args, NULL) != FQLA_OK) abort();
    download(c, T_O);
    download(c, T_HT);
    return product(c, T_DO, T_O) + product(c, T_DHT, T_HT);
}

/* To fourth order: the step is large, so that float32 rounding of o and ht is small beside the difference. */
static double difference(test_case *c, case_tensor_name name, int64_t r, int64_t h, int64_t i) {
    const double at = case_input(c, name, r, h, i), step = 0.0625;
    const double near = loss_at(c, name, r, h, i, at + step) - loss_at(c, name, r, h, i, at - step);
    const double far = loss_at(c, name, r, h, i, at + 2.0 * step) - loss_at(c, name, r, h, i, at - 2.0 * step);
    case_set(c, name, r, h, i, at);
    upload(c, name);
    return (8.0 * near - far) / (12.0 * step);
}

/* Log gates and betas so far from 0 and 1 that a step stays between them. */
static void set_gates(test_case *c) {
    uint64_t random = c->spec.seed;
    int64_t r, h;
    for (r = 0; r < c->rows; r++)
        for (h = 0; h < c->desc.heads_v; h++) {
            case_set(c, T_G, r, h, 0, -0.15 - 0.3 * case_uniform(&random));
            case_set(c, T_BETA, r, h, 0, 0.2 + 0.6 * case_uniform(&random));
        }
}

TEST is_the_gradient(const case_spec *spec) {
    static test_case c;
    case_spec small = *spec;
    size_t n;
    small.plan.dim_k = 8;
    small.plan.dim_v = 16;
    small.plan.backward = 1;
    ASSERT_EQ(FQLA_OK, case_open(&c, test_shared(), &test_shared_host, &small));
    if (spec->plan.gate == FQLA_GATE_LOG) set_gates(&c);
    ASSERT_EQ(FQLA_OK, case_run_backward(&c));
    for (n = 0; n < sizeof inputs / sizeof inputs[0]; n++) {
        const case_tensor *t = &c.t[inputs[n].input];
        double error = 0.0, norm = 0.0;
        int64_t r, h, i;
        if (t->buffer == NULL) continue;
        for (r = 0; r < t->rows; r++)
            for (h = 0; h < t->heads; h++)
                for (i = 0; i < t->dim; i++) {
                    const double gradient = case_get(&c, inputs[n].gradient, r, h, i);
                    const double off = gradient - difference(&c, inputs[n].input, r, h, i);
                    error += off * off;
                    norm += gradient * gradient;
                }
        ASSERT(norm > 0.0);
        ASSERT_IN_RANGEm(inputs[n].name, 0.0, sqrt(error / norm), 3.0e-4);
    }
    case_close(&c);
    PASS();
}

SUITE(gradient) {
    size_t i;
    for (i = 0; i < sizeof specs / sizeof specs[0]; i++) {
        greatest_set_test_suffix(specs[i].name);
        RUN_TESTp(is_the_gradient, &specs[i]);
    }
}
