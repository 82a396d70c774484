/* The warpgroups of dQ and of dK: 64 x 128 in float32 registers, summed over the v-heads of the q/k head in their order.

       dQ += scale o (dO S0^T) + dP K
       dK += update (Vn dS1^T) - w (dW S0^T) + dP^T Q + dKK K + dKK^T K        dKK below its diagonal, zero above

   What is multiplied by a token's factor, a row's, is a product of its own, from which the gate's gradient takes the rows' dots
   with q or k first. Warp w has rows 16w .. 16w + 15. */
#ifndef FLASHQLA_BACKWARD_ROWS_H
#define FLASHQLA_BACKWARD_ROWS_H

#include "backward_shared.h"

/* d = tokens' rows [64 x 128, a tile a half of V] by a state [half of V][half of K]. Eight products of 64 x 128 x 16. */
static __device__ __forceinline__ void multiply_state(float (&d)[64], uint32_t rows, uint32_t state) {
    wgmma_64x128_shared_first(d, tile_descriptor(rows, 0), tile_descriptor(state, TILE_UNITS));
#pragma unroll
    for (int step = 1; step < DIM / 16; step++)
        wgmma_64x128_shared(d, tile_descriptor(rows + step_units(step), 0),
                            tile_descriptor(state + step / 4 * 2 * TILE_UNITS + step % 4 * 128, TILE_UNITS));
}

/* d += a tile [64 x 64] by two tiles of tokens' rows. */
static __device__ __forceinline__ void multiply_tokens(float (&d)[64], uint32_t a, uint32_t rows) {
#pragma unroll
    for (int step = 0; step < CHUNK / 16; step++)
        wgmma_64x128_shared(d, tile_descriptor(a + step * 2, 0), tile_descriptor(rows + step * 128, TILE_UNITS));
}

/* d += the tile transposed by them. */
static __device__ __forceinline__ void multiply_transposed(float (&d)[64], uint32_t a, uint32_t rows) {
#pragma unroll
    for (int step = 0; step < CHUNK / 16; step++)
        wgmma_64x128_shared_both(d, tile_descriptor(a + step * 128, 0), tile_descriptor(rows + step * 128, TILE_UNITS));
}

static __device__ __forceinline__ float sum_quad(float value) {
    value += __shfl_xor_sync(0xffffffffu, value, 1);
    return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

/* The dots of d's rows with those of two tiles: of the lane's row, and of the one 8 below. */
static __device__ __forceinline__ void dot_rows(float (&dot)[2], const float (&d)[64], const Tile *rows, int warp, int lane) {
    dot[0] = dot[1] = 0.0f;
#pragma unroll
    for (int step = 0; step < DIM / 16; step++) {
        uint32_t r[4];
        load_tiles(r, tile_block_address(&rows[step / 4], warp, step % 4, lane));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float *pair = &d[8 * step + i % 2 * 4 + i / 2 * 2];
            dot[i / 2] = fmaf(low_element(r[i]), pair[0], fmaf(high_element(r[i]), pair[1], dot[i / 2]));
        }
    }
    dot[0] = sum_quad(dot[0]);
    dot[1] = sum_quad(dot[1]);
}

