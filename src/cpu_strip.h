// >>cpu_strip: 16 tokens of a v-head, forward and in reverse, from products of small matrices

/*
    With S the state before the strip and D the gradient of the state after it, both [D_k, D_v], a_i and b_i alpha and beta of
    token i, L_ij = a_{j+1} .. a_i (1 for i = j), c_i = a_0 .. a_i and e_i = a_{i+1} .. a_last:

        r_i  = v_i - c_i S^T k_i - sum_{j<i} L_ij (k_i . k_j) b_j r_j          token i adds k_i (b_i r_i)^T to the state
        S'   = c_last S + sum_i k_i (e_i b_i r_i)^T                            the state after the strip
        p_i  = e_i D^T k_i + sum_{t>=i} L_ti scale (q_t . k_i) do_t
                           - sum_{t>i}  L_ti (k_t . k_i) b_t p_t               gradient of b_i r_i
        dv_i = b_i p_i,   dbeta_i = p_i . r_i
        D'   = c_last D + sum_t c_t (scale q_t do_t^T - k_t (b_t p_t)^T)       gradient of the state before the strip

    With W_ts = scale L_ts b_s (do_t . r_s) for t >= s and Z_ts = L_ts b_t b_s (p_t . r_s) for t > s, 0 elsewhere:

        dq_i = scale c_i S do_i + sum_s W_is k_s
        dk_i = e_i b_i D r_i - c_i b_i S p_i + sum_t (W_ti q_t - Z_ti k_t) - sum_s Z_is k_s

    The gradient of log a_i is all that passes the decay of token i, from S or a token s < i to D or a token t >= i:

        dg_i = c_last <D, S> + sum_{t>=i} c_t (scale q_t . S do_t - b_t k_t . S p_t) + sum_{s<i} e_s b_s k_s . D r_s
             + sum_{s<i<=t} (W_ts (q_t . k_s) - Z_ts (k_t . k_s))

    Each of its terms has a_i in it. Nothing is added to be subtracted again: the small dg of a strong gate keeps its digits, and
    that of alpha = 0 is 0. All decays are products of alphas, none a quotient.
*/
enum { FQLA__STRIP = 16, FQLA__PAIR = 2 * FQLA__STRIP, FQLA__TRIPLE = 3 * FQLA__STRIP };

typedef float fqla__square[FQLA__STRIP][FQLA__STRIP];

/* float32 arrays of a strip; rows past the sequence are zero, with alpha 1 and beta 0. width: D_v rounded up to 16, zero past D_v.
   Arrays without a name of their own follow the one that is named. */
typedef struct fqla__strip {
    int64_t row; /* of the first token in the tensors */
    int32_t len; /* tokens, 1 to 16 */

    /* of the q/k head */
    float *q, *k;    /* [16, D_k] each, k after q; normalised where the plan asks for it */
    float *norms;    /* [32]: what l2norm multiplied q's and k's rows with */
    float *columns;  /* [D_k, 32]: q and k, transposed */
    float *qk, *kk;  /* [16, 16] each, kk after qk: q_t . k_s, k_t . k_s */
    float *dcolumns; /* [D_k, 32]: dq and dk, transposed, summed over v-heads, but for: */
    float *mix;      /* [32, 32]: what they have of q and k: W and Z, summed over v-heads */

    /* of the v-head at hand */
    float *state;                 /* [D_k, width]: S, if it is not the chunk's */
    float *along, *given, *p, *r; /* [16, width] each, one after another: S^T k or D^T k; v or do; p; r */
    float alpha[FQLA__STRIP], beta[FQLA__STRIP];
    float from_start[FQLA__STRIP]; /* c */
    fqla__square decay;            /* L, 0 above its diagonal; its last row is e */
    float dg[FQLA__STRIP], dbeta[FQLA__STRIP]; /* of log alpha and beta */
} fqla__strip;

/* What the strips of a thread share. */
typedef struct fqla__strip_desk {
    fqla_cpu_level level;
    int32_t dim_k, width;
    float scale;
    float *scaled;  /* [32, width]: rows times the factors with which they enter S' or D' */
    float *turned;  /* [width, 48]: do, p and r, transposed */
    float *crossed; /* [D_k, 48]: S do, S p, D r */
} fqla__strip_desk;

