// >>cuda_backward: the workspace and the launches of a backward on CUDA

static int64_t fqla__cuda_backward_segments(const fqla_plan *plan) {
    return (int64_t)plan->desc.max_seqs + plan->cuda.backward.extra_segments;
}

/* The most cut sequences and segments of those, as for the forward. */
static int64_t fqla__cuda_backward_cut(const fqla_plan *plan) {
    return fqla__cuda_most_cut(plan->desc.max_seqs, fqla__cuda_backward_segments(plan));
}

static int64_t fqla__cuda_backward_kept(const fqla_plan *plan) {
    return plan->cuda.backward.extra_segments + fqla__cuda_backward_cut(plan);
}

/* How many counts fqla__backward_params.progress has. */
static size_t fqla__backward_counts(const fqla_plan *plan) {
    return 1 + ((size_t)fqla__cuda_max_chunks(&plan->desc) + 1) * (size_t)plan->desc.heads_qk;
}

/* The workspace: what kernel prepare makes where a forward has left no residuals, but in a plan that needs them; the chunks' states;
   what segments start from, forwards and backwards, and their transitions; what kernels that run beside each other tell one another;
   the raw gates' sums. In a low_memory plan the first two are a window's; the next a sequence's parts' first states, but the first
   part's, and two gradients, of the part at hand and of the one before. */
typedef struct fqla__cuda_backward_layout {
    size_t chunks, states, gradients, transitions, progress, gate_sums, bytes; /* where they start; all of it */
} fqla__cuda_backward_layout;

static fqla__cuda_backward_layout fqla__cuda_backward_workspace(const fqla_plan *plan) {
    const fqla_plan_desc *d = &plan->desc;
    const size_t heads = (size_t)d->heads_v, all = (size_t)fqla__cuda_max_chunks(d) * heads;
    size_t entries = all, states = (size_t)fqla__cuda_backward_kept(plan) * heads, gradients = states, transitions = states;
    fqla__cuda_backward_layout layout;
    if (d->low_memory) {
        const fqla__window_measure measure = fqla__measure_windows(plan);
        entries = (size_t)measure.chunks * heads;
        states = (size_t)(measure.parts - 1) * heads;
        gradients = measure.parts > 1 ? 2 * heads : 0;
        transitions = 0;
    }
    layout.chunks = d->needs_residuals ? 0 : (size_t)fqla__round_up((int64_t)(entries * sizeof(fqla__prepared_chunk)), FQLA__ALIGNMENT);
    layout.states = layout.chunks + entries * sizeof(fqla__chunk_states);
    layout.gradients = layout.states + states * sizeof(fqla__kept_state);
    layout.transitions = layout.gradients + gradients * sizeof(fqla__kept_state);
    layout.progress = layout.transitions + transitions * sizeof(fqla__kept_transition);
    layout.gate_sums = layout.progress + (size_t)fqla__round_up((int64_t)(fqla__backward_counts(plan) * sizeof(int32_t)), FQLA__ALIGNMENT);
    layout.bytes = layout.gate_sums + (d->gate == FQLA_GATE_RAW ? all * 2 * sizeof(float) : 0);
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
    p->progress = (int32_t *)(void *)((char *)run->workspace + layout.progress);
    p->gate_sums = (float *)(void *)((char *)run->workspace + layout.gate_sums);
    p->k_token = d->strides.k.token, p->k_head = d->strides.k.head;
    p->v_token = d->strides.v.token, p->v_head = d->strides.v.head;
    p->unit = 2.0f * (float)frexp((double)d->scale, &exponent);
    p->per_unit = 1.0f / p->unit;
    p->power = (float)ldexp(1.0, exponent - 1);
}

