/* The warpgroup of a chunk's 64 x 64 matrices and of the gates; its first thread loads. Warp w has rows 16w .. 16w + 15.

       dP_ij   = scale exp(G_i - G_j) rq_i r_j (dO Vn^T)_ij   i >= j
       dKK_ij  = -exp(G_i - G_j) r_i r_j (dW Vn^T)_ij         i > j
       Z_ij    = dP_ij (Q K^T)_ij + dKK_ij (K K^T)_ij         i > j: what reaches the gates of the tokens j + 1 .. i
       dg_t    = sum_{i>=t} (sum_j Z_ij - sum_j Z_ji + query_i - key_i) + sum_{i<t} H_i + gamma_C <dS1, S0>
       dbeta_j = (dW Vn^T)_jj / beta_j^2

   The inverse needs no gradient of its own: beta dL = -decay T^T dT T^T with dT = dVn W^T, and T^T dVn is dW, T W is Vn.
   Vn_j is beta_j times what the state makes of the token's v, and dW_j is beta_j times the gradient of that product.
   H enters as a prefix sum, not as -H_i and the sum of all, and Z's diagonal not at all: dg is far smaller than they are.
   Where beta is too small to divide by, dbeta_j is worked out from both factors themselves, by hand (tiny_beta). */
#ifndef FLASHQLA_BACKWARD_SCORES_H
#define FLASHQLA_BACKWARD_SCORES_H

#include "backward_rows.h"
#include "gates.h"

/* beta^2 is an exact enough divisor from here on in either 16-bit type. */
#define LEAST_BETA 0.000244140625f

static __device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

static __device__ __forceinline__ float half_of_bf16(uint32_t pair, int high) {
    return __uint_as_float(high ? pair & 0xffff0000u : pair << 16);
}

/* ---- loads, by one thread --------------------------------------------------------------------------------------------------- */

/* Step n's first part, where there is such a step: v-head h of an item, h counted on into the next. */
static __device__ __forceinline__ void load_first(const fqla__backward_params &p, GradientsShared &s, int item, int items, int h,
                                                  int n) {
    const int heads = p.forward.heads_v / p.forward.heads_qk;
    if (h >= heads) h -= heads, item++;
    if (item >= items) return;
    const Place &place = s.places[item % PLACES];
    const int64_t entry = place.number * p.forward.heads_v + group_head(p.forward, place.head_qk, h);
    uint64_t *full = &s.first_full[n % 2];
    mbarrier_arrive_expect(full, sizeof(FirstPart) + sizeof(fqla__factors));
    bulk_load(&s.first[n % 2], p.chunks[entry].ds, sizeof(FirstPart), full);
    bulk_load(&s.factors[n % 3], &p.forward.prepared[entry].factors, sizeof(fqla__factors), full);
}

/* Its second. */
static __device__ __forceinline__ void load_second(const fqla__backward_params &p, GradientsShared &s, int item, int items, int h) {
    const int heads = p.forward.heads_v / p.forward.heads_qk;
    if (h >= heads) h -= heads, item++;
    if (item >= items) return;
    const Place &place = s.places[item % PLACES];
    const int head = group_head(p.forward, place.head_qk, h);
    mbarrier_arrive_expect(&s.second_full, sizeof(SecondPart));
    bulk_load(s.second.s, p.chunks[place.number * p.forward.heads_v + head].s, sizeof s.second.s, &s.second_full);
    for (int half = 0; half < 2; half++) {
        tma_load(&s.second.dout[half], &p.forward.o, half * FQLA__LOAD_COLUMNS, (int32_t)place.row, head, &s.second_full);
        tma_load(&s.second.dw[half], &p.dv, half * FQLA__LOAD_COLUMNS, (int32_t)place.row, head, &s.second_full);
    }
}

