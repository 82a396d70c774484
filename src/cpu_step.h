// >>cpu_step: a tile of tokens through a block of state columns

/*
    The recurrence takes the tokens of a (sequence, head) in tiles of 4 (and singly at the end), so that a vector of state is
    loaded once for 4 tokens. With S the state before the tile, a_c, b_c = alpha, beta of token c, D_cj = a_{j+1} .. a_c
    (1 for c = j) and G_c = a_0 .. a_c, the rows of values u_c that the tile writes and its outputs are

        u_c = b_c (v_c - G_c S^T k_c - sum_{j<c} D_cj (k_c . k_j) u_j)
        o_c = scale (G_c S^T q_c + sum_{j<=c} D_cj (q_c . k_j) u_j)
        S'  = G_last S + sum_j k_j (D_last,j u_j)^T

    which are the formulas of the manual, token by token, with the state written out. All decays are products of alphas, so
    that alpha = 0 needs no care; only j <= c occurs, so that a token never sees a later one.
    Columns of a state are independent of one another: a column's bits do not depend on the block it is in.
*/
enum {
    FQLA__TILE = 4,    /* tokens */
    FQLA__COLUMNS = 32 /* of state in a block: 128 rows of 128 bytes are half of an L1 cache */
};

/* What the tokens of a tile mean to every column: rows of k and q, and the products above with all scalars multiplied in. */
typedef struct fqla__tile {
    const float *k, *q;                  /* [count, dim_k] */
    float v[FQLA__TILE];                 /* u_c of v_c:     b_c */
    float ks[FQLA__TILE];                /* u_c of S^T k_c: -b_c G_c */
    float ku[FQLA__TILE][FQLA__TILE];    /* u_c of u_j:     -b_c D_cj (k_c . k_j), j < c */
    float qs[FQLA__TILE];                /* o_c of S^T q_c: scale G_c */
    float qu[FQLA__TILE][FQLA__TILE];    /* o_c of u_j:     scale D_cj (q_c . k_j), j <= c */
    float su[FQLA__TILE];                /* S' of u_j:      D_last,j */
    float ss;                            /* S' of S:        G_last */
} fqla__tile;

/* Rows of float32, `stride` elements apart. */
typedef struct fqla__rows {
    float *first;
    int64_t stride;
} fqla__rows;

/* One block's tensors: FQLA__COLUMNS columns of each. */
typedef struct fqla__block {
    fqla__rows from, to; /* [dim_k] rows of state; may coincide */
    fqla__rows v, o;     /* [count] rows */
} fqla__block;

static void fqla__step_plain(const fqla__tile *tile, int32_t count, int32_t dim_k, const fqla__block *block) {
    float u[FQLA__TILE][FQLA__COLUMNS], o[FQLA__TILE][FQLA__COLUMNS];
    int32_t c, j, i, x;
    for (c = 0; c < count; c++) {
        const float *k = tile->k + (int64_t)c * dim_k, *q = tile->q + (int64_t)c * dim_k;
        const float *v = block->v.first + c * block->v.stride;
        float ks[FQLA__COLUMNS], qs[FQLA__COLUMNS];
        for (x = 0; x < FQLA__COLUMNS; x++) ks[x] = qs[x] = 0.0f;
        for (i = 0; i < dim_k; i++) {
            const float *s = block->from.first + i * block->from.stride;
            for (x = 0; x < FQLA__COLUMNS; x++) ks[x] += k[i] * s[x];
            for (x = 0; x < FQLA__COLUMNS; x++) qs[x] += q[i] * s[x];
        }
        for (x = 0; x < FQLA__COLUMNS; x++) u[c][x] = tile->v[c] * v[x] + tile->ks[c] * ks[x];
        for (j = 0; j < c; j++)
            for (x = 0; x < FQLA__COLUMNS; x++) u[c][x] += tile->ku[c][j] * u[j][x];
        for (x = 0; x < FQLA__COLUMNS; x++) o[c][x] = tile->qs[c] * qs[x];
        for (j = 0; j <= c; j++)
            for (x = 0; x < FQLA__COLUMNS; x++) o[c][x] += tile->qu[c][j] * u[j][x];
    }
    for (c = 0; c < count; c++) {
        memcpy(block->o.first + c * block->o.stride, o[c], sizeof o[c]);
        for (x = 0; x < FQLA__COLUMNS; x++) u[c][x] *= tile->su[c];
    }
    for (i = 0; i < dim_k; i++) {
        const float *s = block->from.first + i * block->from.stride;
        float sum[FQLA__COLUMNS];
        for (x = 0; x < FQLA__COLUMNS; x++) sum[x] = tile->ss * s[x];
        for (c = 0; c < count; c++) {
            const float k = tile->k[(int64_t)c * dim_k + i];
            for (x = 0; x < FQLA__COLUMNS; x++) sum[x] += k * u[c][x];
        }
        memcpy(block->to.first + i * block->to.stride, sum, sizeof sum);
    }
}

static void fqla__step(const fqla__tile *tile, int32_t count, int32_t dim_k, const fqla__block *block, fqla_cpu_level level) {
    (void)level;
    fqla__step_plain(tile, count, dim_k, block);
}
