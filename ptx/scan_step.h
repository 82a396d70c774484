/* What kernels scan and backward_scan have in common: their shared memory, and a step's product. A step is a segment. */
#ifndef FLASHQLA_SCAN_STEP_H
#define FLASHQLA_SCAN_STEP_H

#include "segment.h"
#include "state.h"

enum { SLOTS = 3 };

typedef struct __align__(1024) StepSlot {
    Tile transition[4];           /* M transposed: [rows / 64][columns / 64] */
    float last[16][WARPGROUP][4]; /* S_loc, as its threads hold it */
} StepSlot;                       /* 64 KB */

typedef struct __align__(1024) ScanShared {
    StepSlot step[SLOTS];       /* step i uses slot i % 3 */
    uint64_t full[SLOTS];
    int32_t exact[FQLA__MOST_SEGMENTS + 1]; /* by step; the one past the last is not */
} ScanShared;

static_assert(sizeof(StepSlot) == sizeof(fqla__kept_transition) + sizeof(fqla__kept_state) / 2, "copied as they are");

/* The first step from f on whose end is wanted. */
static __device__ __forceinline__ int next_wanted(const ScanShared &s, int f, int segments) {
    while (f < segments && !s.exact[f + 1]) f++;
    return f;
}

/* A row's elements as scale times fp16: scale is the power of two above the largest, or anything where that is not finite. */
static __device__ __forceinline__ void pack_rows(const float (&state)[64], uint32_t (&packed)[32], float (&scale)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float most = 0.0f;
#pragma unroll
        for (int j = 0; j < DIM / 8; j++) most = fmaxf(most, fmaxf(fabsf(state[4 * j + 2 * half]), fabsf(state[4 * j + 2 * half + 1])));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
        const int exponent = min(max((int)(__float_as_uint(most) >> 23) + 1, 2), 252); /* biased; its negative is one too */
        const float inverse = __uint_as_float((uint32_t)(254 - exponent) << 23);
        scale[half] = __uint_as_float((uint32_t)exponent << 23);
#pragma unroll
        for (int j = 0; j < DIM / 8; j++) packed[2 * j + half] = pack_fp16(state[4 * j + 2 * half] * inverse, state[4 * j + 2 * half + 1] * inverse);
    }
}

/* d += left operand [64 x 128] by M transposed. m: its units. */
static __device__ __forceinline__ void multiply_transition(float (&d)[64], const uint32_t (&a)[32], uint32_t m) {
#pragma unroll
    for (int step = 0; step < DIM / 16; step++)
        wgmma_64x128_transposed(d, &a[4 * step], tile_descriptor(m + step / 4 * 2 * TILE_UNITS + step % 4 * 128, TILE_UNITS));
}

#endif
