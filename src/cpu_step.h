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
    FQLA__COLUMNS = 32 /* of a block: at D_k = 128 its state is 16 KB, which stays in an L1 cache */
};

/* A tile of `count` tokens, 4 or 1, as every column sees it: rows of k and q, and the formulas' scalars multiplied out. */
typedef struct fqla__tile {
    int32_t count;
    const float *k, *q;               /* [count, D_k] */
    float uv[FQLA__TILE];             /* what u_c takes of v_c:     b_c */
    float us[FQLA__TILE];             /* what u_c takes of S^T k_c: -b_c G_c */
    float uu[FQLA__TILE][FQLA__TILE]; /* what u_c takes of u_j:     -b_c D_cj (k_c . k_j), j < c */
    float os[FQLA__TILE];             /* what o_c takes of S^T q_c: scale G_c */
    float ou[FQLA__TILE][FQLA__TILE]; /* what o_c takes of u_j:     scale D_cj (q_c . k_j), j <= c */
    float su[FQLA__TILE];             /* what S' takes of k_j u_j^T: D_last,j */
    float ss;                         /* what S' takes of S:        G_last */
} fqla__tile;

/* Rows of FQLA__COLUMNS float32, `stride` elements apart. */
typedef struct fqla__rows {
    float *row;
    int64_t stride;
} fqla__rows;

/* A block of a tile's tensors: the state before and after, which may coincide, and rows of v and o. */
typedef struct fqla__block {
    fqla__rows from, to; /* [D_k] rows */
    fqla__rows v, o;     /* [count] rows */
} fqla__block;

static void fqla__step_plain(const fqla__tile *tile, int32_t dim_k, const fqla__block *block) {
    float u[FQLA__TILE][FQLA__COLUMNS];
    int32_t c, j, i, x;
    for (c = 0; c < tile->count; c++) {
        const float *k = tile->k + c * dim_k, *q = tile->q + c * dim_k, *v = block->v.row + c * block->v.stride;
        float *o = block->o.row + c * block->o.stride;
        float ks[FQLA__COLUMNS], qs[FQLA__COLUMNS];
        for (x = 0; x < FQLA__COLUMNS; x++) ks[x] = qs[x] = 0.0f;
        for (i = 0; i < dim_k; i++) {
            const float *s = block->from.row + i * block->from.stride;
            for (x = 0; x < FQLA__COLUMNS; x++) ks[x] += k[i] * s[x], qs[x] += q[i] * s[x];
        }
        for (x = 0; x < FQLA__COLUMNS; x++) {
            float uc = tile->uv[c] * v[x] + tile->us[c] * ks[x], oc = tile->os[c] * qs[x];
            for (j = 0; j < c; j++) uc += tile->uu[c][j] * u[j][x];
            u[c][x] = uc;
            for (j = 0; j <= c; j++) oc += tile->ou[c][j] * u[j][x];
            o[x] = oc;
        }
    }
    for (c = 0; c < tile->count; c++)
        for (x = 0; x < FQLA__COLUMNS; x++) u[c][x] *= tile->su[c];
    for (i = 0; i < dim_k; i++) {
        const float *from = block->from.row + i * block->from.stride;
        float *to = block->to.row + i * block->to.stride;
        for (x = 0; x < FQLA__COLUMNS; x++) {
            float s = tile->ss * from[x];
            for (c = 0; c < tile->count; c++) s += tile->k[c * dim_k + i] * u[c][x];
            to[x] = s;
        }
    }
}

/* The dot products of a tile's rows: kk[c][j] = k_c . k_j for j < c, qk[c][j] = q_c . k_j for j <= c. */
typedef struct fqla__products {
    float kk[FQLA__TILE][FQLA__TILE], qk[FQLA__TILE][FQLA__TILE];
} fqla__products;

static void fqla__products_plain(fqla__products *p, const fqla__tile *tile, int32_t dim_k) {
    int32_t c, j;
    for (c = 0; c < tile->count; c++)
        for (j = 0; j <= c; j++) {
            if (j < c) p->kk[c][j] = fqla__dot(tile->k + c * dim_k, tile->k + j * dim_k, dim_k);
            p->qk[c][j] = fqla__dot(tile->q + c * dim_k, tile->k + j * dim_k, dim_k);
        }
}
