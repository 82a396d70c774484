// >>cpu_step_x86: the steps of cpu_step with AVX2 and with AVX-512

#if FLASHQLA__X86
#define FLASHQLA__TARGET_AVX512 __attribute__((target("avx512f")))

/*
    A step of 4 makes two passes over its columns of the state: the first sums S^T k_c and S^T q_c of all 4 tokens, the second
    updates S. Arithmetic sets the pace: 8 + 5 operations a vector of state, beside 9 + 5 loads (AVX2) or, two vectors to an
    operand, 5 + 3 loads (AVX-512) and a store. At D_k = D_v = 128 and two operations a cycle that is 3328 cycles a token with
    AVX2 and 1664 with AVX-512; 3490 and 1830 were measured (gcc -O2, Sapphire Rapids).
*/

FLASHQLA__TARGET_AVX2 static inline __m256 fqla__times_avx2(float a, __m256 x) { return _mm256_mul_ps(_mm256_set1_ps(a), x); }

/* sum + a x */
FLASHQLA__TARGET_AVX2 static inline __m256 fqla__plus_times_avx2(__m256 sum, float a, __m256 x) {
    return _mm256_fmadd_ps(_mm256_set1_ps(a), x, sum);
}

/* 8 columns' u, times su, from the sums S^T k_c and S^T q_c; and their outputs. */
FLASHQLA__TARGET_AVX2 static inline void fqla__solve_4_avx2(const fqla__tile *tile, const fqla__block *block, int32_t x, __m256 *u,
                                                           __m256 k0, __m256 k1, __m256 k2, __m256 k3, __m256 q0, __m256 q1,
                                                           __m256 q2, __m256 q3) {
    const float *v = block->v.row + x;
    float *o = block->o.row + x;
    const int64_t vs = block->v.stride, os = block->o.stride;
    __m256 u0, u1, u2, u3;
    u0 = fqla__times_avx2(tile->uv[0], _mm256_loadu_ps(v));
    u1 = fqla__times_avx2(tile->uv[1], _mm256_loadu_ps(v + vs));
    u2 = fqla__times_avx2(tile->uv[2], _mm256_loadu_ps(v + 2 * vs));
    u3 = fqla__times_avx2(tile->uv[3], _mm256_loadu_ps(v + 3 * vs));
    u0 = fqla__plus_times_avx2(u0, tile->us[0], k0);
    u1 = fqla__plus_times_avx2(u1, tile->us[1], k1);
    u2 = fqla__plus_times_avx2(u2, tile->us[2], k2);
    u3 = fqla__plus_times_avx2(u3, tile->us[3], k3);
    u1 = fqla__plus_times_avx2(u1, tile->uu[1][0], u0);
    u2 = fqla__plus_times_avx2(u2, tile->uu[2][0], u0);
    u3 = fqla__plus_times_avx2(u3, tile->uu[3][0], u0);
    u2 = fqla__plus_times_avx2(u2, tile->uu[2][1], u1);
    u3 = fqla__plus_times_avx2(u3, tile->uu[3][1], u1);
    u3 = fqla__plus_times_avx2(u3, tile->uu[3][2], u2);
    u[0] = fqla__times_avx2(tile->su[0], u0);
    u[1] = fqla__times_avx2(tile->su[1], u1);
    u[2] = fqla__times_avx2(tile->su[2], u2);
    u[3] = fqla__times_avx2(tile->su[3], u3);
    q0 = fqla__times_avx2(tile->os[0], q0);
    q1 = fqla__times_avx2(tile->os[1], q1);
    q2 = fqla__times_avx2(tile->os[2], q2);
    q3 = fqla__times_avx2(tile->os[3], q3);
    q0 = fqla__plus_times_avx2(q0, tile->ou[0][0], u0);
    q1 = fqla__plus_times_avx2(q1, tile->ou[1][0], u0);
    q2 = fqla__plus_times_avx2(q2, tile->ou[2][0], u0);
    q3 = fqla__plus_times_avx2(q3, tile->ou[3][0], u0);
    q1 = fqla__plus_times_avx2(q1, tile->ou[1][1], u1);
    q2 = fqla__plus_times_avx2(q2, tile->ou[2][1], u1);
    q3 = fqla__plus_times_avx2(q3, tile->ou[3][1], u1);
    q2 = fqla__plus_times_avx2(q2, tile->ou[2][2], u2);
    q3 = fqla__plus_times_avx2(q3, tile->ou[3][2], u2);
    q3 = fqla__plus_times_avx2(q3, tile->ou[3][3], u3);
    _mm256_storeu_ps(o, q0);
    _mm256_storeu_ps(o + os, q1);
    _mm256_storeu_ps(o + 2 * os, q2);
    _mm256_storeu_ps(o + 3 * os, q3);
}

