// >>context: choosing the backend, and memory on it

static fqla_status fqla__context_check(const fqla_context_desc *desc) {
    if ((int)desc->backend < 0 || desc->backend >= FQLA_BACKEND_COUNT)
        return fqla__fail(desc, FQLA_ERROR_INVALID_ENUM, "context_desc.backend is %d; it is one of fqla_backend", (int)desc->backend);
    if ((int)desc->cpu_level < 0 || desc->cpu_level >= FQLA_CPU_LEVEL_COUNT)
        return fqla__fail(desc, FQLA_ERROR_INVALID_ENUM, "context_desc.cpu_level is %d; it is one of fqla_cpu_level",
                          (int)desc->cpu_level);
    if (desc->num_threads < 0 || desc->num_threads > 1024)
        return fqla__fail(desc, FQLA_ERROR_INVALID_VALUE, "context_desc.num_threads is %d; 0 (one a core) to 1024",
                          (int)desc->num_threads);
    if (desc->device < 0)
        return fqla__fail(desc, FQLA_ERROR_INVALID_VALUE, "context_desc.device is %d; it is 0 or more", (int)desc->device);
    if ((desc->alloc == NULL) != (desc->free == NULL))
        return fqla__fail(desc, FQLA_ERROR_INVALID_VALUE, "context_desc.%s is NULL; alloc and free come together or not at all",
                          desc->alloc == NULL ? "alloc" : "free");
    if (desc->cpu_level > fqla__cpu_best_level())
        return fqla__fail(desc, FQLA_ERROR_UNSUPPORTED, "context_desc.cpu_level is %s; this machine has %s",
                          fqla__cpu_level_name(desc->cpu_level), fqla__cpu_level_name(fqla__cpu_best_level()));
    return FQLA_OK;
}

FLASHQLA_API fqla_status fqla_context_create(const fqla_context_desc *desc, fqla_context **context) {
    fqla_status status;
    fqla_context *made;
    if (desc == NULL || context == NULL)
        return fqla__fail(desc, FQLA_ERROR_NULL_POINTER, "fqla_context_create: %s is NULL", desc == NULL ? "desc" : "context");
    status = fqla__context_check(desc);
    if (status != FQLA_OK) return status;
    made = (fqla_context *)fqla__host_alloc_zeroed(desc, sizeof *made);
    if (made == NULL)
        return fqla__fail(desc, FQLA_ERROR_OUT_OF_MEMORY, "fqla_context_create: no memory for %d bytes", (int)sizeof *made);
    made->desc = *desc;
    made->summary.cpu_level = desc->cpu_level == FQLA_CPU_AUTO ? fqla__cpu_best_level() : desc->cpu_level;

    if (desc->backend == FQLA_BACKEND_CPU) {
        snprintf(made->summary.cuda_status, sizeof made->summary.cuda_status, "not asked for: context_desc.backend is CPU");
        status = FQLA_ERROR_NO_CUDA;
    } else {
        status = fqla__cuda_open(made);
    }
    if (status == FQLA_OK) {
        made->desc.backend = FQLA_BACKEND_CUDA;
        made->summary.num_threads = 1;
    } else if (desc->backend == FQLA_BACKEND_CUDA || status == FQLA_ERROR_OUT_OF_MEMORY) {
        fqla__fail(desc, status, "fqla_context_create: %s", made->summary.cuda_status);
        goto fail;
    } else {
        if (desc->backend == FQLA_BACKEND_AUTO) fqla__info(desc, "running on the CPU: %s", made->summary.cuda_status);
        made->desc.backend = FQLA_BACKEND_CPU;
        made->summary.num_threads = desc->num_threads > 0 ? desc->num_threads : fqla__core_count();
        status = fqla__pool_start(&made->pool, &made->desc, made->summary.num_threads);
        if (status != FQLA_OK) goto fail;
    }
    made->summary.backend = made->desc.backend;
    fqla__mutex_init(&made->mutex);
    *context = made;
    return FQLA_OK;
fail:
    fqla__host_free(desc, made);
    return status;
}

FLASHQLA_API fqla_status fqla_context_destroy(fqla_context *context) {
    fqla_context_desc desc;
    int64_t users;
    if (context == NULL) return FQLA_OK;
    desc = context->desc;
    fqla__mutex_lock(&context->mutex);
    users = context->users;
    fqla__mutex_unlock(&context->mutex);
    if (users > 0)
        return fqla__fail(&desc, FQLA_ERROR_IN_USE, "fqla_context_destroy: %lld plans and buffers of the context still live",
                          (long long)users);
    fqla__pool_stop(&context->pool, &desc);
    if (desc.backend == FQLA_BACKEND_CUDA) fqla__cuda_close(context);
    fqla__mutex_destroy(&context->mutex);
    fqla__host_free(&desc, context);
    return FQLA_OK;
}

