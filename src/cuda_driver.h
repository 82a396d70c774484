// >>cuda_driver: the driver's functions, opened at run time, under prototypes of our own. Names and values are cuda.h's.

#if defined(_WIN32)
#define FLASHQLA__CUDA_CALL __stdcall
#else
#define FLASHQLA__CUDA_CALL
#endif

typedef int fqla__cuda_result;          /* CUresult */
typedef int fqla__cuda_ordinal;         /* CUdevice */
typedef uintptr_t fqla__cuda_address;   /* CUdeviceptr */
typedef struct CUmod_st *fqla__cuda_module;
typedef struct CUfunc_st *fqla__cuda_function;

enum {
    FQLA__CUDA_SUCCESS = 0,
    FQLA__CUDA_ERROR_INVALID_VALUE = 1,
    FQLA__CUDA_ERROR_OUT_OF_MEMORY = 2,
    FQLA__CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900, /* the first of the errors of stream capture ... */
    FQLA__CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD = 908 /* ... and the last */
};
enum {
    FQLA__CUDA_MULTIPROCESSOR_COUNT = 16, /* CU_DEVICE_ATTRIBUTE_* */
    FQLA__CUDA_COMPUTE_CAPABILITY_MAJOR = 75,
    FQLA__CUDA_COMPUTE_CAPABILITY_MINOR = 76
};
enum { FQLA__CUDA_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8 }; /* CU_FUNC_ATTRIBUTE_* */
enum { FQLA__CUDA_TENSOR_FLOAT16 = 6, FQLA__CUDA_TENSOR_BFLOAT16 = 9 }; /* CU_TENSOR_MAP_* */
enum { FQLA__CUDA_INTERLEAVE_NONE = 0, FQLA__CUDA_OOB_FILL_ZERO = 0 };
enum { FQLA__CUDA_SWIZZLE_128B = 3 };
enum { FQLA__CUDA_L2_PROMOTION_NONE = 0, FQLA__CUDA_L2_PROMOTION_256B = 3 };

enum { FQLA__CUDA_LAUNCH_PROGRAMMATIC_STREAM_SERIALIZATION = 6 }; /* CU_LAUNCH_ATTRIBUTE_* */

/* CUlaunchAttribute and CUlaunchConfig. */
typedef struct fqla__cuda_launch_attribute {
    int id;
    char padding[4];
    union {
        char bytes[64];
        int programmatic_stream_serialization_allowed;
    } value;
} fqla__cuda_launch_attribute;

typedef struct fqla__cuda_launch_config {
    unsigned int grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
    fqla_stream stream;
    fqla__cuda_launch_attribute *attributes;
    unsigned int attribute_count;
} fqla__cuda_launch_config;

/* Every function that is called, by the name that the library exports it under. */
#define FLASHQLA__CUDA_FUNCTIONS(X)                                                                                       \
    X(cuGetErrorName, (fqla__cuda_result result, const char **name))                                                      \
    X(cuGetErrorString, (fqla__cuda_result result, const char **text))                                                    \
    X(cuInit, (unsigned int flags))                                                                                       \
    X(cuDriverGetVersion, (int *version))                                                                                 \
    X(cuDeviceGetCount, (int *count))                                                                                     \
    X(cuDeviceGet, (fqla__cuda_ordinal *device, int ordinal))                                                             \
    X(cuDeviceGetName, (char *name, int size, fqla__cuda_ordinal device))                                                 \
    X(cuDeviceGetAttribute, (int *value, int attribute, fqla__cuda_ordinal device))                                       \
    X(cuDevicePrimaryCtxRetain, (fqla_cuda_context *context, fqla__cuda_ordinal device))                                  \
    X(cuDevicePrimaryCtxRelease_v2, (fqla__cuda_ordinal device))                                                          \
    X(cuCtxPushCurrent_v2, (fqla_cuda_context context))                                                                   \
    X(cuCtxPopCurrent_v2, (fqla_cuda_context *context))                                                                   \
    X(cuCtxGetDevice, (fqla__cuda_ordinal *device))                                                                       \
    X(cuModuleLoadData, (fqla__cuda_module *module, const void *image))                                                   \
    X(cuModuleUnload, (fqla__cuda_module module))                                                                         \
    X(cuModuleGetFunction, (fqla__cuda_function *function, fqla__cuda_module module, const char *name))                   \
    X(cuFuncSetAttribute, (fqla__cuda_function function, int attribute, int value))                                       \
    X(cuMemAlloc_v2, (fqla__cuda_address *address, size_t bytes))                                                         \
    X(cuMemFree_v2, (fqla__cuda_address address))                                                                         \
    X(cuMemcpyHtoDAsync_v2, (fqla__cuda_address to, const void *from, size_t bytes, fqla_stream stream))                  \
    X(cuMemcpyDtoHAsync_v2, (void *to, fqla__cuda_address from, size_t bytes, fqla_stream stream))                        \
    X(cuStreamSynchronize, (fqla_stream stream))                                                                          \
    X(cuStreamIsCapturing, (fqla_stream stream, int *status))                                                             \
    X(cuStreamGetCtx, (fqla_stream stream, fqla_cuda_context *context))                                                   \
    X(cuTensorMapEncodeTiled, (void *map, int type, uint32_t rank, void *address, const uint64_t *dims,                   \
                               const uint64_t *strides, const uint32_t *box, const uint32_t *element_strides,             \
                               int interleave, int swizzle, int l2_promotion, int oob_fill))                              \
    X(cuLaunchKernelEx, (const fqla__cuda_launch_config *config, fqla__cuda_function function, void **parameters, void **extra))

