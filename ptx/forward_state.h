/* A state warpgroup of the forward: 64 of the state's columns through the segment's chunks. state.h has a step's products; O's are

       O   = scale (o (S0^T Q^T) + Vn P^T)  64 x 64      off the chain

   Chunk c + 1's KS starts before chunk c's O is read out. What a step needs from shared memory's barriers it waits for while its
   products run. */
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

/* Wait until chunk number i is there, and its v; where a part of it is another sequence's, until that is zeros. Past the last there is
   nothing to wait for: its KS is issued all the same, of whatever lies in the slot, and not used, since a wgmma in flight on one of two
   paths would make the compiler wait for every one. */
static __device__ __forceinline__ void wait_chunk(ForwardShared &s, const Ring &ring, int warpgroup, int number, int whole, int numbers) {
    if (number >= numbers) return;
    if (number >= whole) mbarrier_wait(&s.part_full, 0);
    mbarrier_wait(&s.chunk_full[ring.slot], ring.phase);
    mbarrier_wait(&s.v_full[ring.slot][warpgroup], ring.phase);
}

/* What the warp has read or written is there for others. */
static __device__ __forceinline__ void arrive(uint64_t *barrier, int thread) {
    __syncwarp();
    if (thread % WARP == 0) mbarrier_arrive(barrier);
}

/* first_v: the block's first column. warm: the segment starts from zero. */
static __device__ void run_state(const fqla__forward_params &p, ForwardShared &s, int first_v, int warpgroup, int thread, bool warm) {
    const Segment &segment = s.segment;
    const int numbers = uniform(segment.end - s.start), warm_up = uniform(segment.first - s.start), every = p.checkpoint_every;
    const int whole = uniform(segment.len / CHUNK - s.start); /* chunks with all of their rows */
    const uint32_t first_slot = shared_units(s.chunk), first_p = shared_units(s.p);
    const Lane lane = find_lane(thread);
    Ring ring = {0, 0}, out = {0, 0};
    float state[64], ks[32], o[32];
    uint32_t state16[32];

    first_v += warpgroup * STATE_COLUMNS;
    if (segment.kept >= 0 && !warm) load_kept(state, &p.states[segment.kept * p.heads_v + segment.head], first_v / STATE_COLUMNS, thread);
    else if (segment.kept < 0 && segment.in >= 0) load_state(state, p.h0, segment.in, state_place(p, first_v, thread));
    else clear_state(state);
    int number = 0;
    for (; number < warm_up; number++) {
        const uint32_t units = first_slot + ring.slot * (sizeof(ChunkSlot) / 16);
        wait_chunk(s, ring, warpgroup, number, whole, numbers);
        mbarrier_wait(&s.p_full[out.slot], out.phase); /* there is none, but the phases stay in step */
        advance_state(state, units, units + offsetof(ChunkSlot, t) / 16, s.chunk[ring.slot].factors, &s.v[ring.slot][warpgroup], lane);
        arrive(&s.v_free[ring.slot][warpgroup], thread);
        arrive(&s.chunk_free[ring.slot], thread);
        arrive(&s.out_full[out.slot][warpgroup], thread);
        ring_next<SLOTS>(ring);
        ring_next<OUT_SLOTS>(out);
    }

    pack_operand(state16, state);
    wait_chunk(s, ring, warpgroup, number, whole, numbers);
    wgmma_fence();
    multiply_rows(ks, state16, first_slot + ring.slot * (sizeof(ChunkSlot) / 16));
    wgmma_commit();
    for (; number < numbers; number++) {
        const uint32_t units = first_slot + ring.slot * (sizeof(ChunkSlot) / 16);
        const fqla__factors &factors = s.chunk[ring.slot].factors;
        const Ring now = ring, now_out = out;
        uint32_t w16[16], update16[16];
        ring_next<SLOTS>(ring);
        ring_next<OUT_SLOTS>(out);

        wgmma_wait<0>();
        wgmma_settle(ks);
        subtract_from_v(ks, &s.v[now.slot][warpgroup], factors.w, lane);
        pack_operand(w16, ks);
        scale_columns<1>(ks, factors.beta, lane);
        wgmma_fence();
        multiply_square(ks, w16, units + offsetof(ChunkSlot, t) / 16);
        multiply_rows(o, state16, units + offsetof(ChunkSlot, q) / 16);
        wgmma_commit();
        arrive(&s.v_free[now.slot][warpgroup], thread);
        wait_chunk(s, ring, warpgroup, number + 1, whole, numbers);
        scale_state(state, factors.gamma_chunk);
        wgmma_wait<0>();
        wgmma_settle(ks);
        pack_columns(w16, update16, ks, factors.update, lane); /* w16 is Vn from here on */
        wgmma_fence();
        multiply_update(state, update16, units);
        wgmma_commit();
        wgmma_settle(o);
        scale_columns<1>(o, factors.o, lane);
        mbarrier_wait(&s.p_full[now_out.slot], now_out.phase);
        wgmma_fence();
        multiply_square(o, w16, first_p + now_out.slot * (sizeof(Square) / 16));
        wgmma_commit();
        wgmma_wait<1>();
        wgmma_settle(state);
        arrive(&s.chunk_free[now.slot], thread);
        pack_operand(state16, state);
        wgmma_fence();
        multiply_rows(ks, state16, first_slot + ring.slot * (sizeof(ChunkSlot) / 16));
        wgmma_commit();
        wgmma_wait<1>();
        wgmma_settle(o);
        if (number >= OUT_SLOTS) mbarrier_wait(&s.out_free[now_out.slot][warpgroup], now_out.phase ^ 1);
        stage_output(o, p.scale, &s.o[now_out.slot][warpgroup], lane);
        arrive(&s.out_full[now_out.slot][warpgroup], thread);
        if (__builtin_expect(every > 0, 0)) {
            const int chunks = s.start + number + 1;
            if (chunks % every == 0 && chunks * CHUNK <= segment.len)
                store_state(state, p.snapshots, (segment.snapshot + chunks / every - 1) * p.heads_v + segment.head, state_place(p, first_v, thread));
        }
    }
    wgmma_wait<0>();
    if (segment.end * CHUNK > segment.len) send_rows(p, &s.o[out.slot ^ 1][warpgroup], segment, first_v, thread / WARP, thread % WARP);
    if (segment.index == segment.segments - 1 && segment.out >= 0) store_state(state, p.ht, segment.out, state_place(p, first_v, thread));
}

#endif
