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

/* A 16 x 16 accumulator (two tiles of 16 x 8) as 16-bit elements at the lane's address, one row of eight of it. */
static __device__ __forceinline__ void store_block(uint32_t address, const float *d) {
    store_tiles(address, pack_elements(d[0], d[1]), pack_elements(d[2], d[3]), pack_elements(d[4], d[5]), pack_elements(d[6], d[7]));
}

static __device__ __forceinline__ void store_block_fp16(uint32_t address, const float *d) {
    store_tiles(address, pack_fp16(d[0], d[1]), pack_fp16(d[2], d[3]), pack_fp16(d[4], d[5]), pack_fp16(d[6], d[7]));
}

/* The lane's address of block (row, column), counted in blocks, of a swizzled tile. */
static __device__ __forceinline__ uint32_t tile_block_address(const Tile *tile, int row, int column, int lane) {
    const int unit = ((lane / 16) ^ (lane % 8)) ^ (2 * column);
    return shared_address(tile) + (BLOCK * row + lane % 16) * 128 + unit * 16;
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

/* A column of the inverse of the unit lower triangular I + L, L transposed at l[j][i]: x_i = e_i - sum_{j<i} L_ij x_j. */
static __device__ __forceinline__ void invert_block(const float (*l)[DIAGONAL_PITCH], int column, float (&x)[BLOCK]) {
    float4 row[2][BLOCK / 4]; /* column j of L, the next one on its way while this one is used */
#pragma unroll
    for (int i = 0; i < BLOCK / 4; i++) row[0][i] = *(const float4 *)&l[0][4 * i];
#pragma unroll
    for (int i = 0; i < BLOCK; i++) x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
    for (int j = 0; j < BLOCK - 1; j++) {
        const float *current = (const float *)row[j % 2];
#pragma unroll
        for (int i = (j + 1) / 4; i < BLOCK / 4; i++) row[(j + 1) % 2][i] = *(const float4 *)&l[j + 1][4 * i];
#pragma unroll
        for (int i = j + 1; i < BLOCK; i++) x[i] = fmaf(-current[i], x[j], x[i]);
    }
}

/* y [16 x 16] += a b, b a 16 x 16 block in shared memory. */
static __device__ __forceinline__ void multiply_block(float (&y)[8], const uint32_t (&a)[4], uint32_t b_address) {
    uint32_t b[4];
    load_tiles_transposed(b, b_address);
    mma_fp16(*(float (*)[4])&y[0], a, b[0], b[1]);
    mma_fp16(*(float (*)[4])&y[4], a, b[2], b[3]);
}

/* A 16 x 16 accumulator as the left operand of the next product. */
static __device__ __forceinline__ void as_operand(uint32_t (&a)[4], const float (&y)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = pack_fp16(y[2 * i], y[2 * i + 1]);
}

/* A lane's token of a chunk: its gate and beta as they are given. Nothing past the end. */
static __device__ __forceinline__ void load_gates(const fqla__forward_params &p, const Sequence &sequence, int chunk, int token, float *g,
                                                  float *beta) {
    const int64_t index = (int64_t)chunk * CHUNK + token;
    if (index >= sequence.len) return;
    *g = load_gate(p.g, (sequence.row + index) * p.g_token + sequence.head * p.g_head, p.gate == 2);
    *beta = load_gate(p.beta, (sequence.row + index) * p.beta_token + sequence.head * p.beta_head, p.beta_form == 1);
}

/* The decays of a chunk from the gates in g and beta, which are reloaded for the chunk after it. */
static __device__ __forceinline__ void prepare_decays(const fqla__forward_params &p, ForwardShared &s, int chunk, int warp, int lane, float *g,
                                                      float *beta) {
    const Sequence &sequence = s.sequence;
    const int token = BLOCK * warp + lane % BLOCK;
    const bool live = chunk * CHUNK + token < sequence.len;
    Decays &d = s.decays[chunk % 2];
    const float token_beta = live ? plain_beta(p, *beta) : 0.0f;
    float sum = live ? log2_alpha(p, sequence.head, *g) : 0.0f;
    load_gates(p, sequence, chunk + 1, token, g, beta);
#pragma unroll
    for (int step = 1; step < BLOCK; step *= 2) {
        const float left = __shfl_up_sync(0xffffffffu, sum, step, BLOCK);
        if (lane % BLOCK >= step) sum += left;
    }
    const float whole = __shfl_sync(0xffffffffu, sum, BLOCK - 1, BLOCK);
    if (lane < BLOCK) {
        d.sum[token] = sum;
        d.head[token] = exp2_fast(sum);
        d.tail[token] = exp2_fast(whole - sum);
        d.beta[token] = token_beta;
        d.rk[token] = d.rq[token] = 1.0f;
        if (lane == 0) d.block[warp] = whole;
    }
}

/* Start K K^T of a chunk, once it is there. */
static __device__ __forceinline__ void start_kk(float (&kk)[32], ForwardShared &s, int chunk, int thread) {
    const int slot = chunk % QK_SLOTS, valid = s.sequence.len - chunk * CHUNK;
    if (chunk < s.sequence.chunks) mbarrier_wait(&s.qk_full[slot], chunk / QK_SLOTS % 2);
    if (valid > 0 && valid < CHUNK) {
        clear_rows(s.k[slot], valid, thread);
        prepare_sync();
    }
    wgmma_fence();
    multiply_tiles(kk, s.k[slot], s.k[slot]);
    wgmma_commit();
}

static __device__ void prepare_chunks(const fqla__forward_params &p, ForwardShared &s, int block_thread) {
    const Sequence &sequence = s.sequence;
    float kk[32], qk[32], g = 0.0f, beta = 0.0f;
    {
        const int warp = block_thread / WARP, lane = block_thread % WARP;
        load_gates(p, sequence, 0, BLOCK * warp + lane % BLOCK, &g, &beta);
        start_kk(kk, s, 0, block_thread);
        prepare_decays(p, s, 0, warp, lane, &g, &beta);
    }
    for (int chunk = 0; chunk < sequence.chunks; chunk++) {
        const int thread = renewed(block_thread) & (WARPGROUP - 1), warp = thread / WARP, lane = thread % WARP;
        const int row = BLOCK * warp + lane / 4, column = 2 * (lane % 4); /* of an accumulator's first element */
        const int slot = chunk % PREPARED_SLOTS, qk_slot = chunk % QK_SLOTS;
        TokenFactors &factors = s.factors[slot];
        Decays &d = s.decays[chunk % 2];

        wgmma_wait<0>();
        wgmma_settle(kk);
        if (p.l2norm) {
            const float norm = row_norm(s.q[qk_slot], thread / 2, thread % 2);
            __syncwarp();
            if (thread % 2 == 0) d.rq[thread / 2] = rsqrtf(norm + 1e-6f);
#pragma unroll
            for (int e = 0; e < 4; e++) { /* |k_i|^2 is the diagonal of K K^T */
                const int i = row + e / 2 * 8;
#pragma unroll
                for (int tile = 0; tile < 8; tile++)
                    if (8 * tile + column + e % 2 == i) d.rk[i] = rsqrtf(kk[4 * tile + e] + 1e-6f);
            }
        }
        prepare_sync(); /* the decays are there; all reads of the last chunk's L and A are over */
        if (p.l2norm)
#pragma unroll
            for (int tile = 0; tile < 8; tile++) {
                const float2 rk = *(const float2 *)&d.rk[8 * tile + column];
                kk[4 * tile] *= rk.x;
                kk[4 * tile + 1] *= rk.y;
                kk[4 * tile + 2] *= rk.x;
                kk[4 * tile + 3] *= rk.y;
            }

        /* L: its diagonal block in float32, what is left of it in fp16 */
        {
            const float scale[2] = {d.beta[row] * d.rk[row], d.beta[row + 8] * d.rk[row + 8]};
#pragma unroll
            for (int block = 0; block < BLOCKS; block++) {
                float *l = &kk[8 * block];
                if (block > warp) break;
#pragma unroll
                for (int e = 0; e < 8; e++) l[e] *= scale[e / 2 % 2];
                if (block < warp) {
                    store_block_fp16(block_address(s.l, BLOCK * warp, BLOCK * block, lane), l);
                } else {
#pragma unroll
                    for (int e = 0; e < 8; e++) s.diagonal[warp][column + e / 4 * 8 + e % 2][lane / 4 + e / 2 % 2 * 8] = l[e];
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
        if (chunk >= PREPARED_SLOTS) mbarrier_wait(&s.released[slot], (chunk / PREPARED_SLOTS - 1) % 2);
        prepare_sync();

        /* 16 -> 32: block (low, low - 1), 8 of its columns; T's too */
        const int low = warp / 2 * 2 + 1;
        {
            float corner[4] = {0.0f, 0.0f, 0.0f, 0.0f}, y[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
            uint32_t a[4], b[4];
            load_tiles(a, block_address(s.a, BLOCK * low, BLOCK * low, lane));
            multiply_block(y, a, block_address(s.l, BLOCK * low, BLOCK * (low - 1), lane));
            as_operand(a, y);
            load_tiles_transposed(b, block_address(s.a, BLOCK * (low - 1), BLOCK * (low - 1), lane));
            mma_fp16(corner, a, warp % 2 ? b[2] : b[0], warp % 2 ? b[3] : b[1]);
            const int j = BLOCK * (low - 1) + warp % 2 * 8 + column;
            const float2 betas = *(const float2 *)&d.beta[j], tails = *(const float2 *)&d.tail[j];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int i = BLOCK * low + lane / 4 + 8 * half;
                const float head = d.head[i];
                *(uint32_t *)&s.a[i][j] = pack_fp16(-corner[2 * half], -corner[2 * half + 1]);
                *(uint32_t *)(s.t[slot].bytes + i * 128 + (((j / 8) ^ (i % 8)) * 16) + column * 2) =
                    pack_elements(-corner[2 * half] * head * tails.x * betas.x, -corner[2 * half + 1] * head * tails.y * betas.y);
            }
        }
        prepare_sync();

        /* 32 -> 64: block (2 + m, n) */
        const int m = warp / 2, n = warp % 2;
        float z[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        {
            float y[2][8] = {};
            uint32_t a[4];
            for (int block = 2; block <= 2 + m; block++) {
                load_tiles(a, block_address(s.a, BLOCK * (2 + m), BLOCK * block, lane));
                multiply_block(y[0], a, block_address(s.l, BLOCK * block, 0, lane));
                multiply_block(y[1], a, block_address(s.l, BLOCK * block, BLOCK, lane));
            }
            if (n == 0) {
                as_operand(a, y[0]);
                multiply_block(z, a, block_address(s.a, 0, 0, lane));
            }
            as_operand(a, y[1]);
            multiply_block(z, a, block_address(s.a, BLOCK, BLOCK * n, lane));
        }
        /* Q K^T runs under the decays and T */
        wgmma_fence();
        multiply_tiles(qk, s.q[qk_slot], s.k[qk_slot]);
        wgmma_commit();

        /* decays of whole blocks, and inside the warp's diagonal block: 0 above its diagonal */
        const float4 blocks = *(const float4 *)d.block;
        const float e0 = exp2_fast(blocks.x), e1 = exp2_fast(blocks.y), e2 = exp2_fast(blocks.z), e3 = exp2_fast(blocks.w);
        float inside[8];
        {
            const float sums[2] = {d.sum[row], d.sum[row + 8]};
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const int j = column + e / 4 * 8 + e % 2, i = lane / 4 + e / 2 % 2 * 8;
                inside[e] = j <= i ? exp2_fast(sums[e / 2 % 2] - d.sum[BLOCK * warp + j]) : 0.0f;
            }
        }
        /* T: the warp's diagonal block, its block of the lower left */
        {
            uint32_t a[4];
            float t[8];
            load_tiles(a, block_address(s.a, BLOCK * warp, BLOCK * warp, lane)); /* this warp wrote it */
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const int j = column + e / 4 * 8 + e % 2, i = lane / 4 + e / 2 % 2 * 8;
                t[e] = j < i ? from_fp16(e % 2 ? a[e / 2] >> 16 : a[e / 2]) * inside[e] * d.beta[BLOCK * warp + j] : 0.0f;
            }
            store_block(tile_block_address(&s.t[slot], warp, warp, lane), t);
        }
        {
            const float between = (n == 0 ? e1 : 1.0f) * (m == 1 ? e2 : 1.0f); /* whole blocks between block rows 2 + m and n */
            const float head[2] = {-d.head[BLOCK * (2 + m) + lane / 4] * between, -d.head[BLOCK * (2 + m) + lane / 4 + 8] * between};
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const int j = BLOCK * n + column + e / 4 * 8 + e % 2;
                z[e] *= head[e / 2 % 2] * (d.tail[j] * d.beta[j]);
            }
            store_block(tile_block_address(&s.t[slot], 2 + m, n, lane), z);
        }
        /* the state's factors */
        if (lane < BLOCK) {
            const int token = BLOCK * warp + lane;
            const float before = (warp > 0 ? e0 : 1.0f) * (warp > 1 ? e1 : 1.0f) * (warp > 2 ? e2 : 1.0f);
            const float after = (warp < 1 ? e1 : 1.0f) * (warp < 2 ? e2 : 1.0f) * (warp < 3 ? e3 : 1.0f);
            factors.w[token] = d.head[token] * before * d.rk[token];
            factors.update[token] = d.tail[token] * after * d.rk[token];
            factors.o[token] = d.head[token] * before * d.rq[token];
            factors.beta[token] = d.beta[token];
            if (thread == 0) factors.gamma_chunk = e0 * e1 * e2 * e3;
        }

        /* P: the warp's rows */
        wgmma_wait<0>();
        wgmma_settle(qk);
        {
            const float rq[2] = {d.rq[row], d.rq[row + 8]};
            float head[2] = {d.head[row] * rq[0], d.head[row + 8] * rq[1]};
#pragma unroll
            for (int block = BLOCKS - 1; block >= 0; block--) {
                float *value = &qk[8 * block];
                if (block > warp) continue;
                if (block == warp) {
#pragma unroll
                    for (int e = 0; e < 8; e++) {
                        const int j = column + e / 4 * 8 + e % 2, i = lane / 4 + e / 2 % 2 * 8;
                        value[e] = j <= i ? value[e] * inside[e] * (rq[e / 2 % 2] * d.rk[BLOCK * warp + j]) : 0.0f;
                    }
                } else {
#pragma unroll
                    for (int e = 0; e < 8; e++) {
                        const int j = BLOCK * block + column + e / 4 * 8 + e % 2;
                        value[e] *= head[e / 2 % 2] * (d.tail[j] * d.rk[j]);
                    }
                    /* the block itself lies between the rows and the blocks left of it */
                    head[0] *= block == 2 ? e2 : block == 1 ? e1 : e0;
                    head[1] *= block == 2 ? e2 : block == 1 ? e1 : e0;
                }
                store_block(tile_block_address(&s.p[slot], warp, block, lane), value);
            }
        }
        fence_proxy_async(); /* T and P go to wgmma */
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&s.prepared[slot]);

        /* the next chunk's K K^T runs under its gates */
        start_kk(kk, s, chunk + 1, thread);
        prepare_decays(p, s, chunk + 1, warp, lane, &g, &beta);
    }
    wgmma_wait<0>();
}

#endif
