/* What is far away: rows and slots past 4 GiB, more sequences and heads than a grid has rows. Inputs repeat, so outputs must. */
#include "case.h"
#include "greatest.h"

enum { PERIOD = 64 }; /* sequences, or heads, that differ */

/* Memory of the context with bytes of the host's in it. */
static void *device_copy(const void *host, size_t bytes) {
    void *memory = NULL;
    if (fqla_alloc(test_shared(), bytes, &memory) != FQLA_OK) abort();
    if (fqla_upload(test_shared(), memory, host, bytes, NULL) != FQLA_OK) abort();
    return memory;
}

/* One token of each of many sequences, or of many heads: [count, dim] bf16 of q, k and v each repeat after PERIOD. */
TEST many(int32_t num_seqs, int32_t heads_v) {
    const int32_t dim = test_on_cuda() ? 128 : 8, count = num_seqs * heads_v;
    const size_t bytes = (size_t)count * (size_t)dim * 2;
    fqla_plan_desc desc = { .heads_qk = heads_v, .heads_v = heads_v, .dim_k = dim, .dim_v = dim, .num_seqs = num_seqs,
                            .dtype = FQLA_DTYPE_BF16 };
    int32_t *cu_seqlens = (int32_t *)malloc(((size_t)num_seqs + 1) * sizeof *cu_seqlens), i, j;
    uint16_t *values = (uint16_t *)malloc(bytes), *o = (uint16_t *)malloc(bytes);
    float *gates = (float *)malloc((size_t)count * sizeof *gates);
    uint64_t random = 9;
    fqla_forward_args args = { .q = NULL };
    fqla_plan *plan = NULL;
    for (i = 0; i <= num_seqs; i++) cu_seqlens[i] = i;
    for (i = 0; i < count; i++) {
        gates[i] = i < PERIOD ? (float)case_uniform(&random) : gates[i % PERIOD];
        for (j = 0; j < dim; j++) /* of size 1/16 to 1/8, of either sign */
            values[i * dim + j] = i < PERIOD ? (uint16_t)(0x3d80 | (case_random(&random) & 0x807f)) : values[i % PERIOD * dim + j];
    }
    desc.cu_seqlens = cu_seqlens;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(test_shared(), &desc, &plan));
    args.q = args.k = args.v = device_copy(values, bytes);
    args.beta = device_copy(gates, (size_t)count * sizeof *gates);
    for (i = 0; i < count; i++) gates[i] = -gates[i];
    args.g = device_copy(gates, (size_t)count * sizeof *gates);
    memset(o, 0xff, bytes);
    args.o = device_copy(o, bytes);
    ASSERT_EQ(FQLA_OK, fqla_forward(plan, &args, NULL));
    ASSERT_EQ(FQLA_OK, fqla_download(test_shared(), o, args.o, bytes, NULL));
    for (j = 0; j < PERIOD * dim; j++) ASSERT((o[j] & 0x7fff) != 0x7fff && (o[j] & 0x7fff) != 0);
    for (i = PERIOD; i < count; i += PERIOD)
        ASSERT_MEM_EQ(o, o + i * dim, (size_t)(count - i < PERIOD ? count - i : PERIOD) * (size_t)dim * 2);
    ASSERT_EQ(FQLA_OK, fqla_free(test_shared(), (void *)args.q));
    ASSERT_EQ(FQLA_OK, fqla_free(test_shared(), (void *)args.g));
    ASSERT_EQ(FQLA_OK, fqla_free(test_shared(), (void *)args.beta));
    ASSERT_EQ(FQLA_OK, fqla_free(test_shared(), args.o));
    fqla_plan_destroy(plan);
    free(cu_seqlens), free(values), free(o), free(gates);
    PASS();
}

