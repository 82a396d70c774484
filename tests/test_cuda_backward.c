/* The backward's host side on the fake driver: its launches and their parameters, the forward that leaves residuals for it, sizes,
   refusals, every driver call failing. Where a plan cuts sequences is in test_cuda_schedule.c. */
#include "cuda_faults.h"
#include "cuda_host.h"
#include <stddef.h>

enum { HEADS_QK = 2, HEADS_V = 4, SEQS = 3, TOKENS = 200 };
static const int32_t cu_seqlens[SEQS + 1] = {0, 130, 130, 200};

static fqla_plan_desc plan_desc(void) {
    fqla_plan_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.heads_qk = HEADS_QK;
    desc.heads_v = HEADS_V;
    desc.num_seqs = SEQS;
    desc.cu_seqlens = cu_seqlens;
    desc.backward = 1;
    return desc;
}

/* The tensors of a run, each in a slot of one allocation. */
enum {
    Q, K, V, G, BETA, A_LOG, DT_BIAS, H0, O, HT, DO, DHT, DQ, DK, DV, DG, DBETA, DH0, DA_LOG, DDT_BIAS, RESIDUALS, SLOTS,
    SLOT_BYTES = 1 << 20
};

static char *slot(void *memory, int which) { return (char *)memory + (size_t)which * SLOT_BYTES; }

static fqla_forward_args forward_args_in(const fqla_plan *plan, void *memory) {
    fqla_forward_args args;
    memset(&args, 0, sizeof args);
    args.q = slot(memory, Q), args.k = slot(memory, K), args.v = slot(memory, V);
    args.g = slot(memory, G), args.beta = slot(memory, BETA);
    args.h0 = slot(memory, H0), args.ht = slot(memory, HT);
    args.o = slot(memory, O);
    if (plan->desc.gate == FQLA_GATE_RAW) {
        args.A_log = (const float *)(void *)slot(memory, A_LOG);
        args.dt_bias = (const float *)(void *)slot(memory, DT_BIAS);
    }
    args.residuals = slot(memory, RESIDUALS);
    fqla_residuals_size(plan, &args.residuals_size);
    return args;
}

static fqla_backward_args backward_args_in(const fqla_plan *plan, void *memory, int residuals) {
    const fqla_forward_args forward = forward_args_in(plan, memory);
    fqla_backward_args args;
    memset(&args, 0, sizeof args);
    args.q = forward.q, args.k = forward.k, args.v = forward.v, args.g = forward.g, args.beta = forward.beta;
    args.A_log = forward.A_log, args.dt_bias = forward.dt_bias;
    args.h0 = forward.h0;
    args.do_ = slot(memory, DO), args.dht = slot(memory, DHT);
    args.dq = slot(memory, DQ), args.dk = slot(memory, DK), args.dv = slot(memory, DV);
    args.dg = slot(memory, DG), args.dbeta = slot(memory, DBETA);
    args.dh0 = slot(memory, DH0);
    if (plan->desc.gate == FQLA_GATE_RAW) {
        args.dA_log = (float *)(void *)slot(memory, DA_LOG);
        args.ddt_bias = (float *)(void *)slot(memory, DDT_BIAS);
    }
    if (residuals) args.residuals = forward.residuals, args.residuals_size = forward.residuals_size;
    return args;
}

/* A launch copies as many bytes as its kernel takes; the backward's parameters start with the forward's. */
static fqla_status forward(fqla_plan *plan, const fqla_forward_args *args, fqla_stream stream) {
    fake.fake_cuda_settings()->parameter_bytes = sizeof(fqla__forward_params);
    return fqla_forward(plan, args, stream);
}

static fqla_status backward(fqla_plan *plan, const fqla_backward_args *args, fqla_stream stream) {
    fake.fake_cuda_settings()->parameter_bytes = sizeof(fqla__backward_params);
    return fqla_backward(plan, args, stream);
}

static fqla__backward_params parameters_of(int launch) {
    const fake_cuda_launch record = fake.fake_cuda_launch_at(launch);
    fqla__backward_params p;
    memcpy(&p, record.parameters, sizeof p);
    return p;
}

/* Room for every chunk that max_tokens tokens in max_seqs sequences can have. */
static unsigned int most_chunks(const fqla_plan *plan) { return (unsigned int)(plan->desc.max_tokens / 64 + plan->desc.max_seqs); }

/* Segments of cut sequences that a plan has room for: a cut sequence has one more than its extra ones. */
static unsigned int most_kept(const fqla_plan *plan) {
    const int32_t extra = plan->cuda.backward.extra_segments, seqs = plan->desc.max_seqs;
    return (unsigned int)(extra + (extra < seqs ? extra : seqs));
}

/* The launches from `first` on are those of one backward: on one stream, with the same parameters but for the first pass, and each
   but the first ready to start while the one before it runs. A plan that may cut sequences has a first pass over those and a
   scan. */
