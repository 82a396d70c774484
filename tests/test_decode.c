/* Decode against the oracle: 1 to 8 tokens, states kept, pools; and that decode steps equal a forward. */
#include "case.h"
#include "greatest.h"

TEST matches(const case_spec *spec) {
    ASSERT_SILENT(case_check(spec));
    PASS();
}

/* One token runs on both backends; more, and kept states, on the CPU alone: CUDA must refuse them. */
static const case_spec features[] = {
    { .name = "one_sequence", .plan = { .heads_qk = 2, .heads_v = 4 }, .decode_tokens = 1, .seed = 1 },
    { .name = "batch", .plan = { .heads_qk = 2, .heads_v = 4, .num_seqs = 70 }, .decode_tokens = 1, .seed = 2 },
    { .name = "plan_of_long_sequences", .plan = { .heads_v = 2, .num_seqs = 3 }, .lens = { 100, 0, 7 }, .decode_tokens = 1,
      .seed = 3 },
    { .name = "padded_plan", .plan = { .heads_v = 2, .num_seqs = 3, .padded_len = 20 }, .lens = { 20, 0, 7 }, .decode_tokens = 1,
      .seed = 4 },
    { .name = "no_states", .plan = { .heads_v = 2, .num_seqs = 3 }, .no_h0 = true, .no_ht = true, .decode_tokens = 1, .seed = 5 },
    { .name = "in_place", .plan = { .heads_v = 2, .num_seqs = 9 }, .in_place = true, .decode_tokens = 1, .seed = 6 },
    { .name = "bf16_states_vk", .plan = { .heads_v = 2, .num_seqs = 9, .state_dtype = FQLA_DTYPE_BF16,
                                          .state_layout = FQLA_STATE_VK }, .in_place = true, .decode_tokens = 1, .seed = 7 },
    { .name = "fp16", .plan = { .heads_v = 2, .num_seqs = 9, .dtype = FQLA_DTYPE_FP16 }, .decode_tokens = 1, .seed = 8 },
    { .name = "bf16", .plan = { .heads_v = 2, .num_seqs = 9, .dtype = FQLA_DTYPE_BF16 }, .decode_tokens = 1, .seed = 9 },
    { .name = "pool", .plan = { .heads_v = 2, .num_seqs = 15, .pool_size = 40 }, .decode_tokens = 1, .seed = 10 },
    { .name = "pool_in_place", .plan = { .heads_v = 2, .num_seqs = 15, .pool_size = 40 }, .in_place = true, .decode_tokens = 1,
      .seed = 11 },
    { .name = "all_fused", .plan = { .heads_qk = 2, .heads_v = 4, .num_seqs = 5, .l2norm = 1, .gate = FQLA_GATE_RAW,
                                     .beta = FQLA_BETA_SIGMOID, .negative_eigenvalues = 1 }, .decode_tokens = 1, .seed = 12 },
    { .name = "linear_dead", .plan = { .heads_v = 4, .num_seqs = 5, .gate = FQLA_GATE_LINEAR }, .gates = GATES_DEAD,
      .decode_tokens = 1, .seed = 13 },
    { .name = "mixed_gates_mod", .plan = { .heads_qk = 2, .heads_v = 4, .num_seqs = 5, .head_map = FQLA_HEAD_MAP_MOD },
      .gates = GATES_MIXED, .decode_tokens = 1, .seed = 14 },
    { .name = "fused_rows", .plan = { .heads_qk = 2, .heads_v = 4, .num_seqs = 5 }, .rows = ROWS_FUSED, .decode_tokens = 1,
      .seed = 15 },
    { .name = "head_major", .plan = { .heads_qk = 2, .heads_v = 4, .num_seqs = 5 }, .rows = ROWS_HEAD_MAJOR, .decode_tokens = 1,
      .seed = 16 },
    { .name = "gapped_rows", .plan = { .heads_qk = 2, .heads_v = 4, .num_seqs = 5 }, .rows = ROWS_GAPPED, .decode_tokens = 1,
      .seed = 17 },
    { .name = "own_workspace", .plan = { .heads_v = 2, .num_seqs = 5 }, .own_workspace = true, .decode_tokens = 1, .seed = 18 },
    { .name = "cliff", .plan = { .heads_v = 2, .num_seqs = 5 }, .gates = GATES_CLIFF, .decode_tokens = 1, .seed = 19 },
    { .name = "tokens_2", .plan = { .heads_v = 2, .num_seqs = 5 }, .decode_tokens = 2, .seed = 20 },
    { .name = "tokens_8", .plan = { .heads_v = 2, .num_seqs = 5 }, .decode_tokens = 8, .seed = 21 },
    { .name = "states_1", .plan = { .heads_v = 2, .num_seqs = 5 }, .decode_tokens = 1, .keep_states = true, .seed = 22 },
    { .name = "states_8", .plan = { .heads_v = 2, .num_seqs = 5 }, .decode_tokens = 8, .keep_states = true, .seed = 23 },
    { .name = "states_5_bf16_vk_pool", .plan = { .heads_v = 2, .num_seqs = 10, .pool_size = 16, .state_dtype = FQLA_DTYPE_BF16,
                                                 .state_layout = FQLA_STATE_VK }, .in_place = true, .decode_tokens = 5,
      .keep_states = true, .seed = 24 },
    { .name = "states_without_ht", .plan = { .heads_v = 2, .num_seqs = 3 }, .no_ht = true, .no_h0 = true, .decode_tokens = 3,
      .keep_states = true, .seed = 25 },
    { .name = "states_padded_plan", .plan = { .heads_v = 2, .num_seqs = 3, .padded_len = 20 }, .lens = { 20, 0, 7 },
      .decode_tokens = 3, .keep_states = true, .rows = ROWS_HEAD_MAJOR, .seed = 26 },
    { .name = "checkpoints_are_the_forwards", .plan = { .heads_v = 2, .num_seqs = 3, .checkpoint_every = 1 }, .lens = { 70 },
      .decode_tokens = 1, .seed = 27 },
    { .name = "dims_8_8", .plan = { .heads_v = 2, .num_seqs = 3, .dim_k = 8, .dim_v = 8 }, .decode_tokens = 2, .seed = 28 },
    { .name = "dims_200_40", .plan = { .heads_v = 2, .num_seqs = 3, .dim_k = 200, .dim_v = 40 }, .decode_tokens = 2, .seed = 29 },
    { .name = "dims_256_256", .plan = { .heads_v = 2, .num_seqs = 3, .dim_k = 256, .dim_v = 256 }, .decode_tokens = 1, .seed = 30 },
    { .name = "odd_bases", .plan = { .heads_v = 2, .num_seqs = 3, .dim_k = 64, .dim_v = 64 }, .odd_base = true, .decode_tokens = 2,
      .seed = 31 },
};