/* A pool of 9 GiB whose last slots are used; the bits are those of a small pool. */
TEST far_slots(void) {
    enum { NEAR = 5, FAR = 70000 };
    const size_t slot_bytes = 2 * 128 * 128 * sizeof(float);
    static const int32_t near_in[3] = { 0, -1, 3 }, near_out[3] = { 0, 2, 4 };
    static const int32_t far_in[3] = { FAR - NEAR, -1, FAR - NEAR + 3 },
        far_out[3] = { FAR - NEAR, FAR - NEAR + 2, FAR - NEAR + 4 };
    static test_case c;
    const case_spec spec = { .name = "far_slots", .plan = { .heads_v = 2, .num_seqs = 3, .pool_size = NEAR }, .lens = { 70, 3, 64 },
                             .in_place = true, .seed = 1 };
    fqla_forward_args args;
    fqla_plan_desc desc;
    fqla_plan *plan = NULL;
    unsigned char *states = (unsigned char *)malloc(NEAR * slot_bytes), *o;
    void *pool = NULL, *workspace = NULL;
    size_t workspace_size;
    int n;
    ASSERT_EQ(FQLA_OK, case_open(&c, test_shared(), &test_shared_host, &spec));
    for (n = 0; n < 3; n++) {
        case_set_index(&c, T_STATE_IN, n, near_in[n]);
        case_set_index(&c, T_STATE_OUT, n, near_out[n]);
    }
    ASSERT_EQ(FQLA_OK, case_run(&c));
    desc = c.desc;
    desc.pool_size = FAR;
    desc.external_workspace = 1;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(test_shared(), &desc, &plan));
    ASSERT_EQ(FQLA_OK, fqla_workspace_size(plan, &workspace_size));
    ASSERT_EQ(FQLA_OK, fqla_alloc(test_shared(), FAR * slot_bytes, &pool));
    ASSERT_EQ(FQLA_OK, fqla_alloc(test_shared(), workspace_size + 1, &workspace));
    ASSERT_EQ(FQLA_OK, fqla_upload(test_shared(), (char *)pool + (FAR - NEAR) * slot_bytes,
                                   c.buffers[T_H0].before + c.t[T_H0].offset,
                                   NEAR * slot_bytes, NULL));
    case_upload(&c);
    args = case_forward_args(&c);
    args.h0 = args.ht = pool;
    args.state_in = (const int32_t *)device_copy(far_in, sizeof far_in);
    args.state_out = (const int32_t *)device_copy(far_out, sizeof far_out);
    args.workspace = workspace;
    args.workspace_size = workspace_size;
    ASSERT_EQ(FQLA_OK, fqla_forward(plan, &args, NULL));
    ASSERT_EQ(FQLA_OK, fqla_download(test_shared(), states, (char *)pool + (FAR - NEAR) * slot_bytes, NEAR * slot_bytes, NULL));
    ASSERT_MEM_EQ(c.buffers[T_H0].after + c.t[T_H0].offset, states, NEAR * slot_bytes);
    o = (unsigned char *)malloc(c.buffers[T_O].size);
    ASSERT_EQ(FQLA_OK, fqla_download(test_shared(), o, c.buffers[T_O].memory, c.buffers[T_O].size, NULL));
    ASSERT_MEM_EQ(c.buffers[T_O].after, o, c.buffers[T_O].size);
    ASSERT_EQ(FQLA_OK, fqla_free(test_shared(), (void *)args.state_in));
    ASSERT_EQ(FQLA_OK, fqla_free(test_shared(), (void *)args.state_out));
    ASSERT_EQ(FQLA_OK, fqla_free(test_shared(), workspace));
    ASSERT_EQ(FQLA_OK, fqla_free(test_shared(), pool));
    fqla_plan_destroy(plan);
    case_close(&c);
    free(states), free(o);
    PASS();
}

/* Rows 32 MiB apart, 150 of them: 4.7 GiB a tensor; the bits are those of dense rows. */
TEST far_rows(void) {
    enum { ROWS = 150 };
    const int64_t far_token = (int64_t)1 << 24;
    static const case_tensor_name names[4] = { T_Q, T_K, T_V, T_O };
    static test_case c;
    const case_spec spec = { .name = "far_rows", .lens = { ROWS }, .own_workspace = true, .no_h0 = true, .seed = 2 };
    fqla_plan_desc desc;
    fqla_plan *plan = NULL;
    fqla_forward_args args;
    void *far_tensors[4] = { NULL };
    unsigned char row[256];
    int t, r;
    ASSERT_EQ(FQLA_OK, case_open(&c, test_shared(), &test_shared_host, &spec));
    ASSERT_EQ(FQLA_OK, case_run(&c));
    desc = c.desc;
    desc.strides.q.token = desc.strides.k.token = desc.strides.v.token = desc.strides.o.token = far_token;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(test_shared(), &desc, &plan));
    case_upload(&c);
    for (t = 0; t < 4; t++) {
        ASSERT_EQ(FQLA_OK, fqla_alloc(test_shared(), (size_t)((ROWS - 1) * far_token * 2 + 256), &far_tensors[t]));
        for (r = 0; r < ROWS; r++)
            ASSERT_EQ(FQLA_OK, fqla_upload(test_shared(), (char *)far_tensors[t] + r * far_token * 2,
                                           c.buffers[names[t]].before + c.t[names[t]].offset + r * 256, 256, NULL));
    }
    args = case_forward_args(&c);
    args.q = far_tensors[0], args.k = far_tensors[1], args.v = far_tensors[2], args.o = far_tensors[3];
    ASSERT_EQ(FQLA_OK, fqla_forward(plan, &args, NULL));
    for (r = 0; r < ROWS; r++) {
        ASSERT_EQ(FQLA_OK, fqla_download(test_shared(), row, (char *)args.o + r * far_token * 2, sizeof row, NULL));
        ASSERT_MEM_EQ(c.buffers[T_O].after + c.t[T_O].offset + r * 256, row, sizeof row);
    }
    for (t = 0; t < 4; t++) ASSERT_EQ(FQLA_OK, fqla_free(test_shared(), far_tensors[t]));
    fqla_plan_destroy(plan);
    case_close(&c);
    PASS();
}

SUITE(far) {
    RUN_TESTp(many, 70000, 1);
    RUN_TESTp(many, 1, 65536);
    if (test_on_cuda()) { /* a GPU has the memory */
        RUN_TEST(far_slots);
        RUN_TEST(far_rows);
    }
}
