/* The float64 token recurrence and its reverse: what every backend is measured against. It shares the public enums with
   flashqla.h and no line of code. One sequence a call, everything dense and in double. */
#ifndef ORACLE_H
#define ORACLE_H

#include "flashqla.h"

typedef struct oracle {
    int len, heads_qk, heads_v, dim_k, dim_v;
    fqla_head_map head_map;
    fqla_gate gate;
    fqla_beta beta_form;
    int negative_eigenvalues, l2norm;
    double scale;
    const double *q, *k;           /* [len, heads_qk, dim_k] */
    const double *v;               /* [len, heads_v, dim_v] */
    const double *g, *beta;        /* [len, heads_v], in the gate and beta forms */
    const double *A_log, *dt_bias; /* [heads_v], FQLA_GATE_RAW alone */
    const double *h0;              /* [heads_v, dim_k, dim_v], NULL: zero */
    const double *do_;             /* [len, heads_v, dim_v], the reverse alone */
    const double *dht;             /* as h0 */
    int snapshot_every;            /* tokens between the forward's snapshots, 0: none */

    double *o, *ht;                 /* the forward's results */
    double *snapshots;              /* [len / snapshot_every, heads_v, dim_k, dim_v] */
    double *dq, *dk, *dv, *dg, *dbeta, *dA_log, *ddt_bias, *dh0; /* the reverse's, all written */
} oracle;

void oracle_forward(const oracle *p);
void oracle_backward(const oracle *p); /* not for FQLA_GATE_LINEAR */

/* The forms of the inputs, for others that compute in double. */
int oracle_head_qk(const oracle *p, int h); /* that a v-head reads */
double oracle_alpha(const oracle *p, int t, int h);
double oracle_beta(const oracle *p, int t, int h);
double oracle_norm_factor(const oracle *p, const double *row); /* what l2norm multiplies a row of q or k with */

#endif
