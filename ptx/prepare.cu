/* All of a chunk that needs no state: T and the tokens' factors, for every chunk and v-head, into the workspace.

   With N = strict_tril(K K^T), B = diag(beta), r and rq the l2norm's factors of k and q (else 1; K's rows are scaled by r below; rq
   is 1 here where it is left to the forward, which has q):

       A = (I + B N)^-1     T_ij = exp(G_i - G_j) (A B)_ij     (i > j; T_jj = beta_j is the forward's to add)

   What is built is X = A B. For blocks I + B N = [D0 0; B1 N10 D1] it is

       X = [X0 0; X10 X1]     X10 = -X1 N10 X0

   so that N enters as it is, the same for every v-head, and beta in the smallest blocks alone:
     - 8 x 8 leaves by forward substitution in float32, a lane a column: x_i = beta_c [i = c] - beta_i sum_{j<i} N_ij x_j. No
       Neumann series: for near-parallel keys its powers grow and cancel;
     - 8 -> 16 -> 32 -> 64 by that formula in fp16 mma.sync: |A_ij| <= 1 where |1 - beta |k|^2| <= 1, so fp16's 11 bits are better
       than bf16's 8.
   A product is left right^T with both in the accumulator's layout, packed: the accumulator of one is the left operand of the next,
   and N10^T, a block above the diagonal of the symmetric K K^T, is there without a transposition. Leaves come from shared memory
   both ways.

   Decays: G restarts at every 16-block's border; inside a diagonal block exp2 of the difference, elsewhere
   head_i * (whole blocks between) * tail_j, every factor <= 1.

   A block serves a chunk and up to four v-heads of one q/k head. Its four warps make K K^T together and leave it in shared memory
   as the heads' operands; then each goes through its own head alone, and a warp without a head ends. A head is one chain of
   latencies: six blocks a multiprocessor hide it, which 80 registers a thread allow.

   Shared memory, in bytes, from a border of 1024:
       0      k        16384  K, two tiles
       16384  heads    4 x 3088, a warp's own: leaves of X (1024) and T (1024), beta, sum, head, tail (256 each), block (16)
       28736  blocks   6 x 512, -K K^T above its diagonal blocks
       31808  corners  512, inside them
       32320  leaves   2176, its 8 x 8 diagonal blocks, 272 apart, so that four meet no bank twice
       34496  norm_k, factor_k, factor_q   256 each
       35264  k_full   8
   35840 in all. */
#include "gates.h"
#include "grid.h"
#include "sequence.h"
#include "tile.h"

enum {
    LEAF = 8,        /* rows of the blocks that are inverted by substitution */
    LEAF_PITCH = 68, /* floats from one of K K^T's leaves to the next */
    HEADS = FQLA__PREPARE_THREADS / WARP,
    TOKENS = CHUNK / WARP /* a lane's: lane and lane + 32 */
};

/* A warp's own. A leaf is a tile of 128 bytes, transposed: the column of a lane is a row of 16 bytes; [leaf / 4]. */
typedef struct HeadShared {
    uint4 x[TOKENS][WARP]; /* fp16 */
    uint4 t[TOKENS][WARP]; /* elements */
    float beta[CHUNK];
    float sum[CHUNK];  /* log2 of the decay from the border of the token's 16-block up to and with the token */
    float head[CHUNK]; /* that decay */
    float tail[CHUNK]; /* the decay from after the token to the end of its 16-block */
    float block[BLOCKS]; /* that of whole 16-blocks */
} HeadShared;

typedef struct PrepareShared {
    Tile k[2];
    HeadShared heads[HEADS];
    uint4 blocks[6][WARP]; /* -N^T as right operands: block (row, column) above the diagonal at block_number */
    uint4 corners[WARP];   /* the upper right tile of each diagonal block, one 16-block a register */
    float leaves[CHUNK / LEAF][LEAF_PITCH];
    float norm_k[CHUNK];   /* |k|^2, of what l2norm leaves of it */
    float factor_k[CHUNK], factor_q[CHUNK]; /* r, rq; written only with l2norm, rq only where it is made here */
    uint64_t k_full;
} PrepareShared;

