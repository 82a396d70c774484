/* The warpgroup of a chunk's 64 x 64 matrices. Warp w has rows 16w .. 16w + 15.

       dP_ij   = scale exp(G_i - G_j) rq_i r_j (dO Vn^T)_ij   i >= j
       dKK_ij  = -exp(G_i - G_j) r_i r_j (dW Vn^T)_ij         i > j
       dbeta_j = (dW Vn^T)_jj / beta_j^2
       <dS1, S0> = the sum of the diagonals of dS1^T S0, 64 rows of V at a time

   The inverse needs no gradient of its own: beta dL = -decay T^T dT T^T with dT = dVn W^T, and T^T dVn is dW, T W is Vn.
   Vn_j is beta_j times what the state makes of the token's v, and dW_j is beta_j times the gradient of that product.
   Where beta is too small to divide by, dbeta_j is worked out from both factors themselves, by hand (tiny_beta). */
#ifndef FLASHQLA_BACKWARD_SCORES_H
#define FLASHQLA_BACKWARD_SCORES_H

#include "backward_rows.h"
#include "gates.h"

enum { SCORES_BARRIER = 2 };

static __device__ __forceinline__ float element_of(const Tile *tiles, int row, int column) {
    return low_element(
        *(const uint16_t *)(tiles[column / 64].bytes + row * 128 + ((column % 64 / 8 ^ row % 8) * 16) + column % 8 * 2));
}

/* log2 of exp(G_i - G_j) rq_i r_j, i >= j. */
static __device__ __forceinline__ float log2_decay(const fqla__factors &f, int i, int j) {
    float sum = f.row[i] - f.column[j];
    for (int block = j / BLOCK; block < i / BLOCK; block++) sum += f.block[block];
    return sum;
}

/* dbeta of token j from e_j = V_j - w_j K_j S0 - sum_{i<j} N_ji Vn_i, what the state makes of v, and its share of the gradient,
   update_j K_j dS1 + sum_{i>=j} P_ij dO_i - sum_{i>j} N_ij dW_i, N = exp(G_i - G_j) r_i r_j K K^T. A thread a column of V. */
static __device__ __forceinline__ void tiny_beta(const fqla__backward_params &p, GradientsShared &s, const Place &place, int h,
                                                 int n, int j, int thread) {
    const fqla__factors &f = s.factors[n % 3];
    const FirstPart &first = s.first[n % 2];
    const int i = thread % CHUNK, v = thread, half = v / 64, head = group_head(p.forward, place.head_qk, h);
    const bool queries = thread >= CHUNK;
    float dot = 0.0f, state = 0.0f, gradient = 0.0f;
#pragma unroll 1
    for (int x = 0; x < DIM; x++) {
        const float k = element_of(s.k, j, x);
        dot = fmaf(element_of(queries ? s.q : s.k, i, x), k, dot);
        state = fmaf(element_of(s.second.s[half], v % 64, x), k, state);
        gradient = fmaf(element_of(first.ds[half], v % 64, x), k, gradient);
    }
    if (queries) s.tiny_p[i] = i >= j ? p.forward.scale * exp2_fast(log2_decay(f, i, j)) * dot : 0.0f;
    else
        s.tiny_n[i] =
            i != j ? exp2_fast(log2_decay(f, max(i, j), min(i, j))) * (p.forward.l2norm ? s.ratio[max(i, j)] : 1.0f) * dot : 0.0f;
    meet<SCORES_BARRIER, WARPGROUP>();
    float e = low_element(((const uint16_t *)p.v_rows)[(place.row + j) * p.v_token + head * p.v_head + v]) - f.w[j] * state;
    gradient *= f.update[j] * p.unit;
#pragma unroll 1
    for (int x = 0; x < CHUNK; x++) {
        if (x < j) e = fmaf(-s.tiny_n[x], element_of(first.vn, x, v), e);
        if (x > j) gradient = fmaf(-s.tiny_n[x], element_of(s.second.dw, x, v), gradient);
        if (x >= j) gradient = fmaf(s.tiny_p[x], element_of(s.second.dout, x, v), gradient);
    }
    const float sum = sum_warp(e * gradient);
    if (thread % WARP == 0) s.tiny_sum[thread / WARP] = sum;
    meet<SCORES_BARRIER, WARPGROUP>();
    if (thread == 0) s.sums[n % SUMS].tiny[j] = (s.tiny_sum[0] + s.tiny_sum[1]) + (s.tiny_sum[2] + s.tiny_sum[3]);
}

