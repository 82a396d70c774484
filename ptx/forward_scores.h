/* The scores' warpgroup: P_ij = exp(G_i - G_j) rq_i r_j (Q K^T)_ij for i >= j, ahead of the state. Warp w owns rows 16w .. 16w + 15.

   Decays as kernel prepare left them: inside a diagonal block exp2 of a difference of sums, elsewhere
   head_i * (whole blocks between) * tail_j, every factor <= 1. */
#ifndef FLASHQLA_FORWARD_SCORES_H
#define FLASHQLA_FORWARD_SCORES_H

#include "forward_shared.h"
#include "gates.h"

enum { SCORES_BARRIER = 1 }; /* named barrier of the 128 threads */

static __device__ void run_scores(ForwardShared &s, int block_thread) {
    const int first = uniform(s.segment.first - s.start), numbers = uniform(s.segment.end - s.start), len = uniform(s.segment.len - s.start * CHUNK);
    const uint32_t first_slot = shared_units(s.chunk);
    Ring ring = {0, 0}, out = {0, 0};
    float qk[32];
    for (int number = 0; number < numbers; number++) {
        const int thread = renewed(block_thread) & (WARPGROUP - 1), warp = thread / WARP, lane = thread % WARP;
        const int row = BLOCK * warp + lane / 4, column = 2 * (lane % 4); /* of an accumulator's first element */
        const int valid = len - number * CHUNK;
        ChunkSlot &in = s.chunk[ring.slot];
        const fqla__factors &d = in.factors;
        Square *to = &s.p[out.slot];

        if (number >= first) {
            mbarrier_wait(&s.chunk_full[ring.slot], ring.phase);
            if (valid < CHUNK) {
                clear_rows(in.k, 2, valid, thread);
                clear_rows(in.v, STATE_WARPGROUPS, valid, thread);
                mbarrier_arrive(&s.part_full);
                named_barrier<SCORES_BARRIER, WARPGROUP>();
            }
            const uint32_t units = first_slot + ring.slot * (sizeof(ChunkSlot) / 16);
            wgmma_fence();
            multiply_tiles(qk, units + offsetof(ChunkSlot, q) / 16, units);
            wgmma_commit();

            const float e1 = exp2_fast(d.block[1]), e2 = exp2_fast(d.block[2]);
            const float rows[2] = {d.row[row], d.row[row + 8]};
            float inside[8], head[2] = {exp2_fast(rows[0]), exp2_fast(rows[1])};
#pragma unroll
            for (int e = 0; e < 8; e++) inside[e] = exp2_fast(rows[e / 2 % 2] - d.column[BLOCK * warp + column + e / 4 * 8 + e % 2]);
            wgmma_wait<0>();
            wgmma_settle(qk);
            if (number >= OUT_SLOTS) mbarrier_wait(&s.out_full[out.slot], out.phase ^ 1); /* P of two chunks before is used */
#pragma unroll
            for (int block = BLOCKS - 1; block >= 0; block--) {
                float *value = &qk[8 * block];
                if (block > warp) continue;
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
                store_block(to, warp, block, lane, value);
            }
            fence_proxy_async(); /* P goes to wgmma */
        } else if (number >= OUT_SLOTS) { /* no P, but its place's phases stay in step with the state's */
            mbarrier_wait(&s.out_full[out.slot], out.phase ^ 1);
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&s.p_full[out.slot]);
        ring_next<SLOTS>(ring);
        ring_next<OUT_SLOTS>(out);
    }
}

#endif
