/* The fake CUDA driver (see fake_cuda.h). It is strict where the real one is lenient or crashes: a handle that is not alive, a call
   without the context it needs, a launch beyond the limits and the like are written down as misuse, and refused.

   A copy is done when its stream is waited for and no sooner, except that pageable memory is read at once.

   An injected failure acts as a real one does: a call that begins something has not begun it, and one that ends something (pop,
   free, unload, release) has done its work and reports what an earlier launch did. */
#define FAKE_CUDA_DRIVER
#include "fake_cuda.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef enum CUresult {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NOT_INITIALIZED = 3,
    CUDA_ERROR_NO_DEVICE = 100,
    CUDA_ERROR_INVALID_DEVICE = 101,
    CUDA_ERROR_INVALID_IMAGE = 200,
    CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209,
    CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222,
    CUDA_ERROR_INVALID_HANDLE = 400,
    CUDA_ERROR_NOT_FOUND = 500,
    CUDA_ERROR_ILLEGAL_ADDRESS = 700,
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900,
    CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906
} CUresult;

static const struct {
    CUresult result;
    const char *name, *text;
} errors[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {CUDA_ERROR_NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
     "the provided PTX was compiled with an unsupported toolchain."},
    {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
     "operation would make the legacy stream depend on a capturing blocking stream"},
};

typedef struct context {
    int device, alive, retains; /* retains: of a primary context */
} context;

typedef struct stream {
    context *owner;
    int alive, capture;   /* 1: active, 2: broken */
    int captured_kernels; /* of the capture that is going on */
} stream;

typedef struct function {
    struct module *module;
    char name[64];
    int shared_limit;
} function;

typedef struct module {
    context *owner;
    char kernel[64]; /* "": any */
    int alive;
    function functions[4];
    int num_functions;
} module;

typedef struct allocation {
    context *owner;
    void *raw;
    unsigned char *start;
    size_t bytes;
    struct allocation *next;
} allocation;

/* A copy that waits for its stream. */
typedef struct pending {
    void *stream;
    void *to;
    const void *from; /* staged, where it is an upload */
    void *staged;     /* NULL: a download */
    size_t bytes;
    struct pending *next;
} pending;

enum { MAX_DEVICES = 8, MAX_OBJECTS = 1 << 14, MAX_RECORDS = 256, MAX_STACK = 32 };

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
/* Runs a kernel, where the library is linked with tests/emulator. So few multiprocessors that blocks which stay on theirs have much to
   do. */
enum { EMULATED_MULTIPROCESSORS = 3 };
#if defined(_WIN32)
static int emulated(void) { return 0; }
#else
void __attribute__((weak)) fake_cuda_run(const char *kernel, const void *parameters, unsigned int blocks, unsigned int threads);
static int emulated(void) { return fake_cuda_run != NULL; }
#endif

#define H200 {.devices = 1, .major = 9, .multiprocessors = 132, .driver_version = 13000, .memory = (size_t)1 << 30}
static const fake_cuda_machine h200 = H200;
static fake_cuda_machine machine = H200;
static int initialised, calls, injected;
static char failed_call[64], misuse[256];
static context primaries[MAX_DEVICES], contexts[MAX_OBJECTS];
static stream streams[MAX_OBJECTS];
static module modules[MAX_OBJECTS];
static int num_contexts, num_streams, num_modules;
static allocation *allocations;
static pending *queue; /* of all streams, oldest first */
static fake_cuda_launch launches[MAX_RECORDS];
static fake_cuda_copy copies[MAX_RECORDS];
static int num_launches, num_copies;
static __thread context *stack[MAX_STACK];
static __thread int depth;

/* ---- a call: the lock, the count, the injected failure, the rules */

static CUresult breach(CUresult result, const char *format, ...) {
    va_list list;
    if (misuse[0] != '\0') return result;
    va_start(list, format);
    vsnprintf(misuse, sizeof misuse, format, list);
    va_end(list);
    return result;
}

static context *current(void) { return depth > 0 ? stack[depth - 1] : NULL; }

enum { NEEDS_NOTHING, NEEDS_INIT, NEEDS_CONTEXT };

/* Locked from here to end(). Not CUDA_SUCCESS: the call is refused, or `injected`. */
static CUresult begin(const char *call, int needs) {
    pthread_mutex_lock(&mutex);
    calls++;
    injected = machine.fail_call > 0 && --machine.fail_call == 0;
    if (injected) {
        snprintf(failed_call, sizeof failed_call, "%s", call);
        return (CUresult)machine.fail_result;
    }
    if (needs >= NEEDS_INIT && !initialised) return breach(CUDA_ERROR_NOT_INITIALIZED, "%s before cuInit", call);
    if (needs >= NEEDS_CONTEXT && (current() == NULL || !current()->alive))
        return breach(CUDA_ERROR_INVALID_CONTEXT, "%s without a context", call);
    return CUDA_SUCCESS;
}

static CUresult end(CUresult result) {
    pthread_mutex_unlock(&mutex);
    return result;
}

