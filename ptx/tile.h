/* A chunk's 64 x 64 tiles in shared memory, as the copy engine brings them and wgmma reads them. */
#ifndef FLASHQLA_TILE_H
#define FLASHQLA_TILE_H

#include "../src/cuda_params.h"
#include "instructions.h"
#include "mma.h"
#include "tma.h"
#include "wgmma.h"

enum { CHUNK = FQLA__CHUNK_ROWS, DIM = 128, BLOCK = 16, BLOCKS = CHUNK / BLOCK, WARP = 32, WARPGROUP = 128 };

/* 64 rows of 64 elements, 128 bytes a row, 128-byte swizzle: 16-byte unit u of row r lies at r * 128 + ((u ^ r % 8) * 16). 8 KB */
typedef struct __align__(1024) Tile {
    unsigned char bytes[CHUNK * 128];
} Tile;

enum { TILE_UNITS = sizeof(Tile) / 16 };

/* The units of step i of 16 in k along the rows of a pair of tiles. */
static __device__ __forceinline__ uint32_t step_units(int step) { return step / 4 * TILE_UNITS + step % 4 * 2; }

/* The sum of the squares of 16 bytes' elements. */
static __device__ __forceinline__ float sum_of_squares(const uint4 &unit) {
    const uint32_t pairs[4] = {unit.x, unit.y, unit.z, unit.w};
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float low = low_element(pairs[i]), high = high_element(pairs[i]);
        sum = fmaf(low, low, fmaf(high, high, sum));
    }
    return sum;
}

/* d += a b^T for two 64 x 128 pairs of tiles; from the first step on, of eight. */
template <int first> static __device__ __forceinline__ void multiply_tiles_onto(float (&d)[32], uint32_t a, uint32_t b) {
#pragma unroll
    for (int step = first; step < DIM / 16; step++)
        wgmma_64x64_shared(d, tile_descriptor(a + step_units(step), 0), tile_descriptor(b + step_units(step), 0));
}

/* d = a b^T */
static __device__ __forceinline__ void multiply_tiles(float (&d)[32], uint32_t a, uint32_t b) {
    wgmma_64x64_shared_first(d, tile_descriptor(a, 0), tile_descriptor(b, 0));
    multiply_tiles_onto<1>(d, a, b);
}

/* A lower triangular 64 x 64 matrix X of 16-bit elements by its ten 16 x 16 blocks (row, column), in global memory: column after column
   of blocks, of each the blocks row = column .. 3, 512 bytes a block; a block is four 8 x 8 tiles of 128 bytes, of rows of 16 bytes:
   (upper, left), (upper, right), (lower, left), (lower, right). 5 KB */
static __device__ __forceinline__ int triangle_offset(int row, int column) {
    return (column * (9 - column) / 2 + row - column) * 512; /* before column c: 4 + 3 + ... blocks */
}

/* The same in shared memory, as wgmma reads X^T without swizzle: all sixteen blocks, those above the diagonal zero. 8 KB */
typedef struct __align__(1024) Square {
    unsigned char bytes[BLOCKS * BLOCKS * 512];
} Square;

static __device__ __forceinline__ int square_offset(int row, int column) { return (column * BLOCKS + row) * 512; }

/* Of X^T: k runs over X's columns, n over its rows. The operand of column c's blocks: k = 16 columns, N = 64 rows. */
static __device__ __forceinline__ uint64_t square_descriptor(uint32_t square, int column) {
    const uint64_t next_k = 128 >> 4, next_n = 256 >> 4; /* the 8 x 8 tile right of one, and the one below */
    return (square + square_offset(0, column) / 16 | next_k << 16) | next_n << 32;
}

/* d [64 x 64] += a [64 x 64, registers] X^T. N stays 64 though X is triangular: where a wgmma adds to a part of an accumulator ptxas
   serialises all (C7511). */
static __device__ __forceinline__ void multiply_square(float (&d)[32], const uint32_t (&a)[16], uint32_t square) {
#pragma unroll
    for (int column = 0; column < BLOCKS; column++) wgmma_64x64(d, &a[4 * column], square_descriptor(square, column));
}

/* A 16 x 16 accumulator as block (row, column) of a square. */
static __device__ __forceinline__ void store_block(void *square, int row, int column, int lane, const float *d) {
    store_tiles(shared_address(square) + square_offset(row, column) + lane * 16, pack_elements(d[0], d[1]), pack_elements(d[4], d[5]),
                pack_elements(d[2], d[3]), pack_elements(d[6], d[7]));
}

/* Bring what kernel prepare made of a chunk, sizeof(fqla__prepared_chunk) bytes: of T only the blocks that are there. By one thread. */
static __device__ __forceinline__ void load_prepared(Square *t, fqla__factors *factors, const fqla__prepared_chunk *from, uint64_t *barrier) {
#pragma unroll
    for (int column = 0; column < BLOCKS; column++)
        bulk_load(t->bytes + square_offset(column, column), from->t + triangle_offset(column, column), (BLOCKS - column) * 512, barrier);
    bulk_load(factors, &from->factors, sizeof *factors, barrier);
}

static __device__ __forceinline__ void clear_square(Square *square, int thread, int threads) {
    for (int unit = thread; unit < (int)(sizeof *square / 16); unit += threads) ((uint4 *)square->bytes)[unit] = make_uint4(0, 0, 0, 0);
}

/* Rows of a tile from `valid` on belong to the next sequence: zeros, since 0 * NaN is NaN. */
static __device__ __forceinline__ void clear_tile_rows(Tile *tile, int valid, int thread, int threads) {
    for (int unit = valid * 8 + thread; unit < CHUNK * 8; unit += threads) ((uint4 *)tile->bytes)[unit] = make_uint4(0, 0, 0, 0);
}

/* Of several tiles, before wgmma reads them. By a warpgroup. */
static __device__ __forceinline__ void clear_rows(Tile *tiles, int count, int valid, int thread) {
    for (int tile = 0; tile < count; tile++) clear_tile_rows(&tiles[tile], valid, thread, WARPGROUP);
    fence_proxy_async();
}

#endif
