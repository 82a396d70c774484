/* mbarriers in shared memory: one function an instruction. Addresses are 32-bit shared-memory addresses. */
#ifndef FLASHQLA_MBARRIER_H
#define FLASHQLA_MBARRIER_H

#include <stdint.h>

static __device__ __forceinline__ uint32_t shared_address(const void *pointer) { return (uint32_t)__cvta_generic_to_shared(pointer); }

static __device__ __forceinline__ void mbarrier_init(uint64_t *barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

/* Makes the inits visible to the copy engine. */
static __device__ __forceinline__ void mbarrier_init_fence(void) { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

static __device__ __forceinline__ void mbarrier_arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

/* What the warp has read or written is there for others. */
static __device__ __forceinline__ void arrive_warp(uint64_t *barrier, int lane) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier);
}

/* Arrive, and announce the bytes that copies will bring. */
static __device__ __forceinline__ void mbarrier_arrive_expect(uint64_t *barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

/* Has the phase of this parity completed? Waits a moment for it. */
static __device__ __forceinline__ bool mbarrier_try(uint64_t *barrier, uint32_t parity) {
    uint32_t done;
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
    return done != 0;
}

/* Wait for the completion of the phase of this parity. Built with -DFLASHQLA_BOUNDED_WAIT it traps after about ten seconds. */
static __device__ __forceinline__ void mbarrier_wait(uint64_t *barrier, uint32_t parity) {
#ifdef FLASHQLA_BOUNDED_WAIT
    uint32_t tries = 0;
#endif
    while (!mbarrier_try(barrier, parity)) {
#ifdef FLASHQLA_BOUNDED_WAIT
        if (++tries == 10000000u) __trap();
#endif
    }
}

#endif
