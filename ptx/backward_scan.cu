/* What a cut sequence's segments start from in the backward, forwards and backwards: kernel scan for both directions. A segment's
   place in the workspace holds what the first pass of kernel backward_chains has left, and afterwards what the segment starts from,
   where that is exact (backward_segment.h). Step f is segment f forwards and `segments` - 1 - f backwards. The maths and the shared
   memory: scan_step.h. The first step starts from what the first pass has had: it is not asked for. */
#include "backward_segment.h"
#include "grid.h"
#include "scan_step.h"

static_assert(FQLA__BACKWARD_SCAN_THREADS == FQLA__SCAN_THREADS, "one kernel's steps");
static_assert(FQLA__BACKWARD_SCAN_SHARED_BYTES == FQLA__SCAN_SHARED_BYTES, "and their shared memory");

/* A direction and a quarter of a sequence's v-head. number: its first segment's. By all threads. */
template <bool reverse>
static __device__ __forceinline__ void scan_quarter(const fqla__forward_params &f, ScanShared &s, fqla__kept_state *states,
                                                    const Segment &segment, int64_t number, int quarter, Ring &ring, int thread) {
    const int warp = thread / WARP, lane = thread % WARP, segments = segment.segments, chunks = (int)f.table->segment_chunks;
    const int64_t first = (number + (reverse ? segments - 1 : 0)) * f.heads_v + segment.head;
    for (int i = 1 + warp; i < segments; i += FQLA__SCAN_THREADS / WARP) {
        const int warm = reverse ? warm_down_chunks(f, segment, (segments - i) * chunks, lane)
                                 : warm_up_chunks(f, segment, i * chunks, lane);
        if (lane == 0) s.exact[i] = warm == 0;
    }
    __syncthreads();
    const Steps steps = {&states[first], &f.transitions[first], reverse ? -f.heads_v : f.heads_v, exact_steps(s, segments, lane), segments,
                         quarter};
    if (warp == LOADER_WARP) {
        if (lane == 0) load_steps(s, steps, ring);
        return;
    }
    float state[16];
#pragma unroll
    for (int i = 0; i < 16; i++) state[i] = 0.0f;
    run_steps<reverse>(s, steps, ring, state, false, thread);
}

extern "C" __global__ void __launch_bounds__(FQLA__BACKWARD_SCAN_THREADS, 1)
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
        grid_wait();
        if (task % 2 == 1) scan_quarter<true>(f, s, p.gradients, segment, number, quarter, ring, thread);
        else scan_quarter<false>(f, s, f.states, segment, number, quarter, ring, thread);
        __syncthreads();
    }
    grid_wait();
}
