/* A low_memory plan's backward on the fake driver: its windows' tables, its launches in their order, the states that parts of a sequence
   hand to one another, its size and what it refuses. */
#include "cuda_host.h"

enum { HEADS_QK = 16, HEADS_V = 32, SEQS = 6 };
/* short, empty, longer than a window, of many parts, short, long */
static const int32_t cu_seqlens[SEQS + 1] = {0, 300, 300, 2000, 13000, 13100, 15200};

static fqla_plan_desc plan_desc(void) {
    fqla_plan_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.heads_qk = HEADS_QK;
    desc.heads_v = HEADS_V;
    desc.num_seqs = SEQS;
    desc.cu_seqlens = cu_seqlens;
    desc.backward = desc.low_memory = desc.external_workspace = 1;
    return desc;
}

/* Addresses that no kernel of the fake driver looks at, far apart. */
static void *address(int which) { return (void *)(((uintptr_t)1 << 44) + ((uintptr_t)which << 36)); }
enum { WORKSPACE = 20, RESIDUALS };

static fqla_backward_args args_for(const fqla_plan *plan, int residuals) {
    fqla_backward_args a;
    int next = 0;
    memset(&a, 0, sizeof a);
    a.q = address(next++), a.k = address(next++), a.v = address(next++), a.g = address(next++), a.beta = address(next++);
    a.h0 = address(next++), a.do_ = address(next++), a.dht = address(next++);
    a.dq = address(next++), a.dk = address(next++), a.dv = address(next++), a.dg = address(next++), a.dbeta = address(next++);
    a.dh0 = address(next++);
    if (plan->desc.gate == FQLA_GATE_RAW) {
        a.A_log = (const float *)address(next++), a.dt_bias = (const float *)address(next++);
        a.dA_log = (float *)address(next++), a.ddt_bias = (float *)address(next++);
    }
    a.workspace = address(WORKSPACE);
    fqla_workspace_size(plan, &a.workspace_size);
    if (residuals) a.residuals = address(RESIDUALS), fqla_residuals_size(plan, &a.residuals_size);
    return a;
}

static fqla_status backward(fqla_plan *plan, const fqla_backward_args *args) {
    fake.fake_cuda_settings()->parameter_bytes = sizeof(fqla__backward_params);
    return fqla_backward(plan, args, NULL);
}

static fqla__backward_params parameters_of(int launch) {
    const fake_cuda_launch record = fake.fake_cuda_launch_at(launch);
    fqla__backward_params p;
    memcpy(&p, record.parameters, sizeof p);
    return p;
}

static int is(int launch, const char *kernel) { return strncmp(fake.fake_cuda_launch_at(launch).kernel, kernel, strlen(kernel)) == 0; }

/* Sequence n's entry of h0, dht or dh0. */
static const void *entry_of(const fqla_plan *plan, const void *states, int32_t n) {
    return (const char *)states + (size_t)n * HEADS_V * 128 * 128 * (plan->desc.state_dtype == FQLA_DTYPE_BF16 ? 2 : 4);
}

/* The n-th sequence of a window's table lies where it ought to; *tokens: how many. */
static enum greatest_test_res piece_fits(const fqla__device_table *table, int32_t i, int64_t row, int64_t *tokens) {
    const fqla__device_sequence *s = (const fqla__device_sequence *)(table + 1) + i;
    ASSERT_EQ(row, s->row);
    ASSERT_EQ(-1, s->kept);
    *tokens = s->len;
    PASS();
}

