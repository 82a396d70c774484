// >>cpu_matmul: small products of float32 matrices, all that the backward's arithmetic needs

/* C = keep C + A B with C [m, n], A [m, k], B [k, n], m a multiple of 8, n of 16. Row-major; ldc, lda, ldb are elements from a row to
   the next. keep 0: C is not read. C overlaps neither A nor B. Every sum runs over k in order. */
typedef struct fqla__matmul_sizes {
    int32_t m, n, k;
    int32_t ldc, lda, ldb;
} fqla__matmul_sizes;

enum { FQLA__MATMUL_ROWS = 8, FQLA__MATMUL_COLUMNS = 16 };

static void fqla__matmul_plain(float *c, const float *a, const float *b, fqla__matmul_sizes s, float keep) {
    int32_t i, j, l, x;
    for (j = 0; j < s.n; j += FQLA__MATMUL_COLUMNS)
        for (i = 0; i < s.m; i++) {
            float sum[FQLA__MATMUL_COLUMNS];
            float *to = c + (int64_t)i * s.ldc + j;
            for (x = 0; x < FQLA__MATMUL_COLUMNS; x++) sum[x] = 0.0f;
            for (l = 0; l < s.k; l++) {
                const float factor = a[(int64_t)i * s.lda + l];
                const float *from = b + (int64_t)l * s.ldb + j;
                for (x = 0; x < FQLA__MATMUL_COLUMNS; x++) sum[x] += factor * from[x];
            }
            if (keep != 0.0f)
                for (x = 0; x < FQLA__MATMUL_COLUMNS; x++) sum[x] += keep * to[x];
            memcpy(to, sum, sizeof sum);
        }
}

static void fqla__matmul(fqla_cpu_level level, float *c, const float *a, const float *b, fqla__matmul_sizes sizes, float keep) {
    (void)level;
    fqla__matmul_plain(c, a, b, sizes, keep);
}
