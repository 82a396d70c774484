/* The 16-bit floats: to float32 exactly, and to bf16 rounded to nearest even. */
#ifndef HALF_H
#define HALF_H

#include <stdint.h>
#include <string.h>

static inline float half_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float half_from_bf16(uint16_t half) { return half_from_bits((uint32_t)half << 16); }

static inline float half_from_fp16(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 0x3ff;
    const float subnormal = (float)mantissa / 16777216.0f; /* mantissa 2^-24 */
    if (exponent == 0) return sign ? -subnormal : subnormal;
    return half_from_bits(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13);
}

static inline uint16_t half_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40); /* NaN stays NaN */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#endif
