/* The copies' warpgroup of the forward: one thread has the copy engine bring a chunk's tiles as soon as the state is done with the slot's
   last ones, another has it take O away. Threads of their own, since issuing a copy holds a warp a hundred cycles and more. */
#ifndef FLASHQLA_FORWARD_COPIES_H
#define FLASHQLA_FORWARD_COPIES_H

#include "forward_shared.h"

static __device__ void load_chunks(const fqla__forward_params &p, ForwardShared &s, int first_v) {
    const int head = s.segment.head, head_qk = s.segment.head_qk, numbers = s.segment.end - s.start;
    const fqla__prepared_chunk *prepared = &p.prepared[(s.segment.chunk + s.start) * p.heads_v + head];
    const uint32_t bytes = (4 + STATE_WARPGROUPS) * 128 * (uint32_t)p.load_rows + (uint32_t)sizeof *prepared;
    int32_t row = (int32_t)(s.segment.row + (int64_t)s.start * CHUNK);
    Ring ring = {0, 0};
    for (int number = 0; number < numbers; number++) {
        ChunkSlot &slot = s.chunk[ring.slot];
        uint64_t *full = &s.chunk_full[ring.slot];
        if (number >= SLOTS) mbarrier_wait(&s.chunk_free[ring.slot], ring.phase ^ 1);
        mbarrier_arrive_expect(full, bytes);
        for (int half = 0; half < 2; half++) tma_load(&slot.k[half], &p.k, half * FQLA__LOAD_COLUMNS, row, head_qk, full);
        for (int w = 0; w < STATE_WARPGROUPS; w++) tma_load(&slot.v[w], &p.v, first_v + w * STATE_COLUMNS, row, head, full);
        for (int half = 0; half < 2; half++) tma_load(&slot.q[half], &p.q, half * FQLA__LOAD_COLUMNS, row, head_qk, full);
        load_prepared(&slot.t, &slot.factors, prepared, full);
        row += CHUNK;
        prepared += p.heads_v;
        ring_next<SLOTS>(ring);
    }
}

static __device__ void store_output(const fqla__forward_params &p, ForwardShared &s, int first_v) {
    const int numbers = s.segment.end - s.start, warm_up = s.segment.first - s.start;
    const int whole = s.segment.len / CHUNK - s.start; /* chunks with all of their rows */
    const int32_t row = (int32_t)(s.segment.row + (int64_t)s.start * CHUNK);
    Ring out = {0, 0};
    for (int number = 0; number < numbers; number++) {
        mbarrier_wait(&s.out_full[out.slot], out.phase);
        if (number >= warm_up && number < whole) {
            fence_proxy_async(); /* the state's warps wrote it */
            for (int w = 0; w < STATE_WARPGROUPS; w++)
                tma_store(&p.o, first_v + w * STATE_COLUMNS, row + number * CHUNK, s.segment.head, &s.o[out.slot][w]);
            bulk_commit();
            bulk_store_wait<0>();
        }
        mbarrier_arrive(&s.out_free[out.slot]);
        ring_next<OUT_SLOTS>(out);
    }
}

static __device__ __forceinline__ void run_copies(const fqla__forward_params &p, ForwardShared &s, int first_v, int thread) {
    if (thread == 0) load_chunks(p, s, first_v);
    else if (thread == WARP) store_output(p, s, first_v);
}

#endif
