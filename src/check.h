// >>check: the arguments of a run, before anything is written or launched

/* One tensor of a call as bytes: `rows` rows `stride` apart, each with `width` bytes that the call may touch. */
typedef struct fqla__tensor {
    const char *name;
    const void *pointer;
    int64_t rows, stride, width;
    int64_t alignment;
    bool required, output;
} fqla__tensor;

enum { FQLA__INPUT = 0, FQLA__OUTPUT = 1, FQLA__REQUIRED = 2 };

static fqla__tensor fqla__dense_tensor(const char *name, const void *pointer, int64_t bytes, int64_t alignment, int flags) {
    fqla__tensor t;
    t.name = name;
    t.pointer = pointer;
    t.rows = 1;
    t.stride = t.width = bytes;
    t.alignment = alignment;
    t.required = (flags & FQLA__REQUIRED) != 0;
    t.output = (flags & FQLA__OUTPUT) != 0;
    return t;
}

static fqla__tensor fqla__strided_tensor(const char *name, const void *pointer, const fqla_strides *strides, int32_t heads, int32_t dim,
                                         int64_t rows, int64_t element_size, int64_t alignment, int flags) {
    fqla__tensor t = fqla__dense_tensor(name, pointer, 0, alignment, flags);
    const int64_t row = (heads - 1) * strides->head + dim;
    if (rows <= 0) return t;
    if (strides->token >= row) {
        t.rows = rows;
        t.stride = strides->token * element_size;
        t.width = row * element_size;
    } else { /* heads outside: one range from the first element to the last */
        t.stride = t.width = ((rows - 1) * strides->token + row) * element_size;
    }
    return t;
}

/* Do two tensors share a byte? Rows of equal stride may interleave, as q, k and v of one fused buffer do. */
static bool fqla__tensors_overlap(const fqla__tensor *a, const fqla__tensor *b) {
    const uintptr_t start_a = (uintptr_t)a->pointer, start_b = (uintptr_t)b->pointer;
    const uintptr_t end_a = start_a + (uintptr_t)((a->rows - 1) * a->stride + a->width);
    const uintptr_t end_b = start_b + (uintptr_t)((b->rows - 1) * b->stride + b->width);
    uintptr_t distance;
    if (a->pointer == NULL || b->pointer == NULL || a->width == 0 || b->width == 0) return false;
    if (start_a >= end_b || start_b >= end_a) return false;
    if (a->stride != b->stride) return true;
    if (start_b < start_a) return fqla__tensors_overlap(b, a);
    distance = (start_b - start_a) % (uintptr_t)a->stride; /* b's row starts this far into one of a's */
    return distance < (uintptr_t)a->width || distance + (uintptr_t)b->width > (uintptr_t)a->stride;
}

/* ht may be h0: the one pair of tensors that may coincide. */
static bool fqla__may_coincide(const fqla__tensor *a, const fqla__tensor *b) {
    return a->pointer == b->pointer && strcmp(a->name, "h0") == 0 && strcmp(b->name, "ht") == 0;
}

static fqla_status fqla__check_tensors(const fqla_context_desc *log, const char *function, const fqla__tensor *tensors, int count) {
    int i, j;
    for (i = 0; i < count; i++) {
        const fqla__tensor *t = &tensors[i];
        if (t->required && t->pointer == NULL)
            return fqla__fail(log, FQLA_ERROR_NULL_POINTER, "%s: %s is NULL; it is required", function, t->name);
        if (t->pointer != NULL && (uintptr_t)t->pointer % (uintptr_t)t->alignment != 0)
            return fqla__fail(log, FQLA_ERROR_MISALIGNED, "%s: %s is %p; it is a multiple of %d bytes", function, t->name, t->pointer,
                              (int)t->alignment);
        if (t->pointer != NULL && (uintptr_t)t->pointer > UINTPTR_MAX - (uintptr_t)((t->rows - 1) * t->stride + t->width))
            return fqla__fail(log, FQLA_ERROR_TOO_LARGE, "%s: %s at %p runs past the end of the address space", function, t->name,
                              t->pointer);
    }
    for (i = 0; i < count; i++)
        for (j = i + 1; j < count; j++)
            if ((tensors[i].output || tensors[j].output) && fqla__tensors_overlap(&tensors[i], &tensors[j]) &&
                !fqla__may_coincide(&tensors[i], &tensors[j]))
                return fqla__fail(log, FQLA_ERROR_OVERLAP, "%s: %s at %p overlaps %s at %p", function, tensors[j].name,
                                  tensors[j].pointer, tensors[i].name, tensors[i].pointer);
    return FQLA_OK;
}

