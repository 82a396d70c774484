/* A state warpgroup: 64 of the state's columns through all chunks, S^T (64 x 128) in float32 registers.

   Everything is transposed so that the state's copy in 16 bits is the left operand from registers; per chunk, with the gate's
   products as columns' factors:

       KS  = S0^T K^T                     64 x 64      on the chain
       W   = V^T - w KS                                V^T by transposing loads from shared memory
       Vn  = beta W + W T^T               64 x 64      on the chain; T's diagonal, beta, stays in float32
       S1  = gamma_C S0 + (update Vn) K   64 x 128     on the chain
       O   = scale (o (S0^T Q^T) + Vn P^T)             off the chain

   Chunk c + 1's KS starts before chunk c's O is read out, so that the output's way to memory runs under it. */
#ifndef FLASHQLA_FORWARD_STATE_H
#define FLASHQLA_FORWARD_STATE_H

#include "forward_shared.h"
#include "mma.h"
#include "tma.h"
#include "wgmma.h"

/* Issue the loads of a chunk of q and k; of a chunk of v for one warpgroup. By one thread. */
static __device__ __forceinline__ void load_qk(const fqla__forward_params &p, ForwardShared &s, const Sequence &sequence, int chunk) {
    const int slot = chunk % QK_SLOTS;
    const int32_t row = (int32_t)(sequence.row + (int64_t)chunk * CHUNK);
    mbarrier_arrive_expect(&s.qk_full[slot], 4 * 128 * (uint32_t)p.load_rows);
    for (int half = 0; half < 2; half++) {
        tma_load(&s.k[slot][half], &p.k, half * FQLA__LOAD_COLUMNS, sequence.head_qk, row, &s.qk_full[slot]);
        tma_load(&s.q[slot][half], &p.q, half * FQLA__LOAD_COLUMNS, sequence.head_qk, row, &s.qk_full[slot]);
    }
}

static __device__ __forceinline__ void load_v(const fqla__forward_params &p, ForwardShared &s, const Sequence &sequence, int chunk,
                                              int warpgroup) {
    const int slot = chunk % V_SLOTS;
    mbarrier_arrive_expect(&s.v_full[slot][warpgroup], 128 * (uint32_t)p.load_rows);
    tma_load(&s.v[slot][warpgroup], &p.v, warpgroup * STATE_COLUMNS, sequence.head, (int32_t)(sequence.row + (int64_t)chunk * CHUNK),
             &s.v_full[slot][warpgroup]);
}

/* A thread's elements of S^T: state[4j + e] is v = first_v + 8 (e/2), k = 8j + first_k + e%2. */
typedef struct StatePlace {
    int first_v, first_k;
    bool bf16, v_major; /* [.., Dv, Dk]: FQLA_STATE_VK */
} StatePlace;

static __device__ __forceinline__ StatePlace state_place(const fqla__forward_params &p, int first_v, int lane) {
    const StatePlace place = {first_v + lane / 4, 2 * (lane % 4), p.state_bf16 != 0, p.state_layout == 1};
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

/* An accumulator of 2 * count elements as left operands: the layouts agree. */
template <int count> static __device__ __forceinline__ void pack_operand(uint32_t (&a)[count], const float (&d)[2 * count]) {
#pragma unroll
    for (int i = 0; i < count; i++) a[i] = pack_elements(d[2 * i], d[2 * i + 1]);
}

/* Vn as two left operands: as it is, and with its columns multiplied. */
static __device__ __forceinline__ void pack_columns(uint32_t (&plain)[16], uint32_t (&scaled)[16], const float (&d)[32], const float *factors,
                                                    int lane) {
#pragma unroll
    for (int tile = 0; tile < CHUNK / 8; tile++) {
        const float2 factor = *(const float2 *)&factors[8 * tile + 2 * (lane % 4)];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float low = d[4 * tile + 2 * half], high = d[4 * tile + 2 * half + 1];
            plain[2 * tile + half] = pack_elements(low, high);
            scaled[2 * tile + half] = pack_elements(low * factor.x, high * factor.y);
        }
    }
}

/* = left operand [64 x 128] by the transposed rows of two tiles, K^T or Q^T: 64 x 64. */
static __device__ __forceinline__ void multiply_rows(float (&d)[32], const uint32_t (&state)[32], const Tile *tiles) {
    wgmma_64x64_first(d, &state[0], tile_descriptor(&tiles[0], 0));
#pragma unroll
    for (int step = 1; step < DIM / 16; step++)
        wgmma_64x64(d, &state[4 * step], descriptor_advance(tile_descriptor(&tiles[step / 4], 0), step % 4 * 32));
}

