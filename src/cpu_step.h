// >>cpu_step: a tile of tokens through a block of state columns

/*
    The recurrence takes the tokens of a (sequence, head) in tiles of 4 (and singly at the end), so that a vector of state is
    loaded twice and stored once for 4 tokens, and takes 3 1/4 multiply-adds a token where the recurrence takes 4. With S the
    state before the tile, a_c, b_c = alpha, beta of token c, G_c = a_0 .. a_c and D_cj = a_{j+1} .. a_c (1 for c = j), the
    values u_c that the tile writes, its outputs and the state after it are

        u_c = b_c (v_c - G_c S^T k_c - sum_{j<c} D_cj (k_c . k_j) u_j)
        o_c = scale (G_c S^T q_c + sum_{j<=c} D_cj (q_c . k_j) u_j)
        S'  = G_last S + sum_j k_j (D_last,j u_j)^T

    which is the recurrence of the manual with its states written out. All decays are products of alphas, so that alpha = 0
    needs no care, and only j <= c occurs: a token never sees a later one. Columns of S, v, o and u are independent of one another:
    a column's bits do not depend on the block that it is in.
*/
enum {
    FQLA__TILE = 4,     /* tokens */
    FQLA__COLUMNS = 32, /* that a step takes at once: at D_k = 128 their state is 16 KB, which stays in an L1 cache */
    FQLA__MOST_COLUMNS = 256
};

/* A tile of `count` tokens, 4 or 1. The first part is that of a q/k head, the second that of one of its v-heads: the scalars of the
   formulas, multiplied out. */
typedef struct fqla__tile {
    int32_t count;
    const float *k, *q;               /* [count, D_k] */
    float kk[FQLA__TILE][FQLA__TILE]; /* k_c . k_j, j < c */
    float qk[FQLA__TILE][FQLA__TILE]; /* q_c . k_j, j <= c */

    float uv[FQLA__TILE];             /* what u_c takes of v_c:     b_c */
    float us[FQLA__TILE];             /* what u_c takes of S^T k_c: -b_c G_c */
    float uu[FQLA__TILE][FQLA__TILE]; /* what u_c takes of u_j:     -b_c D_cj (k_c . k_j) */
    float os[FQLA__TILE];             /* what o_c takes of S^T q_c: scale G_c */
    float ou[FQLA__TILE][FQLA__TILE]; /* what o_c takes of u_j:     scale D_cj (q_c . k_j) */
    float su[FQLA__TILE];             /* what S' takes of k_j u_j^T: D_last,j */
    float ss;                         /* what S' takes of S:        G_last */
} fqla__tile;

/* Rows of float32, `stride` elements apart. */
typedef struct fqla__rows {
    float *row;
    int64_t stride;
} fqla__rows;

/* Some columns of a tile's tensors: the state before and after, which may coincide, and rows of v and o. */
typedef struct fqla__block {
    int32_t columns;     /* a multiple of FQLA__COLUMNS; of 8 on layout VK */
    fqla__rows from, to; /* [D_k] rows; on layout VK [columns] */
    fqla__rows v, o;     /* [count] rows */
} fqla__block;

static void fqla__tile_products_plain(fqla__tile *tile, int32_t dim_k) {
    int32_t c, j;
    for (c = 0; c < tile->count; c++)
        for (j = 0; j <= c; j++) {
            if (j < c) tile->kk[c][j] = fqla__dot(tile->k + c * dim_k, tile->k + j * dim_k, dim_k);
            tile->qk[c][j] = fqla__dot(tile->q + c * dim_k, tile->k + j * dim_k, dim_k);
        }
}

/* The scalars of a v-head; alpha, beta [count]. */
static void fqla__tile_scalars(fqla__tile *tile, const float *alpha, const float *beta, float scale) {
    float decay[FQLA__TILE]; /* D_cj of the c at hand */
    float from_start = 1.0f; /* G_c */
    int32_t c, j;
    for (c = 0; c < tile->count; c++) {
        from_start *= alpha[c];
        for (j = 0; j < c; j++) decay[j] *= alpha[c];
        decay[c] = 1.0f;
        tile->uv[c] = beta[c];
        tile->us[c] = -beta[c] * from_start;
        for (j = 0; j < c; j++) tile->uu[c][j] = -beta[c] * decay[j] * tile->kk[c][j];
        tile->os[c] = scale * from_start;
        for (j = 0; j <= c; j++) tile->ou[c][j] = scale * decay[j] * tile->qk[c][j];
    }
    for (j = 0; j < tile->count; j++) tile->su[j] = decay[j];
    tile->ss = from_start;
}

