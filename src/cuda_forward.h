// >>cuda_forward: the workspace, and the launches of a forward or a one-token decode

/* The most chunks that a forward or a decode of this plan can have: every sequence may end in a part of one. */
static int64_t fqla__cuda_max_chunks(const fqla_plan_desc *desc) {
    return desc->max_tokens / FLASHQLA_CHUNK + (int64_t)desc->max_seqs;
}

static int64_t fqla__cuda_max_segments(const fqla_plan *plan) { return (int64_t)plan->desc.max_seqs + plan->cuda.schedule.extra_segments; }

/* The most cut sequences. */
static int64_t fqla__cuda_max_cut(const fqla_plan *plan) {
    return fqla__cuda_most_cut(plan->desc.max_seqs, fqla__cuda_max_segments(plan));
}

/* The most segments of cut sequences: a cut sequence has one that is none of the extra ones. */
static int64_t fqla__cuda_max_kept(const fqla_plan *plan) { return plan->cuda.schedule.extra_segments + fqla__cuda_max_cut(plan); }

/* Choose where to cut the sequences of these lengths, and send the tables that follow from it to the device. The driver has read
   pageable memory when the copy returns, so that staging may be filled again at once. */
static fqla_status fqla__cuda_send_tables(const fqla_plan *plan, const char *function, int32_t num_seqs, const int32_t *cu_seqlens,
                                          fqla__schedule *schedule, fqla__schedule *backward, fqla_stream stream) {
    fqla__lengths lengths;
    size_t bytes;
    lengths.cu_seqlens = cu_seqlens;
    lengths.count = num_seqs;
    lengths.each = (int32_t)fqla__ceil_div(plan->desc.padded_len, FLASHQLA_CHUNK);
    fqla__choose_cut(plan, schedule, &lengths, fqla__model);
    bytes = fqla__cuda_fill_table(plan, plan->cuda.staging, num_seqs, cu_seqlens, schedule->segment_chunks);
    if (plan->desc.backward) {
        bytes = plan->cuda.backward_table;
        fqla__choose_cut(plan, backward, &lengths, fqla__backward_model);
        bytes += fqla__cuda_fill_table(plan, (fqla__device_table *)(void *)((char *)plan->cuda.staging + bytes), num_seqs, cu_seqlens,
                                       backward->segment_chunks);
    }
    if (plan->desc.low_memory) bytes = fqla__fill_windows(plan, plan->cuda.staging);
    return fqla__cuda_check(plan->context, function, "cuMemcpyHtoDAsync",
                            plan->context->cuda.driver.cuMemcpyHtoDAsync_v2(plan->cuda.table, plan->cuda.staging, bytes, stream));
}

/* A grid has up to 2^31 - 1 blocks, and the copy engine takes strides below 2^40 bytes. */
static fqla_status fqla__cuda_check_limits(const fqla_plan *plan) {
    const fqla_plan_desc *d = &plan->desc;
    const fqla_strides *strides[4];
    int i;
    strides[0] = &d->strides.q, strides[1] = &d->strides.k, strides[2] = &d->strides.v, strides[3] = &d->strides.o;
    if (4 * d->heads_v * fqla__cuda_max_chunks(d) > INT32_MAX)
        return fqla__fail(&plan->context->desc, FQLA_ERROR_UNSUPPORTED,
                          "plan_desc.max_tokens is %d and max_seqs %d; with heads_v %d that is over 2^29 blocks, more than CUDA launches",
                          (int)d->max_tokens, (int)d->max_seqs, (int)d->heads_v);
    for (i = 0; i < 4; i++)
        if (strides[i]->token >= (int64_t)1 << 39 || strides[i]->head >= (int64_t)1 << 39)
            return fqla__fail(&plan->context->desc, FQLA_ERROR_UNSUPPORTED,
                              "plan_desc.strides.%c is { token %lld, head %lld }; CUDA takes strides below 2^39 elements",
                              "qkvo"[i], (long long)strides[i]->token, (long long)strides[i]->head);
    return FQLA_OK;
}

/* The workspace: what prepare makes of every chunk (in a low_memory plan a forward's goes to its residuals), then the states and transitions of cut sequences' segments. */
typedef struct fqla__cuda_layout {
    size_t states, transitions, bytes; /* where they start; all of it */
} fqla__cuda_layout;