/* 8 columns at a time: 8 sums and an operand for each. */
FLASHQLA__TARGET_AVX2 static void fqla__step_4_avx2(const fqla__tile *tile, int32_t dim_k, const fqla__block *block, int32_t x) {
    const float *k0 = tile->k, *k1 = k0 + dim_k, *k2 = k1 + dim_k, *k3 = k2 + dim_k;
    const float *q0 = tile->q, *q1 = q0 + dim_k, *q2 = q1 + dim_k, *q3 = q2 + dim_k;
    const int64_t from_stride = block->from.stride, to_stride = block->to.stride;
    const __m256 zero = _mm256_setzero_ps(), ss = _mm256_set1_ps(tile->ss);
    const int32_t end = x + FQLA__COLUMNS;
    int32_t i;
    for (; x < end; x += 8) {
        __m256 sk0 = zero, sk1 = zero, sk2 = zero, sk3 = zero, sq0 = zero, sq1 = zero, sq2 = zero, sq3 = zero, u[4];
        const float *from = block->from.row + x;
        float *to = block->to.row + x;
        for (i = 0; i < dim_k; i++, from += from_stride) {
            const __m256 s = _mm256_loadu_ps(from);
            sk0 = fqla__plus_times_avx2(sk0, k0[i], s);
            sk1 = fqla__plus_times_avx2(sk1, k1[i], s);
            sk2 = fqla__plus_times_avx2(sk2, k2[i], s);
            sk3 = fqla__plus_times_avx2(sk3, k3[i], s);
            sq0 = fqla__plus_times_avx2(sq0, q0[i], s);
            sq1 = fqla__plus_times_avx2(sq1, q1[i], s);
            sq2 = fqla__plus_times_avx2(sq2, q2[i], s);
            sq3 = fqla__plus_times_avx2(sq3, q3[i], s);
        }
        fqla__solve_4_avx2(tile, block, x, u, sk0, sk1, sk2, sk3, sq0, sq1, sq2, sq3);
        {
            const __m256 u0 = u[0], u1 = u[1], u2 = u[2], u3 = u[3];
            from = block->from.row + x;
            for (i = 0; i < dim_k; i++, from += from_stride, to += to_stride) {
                __m256 s = _mm256_mul_ps(ss, _mm256_loadu_ps(from));
                s = fqla__plus_times_avx2(s, k0[i], u0);
                s = fqla__plus_times_avx2(s, k1[i], u1);
                s = fqla__plus_times_avx2(s, k2[i], u2);
                s = fqla__plus_times_avx2(s, k3[i], u3);
                _mm256_storeu_ps(to, s);
            }
        }
    }
}

/* One token, all columns of the block: rows of state in their order in memory, as fast as it gives them. The sums lie in the L1
   cache; 4 rows are added to a sum at a time. */
