// >>cuda_backward: the workspace and the launches of a backward on CUDA

static int64_t fqla__cuda_backward_segments(const fqla_plan *plan) {
    return (int64_t)plan->desc.max_seqs + plan->cuda.backward.extra_segments;
}

/* The most segments of cut sequences, as for the forward. */
static int64_t fqla__cuda_backward_kept(const fqla_plan *plan) {
    const int64_t extra = plan->cuda.backward.extra_segments;
    return extra + (extra < plan->desc.max_seqs ? extra : plan->desc.max_seqs);
}

/* The workspace: what kernel prepare makes where a forward has left no residuals; the chunks' states; what segments start from,
   forwards and backwards, and their transitions; the raw gates' sums. */
typedef struct fqla__cuda_backward_layout {
    size_t chunks, states, gradients, transitions, gate_sums, bytes; /* where they start; all of it */
} fqla__cuda_backward_layout;

static fqla__cuda_backward_layout fqla__cuda_backward_workspace(const fqla_plan *plan) {
    const fqla_plan_desc *d = &plan->desc;
    const size_t entries = (size_t)fqla__cuda_max_chunks(d) * (size_t)d->heads_v;
    const size_t kept = (size_t)fqla__cuda_backward_kept(plan) * (size_t)d->heads_v;
    fqla__cuda_backward_layout layout;
    layout.chunks = (size_t)fqla__round_up((int64_t)(entries * sizeof(fqla__prepared_chunk)), FQLA__ALIGNMENT);
    layout.states = layout.chunks + entries * sizeof(fqla__chunk_states);
    layout.gradients = layout.states + kept * sizeof(fqla__kept_state);
    layout.transitions = layout.gradients + kept * sizeof(fqla__kept_state);
    layout.gate_sums = layout.transitions + kept * sizeof(fqla__kept_transition);
    layout.bytes = layout.gate_sums + (d->gate == FQLA_GATE_RAW ? entries * 2 * sizeof(float) : 0);
    return layout;
}

static size_t fqla__cuda_backward_size(const fqla_plan *plan) { return fqla__cuda_backward_workspace(plan).bytes; }

/* What a forward leaves for the backward. */
static size_t fqla__cuda_residuals_size(const fqla_plan *plan) {
    return (size_t)fqla__cuda_max_chunks(&plan->desc) * (size_t)plan->desc.heads_v * sizeof(fqla__prepared_chunk);
}

/* Everything in the parameters but the tensor maps. */
static void fqla__cuda_backward_params(const fqla__run *run, const fqla_backward_args *args, fqla__backward_params *p) {
    const fqla_plan_desc *d = &run->plan->desc;
    const fqla__cuda_backward_layout layout = fqla__cuda_backward_workspace(run->plan);
    int exponent;
    memset(p, 0, sizeof *p);
    fqla__cuda_forward_params(run, &p->forward);
    p->forward.table = (const fqla__device_table *)((uintptr_t)run->plan->cuda.table + run->plan->cuda.backward_table);
    p->forward.states = (fqla__kept_state *)((char *)run->workspace + layout.states);
    p->forward.transitions = (fqla__kept_transition *)((char *)run->workspace + layout.transitions);
    p->gradients = (fqla__kept_state *)((char *)run->workspace + layout.gradients);
    if (args->residuals != NULL) p->forward.prepared = (fqla__prepared_chunk *)(uintptr_t)args->residuals;
    p->v_rows = args->v;
    p->dq_rows = args->dq, p->dk_rows = args->dk, p->dv_rows = args->dv;
    p->dg = args->dg, p->dbeta = args->dbeta;
    p->dht = args->dht, p->dh0 = args->dh0;
    p->dA_log = args->dA_log, p->ddt_bias = args->ddt_bias;
    p->chunks = (fqla__chunk_states *)((char *)run->workspace + layout.chunks);
    p->gate_sums = (float *)(void *)((char *)run->workspace + layout.gate_sums);
    p->k_token = d->strides.k.token, p->k_head = d->strides.k.head;
    p->v_token = d->strides.v.token, p->v_head = d->strides.v.head;
    p->unit = 2.0f * (float)frexp((double)d->scale, &exponent);
    p->per_unit = 1.0f / p->unit;
    p->power = (float)ldexp(1.0, exponent - 1);
}