static fqla__cuda_layout fqla__cuda_workspace(const fqla_plan *plan) {
    const size_t heads = (size_t)plan->desc.heads_v, kept = (size_t)fqla__cuda_max_kept(plan) * heads;
    fqla__cuda_layout layout;
    const int64_t chunks = plan->desc.low_memory ? plan->desc.max_seqs : fqla__cuda_max_chunks(&plan->desc); /* a decode's, or all */
    layout.states = (size_t)fqla__round_up(chunks * plan->desc.heads_v * (int64_t)sizeof(fqla__prepared_chunk), FQLA__ALIGNMENT);
    layout.transitions = layout.states + kept * sizeof(fqla__kept_state);
    layout.bytes = layout.transitions + kept * sizeof(fqla__kept_transition);
    return layout;
}

/* Of what a failure leaves behind fqla__cuda_plan_destroy takes care. The first table is sent on the calling thread's own stream:
   the legacy stream would wait for all others, and could not be used while any of them is being captured. */
static fqla_status fqla__cuda_plan_create(fqla_plan *plan) {
    fqla_context *context = plan->context;
    const fqla__cuda_driver *driver = &context->cuda.driver;
    const fqla_stream per_thread = (fqla_stream)(uintptr_t)2; /* CU_STREAM_PER_THREAD */
    const char *function = "fqla_plan_create";
    size_t bytes;
    fqla_status status = fqla__cuda_check_limits(plan);
    if (status != FQLA_OK) return status;
    fqla__choose_schedule(plan, &plan->cuda.schedule);
    fqla__choose_backward_schedule(plan, &plan->cuda.backward);
    plan->workspace_size = fqla__cuda_workspace(plan).bytes;
    bytes = plan->cuda.backward_table = fqla__cuda_table_size(plan->desc.max_seqs, fqla__cuda_max_segments(plan));
    if (plan->desc.backward)
        bytes += fqla__cuda_table_size(plan->desc.max_seqs, (int64_t)plan->desc.max_seqs + plan->cuda.backward.extra_segments);
    plan->cuda.window_tables = bytes;
    if (plan->desc.low_memory) bytes = fqla__measure_windows(plan).tables;
    plan->cuda.staging = (fqla__device_table *)fqla__host_alloc(&context->desc, bytes);
    if (plan->cuda.staging == NULL)
        return fqla__fail(&context->desc, FQLA_ERROR_OUT_OF_MEMORY, "%s: no memory for the tables of %d sequences", function,
                          (int)plan->desc.max_seqs);
    status = fqla__cuda_enter(context, function);
    if (status != FQLA_OK) return status;
    status = fqla__cuda_check_live_stream(context, function, per_thread);
    if (status == FQLA_OK)
        status = fqla__cuda_check(context, function, "cuMemAlloc", driver->cuMemAlloc_v2(&plan->cuda.table, bytes));
    if (status == FQLA_OK)
        status = fqla__cuda_send_tables(plan, function, plan->num_seqs, plan->cu_seqlens, &plan->cuda.schedule, &plan->cuda.backward, per_thread);
    if (status == FQLA_OK)
        status = fqla__cuda_check(context, function, "cuStreamSynchronize", driver->cuStreamSynchronize(per_thread));
    fqla__cuda_leave(context);
    return status;
}

static void fqla__cuda_plan_destroy(fqla_plan *plan) {
    fqla_context *context = plan->context;
    if (plan->cuda.table != 0 && fqla__cuda_enter_to_end(context)) {
        fqla__cuda_note(context, "cuMemFree", context->cuda.driver.cuMemFree_v2(plan->cuda.table));
        if (plan->workspace != NULL)
            fqla__cuda_note(context, "cuMemFree", context->cuda.driver.cuMemFree_v2((fqla__cuda_address)plan->workspace));
        fqla__cuda_leave(context);
    }
    fqla__host_free(&context->desc, plan->cuda.staging);
}

static fqla_status fqla__cuda_plan_update(fqla_plan *plan, int32_t num_seqs, const int32_t *cu_seqlens, fqla_stream stream) {
    const char *function = "fqla_plan_update";
    fqla__schedule schedule = plan->cuda.schedule, backward = plan->cuda.backward;
    fqla_status status;
    if (plan->desc.low_memory)
        return fqla__fail(&plan->context->desc, FQLA_ERROR_UNSUPPORTED, "%s: plan_desc.low_memory is 1; on CUDA such a plan keeps its lengths",
                          function);
    status = fqla__cuda_enter(plan->context, function);
    if (status != FQLA_OK) return status;
    status = fqla__cuda_check_live_stream(plan->context, function, stream);
    if (status == FQLA_OK) status = fqla__cuda_send_tables(plan, function, num_seqs, cu_seqlens, &schedule, &backward, stream);
    if (status == FQLA_OK) plan->cuda.schedule = schedule, plan->cuda.backward = backward;
    fqla__cuda_leave(plan->context);
    return status;
}