/* The workspace of a run: the caller's, or the plan's own. */
static fqla_status fqla__pick_workspace(const fqla_plan *plan, const char *function, void *given, size_t size, void **workspace) {
    const fqla_context_desc *log = &plan->context->desc;
    *workspace = given != NULL ? given : plan->workspace;
    if (plan->workspace_size == 0) return FQLA_OK;
    if (*workspace == NULL)
        return fqla__fail(log, FQLA_ERROR_NULL_POINTER, "%s: workspace is NULL; the plan was made with external_workspace", function);
    if (given != NULL && size < plan->workspace_size)
        return fqla__fail(log, FQLA_ERROR_WORKSPACE_TOO_SMALL, "%s: workspace_size is %.0f; fqla_workspace_size says %.0f", function,
                          (double)size, (double)plan->workspace_size);
    return FQLA_OK;
}

/* Residuals that a run is given; *residuals is NULL where the plan's backward takes none. */
static fqla_status fqla__pick_residuals(const fqla_plan *plan, const char *function, const void *given, size_t size, const void **residuals) {
    const size_t needed = fqla__residuals_size(plan);
    *residuals = needed > 0 ? given : NULL;
    if (*residuals != NULL && size < needed)
        return fqla__fail(&plan->context->desc, FQLA_ERROR_WORKSPACE_TOO_SMALL, "%s: residuals_size is %.0f; fqla_residuals_size says %.0f", function,
                          (double)size, (double)needed);
    return FQLA_OK;
}

/* The state indices, on the CPU: within the pool, every out slot written once and read by no other sequence.
   owners [pool_size]: for each slot 1 + the sequence that writes it, or 0. */
static fqla_status fqla__check_indices(const fqla__run *run, const char *function, int32_t *owners) {
    const fqla_context_desc *log = &run->plan->context->desc;
    const int32_t pool_size = run->plan->desc.pool_size;
    int32_t n;
    memset(owners, 0, (size_t)pool_size * sizeof *owners);
    for (n = 0; n < run->plan->num_seqs; n++) {
        const int32_t in = run->state_in[n], out = run->state_out[n];
        if (in < -1 || in >= pool_size)
            return fqla__fail(log, FQLA_ERROR_INVALID_INDEX, "%s: state_in[%d] is %d; -1 to %d", function, (int)n, (int)in,
                              (int)pool_size - 1);
        if (out < -1 || out >= pool_size)
            return fqla__fail(log, FQLA_ERROR_INVALID_INDEX, "%s: state_out[%d] is %d; -1 to %d", function, (int)n, (int)out,
                              (int)pool_size - 1);
        if (out < 0) continue;
        if (owners[out] != 0)
            return fqla__fail(log, FQLA_ERROR_INVALID_INDEX, "%s: state_out[%d] and state_out[%d] are both %d; a slot is written once",
                              function, (int)owners[out] - 1, (int)n, (int)out);
        owners[out] = n + 1;
    }
    if (run->h0 != run->ht) return FQLA_OK;
    for (n = 0; n < run->plan->num_seqs; n++) {
        const int32_t in = run->state_in[n];
        if (in >= 0 && owners[in] != 0 && owners[in] != n + 1)
            return fqla__fail(log, FQLA_ERROR_INVALID_INDEX, "%s: state_in[%d] is %d, which state_out[%d] overwrites", function, (int)n,
                              (int)in, (int)owners[in] - 1);
    }
    return FQLA_OK;
}

/* What a run and a backward have in common: bytes of g, beta, states, and the alignments of the backend. */
typedef struct fqla__layout {
    int64_t element, g_element, beta_element; /* bytes */
    int64_t tensor_alignment, state_alignment;
    int64_t state; /* bytes of the states of one sequence: HV of them */
    int64_t rows;
} fqla__layout;

