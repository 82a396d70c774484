/* The warpgroups of dQ and of dK: 64 x 128 in float32 registers, summed over the v-heads of the q/k head in their order.

       dQ += scale o (dO S0^T) + dP K
       dK += update (Vn dS1^T) - w (dW S0^T) + dKK K + dP^T Q + dKK^T K

   dP and dKK below their diagonals, zero above. dP's diagonal is a factor of a row of K or of Q, summed over the v-heads first.

   Of each v-head's rows the gate's gradient takes the dots with q or k, before they are added up. With Z_ij = dP_ij (Q K^T)_ij + dKK_ij
   (K K^T)_ij, i > j, what reaches the gates of the tokens j + 1 .. i,

       sum_j Z_ij = q_i . (dP K)_i + k_i . (dKK K)_i        sum_i Z_ij = k_j . (dP^T Q + dKK^T K)_j

   so that no Q K^T and no sum over rows and columns is made. dP's diagonal would be in both; it is far larger than Z behind a strong
   gate, and what float32 leaves of the difference with it. Warp w has rows 16w .. 16w + 15. */
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

/* d = a tile [64 x 64] by two tiles of tokens' rows. */
static __device__ __forceinline__ void multiply_tokens(float (&d)[64], uint32_t a, uint32_t rows) {
    wgmma_64x128_shared_first(d, tile_descriptor(a, 0), tile_descriptor(rows, TILE_UNITS));
#pragma unroll
    for (int step = 1; step < CHUNK / 16; step++)
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

/* sum += the rows of d times their factors. */
static __device__ __forceinline__ void add_rows(float (&sum)[64], const float (&d)[64], float upper, float lower) {
#pragma unroll
    for (int i = 0; i < 64; i++) sum[i] = fmaf(i / 2 % 2 == 0 ? upper : lower, d[i], sum[i]);
}

/* d += the rows of two tiles times their factors. */
static __device__ __forceinline__ void add_tiles(float (&d)[64], const Tile *rows, float upper, float lower, int warp, int lane) {
#pragma unroll
    for (int step = 0; step < DIM / 16; step++) {
        uint32_t r[4];
        load_tiles(r, tile_block_address(&rows[step / 4], warp, step % 4, lane));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float *pair = &d[8 * step + i % 2 * 4 + i / 2 * 2];
            pair[0] = fmaf(i / 2 == 0 ? upper : lower, low_element(r[i]), pair[0]);
            pair[1] = fmaf(i / 2 == 0 ? upper : lower, high_element(r[i]), pair[1]);
        }
    }
}

/* The lane's rows' sums, which all four lanes of a quad have. */
static __device__ __forceinline__ void store_sums(float *to, float upper, float lower, int warp, int lane) {
    if (lane % 4 > 0) return;
    to[BLOCK * warp + lane / 4] = upper;
    to[BLOCK * warp + lane / 4 + 8] = lower;
}

/* With l2norm the sums are those of the normalised rows times their norms' factors: dx = z - r^2 (x . z) x. */
static __device__ __forceinline__ void through_norm(float (&d)[64], const Tile *rows, const float *square, int warp, int lane) {
    const int row = BLOCK * warp + lane / 4;
    float dot[2];
    dot_rows(dot, d, rows, warp, lane);
    add_tiles(d, rows, -dot[0] * square[row], -dot[1] * square[row + 8], warp, lane);
}

/* The item's dq or dk into two tiles of its last step's first part, n's, which all have read; a part of a chunk to memory. */
static __device__ __forceinline__ void leave_gradient(const fqla__backward_params &p, GradientsShared &s, float (&d)[64], int item, int n,
                                                     const Place &place, int role_thread, bool keys) {
    const int thread = renewed(role_thread), warp = thread / WARP, lane = thread % WARP; /* no addresses are kept for this */
    const int row = BLOCK * warp + lane / 4;
    Tile *tiles = s.first[n % 2].ds[keys ? 1 : 0];
    add_tiles(d, keys ? s.q : s.k, s.dp_diagonal[item % 2][row], s.dp_diagonal[item % 2][row + 8], warp, lane);
    if (p.forward.l2norm) through_norm(d, keys ? s.k : s.q, keys ? s.square_k : s.square_q, warp, lane);
    arrive_warp(&s.qk_free, lane);
    mbarrier_wait(&s.first_used[n % 2], n / 2 % 2);
#pragma unroll
    for (int step = 0; step < DIM / 16; step++) store_tile_block(&tiles[step / 4], warp, step % 4, lane, &d[8 * step]);
    if (place.valid == CHUNK) {
        fence_proxy_async(); /* run_loads sends them */
    } else {
        const int64_t token = keys ? p.k_token : p.forward.q_token, head = keys ? p.k_head : p.forward.q_head;
        uint16_t *to = (uint16_t *)(keys ? p.dk_rows : p.dq_rows) + place.row * token + place.head_qk * head;
        __syncwarp();
#pragma unroll 1
        for (int unit = lane; unit < BLOCK * (DIM / 8); unit += WARP) {
            const int own = BLOCK * warp + unit / (DIM / 8), column = unit % (DIM / 8);
            if (own < place.valid)
                *(uint4 *)(to + own * token + column * 8) =
                    *(const uint4 *)(tiles[column / 8].bytes + own * 128 + ((column % 8 ^ own % 8) * 16));
        }
    }
    arrive_warp(&s.gradients_full[item % 2], lane);
}