/* A block of kernel prepare has a warp for each of up to four v-heads of a q/k head. */
static int32_t fqla__cuda_heads_per_block(const fqla_plan_desc *desc) {
    const int32_t ratio = desc->heads_v / desc->heads_qk;
    return ratio % 4 == 0 ? 4 : ratio % 3 == 0 ? 3 : ratio % 2 == 0 ? 2 : 1;
}

/* Everything in the parameters but the tensor maps. */
static void fqla__cuda_forward_params(const fqla__run *run, fqla__forward_params *p) {
    const fqla_plan_desc *d = &run->plan->desc;
    const fqla__cuda_layout layout = fqla__cuda_workspace(run->plan);
    memset(p, 0, sizeof *p);
    p->g = run->g, p->beta = run->beta;
    p->A_log = run->A_log, p->dt_bias = run->dt_bias;
    p->h0 = run->h0, p->ht = run->ht;
    p->q_rows = run->q;
    p->o_rows = run->o;
    p->snapshots = run->snapshots;
    p->state_in = run->state_in, p->state_out = run->state_out;
    p->bad_index_count = run->bad_index_count;
    p->table = (const fqla__device_table *)run->plan->cuda.table;
    p->prepared = (fqla__prepared_chunk *)(run->residuals != NULL ? run->residuals : run->workspace);
    p->states = (fqla__kept_state *)((char *)run->workspace + layout.states);
    p->transitions = (fqla__kept_transition *)((char *)run->workspace + layout.transitions);
    p->q_token = d->strides.q.token, p->q_head = d->strides.q.head;
    p->g_token = d->strides.g.token, p->g_head = d->strides.g.head;
    p->beta_token = d->strides.beta.token, p->beta_head = d->strides.beta.head;
    p->o_token = d->strides.o.token, p->o_head = d->strides.o.head;
    p->heads_qk = d->heads_qk, p->heads_v = d->heads_v;
    p->head_map = (int32_t)d->head_map, p->state_layout = (int32_t)d->state_layout;
    p->gate = (int32_t)d->gate, p->beta_form = (int32_t)d->beta;
    p->negative_eigenvalues = d->negative_eigenvalues;
    p->l2norm = d->l2norm ? FQLA__L2NORM_PREPARE : 0;
    p->state_bf16 = d->state_dtype == FQLA_DTYPE_BF16;
    p->pool_size = d->pool_size;
    p->checkpoint_every = run->snapshots != NULL ? d->checkpoint_every : 0;
    p->decode_tokens = run->decode_tokens;
    p->heads_per_block = fqla__cuda_heads_per_block(d);
    p->load_rows = run->decode_tokens > 0 ? 1 : FQLA__CHUNK_ROWS;
    p->scale = d->scale;
    p->warm_up_log2 = (float)log2((double)d->warm_up_tolerance);
}

/* Of a kernel's two variants, given the one for bfloat16, the plan's; those from scan on have but one. */
static int fqla__cuda_variant(const fqla_plan *plan, int kernel) {
    return kernel < FQLA__KERNEL_SCAN && plan->desc.dtype == FQLA_DTYPE_FP16 ? kernel + 1 : kernel;
}

