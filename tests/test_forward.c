/* The forward against the oracle: shapes, lengths, strides, layouts, dtypes, gates, states, pools, checkpoints. */
#include "case.h"
#include "greatest.h"

TEST matches(const case_spec *spec) {
    ASSERT_SILENT(case_check(spec));
    PASS();
}

/* Runs each as a test named after it. */
static void run_all(const case_spec *specs, size_t count) {
    size_t i;
    for (i = 0; i < count; i++) {
        greatest_set_test_suffix(specs[i].name);
        RUN_TESTp(matches, &specs[i]);
    }
}

#define RUN_ALL(specs) run_all(specs, sizeof specs / sizeof specs[0])

/* Around the borders of a token, a 16-token block, a chunk and two. */
static void lengths(void) {
    static const int32_t lens[] = { 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 80, 127, 128, 129, 191, 193, 300 };
    static char names[sizeof lens / sizeof lens[0]][16];
    size_t i;
    for (i = 0; i < sizeof lens / sizeof lens[0]; i++) {
        const case_spec spec = { .name = names[i], .plan = { .heads_v = 2 }, .lens = { lens[i] }, .seed = 100 + i };
        snprintf(names[i], sizeof names[i], "length_%d", (int)lens[i]);
        run_all(&spec, 1);
    }
}

static void gates(void) {
    static const struct { fqla_gate gate; const char *name; } forms[] = { { FQLA_GATE_LOG, "log" }, { FQLA_GATE_LINEAR, "linear" },
                                                                         { FQLA_GATE_RAW, "raw" } };
    static const char *const kinds[GATES_COUNT] = { "mild", "zero", "strong", "mixed", "dead", "cliff" };
    static char names[3 * GATES_COUNT][32];
    int form, kind;
    for (form = 0; form < 3; form++)
        for (kind = 0; kind < GATES_COUNT; kind++) {
            char *name = names[form * GATES_COUNT + kind];
            const case_spec spec = { .name = name, .plan = { .heads_qk = 2, .heads_v = 4, .num_seqs = 2, .gate = forms[form].gate },
                                     .lens = { 97, 130 }, .gates = (case_gates)kind, .seed = 200 + (uint64_t)(form * 10 + kind) };
            snprintf(name, sizeof names[0], "gate_%s_%s", forms[form].name, kinds[kind]);
            run_all(&spec, 1);
        }
}

