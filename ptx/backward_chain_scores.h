/* The scores' warpgroup of backward_chains: P of a chunk, ahead of the state, for the gradients; and zeros in the rows past a sequence's
   end. Warp w makes rows 16w .. 16w + 15.

       P_ij = scale / unit exp(G_i - G_j) rq_i r_j (Q K^T)_ij       i >= j, decays.h */
#ifndef FLASHQLA_BACKWARD_CHAIN_SCORES_H
#define FLASHQLA_BACKWARD_CHAIN_SCORES_H

#include "backward_chain_shared.h"
#include "decays.h"

/* P, whose place may be written once `free` completes its phase; NULL: it may. Its decays are worked out while Q K^T is. */
static __device__ __forceinline__ void make_scores(const fqla__factors &d, uint32_t q, uint32_t k, Tile *to, float scale,
                                                   uint64_t *free, uint32_t phase, int warp, int lane) {
    const int row = BLOCK * warp + lane / 4, column = 2 * (lane % 4);
    float qk[32], decay[32];
    wgmma_fence();
    multiply_tiles(qk, q, k);
    wgmma_commit();

    const float e1 = exp2_fast(d.block[1]), e2 = exp2_fast(d.block[2]);
    const float rows[2] = {d.row[row], d.row[row + 8]};
    float inside[8], head[2] = {exp2_fast(rows[0]) * scale, exp2_fast(rows[1]) * scale};
#pragma unroll
    for (int e = 0; e < 8; e++)
        inside[e] = exp2_fast(rows[e / 2 % 2] - d.column[BLOCK * warp + column + e / 4 * 8 + e % 2]) * scale;
#pragma unroll
    for (int i = 0; i < 32; i++) decay[i] = 1.0f;
#pragma unroll
    for (int block = BLOCKS - 1; block >= 0; block--) {
        if (block > warp) continue;
        decay_block(&decay[8 * block], block, warp, lane, d, inside, head, e1, e2);
    }
    wgmma_wait<0>();
    wgmma_settle(qk);
    if (free) mbarrier_wait(free, phase);
    __syncwarp();
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
        if (block > warp) break;
        float *value = &qk[8 * block];
        const float *by = &decay[8 * block];
#pragma unroll
        for (int e = 0; e < 8; e++) value[e] *= by[e];
        if (block == warp) {
#pragma unroll
            for (int e = 0; e < 8; e++) /* above the diagonal, where the decay is zero, the product may be NaN */
                if (by[e] == 0.0f) value[e] = 0.0f;
        }
        store_tile_block(to, warp, block, lane, value);
    }
}

enum { SCORES_BARRIER = 1 }; /* of the 128 threads */

/* The chunk that is not whole is there for the others when its rows past the sequence's end are zeros. */
static __device__ __forceinline__ void clear_part(ChainShared &s, int slot, int valid, int thread) {
    mbarrier_wait(&s.part_full, 0);
    if (s.chain.way == GRADIENTS)
        for (int i = 0; i < 5; i++) clear_tile_rows(s.gradients[slot].k + i, valid, thread, WARPGROUP); /* k, dout, q */
    else
        for (int i = 0; i < 3; i++) clear_tile_rows(s.states[slot].k + i, valid, thread, WARPGROUP); /* k, v */
    fence_proxy_async();
    meet<SCORES_BARRIER, WARPGROUP>();
    if (thread == 0) mbarrier_arrive(&s.full[slot]);
    __syncwarp();
}

/* P of number i lies where that of i - 2 was, which the state uses up to the end of that chunk. */
static __device__ void run_scores(const fqla__backward_params &p, ChainShared &s, int block_thread) {
    const int numbers = uniform(s.chain.numbers), part = uniform(s.chain.part), valid = s.chain.segment.len % CHUNK;
    const bool gradients = s.chain.way == GRADIENTS;
    const uint32_t first_slot = shared_units(s.gradients);
    Ring ring = {0, 0}, before = {SLOTS - 2, 1}, out = {0, 0}; /* before: of the chunk two before */
    for (int number = gradients ? 0 : numbers; number < numbers; number++) {
        const int thread = renewed(block_thread) & (WARPGROUP - 1), warp = thread / WARP, lane = thread % WARP;
        const GradientsSlot &in = s.gradients[ring.slot];
        const uint32_t units = first_slot + ring.slot * (sizeof(GradientsSlot) / 16);
        if (number == part) clear_part(s, ring.slot, valid, thread);
        mbarrier_wait(&s.full[ring.slot], ring.phase);
        __syncwarp();
        make_scores(in.prepared.factors, units + offsetof(GradientsSlot, q) / 16, units, &s.p[out.slot], p.power,
                    number >= RINGS ? &s.free[before.slot] : NULL, before.phase, warp, lane);
        fence_proxy_async(); /* it goes to wgmma */
        arrive_warp(&s.pt_full[out.slot], lane);
        ring_next<SLOTS>(ring);
        ring_next<SLOTS>(before);
        ring_next<RINGS>(out);
    }
    if (!gradients && part >= 0) clear_part(s, part % SLOTS, valid, block_thread);
}

#endif
