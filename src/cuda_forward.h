// >>cuda_forward: a plan's table on the device, and the launch of a forward or a one-token decode

/* Bytes of the table of num_seqs sequences: their number, that of their chunks, then an fqla__device_sequence each. */
static size_t fqla__cuda_table_size(int32_t num_seqs) {
    return 2 * sizeof(int64_t) + (size_t)num_seqs * sizeof(fqla__device_sequence);
}

/* The most chunks that a forward or a decode of this plan can have: every sequence may end in a part of one. */
static int64_t fqla__cuda_max_chunks(const fqla_plan_desc *desc) {
    return desc->max_tokens / FLASHQLA_CHUNK + (int64_t)desc->max_seqs;
}

/* Send the table of these sequences to the device. cu_seqlens NULL: all have padded_len tokens. The driver has read pageable memory
   when the copy returns, so that staging may be filled again at once. */
static fqla_status fqla__cuda_send_table(const fqla_plan *plan, const char *function, int32_t num_seqs, const int32_t *cu_seqlens,
                                         fqla_stream stream) {
    const fqla_plan_desc *d = &plan->desc;
    const int64_t every = (int64_t)FLASHQLA_CHUNK * d->checkpoint_every;
    fqla__device_sequence sequence;
    int64_t snapshot = 0, chunk = 0;
    int32_t n;
    plan->cuda.staging[0] = num_seqs;
    for (n = 0; n < num_seqs; n++) {
        sequence.len = cu_seqlens != NULL ? cu_seqlens[n + 1] - cu_seqlens[n] : d->padded_len;
        sequence.row = d->padded_len > 0 ? (int64_t)n * d->padded_len : cu_seqlens[n];
        sequence.chunk = chunk;
        sequence.snapshot = snapshot;
        chunk += (sequence.len + FLASHQLA_CHUNK - 1) / FLASHQLA_CHUNK;
        snapshot += every > 0 ? sequence.len / every : 0;
        memcpy((char *)plan->cuda.staging + fqla__cuda_table_size(n), &sequence, sizeof sequence);
    }
    plan->cuda.staging[1] = chunk;
    return fqla__cuda_check(plan->context, function, "cuMemcpyHtoDAsync",
                            plan->context->cuda.driver.cuMemcpyHtoDAsync_v2(plan->cuda.table, plan->cuda.staging,
                                                                            fqla__cuda_table_size(num_seqs), stream));
}

/* A grid has up to 2^31 - 1 blocks, and the copy engine takes strides below 2^40 bytes. */
static fqla_status fqla__cuda_check_limits(const fqla_plan *plan) {
    const fqla_plan_desc *d = &plan->desc;
    const fqla_strides *strides[4];
    int i;
    strides[0] = &d->strides.q, strides[1] = &d->strides.k, strides[2] = &d->strides.v, strides[3] = &d->strides.o;
    if (d->heads_v * fqla__cuda_max_chunks(d) > INT32_MAX)
        return fqla__fail(&plan->context->desc, FQLA_ERROR_UNSUPPORTED,
                          "plan_desc.max_tokens is %d and max_seqs %d; with heads_v %d that is over 2^31 - 1 blocks, more than CUDA launches",
                          (int)d->max_tokens, (int)d->max_seqs, (int)d->heads_v);
    for (i = 0; i < 4; i++)
        if (strides[i]->token >= (int64_t)1 << 39 || strides[i]->head >= (int64_t)1 << 39)
            return fqla__fail(&plan->context->desc, FQLA_ERROR_UNSUPPORTED,
                              "plan_desc.strides.%c is { token %lld, head %lld }; CUDA takes strides below 2^39 elements",
                              "qkvo"[i], (long long)strides[i]->token, (long long)strides[i]->head);
    return FQLA_OK;
}

/* Of what a failure leaves behind fqla__cuda_plan_destroy takes care. The first table is sent on the calling thread's own stream:
   the legacy stream would wait for all others, and could not be used while any of them is being captured. */
