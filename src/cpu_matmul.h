// >>cpu_matmul: products of small float32 matrices, which is what the backward's arithmetic consists of

/* Rows of float32, `stride` elements from one to the next. */
typedef struct fqla__matrix {
    const float *first;
    int32_t stride;
} fqla__matrix;

static fqla__matrix fqla__matrix_of(const float *first, int32_t stride) {
    fqla__matrix matrix;
    matrix.first = first;
    matrix.stride = stride;
    return matrix;
}

/*
    C = keep F + A B with C and F [m, n] of one stride, A [m, k], B [k, n]; m and k are multiples of 8, n of 16. F may be C; where
    keep is 0 it is not read. C overlaps neither A nor B.
    A tile of C stays in registers over all of k: one row of B is loaded for all of the tile's rows, and A's elements are spread
    over vectors as they are loaded. The tiles of one column of tiles follow one another, so that their part of B stays in L1.
*/
typedef struct fqla__matmul {
    int32_t m, n, k;
    float *c;
    int32_t ldc;
    float keep;
    const float *f;
    fqla__matrix a, b;
} fqla__matmul;

enum { FQLA__MATMUL_COLUMNS = 16 };

/* One row of 16 columns, four steps of k at a time: what compilers make the best of. */
static void fqla__matmul_plain(const fqla__matmul *p) {
    const int32_t ldb = p->b.stride;
    int32_t i, j, l, x;
    for (j = 0; j < p->n; j += FQLA__MATMUL_COLUMNS)
        for (i = 0; i < p->m; i++) {
            float sum[FQLA__MATMUL_COLUMNS];
            const float *f = p->f + i * p->ldc + j;
            for (x = 0; x < FQLA__MATMUL_COLUMNS; x++) sum[x] = 0.0f;
            for (l = 0; l < p->k; l += 4) {
                const float *a = p->a.first + i * p->a.stride + l, a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3];
                const float *b0 = p->b.first + l * ldb + j, *b1 = b0 + ldb, *b2 = b1 + ldb, *b3 = b2 + ldb;
                for (x = 0; x < FQLA__MATMUL_COLUMNS; x++) sum[x] += (a0 * b0[x] + a1 * b1[x]) + (a2 * b2[x] + a3 * b3[x]);
            }
            if (p->keep != 0.0f)
                for (x = 0; x < FQLA__MATMUL_COLUMNS; x++) sum[x] += p->keep * f[x];
            memcpy(p->c + i * p->ldc + j, sum, sizeof sum);
        }
}

#if FLASHQLA__X86
#define FLASHQLA__INLINE __attribute__((always_inline)) static inline

/* Two vectors side by side: a tile's part of one row. */
typedef struct fqla__avx512_row {
    __m512 left, right;
} fqla__avx512_row;

FLASHQLA__TARGET_AVX512 FLASHQLA__INLINE fqla__avx512_row fqla__avx512_load(const float *b, bool wide) {
    fqla__avx512_row row;
    row.left = _mm512_loadu_ps(b);
    row.right = wide ? _mm512_loadu_ps(b + 16) : _mm512_setzero_ps();
    return row;
}

FLASHQLA__TARGET_AVX512 FLASHQLA__INLINE fqla__avx512_row fqla__avx512_add(fqla__avx512_row sum, float a, fqla__avx512_row b,
                                                                           bool wide) {
    sum.left = _mm512_fmadd_ps(_mm512_set1_ps(a), b.left, sum.left);
    if (wide) sum.right = _mm512_fmadd_ps(_mm512_set1_ps(a), b.right, sum.right);
    return sum;
}

FLASHQLA__TARGET_AVX512 FLASHQLA__INLINE void fqla__avx512_end(float *c, fqla__avx512_row sum, float keep, const float *f,
                                                               bool wide) {
    if (keep != 0.0f) sum = fqla__avx512_add(sum, keep, fqla__avx512_load(f, wide), wide);
    _mm512_storeu_ps(c, sum.left);
    if (wide) _mm512_storeu_ps(c + 16, sum.right);
}

