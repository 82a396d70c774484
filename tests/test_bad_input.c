/* Bad input: every field of every desc and args gets values it must refuse. Each refusal is the right status and one sentence that
   names the field and its value; nothing is written, nothing leaks, and the context and plan work afterwards. */
#include "case.h"
#include "greatest.h"
#include <math.h>
#include <stddef.h>

/* ---- contexts */

static const char *refused_context(fqla_context_desc desc, test_host *host, fqla_status expected, const char *field,
                                   const char *value) {
    fqla_context *context = NULL;
    const char *message = test_refusal(host, expected, fqla_context_create(&desc, &context), field, value);
    if (message == NULL && context != NULL) message = "a context was set";
    if (message == NULL && atomic_load(&host->live) != 0) message = "memory leaked";
    return message;
}

#define REFUSED_CONTEXT(status, field, value, change)                            \
    do {                                                                         \
        fqla_context_desc d = test_desc(&host);                                  \
        change;                                                                  \
        ASSERT_SILENT(refused_context(d, &host, status, field, value));          \
    } while (0)

TEST context_desc(void) {
    static test_host host;
    fqla_context_desc desc = test_desc(&host);
    fqla_context *context = NULL;
    REFUSED_CONTEXT(FQLA_ERROR_INVALID_ENUM, "backend", "-1", d.backend = (fqla_backend)-1);
    REFUSED_CONTEXT(FQLA_ERROR_INVALID_ENUM, "backend", "3", d.backend = FQLA_BACKEND_COUNT);
    REFUSED_CONTEXT(FQLA_ERROR_INVALID_ENUM, "cpu_level", "-1", d.cpu_level = (fqla_cpu_level)-1);
    REFUSED_CONTEXT(FQLA_ERROR_INVALID_ENUM, "cpu_level", "4", d.cpu_level = FQLA_CPU_LEVEL_COUNT);
    REFUSED_CONTEXT(FQLA_ERROR_INVALID_VALUE, "num_threads", "-1", d.num_threads = -1);
    REFUSED_CONTEXT(FQLA_ERROR_INVALID_VALUE, "num_threads", "1025", d.num_threads = 1025);
    REFUSED_CONTEXT(FQLA_ERROR_INVALID_VALUE, "device", "-1", d.device = -1);
    REFUSED_CONTEXT(FQLA_ERROR_INVALID_VALUE, "alloc", NULL, d.alloc = NULL);
    REFUSED_CONTEXT(FQLA_ERROR_INVALID_VALUE, "free", NULL, d.free = NULL);
    if (test_on_cuda()) REFUSED_CONTEXT(FQLA_ERROR_NO_CUDA, "device", "4095", d.device = 4095);
    ASSERT_SILENT(test_refusal(&host, FQLA_ERROR_NULL_POINTER, fqla_context_create(&desc, NULL), "context", NULL));
    ASSERT_EQ(FQLA_ERROR_NULL_POINTER, fqla_context_create(NULL, &context));
    ASSERT_EQ(NULL, context);
    PASS();
}

/* A level that the machine lacks, on a machine that lacks one. */
TEST cpu_level_beyond_the_machine(void) {
    static test_host host;
    fqla_context_summary summary;
    ASSERT_EQ(FQLA_OK, fqla_context_info(test_shared(), &summary));
    ASSERT(summary.cpu_level > FQLA_CPU_AUTO && summary.cpu_level < FQLA_CPU_LEVEL_COUNT);
    if (test_cpu_level == FQLA_CPU_AUTO && summary.cpu_level < FQLA_CPU_AVX512)
        REFUSED_CONTEXT(FQLA_ERROR_UNSUPPORTED, "cpu_level", "avx512", d.cpu_level = FQLA_CPU_AVX512);
    PASS();
}

TEST context_functions(void) {
    static test_host host;
    fqla_context *context = test_open(&host, 1);
    fqla_context_summary summary;
    unsigned char bytes[8] = { 1 };
    void *memory = &host, *unchanged = memory;
    ASSERT_SILENT(test_refusal(&host, FQLA_ERROR_NULL_POINTER, fqla_context_info(context, NULL), "summary", NULL));
    ASSERT_EQ(FQLA_ERROR_NULL_POINTER, fqla_context_info(NULL, &summary));
    ASSERT_EQ(FQLA_ERROR_NULL_POINTER, fqla_alloc(NULL, 1, &memory));
    ASSERT_SILENT(test_refusal(&host, FQLA_ERROR_NULL_POINTER, fqla_alloc(context, 1, NULL), "pointer", NULL));
    ASSERT_SILENT(test_refusal(&host, FQLA_ERROR_INVALID_SIZE, fqla_alloc(context, 0, &memory), "bytes", "0"));
    ASSERT_SILENT(test_refusal(&host, FQLA_ERROR_OUT_OF_MEMORY, fqla_alloc(context, SIZE_MAX, &memory), "bytes", NULL));
    ASSERT_SILENT(test_refusal(&host, FQLA_ERROR_OUT_OF_MEMORY, fqla_alloc(context, SIZE_MAX - 256, &memory), "bytes", NULL));
    ASSERT_EQ(unchanged, memory);
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, 8, &memory));
    ASSERT_SILENT(test_refusal(&host, FQLA_ERROR_IN_USE, fqla_context_destroy(context), "fqla_context_destroy", "1"));
    ASSERT_SILENT(test_refusal(&host, FQLA_ERROR_NULL_POINTER, fqla_upload(context, NULL, bytes, 8, NULL), "device", NULL));
    ASSERT_SILENT(test_refusal(&host, FQLA_ERROR_NULL_POINTER, fqla_upload(context, memory, NULL, 8, NULL), "host", NULL));
    ASSERT_SILENT(test_refusal(&host, FQLA_ERROR_NULL_POINTER, fqla_download(context, NULL, memory, 8, NULL), "host", NULL));
    ASSERT_SILENT(test_refusal(&host, FQLA_ERROR_NULL_POINTER, fqla_download(context, bytes, NULL, 8, NULL), "device", NULL));
    ASSERT_EQ(FQLA_ERROR_NULL_POINTER, fqla_upload(NULL, memory, bytes, 8, NULL));
    ASSERT_EQ(FQLA_ERROR_NULL_POINTER, fqla_download(NULL, bytes, memory, 8, NULL));
    ASSERT_EQ(FQLA_ERROR_NULL_POINTER, fqla_synchronize(NULL, NULL));
    ASSERT_EQ(FQLA_ERROR_NULL_POINTER, fqla_free(NULL, memory));
    ASSERT_EQ(FQLA_OK, fqla_free(context, NULL));
    ASSERT_EQ(FQLA_OK, fqla_free(context, memory));
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(NULL));
    ASSERT_EQ(0, atomic_load(&host.live));
    PASS();
}