static enum greatest_test_res backward_launched(const fqla_plan *plan, int first, int residuals, fqla_stream stream, int captured) {
    const fqla_plan_desc *d = &plan->desc;
    const int32_t extra = plan->cuda.backward.extra_segments;
    const unsigned int chunks = most_chunks(plan), heads_qk = (unsigned int)d->heads_qk, heads = (unsigned int)d->heads_v;
    const unsigned int kept = most_kept(plan), segments = (unsigned int)(d->max_seqs + extra);
    const unsigned int items = chunks * heads_qk, sm_count = (unsigned int)plan->context->summary.sm_count;
    const unsigned int quarters = (kept - (unsigned int)extra) * heads * 8;
    const int raw = d->gate == FQLA_GATE_RAW;
    const fqla__backward_params p = parameters_of(first);
    const struct {
        const char *name; /* with _ at its end: of a type */
        int there, first_pass;
        unsigned int blocks, threads, shared_bytes;
    } kernels[] = {
        {"prepare_", !residuals, 0, chunks * heads / (unsigned int)p.forward.heads_per_block, FQLA__PREPARE_THREADS,
         FQLA__PREPARE_SHARED_BYTES},
        {"backward_chains_", extra > 0, 1, kept * heads * 6, FQLA__CHAINS_THREADS, FQLA__CHAINS_SHARED_BYTES},
        {"backward_scan", extra > 0, 0, quarters < sm_count ? quarters : sm_count, FQLA__SCAN_THREADS, FQLA__SCAN_SHARED_BYTES},
        {"backward_chains_", 1, 0, segments * heads * (extra > 0 ? 8 : 4), FQLA__CHAINS_THREADS, FQLA__CHAINS_SHARED_BYTES},
        {"backward_gradients_", 1, 0, items < sm_count ? items : sm_count, FQLA__GRADIENTS_THREADS, FQLA__GRADIENTS_SHARED_BYTES},
        {"backward_sums", raw, 0, heads, FQLA__SUMS_THREADS, 0},
    };
    const fqla__backward_params last = parameters_of(fake.fake_cuda_launches() - 1);
    int k, at = first;
    for (k = 0; k < (int)(sizeof kernels / sizeof kernels[0]); k++) {
        const char *type = d->dtype == FQLA_DTYPE_FP16 ? "fp16" : "bf16";
        fake_cuda_launch launch;
        fqla__backward_params own;
        char name[64];
        if (!kernels[k].there) continue;
        ASSERTm(kernels[k].name, at < fake.fake_cuda_launches());
        launch = fake.fake_cuda_launch_at(at);
        snprintf(name, sizeof name, "%s%s", kernels[k].name, kernels[k].name[strlen(kernels[k].name) - 1] == '_' ? type : "");
        ASSERT_STR_EQ(name, launch.kernel);
        ASSERT_EQm(name, kernels[k].blocks, launch.grid[0]);
        ASSERT_EQm(name, 1u, launch.grid[1] * launch.grid[2]);
        ASSERT_EQm(name, kernels[k].threads, launch.block[0]);
        ASSERT_EQm(name, 1u, launch.block[1] * launch.block[2]);
        ASSERT_EQm(name, kernels[k].shared_bytes, launch.shared_bytes);
        ASSERT_EQm(name, at > first, launch.dependent);
        ASSERT_EQm(name, stream, launch.stream);
        ASSERT_EQm(name, primary_context(0), launch.context);
        ASSERT_EQm(name, captured, launch.captured);
        own = parameters_of(at);
        ASSERT_EQm(name, kernels[k].first_pass, own.first_pass);
        own.first_pass = last.first_pass;
        ASSERT_EQm(name, extra > 0 && k >= 2, own.overlaps); /* from backward_scan on */
        own.overlaps = last.overlaps;
        ASSERT_EQm(name, extra == 0 && k >= 3 && kernels[3].blocks <= sm_count, own.pace > 0); /* from the main pass on */
        own.pace = last.pace;
        ASSERT_MEM_EQm(name, &last, &own, sizeof own);
        at++;
    }
    ASSERT_EQ(fake.fake_cuda_launches(), at);
    PASS();
}

/* The launches from `first` to the last are a forward's that left residuals. */
static enum greatest_test_res forward_launched(const fqla_plan *plan, int first, void *residuals) {
    const int end = fake.fake_cuda_launches();
    const fake_cuda_launch prepare = fake.fake_cuda_launch_at(first), last = fake.fake_cuda_launch_at(end - 1);
    const fqla__forward_params p = parameters_of(first).forward;
    ASSERT(end - first >= 2);
    ASSERT(strncmp(prepare.kernel, "prepare_", 8) == 0 && strncmp(last.kernel, "forward_", 8) == 0);
    ASSERT_EQ(most_chunks(plan) * (unsigned int)plan->desc.heads_v, prepare.grid[0] * (unsigned int)p.heads_per_block);
    ASSERT((void *)p.prepared == residuals);
    PASS();
}

/* ---- launches */

/* By type, gate and residuals: what runs, and where the chunks that prepare made are looked for. */
TEST what_runs(fqla_dtype dtype, fqla_gate gate, int residuals) {
    fqla_context *context = open_cuda();
    fqla_stream stream = stream_of(primary_context(0));
    fqla_plan_desc desc = plan_desc();
    fqla_plan *plan = NULL;
    fqla_forward_args forward_args;
    fqla_backward_args args;
    fqla_plan_summary summary;
    void *memory = NULL;
    int first;
    desc.dtype = dtype;
    desc.gate = gate;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, (size_t)SLOTS * SLOT_BYTES, &memory));
    forward_args = forward_args_in(plan, memory);
    args = backward_args_in(plan, memory, residuals);
    ASSERT_EQ(FQLA_OK, forward(plan, &forward_args, stream));
    CHECK_CALL(forward_launched(plan, 0, forward_args.residuals));
    first = fake.fake_cuda_launches();
    ASSERT_EQ(FQLA_OK, backward(plan, &args, stream));
    CHECK_CALL(backward_launched(plan, first, residuals, stream, 0));
    ASSERT((void *)parameters_of(first).forward.prepared == (residuals ? forward_args.residuals : plan->workspace));
    forward_args.residuals = NULL; /* they are optional */
    first = fake.fake_cuda_launches();
    ASSERT_EQ(FQLA_OK, forward(plan, &forward_args, NULL));
    CHECK_CALL(forward_launched(plan, first, plan->workspace));
    ASSERT_EQ(FQLA_OK, fqla_plan_info(plan, &summary));
    ASSERT(strstr(summary.backward, "backward_chains") != NULL && strstr(summary.backward, "backward_gradients") != NULL);
    ASSERT_EQ(gate == FQLA_GATE_RAW, strstr(summary.backward, "backward_sums") != NULL);
    ASSERT(strstr(summary.backward, dtype == FQLA_DTYPE_FP16 ? "fp16" : "bf16") != NULL);
    fqla_free(context, memory);
    fqla_plan_destroy(plan);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* Every field of the parameters, with no choice of the plan's left at its default. */
