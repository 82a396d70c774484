/* A state warpgroup of the forward: 64 of the state's columns through the segment's chunks. state.h has a step's products; O's are

       QS  = S0^T Q^T                     64 x 64      under W
       O   = scale (o QS + Vn P^T)        64 x 64      off the chain

   A chunk's products in the order in which they are issued, and what the warps do meanwhile:

       K S0        O of the chunk before goes to shared memory, V^T comes
       Q S0        W
       T W         barriers are waited for, the state is scaled
       update      its operands are packed a step of 16 tokens ahead, Q S0 is scaled
       P Vn        the state is packed for the next chunk's K S0

   ks and o stay in the same registers from chunk to chunk: 64 + 32 + 32 of accumulators, 32 + 16 + 16 of operands. */
#ifndef FLASHQLA_FORWARD_STATE_H
#define FLASHQLA_FORWARD_STATE_H

#include "forward_shared.h"
#include "state.h"

/* scale O^T into its place: the warp's 16 columns. */
static __device__ __forceinline__ void stage_output(const float (&o)[32], float scale, Tile *tile, const Lane &lane) {
    const uint32_t columns = shared_address(tile->bytes) + lane.columns;
#pragma unroll
    for (int pair = 0; pair < CHUNK / 16; pair++) {
        const float *d = &o[8 * pair];
        store_tiles_transposed(columns + pair * 2048, pack_elements(d[0] * scale, d[1] * scale), pack_elements(d[2] * scale, d[3] * scale),
                               pack_elements(d[4] * scale, d[5] * scale), pack_elements(d[6] * scale, d[7] * scale));
    }
}

/* The rows of a part of a chunk, by ordinary stores of the warp's 16 columns: a box would run into the next sequence's. */
static __device__ __forceinline__ void send_rows(const fqla__forward_params &p, const Tile *tile, const Segment &segment, int first_v, int warp,
                                                 int lane) {
    const int chunk = segment.end - 1, rows = segment.len - chunk * CHUNK;
    uint16_t *to = (uint16_t *)p.o_rows + (segment.row + (int64_t)chunk * CHUNK) * p.o_token + segment.head * p.o_head + first_v + 16 * warp +
                   lane % 2 * 8;
    for (int row = lane / 2; row < rows; row += WARP / 2)
        *(uint4 *)(to + row * p.o_token) = *(const uint4 *)(tile->bytes + row * 128 + (((2 * warp + lane % 2) ^ (row % 8)) * 16));
}

/* A state warp's place in the rings, from item to item. */
typedef struct Places {
    Ring chunk, out;
    uint32_t part_phases; /* of part_full, a bit a slot: few chunks use it */
} Places;

/* Wait until chunk number i is there; where a part of it is another sequence's, until that is zeros. Past the item's last there is
   nothing to wait for: its KS is issued all the same, of whatever lies in the slot, and not used, since a wgmma in flight on one of two
   paths would make the compiler wait for every one. */
static __device__ __forceinline__ void wait_chunk(ForwardShared &s, Places &at, int number, int whole, int numbers) {
    if (number >= numbers) return;
    if (number >= whole) {
        mbarrier_wait(&s.part_full[at.chunk.slot], at.part_phases >> at.chunk.slot & 1);
        at.part_phases ^= 1u << at.chunk.slot;
    }
    mbarrier_wait(&s.chunk_full[at.chunk.slot], at.chunk.phase);
}

/* The warpgroup's first column. Asked for where it is used: a register less for the chunks' loop. */
static __device__ __forceinline__ int first_column(const Item &item, int warpgroup) {
    return item.first_v + warpgroup * STATE_COLUMNS;
}