static __device__ __forceinline__ void load_chunk_rows(const fqla__backward_params &p, GradientsShared &s, const Place &place) {
    mbarrier_arrive_expect(&s.qk_full, sizeof s.q + sizeof s.k);
    for (int half = 0; half < 2; half++) {
        tma_load(&s.q[half], &p.forward.q, half * FQLA__LOAD_COLUMNS, (int32_t)place.row, place.head_qk, &s.qk_full);
        tma_load(&s.k[half], &p.forward.k, half * FQLA__LOAD_COLUMNS, (int32_t)place.row, place.head_qk, &s.qk_full);
    }
}

/* ---- parts of a head -------------------------------------------------------------------------------------------------------- */

/* The thread's share of <dS1, S0>: 16 bytes of 128 lie 128 units apart. */
static __device__ __forceinline__ float dot_states(const FirstPart &first, const SecondPart &second, int thread) {
    const uint4 *a = (const uint4 *)first.ds, *b = (const uint4 *)second.s;
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
    for (int i = 0; i < (int)(sizeof first.ds / 16 / WARPGROUP); i++) {
        const uint4 x = a[i * WARPGROUP + thread], y = b[i * WARPGROUP + thread];
        sums[0] = fmaf(low_element(x.x), low_element(y.x), fmaf(high_element(x.x), high_element(y.x), sums[0]));
        sums[1] = fmaf(low_element(x.y), low_element(y.y), fmaf(high_element(x.y), high_element(y.y), sums[1]));
        sums[2] = fmaf(low_element(x.z), low_element(y.z), fmaf(high_element(x.z), high_element(y.z), sums[2]));
        sums[3] = fmaf(low_element(x.w), low_element(y.w), fmaf(high_element(x.w), high_element(y.w), sums[3]));
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

static __device__ __forceinline__ float sum_warp(float value) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
}

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
    named_barrier<SCORES_BARRIER, WARPGROUP>();
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
    named_barrier<SCORES_BARRIER, WARPGROUP>();
    if (thread == 0) s.sums[n % 2].tiny[j] = (s.tiny_sum[0] + s.tiny_sum[1]) + (s.tiny_sum[2] + s.tiny_sum[3]);
}

/* Which of the chunk's tokens have such a beta: a bit a token. By whole warps. */
static __device__ __forceinline__ uint64_t find_tiny(const fqla__factors &f, int valid, int lane) {
    const uint32_t low = __ballot_sync(0xffffffffu, lane < valid && fabsf(f.beta[lane]) < LEAST_BETA);
    const uint32_t high = __ballot_sync(0xffffffffu, lane + WARP < valid && fabsf(f.beta[lane + WARP]) < LEAST_BETA);
    return (uint64_t)high << 32 | low;
}

/* Of 2 * half sums a lane keeps one half and gives the other to the lane 2 * half away. */
template <int half> static __device__ __forceinline__ void halve_sums(float (&c)[16], int lane) {
    const bool upper = (lane & 2 * half) != 0;
#pragma unroll
    for (int i = 0; i < half; i++) {
        const float low = c[i], high = c[i + half], other = __shfl_xor_sync(0xffffffffu, upper ? low : high, 2 * half);
        c[i] = (upper ? high : low) + other;
    }
}

/* Sixteen columns' sums over the lanes of equal lane % 4; a lane ends with two of them. */
static __device__ __forceinline__ void sum_columns(float (&c)[16], float *to, int lane) {
    halve_sums<8>(c, lane);
    halve_sums<4>(c, lane);
    halve_sums<2>(c, lane);
    const int tile = (lane & 16 ? 4 : 0) + (lane & 8 ? 2 : 0) + (lane & 4 ? 1 : 0);
    *(float2 *)&to[8 * tile + 2 * (lane % 4)] = make_float2(c[0], c[1]);
}

