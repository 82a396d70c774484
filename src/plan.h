// >>plan: a batch layout and its schedule: defaults resolved, everything checked once

static fqla_status fqla__check_enum(const fqla_context_desc *log, const char *field, int value, int count) {
    if (value >= 0 && value < count) return FQLA_OK;
    return fqla__fail(log, FQLA_ERROR_INVALID_ENUM, "plan_desc.%s is %d; 0 to %d", field, value, count - 1);
}

static fqla_status fqla__check_range(const fqla_context_desc *log, const char *field, int32_t value, int32_t least, int32_t most) {
    if (value >= least && value <= most) return FQLA_OK;
    return fqla__fail(log, FQLA_ERROR_INVALID_SIZE, "plan_desc.%s is %d; %d to %d", field, (int)value, (int)least, (int)most);
}

static fqla_status fqla__check_flag(const fqla_context_desc *log, const char *field, int32_t value) {
    if (value == 0 || value == 1) return FQLA_OK;
    return fqla__fail(log, FQLA_ERROR_INVALID_VALUE, "plan_desc.%s is %d; it is a flag, 0 or 1", field, (int)value);
}

/* Fill a tensor's strides and see that no two of its elements share an address over `rows` rows and that the last one's offset fits. */
static fqla_status fqla__resolve_strides(const fqla_context_desc *log, const char *field, fqla_strides *strides, int32_t heads,
                                         int32_t dim, int64_t rows, bool aligned_to_16_bytes, int64_t element_size) {
    int64_t head_span, token_span, last;
    if (strides->token < 0 || strides->head < 0)
        return fqla__fail(log, FQLA_ERROR_INVALID_STRIDE, "plan_desc.strides.%s is { token %lld, head %lld }; neither is negative", field,
                          (long long)strides->token, (long long)strides->head);
    if (strides->head == 0) strides->head = dim;
    if (strides->token == 0) {
        if (!fqla__mul(heads, strides->head, &strides->token)) goto too_large;
    }
    if (!fqla__mul(heads - 1, strides->head, &head_span) || !fqla__mul(rows > 0 ? rows - 1 : 0, strides->token, &token_span) ||
        !fqla__add(head_span, token_span, &last) || !fqla__add(last, dim, &last) || !fqla__mul(last, element_size, &last) ||
        !fqla__mul(strides->token, element_size, &last) || !fqla__mul(strides->head, element_size, &last)) /* of one row or head too */
        goto too_large;
    /* heads inside a token's row, or tokens inside a head's plane */
    if (!((heads == 1 || strides->head >= dim) && (rows <= 1 || strides->token >= head_span + dim)) &&
        !((rows <= 1 || strides->token >= dim) && (heads == 1 || strides->head >= token_span + dim)))
        return fqla__fail(log, FQLA_ERROR_INVALID_STRIDE,
                          "plan_desc.strides.%s is { token %lld, head %lld }; rows of %d heads of %d elements overlap", field,
                          (long long)strides->token, (long long)strides->head, (int)heads, (int)dim);
    if (aligned_to_16_bytes && (strides->token * element_size % 16 != 0 || strides->head * element_size % 16 != 0))
        return fqla__fail(log, FQLA_ERROR_MISALIGNED,
                          "plan_desc.strides.%s is { token %lld, head %lld } elements; on CUDA both are multiples of 16 bytes", field,
                          (long long)strides->token, (long long)strides->head);
    return FQLA_OK;
too_large:
    return fqla__fail(log, FQLA_ERROR_TOO_LARGE, "plan_desc.strides.%s is { token %lld, head %lld }; the tensor passes 2^63 bytes", field,
                      (long long)strides->token, (long long)strides->head);
}

