/* A kernel's blocks tell those of the next, which runs beside it, that something is in memory: a count that goes up. */
#ifndef FLASHQLA_PROGRESS_H
#define FLASHQLA_PROGRESS_H

#include <stdint.h>

/* What this thread, or the copy engine for it, has written, and what others have written before they arrived where it waited, is there for
   whoever sees the count. */
static __device__ __forceinline__ void count_up(int32_t *count) {
    asm volatile("fence.proxy.async.global;\n fence.acq_rel.gpu;\n red.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(count) : "memory");
}

/* Where one stands before anything counts: before the block lets the next kernel start. */
static __device__ __forceinline__ void set_count(int32_t *count, int32_t value) {
    asm volatile("st.relaxed.gpu.global.s32 [%0], %1;\n fence.acq_rel.gpu;" ::"l"(count), "r"(value) : "memory");
}

static __device__ __forceinline__ int32_t load_count(const int32_t *count) {
    int32_t value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(count) : "memory");
    return value;
}

/* A number that no one else gets. */
static __device__ __forceinline__ int32_t take_number(int32_t *next) {
    int32_t number;
    asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], 1;" : "=r"(number) : "l"(next) : "memory");
    return number;
}

/* Until the count is `wanted`: by those whose blocks run already or have ended. What is there then this thread's copies may read. Built with
   -DFLASHQLA_BOUNDED_WAIT it traps after about ten seconds. */
static __device__ __forceinline__ void wait_count(const int32_t *count, int32_t wanted) {
#ifdef FLASHQLA_BOUNDED_WAIT
    uint32_t tries = 0;
#endif
    while (load_count(count) < wanted) {
        asm volatile("nanosleep.u32 200;");
#ifdef FLASHQLA_BOUNDED_WAIT
        if (++tries == 50000000u) __trap();
#endif
    }
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

#endif
