/* All of a chunk that needs no state: T and the tokens' factors, for every chunk and v-head, into the workspace.

   With L = strict_tril(diag(beta) K K^T) and A = (I + L)^-1, r and rq the l2norm's factors of k and q (else 1):

       L_ij = beta_i r_i r_j (K K^T)_ij     T_ij = exp(G_i - G_j) A_ij beta_j     (i > j; T_jj = beta_j is the forward's to add)

   A block serves a chunk and some v-heads of one q/k head: K K^T is made once. Its four warps own 16 rows each, and build the 64 x 64
   inverse from 16 x 16 blocks:
     1. the four diagonal blocks, a warp each: their two 8 x 8 leaves by forward substitution in float32, a lane a column, then 8 -> 16;
     2. 16 -> 32: A10 = -A11 L10 A00, and so A32: two warps each, half of the columns a warp;
     3. 32 -> 64: the lower left 32 x 32 in the same way, a 16 x 16 block a warp.
   Products are fp16 mma.sync: |A_ij| <= 1 where |1 - beta |k|^2| <= 1, so fp16's 11 bits are better than bf16's 8.

   Decays: G restarts at every 16-block's border; inside a diagonal block exp2 of the difference, elsewhere
   head_i * (whole blocks between) * tail_j, every factor <= 1.

   The chain of latencies is long and everything in it is small: several blocks a multiprocessor hide it. */
#include "gates.h"
#include "tile.h"

enum { PITCH = 72 }; /* elements of a row of an fp16 matrix: 144 bytes, so that eight rows of ldmatrix meet no bank twice */
enum { LEAF = 8 };            /* the blocks that are inverted by substitution */
enum { DIAGONAL_PITCH = 20 }; /* floats of a row of a diagonal block: an accumulator's columns 2 (l%4) meet no bank twice */

typedef struct PrepareShared {
    union {
        Tile k[2];                                 /* until K K^T is made                                        16 KB */
        float norms[2][CHUNK];                     /* l2norm's factors of k and q, until the lanes have theirs */
        fqla__prepared_chunk odd;                  /* an odd head's chunk on its way out */
    };
    union {
        fqla__prepared_chunk even;                 /* an even head's                                             10.5 KB */
        unsigned char multiple_of_1024[11 * 1024];
    };
    uint16_t matrix[CHUNK][PITCH];                 /* L below the diagonal, A on it, both fp16. A's blocks (1, 0) and (3, 2) lie above the
                                                      diagonal at (0, 1) and (2, 3): L's are still needed        9 KB */
    float diagonal[BLOCKS][BLOCK][DIAGONAL_PITCH]; /* the diagonal blocks of L, transposed                        5 KB */
    float head[CHUNK];                             /* decay from the border of the token's 16-block up to and with the token */
    float tail_beta[CHUNK];                        /* beta times the decay from after the token to the end of its 16-block */
    uint64_t k_full;
} PrepareShared;

static_assert(sizeof(fqla__prepared_chunk) % 16 == 0, "a bulk copy moves 16 bytes at a time");
static_assert(sizeof(PrepareShared) == FQLA__PREPARE_SHARED_BYTES, "what the host asks for");

/* Address of row and column of the matrix, as ldmatrix takes a 16 x 16 block there. */
static __device__ __forceinline__ uint32_t block_address(const uint16_t (*matrix)[PITCH], int row, int column, int lane) {
    return shared_address(&matrix[row + lane % 16][column + lane / 16 * 8]);
}

static __device__ __forceinline__ void store_block_fp16(uint32_t address, const float *d) {
    store_tiles(address, pack_fp16(d[0], d[1]), pack_fp16(d[2], d[3]), pack_fp16(d[4], d[5]), pack_fp16(d[6], d[7]));
}