FLASHQLA__TARGET_AVX2 static void fqla__step_1_avx2(const fqla__tile *tile, int32_t dim_k, const fqla__block *block) {
    const float *k = tile->k, *q = tile->q, *from = block->from.row;
    const int64_t from_stride = block->from.stride, to_stride = block->to.stride;
    const int32_t columns = block->columns;
    const __m256 ss = _mm256_set1_ps(tile->ss);
    float sk[FQLA__MOST_COLUMNS], sq[FQLA__MOST_COLUMNS], *to = block->to.row;
    int32_t i, x;
    for (x = 0; x < columns; x += 8) {
        _mm256_storeu_ps(sk + x, _mm256_setzero_ps());
        _mm256_storeu_ps(sq + x, _mm256_setzero_ps());
    }
    for (i = 0; i < dim_k; i += 4) {
        const float *r0 = from + i * from_stride, *r1 = r0 + from_stride, *r2 = r1 + from_stride, *r3 = r2 + from_stride;
        const __m256 k0 = _mm256_set1_ps(k[i]), k1 = _mm256_set1_ps(k[i + 1]), k2 = _mm256_set1_ps(k[i + 2]);
        const __m256 k3 = _mm256_set1_ps(k[i + 3]), q0 = _mm256_set1_ps(q[i]), q1 = _mm256_set1_ps(q[i + 1]);
        const __m256 q2 = _mm256_set1_ps(q[i + 2]), q3 = _mm256_set1_ps(q[i + 3]);
        for (x = 0; x < columns; x += 8) {
            __m256 ks = _mm256_loadu_ps(sk + x), qs = _mm256_loadu_ps(sq + x), s;
            s = _mm256_loadu_ps(r0 + x), ks = _mm256_fmadd_ps(k0, s, ks), qs = _mm256_fmadd_ps(q0, s, qs);
            s = _mm256_loadu_ps(r1 + x), ks = _mm256_fmadd_ps(k1, s, ks), qs = _mm256_fmadd_ps(q1, s, qs);
            s = _mm256_loadu_ps(r2 + x), ks = _mm256_fmadd_ps(k2, s, ks), qs = _mm256_fmadd_ps(q2, s, qs);
            s = _mm256_loadu_ps(r3 + x), ks = _mm256_fmadd_ps(k3, s, ks), qs = _mm256_fmadd_ps(q3, s, qs);
            _mm256_storeu_ps(sk + x, ks);
            _mm256_storeu_ps(sq + x, qs);
        }
    }
    for (x = 0; x < columns; x += 8) {
        __m256 u = fqla__times_avx2(tile->uv[0], _mm256_loadu_ps(block->v.row + x)), o;
        u = fqla__plus_times_avx2(u, tile->us[0], _mm256_loadu_ps(sk + x));
        o = fqla__plus_times_avx2(fqla__times_avx2(tile->os[0], _mm256_loadu_ps(sq + x)), tile->ou[0][0], u);
        _mm256_storeu_ps(block->o.row + x, o);
        _mm256_storeu_ps(sk + x, u);
    }
    for (i = 0; i < dim_k; i++, from += from_stride, to += to_stride) {
        const __m256 ki = _mm256_set1_ps(k[i]);
        for (x = 0; x < columns; x += 8)
            _mm256_storeu_ps(to + x, _mm256_fmadd_ps(ki, _mm256_loadu_ps(sk + x), _mm256_mul_ps(ss, _mm256_loadu_ps(from + x))));
    }
}