TEST the_parameters(void) {
    fqla_context *context = open_cuda();
    fqla_plan_desc desc = plan_desc();
    fqla_plan *plan = NULL;
    fqla_backward_args args;
    fqla__backward_params p;
    fake_cuda_census before, after;
    void *memory = NULL;
    desc.max_seqs = 5;
    desc.max_tokens = 300;
    desc.dtype = FQLA_DTYPE_FP16;
    desc.state_dtype = FQLA_DTYPE_BF16;
    desc.state_layout = FQLA_STATE_VK;
    desc.head_map = FQLA_HEAD_MAP_MOD;
    desc.gate = FQLA_GATE_RAW;
    desc.beta = FQLA_BETA_SIGMOID;
    desc.negative_eigenvalues = desc.l2norm = 1;
    desc.scale = -0.75f;
    desc.checkpoint_every = 2; /* the forward's alone */
    desc.strides.q.head = 136, desc.strides.q.token = 400;
    desc.strides.k.head = 300 * 128 + 8, desc.strides.k.token = 128;
    desc.strides.v.head = 144, desc.strides.v.token = 640;
    desc.strides.o.head = 300 * 128 + 64, desc.strides.o.token = 128;
    desc.strides.g.token = 7, desc.strides.beta.token = 9, desc.strides.beta.head = 2;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, (size_t)SLOTS * SLOT_BYTES, &memory));
    args = backward_args_in(plan, memory, 0);
    before = fake.fake_cuda_count();
    ASSERT_EQ(FQLA_OK, backward(plan, &args, NULL));
    after = fake.fake_cuda_count();
    ASSERT_MEM_EQ(&before, &after, sizeof before);
    CHECK_CALL(backward_launched(plan, 0, 0, NULL, 0));
    p = parameters_of(0);
    CHECK_CALL(map_holds(&p.forward.q, args.q, HEADS_QK, 300, 136, 400, 64, 6));
    CHECK_CALL(map_holds(&p.forward.k, args.k, HEADS_QK, 300, 300 * 128 + 8, 128, 64, 6));
    CHECK_CALL(map_holds(&p.forward.v, args.v, HEADS_V, 300, 144, 640, 64, 6));
    CHECK_CALL(map_holds(&p.forward.o, args.do_, HEADS_V, 300, 300 * 128 + 64, 128, 64, 6)); /* do has o's strides */
    CHECK_CALL(map_holds(&p.dq, args.dq, HEADS_QK, 300, 136, 400, 64, 6));
    CHECK_CALL(map_holds(&p.dk, args.dk, HEADS_QK, 300, 300 * 128 + 8, 128, 64, 6));
    CHECK_CALL(map_holds(&p.dv, args.dv, HEADS_V, 300, 144, 640, 64, 6));
    ASSERT(p.forward.g == args.g && p.forward.beta == args.beta);
    ASSERT(p.forward.A_log == args.A_log && p.forward.dt_bias == args.dt_bias);
    ASSERT(p.forward.h0 == args.h0 && p.dht == args.dht && p.dh0 == args.dh0);
    ASSERT(p.forward.q_rows == args.q && p.v_rows == args.v);
    ASSERT(p.dq_rows == args.dq && p.dk_rows == args.dk && p.dv_rows == args.dv);
    ASSERT(p.dg == args.dg && p.dbeta == args.dbeta && p.dA_log == args.dA_log && p.ddt_bias == args.ddt_bias);
    ASSERT(p.forward.table->num_seqs == SEQS && p.forward.table->chunks == 5);
    ASSERT(p.forward.q_token == 400 && p.forward.q_head == 136);
    ASSERT(p.k_token == 128 && p.k_head == 300 * 128 + 8 && p.v_token == 640 && p.v_head == 144);
    ASSERT(p.forward.g_token == 7 && p.forward.g_head == 1 && p.forward.beta_token == 9 && p.forward.beta_head == 2);
    ASSERT(p.forward.heads_qk == HEADS_QK && p.forward.heads_v == HEADS_V && p.forward.heads_per_block == 2);
    ASSERT(p.forward.head_map == FQLA_HEAD_MAP_MOD && p.forward.state_layout == FQLA_STATE_VK && p.forward.state_bf16 == 1);
    ASSERT(p.forward.gate == FQLA_GATE_RAW && p.forward.beta_form == FQLA_BETA_SIGMOID);
    ASSERT(p.forward.negative_eigenvalues == 1 && p.forward.l2norm == 1 && p.forward.scale == -0.75f);
    ASSERT(p.forward.decode_tokens == 0 && p.forward.load_rows == 64 && p.forward.pool_size == 0);
    ASSERT(p.forward.checkpoint_every == 0 && p.forward.snapshots == NULL);
    ASSERT(p.forward.state_in == NULL && p.forward.state_out == NULL && p.forward.bad_index_count == NULL);
    fqla_free(context, memory);
    fqla_plan_destroy(plan);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* h0, dht and dh0 may be absent, one by one. */
TEST optional_arguments(void) {
    fqla_context *context = open_cuda();
    const fqla_plan_desc desc = plan_desc();
    fqla_plan *plan = NULL;
    void *memory = NULL;
    int given;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, (size_t)SLOTS * SLOT_BYTES, &memory));
    for (given = 0; given < 8; given++) {
        fqla_backward_args args = backward_args_in(plan, memory, given & 1);
        const int first = fake.fake_cuda_launches();
        fqla__backward_params p;
        if (!(given & 1)) args.h0 = NULL;
        if (!(given & 2)) args.dht = NULL;
        if (!(given & 4)) args.dh0 = NULL;
        ASSERT_EQ(FQLA_OK, backward(plan, &args, NULL));
        CHECK_CALL(backward_launched(plan, first, given & 1, NULL, 0));
        p = parameters_of(first);
        ASSERT(p.forward.h0 == args.h0 && p.dht == args.dht && p.dh0 == args.dh0);
        ASSERT(p.dA_log == NULL && p.ddt_bias == NULL);
    }
    fqla_free(context, memory);
    fqla_plan_destroy(plan);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* Any scale is, exactly, a number from 1 to 2 or its negative times a power of two. */
TEST the_unit_of_a_scale(void) {
    static const float scales[] = {0.0f, 1.0f, -1.0f, 0.5f, -0.75f, 1.9999999f, 3.0f, 1.0e-30f, -3.0e38f, 1.0e-40f};
    fqla_context *context = open_cuda();
    void *memory = NULL;
    size_t i;
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, (size_t)SLOTS * SLOT_BYTES, &memory));
    for (i = 0; i < sizeof scales / sizeof scales[0]; i++) {
        fqla_plan_desc desc = plan_desc();
        fqla_plan *plan = NULL;
        fqla_backward_args args;
        fqla__backward_params p;
        float size;
        desc.scale = scales[i];
        ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
        args = backward_args_in(plan, memory, 1);
        ASSERT_EQ(FQLA_OK, backward(plan, &args, NULL));
        p = parameters_of(fake.fake_cuda_launches() - 1);
        size = p.unit < 0.0f ? -p.unit : p.unit;
        ASSERT(size >= 1.0f && size < 2.0f);
        ASSERT_EQ(plan->desc.scale, p.unit * p.power);
        ASSERT_EQ(p.forward.scale, plan->desc.scale);
        ASSERT_IN_RANGE(1.0, (double)p.unit * (double)p.per_unit, 1.0e-7);
        fqla_plan_destroy(plan);
    }
    fqla_free(context, memory);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* Of heads, and of multiprocessors: those of an H200, and fewer than kernel backward_gradients has work for. */
TEST numbers_of_heads(int multiprocessors) {
    static const int32_t heads[][2] = {{1, 1}, {2, 4}, {1, 3}, {4, 4}, {2, 16}, {3, 15}};
    fqla_context *context;
    void *memory = NULL;
    size_t i;
    int map;
    fake.fake_cuda_settings()->multiprocessors = multiprocessors;
    context = open_cuda();
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, (size_t)SLOTS * SLOT_BYTES, &memory));
    for (i = 0; i < sizeof heads / sizeof heads[0]; i++)
        for (map = 0; map < 2; map++) {
            fqla_plan_desc desc = plan_desc();
            fqla_plan *plan = NULL;
            fqla_backward_args args;
            const int first = fake.fake_cuda_launches();
            desc.heads_qk = heads[i][0];
            desc.heads_v = heads[i][1];
            desc.head_map = (fqla_head_map)map;
            ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
            args = backward_args_in(plan, memory, 0);
            args.h0 = args.dht = args.dh0 = NULL; /* larger than a slot */
            ASSERT_EQ(FQLA_OK, backward(plan, &args, NULL));
            CHECK_CALL(backward_launched(plan, first, 0, NULL, 0));
            ASSERT_EQ(map, parameters_of(first).forward.head_map);
            fqla_plan_destroy(plan);
        }
    fqla_free(context, memory);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* Packed and padded, with empty sequences, with nothing but those, with room for more; whole and cut. */
