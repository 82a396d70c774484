/* The preparing warpgroup: from a chunk's q, k, g, beta to T, P and the tokens' factors, one chunk ahead of the state.

   With L = strict_tril(diag(beta) K K^T) and A = (I + L)^-1, r and rq the l2norm's factors of k and q (else 1):

       L_ij = beta_i r_i r_j (K K^T)_ij     T_ij = exp(G_i - G_j) A_ij beta_j  (i > j; T_jj = beta_j is the state's to add)
       P_ij = exp(G_i - G_j) rq_i r_j (Q K^T)_ij                               (i >= j)

   Warp w owns rows 16w .. 16w + 15. The 64 x 64 inverse is built from 16 x 16 blocks:
     1. the four diagonal blocks by forward substitution in float32, a warp each, a lane a column;
     2. 16 -> 32: A10 = -A11 L10 A00, and so A32: two warps each, half of the columns a warp;
     3. 32 -> 64: the lower left 32 x 32 in the same way, a 16 x 16 block a warp.
   Products in 2 and 3 are fp16 mma.sync: |A_ij| <= 1 where |1 - beta |k|^2| <= 1, so fp16's 11 bits are better than bf16's 8.

   Decays: G restarts at every 16-block's border; inside a diagonal block exp2 of the difference, elsewhere
   head_i * (whole blocks between) * tail_j, every factor <= 1. */
#ifndef FLASHQLA_FORWARD_PREPARE_H
#define FLASHQLA_FORWARD_PREPARE_H

#include "forward_shared.h"
#include "mma.h"
#include "tma.h"
#include "wgmma.h"

enum { PREPARE_BARRIER = 1 }; /* named barrier of the 128 preparing threads */

static __device__ __forceinline__ void prepare_sync(void) { asm volatile("bar.sync %0, %1;" ::"n"((int)PREPARE_BARRIER), "n"((int)WARPGROUP) : "memory"); }

static __device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* One 16-bit element or float32 of a gate tensor. */
static __device__ __forceinline__ float load_gate(const void *tensor, int64_t index, bool raw) {
    if (!raw) return __ldg((const float *)tensor + index);
    return low_element(__ldg((const uint16_t *)tensor + index));
}

/* log2 alpha from the plan's gate form; clamped where alpha is 0 in float32. NaN passes. */
static __device__ __forceinline__ float log2_alpha(const fqla__forward_params &p, int32_t head, float g) {
    const float log2_e = 1.4426950408889634f, least = -104.0f * log2_e;
    float log2_g = g * log2_e;
    if (p.gate == 1) { /* FQLA_GATE_LINEAR */
        log2_g = log2f(g);
    } else if (p.gate == 2) { /* FQLA_GATE_RAW */
        const float x = g + __ldg(p.dt_bias + head);
        log2_g = -expf(__ldg(p.A_log + head)) * (x > 20.0f ? x : log1pf(expf(x))) * log2_e;
    }
    return log2_g < least ? least : log2_g;
}

static __device__ __forceinline__ float plain_beta(const fqla__forward_params &p, float beta) {
    if (p.beta_form == 0) return beta; /* FQLA_BETA_PLAIN */
    return (p.negative_eigenvalues ? 2.0f : 1.0f) / (1.0f + expf(-beta));
}

/* Address of row and column of a 16-bit matrix with PITCH, as ldmatrix takes a 16 x 16 block at (row, column). */
static __device__ __forceinline__ uint32_t block_address(const uint16_t (*matrix)[PITCH], int row, int column, int lane) {
    return shared_address(&matrix[row + lane % 16][column + lane / 16 * 8]);
}

static __device__ __forceinline__ void store_pair(uint16_t (*matrix)[PITCH], int row, int column, float low, float high) {
    *(uint32_t *)&matrix[row][column] = pack_fp16(low, high);
}

/* Two elements at (row, column), column even, of a swizzled tile. */
static __device__ __forceinline__ void store_tile_pair(Tile *tile, int row, int column, float low, float high) {
    *(uint32_t *)(tile->bytes + row * 128 + (((column / 8) ^ (row % 8)) * 16) + column % 8 * 2) = pack_elements(low, high);
}