/* The kernels over all sequences at once. dependent: there is a launch before. */
static fqla_status fqla__cuda_backward_whole(const fqla_plan *plan, const char *function, bool dependent, fqla__backward_params *p,
                                             fqla_stream stream) {
    const int64_t heads = plan->desc.heads_v, kept = fqla__cuda_backward_kept(plan), sm_count = plan->context->summary.sm_count;
    const int64_t items = fqla__cuda_max_chunks(&plan->desc) * plan->desc.heads_qk;
    const int64_t quarters = fqla__cuda_backward_cut(plan) * heads * 8;
    const int64_t blocks = fqla__cuda_backward_segments(plan) * heads * (kept > 0 ? 8 : 4);
    fqla_status status = FQLA_OK;
    if (kept > 0) {
        p->first_pass = 1;
        status = fqla__cuda_launch(plan, function, FQLA__KERNEL_BACKWARD_CHAINS_BF16, kept * heads * 6, FQLA__CHAINS_THREADS,
                                   dependent, &p->forward, stream);
        dependent = true;
        p->first_pass = 0;
        p->overlaps = 1;
        if (status == FQLA_OK)
            status = fqla__cuda_launch(plan, function, FQLA__KERNEL_BACKWARD_SCAN, quarters < sm_count ? quarters : sm_count,
                                       FQLA__SCAN_THREADS, true, &p->forward, stream);
    }
    p->pace = kept == 0 && blocks <= sm_count ? (int32_t)(1000.0 * fqla__backward_costs.gradient) : 0;
    if (status == FQLA_OK)
        status = fqla__cuda_launch(plan, function, FQLA__KERNEL_BACKWARD_CHAINS_BF16, blocks, FQLA__CHAINS_THREADS, dependent,
                                   &p->forward, stream);
    if (status == FQLA_OK)
        status = fqla__cuda_launch(plan, function, FQLA__KERNEL_BACKWARD_GRADIENTS_BF16, items < sm_count ? items : sm_count,
                                   FQLA__GRADIENTS_THREADS, true, &p->forward, stream);
    return status;
}

/* A state of a v-head between a sequence's parts: float32, in the plan's layout. */
static void *fqla__carried_state(void *states, int64_t number, int64_t heads) {
    return (char *)states + (size_t)(number * heads) * sizeof(fqla__kept_state);
}

/* Sequence n's entry in h0, dht or dh0; NULL stays NULL. */
static const void *fqla__given_state(const fqla_plan_desc *d, const void *states, int32_t n) {
    const size_t bytes = (size_t)fqla__state_elements(d) * (d->state_dtype == FQLA_DTYPE_BF16 ? 2 : 4);
    return states != NULL ? (const char *)states + (size_t)n * (size_t)d->heads_v * bytes : NULL;
}

/* One window: its states alone, to be carried on, or its gradients. whole: the parameters for all sequences at once. residuals: the
   forward's, of all chunks; NULL: made here. A kernel prepare may not start while the one before still reads what it writes. */
static fqla_status fqla__cuda_run_window(const fqla_plan *plan, const char *function, const fqla__window *window, bool states_alone,
                                         const fqla__backward_params *whole, const fqla__prepared_chunk *residuals, fqla_stream stream) {
    const fqla_plan_desc *d = &plan->desc;
    const int64_t heads = d->heads_v, sm_count = plan->context->summary.sm_count, items = window->chunks * d->heads_qk;
    const bool begins = window->part == 0, ends = window->part + 1 == window->parts;
    const bool dependent = residuals == NULL || window->first > 0 || window->part > 0 || (window->parts > 1 && !states_alone);
    fqla__backward_params p = *whole;
    fqla_status status = FQLA_OK;
    p.forward.table = (const fqla__device_table *)((uintptr_t)plan->cuda.table + window->table);
    if (residuals != NULL) p.forward.prepared = (fqla__prepared_chunk *)(uintptr_t)(residuals + window->chunk * heads);
    p.forward.h0 = begins ? fqla__given_state(d, whole->forward.h0, window->first)
                          : fqla__carried_state(whole->forward.states, window->part - 1, heads);
    if (states_alone) {
        p.carry = fqla__carried_state(whole->forward.states, window->part, heads);
        p.dht = NULL, p.dh0 = NULL;
    } else {
        p.dht = ends ? fqla__given_state(d, whole->dht, window->first) : fqla__carried_state(whole->gradients, (window->part + 1) % 2, heads);
        p.dh0 = begins ? (void *)(uintptr_t)fqla__given_state(d, whole->dh0, window->first)
                       : fqla__carried_state(whole->gradients, window->part % 2, heads);
        p.gate_sums = whole->gate_sums + window->chunk * heads * 2;
    }
    p.carried = (begins ? 0 : FQLA__CARRIED_H0 | FQLA__CARRIED_DH0) | (ends ? 0 : FQLA__CARRIED_DHT);
    if (residuals == NULL && window->chunks > 0)
        status = fqla__cuda_launch(plan, function, FQLA__KERNEL_PREPARE_BF16, window->chunks * heads / p.forward.heads_per_block,
                                   FQLA__PREPARE_THREADS, false, &p.forward, stream);
    if (status == FQLA_OK)
        status = fqla__cuda_launch(plan, function, FQLA__KERNEL_BACKWARD_CHAINS_BF16, window->count * heads * (states_alone ? 2 : 4),
                                   FQLA__CHAINS_THREADS, dependent, &p.forward, stream);
    if (status == FQLA_OK && !states_alone && items > 0)
        status = fqla__cuda_launch(plan, function, FQLA__KERNEL_BACKWARD_GRADIENTS_BF16, items < sm_count ? items : sm_count,
                                   FQLA__GRADIENTS_THREADS, true, &p.forward, stream);
    return status;
}