/* cu_seqlens against the plan's maxima, and the tables that follow from it. chunks, cu_checkpoints: written on success alone. */
static fqla_status fqla__check_seqlens(const fqla_context_desc *log, const fqla_plan_desc *desc, int32_t num_seqs,
                                       const int32_t *cu_seqlens) {
    int32_t n;
    if (num_seqs < 1 || num_seqs > desc->max_seqs)
        return fqla__fail(log, FQLA_ERROR_INVALID_SIZE, "num_seqs is %d; 1 to max_seqs, which is %d", (int)num_seqs,
                          (int)desc->max_seqs);
    if (cu_seqlens == NULL) {
        if (desc->padded_len > 0) return FQLA_OK;
        return fqla__fail(log, FQLA_ERROR_NULL_POINTER, "cu_seqlens is NULL; only a plan with padded_len can do without");
    }
    if (cu_seqlens[0] != 0)
        return fqla__fail(log, FQLA_ERROR_INVALID_SEQLENS, "cu_seqlens[0] is %d; it is 0", (int)cu_seqlens[0]);
    for (n = 0; n < num_seqs; n++) {
        if (cu_seqlens[n + 1] < cu_seqlens[n])
            return fqla__fail(log, FQLA_ERROR_INVALID_SEQLENS, "cu_seqlens[%d] is %d, below cu_seqlens[%d], %d; it never decreases",
                              (int)n + 1, (int)cu_seqlens[n + 1], (int)n, (int)cu_seqlens[n]);
        if (desc->padded_len > 0 && cu_seqlens[n + 1] - cu_seqlens[n] > desc->padded_len)
            return fqla__fail(log, FQLA_ERROR_INVALID_SEQLENS, "cu_seqlens gives sequence %d %d tokens; padded_len is %d", (int)n,
                              (int)(cu_seqlens[n + 1] - cu_seqlens[n]), (int)desc->padded_len);
    }
    if (cu_seqlens[num_seqs] > desc->max_tokens)
        return fqla__fail(log, FQLA_ERROR_INVALID_SEQLENS, "cu_seqlens[%d] is %d; max_tokens is %d", (int)num_seqs,
                          (int)cu_seqlens[num_seqs], (int)desc->max_tokens);
    return FQLA_OK;
}

/* Enter checked lengths into the plan's host tables. */
static void fqla__set_seqlens(fqla_plan *plan, int32_t num_seqs, const int32_t *cu_seqlens) {
    const int32_t every = FLASHQLA_CHUNK * plan->desc.checkpoint_every;
    int32_t n;
    plan->num_seqs = num_seqs;
    plan->chunks = 0;
    plan->cu_seqlens[0] = 0;
    plan->cu_checkpoints[0] = 0;
    for (n = 0; n < num_seqs; n++) {
        const int32_t len = cu_seqlens != NULL ? cu_seqlens[n + 1] - cu_seqlens[n] : plan->desc.padded_len;
        plan->cu_seqlens[n + 1] = plan->cu_seqlens[n] + len;
        plan->cu_checkpoints[n + 1] = plan->cu_checkpoints[n] + (every > 0 ? len / every : 0);
        plan->chunks += len / FLASHQLA_CHUNK + (len % FLASHQLA_CHUNK != 0);
    }
}

