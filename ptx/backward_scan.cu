/* What a cut sequence's segments start from in the backward, forwards and backwards: kernel scan for both directions. A segment's
   place in the workspace holds what the first pass of kernel backward_chains has left, and afterwards what the segment starts from,
   where that is exact (backward_segment.h). Step f is segment f forwards and `segments` - 1 - f backwards. The maths and the shared
   memory: scan_step.h. The first step starts from what the first pass has had: it is not asked for. */
#include "../src/cuda_backward_params.h"
#include "scan_step.h"

extern "C" __global__ void __launch_bounds__(FQLA__SCAN_THREADS, 1)
    backward_scan(const __grid_constant__ fqla__aligned_backward_params params) {
    enum { PARTS = QUARTERS * 2 };
    const fqla__backward_params &p = params.values;
    const fqla__forward_params &f = p.forward;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    ScanShared &s = *(ScanShared *)shared_bytes;
    const int thread = (int)threadIdx.x;
    const int64_t tasks = f.table->cut * f.heads_v * PARTS;
    Ring ring = {0, 0};

    grid_launch_dependents();
    if (thread == 0) init_steps(s);
    for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
        const int64_t number = first_of_cut(f.table, task / PARTS / f.heads_v);
        const int quarter = (int)(task / 2 % QUARTERS);
        Segment segment;
        find_segment(f, number, (int)(task / PARTS % f.heads_v), false, &segment);
        if (task % 2 == 1) scan_quarter<true, true>(f, s, p.gradients, segment, number, quarter, false, ring, thread);
        else scan_quarter<false, true>(f, s, f.states, segment, number, quarter, false, ring, thread);
        __syncthreads();
    }
    if (blockIdx.x == 0) grid_wait(); /* without a task too: the next kernel takes this one's end for that of all before it */
}