static_assert(sizeof(PrepareShared) == FQLA__PREPARE_SHARED_BYTES, "what the host asks for");

/* ---- the chunk --------------------------------------------------------------------------------------------------------------- */

/* Where block (row, column), row < column, of K K^T lies in PrepareShared. */
static __device__ __forceinline__ int block_number(int row, int column) { return row * (5 - row) / 2 + column - 1; }

/* |q|^2 of the warp's 16 rows from memory, 16 lanes a row, two rows at a time; lane l gets that of row 2 (l / 2 % 8) + l / 16. The
   forward's scores add in the same order. */
static __device__ __forceinline__ float rows_norm(const uint16_t *q, int64_t stride, int first, int last, int lane) {
    float sum[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int row = min(first + 2 * i + lane / 16, last);
        sum[i] = sum_of_squares(__ldg((const uint4 *)(q + row * stride) + lane % 16));
    }
#pragma unroll
    for (int half = 4; half > 0; half /= 2) /* of the rows left a lane keeps one half and gives the other away */
#pragma unroll
        for (int i = 0; i < half; i++) {
            const bool upper = (lane & 2 * half) != 0;
            const float kept = upper ? sum[i + half] : sum[i], given = upper ? sum[i] : sum[i + half];
            sum[i] = kept + __shfl_xor_sync(0xffffffffu, given, 2 * half);
        }
    return sum[0] + __shfl_xor_sync(0xffffffffu, sum[0], 1);
}

/* The diagonal of K K^T and with l2norm what it makes of the rows of K; with it kk is scaled by that. */
static __device__ __forceinline__ void norms(PrepareShared &s, float (&kk)[32], bool l2norm, int valid, int warp, int lane) {
    const int row = BLOCK * warp + lane / 4, column = 2 * (lane % 4);
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
        if (block != warp || lane % 4 != lane / 8) continue; /* a lane on a tile's diagonal has two rows of it, lane / 4 its own */
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float square = lane / 4 % 2 ? kk[8 * block + 6 * half + 1] : kk[8 * block + 6 * half];
            const float r = l2norm && row + 8 * half < valid ? rsqrtf(square + 1e-6f) : 1.0f;
            s.norm_k[row + 8 * half] = square * r * r;
            if (l2norm) s.factor_k[row + 8 * half] = r;
        }
    }
    if (!l2norm) return;
    __syncthreads();
    const float r[2] = {s.factor_k[row], s.factor_k[row + 8]};
#pragma unroll
    for (int tile = 0; tile < 8; tile++) {
        if (tile / 2 < warp) continue;
        const float2 other = *(const float2 *)&s.factor_k[8 * tile + column];
#pragma unroll
        for (int e = 0; e < 4; e++) kk[4 * tile + e] *= r[e / 2] * (e % 2 ? other.y : other.x);
    }
}

/* K K^T, on and above its diagonal, as the heads take it. */
static __device__ __forceinline__ void store_products(PrepareShared &s, const float (&kk)[32], int warp, int lane) {
    const uint32_t minus = 0x80008000u;
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
        const float *d = &kk[8 * block];
        if (block == warp) {
            *(float2 *)&s.leaves[2 * warp][lane / 4 * LEAF + 2 * (lane % 4)] = make_float2(d[0], d[1]);
            *(float2 *)&s.leaves[2 * warp + 1][lane / 4 * LEAF + 2 * (lane % 4)] = make_float2(d[6], d[7]);
            ((uint32_t *)&s.corners[lane])[warp] = pack_fp16(d[4], d[5]) ^ minus;
        } else if (block > warp) {
            s.blocks[block_number(warp, block)][lane] = make_uint4(pack_fp16(d[0], d[1]) ^ minus, pack_fp16(d[4], d[5]) ^ minus,
                                                                   pack_fp16(d[2], d[3]) ^ minus, pack_fp16(d[6], d[7]) ^ minus);
        }
    }
}