/* A thread's share of <dS1, S0> over half of V: 16 bytes lie `threads` units apart. */
template <int threads> static __device__ __forceinline__ float dot_states(const Tile *ds, const Tile *s, int thread) {
    const uint4 *a = (const uint4 *)ds + thread, *b = (const uint4 *)s + thread;
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
    for (int i = 0; i < (int)(2 * sizeof *ds / 16 / threads); i++) {
        const uint4 x = a[i * threads], y = b[i * threads];
        sums[0] = fmaf(low_element(x.x), low_element(y.x), fmaf(high_element(x.x), high_element(y.x), sums[0]));
        sums[1] = fmaf(low_element(x.y), low_element(y.y), fmaf(high_element(x.y), high_element(y.y), sums[1]));
        sums[2] = fmaf(low_element(x.z), low_element(y.z), fmaf(high_element(x.z), high_element(y.z), sums[2]));
        sums[3] = fmaf(low_element(x.w), low_element(y.w), fmaf(high_element(x.w), high_element(y.w), sums[3]));
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

/* sum += the rows of d times their factors; the factors times the rows' dots with `rows` go to `dots`. */
static __device__ __forceinline__ void add_rows(float (&sum)[64], const float (&d)[64], float upper, float lower, const Tile *rows,
                                                float *dots, float sign, int warp, int lane) {
    float dot[2];
    dot_rows(dot, d, rows, warp, lane);
    if (lane % 4 == 0) {
        dots[BLOCK * warp + lane / 4] = upper * dot[0];
        dots[BLOCK * warp + lane / 4 + 8] = lower * dot[1];
    }
    upper *= sign;
    lower *= sign;
#pragma unroll
    for (int j = 0; j < DIM / 8; j++) {
        sum[4 * j] = fmaf(upper, d[4 * j], sum[4 * j]);
        sum[4 * j + 1] = fmaf(upper, d[4 * j + 1], sum[4 * j + 1]);
        sum[4 * j + 2] = fmaf(lower, d[4 * j + 2], sum[4 * j + 2]);
        sum[4 * j + 3] = fmaf(lower, d[4 * j + 3], sum[4 * j + 3]);
    }
}

/* With l2norm the sums are those of the normalised rows times their norms' factors: dx = z - r^2 (x . z) x. */
static __device__ __forceinline__ void through_norm(float (&d)[64], const Tile *rows, const float *square, int warp, int lane) {
    float dot[2];
    dot_rows(dot, d, rows, warp, lane);
    dot[0] *= square[BLOCK * warp + lane / 4];
    dot[1] *= square[BLOCK * warp + lane / 4 + 8];
#pragma unroll
    for (int step = 0; step < DIM / 16; step++) {
        uint32_t r[4];
        load_tiles(r, tile_block_address(&rows[step / 4], warp, step % 4, lane));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float *pair = &d[8 * step + i % 2 * 4 + i / 2 * 2];
            pair[0] = fmaf(-dot[i / 2], low_element(r[i]), pair[0]);
            pair[1] = fmaf(-dot[i / 2], high_element(r[i]), pair[1]);
        }
    }
}

/* dq or dk to memory, by way of two tiles of the item's last step's first part, which all have read. */
template <int barrier> static __device__ __forceinline__ void send_gradient(const float (&d)[64], Tile *tiles,
                                                                            uint64_t *sent, const Place &place, const void *map,
                                                                            void *rows, int64_t token, int64_t head, int thread) {
    const int warp = thread / WARP, lane = thread % WARP;
#pragma unroll
    for (int step = 0; step < DIM / 16; step++) store_tile_block(&tiles[step / 4], warp, step % 4, lane, &d[8 * step]);
    fence_proxy_async();
    meet<barrier, WARPGROUP>();
    if (place.valid == CHUNK) {
        if (thread == 0) {
            for (int half = 0; half < 2; half++)
                tma_store(map, half * FQLA__LOAD_COLUMNS, (int32_t)place.row, place.head_qk, &tiles[half]);
            bulk_commit();
            bulk_store_wait<0>();
        }
    } else {
        for (int unit = thread; unit < place.valid * (DIM / 8); unit += WARPGROUP) {
            const int row = unit / (DIM / 8), column = unit % (DIM / 8);
            *(uint4 *)((uint16_t *)rows + (place.row + row) * token + place.head_qk * head + column * 8) =
                *(const uint4 *)(tiles[column / 8].bytes + row * 128 + ((column % 8 ^ row % 8) * 16));
        }
        meet<barrier, WARPGROUP>();
    }
    if (thread == 0) mbarrier_arrive(sent);
    __syncwarp();
}

enum { QUERIES_BARRIER = 2, KEYS_BARRIER = 3, SCORES_BARRIER = 4 };

static __device__ void run_queries(const fqla__backward_params &p, GradientsShared &s, int items, int thread) {
    const int warp = thread / WARP, lane = thread % WARP, row = BLOCK * warp + lane / 4;
    const int heads = p.forward.heads_v / p.forward.heads_qk;
    float dq[64], product[64];
    int n = 0, clears = 0;
    for (int item = 0; item < items; item++) {
        const Place &place = wait_place(s, item, n, clears);
#pragma unroll
        for (int i = 0; i < 64; i++) dq[i] = 0.0f;
        for (int h = 0; h < heads; h++, n++) {
            const fqla__factors &factors = s.factors[n % 3];
            HeadSums &sums = s.sums[n % SUMS];
            wait_second(s, place, n, clears);
            wgmma_fence();
            multiply_state(product, shared_units(s.second.dout), shared_units(s.second.s));
            wgmma_commit();
            const float upper = factors.o[row] * p.forward.scale, lower = factors.o[row + 8] * p.forward.scale;
            const float states = sum_warp(dot_states<WARPGROUP>(s.first[n % 2].ds[0], s.second.s[0], thread));
            wait_sums(s, n);
            mbarrier_wait(&s.qk_full, item % 2);
            if (lane == 0) sums.states[warp] = states;
            wgmma_wait<0>();
            wgmma_settle(product);
            arrive_warp(&s.used, lane);
            add_rows(dq, product, upper, lower, s.q, sums.query, 1.0f, warp, lane);
            arrive_warp(&s.sums_full[n % SUMS], lane);
            mbarrier_wait(&s.scores_ready, n % 2);
            wgmma_fence();
            multiply_tokens(dq, shared_units(&s.dp), shared_units(s.k));
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_settle(dq);
        }
        if (p.forward.l2norm) through_norm(dq, s.q, s.square_q, warp, lane);
        arrive_warp(&s.qk_free, lane);
        mbarrier_wait(&s.used, (n - 1) % 2);
        send_gradient<QUERIES_BARRIER>(dq, s.first[(n - 1) % 2].ds[0], &s.sent[item % 2], place, &p.dq, p.dq_rows, p.forward.q_token,
                                       p.forward.q_head, thread);
    }
}

static __device__ void run_keys(const fqla__backward_params &p, GradientsShared &s, int items, int thread) {
    const int warp = thread / WARP, lane = thread % WARP, row = BLOCK * warp + lane / 4;
    const int heads = p.forward.heads_v / p.forward.heads_qk;
    float dk[64], product[64];
    int n = 0, clears = 0;
    for (int item = 0; item < items; item++) {
        const Place &place = wait_place(s, item, n, clears);
#pragma unroll
        for (int i = 0; i < 64; i++) dk[i] = 0.0f;
        for (int h = 0; h < heads; h++, n++) {
            const fqla__factors &factors = s.factors[n % 3];
            const FirstPart &first = s.first[n % 2];
            HeadSums &sums = s.sums[n % SUMS];
            mbarrier_wait(&s.first_full[n % 2], n / 2 % 2);
            wgmma_fence();
            multiply_state(product, shared_units(first.vn), shared_units(first.ds));
            wgmma_commit();
            const float update[2] = {factors.update[row] * p.unit, factors.update[row + 8] * p.unit},
                        w[2] = {factors.w[row], factors.w[row + 8]};
            wait_sums(s, n);
            mbarrier_wait(&s.qk_full, item % 2);
            wgmma_wait<0>();
            wgmma_settle(product);
            add_rows(dk, product, update[0], update[1], s.k, sums.update, 1.0f, warp, lane);

            wait_second(s, place, n, clears);
            wgmma_fence();
            multiply_state(product, shared_units(s.second.dw), shared_units(s.second.s));
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_settle(product);
            arrive_warp(&s.used, lane);
            add_rows(dk, product, w[0], w[1], s.k, sums.key, -1.0f, warp, lane);
            arrive_warp(&s.sums_full[n % SUMS], lane);

            mbarrier_wait(&s.scores_ready, n % 2);
            wgmma_fence();
            multiply_transposed(dk, shared_units(&s.dp), shared_units(s.q));
            multiply_tokens(dk, shared_units(&s.m), shared_units(s.k));
            multiply_transposed(dk, shared_units(&s.m), shared_units(s.k));
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_settle(dk);
        }
        if (p.forward.l2norm) through_norm(dk, s.k, s.square_k, warp, lane);
        arrive_warp(&s.qk_free, lane);
        mbarrier_wait(&s.used, (n - 1) % 2);
        send_gradient<KEYS_BARRIER>(dk, s.first[(n - 1) % 2].ds[1], &s.sent[item % 2], place, &p.dk, p.dk_rows, p.k_token, p.k_head,
                                    thread);
    }
}

#endif
