/* The backward against the oracle's reverse. Each case runs its forward first. */
#include "case.h"
#include "greatest.h"

TEST matches(const case_spec *spec) {
    ASSERT_SILENT(case_check(spec));
    PASS();
}

static void run(case_spec spec) {
    spec.plan.backward = 1;
    greatest_set_test_suffix(spec.name);
    RUN_TESTp(matches, &spec);
}

static void lengths(void) {
    static const int32_t lens[] = { 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 193 };
    char name[16];
    size_t i;
    for (i = 0; i < sizeof lens / sizeof lens[0]; i++) {
        snprintf(name, sizeof name, "length_%d", (int)lens[i]);
        run((case_spec){ .name = name, .plan = { .heads_v = 2 }, .lens = { lens[i] }, .seed = 100 + i });
    }
}

static void gates(void) {
    static const char *const kinds[GATES_COUNT] = { "mild", "zero", "strong", "mixed", "dead", "cliff" };
    char name[32];
    int raw, kind;
    for (raw = 0; raw < 2; raw++)
        for (kind = 0; kind < GATES_COUNT; kind++) {
            snprintf(name, sizeof name, "gate_%s_%s", raw ? "raw" : "log", kinds[kind]);
            run((case_spec){ .name = name,
                             .plan = { .heads_qk = 2, .heads_v = 4, .num_seqs = 2, .gate = raw ? FQLA_GATE_RAW : FQLA_GATE_LOG },
                             .lens = { 40, 70 }, .gates = (case_gates)kind, .seed = 200 + (uint64_t)(raw * 10 + kind) });
        }
}

