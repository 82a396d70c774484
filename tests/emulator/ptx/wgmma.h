/* tests/emulator: ptx/wgmma.h */
#ifndef FLASHQLA_WGMMA_H
#define FLASHQLA_WGMMA_H

#include "element.h"
#include "mbarrier.h"

/* Where something lies in shared memory, in units of 16 bytes: what descriptors count in. Worked out once; what lies a constant further
   is an addition. Taken from one lane, so that the compiler keeps it, and the descriptors, in uniform registers. */
static inline uint32_t shared_units(const void *pointer) {
    return __shfl_sync(0xffffffffu, (shared_address(pointer) & 0x3ffffu) >> 4, 0);
}

/* A tile of rows of 64 elements (128 bytes, swizzled by 8 rows, 1024-byte aligned). The operand's N (or M) runs over the rows and its k
   along them: a step of 16 in k is 2 units on. For a transposed operand N runs along the rows, 64 at a time, and k over the rows:
   a step of 16 in k is 128 units on, and the next 64 of N lie next_columns units on. */
static inline uint64_t tile_descriptor(uint32_t units, uint32_t next_columns) {
    const uint64_t eight_rows = 1024 >> 4, swizzle_128b = 1;
    return (units | next_columns << 16) | eight_rows << 32 | swizzle_128b << 62;
}

static inline void wgmma_fence(void) {}
static inline void wgmma_commit(void) { emulator_commit_products(); }
template <int pending> static inline void wgmma_wait(void) { emulator_wait_products(pending); }
template <int count> static inline void wgmma_settle(float (&)[count]) {}

static inline void wgmma_emulated(int n, bool adds, float *d, const uint32_t *a, bool a_rows, uint64_t a_descriptor, bool b_rows,
                                  uint64_t b) {
    emulator_multiply({n, adds, a_rows, b_rows, a_descriptor, b, emulated_element}, d, a);
}

static inline void wgmma_64x64(float (&d)[32], const uint32_t *a, uint64_t b) { wgmma_emulated(64, true, d, a, false, 0, false, b); }
static inline void wgmma_64x64_first(float (&d)[32], const uint32_t *a, uint64_t b) { wgmma_emulated(64, false, d, a, false, 0, false, b); }
static inline void wgmma_64x64_again(float (&d)[32], const uint32_t *a, uint64_t b) { wgmma_emulated(64, false, d, a, false, 0, false, b); }
static inline void wgmma_64x128_transposed(float (&d)[64], const uint32_t *a, uint64_t b) { wgmma_emulated(128, true, d, a, false, 0, true, b); }
static inline void wgmma_64x64_shared(float (&d)[32], uint64_t a, uint64_t b) { wgmma_emulated(64, true, d, NULL, false, a, false, b); }
static inline void wgmma_64x64_shared_first(float (&d)[32], uint64_t a, uint64_t b) { wgmma_emulated(64, false, d, NULL, false, a, false, b); }
template <int a_transposed> static inline void wgmma_64x32_shared(float (&d)[16], uint64_t a, uint64_t b) {
    wgmma_emulated(32, true, d, NULL, a_transposed != 0, a, false, b);
}
static inline void wgmma_64x64_transposed(float (&d)[32], const uint32_t *a, uint64_t b) { wgmma_emulated(64, true, d, a, false, 0, true, b); }
static inline void wgmma_64x64_transposed_again(float (&d)[32], const uint32_t *a, uint64_t b) {
    wgmma_emulated(64, false, d, a, false, 0, true, b);
}
static inline void wgmma_64x128_shared(float (&d)[64], uint64_t a, uint64_t b) { wgmma_emulated(128, true, d, NULL, false, a, true, b); }
static inline void wgmma_64x128_shared_first(float (&d)[64], uint64_t a, uint64_t b) { wgmma_emulated(128, false, d, NULL, false, a, true, b); }
static inline void wgmma_64x128_shared_both(float (&d)[64], uint64_t a, uint64_t b) { wgmma_emulated(128, true, d, NULL, true, a, true, b); }

#endif
