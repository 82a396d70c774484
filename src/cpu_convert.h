// >>cpu_convert: float32 from and to the tensors' dtypes, rounding to nearest even

static float fqla__from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t fqla__to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float fqla__from_bf16(uint16_t half) { return fqla__from_bits((uint32_t)half << 16); }

static uint16_t fqla__to_bf16(float value) {
    const uint32_t bits = fqla__to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u); /* NaN stays NaN */
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static float fqla__from_fp16(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = (half >> 10) & 31u, mantissa = half & 0x3ffu;
    if (exponent == 31u) return fqla__from_bits(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0u) { /* subnormal: mantissa 2^-24 */
        const float magnitude = (float)mantissa * (1.0f / 16777216.0f);
        return sign ? -magnitude : magnitude;
    }
    return fqla__from_bits(sign | (exponent + 112u) << 23 | mantissa << 13);
}

static uint16_t fqla__to_fp16(float value) {
    const uint32_t bits = fqla__to_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);  /* NaN */
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and up round to infinity */
    if (magnitude < 0x38800000u) { /* under 2^-14: adding 0.5 rounds to a multiple of 2^-24 */
        const float shifted = fqla__from_bits(magnitude) + 0.5f;
        return (uint16_t)(sign | (fqla__to_bits(shifted) - 0x3f000000u));
    }
    return (uint16_t)(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

/* Element `index` of a tensor. */
static float fqla__load(const void *tensor, int64_t index, fqla_dtype dtype) {
    switch (dtype) {
    case FQLA_DTYPE_BF16: return fqla__from_bf16(((const uint16_t *)tensor)[index]);
    case FQLA_DTYPE_FP16: return fqla__from_fp16(((const uint16_t *)tensor)[index]);
    default: return ((const float *)tensor)[index];
    }
}

static void fqla__store(void *tensor, int64_t index, fqla_dtype dtype, float value) {
    switch (dtype) {
    case FQLA_DTYPE_BF16: ((uint16_t *)tensor)[index] = fqla__to_bf16(value); break;
    case FQLA_DTYPE_FP16: ((uint16_t *)tensor)[index] = fqla__to_fp16(value); break;
    default: ((float *)tensor)[index] = value; break;
    }
}

/* `count` contiguous elements from `index` on, as float32. */
static void fqla__load_row(float *row, const void *tensor, int64_t index, int32_t count, fqla_dtype dtype) {
    int32_t i;
    switch (dtype) {
    case FQLA_DTYPE_BF16: for (i = 0; i < count; i++) row[i] = fqla__from_bf16(((const uint16_t *)tensor)[index + i]); break;
    case FQLA_DTYPE_FP16: for (i = 0; i < count; i++) row[i] = fqla__from_fp16(((const uint16_t *)tensor)[index + i]); break;
    default: memcpy(row, (const float *)tensor + index, (size_t)count * sizeof *row); break;
    }
}

static void fqla__store_row(void *tensor, int64_t index, int32_t count, fqla_dtype dtype, const float *row) {
    int32_t i;
    switch (dtype) {
    case FQLA_DTYPE_BF16: for (i = 0; i < count; i++) ((uint16_t *)tensor)[index + i] = fqla__to_bf16(row[i]); break;
    case FQLA_DTYPE_FP16: for (i = 0; i < count; i++) ((uint16_t *)tensor)[index + i] = fqla__to_fp16(row[i]); break;
    default: memcpy((float *)tensor + index, row, (size_t)count * sizeof *row); break;
    }
}
