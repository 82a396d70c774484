/* tests/emulator: ptx/mbarrier.h. A barrier: bit 63 its phase, then 15 bits of arrivals it is made for and 16 that are to come, 32 bits of
   bytes to come. */
#ifndef FLASHQLA_MBARRIER_H
#define FLASHQLA_MBARRIER_H

#include <stdint.h>

static inline uint32_t shared_address(const void *pointer) { return (uint32_t)((const unsigned char *)pointer - shared_bytes); }

static inline void mbarrier_init(uint64_t *barrier, uint32_t arrivals) { *barrier = (uint64_t)arrivals << 48 | (uint64_t)arrivals << 32; }
static inline void mbarrier_init_fence(void) {}

/* So many arrivals and bytes fewer; the next phase where nothing is to come. */
static inline void mbarrier_take(uint64_t *barrier, uint32_t arrivals, int32_t bytes) {
    const uint64_t made_for = *barrier >> 48 & 0x7fff;
    uint64_t phase = *barrier >> 63, to_come = (*barrier >> 32 & 0xffff) - arrivals;
    const uint32_t rest = (uint32_t)*barrier - (uint32_t)bytes;
    if (to_come == 0 && rest == 0) phase ^= 1, to_come = made_for;
    *barrier = phase << 63 | made_for << 48 | to_come << 32 | rest;
}

static inline void mbarrier_arrive(uint64_t *barrier) { mbarrier_take(barrier, 1, 0); }
static inline void arrive_warp(uint64_t *barrier, int lane) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier);
}
static inline void mbarrier_arrive_expect(uint64_t *barrier, uint32_t bytes) { mbarrier_take(barrier, 1, -(int32_t)bytes); }
static inline void mbarrier_wait(uint64_t *barrier, uint32_t parity) { emulator_wait_barrier(barrier, parity); }

#endif
