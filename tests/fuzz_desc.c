/* A fuzzer (clang's libFuzzer) on descs and args: any bytes become a context, a plan, updates and runs over real buffers of exactly
   the documented sizes. Whatever is refused is refused without a trace; whatever is taken runs within its buffers. */
#include "flashqla.h"
#include <stdlib.h>
#include <string.h>

enum { MOST_SEQS = 16, MOST_BYTES = 1 << 16, MOST_WORKSPACE = 1 << 22 };

typedef struct input {
    const uint8_t *next;
    size_t left;
} input;

static void take(input *in, void *to, size_t size) {
    const size_t had = size < in->left ? size : in->left;
    memset(to, 0, size);
    memcpy(to, in->next, had);
    in->next += had;
    in->left -= had;
}

static uint8_t byte(input *in) {
    uint8_t value;
    take(in, &value, 1);
    return value;
}

/* Mostly what makes sense, now and then anything. */
static int32_t number(input *in, int32_t bound) {
    const uint8_t how = byte(in);
    int32_t any;
    if (how < 240) return how % bound;
    take(in, &any, sizeof any);
    return any;
}

/* a + number, wrapped: what is added may be anything. */
static int32_t plus_number(input *in, int32_t a, int32_t bound) { return (int32_t)((uint32_t)a + (uint32_t)number(in, bound)); }

static int64_t stride(input *in, int64_t dense) {
    const uint8_t how = byte(in);
    int64_t any;
    if (how < 160) return 0;
    if (how < 240) return dense + how % 16 * 8;
    take(in, &any, sizeof any);
    return any;
}

static void seqlens(input *in, int32_t *cu_seqlens, int32_t count) {
    int32_t n;
    cu_seqlens[0] = number(in, 1);
    for (n = 0; n < count; n++)
        cu_seqlens[n + 1] = plus_number(in, cu_seqlens[n], n % 5 == 1 ? 70 : 9);
}

/* Bytes of a tensor of the plan, or a size over MOST_BYTES where it is too large to try. */
static size_t extent(fqla_strides s, int64_t rows, int64_t heads, int64_t dim, size_t element) {
    const double token = (double)(s.token ? s.token : heads * (s.head ? s.head : dim)), head = (double)(s.head ? s.head : dim);
    const double last = rows > 0 ? ((double)rows - 1.0) * token + ((double)heads - 1.0) * head + (double)dim : 0.0;
    return last * (double)element > (double)MOST_BYTES ? (size_t)MOST_BYTES + 1 : (size_t)(last * (double)element);
}

/* The buffers of a call. */
typedef struct pile {
    void *blocks[32];
    size_t sizes[32];
    int count;
} pile;

/* A buffer of exactly that size, so that the address sanitizer sees a byte too many; or one that another tensor has; or a pointer
   that must be refused. */
static void *buffer(input *in, pile *p, size_t size, int required) {
    const uint8_t how = byte(in);
    if (how >= 250) return NULL;
    if (how >= 245 && p->count > 0 && p->sizes[how % p->count] >= size) return p->blocks[how % p->count];
    if (!required && how % 4 == 0) return NULL;
    p->blocks[p->count] = malloc(size > 0 ? size : 1);
    if (p->blocks[p->count] == NULL) abort();
    memset(p->blocks[p->count], how % 3 == 0 ? 0xff : 0x3c, size > 0 ? size : 1);
    p->sizes[p->count] = size;
    return (char *)p->blocks[p->count++] + (how >= 240);
}

static size_t element_size(fqla_dtype dtype) { return dtype == FQLA_DTYPE_FP32 ? 4 : 2; }

