#include "oracle.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* With S the state of one head, r its q/k head:
       S_t = alpha S + beta k e^T,   e = v - alpha S^T k,   o_t = scale S_t^T q                                          */

int oracle_head_qk(const oracle *p, int h) {
    return p->head_map == FQLA_HEAD_MAP_MOD ? h % p->heads_qk : h / (p->heads_v / p->heads_qk);
}

static double *allocate(size_t count) {
    double *memory = (double *)calloc(count > 0 ? count : 1, sizeof *memory);
    if (memory == NULL) abort();
    return memory;
}

static double dot(const double *a, const double *b, int n) {
    double sum = 0.0;
    int i;
    for (i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }
static double softplus(double x) { return x > 40.0 ? x : log1p(exp(x)); }

double oracle_norm_factor(const oracle *p, const double *row) { return p->l2norm ? 1.0 / sqrt(dot(row, row, p->dim_k) + 1e-6) : 1.0; }

static void normalise(const oracle *p, const double *row, double *out) {
    const double factor = oracle_norm_factor(p, row);
    int i;
    for (i = 0; i < p->dim_k; i++) out[i] = row[i] * factor;
}

static void add_through_norm(const oracle *p, const double *row, const double *normal_grad, double *grad) {
    const double factor = oracle_norm_factor(p, row), along = p->l2norm ? factor * factor * factor * dot(row, normal_grad, p->dim_k) : 0.0;
    int i;
    for (i = 0; i < p->dim_k; i++) grad[i] += factor * normal_grad[i] - along * row[i];
}

double oracle_alpha(const oracle *p, int t, int h) {
    const double g = p->g[t * p->heads_v + h];
    if (p->gate == FQLA_GATE_LINEAR) return g;
    if (p->gate == FQLA_GATE_LOG) return exp(g);
    return exp(-exp(p->A_log[h]) * softplus(g + p->dt_bias[h]));
}

double oracle_beta(const oracle *p, int t, int h) {
    const double beta = p->beta[t * p->heads_v + h];
    if (p->beta_form == FQLA_BETA_PLAIN) return beta;
    return (p->negative_eigenvalues ? 2.0 : 1.0) * sigmoid(beta);
}

/* S becomes the state after a token; e [dim_v] is left as its formula above says. */
static void step(const oracle *p, double alpha, double beta, const double *k, const double *v, double *S, double *e) {
    int i, j;
    for (j = 0; j < p->dim_v; j++) e[j] = v[j];
    for (i = 0; i < p->dim_k; i++)
        for (j = 0; j < p->dim_v; j++) {
            S[i * p->dim_v + j] *= alpha;
            e[j] -= k[i] * S[i * p->dim_v + j];
        }
    for (i = 0; i < p->dim_k; i++)
        for (j = 0; j < p->dim_v; j++) S[i * p->dim_v + j] += beta * k[i] * e[j];
}

static void forward_head(const oracle *p, int h) {
    const size_t state = (size_t)p->dim_k * (size_t)p->dim_v;
    double *S = allocate(state), *q = allocate((size_t)p->dim_k), *k = allocate((size_t)p->dim_k),
           *e = allocate((size_t)p->dim_v);
    int t, i, j;
    if (p->h0 != NULL) memcpy(S, p->h0 + (size_t)h * state, state * sizeof *S);
    for (t = 0; t < p->len; t++) {
        const size_t row_qk = ((size_t)t * (size_t)p->heads_qk + (size_t)oracle_head_qk(p, h)) * (size_t)p->dim_k;
        const size_t row_v = ((size_t)t * (size_t)p->heads_v + (size_t)h) * (size_t)p->dim_v;
        double *o = p->o + row_v;
        normalise(p, p->q + row_qk, q);
        normalise(p, p->k + row_qk, k);
        step(p, oracle_alpha(p, t, h), oracle_beta(p, t, h), k, p->v + row_v, S, e);
        for (j = 0; j < p->dim_v; j++) o[j] = 0.0;
        for (i = 0; i < p->dim_k; i++)
            for (j = 0; j < p->dim_v; j++) o[j] += p->scale * q[i] * S[i * p->dim_v + j];
        if (p->snapshot_every > 0 && (t + 1) % p->snapshot_every == 0) {
            const size_t entry = (size_t)((t + 1) / p->snapshot_every - 1);
            memcpy(p->snapshots + (entry * (size_t)p->heads_v + (size_t)h) * state, S, state * sizeof *S);
        }
    }
    memcpy(p->ht + (size_t)h * state, S, state * sizeof *S);
    free(S), free(q), free(k), free(e);
}

void oracle_forward(const oracle *p) {
    int h;
    for (h = 0; h < p->heads_v; h++) forward_head(p, h);
}

/* D is the gradient of the state, walked back from dht to dh0. At token t, with P = alpha S_{t-1}, S_t = P + beta k e^T and
   e = v - P^T k:
       D += scale q do^T       dq = scale S_t do
       De = D e, Dk = D^T k:   dbeta = k . De       dv = de = beta Dk       dk = beta De - P de
       dP = D - k de^T         dalpha = <dP, S_{t-1}>                        D' = alpha dP */
static void backward_head(const oracle *p, int h) {
    const size_t state = (size_t)p->dim_k * (size_t)p->dim_v, dim_k = (size_t)p->dim_k, dim_v = (size_t)p->dim_v;
    double *states = allocate(((size_t)p->len + 1) * state), *D = allocate(state);
    double *q = allocate(dim_k), *k = allocate(dim_k), *dq = allocate(dim_k),
           *dk = allocate(dim_k), *e = allocate(dim_v), *de = allocate(dim_v);
    int t, i, j;
    if (p->h0 != NULL) memcpy(states, p->h0 + (size_t)h * state, state * sizeof *states);
    for (t = 0; t < p->len; t++) {
        double *S = states + (size_t)(t + 1) * state;
        memcpy(S, S - state, state * sizeof *S);
        normalise(p, p->k + ((size_t)t * (size_t)p->heads_qk + (size_t)oracle_head_qk(p, h)) * dim_k, k);
        step(p, oracle_alpha(p, t, h), oracle_beta(p, t, h), k, p->v + ((size_t)t * (size_t)p->heads_v + (size_t)h) * dim_v, S, e);
    }
    if (p->dht != NULL) memcpy(D, p->dht + (size_t)h * state, state * sizeof *D);
    for (t = p->len - 1; t >= 0; t--) {
        const size_t row_qk = ((size_t)t * (size_t)p->heads_qk + (size_t)oracle_head_qk(p, h)) * dim_k;
        const size_t row_v = ((size_t)t * (size_t)p->heads_v + (size_t)h) * dim_v, at = (size_t)t * (size_t)p->heads_v + (size_t)h;
        const double *S0 = states + (size_t)t * state, *S = S0 + state, *v = p->v + row_v, *grad_o = p->do_ + row_v;
        const double alpha = oracle_alpha(p, t, h), beta = oracle_beta(p, t, h);
        double dbeta = 0.0, dalpha = 0.0;
        normalise(p, p->q + row_qk, q);
        normalise(p, p->k + row_qk, k);
        for (j = 0; j < p->dim_v; j++) e[j] = v[j], de[j] = 0.0;
        for (i = 0; i < p->dim_k; i++) {
            dq[i] = 0.0;
            for (j = 0; j < p->dim_v; j++) {
                const size_t ij = (size_t)i * dim_v + (size_t)j;
                dq[i] += p->scale * S[ij] * grad_o[j];
                D[ij] += p->scale * q[i] * grad_o[j];
                e[j] -= alpha * S0[ij] * k[i];
                de[j] += beta * D[ij] * k[i];
            }
        }
        for (i = 0; i < p->dim_k; i++) {
            double De = 0.0, Pde = 0.0;
            for (j = 0; j < p->dim_v; j++) {
                const size_t ij = (size_t)i * dim_v + (size_t)j;
                De += D[ij] * e[j];
                Pde += alpha * S0[ij] * de[j];
                D[ij] -= k[i] * de[j];
                dalpha += D[ij] * S0[ij];
                D[ij] *= alpha;
            }
            dbeta += k[i] * De;
            dk[i] = beta * De - Pde;
        }
        add_through_norm(p, p->q + row_qk, dq, p->dq + row_qk);
        add_through_norm(p, p->k + row_qk, dk, p->dk + row_qk);
        memcpy(p->dv + row_v, de, dim_v * sizeof *de);
        p->dbeta[at] = p->beta_form == FQLA_BETA_PLAIN ? dbeta : dbeta * beta * (1.0 - sigmoid(p->beta[at]));
        if (p->gate == FQLA_GATE_LOG) {
            p->dg[at] = dalpha * alpha;
        } else { /* log alpha = -exp(A_log) softplus(x), x = a + dt_bias */
            const double x = p->g[at] + p->dt_bias[h], rate = exp(p->A_log[h]), dx = dalpha * alpha * -rate * sigmoid(x);
            p->dg[at] = dx;
            p->ddt_bias[h] += dx;
            p->dA_log[h] += dalpha * alpha * -rate * softplus(x);
        }
    }
    memcpy(p->dh0 + (size_t)h * state, D, state * sizeof *D);
    free(states), free(D), free(q), free(k), free(dq), free(dk), free(e), free(de);
}

void oracle_backward(const oracle *p) {
    const size_t qk = (size_t)p->len * (size_t)p->heads_qk * (size_t)p->dim_k;
    int h;
    memset(p->dq, 0, qk * sizeof *p->dq);
    memset(p->dk, 0, qk * sizeof *p->dk);
    if (p->gate == FQLA_GATE_RAW)
        for (h = 0; h < p->heads_v; h++) p->dA_log[h] = p->ddt_bias[h] = 0.0;
    for (h = 0; h < p->heads_v; h++) backward_head(p, h);
}