TEST batches(void) {
    static const int32_t empty_ones[5] = {0, 0, 65, 65, 65}, all_empty[4] = {0, 0, 0, 0};
    static const int32_t one[2] = {0, 300}, short_ones[4] = {0, 1, 2, 3};
    static const struct {
        const int32_t *cu_seqlens;
        int32_t num_seqs, padded_len, max_seqs, max_tokens, segment_chunks;
        unsigned int chunks; /* room for */
        int64_t rows;        /* of the maps */
    } cases[] = {
        {cu_seqlens, 3, 0, 0, 0, -1, 3 + 3, 200},  {cu_seqlens, 3, 0, 0, 0, 1, 3 + 3, 200},
        {cu_seqlens, 3, 0, 5, 300, 0, 4 + 5, 300}, {cu_seqlens, 3, 0, 5, 300, 2, 4 + 5, 300},
        {empty_ones, 4, 0, 0, 0, 0, 1 + 4, 65},    {all_empty, 3, 0, 0, 0, 0, 3, 1},
        {one, 1, 0, 0, 0, 2, 4 + 1, 300},          {NULL, 3, 70, 0, 0, 0, 3 + 3, 210},
        {short_ones, 3, 70, 4, 0, 0, 4 + 4, 280},  {all_empty, 3, 70, 0, 0, 1, 3 + 3, 210},
    };
    fqla_context *context = open_cuda();
    void *memory = NULL;
    size_t i;
    int residuals;
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, (size_t)SLOTS * SLOT_BYTES, &memory));
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++)
        for (residuals = 0; residuals < 2; residuals++) {
            fqla_plan_desc desc = plan_desc();
            fqla_plan *plan = NULL;
            fqla_backward_args args;
            fqla__backward_params p;
            const int first = fake.fake_cuda_launches();
            desc.cu_seqlens = cases[i].cu_seqlens;
            desc.num_seqs = cases[i].num_seqs;
            desc.padded_len = cases[i].padded_len;
            desc.max_seqs = cases[i].max_seqs;
            desc.max_tokens = cases[i].max_tokens;
            desc.segment_chunks = cases[i].segment_chunks;
            ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
            ASSERT_EQ(cases[i].chunks, most_chunks(plan));
            args = backward_args_in(plan, memory, residuals);
            ASSERT_EQ(FQLA_OK, backward(plan, &args, NULL));
            CHECK_CALL(backward_launched(plan, first, residuals, NULL, 0));
            p = parameters_of(first);
            CHECK_CALL(map_holds(&p.dv, args.dv, HEADS_V, (uint64_t)cases[i].rows, 128, HEADS_V * 128, 64, 9));
            fqla_plan_destroy(plan);
        }
    fqla_free(context, memory);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* Other lengths change the table alone: grids, parameters and where things lie stay. */
TEST an_update(void) {
    static const int32_t other[3] = {0, 300, 301};
    fqla_context *context = open_cuda();
    fqla_stream stream = stream_of(primary_context(0));
    fqla_plan_desc desc = plan_desc();
    fqla_plan *plan = NULL;
    fqla_backward_args args;
    const fqla__device_table *table;
    void *memory = NULL;
    int launches, i;
    desc.max_seqs = 4;
    desc.max_tokens = 350;
    desc.segment_chunks = 2;
    desc.gate = FQLA_GATE_RAW;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, (size_t)SLOTS * SLOT_BYTES, &memory));
    args = backward_args_in(plan, memory, 0);
    ASSERT_EQ(FQLA_OK, backward(plan, &args, stream));
    launches = fake.fake_cuda_launches();
    ASSERT_EQ(FQLA_OK, fqla_plan_update(plan, 2, other, stream));
    ASSERT_EQ(launches, fake.fake_cuda_launches());
    ASSERT_EQ(FQLA_OK, backward(plan, &args, stream));
    CHECK_CALL(backward_launched(plan, launches, 0, stream, 0));
    ASSERT_EQ(2 * launches, fake.fake_cuda_launches());
    for (i = 0; i < launches; i++) {
        const fake_cuda_launch before = fake.fake_cuda_launch_at(i), after = fake.fake_cuda_launch_at(launches + i);
        ASSERT_MEM_EQ(&before, &after, sizeof before);
    }
    ASSERT_EQ(FQLA_OK, fqla_synchronize(context, stream));
    table = parameters_of(0).forward.table;
    ASSERT(table->num_seqs == 2 && table->chunks == 5 + 1);
    fqla_free(context, memory);
    fqla_plan_destroy(plan);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* A training step's forward and backward are captured: nothing but launches, the capture is whole, and an update afterwards reaches
   the table that the graph's kernels read. While it goes on an update is refused. */
TEST a_step_is_captured(void) {
    static const int32_t other[2] = {0, 5};
    fqla_context *context = open_cuda();
    fqla_stream stream = stream_of(primary_context(0));
    fqla_plan_desc desc = plan_desc();
    fqla_plan *plan = NULL;
    fqla_forward_args forward_args;
    fqla_backward_args args;
    fake_cuda_census before, after;
    const fqla__device_table *table;
    void *memory = NULL;
    int first, copies, launches;
    desc.segment_chunks = 2;
    desc.gate = FQLA_GATE_RAW;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, (size_t)SLOTS * SLOT_BYTES, &memory));
    forward_args = forward_args_in(plan, memory);
    args = backward_args_in(plan, memory, 1);
    before = fake.fake_cuda_count();
    copies = fake.fake_cuda_copies();
    fake.fake_cuda_capture_begin(stream);
    ASSERT_EQ(FQLA_OK, forward(plan, &forward_args, stream));
    first = fake.fake_cuda_launches();
    ASSERT_EQ(FQLA_OK, backward(plan, &args, stream));
    CHECK_CALL(backward_launched(plan, first, 1, stream, 1));
    CHECK_CALL(refused(FQLA_ERROR_CAPTURING, fqla_plan_update(plan, 1, other, stream), "is being captured"));
    ASSERT_EQ(1, fake.fake_cuda_capture_end(stream));
    after = fake.fake_cuda_count();
    ASSERT_MEM_EQ(&before, &after, sizeof before);
    ASSERT_EQ(copies, fake.fake_cuda_copies());
    launches = fake.fake_cuda_launches();
    table = parameters_of(first).forward.table;
    ASSERT(table->num_seqs == SEQS && table->chunks == 5);
    ASSERT_EQ(FQLA_OK, fqla_plan_update(plan, 1, other, stream));
    ASSERT_EQ(FQLA_OK, fqla_synchronize(context, stream));
    ASSERT(table->num_seqs == 1 && table->chunks == 1);
    ASSERT_EQ(launches, fake.fake_cuda_launches());
    fqla_free(context, memory);
    fqla_plan_destroy(plan);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

