/* What kernels scan and backward_scan have in common: what segments start from, one after the other. A step is a segment, forwards,
   or backwards with dS for S and M's transpose for M:

       S_{f+1} = last state of f                        where f is the first or warm
                 S_loc_f + M_f S_f                      where f is exact

   M is fp16, and so is S, divided by a power of two that brings the block's part of it to at most 1: a product loses 2e-4, an
   eighth of what a chunk's bfloat16 operands lose.

   A block works off quarters of the columns (v) of v-heads' states, which need nothing of one another, a grid apart. Two warpgroups, a
   half of the rows (k) each, hold S in float32: M from shared memory is the left operand, S in 16 bits, which all threads write, the
   right one. A warp loads, 48 KB a step. The chain of a step: the largest element of all, S to shared memory, 256 tensor cycles, sum;
   S_loc is read and S_f stored under the product. */
#ifndef FLASHQLA_SCAN_STEP_H
#define FLASHQLA_SCAN_STEP_H

#include "grid.h"
#include "ring.h"
#include "segment.h"

enum { SLOTS = 4, QUARTERS = 4, COLUMNS = DIM / QUARTERS, MULTIPLIERS = 2 * WARPGROUP, LOADER_WARP = MULTIPLIERS / WARP };
enum { OPERAND_BYTES = COLUMNS * 128 }; /* 64 of k of the block's columns, rows as a tile's */
static_assert(FQLA__SCAN_THREADS == MULTIPLIERS + WARP, "and a warp that loads");

/* What a step brings: 48 KB, as it lies in the workspace */
typedef struct __align__(1024) StepSlot {
    Tile transition[4];                /* M transposed: [rows / 64][columns / 64] */
    float last[DIM / 8][WARP * 2][4];  /* S_loc, as the threads of a state's warpgroup hold it */
} StepSlot;

typedef struct __align__(1024) ScanShared {
    StepSlot step[SLOTS];                             /* step i of those that are multiplied uses slot i % 4 */
    __align__(1024) unsigned char state[2][OPERAND_BYTES]; /* S / scale in fp16: [half of k], rows v */
    uint32_t largest[MULTIPLIERS / WARP];             /* a warp's largest element's bits */
    uint64_t full[SLOTS];                             /* copy engine -> multipliers */
    uint64_t free[SLOTS];                             /* multipliers -> loader */
    int32_t exact[FQLA__MOST_SEGMENTS];               /* by step */
} ScanShared;

static_assert(sizeof(ScanShared) == FQLA__SCAN_SHARED_BYTES, "what the host asks for");
static_assert(sizeof(StepSlot) == sizeof(fqla__kept_transition) + sizeof(fqla__kept_state) / QUARTERS, "copied as they are");
static_assert(FQLA__MOST_SEGMENTS == 64, "a bit each");

/* The steps of a sequence's v-head: step f's entries in the workspace are `apart` from those of the one before. */
typedef struct Steps {
    fqla__kept_state *states;                /* a segment's last state, then what it starts from */
    const fqla__kept_transition *transitions;
    int64_t apart;
    uint64_t exact;                          /* a bit a step; the first is not */
    int32_t count, quarter;
} Steps;

/* A thread's elements: s[4j + 2r + c] is row k + 8 r, column v(j, c) of the quarter. Which columns of the product are which v is free;
   this order has a warp's 32 floats side by side in the layout that state warpgroups keep a state in. */
typedef struct Part {
    int32_t k, v; /* v(0, 0), of the quarter's */
    int32_t kept; /* of element 0 in a quarter's floats */
} Part;

static __device__ __forceinline__ Part find_part(int thread) {
    const int warp = thread / WARP, lane = thread % WARP;
    Part part;
    part.k = BLOCK * warp + lane / 4;
    part.v = lane % 2 + lane / 2 % 2 * 8;
    part.kept = warp * 2 * 256 + lane % 2 * 16 + lane / 8 * 4 + lane / 2 % 2 * 2 + lane / 4 % 2;
    return part;
}

/* v(j, c) - v(0, 0) and where the element lies from the first, both of element i. */
static __device__ __forceinline__ int part_v(int i) { return i % 2 * 2 + i / 4 % 2 * 4 + i / 8 * 16; }
static __device__ __forceinline__ int part_kept(int i) { return i / 2 % 2 * 256 + i / 4 * 64 + i % 2 * 32; }

static __device__ __forceinline__ void init_steps(ScanShared &s) {
    for (int i = 0; i < SLOTS; i++) {
        mbarrier_init(&s.full[i], 1);
        mbarrier_init(&s.free[i], MULTIPLIERS / WARP);
    }
    mbarrier_init_fence();
}