/* dP and dKK into their tiles, from dO Vn^T and dW Vn^T; Z's sums. qk, kk: Q K^T and K K^T as pairs of bfloat16. */
static __device__ __forceinline__ void make_gradients(const fqla__backward_params &p, GradientsShared &s, float (&d)[32],
                                                      float (&g)[32], const uint32_t (&qk)[16], const uint32_t (&kk)[16], int n,
                                                      int warp, int lane) {
    const fqla__factors &f = s.factors[n % 3];
    HeadSums &sums = s.sums[n % 2];
    const int row = BLOCK * warp + lane / 4, column = 2 * (lane % 4);
    const float e1 = exp2_fast(f.block[1]), e2 = exp2_fast(f.block[2]), scale = p.forward.scale;
    const float rows[2] = {f.row[row], f.row[row + 8]};
    const float ratio[2] = {p.forward.l2norm ? -s.ratio[row] : -1.0f, p.forward.l2norm ? -s.ratio[row + 8] : -1.0f};
    float head[2] = {exp2_fast(rows[0]), exp2_fast(rows[1])}, row_sums[2] = {0.0f, 0.0f}, columns[16];
#pragma unroll
    for (int i = 0; i < 16; i++) columns[i] = 0.0f;
#pragma unroll
    for (int block = BLOCKS - 1; block >= 0; block--) {
        float *dp = &d[8 * block], *m = &g[8 * block];
        if (block > warp) continue;
        const float whole = f.block[block];
        uint32_t products_q[4], products_k[4]; /* unpacked here and not once for all heads: 64 registers */
#pragma unroll
        for (int i = 0; i < 4; i++) {
            products_q[i] = (uint32_t)renewed((int)qk[4 * block + i]);
            products_k[i] = (uint32_t)renewed((int)kk[4 * block + i]);
        }
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const int half = e / 2 % 2, j = column + e / 4 * 8 + e % 2, i = lane / 4 + half * 8;
            const float from = f.column[BLOCK * block + j];
            float decay;
            if (block == warp) {
                decay = exp2_fast(rows[half] - from);
                if (j == i) sums.diagonal[BLOCK * block + j] = m[e];
                dp[e] = j <= i ? dp[e] * (decay * scale) : 0.0f;
                m[e] = j < i ? m[e] * (decay * ratio[half]) : 0.0f;
            } else {
                decay = head[half] * exp2_fast(whole - from);
                dp[e] *= decay * scale;
                m[e] *= decay * ratio[half];
            }
            const int pair = e / 2;
            float z = fmaf(dp[e], half_of_bf16(products_q[pair], e % 2), m[e] * half_of_bf16(products_k[pair], e % 2));
            if (block == warp) z = j < i ? z : 0.0f;
            row_sums[half] += z;
            columns[4 * block + e / 4 * 2 + e % 2] += z;
        }
        if (block < warp) { /* this block lies between the rows and the blocks left of it */
            head[0] *= block == 2 ? e2 : e1;
            head[1] *= block == 2 ? e2 : e1;
        }
        store_tile_block(&s.dp, warp, block, lane, dp);
        store_tile_block(&s.m, warp, block, lane, m);
    }
    fence_proxy_async(); /* they go to wgmma */
    arrive_warp(&s.scores_ready, lane);
    sum_columns(columns, sums.column[warp], lane);
    row_sums[0] = sum_quad(row_sums[0]);
    row_sums[1] = sum_quad(row_sums[1]);
    if (lane % 4 == 0) {
        sums.row[row] = row_sums[0];
        sums.row[row + 8] = row_sums[1];
    }
}

/* A lane's tokens: lane and lane + 32. */
enum { TOKENS = CHUNK / WARP };

typedef struct Gates {
    float g[TOKENS], beta[TOKENS]; /* as given */
} Gates;

static __device__ __forceinline__ Gates load_gates(const fqla__forward_params &f, const Place &place, int head, int lane) {
    Gates gates;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const int64_t row = place.row + (lane + WARP * t < place.valid ? lane + WARP * t : 0);
        gates.g[t] = load_gate(f.g, row * f.g_token + head * f.g_head, f.gate == 2);
        gates.beta[t] = f.beta_form == 1 ? load_gate(f.beta, row * f.beta_token + head * f.beta_head, true) : 0.0f;
    }
    return gates;
}

