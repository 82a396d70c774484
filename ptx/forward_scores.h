/* The scores' warpgroup: P_ij = exp(G_i - G_j) rq_i r_j (Q K^T)_ij for i >= j, ahead of the state. Warp w owns rows 16w .. 16w + 15.
   Each of its warps also has the copy engine bring or take away something, and looks for that while it waits.

   Decays as kernel prepare left them: inside a diagonal block exp2 of a difference of sums, elsewhere
   head_i * (whole blocks between) * tail_j, every factor <= 1. */
#ifndef FLASHQLA_FORWARD_SCORES_H
#define FLASHQLA_FORWARD_SCORES_H

#include "forward_shared.h"
#include "gates.h"

/* Which of the warps loads what: k and q; what kernel prepare made; a state warpgroup's v, and it stores its O. */
enum { LOADS_ROWS, LOADS_PREPARED, LOADS_V, LOADS = LOADS_V + STATE_WARPGROUPS };

typedef struct Loader {
    int what;
    bool leads;                           /* this lane of the warp */
    const fqla__prepared_chunk *prepared; /* of chunk number 0 */
    int32_t row;                          /* of chunk number 0 */
    int32_t head, first_v;                /* first_v: of the warpgroup */
    int32_t numbers, warm_up, whole;      /* chunks; those before the segment's first; those with all of their rows */
    int32_t loaded;                       /* chunks so far */
    Ring in;                              /* the next one's */
} Loader;

/* By one lane. */
static __device__ __forceinline__ void load(const fqla__forward_params &p, ForwardShared &s, const Loader &l) {
    const int slot = l.in.slot, row = l.row + l.loaded * CHUNK;
    if (l.what == LOADS_ROWS) {
        mbarrier_arrive_expect(&s.chunk_full[slot], 4 * 128 * (uint32_t)p.load_rows);
        for (int half = 0; half < 2; half++) {
            tma_load(&s.chunk[slot].k[half], &p.k, half * FQLA__LOAD_COLUMNS, row, l.head, &s.chunk_full[slot]);
            tma_load(&s.chunk[slot].q[half], &p.q, half * FQLA__LOAD_COLUMNS, row, l.head, &s.chunk_full[slot]);
        }
    } else if (l.what == LOADS_PREPARED) {
        mbarrier_arrive_expect(&s.chunk_full[slot], sizeof(fqla__prepared_chunk));
        load_prepared(&s.chunk[slot].t, &s.chunk[slot].factors, l.prepared + (int64_t)l.loaded * p.heads_v, &s.chunk_full[slot]);
    } else {
        const int w = l.what - LOADS_V;
        mbarrier_arrive_expect(&s.v_full[slot][w], 128 * (uint32_t)p.load_rows);
        tma_load(&s.v[slot][w], &p.v, l.first_v, row, l.head, &s.v_full[slot][w]);
    }
}

/* Load the next chunk if its slot is free. By a whole warp. */
static __device__ __forceinline__ void serve(const fqla__forward_params &p, ForwardShared &s, Loader &l) {
    const int w = l.what - LOADS_V;
    if (l.what >= LOADS || l.loaded >= l.numbers) return;
    if (l.loaded >= SLOTS && !mbarrier_test(w >= 0 ? &s.v_free[l.in.slot][w] : &s.chunk_free[l.in.slot], l.in.phase ^ 1)) return;
    if (l.leads) load(p, s, l);
    l.loaded++;
    ring_next<SLOTS>(l.in);
}

/* Wait for a barrier and serve meanwhile. */
static __device__ __forceinline__ void wait_serving(const fqla__forward_params &p, ForwardShared &s, Loader &l, uint64_t *barrier, uint32_t phase) {
    while (!mbarrier_test(barrier, phase)) serve(p, s, l);
}