/* ---- a head: its gates ------------------------------------------------------------------------------------------------------- */

/* A lane's tokens of a head. */
typedef struct Decays {
    float beta[TOKENS], sum[TOKENS], head[TOKENS], tail[TOKENS]; /* as in HeadShared */
    float log2_gamma; /* of the whole chunk */
} Decays;

/* The v-head that a block's warp serves. */
static __device__ __forceinline__ int head_of(const fqla__forward_params &p, int head_qk, int part, int ratio, int warp) {
    const int of_group = part * p.heads_per_block + warp;
    return p.head_map == 0 ? head_qk * ratio + of_group : of_group * p.heads_qk + head_qk;
}

/* g and beta of all heads as given, to where the decays will be; of a token past the end what the first one has. Threads side by side
   take a token's heads, which lie side by side: by a warp a head, every token of every head was a line of the cache to look up. */
static __device__ __forceinline__ void load_gates(const fqla__forward_params &p, PrepareShared &s, int64_t first_row, int valid,
                                                  int head_qk, int part, int ratio, int thread) {
    const int server = thread % HEADS; /* the warp whose head this is */
    if (server >= p.heads_per_block) return;
    const int head = head_of(p, head_qk, part, ratio, server);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const int token = thread / HEADS + WARP * t;
        const int64_t row = first_row + (token < valid ? token : 0);
        s.heads[server].sum[token] = load_gate(p.g, row * p.g_token + head * p.g_head, p.gate == 2);
        s.heads[server].beta[token] = load_gate(p.beta, row * p.beta_token + head * p.beta_head, p.beta_form == 1);
    }
}

/* The decays, also to the warp's shared memory; the factors that need no K to their place. */
static __device__ __forceinline__ Decays make_decays(const fqla__forward_params &p, HeadShared &s, fqla__factors &factors,
                                                     int valid, int head, int lane) {
    Decays d;
    float log2_block[BLOCKS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const bool live = lane + WARP * t < valid;
        const float beta = plain_beta(p, s.beta[lane + WARP * t]), log2_of_alpha = log2_alpha(p, head, s.sum[lane + WARP * t]);
        d.beta[t] = live ? beta : 0.0f;
        d.sum[t] = live ? log2_of_alpha : 0.0f;
    }
#pragma unroll
    for (int step = 1; step < BLOCK; step *= 2)
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            const float left = __shfl_up_sync(0xffffffffu, d.sum[t], step, BLOCK);
            if (lane % BLOCK >= step) d.sum[t] += left;
        }
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
        log2_block[block] = __shfl_sync(0xffffffffu, d.sum[block / 2], block % 2 * BLOCK + BLOCK - 1);
        if (lane == 0) factors.block[block] = log2_block[block], s.block[block] = exp2_fast(log2_block[block]);
    }
    d.log2_gamma = (log2_block[0] + log2_block[1]) + (log2_block[2] + log2_block[3]);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        d.head[t] = exp2_fast(d.sum[t]);
        d.tail[t] = exp2_fast((lane < BLOCK ? log2_block[2 * t] : log2_block[2 * t + 1]) - d.sum[t]);
        s.beta[lane + WARP * t] = d.beta[t];
        s.sum[lane + WARP * t] = d.sum[t];
        s.head[lane + WARP * t] = d.head[t];
        s.tail[lane + WARP * t] = d.tail[t];
        factors.beta[lane + WARP * t] = d.beta[t];
    }
    return d;
}

