#include "cuda_graph.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The driver's functions, X(name, exported name, parameters); all return a CUresult, 0 for success. */
#define DRIVER_FUNCTIONS(X)                                                                         \
    X(init, "cuInit", (unsigned flags))                                                             \
    X(error_name, "cuGetErrorName", (int result, const char **name))                                \
    X(device_get, "cuDeviceGet", (int *device, int ordinal))                                        \
    X(context_retain, "cuDevicePrimaryCtxRetain", (void **context, int device))                     \
    X(context_release, "cuDevicePrimaryCtxRelease_v2", (int device))                                \
    X(context_push, "cuCtxPushCurrent_v2", (void *context))                                         \
    X(context_pop, "cuCtxPopCurrent_v2", (void **context))                                          \
    X(stream_create, "cuStreamCreate", (fqla_stream *stream, unsigned flags))                       \
    X(stream_destroy, "cuStreamDestroy_v2", (fqla_stream stream))                                   \
    X(capture_begin, "cuStreamBeginCapture_v2", (fqla_stream stream, int mode))                     \
    X(capture_end, "cuStreamEndCapture", (fqla_stream stream, void **graph))                        \
    X(instantiate, "cuGraphInstantiateWithFlags", (void **exec, void *graph, unsigned long long flags)) \
    X(launch, "cuGraphLaunch", (void *exec, fqla_stream stream))                                    \
    X(exec_destroy, "cuGraphExecDestroy", (void *exec))                                             \
    X(graph_destroy, "cuGraphDestroy", (void *graph))                                               \
    X(event_create, "cuEventCreate", (void **event, unsigned flags))                                \
    X(event_destroy, "cuEventDestroy_v2", (void *event))                                            \
    X(event_record, "cuEventRecord", (void *event, fqla_stream stream))                             \
    X(event_synchronize, "cuEventSynchronize", (void *event))                                       \
    X(event_elapsed, "cuEventElapsedTime", (float *milliseconds, void *start, void *end))

enum { STREAM_NON_BLOCKING = 1, CAPTURE_THREAD_LOCAL = 1, WARM_UP_REPLAYS = 3, MOST_REPLAYS = 64 };

struct cuda_graph {
    void *library;
#define X(name, symbol, parameters) int (*name) parameters;
    DRIVER_FUNCTIONS(X)
#undef X
    int device;
    void *context; /* NULL until it is current */
    fqla_stream stream;
    void *start, *end; /* events */
};

static bool load(cuda_graph *graph, char *error) {
    static const char *const symbols[] = {
#define X(name, symbol, parameters) symbol,
        DRIVER_FUNCTIONS(X)
#undef X
    };
    void *addresses[sizeof symbols / sizeof symbols[0]];
    size_t i;
    graph->library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (graph->library == NULL) return fail(error, "libcuda.so.1 cannot be opened");
    for (i = 0; i < sizeof symbols / sizeof symbols[0]; i++) {
        addresses[i] = dlsym(graph->library, symbols[i]);
        if (addresses[i] == NULL) return fail(error, "libcuda.so.1 has no %s", symbols[i]);
    }
    i = 0;
#define X(name, symbol, parameters) memcpy(&graph->name, &addresses[i++], sizeof addresses[0]);
    DRIVER_FUNCTIONS(X)
#undef X
    return true;
}

/* False and a line in error where a driver call failed. */
static bool succeeded(const cuda_graph *graph, const char *call, int result, char *error) {
    const char *name = NULL;
    if (result == 0) return true;
    graph->error_name(result, &name);
    return fail(error, "%s: %s", call, name != NULL ? name : "unknown error");
}

cuda_graph *cuda_graph_open(int device, char *error) {
    cuda_graph *graph = calloc(1, sizeof *graph);
    void *context = NULL;
    if (graph == NULL) {
        fail(error, "out of memory");
        return NULL;
    }
    if (!load(graph, error) || !succeeded(graph, "cuInit", graph->init(0), error) ||
        !succeeded(graph, "cuDeviceGet", graph->device_get(&graph->device, device), error) ||
        !succeeded(graph, "cuDevicePrimaryCtxRetain", graph->context_retain(&context, graph->device), error))
        goto fail;
    if (!succeeded(graph, "cuCtxPushCurrent", graph->context_push(context), error)) {
        graph->context_release(graph->device);
        goto fail;
    }
    graph->context = context;
    if (succeeded(graph, "cuStreamCreate", graph->stream_create(&graph->stream, STREAM_NON_BLOCKING), error) &&
        succeeded(graph, "cuEventCreate", graph->event_create(&graph->start, 0), error) &&
        succeeded(graph, "cuEventCreate", graph->event_create(&graph->end, 0), error))
        return graph;
fail:
    cuda_graph_close(graph);
    return NULL;
}

void cuda_graph_close(cuda_graph *graph) {
    void *popped;
    if (graph == NULL) return;
    if (graph->end != NULL) graph->event_destroy(graph->end);
    if (graph->start != NULL) graph->event_destroy(graph->start);
    if (graph->stream != NULL) graph->stream_destroy(graph->stream);
    if (graph->context != NULL) {
        graph->context_pop(&popped);
        graph->context_release(graph->device);
    }
    if (graph->library != NULL) dlclose(graph->library);
    free(graph);
}

static int compare_floats(const void *a, const void *b) {
    const float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

/* Milliseconds of `replays` replays, sorted. */
static bool replay(cuda_graph *graph, void *exec, int replays, float *times, char *error) {
    int i;
    for (i = -WARM_UP_REPLAYS; i < replays; i++) {
        float *time = &times[i < 0 ? 0 : i];
        if (!succeeded(graph, "cuEventRecord", graph->event_record(graph->start, graph->stream), error) ||
            !succeeded(graph, "cuGraphLaunch", graph->launch(exec, graph->stream), error) ||
            !succeeded(graph, "cuEventRecord", graph->event_record(graph->end, graph->stream), error) ||
            !succeeded(graph, "cuEventSynchronize", graph->event_synchronize(graph->end), error) ||
            !succeeded(graph, "cuEventElapsedTime", graph->event_elapsed(time, graph->start, graph->end), error))
            return false;
    }
    qsort(times, (size_t)replays, sizeof *times, compare_floats);
    return true;
}

fqla_status cuda_graph_time(cuda_graph *graph, cuda_graph_call call, void *user, int calls, int replays, double *seconds,
                            char *error) {
    void *captured = NULL, *exec = NULL;
    float times[MOST_REPLAYS];
    fqla_status status = FQLA_OK;
    bool ok;
    int i;
    if (replays > MOST_REPLAYS) replays = MOST_REPLAYS;
    if (!succeeded(graph, "cuStreamBeginCapture", graph->capture_begin(graph->stream, CAPTURE_THREAD_LOCAL), error))
        return FQLA_ERROR_DRIVER;
    for (i = 0; i < calls && status == FQLA_OK; i++) status = call(user, graph->stream);
    ok = succeeded(graph, "cuStreamEndCapture", graph->capture_end(graph->stream, &captured), error);
    if (status == FQLA_OK) {
        ok = ok && succeeded(graph, "cuGraphInstantiate", graph->instantiate(&exec, captured, 0), error) &&
             replay(graph, exec, replays, times, error);
        if (ok) *seconds = 1e-3 * times[replays / 2] / calls;
        else status = FQLA_ERROR_DRIVER;
    }
    if (exec != NULL) graph->exec_destroy(exec);
    if (captured != NULL) graph->graph_destroy(captured);
    return status;
}