static const case_spec features[] = {
    { .name = "no_states", .plan = { .heads_v = 2 }, .lens = { 70 }, .no_h0 = true, .no_ht = true, .seed = 1 },
    { .name = "no_h0", .plan = { .heads_v = 2 }, .lens = { 70 }, .no_h0 = true, .seed = 2 },
    { .name = "no_dht", .plan = { .heads_v = 2 }, .lens = { 70 }, .no_ht = true, .seed = 3 },
    { .name = "empty_sequences", .plan = { .heads_v = 2, .num_seqs = 6 }, .lens = { 0, 1, 0, 0, 65, 0 }, .seed = 4 },
    { .name = "only_empty_sequences", .plan = { .heads_v = 2, .num_seqs = 2, .gate = FQLA_GATE_RAW }, .lens = { 0 }, .seed = 5 },
    { .name = "many_sequences", .plan = { .heads_v = 2, .num_seqs = 24 }, .lens = { 3, 0, 17, 1, 64, 5, 2, 66, 0, 9, 31, 1 },
      .seed = 6 },
    { .name = "grouped_heads", .plan = { .heads_qk = 2, .heads_v = 6, .num_seqs = 2 }, .lens = { 66, 20 }, .seed = 7 },
    { .name = "head_map_mod", .plan = { .heads_qk = 2, .heads_v = 6, .head_map = FQLA_HEAD_MAP_MOD }, .lens = { 66 }, .seed = 8 },
    { .name = "state_vk", .plan = { .heads_v = 2, .state_layout = FQLA_STATE_VK }, .lens = { 100 }, .seed = 9 },
    { .name = "state_bf16_vk", .plan = { .heads_v = 2, .state_dtype = FQLA_DTYPE_BF16, .state_layout = FQLA_STATE_VK },
      .lens = { 70 }, .seed = 10 },
    { .name = "bf16", .plan = { .heads_qk = 1, .heads_v = 3, .dtype = FQLA_DTYPE_BF16 }, .lens = { 90 }, .seed = 11 },
    { .name = "fp16", .plan = { .heads_qk = 1, .heads_v = 3, .dtype = FQLA_DTYPE_FP16 }, .lens = { 90 }, .seed = 12 },
    { .name = "bf16_raw", .plan = { .heads_v = 2, .num_seqs = 3, .dtype = FQLA_DTYPE_BF16, .gate = FQLA_GATE_RAW,
                                    .beta = FQLA_BETA_SIGMOID }, .lens = { 40, 0, 70 }, .seed = 13 },
    { .name = "residuals", .plan = { .heads_qk = 2, .heads_v = 4, .num_seqs = 3 }, .lens = { 130, 0, 33 }, .residuals = true,
      .seed = 42 },
    { .name = "residuals_raw", .plan = { .heads_v = 3, .max_seqs = 4, .max_tokens = 300, .gate = FQLA_GATE_RAW,
                                         .beta = FQLA_BETA_SIGMOID, .l2norm = 1 }, .lens = { 129 }, .residuals = true,
      .own_workspace = true, .rows = ROWS_GAPPED, .seed = 43 },
    { .name = "low_memory", .plan = { .heads_qk = 1, .heads_v = 2, .num_seqs = 3, .low_memory = 1 }, .lens = { 100, 0, 30 },
      .residuals = true, .seed = 44 },
    { .name = "needs_residuals", .plan = { .heads_qk = 1, .heads_v = 2, .num_seqs = 2, .needs_residuals = 1 }, .lens = { 100, 40 },
      .residuals = true, .own_workspace = true, .seed = 45 },
    { .name = "own_workspace", .plan = { .heads_v = 2 }, .lens = { 80 }, .own_workspace = true, .seed = 14 },
    { .name = "scale", .plan = { .heads_v = 2, .scale = -0.75f }, .lens = { 80 }, .seed = 15 },
    { .name = "sigmoid_beta", .plan = { .heads_v = 2, .beta = FQLA_BETA_SIGMOID }, .lens = { 80 }, .seed = 16 },
    { .name = "negative_eigenvalues", .plan = { .heads_v = 2, .beta = FQLA_BETA_SIGMOID, .negative_eigenvalues = 1 },
      .lens = { 80 }, .seed = 17 },
    { .name = "l2norm", .plan = { .heads_qk = 2, .heads_v = 4, .l2norm = 1 }, .lens = { 130 }, .seed = 18 },
    { .name = "all_fused", .plan = { .heads_qk = 2, .heads_v = 4, .num_seqs = 3, .l2norm = 1, .gate = FQLA_GATE_RAW,
                                     .beta = FQLA_BETA_SIGMOID, .negative_eigenvalues = 1 }, .lens = { 66, 0, 12 }, .seed = 19 },
    { .name = "same_keys", .plan = { .heads_v = 2 }, .lens = { 192 }, .same_keys = true, .seed = 20 },
    { .name = "same_keys_l2norm", .plan = { .heads_v = 2, .l2norm = 1 }, .lens = { 130 }, .same_keys = true, .gates = GATES_ZERO,
      .seed = 21 },
    { .name = "same_keys_mixed_gates", .plan = { .heads_v = 4 }, .lens = { 129 }, .same_keys = true, .gates = GATES_MIXED,
      .seed = 22 },
    { .name = "fused_rows", .plan = { .heads_qk = 2, .heads_v = 4, .num_seqs = 2 }, .lens = { 65, 30 }, .rows = ROWS_FUSED,
      .seed = 23 },
    { .name = "fused_rows_raw", .plan = { .heads_v = 2, .gate = FQLA_GATE_RAW, .beta = FQLA_BETA_SIGMOID }, .lens = { 65 },
      .rows = ROWS_FUSED, .seed = 24 },
    { .name = "head_major", .plan = { .heads_qk = 2, .heads_v = 4, .num_seqs = 2 }, .lens = { 65, 30 }, .rows = ROWS_HEAD_MAJOR,
      .seed = 25 },
    { .name = "gapped_rows", .plan = { .heads_qk = 2, .heads_v = 4, .num_seqs = 2 }, .lens = { 65, 30 }, .rows = ROWS_GAPPED,
      .seed = 26 },
    { .name = "padded", .plan = { .heads_v = 2, .num_seqs = 4, .padded_len = 70 }, .lens = { 70, 0, 1, 65 }, .seed = 27 },
    { .name = "padded_more_rows", .plan = { .heads_v = 2, .num_seqs = 2, .max_seqs = 4, .padded_len = 70 }, .lens = { 3, 66 },
      .seed = 28 },
    { .name = "rows_to_spare", .plan = { .heads_v = 2, .num_seqs = 2, .max_seqs = 9, .max_tokens = 200 }, .lens = { 65, 30 },
      .seed = 29 },
    { .name = "checkpoints", .plan = { .heads_v = 2, .num_seqs = 2, .checkpoint_every = 1 }, .lens = { 63, 129 }, .seed = 30 },
    { .name = "dead_tokens_same_keys", .plan = { .heads_v = 2 }, .lens = { 130 }, .same_keys = true, .gates = GATES_DEAD,
      .seed = 31 },
    { .name = "cliffs_in_short_sequences", .plan = { .heads_v = 2, .num_seqs = 5 }, .lens = { 1, 2, 16, 65, 128 },
      .gates = GATES_CLIFF, .seed = 32 },
    { .name = "long", .plan = { .heads_v = 2 }, .lens = { 700 }, .seed = 33 },
    { .name = "long_ungated", .plan = { .heads_v = 1 }, .lens = { 900 }, .gates = GATES_ZERO, .seed = 34 },
    { .name = "dims_8_8", .plan = { .heads_qk = 2, .heads_v = 4, .dim_k = 8, .dim_v = 8 }, .lens = { 70 }, .seed = 35 },
    { .name = "dims_8_256", .plan = { .heads_v = 2, .dim_k = 8, .dim_v = 256 }, .lens = { 70 }, .seed = 36 },
    { .name = "dims_256_8", .plan = { .heads_v = 2, .dim_k = 256, .dim_v = 8 }, .lens = { 70 }, .seed = 37 },
    { .name = "dims_256_256", .plan = { .heads_v = 1, .dim_k = 256, .dim_v = 256 }, .lens = { 66 }, .seed = 38 },
    { .name = "dims_40_72", .plan = { .heads_v = 2, .dim_k = 40, .dim_v = 72, .dtype = FQLA_DTYPE_BF16, .l2norm = 1 },
      .lens = { 70 }, .seed = 39 },
    { .name = "dims_248_120", .plan = { .heads_v = 2, .dim_k = 248, .dim_v = 120 }, .lens = { 70 }, .rows = ROWS_FUSED,
      .seed = 40 },
    { .name = "odd_bases", .plan = { .heads_v = 2, .dim_k = 64, .dim_v = 64 }, .lens = { 70 }, .odd_base = true, .seed = 41 },
};