/* The rest of the factors. */
static __device__ __forceinline__ void write_factors(const fqla__forward_params &p, const PrepareShared &s, const HeadShared &head,
                                                     fqla__factors &factors, const Decays &d, int lane) {
    const float4 block = *(const float4 *)head.block;
    const float first_half = block.x * block.y, last_half = block.z * block.w;
    float growth = 0.0f;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const int token = lane + WARP * t;
        const float before = lane < BLOCK ? (t ? first_half : 1.0f) : (t ? first_half * block.z : block.x);
        const float after = lane < BLOCK ? (t ? block.w : block.y * last_half) : (t ? 1.0f : last_half);
        float r = 1.0f, rq = 1.0f, row = d.sum[t], column = d.sum[t];
        if (p.l2norm) {
            r = s.factor_k[token];
            column -= log2_fast(r);
        }
        if (p.l2norm == FQLA__L2NORM_PREPARE) {
            rq = s.factor_q[token];
            row += log2_fast(rq);
        }
        factors.w[token] = d.head[t] * before * r;
        factors.update[token] = d.tail[t] * after * r;
        factors.o[token] = d.head[t] * before * rq;
        factors.row[token] = row;
        factors.column[token] = column;
        const float norm = fabsf(fmaf(-d.beta[t], s.norm_k[token], 1.0f));
        if (!(norm <= 1.0f)) growth += log2_fast(norm); /* a NaN too */
    }
    if (__any_sync(0xffffffffu, growth != 0.0f)) { /* never where |k| <= 1 and beta <= 2 */
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) growth += __shfl_xor_sync(0xffffffffu, growth, step);
    }
    if (lane == 0) *(float4 *)&factors.gamma_chunk = make_float4(first_half * last_half, d.log2_gamma + growth, 0.0f, 0.0f);
}

/* ---- a head: X and T --------------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void store_tile(unsigned char *t, int row, int column, int tile, uint32_t pair) {
    *(uint32_t *)(t + triangle_offset(row, column) + 128 * tile) = pair;
}

/* Block (row, column) of T below the diagonal blocks from X's; between: the decay of the blocks between them; t: the lane's place
   in the first tile. */
static __device__ __forceinline__ void store_t(unsigned char *t, const HeadShared &head, int row, int column, int lane,
                                               float between, const float (&x)[8]) {
    const float upper = head.head[BLOCK * row + lane / 4] * between, lower = head.head[BLOCK * row + LEAF + lane / 4] * between;
    const float2 *tails = (const float2 *)&head.tail[BLOCK * column + 2 * (lane % 4)];
    const float2 first = tails[0], second = tails[LEAF / 2];
    const float right[4] = {first.x, first.y, second.x, second.y};
    store_tile(t, row, column, 0, pack_elements(x[0] * right[0] * upper, x[1] * right[1] * upper));
    store_tile(t, row, column, 1, pack_elements(x[4] * right[2] * upper, x[5] * right[3] * upper));
    store_tile(t, row, column, 2, pack_elements(x[2] * right[0] * lower, x[3] * right[1] * lower));
    store_tile(t, row, column, 3, pack_elements(x[6] * right[2] * lower, x[7] * right[3] * lower));
}

/* y [16 x 16] = left right^T, both packed accumulators: left's tiles in their own order, upper left, lower left, upper right, lower
   right; right's by rows, a register pair a product. */
static __device__ __forceinline__ void multiply(float (&y)[8], const uint32_t (&left)[4], const uint32_t (&right)[4]) {
    mma_fp16_first(*(float (*)[4])&y[0], left, right[0], right[1]);
    mma_fp16_first(*(float (*)[4])&y[4], left, right[2], right[3]);
}

static __device__ __forceinline__ void multiply_add(float (&y)[8], const uint32_t (&left)[4], const uint32_t (&right)[4]) {
    mma_fp16(*(float (*)[4])&y[0], left, right[0], right[1]);
    mma_fp16(*(float (*)[4])&y[4], left, right[2], right[3]);
}