/* s.exact as bits, the same in every lane. */
static __device__ __forceinline__ uint64_t exact_steps(const ScanShared &s, int count, int lane) {
    const uint32_t low = __ballot_sync(0xffffffffu, lane > 0 && lane < count && s.exact[lane]);
    const uint32_t high = __ballot_sync(0xffffffffu, lane + WARP < count && s.exact[lane + WARP]);
    return (uint64_t)high << WARP | low;
}

/* The first step from f on whose end is wanted, which is where the one after it is exact; 64: none. */
static __device__ __forceinline__ int next_wanted(const Steps &steps, int f) {
    const uint64_t left = f < FQLA__MOST_SEGMENTS - 1 ? steps.exact >> (f + 1) : 0;
    return left != 0 ? f + __ffsll((long long)left) - 1 : FQLA__MOST_SEGMENTS;
}

/* By one thread. */
static __device__ __forceinline__ void load_steps(ScanShared &s, const Steps &steps, Ring &ring) {
    for (int f = next_wanted(steps, 0); f < steps.count; f = next_wanted(steps, f + 1)) {
        const bool exact = steps.exact >> f & 1;
        StepSlot &to = s.step[ring.slot];
        uint64_t *full = &s.full[ring.slot];
        mbarrier_wait(&s.free[ring.slot], ring.phase ^ 1);
        mbarrier_arrive_expect(full, (exact ? (uint32_t)sizeof to.transition : 0) + (uint32_t)sizeof to.last);
        if (exact) bulk_load(to.transition, &steps.transitions[f * steps.apart], sizeof to.transition, full);
        bulk_load(to.last, steps.states[f * steps.apart].values[steps.quarter], sizeof to.last, full);
        ring_next<SLOTS>(ring);
    }
}

/* The block's part of S in shared memory, for the product; returns what it was divided by. */
static __device__ __forceinline__ float share_state(ScanShared &s, const float (&state)[16], int thread) {
    const int warp = thread / WARP, lane = thread % WARP;
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; i++) most = fmaxf(most, fabsf(state[i]));
    uint32_t bits = __reduce_max_sync(0xffffffffu, __float_as_uint(most));
    if (lane == 0) s.largest[warp] = bits;
    named_barrier<1, MULTIPLIERS>();
#pragma unroll
    for (int i = 0; i < MULTIPLIERS / WARP; i++) bits = max(bits, s.largest[i]);
    const int exponent = min(max((int)(bits >> 23) + 1, 2), 252); /* biased; its negative is one too */
    const float inverse = __uint_as_float((uint32_t)(254 - exponent) << 23);
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
        const float *d = &state[8 * pair];
        const int v = 16 * pair + lane / 16 * 8 + lane % 8, unit = warp % 4 * 2 + lane / 8 % 2;
        store_tiles_transposed(shared_address(s.state[warp / 4]) + v * 128 + ((unit ^ (v % 8)) * 16),
                               pack_fp16(d[0] * inverse, d[1] * inverse), pack_fp16(d[2] * inverse, d[3] * inverse),
                               pack_fp16(d[4] * inverse, d[5] * inverse), pack_fp16(d[6] * inverse, d[7] * inverse));
    }
    fence_proxy_async();
    named_barrier<1, MULTIPLIERS>();
    return __uint_as_float((uint32_t)exponent << 23);
}

/* d += M S of the warpgroup's rows, or with M's transpose. m, state: their units. */
template <bool reverse>
static __device__ __forceinline__ void multiply_transition(float (&d)[16], uint32_t m, uint32_t state, int warpgroup) {
#pragma unroll
    for (int step = 0; step < DIM / 16; step++) {
        const uint64_t right = tile_descriptor(state + step / 4 * (OPERAND_BYTES / 16) + step % 4 * 2, 0);
        if (reverse) wgmma_64x32_shared<0>(d, tile_descriptor(m + warpgroup * 2 * TILE_UNITS + step_units(step), 0), right);
        else wgmma_64x32_shared<1>(d, tile_descriptor(m + (step / 4 * 2 + warpgroup) * TILE_UNITS + step % 4 * 128, 0), right);
    }
}

/* From S's place in the workspace, or from a slot's S_loc; and back. */
static __device__ __forceinline__ void load_part(float (&state)[16], const float *from) {
#pragma unroll
    for (int i = 0; i < 16; i++) state[i] = from[part_kept(i)];
}

static __device__ __forceinline__ void store_part(const float (&state)[16], float *to) {
#pragma unroll
    for (int i = 0; i < 16; i++) to[part_kept(i)] = state[i];
}

