/* One row of the benchmark: its inputs made, its plan, its time. */
#ifndef BENCH_TIME_H
#define BENCH_TIME_H

#include "bench_rows.h"
#include "command.h"
#include "cuda_graph.h"

typedef struct timing {
    double seconds;
    fqla_plan_summary plan;
} timing;

/* On a GPU (graph not NULL): bf16, a CUDA graph of 10 calls, median of 7 replays. On the CPU: float32, median of 7 measurements
   of 2 ms or more, fewer where they would take longer than 3 seconds. Any status but FQLA_OK: error holds one line. */
fqla_status bench_time(library *lib, cuda_graph *graph, const row *r, timing *t, char *error);

#endif