SUITE(launches) {
    int half, raw, residuals;
    SET_SETUP(start, NULL);
    for (half = 0; half < 2; half++)
        for (raw = 0; raw < 2; raw++)
            for (residuals = 0; residuals < 2; residuals++) {
                char suffix[64];
                snprintf(suffix, sizeof suffix, "%s_%s%s", half ? "fp16" : "bf16", raw ? "raw" : "log",
                         residuals ? "_residuals" : "");
                greatest_set_test_suffix(suffix);
                RUN_TESTp(what_runs, half ? FQLA_DTYPE_FP16 : FQLA_DTYPE_BF16, raw ? FQLA_GATE_RAW : FQLA_GATE_LOG, residuals);
            }
    RUN_TEST(the_parameters);
    RUN_TEST(optional_arguments);
    RUN_TEST(the_unit_of_a_scale);
    RUN_TESTp(numbers_of_heads, 132);
    RUN_TESTp(numbers_of_heads, 5);
    RUN_TEST(batches);
    RUN_TEST(an_update);
    RUN_TEST(a_step_is_captured);
}

/* ---- sizes */

/* Of the workspace: nothing that kernels write into one part lies in another, and all of it within the bytes of the query. */
static enum greatest_test_res parts_fit(const fqla_plan *plan, const fqla__backward_params *p, char *workspace, size_t bytes) {
    const size_t heads = (size_t)plan->desc.heads_v;
    const size_t entries = (size_t)most_chunks(plan) * heads, kept = (size_t)most_kept(plan) * heads;
    const struct {
        char *start;
        size_t bytes, alignment;
    } parts[] = {
        {(char *)p->forward.prepared, entries * sizeof(fqla__prepared_chunk), 256},
        {(char *)p->chunks, entries * sizeof(fqla__chunk_states), 256}, /* the copy engine's tiles */
        {(char *)p->forward.states, kept * sizeof(fqla__kept_state), 256},
        {(char *)p->gradients, kept * sizeof(fqla__kept_state), 256},
        {(char *)p->forward.transitions, kept * sizeof(fqla__kept_transition), 256},
        {(char *)p->gate_sums, plan->desc.gate == FQLA_GATE_RAW ? entries * 2 * sizeof(float) : 0, sizeof(float)},
    };
    size_t i, j;
    for (i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        if (parts[i].bytes == 0) continue;
        ASSERT(parts[i].start >= workspace && parts[i].start + parts[i].bytes <= workspace + bytes);
        ASSERT_EQ(0u, (unsigned int)((uintptr_t)parts[i].start % parts[i].alignment));
        for (j = 0; j < i; j++)
            ASSERT(parts[i].start >= parts[j].start + parts[j].bytes || parts[j].start >= parts[i].start + parts[i].bytes);
    }
    PASS();
}

/* Room for every chunk that there can be; the same by every query and over updates; no less than a forward's; the plan's own or
   none. */
TEST sizes_by_query(void) {
    static const int32_t other[2] = {0, 5};
    static const struct {
        int32_t padded_len, max_tokens, segment_chunks;
        fqla_gate gate;
        unsigned int chunks;
    } cases[] = {
        {0, 447, -1, FQLA_GATE_LOG, 6 + 7}, {0, 447, -1, FQLA_GATE_RAW, 6 + 7},   {70, 0, -1, FQLA_GATE_RAW, 7 + 7},
        {0, 447, 1, FQLA_GATE_LOG, 6 + 7},  {0, 64 * 12, 1, FQLA_GATE_RAW, 12 + 7}, {70, 0, 4, FQLA_GATE_LOG, 7 + 7},
        {0, 0, 0, FQLA_GATE_RAW, 3 + 7},
    };
    fqla_context *context = open_cuda();
    void *memory = NULL;
    size_t i;
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, (size_t)SLOTS * SLOT_BYTES, &memory));
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const size_t entries = (size_t)cases[i].chunks * HEADS_V;
        fqla_plan_desc desc = plan_desc();
        fqla_plan *plan = NULL;
        fqla_plan_summary summary;
        fqla_backward_args args;
        fqla__backward_params p;
        size_t bytes = 0, residuals = 0, again = 0, of_forward = 0;
        fake_cuda_census before, own, external;
        desc.max_seqs = 7;
        desc.max_tokens = cases[i].max_tokens;
        desc.padded_len = cases[i].padded_len;
        desc.segment_chunks = cases[i].segment_chunks;
        desc.gate = cases[i].gate;
        if (desc.padded_len > 0) desc.cu_seqlens = NULL;
        before = fake.fake_cuda_count();
        ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
        own = fake.fake_cuda_count();
        ASSERT_EQ(FQLA_OK, fqla_workspace_size(plan, &bytes));
        ASSERT_EQ(FQLA_OK, fqla_residuals_size(plan, &residuals));
        ASSERT_EQ(entries * sizeof(fqla__prepared_chunk), residuals);
        ASSERT(bytes >= entries * (sizeof(fqla__prepared_chunk) + sizeof(fqla__chunk_states)));
        ASSERT_EQ(FQLA_OK, fqla_plan_info(plan, &summary));
        ASSERT(summary.workspace_size == bytes && summary.residuals_size == residuals);
        args = backward_args_in(plan, memory, 0);
        ASSERT_EQ(FQLA_OK, backward(plan, &args, NULL));
        p = parameters_of(fake.fake_cuda_launches() - 1);
        CHECK_CALL(parts_fit(plan, &p, (char *)plan->workspace, bytes));
        ASSERT_EQ(FQLA_OK, fqla_plan_update(plan, 1, other, NULL));
        ASSERT_EQ(FQLA_OK, fqla_workspace_size(plan, &again));
        ASSERT_EQ(bytes, again);
        ASSERT_EQ(FQLA_OK, fqla_residuals_size(plan, &again));
        ASSERT_EQ(residuals, again);
        fqla_plan_destroy(plan);
        desc.external_workspace = 1;
        ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
        external = fake.fake_cuda_count();
        ASSERT(own.allocations == external.allocations + 1 && own.bytes == external.bytes + bytes);
        ASSERT(external.bytes - before.bytes < 4096); /* the tables */
        ASSERT_EQ(FQLA_OK, fqla_workspace_size(plan, &again));
        ASSERT_EQ(bytes, again);
        fqla_plan_destroy(plan);
        desc.external_workspace = 0;
        desc.needs_residuals = 1;
        ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
        ASSERT_EQ(FQLA_OK, fqla_workspace_size(plan, &again));
        ASSERT(again + residuals <= bytes && bytes < again + residuals + FQLA__ALIGNMENT);
        ASSERT_EQ(FQLA_OK, fqla_residuals_size(plan, &of_forward));
        ASSERT_EQ(residuals, of_forward);
        args = backward_args_in(plan, memory, 1);
        ASSERT_EQ(FQLA_OK, backward(plan, &args, NULL));
        p = parameters_of(fake.fake_cuda_launches() - 1);
        ASSERT((char *)p.chunks == (char *)plan->workspace && (const void *)p.forward.prepared == args.residuals);
        args.residuals = NULL;
        CHECK_CALL(refused(FQLA_ERROR_NULL_POINTER, backward(plan, &args, NULL), "backward_args.residuals is NULL"));
        fqla_plan_destroy(plan);
        desc.external_workspace = 1;
        desc.backward = desc.needs_residuals = 0;
        ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
        ASSERT_EQ(FQLA_OK, fqla_workspace_size(plan, &of_forward));
        ASSERT_EQ(FQLA_OK, fqla_residuals_size(plan, &residuals));
        ASSERT(of_forward <= bytes && residuals == 0);
        fqla_plan_destroy(plan);
    }
    fqla_free(context, memory);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

