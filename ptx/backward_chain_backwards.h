/* The state's warpgroup of backward_chains backwards, its gradient. As forwards it waits while its products run, and issues the next
   chunk's K dS1 as soon as the state is there. A chunk's products in the order in which they are issued, and what the warps do meanwhile:

       K dS1, P^T dO    the state is scaled, dS1's copy is staged, factors come
       T^T dVn          dVn before it
       Q's update       w dW
       K's update       dV is staged, the next chunk is waited for, its dO comes and is multiplied by o */
#ifndef FLASHQLA_BACKWARD_CHAIN_BACKWARDS_H
#define FLASHQLA_BACKWARD_CHAIN_BACKWARDS_H

#include "backward_chain_state.h"

/* dO^T, 64 columns by 64 tokens, as left operands: as it is. */
static __device__ __forceinline__ void load_columns(uint32_t (&a)[16], const Tile *tile, const Lane &place) {
#pragma unroll
    for (int pair = 0; pair < CHUNK / 16; pair++)
        load_tiles_transposed(*(uint32_t (*)[4])&a[4 * pair], shared_address(tile->bytes) + place.columns + pair * 2048);
}

/* Its columns (tokens) multiplied by their factors times `times`; rest: what the rounding took away. */
template <bool rest>
static __device__ __forceinline__ void scale_operand(uint32_t (&to)[16], const uint32_t (&a)[16], const float *factors, float times,
                                                     const Lane &place) {
#pragma unroll
    for (int tile = 0; tile < CHUNK / 8; tile++) {
        const float2 factor = factors_of(factors, place, tile);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t pair = a[2 * tile + half];
            const float low = low_element(pair) * (factor.x * times), high = high_element(pair) * (factor.y * times);
            uint32_t packed = pack_elements(low, high);
            if (rest) packed = pack_elements(low - low_element(packed), high - high_element(packed));
            to[2 * tile + half] = packed;
        }
    }
}

/* d += left operand [64 x 64] by a tile, k over its rows. */
static __device__ __forceinline__ void multiply_tile(float (&d)[32], const uint32_t (&a)[16], uint32_t tile) {
#pragma unroll
    for (int step = 0; step < CHUNK / 16; step++) wgmma_64x64_transposed(d, &a[4 * step], tile_descriptor(tile + step * 128, 0));
}

static __device__ __forceinline__ void multiply_tile_again(float (&d)[32], const uint32_t (&a)[16], uint32_t tile) {
    wgmma_64x64_transposed_again(d, &a[0], tile_descriptor(tile, 0));
#pragma unroll
    for (int step = 1; step < CHUNK / 16; step++) wgmma_64x64_transposed(d, &a[4 * step], tile_descriptor(tile + step * 128, 0));
}

/* The factors of the lane's sixteen tokens: ahead of where they are used, since shared memory is far away. */
static __device__ __forceinline__ void load_factors(float2 (&to)[8], const float *factors, const Lane &place) {
#pragma unroll
    for (int tile = 0; tile < CHUNK / 8; tile++) to[tile] = factors_of(factors, place, tile);
}

/* dVn = update KdS + P^T dO as a left operand, and beta dVn in place of KdS. */
static __device__ __forceinline__ void make_dvn(uint32_t (&dvn16)[16], float (&ks)[32], const float (&po)[32], const float2 (&update)[8],
                                                const float *betas, const Lane &place) {
#pragma unroll
    for (int tile = 0; tile < CHUNK / 8; tile++) {
        const float2 u = update[tile], beta = factors_of(betas, place, tile);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float *d = &ks[4 * tile + 2 * half];
            const float low = fmaf(u.x, d[0], po[4 * tile + 2 * half]), high = fmaf(u.y, d[1], po[4 * tile + 2 * half + 1]);
            dvn16[2 * tile + half] = pack_elements(low, high);
            d[0] = beta.x * low;
            d[1] = beta.y * high;
        }
    }
}

/* dS0 -= K^T (w dW), 16 tokens as soon as their operand is packed. */
static __device__ __forceinline__ void subtract_update(float (&state)[64], uint32_t (&wdw16)[16], const float (&dw)[32], const float2 (&w)[8],
                                                       uint32_t k) {
#pragma unroll
    for (int step = 0; step < CHUNK / 16; step++) {
#pragma unroll
        for (int i = 4 * step; i < 4 * step + 4; i++)
            wdw16[i] = pack_elements(-w[i / 2].x * dw[2 * i], -w[i / 2].y * dw[2 * i + 1]);
        wgmma_fence();
        wgmma_64x128_transposed(state, &wdw16[4 * step], tile_descriptor(k + step * 128, TILE_UNITS));
    }
}

/* The rows of dV of a chunk that is not whole, by ordinary stores: a box would run into the next sequence's. A warp's own 16
   columns. */
static __device__ __forceinline__ void send_rows(const fqla__backward_params &p, const Tile *tile, const Chain &c, int warp,
                                                 int lane) {
    const int chunk = c.segment.len / CHUNK, rows = c.segment.len % CHUNK;
    uint16_t *to = (uint16_t *)p.dv_rows + (c.segment.row + (int64_t)chunk * CHUNK) * p.v_token + c.segment.head * p.v_head +
                   c.half * STATE_COLUMNS + 16 * warp + lane % 2 * 8;
    for (int row = lane / 2; row < rows; row += WARP / 2)
        *(uint4 *)(to + row * p.v_token) = *(const uint4 *)(tile->bytes + row * 128 + (((2 * warp + lane % 2) ^ (row % 8)) * 16));
}