/* One token on layout VK, 4 rows at a time, their 8 sums added up together. */
FLASHQLA__TARGET_AVX2 static void fqla__step_vk_avx2(const fqla__tile *tile, int32_t dim_k, const fqla__block *block) {
    const __m128 uv = _mm_set1_ps(tile->uv[0]), us = _mm_set1_ps(tile->us[0]);
    const __m128 os = _mm_set1_ps(tile->os[0]), ou = _mm_set1_ps(tile->ou[0][0]);
    const __m256 zero = _mm256_setzero_ps(), ss = _mm256_set1_ps(tile->ss);
    const int64_t from_stride = block->from.stride, to_stride = block->to.stride;
    int32_t i, x;
    for (x = 0; x < block->columns; x += 4) {
        const float *s0 = block->from.row + x * from_stride, *s1 = s0 + from_stride, *s2 = s1 + from_stride, *s3 = s2 + from_stride;
        float *t0 = block->to.row + x * to_stride, *t1 = t0 + to_stride, *t2 = t1 + to_stride, *t3 = t2 + to_stride;
        __m256 k0 = zero, k1 = zero, k2 = zero, k3 = zero, q0 = zero, q1 = zero, q2 = zero, q3 = zero, sums, u0, u1, u2, u3;
        __m128 u;
        for (i = 0; i < dim_k; i += 8) {
            const __m256 k = _mm256_loadu_ps(tile->k + i), q = _mm256_loadu_ps(tile->q + i);
            __m256 s;
            s = _mm256_loadu_ps(s0 + i), k0 = _mm256_fmadd_ps(k, s, k0), q0 = _mm256_fmadd_ps(q, s, q0);
            s = _mm256_loadu_ps(s1 + i), k1 = _mm256_fmadd_ps(k, s, k1), q1 = _mm256_fmadd_ps(q, s, q1);
            s = _mm256_loadu_ps(s2 + i), k2 = _mm256_fmadd_ps(k, s, k2), q2 = _mm256_fmadd_ps(q, s, q2);
            s = _mm256_loadu_ps(s3 + i), k3 = _mm256_fmadd_ps(k, s, k3), q3 = _mm256_fmadd_ps(q, s, q3);
        }
        sums = fqla__sums_avx2(k0, k1, k2, k3, q0, q1, q2, q3);
        u = _mm_fmadd_ps(us, _mm256_castps256_ps128(sums), _mm_mul_ps(uv, _mm_loadu_ps(block->v.row + x)));
        _mm_storeu_ps(block->o.row + x, _mm_fmadd_ps(ou, u, _mm_mul_ps(os, _mm256_extractf128_ps(sums, 1))));
        u0 = _mm256_broadcastss_ps(u), u1 = _mm256_broadcastss_ps(_mm_movehdup_ps(u));
        u2 = _mm256_broadcastss_ps(_mm_movehl_ps(u, u)), u3 = _mm256_broadcastss_ps(_mm_shuffle_ps(u, u, 0xff));
        for (i = 0; i < dim_k; i += 8) {
            const __m256 k = _mm256_loadu_ps(tile->k + i);
            _mm256_storeu_ps(t0 + i, _mm256_fmadd_ps(k, u0, _mm256_mul_ps(ss, _mm256_loadu_ps(s0 + i))));
            _mm256_storeu_ps(t1 + i, _mm256_fmadd_ps(k, u1, _mm256_mul_ps(ss, _mm256_loadu_ps(s1 + i))));
            _mm256_storeu_ps(t2 + i, _mm256_fmadd_ps(k, u2, _mm256_mul_ps(ss, _mm256_loadu_ps(s2 + i))));
            _mm256_storeu_ps(t3 + i, _mm256_fmadd_ps(k, u3, _mm256_mul_ps(ss, _mm256_loadu_ps(s3 + i))));
        }
    }
}

