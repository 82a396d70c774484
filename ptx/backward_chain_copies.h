/* The copies' warpgroup of backward_chains: one thread has the copy engine bring a chunk as soon as the state is done with the
   slot's last one, another has it take away what the state leaves. Threads of their own, since issuing a copy holds a warp a
   hundred cycles and more. The two other warps bring the gradients' T from its blocks to a tile. */
#ifndef FLASHQLA_BACKWARD_CHAIN_COPIES_H
#define FLASHQLA_BACKWARD_CHAIN_COPIES_H

#include "backward_chain_shared.h"
#include "progress.h"

static __device__ __forceinline__ void load_rows(Tile *to, const void *map, int32_t row, int32_t head, uint64_t *full) {
    for (int half = 0; half < 2; half++) tma_load(&to[half], map, half * FQLA__LOAD_COLUMNS, row, head, full);
}

/* A pass over the states that would end long before the reverse recurrences beside it leaves them the memory's time: it takes p.pace
   nanoseconds a chunk. */
static __device__ void load_chunks(const fqla__backward_params &p, ChainShared &s) {
    const fqla__forward_params &f = p.forward;
    const Chain &c = s.chain;
    const int way = c.way, numbers = c.numbers, head = c.segment.head, head_qk = c.segment.head_qk;
    const int step = way == GRADIENTS ? -1 : 1;
    const uint32_t tiles = way == GRADIENTS ? 5 : way == STATES ? 3 : 2;
    const uint32_t bytes = tiles * (uint32_t)sizeof(Tile) + (uint32_t)sizeof(fqla__prepared_chunk);
    const fqla__prepared_chunk *prepared = &f.prepared[(c.segment.chunk + c.start) * f.heads_v + head];
    const uint64_t pace = way == STATES ? (uint64_t)p.pace : 0, began = nanoseconds();
    int32_t row = (int32_t)(c.segment.row + (int64_t)c.start * CHUNK);
    Ring ring = {0, 0};
    for (int number = 0; number < numbers; number++) {
        while (pace > 0 && nanoseconds() - began < pace * (uint64_t)number) { /* ends: time goes on */
        }
        uint64_t *full = number == c.part ? &s.part_full : &s.full[ring.slot];
        if (number >= SLOTS) mbarrier_wait(&s.free[ring.slot], ring.phase ^ 1);
        if (way == GRADIENTS) {
            GradientsSlot &to = s.gradients[ring.slot];
            mbarrier_arrive_expect(full, bytes);
            load_rows(to.q, &f.q, row, head_qk, full);
            load_rows(to.k, &f.k, row, head_qk, full);
            tma_load(&to.dout, &f.o, c.half * STATE_COLUMNS, row, head, full);
            bulk_load(&to.prepared, prepared, sizeof *prepared, full);
        } else {
            StatesSlot &to = s.states[ring.slot];
            mbarrier_arrive_expect(full, bytes);
            load_rows(to.k, &f.k, row, head_qk, full);
            if (way == STATES) tma_load(&to.v, &f.v, c.half * STATE_COLUMNS, row, head, full);
            load_prepared(&to.t, &to.factors, prepared, full);
        }
        row += step * CHUNK;
        prepared += step * f.heads_v;
        ring_next<SLOTS>(ring);
    }
}

/* The state's warps have fenced what they wrote. dV's rows of a chunk that is not whole they store themselves. */
static __device__ void store_results(const fqla__backward_params &p, ChainShared &s) {
    const Chain &c = s.chain;
    const bool gradients = c.way == GRADIENTS;
    Ring ring = {0, 0};
    for (int number = c.silent; number < c.numbers; number++) {
        const int chunk = chunk_of(c, number);
        OutSlot &out = s.out[ring.slot];
        fqla__chunk_states &to = p.chunks[(c.segment.chunk + chunk) * p.forward.heads_v + c.segment.head];
        mbarrier_wait(&s.out_full[ring.slot], ring.phase);
        bulk_store(gradients ? to.ds[c.half] : to.s[c.half], out.state, sizeof out.state);
        if (!gradients) bulk_store(to.vn[c.half], &out.rows, sizeof out.rows);
        else if (number != c.part)
            tma_store(&p.dv, c.half * STATE_COLUMNS, (int32_t)(c.segment.row + (int64_t)chunk * CHUNK), c.segment.head, &out.rows);
        bulk_commit();
        bulk_store_wait<0>();
        mbarrier_arrive(&s.out_free[ring.slot]);
        ring_next<RINGS>(ring);
    }
    if (p.overlaps && c.numbers > 0) {
        bulk_store_landed();
        count_up(ended_chains(p, c.segment.chunk + c.segment.first, c.segment.head_qk));
    }
}

/* T below its diagonal from the triangle of blocks to a tile, by two warps. */
static __device__ __forceinline__ void spread_triangle(const uint8_t *t, Tile *to, int thread) {
#pragma unroll
    for (int i = 0; i < 10 * 32 / SPREADERS; i++) {
        const int unit = thread + i * SPREADERS, block = unit / 32; /* a row of 16 bytes of an 8 x 8 tile */
        const int column = block < 4 ? 0 : block < 7 ? 1 : block < 9 ? 2 : 3, row = block - column * (9 - column) / 2 + column;
        const int r = BLOCK * row + unit / 16 % 2 * 8 + unit % 8, u = 2 * column + unit / 8 % 2;
        *(uint4 *)(to->bytes + r * 128 + ((u ^ (r % 8)) * 16)) = *(const uint4 *)(t + unit * 16);
    }
}

/* T of number i lies where that of i - 2 was, as P. With it goes word that the copy engine has read what lay where results go. */
static __device__ void spread_triangles(ChainShared &s, int thread) {
    const int numbers = s.chain.numbers, silent = s.chain.silent;
    Ring ring = {0, 0}, before = {SLOTS - 2, 1}, two = {0, 0}, out = {0, 0}; /* before: of the chunk two before */
    for (int number = 0; number < numbers; number++) {
        mbarrier_wait(&s.full[ring.slot], ring.phase);
        if (number >= RINGS) mbarrier_wait(&s.free[before.slot], before.phase);
        spread_triangle(s.gradients[ring.slot].prepared.t, &s.t[two.slot], thread);
        fence_proxy_async(); /* it goes to wgmma */
        if (number >= silent) {
            if (number >= silent + RINGS) mbarrier_wait(&s.out_free[out.slot], out.phase ^ 1);
            ring_next<RINGS>(out);
        }
        arrive_warp(&s.pt_full[two.slot], thread % WARP);
        ring_next<SLOTS>(ring);
        ring_next<SLOTS>(before);
        ring_next<RINGS>(two);
    }
}

static __device__ __forceinline__ void run_copies(const fqla__backward_params &p, ChainShared &s, int thread) {
    if (thread == 0) load_chunks(p, s);
    else if (thread == WARP) store_results(p, s);
    else if (thread >= 2 * WARP && s.chain.way == GRADIENTS) spread_triangles(s, thread - 2 * WARP);
}

#endif
