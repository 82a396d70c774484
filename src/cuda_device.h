// >>cuda_device: a context on CUDA: its device, its kernels and its memory.
// Every call pushes the CUDA context and pops it again, so that the caller's stack is as before on every path.

static fqla_status fqla__cuda_status(fqla__cuda_result result) {
    if (result == FQLA__CUDA_SUCCESS) return FQLA_OK;
    if (result == FQLA__CUDA_ERROR_OUT_OF_MEMORY) return FQLA_ERROR_OUT_OF_MEMORY;
    if (result >= FQLA__CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED && result <= FQLA__CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD)
        return FQLA_ERROR_CAPTURING;
    return FQLA_ERROR_DRIVER;
}

/* The status of a driver call that `function` made; a failure is logged. */
static fqla_status fqla__cuda_check(const fqla_context *context, const char *function, const char *call, fqla__cuda_result result) {
    char words[256];
    if (result == FQLA__CUDA_SUCCESS) return FQLA_OK;
    fqla__cuda_result_words(&context->cuda.driver, result, words, sizeof words);
    return fqla__fail(&context->desc, fqla__cuda_status(result), "%s: %s failed: %s", function, call, words);
}

/* The same for a call that cannot be undone or that ends something: what was done stands, a failure is worth a line, no status. */
static void fqla__cuda_note(const fqla_context *context, const char *call, fqla__cuda_result result) {
    char words[256];
    if (result == FQLA__CUDA_SUCCESS) return;
    fqla__cuda_result_words(&context->cuda.driver, result, words, sizeof words);
    fqla__info(&context->desc, "%s failed: %s", call, words);
}

/* The same while a context opens: the sentence becomes cuda_status, since under AUTO it is but the reason for the CPU. */
static fqla_status fqla__cuda_check_open(fqla_context *context, const char *call, fqla__cuda_result result) {
    char words[192];
    if (result == FQLA__CUDA_SUCCESS) return FQLA_OK;
    fqla__cuda_result_words(&context->cuda.driver, result, words, sizeof words);
    snprintf(context->summary.cuda_status, sizeof context->summary.cuda_status, "%s failed: %s", call, words);
    return fqla__cuda_status(result);
}

static fqla_status fqla__cuda_enter(const fqla_context *context, const char *function) {
    const fqla__cuda_device *cuda = &context->cuda;
    return fqla__cuda_check(context, function, "cuCtxPushCurrent", cuda->driver.cuCtxPushCurrent_v2(cuda->context));
}

/* The same to end something: where it fails, the CUDA context has ended before and took everything along. */
static bool fqla__cuda_enter_to_end(const fqla_context *context) {
    const fqla__cuda_result result = context->cuda.driver.cuCtxPushCurrent_v2(context->cuda.context);
    fqla__cuda_note(context, "cuCtxPushCurrent", result);
    return result == FQLA__CUDA_SUCCESS;
}

static void fqla__cuda_leave(const fqla_context *context) {
    fqla_cuda_context popped;
    fqla__cuda_note(context, "cuCtxPopCurrent", context->cuda.driver.cuCtxPopCurrent_v2(&popped));
}

/* ---- kernels */

/* By FQLA__KERNEL_*: the name of the kernel and of its image, and the dynamic shared memory it is launched with. */
static const struct {
    const char *name;
    int shared_bytes;
} fqla__kernels[FQLA__KERNEL_COUNT] = {
    {"prepare_bf16", FQLA__PREPARE_SHARED_BYTES},
    {"prepare_fp16", FQLA__PREPARE_SHARED_BYTES},
    {"states_bf16", FQLA__STATES_SHARED_BYTES},
    {"states_fp16", FQLA__STATES_SHARED_BYTES},
    {"forward_bf16", FQLA__FORWARD_SHARED_BYTES},
    {"forward_fp16", FQLA__FORWARD_SHARED_BYTES},
    {"forward_half_bf16", FQLA__HALF_SHARED_BYTES},
    {"forward_half_fp16", FQLA__HALF_SHARED_BYTES},
    {"backward_chains_bf16", FQLA__CHAINS_SHARED_BYTES},
    {"backward_chains_fp16", FQLA__CHAINS_SHARED_BYTES},
    {"backward_gradients_bf16", FQLA__GRADIENTS_SHARED_BYTES},
    {"backward_gradients_fp16", FQLA__GRADIENTS_SHARED_BYTES},
    {"scan", FQLA__SCAN_SHARED_BYTES},
    {"backward_scan", FQLA__SCAN_SHARED_BYTES},
    {"backward_sums", 0},
};

