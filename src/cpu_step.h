// >>cpu_step: a tile of tokens through a block of state columns

/*
    The recurrence takes the tokens of a (sequence, head) in tiles of 4 (and singly at the end), so that a vector of state is
    loaded twice and stored once for 4 tokens, and takes 3 1/4 multiplications a token where the recurrence has 4. With S the
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
    FQLA__TILE = 4,    /* tokens */
    FQLA__COLUMNS = 32 /* that a step takes at once: at D_k = 128 their state is 16 KB, which stays in an L1 cache */
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
    int32_t columns; /* a multiple of FQLA__COLUMNS */
    fqla__rows from, to; /* [D_k] rows */
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

/* Columns first .. first + FQLA__COLUMNS - 1 of the block, as all kernels do. */
static void fqla__step_plain(const fqla__tile *tile, int32_t dim_k, const fqla__block *block, int32_t first) {
    const float *state = block->from.row + first;
    float u[FQLA__TILE][FQLA__COLUMNS];
    int32_t c, j, i, x;
    for (c = 0; c < tile->count; c++) {
        const float *k = tile->k + c * dim_k, *q = tile->q + c * dim_k, *v = block->v.row + c * block->v.stride + first;
        float *o = block->o.row + c * block->o.stride + first;
        float ks[FQLA__COLUMNS], qs[FQLA__COLUMNS];
        for (x = 0; x < FQLA__COLUMNS; x++) ks[x] = qs[x] = 0.0f;
        for (i = 0; i < dim_k; i++) {
            const float *s = state + i * block->from.stride;
            for (x = 0; x < FQLA__COLUMNS; x++) ks[x] += k[i] * s[x];
            for (x = 0; x < FQLA__COLUMNS; x++) qs[x] += q[i] * s[x];
        }
        for (x = 0; x < FQLA__COLUMNS; x++) u[c][x] = tile->uv[c] * v[x] + tile->us[c] * ks[x];
        for (j = 0; j < c; j++)
            for (x = 0; x < FQLA__COLUMNS; x++) u[c][x] += tile->uu[c][j] * u[j][x];
        for (x = 0; x < FQLA__COLUMNS; x++) qs[x] *= tile->os[c];
        for (j = 0; j <= c; j++)
            for (x = 0; x < FQLA__COLUMNS; x++) qs[x] += tile->ou[c][j] * u[j][x];
        memcpy(o, qs, sizeof qs);
    }
    for (c = 0; c < tile->count; c++)
        for (x = 0; x < FQLA__COLUMNS; x++) u[c][x] *= tile->su[c];
    for (i = 0; i < dim_k; i++) {
        const float *from = state + i * block->from.stride;
        float s[FQLA__COLUMNS];
        for (x = 0; x < FQLA__COLUMNS; x++) s[x] = tile->ss * from[x];
        for (c = 0; c < tile->count; c++)
            for (x = 0; x < FQLA__COLUMNS; x++) s[x] += tile->k[c * dim_k + i] * u[c][x];
        memcpy(block->to.row + i * block->to.stride + first, s, sizeof s);
    }
}
