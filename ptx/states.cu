/* The first pass over cut sequences: a segment's last state and its transition, where the next segment is exact (segment.h).

   With S the state before the segment, its chunks make of it M S + S_loc. M is the same recurrence with v = 0 from the identity.
   A block is a half of the columns of one of the two:

       parts 0, 1   the last state of the segment, from h0 for a sequence's first segment, from zero some chunks early for a warm one;
                    for an exact one S_loc, from zero
       parts 2, 3   M of an exact one

   Roles: a state warpgroup (state.h), a warpgroup whose first thread loads. Two blocks a multiprocessor. O is not made, q not read.

   Shared memory: StatesShared below. Cost: LADDER.md. */
#include <stddef.h>

#include "grid.h"
#include "ring.h"
#include "segment.h"
#include "state.h"

enum { SLOTS = 3, STATE_REGISTERS = 200, LOADER_REGISTERS = 56, STATE_COLUMNS = 64 };
static_assert(FQLA__STATES_THREADS == 2 * WARPGROUP, "a warpgroup a role");
static_assert((STATE_REGISTERS + LOADER_REGISTERS) * WARPGROUP * 2 <= 65536, "two blocks a multiprocessor");

typedef struct __align__(1024) ChunkSlot {
    Tile k[2];             /* columns 0-63, 64-127 */
    Tile v;                /* the block's 64 columns */
    Square t;              /* T below its diagonal */
    fqla__factors factors;
} ChunkSlot;               /* 34 KB */

/* Chunk number i, counted from where the state starts, uses slot i % 3; the phase of its barriers is i / 3. */
typedef struct __align__(1024) StatesShared {
    ChunkSlot chunk[SLOTS]; /* 102 KB */
    Segment segment;
    int32_t start;          /* the chunk where the state starts */
    int32_t idle;           /* nothing to do */
    uint64_t full[SLOTS];   /* copy engine -> state */
    uint64_t done[SLOTS];   /* state -> loader */
} StatesShared;

static_assert(sizeof(StatesShared) == FQLA__STATES_SHARED_BYTES, "what the host asks for");
static_assert(2 * (sizeof(StatesShared) + 1024) <= 228 * 1024, "two blocks a multiprocessor");

static __device__ void run_loader(const fqla__forward_params &p, StatesShared &s, int first_v, bool with_v) {
    const Segment &segment = s.segment;
    const int numbers = segment.end - s.start;
    for (int number = 0; number < numbers; number++) {
        const int slot = number % SLOTS, chunk = s.start + number, row = (int32_t)(segment.row + (int64_t)chunk * CHUNK);
        ChunkSlot &to = s.chunk[slot];
        uint64_t *full = &s.full[slot];
        if (number >= SLOTS) mbarrier_wait(&s.done[slot], (number / SLOTS - 1) % 2);
        mbarrier_arrive_expect(full, (with_v ? 3 : 2) * (uint32_t)sizeof(Tile) + sizeof(fqla__prepared_chunk));
        for (int half = 0; half < 2; half++) tma_load(&to.k[half], &p.k, half * FQLA__LOAD_COLUMNS, row, segment.head_qk, full);
        load_prepared(&to.t, &to.factors, &p.prepared[(segment.chunk + chunk) * p.heads_v + segment.head], full);
        if (with_v) tma_load(&to.v, &p.v, first_v, row, segment.head, full);
    }
}

/* The state through all chunks. All are whole: a sequence's last segment is of no other's concern. The next chunk's K S0 is issued as
   soon as the state is there; after the last one's it is issued once more, of whatever lies in the slot, and not used. */
template <bool with_v> static __device__ __forceinline__ void walk(StatesShared &s, float (&state)[64], int numbers, int thread) {
    const Lane lane = find_lane(thread);
    const uint32_t first_slot = shared_units(s.chunk);
    Ring ring = {0, 0};
    float ks[32];
    uint32_t state16[32];
    numbers = uniform(numbers);
    pack_operand(state16, state);
    mbarrier_wait(&s.full[0], 0);
#pragma unroll
    for (int i = 0; i < 32; i++) ks[i] = 0.0f;
    wgmma_fence();
    multiply_rows_again(ks, state16, first_slot);
    wgmma_commit();
    for (int number = 0; number < numbers; number++) {
        const ChunkSlot &in = s.chunk[ring.slot];
        const uint32_t units = first_slot + ring.slot * (sizeof(ChunkSlot) / 16);
        const Ring now = ring;
        uint32_t v16[16], w16[16], update16[16];
        ring_next<SLOTS>(ring);

        if (with_v) {
            load_v(v16, &in.v, lane);
        } else {
#pragma unroll
            for (int i = 0; i < 16; i++) v16[i] = 0;
        }
        wgmma_wait<0>();
        wgmma_settle(ks);
        start_vn(ks, w16, v16, in.factors, lane);
        wgmma_fence();
        multiply_square(ks, w16, units + offsetof(ChunkSlot, t) / 16);
        wgmma_commit();
        scale_state(state, in.factors.gamma_chunk);
        if (number + 1 < numbers) mbarrier_wait(&s.full[ring.slot], ring.phase);
        wgmma_wait<0>();
        wgmma_settle(ks);
        start_update(state, w16, update16, ks, in.factors.update, units, lane);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_settle(state);
        arrive_warp(&s.done[now.slot], thread % WARP);
        pack_operand(state16, state);
        wgmma_fence();
        multiply_rows_again(ks, state16, first_slot + ring.slot * (sizeof(ChunkSlot) / 16));
        wgmma_commit();
    }
    wgmma_wait<0>();
}