static int valid_context(const context *c) {
    return ((c >= primaries && c < primaries + MAX_DEVICES) || (c >= contexts && c < contexts + num_contexts)) && c->alive;
}

static stream *valid_stream(void *handle) {
    stream *s = (stream *)handle;
    return s >= streams && s < streams + num_streams && s->alive ? s : NULL;
}

static module *valid_module(void *handle) {
    module *m = (module *)handle;
    return m >= modules && m < modules + num_modules && m->alive ? m : NULL;
}

static function *valid_function(void *handle) {
    int i, j;
    for (i = 0; i < num_modules; i++)
        for (j = 0; modules[i].alive && j < modules[i].num_functions; j++)
            if (handle == &modules[i].functions[j]) return &modules[i].functions[j];
    return NULL;
}

/* Is any stream being captured (in `owner` alone, unless NULL)? Then the capture breaks where break_it says so. */
static int capturing(const context *owner, int break_it) {
    int i, found = 0;
    for (i = 0; i < num_streams; i++)
        if (streams[i].alive && streams[i].capture == 1 && (owner == NULL || streams[i].owner == owner)) {
            found = 1;
            if (break_it) streams[i].capture = 2;
        }
    return found;
}

/* The streams NULL, CU_STREAM_LEGACY and CU_STREAM_PER_THREAD. */
static int is_special(const void *handle) { return (uintptr_t)handle <= 2; }
static int is_legacy(const void *handle) { return (uintptr_t)handle <= 1; }

/* Work is about to be enqueued on a stream. */
static CUresult use_stream(const char *call, void *handle, int *captured) {
    stream *s;
    *captured = 0;
    if (is_legacy(handle)) return capturing(current(), 1) ? CUDA_ERROR_STREAM_CAPTURE_IMPLICIT : CUDA_SUCCESS;
    if (is_special(handle)) return CUDA_SUCCESS;
    s = valid_stream(handle);
    if (s == NULL) return breach(CUDA_ERROR_INVALID_HANDLE, "%s on a stream that does not exist", call);
    if (s->owner != current()) return breach(CUDA_ERROR_INVALID_CONTEXT, "%s on a stream of another context", call);
    *captured = s->capture != 0;
    return CUDA_SUCCESS;
}

/* A call that is not safe while anything is being captured. */
static CUresult unsafe(void) { return capturing(NULL, 1) ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS; }

static allocation *find_allocation(const void *address, size_t bytes) {
    allocation *a = allocations;
    const uintptr_t start = (uintptr_t)address;
    while (a != NULL && !(start >= (uintptr_t)a->start && start + bytes <= (uintptr_t)a->start + a->bytes)) a = a->next;
    return a;
}

/* Do the copies of a stream, or of all. */
static void flush(const void *handle, int all) {
    pending **at = &queue;
    while (*at != NULL) {
        pending *p = *at;
        if (!all && p->stream != handle) {
            at = &p->next;
            continue;
        }
        memcpy(p->to, p->from, p->bytes);
        *at = p->next;
        free(p->staged);
        free(p);
    }
}

static int enqueue(void *handle, void *to, const void *from, size_t bytes, int upload) {
    pending **at = &queue, *p = (pending *)calloc(1, sizeof *p);
    if (p == NULL || (upload && (p->staged = malloc(bytes)) == NULL)) {
        free(p);
        return 0;
    }
    if (upload) memcpy(p->staged, from, bytes);
    p->stream = handle;
    p->to = to;
    p->from = upload ? p->staged : from;
    p->bytes = bytes;
    while (*at != NULL) at = &(*at)->next;
    *at = p;
    return 1;
}

/* What a context owned ends with it. */
static void drop_context(context *owner) {
    allocation **at = &allocations;
    int i;
    flush(NULL, 1);
    owner->alive = 0;
    for (i = 0; i < num_modules; i++)
        if (modules[i].owner == owner) modules[i].alive = 0;
    while (*at != NULL) {
        allocation *a = *at;
        if (a->owner != owner) {
            at = &a->next;
            continue;
        }
        *at = a->next;
        free(a->raw);
        free(a);
    }
}

/* ---- the driver's functions */