/* Rows from `valid` on belong to the next sequence: zeros, since 0 * NaN is NaN. */
static __device__ __forceinline__ void clear_rows(Tile *tiles, int valid, int thread) {
    for (int unit = valid * 8 + thread; unit < CHUNK * 8; unit += WARPGROUP) {
        ((uint4 *)tiles[0].bytes)[unit] = make_uint4(0, 0, 0, 0);
        ((uint4 *)tiles[1].bytes)[unit] = make_uint4(0, 0, 0, 0);
    }
    fence_proxy_async();
}

/* d = a b^T for two 64 x 128 pairs of tiles. */
static __device__ __forceinline__ void multiply_tiles(float (&d)[32], const Tile *a, const Tile *b) {
    wgmma_64x64_shared_first(d, tile_descriptor(a, 0), tile_descriptor(b, 0));
#pragma unroll
    for (int step = 1; step < DIM / 16; step++)
        wgmma_64x64_shared(d, descriptor_advance(tile_descriptor(&a[step / 4], 0), step % 4 * 32),
                           descriptor_advance(tile_descriptor(&b[step / 4], 0), step % 4 * 32));
}

/* The squared norm of a row of q, read by two threads, half a row each; both get it. */
static __device__ __forceinline__ float row_norm(const Tile *tiles, int row, int half) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint4 unit = *(const uint4 *)(tiles[half].bytes + row * 128 + ((i ^ (row % 8)) * 16));
        const uint32_t pairs[4] = {unit.x, unit.y, unit.z, unit.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float low = low_element(pairs[j]), high = high_element(pairs[j]);
            sum += low * low + high * high;
        }
    }
    return sum + __shfl_xor_sync(0xffffffffu, sum, 1);
}

/* Column lane % 16 of the inverse of the unit lower triangular I + L, L transposed at l[j][i]: x_i = e_i - sum_{j<i} L_ij x_j. */
static __device__ __forceinline__ void invert_block(const float (*l)[BLOCK], int column, float (&x)[BLOCK]) {
#pragma unroll
    for (int i = 0; i < BLOCK; i++) x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
    for (int j = 0; j < BLOCK - 1; j++) {
        float row[BLOCK];
#pragma unroll
        for (int i = j / 4 * 4; i < BLOCK; i += 4) *(float4 *)&row[i] = *(const float4 *)&l[j][i];
#pragma unroll
        for (int i = j + 1; i < BLOCK; i++) x[i] = fmaf(-row[i], x[j], x[i]);
    }
}

/* y [16 x 16 N8TILES/2 ...] += a b for a 16 x 16 block of a and a 16 x 16 block of b, both in shared memory. */
static __device__ __forceinline__ void multiply_block(float (&y0)[4], float (&y1)[4], const uint32_t (&a)[4], uint32_t b_address) {
    uint32_t b[4];
    load_tiles_transposed(b, b_address);
    mma_fp16(y0, a, b[0], b[1]);
    mma_fp16(y1, a, b[2], b[3]);
}

/* An accumulator pair as the left operand of the next product. */
static __device__ __forceinline__ void as_operand(uint32_t (&a)[4], const float (&y0)[4], const float (&y1)[4]) {
    a[0] = pack_fp16(y0[0], y0[1]);
    a[1] = pack_fp16(y0[2], y0[3]);
    a[2] = pack_fp16(y1[0], y1[1]);
    a[3] = pack_fp16(y1[2], y1[3]);
}

