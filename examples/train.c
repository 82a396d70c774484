/* A small hybrid language model, trained from nothing on a text file, a byte a token: three gated-delta layers, as Qwen3-Next has
   them (short convolution, raw gates, l2norm, gated norm), and one layer of softmax attention.

   - The gated-delta rule is the library's: fqla_forward and fqla_backward over the packed batch, fqla_decode at the end, when the
     model writes a text of its own. All else, forward, backward and Adam, is plain C below, float32 on the CPU.
   - On a GPU the gated-delta rule alone runs there, on bfloat16.
   - Ctrl-C saves a checkpoint, a safetensors file; --resume goes on from it, on the CPU to the same losses bit for bit.

        cc -O2 train.c -ldl -lpthread -lm && ./a.out --help              (on Windows no -ldl)

   Below: helpers, maths, model, layers, the recurrence, forward and backward, optimiser, checkpoints, sampling, main. */
#if !defined(_WIN32) && !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L /* clock_gettime, isatty */
#endif
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define FLASHQLA_IMPLEMENTATION
#include "../flashqla.h"

enum {
    BATCH = 4, TOKENS = 256,   /* sequences of a step, a thread each, and their tokens */
    WRITTEN = 300, PROMPT = 64, ROWS = PROMPT + WRITTEN, /* tokens of the sample; ROWS >= TOKENS */
    BYTES = 256,               /* the vocabulary */
    WIDTH = 128,               /* of the residual stream */
    HIDDEN = 256,              /* of the MLPs */
    LAYERS = 4, DELTAS = 3,    /* gated-delta layers first, attention last */
    HEADS_QK = 1, HEADS_V = 2, HEAD = 128, /* of the gated-delta layers; a GPU takes heads of 128 alone */
    QKV = (2 * HEADS_QK + HEADS_V) * HEAD, VALUE = HEADS_V * HEAD,
    PROJECTED = QKV + 2 * HEADS_V + VALUE, /* a row of the projection: q k v, a, b, and z, which gates the output */
    MIXED = QKV + 8,           /* a row for the library: q k v, a, b, and up to a multiple of 16 bytes */
    TAPS = 4,                  /* of the convolution */
    QUERIES = 4, QUERY = WIDTH / QUERIES, /* heads of the attention */
    RECENT = 50,               /* steps that the losses shown are the mean of */
    MOST = 1000000             /* steps; and the largest seed */
};

/* ---- Helpers ---- */

static void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

static void must(fqla_status status) {
    if (status != FQLA_OK) die("%s: %s", fqla_status_name(status), fqla_status_string(status));
}

static void log_line(fqla_log_level level, const char *message, void *user) {
    (void)level, (void)user;
    fprintf(stderr, "%s\n", message);
}