/* Check a desc field by field and fill its defaults in. */
static fqla_status fqla__plan_resolve(const fqla_context *context, fqla_plan_desc *d) {
    const fqla_context_desc *log = &context->desc;
    const bool cuda = context->desc.backend == FQLA_BACKEND_CUDA;
    fqla_tensor_strides *s = &d->strides;
    int64_t rows, bytes;
    fqla_status status;
    if ((status = fqla__check_enum(log, "dtype", (int)d->dtype, FQLA_DTYPE_COUNT)) != FQLA_OK ||
        (status = fqla__check_enum(log, "state_dtype", (int)d->state_dtype, FQLA_DTYPE_COUNT)) != FQLA_OK ||
        (status = fqla__check_enum(log, "state_layout", (int)d->state_layout, FQLA_STATE_LAYOUT_COUNT)) != FQLA_OK ||
        (status = fqla__check_enum(log, "head_map", (int)d->head_map, FQLA_HEAD_MAP_COUNT)) != FQLA_OK ||
        (status = fqla__check_enum(log, "gate", (int)d->gate, FQLA_GATE_COUNT)) != FQLA_OK ||
        (status = fqla__check_enum(log, "beta", (int)d->beta, FQLA_BETA_COUNT)) != FQLA_OK ||
        (status = fqla__check_flag(log, "negative_eigenvalues", d->negative_eigenvalues)) != FQLA_OK ||
        (status = fqla__check_flag(log, "l2norm", d->l2norm)) != FQLA_OK ||
        (status = fqla__check_flag(log, "backward", d->backward)) != FQLA_OK ||
        (status = fqla__check_flag(log, "external_workspace", d->external_workspace)) != FQLA_OK ||
        (status = fqla__check_flag(log, "low_memory", d->low_memory)) != FQLA_OK ||
        (status = fqla__check_flag(log, "needs_residuals", d->needs_residuals)) != FQLA_OK ||
        (status = fqla__check_range(log, "heads_qk", d->heads_qk, 1, 65536)) != FQLA_OK ||
        (status = fqla__check_range(log, "heads_v", d->heads_v, 1, 65536)) != FQLA_OK ||
        (status = fqla__check_range(log, "num_seqs", d->num_seqs, 1, 1 << 20)) != FQLA_OK ||
        (status = fqla__check_range(log, "padded_len", d->padded_len, 0, INT32_MAX)) != FQLA_OK ||
        (status = fqla__check_range(log, "max_tokens", d->max_tokens, 0, INT32_MAX)) != FQLA_OK ||
        (status = fqla__check_range(log, "v_split", d->v_split, 0, 2)) != FQLA_OK ||
        (status = fqla__check_range(log, "segment_chunks", d->segment_chunks, -1, INT32_MAX / FLASHQLA_CHUNK)) != FQLA_OK ||
        (status = fqla__check_range(log, "pool_size", d->pool_size, 0, INT32_MAX)) != FQLA_OK ||
        (status = fqla__check_range(log, "checkpoint_every", d->checkpoint_every, 0, INT32_MAX / FLASHQLA_CHUNK)) != FQLA_OK)
        return status;
    if (d->heads_v % d->heads_qk != 0)
        return fqla__fail(log, FQLA_ERROR_INVALID_SIZE, "plan_desc.heads_v is %d; it is a multiple of heads_qk, which is %d",
                          (int)d->heads_v, (int)d->heads_qk);
    if (d->dim_k == 0) d->dim_k = 128;
    if (d->dim_v == 0) d->dim_v = 128;
    if (d->dim_k < 8 || d->dim_k > 256 || d->dim_k % 8 != 0 || d->dim_v < 8 || d->dim_v > 256 || d->dim_v % 8 != 0)
        return fqla__fail(log, FQLA_ERROR_INVALID_SIZE, "plan_desc.dim_k and dim_v are %d and %d; multiples of 8, 8 to 256",
                          (int)d->dim_k, (int)d->dim_v);
    if (cuda && (d->dim_k != 128 || d->dim_v != 128))
        return fqla__fail(log, FQLA_ERROR_UNSUPPORTED, "plan_desc.dim_k and dim_v are %d and %d; CUDA has kernels for 128 alone",
                          (int)d->dim_k, (int)d->dim_v);
    if (d->dtype == FQLA_DTYPE_DEFAULT) d->dtype = FQLA_DTYPE_BF16;
    if (cuda && d->dtype == FQLA_DTYPE_FP32)
        return fqla__fail(log, FQLA_ERROR_UNSUPPORTED, "plan_desc.dtype is FP32; CUDA takes BF16 and FP16");
    if (d->state_dtype == FQLA_DTYPE_DEFAULT) d->state_dtype = FQLA_DTYPE_FP32;
    if (d->state_dtype == FQLA_DTYPE_FP16)
        return fqla__fail(log, FQLA_ERROR_UNSUPPORTED, "plan_desc.state_dtype is FP16; states are FP32 or BF16");
    if (d->negative_eigenvalues && d->beta != FQLA_BETA_SIGMOID)
        return fqla__fail(log, FQLA_ERROR_INVALID_VALUE,
                          "plan_desc.negative_eigenvalues is 1; it scales the sigmoid and needs beta = FQLA_BETA_SIGMOID");
    if (!(d->scale >= -3.0e38f && d->scale <= 3.0e38f))
        return fqla__fail(log, FQLA_ERROR_INVALID_VALUE, "plan_desc.scale is %g; it is finite", (double)d->scale);
    if (!(d->warm_up_tolerance == 0.0f || (d->warm_up_tolerance >= 1e-30f && d->warm_up_tolerance <= 1.0f)))
        return fqla__fail(log, FQLA_ERROR_INVALID_VALUE, "plan_desc.warm_up_tolerance is %g; 1e-30 to 1, or 0 for 1e-7",
                          (double)d->warm_up_tolerance);
    if (d->warm_up_tolerance == 0.0f) d->warm_up_tolerance = 1e-7f;
    if (d->scale == 0.0f) d->scale = (float)(1.0 / sqrt((double)d->dim_k));
    if (d->backward && d->gate == FQLA_GATE_LINEAR)
        return fqla__fail(log, FQLA_ERROR_UNSUPPORTED, "plan_desc.backward is 1 with gate LINEAR; the backward takes LOG and RAW");
    if ((d->low_memory || d->needs_residuals) && !d->backward)
        return fqla__fail(log, FQLA_ERROR_INVALID_VALUE, "plan_desc.%s is 1 and backward is 0; it is about the backward's workspace",
                          d->low_memory ? "low_memory" : "needs_residuals");
    if (d->backward && d->pool_size > 0)
        return fqla__fail(log, FQLA_ERROR_UNSUPPORTED, "plan_desc.backward is 1 with pool_size %d; the backward takes no pool",
                          (int)d->pool_size);

    if (d->max_seqs == 0) d->max_seqs = d->num_seqs;
    if (d->max_seqs < d->num_seqs || d->max_seqs > 1 << 20)
        return fqla__fail(log, FQLA_ERROR_INVALID_SIZE, "plan_desc.max_seqs is %d; num_seqs, which is %d, to %d", (int)d->max_seqs,
                          (int)d->num_seqs, 1 << 20);
    if (d->padded_len > 0) {
        if (!fqla__mul(d->max_seqs, d->padded_len, &rows) || rows > INT32_MAX)
            return fqla__fail(log, FQLA_ERROR_TOO_LARGE, "plan_desc.padded_len is %d; with max_seqs %d that is over 2^31 - 1 rows",
                              (int)d->padded_len, (int)d->max_seqs);
        if (d->max_tokens != 0)
            return fqla__fail(log, FQLA_ERROR_INVALID_SIZE,
                              "plan_desc.max_tokens is %d; with padded_len it is 0, max_seqs says how many rows there are",
                              (int)d->max_tokens);
        d->max_tokens = (int32_t)rows;
    } else if (d->max_tokens == 0 && d->cu_seqlens != NULL) {
        d->max_tokens = d->cu_seqlens[d->num_seqs] > 0 ? d->cu_seqlens[d->num_seqs] : 0;
    }
    if ((status = fqla__check_seqlens(log, d, d->num_seqs, d->cu_seqlens)) != FQLA_OK) return status;

    if (d->segment_chunks > 0 && ((int64_t)d->max_tokens + FLASHQLA_CHUNK - 1) / FLASHQLA_CHUNK > 64 * (int64_t)d->segment_chunks)
        return fqla__fail(log, FQLA_ERROR_INVALID_SIZE, "plan_desc.segment_chunks is %d; a sequence of max_tokens, which is %d, has at most 64 segments",
                          (int)d->segment_chunks, (int)d->max_tokens);

    rows = d->max_tokens;
    bytes = fqla__dtype_size(d->dtype);
    if ((status = fqla__resolve_strides(log, "q", &s->q, d->heads_qk, d->dim_k, rows, cuda, bytes)) != FQLA_OK ||
        (status = fqla__resolve_strides(log, "k", &s->k, d->heads_qk, d->dim_k, rows, cuda, bytes)) != FQLA_OK ||
        (status = fqla__resolve_strides(log, "v", &s->v, d->heads_v, d->dim_v, rows, cuda, bytes)) != FQLA_OK ||
        (status = fqla__resolve_strides(log, "o", &s->o, d->heads_v, d->dim_v, rows, cuda, bytes)) != FQLA_OK ||
        (status = fqla__resolve_strides(log, "g", &s->g, d->heads_v, 1, rows, false, 4)) != FQLA_OK ||
        (status = fqla__resolve_strides(log, "beta", &s->beta, d->heads_v, 1, rows, false, 4)) != FQLA_OK)
        return status;
    /* states: [max(max_seqs * 8 of a decode, pool_size, checkpoints), HV, Dk, Dv] */
    if (!fqla__mul(fqla__state_elements(d), d->heads_v, &bytes) || !fqla__mul(bytes, 4, &bytes) ||
        !fqla__mul(bytes, (int64_t)d->max_seqs * FLASHQLA_MAX_DECODE_TOKENS + d->pool_size + d->max_tokens, &bytes))
        return fqla__fail(log, FQLA_ERROR_TOO_LARGE, "plan_desc: the states of max_seqs %d, pool_size %d pass 2^63 bytes",
                          (int)d->max_seqs, (int)d->pool_size);
    return FQLA_OK;
}

