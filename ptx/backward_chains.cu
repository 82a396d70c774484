/* The sequential part of the backward: all states S0 and all their gradients dS1, chunk by chunk, in one grid of two kinds of
   blocks that need nothing of each other.

   The maths, a chunk of C = 64 tokens (symbols as in forward.cu; dO, dht given):

       forwards    W = V - w K S0                              Vn = beta W + T W            S1 = gamma_C S0 + K^T (update Vn)
       backwards   dVn = scale P^T dO + update K dS1           dW = beta dVn + T^T dVn      dV = dW
                   dS0 = gamma_C dS1 + scale Q^T (o dO) - K^T (w dW)

   A block walks 64 columns of V of a sequence's v-head, forwards from h0 or backwards from dht. It leaves for every chunk S0 and
   Vn, or dS1 and dV: kernel backward_gradients makes all else of them, a block a chunk.

   scale = unit * a power of two. Everything of the gradient's is divided by unit until it leaves, so that scale costs a 16-bit
   operand no digit: with zero gates o dO is dO with another exponent. dh0's last chunk adds what rounding o dO has left (the
   relative error of dh0 would be that of one rounding, 1.7e-3).

   Roles, a warpgroup each:
       state     S^T or dS^T, 64 x 128, float32 in registers, its 16-bit copy the left operand, as in state.h
       helper    waits for what the copy engine brings, clears rows past the end; backwards: P, and T from its blocks to a tile;
                 its first thread loads and has the copy engine take the results away

   The pipeline; c is the chunk at hand, c+1 the next one in the block's direction:

       copy engine   all of c+2 and c+3                         S0 Vn / dS1 dV of c-1
       helper             Q K^T, P, T of c+1
       state forwards     K S0 (256 tensor cycles), under it S0's copy out | W | T W (128) | Vn out, update (256)
       state backwards    K dS1 (256), dO^T P (128), under them dS1's copy out | dVn | T^T dVn (128), then Q's update (256) under
                          the next | dW | K's update (256), under it dV out

   By count: forwards 640 tensor cycles and 1300 in all, backwards 1024 and 256 of the helper's and 1700 in all; from memory k 16
   (the halves and v-heads of a q/k head find it in the cache) v 8 T 6.7 S0 16 Vn 8 forwards, q k 32 do 8 T 6.7 dS1 16 dv 8
   backwards, KB.

   Shared memory: ChainShared below. */
#include "backward_common.h"
#include "gates.h"
#include "grid.h"
#include "state.h"

enum { SLOTS = 3, RINGS = 2, STATE_COLUMNS = 64, HALVES = DIM / STATE_COLUMNS };
static_assert(FQLA__CHAINS_THREADS == 2 * WARPGROUP, "a warpgroup a role");

/* What a chunk brings, forwards: 34 KB */
typedef struct __align__(1024) ForwardSlot {
    Tile k[2];
    Tile v; /* the block's 64 columns */
    Square t;
    fqla__factors factors;
} ForwardSlot;

/* and backwards: 47 KB */
typedef struct __align__(1024) ReverseSlot {
    Tile k[2], q[2];
    Tile dout;                     /* dO, the block's 64 columns */
    fqla__prepared_chunk prepared; /* T by its blocks, and the factors */
} ReverseSlot;

/* What leaves: 24 KB */
typedef struct __align__(1024) OutSlot {
    Tile state[2]; /* S0^T or dS1^T */
    Tile rows;     /* Vn or dV */
} OutSlot;

/* Chunk number i of a block, counted in its direction, uses slot i % 3 and ring i % 2. */
typedef struct __align__(1024) ChainShared {
    union {
        ForwardSlot forward[SLOTS];
        ReverseSlot reverse[SLOTS]; /*                                         141 KB */
    };
    Tile p[RINGS], t[RINGS];        /* backwards: P / unit, T below its diagonal      32 KB */
    OutSlot out[RINGS];             /*                                          48 KB */
    uint64_t full[SLOTS];           /* copy engine -> helper */
    uint64_t ready[SLOTS];          /* helper -> state */
    uint64_t done[SLOTS];           /* state -> helper: the slot is used, its results lie in out */
    uint64_t out_free[RINGS];       /* helper -> state: the copy engine has read it */
} ChainShared;

static_assert(sizeof(ChainShared) == FQLA__CHAINS_SHARED_BYTES, "what the host asks for");
static_assert(sizeof(ChainShared) <= 227 * 1024, "what a block can have");