/* What plain C multiplies at once: 4 columns where the compiler has vectors (of SSE2, NEON), else one. */
#if defined(__GNUC__) && !defined(__TINYC__)
typedef float fqla__lanes __attribute__((vector_size(16), aligned(4), may_alias));
#else
typedef float fqla__lanes;
#endif

static fqla__lanes *fqla__row_lanes(fqla__rows rows, int32_t i, int32_t x) {
    return (fqla__lanes *)(void *)(rows.row + i * rows.stride + x);
}

/* FQLA__COLUMNS columns from x on, 4 vectors (a, b, c, d) at a time; token by token, so that 8 sums stay in registers. */
static void fqla__step_plain(const fqla__tile *tile, int32_t dim_k, const fqla__block *block, int32_t x) {
    const int32_t end = x + FQLA__COLUMNS, width = 4 * (int32_t)(sizeof(fqla__lanes) / sizeof(float));
    for (; x < end; x += width) {
        fqla__lanes u[FQLA__TILE][4];
        int32_t t, j, i;
        for (t = 0; t < tile->count; t++) {
            const float *k = tile->k + t * dim_k, *q = tile->q + t * dim_k;
            const fqla__lanes zero = { 0 }, *v = fqla__row_lanes(block->v, t, x);
            fqla__lanes ka = zero, kb = zero, kc = zero, kd = zero, qa = zero, qb = zero, qc = zero, qd = zero;
            fqla__lanes *o = fqla__row_lanes(block->o, t, x);
            for (i = 0; i < dim_k; i++) {
                const fqla__lanes *s = fqla__row_lanes(block->from, i, x);
                ka += k[i] * s[0], kb += k[i] * s[1], kc += k[i] * s[2], kd += k[i] * s[3];
                qa += q[i] * s[0], qb += q[i] * s[1], qc += q[i] * s[2], qd += q[i] * s[3];
            }
            u[t][0] = tile->uv[t] * v[0] + tile->us[t] * ka;
            u[t][1] = tile->uv[t] * v[1] + tile->us[t] * kb;
            u[t][2] = tile->uv[t] * v[2] + tile->us[t] * kc;
            u[t][3] = tile->uv[t] * v[3] + tile->us[t] * kd;
            for (j = 0; j < t; j++)
                for (i = 0; i < 4; i++) u[t][i] += tile->uu[t][j] * u[j][i];
            qa *= tile->os[t], qb *= tile->os[t], qc *= tile->os[t], qd *= tile->os[t];
            for (j = 0; j <= t; j++)
                qa += tile->ou[t][j] * u[j][0], qb += tile->ou[t][j] * u[j][1], qc += tile->ou[t][j] * u[j][2],
                    qd += tile->ou[t][j] * u[j][3];
            o[0] = qa, o[1] = qb, o[2] = qc, o[3] = qd;
        }
        for (t = 0; t < tile->count; t++)
            for (j = 0; j < 4; j++) u[t][j] *= tile->su[t];
        for (i = 0; i < dim_k; i++) {
            const fqla__lanes *from = fqla__row_lanes(block->from, i, x);
            fqla__lanes *to = fqla__row_lanes(block->to, i, x);
            fqla__lanes a = tile->ss * from[0], b = tile->ss * from[1], c = tile->ss * from[2], d = tile->ss * from[3];
            for (t = 0; t < tile->count; t++) {
                const float k = tile->k[t * dim_k + i];
                a += k * u[t][0], b += k * u[t][1], c += k * u[t][2], d += k * u[t][3];
            }
            to[0] = a, to[1] = b, to[2] = c, to[3] = d;
        }
    }
}

/* One token on a state of layout VK, where a row is a column of S: each is read once, in order. */
static void fqla__step_vk_plain(const fqla__tile *tile, int32_t dim_k, const fqla__block *block) {
    int32_t i, x;
    for (x = 0; x < block->columns; x++) {
        const float *from = block->from.row + x * block->from.stride;
        const float u = tile->uv[0] * block->v.row[x] + tile->us[0] * fqla__dot(from, tile->k, dim_k);
        float *to = block->to.row + x * block->to.stride;
        block->o.row[x] = tile->os[0] * fqla__dot(from, tile->q, dim_k) + tile->ou[0][0] * u;
        for (i = 0; i < dim_k; i++) to[i] = tile->ss * from[i] + u * tile->k[i];
    }
}