/* ---- plans */

static const int32_t lens_3[4] = { 0, 5, 5, 12 };

static fqla_plan_desc good_plan(void) {
    return (fqla_plan_desc){ .heads_qk = 2, .heads_v = 4, .num_seqs = 3, .cu_seqlens = lens_3 };
}

static const char *refused_plan(fqla_plan_desc desc, fqla_status expected, const char *field, const char *value) {
    fqla_context *context = test_shared();
    const long live = atomic_load(&test_shared_host.live);
    fqla_plan *plan = NULL;
    const char *message = test_refusal(&test_shared_host, expected, fqla_plan_create(context, &desc, &plan), field, value);
    if (message == NULL && plan != NULL) message = "a plan was set";
    if (message == NULL && atomic_load(&test_shared_host.live) != live) message = "memory leaked";
    return message;
}

#define REFUSED_PLAN(status, field, value, change)                   \
    do {                                                             \
        fqla_plan_desc d = good_plan();                              \
        change;                                                      \
        ASSERT_SILENT(refused_plan(d, status, field, value));        \
    } while (0)

TEST plan_nulls(void) {
    fqla_plan_desc desc = good_plan();
    fqla_context *context = test_shared();
    fqla_plan *plan = NULL;
    ASSERT_EQ(FQLA_ERROR_NULL_POINTER, fqla_plan_create(NULL, &desc, &plan));
    ASSERT_SILENT(test_refusal(&test_shared_host, FQLA_ERROR_NULL_POINTER, fqla_plan_create(context, NULL, &plan), "desc", NULL));
    ASSERT_SILENT(test_refusal(&test_shared_host, FQLA_ERROR_NULL_POINTER, fqla_plan_create(context, &desc, NULL), "plan", NULL));
    ASSERT_EQ(NULL, plan);
    REFUSED_PLAN(FQLA_ERROR_NULL_POINTER, "cu_seqlens", NULL, d.cu_seqlens = NULL);
    fqla_plan_destroy(NULL);
    PASS();
}

TEST plan_sizes(void) {
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "heads_qk", "0", d.heads_qk = 0);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "heads_qk", "-1", d.heads_qk = -1);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "heads_qk", "65537", d.heads_qk = 65537);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "heads_v", "0", d.heads_v = 0);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "heads_v", "-2", d.heads_v = -2);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "heads_v", "65538", d.heads_v = 65538);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "heads_v", "5", d.heads_v = 5);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "heads_v", "1", d.heads_v = 1);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "dim_k", "-8", d.dim_k = -8);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "dim_k", "4", d.dim_k = 4);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "dim_k", "100", d.dim_k = 100);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "dim_k", "264", d.dim_k = 264);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "dim_v", "-8", d.dim_v = -8);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "dim_v", "12", d.dim_v = 12);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "dim_v", "264", d.dim_v = 264);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "num_seqs", "0", d.num_seqs = 0);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "num_seqs", "-3", d.num_seqs = -3);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "num_seqs", "1048577", d.num_seqs = (1 << 20) + 1);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "max_seqs", "2", d.max_seqs = 2);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "max_seqs", "-1", d.max_seqs = -1);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "max_seqs", "1048577", d.max_seqs = (1 << 20) + 1);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "max_tokens", "-1", d.max_tokens = -1);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "padded_len", "-1", d.padded_len = -1);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "max_tokens", "100", d.padded_len = 10; d.max_tokens = 100);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "pool_size", "-1", d.pool_size = -1);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "checkpoint_every", "-1", d.checkpoint_every = -1);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "checkpoint_every", "33554432", d.checkpoint_every = 1 << 25);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "v_split", "-1", d.v_split = -1);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "v_split", "3", d.v_split = 3);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "v_split", "-2147483648", d.v_split = INT32_MIN);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "segment_chunks", "-2", d.segment_chunks = -2);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "segment_chunks", "33554432", d.segment_chunks = 1 << 25);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "segment_chunks", "2147483647", d.segment_chunks = INT32_MAX);
    /* over 64 segments, if all tokens were one sequence's */
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "segment_chunks", "1", d.segment_chunks = 1; d.max_tokens = 64 * 64 + 1);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "max_tokens", "8193", d.segment_chunks = 2; d.max_tokens = 64 * 64 * 2 + 1);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "max_tokens", "4160", d.segment_chunks = 1; d.padded_len = 64; d.max_seqs = 65);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SIZE, "segment_chunks", "524287", d.segment_chunks = (1 << 19) - 1; d.max_tokens = INT32_MAX);
    PASS();
}