/* A block's work. */
typedef struct Chain {
    int64_t row;          /* the sequence's first row */
    int64_t chunk;        /* its first chunk's number in the batch */
    int64_t entry;        /* of h0, dht, dh0, counted in heads' states */
    int32_t len, chunks;
    int32_t head, head_qk;
    int32_t half;         /* of V */
} Chain;

template <bool reverse> static __device__ __forceinline__ int chunk_of(const Chain &c, int number) {
    return reverse ? c.chunks - 1 - number : number;
}

/* ---- helper ----------------------------------------------------------------------------------------------------------------- */

/* Issue the loads of chunk number i. By one thread. */
template <bool reverse>
static __device__ __forceinline__ void load_slot(const fqla__backward_params &p, ChainShared &s, const Chain &c, int number) {
    const fqla__forward_params &f = p.forward;
    const int slot = number % SLOTS, chunk = chunk_of<reverse>(c, number);
    const int32_t row = (int32_t)(c.row + (int64_t)chunk * CHUNK);
    const fqla__prepared_chunk *prepared = &f.prepared[(c.chunk + chunk) * f.heads_v + c.head];
    uint64_t *full = &s.full[slot];
    if (reverse) {
        ReverseSlot &to = s.reverse[slot];
        mbarrier_arrive_expect(full, 5 * sizeof(Tile) + sizeof *prepared);
        for (int half = 0; half < 2; half++) {
            tma_load(&to.k[half], &f.k, half * FQLA__LOAD_COLUMNS, row, c.head_qk, full);
            tma_load(&to.q[half], &f.q, half * FQLA__LOAD_COLUMNS, row, c.head_qk, full);
        }
        tma_load(&to.dout, &f.o, c.half * STATE_COLUMNS, row, c.head, full);
        bulk_load(&to.prepared, prepared, sizeof *prepared, full);
    } else {
        ForwardSlot &to = s.forward[slot];
        mbarrier_arrive_expect(full, 3 * sizeof(Tile) + sizeof *prepared);
        for (int half = 0; half < 2; half++) tma_load(&to.k[half], &f.k, half * FQLA__LOAD_COLUMNS, row, c.head_qk, full);
        tma_load(&to.v, &f.v, c.half * STATE_COLUMNS, row, c.head, full);
        load_prepared(&to.t, &to.factors, prepared, full);
    }
}

/* Shared memory to global memory, contiguous. */
static __device__ __forceinline__ void bulk_store(void *to, const void *from, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)), "r"(bytes)
                 : "memory");
}

/* Chunk number i is done: what it made goes out, and its slot is refilled. By one thread. The ring of the chunk before it has been
   read long since, and is given back before the wait, so that the state never waits for it. */
template <bool reverse>
static __device__ __forceinline__ void retire(const fqla__backward_params &p, ChainShared &s, const Chain &c, int number) {
    const int chunk = chunk_of<reverse>(c, number), slot = number % SLOTS;
    OutSlot &out = s.out[number % RINGS];
    fqla__chunk_states &to = p.chunks[(c.chunk + chunk) * p.forward.heads_v + c.head];
    bulk_store_wait<0>();
    if (number > 0) mbarrier_arrive(&s.out_free[(number - 1) % RINGS]);
    mbarrier_wait(&s.done[slot], number / SLOTS % 2);
    if (number + SLOTS < c.chunks) load_slot<reverse>(p, s, c, number + SLOTS);
    bulk_store(reverse ? to.ds[c.half] : to.s[c.half], out.state, sizeof out.state);
    if (!reverse) bulk_store(to.vn[c.half], &out.rows, sizeof out.rows);
    else if ((chunk + 1) * CHUNK <= c.len)
        tma_store(&p.dv, c.half * STATE_COLUMNS, (int32_t)(c.row + (int64_t)chunk * CHUNK), c.head, &out.rows);
    bulk_commit();
}

/* P_ij = scale / unit exp(G_i - G_j) rq_i r_j (Q K^T)_ij for i >= j. Warp w makes rows 16w .. 16w + 15; decays as in
 * forward_scores.h. */
