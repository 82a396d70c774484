// >>cuda_absent: FLASHQLA_NO_CUDA's answers; no context is ever on CUDA, so only the first is reached

static fqla_status fqla__cuda_open(fqla_context *context) {
    snprintf(context->summary.cuda_status, sizeof context->summary.cuda_status, "built with FLASHQLA_NO_CUDA");
    return FQLA_ERROR_NO_CUDA;
}
static void fqla__cuda_close(fqla_context *context) { (void)context; }
static fqla_status fqla__cuda_alloc(fqla_context *context, size_t bytes, void **pointer) {
    (void)context, (void)bytes, (void)pointer;
    return FQLA_ERROR_NO_CUDA;
}
static fqla_status fqla__cuda_free(fqla_context *context, void *pointer) {
    (void)context, (void)pointer;
    return FQLA_ERROR_NO_CUDA;
}
static fqla_status fqla__cuda_copy(fqla_context *context, void *to, const void *from, size_t bytes, bool upload, fqla_stream stream) {
    (void)context, (void)to, (void)from, (void)bytes, (void)upload, (void)stream;
    return FQLA_ERROR_NO_CUDA;
}
static fqla_status fqla__cuda_synchronize(fqla_context *context, fqla_stream stream) {
    (void)context, (void)stream;
    return FQLA_ERROR_NO_CUDA;
}
static fqla_status fqla__cuda_plan_create(fqla_plan *plan) {
    (void)plan;
    return FQLA_ERROR_NO_CUDA;
}
static void fqla__cuda_plan_destroy(fqla_plan *plan) { (void)plan; }
static fqla_status fqla__cuda_plan_update(fqla_plan *plan, int32_t num_seqs, const int32_t *cu_seqlens, fqla_stream stream) {
    (void)plan, (void)num_seqs, (void)cu_seqlens, (void)stream;
    return FQLA_ERROR_NO_CUDA;
}
static void fqla__cuda_describe(const fqla_plan *plan, fqla_plan_summary *summary) { (void)plan, (void)summary; }
static size_t fqla__cuda_residuals_size(const fqla_plan *plan) {
    (void)plan;
    return 0;
}
static size_t fqla__cuda_backward_size(const fqla_plan *plan) {
    (void)plan;
    return 0;
}
static fqla_status fqla__cuda_backward(const fqla_plan *plan, const fqla_backward_args *args, void *workspace, fqla_stream stream) {
    (void)plan, (void)args, (void)workspace, (void)stream;
    return FQLA_ERROR_NO_CUDA;
}
static fqla_status fqla__cuda_forward(const fqla__run *run, fqla_stream stream) {
    (void)run, (void)stream;
    return FQLA_ERROR_NO_CUDA;
}
