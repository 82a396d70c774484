/* A CUDA graph of calls, timed: what a benchmark needs of the driver beyond the library. No CUDA header, no CUDA toolkit. */
#ifndef CUDA_GRAPH_H
#define CUDA_GRAPH_H

#include "error.h"
#include "flashqla.h"

typedef struct cuda_graph cuda_graph;

/* Open the driver, and a stream in the primary context of the device, which stays current until the close. NULL: see error. */
cuda_graph *cuda_graph_open(int device, char *error);
void cuda_graph_close(cuda_graph *graph);

/* Capture `calls` calls, replay them a few times to warm up and `replays` times, and give the median seconds of a call.
   FQLA_ERROR_DRIVER: error holds a line. Any other status is what call returned. */
typedef fqla_status (*cuda_graph_call)(void *user, fqla_stream stream);
fqla_status cuda_graph_time(cuda_graph *graph, cuda_graph_call call, void *user, int calls, int replays, double *seconds,
                            char *error);

#endif