/* The CPU backend's workspace: the pool's owners (see check.h), then the larger of its operations' needs. */
static int64_t fqla__owners_size(const fqla_plan_desc *desc) {
    return fqla__round_up((int64_t)desc->pool_size * (int64_t)sizeof(int32_t), FQLA__ALIGNMENT);
}

static bool fqla__cpu_workspace(const fqla_plan *plan, size_t *size) {
    int64_t forward = 0, backward = 0, sum;
    if (!fqla__cpu_forward_workspace(plan, &forward)) return false;
    if (plan->desc.backward && !fqla__cpu_backward_workspace(plan, &backward)) return false;
    if (!fqla__add(forward > backward ? forward : backward, fqla__owners_size(&plan->desc), &sum)) return false;
    if ((uint64_t)sum > SIZE_MAX) return false;
    *size = (size_t)sum;
    return true;
}

FLASHQLA_API fqla_status fqla_plan_create(fqla_context *context, const fqla_plan_desc *desc, fqla_plan **plan) {
    const fqla_context_desc *log = context ? &context->desc : NULL;
    const bool cuda = context != NULL && context->desc.backend == FQLA_BACKEND_CUDA;
    fqla_plan *made;
    fqla_plan_desc resolved;
    fqla_status status;
    size_t entries;
    if (context == NULL || desc == NULL || plan == NULL)
        return fqla__fail(log, FQLA_ERROR_NULL_POINTER, "fqla_plan_create: %s is NULL",
                          context == NULL ? "context" : desc == NULL ? "desc" : "plan");
    resolved = *desc;
    status = fqla__plan_resolve(context, &resolved);
    if (status != FQLA_OK) return status;
    made = (fqla_plan *)fqla__host_alloc_zeroed(log, sizeof *made);
    if (made == NULL) return fqla__fail(log, FQLA_ERROR_OUT_OF_MEMORY, "fqla_plan_create: no memory for the plan");
    made->context = context;
    made->desc = resolved;
    made->desc.cu_seqlens = NULL;
    fqla__context_count(context, 1);
    entries = (size_t)resolved.max_seqs + 1;
    made->cu_seqlens = (int32_t *)fqla__host_alloc_zeroed(log, entries * sizeof *made->cu_seqlens);
    made->cu_checkpoints = (int64_t *)fqla__host_alloc_zeroed(log, entries * sizeof *made->cu_checkpoints);
    if (made->cu_seqlens == NULL || made->cu_checkpoints == NULL) {
        status = fqla__fail(log, FQLA_ERROR_OUT_OF_MEMORY, "fqla_plan_create: no memory for the tables of %d sequences",
                            (int)resolved.max_seqs);
        goto fail;
    }
    fqla__set_seqlens(made, resolved.num_seqs, desc->cu_seqlens);
    if (cuda) {
        status = fqla__cuda_plan_create(made);
        if (status != FQLA_OK) goto fail;
        if (resolved.backward && fqla__cuda_backward_size(made) > made->workspace_size) made->workspace_size = fqla__cuda_backward_size(made);
    } else if (!fqla__cpu_workspace(made, &made->workspace_size)) {
        status = fqla__fail(log, FQLA_ERROR_TOO_LARGE, "fqla_plan_create: the workspace of max_tokens %d passes 2^63 bytes",
                            (int)resolved.max_tokens);
        goto fail;
    }
    if (made->workspace_size > 0 && !resolved.external_workspace) {
        if (cuda) {
            status = fqla__cuda_alloc(context, made->workspace_size, &made->workspace);
        } else {
            made->workspace = fqla__host_alloc(log, made->workspace_size);
            if (made->workspace == NULL)
                status = fqla__fail(log, FQLA_ERROR_OUT_OF_MEMORY, "fqla_plan_create: no memory for a workspace of %.0f bytes",
                                    (double)made->workspace_size);
        }
        if (status != FQLA_OK) goto fail;
    }
    *plan = made;
    return FQLA_OK;
fail:
    fqla_plan_destroy(made);
    return status;
}