/* The same where right's lower left tile is zero, as in the transposed diagonal blocks of X. */
static __device__ __forceinline__ void multiply_upper(float (&y)[8], const uint32_t (&left)[4], const uint32_t (&right)[4]) {
    mma_fp16_first(*(float (*)[4])&y[0], left, right[0], right[1]);
    mma_fp16_8_first(*(float (*)[4])&y[4], left[2], left[3], right[3]);
}

static __device__ __forceinline__ void pack(uint32_t (&packed)[4], const float (&y)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) packed[i] = pack_fp16(y[2 * i], y[2 * i + 1]);
}

static __device__ __forceinline__ void load_operand(uint32_t (&b)[4], const uint4 &from) {
    const uint4 all = from;
    b[0] = all.x, b[1] = all.y, b[2] = all.z, b[3] = all.w;
}

/* The lane's columns of the leaves of X and of T. */
static __device__ __forceinline__ void invert_leaves(const PrepareShared &s, HeadShared &head, const Decays &d, int lane) {
    const int column = lane % LEAF;
    uint32_t below[LEAF / 2]; /* of a column's pairs what is below the diagonal */
#pragma unroll
    for (int i = 0; i < LEAF / 2; i++) below[i] = (2 * i > column ? 0xffffu : 0u) | (2 * i + 1 > column ? 0xffff0000u : 0u);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const float *n = s.leaves[4 * t + lane / LEAF];
        const int leaf = WARP * t + lane - column; /* its first token */
        const float4 b[2] = {*(const float4 *)&head.beta[leaf], *(const float4 *)&head.beta[leaf + 4]};
        const float4 g[2] = {*(const float4 *)&head.sum[leaf], *(const float4 *)&head.sum[leaf + 4]};
        const float beta[LEAF] = {b[0].x, b[0].y, b[0].z, b[0].w, b[1].x, b[1].y, b[1].z, b[1].w};
        const float sum[LEAF] = {g[0].x, g[0].y, g[0].z, g[0].w, g[1].x, g[1].y, g[1].z, g[1].w};
        float x[LEAF], y[LEAF], decayed[LEAF];
#pragma unroll
        for (int j = 0; j < LEAF; j++) {
            const float first = j == column ? d.beta[t] : 0.0f;
            x[j] = j == 0 ? first : fmaf(-beta[j], y[j], first);
            if (j == LEAF - 1) break;
            const float4 low = j < 3 ? *(const float4 *)&n[j * LEAF] : make_float4(0, 0, 0, 0);
            const float4 high = *(const float4 *)&n[j * LEAF + 4];
            const float row[LEAF] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}; /* N_ij = (K K^T)_ji */
#pragma unroll
            for (int i = j + 1; i < LEAF; i++) y[i] = j == 0 ? row[i] * x[0] : fmaf(row[i], x[j], y[i]);
        }
        head.x[t][lane] =
            make_uint4(pack_fp16(x[0], x[1]), pack_fp16(x[2], x[3]), pack_fp16(x[4], x[5]), pack_fp16(x[6], x[7]));
        decayed[0] = 0.0f;
#pragma unroll
        for (int i = 1; i < LEAF; i++) decayed[i] = x[i] * exp2_fast(sum[i] - d.sum[t]); /* above the diagonal anything, cut off */
        head.t[t][lane] =
            make_uint4(pack_elements(decayed[0], decayed[1]) & below[0], pack_elements(decayed[2], decayed[3]) & below[1],
                       pack_elements(decayed[4], decayed[5]) & below[2], pack_elements(decayed[6], decayed[7]) & below[3]);
    }
    __syncwarp();
}