/* QUERIES, or KEYS: the same loop over products, of a v-head the one by S0, KEYS' by dS1, that of the chunk. The same instructions, too:
   of roles with code of their own, 4000 instructions a step, a warp waited for instructions a third of the time (LADDER.md, backward
   18). */
static __device__ void run_rows(const fqla__backward_params &p, GradientsShared &s, int thread, bool keys) {
    const int warp = thread / WARP, lane = thread % WARP, row = BLOCK * warp + lane / 4;
    const int heads = p.forward.heads_v / p.forward.heads_qk, products = keys ? 3 : 2;
    const Tile *rows = keys ? s.k : s.q;
    float sum[64], product[64], dot[2];
    int n = 0, clears = 0;
    for (int item = 0;; item++) {
        const Place &place = wait_place(s, item, n, clears);
        if (place.valid == 0) break;
#pragma unroll
        for (int i = 0; i < 64; i++) sum[i] = 0.0f;
        for (int h = 0; h < heads; h++, n++) {
            const fqla__factors &factors = s.factors[n % 3];
            FirstPart &first = s.first[n % 2];
            HeadSums &sums = s.sums[n % SUMS];
            wait_sums(s, n);
#pragma unroll 1
            for (int i = 0; i < products; i++) {
                float upper = 1.0f, lower = 1.0f;
                if (i < products - 1) {
                    const bool after = i > 0; /* by dS1, while the scores are made; S0 first, which the loads wait for */
                    if (!after) wait_second(s, place, n, clears);
                    wgmma_fence();
                    multiply_state(product, shared_units(after ? first.vn : keys ? s.second.dw : s.second.dout),
                                   shared_units(after ? first.ds[0] : s.second.s[0]));
                    wgmma_commit();
                    const float *factor = after ? factors.update : keys ? factors.w : factors.o;
                    const float unit = after ? p.unit : keys ? -1.0f : p.forward.scale;
                    upper = factor[row] * unit, lower = factor[row + 8] * unit;
                    wgmma_wait<0>();
                    wgmma_settle(product);
                    if (after || !keys) arrive_warp(&s.first_used[n % 2], lane); /* QUERIES too, so that it misses no phase of first_full */
                    if (!after) arrive_warp(&s.second_used, lane);
                    if (h == 0) mbarrier_wait(keys ? &s.k_full : &s.q_full, item % 2);
                } else {
                    if (h == 0) mbarrier_wait(keys ? &s.q_full : &s.k_full, item % 2);
                    mbarrier_wait(&s.scores_ready, n % 2);
                    if (keys) {
                        wgmma_fence();
                        multiply_tokens(product, shared_units(&s.m), shared_units(s.k));
                        multiply_transposed(product, shared_units(&s.dp), shared_units(s.q));
                        multiply_transposed(product, shared_units(&s.m), shared_units(s.k));
                        wgmma_commit();
                    } else {
                        wgmma_fence();
                        multiply_tokens(product, shared_units(&s.dp), shared_units(s.k));
                        wgmma_commit();
                    }
                    wgmma_wait<0>();
                    wgmma_settle(product);
                    arrive_warp(&s.scores_used, lane);
                }
                dot_rows(dot, product, rows, warp, lane);
                add_rows(sum, product, upper, lower);
                store_sums(keys ? sums.key[i] : sums.query[i], upper * dot[0], lower * dot[1], warp, lane);
            }
            arrive_warp(&s.sums_full[n % SUMS], lane);
        }
        leave_gradient(p, s, sum, item, n - 1, place, thread, keys);
    }
    end_sums(s, n, lane);
}

#endif
