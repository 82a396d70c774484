/* The warp that finds a block's items: its own number first, and then whichever is next.

   As many blocks as multiprocessors work off the items in the table's order, the longest first. Which block gets which is not fixed
   beforehand: an item of a long sequence takes as long as many others, a warm one longer than an exact one, and a multiprocessor
   that a kernel of another stream occupies takes none. One item is taken ahead, and only once the one before is nearly loaded: a
   block that held more would keep them from others that are idle. Items are independent of one another: bits do not depend on who
   has them. */
#ifndef FLASHQLA_FORWARD_ITEMS_H
#define FLASHQLA_FORWARD_ITEMS_H

#include "forward_shared.h"
#include "grid.h"

enum { ITEMS_WARP = 2 }; /* of the copies' warpgroup */

/* By a warp. */
static __device__ __forceinline__ void zero_output(const fqla__forward_params &p, const Item &item, int lane) {
    enum { UNITS = STATE_WARPGROUPS * STATE_COLUMNS / 8 };
    const Segment &segment = item.segment;
    const int rows = min(segment.len, segment.end * CHUNK) - segment.first * CHUNK;
    uint16_t *to = (uint16_t *)p.o_rows + (segment.row + segment.first * CHUNK) * p.o_token + segment.head * p.o_head +
                   item.first_v + lane % UNITS * 8;
    for (int row = lane / UNITS; row < rows; row += WARP / UNITS) *(uint4 *)(to + row * p.o_token) = make_uint4(0, 0, 0, 0);
}

/* The item's first state on its way to the L2 cache: the threads read it 32 bytes at a time, which takes memory 6 us when all
   blocks do. part: of SPLIT. */
static __device__ __forceinline__ void prefetch_state(const fqla__forward_params &p, const Item &item, uint32_t part) {
    const uint32_t bytes = DIM * DIM * (p.state_bf16 ? 2 : 4), share = bytes / SPLIT;
    if (item.segment.kept < 0 && item.segment.in >= 0)
        bulk_prefetch((const char *)p.h0 + item.segment.in * bytes + part * share, share);
}

/* What needs nothing of the kernels before this one. By a thread. */
static __device__ __forceinline__ void look_up(const fqla__forward_params &p, Item &item, uint32_t number) {
    const uint32_t parts = (uint32_t)renewed(p.heads_v) * SPLIT, part = number % SPLIT; /* renewed: of 24 registers it keeps none */
    item.first_v = (int32_t)part * STATE_COLUMNS * STATE_WARPGROUPS;
    if (find_segment(p, number / parts, (int)(number % parts / SPLIT), part == 0, &item.segment)) prefetch_state(p, item, part);
    else item.segment.row = -1;
}

/* The first has been looked up. */
static __device__ void find_items(const fqla__forward_params &p, ForwardShared &s, int thread) {
    Ring ring = {0, 0};
    for (;;) {
        Item &item = s.items[ring.slot];
        const int lane = renewed(thread) % WARP;
        grid_wait();
        if (item.segment.row >= 0 && item.segment.padding) {
            zero_output(p, item, lane);
        } else {
            int warm_up = 0;
            if (item.segment.row >= 0 && item.segment.index > 0)
                warm_up = warm_up_chunks(p, item.segment, item.segment.first, lane);
            if (lane == 0) {
                item.start = item.segment.first - warm_up;
                mbarrier_arrive(&s.item_full[ring.slot]);
            }
            if (item.segment.row < 0) return;
            mbarrier_wait(&s.item_begun[ring.slot], ring.phase);
            ring_next<ITEMS>(ring);
        }
        __syncwarp();
        if (renewed(thread) % WARP == 0) look_up(p, s.items[ring.slot], gridDim.x + atomicAdd(&p.prepared->factors.taken, 1u));
        __syncwarp();
    }
}

#endif