/* What one call can look like; CUDA runs all but the other dimensions and float32 tensors. */
static const case_spec features[] = {
    { .name = "one_token", .lens = { 1 }, .seed = 1 },
    { .name = "no_states", .plan = { .heads_v = 2 }, .lens = { 70 }, .no_h0 = true, .no_ht = true, .seed = 2 },
    { .name = "no_h0", .plan = { .heads_v = 2 }, .lens = { 70 }, .no_h0 = true, .seed = 3 },
    { .name = "no_ht", .plan = { .heads_v = 2 }, .lens = { 70 }, .no_ht = true, .seed = 4 },
    { .name = "empty_sequences", .plan = { .heads_v = 2, .num_seqs = 6 }, .lens = { 0, 1, 0, 0, 65, 0 }, .seed = 5 },
    { .name = "only_empty_sequences", .plan = { .heads_v = 2, .num_seqs = 2 }, .lens = { 0 }, .seed = 6 },
    { .name = "empty_sequences_without_h0", .plan = { .num_seqs = 3 }, .lens = { 0, 64, 0 }, .no_h0 = true, .seed = 7 },
    { .name = "many_sequences", .plan = { .heads_v = 2, .num_seqs = 60 }, .lens = { 3, 0, 17, 1, 64, 5, 2, 66, 0, 9, 31, 1 },
      .seed = 8 },
    { .name = "grouped_heads", .plan = { .heads_qk = 2, .heads_v = 6, .num_seqs = 2 }, .lens = { 66, 20 }, .seed = 9 },
    { .name = "head_map_mod", .plan = { .heads_qk = 2, .heads_v = 6, .head_map = FQLA_HEAD_MAP_MOD }, .lens = { 66 }, .seed = 10 },
    { .name = "equal_heads", .plan = { .heads_qk = 3, .heads_v = 3, .head_map = FQLA_HEAD_MAP_MOD }, .lens = { 66 }, .seed = 11 },
    { .name = "state_vk", .plan = { .heads_v = 2, .state_layout = FQLA_STATE_VK }, .lens = { 100 }, .seed = 12 },
    { .name = "state_bf16", .plan = { .heads_v = 2, .state_dtype = FQLA_DTYPE_BF16 }, .lens = { 100 }, .seed = 13 },
    { .name = "state_bf16_vk", .plan = { .heads_v = 2, .state_dtype = FQLA_DTYPE_BF16, .state_layout = FQLA_STATE_VK },
      .lens = { 100 }, .seed = 14 },
    { .name = "bf16", .plan = { .heads_v = 2, .dtype = FQLA_DTYPE_BF16 }, .lens = { 140 }, .seed = 15 },
    { .name = "fp16", .plan = { .heads_v = 2, .dtype = FQLA_DTYPE_FP16 }, .lens = { 140 }, .seed = 16 },
    { .name = "fp16_raw", .plan = { .heads_v = 2, .dtype = FQLA_DTYPE_FP16, .gate = FQLA_GATE_RAW, .beta = FQLA_BETA_SIGMOID },
      .lens = { 90 }, .seed = 17 },
    { .name = "fp32", .plan = { .heads_v = 2, .dtype = FQLA_DTYPE_FP32 }, .lens = { 90 }, .seed = 18 },
    { .name = "in_place", .plan = { .heads_v = 2, .num_seqs = 3 }, .lens = { 66, 0, 10 }, .in_place = true, .seed = 19 },
    { .name = "in_place_bf16_vk", .plan = { .heads_v = 2, .state_dtype = FQLA_DTYPE_BF16, .state_layout = FQLA_STATE_VK },
      .lens = { 66 }, .in_place = true, .seed = 20 },
    { .name = "own_workspace", .plan = { .heads_v = 2 }, .lens = { 80 }, .own_workspace = true, .seed = 21 },
    { .name = "scale", .plan = { .heads_v = 2, .scale = -0.75f }, .lens = { 80 }, .seed = 22 },
    { .name = "sigmoid_beta", .plan = { .heads_v = 2, .beta = FQLA_BETA_SIGMOID }, .lens = { 80 }, .seed = 23 },
    { .name = "negative_eigenvalues", .plan = { .heads_v = 2, .beta = FQLA_BETA_SIGMOID, .negative_eigenvalues = 1 },
      .lens = { 80 }, .seed = 24 },
    { .name = "l2norm", .plan = { .heads_qk = 2, .heads_v = 4, .l2norm = 1 }, .lens = { 130 }, .seed = 25 },
    { .name = "all_fused", .plan = { .heads_qk = 2, .heads_v = 4, .l2norm = 1, .gate = FQLA_GATE_RAW, .beta = FQLA_BETA_SIGMOID,
                                     .negative_eigenvalues = 1 }, .lens = { 130 }, .seed = 26 },
    { .name = "same_keys", .plan = { .heads_v = 2 }, .lens = { 192 }, .same_keys = true, .seed = 27 },
    { .name = "same_keys_l2norm", .plan = { .heads_v = 2, .l2norm = 1 }, .lens = { 192 }, .same_keys = true, .gates = GATES_ZERO,
      .seed = 28 },
    { .name = "same_keys_mixed_gates", .plan = { .heads_v = 4 }, .lens = { 129 }, .same_keys = true, .gates = GATES_MIXED,
      .seed = 29 },
    { .name = "fused_rows", .plan = { .heads_qk = 2, .heads_v = 4, .num_seqs = 2 }, .lens = { 65, 30 }, .rows = ROWS_FUSED,
      .seed = 30 },
    { .name = "fused_rows_raw", .plan = { .heads_qk = 1, .heads_v = 2, .gate = FQLA_GATE_RAW, .beta = FQLA_BETA_SIGMOID },
      .lens = { 65 }, .rows = ROWS_FUSED, .seed = 31 },
    { .name = "head_major", .plan = { .heads_qk = 2, .heads_v = 4, .num_seqs = 2 }, .lens = { 65, 30 }, .rows = ROWS_HEAD_MAJOR,
      .seed = 32 },
    { .name = "gapped_rows", .plan = { .heads_qk = 2, .heads_v = 4, .num_seqs = 2 }, .lens = { 65, 30 }, .rows = ROWS_GAPPED,
      .seed = 33 },
    { .name = "gapped_rows_bf16_raw", .plan = { .heads_qk = 2, .heads_v = 4, .dtype = FQLA_DTYPE_BF16, .gate = FQLA_GATE_RAW },
      .lens = { 65 }, .rows = ROWS_GAPPED, .seed = 34 },
    { .name = "padded", .plan = { .heads_v = 2, .num_seqs = 4, .padded_len = 70 }, .lens = { 70, 0, 1, 65 }, .seed = 35 },
    { .name = "padded_more_rows", .plan = { .heads_v = 2, .num_seqs = 2, .max_seqs = 4, .padded_len = 70 }, .lens = { 3, 66 },
      .seed = 36 },
    { .name = "padded_head_major", .plan = { .heads_qk = 2, .heads_v = 2, .num_seqs = 3, .padded_len = 65 }, .lens = { 64, 7, 65 },
      .rows = ROWS_HEAD_MAJOR, .seed = 37 },
    { .name = "rows_to_spare", .plan = { .heads_v = 2, .num_seqs = 2, .max_seqs = 9, .max_tokens = 200 }, .lens = { 65, 30 },
      .seed = 38 },
    { .name = "pool", .plan = { .heads_v = 2, .num_seqs = 10, .pool_size = 23 }, .lens = { 5, 64, 0, 70, 3, 1, 0, 2, 0, 9 },
      .seed = 39 },
    { .name = "pool_in_place", .plan = { .heads_v = 2, .num_seqs = 10, .pool_size = 23 },
      .lens = { 5, 64, 0, 70, 3, 1, 0, 2, 0, 9 }, .in_place = true, .seed = 40 },
    { .name = "pool_bf16_vk", .plan = { .heads_v = 2, .num_seqs = 5, .pool_size = 9, .state_dtype = FQLA_DTYPE_BF16,
                                        .state_layout = FQLA_STATE_VK }, .lens = { 5, 64, 7, 70, 3 }, .in_place = true,
      .seed = 41 },
    { .name = "pool_padded", .plan = { .heads_v = 2, .num_seqs = 5, .padded_len = 66, .pool_size = 9 }, .lens = { 5, 64, 0, 66, 3 },
      .seed = 42 },
    { .name = "checkpoints", .plan = { .heads_v = 2, .num_seqs = 4, .checkpoint_every = 1 }, .lens = { 63, 64, 200, 129 },
      .seed = 43 },
    { .name = "checkpoints_every_2", .plan = { .heads_v = 2, .num_seqs = 3, .checkpoint_every = 2 }, .lens = { 127, 128, 300 },
      .seed = 44 },
    { .name = "checkpoints_none_due", .plan = { .heads_v = 2, .num_seqs = 2, .checkpoint_every = 2 }, .lens = { 127, 3 },
      .seed = 45 },
    { .name = "checkpoints_bf16_vk", .plan = { .heads_v = 2, .checkpoint_every = 1, .state_dtype = FQLA_DTYPE_BF16,
                                               .state_layout = FQLA_STATE_VK }, .lens = { 130 }, .no_h0 = true, .no_ht = true,
      .seed = 46 },
    { .name = "checkpoints_pool", .plan = { .heads_v = 2, .num_seqs = 5, .checkpoint_every = 1, .pool_size = 9 },
      .lens = { 70, 64, 130, 65, 66 }, .in_place = true, .seed = 47 },
    { .name = "dead_tokens_same_keys", .plan = { .heads_v = 2 }, .lens = { 130 }, .same_keys = true, .gates = GATES_DEAD,
      .seed = 48 },
    { .name = "cliffs_in_short_sequences", .plan = { .heads_v = 2, .num_seqs = 5 }, .lens = { 1, 2, 16, 65, 128 },
      .gates = GATES_CLIFF, .seed = 49 },
    { .name = "strong_gates_bf16_states", .plan = { .heads_v = 2, .state_dtype = FQLA_DTYPE_BF16 }, .lens = { 130 },
      .gates = GATES_STRONG, .seed = 50 },
    { .name = "long", .plan = { .heads_v = 2 }, .lens = { 1500 }, .seed = 51 },
    { .name = "long_ungated", .plan = { .heads_v = 1 }, .lens = { 2047 }, .gates = GATES_ZERO, .seed = 52 },
    { .name = "long_mixed_gates", .plan = { .heads_v = 4 }, .lens = { 600 }, .gates = GATES_MIXED, .seed = 53 },
};