/* q and k have come. */
static void fqla__strip_set_qk(const fqla__strip_desk *desk, const fqla__strip *strip) {
    const int32_t dim_k = desk->dim_k;
    fqla__row_transpose(desk->level, strip->columns, FQLA__PAIR, strip->q, dim_k, dim_k, FQLA__PAIR);
    fqla__multiply(desk->level, FQLA__PAIR, FQLA__STRIP, dim_k, strip->qk, FQLA__STRIP, fqla__matrix_of(strip->q, dim_k),
                   fqla__matrix_of(strip->columns + FQLA__STRIP, FQLA__PAIR));
}

/* alpha has come. */
static void fqla__strip_set_alpha(fqla__strip *strip) {
    float product = 1.0f;
    int32_t i, j;
    for (i = 0; i < FQLA__STRIP; i++) {
        product *= strip->alpha[i];
        strip->from_start[i] = product;
        for (j = 0; j < FQLA__STRIP; j++)
            strip->decay[i][j] = j < i ? strip->decay[i - 1][j] * strip->alpha[i] : j == i ? 1.0f : 0.0f;
    }
}

/* The inverse of I + the part of `lower` below its diagonal. */
static void fqla__strip_invert(fqla__square inverse, fqla__square lower) {
    int32_t i, j, x;
    for (i = 0; i < FQLA__STRIP; i++) {
        float row[FQLA__STRIP];
        for (x = 0; x < FQLA__STRIP; x++) row[x] = x == i ? 1.0f : 0.0f;
        for (j = 0; j < i; j++)
            for (x = 0; x < FQLA__STRIP; x++) row[x] -= lower[i][j] * inverse[j][x];
        memcpy(inverse[i], row, sizeof row);
    }
}

/* v has come: r = X (v - c S^T k) with X = (I + L kk b)^-1. */
static void fqla__strip_residuals(const fqla__strip_desk *desk, const fqla__strip *strip, const float *state) {
    const int32_t dim_k = desk->dim_k, width = desk->width;
    fqla__square lower, inverse;
    float factors[FQLA__STRIP][FQLA__PAIR]; /* of S^T k and v */
    int32_t i, j;
    for (i = 0; i < FQLA__STRIP; i++)
        for (j = 0; j < FQLA__STRIP; j++) lower[i][j] = strip->decay[i][j] * strip->kk[i * FQLA__STRIP + j] * strip->beta[j];
    fqla__strip_invert(inverse, lower);
    for (i = 0; i < FQLA__STRIP; i++)
        for (j = 0; j < FQLA__STRIP; j++) {
            factors[i][j] = -inverse[i][j] * strip->from_start[j];
            factors[i][FQLA__STRIP + j] = inverse[i][j];
        }
    fqla__multiply(desk->level, FQLA__STRIP, width, dim_k, strip->along, width, fqla__matrix_of(strip->k, dim_k),
                   fqla__matrix_of(state, width));
    fqla__multiply(desk->level, FQLA__STRIP, width, FQLA__PAIR, strip->r, width, fqla__matrix_of(factors[0], FQLA__PAIR),
                   fqla__matrix_of(strip->along, width));
}

/* The state after the strip; it may take the place of the one before. */
static void fqla__strip_advance(const fqla__strip_desk *desk, const fqla__strip *strip, const float *state, float *next) {
    const int32_t width = desk->width, last = FQLA__STRIP - 1;
    int32_t t;
    for (t = 0; t < FQLA__STRIP; t++)
        fqla__scale_to(desk->scaled + t * width, strip->r + t * width, strip->decay[last][t] * strip->beta[t], width);
    fqla__multiply_add(desk->level, desk->dim_k, width, FQLA__STRIP, next, width, strip->from_start[last], state,
                       fqla__matrix_of(strip->columns + FQLA__STRIP, FQLA__PAIR), fqla__matrix_of(desk->scaled, width));
}

