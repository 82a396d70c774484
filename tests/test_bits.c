/* Determinism and isolation, bit for bit: a hundred repeats, and neighbours of a sequence full of NaN or infinities. */
#include "case.h"
#include "greatest.h"
#include <math.h>

static const case_spec specs[] = {
    { .name = "packed", .plan = { .heads_qk = 2, .heads_v = 4, .num_seqs = 5 }, .lens = { 65, 3, 64, 1, 130 }, .seed = 1 },
    { .name = "tails", .plan = { .heads_v = 2, .num_seqs = 7 }, .lens = { 1, 15, 17, 63, 66, 2, 16 }, .rows = ROWS_FUSED,
      .seed = 2 },
    { .name = "padded", .plan = { .heads_v = 2, .num_seqs = 3, .padded_len = 66, .checkpoint_every = 1 }, .lens = { 64, 66, 5 },
      .seed = 3 },
    { .name = "raw_l2norm", .plan = { .heads_v = 2, .num_seqs = 4, .l2norm = 1, .gate = FQLA_GATE_RAW, .beta = FQLA_BETA_SIGMOID },
      .lens = { 70, 3, 64, 9 }, .rows = ROWS_HEAD_MAJOR, .seed = 4 },
    { .name = "strong_gates_vk", .plan = { .heads_v = 2, .num_seqs = 3, .state_layout = FQLA_STATE_VK,
                                           .state_dtype = FQLA_DTYPE_BF16 },
      .lens = { 70, 3, 64 }, .gates = GATES_STRONG, .seed = 5 },
    { .name = "pool", .plan = { .heads_v = 2, .num_seqs = 6, .pool_size = 14 }, .lens = { 65, 3, 64, 1, 20, 31 }, .in_place = true,
      .seed = 6 },
    { .name = "decode", .plan = { .heads_qk = 2, .heads_v = 4, .num_seqs = 7 }, .decode_tokens = 1, .in_place = true, .seed = 7 },
    { .name = "backward", .plan = { .heads_qk = 2, .heads_v = 4, .num_seqs = 4, .backward = 1, .l2norm = 1 },
      .lens = { 65, 3, 64, 20 }, .seed = 8 },
    { .name = "backward_residuals", .plan = { .heads_qk = 1, .heads_v = 3, .num_seqs = 3, .backward = 1 }, .residuals = true,
      .lens = { 130, 1, 64 }, .gates = GATES_MIXED, .seed = 9 },
};

/* Small dimensions where the backend has them. */
static fqla_status open_small(test_case *c, const case_spec *spec) {
    case_spec small = *spec;
    if (!test_on_cuda()) small.plan.dim_k = 32, small.plan.dim_v = 48;
    return case_open(c, test_shared(), &test_shared_host, &small);
}

/* A backward that takes residuals comes after its forward. */
static fqla_status run(test_case *c, bool backward) {
    const fqla_status status = !backward || c->spec.residuals ? case_run(c) : FQLA_OK;
    return backward && status == FQLA_OK ? case_run_backward(c) : status;
}

TEST hundred_repeats(const case_spec *spec, bool backward) {
    static test_case c;
    unsigned char *first[T_COUNT] = { NULL };
    int name, repeat;
    ASSERT_EQ(FQLA_OK, open_small(&c, spec));
    for (repeat = 0; repeat < 100; repeat++) {
        ASSERT_EQ(FQLA_OK, run(&c, backward));
        for (name = 0; name < T_WORKSPACE; name++) {
            const case_buffer *buffer = &c.buffers[name];
            if (buffer->size == 0) continue;
            if (repeat == 0) {
                first[name] = (unsigned char *)malloc(buffer->size);
                memcpy(first[name], buffer->after, buffer->size);
            } else {
                ASSERT_MEM_EQ(first[name], buffer->after, buffer->size);
            }
        }
    }
    for (name = 0; name < T_COUNT; name++) free(first[name]);
    case_close(&c);
    PASS();
}

/* Mark whatever belongs to sequence n in a copy of the masks' size, so that the rest can be compared. */
static void mark_sequence(const test_case *c, int32_t n, case_tensor_name name, unsigned char *theirs) {
    const case_tensor *t = &c->t[name];
    const size_t size = t->dtype == FQLA_DTYPE_FP32 ? 4 : 2;
    const bool state = name == T_HT || name == T_DH0, entry = name == T_SNAPSHOTS;
    int64_t row = state ? (c->desc.pool_size > 0 ? c->slot_out[n] : n) : case_row(c, n);
    int64_t rows = state ? row >= 0 : case_len(c, n), r, h;
    if (entry) { /* packed by sequence, an entry a chunk */
        int32_t m;
        for (row = 0, m = 0; m < n; m++) row += case_len(c, m) / FLASHQLA_CHUNK;
        rows = case_len(c, n) / FLASHQLA_CHUNK;
    }
    for (r = row; r < row + rows; r++)
        for (h = 0; h < t->heads; h++)
            memset(theirs + t->offset + (size_t)(r * t->row_stride + h * t->head_stride) * size, 1, (size_t)t->dim * size);
}