FLASHQLA_API fqla_status fqla_context_info(const fqla_context *context, fqla_context_summary *summary) {
    if (context == NULL || summary == NULL)
        return fqla__fail(context ? &context->desc : NULL, FQLA_ERROR_NULL_POINTER, "fqla_context_info: %s is NULL",
                          context == NULL ? "context" : "summary");
    *summary = context->summary;
    return FQLA_OK;
}

/* One plan or buffer more (+1) or fewer (-1). */
static void fqla__context_count(fqla_context *context, int64_t change) {
    fqla__mutex_lock(&context->mutex);
    context->users += change;
    fqla__mutex_unlock(&context->mutex);
}

FLASHQLA_API fqla_status fqla_alloc(fqla_context *context, size_t bytes, void **pointer) {
    fqla_status status = FQLA_OK;
    void *made = NULL;
    if (context == NULL || pointer == NULL)
        return fqla__fail(context ? &context->desc : NULL, FQLA_ERROR_NULL_POINTER, "fqla_alloc: %s is NULL",
                          context == NULL ? "context" : "pointer");
    if (bytes == 0) return fqla__fail(&context->desc, FQLA_ERROR_INVALID_SIZE, "fqla_alloc: bytes is 0; it is 1 or more");
    if (context->desc.backend == FQLA_BACKEND_CUDA) {
        status = fqla__cuda_alloc(context, bytes, &made);
    } else {
        made = fqla__host_alloc(&context->desc, bytes);
        if (made == NULL)
            status = fqla__fail(&context->desc, FQLA_ERROR_OUT_OF_MEMORY, "fqla_alloc: no memory for %.0f bytes", (double)bytes);
    }
    if (status != FQLA_OK) return status;
    fqla__context_count(context, 1);
    *pointer = made;
    return FQLA_OK;
}

FLASHQLA_API fqla_status fqla_free(fqla_context *context, void *pointer) {
    fqla_status status = FQLA_OK;
    if (context == NULL) return fqla__fail(NULL, FQLA_ERROR_NULL_POINTER, "fqla_free: context is NULL");
    if (pointer == NULL) return FQLA_OK;
    if (context->desc.backend == FQLA_BACKEND_CUDA) status = fqla__cuda_free(context, pointer);
    else fqla__host_free(&context->desc, pointer);
    /* freed, or gone with a CUDA context that failed; but not where it was none of ours, or while a stream is being captured */
    if (status != FQLA_ERROR_INVALID_VALUE && status != FQLA_ERROR_CAPTURING) fqla__context_count(context, -1);
    return status;
}

/* Both directions; on the CPU a copy. */
static fqla_status fqla__copy(fqla_context *context, const char *function, void *to, const void *from, size_t bytes, bool upload,
                              fqla_stream stream) {
    if (context == NULL) return fqla__fail(NULL, FQLA_ERROR_NULL_POINTER, "%s: context is NULL", function);
    if (bytes == 0) return FQLA_OK;
    if (to == NULL || from == NULL)
        return fqla__fail(&context->desc, FQLA_ERROR_NULL_POINTER, "%s: %s is NULL", function,
                          (to == NULL) == upload ? "device" : "host");
    if (context->desc.backend == FQLA_BACKEND_CUDA) return fqla__cuda_copy(context, to, from, bytes, upload, stream);
    memmove(to, from, bytes);
    return FQLA_OK;
}

FLASHQLA_API fqla_status fqla_upload(fqla_context *context, void *device, const void *host, size_t bytes, fqla_stream stream) {
    return fqla__copy(context, "fqla_upload", device, host, bytes, true, stream);
}

FLASHQLA_API fqla_status fqla_download(fqla_context *context, void *host, const void *device, size_t bytes, fqla_stream stream) {
    return fqla__copy(context, "fqla_download", host, device, bytes, false, stream);
}

FLASHQLA_API fqla_status fqla_synchronize(fqla_context *context, fqla_stream stream) {
    if (context == NULL) return fqla__fail(NULL, FQLA_ERROR_NULL_POINTER, "fqla_synchronize: context is NULL");
    return context->desc.backend == FQLA_BACKEND_CUDA ? fqla__cuda_synchronize(context, stream) : FQLA_OK;
}
