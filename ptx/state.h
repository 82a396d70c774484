/* The state of a v-head in registers, and a chunk's step on it.

   A warpgroup holds S^T of 64 state columns: 64 x 128 in float32. Everything is transposed so that the state's copy in 16 bits is the
   left operand from registers; per chunk, with the gate's products as columns' factors:

       KS  = S0^T K^T                     64 x 64
       W   = V^T - w KS                                V^T by transposing loads from shared memory
       Vn  = beta W + W T^T               64 x 64      T's diagonal, beta, stays in float32
       S1  = gamma_C S0 + (update Vn) K   64 x 128 */
#ifndef FLASHQLA_STATE_H
#define FLASHQLA_STATE_H

#include "tile.h"

/* A thread's elements of S^T: state[4j + e] is v = first_v + 8 (e/2), k = 8j + first_k + e%2. */
typedef struct StatePlace {
    int first_v, first_k;
    bool bf16, v_major; /* [.., Dv, Dk]: FQLA_STATE_VK */
} StatePlace;

/* Of a thread of the warpgroup whose columns begin at first_v. */
static __device__ __forceinline__ StatePlace state_place(const fqla__forward_params &p, int first_v, int thread) {
    const int warp = renewed(thread) / WARP, lane = renewed(thread) % WARP; /* used far apart: nothing is kept from use to use */
    const StatePlace place = {first_v + 16 * warp + lane / 4, 2 * (lane % 4), p.state_bf16 != 0, p.state_layout == 1};
    return place;
}

static __device__ __forceinline__ int64_t first_element(const StatePlace &place, int64_t entry) {
    return entry * DIM * DIM + (place.v_major ? place.first_v * DIM + place.first_k : place.first_k * DIM + place.first_v);
}

/* Where element e of tile j lies from the first: a constant, so that one address serves all 64. */
static __device__ __forceinline__ int element_offset(bool v_major, int j, int e) {
    return v_major ? e / 2 * 8 * DIM + 8 * j + e % 2 : (8 * j + e % 2) * DIM + e / 2 * 8;
}

static __device__ __forceinline__ float state_to_float(float value) { return value; }
static __device__ __forceinline__ float state_to_float(uint16_t value) { return from_bf16(value); }
static __device__ __forceinline__ void float_to_state(float *to, float value) { *to = value; }
static __device__ __forceinline__ void float_to_state(uint16_t *to, float value) { *to = to_bf16(value); }

template <bool v_major, typename Element> static __device__ __forceinline__ void load_elements(float (&state)[64], const Element *from) {
#pragma unroll
    for (int i = 0; i < 64; i++) state[i] = state_to_float(from[element_offset(v_major, i / 4, i % 4)]);
}

template <bool v_major, typename Element> static __device__ __forceinline__ void store_elements(const float (&state)[64], Element *to) {
#pragma unroll
    for (int i = 0; i < 64; i++) float_to_state(&to[element_offset(v_major, i / 4, i % 4)], state[i]);
}

static __device__ __forceinline__ void load_state(float (&state)[64], const void *states, int64_t entry, const StatePlace &place) {
    const int64_t first = first_element(place, entry);
    if (place.bf16 && place.v_major) load_elements<true>(state, (const uint16_t *)states + first);
    else if (place.bf16) load_elements<false>(state, (const uint16_t *)states + first);
    else if (place.v_major) load_elements<true>(state, (const float *)states + first);
    else load_elements<false>(state, (const float *)states + first);
}

static __device__ __forceinline__ void store_state(const float (&state)[64], void *states, int64_t entry, const StatePlace &place) {
    const int64_t first = first_element(place, entry);
    if (place.bf16 && place.v_major) store_elements<true>(state, (uint16_t *)states + first);
    else if (place.bf16) store_elements<false>(state, (uint16_t *)states + first);
    else if (place.v_major) store_elements<true>(state, (float *)states + first);
    else store_elements<false>(state, (float *)states + first);
}

/* To and from the workspace: half 0 or 1 of the state's columns, by the 128 threads of a warpgroup. */
static __device__ __forceinline__ void load_kept(float (&state)[64], const fqla__kept_state *kept, int half, int thread) {
#pragma unroll
    for (int i = 0; i < 16; i++) *(float4 *)&state[4 * i] = *(const float4 *)kept->values[2 * half + thread / 64][i][thread % 64];
}

static __device__ __forceinline__ void store_kept(const float (&state)[64], fqla__kept_state *kept, int half, int thread) {
#pragma unroll
    for (int i = 0; i < 16; i++) *(float4 *)kept->values[2 * half + thread / 64][i][thread % 64] = make_float4(state[4 * i], state[4 * i + 1], state[4 * i + 2], state[4 * i + 3]);
}

