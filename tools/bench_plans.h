/* flashqla bench --all-plans: how good is the plan's own choice? */
#ifndef BENCH_PLANS_H
#define BENCH_PLANS_H

#include "bench_time.h"

/* Time every way in which a plan can spread each fwd row over the GPU, and print them; json: a line each too, or NULL.
   True: every fwd row was timed. */
bool bench_plans(library *lib, cuda_graph *graph, const row_list *rows, FILE *json);

#endif
