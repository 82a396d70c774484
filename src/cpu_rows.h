// >>cpu_rows: rows of float32: from and to the tensors' dtypes, transposed, multiplied with one another

/* All counts are multiples of 8. AVX2 does all of it for AVX-512 too. Conversions have the same bits at every level, NaNs aside. */

static float fqla__dot(const float *a, const float *b, int32_t count) {
    float sums[8] = { 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f };
    int32_t i, x;
    for (i = 0; i < count; i += 8)
        for (x = 0; x < 8; x++) sums[x] += a[i + x] * b[i + x];
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

static void fqla__scale_row(float *row, float factor, int32_t count) {
    int32_t i;
    for (i = 0; i < count; i++) row[i] *= factor;
}

#if FLASHQLA__X86
#define FLASHQLA__TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))

FLASHQLA__TARGET_AVX2 static void fqla__load_row_avx2(float *row, const void *tensor, int64_t index, int32_t count,
                                                       fqla_dtype dtype) {
    const uint16_t *halves = (const uint16_t *)tensor + index;
    int32_t i;
    if (dtype == FQLA_DTYPE_FP32) {
        for (i = 0; i < count; i += 8) _mm256_storeu_ps(row + i, _mm256_loadu_ps((const float *)tensor + index + i));
    } else if (dtype == FQLA_DTYPE_FP16) {
        for (i = 0; i < count; i += 8)
            _mm256_storeu_ps(row + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(halves + i))));
    } else {
        for (i = 0; i < count; i += 8) {
            const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)(halves + i)));
            _mm256_storeu_ps(row + i, _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
        }
    }
}

/* As fqla__to_bf16, in the low half of every lane. */
FLASHQLA__TARGET_AVX2 static inline __m256i fqla__to_bf16_avx2(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value), high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q)));
}

FLASHQLA__TARGET_AVX2 static void fqla__store_row_avx2(void *tensor, int64_t index, int32_t count, fqla_dtype dtype,
                                                        const float *row) {
    uint16_t *halves = (uint16_t *)tensor + index;
    int32_t i;
    if (dtype == FQLA_DTYPE_FP32) {
        for (i = 0; i < count; i += 8) _mm256_storeu_ps((float *)tensor + index + i, _mm256_loadu_ps(row + i));
    } else if (dtype == FQLA_DTYPE_FP16) {
        for (i = 0; i < count; i += 8)
            _mm_storeu_si128((__m128i *)(void *)(halves + i), _mm256_cvtps_ph(_mm256_loadu_ps(row + i), _MM_FROUND_TO_NEAREST_INT));
    } else {
        for (i = 0; i < count; i += 8) {
            const __m256i lanes = fqla__to_bf16_avx2(_mm256_loadu_ps(row + i));
            _mm_storeu_si128((__m128i *)(void *)(halves + i),
                             _mm_packus_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1)));
        }
    }
}

/* 8 x 8: pairs of rows, pairs of pairs, then halves of 128 bits. */
FLASHQLA__TARGET_AVX2 static void fqla__transpose_8_avx2(float *to, int64_t to_stride, const float *from, int64_t from_stride) {
    const __m256 r0 = _mm256_loadu_ps(from), r1 = _mm256_loadu_ps(from + from_stride);
    const __m256 r2 = _mm256_loadu_ps(from + 2 * from_stride), r3 = _mm256_loadu_ps(from + 3 * from_stride);
    const __m256 r4 = _mm256_loadu_ps(from + 4 * from_stride), r5 = _mm256_loadu_ps(from + 5 * from_stride);
    const __m256 r6 = _mm256_loadu_ps(from + 6 * from_stride), r7 = _mm256_loadu_ps(from + 7 * from_stride);
    const __m256 a0 = _mm256_unpacklo_ps(r0, r1), a1 = _mm256_unpackhi_ps(r0, r1), a2 = _mm256_unpacklo_ps(r2, r3);
    const __m256 a3 = _mm256_unpackhi_ps(r2, r3), a4 = _mm256_unpacklo_ps(r4, r5), a5 = _mm256_unpackhi_ps(r4, r5);
    const __m256 a6 = _mm256_unpacklo_ps(r6, r7), a7 = _mm256_unpackhi_ps(r6, r7);
    const __m256 b0 = _mm256_shuffle_ps(a0, a2, 0x44), b1 = _mm256_shuffle_ps(a0, a2, 0xee);
    const __m256 b2 = _mm256_shuffle_ps(a1, a3, 0x44), b3 = _mm256_shuffle_ps(a1, a3, 0xee);
    const __m256 b4 = _mm256_shuffle_ps(a4, a6, 0x44), b5 = _mm256_shuffle_ps(a4, a6, 0xee);
    const __m256 b6 = _mm256_shuffle_ps(a5, a7, 0x44), b7 = _mm256_shuffle_ps(a5, a7, 0xee);
    _mm256_storeu_ps(to, _mm256_permute2f128_ps(b0, b4, 0x20));
    _mm256_storeu_ps(to + to_stride, _mm256_permute2f128_ps(b1, b5, 0x20));
    _mm256_storeu_ps(to + 2 * to_stride, _mm256_permute2f128_ps(b2, b6, 0x20));
    _mm256_storeu_ps(to + 3 * to_stride, _mm256_permute2f128_ps(b3, b7, 0x20));
    _mm256_storeu_ps(to + 4 * to_stride, _mm256_permute2f128_ps(b0, b4, 0x31));
    _mm256_storeu_ps(to + 5 * to_stride, _mm256_permute2f128_ps(b1, b5, 0x31));
    _mm256_storeu_ps(to + 6 * to_stride, _mm256_permute2f128_ps(b2, b6, 0x31));
    _mm256_storeu_ps(to + 7 * to_stride, _mm256_permute2f128_ps(b3, b7, 0x31));
}