static fqla_status fqla__cuda_plan_create(fqla_plan *plan) {
    fqla_context *context = plan->context;
    const fqla__cuda_driver *driver = &context->cuda.driver;
    const fqla_stream per_thread = (fqla_stream)(uintptr_t)2; /* CU_STREAM_PER_THREAD */
    const char *function = "fqla_plan_create";
    const size_t bytes = fqla__cuda_table_size(plan->desc.max_seqs);
    fqla_status status = fqla__cuda_check_limits(plan);
    if (status != FQLA_OK) return status;
    plan->workspace_size = (size_t)(fqla__cuda_max_chunks(&plan->desc) * plan->desc.heads_v) * sizeof(fqla__prepared_chunk);
    plan->cuda.staging = (int64_t *)fqla__host_alloc(&context->desc, bytes);
    if (plan->cuda.staging == NULL)
        return fqla__fail(&context->desc, FQLA_ERROR_OUT_OF_MEMORY, "%s: no memory for the tables of %d sequences", function,
                          (int)plan->desc.max_seqs);
    status = fqla__cuda_enter(context, function);
    if (status != FQLA_OK) return status;
    status = fqla__cuda_check_live_stream(context, function, per_thread);
    if (status == FQLA_OK)
        status = fqla__cuda_check(context, function, "cuMemAlloc", driver->cuMemAlloc_v2(&plan->cuda.table, bytes));
    if (status == FQLA_OK) status = fqla__cuda_send_table(plan, function, plan->num_seqs, plan->cu_seqlens, per_thread);
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
    fqla_status status = fqla__cuda_enter(plan->context, function);
    if (status != FQLA_OK) return status;
    status = fqla__cuda_check_live_stream(plan->context, function, stream);
    if (status == FQLA_OK) status = fqla__cuda_send_table(plan, function, num_seqs, cu_seqlens, stream);
    fqla__cuda_leave(plan->context);
    return status;
}

/* Kernel prepare makes K K^T once for the v-heads that a block serves; with few chunks a block a v-head spreads the work wider. */
static int32_t fqla__cuda_heads_per_block(const fqla_plan *plan) {
    const fqla_plan_desc *d = &plan->desc;
    const int64_t blocks = fqla__cuda_max_chunks(d) * d->heads_qk;
    return blocks >= 16 * (int64_t)plan->context->summary.sm_count ? d->heads_v / d->heads_qk : 1;
}

/* Everything in the parameters but the tensor maps. */
static void fqla__cuda_forward_params(const fqla__run *run, fqla__forward_params *p) {
    const fqla_plan_desc *d = &run->plan->desc;
    memset(p, 0, sizeof *p);
    p->g = run->g, p->beta = run->beta;
    p->A_log = run->A_log, p->dt_bias = run->dt_bias;
    p->h0 = run->h0, p->ht = run->ht;
    p->q_rows = run->q;
    p->o = run->o;
    p->snapshots = run->snapshots;
    p->state_in = run->state_in, p->state_out = run->state_out;
    p->bad_index_count = run->bad_index_count;
    p->table = (const int64_t *)run->plan->cuda.table;
    p->prepared = (fqla__prepared_chunk *)run->workspace;
    p->q_token = d->strides.q.token, p->q_head = d->strides.q.head;
    p->g_token = d->strides.g.token, p->g_head = d->strides.g.head;
    p->beta_token = d->strides.beta.token, p->beta_head = d->strides.beta.head;
    p->o_token = d->strides.o.token, p->o_head = d->strides.o.head;
    p->heads_qk = d->heads_qk, p->heads_v = d->heads_v;
    p->head_map = (int32_t)d->head_map, p->state_layout = (int32_t)d->state_layout;
    p->gate = (int32_t)d->gate, p->beta_form = (int32_t)d->beta;
    p->negative_eigenvalues = d->negative_eigenvalues, p->l2norm = d->l2norm;
    p->state_bf16 = d->state_dtype == FQLA_DTYPE_BF16;
    p->pool_size = d->pool_size;
    p->checkpoint_every = run->snapshots != NULL ? d->checkpoint_every : 0;
    p->decode_tokens = run->decode_tokens;
    p->heads_per_block = fqla__cuda_heads_per_block(run->plan);
    p->load_rows = run->decode_tokens > 0 ? 1 : FQLA__CHUNK_ROWS;
    p->scale = d->scale;
}

/* Of a kernel's two variants, given the one for bfloat16, the plan's. */
static int fqla__cuda_variant(const fqla_plan *plan, int bf16_kernel) { return bf16_kernel + (plan->desc.dtype == FQLA_DTYPE_FP16); }