TEST plan_enums_and_flags(void) {
    REFUSED_PLAN(FQLA_ERROR_INVALID_ENUM, "dtype", "-1", d.dtype = (fqla_dtype)-1);
    REFUSED_PLAN(FQLA_ERROR_INVALID_ENUM, "dtype", "4", d.dtype = FQLA_DTYPE_COUNT);
    REFUSED_PLAN(FQLA_ERROR_INVALID_ENUM, "state_dtype", "-1", d.state_dtype = (fqla_dtype)-1);
    REFUSED_PLAN(FQLA_ERROR_INVALID_ENUM, "state_dtype", "4", d.state_dtype = FQLA_DTYPE_COUNT);
    REFUSED_PLAN(FQLA_ERROR_INVALID_ENUM, "state_layout", "-1", d.state_layout = (fqla_state_layout)-1);
    REFUSED_PLAN(FQLA_ERROR_INVALID_ENUM, "state_layout", "2", d.state_layout = FQLA_STATE_LAYOUT_COUNT);
    REFUSED_PLAN(FQLA_ERROR_INVALID_ENUM, "head_map", "-1", d.head_map = (fqla_head_map)-1);
    REFUSED_PLAN(FQLA_ERROR_INVALID_ENUM, "head_map", "2", d.head_map = FQLA_HEAD_MAP_COUNT);
    REFUSED_PLAN(FQLA_ERROR_INVALID_ENUM, "gate", "-1", d.gate = (fqla_gate)-1);
    REFUSED_PLAN(FQLA_ERROR_INVALID_ENUM, "gate", "3", d.gate = FQLA_GATE_COUNT);
    REFUSED_PLAN(FQLA_ERROR_INVALID_ENUM, "beta", "-1", d.beta = (fqla_beta)-1);
    REFUSED_PLAN(FQLA_ERROR_INVALID_ENUM, "beta", "2", d.beta = FQLA_BETA_COUNT);
    REFUSED_PLAN(FQLA_ERROR_INVALID_VALUE, "negative_eigenvalues", "2", d.negative_eigenvalues = 2; d.beta = FQLA_BETA_SIGMOID);
    REFUSED_PLAN(FQLA_ERROR_INVALID_VALUE, "negative_eigenvalues", "1", d.negative_eigenvalues = 1);
    REFUSED_PLAN(FQLA_ERROR_INVALID_VALUE, "l2norm", "-1", d.l2norm = -1);
    REFUSED_PLAN(FQLA_ERROR_INVALID_VALUE, "backward", "2", d.backward = 2);
    REFUSED_PLAN(FQLA_ERROR_INVALID_VALUE, "external_workspace", "7", d.external_workspace = 7);
    REFUSED_PLAN(FQLA_ERROR_INVALID_VALUE, "low_memory", "-1", d.low_memory = -1; d.backward = 1);
    REFUSED_PLAN(FQLA_ERROR_INVALID_VALUE, "low_memory", "1", d.low_memory = 1);
    REFUSED_PLAN(FQLA_ERROR_INVALID_VALUE, "needs_residuals", "2", d.needs_residuals = 2; d.backward = 1);
    REFUSED_PLAN(FQLA_ERROR_INVALID_VALUE, "needs_residuals", "1", d.needs_residuals = 1);
    REFUSED_PLAN(FQLA_ERROR_INVALID_VALUE, "scale", "nan", d.scale = NAN);
    REFUSED_PLAN(FQLA_ERROR_INVALID_VALUE, "scale", "inf", d.scale = INFINITY);
    REFUSED_PLAN(FQLA_ERROR_INVALID_VALUE, "scale", "-inf", d.scale = -INFINITY);
    REFUSED_PLAN(FQLA_ERROR_INVALID_VALUE, "warm_up_tolerance", "nan", d.warm_up_tolerance = NAN);
    REFUSED_PLAN(FQLA_ERROR_INVALID_VALUE, "warm_up_tolerance", "inf", d.warm_up_tolerance = INFINITY);
    REFUSED_PLAN(FQLA_ERROR_INVALID_VALUE, "warm_up_tolerance", "-1e-07", d.warm_up_tolerance = -1e-7f);
    REFUSED_PLAN(FQLA_ERROR_INVALID_VALUE, "warm_up_tolerance", "1.5", d.warm_up_tolerance = 1.5f);
    REFUSED_PLAN(FQLA_ERROR_INVALID_VALUE, "warm_up_tolerance", "1e-31", d.warm_up_tolerance = 1e-31f);
    PASS();
}

/* The least and the most of the schedule's fields are taken, on every backend. */
TEST plan_schedule(void) {
    static const int32_t v_splits[] = { 1, 2 }, steps[] = { -1, 1, 64, (1 << 25) - 1 };
    static const float tolerances[] = { 1e-30f, 1e-7f, 1.0f };
    size_t i;
    fqla_plan *plan = NULL;
    for (i = 0; i < 9; i++) {
        fqla_plan_desc d = good_plan();
        if (i < 2) d.v_split = v_splits[i];
        else if (i < 6) d.segment_chunks = steps[i - 2];
        else d.warm_up_tolerance = tolerances[i - 6];
        if (d.segment_chunks > 0) d.max_tokens = 64 * 64;
        ASSERT_EQ(FQLA_OK, fqla_plan_create(test_shared(), &d, &plan));
        fqla_plan_destroy(plan);
    }
    PASS();
}

TEST plan_unsupported(void) {
    REFUSED_PLAN(FQLA_ERROR_UNSUPPORTED, "state_dtype", "FP16", d.state_dtype = FQLA_DTYPE_FP16);
    REFUSED_PLAN(FQLA_ERROR_UNSUPPORTED, "backward", "LINEAR", d.backward = 1; d.gate = FQLA_GATE_LINEAR);
    REFUSED_PLAN(FQLA_ERROR_UNSUPPORTED, "backward", "4", d.backward = 1; d.pool_size = 4);
    if (test_on_cuda()) {
        REFUSED_PLAN(FQLA_ERROR_UNSUPPORTED, "dtype", "FP32", d.dtype = FQLA_DTYPE_FP32);
        REFUSED_PLAN(FQLA_ERROR_UNSUPPORTED, "dim_k", "64", d.dim_k = 64);
        REFUSED_PLAN(FQLA_ERROR_UNSUPPORTED, "dim_v", "256", d.dim_v = 256);
    }
    PASS();
}