/* The products of 4 tokens: 16 sums in two passes. */
FLASHQLA__TARGET_AVX2 static void fqla__tile_products_4_avx2(fqla__tile *tile, int32_t dim_k) {
    const float *k0 = tile->k, *k1 = k0 + dim_k, *k2 = k1 + dim_k, *k3 = k2 + dim_k;
    const float *q0 = tile->q, *q1 = q0 + dim_k, *q2 = q1 + dim_k, *q3 = q2 + dim_k;
    const __m256 zero = _mm256_setzero_ps();
    __m256 k10 = zero, k20 = zero, k21 = zero, k30 = zero, k31 = zero, k32 = zero, q00 = zero, q10 = zero;
    __m256 q11 = zero, q20 = zero, q21 = zero, q22 = zero, q30 = zero, q31 = zero, q32 = zero, q33 = zero;
    float sums[16];
    int32_t i;
    for (i = 0; i < dim_k; i += 8) {
        const __m256 a = _mm256_loadu_ps(k0 + i), b = _mm256_loadu_ps(k1 + i);
        const __m256 c = _mm256_loadu_ps(k2 + i), d = _mm256_loadu_ps(k3 + i);
        k10 = _mm256_fmadd_ps(b, a, k10);
        k20 = _mm256_fmadd_ps(c, a, k20), k21 = _mm256_fmadd_ps(c, b, k21);
        k30 = _mm256_fmadd_ps(d, a, k30), k31 = _mm256_fmadd_ps(d, b, k31), k32 = _mm256_fmadd_ps(d, c, k32);
        q00 = _mm256_fmadd_ps(_mm256_loadu_ps(q0 + i), a, q00), q10 = _mm256_fmadd_ps(_mm256_loadu_ps(q1 + i), a, q10);
    }
    _mm256_storeu_ps(sums, fqla__sums_avx2(k10, k20, k21, k30, k31, k32, q00, q10));
    for (i = 0; i < dim_k; i += 8) {
        const __m256 a = _mm256_loadu_ps(k0 + i), b = _mm256_loadu_ps(k1 + i);
        const __m256 c = _mm256_loadu_ps(k2 + i), d = _mm256_loadu_ps(k3 + i);
        const __m256 e = _mm256_loadu_ps(q2 + i), f = _mm256_loadu_ps(q3 + i);
        q11 = _mm256_fmadd_ps(_mm256_loadu_ps(q1 + i), b, q11);
        q20 = _mm256_fmadd_ps(e, a, q20), q21 = _mm256_fmadd_ps(e, b, q21), q22 = _mm256_fmadd_ps(e, c, q22);
        q30 = _mm256_fmadd_ps(f, a, q30), q31 = _mm256_fmadd_ps(f, b, q31), q32 = _mm256_fmadd_ps(f, c, q32);
        q33 = _mm256_fmadd_ps(f, d, q33);
    }
    _mm256_storeu_ps(sums + 8, fqla__sums_avx2(q11, q20, q21, q22, q30, q31, q32, q33));
    tile->kk[1][0] = sums[0];
    tile->kk[2][0] = sums[1], tile->kk[2][1] = sums[2];
    tile->kk[3][0] = sums[3], tile->kk[3][1] = sums[4], tile->kk[3][2] = sums[5];
    tile->qk[0][0] = sums[6];
    tile->qk[1][0] = sums[7], tile->qk[1][1] = sums[8];
    tile->qk[2][0] = sums[9], tile->qk[2][1] = sums[10], tile->qk[2][2] = sums[11];
    tile->qk[3][0] = sums[12], tile->qk[3][1] = sums[13], tile->qk[3][2] = sums[14], tile->qk[3][3] = sums[15];
}

FLASHQLA__TARGET_AVX512 static inline __m512 fqla__times_avx512(float a, __m512 x) { return _mm512_mul_ps(_mm512_set1_ps(a), x); }

FLASHQLA__TARGET_AVX512 static inline __m512 fqla__plus_times_avx512(__m512 sum, float a, __m512 x) {
    return _mm512_fmadd_ps(_mm512_set1_ps(a), x, sum);
}