static fqla__layout fqla__layout_of(const fqla_plan *plan, int32_t decode_tokens) {
    const fqla_plan_desc *d = &plan->desc;
    const bool cuda = plan->context->desc.backend == FQLA_BACKEND_CUDA;
    fqla__layout l;
    l.element = fqla__dtype_size(d->dtype);
    l.g_element = fqla__dtype_size(fqla__g_dtype(d));
    l.beta_element = fqla__dtype_size(fqla__beta_dtype(d));
    l.tensor_alignment = cuda ? 16 : l.element;
    l.state_alignment = cuda ? 16 : fqla__dtype_size(d->state_dtype);
    l.state = fqla__state_elements(d) * d->heads_v * fqla__dtype_size(d->state_dtype);
    l.rows = decode_tokens > 0 ? (int64_t)plan->num_seqs * decode_tokens : d->max_tokens;
    return l;
}

static fqla_status fqla__check_run(const fqla__run *run, const char *function) {
    const fqla_plan *plan = run->plan;
    const fqla_plan_desc *d = &plan->desc;
    const fqla_context_desc *log = &plan->context->desc;
    const fqla_tensor_strides *s = &d->strides;
    const fqla__layout l = fqla__layout_of(plan, run->decode_tokens);
    const bool raw = d->gate == FQLA_GATE_RAW, pool = d->pool_size > 0;
    const int in = FQLA__INPUT, out = FQLA__OUTPUT, required = FQLA__REQUIRED, with_pool = pool ? required : 0;
    const int64_t states = pool ? d->pool_size : plan->num_seqs, indices = (int64_t)plan->num_seqs * 4;
    const int64_t snapshots = run->decode_tokens > 0 ? (int64_t)plan->num_seqs * run->decode_tokens : plan->cu_checkpoints[plan->num_seqs];
    const char *snapshots_name = run->decode_tokens > 0 ? "states" : "checkpoints";
    fqla__tensor t[17];
    int count = 0;
    if (!pool && (run->state_in != NULL || run->state_out != NULL))
        return fqla__fail(log, FQLA_ERROR_INVALID_VALUE, "%s: %s is given, but the plan has no pool (plan_desc.pool_size is 0)", function,
                          run->state_in != NULL ? "state_in" : "state_out");
    if (run->decode_tokens == 0 && run->snapshots != NULL && d->checkpoint_every == 0)
        return fqla__fail(log, FQLA_ERROR_INVALID_VALUE, "%s: checkpoints is given, but plan_desc.checkpoint_every is 0", function);
    t[count++] = fqla__strided_tensor("q", run->q, &s->q, d->heads_qk, d->dim_k, l.rows, l.element, l.tensor_alignment, in | required);
    t[count++] = fqla__strided_tensor("k", run->k, &s->k, d->heads_qk, d->dim_k, l.rows, l.element, l.tensor_alignment, in | required);
    t[count++] = fqla__strided_tensor("v", run->v, &s->v, d->heads_v, d->dim_v, l.rows, l.element, l.tensor_alignment, in | required);
    t[count++] = fqla__strided_tensor("g", run->g, &s->g, d->heads_v, 1, l.rows, l.g_element, l.g_element, in | required);
    t[count++] = fqla__strided_tensor("beta", run->beta, &s->beta, d->heads_v, 1, l.rows, l.beta_element, l.beta_element, in | required);
    if (raw) {
        t[count++] = fqla__dense_tensor("A_log", run->A_log, (int64_t)d->heads_v * 4, 4, in | required);
        t[count++] = fqla__dense_tensor("dt_bias", run->dt_bias, (int64_t)d->heads_v * 4, 4, in | required);
    }
    t[count++] = fqla__dense_tensor("h0", run->h0, states * l.state, l.state_alignment, in | with_pool);
    t[count++] = fqla__dense_tensor("state_in", run->state_in, indices, 4, in | with_pool);
    t[count++] = fqla__dense_tensor("state_out", run->state_out, indices, 4, in | with_pool);
    t[count++] = fqla__strided_tensor("o", run->o, &s->o, d->heads_v, d->dim_v, l.rows, l.element, l.tensor_alignment, out | required);
    t[count++] = fqla__dense_tensor("ht", run->ht, states * l.state, l.state_alignment, out | with_pool);
    t[count++] = fqla__dense_tensor(snapshots_name, run->snapshots, snapshots * l.state, l.state_alignment,
                                    out | (run->decode_tokens == 0 && snapshots > 0 ? required : 0));
    t[count++] = fqla__dense_tensor("bad_index_count", run->bad_index_count, 4, 4, out);
    t[count++] = fqla__dense_tensor("residuals", run->residuals, (int64_t)fqla__residuals_size(plan), 16, out);
    t[count++] = fqla__dense_tensor("workspace", run->workspace, (int64_t)plan->workspace_size, FQLA__ALIGNMENT, out);
    return fqla__check_tensors(log, function, t, count);
}

