/* Single instructions that CUDA has no function for, but wgmma (wgmma.h), the warp's products (mma.h), copies (tma.h), mbarriers
   (mbarrier.h) and conversions (element.h). */
#ifndef FLASHQLA_INSTRUCTIONS_H
#define FLASHQLA_INSTRUCTIONS_H

#include <stdint.h>

static __device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Of a clock that all multiprocessors share. */
static __device__ __forceinline__ uint64_t nanoseconds(void) {
    uint64_t time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time)::"memory");
    return time;
}

/* A value that the compiler takes for a new one: what is computed from it inside a loop stays inside, rather than occupying registers
   for the whole loop. */
static __device__ __forceinline__ int renewed(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

/* Named barriers; 0 is __syncthreads'. By whole warps. */
template <int number, int threads> static __device__ __forceinline__ void named_barrier(void) {
    asm volatile("bar.sync %0, %1;" ::"n"(number), "n"(threads) : "memory");
}

/* Registers a thread, by all of a warpgroup: fewer than the kernel starts with, or more, once others have given some up. */
template <int registers> static __device__ __forceinline__ void shrink_registers(void) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers> static __device__ __forceinline__ void grow_registers(void) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

#endif