TEST plan_cu_seqlens(void) {
    static const int32_t above_zero[4] = { 1, 5, 5, 12 }, below_zero[4] = { -1, 5, 5, 12 }, decreasing[4] = { 0, 5, 4, 12 };
    static const int32_t wrapped[4] = { 0, INT32_MAX, INT32_MIN, -7 }, to_negative[4] = { 0, 0, 0, -1 };
    REFUSED_PLAN(FQLA_ERROR_INVALID_SEQLENS, "cu_seqlens[0]", "1", d.cu_seqlens = above_zero);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SEQLENS, "cu_seqlens[0]", "-1", d.cu_seqlens = below_zero);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SEQLENS, "cu_seqlens[2]", "4", d.cu_seqlens = decreasing);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SEQLENS, "cu_seqlens[2]", "-2147483648", d.cu_seqlens = wrapped);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SEQLENS, "cu_seqlens[3]", "-1", d.cu_seqlens = to_negative);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SEQLENS, "cu_seqlens[3]", "12", d.max_tokens = 11);
    REFUSED_PLAN(FQLA_ERROR_INVALID_SEQLENS, "padded_len", "6", d.padded_len = 6);
    PASS();
}

TEST plan_strides(void) {
    static const int32_t one[2] = { 0, 1 };
    REFUSED_PLAN(FQLA_ERROR_INVALID_STRIDE, "strides.q", "-256", d.strides.q.token = -256);
    REFUSED_PLAN(FQLA_ERROR_INVALID_STRIDE, "strides.k", "-128", d.strides.k.head = -128);
    REFUSED_PLAN(FQLA_ERROR_INVALID_STRIDE, "strides.v", "-9223372036854775808", d.strides.v.token = INT64_MIN);
    REFUSED_PLAN(FQLA_ERROR_INVALID_STRIDE, "strides.o", "-1", d.strides.o.head = -1);
    REFUSED_PLAN(FQLA_ERROR_INVALID_STRIDE, "strides.g", "-1", d.strides.g.token = -1);
    REFUSED_PLAN(FQLA_ERROR_INVALID_STRIDE, "strides.beta", "-1", d.strides.beta.head = -1);
    /* tokens, heads, or the one inside the other's plane that overlap */
    REFUSED_PLAN(FQLA_ERROR_INVALID_STRIDE, "strides.q", "128", d.strides.q.token = 128);
    REFUSED_PLAN(FQLA_ERROR_INVALID_STRIDE, "strides.k", "64", d.strides.k.head = 64);
    REFUSED_PLAN(FQLA_ERROR_INVALID_STRIDE, "strides.v", "1408", d.strides.v.token = 128; d.strides.v.head = 11 * 128);
    REFUSED_PLAN(FQLA_ERROR_INVALID_STRIDE, "strides.o", "504", d.strides.o.token = 504);
    REFUSED_PLAN(FQLA_ERROR_INVALID_STRIDE, "strides.g", "3", d.strides.g.token = 3);
    REFUSED_PLAN(FQLA_ERROR_INVALID_STRIDE, "strides.beta", "11", d.strides.beta.token = 1; d.strides.beta.head = 11);
    REFUSED_PLAN(FQLA_ERROR_TOO_LARGE, "strides.q", "9223372036854775807", d.strides.q.token = INT64_MAX);
    REFUSED_PLAN(FQLA_ERROR_TOO_LARGE, "strides.k", "9223372036854775807", d.strides.k.head = INT64_MAX);
    REFUSED_PLAN(FQLA_ERROR_TOO_LARGE, "strides.v", "4611686018427387904", d.strides.v.token = (int64_t)1 << 62);
    /* with one token, or one head, the stride is never multiplied; it is still refused */
    REFUSED_PLAN(FQLA_ERROR_TOO_LARGE, "strides.q", "9223372036854775807", d.num_seqs = 1; d.cu_seqlens = one;
                 d.strides.q.token = INT64_MAX);
    REFUSED_PLAN(FQLA_ERROR_TOO_LARGE, "strides.q", "9223372036854775807", d.heads_qk = 1; d.strides.q.head = INT64_MAX;
                 d.strides.q.token = 128);
    if (test_on_cuda()) {
        REFUSED_PLAN(FQLA_ERROR_MISALIGNED, "strides.q", "260", d.strides.q.token = 260);
        REFUSED_PLAN(FQLA_ERROR_MISALIGNED, "strides.k", "132", d.strides.k.head = 132);
        REFUSED_PLAN(FQLA_ERROR_MISALIGNED, "strides.v", "516", d.strides.v.token = 516);
        REFUSED_PLAN(FQLA_ERROR_MISALIGNED, "strides.o", "129", d.strides.o.head = 129);
    }
    PASS();
}

TEST plan_too_large(void) {
    REFUSED_PLAN(FQLA_ERROR_TOO_LARGE, "padded_len", "1000000000", d.padded_len = 1000000000);
    REFUSED_PLAN(FQLA_ERROR_TOO_LARGE, "padded_len", "2147483647", d.padded_len = INT32_MAX; d.max_seqs = 1 << 20);
    REFUSED_PLAN(FQLA_ERROR_TOO_LARGE, "pool_size", "2147483647", d.heads_v = 65536; d.pool_size = d.max_tokens = INT32_MAX);
    PASS();
}

TEST plan_functions(void) {
    fqla_plan_desc desc = good_plan();
    fqla_plan *plan = NULL;
    fqla_plan_summary before, after;
    static const int32_t decreasing[4] = { 0, 5, 4, 12 }, above_zero[4] = { 1, 5, 5, 12 }, too_long[4] = { 0, 5, 5, 13 };
    size_t bytes;
    test_host *host = &test_shared_host;
    desc.checkpoint_every = 1;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(test_shared(), &desc, &plan));
    ASSERT_EQ(FQLA_OK, fqla_plan_info(plan, &before));
    ASSERT_EQ(FQLA_ERROR_NULL_POINTER, fqla_plan_update(NULL, 3, lens_3, NULL));
    ASSERT_EQ(FQLA_ERROR_NULL_POINTER, fqla_plan_info(NULL, &after));
    ASSERT_EQ(FQLA_ERROR_NULL_POINTER, fqla_workspace_size(NULL, &bytes));
    ASSERT_EQ(FQLA_ERROR_NULL_POINTER, fqla_residuals_size(NULL, &bytes));
