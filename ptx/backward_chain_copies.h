/* The copies' warpgroup of backward_chains: one thread has the copy engine bring a chunk as soon as the state is done with the
   slot's last one, another has it take away what the state leaves. Threads of their own, since issuing a copy holds a warp a
   hundred cycles and more. */
#ifndef FLASHQLA_BACKWARD_CHAIN_COPIES_H
#define FLASHQLA_BACKWARD_CHAIN_COPIES_H

#include "backward_chain_shared.h"

static __device__ __forceinline__ void load_rows(Tile *to, const void *map, int32_t row, int32_t head, uint64_t *full) {
    for (int half = 0; half < 2; half++) tma_load(&to[half], map, half * FQLA__LOAD_COLUMNS, row, head, full);
}

static __device__ void load_chunks(const fqla__backward_params &p, ChainShared &s) {
    const fqla__forward_params &f = p.forward;
    const Chain &c = s.chain;
    const int way = c.way, numbers = c.numbers, head = c.segment.head, head_qk = c.segment.head_qk;
    const int step = way == GRADIENTS ? -1 : 1;
    const uint32_t tiles = way == GRADIENTS ? 5 : way == STATES ? 3 : 2;
    const uint32_t bytes = tiles * (uint32_t)sizeof(Tile) + (uint32_t)sizeof(fqla__prepared_chunk);
    const fqla__prepared_chunk *prepared = &f.prepared[(c.segment.chunk + c.start) * f.heads_v + head];
    int32_t row = (int32_t)(c.segment.row + (int64_t)c.start * CHUNK);
    Ring ring = {0, 0};
    for (int number = 0; number < numbers; number++) {
        uint64_t *full = number == c.part ? &s.part_full : &s.full[ring.slot];
        if (way == GRADIENTS) {
            GradientsSlot &to = s.gradients[ring.slot];
            if (number >= SLOTS) mbarrier_wait(&s.half_free[ring.slot], ring.phase ^ 1);
            mbarrier_arrive_expect(full, bytes);
            load_rows(to.q, &f.q, row, head_qk, full);
            tma_load(&to.dout, &f.o, c.half * STATE_COLUMNS, row, head, full);
            if (number >= SLOTS) mbarrier_wait(&s.free[ring.slot], ring.phase ^ 1);
            load_rows(to.k, &f.k, row, head_qk, full);
            bulk_load(&to.prepared, prepared, sizeof *prepared, full);
        } else {
            StatesSlot &to = s.states[ring.slot];
            if (number >= SLOTS) mbarrier_wait(&s.free[ring.slot], ring.phase ^ 1);
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
}

static __device__ __forceinline__ void run_copies(const fqla__backward_params &p, ChainShared &s, int thread) {
    if (thread == 0) load_chunks(p, s);
    else if (thread == WARP) store_results(p, s);
}

#endif