/* Other dimensions, which CUDA refuses by name. */
static const case_spec dimensions[] = {
    { .name = "dims_8_8", .plan = { .heads_qk = 2, .heads_v = 4, .dim_k = 8, .dim_v = 8 }, .lens = { 70 }, .seed = 61 },
    { .name = "dims_8_256", .plan = { .heads_v = 2, .dim_k = 8, .dim_v = 256 }, .lens = { 70 }, .seed = 62 },
    { .name = "dims_256_8", .plan = { .heads_v = 2, .dim_k = 256, .dim_v = 8 }, .lens = { 70 }, .seed = 63 },
    { .name = "dims_256_256", .plan = { .heads_v = 1, .dim_k = 256, .dim_v = 256 }, .lens = { 66 }, .seed = 64 },
    { .name = "dims_16_24", .plan = { .heads_v = 2, .dim_k = 16, .dim_v = 24, .state_layout = FQLA_STATE_VK }, .lens = { 70 },
      .seed = 65 },
    { .name = "dims_40_72", .plan = { .heads_v = 2, .dim_k = 40, .dim_v = 72, .dtype = FQLA_DTYPE_BF16 }, .lens = { 70 },
      .seed = 66 },
    { .name = "dims_64_64", .plan = { .heads_v = 2, .dim_k = 64, .dim_v = 64, .dtype = FQLA_DTYPE_FP16, .l2norm = 1 },
      .lens = { 70 }, .seed = 67 },
    { .name = "dims_96_136", .plan = { .heads_v = 2, .dim_k = 96, .dim_v = 136 }, .lens = { 70 }, .rows = ROWS_GAPPED, .seed = 68 },
    { .name = "dims_248_120", .plan = { .heads_v = 2, .dim_k = 248, .dim_v = 120, .checkpoint_every = 1 }, .lens = { 70 },
      .rows = ROWS_FUSED, .seed = 69 },
    { .name = "dims_128_256_pool", .plan = { .heads_v = 2, .dim_k = 128, .dim_v = 256, .num_seqs = 5, .pool_size = 9,
                                             .state_layout = FQLA_STATE_VK, .state_dtype = FQLA_DTYPE_BF16 }, .lens = { 7 },
      .in_place = true, .seed = 70 },
};

