/* The decays of a chunk's 64 x 64 scores, exp(G_i - G_j) rq_i r_j for i >= j, as kernel prepare left them: inside a diagonal block exp2 of a
   difference of sums, elsewhere head_i * (whole blocks between) * tail_j, every factor <= 1. */
#ifndef FLASHQLA_DECAYS_H
#define FLASHQLA_DECAYS_H

#include "gates.h"
#include "tile.h"

/* Of a warp's 16 rows block `block`, an accumulator, times its decays; blocks from the diagonal's, `warp`, to the left. inside: of the
   diagonal's own; head: from the block's right end to the lane's rows, stepped; e1, e2: of the second block and the third. */
static __device__ __forceinline__ void decay_block(float *value, int block, int warp, int lane, const fqla__factors &d,
                                                   const float (&inside)[8], float (&head)[2], float e1, float e2) {
    const int column = 2 * (lane % 4);
    if (block == warp) {
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const int j = column + e / 4 * 8 + e % 2, i = lane / 4 + e / 2 % 2 * 8;
            value[e] = j <= i ? value[e] * inside[e] : 0.0f;
        }
    } else {
        const float whole = d.block[block];
#pragma unroll
        for (int e = 0; e < 8; e++)
            value[e] *= head[e / 2 % 2] * exp2_fast(whole - d.column[BLOCK * block + column + e / 4 * 8 + e % 2]);
        /* this block lies between the rows and the blocks left of it */
        head[0] *= block == 2 ? e2 : e1;
        head[1] *= block == 2 ? e2 : e1;
    }
}

#endif
