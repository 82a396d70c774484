/* What a cut sequence's segments start from in the backward, forwards and backwards: kernel scan for both directions. A segment's
   place in the workspace holds what the first pass of kernel backward_chains has left, and afterwards what the segment starts from,
   where that is exact (backward_segment.h). Step f is segment f forwards and `segments` - 1 - f backwards. The maths and the shared
   memory: scan_step.h. The first step starts from what the first pass has had: it is not asked for.

   A block is a direction and a quarter of the columns of a sequence's v-head. */
#include "backward_segment.h"
#include "grid.h"
#include "scan_step.h"

static_assert(FQLA__BACKWARD_SCAN_THREADS == FQLA__SCAN_THREADS, "one kernel's steps");
static_assert(FQLA__BACKWARD_SCAN_SHARED_BYTES == FQLA__SCAN_SHARED_BYTES, "and their shared memory");

extern "C" __global__ void __launch_bounds__(FQLA__BACKWARD_SCAN_THREADS, 1)
    backward_scan(const __grid_constant__ fqla__aligned_backward_params params) {
    const fqla__backward_params &p = params.values;
    const fqla__forward_params &f = p.forward;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    ScanShared &s = *(ScanShared *)shared_bytes;
    const bool reverse = blockIdx.x % 2 == 1;
    const int quarter = (int)(blockIdx.x / 2 % QUARTERS), head = (int)(blockIdx.x / 2 / QUARTERS % (uint32_t)f.heads_v);
    const int thread = (int)threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    const int64_t number = blockIdx.x / 2 / QUARTERS / (uint32_t)f.heads_v;
    Segment segment;

    grid_launch_dependents();
    grid_wait();
    if (number >= f.table->kept) return;
    find_segment(f, number, head, false, &segment);
    if (segment.index > 0) return;
    const int segments = segment.segments, chunks = (int)f.table->segment_chunks;
    const int64_t apart = reverse ? -f.heads_v : f.heads_v;
    const int64_t first = (number + (reverse ? segments - 1 : 0)) * f.heads_v + head;
    const Steps steps = {&(reverse ? p.gradients : f.states)[first], &f.transitions[first], apart, segments, quarter};

    if (thread == 0) {
        init_steps(s);
        s.exact[0] = s.exact[segments] = 0;
    }
    for (int i = 1 + warp; i < segments; i += FQLA__SCAN_THREADS / WARP) {
        const int warm = reverse ? warm_down_chunks(f, segment, (segments - i) * chunks, lane)
                                 : warm_up_chunks(f, segment, i * chunks, lane);
        if (lane == 0) s.exact[i] = warm == 0;
    }
    __syncthreads();
    if (warp == LOADER_WARP) {
        if (lane == 0) load_steps(s, steps);
        return;
    }
    float state[16];
#pragma unroll
    for (int i = 0; i < 16; i++) state[i] = 0.0f;
    if (reverse) run_steps<true>(s, steps, state, false, thread);
    else run_steps<false>(s, steps, state, false, thread);
}