static void fqla__cuda_describe(const fqla_plan *plan, fqla_plan_summary *summary) {
    const char *prepare = fqla__kernels[fqla__cuda_variant(plan, FQLA__KERNEL_PREPARE_BF16)].name;
    const char *forward = fqla__kernels[fqla__cuda_variant(plan, FQLA__KERNEL_FORWARD_BF16)].name, *form = plan->context->summary.kernel_form;
    snprintf(summary->forward, sizeof summary->forward, "cuda %s, %s (%s)", prepare, forward, form);
    snprintf(summary->decode, sizeof summary->decode, "cuda %s, %s (%s), as sequences of one token; no more than one", prepare, forward, form);
    snprintf(summary->backward, sizeof summary->backward, "none: CUDA has no backward kernels yet");
    snprintf(summary->schedule, sizeof summary->schedule,
             "prepare: a block for %d v-heads of a chunk; forward: a block for each of %d v-heads of up to %d sequences",
             (int)fqla__cuda_heads_per_block(plan), (int)plan->desc.heads_v, (int)plan->desc.max_seqs);
}

/* The tensor map of [rows, heads, 128], read in boxes of box_rows rows of 64 columns of one head. */
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
    dims[0] = 128, dims[1] = (uint64_t)heads, dims[2] = rows > 0 ? (uint64_t)rows : 1;
    byte_strides[0] = (uint64_t)strides->head * 2, byte_strides[1] = (uint64_t)strides->token * 2;
    box[0] = FQLA__LOAD_COLUMNS, box[1] = 1, box[2] = (uint32_t)box_rows;
    status = fqla__cuda_check(run->plan->context, function, "cuTensorMapEncodeTiled",
                              run->plan->context->cuda.driver.cuTensorMapEncodeTiled(
                                  aligned, type, 3, (void *)(uintptr_t)tensor, dims, byte_strides, box, element_strides,
                                  FQLA__CUDA_INTERLEAVE_NONE, FQLA__CUDA_SWIZZLE_128B, FQLA__CUDA_L2_PROMOTION_256B, FQLA__CUDA_OOB_FILL_ZERO));
    if (status == FQLA_OK) memcpy(map, aligned, sizeof *map);
    return status;
}

static fqla_status fqla__cuda_launch(const fqla_plan *plan, const char *function, int kernel, int64_t blocks, unsigned int threads,
                                     fqla__forward_params *params, fqla_stream stream) {
    const fqla__cuda_device *cuda = &plan->context->cuda;
    const int variant = fqla__cuda_variant(plan, kernel);
    void *parameters[1];
    parameters[0] = params;
    return fqla__cuda_check(plan->context, function, "cuLaunchKernel",
                            cuda->driver.cuLaunchKernel(cuda->functions[variant], (unsigned int)blocks, 1, 1, threads, 1, 1,
                                                        (unsigned int)fqla__kernels[variant].shared_bytes, stream, parameters, NULL));
}

/* Everything else that can fail comes before the two launches. Where the second itself fails the first still runs: it writes the
   workspace alone. */
static fqla_status fqla__cuda_forward(const fqla__run *run, fqla_stream stream) {
    const fqla_plan *plan = run->plan;
    const fqla_plan_desc *d = &plan->desc;
    const fqla_tensor_strides *s = &d->strides;
    const char *function = run->decode_tokens > 0 ? "fqla_decode" : "fqla_forward";
    const int64_t chunks = run->decode_tokens > 0 ? d->max_seqs : fqla__cuda_max_chunks(d);
    fqla__forward_params p;
    fqla_status status = fqla__cuda_enter(plan->context, function);
    if (status != FQLA_OK) return status;
    fqla__cuda_forward_params(run, &p);
    if ((status = fqla__cuda_check_stream(plan->context, function, stream)) == FQLA_OK &&
        (status = fqla__cuda_tensor_map(run, function, &p.q, run->q, d->heads_qk, &s->q, p.load_rows)) == FQLA_OK &&
        (status = fqla__cuda_tensor_map(run, function, &p.k, run->k, d->heads_qk, &s->k, p.load_rows)) == FQLA_OK &&
        (status = fqla__cuda_tensor_map(run, function, &p.v, run->v, d->heads_v, &s->v, p.load_rows)) == FQLA_OK)
        status = fqla__cuda_launch(plan, function, FQLA__KERNEL_PREPARE_BF16, chunks * d->heads_v / p.heads_per_block,
                                   FQLA__PREPARE_THREADS, &p, stream);
    if (status == FQLA_OK)
        status = fqla__cuda_launch(plan, function, FQLA__KERNEL_FORWARD_BF16, (int64_t)d->heads_v * d->max_seqs, FQLA__FORWARD_THREADS, &p,
                                   stream);
    fqla__cuda_leave(plan->context);
    return status;
}