/* Which of the chunk's tokens have such a beta: a bit a token. By whole warps. */
static __device__ __forceinline__ uint64_t find_tiny(const fqla__factors &f, int valid, int lane) {
    const uint32_t low = __ballot_sync(0xffffffffu, lane < valid && fabsf(f.beta[lane]) < LEAST_BETA);
    const uint32_t high = __ballot_sync(0xffffffffu, lane + WARP < valid && fabsf(f.beta[lane + WARP]) < LEAST_BETA);
    return (uint64_t)high << 32 | low;
}

/* A 16 x 16 accumulator's diagonal lies in the lanes l of l/8 = l%4: row l/4 (half 0) and l/4 + 8 (half 1). */
static __device__ __forceinline__ bool has_diagonal(int lane) { return lane / 8 == lane % 4; }
static __device__ __forceinline__ float diagonal_of(const float *block, int half, int lane) {
    return lane / 4 % 2 ? block[6 * half + 1] : block[6 * half];
}

/* Of a 64 x 64 product its diagonal. */
static __device__ __forceinline__ void leave_diagonal(float *to, const float (&d)[32], int warp, int lane) {
#pragma unroll
    for (int block = 0; block < BLOCKS; block++)
        if (block == warp && has_diagonal(lane))
            for (int half = 0; half < 2; half++)
                to[BLOCK * block + lane / 4 + 8 * half] = diagonal_of(&d[8 * block], half, lane);
}

/* dP and dKK from dO Vn^T and dW Vn^T, into their tiles. h: the item's v-head. */
static __device__ __forceinline__ void make_gradients(const fqla__backward_params &p, GradientsShared &s, float (&d)[32],
                                                      float (&g)[32], int item, int h, int n, int warp, int lane) {
    const fqla__factors &f = s.factors[n % 3];
    const int row = BLOCK * warp + lane / 4, column = 2 * (lane % 4);
    const float e1 = exp2_fast(f.block[1]), e2 = exp2_fast(f.block[2]), scale = p.forward.scale;
    const float rows[2] = {f.row[row], f.row[row + 8]};
    const float ratio[2] = {p.forward.l2norm ? -s.ratio[row] : -1.0f, p.forward.l2norm ? -s.ratio[row + 8] : -1.0f};
    float head[2] = {exp2_fast(rows[0]), exp2_fast(rows[1])}; /* from the blocks left of these to the rows */
    float dp_diagonal[2], diagonal[2]; /* where the lane has them: dP's, and dW Vn^T's */
#pragma unroll
    for (int block = BLOCKS - 1; block >= 0; block--) {
        float *dp = &d[8 * block], *m = &g[8 * block];
        if (block > warp) continue;
        const bool own = block == warp; /* the diagonal's: its decays from its own rows' logarithms */
        const float whole = f.block[block];
        if (own)
            for (int half = 0; half < 2; half++) diagonal[half] = diagonal_of(m, half, lane);
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const int half = e / 2 % 2, j = column + e / 4 * 8 + e % 2, i = lane / 4 + half * 8;
            const float decay = (own ? 1.0f : head[half]) * exp2_fast((own ? rows[half] : whole) - f.column[BLOCK * block + j]);
            dp[e] *= decay * scale;
            m[e] *= decay * ratio[half];
            if (e % 6 < 2 && own && j == i) dp_diagonal[half] = dp[e]; /* elements 0, 1, 6 and 7 alone can be */
            dp[e] = !own || j < i ? dp[e] : 0.0f;
            m[e] = !own || j < i ? m[e] : 0.0f;
        }
        if (!own) { /* this block lies between the rows and the blocks left of it */
            head[0] *= block == 2 ? e2 : e1;
            head[1] *= block == 2 ? e2 : e1;
        }
        store_tile_block(&s.dp, warp, block, lane, dp);
        store_tile_block(&s.m, warp, block, lane, m);
    }
    if (has_diagonal(lane))
        for (int half = 0; half < 2; half++) {
            float *sum = &s.dp_diagonal[item % 2][row + 8 * half];
            *sum = h == 0 ? dp_diagonal[half] : *sum + dp_diagonal[half];
            s.sums[n % SUMS].diagonal[row + 8 * half] = diagonal[half];
        }
    fence_proxy_async(); /* they go to wgmma */
    arrive_warp(&s.scores_ready, lane);
}