TEST no_memory_for_the_workspace(void) {
    fqla_context *context = open_cuda();
    const fqla_plan_desc desc = plan_desc();
    fqla_plan *plan = NULL;
    fake.fake_cuda_settings()->memory = 1 << 20; /* the table's and a forward's would fit */
    CHECK_CALL(refused(FQLA_ERROR_OUT_OF_MEMORY, fqla_plan_create(context, &desc, &plan), "bytes: cuMemAlloc failed"));
    ASSERT(plan == NULL);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

SUITE(sizes) {
    SET_SETUP(start, NULL);
    RUN_TEST(sizes_by_query);
    RUN_TEST(no_memory_for_the_workspace);
}

/* ---- refusals: one sentence, and the driver is not asked */

static const struct {
    const char *name;
    size_t offset, alignment;
    int required;
} arguments[] = {
#define ARGUMENT(field, alignment, required) {#field, offsetof(fqla_backward_args, field), alignment, required}
    ARGUMENT(q, 16, 1),      ARGUMENT(k, 16, 1),       ARGUMENT(v, 16, 1),      ARGUMENT(g, 2, 1),        ARGUMENT(beta, 2, 1),
    ARGUMENT(A_log, 4, 1),   ARGUMENT(dt_bias, 4, 1),  ARGUMENT(h0, 16, 0),     ARGUMENT(do_, 16, 1),     ARGUMENT(dht, 16, 0),
    ARGUMENT(dq, 16, 1),     ARGUMENT(dk, 16, 1),      ARGUMENT(dv, 16, 1),     ARGUMENT(dg, 2, 1),       ARGUMENT(dbeta, 2, 1),
    ARGUMENT(dh0, 16, 0),    ARGUMENT(dA_log, 4, 1),   ARGUMENT(ddt_bias, 4, 1), ARGUMENT(residuals, 16, 0),
    ARGUMENT(workspace, 256, 0),
#undef ARGUMENT
};

static void set_argument(fqla_backward_args *args, size_t i, const char *pointer) {
    memcpy((char *)args + arguments[i].offset, &pointer, sizeof pointer);
}

static char *get_argument(const fqla_backward_args *args, size_t i) {
    char *pointer;
    memcpy(&pointer, (const char *)args + arguments[i].offset, sizeof pointer);
    return pointer;
}

/* Absent, misaligned, over another tensor. The raw forms have every argument. */
TEST bad_pointers(void) {
    fqla_context *context = open_cuda();
    fqla_plan_desc desc = plan_desc();
    fqla_plan *plan = NULL;
    fqla_backward_args good, args;
    void *memory = NULL, *workspace = NULL;
    size_t bytes = 0, i, j;
    int calls;
    desc.gate = FQLA_GATE_RAW;
    desc.beta = FQLA_BETA_SIGMOID;
    desc.external_workspace = 1;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
    ASSERT_EQ(FQLA_OK, fqla_workspace_size(plan, &bytes));
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, (size_t)SLOTS * SLOT_BYTES, &memory));
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, bytes, &workspace));
    good = backward_args_in(plan, memory, 1);
    good.workspace = workspace;
    good.workspace_size = bytes;
    calls = fake.fake_cuda_calls();
    for (i = 0; i < sizeof arguments / sizeof arguments[0]; i++) {
        char words[64];
        const int output = arguments[i].name[0] == 'd' && strcmp(arguments[i].name, "do_") != 0 &&
                           strcmp(arguments[i].name, "dht") != 0 && strcmp(arguments[i].name, "dt_bias") != 0;
        snprintf(words, sizeof words, "fqla_backward: %s is", arguments[i].name);
        args = good;
        set_argument(&args, i, get_argument(&good, i) + arguments[i].alignment / 2);
        CHECK_CALL(refused(FQLA_ERROR_MISALIGNED, backward(plan, &args, NULL), words));
        args = good;
        set_argument(&args, i, NULL);
        if (arguments[i].required) CHECK_CALL(refused(FQLA_ERROR_NULL_POINTER, backward(plan, &args, NULL), words));
        for (j = 0; output && j < sizeof arguments / sizeof arguments[0]; j++) {
            if (j == i) continue;
            args = good;
            set_argument(&args, i, get_argument(&good, j));
            CHECK_CALL(refused(FQLA_ERROR_OVERLAP, backward(plan, &args, NULL), "overlaps"));
        }
    }
    ASSERT_EQ(calls, fake.fake_cuda_calls());
    ASSERT_EQ(FQLA_OK, backward(plan, &good, NULL));
    fqla_free(context, workspace);
    fqla_free(context, memory);
    fqla_plan_destroy(plan);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* Workspace and residuals: too few bytes, none where the plan owns none, over a tensor; the caller's go before the plan's own. */