#define REFUSED(status, field, value, call) ASSERT_SILENT(test_refusal(host, status, call, field, value))
    REFUSED(FQLA_ERROR_NULL_POINTER, "summary", NULL, fqla_plan_info(plan, NULL));
    REFUSED(FQLA_ERROR_NULL_POINTER, "bytes", NULL, fqla_workspace_size(plan, NULL));
    REFUSED(FQLA_ERROR_NULL_POINTER, "bytes", NULL, fqla_residuals_size(plan, NULL));
    REFUSED(FQLA_ERROR_NULL_POINTER, "cu_seqlens", NULL, fqla_plan_update(plan, 3, NULL, NULL));
    REFUSED(FQLA_ERROR_INVALID_SIZE, "num_seqs", "4", fqla_plan_update(plan, 4, lens_3, NULL));
    REFUSED(FQLA_ERROR_INVALID_SIZE, "num_seqs", "0", fqla_plan_update(plan, 0, lens_3, NULL));
    REFUSED(FQLA_ERROR_INVALID_SIZE, "num_seqs", "-1", fqla_plan_update(plan, -1, lens_3, NULL));
    REFUSED(FQLA_ERROR_INVALID_SEQLENS, "cu_seqlens[2]", "4", fqla_plan_update(plan, 3, decreasing, NULL));
    REFUSED(FQLA_ERROR_INVALID_SEQLENS, "cu_seqlens[0]", "1", fqla_plan_update(plan, 3, above_zero, NULL));
    REFUSED(FQLA_ERROR_INVALID_SEQLENS, "cu_seqlens[3]", "13", fqla_plan_update(plan, 3, too_long, NULL));
#undef REFUSED
    ASSERT_EQ(FQLA_OK, fqla_plan_info(plan, &after));
    ASSERT_MEM_EQ(&before, &after, sizeof after); /* the plan is as before */
    fqla_plan_destroy(plan);
    PASS();
}

/* ---- runs */

/* A pointer in one of the args structs. */
typedef struct argument {
    const char *name;
    size_t offset;
    case_tensor_name tensor;
    enum { INPUT, OUTPUT } role;
    bool required;
    int cuda_alignment;
} argument;

#define FIELD(type, field, tensor, role, required, alignment) { #field, offsetof(type, field), tensor, role, required, alignment }

static const argument forward_arguments[] = {
    FIELD(fqla_forward_args, q, T_Q, INPUT, true, 16),
    FIELD(fqla_forward_args, k, T_K, INPUT, true, 16),
    FIELD(fqla_forward_args, v, T_V, INPUT, true, 16),
    FIELD(fqla_forward_args, g, T_G, INPUT, true, 2),
    FIELD(fqla_forward_args, beta, T_BETA, INPUT, true, 2),
    FIELD(fqla_forward_args, A_log, T_A_LOG, INPUT, true, 4),
    FIELD(fqla_forward_args, dt_bias, T_DT_BIAS, INPUT, true, 4),
    FIELD(fqla_forward_args, h0, T_H0, INPUT, true, 16),
    FIELD(fqla_forward_args, o, T_O, OUTPUT, true, 16),
    FIELD(fqla_forward_args, ht, T_HT, OUTPUT, true, 16),
    FIELD(fqla_forward_args, state_in, T_STATE_IN, INPUT, true, 4),
    FIELD(fqla_forward_args, state_out, T_STATE_OUT, INPUT, true, 4),
    FIELD(fqla_forward_args, checkpoints, T_SNAPSHOTS, OUTPUT, true, 16),
    FIELD(fqla_forward_args, bad_index_count, T_BAD_INDEX_COUNT, OUTPUT, false, 4),
    FIELD(fqla_forward_args, workspace, T_WORKSPACE, OUTPUT, true, 256),
};
static const argument decode_arguments[] = {
    FIELD(fqla_decode_args, q, T_Q, INPUT, true, 16),
    FIELD(fqla_decode_args, k, T_K, INPUT, true, 16),
    FIELD(fqla_decode_args, v, T_V, INPUT, true, 16),
    FIELD(fqla_decode_args, g, T_G, INPUT, true, 2),
    FIELD(fqla_decode_args, beta, T_BETA, INPUT, true, 2),
    FIELD(fqla_decode_args, A_log, T_A_LOG, INPUT, true, 4),
    FIELD(fqla_decode_args, dt_bias, T_DT_BIAS, INPUT, true, 4),
    FIELD(fqla_decode_args, h0, T_H0, INPUT, true, 16),
    FIELD(fqla_decode_args, o, T_O, OUTPUT, true, 16),
    FIELD(fqla_decode_args, ht, T_HT, OUTPUT, true, 16),
    FIELD(fqla_decode_args, state_in, T_STATE_IN, INPUT, true, 4),
    FIELD(fqla_decode_args, state_out, T_STATE_OUT, INPUT, true, 4),
    FIELD(fqla_decode_args, states, T_SNAPSHOTS, OUTPUT, false, 16),
    FIELD(fqla_decode_args, bad_index_count, T_BAD_INDEX_COUNT, OUTPUT, false, 4),
    FIELD(fqla_decode_args, workspace, T_WORKSPACE, OUTPUT, true, 256),
};
static const argument backward_arguments[] = {
    FIELD(fqla_backward_args, q, T_Q, INPUT, true, 16),
    FIELD(fqla_backward_args, k, T_K, INPUT, true, 16),
    FIELD(fqla_backward_args, v, T_V, INPUT, true, 16),
    FIELD(fqla_backward_args, g, T_G, INPUT, true, 2),
    FIELD(fqla_backward_args, beta, T_BETA, INPUT, true, 2),
    FIELD(fqla_backward_args, A_log, T_A_LOG, INPUT, true, 4),
    FIELD(fqla_backward_args, dt_bias, T_DT_BIAS, INPUT, true, 4),
    FIELD(fqla_backward_args, h0, T_H0, INPUT, false, 16),
    FIELD(fqla_backward_args, do_, T_DO, INPUT, true, 16),
    FIELD(fqla_backward_args, dht, T_DHT, INPUT, false, 16),
    FIELD(fqla_backward_args, dq, T_DQ, OUTPUT, true, 16),
    FIELD(fqla_backward_args, dk, T_DK, OUTPUT, true, 16),
    FIELD(fqla_backward_args, dv, T_DV, OUTPUT, true, 16),
    FIELD(fqla_backward_args, dg, T_DG, OUTPUT, true, 2),
    FIELD(fqla_backward_args, dbeta, T_DBETA, OUTPUT, true, 2),
    FIELD(fqla_backward_args, dh0, T_DH0, OUTPUT, false, 16),
    FIELD(fqla_backward_args, dA_log, T_DA_LOG, OUTPUT, true, 4),
    FIELD(fqla_backward_args, ddt_bias, T_DDT_BIAS, OUTPUT, true, 4),
    FIELD(fqla_backward_args, residuals, T_RESIDUALS, INPUT, false, 16),
    FIELD(fqla_backward_args, workspace, T_WORKSPACE, OUTPUT, true, 256),
};