/* A transition's transpose, as the scans' products read it: the rows of this half. Its elements are at most 1 where the recurrence is
   stable. */
static __device__ __forceinline__ void store_transition(const float (&state)[64], fqla__kept_transition *to, int half, int warp, int lane) {
#pragma unroll
    for (int j = 0; j < DIM / 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int row = 16 * warp + lane / 4 + 8 * e;
            *(uint32_t *)&to->tiles[2 * half + j / 8][row * 128 + ((j % 8 ^ row % 8) * 16) + lane % 4 * 4] =
                pack_fp16(state[4 * j + 2 * e], state[4 * j + 2 * e + 1]);
        }
}

static __device__ __forceinline__ void clear_state(float (&state)[64]) {
#pragma unroll
    for (int i = 0; i < 64; i++) state[i] = 0.0f;
}

/* An accumulator of 2 * count elements as left operands: the layouts agree. */
template <int count> static __device__ __forceinline__ void pack_operand(uint32_t (&a)[count], const float (&d)[2 * count]) {
#pragma unroll
    for (int i = 0; i < count; i++) a[i] = pack_elements(d[2 * i], d[2 * i + 1]);
}

/* What a thread of a state warpgroup knows of its place, in registers: shared memory is far away while wgmma runs. */
typedef struct Lane {
    uint32_t columns; /* byte offset in a tile of the lane's row of 8 x 8 tiles: rows 0-15, the warp's 16 columns */
    uint32_t pair;    /* byte offset of the lane's two tokens in factors: 2 (lane % 4) */
} Lane;

static __device__ __forceinline__ Lane find_lane(int thread) {
    const int warp = thread / WARP, lane = thread % WARP, row = lane / 16 * 8 + lane % 8, unit = 2 * warp + lane / 8 % 2;
    Lane place;
    place.columns = (uint32_t)renewed(row * 128 + ((unit ^ (row % 8)) * 16));
    place.pair = (uint32_t)renewed(lane % 4 * 8);
    return place;
}

/* The factors of the lane's tokens 8 tile + 2 (lane % 4) and the next. */
static __device__ __forceinline__ float2 factors_of(const float *factors, const Lane &lane, int tile) {
    return *(const float2 *)((const char *)factors + lane.pair + 32 * tile);
}

/* Vn as two left operands, of tiles [first, end) of eight tokens: as it is, and with its columns multiplied. */
static __device__ __forceinline__ void pack_columns(uint32_t (&plain)[16], uint32_t (&scaled)[16], const float (&d)[32], const float *factors,
                                                    const Lane &lane, int first, int end) {
#pragma unroll
    for (int tile = first; tile < end; tile++) {
        const float2 factor = factors_of(factors, lane, tile);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float low = d[4 * tile + 2 * half], high = d[4 * tile + 2 * half + 1];
            plain[2 * tile + half] = pack_elements(low, high);
            scaled[2 * tile + half] = pack_elements(low * factor.x, high * factor.y);
        }
    }
}

/* = left operand [64 x 128] by the transposed rows of two tiles, K^T or Q^T: 64 x 64. */
static __device__ __forceinline__ void multiply_rows(float (&d)[32], const uint32_t (&state)[32], uint32_t tiles) {
    wgmma_64x64_first(d, &state[0], tile_descriptor(tiles, 0));
#pragma unroll
    for (int step = 1; step < DIM / 16; step++) wgmma_64x64(d, &state[4 * step], tile_descriptor(tiles + step_units(step), 0));
}

/* state += left operand [64 x 64] by K. */
static __device__ __forceinline__ void multiply_update(float (&state)[64], const uint32_t (&a)[16], uint32_t k) {
#pragma unroll
    for (int step = 0; step < CHUNK / 16; step++) wgmma_64x128_transposed(state, &a[4 * step], tile_descriptor(k + step * 128, TILE_UNITS));
}

/* W = V^T - w KS in place. v: the warpgroup's 64 columns. */
static __device__ __forceinline__ void subtract_from_v(float (&ks)[32], const Tile *v, const float *w, const Lane &lane) {
    const uint32_t columns = shared_address(v->bytes) + lane.columns;
#pragma unroll
    for (int pair = 0; pair < CHUNK / 16; pair++) {
        uint32_t r[4];
        load_tiles_transposed(r, columns + pair * 2048);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float2 factor = factors_of(w, lane, 2 * pair + half);
            float *d = &ks[8 * pair + 4 * half];
            d[0] = low_element(r[2 * half]) - factor.x * d[0];
            d[1] = high_element(r[2 * half]) - factor.y * d[1];
            d[2] = low_element(r[2 * half + 1]) - factor.x * d[2];
            d[3] = high_element(r[2 * half + 1]) - factor.y * d[3];
        }
    }
}