/* On a GPU a window is of 512 chunks times v-heads at least: a sequence of two parts, and two whole ones in a window. Much work for
   the oracle, and on the CPU nothing but "low_memory" again. */
static void windows(void) {
    run((case_spec){ .name = "low_memory_parts",
                     .plan = { .heads_qk = 1, .heads_v = 64, .num_seqs = 4, .low_memory = 1, .needs_residuals = 1, .gate = FQLA_GATE_RAW },
                     .lens = { 600, 0, 40, 1 }, .residuals = true, .seed = 45 });
}

/* A plan made without it has no backward. */
TEST needs_a_plan_for_it(void) {
    static test_case c;
    const case_spec spec = { .name = "forward_plan", .plan = { .heads_v = 2 }, .lens = { 3 }, .seed = 50 };
    const fqla_backward_args args = { .q = NULL };
    ASSERT_EQ(FQLA_OK, case_open(&c, test_shared(), &test_shared_host, &spec));
    ASSERT_SILENT(test_refusal(&test_shared_host, FQLA_ERROR_UNSUPPORTED, fqla_backward(c.plan, &args, NULL), "backward", "0"));
    case_close(&c);
    PASS();
}

SUITE(backward) {
    size_t i;
    lengths();
    gates();
    for (i = 0; i < sizeof features / sizeof features[0]; i++) run(features[i]);
    if (test_on_cuda()) windows();
    RUN_TEST(needs_a_plan_for_it);
}
