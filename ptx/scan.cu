/* The first states of a cut sequence's segments, in order: a segment's place in the workspace holds its last state as kernel states left
   it, and holds its first state afterwards, where the forward will read it: for the first segment and for every exact one. The maths
   and the shared memory: scan_step.h.

   h0 is copied here, since the forward's last segment may write ht over it before the first has started. */
#include "scan_step.h"

extern "C" __global__ void __launch_bounds__(FQLA__SCAN_THREADS, 1) scan(const __grid_constant__ fqla__aligned_params params) {
    const fqla__forward_params &p = params.values;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    ScanShared &s = *(ScanShared *)shared_bytes;
    const int thread = (int)threadIdx.x;
    const int64_t tasks = p.table->cut * p.heads_v * QUARTERS;
    Ring ring = {0, 0};

    grid_launch_dependents();
    if (blockIdx.x >= tasks && blockIdx.x > 0) return; /* as in states.cu */
    if (thread == 0) init_steps(s);
    for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
        const int64_t number = first_of_cut(p.table, task / QUARTERS / p.heads_v);
        Segment segment;
        find_segment(p, number, (int)(task / QUARTERS % p.heads_v), false, &segment);
        grid_wait();
        if (!segment.padding) scan_quarter<false, false>(p, s, p.states, segment, number, (int)(task % QUARTERS), true, ring, thread);
        __syncthreads();
    }
    grid_wait(); /* without a task too: the next kernel takes this one's end for that of all before it */
}
