/* The forward's shared memory and who hands what to whom. */
#ifndef FLASHQLA_FORWARD_SHARED_H
#define FLASHQLA_FORWARD_SHARED_H

#include "../src/cuda_params.h"
#include "mbarrier.h"

enum { CHUNK = FQLA__CHUNK_ROWS, DIM = 128, BLOCK = 16, BLOCKS = CHUNK / BLOCK, WARP = 32, WARPGROUP = 128 };
enum { STATE_WARPGROUPS = 2, STATE_WARPS = 4 * STATE_WARPGROUPS, STATE_COLUMNS = DIM / STATE_WARPGROUPS };
enum { QK_SLOTS = 3, V_SLOTS = 2, PREPARED_SLOTS = 2 };
enum { DIAGONAL_PITCH = 20 }; /* floats of a row of a diagonal block: an accumulator's columns 2 (l%4) meet no bank twice */
enum { PITCH = 72 }; /* elements of a row of the fp16 matrices L and A: 144 bytes, so that eight rows of ldmatrix meet no bank twice */

/* 64 rows of 64 elements, 128 bytes a row, 128-byte swizzle: 16-byte unit u of row r lies at r * 128 + ((u ^ r % 8) * 16). 8 KB */
typedef struct Tile {
    unsigned char bytes[CHUNK * 128];
} Tile;

/* What the state's warpgroups need of a chunk's tokens besides T and P. 1040 bytes */
typedef struct TokenFactors {
    float w[CHUNK];      /* gamma_j r_j: W = V - w K S0 */
    float update[CHUNK]; /* gamma_C / gamma_j r_j: rows of Vn into the update */
    float o[CHUNK];      /* gamma_i rq_i: rows of Q S0 into O */
    float beta[CHUNK];
    float gamma_chunk;   /* gamma_C */
    float padding[3];
} TokenFactors;

/* The preparing warps' own notes on a chunk. 1552 bytes */
typedef struct Decays {
    float sum[CHUNK];    /* log2 of the decay from the token's 16-block's border up to and with it */
    float head[CHUNK];   /* exp2 of that */
    float tail[CHUNK];   /* decay from after the token to its block's end */
    float beta[CHUNK];
    float rk[CHUNK];     /* 1, or l2norm's factors of k and q */
    float rq[CHUNK];
    float block[BLOCKS]; /* log2 of a block's whole decay */
} Decays;

/* The sequence and head of a block. In shared memory: it costs no registers. */
typedef struct Sequence {
    int64_t row;      /* its first row in q, k, v, o, g, beta */
    int32_t len;
    int32_t chunks;
    int64_t snapshot; /* its first entry in snapshots */
    int32_t head, head_qk;
    int64_t in, out;  /* entries of h0 and ht, counted in heads' states; -1: none */
} Sequence;

typedef struct __align__(1024) ForwardShared {
    Tile k[QK_SLOTS][2];                          /* columns 0-63, 64-127                          48 KB */
    Tile q[QK_SLOTS][2];                          /*                                               48 KB */
    Tile v[V_SLOTS][STATE_WARPGROUPS];            /* a warpgroup's 64 columns                      32 KB */
    Tile t[PREPARED_SLOTS];                       /* T below the diagonal, zeros elsewhere         16 KB */
    Tile p[PREPARED_SLOTS];                       /* P                                             16 KB */
    unsigned char o[STATE_WARPS][CHUNK * 32];     /* a warp's 16 columns of O on their way out     16 KB */
    uint16_t l[CHUNK][PITCH];                     /* L below the diagonal blocks, fp16              9 KB */
    uint16_t a[CHUNK][PITCH];                     /* (I + L)^-1, fp16                               9 KB */
    float diagonal[BLOCKS][BLOCK][DIAGONAL_PITCH]; /* the diagonal blocks of L, transposed          5 KB */
    TokenFactors factors[PREPARED_SLOTS];
    Decays decays[2];
    Sequence sequence;
    uint64_t qk_full[QK_SLOTS];                   /* copy engine -> all: q and k are there */
    uint64_t v_full[V_SLOTS][STATE_WARPGROUPS];   /* copy engine -> a state warpgroup */
    uint64_t prepared[PREPARED_SLOTS];            /* preparing warps -> state: T, P, factors are there */
    uint64_t released[PREPARED_SLOTS];            /* state's warps -> preparing: T, P, factors may be overwritten */
    uint32_t qk_readers[QK_SLOTS];                /* state warps done with a slot; the last one refills it */
    uint32_t v_readers[V_SLOTS][STATE_WARPGROUPS];
} ForwardShared;

static_assert(sizeof(ForwardShared) == FQLA__FORWARD_SHARED_BYTES, "what the host asks for");
static_assert(sizeof(ForwardShared) <= 227 * 1024, "what a block can have");

/* Counts warps modulo `count`; true for the last: all the others' reads are over. */
static __device__ __forceinline__ bool last_reader(uint32_t *readers, uint32_t count) {
    uint32_t before;
    asm volatile("atom.acq_rel.cta.shared::cta.inc.u32 %0, [%1], %2;" : "=r"(before) : "r"(shared_address(readers)), "r"(count - 1) : "memory");
    return before == count - 1;
}

/* A value that the compiler takes for a new one: what is computed from it inside a loop stays inside, rather than occupying registers
   for the whole loop. */
static __device__ __forceinline__ int renewed(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

#endif