static __device__ __forceinline__ void make_scores(const ReverseSlot &in, Tile *to, float scale, int warp, int lane) {
    const fqla__factors &d = in.prepared.factors;
    const int row = BLOCK * warp + lane / 4, column = 2 * (lane % 4);
    float qk[32];
    wgmma_fence();
    multiply_tiles(qk, shared_units(in.q), shared_units(in.k));
    wgmma_commit();

    const float e1 = exp2_fast(d.block[1]), e2 = exp2_fast(d.block[2]);
    const float rows[2] = {d.row[row], d.row[row + 8]};
    float inside[8], head[2] = {exp2_fast(rows[0]) * scale, exp2_fast(rows[1]) * scale};
#pragma unroll
    for (int e = 0; e < 8; e++)
        inside[e] = exp2_fast(rows[e / 2 % 2] - d.column[BLOCK * warp + column + e / 4 * 8 + e % 2]) * scale;
    wgmma_wait<0>();
    wgmma_settle(qk);
#pragma unroll
    for (int block = BLOCKS - 1; block >= 0; block--) {
        float *value = &qk[8 * block];
        if (block > warp) continue;
        if (block == warp) {
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const int j = column + e / 4 * 8 + e % 2, i = lane / 4 + e / 2 % 2 * 8;
                value[e] = j <= i ? value[e] * inside[e] : 0.0f;
            }
        } else {
            const float whole = d.block[block];
#pragma unroll
            for (int e = 0; e < 8; e++)
                value[e] *= head[e / 2 % 2] * exp2_fast(whole - d.column[BLOCK * block + column + e / 4 * 8 + e % 2]);
            /* this block lies between the rows and the blocks left of it */
            head[0] *= block == 2 ? e2 : e1;
            head[1] *= block == 2 ? e2 : e1;
        }
        store_tile_block(to, warp, block, lane, value);
    }
}

/* T below its diagonal from the triangle of blocks to a tile. */
static __device__ __forceinline__ void spread_triangle(const uint8_t *t, Tile *to, int thread) {
#pragma unroll
    for (int i = 0; i < 3; i++) {
        const int unit = thread + i * WARPGROUP, block = unit / 32; /* a row of 16 bytes of an 8 x 8 tile */
        if (block >= 10) break;
        const int column = block < 4 ? 0 : block < 7 ? 1 : block < 9 ? 2 : 3, row = block - column * (9 - column) / 2 + column;
        const int r = BLOCK * row + unit / 16 % 2 * 8 + unit % 8, u = 2 * column + unit / 8 % 2;
        *(uint4 *)(to->bytes + r * 128 + ((u ^ (r % 8)) * 16)) = *(const uint4 *)(t + unit * 16);
    }
}

enum { HELPER_BARRIER = 1 };

template <bool reverse>
static __device__ void run_helper(const fqla__backward_params &p, ChainShared &s, const Chain &c, int block_thread) {
    if (block_thread == 0)
        for (int number = 0; number < min((int)SLOTS, c.chunks); number++) load_slot<reverse>(p, s, c, number);
    for (int number = 0; number < c.chunks; number++) {
        const int thread = renewed(block_thread) & (WARPGROUP - 1), warp = thread / WARP, lane = thread % WARP,
                  slot = number % SLOTS;
        const int valid = c.len - chunk_of<reverse>(c, number) * CHUNK;
        mbarrier_wait(&s.full[slot], number / SLOTS % 2);
        if (valid < CHUNK) {
            if (reverse)
                for (int i = 0; i < 5; i++) clear_tile_rows(&s.reverse[slot].k[0] + i, valid, thread, WARPGROUP); /* k, q, dout */
            else
                for (int i = 0; i < 3; i++) clear_tile_rows(&s.forward[slot].k[0] + i, valid, thread, WARPGROUP); /* k, v */
            fence_proxy_async();
            named_barrier<HELPER_BARRIER, WARPGROUP>();
        }
        if (reverse) {
            if (number >= RINGS)
                mbarrier_wait(&s.done[(number - RINGS) % SLOTS], (number - RINGS) / SLOTS % 2); /* P and T are used */
            spread_triangle(s.reverse[slot].prepared.t, &s.t[number % RINGS], thread);
            make_scores(s.reverse[slot], &s.p[number % RINGS], p.power, warp, lane);
            fence_proxy_async(); /* they go to wgmma */
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&s.ready[slot]);
        if (thread == 0 && number > 0) retire<reverse>(p, s, c, number - 1);
        __syncwarp();
    }
    if (block_thread == 0 && c.chunks > 0) {
        retire<reverse>(p, s, c, c.chunks - 1);
        bulk_store_wait<0>();
    }
}

/* ---- state ------------------------------------------------------------------------------------------------------------------ */