/* Sequence n's inputs become `value`, one tensor after the other and then all: no other sequence's output changes a bit. */
TEST neighbours(const case_spec *spec, bool backward, double value) {
    static const case_tensor_name inputs[] = { T_Q, T_K, T_V, T_G, T_BETA, T_H0, T_DO, T_DHT };
    enum { INPUTS = sizeof inputs / sizeof inputs[0] };
    static test_case clean, dirty;
    int32_t n;
    int which, name;
    ASSERT_EQ(FQLA_OK, open_small(&clean, spec));
    ASSERT_EQ(FQLA_OK, run(&clean, backward));
    for (n = 0; n < clean.num_seqs; n++)
        for (which = 0; which <= INPUTS; which++) {
            int i;
            if (which < INPUTS && clean.t[inputs[which]].buffer == NULL) continue;
            ASSERT_EQ(FQLA_OK, open_small(&dirty, spec));
            for (i = 0; i < INPUTS; i++) {
                const case_tensor *t = &dirty.t[inputs[i]];
                const bool state = inputs[i] == T_H0 || inputs[i] == T_DHT;
                const int64_t row = state ? (dirty.desc.pool_size > 0 ? dirty.slot_in[n] : n) : case_row(&dirty, n);
                const int64_t rows = state ? row >= 0 : case_len(&dirty, n);
                int64_t r, h, d;
                if (t->buffer == NULL || (which != i && which != INPUTS)) continue;
                for (r = row; r < row + rows; r++)
                    for (h = 0; h < t->heads; h++)
                        for (d = 0; d < t->dim; d++) case_set(&dirty, inputs[i], r, h, d, value);
            }
            ASSERT_EQ(FQLA_OK, run(&dirty, backward));
            for (name = T_O; name <= T_DH0; name++) {
                const case_buffer *a = clean.t[name].buffer, *b = dirty.t[name].buffer;
                unsigned char *theirs;
                size_t at;
                if (a == NULL) continue;
                theirs = (unsigned char *)calloc(a->size, 1);
                mark_sequence(&dirty, n, (case_tensor_name)name, theirs);
                if (a == clean.t[T_H0].buffer) /* one pool: the inputs differ where they were set */
                    for (at = 0; at < a->size; at++)
                        theirs[at] |= clean.t[T_H0].buffer->before[at] != dirty.t[T_H0].buffer->before[at];
                for (at = 0; at < a->size && (theirs[at] || a->after[at] == b->after[at]); at++) continue;
                ASSERTm("a bit of another sequence changed", at == a->size);
                free(theirs);
            }
            case_close(&dirty);
        }
    case_close(&clean);
    PASS();
}

/* A forward that leaves residuals has the same outputs as one that does not. */
TEST residuals_change_no_bit(void) {
    static test_case without, with;
    case_spec spec = { .name = "residuals", .plan = { .heads_qk = 2, .heads_v = 4, .num_seqs = 3, .backward = 1, .l2norm = 1 },
                       .lens = { 130, 3, 64 }, .seed = 10 };
    int name;
    ASSERT_EQ(FQLA_OK, open_small(&without, &spec));
    ASSERT_EQ(FQLA_OK, case_run(&without));
    spec.residuals = true;
    ASSERT_EQ(FQLA_OK, open_small(&with, &spec));
    ASSERT_EQ(FQLA_OK, case_run(&with));
    for (name = T_O; name <= T_HT; name++)
        ASSERT_MEM_EQ(without.t[name].buffer->after, with.t[name].buffer->after, with.t[name].buffer->size);
    case_close(&without);
    case_close(&with);
    PASS();
}

SUITE(bits) {
    size_t i;
    RUN_TEST(residuals_change_no_bit);
    for (i = 0; i < sizeof specs / sizeof specs[0]; i++) {
        const bool backward = specs[i].plan.backward;
        greatest_set_test_suffix(specs[i].name);
        RUN_TESTp(hundred_repeats, &specs[i], backward);
        greatest_set_test_suffix(specs[i].name);
        RUN_TESTp(neighbours, &specs[i], backward, (double)NAN);
        greatest_set_test_suffix(specs[i].name);
        RUN_TESTp(neighbours, &specs[i], backward, (double)INFINITY);
        greatest_set_test_suffix(specs[i].name);
        RUN_TESTp(neighbours, &specs[i], backward, -(double)INFINITY);
    }
}