/* do has come: p = Y^T (e D^T k + M do) with Y = (I + b L kk)^-1 and M_it = L_ti scale (q_t . k_i). */
static void fqla__strip_adjoints(const fqla__strip_desk *desk, const fqla__strip *strip, const float *dstate) {
    const int32_t dim_k = desk->dim_k, width = desk->width, last = FQLA__STRIP - 1;
    fqla__square lower, inverse, turned, from_do;
    float factors[FQLA__STRIP][FQLA__PAIR]; /* of D^T k and do */
    int32_t i, j;
    for (i = 0; i < FQLA__STRIP; i++)
        for (j = 0; j < FQLA__STRIP; j++) {
            lower[i][j] = strip->decay[i][j] * strip->kk[i * FQLA__STRIP + j] * strip->beta[i];
            from_do[j][i] = strip->decay[i][j] * strip->qk[i * FQLA__STRIP + j] * desk->scale;
        }
    fqla__strip_invert(inverse, lower);
    for (i = 0; i < FQLA__STRIP; i++)
        for (j = 0; j < FQLA__STRIP; j++) {
            turned[i][j] = inverse[j][i];
            factors[i][j] = inverse[j][i] * strip->decay[last][j];
        }
    fqla__multiply(desk->level, FQLA__STRIP, FQLA__STRIP, FQLA__STRIP, factors[0] + FQLA__STRIP, FQLA__PAIR,
                   fqla__matrix_of(turned[0], FQLA__STRIP), fqla__matrix_of(from_do[0], FQLA__STRIP));
    fqla__multiply(desk->level, FQLA__STRIP, width, dim_k, strip->along, width, fqla__matrix_of(strip->k, dim_k),
                   fqla__matrix_of(dstate, width));
    fqla__multiply(desk->level, FQLA__STRIP, width, FQLA__PAIR, strip->p, width, fqla__matrix_of(factors[0], FQLA__PAIR),
                   fqla__matrix_of(strip->along, width));
}

/* What passes the strip's borders: to dcolumns, and to dg in the order of do, p, r (see crossed), times factors. */
static void fqla__strip_borders(const fqla__strip_desk *desk, const fqla__strip *strip, const float *factors, float *flows) {
    int32_t i, x;
    for (x = 0; x < FQLA__TRIPLE; x++) flows[x] = 0.0f;
    for (i = 0; i < desk->dim_k; i++) {
        const float *__restrict crossed = desk->crossed + i * FQLA__TRIPLE;
        const float *__restrict q = strip->columns + i * FQLA__PAIR, *__restrict k = q + FQLA__STRIP;
        float *__restrict dq = strip->dcolumns + i * FQLA__PAIR, *__restrict dk = dq + FQLA__STRIP;
        for (x = 0; x < FQLA__STRIP; x++) {
            const float by_do = factors[x] * crossed[x];
            const float by_p = factors[FQLA__STRIP + x] * crossed[FQLA__STRIP + x];
            const float by_r = factors[FQLA__PAIR + x] * crossed[FQLA__PAIR + x];
            dq[x] += by_do;
            dk[x] += by_p + by_r;
            flows[x] += q[x] * by_do;
            flows[FQLA__STRIP + x] += k[x] * by_p;
            flows[FQLA__PAIR + x] += k[x] * by_r;
        }
    }
}