/* state: what the first step starts from; keeps_first: it is left in the workspace like those of the exact ones. */
template <bool reverse>
static __device__ __forceinline__ void run_steps(ScanShared &s, const Steps &steps, Ring &ring, float (&state)[16], bool keeps_first,
                                                 int thread) {
    const int warpgroup = uniform(thread / WARPGROUP), count = uniform(steps.count), lane = thread % WARP;
    const uint32_t first_slot = shared_units(s.step), state_units = shared_units(s.state);
    const Part part = find_part(thread);
    int wanted = next_wanted(steps, 0);
    for (int f = 0; f < count; f++) {
        const bool exact = steps.exact >> f & 1;
        float *place = &steps.states[f * steps.apart].values[steps.quarter][0][0][0] + part.kept;
        if (f != wanted) {
            if (exact || (f == 0 && keeps_first)) store_part(state, place);
            continue;
        }
        const float *last = &s.step[ring.slot].last[0][0][0] + part.kept;
        if (exact) {
            float d[16];
            const float scale = share_state(s, state, thread);
#pragma unroll
            for (int i = 0; i < 16; i++) d[i] = 0.0f;
            mbarrier_wait(&s.full[ring.slot], ring.phase);
            wgmma_fence();
            multiply_transition<reverse>(d, first_slot + ring.slot * (sizeof(StepSlot) / 16), state_units, warpgroup);
            wgmma_commit();
            store_part(state, place);
            load_part(state, last);
            wgmma_wait<0>();
            wgmma_settle(d);
#pragma unroll
            for (int i = 0; i < 16; i++) state[i] += scale * d[i];
        } else {
            mbarrier_wait(&s.full[ring.slot], ring.phase);
            if (f == 0 && keeps_first) store_part(state, place);
            load_part(state, last);
        }
        arrive_warp(&s.free[ring.slot], lane);
        ring_next<SLOTS>(ring);
        wanted = next_wanted(steps, f + 1);
    }
}

/* The block's part of h0, in any of its layouts: once a sequence. */
static __device__ __forceinline__ void load_given(const fqla__forward_params &p, float (&state)[16], int64_t entry, int quarter, int thread) {
    const Part part = find_part(thread);
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const int k = part.k + i / 2 % 2 * 8, v = quarter * COLUMNS + part.v + part_v(i);
        const int64_t at = entry * DIM * DIM + (p.state_layout == 1 ? v * DIM + k : k * DIM + v); /* 1: FQLA_STATE_VK */
        state[i] = p.state_bf16 ? from_bf16(((const uint16_t *)p.h0)[at]) : ((const float *)p.h0)[at];
    }
}

/* A quarter of a sequence's v-head. number: its first segment's; states: theirs or their gradients'; from_h0: the first step starts from
   h0, which is kept, else from what is not asked for; waits: for the kernel before, once it is known that there is something to do.
   By all threads, before which and after which the block meets. */
template <bool reverse, bool waits>
static __device__ __forceinline__ void scan_quarter(const fqla__forward_params &p, ScanShared &s, fqla__kept_state *states,
                                                    const Segment &segment, int64_t number, int quarter, bool from_h0, Ring &ring,
                                                    int thread) {
    const int warp = thread / WARP, lane = thread % WARP, segments = segment.segments, chunks = (int)p.table->segment_chunks;
    const int64_t first = (number + (reverse ? segments - 1 : 0)) * p.heads_v + segment.head;
    for (int f = 1 + warp; f < segments; f += FQLA__SCAN_THREADS / WARP) {
        const int warm = reverse ? warm_down_chunks(p, segment, (segments - f) * chunks, lane)
                                 : warm_up_chunks(p, segment, f * chunks, lane);
        if (lane == 0) s.exact[f] = warm == 0;
    }
    __syncthreads();
    const Steps steps = {&states[first], &p.transitions[first], reverse ? -p.heads_v : p.heads_v, exact_steps(s, segments, lane), segments,
                         quarter};
    if (waits) {
        if (steps.exact == 0) return;
        grid_wait();
    }
    if (warp == LOADER_WARP) {
        if (lane == 0) load_steps(s, steps, ring);
        return;
    }
    float state[16];
    if (from_h0 && segment.in >= 0) {
        load_given(p, state, segment.in, quarter, thread);
    } else {
#pragma unroll
        for (int i = 0; i < 16; i++) state[i] = 0.0f;
    }
    run_steps<reverse>(s, steps, ring, state, from_h0, thread);
}

#endif