static __device__ __forceinline__ void store_gate(void *to, int64_t index, float value, bool raw) {
    if (!raw) ((float *)to)[index] = value;
    else ((uint16_t *)to)[index] = (uint16_t)pack_elements(value, 0.0f);
}

/* dg and dbeta of a head, through the raw forms where the plan has them. By one warp. */
static __device__ __forceinline__ void finish_gates(const fqla__backward_params &p, GradientsShared &s, const Place &place,
                                                    const Gates &gates, int h, int n, int lane) {
    const fqla__forward_params &f = p.forward;
    const fqla__factors &factors = s.factors[n % 3];
    const HeadSums &sums = s.sums[n % 2];
    const int head = group_head(f, place.head_qk, h);
    const float states = ((sums.states[0] + sums.states[1]) + (sums.states[2] + sums.states[3])) * p.unit * factors.gamma_chunk;
    float dg[TOKENS], prefix[TOKENS];
    mbarrier_wait(&s.dots_ready[n % 2], n / 2 % 2);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const int token = lane + WARP * t;
        const float columns = (sums.column[0][token] + sums.column[1][token]) + (sums.column[2][token] + sums.column[3][token]);
        dg[t] = (sums.row[token] - columns) + (sums.query[token] - sums.key[token]);
        prefix[t] = sums.update[token];
    }
#pragma unroll
    for (int step = 1; step < WARP; step *= 2)
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            const float right = __shfl_down_sync(0xffffffffu, dg[t], step), left = __shfl_up_sync(0xffffffffu, prefix[t], step);
            if (lane + step < WARP) dg[t] += right;
            if (lane >= step) prefix[t] += left;
        }
    const float upper = __shfl_sync(0xffffffffu, dg[1], 0), lower = __shfl_sync(0xffffffffu, prefix[0], WARP - 1);
    dg[0] += upper;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        prefix[t] = __shfl_up_sync(0xffffffffu, prefix[t], 1);
        if (lane == 0) prefix[t] = 0.0f;
    }
    prefix[1] += lower;

    float dA_log = 0.0f, ddt_bias = 0.0f;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const int token = lane + WARP * t;
        const float beta = factors.beta[token];
        float value = dg[t] + prefix[t] + states,
              dbeta = fabsf(beta) < LEAST_BETA ? sums.tiny[token] : sums.diagonal[token] / (beta * beta);
        if (f.gate == 2) { /* FQLA_GATE_RAW: g = rate softplus(raw) */
            const float raw = gates.g[t] + __ldg(f.dt_bias + head), rate = -expf(__ldg(f.A_log + head));
            const float log_alpha = rate * (raw > 20.0f ? raw : log1pf(expf(raw)));
            if (log_alpha < -104.0f) value = 0.0f;
            else if (token < place.valid) {
                dA_log += value * log_alpha;
                value *= rate * (raw > 20.0f ? 1.0f : 1.0f / (1.0f + expf(-raw)));
                ddt_bias += value;
            }
        } else if (gates.g[t] < -104.0f) {
            value = 0.0f;
        }
        if (f.beta_form == 1) dbeta *= beta / (1.0f + expf(gates.beta[t])); /* the derivative is beta (1 - sigmoid b) */
        if (token < place.valid) {
            const int64_t row = place.row + token;
            store_gate(p.dg, row * f.g_token + head * f.g_head, value, f.gate == 2);
            store_gate(p.dbeta, row * f.beta_token + head * f.beta_head, dbeta, f.beta_form == 1);
        }
    }
    if (f.gate == 2) {
        dA_log = sum_warp(dA_log);
        ddt_bias = sum_warp(ddt_bias);
        if (lane == 0) *(float2 *)&p.gate_sums[(place.number * f.heads_v + head) * 2] = make_float2(dA_log, ddt_bias);
    }
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
    named_barrier<SCORES_BARRIER, WARPGROUP>();
    if (thread < CHUNK) s.ratio[row] = s.tiny_n[row] / s.tiny_p[row];
    named_barrier<SCORES_BARRIER, WARPGROUP>();
}

