/* The first states of a cut sequence's segments, in order: a segment's place in the workspace holds its last state as kernel states left
   it, and holds its first state afterwards, where the forward will read it: for the first segment and for every exact one.

       S_0 = h0      S_{f+1} = last state of f                   where f is the first or warm
                     S_{f+1} = S_loc_f + M_f S_f                 where f is exact

   M is fp16, and so is S, each row of S^T divided by a power of two that brings it to at most 1: a product loses 2e-4, an eighth of what
   a chunk's bfloat16 operands lose. h0 is copied here, since the forward's last segment may write ht over it before the first has started.

   A block is half of the columns of a sequence's v-head: one warpgroup, S^T in registers (state.h). Shared memory: scan_step.h. */
#include "grid.h"
#include "scan_step.h"

enum { STATE_COLUMNS = 64 };
static_assert(FQLA__SCAN_THREADS == WARPGROUP, "one warpgroup");

static_assert(sizeof(ScanShared) == FQLA__SCAN_SHARED_BYTES, "what the host asks for");

static __device__ __forceinline__ void load_step(const fqla__forward_params &p, ScanShared &s, int64_t entry, int half, bool exact, int slot) {
    StepSlot &to = s.step[slot];
    mbarrier_arrive_expect(&s.full[slot], (exact ? sizeof(fqla__kept_transition) : 0) + sizeof to.last);
    if (exact) bulk_load(to.transition, &p.transitions[entry], sizeof(fqla__kept_transition), &s.full[slot]);
    bulk_load(to.last, p.states[entry].values[half], sizeof to.last, &s.full[slot]);
}

extern "C" __global__ void __launch_bounds__(FQLA__SCAN_THREADS, 1) scan(const __grid_constant__ fqla__aligned_params params) {
    const fqla__forward_params &p = params.values;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    ScanShared &s = *(ScanShared *)shared_bytes;
    const int half = (int)(blockIdx.x % 2), head = (int)(blockIdx.x / 2 % (uint32_t)p.heads_v);
    const int thread = (int)threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    const int64_t number = blockIdx.x / 2 / (uint32_t)p.heads_v;
    Segment segment;

    grid_launch_dependents();
    if (number >= p.table->kept && blockIdx.x > 0) return; /* as in states.cu */
    grid_wait();
    if (number >= p.table->kept) return;
    find_segment(p, number, head, false, &segment);
    if (segment.index > 0 || segment.padding) return;
    const int segments = segment.segments, step = (int)p.table->segment_chunks;
    const int64_t first = number * p.heads_v + head; /* a segment's entry: first + f * heads_v */

    if (thread == 0) {
        for (int i = 0; i < SLOTS; i++) mbarrier_init(&s.full[i], 1);
        mbarrier_init_fence();
        s.exact[0] = s.exact[segments] = 0;
    }
    for (int f = 1 + warp; f < segments; f += WARPGROUP / WARP) {
        const int warm_up = warm_up_chunks(p, segment, f * step, lane);
        if (lane == 0) s.exact[f] = warm_up == 0;
    }
    __syncthreads();

    int wanted = next_wanted(s, 0, segments), loading = wanted; /* by every thread; only the first loads */
    for (int slot = 0; slot < SLOTS && loading < segments; slot++, loading = next_wanted(s, loading + 1, segments))
        if (thread == 0) load_step(p, s, first + loading * p.heads_v, half, s.exact[loading], slot);

    float state[64], last[64];
    if (segment.in >= 0) load_state(state, p.h0, segment.in, state_place(p, half * STATE_COLUMNS, thread));
    else clear_state(state);
    for (int f = 0, done = 0; f < segments; f++) {
        fqla__kept_state *place = &p.states[first + f * p.heads_v];
        const bool exact = s.exact[f];
        if (f != wanted) {
            if (f == 0 || exact) store_kept(state, place, half, thread);
            continue;
        }
        const int slot = done % SLOTS;
        mbarrier_wait(&s.full[slot], done / SLOTS % 2);
#pragma unroll
        for (int i = 0; i < 16; i++) *(float4 *)&last[4 * i] = *(const float4 *)s.step[slot].last[i][thread];
        if (f == 0 || exact) store_kept(state, place, half, thread);
        if (exact) {
            uint32_t packed[32];
            float scale[2];
            pack_rows(state, packed, scale);
            clear_state(state);
            wgmma_fence();
            multiply_transition(state, packed, shared_units(s.step[slot].transition));
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_settle(state);
#pragma unroll
            for (int i = 0; i < 64; i++) last[i] += scale[i / 2 % 2] * state[i];
        }
#pragma unroll
        for (int i = 0; i < 64; i++) state[i] = last[i];
        __syncthreads(); /* the slot is read */
        if (loading < segments && thread == 0) load_step(p, s, first + loading * p.heads_v, half, s.exact[loading], slot);
        loading = next_wanted(s, loading + 1, segments);
        wanted = next_wanted(s, f + 1, segments);
        done++;
    }
}