/* 8 rows of 32 columns, or, not wide, of 16. */
FLASHQLA__TARGET_AVX512 FLASHQLA__INLINE void fqla__avx512_tile(const fqla__matmul *p, int32_t i, int32_t j, bool wide) {
    const int64_t lda = p->a.stride, ldb = p->b.stride, ldc = p->ldc;
    const float *a = p->a.first + i * lda, *b = p->b.first + j, *f = p->f + i * ldc + j;
    float *c = p->c + i * ldc + j;
    const fqla__avx512_row zero = { _mm512_setzero_ps(), _mm512_setzero_ps() };
    fqla__avx512_row c0 = zero, c1 = zero, c2 = zero, c3 = zero, c4 = zero, c5 = zero, c6 = zero, c7 = zero;
    int32_t l;
    for (l = 0; l < p->k; l++, a++) {
        const fqla__avx512_row row = fqla__avx512_load(b + l * ldb, wide);
        c0 = fqla__avx512_add(c0, a[0], row, wide);
        c1 = fqla__avx512_add(c1, a[lda], row, wide);
        c2 = fqla__avx512_add(c2, a[2 * lda], row, wide);
        c3 = fqla__avx512_add(c3, a[3 * lda], row, wide);
        c4 = fqla__avx512_add(c4, a[4 * lda], row, wide);
        c5 = fqla__avx512_add(c5, a[5 * lda], row, wide);
        c6 = fqla__avx512_add(c6, a[6 * lda], row, wide);
        c7 = fqla__avx512_add(c7, a[7 * lda], row, wide);
    }
    fqla__avx512_end(c, c0, p->keep, f, wide);
    fqla__avx512_end(c + ldc, c1, p->keep, f + ldc, wide);
    fqla__avx512_end(c + 2 * ldc, c2, p->keep, f + 2 * ldc, wide);
    fqla__avx512_end(c + 3 * ldc, c3, p->keep, f + 3 * ldc, wide);
    fqla__avx512_end(c + 4 * ldc, c4, p->keep, f + 4 * ldc, wide);
    fqla__avx512_end(c + 5 * ldc, c5, p->keep, f + 5 * ldc, wide);
    fqla__avx512_end(c + 6 * ldc, c6, p->keep, f + 6 * ldc, wide);
    fqla__avx512_end(c + 7 * ldc, c7, p->keep, f + 7 * ldc, wide);
}

FLASHQLA__TARGET_AVX512 static void fqla__matmul_avx512(const fqla__matmul *p) {
    int32_t i, j;
    for (j = 0; j + 32 <= p->n; j += 32)
        for (i = 0; i < p->m; i += 8) fqla__avx512_tile(p, i, j, true);
    if (j < p->n)
        for (i = 0; i < p->m; i += 8) fqla__avx512_tile(p, i, j, false);
}

typedef struct fqla__avx2_row {
    __m256 left, right;
} fqla__avx2_row;

FLASHQLA__TARGET_AVX2 FLASHQLA__INLINE fqla__avx2_row fqla__avx2_load(const float *b) {
    fqla__avx2_row row;
    row.left = _mm256_loadu_ps(b);
    row.right = _mm256_loadu_ps(b + 8);
    return row;
}

FLASHQLA__TARGET_AVX2 FLASHQLA__INLINE fqla__avx2_row fqla__avx2_add(fqla__avx2_row sum, float a, fqla__avx2_row b) {
    sum.left = _mm256_fmadd_ps(_mm256_set1_ps(a), b.left, sum.left);
    sum.right = _mm256_fmadd_ps(_mm256_set1_ps(a), b.right, sum.right);
    return sum;
}

FLASHQLA__TARGET_AVX2 FLASHQLA__INLINE void fqla__avx2_end(float *c, fqla__avx2_row sum, float keep, const float *f) {
    if (keep != 0.0f) sum = fqla__avx2_add(sum, keep, fqla__avx2_load(f));
    _mm256_storeu_ps(c, sum.left);
    _mm256_storeu_ps(c + 8, sum.right);
}

