/* Cases drawn at random from everything that a call may be, from a seed that is printed. */
#include "case.h"
#include "greatest.h"

enum { CASES = 80 };

static uint64_t seed = 20250101;

static int32_t below(uint64_t *random, int32_t bound) { return (int32_t)(case_random(random) % (uint64_t)bound); }

/* Lengths that fall on borders as often as not. */
static int32_t random_length(uint64_t *random) {
    static const int32_t borders[] = { 0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 192 };
    return below(random, 2) ? borders[below(random, 12)] : below(random, 150);
}

static case_spec random_spec(uint64_t case_seed) {
    uint64_t random = case_seed;
    case_spec s = { .name = "random", .seed = case_seed };
    fqla_plan_desc *d = &s.plan;
    int i;
    d->heads_qk = 1 + below(&random, 3);
    d->heads_v = d->heads_qk * (1 + below(&random, 3));
    if (!test_on_cuda()) {
        d->dim_k = 8 * (1 + below(&random, below(&random, 4) ? 16 : 32));
        d->dim_v = 8 * (1 + below(&random, below(&random, 4) ? 16 : 32));
    }
    d->num_seqs = 1 + below(&random, 8);
    for (i = 0; i < 12; i++) s.lens[i] = random_length(&random);
    if (below(&random, 4) == 0) d->padded_len = 192 + below(&random, 3);
    if (below(&random, 3) == 0) d->max_seqs = d->num_seqs + below(&random, 3);
    if (d->padded_len == 0 && below(&random, 3) == 0) d->max_tokens = 192 * 8 + below(&random, 100);
    d->dtype = test_on_cuda() ? (fqla_dtype)(1 + below(&random, 2)) : (fqla_dtype)below(&random, 4);
    d->state_dtype = (fqla_dtype)(below(&random, 2) ? FQLA_DTYPE_FP32 : FQLA_DTYPE_BF16);
    d->state_layout = (fqla_state_layout)below(&random, 2);
    d->head_map = (fqla_head_map)below(&random, 2);
    d->gate = (fqla_gate)below(&random, 3);
    d->beta = (fqla_beta)below(&random, 2);
    d->negative_eigenvalues = d->beta == FQLA_BETA_SIGMOID && below(&random, 2);
    d->l2norm = below(&random, 2);
    d->scale = below(&random, 2) ? 0.0f : (float)(0.1 + case_uniform(&random));
    s.gates = (case_gates)below(&random, GATES_COUNT);
    s.rows = (case_rows)below(&random, ROWS_COUNT);
    s.same_keys = below(&random, 6) == 0;
    s.own_workspace = below(&random, 4) == 0;
    if (below(&random, 3) == 0) d->pool_size = 2 * d->num_seqs + below(&random, 4);
    if (below(&random, 3) == 0) d->checkpoint_every = 1 + below(&random, 2);
    if (d->pool_size == 0) s.no_h0 = below(&random, 4) == 0, s.no_ht = below(&random, 4) == 0;
    s.in_place = !s.no_h0 && !s.no_ht && below(&random, 3) == 0;
    if (below(&random, 4) == 0) {
        s.decode_tokens = test_on_cuda() ? 1 : 1 + below(&random, FLASHQLA_MAX_DECODE_TOKENS);
        s.keep_states = !test_on_cuda() && below(&random, 2);
    } else if (d->pool_size == 0 && d->gate != FQLA_GATE_LINEAR) {
        d->backward = below(&random, 2);
        s.residuals = below(&random, 2) != 0;
    }
    return s;
}

TEST random_case(uint64_t case_seed) {
    const case_spec spec = random_spec(case_seed);
    ASSERT_SILENT(case_check(&spec));
    PASS();
}

SUITE(random_cases) {
    char name[32];
    int i;
    printf("  seeds from %llu\n", (unsigned long long)seed);
    for (i = 0; i < CASES; i++) {
        snprintf(name, sizeof name, "%llu", (unsigned long long)seed + (unsigned long long)i);
        greatest_set_test_suffix(name);
        RUN_TESTp(random_case, seed + (uint64_t)i);
    }
}
