#include "rounded.h"
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { CHUNK = 64, DIM = 128 };

typedef double state[DIM][DIM];   /* [k][v] */
typedef double rows[CHUNK][DIM];  /* a token's */
typedef double square[CHUNK][CHUNK];

double rounded(double x, fqla_dtype dtype) {
    const int digits = dtype == FQLA_DTYPE_BF16 ? 8 : 11, least = dtype == FQLA_DTYPE_BF16 ? -126 : -14;
    double step;
    if ((dtype != FQLA_DTYPE_BF16 && dtype != FQLA_DTYPE_FP16) || x == 0.0 || !isfinite(x)) return x;
    step = ldexp(1.0, (ilogb(x) > least ? ilogb(x) : least) + 1 - digits);
    x = nearbyint(x / step) * step;
    return dtype == FQLA_DTYPE_FP16 && fabs(x) > 65504.0 ? copysign(INFINITY, x) : x;
}

/* What is rounded to one type whatever the tensors' is. With float32, where nothing is rounded, neither is this: the algebra alone. */
static double rounded_as(double x, fqla_dtype type, fqla_dtype dtype) { return dtype == FQLA_DTYPE_FP32 ? x : rounded(x, type); }

static void round_all(const double *from, double *to, size_t count, fqla_dtype dtype) {
    size_t i;
    for (i = 0; i < count; i++) to[i] = rounded(from[i], dtype);
}

static double dot(const double *a, const double *b) {
    double sum = 0.0;
    int i;
    for (i = 0; i < DIM; i++) sum += a[i] * b[i];
    return sum;
}

static void add(double *to, double factor, const double *from) {
    int i;
    for (i = 0; i < DIM; i++) to[i] += factor * from[i];
}

/* S^T k and S v. */
static void by_key(double (*S)[DIM], const double *k, double *out) {
    int i;
    memset(out, 0, DIM * sizeof *out);
    for (i = 0; i < DIM; i++) add(out, k[i], S[i]);
}

static void by_value(double (*S)[DIM], const double *v, double *out) {
    int i;
    for (i = 0; i < DIM; i++) out[i] = dot(S[i], v);
}

static void add_outer(double (*S)[DIM], const double *k, double factor, const double *v) {
    int i;
    for (i = 0; i < DIM; i++) add(S[i], factor * k[i], v);
}

static void scale_state(double (*S)[DIM], double factor) {
    int i, j;
    for (i = 0; i < DIM; i++)
        for (j = 0; j < DIM; j++) S[i][j] *= factor;
}

static double sum_products(double (*a)[DIM], double (*b)[DIM]) {
    double sum = 0.0;
    int i;
    for (i = 0; i < DIM; i++) sum += dot(a[i], b[i]);
    return sum;
}

/* A chunk of a v-head: its inputs, what prepare makes of them and what the forward leaves. */
typedef struct chunk {
    int first, count;     /* tokens */
    rows q, k, v, dout;   /* q and k as given: the l2norm's factors go with the tokens' */
    double beta[CHUNK], w[CHUNK], o[CHUNK], update[CHUNK], gamma_chunk;
    square decay_qk, decay_kk; /* exp(G_i - G_j) times the l2norm's factors, i >= j */
    square qk, kk;
    square t;             /* T below its diagonal, in 16 bits */
    state s;              /* S0 in 16 bits */
    rows vn, vn16;
} chunk;

/* X = (I + beta N)^-1 beta, N below the diagonal of K K^T: leaves of 8 x 8 as they are, then X10 = -X1 N10 X0 from 8 to 64 tokens with
   every operand in float16 (ptx/prepare.cu). */
static void invert(const double *beta, square n, square x, fqla_dtype dtype) {
    int i, j, m, size, base;
    memset(x, 0, sizeof(square));
    for (i = 0; i < CHUNK; i++)
        for (j = i / 8 * 8; j <= i; j++) {
            x[i][j] = i == j ? beta[i] : 0.0;
            for (m = j; m < i; m++) x[i][j] -= beta[i] * n[i][m] * x[m][j];
        }
    for (size = 8; size < CHUNK; size *= 2)
        for (base = 0; base < CHUNK; base += 2 * size)
            for (i = base + size; i < base + 2 * size; i++) {
                double y[CHUNK];
                for (m = base; m < base + size; m++) {
                    for (y[m] = 0.0, j = base + size; j <= i; j++)
                        y[m] -= rounded_as(x[i][j], FQLA_DTYPE_FP16, dtype) * rounded_as(n[j][m], FQLA_DTYPE_FP16, dtype);
                    y[m] = rounded_as(y[m], FQLA_DTYPE_FP16, dtype);
                }
                for (j = base; j < base + size; j++)
                    for (m = j; m < base + size; m++) x[i][j] += y[m] * rounded_as(x[m][j], FQLA_DTYPE_FP16, dtype);
            }
}