/* Everything else that can fail comes before the launches, as in the forward. */
static fqla_status fqla__cuda_backward(const fqla_plan *plan, const fqla_backward_args *args, void *workspace, fqla_stream stream) {
    const fqla_plan_desc *d = &plan->desc;
    const fqla_tensor_strides *s = &d->strides;
    const char *function = "fqla_backward";
    const int64_t chunks = fqla__cuda_max_chunks(d), heads = d->heads_v, items = chunks * d->heads_qk;
    const int64_t sm_count = plan->context->summary.sm_count, kept = fqla__cuda_backward_kept(plan);
    bool dependent = args->residuals == NULL; /* there is a launch before */
    fqla__backward_params p;
    fqla__run run;
    fqla_status status = fqla__cuda_enter(plan->context, function);
    if (status != FQLA_OK) return status;
    memset(&run, 0, sizeof run);
    run.plan = plan;
    run.q = args->q, run.k = args->k, run.v = args->v;
    run.g = args->g, run.beta = args->beta;
    run.A_log = args->A_log, run.dt_bias = args->dt_bias;
    run.h0 = args->h0;
    run.workspace = workspace;
    fqla__cuda_backward_params(&run, args, &p);
    if ((status = fqla__cuda_check_stream(plan->context, function, stream)) == FQLA_OK &&
        (status = fqla__cuda_tensor_map(&run, function, &p.forward.q, args->q, d->heads_qk, &s->q, FQLA__CHUNK_ROWS)) == FQLA_OK &&
        (status = fqla__cuda_tensor_map(&run, function, &p.forward.k, args->k, d->heads_qk, &s->k, FQLA__CHUNK_ROWS)) == FQLA_OK &&
        (status = fqla__cuda_tensor_map(&run, function, &p.forward.v, args->v, d->heads_v, &s->v, FQLA__CHUNK_ROWS)) == FQLA_OK &&
        (status = fqla__cuda_tensor_map(&run, function, &p.forward.o, args->do_, d->heads_v, &s->o, FQLA__CHUNK_ROWS)) == FQLA_OK &&
        (status = fqla__cuda_tensor_map(&run, function, &p.dq, args->dq, d->heads_qk, &s->q, FQLA__CHUNK_ROWS)) == FQLA_OK &&
        (status = fqla__cuda_tensor_map(&run, function, &p.dk, args->dk, d->heads_qk, &s->k, FQLA__CHUNK_ROWS)) == FQLA_OK &&
        (status = fqla__cuda_tensor_map(&run, function, &p.dv, args->dv, d->heads_v, &s->v, FQLA__CHUNK_ROWS)) == FQLA_OK &&
        args->residuals == NULL)
        status = fqla__cuda_launch(plan, function, FQLA__KERNEL_PREPARE_BF16, chunks * heads / p.forward.heads_per_block,
                                   FQLA__PREPARE_THREADS, false, &p.forward, stream);
    /* the parameters' first member lies where they do */
    if (status == FQLA_OK && kept > 0) {
        p.first_pass = 1;
        status = fqla__cuda_launch(plan, function, FQLA__KERNEL_BACKWARD_CHAINS_BF16, kept * heads * 6, FQLA__CHAINS_THREADS,
                                   dependent, &p.forward, stream);
        dependent = true;
        p.first_pass = 0;
        if (status == FQLA_OK)
            status = fqla__cuda_launch(plan, function, FQLA__KERNEL_BACKWARD_SCAN, kept * heads * 4, FQLA__BACKWARD_SCAN_THREADS,
                                       true, &p.forward, stream);
    }
    if (status == FQLA_OK)
        status = fqla__cuda_launch(plan, function, FQLA__KERNEL_BACKWARD_CHAINS_BF16,
                                   fqla__cuda_backward_segments(plan) * heads * 4, FQLA__CHAINS_THREADS, dependent,
                                   &p.forward, stream);
    if (status == FQLA_OK)
        status = fqla__cuda_launch(plan, function, FQLA__KERNEL_BACKWARD_GRADIENTS_BF16, items < sm_count ? items : sm_count,
                                   FQLA__GRADIENTS_THREADS, true, &p.forward, stream);
    if (status == FQLA_OK && d->gate == FQLA_GATE_RAW)
        status = fqla__cuda_launch(plan, function, FQLA__KERNEL_BACKWARD_SUMS, heads, FQLA__SUMS_THREADS, true, &p.forward, stream);
    fqla__cuda_leave(plan->context);
    return status;
}
