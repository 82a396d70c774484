/* The first states of a cut sequence's segments, in order: a segment's place in the workspace holds its last state as kernel states left
   it, and holds its first state afterwards, where the forward will read it: for the first segment and for every exact one. The maths
   and the shared memory: scan_step.h.

   h0 is copied here, since the forward's last segment may write ht over it before the first has started. */
#include "grid.h"
#include "scan_step.h"
#include "state.h"

static __device__ __forceinline__ void load_given(const fqla__forward_params &p, float (&state)[16], int64_t entry, int quarter, int thread) {
    const Part part = find_part(thread);
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const int k = part.k + i / 2 % 2 * 8, v = quarter * COLUMNS + part.v + part_v(i);
        const int64_t at = entry * DIM * DIM + (p.state_layout == 1 ? v * DIM + k : k * DIM + v); /* 1: FQLA_STATE_VK */
        state[i] = p.state_bf16 ? from_bf16(((const uint16_t *)p.h0)[at]) : ((const float *)p.h0)[at];
    }
}

/* A quarter of a sequence's v-head. By all threads. */
static __device__ __forceinline__ void scan_quarter(const fqla__forward_params &p, ScanShared &s, const Segment &segment, int64_t number,
                                                    int quarter, Ring &ring, int thread) {
    const int warp = thread / WARP, lane = thread % WARP, segments = segment.segments, chunks = (int)p.table->segment_chunks;
    const int64_t first = number * p.heads_v + segment.head;
    for (int f = 1 + warp; f < segments; f += FQLA__SCAN_THREADS / WARP) {
        const int warm_up = warm_up_chunks(p, segment, f * chunks, lane);
        if (lane == 0) s.exact[f] = warm_up == 0;
    }
    __syncthreads();
    const Steps steps = {&p.states[first], &p.transitions[first], p.heads_v, exact_steps(s, segments, lane), segments, quarter};
    if (warp == LOADER_WARP) {
        if (lane == 0) load_steps(s, steps, ring);
        return;
    }
    float state[16];
    if (segment.in >= 0) {
        load_given(p, state, segment.in, quarter, thread);
    } else {
#pragma unroll
        for (int i = 0; i < 16; i++) state[i] = 0.0f;
    }
    run_steps<false>(s, steps, ring, state, true, thread);
}

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
        if (!segment.padding) scan_quarter(p, s, segment, number, (int)(task % QUARTERS), ring, thread);
        __syncthreads();
    }
    grid_wait();
}