static void read_chunk(const oracle *p, int h, int first, fqla_dtype dtype, chunk *c) {
    double log_alpha[CHUNK], gamma[CHUNK], r[CHUNK], rq[CHUNK], sum = 0.0;
    square decay, n, x;
    int i, j;
    memset(c, 0, sizeof *c);
    memset(decay, 0, sizeof decay);
    memset(n, 0, sizeof n);
    c->first = first;
    c->count = p->len - first < CHUNK ? p->len - first : CHUNK;
    for (i = 0; i < c->count; i++) {
        const size_t t = (size_t)(first + i), qk = t * (size_t)p->heads_qk + (size_t)oracle_head_qk(p, h), v = t * (size_t)p->heads_v + (size_t)h;
        memcpy(c->q[i], p->q + qk * DIM, sizeof c->q[i]);
        memcpy(c->k[i], p->k + qk * DIM, sizeof c->k[i]);
        rq[i] = oracle_norm_factor(p, c->q[i]);
        r[i] = oracle_norm_factor(p, c->k[i]);
        memcpy(c->v[i], p->v + v * DIM, sizeof c->v[i]);
        if (p->do_ != NULL) memcpy(c->dout[i], p->do_ + v * DIM, sizeof c->dout[i]);
        c->beta[i] = oracle_beta(p, (int)t, h);
        log_alpha[i] = fmax(log(oracle_alpha(p, (int)t, h)), -104.0);
        sum += log_alpha[i];
        gamma[i] = exp(sum);
    }
    c->gamma_chunk = exp(sum);
    for (i = 0; i < c->count; i++) {
        double after = 0.0;
        for (j = i; j >= 0; j--) {
            decay[i][j] = exp(after);
            after += log_alpha[j];
            c->qk[i][j] = dot(c->q[i], c->k[j]);
            c->kk[i][j] = dot(c->k[i], c->k[j]);
            c->decay_qk[i][j] = decay[i][j] * rq[i] * r[j];
            c->decay_kk[i][j] = decay[i][j] * r[i] * r[j];
            n[i][j] = r[i] * r[j] * c->kk[i][j];
        }
        for (after = 0.0, j = i + 1; j < c->count; j++) after += log_alpha[j];
        c->w[i] = gamma[i] * r[i];
        c->o[i] = gamma[i] * rq[i];
        c->update[i] = exp(after) * r[i];
    }
    invert(c->beta, n, x, dtype);
    for (i = 0; i < CHUNK; i++)
        for (j = 0; j < i; j++) c->t[i][j] = rounded(decay[i][j] * x[i][j], dtype);
}

/* S goes through the chunk; its S0 and Vn stay there. */
static void advance(chunk *c, double (*S)[DIM], fqla_dtype dtype) {
    rows w;
    int i, j;
    round_all(&S[0][0], &c->s[0][0], DIM * DIM, dtype);
    for (i = 0; i < c->count; i++) {
        double ks[DIM];
        by_key(c->s, c->k[i], ks);
        for (j = 0; j < DIM; j++) {
            const double exact = c->v[i][j] - c->w[i] * ks[j];
            c->vn[i][j] = c->beta[i] * exact;
            w[i][j] = rounded(exact, dtype);
        }
        for (j = 0; j < i; j++) add(c->vn[i], c->t[i][j], w[j]);
    }
    round_all(&c->vn[0][0], &c->vn16[0][0], CHUNK * DIM, dtype);
    scale_state(S, c->gamma_chunk);
    for (i = 0; i < c->count; i++) {
        double scaled[DIM];
        for (j = 0; j < DIM; j++) scaled[j] = rounded(c->update[i] * c->vn[i][j], dtype);
        add_outer(S, c->k[i], 1.0, scaled);
    }
}

static void forward_head(const oracle *p, int h, fqla_dtype dtype) {
    chunk *c = (chunk *)malloc(sizeof *c);
    double(*S)[DIM] = (double(*)[DIM])calloc(DIM, sizeof *S);
    int first, i, j;
    if (c == NULL || S == NULL) abort();
    if (p->h0 != NULL) memcpy(S, p->h0 + (size_t)h * DIM * DIM, sizeof(state));
    for (first = 0; first < p->len; first += CHUNK) {
        read_chunk(p, h, first, dtype, c);
        advance(c, S, dtype);
        for (i = 0; i < c->count; i++) {
            double *o = p->o + ((size_t)(first + i) * (size_t)p->heads_v + (size_t)h) * DIM, qs[DIM];
            by_key(c->s, c->q[i], qs);
            for (j = 0; j < DIM; j++) o[j] = p->scale * c->o[i] * qs[j];
            for (j = 0; j <= i; j++) add(o, p->scale * rounded(c->decay_qk[i][j] * c->qk[i][j], dtype), c->vn16[j]);
        }
    }
    memcpy(p->ht + (size_t)h * DIM * DIM, S, sizeof(state));
    free(c), free(S);
}