static void fqla__cuda_unload_kernels(fqla_context *context) {
    fqla__cuda_device *cuda = &context->cuda;
    int i;
    for (i = 0; i < FQLA__KERNEL_COUNT; i++) {
        if (cuda->modules[i] != NULL) fqla__cuda_note(context, "cuModuleUnload", cuda->driver.cuModuleUnload(cuda->modules[i]));
        cuda->modules[i] = NULL;
    }
}

/* An image of so many bytes from its text (tools/embed.c says how), for the driver to read; to be freed. NULL: no memory. */
static void *fqla__decode_image(const fqla_context_desc *desc, const char *const *text, size_t bytes) {
    const size_t words = (bytes + 3) / 4;
    unsigned char *image = (unsigned char *)fqla__host_alloc(desc, words * 4);
    const char *at = *text;
    size_t i;
    int digit;
    for (i = 0; image != NULL && i < words; i++) {
        uint32_t value = 0;
        if (*at == '\0') at = *++text;
        for (digit = 0; digit < 5; digit++, at++)
            value = value * 85 + (uint32_t)((*at == '!' ? '?' : *at == '~' ? '\\' : *at) - '#');
        image[4 * i] = (unsigned char)value, image[4 * i + 1] = (unsigned char)(value >> 8);
        image[4 * i + 2] = (unsigned char)(value >> 16), image[4 * i + 3] = (unsigned char)(value >> 24);
    }
    return image;
}

/* Load kernel i from its cubin or from the PTX in its fatbin. */
static fqla_status fqla__cuda_load_kernel(fqla_context *context, int i, bool ptx) {
    fqla__cuda_device *cuda = &context->cuda;
    const fqla__cuda_driver *driver = &cuda->driver;
    const fqla__cuda_image *image = fqla__cuda_images;
    fqla_status status;
    void *bytes;
    while (image->name != NULL && strcmp(image->name, fqla__kernels[i].name) != 0) image++;
    if (image->name == NULL) {
        snprintf(context->summary.cuda_status, sizeof context->summary.cuda_status, "this header was made without the kernel %s",
                 fqla__kernels[i].name);
        return FQLA_ERROR_NO_CUDA;
    }
    bytes = fqla__decode_image(&context->desc, ptx ? image->fatbin : image->cubin, ptx ? image->fatbin_size : image->cubin_size);
    if (bytes == NULL) {
        snprintf(context->summary.cuda_status, sizeof context->summary.cuda_status, "no memory for the image of the kernel %s", image->name);
        return FQLA_ERROR_OUT_OF_MEMORY;
    }
    status = fqla__cuda_check_open(context, "cuModuleLoadData", driver->cuModuleLoadData(&cuda->modules[i], bytes));
    fqla__host_free(&context->desc, bytes);
    if (status != FQLA_OK) return status;
    status = fqla__cuda_check_open(context, "cuModuleGetFunction",
                                   driver->cuModuleGetFunction(&cuda->functions[i], cuda->modules[i], image->name));
    if (status != FQLA_OK) return status;
    return fqla__cuda_check_open(context, "cuFuncSetAttribute",
                                 driver->cuFuncSetAttribute(cuda->functions[i], FQLA__CUDA_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                                            fqla__kernels[i].shared_bytes));
}