typedef enum operation { FORWARD, DECODE, BACKWARD } operation;
static const struct {
    const argument *arguments;
    size_t count;
} operations[] = { { forward_arguments, sizeof forward_arguments / sizeof *forward_arguments },
                   { decode_arguments, sizeof decode_arguments / sizeof *decode_arguments },
                   { backward_arguments, sizeof backward_arguments / sizeof *backward_arguments } };

typedef union any_args {
    fqla_forward_args forward;
    fqla_decode_args decode;
    fqla_backward_args backward;
} any_args;

static any_args good_args(const test_case *c, operation op) {
    any_args args;
    memset(&args, 0, sizeof args);
    if (op == FORWARD) args.forward = case_forward_args(c);
    else if (op == DECODE) args.decode = case_decode_args(c);
    else args.backward = case_backward_args(c);
    return args;
}

static char *get_pointer(const any_args *args, const argument *a) {
    char *pointer;
    memcpy(&pointer, (const char *)args + a->offset, sizeof pointer);
    return pointer;
}

static void set_pointer(any_args *args, const argument *a, const char *pointer) {
    memcpy((char *)args + a->offset, &pointer, sizeof pointer);
}

/* The call, its refusal, and that nothing was written. */
static const char *refused_run(test_case *c, operation op, const any_args *args, fqla_status expected, const char *field,
                               const char *value) {
    static char text[1100];
    const char *message;
    fqla_status status;
    if (op == FORWARD) status = fqla_forward(c->plan, &args->forward, NULL);
    else if (op == DECODE) status = fqla_decode(c->plan, &args->decode, NULL);
    else status = fqla_backward(c->plan, &args->backward, NULL);
    message = test_refusal(c->host, expected, status, field, value);
    if (message == NULL) {
        case_download(c);
        message = case_untouched(c);
    }
    if (message == NULL) return NULL;
    snprintf(text, sizeof text, "%s, about %s: %s", op == FORWARD ? "forward" : op == DECODE ? "decode" : "backward", field,
             message);
    return text;
}

/* Everything that a call has: raw gates, a pool (not for the backward), snapshots. Small dims where the backend has them. */
static case_spec full_spec(operation op) {
    case_spec spec = { .name = "full", .lens = { 65, 3 }, .seed = 3,
                       .plan = { .heads_qk = 1, .heads_v = 2, .num_seqs = 2, .gate = FQLA_GATE_RAW, .beta = FQLA_BETA_SIGMOID } };
    if (!test_on_cuda()) spec.plan.dim_k = 16, spec.plan.dim_v = 24;
    if (op == BACKWARD) spec.plan.backward = 1, spec.residuals = true;
    else spec.plan.pool_size = 5;
    if (op == FORWARD) spec.plan.checkpoint_every = 1;
    if (op == DECODE) spec.decode_tokens = test_on_cuda() ? 1 : 2, spec.keep_states = !test_on_cuda();
    return spec;
}

TEST arguments_of(operation op) {
    static test_case c;
    const case_spec spec = full_spec(op);
    const argument *arguments = operations[op].arguments;
    const size_t count = operations[op].count;
    const any_args zero = { .forward = { .q = NULL } };
    size_t i, j;
    ASSERT_EQ(FQLA_OK, case_open(&c, test_shared(), &test_shared_host, &spec));
    case_upload(&c);
    atomic_store(&test_shared_host.errors, 0);
    {
        const fqla_status no_plan = op == FORWARD ? fqla_forward(NULL, &zero.forward, NULL)
                                    : op == DECODE ? fqla_decode(NULL, &zero.decode, NULL)
                                        : fqla_backward(NULL, &zero.backward, NULL);
        const fqla_status no_args = op == FORWARD ? fqla_forward(c.plan, NULL, NULL)
                                    : op == DECODE ? fqla_decode(c.plan, NULL, NULL) : fqla_backward(c.plan, NULL, NULL);
        ASSERT_EQ(FQLA_ERROR_NULL_POINTER, no_plan);
        ASSERT_SILENT(test_refusal(&test_shared_host, FQLA_ERROR_NULL_POINTER, no_args, "args", NULL));
    }
    for (i = 0; i < count; i++) {
        const argument *a = &arguments[i];
        any_args args = good_args(&c, op);
        char *good = get_pointer(&args, a);
        const int alignment = test_on_cuda() ? a->cuda_alignment : a->tensor == T_WORKSPACE ? 256
            : c.t[a->tensor].dtype == FQLA_DTYPE_FP32 ? 4 : 2;
        if (good == NULL) continue; /* a backend without workspace, or without snapshots */
        if (a->required) {
            set_pointer(&args, a, NULL);
            ASSERT_SILENT(refused_run(&c, op, &args, FQLA_ERROR_NULL_POINTER, a->name, "NULL"));
        }
        set_pointer(&args, a, good + 1);
        ASSERT_SILENT(refused_run(&c, op, &args, FQLA_ERROR_MISALIGNED, a->name, NULL));
        set_pointer(&args, a, good + alignment / 2);
        ASSERT_SILENT(refused_run(&c, op, &args, FQLA_ERROR_MISALIGNED, a->name, NULL));
        if (c.buffers[a->tensor].size > 1024) { /* so near the end of the address space that it does not fit */
            set_pointer(&args, a, (const char *)(UINTPTR_MAX - 255));
            ASSERT_SILENT(refused_run(&c, op, &args, FQLA_ERROR_TOO_LARGE, a->name, NULL));
        }
        for (j = 0; j < count && a->role == OUTPUT; j++) { /* an output over any other tensor, exactly and shifted */
            char *other = get_pointer(&args, &arguments[j]);
            if (j == i || other == NULL) continue;
            if (a->tensor == T_HT && arguments[j].tensor == T_H0) continue; /* allowed: case_spec.in_place */
            set_pointer(&args, a, other);
            ASSERT_SILENT(refused_run(&c, op, &args, FQLA_ERROR_OVERLAP, a->name, "overlaps"));
        }
        if (a->tensor == T_HT && op != BACKWARD) { /* h0 itself may be ht, a shifted one not */
            set_pointer(&args, a, get_pointer(&args, &arguments[7]) + 16);
            ASSERT_SILENT(refused_run(&c, op, &args, FQLA_ERROR_OVERLAP, "ht", "overlaps h0"));
        }
    }
    case_close(&c);
    PASS();
}