/* A column of the inverse of a unit lower triangular 8 x 8 block I + L, L transposed at l[j][i]: x_i = e_i - sum_{j<i} L_ij x_j. */
static __device__ __forceinline__ void invert_leaf(const float *l, int column, float (&x)[LEAF]) {
    float4 rows[LEAF - 1][2];
#pragma unroll
    for (int j = 0; j < LEAF - 1; j++)
#pragma unroll
        for (int i = (j + 1) / 4; i < 2; i++) rows[j][i] = *(const float4 *)&l[j * DIAGONAL_PITCH + 4 * i];
#pragma unroll
    for (int i = 0; i < LEAF; i++) x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
    for (int j = 0; j < LEAF - 1; j++)
#pragma unroll
        for (int i = j + 1; i < LEAF; i++) x[i] = fmaf(-((const float *)rows[j])[i], x[j], x[i]);
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

/* The chunk of the whole batch: its sequence's number, by a search in steps of 32. By whole warps. */
static __device__ __forceinline__ int64_t find_sequence(const fqla__device_sequence *sequences, int64_t count, int64_t chunk, int lane) {
    int64_t first = 0;
    while (count > 1) {
        const int64_t step = (count + WARP - 1) / WARP, probe = first + lane * step;
        const bool before = lane * step < count && sequences[probe].chunk <= chunk;
        const int passed = __popc(__ballot_sync(0xffffffffu, before)) - 1;
        first += passed * step;
        count = min(step, count - passed * step);
    }
    return first;
}

/* |q|^2 of a row, read from memory by two threads, half a row each; both get it. */
static __device__ __forceinline__ float row_norm(const uint16_t *row, int half) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint4 unit = __ldg((const uint4 *)(row + half * 64) + i);
        const uint32_t pairs[4] = {unit.x, unit.y, unit.z, unit.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float low = low_element(pairs[j]), high = high_element(pairs[j]);
            sum += low * low + high * high;
        }
    }
    return sum + __shfl_xor_sync(0xffffffffu, sum, 1);
}

/* T stays zero above its diagonal blocks. */
static __device__ __forceinline__ void clear_t(fqla__prepared_chunk &chunk, int thread) {
    for (int unit = thread; unit < CHUNK * 8; unit += FQLA__PREPARE_THREADS) ((uint4 *)chunk.t)[unit] = make_uint4(0, 0, 0, 0);
}

/* A token's gate and beta of one head, as they are given. */
typedef struct Gate {
    float g, beta;
} Gate;

static __device__ __forceinline__ Gate load_gates(const fqla__forward_params &p, int64_t row, int head, bool live) {
    Gate gate = {0.0f, 0.0f};
    if (!live) return gate;
    gate.g = load_gate(p.g, row * p.g_token + head * p.g_head, p.gate == 2);
    gate.beta = load_gate(p.beta, row * p.beta_token + head * p.beta_head, p.beta_form == 1);
    return gate;
}

/* The decays of a lane's token; lanes 16-31 double 0-15. */
static __device__ __forceinline__ void prepare_decays(const fqla__forward_params &p, PrepareShared &s, fqla__prepared_chunk &chunk,
                                                      Gate given, bool live, int head, int warp, int lane, float r, float rq) {
    const int token = BLOCK * warp + lane % BLOCK;
    const float beta = live ? plain_beta(p, given.beta) : 0.0f;
    float sum = live ? log2_alpha(p, head, given.g) : 0.0f;
#pragma unroll
    for (int step = 1; step < BLOCK; step *= 2) {
        const float left = __shfl_up_sync(0xffffffffu, sum, step, BLOCK);
        if (lane % BLOCK >= step) sum += left;
    }
    const float whole = __shfl_sync(0xffffffffu, sum, BLOCK - 1, BLOCK);
    if (lane < BLOCK) {
        chunk.beta[token] = beta;
        chunk.sum[token] = sum;
        const float decay_head = exp2_fast(sum), decay_tail = exp2_fast(whole - sum);
        s.head[token] = decay_head;
        s.tail_beta[token] = decay_tail * beta;
        chunk.head[token] = decay_head * rq;
        chunk.tail[token] = decay_tail * r;
        chunk.r[token] = r;
        chunk.rq[token] = rq;
        if (lane == 0) chunk.block[warp] = exp2_fast(whole);
    }
}

