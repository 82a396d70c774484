/* Gates on the device: log2 alpha and beta of a token from what the plan's forms give. */
#ifndef FLASHQLA_GATES_H
#define FLASHQLA_GATES_H

#include "../src/cuda_params.h"
#include "element.h"
#include "instructions.h"

/* One 16-bit element or float32 of a gate tensor. */
static __device__ __forceinline__ float load_gate(const void *tensor, int64_t index, bool raw) {
    if (!raw) return __ldg((const float *)tensor + index);
    return low_element(__ldg((const uint16_t *)tensor + index));
}

/* log2 alpha from the plan's gate form; clamped where alpha is 0 in float32. NaN passes. */
static __device__ __forceinline__ float log2_alpha(const fqla__forward_params &p, int32_t head, float g) {
    const float log2_e = 1.4426950408889634f, least = -104.0f * log2_e;
    float log2_g = g * log2_e;
    if (p.gate == 1) { /* FQLA_GATE_LINEAR */
        log2_g = log2f(g);
    } else if (p.gate == 2) { /* FQLA_GATE_RAW */
        const float x = g + __ldg(p.dt_bias + head);
        log2_g = -expf(__ldg(p.A_log + head)) * (x > 20.0f ? x : log1pf(expf(x))) * log2_e;
    }
    return log2_g < least ? least : log2_g;
}

static __device__ __forceinline__ float plain_beta(const fqla__forward_params &p, float beta) {
    if (p.beta_form == 0) return beta; /* FQLA_BETA_PLAIN */
    return (p.negative_eigenvalues ? 2.0f : 1.0f) / (1.0f + expf(-beta));
}

#endif
