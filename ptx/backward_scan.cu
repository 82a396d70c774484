/* What a cut sequence's segments start from in the backward, forwards and backwards: kernel scan for both directions. A segment's
   place in the workspace holds what the first pass of kernel backward_chains has left, and afterwards what the segment starts from,
   where that is exact (backward_segment.h). In the order of the direction, f the step, segment f forwards and `segments` - 1 - f
   backwards:

       S_{f+1}  = last state of f                        where f is the first or warm
                = S_loc_f + M_f S_f                      where f is exact
       dS_{f+1} = the same with dS_loc and M^T

   M is fp16, and so is S, each row of S^T divided by a power of two that brings it to at most 1 (scan.cu). M lies transposed: the
   tiles are the right operand along their rows forwards, and across them backwards.

   A block is a direction and half of the columns of a sequence's v-head: one warpgroup, S^T in registers (state.h). Shared memory:
   scan_step.h. */
#include "backward_segment.h"
#include "grid.h"
#include "scan_step.h"

static_assert(FQLA__BACKWARD_SCAN_THREADS == WARPGROUP, "one warpgroup");
static_assert(sizeof(ScanShared) == FQLA__BACKWARD_SCAN_SHARED_BYTES, "what the host asks for");

static __device__ __forceinline__ void load_step(ScanShared &s, const fqla__kept_state *last,
                                                 const fqla__kept_transition *transition, int half, bool exact, int slot) {
    StepSlot &to = s.step[slot];
    mbarrier_arrive_expect(&s.full[slot], (exact ? sizeof *transition : 0) + sizeof to.last);
    if (exact) bulk_load(to.transition, transition, sizeof *transition, &s.full[slot]);
    bulk_load(to.last, last->values[half], sizeof to.last, &s.full[slot]);
}

/* state = S_loc + M S, or with M's transpose. m: its units. */
template <bool reverse>
static __device__ __forceinline__ void carry_over(float (&state)[64], const float (&last)[64], uint32_t m) {
    uint32_t packed[32];
    float scale[2];
    pack_rows(state, packed, scale);
    wgmma_fence();
    if (reverse) {
        float d[2][32];
        multiply_rows(d[0], packed, m);
        multiply_rows(d[1], packed, m + 2 * TILE_UNITS);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_settle(d[0]);
        wgmma_settle(d[1]);
#pragma unroll
        for (int i = 0; i < 64; i++) state[i] = last[i] + scale[i / 2 % 2] * d[i / 32][i % 32];
    } else {
        float d[64];
        clear_state(d);
        multiply_transition(d, packed, m);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_settle(d);
#pragma unroll
        for (int i = 0; i < 64; i++) state[i] = last[i] + scale[i / 2 % 2] * d[i];
    }
}

/* first: the sequence's first segment's entry in the workspace; step f's lies (reverse ? segments - 1 - f : f) * heads on. */
template <bool reverse>
static __device__ void walk(const fqla__forward_params &p, ScanShared &s, fqla__kept_state *states, int64_t first, int segments,
                            int half, int thread) {
    const int64_t heads = p.heads_v;
    int wanted = next_wanted(s, 0, segments), loading = wanted; /* by every thread; only the first loads */
    float state[64], last[64];
    clear_state(state);
    for (int i = 0; i < SLOTS && loading < segments; i++, loading = next_wanted(s, loading + 1, segments))
        if (thread == 0) {
            const int64_t entry = first + (reverse ? segments - 1 - loading : loading) * heads;
            load_step(s, &states[entry], &p.transitions[entry], half, s.exact[loading], i);
        }
    __syncwarp();
    for (int f = 0, done = 0; f < segments; f++) {
        fqla__kept_state *place = &states[first + (reverse ? segments - 1 - f : f) * heads];
        const bool exact = s.exact[f];
        if (f != wanted) {
            if (exact) store_kept(state, place, half, thread);
            continue;
        }
        const int slot = done % SLOTS;
        mbarrier_wait(&s.full[slot], done / SLOTS % 2);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 16; i++) *(float4 *)&last[4 * i] = *(const float4 *)s.step[slot].last[i][thread];
        if (exact) {
            store_kept(state, place, half, thread);
            carry_over<reverse>(state, last, shared_units(s.step[slot].transition));
        } else {
#pragma unroll
            for (int i = 0; i < 64; i++) state[i] = last[i];
        }
        __syncthreads(); /* the slot is read */
        if (loading < segments && thread == 0) {
            const int64_t entry = first + (reverse ? segments - 1 - loading : loading) * heads;
            load_step(s, &states[entry], &p.transitions[entry], half, s.exact[loading], slot);
        }
        __syncwarp();
        loading = next_wanted(s, loading + 1, segments);
        wanted = next_wanted(s, f + 1, segments);
        done++;
    }
}

extern "C" __global__ void __launch_bounds__(FQLA__BACKWARD_SCAN_THREADS, 1)
    backward_scan(const __grid_constant__ fqla__aligned_backward_params params) {
    const fqla__backward_params &p = params.values;
    const fqla__forward_params &f = p.forward;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    ScanShared &s = *(ScanShared *)shared_bytes;
    const bool reverse = blockIdx.x % 2 == 1;
    const int half = (int)(blockIdx.x / 2 % HALVES), head = (int)(blockIdx.x / 4 % (uint32_t)f.heads_v);
    const int thread = (int)threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    const int64_t number = blockIdx.x / 4 / (uint32_t)f.heads_v;
    Segment segment;

    grid_launch_dependents();
    grid_wait();
    if (number >= f.table->kept) return;
    find_segment(f, number, head, false, &segment);
    if (segment.index > 0) return;
    const int segments = segment.segments, chunks = (int)f.table->segment_chunks;

    if (thread == 0) {
        for (int i = 0; i < SLOTS; i++) mbarrier_init(&s.full[i], 1);
        mbarrier_init_fence();
        s.exact[0] = s.exact[segments] = 0;
    }
    for (int i = 1 + warp; i < segments; i += WARPGROUP / WARP) {
        const int warm = reverse ? warm_down_chunks(f, segment, (segments - i) * chunks, lane)
                                 : warm_up_chunks(f, segment, i * chunks, lane);
        if (lane == 0) s.exact[i] = warm == 0;
    }
    __syncthreads();
    const int64_t first = number * f.heads_v + head;
    if (reverse) walk<true>(f, s, p.gradients, first, segments, half, thread);
    else walk<false>(f, s, f.states, first, segments, half, thread);
}