/* 16 columns' u, times su, and their outputs. */
FLASHQLA__TARGET_AVX512 static inline void fqla__solve_4_avx512(const fqla__tile *tile, const fqla__block *block, int32_t x,
                                                               __m512 *u, __m512 k0, __m512 k1, __m512 k2, __m512 k3, __m512 q0,
                                                               __m512 q1, __m512 q2, __m512 q3) {
    const float *v = block->v.row + x;
    float *o = block->o.row + x;
    const int64_t vs = block->v.stride, os = block->o.stride;
    __m512 u0, u1, u2, u3;
    u0 = fqla__times_avx512(tile->uv[0], _mm512_loadu_ps(v));
    u1 = fqla__times_avx512(tile->uv[1], _mm512_loadu_ps(v + vs));
    u2 = fqla__times_avx512(tile->uv[2], _mm512_loadu_ps(v + 2 * vs));
    u3 = fqla__times_avx512(tile->uv[3], _mm512_loadu_ps(v + 3 * vs));
    u0 = fqla__plus_times_avx512(u0, tile->us[0], k0);
    u1 = fqla__plus_times_avx512(u1, tile->us[1], k1);
    u2 = fqla__plus_times_avx512(u2, tile->us[2], k2);
    u3 = fqla__plus_times_avx512(u3, tile->us[3], k3);
    u1 = fqla__plus_times_avx512(u1, tile->uu[1][0], u0);
    u2 = fqla__plus_times_avx512(u2, tile->uu[2][0], u0);
    u3 = fqla__plus_times_avx512(u3, tile->uu[3][0], u0);
    u2 = fqla__plus_times_avx512(u2, tile->uu[2][1], u1);
    u3 = fqla__plus_times_avx512(u3, tile->uu[3][1], u1);
    u3 = fqla__plus_times_avx512(u3, tile->uu[3][2], u2);
    u[0] = fqla__times_avx512(tile->su[0], u0);
    u[1] = fqla__times_avx512(tile->su[1], u1);
    u[2] = fqla__times_avx512(tile->su[2], u2);
    u[3] = fqla__times_avx512(tile->su[3], u3);
    q0 = fqla__times_avx512(tile->os[0], q0);
    q1 = fqla__times_avx512(tile->os[1], q1);
    q2 = fqla__times_avx512(tile->os[2], q2);
    q3 = fqla__times_avx512(tile->os[3], q3);
    q0 = fqla__plus_times_avx512(q0, tile->ou[0][0], u0);
    q1 = fqla__plus_times_avx512(q1, tile->ou[1][0], u0);
    q2 = fqla__plus_times_avx512(q2, tile->ou[2][0], u0);
    q3 = fqla__plus_times_avx512(q3, tile->ou[3][0], u0);
    q1 = fqla__plus_times_avx512(q1, tile->ou[1][1], u1);
    q2 = fqla__plus_times_avx512(q2, tile->ou[2][1], u1);
    q3 = fqla__plus_times_avx512(q3, tile->ou[3][1], u1);
    q2 = fqla__plus_times_avx512(q2, tile->ou[2][2], u2);
    q3 = fqla__plus_times_avx512(q3, tile->ou[3][2], u2);
    q3 = fqla__plus_times_avx512(q3, tile->ou[3][3], u3);
    _mm512_storeu_ps(o, q0);
    _mm512_storeu_ps(o + os, q1);
    _mm512_storeu_ps(o + 2 * os, q2);
    _mm512_storeu_ps(o + 3 * os, q3);
}

