// >>run: the three entry points: check, then hand over to the plan's backend

/* Forward and decode alike. given, size: the caller's workspace. */
static fqla_status fqla__run_forward(fqla__run *run, const char *function, void *given, size_t size, fqla_stream stream) {
    const fqla_plan *plan = run->plan;
    const int64_t owners_size = fqla__owners_size(&plan->desc);
    fqla_status status = fqla__pick_workspace(plan, function, given, size, &run->workspace);
    if (status == FQLA_OK) status = fqla__check_run(run, function);
    if (status != FQLA_OK) return status;
    if (plan->context->desc.backend == FQLA_BACKEND_CUDA) return fqla__cuda_forward(run, stream);
    if (plan->desc.pool_size > 0) {
        status = fqla__check_indices(run, function, (int32_t *)run->workspace);
        if (status != FQLA_OK) return status;
        run->workspace = (char *)run->workspace + owners_size;
    }
    fqla__cpu_forward(run);
    return FQLA_OK;
}

FLASHQLA_API fqla_status fqla_forward(fqla_plan *plan, const fqla_forward_args *args, fqla_stream stream) {
    const void *residuals;
    fqla_status status;
    fqla__run run;
    if (plan == NULL || args == NULL)
        return fqla__fail(plan ? &plan->context->desc : NULL, FQLA_ERROR_NULL_POINTER, "fqla_forward: %s is NULL",
                          plan == NULL ? "plan" : "args");
    memset(&run, 0, sizeof run);
    run.plan = plan;
    run.q = args->q, run.k = args->k, run.v = args->v;
    run.g = args->g, run.beta = args->beta;
    run.A_log = args->A_log, run.dt_bias = args->dt_bias;
    run.h0 = args->h0, run.o = args->o, run.ht = args->ht;
    run.state_in = args->state_in, run.state_out = args->state_out;
    run.snapshots = args->checkpoints;
    run.snapshot_every = FLASHQLA_CHUNK * plan->desc.checkpoint_every;
    run.bad_index_count = args->bad_index_count;
    status = fqla__pick_residuals(plan, "fqla_forward", args->residuals, args->residuals_size, &residuals);
    if (status != FQLA_OK) return status;
    run.residuals = (void *)(uintptr_t)residuals;
    return fqla__run_forward(&run, "fqla_forward", args->workspace, args->workspace_size, stream);
}

FLASHQLA_API fqla_status fqla_decode(fqla_plan *plan, const fqla_decode_args *args, fqla_stream stream) {
    const fqla_context_desc *log = plan ? &plan->context->desc : NULL;
    const fqla_plan_desc *d;
    fqla_tensor_strides strides;
    fqla_status status;
    fqla__run run;
    int64_t rows;
    if (plan == NULL || args == NULL)
        return fqla__fail(log, FQLA_ERROR_NULL_POINTER, "fqla_decode: %s is NULL", plan == NULL ? "plan" : "args");
    if (args->num_tokens < 0 || args->num_tokens > FLASHQLA_MAX_DECODE_TOKENS)
        return fqla__fail(log, FQLA_ERROR_INVALID_SIZE, "fqla_decode: num_tokens is %d; 1 to %d, or 0 for 1", (int)args->num_tokens,
                          FLASHQLA_MAX_DECODE_TOKENS);
    memset(&run, 0, sizeof run);
    run.plan = plan;
    run.q = args->q, run.k = args->k, run.v = args->v;
    run.g = args->g, run.beta = args->beta;
    run.A_log = args->A_log, run.dt_bias = args->dt_bias;
    run.h0 = args->h0, run.o = args->o, run.ht = args->ht;
    run.state_in = args->state_in, run.state_out = args->state_out;
    run.snapshots = args->states;
    run.snapshot_every = args->states != NULL ? 1 : 0;
    run.decode_tokens = args->num_tokens == 0 ? 1 : args->num_tokens;
    run.bad_index_count = args->bad_index_count;

    /* the plan's strides were checked for max_tokens rows; a decode may have more */
    d = &plan->desc;
    strides = d->strides;
    rows = (int64_t)plan->num_seqs * run.decode_tokens;
    if (rows > d->max_tokens &&
        ((status = fqla__resolve_strides(log, "q", &strides.q, d->heads_qk, d->dim_k, rows, false, 4)) != FQLA_OK ||
         (status = fqla__resolve_strides(log, "k", &strides.k, d->heads_qk, d->dim_k, rows, false, 4)) != FQLA_OK ||
         (status = fqla__resolve_strides(log, "v", &strides.v, d->heads_v, d->dim_v, rows, false, 4)) != FQLA_OK ||
         (status = fqla__resolve_strides(log, "o", &strides.o, d->heads_v, d->dim_v, rows, false, 4)) != FQLA_OK ||
         (status = fqla__resolve_strides(log, "g", &strides.g, d->heads_v, 1, rows, false, 4)) != FQLA_OK ||
         (status = fqla__resolve_strides(log, "beta", &strides.beta, d->heads_v, 1, rows, false, 4)) != FQLA_OK))
        return status;
    if (plan->context->desc.backend == FQLA_BACKEND_CUDA && (run.decode_tokens > 1 || run.snapshots != NULL))
        return fqla__fail(log, FQLA_ERROR_UNSUPPORTED, "fqla_decode: %s; CUDA decodes one token a call and keeps no states",
                          run.snapshots != NULL ? "states is given" : "num_tokens is over 1");
    return fqla__run_forward(&run, "fqla_decode", args->workspace, args->workspace_size, stream);
}

FLASHQLA_API fqla_status fqla_backward(fqla_plan *plan, const fqla_backward_args *args, fqla_stream stream) {
    const fqla_context_desc *log = plan ? &plan->context->desc : NULL;
    fqla_backward_args checked;
    fqla_status status;
    void *workspace;
    if (plan == NULL || args == NULL)
        return fqla__fail(log, FQLA_ERROR_NULL_POINTER, "fqla_backward: %s is NULL", plan == NULL ? "plan" : "args");
    if (!plan->desc.backward)
        return fqla__fail(log, FQLA_ERROR_UNSUPPORTED, "fqla_backward: the plan was made with plan_desc.backward 0");
    status = fqla__pick_workspace(plan, "fqla_backward", args->workspace, args->workspace_size, &workspace);
    checked = *args;
    if (status == FQLA_OK) status = fqla__pick_residuals(plan, "fqla_backward", args->residuals, args->residuals_size, &checked.residuals);
    if (status == FQLA_OK) status = fqla__check_backward(plan, &checked, workspace);
    if (status != FQLA_OK) return status;
    if (plan->context->desc.backend == FQLA_BACKEND_CUDA) return fqla__cuda_backward(plan, &checked, workspace, stream);
    fqla__cpu_backward(plan, &checked, workspace);
    return FQLA_OK;
}