/* X, and T on its way out as X's blocks are ready. */
static __device__ __forceinline__ void invert(const PrepareShared &s, HeadShared &head, fqla__prepared_chunk &chunk,
                                              const Decays &d, int lane) {
    unsigned char *t = chunk.t + 4 * lane;
    const int quad = lane / 4, pair = 2 * (lane % 4);
    uint32_t x[BLOCKS][4], transposed[BLOCKS][4]; /* the diagonal blocks of X as left operands, those of X^T as right ones */
    uint32_t b[4], y[2][4];

    invert_leaves(s, head, d, lane);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t tiles[4];
        const uint32_t place = (uint32_t)sizeof(uint4) * (WARP * half + lane);
        load_tiles_transposed(tiles, shared_address(head.t) + place);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int block = 2 * half + i / 2;
            store_tile(t, block, block, i % 2 * 3, tiles[i]);
            if (i % 2) store_tile(t, block, block, 1, 0);
        }
        load_tiles_transposed(tiles, shared_address(head.x) + place);
#pragma unroll
        for (int i = 0; i < 4; i++) x[2 * half + i / 2][i % 2 * 3] = tiles[i];
        load_tiles(tiles, shared_address(head.x) + place);
#pragma unroll
        for (int i = 0; i < 4; i++) transposed[2 * half + i / 2][i % 2 * 3] = tiles[i];
    }

    /* 8 -> 16, two blocks a product: the left operand is their tiles on a diagonal, the right one their tiles below one another */
    load_operand(b, s.corners[lane]);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int first = 2 * half, second = 2 * half + 1;
        float product[4], corner[4];
        const uint32_t lower[4] = {x[first][3], 0, 0, x[second][3]};
        mma_fp16_first(product, lower, b[first], b[second]);
        const uint32_t left[4] = {pack_fp16(product[0], product[1]), 0, 0, pack_fp16(product[2], product[3])};
        mma_fp16_first(corner, left, transposed[first][0], transposed[second][0]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int block = 2 * half + i;
            const float to = head.sum[BLOCK * block + LEAF + quad];
            const float2 from = *(const float2 *)&head.sum[BLOCK * block + pair];
            x[block][1] = pack_fp16(corner[2 * i], corner[2 * i + 1]);
            x[block][2] = 0;
            transposed[block][1] = transpose_tile(x[block][1]);
            store_tile(t, block, block, 2,
                       pack_elements(corner[2 * i] * exp2_fast(to - from.x), corner[2 * i + 1] * exp2_fast(to - from.y)));
        }
    }

    /* 16 -> 32: X10 and X32 */
    __syncwarp(); /* no load may move up across it: registers */
    uint32_t x10_transposed[4], x32[4];
    {
        float product[8], result[8];
        uint32_t packed[4];
        load_operand(b, s.blocks[block_number(0, 1)][lane]);
        multiply(product, x[1], b);
        pack(packed, product);
        multiply_upper(result, packed, transposed[0]);
        pack(packed, result);
#pragma unroll
        for (int i = 0; i < 4; i++) x10_transposed[i] = transpose_tile(packed[i]);
        store_t(t, head, 1, 0, lane, 1.0f, result);

        load_operand(b, s.blocks[block_number(2, 3)][lane]);
        multiply(product, x[3], b);
        pack(packed, product);
        multiply_upper(result, packed, transposed[2]);
        pack(x32, result);
        store_t(t, head, 3, 2, lane, 1.0f, result);
    }

    /* 32 -> 64: two rows of blocks, Y = X (-N), then Y X */
#pragma unroll
    for (int row = 2; row < BLOCKS; row++) {
        float product[8], result[8];
        __syncwarp(); /* no load may move up across it: registers */
#pragma unroll
        for (int column = 0; column < 2; column++) {
            load_operand(b, s.blocks[block_number(column, row)][lane]);
            multiply(product, x[row], b);
            if (row == 3) {
                load_operand(b, s.blocks[block_number(column, 2)][lane]);
                multiply_add(product, x32, b);
            }
            pack(y[column], product);
        }
        multiply_upper(result, y[1], transposed[1]);
        const float between = row == 3 ? head.block[2] : 1.0f;
        store_t(t, head, row, 1, lane, between, result);
        multiply_upper(result, y[0], transposed[0]);
        multiply_add(result, y[1], x10_transposed);
        store_t(t, head, row, 0, lane, between * head.block[1], result);
    }
}