/* All 32 columns, vectors a and b: 16 sums, an operand for two. */
FLASHQLA__TARGET_AVX512 static void fqla__step_4_avx512(const fqla__tile *tile, int32_t dim_k, const fqla__block *block,
                                                        int32_t x) {
    const float *k0 = tile->k, *k1 = k0 + dim_k, *k2 = k1 + dim_k, *k3 = k2 + dim_k;
    const float *q0 = tile->q, *q1 = q0 + dim_k, *q2 = q1 + dim_k, *q3 = q2 + dim_k;
    const float *from = block->from.row + x;
    float *to = block->to.row + x;
    const __m512 zero = _mm512_setzero_ps(), ss = _mm512_set1_ps(tile->ss);
    __m512 k0a = zero, k1a = zero, k2a = zero, k3a = zero, q0a = zero, q1a = zero, q2a = zero, q3a = zero, ua[4];
    __m512 k0b = zero, k1b = zero, k2b = zero, k3b = zero, q0b = zero, q1b = zero, q2b = zero, q3b = zero, ub[4];
    int32_t i;
    for (i = 0; i < dim_k; i++, from += block->from.stride) {
        const __m512 a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + 16);
        __m512 y;
        y = _mm512_set1_ps(k0[i]), k0a = _mm512_fmadd_ps(y, a, k0a), k0b = _mm512_fmadd_ps(y, b, k0b);
        y = _mm512_set1_ps(k1[i]), k1a = _mm512_fmadd_ps(y, a, k1a), k1b = _mm512_fmadd_ps(y, b, k1b);
        y = _mm512_set1_ps(k2[i]), k2a = _mm512_fmadd_ps(y, a, k2a), k2b = _mm512_fmadd_ps(y, b, k2b);
        y = _mm512_set1_ps(k3[i]), k3a = _mm512_fmadd_ps(y, a, k3a), k3b = _mm512_fmadd_ps(y, b, k3b);
        y = _mm512_set1_ps(q0[i]), q0a = _mm512_fmadd_ps(y, a, q0a), q0b = _mm512_fmadd_ps(y, b, q0b);
        y = _mm512_set1_ps(q1[i]), q1a = _mm512_fmadd_ps(y, a, q1a), q1b = _mm512_fmadd_ps(y, b, q1b);
        y = _mm512_set1_ps(q2[i]), q2a = _mm512_fmadd_ps(y, a, q2a), q2b = _mm512_fmadd_ps(y, b, q2b);
        y = _mm512_set1_ps(q3[i]), q3a = _mm512_fmadd_ps(y, a, q3a), q3b = _mm512_fmadd_ps(y, b, q3b);
    }
    fqla__solve_4_avx512(tile, block, x, ua, k0a, k1a, k2a, k3a, q0a, q1a, q2a, q3a);
    fqla__solve_4_avx512(tile, block, x + 16, ub, k0b, k1b, k2b, k3b, q0b, q1b, q2b, q3b);
    {
        const __m512 u0a = ua[0], u1a = ua[1], u2a = ua[2], u3a = ua[3], u0b = ub[0], u1b = ub[1], u2b = ub[2], u3b = ub[3];
        from = block->from.row + x;
        for (i = 0; i < dim_k; i++, from += block->from.stride, to += block->to.stride) {
            __m512 a = _mm512_mul_ps(ss, _mm512_loadu_ps(from)), b = _mm512_mul_ps(ss, _mm512_loadu_ps(from + 16));
            __m512 y;
            y = _mm512_set1_ps(k0[i]), a = _mm512_fmadd_ps(y, u0a, a), b = _mm512_fmadd_ps(y, u0b, b);
            y = _mm512_set1_ps(k1[i]), a = _mm512_fmadd_ps(y, u1a, a), b = _mm512_fmadd_ps(y, u1b, b);
            y = _mm512_set1_ps(k2[i]), a = _mm512_fmadd_ps(y, u2a, a), b = _mm512_fmadd_ps(y, u2b, b);
            y = _mm512_set1_ps(k3[i]), a = _mm512_fmadd_ps(y, u3a, a), b = _mm512_fmadd_ps(y, u3b, b);
            _mm512_storeu_ps(to, a);
            _mm512_storeu_ps(to + 16, b);
        }
    }
}