/* 4 rows of 16 columns. */
FLASHQLA__TARGET_AVX2 FLASHQLA__INLINE void fqla__avx2_tile(const fqla__matmul *p, int32_t i, int32_t j) {
    const int64_t lda = p->a.stride, ldb = p->b.stride, ldc = p->ldc;
    const float *a = p->a.first + i * lda, *b = p->b.first + j, *f = p->f + i * ldc + j;
    float *c = p->c + i * ldc + j;
    const fqla__avx2_row zero = { _mm256_setzero_ps(), _mm256_setzero_ps() };
    fqla__avx2_row c0 = zero, c1 = zero, c2 = zero, c3 = zero;
    int32_t l;
    for (l = 0; l < p->k; l++, a++) {
        const fqla__avx2_row row = fqla__avx2_load(b + l * ldb);
        c0 = fqla__avx2_add(c0, a[0], row);
        c1 = fqla__avx2_add(c1, a[lda], row);
        c2 = fqla__avx2_add(c2, a[2 * lda], row);
        c3 = fqla__avx2_add(c3, a[3 * lda], row);
    }
    fqla__avx2_end(c, c0, p->keep, f);
    fqla__avx2_end(c + ldc, c1, p->keep, f + ldc);
    fqla__avx2_end(c + 2 * ldc, c2, p->keep, f + 2 * ldc);
    fqla__avx2_end(c + 3 * ldc, c3, p->keep, f + 3 * ldc);
}

FLASHQLA__TARGET_AVX2 static void fqla__matmul_avx2(const fqla__matmul *p) {
    int32_t i, j;
    for (j = 0; j < p->n; j += 16)
        for (i = 0; i < p->m; i += 4) fqla__avx2_tile(p, i, j);
}
#endif

static void fqla__multiply_add(fqla_cpu_level level, int32_t m, int32_t n, int32_t k, float *c, int32_t ldc, float keep,
                               const float *f, fqla__matrix a, fqla__matrix b) {
    fqla__matmul p;
    p.m = m, p.n = n, p.k = k;
    p.c = c, p.ldc = ldc;
    p.keep = keep, p.f = f;
    p.a = a, p.b = b;
#if FLASHQLA__X86
    if (level == FQLA_CPU_AVX512) fqla__matmul_avx512(&p);
    else if (level == FQLA_CPU_AVX2) fqla__matmul_avx2(&p);
    else fqla__matmul_plain(&p);
#else
    (void)level;
    fqla__matmul_plain(&p);
#endif
}

/* C = A B */
static void fqla__multiply(fqla_cpu_level level, int32_t m, int32_t n, int32_t k, float *c, int32_t ldc, fqla__matrix a,
                           fqla__matrix b) {
    fqla__multiply_add(level, m, n, k, c, ldc, 0.0f, c, a, b);
}

/* to = from times factor; width is a multiple of 16. */
static void fqla__scale_to(float *__restrict to, const float *__restrict from, float factor, int32_t width) {
    int32_t i, x;
    for (i = 0; i < width; i += FQLA__MATMUL_COLUMNS)
        for (x = 0; x < FQLA__MATMUL_COLUMNS; x++) to[i + x] = factor * from[i + x];
}

#if FLASHQLA__X86
FLASHQLA__TARGET_AVX2 static void fqla__inner_sums_avx2(float *sums, const float *a, const float *b, int32_t count) {
    __m256 left = _mm256_setzero_ps(), right = _mm256_setzero_ps();
    int32_t i;
    for (i = 0; i < count; i += 16) {
        left = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), left);
        right = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8), _mm256_loadu_ps(b + i + 8), right);
    }
    _mm256_storeu_ps(sums, left);
    _mm256_storeu_ps(sums + 8, right);
}
#endif

static void fqla__inner_sums_plain(float *sums, const float *a, const float *b, int32_t count) {
    int32_t i, x;
    for (x = 0; x < 16; x++) sums[x] = 0.0f;
    for (i = 0; i < count; i += 16)
        for (x = 0; x < 16; x++) sums[x] += a[i + x] * b[i + x];
}

/* sum of a_i b_i, by way of 16 partial sums; count is a multiple of 16. */
static float fqla__inner_product(fqla_cpu_level level, const float *a, const float *b, int32_t count) {
    float sums[16], sum = 0.0f;
    int32_t x;
#if FLASHQLA__X86
    if (level >= FQLA_CPU_AVX2) fqla__inner_sums_avx2(sums, a, b, count);
    else fqla__inner_sums_plain(sums, a, b, count);
#else
    (void)level;
    fqla__inner_sums_plain(sums, a, b, count);
#endif
    for (x = 0; x < 16; x++) sum += sums[x];
    return sum;
}