/* += left operand [64 x 64] by the transposed T or P. */
static __device__ __forceinline__ void multiply_prepared(float (&d)[32], const uint32_t (&a)[16], const Tile *tile) {
#pragma unroll
    for (int step = 0; step < CHUNK / 16; step++)
        wgmma_64x64(d, &a[4 * step], descriptor_advance(tile_descriptor(tile, 0), step * 32));
}

/* W = V^T - w KS in place. v: the warp's 16 columns of the warpgroup's tile. Tokens from `valid` on are another sequence's. */
static __device__ __forceinline__ void subtract_from_v(float (&ks)[32], const Tile *v, const float *w, int warp, int lane, int valid) {
#pragma unroll
    for (int pair = 0; pair < CHUNK / 16; pair++) {
        const int row = 16 * pair + lane / 16 * 8 + lane % 8, unit = 2 * warp + lane / 8 % 2;
        uint32_t r[4];
        load_tiles_transposed(r, shared_address(v->bytes + row * 128 + ((unit ^ (row % 8)) * 16)));
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int token = 16 * pair + 8 * half + 2 * (lane % 4);
            const float2 factor = *(const float2 *)&w[token];
            float *d = &ks[8 * pair + 4 * half];
            const uint32_t keep = token + 1 < valid ? 0xffffffffu : token < valid ? 0xffffu : 0u;
            const uint32_t upper = r[2 * half] & keep, lower = r[2 * half + 1] & keep;
            d[0] = low_element(upper) - factor.x * d[0];
            d[1] = high_element(upper) - factor.y * d[1];
            d[2] = low_element(lower) - factor.x * d[2];
            d[3] = high_element(lower) - factor.y * d[3];
        }
    }
}

/* Multiply the columns (tokens) of a 64 x 64 accumulator. */
static __device__ __forceinline__ void scale_columns(float (&d)[32], const float *factors, int lane) {
#pragma unroll
    for (int tile = 0; tile < CHUNK / 8; tile++) {
        const float2 factor = *(const float2 *)&factors[8 * tile + 2 * (lane % 4)];
        d[4 * tile] *= factor.x;
        d[4 * tile + 1] *= factor.y;
        d[4 * tile + 2] *= factor.x;
        d[4 * tile + 3] *= factor.y;
    }
}

/* O^T to o: transposed through the warp's 2 KB of shared memory (rows of 32 bytes, 32-byte swizzle), then one bulk store, or row by row
   where rows from `valid` on are another sequence's. */
static __device__ __forceinline__ void store_output(const float (&o)[32], const fqla__forward_params &p, unsigned char *staging,
                                                    const Sequence &sequence, int chunk, int first_v, int lane, int valid) {
    const int64_t first_row = sequence.row + (int64_t)chunk * CHUNK;
    if (lane == 0) tma_store_wait(); /* the last chunk's store has read the staging */
    __syncwarp();
#pragma unroll
    for (int pair = 0; pair < CHUNK / 16; pair++) {
        const int row = 16 * pair + lane / 16 * 8 + lane % 8, unit = lane / 8 % 2;
        const float *d = &o[8 * pair];
        store_tiles_transposed(shared_address(staging + row * 32 + ((unit ^ (row / 4 % 2)) * 16)),
                               pack_elements(d[0] * p.scale, d[1] * p.scale), pack_elements(d[2] * p.scale, d[3] * p.scale),
                               pack_elements(d[4] * p.scale, d[5] * p.scale), pack_elements(d[6] * p.scale, d[7] * p.scale));
    }
    if (valid == CHUNK) {
        fence_proxy_async();
        __syncwarp();
        if (lane == 0) tma_store(&p.o, first_v, sequence.head, (int32_t)first_row, staging);
    } else {
        __syncwarp();
        for (int row = lane / 2; row < valid; row += WARP / 2) {
            const uint4 unit = *(const uint4 *)(staging + row * 32 + ((lane % 2 ^ (row / 4 % 2)) * 16));
            *(uint4 *)((uint16_t *)p.o_rows + (first_row + row) * p.o_token + sequence.head * p.o_head + first_v + lane % 2 * 8) = unit;
        }
    }
}

/* Wait until a chunk is prepared. Past the last one there is nothing to wait for: its KS is issued all the same, of whatever lies in the
   slot, and not used, since a wgmma in flight on one of two paths would make the compiler wait for every one. */