FLASHQLA_API void fqla_plan_destroy(fqla_plan *plan) {
    fqla_context *context;
    if (plan == NULL) return;
    context = plan->context;
    if (context->desc.backend == FQLA_BACKEND_CUDA) fqla__cuda_plan_destroy(plan);
    else fqla__host_free(&context->desc, plan->workspace);
    fqla__host_free(&context->desc, plan->cu_checkpoints);
    fqla__host_free(&context->desc, plan->cu_seqlens);
    fqla__host_free(&context->desc, plan);
    fqla__context_count(context, -1);
}

FLASHQLA_API fqla_status fqla_plan_update(fqla_plan *plan, int32_t num_seqs, const int32_t *cu_seqlens, fqla_stream stream) {
    fqla_status status;
    if (plan == NULL) return fqla__fail(NULL, FQLA_ERROR_NULL_POINTER, "fqla_plan_update: plan is NULL");
    status = fqla__check_seqlens(&plan->context->desc, &plan->desc, num_seqs, cu_seqlens);
    if (status != FQLA_OK) return status;
    if (plan->context->desc.backend == FQLA_BACKEND_CUDA) {
        status = fqla__cuda_plan_update(plan, num_seqs, cu_seqlens, stream);
        if (status != FQLA_OK) return status;
    }
    fqla__set_seqlens(plan, num_seqs, cu_seqlens);
    return FQLA_OK;
}