/* A = (I + L)^-1 in the matrix, in the three steps above; z: the warp's block (2 + warp / 2, warp % 2), negated. */
static __device__ __forceinline__ void invert(PrepareShared &s, int warp, int lane, float (&z)[8]) {
    const int column = 2 * (lane % 4), low = warp / 2 * 2 + 1, m = warp / 2, n = warp % 2;
    { /* lanes 0-7 and 8-15 a leaf each; lanes 16-31 double them and write the lower rows */
        const int leaf = lane / LEAF % 2, corner_of_leaf = BLOCK * warp + LEAF * leaf;
        float x[LEAF], y[4] = {0.0f, 0.0f, 0.0f, 0.0f}, corner[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        uint32_t a[4];
        invert_leaf(&s.diagonal[warp][LEAF * leaf][LEAF * leaf], lane % LEAF, x);
#pragma unroll
        for (int i = 0; i < LEAF / 2; i++)
            s.matrix[corner_of_leaf + lane / BLOCK * (LEAF / 2) + i][corner_of_leaf + lane % LEAF] =
                (uint16_t)pack_fp16(lane < BLOCK ? x[i] : x[i + LEAF / 2], 0.0f);
        __syncwarp();
        const float2 l = *(const float2 *)&s.diagonal[warp][lane / 4][LEAF + column];
        load_tiles(a, block_address(s.matrix, BLOCK * warp, BLOCK * warp, lane));
        mma_fp16_8(y, a[3], pack_fp16(l.x, l.y));
        load_tiles_transposed(a, block_address(s.matrix, BLOCK * warp, BLOCK * warp, lane));
        mma_fp16_8(corner, pack_fp16(y[0], y[1]), a[0]);
        __syncwarp(); /* the corner was read along with the leaves */
        *(uint32_t *)&s.matrix[BLOCK * warp + LEAF + lane / 4][BLOCK * warp + column] = pack_fp16(-corner[0], -corner[1]);
    }
    __syncthreads();
    {
        float corner[4] = {0.0f, 0.0f, 0.0f, 0.0f}, y[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        uint32_t a[4], b[4];
        load_tiles(a, block_address(s.matrix, BLOCK * low, BLOCK * low, lane));
        multiply_block(y, a, block_address(s.matrix, BLOCK * low, BLOCK * (low - 1), lane));
        as_operand(a, y);
        load_tiles_transposed(b, block_address(s.matrix, BLOCK * (low - 1), BLOCK * (low - 1), lane));
        mma_fp16(corner, a, warp % 2 ? b[2] : b[0], warp % 2 ? b[3] : b[1]);
#pragma unroll
        for (int half = 0; half < 2; half++)
            *(uint32_t *)&s.matrix[BLOCK * (low - 1) + lane / 4 + 8 * half][BLOCK * low + warp % 2 * 8 + column] =
                pack_fp16(-corner[2 * half], -corner[2 * half + 1]);
    }
    __syncthreads();
    {
        float y[2][8] = {};
        uint32_t a[4];
        if (m == 1) { /* A32 L20, A32 L21 */
            load_tiles(a, block_address(s.matrix, BLOCK * 2, BLOCK * 3, lane));
            multiply_block(y[0], a, block_address(s.matrix, BLOCK * 2, 0, lane));
            multiply_block(y[1], a, block_address(s.matrix, BLOCK * 2, BLOCK, lane));
        }
        load_tiles(a, block_address(s.matrix, BLOCK * (2 + m), BLOCK * (2 + m), lane));
        multiply_block(y[0], a, block_address(s.matrix, BLOCK * (2 + m), 0, lane));
        multiply_block(y[1], a, block_address(s.matrix, BLOCK * (2 + m), BLOCK, lane));
        if (n == 0) {
            as_operand(a, y[0]);
            multiply_block(z, a, block_address(s.matrix, 0, 0, lane));
        }
        as_operand(a, y[1]);
        multiply_block(z, a, block_address(s.matrix, n == 0 ? 0 : BLOCK, BLOCK, lane));
    }
}

/* T into the image from A: the warp's diagonal block, for warps 1 and 3 the one left of it, and its block of the lower left. */
static __device__ __forceinline__ void write_t(PrepareShared &s, fqla__prepared_chunk &chunk, int warp, int lane, const float (&z)[8]) {
    const int m = warp / 2, n = warp % 2, column = 2 * (lane % 4);
#pragma unroll
    for (int left = 0; left < 2; left++) {
        uint32_t a[4];
        float t[8];
        if (left > warp % 2) break;
        load_tiles(a, block_address(s.matrix, BLOCK * (warp - left), BLOCK * warp, lane));
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const int j = column + e / 4 * 8 + e % 2, i = lane / 4 + e / 2 % 2 * 8, from = BLOCK * (warp - left) + j, to = BLOCK * warp + i;
            const float decay = left ? s.head[to] * s.tail_beta[from] : exp2_fast(chunk.sum[to] - chunk.sum[from]) * chunk.beta[from];
            t[e] = left || j < i ? from_fp16(e % 2 ? a[e / 2] >> 16 : a[e / 2]) * decay : 0.0f;
        }
        store_block(tile_block_address(chunk.t, warp, warp - left, lane), t);
    }
    const float between = (n == 0 ? chunk.block[1] : 1.0f) * (m == 1 ? chunk.block[2] : 1.0f); /* whole blocks between rows and columns */
    float t[8];
#pragma unroll
    for (int e = 0; e < 8; e++) {
        const int from = BLOCK * n + column + e / 4 * 8 + e % 2, to = BLOCK * (2 + m) + lane / 4 + e / 2 % 2 * 8;
        t[e] = -z[e] * (s.head[to] * between) * s.tail_beta[from];
    }
    store_block(tile_block_address(chunk.t, 2 + m, n, lane), t);
}

/* The v-heads that read a q/k head. */
static __device__ __forceinline__ int head_of_group(const fqla__forward_params &p, int head_qk, int i) {
    return p.head_map == 0 ? head_qk * (p.heads_v / p.heads_qk) + i : i * p.heads_qk + head_qk;
}

extern "C" __global__ void __launch_bounds__(FQLA__PREPARE_THREADS, 5)
#if defined(FLASHQLA_ELEMENT_BF16)
    prepare_bf16(const __grid_constant__ fqla__aligned_params params)
#else
    prepare_fp16(const __grid_constant__ fqla__aligned_params params)
#endif
{
    const fqla__forward_params &p = params.values;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    PrepareShared &s = *(PrepareShared *)shared_bytes;
    const fqla__device_sequence *sequences = (const fqla__device_sequence *)(p.table + 2);
    const int thread = (int)threadIdx.x, warp = thread / WARP, lane = thread % WARP, row = BLOCK * warp + lane / 4, column = 2 * (lane % 4);
    const int ratio = p.heads_v / p.heads_qk, parts = ratio / p.heads_per_block, groups = p.heads_qk * parts;
    const int64_t chunk_number = blockIdx.x / (uint32_t)groups;
    const int group = (int)(blockIdx.x % (uint32_t)groups), head_qk = group / parts, first_head = group % parts * p.heads_per_block;
    float kk[32], r = 1.0f, rq = 1.0f;

    int64_t first_row;
    int valid;
    if (p.decode_tokens > 0) {
        if (chunk_number >= p.table[0]) return;
        first_row = chunk_number * p.decode_tokens;
        valid = p.decode_tokens;
    } else {
        if (chunk_number >= p.table[1]) return;
        const fqla__device_sequence sequence = sequences[find_sequence(sequences, p.table[0], chunk_number, lane)];
        const int64_t in_sequence = (chunk_number - sequence.chunk) * CHUNK;
        first_row = sequence.row + in_sequence;
        valid = (int)min((int64_t)CHUNK, sequence.len - in_sequence);
    }

    if (thread == 0) {
        mbarrier_init(&s.k_full, 1);
        mbarrier_init_fence();
    }
    clear_t(s.even, thread);
    for (int unit = thread; unit < (int)(sizeof s.matrix / 16); unit += FQLA__PREPARE_THREADS) /* above the leaves A stays zero */
        ((uint4 *)s.matrix)[unit] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    if (thread == 0) {
        mbarrier_arrive_expect(&s.k_full, 2 * 128 * (uint32_t)p.load_rows);
        for (int half = 0; half < 2; half++)
            tma_load(&s.k[half], &p.k, half * FQLA__LOAD_COLUMNS, head_qk, (int32_t)first_row, &s.k_full);
    }
    const int token = BLOCK * warp + lane % BLOCK;
    const bool live = token < valid;
    Gate next = load_gates(p, first_row + token, head_of_group(p, head_qk, first_head), live);
    mbarrier_wait(&s.k_full, 0);
    if (valid < CHUNK) {
        clear_rows(s.k, valid, thread);
        __syncthreads();
    }
    wgmma_fence();
    multiply_tiles(kk, s.k, s.k);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_settle(kk);
    if (p.l2norm) { /* |k_i|^2 is the diagonal of K K^T */
        __syncthreads(); /* K is no longer needed */
#pragma unroll
        for (int tile = 0; tile < 8; tile++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (8 * tile + column + e % 2 == row + e / 2 * 8) s.norms[0][row + e / 2 * 8] = rsqrtf(kk[4 * tile + e] + 1e-6f);
        const int q_row = min(thread / 2, valid - 1); /* of a row past the end the factor is not used */
        const float norm = row_norm((const uint16_t *)p.q_rows + (first_row + q_row) * p.q_token + head_qk * p.q_head, thread % 2);
        if (thread % 2 == 0) s.norms[1][thread / 2] = rsqrtf(norm + 1e-6f);
        __syncthreads();
        r = s.norms[0][BLOCK * warp + lane % BLOCK];
        rq = BLOCK * warp + lane % BLOCK < valid ? s.norms[1][BLOCK * warp + lane % BLOCK] : 1.0f;
#pragma unroll
        for (int i = 0; i < 32; i++) kk[i] *= s.norms[0][row + i / 2 % 2 * 8] * s.norms[0][i / 4 * 8 + column + i % 2];
    }
    __syncthreads();
    if (p.heads_per_block > 1) clear_t(s.odd, thread);
    for (int h = 0; h < p.heads_per_block; h++) {
        const int head = head_of_group(p, head_qk, first_head + h);
        const Gate gate = next;
        fqla__prepared_chunk &chunk = h % 2 ? s.odd : s.even;
        float z[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};

        if (thread == 0) bulk_store_wait<1>(); /* the image of two heads before is out */
        __syncthreads();
        prepare_decays(p, s, chunk, gate, live, head, warp, lane, r, rq);
        if (h + 1 < p.heads_per_block) next = load_gates(p, first_row + token, head_of_group(p, head_qk, first_head + h + 1), live);
        __syncwarp();
        /* L: its diagonal block in float32, what is left of it in fp16 */
        {
            const float scale[2] = {chunk.beta[row], chunk.beta[row + 8]};
#pragma unroll
            for (int block = 0; block < BLOCKS; block++) {
                float l[8];
                if (block > warp) break;
#pragma unroll
                for (int e = 0; e < 8; e++) l[e] = kk[8 * block + e] * scale[e / 2 % 2];
                if (block < warp) {
                    store_block_fp16(block_address(s.matrix, BLOCK * warp, BLOCK * block, lane), l);
                } else {
#pragma unroll
                    for (int e = 0; e < 8; e++) s.diagonal[warp][column + e / 4 * 8 + e % 2][lane / 4 + e / 2 % 2 * 8] = l[e];
                }
            }
        }
        __syncwarp();
        invert(s, warp, lane, z);
        write_t(s, chunk, warp, lane, z);
        if (lane < BLOCK) {
            const int token = BLOCK * warp + lane;
            const float e0 = chunk.block[0], e1 = chunk.block[1], e2 = chunk.block[2], e3 = chunk.block[3];
            const float before = (warp > 0 ? e0 : 1.0f) * (warp > 1 ? e1 : 1.0f) * (warp > 2 ? e2 : 1.0f);
            const float after = (warp < 1 ? e1 : 1.0f) * (warp < 2 ? e2 : 1.0f) * (warp < 3 ? e3 : 1.0f);
            chunk.w[token] = s.head[token] * before * r;
            chunk.update[token] = chunk.tail[token] * after;
            chunk.o[token] = chunk.head[token] * before;
            if (thread == 0) chunk.gamma_chunk = e0 * e1 * e2 * e3;
        }
        fence_proxy_async();
        __syncthreads();
        if (thread == 0) bulk_store(&p.prepared[chunk_number * p.heads_v + head], &chunk, sizeof chunk);
    }
    if (thread == 0) bulk_store_wait<0>();
}