typedef struct fqla__cuda_driver {
#define FLASHQLA__X(name, parameters) fqla__cuda_result(FLASHQLA__CUDA_CALL *name) parameters;
    FLASHQLA__CUDA_FUNCTIONS(FLASHQLA__X)
#undef FLASHQLA__X
} fqla__cuda_driver;

/* Open the driver's library and find its functions. False: *reason says in words what is missing, and nothing stays open.
   An opened library is never closed: a driver that ran has threads and exit handlers inside it. */
static bool fqla__cuda_driver_open(fqla__cuda_driver *driver, char *reason, size_t reason_size) {
#if defined(_WIN32)
    static const char *const names[] = {"nvcuda.dll"};
#else
    static const char *const names[] = {"libcuda.so.1", "libcuda.so"};
#endif
    const char *missing = NULL;
    void *library = NULL;
    size_t i;
    for (i = 0; i < sizeof names / sizeof names[0] && library == NULL; i++) library = fqla__library_open(names[i]);
    if (library == NULL) {
        snprintf(reason, reason_size, "no CUDA driver: %s cannot be opened", names[0]);
        return false;
    }
#define FLASHQLA__X(name, parameters) \
    if (!fqla__library_symbol(library, #name, &driver->name)) missing = #name;
    FLASHQLA__CUDA_FUNCTIONS(FLASHQLA__X)
#undef FLASHQLA__X
    if (missing != NULL) {
        snprintf(reason, reason_size, "the CUDA driver is too old: %s has no %s", names[i - 1], missing);
        fqla__library_close(library);
        return false;
    }
    return true;
}

/* "CUDA_ERROR_NO_DEVICE (no CUDA-capable device is detected)" */
static void fqla__cuda_result_words(const fqla__cuda_driver *driver, fqla__cuda_result result, char *words, size_t size) {
    const char *name = NULL, *text = NULL;
    driver->cuGetErrorName(result, &name);
    driver->cuGetErrorString(result, &text);
    if (name != NULL) snprintf(words, size, "%s (%s)", name, text != NULL ? text : "no description");
    else snprintf(words, size, "unknown error %d", result);
}

/* The kernels, one an image; see fqla__kernels in cuda_device.h. Of each the variant for bfloat16, then that for float16. */
enum {
    FQLA__KERNEL_PREPARE_BF16,
    FQLA__KERNEL_PREPARE_FP16,
    FQLA__KERNEL_STATES_BF16,
    FQLA__KERNEL_STATES_FP16,
    FQLA__KERNEL_FORWARD_BF16,
    FQLA__KERNEL_FORWARD_FP16,
    FQLA__KERNEL_FORWARD_HALF_BF16,
    FQLA__KERNEL_FORWARD_HALF_FP16,
    FQLA__KERNEL_BACKWARD_CHAINS_BF16,
    FQLA__KERNEL_BACKWARD_CHAINS_FP16,
    FQLA__KERNEL_BACKWARD_GRADIENTS_BF16,
    FQLA__KERNEL_BACKWARD_GRADIENTS_FP16,
    FQLA__KERNEL_SCAN, /* it and what follows: of one kind */
    FQLA__KERNEL_BACKWARD_SCAN,
    FQLA__KERNEL_BACKWARD_SUMS,
    FQLA__KERNEL_COUNT
};

/* What a context keeps on CUDA: all of it from its creation on, so that a run loads nothing. */
typedef struct fqla__cuda_device {
    fqla__cuda_driver driver;
    fqla__cuda_ordinal device;
    fqla_cuda_context context; /* borrowed, or the device's primary context */
    bool retained;             /* it is the primary context, to be released */
    fqla__cuda_module modules[FQLA__KERNEL_COUNT];
    fqla__cuda_function functions[FQLA__KERNEL_COUNT];
} fqla__cuda_device;

/* How a forward is spread over the GPU; cuda_schedule.h chooses. A backward: cuda_backward_schedule.h. */
typedef struct fqla__schedule {
    int32_t v_split;            /* 1 or 2 blocks a v-head; from the plan's maxima */
    int32_t extra_segments;     /* by cutting sequences there are so many segments more than sequences, at most; 0: none is cut. From the maxima */
    int32_t segment_chunks;     /* chunks of a segment; 0: no sequence is cut. From the lengths of the moment */
    double microseconds, uncut; /* the model's time, and without cutting */
} fqla__schedule;

/* What a plan keeps on CUDA: the device table of cuda_params.h, behind it the backward's, which has segments of its own; host memory in
   which their next content is put together; the schedules. */
typedef struct fqla__cuda_plan {
    fqla__cuda_address table;
    size_t backward_table; /* bytes from the first to the second */
    size_t window_tables;  /* and to those of a low_memory plan's windows (cuda_windows.h) */
    fqla__device_table *staging;
    fqla__schedule schedule, backward;
} fqla__cuda_plan;
