/* tests/emulator: ptx/mbarrier.h */
#ifndef FLASHQLA_MBARRIER_H
#define FLASHQLA_MBARRIER_H

#include <stdint.h>

static inline uint32_t shared_address(const void *pointer) { return (uint32_t)((const unsigned char *)pointer - shared_bytes); }

static inline void mbarrier_init(uint64_t *barrier, uint32_t arrivals) { emulator_start_barrier(barrier, arrivals); }
static inline void mbarrier_init_fence(void) {}

static inline void mbarrier_arrive(uint64_t *barrier) { emulator_take(barrier, 1, 0); }
static inline void arrive_warp(uint64_t *barrier, int lane) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier);
}
static inline void mbarrier_arrive_expect(uint64_t *barrier, uint32_t bytes) { emulator_take(barrier, 1, -(int32_t)bytes); }
static inline void mbarrier_wait(uint64_t *barrier, uint32_t parity) { emulator_wait_barrier(barrier, parity); }

#endif