/* Q K^T and K K^T as pairs of bfloat16. */
static __device__ __forceinline__ void multiply_chunk(GradientsShared &s, uint32_t (&qk)[16], uint32_t (&kk)[16]) {
    float a[32], b[32];
    wgmma_fence();
    multiply_tiles(a, shared_units(s.q), shared_units(s.k));
    multiply_tiles(b, shared_units(s.k), shared_units(s.k));
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_settle(a);
    wgmma_settle(b);
#pragma unroll
    for (int i = 0; i < 16; i++) {
        qk[i] = pack_bf16(a[2 * i], a[2 * i + 1]);
        kk[i] = pack_bf16(b[2 * i], b[2 * i + 1]);
    }
}

static __device__ void run_scores(const fqla__backward_params &p, GradientsShared &s, int items, int block_thread) {
    const int heads = p.forward.heads_v / p.forward.heads_qk;
    uint32_t qk[16], kk[16];
    int n = 0, clears = 0;
    for (int item = 0; item < items; item++) {
        const Place &place = s.places[item % PLACES];
        if (item > 0 && block_thread == 0) {
            mbarrier_wait(&s.qk_free, (item - 1) % 2);
            load_chunk_rows(p, s, place);
        }
        __syncwarp();
        wait_rows(s, place, item, clears);
        if (p.forward.l2norm) make_norms(s, place.valid, block_thread);
        multiply_chunk(s, qk, kk);
        if (item > 0 && block_thread == 0) {
            mbarrier_wait(&s.sent, (item - 1) % 2);
            load_first(p, s, item, items, 1, n + 1);
        }
        __syncwarp();
        for (int h = 0; h < heads; h++, n++) {
            const int thread = renewed(block_thread) & (WARPGROUP - 1), warp = thread / WARP, lane = thread % WARP;
            const FirstPart &first = s.first[n % 2];
            const bool finishes = warp == n % 4; /* the step's gates */
            float d[32], g[32];
            Gates gates;
            if (finishes) gates = load_gates(p.forward, place, group_head(p.forward, place.head_qk, h), lane);
            if (h == 0 && warp == (n + 2) % 4 && item + 2 < items) { /* of item - 2, whose place it takes, nobody knows any more */
                const Place later = find_place(p.forward, item + 2, lane);
                if (lane == 0) s.places[(item + 2) % PLACES] = later;
                __syncwarp();
            }
            wait_second(s, place, n, clears);
            wgmma_fence();
            multiply_tiles(d, shared_units(s.second.dout), shared_units(first.vn));
            multiply_tiles(g, shared_units(s.second.dw), shared_units(first.vn));
            wgmma_commit();
            const float states = sum_warp(dot_states(first, s.second, thread));
            wgmma_wait<0>();
            wgmma_settle(d);
            wgmma_settle(g);
            if (lane == 0) s.sums[n % 2].states[warp] = states;
            for (uint64_t tiny = find_tiny(s.factors[n % 3], place.valid, lane); tiny != 0; tiny &= tiny - 1)
                tiny_beta(p, s, place, h, n, __ffsll((long long)tiny) - 1, thread);
            arrive_warp(&s.used, lane);
            mbarrier_wait(&s.used, n % 2);
            if (thread == 0) {
                load_second(p, s, item, items, h + 1);
                if (h + 1 < heads) load_first(p, s, item, items, h + 2, n + 2); /* else once dq and dk have left its place */
            }
            __syncwarp();
            make_gradients(p, s, d, g, qk, kk, n, warp, lane);
            named_barrier<SCORES_BARRIER, WARPGROUP>();
            if (finishes) finish_gates(p, s, place, gates, h, n, lane);
        }
    }
}

#endif