static void *allocate(size_t bytes) {
    void *memory = calloc(1, bytes);
    if (memory == NULL) die("out of memory");
    return memory;
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Number `index` of a random sequence (splitmix64): what a step draws depends on the seed and the step alone. */
static uint64_t random_bits(uint64_t seed, uint64_t index) {
    uint64_t x = (seed << 40) + (index + 1) * 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static float uniform(uint64_t seed, uint64_t index) { return (float)(random_bits(seed, index) >> 40) / 16777216.0f; }

/* Run task(job, 0 .. count - 1), each in a thread, 0 in this one. No result depends on which thread did what. */
typedef struct thread_job {
    void (*task)(void *job, int index);
    void *job;
    int index;
    pthread_t thread;
} thread_job;

static void *thread_main(void *argument) {
    const thread_job *j = argument;
    j->task(j->job, j->index);
    return NULL;
}

static void parallel(void (*task)(void *job, int index), void *job, int count) {
    thread_job jobs[BATCH];
    for (int i = 1; i < count; i++) {
        jobs[i] = (thread_job){ .task = task, .job = job, .index = i };
        if (pthread_create(&jobs[i].thread, NULL, thread_main, &jobs[i]) != 0) die("no thread %d of %d", i, count);
    }
    task(job, 0);
    for (int i = 1; i < count; i++) pthread_join(jobs[i].thread, NULL);
}

/* ---- Maths ---- */

/* A matrix to read: element [i][j] is at[i * row + j * column]. */
typedef struct view {
    const float *at;
    int row, column;
} view;

/* y = a b, or y += a b; a is m x k, b k x n, rows of y are y_row apart. Two rows of y at a time over a panel of b that the cache
   holds; the innermost loop has a fixed count, so that a compiler makes vector code of it at -O2. */
static void matmul(float *y, int y_row, view a, view b, int m, int n, int k, bool add) {
    enum { PANEL = 64, DEPTH = 64 };
    for (int j0 = 0; j0 < n; j0 += PANEL)
        for (int k0 = 0; k0 < k; k0 += DEPTH) {
            const int width = n - j0 < PANEL ? n - j0 : PANEL, depth = k - k0 < DEPTH ? k - k0 : DEPTH;
            float panel[DEPTH][PANEL] = { { 0 } };
            for (int l = 0; l < depth; l++)
                for (int j = 0; j < width; j++) panel[l][j] = b.at[(k0 + l) * b.row + (j0 + j) * b.column];
            for (int i = 0; i < m; i += 2) {
                const int rows[2] = { i, i + 1 < m ? i + 1 : i }; /* the last one twice where m is odd */
                float left[2][DEPTH] = { { 0 } }, sum[2][PANEL] = { { 0 } };
                for (int r = 0; r < 2; r++) {
                    for (int l = 0; l < depth; l++) left[r][l] = a.at[rows[r] * a.row + (k0 + l) * a.column];
                    if (add || k0 > 0) memcpy(sum[r], y + rows[r] * y_row + j0, (size_t)width * sizeof(float));
                }
                for (int l = 0; l < depth; l += 4) {
                    const float *p = left[0] + l, *q = left[1] + l;
                    for (int j = 0; j < PANEL; j++) {
                        const float b0 = panel[l][j], b1 = panel[l + 1][j], b2 = panel[l + 2][j], b3 = panel[l + 3][j];
                        sum[0][j] += p[0] * b0 + p[1] * b1 + p[2] * b2 + p[3] * b3;
                        sum[1][j] += q[0] * b0 + q[1] * b1 + q[2] * b2 + q[3] * b3;
                    }
                }
                for (int r = 0; r < 2; r++) memcpy(y + rows[r] * y_row + j0, sum[r], (size_t)width * sizeof(float));
            }
        }
}

/* y = x w (or y += x w) for `rows` rows of x [in], w [in][out]; all dense. */
static void linear(float *y, const float *x, const float *w, int rows, int in, int out, bool add) {
    matmul(y, out, (view){ x, in, 1 }, (view){ w, out, 1 }, rows, out, in, add);
}

/* Its gradients: dx = dy w^T, dw += x^T dy. */
static void linear_backward(float *dx, float *dw, const float *dy, const float *x, const float *w, int rows, int in, int out) {
    matmul(dx, in, (view){ dy, out, 1 }, (view){ w, 1, out }, rows, in, out, false);
    matmul(dw, out, (view){ x, 1, in }, (view){ dy, out, 1 }, in, out, rows, true);
}

static float dot(const float *x, const float *y, int n) {
    float sum[4] = { 0 };
    for (int i = 0; i < n; i += 4) /* n: a multiple of 4 */
        for (int j = 0; j < 4; j++) sum[j] += x[i + j] * y[i + j];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

static float inverse_rms(const float *x, int n) { return 1 / sqrtf(dot(x, x, n) / (float)n + 1e-6f); }

static void rmsnorm(float *y, const float *x, const float *w, int n) {
    const float r = inverse_rms(x, n);
    for (int i = 0; i < n; i++) y[i] = x[i] * r * w[i];
}

/* dx += and dw += of one row. dy is lost. */
static void rmsnorm_backward(float *dx, float *dw, float *dy, const float *x, const float *w, int n) {
    const float r = inverse_rms(x, n);
    for (int i = 0; i < n; i++) {
        dw[i] += dy[i] * x[i] * r;
        dy[i] *= w[i];
    }
    const float along = dot(dy, x, n) * r * r / (float)n;
    for (int i = 0; i < n; i++) dx[i] += r * (dy[i] - x[i] * along);
}

static float sigmoid(float x) { return 1 / (1 + expf(-x)); }
static float silu(float x) { return x * sigmoid(x); }
static float silu_slope(float x) { const float s = sigmoid(x); return s * (1 + x * (1 - s)); }

/* ---- Model ---- */

/* Weights, and of the same form their gradients and Adam's two moments. A matrix is [in][out]. */
typedef struct delta_weights {
    float norm[WIDTH], project[WIDTH][PROJECTED], taps[TAPS][QKV];
    float A_log[HEADS_V], dt_bias[HEADS_V];
    float gated_norm[HEAD], out[VALUE][WIDTH];
} delta_weights;

typedef struct attention_weights {
    float norm[WIDTH], project[WIDTH][3 * WIDTH], out[WIDTH][WIDTH];
} attention_weights;

typedef struct mlp_weights {
    float norm[WIDTH], up[WIDTH][2 * HIDDEN], down[HIDDEN][WIDTH]; /* up: the gate, and what it gates */
} mlp_weights;

typedef struct model {
    float embedding[BYTES][WIDTH]; /* of the bytes, on the way in and on the way out */
    delta_weights delta[DELTAS];
    attention_weights attention;
    mlp_weights mlp[LAYERS];
    float norm[WIDTH];
} model;

enum { WEIGHTS = sizeof(model) / sizeof(float) };

/* What is computed of one sequence: kept for the backward, and for the tokens to come, which read the convolution's inputs and the
   attention's keys and values of the rows before theirs. */
typedef struct delta_rows {
    float normed[ROWS][WIDTH], projected[ROWS][PROJECTED], mixed[ROWS][MIXED], o[ROWS][VALUE], gated[ROWS][VALUE];
} delta_rows;

typedef struct attention_rows {
    float normed[ROWS][WIDTH], projected[ROWS][3 * WIDTH], shares[QUERIES][ROWS][ROWS], o[ROWS][WIDTH];
} attention_rows;

typedef struct mlp_rows {
    float normed[ROWS][WIDTH], up[ROWS][2 * HIDDEN], gated[ROWS][HIDDEN];
} mlp_rows;

typedef struct sequence {
    uint8_t bytes[ROWS + 1];
    float x[LAYERS + 1][ROWS][WIDTH], middle[LAYERS][ROWS][WIDTH]; /* the residual stream before a layer, and before its MLP */
    delta_rows delta[DELTAS];
    attention_rows attention;
    mlp_rows mlp[LAYERS];
    float normed[ROWS][WIDTH], logits[ROWS][BYTES];
    double loss; /* summed over the tokens */
    /* the backward's: gradients of the residual stream, then of what is inside the layer at hand; of the weights */
    float dx[TOKENS][WIDTH], dnormed[TOKENS][WIDTH];
    float dprojected[TOKENS][PROJECTED], dmixed[TOKENS][MIXED], do_[TOKENS][VALUE], dgated[TOKENS][VALUE];
    float dqkv[TOKENS][3 * WIDTH], dshares[TOKENS][TOKENS], dattended[TOKENS][WIDTH];
    float dup[TOKENS][2 * HIDDEN], dhidden[TOKENS][HIDDEN];
    model gradient;
} sequence;

/* A gated-delta layer's tensors where the backend works, all sequences packed. */
typedef struct device_layer {
    void *mixed, *o, *residuals;
    float *gates; /* A_log, then dt_bias */
    float *state; /* of the sample */
} device_layer;

typedef struct trainer {
    /* what a checkpoint holds */
    model *weights, *moment, *variance;
    float losses[RECENT]; /* step s left s % RECENT */
    int step, steps;
    uint64_t seed;
    /* the rest */
    const uint8_t *text;
    size_t size;
    sequence *sequences; /* [BATCH] */
    model *gradient;
    double squares[BATCH]; /* of parts of the gradient */
    fqla_context *context;
    fqla_plan *batch, *sample;
    size_t element, residuals_size; /* bytes: of a number in the plans' dtype, of a layer's residuals */
    uint16_t *staging;
    device_layer delta[DELTAS];
    void *dmixed, *do_;
    float *dgates;
    void *owned[3 + 5 * DELTAS]; /* the backend's memory */
    int owned_count;
} trainer;

static void fill(trainer *t, uint64_t *drawn, float *w, size_t count, float deviation) {
    for (size_t i = 0; i < count; i++) w[i] = deviation * sqrtf(3) * (2 * uniform(t->seed, (*drawn)++) - 1);
}

static void initialise(trainer *t) {
    const float in = 1 / sqrtf(WIDTH), out = 1 / sqrtf(2 * LAYERS); /* 2 * LAYERS outputs add up in the residual stream */
    model *w = t->weights;
    uint64_t drawn = (uint64_t)1 << 32; /* beyond what the steps draw */
    fill(t, &drawn, &w->embedding[0][0], BYTES * WIDTH, 0.05f);
    for (int i = 0; i < WIDTH; i++) {
        w->norm[i] = w->attention.norm[i] = 1;
        for (int l = 0; l < LAYERS; l++) w->mlp[l].norm[i] = 1;
        for (int l = 0; l < DELTAS; l++) w->delta[l].norm[i] = 1;
    }
    for (int l = 0; l < DELTAS; l++) {
        delta_weights *d = &w->delta[l];
        fill(t, &drawn, &d->project[0][0], WIDTH * PROJECTED, in);
        fill(t, &drawn, &d->taps[0][0], TAPS * QKV, 0.5f);
        fill(t, &drawn, &d->out[0][0], VALUE * WIDTH, out / sqrtf(VALUE));
        for (int i = 0; i < HEAD; i++) d->gated_norm[i] = 1;
        for (int h = 0; h < HEADS_V; h++) { /* rates of forgetting from 0.001 to 1.6 a token, as in Mamba 2 */
            const float dt = 0.001f * powf(100, uniform(t->seed, drawn++));
            d->A_log[h] = logf(1 + 15 * uniform(t->seed, drawn++));
            d->dt_bias[h] = logf(expm1f(dt)); /* softplus of this is dt */
        }
    }
    fill(t, &drawn, &w->attention.project[0][0], WIDTH * 3 * WIDTH, in);
    fill(t, &drawn, &w->attention.out[0][0], WIDTH * WIDTH, out * in);
    for (int l = 0; l < LAYERS; l++) {
        fill(t, &drawn, &w->mlp[l].up[0][0], WIDTH * 2 * HIDDEN, in);
        fill(t, &drawn, &w->mlp[l].down[0][0], HIDDEN * WIDTH, out / sqrtf(HIDDEN));
    }
}

/* ---- Layers: rows first .. first + count - 1 of a sequence; backward: rows 0 .. TOKENS - 1 ---- */

static void mlp(const mlp_weights *w, mlp_rows *r, float (*y)[WIDTH], float (*x)[WIDTH], int first, int count) {
    for (int t = first; t < first + count; t++) rmsnorm(r->normed[t], x[t], w->norm, WIDTH);
    linear(r->up[first], r->normed[first], w->up[0], count, WIDTH, 2 * HIDDEN, false);
    for (int t = first; t < first + count; t++)
        for (int i = 0; i < HIDDEN; i++) r->gated[t][i] = silu(r->up[t][i]) * r->up[t][HIDDEN + i];
    memcpy(y[first], x[first], (size_t)count * sizeof y[0]);
    linear(y[first], r->gated[first], w->down[0], count, HIDDEN, WIDTH, true);
}

/* s->dx, the gradient of y, becomes that of x: here and below. */
static void mlp_backward(const mlp_weights *w, const mlp_rows *r, mlp_weights *dw, float (*x)[WIDTH], sequence *s) {
    linear_backward(s->dhidden[0], dw->down[0], s->dx[0], r->gated[0], w->down[0], TOKENS, HIDDEN, WIDTH);
    for (int t = 0; t < TOKENS; t++)
        for (int i = 0; i < HIDDEN; i++) {
            s->dup[t][i] = s->dhidden[t][i] * r->up[t][HIDDEN + i] * silu_slope(r->up[t][i]);
            s->dup[t][HIDDEN + i] = s->dhidden[t][i] * silu(r->up[t][i]);
        }
    linear_backward(s->dnormed[0], dw->up[0], s->dup[0], r->normed[0], w->up[0], TOKENS, WIDTH, 2 * HIDDEN);
    for (int t = 0; t < TOKENS; t++) rmsnorm_backward(s->dx[t], dw->norm, s->dnormed[t], x[t], w->norm, WIDTH);
}

/* Causal softmax attention over the last TOKENS tokens. It needs no positions: the layers below know about order. */
static void attention(const attention_weights *w, attention_rows *r, float (*y)[WIDTH], float (*x)[WIDTH], int first, int count) {
    const float scale = 1 / sqrtf(QUERY);
    const int end = first + count, row = 3 * WIDTH;
    for (int t = first; t < end; t++) rmsnorm(r->normed[t], x[t], w->norm, WIDTH);
    linear(r->projected[first], r->normed[first], w->project[0], count, WIDTH, row, false);
    for (int h = 0; h < QUERIES; h++) {
        const float *q = r->projected[first] + h * QUERY, *k = r->projected[0] + WIDTH + h * QUERY, *v = k + WIDTH;
        float (*share)[ROWS] = r->shares[h];
        matmul(share[first], ROWS, (view){ q, row, 1 }, (view){ k, 1, row }, count, end, QUERY, false);
        for (int t = first; t < end; t++) {
            const int oldest = t < TOKENS ? 0 : t - TOKENS + 1;
            float most = share[t][t], sum = 0;
            for (int u = oldest; u < t; u++) most = fmaxf(most, share[t][u]);
            for (int u = 0; u < end; u++) {
                share[t][u] = u < oldest || u > t ? 0 : expf((share[t][u] - most) * scale);
                sum += share[t][u];
            }
            for (int u = oldest; u <= t; u++) share[t][u] /= sum;
        }
        matmul(r->o[first] + h * QUERY, WIDTH, (view){ share[first], ROWS, 1 }, (view){ v, row, 1 }, count, QUERY, end, false);
    }
    memcpy(y[first], x[first], (size_t)count * sizeof y[0]);
    linear(y[first], r->o[first], w->out[0], count, WIDTH, WIDTH, true);
}

static void attention_backward(const attention_weights *w, const attention_rows *r, attention_weights *dw, float (*x)[WIDTH],
                               sequence *s) {
    const float scale = 1 / sqrtf(QUERY);
    const int row = 3 * WIDTH;
    linear_backward(s->dattended[0], dw->out[0], s->dx[0], r->o[0], w->out[0], TOKENS, WIDTH, WIDTH);
    for (int h = 0; h < QUERIES; h++) {
        const float *q = r->projected[0] + h * QUERY, *k = q + WIDTH, *v = k + WIDTH;
        float *dq = s->dqkv[0] + h * QUERY, *dk = dq + WIDTH, *dv = dk + WIDTH;
        const view do_ = { s->dattended[0] + h * QUERY, WIDTH, 1 }, dscore = { s->dshares[0], TOKENS, 1 };
        matmul(s->dshares[0], TOKENS, do_, (view){ v, 1, row }, TOKENS, TOKENS, QUERY, false);
        matmul(dv, row, (view){ r->shares[h][0], 1, ROWS }, do_, TOKENS, QUERY, TOKENS, false);
        for (int t = 0; t < TOKENS; t++) { /* the scores' gradient in the shares' place */
            const float mean = dot(r->shares[h][t], s->dshares[t], TOKENS);
            for (int u = 0; u < TOKENS; u++) s->dshares[t][u] = r->shares[h][t][u] * (s->dshares[t][u] - mean) * scale;
        }
        matmul(dq, row, dscore, (view){ k, row, 1 }, TOKENS, QUERY, TOKENS, false);
        matmul(dk, row, (view){ dscore.at, 1, TOKENS }, (view){ q, row, 1 }, TOKENS, QUERY, TOKENS, false);
    }
    linear_backward(s->dnormed[0], dw->project[0], s->dqkv[0], r->normed[0], w->project[0], TOKENS, WIDTH, row);
    for (int t = 0; t < TOKENS; t++) rmsnorm_backward(s->dx[t], dw->norm, s->dnormed[t], x[t], w->norm, WIDTH);
}

/* A row of the causal convolution over the last TAPS rows, a channel at a time. */
static void convolve(float y[QKV], float (*x)[PROJECTED], const float (*taps)[QKV], int t) {
    for (int i = 0; i < QKV; i++) y[i] = 0;
    for (int tap = 0; tap < TAPS && tap <= t; tap++)
        for (int i = 0; i < QKV; i++) y[i] += taps[tap][i] * x[t - tap][i];
}

/* A gated-delta layer up to the recurrence: what the library reads. */
static void delta_before(const delta_weights *w, delta_rows *r, float (*x)[WIDTH], int first, int count) {
    for (int t = first; t < first + count; t++) rmsnorm(r->normed[t], x[t], w->norm, WIDTH);
    linear(r->projected[first], r->normed[first], w->project[0], count, WIDTH, PROJECTED, false);
    for (int t = first; t < first + count; t++) {
        float *y = r->mixed[t];
        convolve(y, r->projected, w->taps, t);
        for (int i = 0; i < QKV; i++) y[i] = silu(y[i]);
        memcpy(y + QKV, r->projected[t] + QKV, 2 * HEADS_V * sizeof *y); /* a and b */
    }
}

/* From s->dmixed and what delta_after_backward left in s->dprojected. */
static void delta_before_backward(const delta_weights *w, delta_rows *r, delta_weights *dw, float (*x)[WIDTH], sequence *s) {
    for (int t = 0; t < TOKENS; t++) {
        float y[QKV], *dy = s->dmixed[t];
        memset(s->dprojected[t], 0, QKV * sizeof *dy);
        memcpy(s->dprojected[t] + QKV, dy + QKV, 2 * HEADS_V * sizeof *dy);
        convolve(y, r->projected, w->taps, t);
        for (int i = 0; i < QKV; i++) dy[i] *= silu_slope(y[i]);
        for (int tap = 0; tap < TAPS && tap <= t; tap++)
            for (int i = 0; i < QKV; i++) {
                s->dprojected[t - tap][i] += w->taps[tap][i] * dy[i];
                dw->taps[tap][i] += r->projected[t - tap][i] * dy[i];
            }
    }
    linear_backward(s->dnormed[0], dw->project[0], s->dprojected[0], r->normed[0], w->project[0], TOKENS, WIDTH, PROJECTED);
    for (int t = 0; t < TOKENS; t++) rmsnorm_backward(s->dx[t], dw->norm, s->dnormed[t], x[t], w->norm, WIDTH);
}

/* The rest of it: the output, normalised a head, gated by z, projected. */
static void delta_after(const delta_weights *w, delta_rows *r, float (*y)[WIDTH], float (*x)[WIDTH], int first, int count) {
    for (int t = first; t < first + count; t++) {
        const float *z = r->projected[t] + PROJECTED - VALUE;
        for (int h = 0; h < VALUE; h += HEAD) rmsnorm(r->gated[t] + h, r->o[t] + h, w->gated_norm, HEAD);
        for (int i = 0; i < VALUE; i++) r->gated[t][i] *= silu(z[i]);
    }
    memcpy(y[first], x[first], (size_t)count * sizeof y[0]);
    linear(y[first], r->gated[first], w->out[0], count, VALUE, WIDTH, true);
}

static void delta_after_backward(const delta_weights *w, const delta_rows *r, delta_weights *dw, sequence *s) {
    linear_backward(s->dgated[0], dw->out[0], s->dx[0], r->gated[0], w->out[0], TOKENS, VALUE, WIDTH);
    memset(s->do_, 0, sizeof s->do_);
    for (int t = 0; t < TOKENS; t++) {
        const float *z = r->projected[t] + PROJECTED - VALUE;
        float *dz = s->dprojected[t] + PROJECTED - VALUE, *dy = s->dgated[t];
        for (int h = 0; h < VALUE; h += HEAD) {
            float normed[HEAD];
            rmsnorm(normed, r->o[t] + h, w->gated_norm, HEAD);
            for (int i = 0; i < HEAD; i++) {
                dz[h + i] = dy[h + i] * normed[i] * silu_slope(z[h + i]);
                dy[h + i] *= silu(z[h + i]);
            }
            rmsnorm_backward(s->do_[t] + h, dw->gated_norm, dy + h, r->o[t] + h, w->gated_norm, HEAD);
        }
    }
}

static void head(const model *w, sequence *s, int first, int count) {
    for (int t = first; t < first + count; t++) rmsnorm(s->normed[t], s->x[LAYERS][t], w->norm, WIDTH);
    matmul(s->logits[first], BYTES, (view){ s->normed[first], WIDTH, 1 }, (view){ w->embedding[0], 1, WIDTH }, count, BYTES, WIDTH,
           false);
}

/* The loss, the mean of -log of the next byte's probability over the batch, and its gradient, which replaces the logits. */
static void head_backward(const model *w, sequence *s) {
    s->loss = 0;
    for (int t = 0; t < TOKENS; t++) {
        float *y = s->logits[t], most = y[0], sum = 0;
        for (int i = 1; i < BYTES; i++) most = fmaxf(most, y[i]);
        s->loss += (double)(most - y[s->bytes[t + 1]]);
        for (int i = 0; i < BYTES; i++) sum += y[i] = expf(y[i] - most);
        s->loss += (double)logf(sum);
        for (int i = 0; i < BYTES; i++) y[i] /= sum * BATCH * TOKENS;
        y[s->bytes[t + 1]] -= 1.0f / (BATCH * TOKENS);
    }
    linear(s->dnormed[0], s->logits[0], w->embedding[0], TOKENS, BYTES, WIDTH, false);
    matmul(s->gradient.embedding[0], WIDTH, (view){ s->logits[0], 1, BYTES }, (view){ s->normed[0], WIDTH, 1 }, BYTES, WIDTH,
           TOKENS, true);
    memset(s->dx, 0, sizeof s->dx);
    for (int t = 0; t < TOKENS; t++)
        rmsnorm_backward(s->dx[t], s->gradient.norm, s->dnormed[t], s->x[LAYERS][t], w->norm, WIDTH);
}

/* ---- The recurrence: the library's part ---- */

static uint16_t to_bf16(float x) { /* to the nearest, to even on a tie */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static float from_bf16(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

/* A tensor of the plans' dtype, float32 on the CPU and bfloat16 on a GPU, from its element number `offset`. */
static void *at(const trainer *t, void *tensor, size_t offset) { return (char *)tensor + offset * t->element; }

static void put(trainer *t, void *tensor, const float *from, size_t count) {
    const void *data = from;
    if (t->element == sizeof(uint16_t)) {
        for (size_t i = 0; i < count; i++) t->staging[i] = to_bf16(from[i]);
        data = t->staging;
    }
    must(fqla_upload(t->context, tensor, data, count * t->element, NULL));
}

static void get(trainer *t, float *to, const void *tensor, size_t count) {
    const bool narrow = t->element == sizeof(uint16_t);
    must(fqla_download(t->context, narrow ? (void *)t->staging : to, tensor, count * t->element, NULL)); /* waits for the run */
    for (size_t i = 0; narrow && i < count; i++) to[i] = from_bf16(t->staging[i]);
}

static void *device_allocate(trainer *t, size_t bytes) {
    void **memory = &t->owned[t->owned_count++];
    must(fqla_alloc(t->context, bytes, memory));
    return *memory;
}

static void make_plans(trainer *t, fqla_backend backend) {
    const fqla_strides mixed = { MIXED, HEAD }, gates = { MIXED, 1 };
    int32_t cu_seqlens[BATCH + 1];
    fqla_context_summary summary;
    must(fqla_context_create(&(fqla_context_desc){ .backend = backend, .log = log_line }, &t->context));
    must(fqla_context_info(t->context, &summary));
    const bool cuda = summary.backend == FQLA_BACKEND_CUDA;
    printf("gated-delta layers on the %s\n", cuda ? summary.device_name : "CPU");

    for (int n = 0; n <= BATCH; n++) cu_seqlens[n] = n * TOKENS;
    fqla_plan_desc desc = { .heads_qk = HEADS_QK, .heads_v = HEADS_V, .num_seqs = BATCH, .cu_seqlens = cu_seqlens,
                            .dtype = cuda ? FQLA_DTYPE_BF16 : FQLA_DTYPE_FP32, .gate = FQLA_GATE_RAW, .beta = FQLA_BETA_SIGMOID,
                            .l2norm = 1, /* q, k, v, a and b lie in one row: */
                            .strides = { .q = mixed, .k = mixed, .v = mixed, .g = gates, .beta = gates }, .backward = 1 };
    must(fqla_plan_create(t->context, &desc, &t->batch));
    cu_seqlens[1] = PROMPT;
    desc.num_seqs = 1;
    desc.backward = 0;
    must(fqla_plan_create(t->context, &desc, &t->sample));

    const size_t rows = BATCH * TOKENS;
    t->element = cuda ? sizeof(uint16_t) : sizeof(float);
    t->staging = allocate(rows * MIXED * sizeof *t->staging);
    t->dmixed = device_allocate(t, rows * MIXED * t->element);
    t->do_ = device_allocate(t, rows * VALUE * t->element);
    t->dgates = device_allocate(t, 2 * HEADS_V * sizeof(float));
    must(fqla_residuals_size(t->batch, &t->residuals_size));
    for (int l = 0; l < DELTAS; l++) {
        t->delta[l].mixed = device_allocate(t, rows * MIXED * t->element);
        t->delta[l].o = device_allocate(t, rows * VALUE * t->element);
        t->delta[l].gates = device_allocate(t, 2 * HEADS_V * sizeof(float));
        t->delta[l].state = device_allocate(t, HEADS_V * HEAD * HEAD * sizeof(float));
        if (t->residuals_size > 0) t->delta[l].residuals = device_allocate(t, t->residuals_size);
    }
}

static void free_plans(trainer *t) {
    for (int i = 0; i < t->owned_count; i++) must(fqla_free(t->context, t->owned[i]));
    fqla_plan_destroy(t->batch);
    fqla_plan_destroy(t->sample);
    must(fqla_context_destroy(t->context));
    free(t->staging);
}

enum { K = HEADS_QK * HEAD, V = 2 * K, A = QKV, B = QKV + HEADS_V }; /* where they start in a row of mixed; q is first */

/* o of rows first .. first + count - 1. A batch keeps what its backward will want; a sample keeps its state: its first rows are a
   prompt, each later one a step of fqla_decode with the state updated in place. */
static void recurrence(trainer *t, int layer, int sequences, int first, int count) {
    const delta_weights *w = &t->weights->delta[layer];
    const device_layer *d = &t->delta[layer];
    const size_t rows = (size_t)count;
    float *A_log = d->gates, *dt_bias = d->gates + HEADS_V;
    for (int n = 0; n < sequences; n++)
        put(t, at(t, d->mixed, (size_t)n * rows * MIXED), t->sequences[n].delta[layer].mixed[first], rows * MIXED);
    must(fqla_upload(t->context, A_log, w->A_log, sizeof w->A_log, NULL));
    must(fqla_upload(t->context, dt_bias, w->dt_bias, sizeof w->dt_bias, NULL));

    void *q = d->mixed, *k = at(t, q, K), *v = at(t, q, V), *a = at(t, q, A), *b = at(t, q, B);
    if (first > 0)
        must(fqla_decode(t->sample, &(fqla_decode_args){ .q = q, .k = k, .v = v, .g = a, .beta = b, .A_log = A_log,
                                                         .dt_bias = dt_bias, .o = d->o, .h0 = d->state, .ht = d->state }, NULL));
    else if (sequences < BATCH)
        must(fqla_forward(t->sample, &(fqla_forward_args){ .q = q, .k = k, .v = v, .g = a, .beta = b, .A_log = A_log,
                                                           .dt_bias = dt_bias, .o = d->o, .ht = d->state }, NULL));
    else
        must(fqla_forward(t->batch, &(fqla_forward_args){ .q = q, .k = k, .v = v, .g = a, .beta = b, .A_log = A_log,
                                                          .dt_bias = dt_bias, .o = d->o, .residuals = d->residuals,
                                                          .residuals_size = t->residuals_size }, NULL));
    for (int n = 0; n < sequences; n++)
        get(t, t->sequences[n].delta[layer].o[first], at(t, d->o, (size_t)n * rows * VALUE), rows * VALUE);
}

/* From the sequences' do_ their dmixed, and the gates' gradients, summed over the batch, into `dw`. */
static void recurrence_backward(trainer *t, int layer, delta_weights *dw) {
    const device_layer *d = &t->delta[layer];
    void *q = d->mixed, *dq = t->dmixed;
    for (int n = 0; n < BATCH; n++) put(t, at(t, t->do_, (size_t)n * TOKENS * VALUE), t->sequences[n].do_[0], TOKENS * VALUE);
    must(fqla_backward(t->batch, &(fqla_backward_args){
        .q = q, .k = at(t, q, K), .v = at(t, q, V), .g = at(t, q, A), .beta = at(t, q, B), .A_log = d->gates,
        .dt_bias = d->gates + HEADS_V, .do_ = t->do_,
        .dq = dq, .dk = at(t, dq, K), .dv = at(t, dq, V), .dg = at(t, dq, A), .dbeta = at(t, dq, B), .dA_log = t->dgates,
        .ddt_bias = t->dgates + HEADS_V, .residuals = d->residuals, .residuals_size = t->residuals_size }, NULL));
    for (int n = 0; n < BATCH; n++) get(t, t->sequences[n].dmixed[0], at(t, dq, (size_t)n * TOKENS * MIXED), TOKENS * MIXED);
    must(fqla_download(t->context, dw->A_log, t->dgates, sizeof dw->A_log, NULL));
    must(fqla_download(t->context, dw->dt_bias, t->dgates + HEADS_V, sizeof dw->dt_bias, NULL));
}

/* ---- Forward and backward: the sequences side by side between two recurrences, which take them together ---- */

typedef struct part {
    trainer *t;
    int number; /* 0 .. DELTAS: the recurrences of that number come after it in the forward, before it in the backward */
    int first, count;
} part;

static void forward_part(void *job, int index) {
    const part *p = job;
    const model *w = p->t->weights;
    sequence *s = &p->t->sequences[index];
    const int first = p->first, count = p->count, layer = p->number, before = layer - 1;
    if (layer == 0) {
        for (int t = first; t < first + count; t++) memcpy(s->x[0][t], w->embedding[s->bytes[t]], sizeof s->x[0][t]);
    } else {
        delta_after(&w->delta[before], &s->delta[before], s->middle[before], s->x[before], first, count);
        mlp(&w->mlp[before], &s->mlp[before], s->x[layer], s->middle[before], first, count);
    }
    if (layer < DELTAS) {
        delta_before(&w->delta[layer], &s->delta[layer], s->x[layer], first, count);
    } else {
        attention(&w->attention, &s->attention, s->middle[layer], s->x[layer], first, count);
        mlp(&w->mlp[layer], &s->mlp[layer], s->x[LAYERS], s->middle[layer], first, count);
        head(w, s, first, count);
    }
}

static void forward(trainer *t, int sequences, int first, int count) {
    for (int number = 0; number <= DELTAS; number++) {
        parallel(forward_part, &(part){ t, number, first, count }, sequences);
        if (number < DELTAS) recurrence(t, number, sequences, first, count);
    }
}

static void backward_part(void *job, int index) {
    const part *p = job;
    const model *w = p->t->weights;
    sequence *s = &p->t->sequences[index];
    model *dw = &s->gradient;
    const int layer = p->number, before = layer - 1;
    if (layer == DELTAS) {
        memset(dw, 0, sizeof *dw);
        head_backward(w, s);
        mlp_backward(&w->mlp[layer], &s->mlp[layer], &dw->mlp[layer], s->middle[layer], s);
        attention_backward(&w->attention, &s->attention, &dw->attention, s->x[layer], s);
    } else {
        delta_before_backward(&w->delta[layer], &s->delta[layer], &dw->delta[layer], s->x[layer], s);
    }
    if (layer > 0) {
        mlp_backward(&w->mlp[before], &s->mlp[before], &dw->mlp[before], s->middle[before], s);
        delta_after_backward(&w->delta[before], &s->delta[before], &dw->delta[before], s);
    } else {
        for (int t = 0; t < TOKENS; t++)
            for (int i = 0; i < WIDTH; i++) dw->embedding[s->bytes[t]][i] += s->dx[t][i];
    }
}

/* After it every sequence has its own gradient; the gates' are in sequence 0's. */
static void backward(trainer *t) {
    for (int number = DELTAS; number >= 0; number--) {
        parallel(backward_part, &(part){ .t = t, .number = number }, BATCH);
        if (number > 0) recurrence_backward(t, number - 1, &t->sequences[0].gradient.delta[number - 1]);
    }
}

/* ---- Optimiser ---- */

static void add_gradients(void *job, int index) {
    trainer *t = job;
    float *sum = (float *)t->gradient;
    t->squares[index] = 0;
    for (int i = WEIGHTS / BATCH * index; i < (index == BATCH - 1 ? WEIGHTS : WEIGHTS / BATCH * (index + 1)); i++) {
        sum[i] = 0;
        for (int n = 0; n < BATCH; n++) sum[i] += ((const float *)&t->sequences[n].gradient)[i];
        t->squares[index] += (double)(sum[i] * sum[i]);
    }
}

/* Adam; the gradient's norm at most 1, the rate up over the first steps and down along a cosine to a twentieth. epsilon is large:
   with 1e-8 weights of tiny gradients run after the rounding of bfloat16, and the GPU's loss ends up 1 % from the CPU's. */
static void adam(void *job, int index) {
    const float rate = 2e-3f, decay1 = 0.9f, decay2 = 0.99f, epsilon = 1e-5f, warm_up = 20;
    trainer *t = job;
    float *w = (float *)t->weights, *m = (float *)t->moment, *v = (float *)t->variance;
    const float *g = (const float *)t->gradient, done = (float)(t->step + 1);
    double squares = 0;
    for (int n = 0; n < BATCH; n++) squares += t->squares[n];
    const float norm = (float)sqrt(squares), clip = norm > 1 ? 1 / norm : 1;
    const float now = rate * fminf(1, done / warm_up) * (0.525f + 0.475f * cosf(3.1415927f * done / (float)t->steps));
    const float whole1 = 1 - powf(decay1, done), whole2 = 1 - powf(decay2, done);
    for (int i = WEIGHTS / BATCH * index; i < (index == BATCH - 1 ? WEIGHTS : WEIGHTS / BATCH * (index + 1)); i++) {
        m[i] += (1 - decay1) * (clip * g[i] - m[i]);
        v[i] += (1 - decay2) * (clip * g[i] * clip * g[i] - v[i]);
        w[i] -= now * (m[i] / whole1) / (sqrtf(v[i] / whole2) + epsilon);
    }
}

static void train_step(trainer *t) {
    double loss = 0;
    for (int n = 0; n < BATCH; n++) { /* anywhere in the text */
        const uint64_t draw = random_bits(t->seed, (uint64_t)t->step * BATCH + (uint64_t)n);
        memcpy(t->sequences[n].bytes, t->text + draw % (t->size - TOKENS), TOKENS + 1);
    }
    forward(t, BATCH, 0, TOKENS);
    backward(t);
    for (int n = 0; n < BATCH; n++) loss += t->sequences[n].loss;
    parallel(add_gradients, t, BATCH);
    parallel(adam, t, BATCH);
    t->losses[t->step++ % RECENT] = (float)(loss / (BATCH * TOKENS));
}

/* The mean of the last steps' losses. */
static double recent_loss(const trainer *t) {
    const int count = t->step < RECENT ? t->step : RECENT;
    double sum = 0;
    for (int i = 0; i < count; i++) sum += (double)t->losses[i];
    return sum / count;
}

/* ---- Checkpoints: safetensors, which is 8 bytes with the length of a JSON header, the header, and the tensors ---- */

typedef struct tensor {
    const char *name;
    size_t offset; /* in a model */
    int rows, columns;
} tensor;

#define TENSOR(name, rows, columns) { #name, offsetof(model, name), rows, columns }
#define DELTA(l)                                                                                                     \
    TENSOR(delta[l].norm, 1, WIDTH), TENSOR(delta[l].project, WIDTH, PROJECTED), TENSOR(delta[l].taps, TAPS, QKV),   \
    TENSOR(delta[l].A_log, 1, HEADS_V), TENSOR(delta[l].dt_bias, 1, HEADS_V),                                        \
    TENSOR(delta[l].gated_norm, 1, HEAD), TENSOR(delta[l].out, VALUE, WIDTH)
#define MLP(l) TENSOR(mlp[l].norm, 1, WIDTH), TENSOR(mlp[l].up, WIDTH, 2 * HIDDEN), TENSOR(mlp[l].down, HIDDEN, WIDTH)

static const tensor tensors[] = {
    TENSOR(embedding, BYTES, WIDTH), DELTA(0), DELTA(1), DELTA(2),
    TENSOR(attention.norm, 1, WIDTH), TENSOR(attention.project, WIDTH, 3 * WIDTH), TENSOR(attention.out, WIDTH, WIDTH),
    MLP(0), MLP(1), MLP(2), MLP(3), TENSOR(norm, 1, WIDTH),
};
enum { TENSORS = sizeof tensors / sizeof tensors[0], HEADER = 1 << 16 };
static const char *const kinds[3] = { "weights", "adam_m", "adam_v" };

static size_t count_of(const tensor *x) { return (size_t)x->rows * (size_t)x->columns; }

/* Tells two texts apart (FNV-1a). */
static uint64_t fingerprint(const uint8_t *text, size_t size) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < size; i++) hash = (hash ^ text[i]) * 0x100000001b3u;
    return hash;
}

static void save(const trainer *t, const char *path) {
    const model *const models[3] = { t->weights, t->moment, t->variance };
    char *header = allocate(HEADER), *part_path = allocate(strlen(path) + 6), *end = header;
    size_t offset = 0;
    end += sprintf(end, "{\"__metadata__\":{\"step\":\"%d\",\"steps\":\"%d\",\"seed\":\"%llu\",\"text\":\"%llu\"}", t->step,
                   t->steps, (unsigned long long)t->seed, (unsigned long long)fingerprint(t->text, t->size));
    for (int kind = 0; kind < 3; kind++)
        for (int i = 0; i < TENSORS; i++) {
            const size_t bytes = count_of(&tensors[i]) * sizeof(float);
            end += sprintf(end, ",\"%s.%s\":{\"dtype\":\"F32\",\"shape\":[%d,%d],\"data_offsets\":[%llu,%llu]}", kinds[kind],
                           tensors[i].name, tensors[i].rows, tensors[i].columns, (unsigned long long)offset,
                           (unsigned long long)(offset + bytes));
            offset += bytes;
        }
    end += sprintf(end, ",\"losses\":{\"dtype\":\"F32\",\"shape\":[%d],\"data_offsets\":[%llu,%llu]}}", RECENT,
                   (unsigned long long)offset, (unsigned long long)(offset + sizeof t->losses));
    while ((end - header) % 8 != 0) *end++ = ' ';

    if (offset != 3 * sizeof(model)) die("the list of tensors is not the whole model");
    sprintf(part_path, "%s.part", path); /* so that `path` never holds half a checkpoint */
    const uint64_t length = (uint64_t)(end - header);
    uint8_t prefix[8];
    for (int i = 0; i < 8; i++) prefix[i] = (uint8_t)(length >> 8 * i);
    FILE *file = fopen(part_path, "wb");
    if (file == NULL) die("%s: %s", part_path, strerror(errno));
    bool good = fwrite(prefix, 8, 1, file) == 1 && fwrite(header, (size_t)length, 1, file) == 1;
    for (int kind = 0; kind < 3; kind++)
        for (int i = 0; i < TENSORS; i++) {
            const size_t count = count_of(&tensors[i]);
            good = good && fwrite((const char *)models[kind] + tensors[i].offset, sizeof(float), count, file) == count;
        }
    good = good && fwrite(t->losses, sizeof t->losses, 1, file) == 1;
    good = fclose(file) == 0 && good;
#if defined(_WIN32)
    if (good) remove(path); /* rename does not replace a file there */
#endif
    if (!good || rename(part_path, path) != 0) die("%s: %s", path, strerror(errno));
    free(part_path);
    free(header);
}

/* The bytes of a file and a zero after them. */
static uint8_t *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (file == NULL) die("%s: %s", path, strerror(errno));
    size_t capacity = 1 << 16, got;
    uint8_t *data = malloc(capacity);
    *size = 0;
    while (data != NULL && (got = fread(data + *size, 1, capacity - *size - 1, file)) > 0) {
        *size += got;
        if (*size == capacity - 1) data = realloc(data, capacity *= 2);
    }
    if (data == NULL) die("%s: out of memory", path);
    if (ferror(file)) die("%s: %s", path, strerror(errno));
    fclose(file);
    data[*size] = 0;
    return data;
}

/* What follows `key` in a header that is written without blanks, as all known writers do. */
static const char *find(const char *path, const char *header, const char *key) {
    const char *place = strstr(header, key);
    if (place == NULL) die("%s: no checkpoint of this program: its header lacks %s", path, key);
    return place + strlen(key);
}

static uint64_t metadata(const char *path, const char *header, const char *key) {
    return strtoull(find(path, header, key), NULL, 10);
}

static void load_tensor(const char *path, const char *header, const char *data, size_t size, const char *name, void *to,
                        size_t count) {
    char key[80];
    unsigned long long begin, end;
    sprintf(key, "\"%s\":{", name);
    const char *entry = find(path, header, key);
    const char *offsets = find(path, entry, "\"data_offsets\":[");
    if (sscanf(offsets, "%llu,%llu", &begin, &end) != 2 || begin > end || end > size || end - begin != count * sizeof(float) ||
        strncmp(find(path, entry, "\"dtype\":"), "\"F32\"", 5) != 0)
        die("%s: %s is not %llu numbers of float32 in the file", path, name, (unsigned long long)count);
    memcpy(to, data + begin, count * sizeof(float));
}

static void load(trainer *t, const char *path) {
    model *const models[3] = { t->weights, t->moment, t->variance };
    size_t size;
    uint8_t *file = read_file(path, &size);
    uint64_t length = 0;
    for (size_t i = 0; i < 8 && i < size; i++) length |= (uint64_t)file[i] << 8 * i;
    if (size < 8 || length > size - 8) die("%s: not a safetensors file", path);
    char *header = allocate((size_t)length + 1);
    memcpy(header, file + 8, (size_t)length);
    const char *data = (const char *)file + 8 + length;
    size -= 8 + (size_t)length;

    if (metadata(path, header, "\"text\":\"") != fingerprint(t->text, t->size)) die("%s: it was trained on another text", path);
    t->seed = metadata(path, header, "\"seed\":\"");
    t->step = (int)metadata(path, header, "\"step\":\"");
    t->steps = (int)metadata(path, header, "\"steps\":\"");
    if (t->step < 1 || t->step > t->steps || t->steps > MOST) die("%s: step %d of %d", path, t->step, t->steps);
    for (int kind = 0; kind < 3; kind++)
        for (int i = 0; i < TENSORS; i++) {
            char name[64];
            sprintf(name, "%s.%s", kinds[kind], tensors[i].name);
            load_tensor(path, header, data, size, name, (char *)models[kind] + tensors[i].offset, count_of(&tensors[i]));
        }
    load_tensor(path, header, data, size, "losses", t->losses, RECENT);
    free(header);
    free(file);
}

/* ---- Sampling ---- */

static uint8_t draw_byte(const trainer *t, const float logits[BYTES], int row) {
    const float cold = 1 / 0.8f; /* a temperature of 0.8 */
    float shares[BYTES], most = logits[0], sum = 0;
    for (int i = 1; i < BYTES; i++) most = fmaxf(most, logits[i]);
    for (int i = 0; i < BYTES; i++) sum += shares[i] = expf((logits[i] - most) * cold);
    float left = sum * uniform(t->seed, ((uint64_t)1 << 40) + (uint64_t)row);
    int byte = 0;
    while (byte < BYTES - 1 && (left -= shares[byte]) >= 0) byte++;
    return (uint8_t)byte;
}

/* Read bytes from the middle of the text as a prompt, in one call; go on from there, a token a call. */
static void write_sample(trainer *t) {
    sequence *s = &t->sequences[0];
    memcpy(s->bytes, t->text + t->size / 2, PROMPT);
    printf("\n%d bytes of the text, and in brackets how the model goes on:\n\n", PROMPT);
    fwrite(s->bytes, 1, PROMPT, stdout);
    putchar('[');
    forward(t, 1, 0, PROMPT);
    for (int row = PROMPT; row < ROWS; row++) {
        s->bytes[row] = draw_byte(t, s->logits[row - 1], row);
        putchar(s->bytes[row]);
        if (row < ROWS - 1) forward(t, 1, row, 1);
    }
    printf("]\n");
}

/* ---- Main ---- */

static volatile sig_atomic_t interrupted;

static void interrupt(int number) {
    interrupted = 1;
    signal(number, SIG_DFL); /* the second one ends the program */
}

/* Entropy of a byte given the one before it, nats: what a table of pairs would reach on this text. */
static double bigram_entropy(const uint8_t *text, size_t size) {
    static double pairs[BYTES][BYTES], firsts[BYTES];
    double entropy = 0;
    for (size_t i = 0; i + 1 < size; i++) {
        pairs[text[i]][text[i + 1]]++;
        firsts[text[i]]++;
    }
    for (int a = 0; a < BYTES; a++)
        for (int b = 0; b < BYTES; b++)
            if (pairs[a][b] > 0) entropy -= pairs[a][b] * log(pairs[a][b] / firsts[a]);
    return entropy / (double)(size - 1);
}

static const char *default_text(void) {
    static const char *const paths[] = { "/usr/share/common-licenses/GPL-3", "/usr/share/licenses/spdx/GPL-3.0-only.txt",
                                         "/usr/share/licenses/common/GPL3/license.txt" };
    for (size_t i = 0; i < sizeof paths / sizeof paths[0]; i++)
        if (access(paths[i], R_OK) == 0) return paths[i];
    die("no licence text was found on this system to train on: name a text file");
    return NULL;
}

static void usage(FILE *to, const char *program) {
    fprintf(to,
            "usage: %s [FILE] [options]\n"
            "Train a small hybrid language model on FILE (a licence of the system, if none is named), then let it write.\n"
            "  --steps N                 of %d tokens each; default 200\n"
            "  --seed N                  of the weights, the batches and the sample; default 1\n"
            "  --backend auto|cpu|cuda   where the gated-delta layers run; default cpu\n"
            "  --save CKPT               the checkpoint written at the end, and on ctrl-C (there train.safetensors if not given)\n"
            "  --resume CKPT             go on from a checkpoint, to the end that it was to have\n",
            program, BATCH * TOKENS);
}

static void misuse(const char *program, const char *what, const char *which) {
    fprintf(stderr, "%s: %s\n", what, which);
    usage(stderr, program);
    exit(2);
}

static int whole_number(const char *program, const char *option, const char *text) {
    char *end;
    const long number = strtol(text, &end, 10);
    if (end == text || *end != '\0' || number < 1 || number > MOST) misuse(program, option, "a number from 1 to 1000000");
    return (int)number;
}

int main(int argc, char **argv) {
    const char *file = NULL, *save_path = NULL, *resume_path = NULL;
    fqla_backend backend = FQLA_BACKEND_CPU;
    trainer *t = allocate(sizeof *t);
    for (int i = 1; i < argc; i++) {
        const char *option = argv[i];
        if (strcmp(option, "--help") == 0) {
            usage(stdout, argv[0]);
            return 0;
        }
        if (option[0] != '-') {
            if (file != NULL) misuse(argv[0], "one FILE is enough", option);
            file = option;
            continue;
        }
        const char *value = argv[i + 1];
        if (value == NULL) misuse(argv[0], "unknown, or without a value", option);
        i++;
        if (strcmp(option, "--steps") == 0) t->steps = whole_number(argv[0], option, value);
        else if (strcmp(option, "--seed") == 0) t->seed = (uint64_t)whole_number(argv[0], option, value);
        else if (strcmp(option, "--save") == 0) save_path = value;
        else if (strcmp(option, "--resume") == 0) resume_path = value;
        else if (strcmp(option, "--backend") != 0) misuse(argv[0], "unknown option", option);
        else if (strcmp(value, "auto") == 0) backend = FQLA_BACKEND_AUTO;
        else if (strcmp(value, "cpu") == 0) backend = FQLA_BACKEND_CPU;
        else if (strcmp(value, "cuda") == 0) backend = FQLA_BACKEND_CUDA;
        else misuse(argv[0], "unknown backend", value);
    }
    if (resume_path != NULL && (t->steps > 0 || t->seed > 0))
        misuse(argv[0], "with --resume", "steps and seed are the checkpoint's");

    if (file == NULL) file = default_text();
    t->text = read_file(file, &t->size);
    if (t->size < 2 * TOKENS) die("%s: %d bytes; at least %d are needed", file, (int)t->size, 2 * TOKENS);
    t->weights = allocate(sizeof *t->weights);
    t->moment = allocate(sizeof *t->moment);
    t->variance = allocate(sizeof *t->variance);
    t->gradient = allocate(sizeof *t->gradient);
    t->sequences = allocate(BATCH * sizeof *t->sequences);
    if (resume_path != NULL) {
        load(t, resume_path);
    } else {
        if (t->steps == 0) t->steps = 200;
        if (t->seed == 0) t->seed = 1;
        initialise(t);
    }
    const double entropy = bigram_entropy(t->text, t->size);
    printf("%s: %llu bytes, bigram entropy %.3f nats a byte\n", file, (unsigned long long)t->size, entropy);
    printf("%d weights, %d steps of %d tokens, %d of them done\n", WEIGHTS, t->steps, BATCH * TOKENS, t->step);
    make_plans(t, backend);

    const bool terminal = isatty(fileno(stdout)) != 0;
    const int first = t->step, lines = (t->steps + 19) / 20;
    const double start = seconds();
    signal(SIGINT, interrupt);
    signal(SIGTERM, interrupt);
    while (t->step < t->steps && !interrupted) {
        train_step(t);
        const bool stays = t->step % lines == 0 || t->step == t->steps || interrupted;
        if (!stays && !terminal) continue;
        const double pace = (seconds() - start) / (t->step - first);
        printf("%sstep %d of %d, loss %.4f, %.0f tokens/s, %.0f s left   %s", terminal ? "\r" : "", t->step, t->steps,
               recent_loss(t), BATCH * TOKENS / pace, pace * (t->steps - t->step), stays ? "\n" : "");
        fflush(stdout);
    }
    if (interrupted && save_path == NULL) save_path = "train.safetensors";
    if (save_path != NULL) save(t, save_path);
    if (t->step < t->steps) {
        printf("saved %s; to go on: --resume %s\n", save_path, save_path);
    } else {
        printf("loss %.4f nats a byte, the mean of the last %d training steps (nothing is held out); bigram entropy %.3f\n",
               recent_loss(t), t->steps < RECENT ? t->steps : RECENT, entropy);
        write_sample(t);
    }

    free_plans(t);
    void *all[] = { t->weights, t->moment, t->variance, t->gradient, t->sequences, (void *)(uintptr_t)t->text, t };
    for (int i = 0; i < 7; i++) free(all[i]);
    return 0;
}