static __device__ __forceinline__ void wait_chunk(ForwardShared &s, const Sequence &sequence, int chunk) {
    if (chunk >= sequence.chunks) return;
    mbarrier_wait(&s.prepared[chunk % PREPARED_SLOTS], chunk / PREPARED_SLOTS % 2);
    mbarrier_wait(&s.qk_full[chunk % QK_SLOTS], chunk / QK_SLOTS % 2);
}

static __device__ void run_state(const fqla__forward_params &p, ForwardShared &s, int warpgroup, int thread) {
    const Sequence &sequence = s.sequence;
    const int warp = thread / WARP, first_v = warpgroup * STATE_COLUMNS + 16 * warp;
    float state[64], ks[32], o[32];
    uint32_t state16[32];

    if (sequence.in >= 0) {
        load_state(state, p.h0, sequence.in, state_place(p, first_v, thread % WARP));
    } else {
#pragma unroll
        for (int i = 0; i < 64; i++) state[i] = 0.0f;
    }
    pack_operand(state16, state);

    wait_chunk(s, sequence, 0);
    wgmma_fence();
    multiply_rows(ks, state16, s.k[0]);
    wgmma_commit();
    for (int chunk = 0; chunk < sequence.chunks; chunk++) {
        const int lane = renewed(thread) & (WARP - 1);
        const int slot = chunk % PREPARED_SLOTS, qk_slot = chunk % QK_SLOTS, v_slot = chunk % V_SLOTS;
        const int valid = min(CHUNK, sequence.len - chunk * CHUNK);
        const TokenFactors &factors = s.factors[slot];
        uint32_t w16[16], update16[16];

        mbarrier_wait(&s.v_full[v_slot][warpgroup], chunk / V_SLOTS % 2);
        wgmma_wait<0>();
        wgmma_settle(ks);
        subtract_from_v(ks, &s.v[v_slot][warpgroup], factors.w, warp, lane, valid);
        __syncwarp();
        if (lane == 0 && last_reader(&s.v_readers[v_slot][warpgroup], 4) && chunk + V_SLOTS < sequence.chunks)
            load_v(p, s, sequence, chunk + V_SLOTS, warpgroup);
        pack_operand(w16, ks);
        scale_columns(ks, factors.beta, lane);
        wgmma_fence();
        multiply_prepared(ks, w16, &s.t[slot]);
        multiply_rows(o, state16, s.q[qk_slot]);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_settle(ks);
        pack_columns(w16, update16, ks, factors.update, lane); /* w16 is Vn from here on */
#pragma unroll
        for (int i = 0; i < 64; i++) state[i] *= factors.gamma_chunk;
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < CHUNK / 16; step++)
            wgmma_64x128_transposed(state, &update16[4 * step], descriptor_advance(tile_descriptor(s.k[qk_slot], sizeof(Tile)), step * 2048));
        wgmma_commit();
        wgmma_settle(o);
        scale_columns(o, factors.o, lane);
        wgmma_fence();
        multiply_prepared(o, w16, &s.p[slot]);
        wgmma_commit();

        wgmma_wait<1>();
        wgmma_settle(state);
        if (lane == 0 && last_reader(&s.qk_readers[qk_slot], STATE_WARPS) && chunk + QK_SLOTS < sequence.chunks)
            load_qk(p, s, sequence, chunk + QK_SLOTS);
        pack_operand(state16, state);

        wait_chunk(s, sequence, chunk + 1);
        wgmma_fence();
        multiply_rows(ks, state16, s.k[(chunk + 1) % QK_SLOTS]);
        wgmma_commit();
        wgmma_wait<1>();
        wgmma_settle(o);
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&s.released[slot]);
        store_output(o, p, s.o[4 * warpgroup + warp], sequence, chunk, first_v, lane, valid);
        if (p.checkpoint_every > 0 && valid == CHUNK && (chunk + 1) % p.checkpoint_every == 0)
            store_state(state, p.snapshots, (sequence.snapshot + (chunk + 1) / p.checkpoint_every - 1) * p.heads_v + sequence.head,
                        state_place(p, first_v, lane));
    }
    wgmma_wait<0>();
    if (sequence.out >= 0) store_state(state, p.ht, sequence.out, state_place(p, first_v, renewed(thread) & (WARP - 1)));
    tma_store_wait(); /* the staging outlives its reads */
}

#endif
