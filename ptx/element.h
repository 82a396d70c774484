/* The 16-bit type of q, k, v, o: one kernel image each, chosen by -DFLASHQLA_ELEMENT_BF16 or -DFLASHQLA_ELEMENT_FP16. */
#ifndef FLASHQLA_ELEMENT_H
#define FLASHQLA_ELEMENT_H

#include <stdint.h>

#if defined(FLASHQLA_ELEMENT_BF16)
#define ELEMENT_PTX "bf16"
#elif defined(FLASHQLA_ELEMENT_FP16)
#define ELEMENT_PTX "f16"
#else
#error "define FLASHQLA_ELEMENT_BF16 or FLASHQLA_ELEMENT_FP16"
#endif

/* Two float32 rounded to a register of two elements, low first. */
static __device__ __forceinline__ uint32_t pack_elements(float low, float high) {
    uint32_t pair;
    asm("cvt.rn." ELEMENT_PTX "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

static __device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

static __device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

static __device__ __forceinline__ float from_fp16(uint32_t bits) {
    float value;
    asm("{.reg .b16 half; cvt.u16.u32 half, %1; cvt.f32.f16 %0, half;}" : "=f"(value) : "r"(bits & 0xffffu));
    return value;
}

static __device__ __forceinline__ float from_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }

static __device__ __forceinline__ uint16_t to_bf16(float value) {
    uint16_t half;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}

/* The low and the high element of a pair. */
#if defined(FLASHQLA_ELEMENT_BF16)
static __device__ __forceinline__ float low_element(uint32_t pair) { return __uint_as_float(pair << 16); }
static __device__ __forceinline__ float high_element(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
#else
static __device__ __forceinline__ float low_element(uint32_t pair) { return from_fp16(pair); }
static __device__ __forceinline__ float high_element(uint32_t pair) { return from_fp16(pair >> 16); }
#endif

#endif
