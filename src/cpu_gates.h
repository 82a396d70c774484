// >>cpu_gates: log alpha and beta of a token from what the plan's forms give

static float fqla__softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }
static float fqla__sigmoid(float x) { return x >= 0.0f ? 1.0f / (1.0f + expf(-x)) : expf(x) / (1.0f + expf(x)); }

enum { FQLA__LEAST_LOG_ALPHA = -104 }; /* exp of it is 0 in float32; NaN passes the clamp */

/* alpha of v-head h from its element of g. */
static float fqla__alpha(const fqla_plan_desc *desc, float g, const float *A_log, const float *dt_bias, int32_t h) {
    if (desc->gate == FQLA_GATE_LINEAR) return g;
    if (desc->gate == FQLA_GATE_RAW) g = -expf(A_log[h]) * fqla__softplus(g + dt_bias[h]);
    return g < (float)FQLA__LEAST_LOG_ALPHA ? 0.0f : expf(g);
}

static float fqla__beta(const fqla_plan_desc *desc, float beta) {
    if (desc->beta == FQLA_BETA_PLAIN) return beta;
    return desc->negative_eigenvalues ? 2.0f * fqla__sigmoid(beta) : fqla__sigmoid(beta);
}

/* What l2norm multiplies a row of q or k with. */
static float fqla__l2norm_factor(float sum_of_squares) { return 1.0f / sqrtf(sum_of_squares + 1e-6f); }