static fqla_status fqla__check_backward(const fqla_plan *plan, const fqla_backward_args *a, const void *workspace) {
    const fqla_plan_desc *d = &plan->desc;
    const fqla_tensor_strides *s = &d->strides;
    const fqla__layout l = fqla__layout_of(plan, 0);
    const int in = FQLA__INPUT, out = FQLA__OUTPUT, required = FQLA__REQUIRED;
    const int64_t states = plan->num_seqs * l.state, heads = (int64_t)d->heads_v * 4;
    fqla__tensor t[20];
    int count = 0;
    t[count++] = fqla__strided_tensor("q", a->q, &s->q, d->heads_qk, d->dim_k, l.rows, l.element, l.tensor_alignment, in | required);
    t[count++] = fqla__strided_tensor("k", a->k, &s->k, d->heads_qk, d->dim_k, l.rows, l.element, l.tensor_alignment, in | required);
    t[count++] = fqla__strided_tensor("v", a->v, &s->v, d->heads_v, d->dim_v, l.rows, l.element, l.tensor_alignment, in | required);
    t[count++] = fqla__strided_tensor("g", a->g, &s->g, d->heads_v, 1, l.rows, l.g_element, l.g_element, in | required);
    t[count++] = fqla__strided_tensor("beta", a->beta, &s->beta, d->heads_v, 1, l.rows, l.beta_element, l.beta_element, in | required);
    t[count++] = fqla__strided_tensor("do_", a->do_, &s->o, d->heads_v, d->dim_v, l.rows, l.element, l.tensor_alignment, in | required);
    t[count++] = fqla__dense_tensor("h0", a->h0, states, l.state_alignment, in);
    t[count++] = fqla__dense_tensor("dht", a->dht, states, l.state_alignment, in);
    t[count++] = fqla__strided_tensor("dq", a->dq, &s->q, d->heads_qk, d->dim_k, l.rows, l.element, l.tensor_alignment, out | required);
    t[count++] = fqla__strided_tensor("dk", a->dk, &s->k, d->heads_qk, d->dim_k, l.rows, l.element, l.tensor_alignment, out | required);
    t[count++] = fqla__strided_tensor("dv", a->dv, &s->v, d->heads_v, d->dim_v, l.rows, l.element, l.tensor_alignment, out | required);
    t[count++] = fqla__strided_tensor("dg", a->dg, &s->g, d->heads_v, 1, l.rows, l.g_element, l.g_element, out | required);
    t[count++] = fqla__strided_tensor("dbeta", a->dbeta, &s->beta, d->heads_v, 1, l.rows, l.beta_element, l.beta_element, out | required);
    t[count++] = fqla__dense_tensor("dh0", a->dh0, states, l.state_alignment, out);
    if (d->gate == FQLA_GATE_RAW) {
        t[count++] = fqla__dense_tensor("A_log", a->A_log, heads, 4, in | required);
        t[count++] = fqla__dense_tensor("dt_bias", a->dt_bias, heads, 4, in | required);
        t[count++] = fqla__dense_tensor("dA_log", a->dA_log, heads, 4, out | required);
        t[count++] = fqla__dense_tensor("ddt_bias", a->ddt_bias, heads, 4, out | required);
    }
    if (fqla__residuals_size(plan) > 0)
        t[count++] = fqla__dense_tensor("residuals", a->residuals, (int64_t)fqla__residuals_size(plan), 16, in);
    t[count++] = fqla__dense_tensor("workspace", workspace, (int64_t)plan->workspace_size, FQLA__ALIGNMENT, out);
    return fqla__check_tensors(&plan->context->desc, "fqla_backward", t, count);
}
