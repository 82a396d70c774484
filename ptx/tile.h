/* A chunk's 64 x 64 tiles in shared memory, as the copy engine brings them and wgmma reads them. */
#ifndef FLASHQLA_TILE_H
#define FLASHQLA_TILE_H

#include "../src/cuda_params.h"
#include "mma.h"
#include "tma.h"
#include "wgmma.h"

enum { CHUNK = FQLA__CHUNK_ROWS, DIM = 128, BLOCK = 16, BLOCKS = CHUNK / BLOCK, WARP = 32, WARPGROUP = 128 };

/* 64 rows of 64 elements, 128 bytes a row, 128-byte swizzle: 16-byte unit u of row r lies at r * 128 + ((u ^ r % 8) * 16). 8 KB */
typedef struct __align__(1024) Tile {
    unsigned char bytes[CHUNK * 128];
} Tile;

/* d = a b^T for two 64 x 128 pairs of tiles. */
static __device__ __forceinline__ void multiply_tiles(float (&d)[32], const Tile *a, const Tile *b) {
    wgmma_64x64_shared_first(d, tile_descriptor(a, 0), tile_descriptor(b, 0));
#pragma unroll
    for (int step = 1; step < DIM / 16; step++)
        wgmma_64x64_shared(d, descriptor_advance(tile_descriptor(&a[step / 4], 0), step % 4 * 32),
                           descriptor_advance(tile_descriptor(&b[step / 4], 0), step % 4 * 32));
}

/* A 16 x 16 accumulator (two tiles of 16 x 8) as 16-bit elements; address: the lane's, of one row of eight of them. */
static __device__ __forceinline__ void store_block(uint32_t address, const float *d) {
    store_tiles(address, pack_elements(d[0], d[1]), pack_elements(d[2], d[3]), pack_elements(d[4], d[5]), pack_elements(d[6], d[7]));
}

/* The lane's address of block (row, column), counted in 16 x 16 blocks, of a tile. */
static __device__ __forceinline__ uint32_t tile_block_address(const void *tile, int row, int column, int lane) {
    const int unit = ((lane / 16) ^ (lane % 8)) ^ (2 * column);
    return shared_address(tile) + (BLOCK * row + lane % 16) * 128 + unit * 16;
}

/* Rows of a pair of tiles from `valid` on belong to the next sequence: zeros, since 0 * NaN is NaN. By a warpgroup. */
static __device__ __forceinline__ void clear_rows(Tile *tiles, int valid, int thread) {
    for (int unit = valid * 8 + thread; unit < CHUNK * 8; unit += WARPGROUP) {
        ((uint4 *)tiles[0].bytes)[unit] = make_uint4(0, 0, 0, 0);
        ((uint4 *)tiles[1].bytes)[unit] = make_uint4(0, 0, 0, 0);
    }
    fence_proxy_async();
}

/* A value that the compiler takes for a new one: what is computed from it inside a loop stays inside, rather than occupying registers
   for the whole loop. */
static __device__ __forceinline__ int renewed(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

#endif