/* Load all kernels in one form. On failure none is loaded. */
static fqla_status fqla__cuda_load_form(fqla_context *context, bool ptx) {
    fqla_status status = FQLA_OK;
    int i;
    for (i = 0; i < FQLA__KERNEL_COUNT && status == FQLA_OK; i++) status = fqla__cuda_load_kernel(context, i, ptx);
    if (status != FQLA_OK) fqla__cuda_unload_kernels(context);
    else snprintf(context->summary.kernel_form, sizeof context->summary.kernel_form, "%s", ptx ? "ptx" : "cubin");
    return status;
}

/* The cubins, or the PTX if the driver refuses them. The tests define FLASHQLA__FORCE_PTX to try the PTX on any driver. */
static fqla_status fqla__cuda_load_kernels(fqla_context *context) {
    char *why = context->summary.cuda_status, refusal[sizeof context->summary.cuda_status];
    const int version = (int)context->summary.driver_version;
    fqla_status status;
#ifndef FLASHQLA__FORCE_PTX
    status = fqla__cuda_load_form(context, false);
    if (status == FQLA_OK || status == FQLA_ERROR_OUT_OF_MEMORY) return status;
    fqla__info(&context->desc, "the driver (CUDA %d.%d) refuses the kernels' cubins, their PTX is next: %s", version / 1000,
               version % 1000 / 10, why);
#endif
    status = fqla__cuda_load_form(context, true);
    if (status == FQLA_OK || status == FQLA_ERROR_OUT_OF_MEMORY) return status;
    snprintf(refusal, sizeof refusal, "%s", why);
    snprintf(why, sizeof refusal, "the driver (CUDA %d.%d) refuses the kernels: %.200s", version / 1000, version % 1000 / 10,
             refusal);
    return FQLA_ERROR_NO_CUDA;
}

/* ---- the device */

/* The device of the borrowed context, or of the ordinal. */
static fqla_status fqla__cuda_find_device(fqla_context *context) {
    fqla__cuda_device *cuda = &context->cuda;
    const fqla__cuda_driver *driver = &cuda->driver;
    fqla_status status;
    int count = 0;
    if (context->desc.cuda_context != NULL) {
        cuda->context = context->desc.cuda_context;
        status = fqla__cuda_check_open(context, "cuCtxPushCurrent", driver->cuCtxPushCurrent_v2(cuda->context));
        if (status != FQLA_OK) return status;
        status = fqla__cuda_check_open(context, "cuCtxGetDevice", driver->cuCtxGetDevice(&cuda->device));
        fqla__cuda_leave(context);
        return status;
    }
    status = fqla__cuda_check_open(context, "cuDeviceGetCount", driver->cuDeviceGetCount(&count));
    if (status != FQLA_OK) return status;
    if (context->desc.device >= count) {
        snprintf(context->summary.cuda_status, sizeof context->summary.cuda_status,
                 "context_desc.device is %d; the CUDA driver has %d device%s", (int)context->desc.device, count,
                 count == 1 ? "" : "s");
        return FQLA_ERROR_NO_CUDA;
    }
    return fqla__cuda_check_open(context, "cuDeviceGet", driver->cuDeviceGet(&cuda->device, (int)context->desc.device));
}

static fqla_status fqla__cuda_attribute(fqla_context *context, int attribute, int *value) {
    return fqla__cuda_check_open(context, "cuDeviceGetAttribute",
                                 context->cuda.driver.cuDeviceGetAttribute(value, attribute, context->cuda.device));
}

