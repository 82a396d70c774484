/* The scores' warpgroup: P_ij = exp(G_i - G_j) rq_i r_j (Q K^T)_ij for i >= j, ahead of the state. Warp w owns rows 16w .. 16w + 15.

   Decays as kernel prepare left them: inside a diagonal block exp2 of a difference of sums, elsewhere
   head_i * (whole blocks between) * tail_j, every factor <= 1. */
#ifndef FLASHQLA_FORWARD_SCORES_H
#define FLASHQLA_FORWARD_SCORES_H

#include "forward_shared.h"
#include "gates.h"

/* Issue the loads of a chunk; of a chunk of v for one warpgroup. By one thread. */
static __device__ __forceinline__ void load_chunk(const fqla__forward_params &p, ForwardShared &s, const Sequence &sequence, int chunk) {
    uint64_t *full = &s.chunk_full[chunk % CHUNK_SLOTS];
    ChunkSlot &to = s.chunk[chunk % CHUNK_SLOTS];
    const int32_t row = (int32_t)(sequence.row + (int64_t)chunk * CHUNK);
    mbarrier_arrive_expect(full, 4 * 128 * (uint32_t)p.load_rows + sizeof to.prepared);
    for (int half = 0; half < 2; half++) {
        tma_load(&to.k[half], &p.k, half * FQLA__LOAD_COLUMNS, sequence.head_qk, row, full);
        tma_load(&to.q[half], &p.q, half * FQLA__LOAD_COLUMNS, sequence.head_qk, row, full);
    }
    bulk_load(&to.prepared, &p.prepared[(sequence.chunk + chunk) * p.heads_v + sequence.head], sizeof to.prepared, full);
}

static __device__ __forceinline__ void load_v(const fqla__forward_params &p, ForwardShared &s, const Sequence &sequence, int chunk,
                                              int warpgroup) {
    const int slot = chunk % V_SLOTS;
    mbarrier_arrive_expect(&s.v_full[slot][warpgroup], 128 * (uint32_t)p.load_rows);
    tma_load(&s.v[slot][warpgroup], &p.v, warpgroup * STATE_COLUMNS, sequence.head, (int32_t)(sequence.row + (int64_t)chunk * CHUNK),
             &s.v_full[slot][warpgroup]);
}

/* Refill the slots of a chunk as the state is done with them. By one thread. */
static __device__ __forceinline__ void refill(const fqla__forward_params &p, ForwardShared &s, int chunk) {
    const int v_slot = chunk % V_SLOTS, chunk_slot = chunk % CHUNK_SLOTS;
    if (chunk + V_SLOTS < s.sequence.chunks)
        for (int w = 0; w < STATE_WARPGROUPS; w++) {
            mbarrier_wait(&s.v_free[v_slot][w], chunk / V_SLOTS % 2);
            load_v(p, s, s.sequence, chunk + V_SLOTS, w);
        }
    if (chunk + CHUNK_SLOTS < s.sequence.chunks) {
        mbarrier_wait(&s.chunk_free[chunk_slot], chunk / CHUNK_SLOTS % 2);
        load_chunk(p, s, s.sequence, chunk + CHUNK_SLOTS);
    }
}

enum { SCORES_BARRIER = 1 }; /* named barrier of the 128 threads */

static __device__ void run_scores(const fqla__forward_params &p, ForwardShared &s, int block_thread) {
    const Sequence &sequence = s.sequence;
    float qk[32];
    for (int chunk = 0; chunk < sequence.chunks; chunk++) {
        const int thread = renewed(block_thread) & (WARPGROUP - 1), warp = thread / WARP, lane = thread % WARP;
        const int row = BLOCK * warp + lane / 4, column = 2 * (lane % 4); /* of an accumulator's first element */
        const int slot = chunk % P_SLOTS, valid = sequence.len - chunk * CHUNK;
        ChunkSlot &in = s.chunk[chunk % CHUNK_SLOTS];
        const fqla__prepared_chunk &d = in.prepared;

        mbarrier_wait(&s.chunk_full[chunk % CHUNK_SLOTS], chunk / CHUNK_SLOTS % 2);
        if (valid < CHUNK) {
            clear_rows(in.k, valid, thread);
            asm volatile("bar.sync %0, %1;" ::"n"((int)SCORES_BARRIER), "n"((int)WARPGROUP) : "memory");
        }
        wgmma_fence();
        multiply_tiles(qk, in.q, in.k);
        wgmma_commit();

        const float e1 = d.block[1], e2 = d.block[2];
        float inside[8], head[2] = {d.head[row], d.head[row + 8]};
        {
            const float sums[2] = {d.sum[row], d.sum[row + 8]}, rq[2] = {d.rq[row], d.rq[row + 8]};
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const int j = BLOCK * warp + column + e / 4 * 8 + e % 2;
                inside[e] = exp2_fast(sums[e / 2 % 2] - d.sum[j]) * rq[e / 2 % 2] * d.r[j];
            }
        }
        if (chunk >= P_SLOTS) mbarrier_wait(&s.p_free[slot], (chunk / P_SLOTS - 1) % 2);
        wgmma_wait<0>();
        wgmma_settle(qk);
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
#pragma unroll
                for (int e = 0; e < 8; e++) value[e] *= head[e / 2 % 2] * d.tail[BLOCK * block + column + e / 4 * 8 + e % 2];
                /* this block lies between the rows and the blocks left of it */
                head[0] *= block == 2 ? e2 : e1;
                head[1] *= block == 2 ? e2 : e1;
            }
            store_block(tile_block_address(&s.p[slot], warp, block, lane), value);
        }
        fence_proxy_async(); /* P goes to wgmma */
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&s.p_full[slot]);
        if (thread == 0 && chunk > 0) refill(p, s, chunk - 1);
    }
}

#endif
