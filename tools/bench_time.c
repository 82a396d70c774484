#include "bench_time.h"

#include "half.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { DIM = 128, GRAPH_CALLS = 10, REPLAYS = 7, MOST_BUFFERS = 24 };

// >>random numbers: the same in every run

/* Sebastiano Vigna's splitmix64: 64 random bits. */
static uint64_t next_random(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* N(0,1) at 65536 equally likely values: 16 random bits pick one. */
static float normal[65536];

/* Half of the table by Newton's method on the distribution function, each from its neighbour; the other half by symmetry. */
static void make_normal_table(void) {
    const double sqrt_2_pi = 2.5066282746310002;
    double x = 0;
    int i, step;
    for (i = 0; i < 32768; i++) {
        const double tail = (32767.5 - i) / 65536; /* the probability of a value above x */
        for (step = 0; step < 4; step++) x += (0.5 * erfc(x / sqrt(2.0)) - tail) * sqrt_2_pi * exp(0.5 * x * x);
        normal[32768 + i] = (float)x;
        normal[32767 - i] = (float)-x;
    }
}

/* count N(0,1) numbers, times a scale. */
static void fill_normal(uint64_t *state, float *values, size_t count, float scale) {
    size_t i;
    uint64_t bits = 0;
    for (i = 0; i < count; i++, bits >>= 16) {
        if (i % 4 == 0) bits = next_random(state);
        values[i] = normal[bits & 0xffff] * scale;
    }
}

static void normalise(float *values, size_t count) {
    double sum = 0;
    size_t i;
    for (i = 0; i < count; i++) sum += (double)values[i] * values[i];
    for (i = 0; i < count; i++) values[i] *= (float)(1 / sqrt(sum));
}

// >>buffers

struct bench_inputs {
    library *lib;
    cuda_graph *graph;
    const row *row;
    fqla_dtype dtype;
    fqla_plan *plan;
    fqla_forward_args forward;
    fqla_backward_args backward;
    fqla_decode_args decode;
    void *buffers[MOST_BUFFERS];
    int count;
    fqla_status status; /* what went wrong first */
    uint64_t random;
};
typedef struct bench_inputs run;

static void *make_buffer(run *r, size_t bytes) {
    void *buffer = NULL;
    if (r->status == FQLA_OK) r->status = fqla_alloc(r->lib->context, bytes > 0 ? bytes : 1, &buffer);
    if (r->status == FQLA_OK) r->buffers[r->count++] = buffer;
    return buffer;
}

static void *upload(run *r, const void *host, size_t bytes) {
    void *buffer = make_buffer(r, bytes);
    if (r->status == FQLA_OK) r->status = fqla_upload(r->lib->context, buffer, host, bytes, NULL);
    return buffer;
}

static void *allocate(run *r, size_t bytes) {
    void *memory = r->status == FQLA_OK ? malloc(bytes + 1) : NULL;
    if (memory == NULL && r->status == FQLA_OK) r->status = FQLA_ERROR_OUT_OF_MEMORY;
    return memory;
}

static size_t tensor_bytes(const run *r, int32_t heads) {
    return (size_t)r->row->tokens * (size_t)heads * DIM * (r->dtype == FQLA_DTYPE_FP32 ? 4 : 2);
}

static size_t gate_bytes(const run *r) { return (size_t)r->row->tokens * (size_t)r->row->heads_v * 4; }
static size_t state_bytes(const run *r) { return (size_t)r->row->num_seqs * (size_t)r->row->heads_v * DIM * DIM * 4; }

/* [T, heads, 128] of N(0,1), or of random unit vectors. */
static void *make_tensor(run *r, int32_t heads, bool unit) {
    const size_t rows = (size_t)r->row->tokens * (size_t)heads;
    void *host = allocate(r, tensor_bytes(r, heads)), *buffer;
    size_t i, j;
    if (host == NULL) return NULL;
    for (i = 0; i < rows; i++) {
        float values[DIM];
        fill_normal(&r->random, values, DIM, 1.0f);
        if (unit) normalise(values, DIM);
        if (r->dtype == FQLA_DTYPE_FP32) memcpy((float *)host + i * DIM, values, sizeof values);
        else
            for (j = 0; j < DIM; j++) ((uint16_t *)host)[i * DIM + j] = half_to_bf16(values[j]);
    }
    buffer = upload(r, host, tensor_bytes(r, heads));
    free(host);
    return buffer;
}

/* [N, HV, 128, 128] of N(0,1) times a scale. */
static void *make_state(run *r, float scale) {
    float *host = allocate(r, state_bytes(r));
    void *buffer;
    if (host == NULL) return NULL;
    fill_normal(&r->random, host, state_bytes(r) / 4, scale);
    buffer = upload(r, host, state_bytes(r));
    free(host);
    return buffer;
}

/* g = logsigmoid(N(0,1)) / 16, but 0 for a quarter of the heads, rounded down and drawn at random; beta = sigmoid(N(0,1)). */
static void make_gates(run *r, const void **g, const void **beta) {
    const size_t heads = (size_t)r->row->heads_v, tokens = (size_t)r->row->tokens;
    float *host = allocate(r, gate_bytes(r));
    size_t *order = allocate(r, heads * sizeof *order), t, h, i;
    bool *is_open = allocate(r, heads);
    *g = *beta = NULL;
    if (host != NULL && order != NULL && is_open != NULL) {
        for (h = 0; h < heads; h++) order[h] = h, is_open[h] = false;
        for (h = 0; h < heads / 4; h++) {
            const size_t pick = h + next_random(&r->random) % (heads - h), head = order[pick];
            order[pick] = order[h];
            is_open[head] = true;
        }
        fill_normal(&r->random, host, tokens * heads, 1.0f);
        for (t = i = 0; t < tokens; t++)
            for (h = 0; h < heads; h++, i++) host[i] = is_open[h] ? 0.0f : -log1pf(expf(-host[i])) / 16.0f;
        *g = upload(r, host, gate_bytes(r));
        fill_normal(&r->random, host, tokens * heads, 1.0f);
        for (i = 0; i < tokens * heads; i++) host[i] = 1.0f / (1.0f + expf(-host[i]));
        *beta = upload(r, host, gate_bytes(r));
    }
    free(host);
    free(order);
    free(is_open);
}

// >>the runs

static void make_plan(run *r, spread s) {
    const row *w = r->row;
    fqla_plan_desc desc;
    int32_t n, *cu_seqlens = allocate(r, ((size_t)w->num_seqs + 1) * sizeof *cu_seqlens);
    if (cu_seqlens == NULL) return;
    cu_seqlens[0] = 0;
    for (n = 0; n < w->num_seqs; n++) cu_seqlens[n + 1] = cu_seqlens[n] + w->lens[n];
    memset(&desc, 0, sizeof desc);
    desc.heads_qk = w->heads_qk;
    desc.heads_v = w->heads_v;
    desc.num_seqs = w->num_seqs;
    desc.cu_seqlens = cu_seqlens;
    desc.dtype = r->dtype;
    desc.backward = w->op == BACKWARD;
    desc.v_split = s.v_split;
    desc.segment_chunks = s.segment_chunks;
    desc.low_memory = desc.backward ? s.low_memory : 0;
    desc.needs_residuals = desc.backward; /* its forward saves them: make_residuals */
    r->status = fqla_plan_create(r->lib->context, &desc, &r->plan);
    free(cu_seqlens);
}

static void make_forward(run *r) {
    const row *w = r->row;
    fqla_forward_args *a = &r->forward;
    a->q = make_tensor(r, w->heads_qk, true);
    a->k = make_tensor(r, w->heads_qk, true);
    a->v = make_tensor(r, w->heads_v, false);
    make_gates(r, &a->g, &a->beta);
    a->h0 = make_state(r, 1.0f);
    a->o = make_buffer(r, tensor_bytes(r, w->heads_v));
    a->ht = w->op == DECODE ? (void *)a->h0 : make_buffer(r, state_bytes(r)); /* a decode's states stay in place */
}

static void make_backward(run *r) {
    const row *w = r->row;
    const fqla_forward_args *f = &r->forward;
    fqla_backward_args *b = &r->backward;
    b->q = f->q, b->k = f->k, b->v = f->v, b->g = f->g, b->beta = f->beta, b->h0 = f->h0;
    b->do_ = make_tensor(r, w->heads_v, false);
    b->dht = make_state(r, 0.125f);
    b->dq = make_buffer(r, tensor_bytes(r, w->heads_qk));
    b->dk = make_buffer(r, tensor_bytes(r, w->heads_qk));
    b->dv = make_buffer(r, tensor_bytes(r, w->heads_v));
    b->dg = make_buffer(r, gate_bytes(r));
    b->dbeta = make_buffer(r, gate_bytes(r));
    b->dh0 = make_buffer(r, state_bytes(r));
}

/* What the plan's forward saves for its backward. */
static void make_residuals(run *r) {
    size_t size = 0;
    if (r->status == FQLA_OK) r->status = fqla_residuals_size(r->plan, &size);
    r->forward.residuals = size > 0 ? make_buffer(r, size) : NULL;
    r->forward.residuals_size = size;
    r->backward.residuals = r->forward.residuals, r->backward.residuals_size = size;
    if (r->status == FQLA_OK) r->status = fqla_forward(r->plan, &r->forward, NULL);
    if (r->status == FQLA_OK) r->status = fqla_synchronize(r->lib->context, NULL);
}

static void make_decode(run *r) {
    const fqla_forward_args *f = &r->forward;
    fqla_decode_args *d = &r->decode;
    d->q = f->q, d->k = f->k, d->v = f->v, d->g = f->g, d->beta = f->beta, d->h0 = f->h0;
    d->o = f->o, d->ht = f->ht;
}

static fqla_status call(void *user, fqla_stream stream) {
    run *r = user;
    switch (r->row->op) {
    case BACKWARD: return fqla_backward(r->plan, &r->backward, stream);
    case DECODE: return fqla_decode(r->plan, &r->decode, stream);
    default: return fqla_forward(r->plan, &r->forward, stream);
    }
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static int compare_doubles(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* The first call warms up, and says how many a measurement needs to be long enough for the clock. */
static fqla_status time_on_cpu(run *r, double *seconds) {
    double times[REPLAYS], start = now(), first, total = 0;
    fqla_status status = call(r, NULL);
    int calls, i, count = 0;
    first = now() - start;
    calls = first > 2e-3 ? 1 : first > 2e-6 ? (int)ceil(2e-3 / first) : 1000;
    while (status == FQLA_OK && count < REPLAYS && (count == 0 || total < 3)) {
        start = now();
        for (i = 0; i < calls && status == FQLA_OK; i++) status = call(r, NULL);
        times[count] = (now() - start) / calls;
        total += times[count++] * calls;
    }
    if (status != FQLA_OK) return status;
    qsort(times, (size_t)count, sizeof *times, compare_doubles);
    *seconds = times[count / 2];
    return FQLA_OK;
}

/* The status, with a line in error where it is none of success. */
static fqla_status told(const run *r, char *error) {
    if (r->status != FQLA_OK && error[0] == '\0')
        fail(error, "%s", r->lib->message[0] != '\0' ? r->lib->message : fqla_status_string(r->status));
    return r->status;
}

static void free_buffers(run *r, int left) {
    while (r->count > left) fqla_free(r->lib->context, r->buffers[--r->count]);
}

static void drop_plan(run *r) {
    fqla_plan_destroy(r->plan);
    r->plan = NULL;
}

fqla_status bench_inputs_make(library *lib, cuda_graph *graph, const row *w, bench_inputs **inputs, char *error) {
    const spread any = { 0, 0, 0 };
    run *r = calloc(1, sizeof *r);
    fqla_status status;
    *inputs = NULL;
    error[0] = lib->message[0] = '\0';
    if (r == NULL) {
        fail(error, "out of memory");
        return FQLA_ERROR_OUT_OF_MEMORY;
    }
    r->lib = lib;
    r->graph = graph;
    r->row = w;
    r->dtype = graph != NULL ? FQLA_DTYPE_BF16 : FQLA_DTYPE_FP32;
    r->random = 1;
    if (normal[65535] == 0.0f) make_normal_table();
    make_plan(r, any); /* is there one? */
    drop_plan(r);
    make_forward(r);
    if (w->op == BACKWARD) make_backward(r);
    if (w->op == DECODE) make_decode(r);
    status = told(r, error);
    if (status == FQLA_OK) *inputs = r;
    else bench_inputs_free(r);
    return status;
}

void bench_inputs_free(bench_inputs *inputs) {
    if (inputs == NULL) return;
    free_buffers(inputs, 0);
    free(inputs);
}

fqla_status bench_time(bench_inputs *r, spread s, timing *t, char *error) {
    const int count = r->count;
    memset(t, 0, sizeof *t);
    error[0] = r->lib->message[0] = '\0';
    r->status = FQLA_OK;
    make_plan(r, s);
    if (r->status == FQLA_OK) r->status = fqla_plan_info(r->plan, &t->plan);
    if (r->status == FQLA_OK && r->row->op == BACKWARD) make_residuals(r);
    if (r->status == FQLA_OK)
        r->status = r->graph != NULL ? cuda_graph_time(r->graph, call, r, GRAPH_CALLS, REPLAYS, &t->seconds, error)
                                     : time_on_cpu(r, &t->seconds);
    free_buffers(r, count);
    drop_plan(r);
    return told(r, error);
}