/* Its name, size and compute capability, which must be 9.0: sm_90a code runs on no other. */
static fqla_status fqla__cuda_examine_device(fqla_context *context) {
    const fqla__cuda_device *cuda = &context->cuda;
    fqla_context_summary *summary = &context->summary;
    char *name = summary->device_name;
    int major = 0, minor = 0, sm_count = 0;
    fqla_status status = fqla__cuda_check_open(
        context, "cuDeviceGetName", cuda->driver.cuDeviceGetName(name, (int)sizeof summary->device_name, cuda->device));
    if (status == FQLA_OK) status = fqla__cuda_attribute(context, FQLA__CUDA_COMPUTE_CAPABILITY_MAJOR, &major);
    if (status == FQLA_OK) status = fqla__cuda_attribute(context, FQLA__CUDA_COMPUTE_CAPABILITY_MINOR, &minor);
    if (status == FQLA_OK) status = fqla__cuda_attribute(context, FQLA__CUDA_MULTIPROCESSOR_COUNT, &sm_count);
    if (status != FQLA_OK) return status;
    summary->compute_capability = major * 10 + minor;
    summary->sm_count = sm_count;
    if (major == 9 && minor == 0) return FQLA_OK;
    snprintf(summary->cuda_status, sizeof summary->cuda_status, "%s has compute capability %d.%d; the kernels need 9.0", name,
             major, minor);
    return FQLA_ERROR_NO_CUDA;
}

static void fqla__cuda_release(fqla_context *context) {
    fqla__cuda_device *cuda = &context->cuda;
    if (cuda->retained)
        fqla__cuda_note(context, "cuDevicePrimaryCtxRelease", cuda->driver.cuDevicePrimaryCtxRelease_v2(cuda->device));
    cuda->retained = false;
}

static void fqla__cuda_close(fqla_context *context) {
    if (fqla__cuda_enter_to_end(context)) {
        fqla__cuda_unload_kernels(context);
        fqla__cuda_leave(context);
    }
    fqla__cuda_release(context);
}

/* Put the context on CUDA. On failure nothing is held and summary.cuda_status says why; FQLA_ERROR_NO_CUDA where there is no
   driver, no device, or none that can run the kernels. */
static fqla_status fqla__cuda_open(fqla_context *context) {
    fqla__cuda_device *cuda = &context->cuda;
    const fqla__cuda_driver *driver = &cuda->driver;
    fqla_context_summary *summary = &context->summary;
    fqla_status status;
    int version = 0;
    if (!fqla__cuda_driver_open(&cuda->driver, summary->cuda_status, sizeof summary->cuda_status)) return FQLA_ERROR_NO_CUDA;
    if (fqla__cuda_check_open(context, "cuInit", driver->cuInit(0)) != FQLA_OK) return FQLA_ERROR_NO_CUDA;
    status = fqla__cuda_check_open(context, "cuDriverGetVersion", driver->cuDriverGetVersion(&version));
    summary->driver_version = version;
    if (status == FQLA_OK) status = fqla__cuda_find_device(context);
    if (status == FQLA_OK) status = fqla__cuda_examine_device(context);
    if (status == FQLA_OK && context->desc.cuda_context == NULL) {
        status = fqla__cuda_check_open(context, "cuDevicePrimaryCtxRetain",
                                       driver->cuDevicePrimaryCtxRetain(&cuda->context, cuda->device));
        cuda->retained = status == FQLA_OK;
    }
    if (status == FQLA_OK) {
        status = fqla__cuda_check_open(context, "cuCtxPushCurrent", driver->cuCtxPushCurrent_v2(cuda->context));
        if (status == FQLA_OK) {
            status = fqla__cuda_load_kernels(context);
            fqla__cuda_leave(context);
        }
    }
    if (status == FQLA_OK) snprintf(summary->cuda_status, sizeof summary->cuda_status, "ready");
    else fqla__cuda_release(context);
    return status;
}

/* ---- streams and memory */

/* Does the stream belong to our CUDA context? Special streams (NULL, legacy, per thread) are the current context's: ours. */
static fqla_status fqla__cuda_check_stream(const fqla_context *context, const char *function, fqla_stream stream) {
    fqla_cuda_context owner = NULL;
    fqla_status status;
    if (stream == NULL) return FQLA_OK;
    status = fqla__cuda_check(context, function, "cuStreamGetCtx", context->cuda.driver.cuStreamGetCtx(stream, &owner));
    if (status == FQLA_OK && owner != context->cuda.context)
        return fqla__fail(&context->desc, FQLA_ERROR_WRONG_CONTEXT, "%s: stream %p belongs to the CUDA context %p, not to %p",
                          function, (void *)stream, (void *)owner, (void *)context->cuda.context);
    return status;
}

