/* One row of the benchmark: its inputs made once, and the time of any plan for it. */
#ifndef BENCH_TIME_H
#define BENCH_TIME_H

#include "bench_rows.h"
#include "command.h"
#include "cuda_graph.h"

typedef struct timing {
    double seconds;
    fqla_plan_summary plan;
} timing;

/* How a plan spreads its work over a GPU: the fields of plan_desc. Zeros: the plan chooses. low_memory: of bwd rows alone. */
typedef struct spread {
    int32_t v_split, segment_chunks, low_memory;
} spread;

/* A row's inputs and outputs on the device, for one plan after the other. lib and the row outlive them.
   Any status but FQLA_OK, of these functions: error holds one line. What has no plan is refused before anything is made. */
typedef struct bench_inputs bench_inputs;
fqla_status bench_inputs_make(library *lib, cuda_graph *graph, const row *r, bench_inputs **inputs, char *error);
void bench_inputs_free(bench_inputs *inputs);

/* On a GPU (graph not NULL): bf16, a CUDA graph of 10 calls, median of 7 replays. On the CPU: float32, median of 7 measurements
   of 2 ms or more, fewer where they would take longer than 3 seconds. */
fqla_status bench_time(bench_inputs *inputs, spread s, timing *t, char *error);

#endif
