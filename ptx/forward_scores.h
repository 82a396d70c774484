/* The scores' warpgroup: P_ij = exp(G_i - G_j) rq_i r_j (Q K^T)_ij for i >= j (decays.h), ahead of the state. Warp w owns rows 16w ..
   16w + 15. */
#ifndef FLASHQLA_FORWARD_SCORES_H
#define FLASHQLA_FORWARD_SCORES_H

#include "decays.h"
#include "forward_shared.h"

enum { SCORES_BARRIER = 1 }; /* named barrier of the 128 threads */

/* |q|^2 of row lane % 16 of the warp's 16: a lane adds every second 16 bytes of it, the one 16 lanes on the others. In kernel
   prepare's order, so that the bits of o are the same with residuals, where rq is prepare's. */
static __device__ __forceinline__ float rows_norm(const Tile (&q)[2], int warp, int lane) {
    const int row = BLOCK * warp + lane % BLOCK;
    float sum[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float half[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int place = row * 128 + (((lane / BLOCK + 2 * i + 4 * j) ^ row % 8) * 16);
            half[j] = sum_of_squares(*(const uint4 *)&q[0].bytes[place]) + sum_of_squares(*(const uint4 *)&q[1].bytes[place]);
        }
        sum[i] = half[0] + half[1];
    }
    const float half = sum[0] + sum[1];
    return half + __shfl_xor_sync(0xffffffffu, half, BLOCK);
}

/* An item's chunks. normalise_q: with the l2norm's rq, which kernel prepare has left out of the factors. */
static __device__ __forceinline__ void make_scores(ForwardShared &s, const Item &item, bool normalise_q, int block_thread,
                                                   Ring &ring, Ring &out) {
    const int first = uniform(item.segment.first - item.start), numbers = uniform(item.segment.end - item.start);
    const int len = uniform(item.segment.len - item.start * CHUNK);
    const uint32_t first_slot = shared_units(s.chunk);
    float qk[32];
    for (int number = 0; number < numbers; number++) {
        const int thread = renewed(block_thread) & (WARPGROUP - 1), warp = thread / WARP, lane = thread % WARP;
        const int row = BLOCK * warp + lane / 4, column = 2 * (lane % 4); /* of an accumulator's first element */
        const int valid = len - number * CHUNK;
        ChunkSlot &in = s.chunk[ring.slot];
        fqla__factors &d = in.factors;
        Square *to = &s.p[out.slot];

        if (number >= first) {
            mbarrier_wait(&s.chunk_full[ring.slot], ring.phase);
            if (valid < CHUNK) {
                clear_rows(in.k, 2, valid, thread);
                clear_rows(in.v, STATE_WARPGROUPS, valid, thread);
                mbarrier_arrive(&s.part_full[ring.slot]);
                named_barrier<SCORES_BARRIER, WARPGROUP>();
            }
            const uint32_t units = first_slot + ring.slot * (sizeof(ChunkSlot) / 16);
            wgmma_fence();
            multiply_tiles(qk, units + offsetof(ChunkSlot, q) / 16, units);
            wgmma_commit();

            float rows[2] = {d.row[row], d.row[row + 8]};
            if (normalise_q) {
                const float rq = rsqrtf(rows_norm(in.q, warp, lane) + 1e-6f), log2_rq = log2_fast(rq);
                if (lane < BLOCK) d.o[BLOCK * warp + lane] *= rq; /* the state reads them once P is there */
                rows[0] += __shfl_sync(0xffffffffu, log2_rq, lane / 4);
                rows[1] += __shfl_sync(0xffffffffu, log2_rq, lane / 4 + 8);
            }
            const float e1 = exp2_fast(d.block[1]), e2 = exp2_fast(d.block[2]);
            float inside[8], head[2] = {exp2_fast(rows[0]), exp2_fast(rows[1])};
#pragma unroll
            for (int e = 0; e < 8; e++) inside[e] = exp2_fast(rows[e / 2 % 2] - d.column[BLOCK * warp + column + e / 4 * 8 + e % 2]);
            wgmma_wait<0>();
            wgmma_settle(qk);
            mbarrier_wait(&s.out_full[out.slot], out.phase ^ 1); /* P of two chunks before is used */
#pragma unroll
            for (int block = BLOCKS - 1; block >= 0; block--) {
                float *value = &qk[8 * block];
                if (block > warp) continue;
                decay_block(value, block, warp, lane, d, inside, head, e1, e2);
                store_block(to, warp, block, lane, value);
            }
            fence_proxy_async(); /* P goes to wgmma */
        } else { /* no P, but its place's phases stay in step with the state's */
            mbarrier_wait(&s.out_full[out.slot], out.phase ^ 1);
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&s.p_full[out.slot]);
        ring_next<SLOTS>(ring);
        ring_next<OUT_SLOTS>(out);
    }
}

static __device__ void run_scores(ForwardShared &s, bool normalise_q, int thread) {
    Ring items = {0, 0}, ring = {0, 0}, out = {0, 0};
    for (;; ring_next<ITEMS>(items)) {
        const Item &item = s.items[items.slot];
        mbarrier_wait(&s.item_full[items.slot], items.phase);
        if (uniform(item.segment.row < 0)) return;
        arrive_warp(&s.item_begun[items.slot], thread % WARP);
        make_scores(s, item, normalise_q, thread, ring, out);
    }
}

#endif
