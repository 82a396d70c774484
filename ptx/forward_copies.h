/* The copies' warpgroup of the forward: one thread has the copy engine bring a chunk's tiles as soon as the state is done with the
   slot's last ones, another has it take O away, a warp finds the next item. Threads of their own, since issuing a copy holds a warp
   a hundred cycles and more. The loads run ahead of the state over an item's end, and the stores behind it. */
#ifndef FLASHQLA_FORWARD_COPIES_H
#define FLASHQLA_FORWARD_COPIES_H

#include "forward_items.h"
#include "forward_shared.h"

/* begun: the item's, which has the next one looked up. That takes about 2 us, a chunk's time or two. */
static __device__ __forceinline__ void load_chunks(const fqla__forward_params &p, ForwardShared &s, const Item &item,
                                                   uint64_t *begun, Ring &ring) {
    enum { LEFT = 2 }; /* chunks then left to load */
    const int head = item.segment.head, head_qk = item.segment.head_qk, first_v = item.first_v;
    const fqla__prepared_chunk *prepared = &p.prepared[(item.segment.chunk + item.start) * p.heads_v + head];
    const uint32_t bytes = (4 + STATE_WARPGROUPS) * 128 * (uint32_t)p.load_rows + (uint32_t)sizeof *prepared;
    int32_t row = (int32_t)(item.segment.row + (int64_t)item.start * CHUNK);
    int left = item.segment.end - item.start;
    if (left < LEFT) mbarrier_arrive(begun);
    for (; left > 0; left--) {
        ChunkSlot &slot = s.chunk[ring.slot];
        uint64_t *full = &s.chunk_full[ring.slot];
        if (left == LEFT) mbarrier_arrive(begun);
        mbarrier_wait(&s.chunk_free[ring.slot], ring.phase ^ 1);
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

static __device__ __forceinline__ void store_output(const fqla__forward_params &p, ForwardShared &s, const Item &item, Ring &out) {
    const int numbers = item.segment.end - item.start, warm_up = item.segment.first - item.start, head = item.segment.head;
    const int whole = item.segment.len / CHUNK - item.start; /* chunks with all of their rows */
    const int32_t row = (int32_t)(item.segment.row + (int64_t)item.start * CHUNK), first_v = item.first_v;
    for (int number = 0; number < numbers; number++) {
        mbarrier_wait(&s.out_full[out.slot], out.phase);
        if (number >= warm_up && number < whole) {
            fence_proxy_async(); /* the state's warps wrote it */
            for (int w = 0; w < STATE_WARPGROUPS; w++)
                tma_store(&p.o, first_v + w * STATE_COLUMNS, row + number * CHUNK, head, &s.o[out.slot][w]);
            bulk_commit();
            bulk_store_wait<0>();
        }
        mbarrier_arrive(&s.out_free[out.slot]);
        ring_next<OUT_SLOTS>(out);
    }
}

static __device__ __forceinline__ void run_copies(const fqla__forward_params &p, ForwardShared &s, int thread) {
    Ring items = {0, 0}, ring = {0, 0};
    if (thread / WARP == ITEMS_WARP) find_items(p, s, thread);
    if (thread != 0 && thread != WARP) return;
    for (;; ring_next<ITEMS>(items)) {
        const Item &item = s.items[items.slot];
        mbarrier_wait(&s.item_full[items.slot], items.phase);
        if (item.segment.row < 0) return;
        if (thread == 0) {
            load_chunks(p, s, item, &s.item_begun[items.slot], ring);
        } else {
            mbarrier_arrive(&s.item_begun[items.slot]);
            store_output(p, s, item, ring);
        }
    }
}

#endif