TEST bad_buffers(void) {
    fqla_context *context = open_cuda();
    fqla_plan_desc desc = plan_desc();
    void *memory = NULL, *workspace = NULL;
    size_t bytes = 0;
    int external;
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, (size_t)SLOTS * SLOT_BYTES, &memory));
    for (external = 0; external < 2; external++) {
        fqla_plan *plan = NULL;
        fqla_forward_args forward_args;
        fqla_backward_args args;
        fqla__backward_params p;
        int calls, first;
        desc.external_workspace = external;
        ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
        ASSERT_EQ(FQLA_OK, fqla_workspace_size(plan, &bytes));
        ASSERT_EQ(FQLA_OK, fqla_alloc(context, bytes, &workspace));
        forward_args = forward_args_in(plan, memory);
        args = backward_args_in(plan, memory, 1);
        calls = fake.fake_cuda_calls();
        if (external) {
            CHECK_CALL(refused(FQLA_ERROR_NULL_POINTER, backward(plan, &args, NULL), "fqla_backward: workspace is NULL"));
            CHECK_CALL(refused(FQLA_ERROR_NULL_POINTER, forward(plan, &forward_args, NULL), "fqla_forward: workspace is NULL"));
        }
        args.workspace = forward_args.workspace = workspace;
        args.workspace_size = bytes - 1;
        CHECK_CALL(refused(FQLA_ERROR_WORKSPACE_TOO_SMALL, backward(plan, &args, NULL), "fqla_backward: workspace_size is"));
        args.workspace_size = forward_args.workspace_size = bytes;
        args.workspace = args.dk;
        CHECK_CALL(refused(FQLA_ERROR_OVERLAP, backward(plan, &args, NULL), "workspace"));
        args.workspace = workspace;
        args.residuals_size = --forward_args.residuals_size;
        CHECK_CALL(refused(FQLA_ERROR_WORKSPACE_TOO_SMALL, backward(plan, &args, NULL), "fqla_backward: residuals_size is"));
        CHECK_CALL(refused(FQLA_ERROR_WORKSPACE_TOO_SMALL, forward(plan, &forward_args, NULL), "fqla_forward: residuals_size is"));
        args.residuals_size = ++forward_args.residuals_size;
        args.residuals = args.dq;
        CHECK_CALL(refused(FQLA_ERROR_OVERLAP, backward(plan, &args, NULL), "residuals"));
        args.residuals = workspace;
        CHECK_CALL(refused(FQLA_ERROR_OVERLAP, backward(plan, &args, NULL), "residuals"));
        forward_args.residuals = slot(memory, K);
        CHECK_CALL(refused(FQLA_ERROR_OVERLAP, forward(plan, &forward_args, NULL), "residuals"));
        forward_args.residuals = slot(memory, RESIDUALS) + 8;
        CHECK_CALL(refused(FQLA_ERROR_MISALIGNED, forward(plan, &forward_args, NULL), "residuals"));
        ASSERT_EQ(calls, fake.fake_cuda_calls());
        first = fake.fake_cuda_launches();
        args.residuals = NULL; /* its size then is of no matter */
        args.residuals_size = 0;
        ASSERT_EQ(FQLA_OK, backward(plan, &args, NULL));
        CHECK_CALL(backward_launched(plan, first, 0, NULL, 0));
        p = parameters_of(first);
        CHECK_CALL(parts_fit(plan, &p, (char *)workspace, bytes));
        fqla_free(context, workspace);
        fqla_plan_destroy(plan);
    }
    fqla_free(context, memory);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* No plan, no args, a plan without it, another context's stream; plans that have none. */
TEST what_it_is_not_for(void) {
    fqla_context *context = open_cuda();
    fqla_cuda_context other = new_context();
    fqla_stream stream = stream_of(other);
    fqla_plan_desc desc = plan_desc();
    fqla_plan *plan = NULL, *forward_plan = NULL, *none = NULL;
    fqla_backward_args args;
    void *memory = NULL;
    int calls;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
    desc.backward = 0;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &forward_plan));
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, (size_t)SLOTS * SLOT_BYTES, &memory));
    args = backward_args_in(plan, memory, 0);
    calls = fake.fake_cuda_calls();
    ASSERT_EQ(FQLA_ERROR_NULL_POINTER, fqla_backward(NULL, &args, NULL));
    CHECK_CALL(refused(FQLA_ERROR_NULL_POINTER, fqla_backward(plan, NULL, NULL), "args is NULL"));
    CHECK_CALL(refused(FQLA_ERROR_UNSUPPORTED, fqla_backward(forward_plan, &args, NULL), "plan_desc.backward 0"));
    ASSERT_EQ(calls, fake.fake_cuda_calls());
    fake.fake_cuda_push(other);
    CHECK_CALL(refused(FQLA_ERROR_WRONG_CONTEXT, backward(plan, &args, stream), "fqla_backward: stream"));
    ASSERT_EQ(0, fake.fake_cuda_launches());
    ASSERT_EQ(FQLA_OK, backward(plan, &args, NULL)); /* the default stream of the plan's context, whatever is current */
    CHECK_CALL(backward_launched(plan, 0, 0, NULL, 0));
    ASSERT_EQ(other, fake.fake_cuda_current());
    fake.fake_cuda_pop();
    desc = plan_desc();
    desc.gate = FQLA_GATE_LINEAR;
    CHECK_CALL(refused(FQLA_ERROR_UNSUPPORTED, fqla_plan_create(context, &desc, &none), "backward"));
    desc = plan_desc();
    desc.pool_size = 4;
    CHECK_CALL(refused(FQLA_ERROR_UNSUPPORTED, fqla_plan_create(context, &desc, &none), "backward"));
    ASSERT(none == NULL);
    fqla_free(context, memory);
    fqla_plan_destroy(forward_plan);
    fqla_plan_destroy(plan);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    fake.fake_cuda_stream_destroy(stream);
    fake.fake_cuda_context_destroy(other);
    return clean();
}

SUITE(refusals) {
    SET_SETUP(start, NULL);
    RUN_TEST(bad_pointers);
    RUN_TEST(bad_buffers);
    RUN_TEST(what_it_is_not_for);
}

/* ---- every driver call fails */

static fqla_plan_desc full_plan_desc(void) {
    fqla_plan_desc desc = plan_desc();
    desc.gate = FQLA_GATE_RAW;
    desc.segment_chunks = 2;
    return desc;
}

/* A life from context to context, with a forward that leaves residuals, a backward that takes them and one that does without. Stops
   at the first failure, cleans up and returns it. */
static fqla_status live(const fqla_context_desc *desc) {
    const fqla_plan_desc plan_as = full_plan_desc();
    fqla_context *context = NULL;
    fqla_plan *plan = NULL;
    fqla_forward_args forward_args;
    fqla_backward_args args;
    fqla_stream stream = NULL;
    void *memory = NULL;
    fqla_status status = fqla_context_create(desc, &context), last;
    if (status == FQLA_OK) {
        stream = stream_of(desc->cuda_context != NULL ? desc->cuda_context : primary_context(0));
        status = fqla_alloc(context, (size_t)SLOTS * SLOT_BYTES, &memory);
    }
    if (status == FQLA_OK) status = fqla_plan_create(context, &plan_as, &plan);
    if (status == FQLA_OK) {
        forward_args = forward_args_in(plan, memory);
        status = forward(plan, &forward_args, stream);
    }
    if (status == FQLA_OK) {
        args = backward_args_in(plan, memory, 1);
        status = backward(plan, &args, stream);
    }
    if (status == FQLA_OK) {
        args = backward_args_in(plan, memory, 0);
        status = backward(plan, &args, NULL);
    }
    if (status == FQLA_OK) status = fqla_synchronize(context, stream);
    fqla_plan_destroy(plan);
    last = memory != NULL ? fqla_free(context, memory) : FQLA_OK;
    if (status == FQLA_OK) status = last;
    if (stream != NULL) fake.fake_cuda_stream_destroy(stream);
    last = fqla_context_destroy(context);
    return status != FQLA_OK ? status : last;
}

enum { MOST_LAUNCHES = 64 };