static __device__ void run_state(const fqla__forward_params &p, StatesShared &s, int half, bool transition, int thread) {
    const Segment &segment = s.segment;
    const int warp = thread / WARP, lane = thread % WARP, numbers = segment.end - s.start;
    const int64_t entry = segment.kept * p.heads_v + segment.head;
    float state[64];
    if (transition) {
#pragma unroll
        for (int i = 0; i < 64; i++) /* row of S^T half * 64 + ..., column 8 (i/4) + ... */
            state[i] = half * STATE_COLUMNS + 16 * warp + lane / 4 + i / 2 % 2 * 8 == i / 4 * 8 + lane % 4 * 2 + i % 2 ? 1.0f : 0.0f;
        walk<false>(s, state, numbers, thread);
        store_transition(state, &p.transitions[entry], half, warp, lane);
    } else {
        if (segment.index == 0 && segment.in >= 0) load_state(state, p.h0, segment.in, state_place(p, half * STATE_COLUMNS, thread));
        else clear_state(state);
        walk<true>(s, state, numbers, thread);
        store_kept(state, &p.states[entry], half, thread);
    }
}

extern "C" __global__ void __launch_bounds__(FQLA__STATES_THREADS, 2)
#if defined(FLASHQLA_ELEMENT_BF16)
    states_bf16(const __grid_constant__ fqla__aligned_params params)
#else
    states_fp16(const __grid_constant__ fqla__aligned_params params)
#endif
{
    const fqla__forward_params &p = params.values;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    StatesShared &s = *(StatesShared *)shared_bytes;
    const int part = (int)(blockIdx.x % 4), half = part % 2, thread = (int)threadIdx.x;
    const bool transition = part / 2 == 1;
    const int head = (int)(blockIdx.x / 4 % (uint32_t)p.heads_v);
    const int64_t number = blockIdx.x / 4 / (uint32_t)p.heads_v;

    grid_launch_dependents();
    if (number >= p.table->kept && blockIdx.x > 0) return; /* while prepare runs; the first block waits, for this kernel to end after it */
    Segment segment; /* of the first warp */
    if (thread < WARP) find_segment(p, number, head, false, &segment);
    for (int i = 0; i < SLOTS; i++) clear_square(&s.chunk[i].t, thread, FQLA__STATES_THREADS); /* above its diagonal blocks it stays zero */
    grid_wait();
    if (number >= p.table->kept) return;
    if (thread < WARP) {
        int warm_up = 0;
        bool idle = segment.padding || segment.index == segment.segments - 1 || warm_up_chunks(p, segment, segment.end, thread) > 0;
        if (!idle && segment.index > 0) warm_up = warm_up_chunks(p, segment, segment.first, thread);
        idle = idle || (transition && (segment.index == 0 || warm_up > 0));
        if (thread == 0) {
            s.segment = segment;
            s.start = segment.first - warm_up;
            s.idle = idle;
            for (int i = 0; i < SLOTS; i++) {
                mbarrier_init(&s.full[i], 1);
                mbarrier_init(&s.done[i], WARPGROUP / WARP);
            }
            mbarrier_init_fence();
        }
    }
    fence_proxy_async();
    __syncthreads();
    if (s.idle) return;
    const int role = __shfl_sync(0xffffffffu, thread / WARPGROUP, 0);
    if (role == 1) {
        shrink_registers<LOADER_REGISTERS>();
        if (thread == WARPGROUP) run_loader(p, s, half * STATE_COLUMNS, !transition);
    } else {
        grow_registers<STATE_REGISTERS>();
        run_state(p, s, half, transition, thread);
    }
}