static __device__ void prepare_chunks(const fqla__forward_params &p, ForwardShared &s, int block_thread) {
    const Sequence &sequence = s.sequence;
    const bool raw_gate = p.gate == 2, raw_beta = p.beta_form == 1;
    const int64_t g_first = sequence.row * p.g_token + sequence.head * p.g_head;
    const int64_t beta_first = sequence.row * p.beta_token + sequence.head * p.beta_head;
    float g_next = 0.0f, beta_next = 0.0f;

    {
        const int token = block_thread % WARPGROUP / WARP * BLOCK + block_thread % BLOCK;
        if (token < sequence.len) {
            g_next = load_gate(p.g, g_first + token * p.g_token, raw_gate);
            beta_next = load_gate(p.beta, beta_first + token * p.beta_token, raw_beta);
        }
    }
    for (int chunk = 0; chunk < sequence.chunks; chunk++) {
        const int thread = renewed(block_thread) & (WARPGROUP - 1), warp = thread / WARP, lane = thread % WARP;
        const int row = BLOCK * warp + lane / 4, column = 2 * (lane % 4);
        const int token = BLOCK * warp + lane % BLOCK; /* the one whose gate this lane reads; lanes 16-31 double 0-15 */
        const int slot = chunk % PREPARED_SLOTS, qk_slot = chunk % QK_SLOTS, valid = min(CHUNK, sequence.len - chunk * CHUNK);
        TokenFactors &factors = s.factors[slot];
        Decays &d = s.decays[chunk % 2];
        float qk[32];

        mbarrier_wait(&s.qk_full[qk_slot], chunk / QK_SLOTS % 2);
        if (valid < CHUNK) {
            clear_rows(s.k[qk_slot], valid, thread);
            prepare_sync();
        }
        float kk[32];
        /* K K^T runs under the gates */
        wgmma_fence();
        multiply_tiles(kk, s.k[qk_slot], s.k[qk_slot]);
        wgmma_commit();

        /* gates: an inclusive sum inside each 16-block */
        const float beta = token < valid ? plain_beta(p, beta_next) : 0.0f;
        float sum = token < valid ? log2_alpha(p, sequence.head, g_next) : 0.0f;
        if (token + (chunk + 1) * CHUNK < sequence.len) {
            const int64_t next = token + (int64_t)(chunk + 1) * CHUNK;
            g_next = load_gate(p.g, g_first + next * p.g_token, raw_gate);
            beta_next = load_gate(p.beta, beta_first + next * p.beta_token, raw_beta);
        }
#pragma unroll
        for (int step = 1; step < BLOCK; step *= 2) {
            const float left = __shfl_up_sync(0xffffffffu, sum, step, BLOCK);
            if (lane % 16 >= step) sum += left;
        }
        const float whole = __shfl_sync(0xffffffffu, sum, BLOCK - 1, BLOCK);
        if (chunk >= PREPARED_SLOTS) mbarrier_wait(&s.released[slot], (chunk / PREPARED_SLOTS - 1) % 2);
        if (lane < BLOCK) {
            d.sum[token] = sum;
            d.head[token] = exp2_fast(sum);
            d.tail[token] = exp2_fast(whole - sum);
            d.rk[token] = d.rq[token] = 1.0f;
            factors.beta[token] = beta;
            if (lane == 0) d.block[warp] = whole;
        }
        if (p.l2norm) {
            const float norm = row_norm(s.q[qk_slot], thread / 2, thread % 2);
            __syncwarp(); /* rows thread / 2 are the warp's own tokens */
            if (thread % 2 == 0) d.rq[thread / 2] = rsqrtf(norm + 1e-6f);
        }

        wgmma_wait<0>();
        wgmma_settle(kk);
        if (p.l2norm) { /* |k_i|^2 is the diagonal of K K^T */
#pragma unroll
            for (int tile = 0; tile < 8; tile++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (8 * tile + column + e % 2 == row + e / 2 * 8) d.rk[row + e / 2 * 8] = rsqrtf(kk[4 * tile + e] + 1e-6f);
        }
        prepare_sync(); /* decays and beta are there; all reads of the last chunk's L and A are over */

        /* L: its diagonal block in float32, what is left of it in fp16 */
        {
            const float row_scale[2] = {factors.beta[row] * d.rk[row], factors.beta[row + 8] * d.rk[row + 8]};
#pragma unroll
            for (int tile = 0; tile < 8; tile++) {
                const int j = 8 * tile + column;
                const float2 rk = *(const float2 *)&d.rk[j];
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float low = kk[4 * tile + 2 * half] * row_scale[half] * rk.x;
                    const float high = kk[4 * tile + 2 * half + 1] * row_scale[half] * rk.y;
                    if (tile / 2 == warp) {
                        s.diagonal[warp][j % BLOCK][lane / 4 + 8 * half] = low;
                        s.diagonal[warp][j % BLOCK + 1][lane / 4 + 8 * half] = high;
                    } else if (tile / 2 < warp) {
                        store_pair(s.l, row + 8 * half, j, low, high);
                    }
                }
            }
        }
        __syncwarp();
        {
            float x[BLOCK];
            invert_block(s.diagonal[warp], lane % BLOCK, x);
#pragma unroll
            for (int i = 0; i < BLOCK / 2; i++) { /* lanes 0-15 write rows 0-7, lanes 16-31 rows 8-15 */
                const float value = lane < BLOCK ? x[i] : x[i + BLOCK / 2];
                s.a[BLOCK * warp + lane / BLOCK * 8 + i][BLOCK * warp + lane % BLOCK] = (uint16_t)pack_fp16(value, 0.0f);
            }
        }
        prepare_sync();

        /* 16 -> 32: block (low, low - 1), 8 of its columns; T's too */
        const int low = warp / 2 * 2 + 1, half_columns = warp % 2 * 8;
        {
            float corner[4] = {0.0f, 0.0f, 0.0f, 0.0f}, y0[4] = {0.0f, 0.0f, 0.0f, 0.0f}, y1[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            uint32_t a[4], b[4];
            load_tiles(a, block_address(s.a, BLOCK * low, BLOCK * low, lane));
            multiply_block(y0, y1, a, block_address(s.l, BLOCK * low, BLOCK * (low - 1), lane));
            as_operand(a, y0, y1);
            load_tiles_transposed(b, block_address(s.a, BLOCK * (low - 1), BLOCK * (low - 1), lane));
            mma_fp16(corner, a, warp % 2 ? b[2] : b[0], warp % 2 ? b[3] : b[1]);
            const int j = BLOCK * (low - 1) + half_columns + column;
            const float2 betas = *(const float2 *)&factors.beta[j], tails = *(const float2 *)&d.tail[j];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int i = BLOCK * low + lane / 4 + 8 * half;
                store_pair(s.a, i, j, -corner[2 * half], -corner[2 * half + 1]);
                store_tile_pair(&s.t[slot], i, j, -corner[2 * half] * d.head[i] * tails.x * betas.x,
                                -corner[2 * half + 1] * d.head[i] * tails.y * betas.y);
            }
        }
        prepare_sync();

        /* 32 -> 64: block (2 + m, n) */
        const int m = warp / 2, n = warp % 2;
        float z0[4] = {0.0f, 0.0f, 0.0f, 0.0f}, z1[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        {
            float y[4][4] = {};
            uint32_t a[4];
            for (int block = 2; block <= 2 + m; block++) {
                load_tiles(a, block_address(s.a, BLOCK * (2 + m), BLOCK * block, lane));
                multiply_block(y[0], y[1], a, block_address(s.l, BLOCK * block, 0, lane));
                multiply_block(y[2], y[3], a, block_address(s.l, BLOCK * block, BLOCK, lane));
            }
            if (n == 0) {
                as_operand(a, y[0], y[1]);
                multiply_block(z0, z1, a, block_address(s.a, 0, 0, lane));
            }
            as_operand(a, y[2], y[3]);
            multiply_block(z0, z1, a, block_address(s.a, BLOCK, BLOCK * n, lane));
        }

        /* Q K^T runs under the decays and T */
        wgmma_fence();
        multiply_tiles(qk, s.q[qk_slot], s.k[qk_slot]);
        wgmma_commit();

        /* decays of this thread's places, and of whole blocks */
        const float4 blocks = *(const float4 *)d.block;
        const float e0 = exp2_fast(blocks.x), e1 = exp2_fast(blocks.y), e2 = exp2_fast(blocks.z), e3 = exp2_fast(blocks.w);
        const float head[2] = {d.head[row], d.head[row + 8]}, sums[2] = {d.sum[row], d.sum[row + 8]};
        float inside[2][4]; /* decays of the warp's diagonal block, 0 above its diagonal */
#pragma unroll
        for (int tile = 0; tile < 2; tile++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int j = BLOCK * warp + 8 * tile + column + e % 2;
                inside[tile][e] = j <= row + e / 2 * 8 ? exp2_fast(sums[e / 2] - d.sum[j]) : 0.0f;
            }

        /* T: the warp's diagonal block, its block of the lower left */
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            const int j = BLOCK * warp + 8 * tile + column;
            const float2 betas = *(const float2 *)&factors.beta[j];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int i = row + 8 * half;
                const uint32_t pair = *(const uint32_t *)&s.a[i][j];
                store_tile_pair(&s.t[slot], i, j, j < i ? from_fp16(pair) * inside[tile][2 * half] * betas.x : 0.0f,
                                j + 1 < i ? from_fp16(pair >> 16) * inside[tile][2 * half + 1] * betas.y : 0.0f);
            }
        }
        const float between = (n == 0 ? e1 : 1.0f) * (m == 1 ? e2 : 1.0f); /* whole blocks between block rows 2 + m and n */
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            const int j = BLOCK * n + 8 * tile + column;
            const float2 betas = *(const float2 *)&factors.beta[j], tails = *(const float2 *)&d.tail[j];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int i = BLOCK * (2 + m) + lane / 4 + 8 * half;
                const float scale = d.head[i] * between;
                const float (&z)[4] = tile ? z1 : z0;
                store_tile_pair(&s.t[slot], i, j, -z[2 * half] * scale * tails.x * betas.x, -z[2 * half + 1] * scale * tails.y * betas.y);
            }
        }

        /* P: the warp's rows */
        wgmma_wait<0>();
        wgmma_settle(qk);
        {
            const float rq[2] = {d.rq[row], d.rq[row + 8]};
#pragma unroll
            for (int block = 0; block < BLOCKS; block++) {
                if (block > warp) break;
                const float middle = (block < 1 && warp > 1 ? e1 : 1.0f) * (block < 2 && warp > 2 ? e2 : 1.0f);
#pragma unroll
                for (int tile = 0; tile < 2; tile++) {
                    const int j = BLOCK * block + 8 * tile + column;
                    const float2 tails = *(const float2 *)&d.tail[j], rk = *(const float2 *)&d.rk[j];
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const float *value = &qk[8 * block + 4 * tile + 2 * half];
                        const float outside = head[half] * middle;
                        const float low_decay = block == warp ? inside[tile][2 * half] : outside * tails.x;
                        const float high_decay = block == warp ? inside[tile][2 * half + 1] : outside * tails.y;
                        store_tile_pair(&s.p[slot], row + 8 * half, j, low_decay == 0.0f ? 0.0f : value[0] * low_decay * rq[half] * rk.x,
                                        high_decay == 0.0f ? 0.0f : value[1] * high_decay * rq[half] * rk.y);
                    }
                }
            }
        }

        /* the state's factors */
        if (lane < BLOCK) {
            const float before = (warp > 0 ? e0 : 1.0f) * (warp > 1 ? e1 : 1.0f) * (warp > 2 ? e2 : 1.0f);
            const float after = (warp < 1 ? e1 : 1.0f) * (warp < 2 ? e2 : 1.0f) * (warp < 3 ? e3 : 1.0f);
            factors.w[token] = d.head[token] * before * d.rk[token];
            factors.update[token] = d.tail[token] * after * d.rk[token];
            factors.o[token] = d.head[token] * before * d.rq[token];
            if (thread == 0) factors.gamma_chunk = e0 * e1 * e2 * e3;
        }
        fence_proxy_async(); /* T and P go to wgmma */
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&s.prepared[slot]);
    }
}

#endif
