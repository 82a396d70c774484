/* dg and dbeta from what the producers of backward_gradients leave of a step, by a warp of its own: a chunk's sums are a chain of
   latencies.

       dg_t    = sum_{i>=t} (q_i . dQ_i + k_i . (dKK K - w dW S0^T)_i - k_i . (dP^T Q + dKK^T K)_i) + sum_{i<t} H_i + gamma_C <dS1, S0>
       dbeta_j = (dW Vn^T)_jj / beta_j^2

   with dQ and dP of this v-head and without dP's diagonal (backward_rows.h). H enters as a prefix sum, not as -H_i and the sum of
   all: dg is far smaller than they are. */
#ifndef FLASHQLA_BACKWARD_GATES_H
#define FLASHQLA_BACKWARD_GATES_H

#include "backward_rows.h"
#include "gates.h"

/* A lane's tokens: lane and lane + 32. */
enum { TOKENS = CHUNK / WARP };

static __device__ __forceinline__ void store_gate(void *to, int64_t index, float value, bool raw) {
    if (!raw) ((float *)to)[index] = value;
    else ((uint16_t *)to)[index] = (uint16_t)pack_elements(value, 0.0f);
}

/* dg and dbeta of a head, through the raw forms where the plan has them. By one warp. */
static __device__ __forceinline__ void finish_gates(const fqla__backward_params &p, const HeadSums &sums, const Place &place,
                                                    int head, int lane) {
    const fqla__forward_params &f = p.forward;
    const fqla__factors &factors = f.prepared[place.number * f.heads_v + head].factors;
    const float states = sum_warp(sums.states[lane] + sums.states[lane + WARP]) * p.unit * __ldg(&factors.gamma_chunk);
    float g[TOKENS], b[TOKENS], betas[TOKENS], dg[TOKENS], prefix[TOKENS]; /* g, b as given */
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const int64_t row = place.row + (lane + WARP * t < place.valid ? lane + WARP * t : 0);
        g[t] = load_gate(f.g, row * f.g_token + head * f.g_head, f.gate == 2);
        b[t] = f.beta_form == 1 ? load_gate(f.beta, row * f.beta_token + head * f.beta_head, true) : 0.0f;
        betas[t] = __ldg(&factors.beta[lane + WARP * t]);
    }
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const int token = lane + WARP * t;
        dg[t] = (sums.query[0][token] + sums.query[1][token]) + (sums.key[0][token] + (2.0f * sums.read[token] - sums.key[2][token]));
        prefix[t] = sums.key[1][token];
    }
#pragma unroll
    for (int step = 1; step < WARP; step *= 2)
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            const float right = __shfl_down_sync(0xffffffffu, dg[t], step), left = __shfl_up_sync(0xffffffffu, prefix[t], step);
            if (lane + step < WARP) dg[t] += right;
            if (lane >= step) prefix[t] += left;
        }
    const float upper = __shfl_sync(0xffffffffu, dg[1], 0), lower = __shfl_sync(0xffffffffu, prefix[0], WARP - 1);
    dg[0] += upper;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        prefix[t] = __shfl_up_sync(0xffffffffu, prefix[t], 1);
        if (lane == 0) prefix[t] = 0.0f;
    }
    prefix[1] += lower;

    float dA_log = 0.0f, ddt_bias = 0.0f;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const int token = lane + WARP * t;
        const float beta = betas[t];
        float value = dg[t] + prefix[t] + states,
              dbeta = fabsf(beta) < LEAST_BETA ? sums.tiny[token] : sums.diagonal[token] / (beta * beta);
        if (f.gate == 2) { /* FQLA_GATE_RAW: g = rate softplus(raw) */
            const float raw = g[t] + __ldg(f.dt_bias + head), rate = -expf(__ldg(f.A_log + head));
            const float log_alpha = rate * (raw > 20.0f ? raw : log1pf(expf(raw)));
            if (log_alpha < -104.0f) value = 0.0f;
            else if (token < place.valid) {
                dA_log += value * log_alpha;
                value *= rate * (raw > 20.0f ? 1.0f : 1.0f / (1.0f + expf(-raw)));
                ddt_bias += value;
            }
        } else if (g[t] < -104.0f) {
            value = 0.0f;
        }
        if (f.beta_form == 1) dbeta *= beta / (1.0f + expf(b[t])); /* the derivative is beta (1 - sigmoid b) */
        if (token < place.valid) {
            const int64_t row = place.row + token;
            store_gate(p.dg, row * f.g_token + head * f.g_head, value, f.gate == 2);
            store_gate(p.dbeta, row * f.beta_token + head * f.beta_head, dbeta, f.beta_form == 1);
        }
    }
    if (f.gate == 2) {
        dA_log = sum_warp(dA_log);
        ddt_bias = sum_warp(ddt_bias);
        if (lane == 0) *(float2 *)&p.gate_sums[(place.number * f.heads_v + head) * 2] = make_float2(dA_log, ddt_bias);
    }
}

/* Step by step. */
static __device__ void run_gates(const fqla__backward_params &p, GradientsShared &s, int lane) {
    const int heads = p.forward.heads_v / p.forward.heads_qk;
    for (int n = 0;; n++) {
        mbarrier_wait(&s.sums_full[n % SUMS], n / SUMS % 2);
        __syncwarp();
        const Place &place = s.places[n / heads % PLACES];
        if (place.valid == 0) return;
        finish_gates(p, s.sums[n % SUMS], place, group_head(p.forward, place.head_qk, n % heads), lane);
        arrive_warp(&s.sums_free[n % SUMS], lane);
    }
}

#endif