static __device__ __forceinline__ void walk_item(const fqla__forward_params &p, ForwardShared &s, const Item &item, int warpgroup,
                                                 int thread, const Lane &lane, Places &at) {
    const Segment &segment = item.segment;
    const int numbers = uniform(segment.end - item.start), warm_up = uniform(segment.first - item.start);
    const int whole = uniform(segment.len / CHUNK - item.start); /* chunks with all of their rows */
    const int every = p.checkpoint_every;
    const uint32_t first_slot = shared_units(s.chunk), first_p = shared_units(s.p);
    Ring &ring = at.chunk, &out = at.out;
    float state[64], ks[32], o[32];
    uint32_t state16[32];

    if (segment.kept >= 0 && warm_up == 0)
        load_kept(state, &p.states[segment.kept * p.heads_v + segment.head], first_column(item, warpgroup) / STATE_COLUMNS, thread);
    else if (segment.kept < 0 && segment.in >= 0)
        load_state(state, p.h0, segment.in, state_place(p, first_column(item, warpgroup), thread));
    else
        clear_state(state);
    int number = 0;
    for (; number < warm_up; number++) {
        const uint32_t units = first_slot + ring.slot * (sizeof(ChunkSlot) / 16);
        wait_chunk(s, at, number, whole, numbers);
        mbarrier_wait(&s.p_full[out.slot], out.phase); /* there is none, and no O, but the phases stay in step */
        mbarrier_wait(&s.out_free[out.slot], out.phase ^ 1);
        advance_state(state, units, units + offsetof(ChunkSlot, t) / 16, s.chunk[ring.slot].factors, &s.chunk[ring.slot].v[warpgroup], lane);
        arrive_warp(&s.chunk_free[ring.slot], thread % WARP);
        arrive_warp(&s.out_full[out.slot], thread % WARP);
        ring_next<SLOTS>(ring);
        ring_next<OUT_SLOTS>(out);
    }

    pack_operand(state16, state);
    wait_chunk(s, at, number, whole, numbers);
#pragma unroll
    for (int i = 0; i < 32; i++) ks[i] = o[i] = 0.0f;
    wgmma_fence();
    multiply_rows_again(ks, state16, first_slot + ring.slot * (sizeof(ChunkSlot) / 16));
    wgmma_commit();
    for (; number < numbers; number++) {
        const uint32_t units = first_slot + ring.slot * (sizeof(ChunkSlot) / 16);
        const fqla__factors &factors = s.chunk[ring.slot].factors;
        const Ring now = ring, now_out = out;
        uint32_t v16[16], vn16[16], update16[16];
        ring_next<SLOTS>(ring);
        ring_next<OUT_SLOTS>(out);

        load_v(v16, &s.chunk[now.slot].v[warpgroup], lane);
        wgmma_wait<0>();
        wgmma_settle(ks);
        wgmma_fence();
        multiply_rows_again(o, state16, units + offsetof(ChunkSlot, q) / 16);
        wgmma_commit();
        start_vn(ks, vn16, v16, factors, lane); /* vn16 is W until Vn is there */
        wgmma_fence();
        multiply_square(ks, vn16, units + offsetof(ChunkSlot, t) / 16);
        wgmma_commit();
        wait_chunk(s, at, number + 1, whole, numbers);
        mbarrier_wait(&s.out_free[now_out.slot], now_out.phase ^ 1);
        scale_state(state, factors.gamma_chunk);
        wgmma_wait<0>();
        wgmma_settle(ks);
        start_update(state, vn16, update16, ks, factors.update, units, lane);
        wgmma_commit();
        mbarrier_wait(&s.p_full[now_out.slot], now_out.phase); /* here, since ptxas would put the next lines between the update's products */
        wgmma_settle(o);
        scale_columns(o, factors.o, lane);
        wgmma_fence();
        multiply_square(o, vn16, first_p + now_out.slot * (sizeof(Square) / 16));
        wgmma_commit();
        wgmma_wait<1>();
        wgmma_settle(state);
        pack_operand(state16, state);
        wgmma_fence();
        multiply_rows_again(ks, state16, first_slot + ring.slot * (sizeof(ChunkSlot) / 16));
        wgmma_commit();
        arrive_warp(&s.chunk_free[now.slot], thread % WARP);
        wgmma_wait<1>();
        wgmma_settle(o);
        stage_output(o, p.scale, &s.o[now_out.slot][warpgroup], lane);
        arrive_warp(&s.out_full[now_out.slot], thread % WARP);
        if (__builtin_expect(every > 0, 0)) {
            const int chunks = item.start + number + 1;
            if (chunks % every == 0 && chunks * CHUNK <= segment.len)
                store_state(state, p.snapshots, (segment.snapshot + chunks / every - 1) * p.heads_v + segment.head,
                            state_place(p, first_column(item, warpgroup), thread));
        }
    }
    wgmma_wait<0>();
    if (segment.end * CHUNK > segment.len)
        send_rows(p, &s.o[out.slot ^ 1][warpgroup], segment, first_column(item, warpgroup), renewed(thread) / WARP,
                  renewed(thread) % WARP);
    if (segment.index == segment.segments - 1 && segment.out >= 0)
        store_state(state, p.ht, segment.out, state_place(p, first_column(item, warpgroup), thread));
}

static __device__ void run_state(const fqla__forward_params &p, ForwardShared &s, int warpgroup, int thread) {
    const Lane lane = find_lane(thread);
    Ring items = {0, 0};
    Places at = {{0, 0}, {0, 0}, 0};
    for (;; ring_next<ITEMS>(items)) {
        const Item &item = s.items[items.slot];
        mbarrier_wait(&s.item_full[items.slot], items.phase);
        if (uniform(item.segment.row < 0)) return;
        arrive_warp(&s.item_begun[items.slot], thread % WARP);
        walk_item(p, s, item, warpgroup, thread, lane, at);
    }
}

#endif