TEST workspace_of(operation op) {
    static test_case c;
    const case_spec spec = full_spec(op);
    any_args args;
    char size[32];
    ASSERT_EQ(FQLA_OK, case_open(&c, test_shared(), &test_shared_host, &spec));
    case_upload(&c);
    atomic_store(&test_shared_host.errors, 0);
    if (c.summary.workspace_size > 0) {
        args = good_args(&c, op);
        if (op == FORWARD) args.forward.workspace_size--;
        else if (op == DECODE) args.decode.workspace_size--;
        else args.backward.workspace_size--;
        snprintf(size, sizeof size, "%llu", (unsigned long long)c.summary.workspace_size - 1);
        ASSERT_SILENT(refused_run(&c, op, &args, FQLA_ERROR_WORKSPACE_TOO_SMALL, "workspace_size", size));
    }
    case_close(&c);
    PASS();
}

/* The same plan and contexts as every refusal above had still give the right answer. */
TEST works_after_refusals(operation op) {
    static test_case c;
    const case_spec spec = full_spec(op);
    any_args args;
    ASSERT_EQ(FQLA_OK, case_open(&c, test_shared(), &test_shared_host, &spec));
    case_upload(&c);
    atomic_store(&test_shared_host.errors, 0);
    args = good_args(&c, op);
    set_pointer(&args, &operations[op].arguments[0], NULL);
    ASSERT_SILENT(refused_run(&c, op, &args, FQLA_ERROR_NULL_POINTER, "q", NULL));
    ASSERT_EQ(FQLA_OK, case_run(&c));
    ASSERT_SILENT(case_compare(&c));
    if (op == BACKWARD) {
        ASSERT_EQ(FQLA_OK, case_run_backward(&c));
        ASSERT_SILENT(case_compare_backward(&c));
    }
    case_close(&c);
    PASS();
}

TEST decode_tokens(void) {
    static test_case c;
    const case_spec spec = full_spec(DECODE);
    any_args args;
    ASSERT_EQ(FQLA_OK, case_open(&c, test_shared(), &test_shared_host, &spec));
    case_upload(&c);
    atomic_store(&test_shared_host.errors, 0);
    args = good_args(&c, DECODE);
    args.decode.num_tokens = -1;
    ASSERT_SILENT(refused_run(&c, DECODE, &args, FQLA_ERROR_INVALID_SIZE, "num_tokens", "-1"));
    args.decode.num_tokens = FLASHQLA_MAX_DECODE_TOKENS + 1;
    ASSERT_SILENT(refused_run(&c, DECODE, &args, FQLA_ERROR_INVALID_SIZE, "num_tokens", "9"));
    case_close(&c);
    PASS();
}

/* A decode has more rows than the plan's forward: strides that suit the one need not suit the other. */
TEST decode_strides(void) {
    static const int32_t cu[4] = { 0, 1, 1, 1 };
    fqla_plan_desc desc = { .heads_qk = 2, .heads_v = 2, .num_seqs = 3, .cu_seqlens = cu };
    const fqla_decode_args args = { .num_tokens = 1 };
    fqla_plan *plan = NULL;
    desc.strides.v.token = 128;
    desc.strides.v.head = 128;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(test_shared(), &desc, &plan));
    ASSERT_SILENT(test_refusal(&test_shared_host, FQLA_ERROR_INVALID_STRIDE, fqla_decode(plan, &args, NULL), "strides.v", "128"));
    fqla_plan_destroy(plan);
    PASS();
}

/* What a plan does not have must not be given. */
TEST arguments_that_the_plan_lacks(void) {
    static test_case c;
    case_spec spec = full_spec(FORWARD);
    static const int32_t index[2] = { -1, -1 };
    any_args args;
    spec.plan.pool_size = 0;
    spec.plan.checkpoint_every = 0;
    ASSERT_EQ(FQLA_OK, case_open(&c, test_shared(), &test_shared_host, &spec));
    case_upload(&c);
    atomic_store(&test_shared_host.errors, 0);
    args = good_args(&c, FORWARD);
    args.forward.state_in = index;
    ASSERT_SILENT(refused_run(&c, FORWARD, &args, FQLA_ERROR_INVALID_VALUE, "state_in", "0"));
    args = good_args(&c, FORWARD);
    args.forward.state_out = index;
    ASSERT_SILENT(refused_run(&c, FORWARD, &args, FQLA_ERROR_INVALID_VALUE, "state_out", "0"));
    args = good_args(&c, FORWARD);
    args.forward.checkpoints = args.forward.o;
    ASSERT_SILENT(refused_run(&c, FORWARD, &args, FQLA_ERROR_INVALID_VALUE, "checkpoints", "0"));
    case_close(&c);
    PASS();
}