/* Multiply the columns (tokens) of a 64 x 64 accumulator by their factors. */
static __device__ __forceinline__ void scale_columns(float (&d)[32], const float *factors, const Lane &lane) {
#pragma unroll
    for (int tile = 0; tile < CHUNK / 8; tile++) {
        const float2 factor = factors_of(factors, lane, tile);
        d[4 * tile] *= factor.x;
        d[4 * tile + 1] *= factor.y;
        d[4 * tile + 2] *= factor.x;
        d[4 * tile + 3] *= factor.y;
    }
}

static __device__ __forceinline__ void scale_state(float (&state)[64], float gamma_chunk) {
#pragma unroll
    for (int i = 0; i < 64; i++) state[i] *= gamma_chunk;
}

/* V^T, two elements a register: a left operand's order. */
static __device__ __forceinline__ void load_v(uint32_t (&v16)[16], const Tile *v, const Lane &lane) {
    const uint32_t columns = shared_address(v->bytes) + lane.columns;
#pragma unroll
    for (int pair = 0; pair < CHUNK / 16; pair++) load_tiles_transposed(*(uint32_t(*)[4])&v16[4 * pair], columns + pair * 2048);
}

/* [64 x 64] = left operand [64 x 128] by the transposed rows of two tiles, K^T or Q^T, in the registers of the chunk before. */
static __device__ __forceinline__ void multiply_rows_again(float (&d)[32], const uint32_t (&state)[32], uint32_t tiles) {
    wgmma_64x64_again(d, &state[0], tile_descriptor(tiles, 0));
#pragma unroll
    for (int step = 1; step < DIM / 16; step++) wgmma_64x64(d, &state[4 * step], tile_descriptor(tiles + step_units(step), 0));
}

/* KS in place to beta W, where Vn begins, and W itself as a left operand. */
static __device__ __forceinline__ void start_vn(float (&ks)[32], uint32_t (&w16)[16], const uint32_t (&v16)[16], const fqla__factors &factors,
                                                const Lane &lane) {
#pragma unroll
    for (int tile = 0; tile < CHUNK / 8; tile++) {
        const float2 factor = factors_of(factors.w, lane, tile);
        float *d = &ks[4 * tile];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            d[2 * half] = low_element(v16[2 * tile + half]) - factor.x * d[2 * half];
            d[2 * half + 1] = high_element(v16[2 * tile + half]) - factor.y * d[2 * half + 1];
        }
    }
    pack_operand(w16, ks);
    scale_columns(ks, factors.beta, lane);
}

/* state += K^T (update Vn), 16 tokens as soon as their operand is packed; vn16: Vn itself, for O. */
static __device__ __forceinline__ void start_update(float (&state)[64], uint32_t (&vn16)[16], uint32_t (&update16)[16], const float (&vn)[32],
                                                    const float *update, uint32_t k, const Lane &lane) {
#pragma unroll
    for (int step = 0; step < CHUNK / 16; step++) {
        pack_columns(vn16, update16, vn, update, lane, 2 * step, 2 * step + 2);
        wgmma_fence();
        wgmma_64x128_transposed(state, &update16[4 * step], tile_descriptor(k + step * 128, TILE_UNITS));
    }
}

/* The state through a chunk, alone. k, t: their units. */
static __device__ __forceinline__ void advance_state(float (&state)[64], uint32_t k, uint32_t t, const fqla__factors &factors, const Tile *v,
                                                     const Lane &lane) {
    uint32_t state16[32], w16[16];
    float ks[32];
    pack_operand(state16, state);
    wgmma_fence();
    multiply_rows(ks, state16, k);
    wgmma_commit();
    scale_state(state, factors.gamma_chunk);
    wgmma_wait<0>();
    wgmma_settle(ks);
    subtract_from_v(ks, v, factors.w, lane);
    pack_operand(w16, ks);
    scale_columns(ks, factors.beta, lane);
    wgmma_fence();
    multiply_square(ks, w16, t);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_settle(ks);
    scale_columns(ks, factors.update, lane);
    pack_operand(w16, ks);
    wgmma_fence();
    multiply_update(state, w16, k);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_settle(state);
}

#endif