/* The state's 16-bit copy, whose registers are a left operand, as two tiles with rows v. */
static __device__ __forceinline__ void stage_state(const uint32_t (&state)[32], Tile *tiles, int warp, int lane) {
#pragma unroll
    for (int step = 0; step < DIM / 16; step++) {
        const uint32_t *a = &state[4 * step]; /* (upper, left), (lower, left), (upper, right), (lower, right) */
        store_tiles(tile_block_address(&tiles[step / 4], warp, step % 4, lane), a[0], a[2], a[1], a[3]);
    }
}

/* Wait until the ring of chunk number i is free. */
static __device__ __forceinline__ void wait_out(ChainShared &s, int number) {
    if (number >= RINGS) mbarrier_wait(&s.out_free[number % RINGS], (number / RINGS - 1) % 2);
}

/* X^T, 64 columns by 64 tokens in registers, into a tile of tokens' rows, of which a warp writes 16 columns. */
static __device__ __forceinline__ void stage_rows(const uint32_t (&x)[16], const Tile *tile, const Lane &place) {
#pragma unroll
    for (int pair = 0; pair < CHUNK / 16;
         pair++) /* a left operand's registers are 8 x 8 tiles in the order of their transposing loads */
        store_tiles_transposed(shared_address(tile->bytes) + place.columns + pair * 2048, x[4 * pair], x[4 * pair + 1],
                               x[4 * pair + 2], x[4 * pair + 3]);
}

static __device__ void run_state(const fqla__backward_params &p, ChainShared &s, const Chain &c, int thread) {
    const int lane = thread % WARP, warp = thread / WARP;
    const Lane place = find_lane(thread);
    float state[64], ks[32];
    uint32_t state16[32], w16[16], update16[16];
    if (p.forward.h0) load_state(state, p.forward.h0, c.entry, state_place(p.forward, c.half * STATE_COLUMNS + 16 * warp, lane));
    else clear_state(state);
    for (int number = 0; number < c.chunks; number++) {
        const int slot = number % SLOTS;
        const ForwardSlot &in = s.forward[slot];
        const fqla__factors &factors = in.factors;
        const uint32_t k = shared_units(in.k), t = shared_units(&in.t);
        OutSlot &out = s.out[number % RINGS];
        pack_operand(state16, state);
        mbarrier_wait(&s.ready[slot], number / SLOTS % 2);
        wgmma_fence();
        multiply_rows(ks, state16, k);
        wgmma_commit();
        scale_state(state, factors.gamma_chunk);
        wait_out(s, number);
        stage_state(state16, out.state, warp, lane);
        wgmma_wait<0>();
        wgmma_settle(ks);
        subtract_from_v(ks, &in.v, factors.w, place);
        pack_operand(w16, ks);
        scale_columns<1>(ks, factors.beta, place);
        wgmma_fence();
        multiply_square(ks, w16, t);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_settle(ks);
        pack_columns(w16, update16, ks, factors.update, place); /* w16 is Vn from here on */
        wgmma_fence();
        multiply_update(state, update16, k);
        wgmma_commit();
        stage_rows(w16, &out.rows, place);
        fence_proxy_async(); /* S0 and Vn go to the copy engine */
        wgmma_wait<0>();
        wgmma_settle(state);
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&s.done[slot]);
    }
}

/* dO^T, 64 columns by 64 tokens, as left operands: as it is. */
static __device__ __forceinline__ void load_columns(uint32_t (&a)[16], const Tile *tile, const Lane &place) {
#pragma unroll
    for (int pair = 0; pair < CHUNK / 16; pair++)
        load_tiles_transposed(*(uint32_t (*)[4])&a[4 * pair], shared_address(tile->bytes) + place.columns + pair * 2048);
}

/* Its columns (tokens) multiplied by their factors times `times`; rest: what the rounding took away. */
template <bool rest>
static __device__ __forceinline__ void scale_operand(uint32_t (&to)[16], const uint32_t (&a)[16], const float *factors, float times,
                                                     const Lane &place) {
#pragma unroll
    for (int tile = 0; tile < CHUNK / 8; tile++) {
        const float2 factor = factors_of(factors, place, tile);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t pair = a[2 * tile + half];
            const float low = low_element(pair) * (factor.x * times), high = high_element(pair) * (factor.y * times);
            uint32_t packed = pack_elements(low, high);
            if (rest) packed = pack_elements(low - low_element(packed), high - high_element(packed));
            to[2 * tile + half] = packed;
        }
    }
}

