/* A hundred shapes of the backward drawn at random, the same on every backend but for the CPU's other dimensions. A shape that
   fails is printed with the command that runs it alone. */
#include "case.h"
#include "greatest.h"

enum { SHAPES = 100, FEW_TOKENS = 140, MANY_TOKENS = 450 }; /* of all sequences, at most: the oracle takes its time */

static const uint64_t first_seed = 3000;

static int32_t below(uint64_t *random, int32_t bound) { return (int32_t)(case_random(random) % (uint64_t)bound); }

/* On a border of a chunk or a step beside it, short, or up to a few hundred. */
static int32_t random_length(uint64_t *random) {
    static const int32_t borders[] = { 0, 0, 1, 63, 64, 65, 127, 128, 129 };
    switch (below(random, 4)) {
        case 0: return below(random, 20);
        case 1: return below(random, 400);
        default: return borders[below(random, 9)];
    }
}

static case_spec random_spec(uint64_t seed) {
    static const int32_t heads[][2] = { { 1, 1 }, { 2, 4 }, { 1, 3 }, { 4, 4 }, { 2, 16 }, { 1, 2 }, { 3, 3 }, { 2, 6 }, { 1, 8 } };
    static const case_gates gates[] = { GATES_MILD, GATES_ZERO, GATES_STRONG, GATES_MIXED };
    uint64_t random = seed;
    case_spec s = { .name = "random_backward", .seed = seed };
    fqla_plan_desc *d = &s.plan;
    const int pair = below(&random, sizeof heads / sizeof heads[0]);
    const int32_t dim_k = 8 * (1 + below(&random, 16)), dim_v = 8 * (1 + below(&random, 16)), most_seqs = 1 + below(&random, 6);
    const bool other_dims = below(&random, 3) > 0, many = below(&random, 4) == 0 && heads[pair][1] <= 4;
    int32_t tokens = 0, longest = 0;
    d->backward = 1;
    d->heads_qk = heads[pair][0];
    d->heads_v = heads[pair][1];
    if (other_dims && !test_on_cuda()) d->dim_k = dim_k, d->dim_v = dim_v;
    while (d->num_seqs < most_seqs) {
        const int32_t len = random_length(&random);
        if (tokens + len > (many ? MANY_TOKENS : FEW_TOKENS)) {
            if (d->num_seqs > 0) break;
            continue;
        }
        s.lens[d->num_seqs++] = len;
        tokens += len;
        if (len > longest) longest = len;
    }
    if (tokens > 0 && tokens < 16) { /* of a handful of numbers a relative error says little: more beside them */
        s.lens[d->num_seqs++] = 33;
        tokens += 33;
        if (longest < 33) longest = 33;
    }
    if (below(&random, 4) == 0) d->padded_len = longest + 1 + below(&random, 3);
    if (below(&random, 3) == 0) d->max_seqs = d->num_seqs + below(&random, 3);
    if (d->padded_len == 0 && (tokens == 0 || below(&random, 3) == 0)) d->max_tokens = tokens + 1 + below(&random, 100);
    d->dtype = below(&random, 3) == 0 ? FQLA_DTYPE_FP16 : FQLA_DTYPE_DEFAULT;
    d->state_dtype = below(&random, 4) == 0 ? FQLA_DTYPE_BF16 : FQLA_DTYPE_FP32;
    d->state_layout = (fqla_state_layout)below(&random, 2);
    d->head_map = (fqla_head_map)below(&random, 2);
    /* dA_log and ddt_bias are a sum a head, which may cancel: none of few heads alone */
    d->gate = below(&random, 2) == 0 && d->heads_v >= 4 ? FQLA_GATE_RAW : FQLA_GATE_LOG;
    d->beta = (fqla_beta)below(&random, 2);
    d->negative_eigenvalues = d->beta == FQLA_BETA_SIGMOID && below(&random, 2);
    d->l2norm = below(&random, 2);
    d->scale = below(&random, 2) ? 0.0f : (float)(0.1 + case_uniform(&random));
    s.gates = gates[below(&random, 4)];
    s.rows = (case_rows)below(&random, ROWS_COUNT);
    s.no_h0 = below(&random, 3) == 0;
    s.no_ht = below(&random, 3) == 0; /* nor dht */
    s.residuals = below(&random, 2) != 0;
    s.own_workspace = below(&random, 4) == 0;
    return s;
}

static void print_shape(const case_spec *s) {
    const fqla_plan_desc *d = &s->plan;
    int32_t n;
    printf("\nheads %d/%d, dims %d/%d, lengths", (int)d->heads_qk, (int)d->heads_v, d->dim_k ? (int)d->dim_k : 128,
           d->dim_v ? (int)d->dim_v : 128);
    for (n = 0; n < d->num_seqs; n++) printf("%c%d", n == 0 ? ' ' : ',', (int)s->lens[n]);
    printf(", padded_len %d, max_seqs %d, max_tokens %d, layout %d, map %d, negative_eigenvalues %d, l2norm %d, scale %g%s%s%s%s\n",
           (int)d->padded_len, (int)d->max_seqs, (int)d->max_tokens, (int)d->state_layout, (int)d->head_map,
           (int)d->negative_eigenvalues, (int)d->l2norm, (double)d->scale, s->no_h0 ? ", no h0" : "", s->no_ht ? ", no dht" : "",
           s->residuals ? ", residuals" : "", s->own_workspace ? ", own workspace" : "");
    printf("    build/tests/suite --backend %s -e -t random_shape_%llu\n", test_on_cuda() ? "cuda" : "cpu",
           (unsigned long long)s->seed);
}

TEST random_shape(uint64_t seed) {
    const case_spec spec = random_spec(seed);
    const char *message = case_check(&spec);
    if (message != NULL) print_shape(&spec);
    ASSERT_SILENT(message);
    PASS();
}

SUITE(random_backward) {
    char name[32];
    uint64_t seed;
    printf("  seeds from %llu\n", (unsigned long long)first_seed);
    for (seed = first_seed; seed < first_seed + SHAPES; seed++) {
        snprintf(name, sizeof name, "%llu", (unsigned long long)seed);
        greatest_set_test_suffix(name);
        RUN_TESTp(random_shape, seed);
    }
}