/* The dots of k with dKK K, by the role that has time for them. */
static __device__ __forceinline__ void sum_reads(GradientsShared &s, int n, int warp, int lane) {
    float product[64], dot[2];
    wgmma_fence();
    multiply_tokens(product, shared_units(&s.m), shared_units(s.k));
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_settle(product);
    arrive_warp(&s.scores_used, lane);
    dot_rows(dot, product, s.k, warp, lane);
    store_sums(s.sums[n % SUMS].read, dot[0], dot[1], warp, lane);
}

/* With l2norm the rows' norms, from shared memory: 64 threads those of q, 64 those of k. */
static __device__ __forceinline__ void make_norms(GradientsShared &s, int valid, int thread) {
    const int row = thread % CHUNK;
    const Tile *tiles = thread < CHUNK ? s.q : s.k;
    float sum = 0.0f;
#pragma unroll 4
    for (int unit = 0; unit < DIM / 8; unit++) {
        const uint4 x = *(const uint4 *)(tiles[unit / 8].bytes + row * 128 + ((unit % 8 ^ row % 8) * 16));
        const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
            sum = fmaf(low_element(pairs[i]), low_element(pairs[i]), fmaf(high_element(pairs[i]), high_element(pairs[i]), sum));
    }
    const float r = row < valid ? rsqrtf(sum + 1e-6f) : 1.0f;
    if (thread < CHUNK) s.square_q[row] = r * r, s.tiny_p[row] = r;
    else s.square_k[row] = r * r, s.tiny_n[row] = r;
    meet<SCORES_BARRIER, WARPGROUP>();
    if (thread < CHUNK) s.ratio[row] = s.tiny_n[row] / s.tiny_p[row];
    meet<SCORES_BARRIER, WARPGROUP>();
}

/* q and k of an item come late, when the one before no longer needs theirs; dP and dKK do without them. */
static __device__ void run_scores(const fqla__backward_params &p, GradientsShared &s, int block_thread) {
    const int heads = p.forward.heads_v / p.forward.heads_qk;
    int n = 0, clears = 0;
    for (int item = 0;; item++) {
        const Place &place = wait_place(s, item, n, clears);
        if (place.valid == 0) break;
        if (p.forward.l2norm) {
            mbarrier_wait(&s.q_full, item % 2);
            mbarrier_wait(&s.k_full, item % 2);
            make_norms(s, place.valid, block_thread);
        }
        for (int h = 0; h < heads; h++, n++) {
            const int thread = renewed(block_thread) & (WARPGROUP - 1), warp = thread / WARP, lane = thread % WARP;
            const FirstPart &first = s.first[n % 2];
            float d[32], g[32], states[32];
            wait_second(s, place, n, clears);
            wgmma_fence();
            multiply_tiles(d, shared_units(s.second.dout), shared_units(first.vn));
            multiply_tiles(g, shared_units(s.second.dw), shared_units(first.vn));
            multiply_tiles(states, shared_units(first.ds[0]), shared_units(s.second.s[0]));
            multiply_tiles_onto<0>(states, shared_units(first.ds[1]), shared_units(s.second.s[1]));
            wgmma_commit();
            wait_sums(s, n);
            wgmma_wait<0>();
            wgmma_settle(d);
            wgmma_settle(g);
            wgmma_settle(states);
            for (uint64_t tiny = find_tiny(s.factors[n % 3], place.valid, lane); tiny != 0; tiny &= tiny - 1) {
                mbarrier_wait(&s.q_full, item % 2);
                mbarrier_wait(&s.k_full, item % 2);
                tiny_beta(p, s, place, h, n, __ffsll((long long)tiny) - 1, thread);
            }
            arrive_warp(&s.first_used[n % 2], lane);
            arrive_warp(&s.second_used, lane);
            leave_diagonal(s.sums[n % SUMS].states, states, warp, lane);
            if (n > 0) mbarrier_wait(&s.scores_used, (n - 1) % 2);
            __syncwarp();
            make_gradients(p, s, d, g, item, h, n, warp, lane);
            mbarrier_wait(&s.k_full, item % 2);
            mbarrier_wait(&s.q_full, item % 2); /* its q is not read, but no phase may be missed: tiny_beta and make_norms wait for some */
            mbarrier_wait(&s.scores_ready, n % 2);
            sum_reads(s, n, warp, lane);
            if (h == heads - 1) arrive_warp(&s.qk_free, lane);
            arrive_warp(&s.sums_full[n % SUMS], lane);
        }
    }
    end_sums(s, n, block_thread % WARP);
}

#endif