/* The CPU's backward recomputes everything. */
static size_t fqla__residuals_size(const fqla_plan *plan) {
    return plan->context->desc.backend == FQLA_BACKEND_CUDA && plan->desc.backward ? fqla__cuda_residuals_size(plan) : 0;
}

FLASHQLA_API fqla_status fqla_plan_info(const fqla_plan *plan, fqla_plan_summary *summary) {
    const char *level;
    if (plan == NULL || summary == NULL)
        return fqla__fail(plan ? &plan->context->desc : NULL, FQLA_ERROR_NULL_POINTER, "fqla_plan_info: %s is NULL",
                          plan == NULL ? "plan" : "summary");
    memset(summary, 0, sizeof *summary);
    summary->backend = plan->context->desc.backend;
    summary->num_seqs = plan->num_seqs;
    summary->tokens = plan->cu_seqlens[plan->num_seqs];
    summary->chunks = plan->chunks;
    summary->checkpoints = plan->cu_checkpoints[plan->num_seqs];
    summary->v_split = summary->segments = 1;
    summary->workspace_size = plan->workspace_size;
    summary->residuals_size = fqla__residuals_size(plan);
    if (summary->backend == FQLA_BACKEND_CUDA) {
        fqla__cuda_describe(plan, summary);
        return FQLA_OK;
    }
    level = fqla__cpu_level_name(plan->context->summary.cpu_level);
    snprintf(summary->forward, sizeof summary->forward, "cpu %s token recurrence", level);
    snprintf(summary->decode, sizeof summary->decode, "cpu %s token recurrence", level);
    if (plan->desc.backward) snprintf(summary->backward, sizeof summary->backward, "cpu %s reverse recurrence", level);
    else snprintf(summary->backward, sizeof summary->backward, "none: plan_desc.backward is 0");
    snprintf(summary->schedule, sizeof summary->schedule, "%d threads over sequences, heads and blocks of D_v columns",
             (int)plan->context->summary.num_threads);
    return FQLA_OK;
}

FLASHQLA_API fqla_status fqla_workspace_size(const fqla_plan *plan, size_t *bytes) {
    if (plan == NULL || bytes == NULL)
        return fqla__fail(plan ? &plan->context->desc : NULL, FQLA_ERROR_NULL_POINTER, "fqla_workspace_size: %s is NULL",
                          plan == NULL ? "plan" : "bytes");
    *bytes = plan->workspace_size;
    return FQLA_OK;
}

FLASHQLA_API fqla_status fqla_residuals_size(const fqla_plan *plan, size_t *bytes) {
    if (plan == NULL || bytes == NULL)
        return fqla__fail(plan ? &plan->context->desc : NULL, FQLA_ERROR_NULL_POINTER, "fqla_residuals_size: %s is NULL",
                          plan == NULL ? "plan" : "bytes");
    *bytes = fqla__residuals_size(plan);
    return FQLA_OK;
}