static void run_plan(input *in, fqla_plan *plan, const fqla_plan_desc *d, int32_t num_seqs) {
    fqla_plan_summary summary;
    pile blocks;
    int i;
    const int which = byte(in) % 3;
    const int32_t dim_k = d->dim_k ? d->dim_k : 128, dim_v = d->dim_v ? d->dim_v : 128;
    const int32_t max_seqs = d->max_seqs ? d->max_seqs : d->num_seqs;
    const size_t element = element_size(d->dtype), state_element = d->state_dtype == FQLA_DTYPE_BF16 ? 2 : 4;
    const size_t g_element = d->gate == FQLA_GATE_RAW ? element : 4, beta_element = d->beta == FQLA_BETA_SIGMOID ? element : 4;
    const size_t state = (size_t)dim_k * (size_t)dim_v * (size_t)d->heads_v * state_element;
    const size_t states = state * (size_t)(d->pool_size > 0 ? d->pool_size : num_seqs), heads = (size_t)d->heads_v * 4;
    const int32_t tokens = which == 1 ? number(in, 9) : 0;
    int64_t rows;
    size_t q, v, o, g, beta, snapshots;
    blocks.count = 0;
    if (fqla_plan_info(plan, &summary) != FQLA_OK) abort();
    rows = which == 1 ? (int64_t)num_seqs * (tokens > 0 ? tokens : 1)
           : d->padded_len > 0 ? (int64_t)max_seqs * d->padded_len : d->max_tokens > 0 ? d->max_tokens : summary.tokens;
    if (which == 1 && (tokens < 0 || tokens > FLASHQLA_MAX_DECODE_TOKENS)) rows = num_seqs; /* refused */
    q = extent(d->strides.q, rows, d->heads_qk, dim_k, element);
    if (extent(d->strides.k, rows, d->heads_qk, dim_k, element) > q) q = extent(d->strides.k, rows, d->heads_qk, dim_k, element);
    v = extent(d->strides.v, rows, d->heads_v, dim_v, element);
    o = extent(d->strides.o, rows, d->heads_v, dim_v, element);
    g = extent(d->strides.g, rows, d->heads_v, 1, g_element);
    beta = extent(d->strides.beta, rows, d->heads_v, 1, beta_element);
    snapshots = state * (size_t)(which == 1 ? rows : summary.checkpoints);
    if (q > MOST_BYTES || v > MOST_BYTES || o > MOST_BYTES || g > MOST_BYTES || beta > MOST_BYTES || states > MOST_BYTES ||
        snapshots > MOST_BYTES || summary.workspace_size > MOST_WORKSPACE)
        return;
    if (which == 2) {
        fqla_backward_args a;
        memset(&a, 0, sizeof a);
        a.q = buffer(in, &blocks, q, 1), a.k = buffer(in, &blocks, q, 1), a.v = buffer(in, &blocks, v, 1);
        a.g = buffer(in, &blocks, g, 1), a.beta = buffer(in, &blocks, beta, 1);
        a.A_log = (const float *)buffer(in, &blocks, heads, 1), a.dt_bias = (const float *)buffer(in, &blocks, heads, 1);
        a.h0 = buffer(in, &blocks, states, 0), a.do_ = buffer(in, &blocks, o, 1), a.dht = buffer(in, &blocks, states, 0);
        a.dq = buffer(in, &blocks, q, 1), a.dk = buffer(in, &blocks, q, 1), a.dv = buffer(in, &blocks, v, 1);
        a.dg = buffer(in, &blocks, g, 1), a.dbeta = buffer(in, &blocks, beta, 1), a.dh0 = buffer(in, &blocks, states, 0);
        a.dA_log = (float *)buffer(in, &blocks, heads, 1), a.ddt_bias = (float *)buffer(in, &blocks, heads, 1);
        (void)fqla_backward(plan, &a, NULL);
    } else {
        fqla_forward_args a;
        int32_t indices[2 * MOST_SEQS];
        const int32_t slots = d->pool_size > 0 && d->pool_size < 240 ? d->pool_size : 8;
        memset(&a, 0, sizeof a);
        for (i = 0; i < 2 * MOST_SEQS; i++) indices[i] = plus_number(in, -(i % 5 == 0), slots);
        a.q = buffer(in, &blocks, q, 1), a.k = buffer(in, &blocks, q, 1), a.v = buffer(in, &blocks, v, 1);
        a.g = buffer(in, &blocks, g, 1), a.beta = buffer(in, &blocks, beta, 1);
        a.A_log = (const float *)buffer(in, &blocks, heads, 1), a.dt_bias = (const float *)buffer(in, &blocks, heads, 1);
        a.h0 = buffer(in, &blocks, states, d->pool_size > 0), a.o = buffer(in, &blocks, o, 1);
        a.ht = byte(in) % 3 == 0 ? (void *)(uintptr_t)a.h0 : buffer(in, &blocks, states, d->pool_size > 0);
        if ((d->pool_size > 0) != (byte(in) > 250)) a.state_in = indices, a.state_out = indices + MOST_SEQS;
        if (snapshots > 0) a.checkpoints = buffer(in, &blocks, snapshots, which == 0);
        if (which == 0) {
            (void)fqla_forward(plan, &a, NULL);
        } else {
            fqla_decode_args b;
            memset(&b, 0, sizeof b);
            b.num_tokens = tokens;
            b.q = a.q, b.k = a.k, b.v = a.v, b.g = a.g, b.beta = a.beta, b.A_log = a.A_log, b.dt_bias = a.dt_bias, b.h0 = a.h0;
            b.o = a.o, b.ht = a.ht, b.state_in = a.state_in, b.state_out = a.state_out, b.states = a.checkpoints;
            (void)fqla_decode(plan, &b, NULL);
        }
    }
    for (i = 0; i < blocks.count; i++) free(blocks.blocks[i]);
}

/* Any context desc: refused, or made and destroyed. */
static void try_context(input *in) {
    fqla_context_desc desc;
    fqla_context *context = NULL;
    memset(&desc, 0, sizeof desc);
    desc.backend = (fqla_backend)number(in, 2);
    desc.num_threads = number(in, 4);
    desc.cpu_level = (fqla_cpu_level)number(in, 5);
    desc.device = number(in, 1);
    if (desc.num_threads > 8 && desc.num_threads <= 1024) desc.num_threads = -1;
    if (fqla_context_create(&desc, &context) == FQLA_OK) {
        if (fqla_context_destroy(context) != FQLA_OK) abort();
    } else if (context != NULL) {
        abort();
    }
}

