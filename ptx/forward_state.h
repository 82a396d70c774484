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
static __device__ __forceinline__ void multiply_prepared(float (&d)[32], const uint32_t (&a)[16], const void *tile) {
#pragma unroll
    for (int step = 0; step < CHUNK / 16; step++)
        wgmma_64x64(d, &a[4 * step], descriptor_advance(tile_descriptor(tile, 0), step * 32));
}

/* W = V^T - w KS in place. v: the warp's 16 columns of the warpgroup's tile. tail: tokens from `valid` on are another sequence's. */
template <bool tail> static __device__ __forceinline__ void subtract_from_v(float (&ks)[32], const Tile *v, const float *w, int warp, int lane, int valid) {
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
            const uint32_t keep = !tail || token + 1 < valid ? 0xffffffffu : token < valid ? 0xffffu : 0u;
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

/* O^T to o, transposed through the warp's 2 KB of shared memory: rows of 32 bytes, 16-byte units exchanged every four rows so that no two
   of eight rows meet in a bank. Rows from `valid` on are another sequence's. */
static __device__ __forceinline__ void stage_output(const float (&o)[32], const fqla__forward_params &p, unsigned char *staging, int lane) {
    __syncwarp(); /* the last chunk's rows are read */
#pragma unroll
    for (int pair = 0; pair < CHUNK / 16; pair++) {
        const int row = 16 * pair + lane / 16 * 8 + lane % 8, unit = lane / 8 % 2;
        const float *d = &o[8 * pair];
        store_tiles_transposed(shared_address(staging + row * 32 + ((unit ^ (row / 4 % 2)) * 16)),
                               pack_elements(d[0] * p.scale, d[1] * p.scale), pack_elements(d[2] * p.scale, d[3] * p.scale),
                               pack_elements(d[4] * p.scale, d[5] * p.scale), pack_elements(d[6] * p.scale, d[7] * p.scale));
    }
    __syncwarp();
}

static __device__ __forceinline__ void send_output(const fqla__forward_params &p, const unsigned char *staging, const Sequence &sequence,
                                                   int chunk, int first_v, int lane, int valid) {
    const int64_t first_row = sequence.row + (int64_t)chunk * CHUNK;
    uint16_t *to = (uint16_t *)p.o + (first_row + lane / 2) * p.o_token + sequence.head * p.o_head + first_v + lane % 2 * 8;
#pragma unroll
    for (int i = 0; i < CHUNK * 2 / WARP; i++) {
        const int row = lane / 2 + i * (WARP / 2);
        const uint4 unit = *(const uint4 *)(staging + row * 32 + ((lane % 2 ^ (row / 4 % 2)) * 16));
        if (row < valid) *(uint4 *)(to + i * (WARP / 2) * p.o_token) = unit;
    }
}

/* Wait until a chunk's k and q are there; where k's rows past the end are to be cleared, until they are. Past the last chunk there is
   nothing to wait for: its KS is issued all the same, of whatever lies in the slot, and not used, since a wgmma in flight on one
   of two paths would make the compiler wait for every one. */
static __device__ __forceinline__ void wait_chunk(ForwardShared &s, const Sequence &sequence, int chunk) {
    if (chunk >= sequence.chunks) return;
    if (sequence.len - chunk * CHUNK < CHUNK) mbarrier_wait(&s.p_full[chunk % P_SLOTS], chunk / P_SLOTS % 2);
    mbarrier_wait(&s.chunk_full[chunk % CHUNK_SLOTS], chunk / CHUNK_SLOTS % 2);
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
    multiply_rows(ks, state16, s.chunk[0].k);
    wgmma_commit();
    for (int chunk = 0; chunk < sequence.chunks; chunk++) {
        const int lane = renewed(thread) & (WARP - 1);
        const int p_slot = chunk % P_SLOTS, v_slot = chunk % V_SLOTS, chunk_slot = chunk % CHUNK_SLOTS;
        const int valid = min(CHUNK, sequence.len - chunk * CHUNK);
        const ChunkSlot &in = s.chunk[chunk_slot], &next = s.chunk[(chunk + 1) % CHUNK_SLOTS];
        const fqla__prepared_chunk &factors = in.prepared;
        unsigned char *staging = s.o[4 * warpgroup + warp];
        uint32_t w16[16], update16[16];

        mbarrier_wait(&s.v_full[v_slot][warpgroup], chunk / V_SLOTS % 2);
        wgmma_wait<0>();
        wgmma_settle(ks);
        if (valid == CHUNK) subtract_from_v<false>(ks, &s.v[v_slot][warpgroup], factors.w, warp, lane, valid);
        else subtract_from_v<true>(ks, &s.v[v_slot][warpgroup], factors.w, warp, lane, valid);
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&s.v_free[v_slot][warpgroup]);
        pack_operand(w16, ks);
        scale_columns(ks, factors.beta, lane);
        wgmma_fence();
        multiply_prepared(ks, w16, factors.t);
        multiply_rows(o, state16, in.q);
        wgmma_commit();
        if (chunk > 0) send_output(p, staging, sequence, chunk - 1, first_v, lane, CHUNK);
        wgmma_wait<0>();
        wgmma_settle(ks);
        pack_columns(w16, update16, ks, factors.update, lane); /* w16 is Vn from here on */
#pragma unroll
        for (int i = 0; i < 64; i++) state[i] *= factors.gamma_chunk;
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < CHUNK / 16; step++)
            wgmma_64x128_transposed(state, &update16[4 * step], descriptor_advance(tile_descriptor(in.k, sizeof(Tile)), step * 2048));
        wgmma_commit();
        wgmma_settle(o);
        scale_columns(o, factors.o, lane);
        mbarrier_wait(&s.p_full[p_slot], chunk / P_SLOTS % 2);
        wgmma_fence();
        multiply_prepared(o, w16, &s.p[p_slot]);
        wgmma_commit();

        wgmma_wait<1>();
        wgmma_settle(state);
        if (lane == 0) mbarrier_arrive(&s.chunk_free[chunk_slot]);
        pack_operand(state16, state);
        wait_chunk(s, sequence, chunk + 1);
        wgmma_fence();
        multiply_rows(ks, state16, next.k);
        wgmma_commit();
        wgmma_wait<1>();
        wgmma_settle(o);
        if (lane == 0) mbarrier_arrive(&s.p_free[p_slot]);
        stage_output(o, p, staging, lane);
        if (p.checkpoint_every > 0 && valid == CHUNK && (chunk + 1) % p.checkpoint_every == 0)
            store_state(state, p.snapshots, (sequence.snapshot + (chunk + 1) / p.checkpoint_every - 1) * p.heads_v + sequence.head,
                        state_place(p, first_v, lane));
    }
    wgmma_wait<0>();
    if (sequence.chunks > 0)
        send_output(p, s.o[4 * warpgroup + warp], sequence, sequence.chunks - 1, first_v, renewed(thread) & (WARP - 1),
                    sequence.len - (sequence.chunks - 1) * CHUNK);
    if (sequence.out >= 0) store_state(state, p.ht, sequence.out, state_place(p, first_v, renewed(thread) & (WARP - 1)));
}

#endif