/* The sums of 8 vectors' elements, a vector a lane. */
FLASHQLA__TARGET_AVX2 static inline __m256 fqla__sums_avx2(__m256 a, __m256 b, __m256 c, __m256 d, __m256 e, __m256 f, __m256 g,
                                                            __m256 h) {
    const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    const __m256 efgh = _mm256_hadd_ps(_mm256_hadd_ps(e, f), _mm256_hadd_ps(g, h));
    return _mm256_add_ps(_mm256_permute2f128_ps(abcd, efgh, 0x20), _mm256_permute2f128_ps(abcd, efgh, 0x31));
}

FLASHQLA__TARGET_AVX2 static void fqla__normalise_row_avx2(float *row, int32_t count) {
    const __m256 zero = _mm256_setzero_ps();
    __m256 sum = zero, factor;
    int32_t i;
    for (i = 0; i < count; i += 8) sum = _mm256_fmadd_ps(_mm256_loadu_ps(row + i), _mm256_loadu_ps(row + i), sum);
    sum = fqla__sums_avx2(sum, zero, zero, zero, zero, zero, zero, zero);
    factor = _mm256_set1_ps(fqla__l2norm_factor(_mm256_cvtss_f32(sum)));
    for (i = 0; i < count; i += 8) _mm256_storeu_ps(row + i, _mm256_mul_ps(_mm256_loadu_ps(row + i), factor));
}
#endif

/* `count` contiguous elements of a tensor from `index` on, as float32. */
static void fqla__row_load(fqla_cpu_level level, float *row, const void *tensor, int64_t index, int32_t count, fqla_dtype dtype) {
#if FLASHQLA__X86
    if (level >= FQLA_CPU_AVX2) {
        fqla__load_row_avx2(row, tensor, index, count, dtype);
        return;
    }
#endif
    (void)level;
    fqla__load_row(row, tensor, index, count, dtype);
}

static void fqla__row_store(fqla_cpu_level level, void *tensor, int64_t index, int32_t count, fqla_dtype dtype, const float *row) {
#if FLASHQLA__X86
    if (level >= FQLA_CPU_AVX2) {
        fqla__store_row_avx2(tensor, index, count, dtype, row);
        return;
    }
#endif
    (void)level;
    fqla__store_row(tensor, index, count, dtype, row);
}

/* to[i][x] = from[x][i] for `rows` rows of `to` and `columns` of its columns; strides in elements. */
static void fqla__row_transpose(fqla_cpu_level level, float *to, int64_t to_stride, const float *from, int64_t from_stride,
                                int32_t rows, int32_t columns) {
    int32_t i, x;
#if FLASHQLA__X86
    if (level >= FQLA_CPU_AVX2) {
        for (i = 0; i < rows; i += 8)
            for (x = 0; x < columns; x += 8)
                fqla__transpose_8_avx2(to + i * to_stride + x, to_stride, from + x * from_stride + i, from_stride);
        return;
    }
#endif
    (void)level;
    for (i = 0; i < rows; i++)
        for (x = 0; x < columns; x++) to[i * to_stride + x] = from[x * from_stride + i];
}

/* row / sqrt(row . row + 1e-6) */
static void fqla__normalise_row(fqla_cpu_level level, float *row, int32_t count) {
#if FLASHQLA__X86
    if (level >= FQLA_CPU_AVX2) {
        fqla__normalise_row_avx2(row, count);
        return;
    }
#endif
    (void)level;
    fqla__scale_row(row, fqla__l2norm_factor(fqla__dot(row, row, count)), count);
}
