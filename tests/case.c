#include "case.h"
#include "rounded.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD = 256, POISON = 0xff }; /* 0xff bytes are a NaN in every float format, and index -1 */
enum { MUST = 1, MAY = 2 };          /* case_buffer.written */

static const char *const names[T_COUNT] = { "q", "k", "v", "g", "beta", "A_log", "dt_bias", "h0", "do", "dht", "state_in",
                                            "state_out", "o", "ht", "snapshots", "dq", "dk", "dv", "dg", "dbeta", "dh0", "dA_log",
                                            "ddt_bias", "bad_index_count", "workspace", "residuals" };
static const char *const gate_names[GATES_COUNT] = { "mild", "zero", "strong", "mixed", "dead", "cliff" };
static const char *const rows_names[ROWS_COUNT] = { "dense", "fused", "head-major", "gapped" };

/* ---- numbers */

uint64_t case_random(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

double case_uniform(uint64_t *state) { return (double)(case_random(state) >> 11) / 9007199254740992.0; }

double case_normal(uint64_t *state) { /* Box and Muller, one of the pair */
    const double radius = sqrt(-2.0 * log(1.0 - case_uniform(state)));
    return radius * cos(6.283185307179586 * case_uniform(state));
}

/* ---- elements, with conversions of the tests' own */

static size_t dtype_size(fqla_dtype dtype) { return dtype == FQLA_DTYPE_FP32 ? 4 : 2; }

static double decode_element(const unsigned char *at, fqla_dtype dtype) {
    uint16_t half;
    uint32_t bits;
    float value;
    if (dtype == FQLA_DTYPE_FP32) {
        memcpy(&value, at, sizeof value);
        return (double)value;
    }
    memcpy(&half, at, sizeof half);
    if (dtype == FQLA_DTYPE_BF16) {
        bits = (uint32_t)half << 16;
        memcpy(&value, &bits, sizeof value);
        return (double)value;
    } else {
        const double sign = half & 0x8000 ? -1.0 : 1.0;
        const int exponent = (half >> 10) & 31, mantissa = half & 1023;
        if (exponent == 31) return mantissa != 0 ? (double)NAN : sign * (double)INFINITY;
        if (exponent == 0) return sign * ldexp(mantissa, -24);
        return sign * ldexp(1024 + mantissa, exponent - 25);
    }
}

/* To nearest even, by the definition: scale so that the last bit kept has weight one, round, scale back. */
static void encode_element(unsigned char *at, fqla_dtype dtype, double value) {
    const int digits = dtype == FQLA_DTYPE_BF16 ? 8 : 11, least = dtype == FQLA_DTYPE_BF16 ? -133 : -24;
    if (dtype != FQLA_DTYPE_FP32 && isfinite(value)) {
        int exponent;
        (void)frexp(value, &exponent);
        exponent = exponent - digits > least ? exponent - digits : least;
        value = ldexp(nearbyint(ldexp(value, -exponent)), exponent);
    }
    if (dtype == FQLA_DTYPE_FP16) {
        uint16_t half = signbit(value) ? 0x8000 : 0;
        const double magnitude = fabs(value);
        int exponent;
        if (isnan(value)) half = 0x7e00;
        else if (magnitude >= 65536.0) half |= 0x7c00;
        else if (magnitude < ldexp(1.0, -14)) half |= (uint16_t)ldexp(magnitude, 24);
        else {
            const double fraction = frexp(magnitude, &exponent); /* [0.5, 1) */
            half |= (uint16_t)((exponent + 14) * 1024 + (int)(fraction * 2048.0) - 1024);
        }
        memcpy(at, &half, sizeof half);
    } else {
        const float single = (float)value;
        uint32_t bits;
        memcpy(&bits, &single, sizeof bits);
        if (dtype == FQLA_DTYPE_FP32) {
            memcpy(at, &bits, sizeof bits);
        } else {
            const uint16_t half = (uint16_t)(bits >> 16);
            memcpy(at, &half, sizeof half);
        }
    }
}

static size_t element_offset(const case_tensor *t, int64_t row, int64_t head, int64_t i) {
    return t->offset + (size_t)(row * t->row_stride + head * t->head_stride + i) * dtype_size(t->dtype);
}

double case_get(const test_case *c, case_tensor_name name, int64_t row, int64_t head, int64_t i) {
    const case_tensor *t = &c->t[name];
    return decode_element(t->buffer->after + element_offset(t, row, head, i), t->dtype);
}

double case_input(const test_case *c, case_tensor_name name, int64_t row, int64_t head, int64_t i) {
    const case_tensor *t = &c->t[name];
    return decode_element(t->buffer->before + element_offset(t, row, head, i), t->dtype);
}

void case_set(test_case *c, case_tensor_name name, int64_t row, int64_t head, int64_t i, double value) {
    const case_tensor *t = &c->t[name];
    encode_element(t->buffer->before + element_offset(t, row, head, i), t->dtype, value);
}

void case_set_index(test_case *c, case_tensor_name name, int32_t n, int32_t index) {
    memcpy(c->t[name].buffer->before + c->t[name].offset + (size_t)n * sizeof index, &index, sizeof index);
}

int64_t case_row(const test_case *c, int32_t n) {
    if (c->spec.decode_tokens > 0) return (int64_t)n * c->spec.decode_tokens;
    return c->desc.padded_len > 0 ? (int64_t)n * c->desc.padded_len : c->cu_seqlens[n];
}

int32_t case_len(const test_case *c, int32_t n) {
    return c->spec.decode_tokens > 0 ? c->spec.decode_tokens : c->cu_seqlens[n + 1] - c->cu_seqlens[n];
}

bool case_is_output(case_tensor_name name) { return name >= T_O; }

static bool is_gradient(case_tensor_name name) { return name >= T_DQ && name <= T_DDT_BIAS; }

/* Element (i, j) of a state in its layout. */
static int64_t state_index(const test_case *c, int i, int j) {
    return c->desc.state_layout == FQLA_STATE_VK ? (int64_t)j * c->dim_k + i : (int64_t)i * c->dim_v + j;
}

/* Tokens between snapshots, and sequence n's first entry. */
static int32_t snapshot_every(const test_case *c) {
    if (c->spec.decode_tokens > 0) return c->spec.keep_states ? 1 : 0;
    return FLASHQLA_CHUNK * c->desc.checkpoint_every;
}

static int64_t first_snapshot(const test_case *c, int32_t n) {
    int64_t entries = 0;
    int32_t m;
    if (snapshot_every(c) == 0) return 0;
    for (m = 0; m < n; m++) entries += case_len(c, m) / snapshot_every(c);
    return entries;
}

/* ---- memory */

static void *allocate(size_t size) {
    void *memory = malloc(size);
    if (memory == NULL) abort();
    return memory;
}

static void buffer_make(test_case *c, case_buffer *buffer, size_t bytes) {
    buffer->size = bytes + 2 * GUARD;
    buffer->before = (unsigned char *)allocate(buffer->size);
    buffer->after = (unsigned char *)allocate(buffer->size);
    buffer->written = (unsigned char *)allocate(buffer->size);
    memset(buffer->before, POISON, buffer->size);
    memset(buffer->after, POISON, buffer->size);
    memset(buffer->written, 0, buffer->size);
    if (fqla_alloc(c->context, buffer->size, &buffer->memory) != FQLA_OK) abort();
}

static void buffers_free(test_case *c) {
    int name;
    for (name = 0; name < T_COUNT; name++) {
        case_buffer *buffer = &c->buffers[name];
        if (buffer->memory != NULL && fqla_free(c->context, buffer->memory) != FQLA_OK) abort();
        free(buffer->before), free(buffer->after), free(buffer->written);
        free(c->expected[name]), free(c->rounded[name]);
        c->expected[name] = c->rounded[name] = NULL;
        c->t[name].buffer = NULL;
    }
    memset(c->buffers, 0, sizeof c->buffers);
}

/* Elements from the first to the last of a tensor. */
static int64_t span(int64_t rows, int64_t heads, int64_t dim, fqla_strides s) {
    return rows == 0 ? 0 : (rows - 1) * s.token + (heads - 1) * s.head + dim;
}

/* A tensor in a buffer of its own. */
static void place(test_case *c, case_tensor_name name, fqla_dtype dtype, int64_t rows, int64_t heads, int64_t dim, fqla_strides s) {
    const size_t size = dtype_size(dtype), odd = c->spec.odd_base ? size : 0;
    buffer_make(c, &c->buffers[name], (size_t)span(rows, heads, dim, s) * size + odd);
    c->t[name] = (case_tensor){ .buffer = &c->buffers[name], .offset = GUARD + odd, .dtype = dtype, .row_stride = s.token,
                                .head_stride = s.head, .rows = rows, .heads = heads, .dim = dim };
}

static void place_dense(test_case *c, case_tensor_name name, fqla_dtype dtype, int64_t rows, int64_t heads, int64_t dim) {
    place(c, name, dtype, rows, heads, dim, (fqla_strides){ heads * dim, dim });
}

/* A tensor `at` elements into the rows of another's buffer. */
static void place_beside(test_case *c, case_tensor_name name, case_tensor_name first, int64_t at, int64_t heads, int64_t dim) {
    c->t[name] = c->t[first];
    c->t[name].offset += (size_t)at * dtype_size(c->t[first].dtype);
    c->t[name].heads = heads;
    c->t[name].dim = dim;
}

/* ---- what the desc says */

/* gap: no two tensors have the same, so that one's strides used for another show. */
static fqla_strides strides_for(case_rows kind, int64_t rows, int64_t heads, int64_t dim, int64_t gap) {
    switch (kind) {
    case ROWS_HEAD_MAJOR: return (fqla_strides){ dim, rows * dim + gap };
    case ROWS_GAPPED: return (fqla_strides){ heads * (dim + gap) + 16, dim + gap };
    default: return (fqla_strides){ heads * dim, dim };
    }
}

/* Are g and beta one buffer? */
static bool fused_gates(const fqla_plan_desc *d) { return (d->gate == FQLA_GATE_RAW) == (d->beta == FQLA_BETA_SIGMOID); }

/* Rows that a forward's buffers hold. */
static int64_t plan_rows(const test_case *c) {
    const fqla_plan_desc *d = &c->desc;
    const int32_t max_seqs = d->max_seqs > 0 ? d->max_seqs : d->num_seqs;
    if (d->padded_len > 0) return (int64_t)max_seqs * d->padded_len;
    return d->max_tokens > 0 ? d->max_tokens : c->cu_seqlens[c->num_seqs];
}

static void choose_strides(test_case *c) {
    fqla_plan_desc *d = &c->desc;
    fqla_tensor_strides *s = &d->strides;
    const int64_t qk = (int64_t)d->heads_qk * c->dim_k, v = (int64_t)d->heads_v * c->dim_v;
    const int64_t rows = c->rows > plan_rows(c) ? c->rows : plan_rows(c); /* a decode's, a forward's: the plan serves both */
    if (c->spec.rows == ROWS_DENSE) return; /* zeros: the library's defaults */
    s->q = strides_for(c->spec.rows, rows, d->heads_qk, c->dim_k, 8);
    s->k = strides_for(c->spec.rows, rows, d->heads_qk, c->dim_k, 16);
    s->v = strides_for(c->spec.rows, rows, d->heads_v, c->dim_v, 24);
    s->o = strides_for(c->spec.rows, rows, d->heads_v, c->dim_v, 32);
    s->g = strides_for(c->spec.rows, rows, d->heads_v, 1, 1);
    s->beta = strides_for(c->spec.rows, rows, d->heads_v, 1, 2);
    if (c->spec.rows == ROWS_FUSED) {
        s->q.token = s->k.token = s->v.token = 2 * qk + v;
        if (fused_gates(d)) s->g.token = s->beta.token = 2 * (int64_t)d->heads_v;
    }
}

static fqla_strides or_dense(fqla_strides s, int64_t heads, int64_t dim) {
    return s.token == 0 ? (fqla_strides){ heads * dim, dim } : s;
}

/* q, k, v or their gradients; g, beta or theirs. */
static void place_inputs(test_case *c, case_tensor_name q, case_tensor_name g) {
    const fqla_plan_desc *d = &c->desc;
    const fqla_tensor_strides *s = &d->strides;
    const case_tensor_name k = (case_tensor_name)(q + 1), v = (case_tensor_name)(q + 2), beta = (case_tensor_name)(g + 1);
    const fqla_dtype g_dtype = d->gate == FQLA_GATE_RAW ? d->dtype : FQLA_DTYPE_FP32;
    const fqla_dtype beta_dtype = d->beta == FQLA_BETA_SIGMOID ? d->dtype : FQLA_DTYPE_FP32;
    const int64_t qk_width = (int64_t)d->heads_qk * c->dim_k, v_width = (int64_t)d->heads_v * c->dim_v;
    if (c->spec.rows == ROWS_FUSED) {
        place(c, q, d->dtype, c->rows, 1, 2 * qk_width + v_width, (fqla_strides){ s->q.token, s->q.head });
        place_beside(c, k, q, qk_width, d->heads_qk, c->dim_k);
        place_beside(c, v, q, 2 * qk_width, d->heads_v, c->dim_v);
        c->t[v].head_stride = c->dim_v;
        c->t[q].heads = d->heads_qk;
        c->t[q].dim = c->dim_k;
    } else {
        place(c, q, d->dtype, c->rows, d->heads_qk, c->dim_k, or_dense(s->q, d->heads_qk, c->dim_k));
        place(c, k, d->dtype, c->rows, d->heads_qk, c->dim_k, or_dense(s->k, d->heads_qk, c->dim_k));
        place(c, v, d->dtype, c->rows, d->heads_v, c->dim_v, or_dense(s->v, d->heads_v, c->dim_v));
    }
    if (c->spec.rows == ROWS_FUSED && fused_gates(d)) {
        place(c, g, g_dtype, c->rows, 1, 2 * d->heads_v, (fqla_strides){ s->g.token, 1 });
        place_beside(c, beta, g, d->heads_v, d->heads_v, 1);
        c->t[g].heads = d->heads_v;
        c->t[g].dim = 1;
    } else {
        place(c, g, g_dtype, c->rows, d->heads_v, 1, or_dense(s->g, d->heads_v, 1));
        place(c, beta, beta_dtype, c->rows, d->heads_v, 1, or_dense(s->beta, d->heads_v, 1));
    }
}

/* ---- values */

/* Log alpha of a token at `at` of a sequence of `len`. */
static double random_log_alpha(test_case *c, int64_t at, int64_t len, int64_t head) {
    const double mild = -log1p(exp(-case_normal(&c->random))) / 16.0;
    case_gates gates = c->spec.gates;
    if (gates == GATES_MIXED) {
        if (head % 4 == 2) return 16.0 * mild;
        gates = head % 4 == 0 ? GATES_ZERO : head % 4 == 1 ? GATES_MILD : GATES_STRONG;
    }
    if (gates == GATES_ZERO) return 0.0;
    if (gates == GATES_STRONG) return -5.0 - 10.0 * case_uniform(&c->random);
    if (gates == GATES_DEAD && (at + head) % 7 == 3) return -200.0;
    if (gates == GATES_CLIFF && at == len / 2) return -400.0;
    return mild;
}

/* A_log of a head such that random a near zero give its log alphas (see random_raw_gate). */
static double raw_rate(const test_case *c, int64_t head) {
    case_gates gates = c->spec.gates;
    if (gates == GATES_MIXED) gates = head % 4 == 0 ? GATES_ZERO : head % 4 == 3 ? GATES_STRONG : GATES_MILD;
    return gates == GATES_ZERO ? -60.0 : gates == GATES_STRONG ? 2.5 : gates == GATES_MILD ? -3.0 : 0.0;
}

static double random_raw_gate(test_case *c, int64_t at, int64_t len, int64_t head) {
    if (c->spec.gates == GATES_DEAD && (at + head) % 7 == 3) return 200.0;
    if (c->spec.gates == GATES_CLIFF && at == len / 2) return 400.0;
    return case_normal(&c->random) - (c->spec.gates == GATES_DEAD || c->spec.gates == GATES_CLIFF ? 3.0 : 0.0);
}

/* A unit vector, or one of any length where the library is to normalise it; `around`: near that vector. */
static void random_direction(test_case *c, case_tensor_name name, int64_t row, int64_t head, const double *around) {
    const case_tensor *t = &c->t[name];
    double x[256], norm = 0.0;
    int64_t i;
    for (i = 0; i < t->dim; i++) {
        x[i] = case_normal(&c->random);
        if (around != NULL) x[i] = around[i] + 0.1 * x[i];
        norm += x[i] * x[i];
    }
    norm = sqrt(norm) * (c->desc.l2norm ? 0.5 + case_uniform(&c->random) : 1.0);
    for (i = 0; i < t->dim; i++) case_set(c, name, row, head, i, x[i] / norm);
}

static void random_normals(test_case *c, case_tensor_name name, int64_t row, double size) {
    const case_tensor *t = &c->t[name];
    int64_t h, i;
    if (t->buffer == NULL) return;
    for (h = 0; h < t->heads; h++)
        for (i = 0; i < t->dim; i++) case_set(c, name, row, h, i, size * case_normal(&c->random));
}

static void fill_tokens(test_case *c, int32_t n) {
    const fqla_plan_desc *d = &c->desc;
    const int32_t len = case_len(c, n);
    double around[256];
    int64_t h;
    int32_t at;
    for (h = 0; h < c->dim_k; h++) around[h] = case_normal(&c->random);
    for (at = 0; at < len; at++) {
        const int64_t row = case_row(c, n) + at;
        for (h = 0; h < d->heads_qk; h++) {
            random_direction(c, T_Q, row, h, NULL);
            random_direction(c, T_K, row, h, c->spec.same_keys ? around : NULL);
        }
        random_normals(c, T_V, row, 1.0);
        random_normals(c, T_DO, row, 1.0);
        for (h = 0; h < d->heads_v; h++) {
            const double b = case_normal(&c->random);
            if (d->gate == FQLA_GATE_RAW) {
                case_set(c, T_G, row, h, 0, random_raw_gate(c, at, len, h));
            } else {
                const double log_alpha = random_log_alpha(c, at, len, h);
                case_set(c, T_G, row, h, 0, d->gate == FQLA_GATE_LINEAR ? exp(log_alpha) : log_alpha);
            }
            case_set(c, T_BETA, row, h, 0, d->beta == FQLA_BETA_SIGMOID ? b : 1.0 / (1.0 + exp(-b)));
        }
    }
}

/* Slots of the pool: in place, one to another, from zero, not stored, neither; and with bad_indices some that are outside. */
static void choose_slots(test_case *c) {
    const int32_t size = c->desc.pool_size;
    int32_t *slots = (int32_t *)allocate((size_t)size * sizeof *slots), used = 0, n;
    for (n = 0; n < size; n++) slots[n] = n;
    for (n = size - 1; n > 0; n--) {
        const int32_t other = (int32_t)(case_random(&c->random) % (uint64_t)(n + 1)), slot = slots[n];
        slots[n] = slots[other];
        slots[other] = slot;
    }
    c->bad_indices = 0;
    for (n = 0; n < c->num_seqs; n++) {
        static const int32_t outside[3] = { -2, INT32_MIN, INT32_MAX };
        const int kind = n % 5;
        int32_t in, out;
        c->slot_in[n] = kind == 2 || kind == 4 ? -1 : slots[used++];
        c->slot_out[n] = kind == 3 || kind == 4 ? -1 : kind == 0 ? c->slot_in[n] : slots[used++];
        in = c->slot_in[n];
        out = c->slot_out[n];
        if (c->spec.bad_indices && in == -1) in = n % 2 == 0 ? size : outside[n % 3], c->bad_indices++;
        if (c->spec.bad_indices && out == -1) out = n % 2 == 0 ? outside[n % 3] : size, c->bad_indices++;
        case_set_index(c, T_STATE_IN, n, in);
        case_set_index(c, T_STATE_OUT, n, out);
    }
    free(slots);
}

/* ---- which bytes a run writes */

static void mark(test_case *c, case_tensor_name name, int64_t row, unsigned char how) {
    const case_tensor *t = &c->t[name];
    int64_t h;
    if (t->buffer == NULL) return;
    for (h = 0; h < t->heads; h++)
        memset(t->buffer->written + element_offset(t, row, h, 0), how, (size_t)t->dim * dtype_size(t->dtype));
}

/* Memory that a run may write anywhere. */
static void place_scratch(test_case *c, case_tensor_name name, size_t bytes) {
    case_buffer *buffer = &c->buffers[name];
    if (bytes == 0) return;
    buffer_make(c, buffer, bytes);
    memset(buffer->written + GUARD, MAY, bytes);
    c->t[name] = (case_tensor){ .buffer = buffer, .offset = GUARD };
}

static void mark_outputs(test_case *c) {
    const bool pool = c->desc.pool_size > 0;
    int32_t n, s, name;
    for (n = 0; n < c->num_seqs; n++) {
        const bool padding = pool && c->slot_in[n] < 0 && c->slot_out[n] < 0;
        int64_t row;
        for (row = case_row(c, n); row < case_row(c, n) + case_len(c, n); row++) {
            mark(c, T_O, row, MUST);
            for (name = T_DQ; name <= T_DBETA; name++) mark(c, (case_tensor_name)name, row, MUST);
        }
        if (!pool) mark(c, T_HT, n, MUST);
        else if (c->slot_out[n] >= 0) mark(c, T_HT, c->slot_out[n], MUST);
        mark(c, T_DH0, n, MUST);
        if (snapshot_every(c) > 0)
            for (s = 0; s < case_len(c, n) / snapshot_every(c); s++)
                mark(c, T_SNAPSHOTS, first_snapshot(c, n) + s, padding ? MAY : MUST);
    }
    mark(c, T_DA_LOG, 0, MUST);
    mark(c, T_DDT_BIAS, 0, MUST);
    mark(c, T_BAD_INDEX_COUNT, 0, MAY);
}

/* ---- opening and closing */

/* Buffers, values and marks for the lengths of the moment. */
static void make_tensors(test_case *c) {
    const fqla_plan_desc *d = &c->desc;
    const bool pool = d->pool_size > 0, raw = d->gate == FQLA_GATE_RAW;
    const int64_t state = (int64_t)c->dim_k * c->dim_v, states = pool ? d->pool_size : c->num_seqs;
    const fqla_dtype state_dtype = d->state_dtype == FQLA_DTYPE_DEFAULT ? FQLA_DTYPE_FP32 : d->state_dtype;
    const fqla_strides o = or_dense(d->strides.o, d->heads_v, c->dim_v);
    const uint32_t count_before = 5;
    int32_t n;
    c->random = c->spec.seed ^ 0x5eed;
    place_inputs(c, T_Q, T_G);
    place(c, T_O, d->dtype, c->rows, d->heads_v, c->dim_v, o);
    if (!c->spec.no_h0 || pool) place_dense(c, T_H0, state_dtype, states, d->heads_v, state);
    if (c->spec.in_place) {
        place_beside(c, T_HT, T_H0, 0, d->heads_v, state);
    } else if (!c->spec.no_ht || pool) {
        place_dense(c, T_HT, state_dtype, states, d->heads_v, state);
    }
    if (raw) {
        place_dense(c, T_A_LOG, FQLA_DTYPE_FP32, 1, d->heads_v, 1);
        place_dense(c, T_DT_BIAS, FQLA_DTYPE_FP32, 1, d->heads_v, 1);
    }
    if (pool) {
        place_dense(c, T_STATE_IN, FQLA_DTYPE_FP32, c->num_seqs, 1, 1); /* 4 bytes each; int32 in truth */
        place_dense(c, T_STATE_OUT, FQLA_DTYPE_FP32, c->num_seqs, 1, 1);
        choose_slots(c);
    }
    c->snapshots = first_snapshot(c, c->num_seqs);
    if (c->snapshots > 0) place_dense(c, T_SNAPSHOTS, state_dtype, c->snapshots, d->heads_v, state);
    if (d->backward) {
        place(c, T_DO, d->dtype, c->rows, d->heads_v, c->dim_v, o);
        place_inputs(c, T_DQ, T_DG);
        if (!c->spec.no_ht) place_dense(c, T_DHT, state_dtype, states, d->heads_v, state);
        if (!c->spec.no_h0 || !c->spec.no_ht) place_dense(c, T_DH0, state_dtype, states, d->heads_v, state);
        if (raw) {
            place_dense(c, T_DA_LOG, FQLA_DTYPE_FP32, 1, d->heads_v, 1);
            place_dense(c, T_DDT_BIAS, FQLA_DTYPE_FP32, 1, d->heads_v, 1);
        }
    }
    place_dense(c, T_BAD_INDEX_COUNT, FQLA_DTYPE_FP32, 1, 1, 1);
    memcpy(c->buffers[T_BAD_INDEX_COUNT].before + c->t[T_BAD_INDEX_COUNT].offset, &count_before, sizeof count_before);
    if (!c->spec.own_workspace) place_scratch(c, T_WORKSPACE, c->summary.workspace_size);
    if (c->spec.residuals) place_scratch(c, T_RESIDUALS, c->summary.residuals_size);

    for (n = 0; n < d->heads_v && raw; n++) {
        case_set(c, T_A_LOG, 0, n, 0, raw_rate(c, n) + 0.2 * case_normal(&c->random));
        case_set(c, T_DT_BIAS, 0, n, 0, 0.2 * case_normal(&c->random));
    }
    for (n = 0; n < c->num_seqs; n++) {
        const int64_t slot = pool ? c->slot_in[n] : n;
        fill_tokens(c, n);
        if (slot >= 0) random_normals(c, T_H0, slot, 1.0);
        random_normals(c, T_DHT, n, 0.125);
    }
    mark_outputs(c);
}

static void set_lens(test_case *c, int32_t num_seqs, const int32_t *lens) {
    int32_t n;
    c->num_seqs = num_seqs;
    c->cu_seqlens[0] = 0;
    for (n = 0; n < num_seqs; n++) c->cu_seqlens[n + 1] = c->cu_seqlens[n] + lens[n % 12];
}

static int64_t rows_of(const test_case *c) {
    return c->spec.decode_tokens > 0 ? (int64_t)c->num_seqs * c->spec.decode_tokens : plan_rows(c);
}

fqla_status case_open(test_case *c, fqla_context *context, test_host *host, const case_spec *spec) {
    fqla_status status;
    memset(c, 0, sizeof *c);
    c->spec = *spec;
    c->context = context;
    c->host = host;
    c->desc = spec->plan;
    if (c->desc.heads_qk == 0) c->desc.heads_qk = 1;
    if (c->desc.heads_v == 0) c->desc.heads_v = c->desc.heads_qk;
    if (c->desc.num_seqs == 0) c->desc.num_seqs = 1;
    if (c->desc.dtype == FQLA_DTYPE_DEFAULT) c->desc.dtype = test_on_cuda() ? FQLA_DTYPE_BF16 : FQLA_DTYPE_FP32;
    c->desc.external_workspace = !spec->own_workspace;
    c->dim_k = c->desc.dim_k > 0 ? c->desc.dim_k : 128;
    c->dim_v = c->desc.dim_v > 0 ? c->desc.dim_v : 128;
    set_lens(c, c->desc.num_seqs, spec->lens);
    c->desc.cu_seqlens = c->cu_seqlens;
    c->rows = rows_of(c);
    choose_strides(c);
    status = fqla_plan_create(context, &c->desc, &c->plan);
    if (status != FQLA_OK) return status;
    if (fqla_plan_info(c->plan, &c->summary) != FQLA_OK) abort();
    make_tensors(c);
    return FQLA_OK;
}

fqla_status case_relength(test_case *c, int32_t num_seqs, const int32_t *lens) {
    fqla_status status;
    set_lens(c, num_seqs, lens);
    status = fqla_plan_update(c->plan, num_seqs, c->cu_seqlens, NULL);
    if (status != FQLA_OK) return status;
    if (fqla_plan_info(c->plan, &c->summary) != FQLA_OK) abort();
    c->rows = rows_of(c);
    buffers_free(c);
    make_tensors(c);
    return FQLA_OK;
}

void case_close(test_case *c) {
    buffers_free(c);
    fqla_plan_destroy(c->plan);
    c->plan = NULL;
}

/* ---- running */

static void *address(const test_case *c, case_tensor_name name) {
    const case_tensor *t = &c->t[name];
    return t->buffer == NULL ? NULL : (char *)t->buffer->memory + t->offset;
}

static size_t scratch_size(const test_case *c, case_tensor_name name) {
    return c->t[name].buffer != NULL ? c->t[name].buffer->size - 2 * GUARD : 0;
}

fqla_forward_args case_forward_args(const test_case *c) {
    return (fqla_forward_args){ .q = address(c, T_Q), .k = address(c, T_K), .v = address(c, T_V), .g = address(c, T_G),
                                .beta = address(c, T_BETA), .A_log = (const float *)address(c, T_A_LOG),
                                .dt_bias = (const float *)address(c, T_DT_BIAS), .h0 = address(c, T_H0), .o = address(c, T_O),
                                .ht = address(c, T_HT), .state_in = (const int32_t *)address(c, T_STATE_IN),
                                .state_out = (const int32_t *)address(c, T_STATE_OUT), .checkpoints = address(c, T_SNAPSHOTS),
                                .bad_index_count = (uint32_t *)address(c, T_BAD_INDEX_COUNT),
                                .residuals = address(c, T_RESIDUALS), .residuals_size = scratch_size(c, T_RESIDUALS),
                                .workspace = address(c, T_WORKSPACE), .workspace_size = scratch_size(c, T_WORKSPACE) };
}

fqla_backward_args case_backward_args(const test_case *c) {
    return (fqla_backward_args){ .q = address(c, T_Q), .k = address(c, T_K), .v = address(c, T_V), .g = address(c, T_G),
                                 .beta = address(c, T_BETA), .A_log = (const float *)address(c, T_A_LOG),
                                 .dt_bias = (const float *)address(c, T_DT_BIAS), .h0 = address(c, T_H0), .do_ = address(c, T_DO),
                                 .dht = address(c, T_DHT), .dq = address(c, T_DQ), .dk = address(c, T_DK), .dv = address(c, T_DV),
                                 .dg = address(c, T_DG), .dbeta = address(c, T_DBETA), .dh0 = address(c, T_DH0),
                                 .dA_log = (float *)address(c, T_DA_LOG), .ddt_bias = (float *)address(c, T_DDT_BIAS),
                                 .residuals = address(c, T_RESIDUALS), .residuals_size = scratch_size(c, T_RESIDUALS),
                                 .workspace = address(c, T_WORKSPACE), .workspace_size = scratch_size(c, T_WORKSPACE) };
}

fqla_decode_args case_decode_args(const test_case *c) {
    return (fqla_decode_args){ .num_tokens = c->spec.decode_tokens, .q = address(c, T_Q), .k = address(c, T_K),
                               .v = address(c, T_V),
                               .g = address(c, T_G), .beta = address(c, T_BETA), .A_log = (const float *)address(c, T_A_LOG),
                               .dt_bias = (const float *)address(c, T_DT_BIAS), .h0 = address(c, T_H0), .o = address(c, T_O),
                               .ht = address(c, T_HT), .state_in = (const int32_t *)address(c, T_STATE_IN),
                               .state_out = (const int32_t *)address(c, T_STATE_OUT), .states = address(c, T_SNAPSHOTS),
                               .bad_index_count = (uint32_t *)address(c, T_BAD_INDEX_COUNT), .workspace = address(c, T_WORKSPACE),
                               .workspace_size = scratch_size(c, T_WORKSPACE) };
}

void case_upload(test_case *c) {
    int name;
    for (name = 0; name < T_COUNT; name++)
        if (c->buffers[name].memory != NULL &&
            fqla_upload(c->context, c->buffers[name].memory, c->buffers[name].before, c->buffers[name].size, NULL) != FQLA_OK)
            abort();
}

void case_download(test_case *c) {
    int name;
    for (name = 0; name < T_COUNT; name++)
        if (c->buffers[name].memory != NULL &&
            fqla_download(c->context, c->buffers[name].after, c->buffers[name].memory, c->buffers[name].size, NULL) != FQLA_OK)
            abort();
}

/* One run of any kind between an upload and a download; it must not allocate. */
static fqla_status run(test_case *c, bool backward) {
    const long calls = c->host != NULL ? atomic_load(&c->host->calls) : 0;
    fqla_status status;
    case_upload(c);
    if (backward) {
        const fqla_backward_args args = case_backward_args(c);
        status = fqla_backward(c->plan, &args, NULL);
    } else if (c->spec.decode_tokens > 0) {
        const fqla_decode_args args = case_decode_args(c);
        status = fqla_decode(c->plan, &args, NULL);
    } else {
        const fqla_forward_args args = case_forward_args(c);
        status = fqla_forward(c->plan, &args, NULL);
    }
    if (c->host != NULL && atomic_load(&c->host->calls) != calls) {
        fprintf(stderr, "%s: a run allocated memory\n", c->spec.name);
        abort();
    }
    if (fqla_synchronize(c->context, NULL) != FQLA_OK) {
        fprintf(stderr, "%s: %s\n", c->spec.name, c->host != NULL ? c->host->message : "synchronising failed");
        exit(EXIT_FAILURE);
    }
    case_download(c);
    if (!backward && c->t[T_RESIDUALS].buffer != NULL) /* the next upload brings them back */
        memcpy(c->t[T_RESIDUALS].buffer->before + GUARD, c->t[T_RESIDUALS].buffer->after + GUARD, scratch_size(c, T_RESIDUALS));
    return status;
}

fqla_status case_run(test_case *c) { return run(c, false); }
fqla_status case_run_backward(test_case *c) { return run(c, true); }

/* ---- expecting */

/* A tensor's rows as a dense array in double; states come out as [heads, dim_k, dim_v]. NULL where the tensor is not there. */
static double *gather(const test_case *c, case_tensor_name name, int64_t row, int64_t rows) {
    const case_tensor *t = &c->t[name];
    const bool state = name == T_H0 || name == T_DHT;
    double *out, *next;
    int64_t r, h, i;
    int a, b;
    if (t->buffer == NULL) return NULL;
    next = out = (double *)allocate((size_t)(rows * t->heads * t->dim + 1) * sizeof *out);
    for (r = row; r < row + rows; r++)
        for (h = 0; h < t->heads; h++) {
            for (i = 0; i < t->dim && !state; i++) *next++ = case_input(c, name, r, h, i);
            for (a = 0; a < c->dim_k && state; a++)
                for (b = 0; b < c->dim_v; b++) *next++ = case_input(c, name, r, h, state_index(c, a, b));
        }
    return out;
}

/* Put rows of an oracle's output where the tensor's dense results have them. */
static void scatter(const test_case *c, double **results, case_tensor_name name, int64_t row, int64_t rows, const double *values) {
    const case_tensor *t = &c->t[name];
    const bool state = name == T_HT || name == T_SNAPSHOTS || name == T_DH0;
    int64_t r, h, i;
    int a, b;
    if (t->buffer == NULL) return;
    if (results[name] == NULL) {
        results[name] = (double *)calloc((size_t)(t->rows * t->heads * t->dim) + 1, sizeof(double));
        if (results[name] == NULL) abort();
    }
    for (r = row; r < row + rows; r++)
        for (h = 0; h < t->heads; h++) {
            double *to = results[name] + (r * t->heads + h) * t->dim;
            for (i = 0; i < t->dim && !state; i++) to[i] = *values++;
            for (a = 0; a < c->dim_k && state; a++)
                for (b = 0; b < c->dim_v; b++) to[state_index(c, a, b)] = *values++;
        }
}

static double *zeros(int64_t count) {
    double *memory = (double *)calloc((size_t)count + 1, sizeof *memory);
    if (memory == NULL) abort();
    return memory;
}

/* The oracle on sequence n, forward or reverse; rounds: with what a Hopper's kernels round. */
static void expect_sequence(test_case *c, int32_t n, bool backward, bool rounds) {
    double **const results = rounds ? c->rounded : c->expected;
    const fqla_plan_desc *d = &c->desc;
    const bool pool = d->pool_size > 0;
    const int32_t len = case_len(c, n), every = snapshot_every(c), snapshots = every > 0 && !backward ? len / every : 0;
    const int64_t row = case_row(c, n), in = pool ? c->slot_in[n] : n, out = pool ? c->slot_out[n] : n;
    const int64_t qk = (int64_t)len * d->heads_qk * c->dim_k, v = (int64_t)len * d->heads_v * c->dim_v,
                  gates = (int64_t)len * d->heads_v;
    const int64_t state = (int64_t)d->heads_v * c->dim_k * c->dim_v;
    double *q = gather(c, T_Q, row, len), *k = gather(c, T_K, row, len), *values = gather(c, T_V, row, len);
    double *g = gather(c, T_G, row, len), *beta = gather(c, T_BETA, row, len);
    double *A_log = gather(c, T_A_LOG, 0, 1), *dt_bias = gather(c, T_DT_BIAS, 0, 1);
    double *h0 = in >= 0 ? gather(c, T_H0, in, 1) : NULL;
    oracle p = { .len = len, .heads_qk = d->heads_qk, .heads_v = d->heads_v, .dim_k = c->dim_k, .dim_v = c->dim_v,
                 .head_map = d->head_map, .gate = d->gate, .beta_form = d->beta, .negative_eigenvalues = d->negative_eigenvalues,
                 .l2norm = d->l2norm, .scale = d->scale != 0.0f ? (double)d->scale : (double)(float)(1.0 / sqrt((double)c->dim_k)),
                 .q = q, .k = k, .v = values, .g = g, .beta = beta, .A_log = A_log, .dt_bias = dt_bias, .h0 = h0 };
    if (!backward) {
        const bool padding = pool && in < 0 && out < 0;
        double *o = zeros(v), *ht = zeros(state), *entries = zeros(snapshots * state);
        p.snapshot_every = snapshots > 0 ? every : 0;
        p.o = o, p.ht = ht, p.snapshots = entries;
        if (!padding && rounds) rounded_forward(&p, d->dtype);
        else if (!padding) oracle_forward(&p);
        scatter(c, results, T_O, row, len, o);
        if (out >= 0) scatter(c, results, T_HT, out, 1, ht);
        if (snapshots > 0) scatter(c, results, T_SNAPSHOTS, first_snapshot(c, n), snapshots, entries);
        free(o), free(ht), free(entries);
    } else {
        double *grad_o = gather(c, T_DO, row, len), *dht = gather(c, T_DHT, n, 1);
        double *dq = zeros(qk), *dk = zeros(qk), *dv = zeros(v), *dg = zeros(gates), *dbeta = zeros(gates), *dh0 = zeros(state);
        double *dA_log = zeros(d->heads_v), *ddt_bias = zeros(d->heads_v);
        int32_t h;
        p.do_ = grad_o, p.dht = dht;
        p.dq = dq, p.dk = dk, p.dv = dv, p.dg = dg, p.dbeta = dbeta, p.dh0 = dh0, p.dA_log = dA_log, p.ddt_bias = ddt_bias;
        if (rounds) rounded_backward(&p, d->dtype);
        else oracle_backward(&p);
        scatter(c, results, T_DQ, row, len, dq);
        scatter(c, results, T_DK, row, len, dk);
        scatter(c, results, T_DV, row, len, dv);
        scatter(c, results, T_DG, row, len, dg);
        scatter(c, results, T_DBETA, row, len, dbeta);
        scatter(c, results, T_DH0, n, 1, dh0);
        if (results[T_DA_LOG] != NULL) { /* sums over all sequences */
            for (h = 0; h < d->heads_v; h++) dA_log[h] += results[T_DA_LOG][h], ddt_bias[h] += results[T_DDT_BIAS][h];
        }
        scatter(c, results, T_DA_LOG, 0, 1, dA_log);
        scatter(c, results, T_DDT_BIAS, 0, 1, ddt_bias);
        free(grad_o), free(dht), free(dq), free(dk), free(dv), free(dg), free(dbeta), free(dh0), free(dA_log), free(ddt_bias);
    }
    free(q), free(k), free(values), free(g), free(beta), free(A_log), free(dt_bias), free(h0);
}

/* All sequences, anew. */
static void expect(test_case *c, bool backward, bool rounds) {
    double **const results = rounds ? c->rounded : c->expected;
    int32_t n;
    int name;
    for (name = 0; name < T_COUNT; name++)
        if (is_gradient((case_tensor_name)name) == backward) free(results[name]), results[name] = NULL;
    for (n = 0; n < c->num_seqs; n++) expect_sequence(c, n, backward, rounds);
}

/* ---- comparing */

static struct { double error; char name[64]; } worst[T_COUNT][2]; /* [1]: of tensors stored in 16 bits */

/* A Hopper's gradients: those of the golden cases. */
static double gradient_tolerance_on_cuda(const test_case *c, case_tensor_name name) {
    switch (name) {
        case T_DK: return 5.3e-3;
        case T_DV: return c->spec.same_keys ? 1.2e-2 : 4.0e-3;
        case T_DBETA: return 6.5e-3;
        case T_DG: case T_DA_LOG: case T_DDT_BIAS: return 8.0e-3;
        case T_DH0: return 2.5e-3;
        default: return 4.0e-3;
    }
}

/* float32 2e-6 and gradients 1e-5, outputs rounded to bf16 3e-3. A Hopper's 16-bit operands: o 4e-3, ht 2.5e-3, and 1.2e-2 where
   keys are nearly parallel. */
static double tolerance(const test_case *c, case_tensor_name name) {
    const fqla_dtype dtype = c->t[name].dtype;
    const bool state = name == T_HT || name == T_SNAPSHOTS;
    if (test_on_cuda() && is_gradient(name)) return gradient_tolerance_on_cuda(c, name);
    if (test_on_cuda()) {
        /* 16-bit operands alone, simulated in float64, come to 2.55e-3 over 2047 tokens of which no gate forgets anything */
        const bool never_forgets = c->spec.gates == GATES_ZERO && c->rows > 1024;
        const double ht = c->spec.same_keys ? 1.2e-2 : never_forgets ? 2.7e-3 : 2.5e-3;
        return !state ? 4.0e-3 : dtype == FQLA_DTYPE_BF16 ? ht + 1.0e-3 : ht;
    }
    return dtype == FQLA_DTYPE_BF16 ? 3.0e-3 : dtype == FQLA_DTYPE_FP16 ? 5.0e-4 : is_gradient(name) ? 1.0e-5 : 2.0e-6;
}

static const char *describe(const test_case *c, char *text, size_t size) {
    const fqla_plan_desc *d = &c->desc;
    snprintf(text, size, "%s [heads %d/%d, dims %d/%d, %d seqs, %lld rows, dtypes %d/%d, gate %d %s, beta %d, %s, seed %llu]",
             c->spec.name != NULL ? c->spec.name : "case", d->heads_qk, d->heads_v, c->dim_k, c->dim_v, c->num_seqs,
             (long long)c->rows, (int)d->dtype, (int)d->state_dtype, (int)d->gate, gate_names[c->spec.gates], (int)d->beta,
             rows_names[c->spec.rows], (unsigned long long)c->spec.seed);
    return text;
}

static char wrong[1024];

/* A Hopper's results past a tolerance pass where the roundings that its kernels are made of, and nothing else, lead as far away on these
   very inputs (rounded.h). The two agree to 2 % and less; the rest of five is float32's. */
static const double ROUNDINGS_ALONE = 1.05;
static int rounded_past; /* how often */

/* The relative L2 error of what a run wrote, or of c->rounded. Absolute where the norm is under 1e-6. */
static double relative_error(const test_case *c, case_tensor_name name, bool rounds, double *norm) {
    const case_tensor *t = &c->t[name];
    double error = 0.0;
    int64_t r, h, i;
    *norm = 0.0;
    for (r = 0; r < t->rows; r++)
        for (h = 0; h < t->heads; h++) {
            if (t->buffer->written[element_offset(t, r, h, 0)] != MUST) continue;
            for (i = 0; i < t->dim; i++) {
                const int64_t at = (r * t->heads + h) * t->dim + i;
                const double expected = c->expected[name][at],
                             off = (rounds ? rounded(c->rounded[name][at], t->dtype) : case_get(c, name, r, h, i)) - expected;
                error += off * off;
                *norm += expected * expected;
            }
        }
    error = *norm > 1e-12 ? sqrt(error / *norm) : sqrt(error);
    *norm = sqrt(*norm);
    return error;
}

/* Of the roundings; 0 where they excuse nothing: on the CPU, and where they come to no number. */
static double rounding_error(test_case *c, case_tensor_name name) {
    double error, norm;
    if (!test_on_cuda() || name == T_SNAPSHOTS) return 0.0;
    if (c->rounded[name] == NULL) expect(c, is_gradient(name), true);
    error = relative_error(c, name, true, &norm);
    return isfinite(error) ? error : 0.0;
}

static const char *compare_tensor(test_case *c, case_tensor_name name) {
    const case_tensor *t = &c->t[name];
    const double allowed = tolerance(c, name);
    double norm, relative;
    char text[512];
    int64_t r, h, i;
    if (t->buffer == NULL || c->expected[name] == NULL) return NULL;
    for (r = 0; r < t->rows; r++)
        for (h = 0; h < t->heads; h++) {
            if (t->buffer->written[element_offset(t, r, h, 0)] != MUST) continue;
            for (i = 0; i < t->dim; i++) {
                const double got = case_get(c, name, r, h, i);
                if (isfinite(got)) continue;
                snprintf(wrong, sizeof wrong, "%s: %s[%lld, %lld, %lld] is %g, expected %g", describe(c, text, sizeof text), names[name],
                         (long long)r, (long long)h, (long long)i, got, c->expected[name][(r * t->heads + h) * t->dim + i]);
                return wrong;
            }
        }
    relative = relative_error(c, name, false, &norm);
    if (relative > worst[name][dtype_size(t->dtype) == 2].error) {
        worst[name][dtype_size(t->dtype) == 2].error = relative;
        snprintf(worst[name][dtype_size(t->dtype) == 2].name, sizeof worst[0][0].name, "%s", c->spec.name);
    }
    if (relative <= allowed) return NULL;
    if (relative <= ROUNDINGS_ALONE * rounding_error(c, name)) {
        rounded_past++;
        return NULL;
    }
    snprintf(wrong, sizeof wrong, "%s: %s is off by %.3g, allowed %.3g (norm %.3g)", describe(c, text, sizeof text), names[name],
             relative,
             allowed, norm);
    return wrong;
}

void case_print_worst(void) {
    int name, half;
    for (name = 0; name < T_COUNT; name++)
        for (half = 0; half < 2; half++)
            if (worst[name][half].name[0] != '\0')
                printf("worst relative L2 error of %s in %d bits: %.3g (%s)\n", names[name], half ? 16 : 32,
                       worst[name][half].error,
                       worst[name][half].name);
    if (rounded_past > 0) printf("past their tolerances by what 16-bit operands cost and no more: %d tensors\n", rounded_past);
}

/* Bytes that changed though no run may write them. all: not even outputs; gradients: which outputs the run had. */
static const char *find_trespass(const test_case *c, bool all, bool gradients) {
    char text[512];
    size_t i;
    int name;
    for (name = 0; name < T_COUNT; name++) {
        const case_buffer *buffer = &c->buffers[name];
        const bool may = name == T_WORKSPACE || (!all && is_gradient((case_tensor_name)name) == gradients);
        for (i = 0; i < buffer->size; i++)
            if (buffer->after[i] != buffer->before[i] && !(may && buffer->written[i] != 0)) {
                snprintf(wrong, sizeof wrong,
                         "%s: byte %lld of %s's buffer (%lld bytes between guards of %d) changed from %02x to %02x",
                         describe(c, text, sizeof text), (long long)i - GUARD, names[name], (long long)buffer->size - 2 * GUARD,
                         GUARD, buffer->before[i], buffer->after[i]);
                return wrong;
            }
    }
    return NULL;
}

const char *case_untouched(const test_case *c) { return find_trespass(c, true, false); }

static const char *compare(test_case *c, bool backward) {
    const char *message = find_trespass(c, false, backward);
    uint32_t count;
    int name;
    expect(c, backward, false);
    for (name = 0; name < T_COUNT; name++) free(c->rounded[name]), c->rounded[name] = NULL;
    for (name = T_O; name < T_BAD_INDEX_COUNT && message == NULL; name++)
        if (is_gradient((case_tensor_name)name) == backward) message = compare_tensor(c, (case_tensor_name)name);
    memcpy(&count, c->buffers[T_BAD_INDEX_COUNT].after + c->t[T_BAD_INDEX_COUNT].offset, sizeof count);
    if (message == NULL && count != 5 + (backward ? 0 : c->bad_indices)) {
        snprintf(wrong, sizeof wrong, "%s: bad_index_count rose by %u, expected %u", c->spec.name, count - 5, c->bad_indices);
        message = wrong;
    }
    return message;
}

const char *case_compare(test_case *c) { return compare(c, false); }
const char *case_compare_backward(test_case *c) { return compare(c, true); }

/* ---- all of it */

/* What CUDA refuses, and whether it does so when the plan is made. */
static bool cuda_refuses_plan(const case_spec *s) {
    const fqla_plan_desc *d = &s->plan;
    return (d->dim_k != 0 && d->dim_k != 128) || (d->dim_v != 0 && d->dim_v != 128) || d->dtype == FQLA_DTYPE_FP32;
}

static bool cuda_refuses_run(const case_spec *s) { return s->decode_tokens > 1 || s->keep_states; }

const char *case_check_on(fqla_context *context, test_host *host, const case_spec *spec) {
    static test_case c;
    const char *message;
    fqla_status status;
    atomic_store(&host->errors, 0);
    status = case_open(&c, context, host, spec);
    if (test_on_cuda() && cuda_refuses_plan(spec)) {
        if (status == FQLA_OK) case_close(&c);
        return test_refusal(host, FQLA_ERROR_UNSUPPORTED, status, NULL, NULL);
    }
    if (status != FQLA_OK) {
        snprintf(wrong, sizeof wrong, "%s: no plan, %s: %s", spec->name, fqla_status_name(status), host->message);
        return wrong;
    }
    status = case_run(&c);
    if (test_on_cuda() && cuda_refuses_run(spec)) {
        message = test_refusal(host, FQLA_ERROR_UNSUPPORTED, status, NULL, NULL);
        if (message == NULL) message = case_untouched(&c);
    } else if (status != FQLA_OK) {
        snprintf(wrong, sizeof wrong, "%s: %s: %s", spec->name, fqla_status_name(status), host->message);
        message = wrong;
    } else {
        message = case_compare(&c);
    }
    if (message == NULL && spec->plan.backward) {
        status = case_run_backward(&c);
        message = status == FQLA_OK ? case_compare_backward(&c) : wrong;
        if (status != FQLA_OK)
            snprintf(wrong, sizeof wrong, "%s: backward: %s: %s", spec->name, fqla_status_name(status), host->message);
    }
    case_close(&c);
    return message;
}

const char *case_check(const case_spec *spec) { return case_check_on(test_shared(), &test_shared_host, spec); }