static void fqla__cuda_describe(const fqla_plan *plan, fqla_plan_summary *summary) {
    const fqla__schedule *schedule = &plan->cuda.schedule, *backward = &plan->cuda.backward;
    const char *type = plan->desc.dtype == FQLA_DTYPE_FP16 ? "fp16" : "bf16", *form = plan->context->summary.kernel_form;
    const int32_t step = schedule->segment_chunks;
    int32_t n;
    summary->v_split = schedule->v_split;
    for (n = 0; n < plan->num_seqs; n++) {
        const int64_t chunks = fqla__ceil_div(plan->cu_seqlens[n + 1] - plan->cu_seqlens[n], FLASHQLA_CHUNK);
        if (step > 0 && fqla__ceil_div(chunks, step) > summary->segments) summary->segments = (int32_t)fqla__ceil_div(chunks, step);
    }
    snprintf(summary->forward, sizeof summary->forward, "cuda prepare, %sforward%s, %s (%s)", schedule->extra_segments > 0 ? "states, scan, " : "",
             schedule->v_split == 2 ? "_half" : "", type, form);
    snprintf(summary->decode, sizeof summary->decode, "cuda prepare, forward, %s (%s), as sequences of one token; no more than one", type, form);
    if (plan->desc.backward)
        snprintf(summary->backward, sizeof summary->backward, "cuda (prepare), %sbackward_chains, backward_gradients%s, %s (%s)",
                 plan->cuda.backward.extra_segments > 0 ? "backward_chains, backward_scan, " : "", plan->desc.gate == FQLA_GATE_RAW ? ", backward_sums" : "", type, form);
    else
        snprintf(summary->backward, sizeof summary->backward, "none: plan_desc.backward is 0");
    if (step > 0)
        snprintf(summary->schedule, sizeof summary->schedule,
                 "V over %d block%s, segments of %d chunks: %.0f us by the model, uncut %.0f", (int)schedule->v_split,
                 schedule->v_split == 2 ? "s" : "", (int)step, schedule->microseconds, schedule->uncut);
    else
        snprintf(summary->schedule, sizeof summary->schedule, "V over %d block%s, sequences uncut: %.0f us by the model", (int)schedule->v_split,
                 schedule->v_split == 2 ? "s" : "", schedule->microseconds);
    if (backward->segment_chunks > 0 || plan->desc.low_memory) {
        const size_t length = strlen(summary->schedule), room = sizeof summary->schedule - length;
        if (plan->desc.low_memory)
            snprintf(summary->schedule + length, room, "; backward in windows of %d chunks", (int)fqla__window_chunks(plan));
        else
            snprintf(summary->schedule + length, room, "; backward in parts of %d chunks: %.0f us, uncut %.0f",
                     (int)backward->segment_chunks, backward->microseconds, backward->uncut);
    }
}

/* The tensor map of [heads, rows, 128], read in boxes of box_rows rows of 64 columns of one head. */
static fqla_status fqla__cuda_tensor_map(const fqla__run *run, const char *function, fqla__tensor_map *map, const void *tensor,
                                         int32_t heads, const fqla_strides *strides, int32_t box_rows) {
    const fqla_plan_desc *d = &run->plan->desc;
    const int type = d->dtype == FQLA_DTYPE_FP16 ? FQLA__CUDA_TENSOR_FLOAT16 : FQLA__CUDA_TENSOR_BFLOAT16;
    const int32_t rows = run->decode_tokens > 0 ? d->max_seqs : d->max_tokens;
    const uint32_t element_strides[3] = {1, 1, 1};
    uint64_t dims[3], byte_strides[2], storage[16 + 15], *aligned = storage; /* the driver wants 128-byte alignment */
    uint32_t box[3];
    fqla_status status;
    while ((uintptr_t)aligned % 128 != 0) aligned++;
    dims[0] = 128, dims[1] = rows > 0 ? (uint64_t)rows : 1, dims[2] = (uint64_t)heads;
    byte_strides[0] = (uint64_t)strides->token * 2, byte_strides[1] = (uint64_t)strides->head * 2;
    box[0] = FQLA__LOAD_COLUMNS, box[1] = (uint32_t)box_rows, box[2] = 1;
    status = fqla__cuda_check(run->plan->context, function, "cuTensorMapEncodeTiled",
                              run->plan->context->cuda.driver.cuTensorMapEncodeTiled(
                                  aligned, type, 3, (void *)(uintptr_t)tensor, dims, byte_strides, box, element_strides,
                                  FQLA__CUDA_INTERLEAVE_NONE, FQLA__CUDA_SWIZZLE_128B, FQLA__CUDA_L2_PROMOTION_256B, FQLA__CUDA_OOB_FILL_ZERO));
    if (status == FQLA_OK) memcpy(map, aligned, sizeof *map);
    return status;
}