/* Every sequence once, whole or part by part; what starts and ends where; nothing of the workspace beyond its size. */
TEST window_by_window(fqla_dtype state_dtype, fqla_gate gate, int residuals) {
    fqla_context *context = open_cuda();
    fqla_plan_desc desc = plan_desc();
    fqla_plan *plan = NULL;
    fqla_backward_args args;
    int launch = 0, n = 0, part = 0, backwards = 0, longest = 0;
    int64_t row = 0, most = 0;
    desc.state_dtype = state_dtype;
    desc.gate = gate;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
    args = args_for(plan, residuals);
    ASSERT_EQ(FQLA_OK, backward(plan, &args));
    most = fqla__window_chunks(plan);
    ASSERT(most > 1 && most * 64 < 2100); /* or the lengths above say nothing */
    while (n < SEQS) {
        const int prepare = !residuals;
        const int chains = launch + prepare;
        const fqla__backward_params p = parameters_of(chains);
        const fqla__device_table *table = p.forward.table;
        const int64_t parts = (cu_seqlens[n + 1] - cu_seqlens[n] + most * 64 - 1) / (most * 64);
        const int first = part == 0, last = part + 1 >= parts, alone = parts > 1 && !backwards && !last;
        const char *workspace = (const char *)args.workspace, *end = workspace + args.workspace_size;
        int64_t tokens, chunks = 0;
        int32_t i;
        ASSERT(launch < fake.fake_cuda_launches());
        if (prepare) {
            ASSERT(is(launch, "prepare_") && !fake.fake_cuda_launch_at(launch).dependent);
            ASSERT_EQ((unsigned int)table->chunks * HEADS_V, fake.fake_cuda_launch_at(launch).grid[0] * 2);
            ASSERT(parameters_of(launch).forward.table == table);
            ASSERT((const char *)p.forward.prepared >= workspace);
            ASSERT((const char *)(p.forward.prepared + table->chunks * HEADS_V) <= (const char *)p.chunks);
        } else {
            ASSERT(p.forward.prepared == (const fqla__prepared_chunk *)args.residuals +
                                             (row == 0 ? 0 : (n > 2 ? 32 + (n > 3 ? 172 + (n > 4 ? 2 : 0) : 0) : 5) + part * most) * HEADS_V);
        }
        ASSERT(is(chains, "backward_chains_"));
        ASSERT_EQ(chains > 0, fake.fake_cuda_launch_at(chains).dependent);
        ASSERT_EQ((unsigned int)table->num_seqs * HEADS_V * (alone ? 2 : 4), fake.fake_cuda_launch_at(chains).grid[0]);
        ASSERT((const char *)(p.chunks + table->chunks * HEADS_V) <= end);
        ASSERT(table->chunks <= most);
        for (i = 0; i < table->num_seqs; i++) {
            CHECK_CALL(piece_fits(table, i, cu_seqlens[n + i] + part * most * 64, &tokens));
            ASSERT_EQ(chunks, ((const fqla__device_sequence *)(table + 1) + i)->chunk);
            ASSERT_EQ(parts > 1 && !last ? most * 64 : cu_seqlens[n + i + 1] - cu_seqlens[n + i] - part * most * 64, tokens);
            chunks += (tokens + 63) / 64;
        }
        ASSERT_EQ(chunks, table->chunks);
        /* what it starts from and what it leaves */
        if (first) ASSERT(p.forward.h0 == entry_of(plan, args.h0, n));
        else ASSERT((const char *)p.forward.h0 == (const char *)p.forward.states + (size_t)(part - 1) * HEADS_V * 65536);
        ASSERT_EQ(first ? 0 : FQLA__CARRIED_H0, p.carried & FQLA__CARRIED_H0);
        if (alone) {
            ASSERT((char *)p.carry == (char *)p.forward.states + (size_t)part * HEADS_V * 65536);
            ASSERT((const char *)p.carry + HEADS_V * 65536 <= (const char *)p.gradients);
            part++;
            launch = chains + 1;
            continue;
        }
        ASSERT(p.carry == NULL);
        if (last) ASSERT(p.dht == entry_of(plan, args.dht, n) && !(p.carried & FQLA__CARRIED_DHT));
        else ASSERT(p.dht == parameters_of(launch - 1).dh0 && (p.carried & FQLA__CARRIED_DHT)); /* the part's after it */
        if (first) ASSERT(p.dh0 == entry_of(plan, args.dh0, n) && !(p.carried & FQLA__CARRIED_DH0));
        else ASSERT(p.dh0 != p.dht && (p.carried & FQLA__CARRIED_DH0));
        launch = chains + 1;
        if (table->chunks > 0) {
            const unsigned int items = (unsigned int)table->chunks * HEADS_QK;
            ASSERT(is(launch, "backward_gradients_") && fake.fake_cuda_launch_at(launch).dependent);
            ASSERT_EQ(items < 132 ? items : 132, fake.fake_cuda_launch_at(launch).grid[0]);
            launch++;
        }
        if (part > longest) longest = part;
        backwards = part > 0;
        if (part > 0) part--;
        else n += (int)table->num_seqs;
        row = n < SEQS ? cu_seqlens[n] + part * most * 64 : 0;
    }
    ASSERT(longest >= 4);
    if (gate == FQLA_GATE_RAW) {
        const fqla__backward_params p = parameters_of(launch);
        ASSERT(is(launch, "backward_sums"));
        ASSERT_EQ(plan->chunks, p.forward.table->chunks);
        ASSERT((const char *)(p.gate_sums + (size_t)plan->chunks * HEADS_V * 2) <= (const char *)args.workspace + args.workspace_size);
        launch++;
    }
    ASSERT_EQ(launch, fake.fake_cuda_launches());
    fqla_plan_destroy(plan);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* 16/32, one sequence of 131072 tokens: below 256 MB; and never more than without. */
TEST sizes(void) {
    static const int32_t lengths[] = {1, 64, 1000, 8192, 32768, 131072, 1000000};
    fqla_context *context = open_cuda();
    size_t i;
    for (i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        const int32_t one[2] = {0, lengths[i]};
        fqla_plan_desc desc = plan_desc();
        fqla_plan *plan = NULL;
        size_t low = 0, whole = 0;
        desc.num_seqs = 1;
        desc.cu_seqlens = one;
        ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
        ASSERT_EQ(FQLA_OK, fqla_workspace_size(plan, &low));
        fqla_plan_destroy(plan);
        desc.low_memory = 0;
        ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
        ASSERT_EQ(FQLA_OK, fqla_workspace_size(plan, &whole));
        fqla_plan_destroy(plan);
        ASSERT(low <= whole);
        if (lengths[i] <= 131072) ASSERT(low < 256000000u);
    }
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

TEST refusals(void) {
    static const int32_t other[2] = {0, 5};
    fqla_context *context = open_cuda();
    fqla_plan_desc desc = plan_desc();
    fqla_plan *plan = NULL;
    fqla_forward_args args;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
    CHECK_CALL(refused(FQLA_ERROR_UNSUPPORTED, fqla_plan_update(plan, 1, other, NULL), "low_memory is 1"));
    memset(&args, 0, sizeof args);
    args.q = address(0), args.k = address(1), args.v = address(2), args.g = address(3), args.beta = address(4), args.o = address(5);
    args.workspace = address(WORKSPACE);
    ASSERT_EQ(FQLA_OK, fqla_workspace_size(plan, &args.workspace_size));
    CHECK_CALL(refused(FQLA_ERROR_NULL_POINTER, fqla_forward(plan, &args, NULL), "residuals is NULL"));
    ASSERT_EQ(0, fake.fake_cuda_launches());
    args.residuals = address(RESIDUALS);
    ASSERT_EQ(FQLA_OK, fqla_residuals_size(plan, &args.residuals_size));
    fake.fake_cuda_settings()->parameter_bytes = sizeof(fqla__forward_params);
    ASSERT_EQ(FQLA_OK, fqla_forward(plan, &args, NULL));
    fqla_plan_destroy(plan);
    desc.backward = 0;
    CHECK_CALL(refused(FQLA_ERROR_INVALID_VALUE, fqla_plan_create(context, &desc, &plan), "low_memory is 1"));
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* Whatever launch fails, the call says so and the next one works. */
TEST a_launch_fails(void) {
    fqla_context *context = open_cuda();
    fqla_plan_desc desc = plan_desc();
    fqla_plan *plan = NULL;
    fqla_backward_args args;
    int nth, launches = 0;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
    args = args_for(plan, 0);
    for (nth = 1; nth < 40; nth++) { /* of the driver's calls; the first are no launches */
        fqla_status status;
        fake.fake_cuda_settings()->fail_call = nth;
        fake.fake_cuda_settings()->fail_result = 999;
        status = backward(plan, &args);
        ASSERT_EQ(nth, nth * (status != FQLA_OK));
        launches += strcmp(fake.fake_cuda_failed_call(), "cuLaunchKernelEx") == 0;
    }
    ASSERT(launches > 20);
    ASSERT_EQ(FQLA_OK, backward(plan, &args));
    fqla_plan_destroy(plan);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

SUITE(windows) {
    int bf16, raw, residuals;
    SET_SETUP(start, NULL);
    for (bf16 = 0; bf16 < 2; bf16++)
        for (raw = 0; raw < 2; raw++)
            for (residuals = 0; residuals < 2; residuals++)
                RUN_TESTp(window_by_window, bf16 ? FQLA_DTYPE_BF16 : FQLA_DTYPE_FP32, raw ? FQLA_GATE_RAW : FQLA_GATE_LOG, residuals);
    RUN_TEST(sizes);
    RUN_TEST(refusals);
    RUN_TEST(a_launch_fails);
}

GREATEST_MAIN_DEFS();

int main(int argc, char **argv) {
    if (!find_fake()) {
        fprintf(stderr, "test_cuda_windows: " FIRST_LIBRARY " is not the fake driver; LD_LIBRARY_PATH leads to it\n");
        return 2;
    }
    GREATEST_MAIN_BEGIN();
    RUN_SUITE(windows);
    GREATEST_MAIN_END();
}