/* The same, and it is not being captured: a copy or a wait there would end up in the graph or break it. */
static fqla_status fqla__cuda_check_live_stream(const fqla_context *context, const char *function, fqla_stream stream) {
    int capturing = 0;
    fqla_status status = fqla__cuda_check_stream(context, function, stream);
    if (status != FQLA_OK) return status;
    status = fqla__cuda_check(context, function, "cuStreamIsCapturing",
                              context->cuda.driver.cuStreamIsCapturing(stream, &capturing));
    if (status == FQLA_OK && capturing != 0)
        return fqla__fail(&context->desc, FQLA_ERROR_CAPTURING, "%s: stream %p is being captured", function, (void *)stream);
    return status;
}

static fqla_status fqla__cuda_alloc(fqla_context *context, size_t bytes, void **pointer) {
    fqla__cuda_address address = 0;
    fqla_status status = fqla__cuda_enter(context, "fqla_alloc");
    char function[64];
    if (status != FQLA_OK) return status;
    snprintf(function, sizeof function, "fqla_alloc of %.0f bytes", (double)bytes);
    status = fqla__cuda_check(context, function, "cuMemAlloc", context->cuda.driver.cuMemAlloc_v2(&address, bytes));
    fqla__cuda_leave(context);
    *pointer = (void *)address;
    return status;
}

/* FQLA_ERROR_INVALID_VALUE: none of ours. FQLA_ERROR_CAPTURING: not now. Any other failure is the context's; the memory is gone. */
static fqla_status fqla__cuda_free(fqla_context *context, void *pointer) {
    fqla__cuda_result result;
    fqla_status status = fqla__cuda_enter(context, "fqla_free");
    if (status != FQLA_OK) return status;
    result = context->cuda.driver.cuMemFree_v2((fqla__cuda_address)pointer);
    status = fqla__cuda_check(context, "fqla_free", "cuMemFree", result);
    fqla__cuda_leave(context);
    return result == FQLA__CUDA_ERROR_INVALID_VALUE ? FQLA_ERROR_INVALID_VALUE : status;
}

static fqla_status fqla__cuda_copy(fqla_context *context, void *to, const void *from, size_t bytes, bool upload,
                                   fqla_stream stream) {
    const char *function = upload ? "fqla_upload" : "fqla_download";
    const fqla__cuda_driver *driver = &context->cuda.driver;
    fqla_status status = fqla__cuda_enter(context, function);
    if (status != FQLA_OK) return status;
    status = fqla__cuda_check_live_stream(context, function, stream);
    if (status == FQLA_OK && upload)
        status = fqla__cuda_check(context, function, "cuMemcpyHtoDAsync",
                                  driver->cuMemcpyHtoDAsync_v2((fqla__cuda_address)to, from, bytes, stream));
    else if (status == FQLA_OK)
        status = fqla__cuda_check(context, function, "cuMemcpyDtoHAsync",
                                  driver->cuMemcpyDtoHAsync_v2(to, (fqla__cuda_address)from, bytes, stream));
    if (status == FQLA_OK) status = fqla__cuda_check(context, function, "cuStreamSynchronize", driver->cuStreamSynchronize(stream));
    fqla__cuda_leave(context);
    return status;
}

static fqla_status fqla__cuda_synchronize(fqla_context *context, fqla_stream stream) {
    fqla_status status = fqla__cuda_enter(context, "fqla_synchronize");
    if (status != FQLA_OK) return status;
    status = fqla__cuda_check_live_stream(context, "fqla_synchronize", stream);
    if (status == FQLA_OK)
        status = fqla__cuda_check(context, "fqla_synchronize", "cuStreamSynchronize",
                                  context->cuda.driver.cuStreamSynchronize(stream));
    fqla__cuda_leave(context);
    return status;
}
