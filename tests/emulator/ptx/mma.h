/* tests/emulator: ptx/mma.h */
#ifndef FLASHQLA_MMA_H
#define FLASHQLA_MMA_H

#include "element.h"
#include "mbarrier.h"

/* Row `row` of the tile whose rows lanes 8 i .. 8 i + 7 give. */
static inline unsigned char *tile_row(const uint64_t *addresses, int tile, int row) { return shared_bytes + addresses[8 * tile + row]; }

static inline uint16_t tile_element(const uint64_t *addresses, int tile, int row, int column) {
    uint16_t bits;
    memcpy(&bits, tile_row(addresses, tile, row) + 2 * column, sizeof bits);
    return bits;
}

static inline void load_tiles(uint32_t (&r)[4], uint32_t address) {
    const uint64_t *addresses = emulator_exchange(address);
    const int lane = emulator_this_lane();
    for (int i = 0; i < 4; i++) memcpy(&r[i], tile_row(addresses, i, lane / 4) + lane % 4 * 4, 4);
}

static inline void load_tiles_transposed(uint32_t (&r)[4], uint32_t address) {
    const uint64_t *addresses = emulator_exchange(address);
    const int lane = emulator_this_lane();
    for (int i = 0; i < 4; i++)
        r[i] = tile_element(addresses, i, lane % 4 * 2, lane / 4) | (uint32_t)tile_element(addresses, i, lane % 4 * 2 + 1, lane / 4) << 16;
}

static inline void store_tiles(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    const uint64_t *addresses = emulator_exchange(address);
    const uint32_t r[4] = {a, b, c, d};
    const int lane = emulator_this_lane();
    for (int i = 0; i < 4; i++) memcpy(tile_row(addresses, i, lane / 4) + lane % 4 * 4, &r[i], 4);
    __syncwarp();
}

static inline void store_tiles_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    const uint64_t *addresses = emulator_exchange(address);
    const uint32_t r[4] = {a, b, c, d};
    const int lane = emulator_this_lane();
    for (int i = 0; i < 4; i++)
        for (int e = 0; e < 2; e++) {
            const uint16_t bits = (uint16_t)(r[i] >> 16 * e);
            memcpy(tile_row(addresses, i, lane % 4 * 2 + e) + 2 * (lane / 4), &bits, 2);
        }
    __syncwarp();
}

/* a's pair p of lane l: row l/4 + 8 (p%2), columns 2 (l%4) + 8 (p/2) and the next; b's register i: rows 2 (l%4) + 8 i and the next,
   column l/4. k: 16, or 8 for the first halves alone. */
static inline void mma_emulated(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int k) {
    uint64_t left[2][32], right[32];
    memcpy(left[0], emulator_exchange(a[0] | (uint64_t)a[1] << 32), sizeof left[0]);
    memcpy(left[1], emulator_exchange(a[2] | (uint64_t)a[3] << 32), sizeof left[1]);
    memcpy(right, emulator_exchange(b0 | (uint64_t)b1 << 32), sizeof right);
    const int lane = emulator_this_lane();
    for (int e = 0; e < 4; e++) {
        const int row = lane / 4, column = lane % 4 * 2 + e % 2;
        for (int i = 0; i < k; i++) {
            const uint64_t pair = left[i / 8][4 * row + i % 8 / 2] >> (e / 2 * 32 + i % 2 * 16);
            const uint64_t other = right[4 * column + i % 8 / 2] >> (i / 8 * 32 + i % 2 * 16);
            d[e] += from_fp16((uint32_t)pair & 0xffff) * from_fp16((uint32_t)other & 0xffff);
        }
    }
}

static inline void mma_fp16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_emulated(d, a, b0, b1, 16); }
static inline void mma_fp16_first(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    for (int e = 0; e < 4; e++) d[e] = 0.0f;
    mma_emulated(d, a, b0, b1, 16);
}
static inline void mma_fp16_8_first(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    const uint32_t a[4] = {a0, a1, 0, 0};
    for (int e = 0; e < 4; e++) d[e] = 0.0f;
    mma_emulated(d, a, b, 0, 8);
}

static inline uint32_t transpose_tile(uint32_t tile) {
    const uint64_t *tiles = emulator_exchange(tile);
    const int lane = emulator_this_lane(), row = lane / 4;
    uint32_t transposed = 0;
    for (int e = 0; e < 2; e++) {
        const int column = lane % 4 * 2 + e; /* of the transposed one: a row of the tile */
        transposed |= (uint32_t)(tiles[4 * column + row / 2] >> 16 * (row % 2) & 0xffff) << 16 * e;
    }
    return transposed;
}

#endif
