/* What the backward's kernels have in common: 64 x 64 matrices as tiles, and where a chunk or a sequence lies. */
#ifndef FLASHQLA_BACKWARD_COMMON_H
#define FLASHQLA_BACKWARD_COMMON_H

#include "sequence.h"
#include "../src/cuda_backward_params.h"
#include "tile.h"

/* Where lane l's row of four 8 x 8 tiles lies in 16 x 16 block (row, column) of a tile: (upper, left), (upper, right), (lower,
   left), (lower, right). */
static __device__ __forceinline__ uint32_t tile_block_address(const Tile *tile, int row, int column, int lane) {
    const int r = BLOCK * row + lane / 16 * 8 + lane % 8, unit = 2 * column + lane / 8 % 2;
    return shared_address(tile->bytes) + r * 128 + ((unit ^ (r % 8)) * 16);
}

/* A 16 x 16 accumulator as block (row, column) of a tile. */
static __device__ __forceinline__ void store_tile_block(const Tile *tile, int row, int column, int lane, const float *d) {
    store_tiles(tile_block_address(tile, row, column, lane), pack_elements(d[0], d[1]), pack_elements(d[4], d[5]),
                pack_elements(d[2], d[3]), pack_elements(d[6], d[7]));
}

static __device__ __forceinline__ void clear_tile(Tile *tile, int thread, int threads) {
    for (int unit = thread; unit < (int)(sizeof *tile / 16); unit += threads) ((uint4 *)tile->bytes)[unit] = make_uint4(0, 0, 0, 0);
}

/* A named barrier of warps whose lanes may have had work of their own. */
template <int number, int threads> static __device__ __forceinline__ void meet(void) {
    __syncwarp();
    named_barrier<number, threads>();
}

/* Where fqla__backward_params.progress has what. */
static __device__ __forceinline__ int32_t *taken_items(const fqla__backward_params &p) { return p.progress; }
static __device__ __forceinline__ int32_t *exact_flag(const fqla__backward_params &p, int head_qk) { return p.progress + 1 + head_qk; }
static __device__ __forceinline__ int32_t *ended_chains(const fqla__backward_params &p, int64_t first_chunk, int head_qk) {
    return p.progress + 1 + (first_chunk + 1) * p.forward.heads_qk + head_qk;
}

/* The v-heads that read a q/k head. */
static __device__ __forceinline__ int group_head(const fqla__forward_params &p, int head_qk, int i) {
    return p.head_map == 0 ? head_qk * (p.heads_v / p.heads_qk) + i : i * p.heads_qk + head_qk;
}

#endif