FAKE_CUDA_API CUresult cuGetErrorName(CUresult result, const char **name) {
    size_t i;
    *name = NULL;
    for (i = 0; i < sizeof errors / sizeof errors[0]; i++)
        if (errors[i].result == result) *name = errors[i].name;
    return *name != NULL ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

FAKE_CUDA_API CUresult cuGetErrorString(CUresult result, const char **text) {
    size_t i;
    *text = NULL;
    for (i = 0; i < sizeof errors / sizeof errors[0]; i++)
        if (errors[i].result == result) *text = errors[i].text;
    return *text != NULL ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

FAKE_CUDA_API CUresult cuInit(unsigned int flags) {
    CUresult result = begin("cuInit", NEEDS_NOTHING);
    if (result != CUDA_SUCCESS) return end(result);
    if (flags != 0) return end(breach(CUDA_ERROR_INVALID_VALUE, "cuInit with flags"));
    if (machine.devices == 0) return end(CUDA_ERROR_NO_DEVICE);
    initialised = 1;
    return end(CUDA_SUCCESS);
}

FAKE_CUDA_API CUresult cuDriverGetVersion(int *version) {
    CUresult result = begin("cuDriverGetVersion", NEEDS_NOTHING);
    if (result == CUDA_SUCCESS) *version = machine.driver_version;
    return end(result);
}

FAKE_CUDA_API CUresult cuDeviceGetCount(int *count) {
    CUresult result = begin("cuDeviceGetCount", NEEDS_INIT);
    if (result == CUDA_SUCCESS) *count = machine.devices;
    return end(result);
}

FAKE_CUDA_API CUresult cuDeviceGet(int *device, int ordinal) {
    CUresult result = begin("cuDeviceGet", NEEDS_INIT);
    if (result != CUDA_SUCCESS) return end(result);
    if (ordinal < 0 || ordinal >= machine.devices)
        return end(breach(CUDA_ERROR_INVALID_DEVICE, "cuDeviceGet of device %d", ordinal));
    *device = ordinal;
    return end(CUDA_SUCCESS);
}

static CUresult check_device(CUresult result, const char *call, int device) {
    if (result == CUDA_SUCCESS && (device < 0 || device >= machine.devices))
        return breach(CUDA_ERROR_INVALID_DEVICE, "%s of device %d", call, device);
    return result;
}

FAKE_CUDA_API CUresult cuDeviceGetName(char *name, int size, int device) {
    CUresult result = check_device(begin("cuDeviceGetName", NEEDS_INIT), "cuDeviceGetName", device);
    if (result == CUDA_SUCCESS) snprintf(name, (size_t)size, "Fake GPU %d", device);
    return end(result);
}

FAKE_CUDA_API CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
    CUresult result = check_device(begin("cuDeviceGetAttribute", NEEDS_INIT), "cuDeviceGetAttribute", device);
    if (result != CUDA_SUCCESS) return end(result);
    switch (attribute) {
    case 16: *value = emulated() ? EMULATED_MULTIPROCESSORS : machine.multiprocessors; break;
    case 75: *value = machine.major; break;
    case 76: *value = machine.minor; break;
    default: return end(breach(CUDA_ERROR_INVALID_VALUE, "cuDeviceGetAttribute %d", attribute));
    }
    return end(CUDA_SUCCESS);
}

FAKE_CUDA_API CUresult cuDevicePrimaryCtxRetain(void **handle, int device) {
    CUresult result = check_device(begin("cuDevicePrimaryCtxRetain", NEEDS_INIT), "cuDevicePrimaryCtxRetain", device);
    if (result != CUDA_SUCCESS) return end(result);
    primaries[device].device = device;
    primaries[device].alive = 1;
    primaries[device].retains++;
    *handle = &primaries[device];
    return end(CUDA_SUCCESS);
}

FAKE_CUDA_API CUresult cuDevicePrimaryCtxRelease_v2(int device) {
    CUresult result = begin("cuDevicePrimaryCtxRelease_v2", NEEDS_INIT);
    if (result != CUDA_SUCCESS && !injected) return end(result);
    if (device < 0 || device >= MAX_DEVICES || primaries[device].retains == 0)
        return end(breach(CUDA_ERROR_INVALID_CONTEXT, "cuDevicePrimaryCtxRelease of a context that is not retained"));
    if (--primaries[device].retains == 0) drop_context(&primaries[device]);
    return end(result);
}

FAKE_CUDA_API CUresult cuCtxPushCurrent_v2(void *handle) {
    CUresult result = begin("cuCtxPushCurrent_v2", NEEDS_INIT);
    if (result != CUDA_SUCCESS) return end(result);
    if (!valid_context((context *)handle)) return end(CUDA_ERROR_INVALID_CONTEXT);
    if (depth == MAX_STACK) return end(breach(CUDA_ERROR_INVALID_VALUE, "cuCtxPushCurrent over %d deep", MAX_STACK));
    stack[depth++] = (context *)handle;
    return end(CUDA_SUCCESS);
}

FAKE_CUDA_API CUresult cuCtxPopCurrent_v2(void **handle) {
    CUresult result = begin("cuCtxPopCurrent_v2", NEEDS_INIT);
    if (result != CUDA_SUCCESS && !injected) return end(result);
    if (depth == 0) return end(breach(CUDA_ERROR_INVALID_CONTEXT, "cuCtxPopCurrent of an empty stack"));
    depth--;
    if (handle != NULL) *handle = stack[depth];
    return end(result);
}

FAKE_CUDA_API CUresult cuCtxGetDevice(int *device) {
    CUresult result = begin("cuCtxGetDevice", NEEDS_CONTEXT);
    if (result == CUDA_SUCCESS) *device = current()->device;
    return end(result);
}

/* A cubin is an ELF file, a fatbin starts with a magic number of its own. */
static int is_cubin(const unsigned char *image) { return memcmp(image, "\177ELF", 4) == 0; }
static int is_fatbin(const unsigned char *image) { return memcmp(image, "\120\355\125\272", 4) == 0; }

static uint64_t little_endian(const unsigned char *bytes, int count) {
    uint64_t value = 0;
    while (count-- > 0) value = value << 8 | bytes[count];
    return value;
}

/* The kernel of a cubin, which holds one: of its section .text.NAME. A fatbin's PTX is compressed: "", every name is taken. */
static void find_kernel(const unsigned char *image, char *name, size_t size) {
    const unsigned char *sections, *names;
    uint64_t entry, count, i;
    name[0] = '\0';
    if (!is_cubin(image)) return;
    sections = image + little_endian(image + 40, 8);
    entry = little_endian(image + 58, 2);
    count = little_endian(image + 60, 2);
    names = image + little_endian(sections + little_endian(image + 62, 2) * entry + 24, 8);
    for (i = 0; i < count; i++) {
        const char *section = (const char *)names + little_endian(sections + i * entry, 4);
        if (strncmp(section, ".text.", 6) == 0) snprintf(name, size, "%s", section + 6);
    }
}

/* The image may go once it is loaded. */
FAKE_CUDA_API CUresult cuModuleLoadData(void **handle, const void *image) {
    CUresult result = begin("cuModuleLoadData", NEEDS_CONTEXT);
    const unsigned char *bytes = (const unsigned char *)image;
    module *m;
    if (result != CUDA_SUCCESS || (result = unsafe()) != CUDA_SUCCESS) return end(result);
    if (bytes == NULL || (!is_cubin(bytes) && !is_fatbin(bytes)))
        return end(breach(CUDA_ERROR_INVALID_IMAGE, "cuModuleLoadData of what is no cubin and no fatbin"));
    result = (CUresult)(is_cubin(bytes) ? machine.cubin_result : machine.fatbin_result);
    if (result != CUDA_SUCCESS) return end(result);
    if (num_modules == MAX_OBJECTS) return end(CUDA_ERROR_OUT_OF_MEMORY);
    m = &modules[num_modules++];
    m->owner = current();
    find_kernel(bytes, m->kernel, sizeof m->kernel);
    m->alive = 1;
    *handle = m;
    return end(CUDA_SUCCESS);
}

FAKE_CUDA_API CUresult cuModuleUnload(void *handle) {
    CUresult result = begin("cuModuleUnload", NEEDS_CONTEXT);
    module *m = valid_module(handle);
    if (result != CUDA_SUCCESS && !injected) return end(result);
    if (m == NULL) return end(breach(CUDA_ERROR_INVALID_HANDLE, "cuModuleUnload of a module that does not exist"));
    if (m->owner != current()) return end(breach(CUDA_ERROR_INVALID_CONTEXT, "cuModuleUnload of another context's module"));
    m->alive = 0;
    return end(result);
}

FAKE_CUDA_API CUresult cuModuleGetFunction(void **handle, void *module_handle, const char *name) {
    CUresult result = begin("cuModuleGetFunction", NEEDS_CONTEXT);
    module *m = valid_module(module_handle);
    function *f;
    if (result != CUDA_SUCCESS) return end(result);
    if (m == NULL) return end(breach(CUDA_ERROR_INVALID_HANDLE, "cuModuleGetFunction of a module that does not exist"));
    if (m->num_functions == 4 || (m->kernel[0] != '\0' && strcmp(m->kernel, name) != 0))
        return end(breach(CUDA_ERROR_NOT_FOUND, "cuModuleGetFunction of %s, which the image lacks", name));
    f = &m->functions[m->num_functions++];
    f->module = m;
    f->shared_limit = 48 * 1024;
    snprintf(f->name, sizeof f->name, "%s", name);
    *handle = f;
    return end(CUDA_SUCCESS);
}

FAKE_CUDA_API CUresult cuFuncSetAttribute(void *handle, int attribute, int value) {
    CUresult result = begin("cuFuncSetAttribute", NEEDS_CONTEXT);
    function *f = valid_function(handle);
    if (result != CUDA_SUCCESS) return end(result);
    if (f == NULL) return end(breach(CUDA_ERROR_INVALID_HANDLE, "cuFuncSetAttribute of a function that does not exist"));
    if (attribute != 8 || value < 0 || value > 227 * 1024)
        return end(breach(CUDA_ERROR_INVALID_VALUE, "cuFuncSetAttribute %d to %d", attribute, value));
    f->shared_limit = value;
    return end(CUDA_SUCCESS);
}

FAKE_CUDA_API CUresult cuMemAlloc_v2(uintptr_t *address, size_t bytes) {
    CUresult result = begin("cuMemAlloc_v2", NEEDS_CONTEXT);
    size_t used = 0;
    allocation *a;
    if (result != CUDA_SUCCESS || (result = unsafe()) != CUDA_SUCCESS) return end(result);
    if (bytes == 0) return end(breach(CUDA_ERROR_INVALID_VALUE, "cuMemAlloc of 0 bytes"));
    for (a = allocations; a != NULL; a = a->next)
        if (a->owner->device == current()->device) used += a->bytes;
    if (used > machine.memory || bytes > machine.memory - used) return end(CUDA_ERROR_OUT_OF_MEMORY);
    a = (allocation *)calloc(1, sizeof *a);
    if (a == NULL || (a->raw = malloc(bytes + 256)) == NULL) {
        free(a);
        return end(CUDA_ERROR_OUT_OF_MEMORY);
    }
    a->owner = current();
    a->start = (unsigned char *)a->raw + (256 - (uintptr_t)a->raw % 256);
    a->bytes = bytes;
    memset(a->start, 0xa5, bytes);
    a->next = allocations;
    allocations = a;
    *address = (uintptr_t)a->start;
    return end(CUDA_SUCCESS);
}

FAKE_CUDA_API CUresult cuMemFree_v2(uintptr_t address) {
    CUresult result = begin("cuMemFree_v2", NEEDS_CONTEXT);
    allocation **at = &allocations, *a;
    if (result != CUDA_SUCCESS && !injected) return end(result);
    if (unsafe() != CUDA_SUCCESS) return end(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    while (*at != NULL && (uintptr_t)(*at)->start != address) at = &(*at)->next;
    if (*at == NULL) return end(CUDA_ERROR_INVALID_VALUE);
    flush(NULL, 1);
    a = *at;
    *at = a->next;
    free(a->raw);
    free(a);
    return end(result);
}

static CUresult copy(const char *call, void *to, const void *from, size_t bytes, void *stream_handle, int upload) {
    CUresult result = begin(call, NEEDS_CONTEXT);
    fake_cuda_copy record;
    int captured;
    if (result == CUDA_SUCCESS) result = use_stream(call, stream_handle, &captured);
    if (result != CUDA_SUCCESS) return end(result);
    if (find_allocation(upload ? to : from, bytes) == NULL)
        return end(breach(CUDA_ERROR_INVALID_VALUE, "%s outside device memory", call));
    if (!captured && !enqueue(stream_handle, to, from, bytes, upload)) return end(CUDA_ERROR_OUT_OF_MEMORY);
    record.to = (uintptr_t)to;
    record.from = (uintptr_t)from;
    record.bytes = bytes;
    record.stream = stream_handle;
    record.upload = upload;
    record.captured = captured;
    if (num_copies < MAX_RECORDS) copies[num_copies] = record;
    num_copies++;
    return end(CUDA_SUCCESS);
}

FAKE_CUDA_API CUresult cuMemcpyHtoDAsync_v2(uintptr_t to, const void *from, size_t bytes, void *stream_handle) {
    return copy("cuMemcpyHtoDAsync_v2", (void *)to, from, bytes, stream_handle, 1);
}

FAKE_CUDA_API CUresult cuMemcpyDtoHAsync_v2(void *to, uintptr_t from, size_t bytes, void *stream_handle) {
    return copy("cuMemcpyDtoHAsync_v2", to, (const void *)from, bytes, stream_handle, 0);
}

FAKE_CUDA_API CUresult cuStreamSynchronize(void *handle) {
    CUresult result = begin("cuStreamSynchronize", NEEDS_CONTEXT);
    int captured;
    if (result == CUDA_SUCCESS) result = use_stream("cuStreamSynchronize", handle, &captured);
    if (result != CUDA_SUCCESS) return end(result);
    if (captured) {
        valid_stream(handle)->capture = 2;
        return end(breach(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "cuStreamSynchronize of a stream that is being captured"));
    }
    flush(handle, 0);
    return end(CUDA_SUCCESS);
}

FAKE_CUDA_API CUresult cuStreamIsCapturing(void *handle, int *status) {
    CUresult result = begin("cuStreamIsCapturing", NEEDS_CONTEXT);
    if (result != CUDA_SUCCESS) return end(result);
    if (is_legacy(handle) && capturing(current(), 0)) return end(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    if (!is_special(handle) && valid_stream(handle) == NULL)
        return end(breach(CUDA_ERROR_INVALID_HANDLE, "cuStreamIsCapturing of a stream that does not exist"));
    *status = is_special(handle) ? 0 : valid_stream(handle)->capture;
    return end(CUDA_SUCCESS);
}

FAKE_CUDA_API CUresult cuStreamGetCtx(void *handle, void **context_handle) {
    CUresult result = begin("cuStreamGetCtx", NEEDS_CONTEXT);
    if (result != CUDA_SUCCESS) return end(result);
    if (!is_special(handle) && valid_stream(handle) == NULL)
        return end(breach(CUDA_ERROR_INVALID_HANDLE, "cuStreamGetCtx of a stream that does not exist"));
    *context_handle = is_special(handle) ? current() : valid_stream(handle)->owner;
    return end(CUDA_SUCCESS);
}

/* For elements of 2 bytes without interleaving, which is all that is asked for. */
FAKE_CUDA_API CUresult cuTensorMapEncodeTiled(void *map, int type, uint32_t rank, void *address, const uint64_t *dims,
                                              const uint64_t *strides, const uint32_t *box, const uint32_t *element_strides,
                                              int interleave, int swizzle, int promotion, int fill) {
    CUresult result = begin("cuTensorMapEncodeTiled", NEEDS_CONTEXT);
    fake_cuda_tensor_map made;
    uint32_t i;
    if (result != CUDA_SUCCESS) return end(result);
    if ((uintptr_t)map % 64 != 0 || (uintptr_t)address % 16 != 0 || (type != 6 && type != 9) || rank != 3 || interleave != 0 ||
        swizzle < 0 || swizzle > 3 || promotion < 0 || promotion > 3 || fill != 0)
        return end(breach(CUDA_ERROR_INVALID_VALUE, "cuTensorMapEncodeTiled: alignment, type, rank or modes"));
    for (i = 0; i < 3; i++)
        if (dims[i] < 1 || dims[i] > (uint64_t)1 << 32 || box[i] < 1 || box[i] > 256 || element_strides[i] < 1 ||
            element_strides[i] > 8)
            return end(breach(CUDA_ERROR_INVALID_VALUE, "cuTensorMapEncodeTiled: dimension %u", (unsigned int)i));
    for (i = 0; i < 2; i++)
        if (strides[i] % 16 != 0 || strides[i] >= (uint64_t)1 << 40)
            return end(breach(CUDA_ERROR_INVALID_VALUE, "cuTensorMapEncodeTiled: stride %u", (unsigned int)i));
    if (box[0] * 2 % 16 != 0 || (swizzle != 0 && box[0] * 2 > 16u << swizzle))
        return end(breach(CUDA_ERROR_INVALID_VALUE, "cuTensorMapEncodeTiled: a box's row"));
    memset(&made, 0, sizeof made);
    made.magic = FAKE_CUDA_TENSOR_MAP_MAGIC;
    made.address = (uintptr_t)address;
    memcpy(made.dims, dims, sizeof made.dims);
    memcpy(made.strides, strides, sizeof made.strides);
    memcpy(made.box, box, sizeof made.box);
    made.type = (uint32_t)type;
    made.swizzle = (uint32_t)swizzle;
    made.promotion = (uint32_t)promotion;
    memset(map, 0, 128);
    memcpy(map, &made, sizeof made);
    return end(CUDA_SUCCESS);
}

/* CUlaunchAttribute and CUlaunchConfig, for the one attribute that is asked for. */
typedef struct launch_attribute {
    int id; /* 6: programmatic stream serialization */
    char padding[4];
    union {
        int allowed;
        char bytes[64];
    } value;
} launch_attribute;

typedef struct launch_config {
    unsigned int grid[3], block[3], shared_bytes;
    void *stream;
    const launch_attribute *attributes;
    unsigned int num_attributes;
} launch_config;

FAKE_CUDA_API CUresult cuLaunchKernelEx(const launch_config *config, void *handle, void **parameters, void **extra) {
    CUresult result = begin("cuLaunchKernelEx", NEEDS_CONTEXT);
    function *f = valid_function(handle);
    fake_cuda_launch record;
    int captured, i;
    if (result == CUDA_SUCCESS) result = use_stream("cuLaunchKernelEx", config->stream, &captured);
    if (result != CUDA_SUCCESS) return end(result);
    if (f == NULL) return end(breach(CUDA_ERROR_INVALID_HANDLE, "cuLaunchKernelEx of a function that does not exist"));
    if (f->module->owner != current())
        return end(breach(CUDA_ERROR_INVALID_CONTEXT, "cuLaunchKernelEx of another context's function"));
    for (i = 0; i < 3; i++)
        if (config->grid[i] < 1 || config->grid[i] > (i == 0 ? 0x7fffffffu : 65535u) || config->block[i] < 1)
            return end(breach(CUDA_ERROR_INVALID_VALUE, "cuLaunchKernelEx: grid or block"));
    if ((uint64_t)config->block[0] * config->block[1] * config->block[2] > 1024)
        return end(breach(CUDA_ERROR_INVALID_VALUE, "cuLaunchKernelEx: over 1024 threads"));
    if (config->shared_bytes > (unsigned int)f->shared_limit)
        return end(breach(CUDA_ERROR_INVALID_VALUE, "cuLaunchKernelEx: %u bytes of shared memory over %d", config->shared_bytes,
                          f->shared_limit));
    if (parameters == NULL || parameters[0] == NULL || extra != NULL || machine.parameter_bytes > FAKE_CUDA_PARAMETER_BYTES)
        return end(breach(CUDA_ERROR_INVALID_VALUE, "cuLaunchKernelEx: parameters"));
    if (config->num_attributes > 1 ||
        (config->num_attributes == 1 && (config->attributes == NULL || config->attributes[0].id != 6)))
        return end(breach(CUDA_ERROR_INVALID_VALUE, "cuLaunchKernelEx: attributes"));
    memset(&record, 0, sizeof record);
    memcpy(record.kernel, f->name, sizeof record.kernel);
    memcpy(record.grid, config->grid, sizeof record.grid);
    memcpy(record.block, config->block, sizeof record.block);
    record.shared_bytes = config->shared_bytes;
    record.dependent = config->num_attributes == 1 && config->attributes[0].value.allowed != 0;
    record.stream = config->stream;
    record.context = current();
    record.captured = captured;
    memcpy(record.parameters, parameters[0], machine.parameter_bytes);
    if (num_launches < MAX_RECORDS) launches[num_launches] = record;
    num_launches++;
    if (captured) valid_stream(config->stream)->captured_kernels++;
#if !defined(_WIN32)
    if (!captured && emulated()) fake_cuda_run(f->name, parameters[0], config->grid[0], config->block[0]);
#endif
    return end(CUDA_SUCCESS);
}

/* ---- graphs and their times, for tools/cuda_graph.c: every kernel of a replay takes a microsecond */

typedef struct graph {
    int kernels;
} graph;

typedef struct event {
    double milliseconds;
} event;

static double milliseconds; /* of all replays */

static CUresult make(const char *call, size_t bytes, void **handle) {
    CUresult result = begin(call, NEEDS_CONTEXT);
    if (result == CUDA_SUCCESS && (*handle = calloc(1, bytes)) == NULL) result = CUDA_ERROR_OUT_OF_MEMORY;
    return end(result);
}

static CUresult destroy(const char *call, void *handle) {
    CUresult result = begin(call, NEEDS_CONTEXT);
    free(handle);
    return end(result);
}

FAKE_CUDA_API CUresult cuStreamCreate(void **handle, unsigned int flags) {
    CUresult result = begin("cuStreamCreate", NEEDS_CONTEXT);
    (void)flags;
    if (result != CUDA_SUCCESS) return end(result);
    if (num_streams == MAX_OBJECTS) return end(CUDA_ERROR_OUT_OF_MEMORY);
    streams[num_streams].owner = current();
    streams[num_streams].alive = 1;
    *handle = &streams[num_streams++];
    return end(CUDA_SUCCESS);
}

FAKE_CUDA_API CUresult cuStreamDestroy_v2(void *handle) {
    CUresult result = begin("cuStreamDestroy_v2", NEEDS_CONTEXT);
    if (result != CUDA_SUCCESS && !injected) return end(result);
    if (valid_stream(handle) == NULL) return end(breach(CUDA_ERROR_INVALID_HANDLE, "cuStreamDestroy of no stream"));
    valid_stream(handle)->alive = 0;
    return end(result);
}

FAKE_CUDA_API CUresult cuStreamBeginCapture_v2(void *handle, int mode) {
    CUresult result = begin("cuStreamBeginCapture_v2", NEEDS_CONTEXT);
    (void)mode;
    if (result != CUDA_SUCCESS) return end(result);
    if (valid_stream(handle) == NULL || valid_stream(handle)->capture != 0)
        return end(breach(CUDA_ERROR_INVALID_VALUE, "cuStreamBeginCapture of no stream, or one that is captured"));
    valid_stream(handle)->capture = 1;
    valid_stream(handle)->captured_kernels = 0;
    return end(CUDA_SUCCESS);
}

FAKE_CUDA_API CUresult cuStreamEndCapture(void *handle, void **graph_handle) {
    CUresult result = begin("cuStreamEndCapture", NEEDS_CONTEXT);
    stream *s = valid_stream(handle);
    graph *made;
    if (result != CUDA_SUCCESS) return end(result);
    if (s == NULL || s->capture == 0) return end(breach(CUDA_ERROR_INVALID_VALUE, "cuStreamEndCapture of no capture"));
    result = s->capture == 1 ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    s->capture = 0;
    if (result != CUDA_SUCCESS) return end(result);
    made = (graph *)calloc(1, sizeof *made);
    if (made == NULL) return end(CUDA_ERROR_OUT_OF_MEMORY);
    made->kernels = s->captured_kernels;
    *graph_handle = made;
    return end(CUDA_SUCCESS);
}

FAKE_CUDA_API CUresult cuGraphInstantiateWithFlags(void **handle, void *graph_handle, unsigned long long flags) {
    CUresult result = make("cuGraphInstantiateWithFlags", sizeof(graph), handle);
    (void)flags;
    if (result == CUDA_SUCCESS) *(graph *)*handle = *(graph *)graph_handle;
    return result;
}

FAKE_CUDA_API CUresult cuGraphLaunch(void *handle, void *stream_handle) {
    CUresult result = begin("cuGraphLaunch", NEEDS_CONTEXT);
    int captured;
    if (result == CUDA_SUCCESS) result = use_stream("cuGraphLaunch", stream_handle, &captured);
    if (result == CUDA_SUCCESS) milliseconds += 1e-3 * ((graph *)handle)->kernels;
    return end(result);
}

FAKE_CUDA_API CUresult cuGraphExecDestroy(void *handle) { return destroy("cuGraphExecDestroy", handle); }
FAKE_CUDA_API CUresult cuGraphDestroy(void *handle) { return destroy("cuGraphDestroy", handle); }

FAKE_CUDA_API CUresult cuEventCreate(void **handle, unsigned int flags) {
    (void)flags;
    return make("cuEventCreate", sizeof(event), handle);
}

FAKE_CUDA_API CUresult cuEventDestroy_v2(void *handle) { return destroy("cuEventDestroy_v2", handle); }

FAKE_CUDA_API CUresult cuEventRecord(void *handle, void *stream_handle) {
    CUresult result = begin("cuEventRecord", NEEDS_CONTEXT);
    int captured;
    if (result == CUDA_SUCCESS) result = use_stream("cuEventRecord", stream_handle, &captured);
    if (result == CUDA_SUCCESS) ((event *)handle)->milliseconds = milliseconds;
    return end(result);
}

FAKE_CUDA_API CUresult cuEventSynchronize(void *handle) {
    (void)handle;
    return end(begin("cuEventSynchronize", NEEDS_CONTEXT));
}

FAKE_CUDA_API CUresult cuEventElapsedTime(float *elapsed, void *start, void *stop) {
    CUresult result = begin("cuEventElapsedTime", NEEDS_CONTEXT);
    if (result == CUDA_SUCCESS) *elapsed = (float)(((event *)stop)->milliseconds - ((event *)start)->milliseconds);
    return end(result);
}

/* ---- the test's side; none of it counts as a call */

FAKE_CUDA_API void fake_cuda_reset(void) {
    pthread_mutex_lock(&mutex);
    machine = h200;
    calls = num_launches = num_copies = 0;
    failed_call[0] = misuse[0] = '\0';
    pthread_mutex_unlock(&mutex);
}

FAKE_CUDA_API fake_cuda_machine *fake_cuda_settings(void) { return &machine; }
FAKE_CUDA_API int fake_cuda_calls(void) { return calls; }
FAKE_CUDA_API const char *fake_cuda_failed_call(void) { return failed_call; }
FAKE_CUDA_API const char *fake_cuda_misuse(void) { return misuse; }
FAKE_CUDA_API int fake_cuda_launches(void) { return num_launches; }
FAKE_CUDA_API fake_cuda_launch fake_cuda_launch_at(int index) { return launches[index]; }
FAKE_CUDA_API int fake_cuda_copies(void) { return num_copies; }
FAKE_CUDA_API fake_cuda_copy fake_cuda_copy_at(int index) { return copies[index]; }

FAKE_CUDA_API fake_cuda_census fake_cuda_count(void) {
    fake_cuda_census census;
    allocation *a;
    int i;
    memset(&census, 0, sizeof census);
    pthread_mutex_lock(&mutex);
    for (a = allocations; a != NULL; a = a->next) {
        census.allocations++;
        census.bytes += a->bytes;
    }
    for (i = 0; i < num_modules; i++) census.modules += modules[i].alive;
    for (i = 0; i < MAX_DEVICES; i++) census.retains += primaries[i].retains;
    census.stack = depth;
    pthread_mutex_unlock(&mutex);
    return census;
}

FAKE_CUDA_API void *fake_cuda_context_create(int device) {
    context *c;
    pthread_mutex_lock(&mutex);
    initialised = 1;
    c = &contexts[num_contexts++];
    c->device = device;
    c->alive = 1;
    pthread_mutex_unlock(&mutex);
    return c;
}

FAKE_CUDA_API void fake_cuda_context_destroy(void *handle) {
    pthread_mutex_lock(&mutex);
    drop_context((context *)handle);
    pthread_mutex_unlock(&mutex);
}

FAKE_CUDA_API void *fake_cuda_primary_context(int device) { return &primaries[device]; }
FAKE_CUDA_API void fake_cuda_push(void *handle) { stack[depth++] = (context *)handle; }
FAKE_CUDA_API void fake_cuda_pop(void) { depth--; }
FAKE_CUDA_API void *fake_cuda_current(void) { return current(); }

FAKE_CUDA_API void *fake_cuda_stream_create(void *handle) {
    stream *s;
    pthread_mutex_lock(&mutex);
    s = &streams[num_streams++];
    s->owner = (context *)handle;
    s->alive = 1;
    pthread_mutex_unlock(&mutex);
    return s;
}

FAKE_CUDA_API void fake_cuda_stream_destroy(void *handle) {
    pthread_mutex_lock(&mutex);
    ((stream *)handle)->alive = 0;
    pthread_mutex_unlock(&mutex);
}

FAKE_CUDA_API void fake_cuda_capture_begin(void *handle) {
    pthread_mutex_lock(&mutex);
    ((stream *)handle)->capture = 1;
    pthread_mutex_unlock(&mutex);
}

FAKE_CUDA_API int fake_cuda_capture_end(void *handle) {
    int whole;
    pthread_mutex_lock(&mutex);
    whole = ((stream *)handle)->capture == 1;
    ((stream *)handle)->capture = 0;
    pthread_mutex_unlock(&mutex);
    return whole;
}