/* Interleaved rows of one buffer are no overlap; rows that touch are. */
TEST interleaved_rows(void) {
    enum { TOKENS = 4, ROW = 4 * 128 + 128 };
    static const int32_t cu[2] = { 0, TOKENS };
    fqla_context *context = test_shared();
    fqla_plan_desc desc = { .heads_qk = 1, .heads_v = 1, .num_seqs = 1, .cu_seqlens = cu, .dtype = FQLA_DTYPE_BF16 };
    fqla_plan *plan = NULL;
    fqla_forward_args args = { .q = NULL };
    const fqla_strides row = { ROW, 128 };
    void *rows = NULL, *gates = NULL;
    uint16_t *at;
    float zeros[2 * TOKENS] = { 0.0f };
    static uint16_t clean[TOKENS * ROW];
    desc.strides.q = desc.strides.k = desc.strides.v = desc.strides.o = row;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, sizeof clean, &rows));
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, sizeof zeros, &gates));
    ASSERT_EQ(FQLA_OK, fqla_upload(context, rows, clean, sizeof clean, NULL));
    ASSERT_EQ(FQLA_OK, fqla_upload(context, gates, zeros, sizeof zeros, NULL));
    at = (uint16_t *)rows;
    args.q = at;
    args.k = at + 128;
    args.v = at + 256;
    args.o = at + 384;
    args.g = gates;
    args.beta = (const char *)gates + sizeof zeros / 2;
    ASSERT_EQ(FQLA_OK, fqla_forward(plan, &args, NULL));
    ASSERT_EQ(FQLA_OK, fqla_synchronize(context, NULL));
    atomic_store(&test_shared_host.errors, 0);
    args.o = at + 384 - 8; /* v's last 8 columns */
    ASSERT_SILENT(test_refusal(&test_shared_host, FQLA_ERROR_OVERLAP, fqla_forward(plan, &args, NULL), "o at", "v at"));
    args.o = at + ROW - 120; /* into q of the next row */
    ASSERT_SILENT(test_refusal(&test_shared_host, FQLA_ERROR_OVERLAP, fqla_forward(plan, &args, NULL), "o at", "q at"));
    ASSERT_EQ(FQLA_OK, fqla_free(context, rows));
    ASSERT_EQ(FQLA_OK, fqla_free(context, gates));
    fqla_plan_destroy(plan);
    PASS();
}

/* On the CPU an index outside the pool, or an out slot that someone else uses, is refused. */
TEST pool_indices(operation op) {
    static test_case c;
    case_spec spec = full_spec(op);
    static const struct {
        int32_t in[3], out[3];
        bool in_place;
        const char *field, *value;
    } wrong[] = {
        { { 5, -1, -1 }, { -1, -1, -1 }, false, "state_in[0]", "5" },
        { { -1, -1, -2 }, { -1, -1, -1 }, false, "state_in[2]", "-2" },
        { { -1, INT32_MAX, -1 }, { -1, -1, -1 }, false, "state_in[1]", "2147483647" },
        { { -1, -1, -1 }, { INT32_MIN, -1, -1 }, false, "state_out[0]", "-2147483648" },
        { { 0, 1, 2 }, { 0, 5, 2 }, true, "state_out[1]", "5" },
        { { -1, -1, -1 }, { 3, 1, 3 }, false, "state_out[2]", "3" },
        { { 0, 1, 2 }, { 1, 0, 2 }, true, "state_in", "1" }, /* a swap within one pool: each overwrites what the other reads */
        { { 4, -1, 4 }, { -1, 4, -1 }, true, "state_in", "4" },
    };
    size_t i;
    int n;
    spec.plan.num_seqs = 3;
    for (i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        any_args args;
        spec.in_place = wrong[i].in_place;
        spec.plan.pool_size = 5;
        ASSERT_EQ(FQLA_OK, case_open(&c, test_shared(), &test_shared_host, &spec));
        for (n = 0; n < 3; n++) {
            case_set_index(&c, T_STATE_IN, n, wrong[i].in[n]);
            case_set_index(&c, T_STATE_OUT, n, wrong[i].out[n]);
        }
        case_upload(&c);
        atomic_store(&test_shared_host.errors, 0);
        args = good_args(&c, op);
        ASSERT_SILENT(refused_run(&c, op, &args, FQLA_ERROR_INVALID_INDEX, wrong[i].field, wrong[i].value));
        case_close(&c);
    }
    PASS();
}

SUITE(bad_input) {
    static const char *const names[] = { "forward", "decode", "backward" };
    int op;
    RUN_TEST(context_desc);
    RUN_TEST(cpu_level_beyond_the_machine);
    RUN_TEST(context_functions);
    RUN_TEST(plan_nulls);
    RUN_TEST(plan_sizes);
    RUN_TEST(plan_enums_and_flags);
    RUN_TEST(plan_schedule);
    RUN_TEST(plan_unsupported);
    RUN_TEST(plan_cu_seqlens);
    RUN_TEST(plan_strides);
    RUN_TEST(plan_too_large);
    RUN_TEST(plan_functions);
    for (op = FORWARD; op <= BACKWARD; op++) {
        greatest_set_test_suffix(names[op]);
        RUN_TESTp(arguments_of, (operation)op);
        greatest_set_test_suffix(names[op]);
        RUN_TESTp(workspace_of, (operation)op);
        greatest_set_test_suffix(names[op]);
        RUN_TESTp(works_after_refusals, (operation)op);
    }
    RUN_TEST(decode_tokens);
    RUN_TEST(decode_strides);
    RUN_TEST(arguments_that_the_plan_lacks);
    RUN_TEST(interleaved_rows);
    if (!test_on_cuda()) {
        greatest_set_test_suffix("forward");
        RUN_TESTp(pool_indices, FORWARD);
        greatest_set_test_suffix("decode");
        RUN_TESTp(pool_indices, DECODE);
    }
}