static __device__ void run_gradients(const fqla__backward_params &p, ChainShared &s, int thread) {
    const Chain &c = s.chain;
    const int numbers = uniform(c.numbers), silent = uniform(c.silent), part = uniform(c.part);
    const int lane = thread % WARP, warp = thread / WARP;
    const uint32_t first_slot = shared_units(s.gradients), first_p = shared_units(s.p), first_t = shared_units(s.t);
    const Lane place = find_lane(thread);
    const uint32_t rows = operand_place(warp, lane);
    Ring ring = {0, 0}, ring_p = {0, 0}, ring_out = {0, 0};
    float state[64], ks[32], po[32];
    uint32_t state16[32], do16[16], odo16[16]; /* of the chunk: its dS1, dO and o dO */

    start_state(p, c, state, p.dht, FQLA__CARRIED_DHT, p.gradients, thread);
    if (c.from == FROM_GIVEN) scale_state(state, p.per_unit);
    pack_operand(state16, state);
    wait_chunk(s, ring, 0, numbers);
    load_columns(do16, &s.gradients[0].dout, place);
    scale_operand<false>(odo16, do16, s.gradients[0].prepared.factors.o, p.power, place);
#pragma unroll
    for (int i = 0; i < 32; i++) ks[i] = po[i] = 0.0f;
    wgmma_fence();
    multiply_rows_again(ks, state16, first_slot);
    wgmma_commit();
    for (int number = 0; number < numbers; number++) {
        const uint32_t units = first_slot + ring.slot * (sizeof(GradientsSlot) / 16);
        const fqla__factors &factors = s.gradients[ring.slot].prepared.factors;
        OutSlot &out = s.out[ring_out.slot];
        const Ring now = ring, now_p = ring_p;
        uint32_t dvn16[16], wdw16[16], dv16[16];
        float2 update[8], w[8];
        ring_next<SLOTS>(ring);
        ring_next<RINGS>(ring_p);

        mbarrier_wait(&s.pt_full[now_p.slot], now_p.phase);
        wgmma_fence();
        multiply_tile_again(po, do16, first_p + now_p.slot * TILE_UNITS);
        wgmma_commit();
        scale_state(state, factors.gamma_chunk);
        if (number >= silent) stage_state(state16, out.state, rows);
        load_factors(update, factors.update, place);
        wgmma_wait<0>();
        wgmma_settle(ks);
        wgmma_settle(po);
        make_dvn(dvn16, ks, po, update, factors.beta, place);
        wgmma_fence();
        multiply_tile(ks, dvn16, first_t + now_p.slot * TILE_UNITS);
        wgmma_commit();
        multiply_update(state, odo16, units + offsetof(GradientsSlot, q) / 16);
        wgmma_commit();
        load_factors(w, factors.w, place);
        wgmma_wait<1>();
        wgmma_settle(ks);
        subtract_update(state, wdw16, ks, w, units);
        wgmma_commit();
#pragma unroll
        for (int i = 0; i < 16; i++) dv16[i] = pack_elements(p.unit * ks[2 * i], p.unit * ks[2 * i + 1]);
        if (number >= silent) stage_rows(dv16, &out.rows, place);
        wait_chunk(s, ring, number + 1, numbers);
        load_columns(do16, &s.gradients[ring.slot].dout, place);
        wgmma_wait<1>(); /* Q's update has read o dO */
        scale_operand<false>(odo16, do16, s.gradients[ring.slot].prepared.factors.o, p.power, place);
        wgmma_wait<0>();
        wgmma_settle(state);
        arrive_warp(&s.free[now.slot], lane);
        pack_operand(state16, state);
        wgmma_fence();
        multiply_rows_again(ks, state16, first_slot + ring.slot * (sizeof(GradientsSlot) / 16));
        wgmma_commit();
        if (number >= silent) {
            fence_proxy_async(); /* dS1 and dV go to the copy engine */
            __syncwarp();
            if (__builtin_expect(number == part, 0)) send_rows(p, &out.rows, c, warp, lane);
            arrive_warp(&s.out_full[ring_out.slot], lane);
            ring_next<RINGS>(ring_out);
        }
    }
    wgmma_wait<0>();
    if (c.keeps) {
        store_kept(state, &p.gradients[c.segment.kept * p.forward.heads_v + c.segment.head], c.half, thread);
    } else if (c.segment.index == 0 && p.dh0) {
        if (numbers > 0) { /* its slot is not refilled */
            const GradientsSlot &in = s.gradients[ring.slot == 0 ? SLOTS - 1 : ring.slot - 1];
            load_columns(do16, &in.dout, place);
            scale_operand<true>(odo16, do16, in.prepared.factors.o, p.power, place);
            wgmma_fence();
            multiply_update(state, odo16, shared_units(in.q));
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_settle(state);
        }
        scale_state(state, p.unit);
        store_state(state, p.dh0, c.entry, given_place(p, FQLA__CARRIED_DH0, c.half * STATE_COLUMNS, thread));
    }
}

#endif