/* p and r are there: what the v-head adds to dq and dk, its dg and dbeta; dstate: D, and then D'. */
static void fqla__strip_gradients(const fqla__strip_desk *desk, fqla__strip *strip, const float *state, float *dstate) {
    const int32_t dim_k = desk->dim_k, width = desk->width, last = FQLA__STRIP - 1;
    const fqla__matrix given = fqla__matrix_of(strip->given, width), turned = fqla__matrix_of(desk->turned, FQLA__TRIPLE);
    const fqla__matrix turned_r = fqla__matrix_of(desk->turned + FQLA__PAIR, FQLA__TRIPLE);
    float factors[FQLA__TRIPLE];                 /* of do, p and r where they enter D', D' and S' */
    float flows[FQLA__TRIPLE];                   /* from S to token t by do_t, by p_t; from token s to D by r_s */
    float through;                               /* from S to D, and then from all tokens before i as well */
    float arriving[FQLA__STRIP];                 /* at token t, likewise */
    fqla__square between;                        /* from token s to token t, at [s][t] */
    float products[2][FQLA__STRIP][FQLA__STRIP]; /* do_t . r_s, p_t . r_s */
    int32_t i, s, t;
    for (t = 0; t < FQLA__STRIP; t++) {
        factors[t] = desk->scale * strip->from_start[t];
        factors[FQLA__STRIP + t] = -strip->from_start[t] * strip->beta[t];
        factors[FQLA__PAIR + t] = strip->decay[last][t] * strip->beta[t];
    }
    fqla__row_transpose(desk->level, desk->turned, FQLA__TRIPLE, strip->given, width, width, FQLA__TRIPLE);
    fqla__multiply(desk->level, dim_k, FQLA__PAIR, width, desk->crossed, FQLA__TRIPLE, fqla__matrix_of(state, width), turned);
    fqla__multiply(desk->level, dim_k, FQLA__STRIP, width, desk->crossed + FQLA__PAIR, FQLA__TRIPLE, fqla__matrix_of(dstate, width),
                   turned_r);
    fqla__multiply(desk->level, FQLA__PAIR, FQLA__STRIP, width, products[0][0], FQLA__STRIP, given, turned_r);
    fqla__strip_borders(desk, strip, factors, flows);

    for (t = 0; t < FQLA__STRIP; t++)
        for (s = 0; s <= t; s++) {
            const float decay = strip->decay[t][s] * strip->beta[s];
            const float w = desk->scale * decay * products[0][t][s];
            const float z = s < t ? decay * strip->beta[t] * products[1][t][s] : 0.0f;
            float *q_t = strip->mix + t * FQLA__PAIR, *k_t = q_t + FQLA__STRIP * FQLA__PAIR;
            float *k_s = strip->mix + (FQLA__STRIP + s) * FQLA__PAIR;
            k_s[t] += w;               /* in dq_t */
            q_t[FQLA__STRIP + s] += w; /* in dk_s */
            k_s[FQLA__STRIP + t] -= z; /* in dk_t */
            k_t[FQLA__STRIP + s] -= z; /* in dk_s */
            between[s][t] = w * strip->qk[t * FQLA__STRIP + s] - z * strip->kk[t * FQLA__STRIP + s];
        }

    through = strip->from_start[last] * fqla__inner_product(desk->level, dstate, state, dim_k * width);
    for (t = 0; t < FQLA__STRIP; t++) arriving[t] = flows[t] + flows[FQLA__STRIP + t];
    for (i = 0; i < FQLA__STRIP; i++) {
        strip->dbeta[i] = products[1][i][i];
        strip->dg[i] = through;
        for (t = i; t < FQLA__STRIP; t++) strip->dg[i] += arriving[t];
        through += flows[FQLA__PAIR + i];
        for (t = i + 1; t < FQLA__STRIP; t++) arriving[t] += between[i][t];
    }

    for (t = 0; t < FQLA__PAIR; t++) fqla__scale_to(desk->scaled + t * width, strip->given + t * width, factors[t], width);
    fqla__multiply_add(desk->level, dim_k, width, FQLA__PAIR, dstate, width, strip->from_start[last], dstate,
                       fqla__matrix_of(strip->columns, FQLA__PAIR), fqla__matrix_of(desk->scaled, width));
}

/* All v-heads have added to dq and dk: their rows, to [32, D_k]. */
static void fqla__strip_finish(const fqla__strip_desk *desk, const fqla__strip *strip, float *rows) {
    fqla__multiply_add(desk->level, desk->dim_k, FQLA__PAIR, FQLA__PAIR, strip->dcolumns, FQLA__PAIR, 1.0f, strip->dcolumns,
                       fqla__matrix_of(strip->columns, FQLA__PAIR), fqla__matrix_of(strip->mix, FQLA__PAIR));
    fqla__row_transpose(desk->level, rows, desk->dim_k, strip->dcolumns, FQLA__PAIR, FQLA__PAIR, desk->dim_k);
}