void rounded_forward(const oracle *p, fqla_dtype dtype) {
    int h;
    for (h = 0; h < p->heads_v; h++) forward_head(p, h, dtype);
}

/* The gradient of the state D, divided by unit, goes back through the chunk; dw: unit dW in 16 bits, as it is stored; dvn: unit dVn. */
static void retreat(chunk *c, double (*D)[DIM], double unit, double power, bool is_first, fqla_dtype dtype, double (*d16)[DIM], rows dw,
                    rows dvn) {
    rows dvn16;
    int i, j, m;
    round_all(&D[0][0], &d16[0][0], DIM * DIM, dtype);
    scale_state(D, c->gamma_chunk);
    for (i = 0; i < c->count; i++) {
        double kd[DIM];
        by_key(d16, c->k[i], kd);
        for (m = 0; m < DIM; m++) dvn[i][m] = c->update[i] * kd[m];
        for (j = i; j < c->count; j++) add(dvn[i], rounded(power * c->decay_qk[j][i] * c->qk[j][i], dtype), c->dout[j]);
        for (m = 0; m < DIM; m++) dvn16[i][m] = rounded(dvn[i][m], dtype);
    }
    for (i = 0; i < c->count; i++) {
        double sum[DIM], left[DIM];
        for (m = 0; m < DIM; m++) sum[m] = c->beta[i] * dvn[i][m];
        for (j = i + 1; j < c->count; j++) add(sum, c->t[j][i], dvn16[j]);
        for (m = 0; m < DIM; m++) {
            const double o = power * c->o[i] * c->dout[i][m];
            dw[i][m] = rounded(unit * sum[m], dtype);
            left[m] = rounded(o, dtype);
            if (is_first) left[m] += rounded(o - left[m], dtype); /* what dh0's last chunk adds */
        }
        add_outer(D, c->q[i], 1.0, left);
        for (m = 0; m < DIM; m++) left[m] = rounded(-c->w[i] * sum[m], dtype);
        add_outer(D, c->k[i], 1.0, left);
    }
    for (i = 0; i < c->count; i++)
        for (m = 0; m < DIM; m++) dvn[i][m] *= unit;
}

/* A token's gates' gradients from those of log alpha and beta. */
static void leave_gates(const oracle *p, int h, int t, double dlog_alpha, double dbeta) {
    const size_t at = (size_t)t * (size_t)p->heads_v + (size_t)h;
    const double beta = oracle_beta(p, t, h);
    p->dbeta[at] = p->beta_form == FQLA_BETA_PLAIN ? dbeta : dbeta * beta / (1.0 + exp(p->beta[at]));
    if (log(oracle_alpha(p, t, h)) < -104.0) dlog_alpha = 0.0;
    p->dg[at] = dlog_alpha;
    if (p->gate == FQLA_GATE_RAW) {
        const double x = p->g[at] + p->dt_bias[h], rate = -exp(p->A_log[h]);
        p->dg[at] = dlog_alpha * rate / (1.0 + exp(-x));
        p->ddt_bias[h] += p->dg[at];
        p->dA_log[h] += dlog_alpha * rate * (x > 40.0 ? x : log1p(exp(x)));
    }
}

/* z: of the normalised row, times the norm's factor. */
static void add_through_norm(const oracle *p, double *row, const double *z, double *grad) {
    const double r = oracle_norm_factor(p, row);
    add(grad, 1.0, z);
    if (p->l2norm) add(grad, -r * r * dot(row, z), row);
}