/* On the CPU a pointer need not be aligned to more than its element; a GPU refuses that. */
static const case_spec odd_bases[] = {
    { .name = "odd_bases_fp32", .plan = { .heads_v = 2, .num_seqs = 2, .checkpoint_every = 1 }, .lens = { 70, 9 }, .odd_base = true,
      .seed = 71 },
    { .name = "odd_bases_bf16", .plan = { .heads_v = 2, .dtype = FQLA_DTYPE_BF16, .state_dtype = FQLA_DTYPE_BF16 }, .lens = { 70 },
      .odd_base = true, .rows = ROWS_FUSED, .seed = 72 },
};

/* On a GPU an index outside the pool acts as -1 and is counted; a CPU refuses the call (see test_bad_input.c). */
static const case_spec bad_indices[] = {
    { .name = "bad_indices", .plan = { .heads_v = 2, .num_seqs = 10, .pool_size = 23 }, .lens = { 5, 64, 0, 70, 3, 1, 0, 2, 0, 9 },
      .bad_indices = true, .seed = 81 },
    { .name = "bad_indices_in_place", .plan = { .heads_v = 2, .num_seqs = 10, .pool_size = 23 },
      .lens = { 5, 64, 10, 70, 3, 1, 66, 2, 65, 130 }, .bad_indices = true, .in_place = true, .seed = 82 },
};

SUITE(forward) {
    lengths();
    gates();
    RUN_ALL(features);
    RUN_ALL(dimensions);
    if (test_on_cuda()) RUN_ALL(bad_indices);
    else RUN_ALL(odd_bases);
}