/* No memory for what is too large to try. */
static void *small_alloc(size_t bytes, void *user) {
    (void)user;
    return bytes > 4 * (size_t)MOST_WORKSPACE ? NULL : malloc(bytes);
}

static void small_free(void *pointer, void *user) {
    (void)user;
    free(pointer);
}

/* The contexts that plans are made on: one for each level, of two threads. */
static fqla_context *context_of(int level) {
    static fqla_context *contexts[FQLA_CPU_LEVEL_COUNT];
    fqla_context_desc desc;
    if (contexts[level] != NULL) return contexts[level];
    memset(&desc, 0, sizeof desc);
    desc.backend = FQLA_BACKEND_CPU;
    desc.num_threads = 2;
    desc.cpu_level = (fqla_cpu_level)level;
    desc.alloc = small_alloc;
    desc.free = small_free;
    return fqla_context_create(&desc, &contexts[level]) == FQLA_OK ? contexts[level] : context_of(FQLA_CPU_PLAIN);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input in = { data, size };
    int32_t cu_seqlens[MOST_SEQS + 1], other[MOST_SEQS + 1], num_seqs;
    fqla_context *context;
    fqla_plan_desc d;
    fqla_plan *plan = NULL;
    fqla_strides *strides = &d.strides.q;
    int i;
    if (byte(&in) % 16 == 0) {
        try_context(&in);
        return 0;
    }
    context = context_of(byte(&in) % FQLA_CPU_LEVEL_COUNT);
    memset(&d, 0, sizeof d);
    d.heads_qk = plus_number(&in, 1, 3);
    d.heads_v = byte(&in) < 240 ? (int32_t)((uint32_t)d.heads_qk * (1u + byte(&in) % 3)) : number(&in, 9);
    d.dim_k = byte(&in) < 240 ? 8 * (byte(&in) % 9) : number(&in, 300);
    d.dim_v = byte(&in) < 240 ? 8 * (byte(&in) % 9) : number(&in, 300);
    d.num_seqs = plus_number(&in, 1, 5);
    seqlens(&in, cu_seqlens, MOST_SEQS);
    d.cu_seqlens = byte(&in) < 250 ? cu_seqlens : NULL;
    if (d.num_seqs > MOST_SEQS) d.cu_seqlens = NULL; /* what it names must exist */
    if (byte(&in) % 4 == 0) d.padded_len = number(&in, 90);
    if (byte(&in) % 4 == 0) d.max_seqs = plus_number(&in, d.num_seqs, 3);
    if (byte(&in) % 4 == 0) d.max_tokens = number(&in, 240);
    d.dtype = (fqla_dtype)number(&in, 4), d.state_dtype = (fqla_dtype)number(&in, 4);
    d.state_layout = (fqla_state_layout)number(&in, 2), d.head_map = (fqla_head_map)number(&in, 2);
    d.gate = (fqla_gate)number(&in, 3), d.beta = (fqla_beta)number(&in, 2);
    d.negative_eigenvalues = byte(&in) % 4 == 0 ? number(&in, 2) : 0;
    d.l2norm = number(&in, 2);
    if (byte(&in) % 4 == 0) take(&in, &d.scale, sizeof d.scale);
    for (i = 0; i < 6; i++) {
        const int64_t heads = i < 2 ? d.heads_qk : d.heads_v, dim = i < 2 ? d.dim_k : i < 4 ? d.dim_v : 1;
        strides[i].head = stride(&in, dim > 0 ? dim : 128);
        strides[i].token = stride(&in, heads * (dim > 0 ? dim : 128));
    }
    if (byte(&in) % 8 == 0) take(&in, &d.warm_up_tolerance, sizeof d.warm_up_tolerance);
    if (byte(&in) % 4 == 0) d.v_split = number(&in, 3);
    if (byte(&in) % 4 == 0) d.segment_chunks = plus_number(&in, -1, 6);
    if (byte(&in) % 3 == 0) d.pool_size = number(&in, 9);
    if (byte(&in) % 3 == 0) d.checkpoint_every = number(&in, 3);
    if (byte(&in) % 2 == 0) d.backward = number(&in, 2);
    d.external_workspace = byte(&in) % 8 == 0;
    if (byte(&in) % 8 == 0) d.low_memory = number(&in, 2);
    if (byte(&in) % 8 == 0) d.needs_residuals = number(&in, 2);
    if (fqla_plan_create(context, &d, &plan) == FQLA_OK) {
        num_seqs = d.num_seqs;
        run_plan(&in, plan, &d, num_seqs);
        seqlens(&in, other, MOST_SEQS);
        i = number(&in, 6);
        if (d.max_tokens == 0 && d.padded_len == 0) d.max_tokens = cu_seqlens[d.num_seqs]; /* what the plan made of 0 */
        if (i <= MOST_SEQS && fqla_plan_update(plan, i, other, NULL) == FQLA_OK) num_seqs = i;
        run_plan(&in, plan, &d, num_seqs);
        fqla_plan_destroy(plan);
    } else if (plan != NULL) {
        abort();
    }
    return 0;
}