/* Window by window; a sequence's parts twice, there for their states and back. */
static fqla_status fqla__cuda_run_windows(const fqla_plan *plan, const char *function, const fqla__backward_params *whole,
                                          const fqla__prepared_chunk *residuals, fqla_stream stream) {
    const int64_t most = fqla__window_chunks(plan);
    fqla__window window = fqla__before_windows(plan);
    fqla_status status = FQLA_OK;
    while (status == FQLA_OK && fqla__next_window(plan, most, &window)) {
        const fqla__window last = window;
        const bool alone = window.part + 1 < window.parts;
        status = fqla__cuda_run_window(plan, function, &window, alone, whole, residuals, stream);
        if (alone || window.parts == 1) continue;
        for (; status == FQLA_OK && window.part > 0;) {
            window.part--;
            window.chunks = most;
            window.chunk -= most;
            window.table -= fqla__cuda_table_size(1, 1);
            status = fqla__cuda_run_window(plan, function, &window, false, whole, residuals, stream);
        }
        window = last;
    }
    return status;
}

/* Everything else that can fail comes before the launches, as in the forward. */
static fqla_status fqla__cuda_backward(const fqla_plan *plan, const fqla_backward_args *args, void *workspace, fqla_stream stream) {
    const fqla_plan_desc *d = &plan->desc;
    const fqla_tensor_strides *s = &d->strides;
    const char *function = "fqla_backward";
    const bool prepares = args->residuals == NULL && !d->low_memory;
    fqla__backward_params p;
    fqla__run run;
    fqla_status status;
    if (d->needs_residuals && args->residuals == NULL)
        return fqla__fail(&plan->context->desc, FQLA_ERROR_NULL_POINTER,
                          "%s: backward_args.residuals is NULL; with plan_desc.needs_residuals the workspace has no room for them", function);
    status = fqla__cuda_enter(plan->context, function);
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
        (status = fqla__cuda_tensor_map(&run, function, &p.dv, args->dv, d->heads_v, &s->v, FQLA__CHUNK_ROWS)) == FQLA_OK && prepares)
        status = fqla__cuda_launch(plan, function, FQLA__KERNEL_PREPARE_BF16,
                                   fqla__cuda_max_chunks(d) * d->heads_v / p.forward.heads_per_block, FQLA__PREPARE_THREADS, false,
                                   &p.forward, stream);
    /* the parameters' first member lies where they do */
    if (status == FQLA_OK)
        status = d->low_memory ? fqla__cuda_run_windows(plan, function, &p, (const fqla__prepared_chunk *)args->residuals, stream)
                               : fqla__cuda_backward_whole(plan, function, prepares, &p, stream);
    if (status == FQLA_OK && d->gate == FQLA_GATE_RAW)
        status = fqla__cuda_launch(plan, function, FQLA__KERNEL_BACKWARD_SUMS, d->heads_v, FQLA__SUMS_THREADS, true, &p.forward, stream);
    fqla__cuda_leave(plan->context);
    return status;
}
