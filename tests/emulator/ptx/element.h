/* tests/emulator: ptx/element.h. Rounding to nearest, ties to even, as the hardware's. */
#ifndef FLASHQLA_ELEMENT_H
#define FLASHQLA_ELEMENT_H

#include <stdint.h>

static inline uint16_t to_bf16(float value) {
    const uint32_t bits = __float_as_uint(value);
    if (value != value) return 0x7fff;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline uint16_t to_fp16(float value) {
    const uint16_t sign = (uint16_t)(__float_as_uint(value) >> 16 & 0x8000);
    const float size = fabsf(value);
    if (value != value) return 0x7fff;
    if (size >= 65520.0f) return sign | 0x7c00;
    /* below 2^-14 the digits have a place of their own; a sum with a large number rounds to it */
    if (size < 6.103515625e-5f) return sign | (uint16_t)(__float_as_uint(size + 0.5f) - __float_as_uint(0.5f));
    const uint32_t bits = __float_as_uint(size) - (112u << 23);
    return sign | (uint16_t)((bits + 0xfff + (bits >> 13 & 1)) >> 13);
}
static inline float from_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }
static inline float from_fp16(uint32_t bits) {
    const uint32_t sign = (bits & 0x8000) << 16, size = bits & 0x7fff;
    if (size < 0x400) return __uint_as_float(__float_as_uint((float)size * 5.9604644775390625e-8f) | sign);
    return __uint_as_float(sign | (size >= 0x7c00 ? 0x7f800000u | (size & 0x3ff) << 13 : (size << 13) + (112u << 23)));
}
static inline uint32_t pack_bf16(float low, float high) { return to_bf16(low) | (uint32_t)to_bf16(high) << 16; }
static inline uint32_t pack_fp16(float low, float high) { return to_fp16(low) | (uint32_t)to_fp16(high) << 16; }

#if defined(FLASHQLA_ELEMENT_BF16)
static inline uint32_t pack_elements(float low, float high) { return pack_bf16(low, high); }
static inline float low_element(uint32_t pair) { return from_bf16(pair); }
static inline float high_element(uint32_t pair) { return from_bf16(pair >> 16); }
#else
static inline uint32_t pack_elements(float low, float high) { return pack_fp16(low, high); }
static inline float low_element(uint32_t pair) { return from_fp16(pair); }
static inline float high_element(uint32_t pair) { return from_fp16(pair >> 16); }
#endif
static inline float emulated_element(uint16_t bits) { return low_element(bits); }

#endif