static const case_spec bad_indices = { .name = "bad_indices", .plan = { .heads_v = 2, .num_seqs = 15, .pool_size = 40 },
                                       .bad_indices = true, .decode_tokens = 1, .seed = 40 };

/* A forward of a prompt and then decodes, the state carried in place, give what one forward of all gives. */
TEST continues_a_forward(void) {
    enum { PROMPT = 70, STEPS = 5 };
    static test_case whole, prompt, decode;
    const case_spec all = { .name = "whole", .plan = { .heads_qk = 1, .heads_v = 2 }, .lens = { PROMPT + STEPS }, .seed = 50 };
    case_spec head = all, tail = all;
    const fqla_status opened = case_open(&whole, test_shared(), &test_shared_host, &all);
    const double tolerance = test_on_cuda() ? 2.0e-2 : 1.0e-5;
    int step, name, h, i;
    ASSERT_EQ(FQLA_OK, opened);
    head.lens[0] = PROMPT;
    ASSERT_EQ(FQLA_OK, case_open(&prompt, test_shared(), &test_shared_host, &head));
    tail.decode_tokens = 1;
    tail.in_place = true;
    ASSERT_EQ(FQLA_OK, case_open(&decode, test_shared(), &test_shared_host, &tail));
    ASSERT_EQ(FQLA_OK, case_run(&whole));
    for (name = T_Q; name <= T_BETA; name++) /* the whole's first rows */
        memcpy(prompt.buffers[name].before, whole.buffers[name].before, prompt.buffers[name].size - 256);
    memcpy(prompt.buffers[T_H0].before, whole.buffers[T_H0].before, whole.buffers[T_H0].size);
    ASSERT_EQ(FQLA_OK, case_run(&prompt));
    memcpy(decode.buffers[T_H0].before, prompt.buffers[T_HT].after, prompt.buffers[T_HT].size);
    for (step = 0; step < STEPS; step++) {
        for (name = T_Q; name <= T_BETA; name++)
            for (h = 0; h < decode.t[name].heads; h++)
                for (i = 0; i < decode.t[name].dim; i++)
                    case_set(&decode, (case_tensor_name)name, 0, h, i,
                             case_input(&whole, (case_tensor_name)name, PROMPT + step, h, i));
        ASSERT_EQ(FQLA_OK, case_run(&decode));
        memcpy(decode.buffers[T_H0].before, decode.buffers[T_H0].after, decode.buffers[T_H0].size);
        for (h = 0; h < 2; h++)
            for (i = 0; i < 128; i++)
                ASSERT_IN_RANGE(case_get(&whole, T_O, PROMPT + step, h, i), case_get(&decode, T_O, 0, h, i), tolerance);
    }
    case_close(&whole);
    case_close(&prompt);
    case_close(&decode);
    PASS();
}

SUITE(decode) {
    size_t i;
    for (i = 0; i < sizeof features / sizeof features[0]; i++) {
        if (test_on_cuda() && features[i].odd_base) continue; /* refused there: test_bad_input.c */
        greatest_set_test_suffix(features[i].name);
        RUN_TESTp(matches, &features[i]);
    }
    if (test_on_cuda()) {
        greatest_set_test_suffix(bad_indices.name);
        RUN_TESTp(matches, &bad_indices);
    }
    RUN_TEST(continues_a_forward);
}