/* The kernels of the life in which nothing fails, in their order; the count. */
static int launches_of_a_life(char (*kernels)[64]) {
    const fqla_context_desc desc = desc_of(FQLA_BACKEND_CUDA);
    int i, count = 0;
    start(NULL);
    if (live(&desc) == FQLA_OK) count = fake.fake_cuda_launches();
    for (i = 0; i < count && i < MOST_LAUNCHES; i++)
        snprintf(kernels[i], sizeof kernels[i], "%s", fake.fake_cuda_launch_at(i).kernel);
    return count;
}

/* Whatever fails, what was launched before it is what is launched without failures, and no more. */
static enum greatest_test_res every_call_fails(int borrow, int result, const char *result_name, fqla_status expected) {
    static char kernels[MOST_LAUNCHES][64];
    const int whole = launches_of_a_life(kernels);
    fqla_context_desc desc = desc_of(FQLA_BACKEND_CUDA);
    int n, i, hit = 1, failed_launches = 0;
    ASSERT(whole >= 2 + 3 + 4 && whole <= MOST_LAUNCHES);
    for (n = 1; hit; n++) {
        char words[128];
        const char *name;
        fqla_status status;
        start(NULL);
        if (borrow) desc.cuda_context = new_context();
        fake.fake_cuda_settings()->fail_call = n;
        fake.fake_cuda_settings()->fail_result = result;
        status = live(&desc);
        name = failed_call();
        hit = name[0] != '\0';
        snprintf(words, sizeof words, "%s failed: %s", name, result_name);
        CHECK_CALL(failure_is_told(name, words, expected, status));
        if (status == FQLA_OK) ASSERT_EQm(name, whole, fake.fake_cuda_launches());
        for (i = 0; i < fake.fake_cuda_launches(); i++) ASSERT_STR_EQm(name, kernels[i], fake.fake_cuda_launch_at(i).kernel);
        if (strcmp(name, "cuLaunchKernelEx") == 0) ASSERT_EQm(name, failed_launches++, fake.fake_cuda_launches());
        /* a context that cannot be entered has ended, and took along what was in it; here it still has to */
        if (borrow && strcmp(name, "cuCtxPushCurrent") == 0) fake.fake_cuda_context_destroy(desc.cuda_context);
        CHECK_CALL(clean());
        if (borrow) fake.fake_cuda_context_destroy(desc.cuda_context);
    }
    ASSERT(n > 60);
    ASSERT_EQ(whole, failed_launches); /* each was tried */
    return clean();
}

static const char illegal_address[] = "CUDA_ERROR_ILLEGAL_ADDRESS (an illegal memory access was encountered)";

TEST every_call_fails_on_the_primary_context(void) {
    CHECK_CALL(every_call_fails(0, 700, illegal_address, FQLA_ERROR_DRIVER));
    return every_call_fails(0, 2, "CUDA_ERROR_OUT_OF_MEMORY (out of memory)", FQLA_ERROR_OUT_OF_MEMORY);
}

TEST every_call_fails_on_a_borrowed_context(void) { return every_call_fails(1, 700, illegal_address, FQLA_ERROR_DRIVER); }

/* Each entry point on objects that live on: fails at each of its calls, and works the next time. A run launches nothing but what
   comes before a launch that fails. */
TEST a_later_call_works(void) {
    enum { PLAN, FORWARD, BACKWARD, BACKWARD_FROM_RESIDUALS, ENTRY_POINTS };
    fqla_context *context = open_cuda();
    fqla_stream stream = stream_of(primary_context(0));
    const fqla_plan_desc desc = full_plan_desc();
    fqla_plan *plan = NULL;
    fqla_forward_args forward_args;
    fqla_backward_args args, from_residuals;
    void *memory = NULL;
    int entry, n, again;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, (size_t)SLOTS * SLOT_BYTES, &memory));
    forward_args = forward_args_in(plan, memory);
    args = backward_args_in(plan, memory, 0);
    from_residuals = backward_args_in(plan, memory, 1);
    for (entry = 0; entry < ENTRY_POINTS; entry++) {
        const fake_cuda_census before = fake.fake_cuda_count();
        int hit = 1, failed_launches = 0, launches = 0;
        for (n = 1; hit; n++)
            for (again = 0; again < 2; again++) {
                const int first = fake.fake_cuda_launches();
                fqla_status status;
                fake_cuda_census after;
                fqla_plan *made = NULL;
                fake.fake_cuda_settings()->fail_call = again ? 0 : n;
                fake.fake_cuda_settings()->fail_result = 700;
                switch (entry) {
                case PLAN: status = fqla_plan_create(context, &desc, &made); break;
                case FORWARD: status = forward(plan, &forward_args, stream); break;
                case BACKWARD: status = backward(plan, &args, stream); break;
                default: status = backward(plan, &from_residuals, stream); break;
                }
                if (fake.fake_cuda_settings()->fail_call > 0) hit = 0; /* n is more than it has calls */
                fake.fake_cuda_settings()->fail_call = 0;
                if (again || !hit) ASSERT_EQ(FQLA_OK, status);
                launches = fake.fake_cuda_launches() - first;
                if (status != FQLA_OK) {
                    const int launch = strcmp(failed_call(), "cuLaunchKernelEx") == 0;
                    ASSERT_EQ(FQLA_ERROR_DRIVER, status);
                    ASSERT(made == NULL);
                    ASSERT_EQ(launch ? failed_launches : 0, launches);
                    failed_launches += launch;
                } else if (entry >= BACKWARD) {
                    CHECK_CALL(backward_launched(plan, first, entry == BACKWARD_FROM_RESIDUALS, stream, 0));
                } else if (entry == FORWARD) {
                    CHECK_CALL(forward_launched(plan, first, forward_args.residuals));
                }
                fqla_plan_destroy(made);
                after = fake.fake_cuda_count();
                ASSERT_MEM_EQ(&before, &after, sizeof before);
                ASSERT_STR_EQ("", fake.fake_cuda_misuse());
                fake.fake_cuda_reset(); /* records are kept of a few hundred launches */
            }
        ASSERT(n > 3);
        ASSERT_EQ(launches, failed_launches); /* each was tried */
    }
    fqla_plan_destroy(plan);
    ASSERT_EQ(FQLA_OK, fqla_free(context, memory));
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

SUITE(failures) {
    SET_SETUP(start, NULL);
    RUN_TEST(every_call_fails_on_the_primary_context);
    RUN_TEST(every_call_fails_on_a_borrowed_context);
    RUN_TEST(a_later_call_works);
}

GREATEST_MAIN_DEFS();

int main(int argc, char **argv) {
    if (!find_fake()) {
        fprintf(stderr, "test_cuda_backward: " FIRST_LIBRARY " is not the fake driver; LD_LIBRARY_PATH leads to it\n");
        return 2;
    }
    GREATEST_MAIN_BEGIN();
    RUN_SUITE(launches);
    RUN_SUITE(sizes);
    RUN_SUITE(refusals);
    RUN_SUITE(failures);
    GREATEST_MAIN_END();
}