/* dependent: the kernel waits itself for the one before it, so that its blocks may start while that one runs. */
static fqla_status fqla__cuda_launch(const fqla_plan *plan, const char *function, int kernel, int64_t blocks, unsigned int threads, bool dependent,
                                     fqla__forward_params *params, fqla_stream stream) {
    const fqla__cuda_device *cuda = &plan->context->cuda;
    const int variant = fqla__cuda_variant(plan, kernel);
    fqla__cuda_launch_attribute attribute;
    fqla__cuda_launch_config config;
    void *parameters[1];
    parameters[0] = params;
    memset(&attribute, 0, sizeof attribute);
    attribute.id = FQLA__CUDA_LAUNCH_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmatic_stream_serialization_allowed = 1;
    memset(&config, 0, sizeof config);
    config.grid_x = (unsigned int)blocks, config.grid_y = config.grid_z = 1;
    config.block_x = threads, config.block_y = config.block_z = 1;
    config.shared_bytes = (unsigned int)fqla__kernels[variant].shared_bytes;
    config.stream = stream;
    config.attributes = &attribute;
    config.attribute_count = dependent ? 1 : 0;
    return fqla__cuda_check(plan->context, function, "cuLaunchKernelEx",
                            cuda->driver.cuLaunchKernelEx(&config, cuda->functions[variant], parameters, NULL));
}

/* Everything else that can fail comes before the launches. Where a later one fails those before it still run: they write the
   workspace alone. */
static fqla_status fqla__cuda_forward(const fqla__run *run, fqla_stream stream) {
    const fqla_plan *plan = run->plan;
    const fqla_plan_desc *d = &plan->desc;
    const fqla_tensor_strides *s = &d->strides;
    const bool decode = run->decode_tokens > 0, cut = !decode && plan->cuda.schedule.extra_segments > 0, half = !decode && plan->cuda.schedule.v_split == 2;
    const char *function = decode ? "fqla_decode" : "fqla_forward";
    const int64_t chunks = decode ? d->max_seqs : fqla__cuda_max_chunks(d), heads = d->heads_v;
    const int64_t kept = fqla__cuda_max_kept(plan), quarters = fqla__cuda_max_cut(plan) * heads * 4;
    const int64_t sm_count = plan->context->summary.sm_count;
    const int64_t items = (decode ? d->max_seqs : fqla__cuda_max_segments(plan)) * heads * (half ? 2 : 1);
    fqla__forward_params p;
    fqla_status status;
    if (d->low_memory && !decode && run->residuals == NULL)
        return fqla__fail(&plan->context->desc, FQLA_ERROR_NULL_POINTER,
                          "%s: forward_args.residuals is NULL; with plan_desc.low_memory the workspace has no room for them", function);
    status = fqla__cuda_enter(plan->context, function);
    if (status != FQLA_OK) return status;
    fqla__cuda_forward_params(run, &p);
    if (d->l2norm && run->residuals == NULL && !half) p.l2norm = FQLA__L2NORM_FORWARD; /* forward_half has no time for it */
    if ((status = fqla__cuda_check_stream(plan->context, function, stream)) == FQLA_OK &&
        (status = fqla__cuda_tensor_map(run, function, &p.q, run->q, d->heads_qk, &s->q, p.load_rows)) == FQLA_OK &&
        (status = fqla__cuda_tensor_map(run, function, &p.k, run->k, d->heads_qk, &s->k, p.load_rows)) == FQLA_OK &&
        (status = fqla__cuda_tensor_map(run, function, &p.v, run->v, d->heads_v, &s->v, p.load_rows)) == FQLA_OK &&
        (status = fqla__cuda_tensor_map(run, function, &p.o, run->o, d->heads_v, &s->o, p.load_rows)) == FQLA_OK)
        status = fqla__cuda_launch(plan, function, FQLA__KERNEL_PREPARE_BF16, chunks * heads / p.heads_per_block, FQLA__PREPARE_THREADS, false,
                                   &p, stream);
    if (status == FQLA_OK && cut)
        status = fqla__cuda_launch(plan, function, FQLA__KERNEL_STATES_BF16, kept * heads * 4, FQLA__STATES_THREADS, true, &p, stream);
    if (status == FQLA_OK && cut)
        status = fqla__cuda_launch(plan, function, FQLA__KERNEL_SCAN, quarters < sm_count ? quarters : sm_count, FQLA__SCAN_THREADS, true, &p,
                                   stream);
    if (status == FQLA_OK)
        status = fqla__cuda_launch(plan, function, half ? FQLA__KERNEL_FORWARD_HALF_BF16 : FQLA__KERNEL_FORWARD_BF16,
                                   items < sm_count ? items : sm_count, half ? FQLA__HALF_THREADS : FQLA__FORWARD_THREADS, true, &p,
                                   stream);
    fqla__cuda_leave(plan->context);
    return status;
}