/* d += left operand [64 x 64] by a tile, k over its rows. */
static __device__ __forceinline__ void multiply_tile(float (&d)[32], const uint32_t (&a)[16], uint32_t tile) {
#pragma unroll
    for (int step = 0; step < CHUNK / 16; step++) wgmma_64x64_transposed(d, &a[4 * step], tile_descriptor(tile + step * 128, 0));
}

static __device__ __forceinline__ void multiply_tile_first(float (&d)[32], const uint32_t (&a)[16], uint32_t tile) {
    wgmma_64x64_transposed_first(d, &a[0], tile_descriptor(tile, 0));
#pragma unroll
    for (int step = 1; step < CHUNK / 16; step++) wgmma_64x64_transposed(d, &a[4 * step], tile_descriptor(tile + step * 128, 0));
}

/* The last chunk's rows of dV, by ordinary stores: a box would run into the next sequence's. A warp's own 16 columns. */
static __device__ __forceinline__ void send_rows(const fqla__backward_params &p, const Tile *tile, const Chain &c, int chunk,
                                                 int warp, int lane, int valid) {
    uint16_t *to = (uint16_t *)p.dv_rows + (c.row + (int64_t)chunk * CHUNK) * p.v_token + c.head * p.v_head +
                   c.half * STATE_COLUMNS + 16 * warp + lane % 2 * 8;
    for (int row = lane / 2; row < valid; row += WARP / 2)
        *(uint4 *)(to + row * p.v_token) = *(const uint4 *)(tile->bytes + row * 128 + (((2 * warp + lane % 2) ^ (row % 8)) * 16));
}

static __device__ void run_reverse(const fqla__backward_params &p, ChainShared &s, const Chain &c, int thread) {
    const int lane = thread % WARP, warp = thread / WARP;
    const Lane place = find_lane(thread);
    const float unit = p.unit, per_unit = p.per_unit;
    float state[64], ks[32], po[32];
    uint32_t state16[32], do16[16], update16[16];
    if (p.dht) load_state(state, p.dht, c.entry, state_place(p.forward, c.half * STATE_COLUMNS + 16 * warp, lane));
    else clear_state(state);
    scale_state(state, per_unit);
    for (int number = 0; number < c.chunks; number++) {
        const int slot = number % SLOTS, ring = number % RINGS;
        const int chunk = chunk_of<true>(c, number), valid = min((int)CHUNK, c.len - chunk * CHUNK);
        const ReverseSlot &in = s.reverse[slot];
        const fqla__factors &factors = in.prepared.factors;
        const uint32_t k = shared_units(in.k), q = k + 2 * TILE_UNITS, probabilities = shared_units(&s.p[ring]),
                       t = shared_units(&s.t[ring]);
        OutSlot &out = s.out[ring];
        pack_operand(state16, state);
        mbarrier_wait(&s.ready[slot], number / SLOTS % 2);
        load_columns(do16, &in.dout, place);
        wgmma_fence();
        multiply_rows(ks, state16, k);
        multiply_tile_first(po, do16, probabilities);
        wgmma_commit();
        scale_state(state, factors.gamma_chunk);
        wait_out(s, number);
        stage_state(state16, out.state, warp, lane);
        scale_operand<false>(update16, do16, factors.o, p.power, place);
        wgmma_wait<0>();
        wgmma_settle(ks);
        wgmma_settle(po);
#pragma unroll
        for (int tile = 0; tile < CHUNK / 8; tile++) { /* dVn, and beta dVn */
            const float2 u = factors_of(factors.update, place, tile), beta = factors_of(factors.beta, place, tile);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float *d = &ks[4 * tile + 2 * half];
                const float low = fmaf(u.x, d[0], po[4 * tile + 2 * half]), high = fmaf(u.y, d[1], po[4 * tile + 2 * half + 1]);
                do16[2 * tile + half] = pack_elements(low, high);
                d[0] = beta.x * low;
                d[1] = beta.y * high;
            }
        }
        wgmma_fence();
        multiply_tile(ks, do16, t);
        wgmma_commit();
        multiply_update(state, update16, q);
        wgmma_commit();
        wgmma_wait<1>();
        wgmma_settle(ks);
        uint32_t dv16[16];
#pragma unroll
        for (int tile = 0; tile < CHUNK / 8; tile++) { /* - w dW into the state; dV = unit dW */
            const float2 w = factors_of(factors.w, place, tile);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float low = ks[4 * tile + 2 * half], high = ks[4 * tile + 2 * half + 1];
                do16[2 * tile + half] = pack_elements(-w.x * low, -w.y * high);
                dv16[2 * tile + half] = pack_elements(unit * low, unit * high);
            }
        }
        wgmma_fence();
        multiply_update(state, do16, k);
        wgmma_commit();
        stage_rows(dv16, &out.rows, place);
        fence_proxy_async(); /* dS1 and dV go to the copy engine */
        wgmma_wait<0>();
        wgmma_settle(state);
        __syncwarp();
        if (valid < CHUNK) send_rows(p, &out.rows, c, chunk, warp, lane, valid);
        if (lane == 0) mbarrier_arrive(&s.done[slot]);
    }
    if (p.dh0) {
        if (c.chunks > 0) { /* its slot is not refilled */
            const ReverseSlot &in = s.reverse[(c.chunks - 1) % SLOTS];
            load_columns(do16, &in.dout, place);
            scale_operand<true>(update16, do16, in.prepared.factors.o, p.power, place);
            wgmma_fence();
            multiply_update(state, update16, shared_units(in.q));
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_settle(state);
        }
        scale_state(state, unit);
        store_state(state, p.dh0, c.entry, state_place(p.forward, c.half * STATE_COLUMNS + 16 * warp, lane));
    }
}