/* Wait until the state is done with chunk number i, which used `out`: P's place is free, and O goes out by who loads v. */
static __device__ __forceinline__ void retire(const fqla__forward_params &p, ForwardShared &s, Loader &l, const Ring &out, int number) {
    const int w = l.what - LOADS_V;
    for (int i = 0; i < STATE_WARPGROUPS; i++) wait_serving(p, s, l, &s.out_full[out.slot][i], out.phase);
    if (w < 0 || l.what >= LOADS || !l.leads) return;
    if (number > 0) { /* O before it has left: its store began a chunk ago */
        bulk_store_wait<0>();
        mbarrier_arrive(&s.out_free[out.slot ^ 1][w]);
    }
    if (number >= l.warm_up && number < l.whole) {
        fence_proxy_async(); /* the state's warps wrote it */
        tma_store(&p.o, l.first_v, l.row + number * CHUNK, l.head, &s.o[out.slot][w]);
        bulk_commit();
    }
}

enum { SCORES_BARRIER = 1 }; /* named barrier of the 128 threads */

static __device__ void run_scores(const fqla__forward_params &p, ForwardShared &s, int first_v, int block_thread) {
    const int first = uniform(s.segment.first - s.start), numbers = uniform(s.segment.end - s.start), len = uniform(s.segment.len - s.start * CHUNK);
    const uint32_t first_slot = shared_units(s.chunk);
    Ring ring = {0, 0}, out = {0, 0};
    Loader l;
    float qk[32];
    l.what = uniform(block_thread / WARP);
    l.leads = block_thread % WARP == 0;
    l.prepared = &p.prepared[(s.segment.chunk + s.start) * p.heads_v + s.segment.head];
    l.row = uniform((int32_t)(s.segment.row + (int64_t)s.start * CHUNK));
    l.head = uniform(l.what == LOADS_ROWS ? s.segment.head_qk : s.segment.head);
    l.first_v = first_v + (l.what - LOADS_V) * STATE_COLUMNS;
    l.numbers = numbers, l.warm_up = first, l.whole = len / CHUNK;
    l.loaded = 0;
    l.in = ring;
    for (int number = 0; number < numbers; number++) {
        const int thread = renewed(block_thread) & (WARPGROUP - 1), warp = thread / WARP, lane = thread % WARP;
        const int row = BLOCK * warp + lane / 4, column = 2 * (lane % 4); /* of an accumulator's first element */
        const int valid = len - number * CHUNK;
        ChunkSlot &in = s.chunk[ring.slot];
        const fqla__factors &d = in.factors;
        Square *to = &s.p[out.slot];
        const Ring before = {out.slot, out.phase ^ 1}; /* of two chunks before */

        serve(p, s, l); /* once a chunk, waiting or not */
        wait_serving(p, s, l, &s.chunk_full[ring.slot], ring.phase);
        if (number >= first) {
            if (valid < CHUNK) {
                for (int w = 0; w < STATE_WARPGROUPS; w++) wait_serving(p, s, l, &s.v_full[ring.slot][w], ring.phase);
                clear_rows(in.k, 2, valid, thread);
                clear_rows(s.v[ring.slot], STATE_WARPGROUPS, valid, thread);
                mbarrier_arrive(&s.part_full);
                asm volatile("bar.sync %0, %1;" ::"n"((int)SCORES_BARRIER), "n"((int)WARPGROUP) : "memory");
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
            if (number >= OUT_SLOTS) retire(p, s, l, before, number - OUT_SLOTS);
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
            retire(p, s, l, before, number - OUT_SLOTS);
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&s.p_full[out.slot]);
        ring_next<SLOTS>(ring);
        ring_next<OUT_SLOTS>(out);
    }
    for (int number = max(0, numbers - OUT_SLOTS); number < numbers; number++) {
        const Ring last = {number % OUT_SLOTS, (uint32_t)(number / OUT_SLOTS % 2)};
        retire(p, s, l, last, number);
    }
    if (l.leads) bulk_store_wait<0>();
}

#endif
