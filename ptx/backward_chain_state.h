/* The state's warpgroup of backward_chains: S^T or dS^T, 64 x 128, float32 in registers, its 16-bit copy the left operand, as in
   state.h. It goes forwards or backwards: backward_chain_forwards.h, backward_chain_backwards.h. */
#ifndef FLASHQLA_BACKWARD_CHAIN_STATE_H
#define FLASHQLA_BACKWARD_CHAIN_STATE_H

#include "backward_chain_shared.h"
#include "state.h"

/* Where a lane's row of 8 x 8 tiles of a left operand's first 16 columns lies in a tile with rows v, in bytes. */
static __device__ __forceinline__ uint32_t operand_place(int warp, int lane) {
    const int row = BLOCK * warp + lane / 8 % 2 * 8 + lane % 8;
    return (uint32_t)renewed(row * 128 + ((lane / 16 ^ row % 8) * 16));
}

/* The state's 16-bit copy, whose registers are a left operand, as two tiles with rows v. */
static __device__ __forceinline__ void stage_state(const uint32_t (&state)[32], Tile *tiles, uint32_t place) {
#pragma unroll
    for (int step = 0; step < DIM / 16; step++) {
        const uint32_t *a = &state[4 * step];
        store_tiles(shared_address(&tiles[step / 4]) + (place ^ step % 4 * 32), a[0], a[1], a[2], a[3]);
    }
}

/* X^T, 64 columns by 64 tokens in registers, into a tile of tokens' rows, of which a warp writes 16 columns. */
static __device__ __forceinline__ void stage_rows(const uint32_t (&x)[16], const Tile *tile, const Lane &place) {
#pragma unroll
    for (int pair = 0; pair < CHUNK / 16;
         pair++) /* a left operand's registers are 8 x 8 tiles in the order of their transposing loads */
        store_tiles_transposed(shared_address(tile->bytes) + place.columns + pair * 2048, x[4 * pair], x[4 * pair + 1],
                               x[4 * pair + 2], x[4 * pair + 3]);
}

/* Where h0, dht or dh0 lies, whose columns begin at first_v; `carried`: one of p.carried. */
static __device__ __forceinline__ StatePlace given_place(const fqla__backward_params &p, int32_t carried, int first_v, int thread) {
    StatePlace place = state_place(p.forward, first_v, thread);
    if (p.carried & carried) place.bf16 = false;
    return place;
}

/* What the chain starts from. given: h0 or dht, one of p.carried or not. */
static __device__ __forceinline__ void start_state(const fqla__backward_params &p, const Chain &c, float (&state)[64],
                                                   const void *given, int32_t carried, const fqla__kept_state *kept, int thread) {
    if (c.from == FROM_KEPT) {
        load_kept(state, &kept[c.segment.kept * p.forward.heads_v + c.segment.head], c.half, thread);
    } else if (c.from == FROM_GIVEN && given) {
        load_state(state, given, c.entry, given_place(p, carried, c.half * STATE_COLUMNS, thread));
    } else {
        const int row = c.half * STATE_COLUMNS + thread / WARP * 16 + thread % WARP / 4, column = thread % 4 * 2;
        const float diagonal = c.from == FROM_IDENTITY ? 1.0f : 0.0f;
#pragma unroll
        for (int i = 0; i < 64; i++) state[i] = row + i / 2 % 2 * 8 == i / 4 * 8 + column + i % 2 ? diagonal : 0.0f;
    }
}

#endif