/* All that kernel backward_gradients makes of a chunk. */
static void leave_gradients(const oracle *p, int h, chunk *c, double (*d16)[DIM], rows dw, rows dvn, double unit, fqla_dtype dtype) {
    rows dq, dk;
    double dg[CHUNK] = { 0 }, H[CHUNK], after = 0.0, before = 0.0;
    const double states = unit * c->gamma_chunk * sum_products(d16, c->s);
    int i, j, m;
    memset(dk, 0, sizeof dk);
    for (i = 0; i < c->count; i++) {
        double row[DIM];
        by_value(c->s, c->dout[i], row);
        for (m = 0; m < DIM; m++) dq[i][m] = p->scale * c->o[i] * row[m];
        dg[i] += dot(dq[i], c->q[i]);
        by_value(d16, c->vn16[i], row);
        add(dk[i], unit * c->update[i], row);
        H[i] = unit * c->update[i] * dot(c->k[i], row);
        by_value(c->s, dw[i], row);
        add(dk[i], -c->w[i], row);
        dg[i] -= c->w[i] * dot(c->k[i], row);
    }
    for (i = 0; i < c->count; i++)
        for (j = 0; j <= i; j++) {
            const double dp = p->scale * c->decay_qk[i][j] * dot(c->dout[i], c->vn16[j]), dp16 = i > j ? rounded(dp, dtype) : dp;
            const double dkk = i > j ? -c->decay_kk[i][j] * dot(dw[i], c->vn16[j]) : 0.0, dkk16 = rounded(dkk, dtype);
            const double z = dp16 * c->qk[i][j] + dkk16 * c->kk[i][j];
            add(dq[i], dp16, c->k[j]);
            add(dk[j], dp16, c->q[i]);
            add(dk[i], dkk16, c->k[j]);
            add(dk[j], dkk16, c->k[i]);
            if (i > j) dg[i] += z, dg[j] -= z;
        }
    for (i = c->count - 1; i >= 0; i--) dg[i] = after += dg[i];
    for (i = 0; i < c->count; i++) {
        const size_t t = (size_t)(c->first + i), qk = (t * (size_t)p->heads_qk + (size_t)oracle_head_qk(p, h)) * DIM;
        double dbeta = dot(dw[i], c->vn16[i]) / (c->beta[i] * c->beta[i]);
        if (fabs(c->beta[i]) < ldexp(1.0, -12)) { /* too small to divide by: both factors themselves */
            double e[DIM];
            by_key(c->s, c->k[i], e);
            for (m = 0; m < DIM; m++) e[m] = c->v[i][m] - c->w[i] * e[m];
            for (j = 0; j < i; j++) add(e, -c->decay_kk[i][j] * c->kk[i][j], c->vn16[j]);
            for (j = i + 1; j < c->count; j++) add(dvn[i], -c->decay_kk[j][i] * c->kk[j][i], dw[j]);
            dbeta = dot(e, dvn[i]);
        }
        leave_gates(p, h, (int)t, dg[i] + before + states, dbeta);
        before += H[i];
        add_through_norm(p, c->q[i], dq[i], p->dq + qk);
        add_through_norm(p, c->k[i], dk[i], p->dk + qk);
        memcpy(p->dv + (t * (size_t)p->heads_v + (size_t)h) * DIM, dw[i], DIM * sizeof(double));
    }
}

static void backward_head(const oracle *p, int h, fqla_dtype dtype) {
    const int count = (p->len + CHUNK - 1) / CHUNK;
    chunk *chunks = (chunk *)malloc((size_t)(count + 1) * sizeof *chunks);
    double(*S)[DIM] = (double(*)[DIM])calloc(DIM, sizeof *S), (*D)[DIM] = (double(*)[DIM])calloc(DIM, sizeof *D);
    double(*d16)[DIM] = (double(*)[DIM])calloc(DIM, sizeof *d16), *dh0 = p->dh0 + (size_t)h * DIM * DIM;
    int exponent, n;
    const double unit = 2.0 * frexp(p->scale, &exponent), power = ldexp(1.0, exponent - 1);
    if (chunks == NULL || S == NULL || D == NULL || d16 == NULL) abort();
    if (p->h0 != NULL) memcpy(S, p->h0 + (size_t)h * DIM * DIM, sizeof(state));
    if (p->dht != NULL) memcpy(D, p->dht + (size_t)h * DIM * DIM, sizeof(state));
    scale_state(D, 1.0 / unit);
    for (n = 0; n < count; n++) {
        read_chunk(p, h, n * CHUNK, dtype, &chunks[n]);
        advance(&chunks[n], S, dtype);
    }
    for (n = count - 1; n >= 0; n--) {
        rows dw, dvn;
        retreat(&chunks[n], D, unit, power, n == 0, dtype, d16, dw, dvn);
        leave_gradients(p, h, &chunks[n], d16, dw, dvn, unit, dtype);
    }
    scale_state(D, unit);
    memcpy(dh0, D, sizeof(state));
    free(chunks), free(S), free(D), free(d16);
}

void rounded_backward(const oracle *p, fqla_dtype dtype) {
    const size_t qk = (size_t)p->len * (size_t)p->heads_qk * DIM;
    int h;
    memset(p->dq, 0, qk * sizeof *p->dq);
    memset(p->dk, 0, qk * sizeof *p->dk);
    if (p->gate == FQLA_GATE_RAW)
        for (h = 0; h < p->heads_v; h++) p->dA_log[h] = p->ddt_bias[h] = 0.0;
    for (h = 0; h < p->heads_v; h++) backward_head(p, h, dtype);
}