extern "C" __global__ void __launch_bounds__(FQLA__PREPARE_THREADS, 6)
#if defined(FLASHQLA_ELEMENT_BF16)
    prepare_bf16(const __grid_constant__ fqla__aligned_params params)
#else
    prepare_fp16(const __grid_constant__ fqla__aligned_params params)
#endif
{
    const fqla__forward_params &p = params.values;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    PrepareShared &s = *(PrepareShared *)shared_bytes;
    const int thread = (int)threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    const uint32_t ratio = (uint32_t)p.heads_v / (uint32_t)p.heads_qk, parts = ratio / (uint32_t)p.heads_per_block;
    const uint32_t groups = (uint32_t)p.heads_qk * parts, group = blockIdx.x % groups;
    const int64_t chunk_number = blockIdx.x / groups;
    const int head_qk = (int)(group / parts), part = (int)(group % parts), head = head_of(p, head_qk, part, (int)ratio, warp);
    const bool has_head = warp < p.heads_per_block;

    grid_launch_dependents();
    if (blockIdx.x == 0 && thread == 0) p.prepared->factors.taken = 0;
    int64_t first_row;
    int valid;
    const int64_t num_seqs = p.table->num_seqs, chunks = p.table->chunks; /* one load, not one after the other */
    if (p.decode_tokens > 0) {
        if (chunk_number >= num_seqs) return;
        first_row = chunk_number * p.decode_tokens;
        valid = p.decode_tokens;
    } else {
        if (chunk_number >= chunks) return;
        const fqla__device_sequence *sequences = (const fqla__device_sequence *)(p.table + 1);
        const fqla__device_sequence sequence = sequences[find_sequence(sequences, num_seqs, chunk_number, lane)];
        const int64_t in_sequence = (chunk_number - sequence.chunk) * CHUNK;
        first_row = sequence.row + in_sequence;
        valid = (int)min((int64_t)CHUNK, sequence.len - in_sequence);
    }

    if (thread == 0) {
        mbarrier_init(&s.k_full, 1);
        mbarrier_init_fence();
        mbarrier_arrive_expect(&s.k_full, 2 * 128 * (uint32_t)p.load_rows);
        for (int half = 0; half < 2; half++)
            tma_load(&s.k[half], &p.k, half * FQLA__LOAD_COLUMNS, (int32_t)first_row, head_qk, &s.k_full);
    }
    load_gates(p, s, first_row, valid, head_qk, part, (int)ratio, thread);
    __syncthreads();
    if (p.l2norm == FQLA__L2NORM_PREPARE) { /* by lanes 2 i and 2 i + 1 a row */
        const int row = BLOCK * warp + 2 * (lane / 2 % 8) + lane / 16;
        const uint16_t *q = (const uint16_t *)p.q_rows + first_row * p.q_token + head_qk * p.q_head;
        const float norm = rows_norm(q, p.q_token, BLOCK * warp, valid - 1, lane);
        if (lane % 2 == 0) s.factor_q[row] = row < valid ? rsqrtf(norm + 1e-6f) : 1.0f;
    }
    Decays decays;
    fqla__prepared_chunk &chunk = p.prepared[chunk_number * p.heads_v + head];
    if (has_head) decays = make_decays(p, s.heads[warp], chunk.factors, valid, head, lane);

    float kk[32];
    mbarrier_wait(&s.k_full, 0);
    if (valid < CHUNK) {
        clear_rows(s.k, 2, valid, thread);
        __syncthreads();
    }
    wgmma_fence();
    multiply_tiles(kk, shared_units(s.k), shared_units(s.k));
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_settle(kk);
    norms(s, kk, p.l2norm, valid, warp, lane);
    store_products(s, kk, warp, lane);
    __syncthreads();

    if (!has_head) return;
    write_factors(p, s, s.heads[warp], chunk.factors, decays, lane);
    invert(s, s.heads[warp], chunk, decays, lane);
}