/* As fqla__step_1_avx2. */
FLASHQLA__TARGET_AVX512 static void fqla__step_1_avx512(const fqla__tile *tile, int32_t dim_k, const fqla__block *block) {
    const float *k = tile->k, *q = tile->q, *from = block->from.row;
    const int64_t from_stride = block->from.stride, to_stride = block->to.stride;
    const int32_t columns = block->columns;
    const __m512 ss = _mm512_set1_ps(tile->ss);
    float sk[FQLA__MOST_COLUMNS], sq[FQLA__MOST_COLUMNS], *to = block->to.row;
    int32_t i, x;
    for (x = 0; x < columns; x += 16) {
        _mm512_storeu_ps(sk + x, _mm512_setzero_ps());
        _mm512_storeu_ps(sq + x, _mm512_setzero_ps());
    }
    for (i = 0; i < dim_k; i += 4) {
        const float *r0 = from + i * from_stride, *r1 = r0 + from_stride, *r2 = r1 + from_stride, *r3 = r2 + from_stride;
        const __m512 k0 = _mm512_set1_ps(k[i]), k1 = _mm512_set1_ps(k[i + 1]), k2 = _mm512_set1_ps(k[i + 2]);
        const __m512 k3 = _mm512_set1_ps(k[i + 3]), q0 = _mm512_set1_ps(q[i]), q1 = _mm512_set1_ps(q[i + 1]);
        const __m512 q2 = _mm512_set1_ps(q[i + 2]), q3 = _mm512_set1_ps(q[i + 3]);
        for (x = 0; x < columns; x += 16) {
            __m512 ks = _mm512_loadu_ps(sk + x), qs = _mm512_loadu_ps(sq + x), s;
            s = _mm512_loadu_ps(r0 + x), ks = _mm512_fmadd_ps(k0, s, ks), qs = _mm512_fmadd_ps(q0, s, qs);
            s = _mm512_loadu_ps(r1 + x), ks = _mm512_fmadd_ps(k1, s, ks), qs = _mm512_fmadd_ps(q1, s, qs);
            s = _mm512_loadu_ps(r2 + x), ks = _mm512_fmadd_ps(k2, s, ks), qs = _mm512_fmadd_ps(q2, s, qs);
            s = _mm512_loadu_ps(r3 + x), ks = _mm512_fmadd_ps(k3, s, ks), qs = _mm512_fmadd_ps(q3, s, qs);
            _mm512_storeu_ps(sk + x, ks);
            _mm512_storeu_ps(sq + x, qs);
        }
    }
    for (x = 0; x < columns; x += 16) {
        __m512 u = fqla__times_avx512(tile->uv[0], _mm512_loadu_ps(block->v.row + x)), o;
        u = fqla__plus_times_avx512(u, tile->us[0], _mm512_loadu_ps(sk + x));
        o = fqla__plus_times_avx512(fqla__times_avx512(tile->os[0], _mm512_loadu_ps(sq + x)), tile->ou[0][0], u);
        _mm512_storeu_ps(block->o.row + x, o);
        _mm512_storeu_ps(sk + x, u);
    }
    for (i = 0; i < dim_k; i++, from += from_stride, to += to_stride) {
        const __m512 ki = _mm512_set1_ps(k[i]);
        for (x = 0; x < columns; x += 16)
            _mm512_storeu_ps(to + x, _mm512_fmadd_ps(ki, _mm512_loadu_ps(sk + x), _mm512_mul_ps(ss, _mm512_loadu_ps(from + x))));
    }
}
#endif

/* All columns of the block. */
static void fqla__step(fqla_cpu_level level, const fqla__tile *tile, int32_t dim_k, const fqla__block *block) {
    int32_t x;
#if FLASHQLA__X86
    if (level >= FQLA_CPU_AVX2 && tile->count == 1) {
        if (level == FQLA_CPU_AVX512) fqla__step_1_avx512(tile, dim_k, block);
        else fqla__step_1_avx2(tile, dim_k, block);
        return;
    }
    for (x = 0; x < block->columns && level >= FQLA_CPU_AVX2; x += FQLA__COLUMNS) {
        if (level == FQLA_CPU_AVX512) fqla__step_4_avx512(tile, dim_k, block, x);
        else fqla__step_4_avx2(tile, dim_k, block, x);
    }
    if (level >= FQLA_CPU_AVX2) return;
#endif
    (void)level;
    for (x = 0; x < block->columns; x += FQLA__COLUMNS) fqla__step_plain(tile, dim_k, block, x);
}

static void fqla__step_vk(fqla_cpu_level level, const fqla__tile *tile, int32_t dim_k, const fqla__block *block) {
#if FLASHQLA__X86
    if (level >= FQLA_CPU_AVX2) {
        fqla__step_vk_avx2(tile, dim_k, block);
        return;
    }
#endif
    (void)level;
    fqla__step_vk_plain(tile, dim_k, block);
}

static void fqla__tile_products(fqla_cpu_level level, fqla__tile *tile, int32_t dim_k) {
#if FLASHQLA__X86
    if (level >= FQLA_CPU_AVX2 && tile->count == FQLA__TILE) {
        fqla__tile_products_4_avx2(tile, dim_k);
        return;
    }
#endif
    (void)level;
    fqla__tile_products_plain(tile, dim_k);
}