/* ---- the kernel ------------------------------------------------------------------------------------------------------------- */

extern "C" __global__ void __launch_bounds__(FQLA__CHAINS_THREADS, 1)
#if defined(FLASHQLA_ELEMENT_BF16)
    backward_chains_bf16(const __grid_constant__ fqla__aligned_backward_params params)
#else
    backward_chains_fp16(const __grid_constant__ fqla__aligned_backward_params params)
#endif
{
    const fqla__backward_params &p = params.values;
    const fqla__forward_params &f = p.forward;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    ChainShared &s = *(ChainShared *)shared_bytes;
    const uint32_t of_a_kind = gridDim.x / 2, block = blockIdx.x % of_a_kind, parts = (uint32_t)f.heads_v * HALVES;
    const bool reverse = blockIdx.x < of_a_kind; /* the longer ones first */
    const int thread = (int)threadIdx.x;

    if (thread == 0) {
        for (int i = 0; i < SLOTS; i++) {
            mbarrier_init(&s.full[i], 1);
            mbarrier_init(&s.ready[i], WARPGROUP / WARP);
            mbarrier_init(&s.done[i], WARPGROUP / WARP);
        }
        for (int i = 0; i < RINGS; i++) mbarrier_init(&s.out_free[i], 1);
        mbarrier_init_fence();
    }
    if (reverse) /* above their diagonal blocks they stay zero */
        for (int i = 0; i < RINGS; i++) {
            clear_tile(&s.p[i], thread, FQLA__CHAINS_THREADS);
            clear_tile(&s.t[i], thread, FQLA__CHAINS_THREADS);
        }
    else
        for (int i = 0; i < SLOTS; i++) clear_square(&s.forward[i].t, thread, FQLA__CHAINS_THREADS);
    fence_proxy_async();
    grid_launch_dependents();
    grid_wait();

    const fqla__device_table *table = f.table;
    const fqla__device_sequence *sequences = (const fqla__device_sequence *)(table + 1);
    const fqla__device_segment *segments = (const fqla__device_segment *)(sequences + table->num_seqs);
    const int64_t number = block / parts;
    if (number >= table->segments || (number < table->kept && segments[number].index > 0))
        return; /* a cut sequence's first segment stands for it */
    const int64_t n = segments[number].sequence;
    Chain c;
    c.row = sequences[n].row;
    c.chunk = sequences[n].chunk;
    c.len = (int32_t)sequences[n].len;
    c.chunks = (c.len + CHUNK - 1) / CHUNK;
    c.head = (int32_t)(block % parts / HALVES);
    c.head_qk = f.head_map == 0 ? c.head / (f.heads_v / f.heads_qk) : c.head % f.heads_qk;
    c.half = (int32_t)(block % HALVES);
    c.entry = n * f.heads_v + c.head;
    __syncthreads();

    const int role = __shfl_sync(0xffffffffu, thread / WARPGROUP, 0);
    if (reverse) {
        if (role == 1) run_helper<true>(p, s, c, thread % WARPGROUP);
        else run_reverse(p, s, c, thread);
    } else {
        if (role == 1) run_helper<false>(p, s, c, thread % WARPGROUP);
        else run_state(p, s, c, thread);
    }
}
