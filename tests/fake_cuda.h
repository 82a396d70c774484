/* The fake CUDA driver: libcuda.so.1 without a GPU. It exports the driver's functions that flashqla.h and the command line call;
   device memory is host memory, copies copy, a launch is written down and nothing runs. This is how a test talks to it, beside the
   driver's functions. */
#ifndef FAKE_CUDA_H
#define FAKE_CUDA_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32) && defined(FAKE_CUDA_DRIVER)
#define FAKE_CUDA_API __declspec(dllexport)
#else
#define FAKE_CUDA_API
#endif

/* What machine it pretends to be, and what goes wrong. fake_cuda_reset sets an H200 on which nothing does. */
typedef struct fake_cuda_machine {
    int devices;            /* none: cuInit is CUDA_ERROR_NO_DEVICE */
    int major, minor;       /* compute capability */
    int multiprocessors;
    int driver_version;     /* 13000: CUDA 13.0 */
    int cubin_result, fatbin_result; /* of cuModuleLoadData; 0: takes it */
    int fail_call;          /* 1: the next call fails, 2: the one after; 0: none */
    int fail_result;        /* with this CUresult */
    size_t memory;          /* bytes of a device */
    size_t parameter_bytes; /* of a kernel: as many are copied at a launch */
} fake_cuda_machine;

/* What exists, to be compared before and after. */
typedef struct fake_cuda_census {
    int allocations, modules, retains; /* retains: of all primary contexts */
    int stack;                         /* contexts on the calling thread's stack */
    size_t bytes;
} fake_cuda_census;

enum { FAKE_CUDA_PARAMETER_BYTES = 2048 };

typedef struct fake_cuda_launch {
    char kernel[64];
    unsigned int grid[3], block[3], shared_bytes;
    int dependent;  /* programmatic stream serialization: it may start while the kernel before it still runs */
    void *stream, *context;
    int captured;   /* into a graph: not run */
    unsigned char parameters[FAKE_CUDA_PARAMETER_BYTES];
} fake_cuda_launch;

typedef struct fake_cuda_copy {
    uintptr_t to, from;
    size_t bytes;
    void *stream;
    int upload, captured;
} fake_cuda_copy;

/* What cuTensorMapEncodeTiled writes into a map's 128 bytes. */
typedef struct fake_cuda_tensor_map {
    uint64_t magic, address, dims[3], strides[2];
    uint32_t box[3], type, swizzle, interleave, fill, promotion;
} fake_cuda_tensor_map;
#define FAKE_CUDA_TENSOR_MAP_MAGIC 0x70616d726f736e74ull

/* The functions of the control interface, exported under their names. */
#define FAKE_CUDA_FUNCTIONS(X)                                                                                     \
    X(void, fake_cuda_reset, (void))                  /* an H200; counts at 0, records empty. What exists stays */ \
    X(fake_cuda_machine *, fake_cuda_settings, (void))                                                             \
    X(int, fake_cuda_calls, (void))                   /* driver calls since the reset */                           \
    X(const char *, fake_cuda_failed_call, (void))    /* the call that fail_call made fail; "" before */           \
    X(const char *, fake_cuda_misuse, (void))         /* the first breach of the driver's rules since the reset */ \
    X(fake_cuda_census, fake_cuda_count, (void))                                                                   \
    X(int, fake_cuda_launches, (void))                                                                             \
    X(fake_cuda_launch, fake_cuda_launch_at, (int index))                                                          \
    X(int, fake_cuda_copies, (void))                                                                               \
    X(fake_cuda_copy, fake_cuda_copy_at, (int index))                                                              \
    X(void *, fake_cuda_context_create, (int device)) /* a CUcontext of the caller's own */                        \
    X(void, fake_cuda_context_destroy, (void *context))                                                            \
    X(void *, fake_cuda_primary_context, (int device))                                                             \
    X(void, fake_cuda_push, (void *context))                                                                       \
    X(void, fake_cuda_pop, (void))                                                                                 \
    X(void *, fake_cuda_current, (void))                                                                           \
    X(void *, fake_cuda_stream_create, (void *context))                                                            \
    X(void, fake_cuda_stream_destroy, (void *stream))                                                              \
    X(void, fake_cuda_capture_begin, (void *stream))                                                               \
    X(int, fake_cuda_capture_end, (void *stream)) /* 1: a graph; 0: something broke the capture */

#define FAKE_CUDA_X(type, name, parameters) FAKE_CUDA_API type name parameters;
FAKE_CUDA_FUNCTIONS(FAKE_CUDA_X)
#undef FAKE_CUDA_X

#endif
