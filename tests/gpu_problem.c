#include "gpu_problem.h"
#include "oracle.h"
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MOST_THREADS = 16 };

const char *const problem_names[TENSORS] = { "q", "k", "v", "g", "beta", "h0", "do", "dht",
                                             "o", "ht", "dq", "dk", "dv", "dg", "dbeta", "dh0" };
const char *const gate_kinds[GATES] = { "mild", "zero", "x64", "-10", "mixed", "quarter" };

/* ---- help */

void *allocate(size_t bytes) {
    void *memory = malloc(bytes > 0 ? bytes : 1);
    if (memory == NULL) abort();
    return memory;
}

void check(fqla_status status) {
    if (status == FQLA_OK) return;
    fprintf(stderr, "%s: %s\n", fqla_status_name(status), test_shared_host.message);
    exit(EXIT_FAILURE);
}

double seconds(void) {
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

typedef struct team {
    void (*job)(void *user, int index);
    void *user;
    int count;
    atomic_int next;
} team;

static void *team_member(void *argument) {
    team *t = (team *)argument;
    int index;
    while ((index = atomic_fetch_add(&t->next, 1)) < t->count) t->job(t->user, index);
    return NULL;
}

void parallel(int count, void (*job)(void *user, int index), void *user) {
    const long processors = sysconf(_SC_NPROCESSORS_ONLN);
    team t = { .job = job, .user = user, .count = count };
    pthread_t threads[MOST_THREADS];
    int started = 0;
    while (started + 1 < MOST_THREADS && started + 1 < processors && started + 1 < count &&
           pthread_create(&threads[started], NULL, team_member, &t) == 0)
        started++;
    team_member(&t);
    while (started > 0) pthread_join(threads[--started], NULL);
}

/* ---- tensors */

static bool is_state(problem_tensor t) { return t == H0 || t == DHT || t == HT || t == DH0; }
static bool is_gate(problem_tensor t) { return t == G || t == BETA || t == DG || t == DBETA; }
static bool is_narrow(problem_tensor t) { return !is_state(t) && !is_gate(t); }
static bool is_of_backward(problem_tensor t) { return t == DO || t == DHT || t >= FIRST_GRADIENT; }
static size_t elements_of(problem_tensor t) { return is_state(t) ? STATE : is_gate(t) ? 1 : DIM; } /* a row and head */

static size_t heads_of(const problem *p, problem_tensor t) {
    return (size_t)(t == Q || t == K || t == DQ || t == DK ? p->heads_qk : p->heads_v);
}

static size_t rows_of(const problem *p, problem_tensor t) {
    return (size_t)(is_state(t) ? p->num_seqs : p->cu_seqlens[p->num_seqs]);
}

static size_t count_of(const problem *p, problem_tensor t) { return p->bytes[t] / (is_narrow(t) ? 2 : 4); }

static uint16_t to_bf16(double value) { /* to nearest even; no NaN */
    const float single = (float)value;
    uint32_t bits;
    memcpy(&bits, &single, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static double from_bf16(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float single;
    memcpy(&single, &bits, sizeof single);
    return (double)single;
}

static double element(const problem *p, problem_tensor t, size_t i) {
    return is_narrow(t) ? from_bf16(((const uint16_t *)p->host[t])[i]) : (double)((const float *)p->host[t])[i];
}

bool problem_is_finite(const problem *p, problem_tensor tensor) {
    size_t i;
    bool finite = true;
    for (i = 0; i < count_of(p, tensor); i++) finite &= isfinite(element(p, tensor, i)) != 0;
    return finite;
}

/* ---- values */

double draw_uniform(uint64_t *random) { return (case_uniform(random) - 0.5) * 3.4641016151377544; }

static double log_alpha(const problem *p, int32_t head, uint64_t *random) {
    const double mild = -log1p(exp(-case_normal(random))) / 16.0, strong = -5.0 - 10.0 * case_uniform(random);
    switch (p->gates) {
        case ZERO: return 0.0;
        case X64: return 64.0 * mild;
        case STRONG: return strong;
        case MIXED: return head % 4 == 0 ? 0.0 : head % 4 == 1 ? mild : head % 4 == 2 ? 16.0 * mild : strong;
        case QUARTER: return head % 4 == 0 ? 0.0 : mild;
        default: return mild;
    }
}

/* Of length 1 where it is a query or a key. */
static void fill_vector(const problem *p, problem_tensor tensor, int64_t vector, uint64_t *random) {
    uint16_t *out = (uint16_t *)p->host[tensor] + vector * DIM;
    double x[DIM], norm = 0.0;
    int i;
    for (i = 0; i < DIM; i++) {
        x[i] = p->draw(random);
        norm += x[i] * x[i];
    }
    norm = tensor == Q || tensor == K ? 1.0 / sqrt(norm) : 1.0;
    for (i = 0; i < DIM; i++) out[i] = to_bf16(x[i] * norm);
}

void problem_fill_tokens(const problem *p, int64_t first, int64_t end) {
    uint64_t random = p->seed << 32 | (uint64_t)first, random_do = ~random;
    int64_t t;
    int32_t h;
    for (t = first; t < end; t++) {
        for (h = 0; h < p->heads_qk; h++) {
            fill_vector(p, Q, t * p->heads_qk + h, &random);
            fill_vector(p, K, t * p->heads_qk + h, &random);
        }
        for (h = 0; h < p->heads_v; h++) {
            fill_vector(p, V, t * p->heads_v + h, &random);
            ((float *)p->host[G])[t * p->heads_v + h] = (float)log_alpha(p, h, &random);
            ((float *)p->host[BETA])[t * p->heads_v + h] = (float)(1.0 / (1.0 + exp(-case_normal(&random))));
            if (p->backward) fill_vector(p, DO, t * p->heads_v + h, &random_do);
        }
    }
}

void problem_fill_states(const problem *p) {
    uint64_t random = ~p->seed;
    float *h0 = (float *)p->host[H0], *dht = (float *)p->host[DHT];
    size_t i;
    for (i = 0; i < count_of(p, H0); i++) h0[i] = (float)p->draw(&random);
    for (i = 0; i < count_of(p, DHT); i++) dht[i] = (float)(p->draw(&random) / 8.0);
}

/* ---- a problem's life */

problem problem_make(int32_t heads_qk, int32_t heads_v, int32_t num_seqs, const int32_t *lens, gate_kind gates, uint64_t seed,
                     bool backward) {
    problem p = { .heads_qk = heads_qk, .heads_v = heads_v, .num_seqs = num_seqs, .gates = gates, .seed = seed,
                  .backward = backward, .draw = case_normal };
    int32_t n;
    int t;
    if (num_seqs > CASE_MOST_SEQS) abort();
    for (n = 0; n < num_seqs; n++) p.cu_seqlens[n + 1] = p.cu_seqlens[n] + lens[n];
    for (t = 0; t < TENSORS; t++) {
        const problem_tensor tensor = (problem_tensor)t;
        if (is_of_backward(tensor) && !backward) continue;
        p.bytes[t] = rows_of(&p, tensor) * heads_of(&p, tensor) * elements_of(tensor) * (is_narrow(tensor) ? 2 : 4);
        p.host[t] = allocate(p.bytes[t]);
    }
    return p;
}

void problem_upload(problem *p) {
    int t;
    for (t = 0; t < TENSORS; t++) {
        if (p->bytes[t] == 0) continue;
        check(fqla_alloc(test_shared(), p->bytes[t], &p->device[t]));
        if (t < FIRST_OUTPUT) check(fqla_upload(test_shared(), p->device[t], p->host[t], p->bytes[t], NULL));
    }
}

void problem_free(problem *p) {
    int t;
    for (t = 0; t < TENSORS; t++) {
        check(fqla_free(test_shared(), p->device[t]));
        free(p->host[t]);
        free(p->expected[t]);
    }
}

fqla_status problem_plan(const problem *p, int32_t v_split, int32_t segment_chunks, bool low_memory, fqla_plan **plan) {
    const fqla_plan_desc desc = { .heads_qk = p->heads_qk, .heads_v = p->heads_v, .num_seqs = p->num_seqs,
                                  .cu_seqlens = p->cu_seqlens, .dtype = FQLA_DTYPE_BF16, .state_dtype = FQLA_DTYPE_FP32,
                                  .v_split = v_split, .segment_chunks = segment_chunks, .backward = p->backward,
                                  .low_memory = low_memory };
    return fqla_plan_create(test_shared(), &desc, plan);
}

void problem_run(const problem *p, fqla_plan *plan, bool backward, void *residuals) {
    void *const *d = p->device;
    size_t bytes;
    check(fqla_residuals_size(plan, &bytes));
    if (backward) {
        const fqla_backward_args args = { .q = d[Q], .k = d[K], .v = d[V], .g = d[G], .beta = d[BETA], .h0 = d[H0], .do_ = d[DO],
                                          .dht = d[DHT], .dq = d[DQ], .dk = d[DK], .dv = d[DV], .dg = d[DG], .dbeta = d[DBETA],
                                          .dh0 = d[DH0], .residuals = residuals, .residuals_size = bytes };
        check(fqla_backward(plan, &args, NULL));
    } else {
        const fqla_forward_args args = { .q = d[Q], .k = d[K], .v = d[V], .g = d[G], .beta = d[BETA], .h0 = d[H0], .o = d[O],
                                         .ht = d[HT], .residuals = residuals, .residuals_size = bytes };
        check(fqla_forward(plan, &args, NULL));
    }
}

void problem_run_afresh(const problem *p, fqla_plan *plan, bool backward, void *residuals) {
    const int first = backward ? FIRST_GRADIENT : FIRST_OUTPUT, end = backward ? TENSORS : FIRST_GRADIENT;
    int t;
    for (t = first; t < end; t++) {
        memset(p->host[t], 0xff, p->bytes[t]);
        if (p->bytes[t] > 0) check(fqla_upload(test_shared(), p->device[t], p->host[t], p->bytes[t], NULL));
    }
    problem_run(p, plan, backward, residuals);
    check(fqla_synchronize(test_shared(), NULL));
    for (t = first; t < end; t++)
        if (p->bytes[t] > 0) check(fqla_download(test_shared(), p->host[t], p->device[t], p->bytes[t], NULL));
}

/* ---- what is expected */

/* A sequence's share of a tensor: the heads of one q/k head, where the rows of that lie. */
typedef struct share {
    size_t row, rows, head, heads, all_heads, elements;
} share;

static share share_of(const problem *p, problem_tensor t, int32_t n, int32_t head_qk) {
    const size_t ratio = heads_of(p, t) / (size_t)p->heads_qk;
    share s = { .head = (size_t)head_qk * ratio, .heads = ratio, .all_heads = heads_of(p, t), .elements = elements_of(t) };
    s.row = is_state(t) ? (size_t)n : (size_t)p->cu_seqlens[n];
    s.rows = is_state(t) ? 1 : (size_t)(p->cu_seqlens[n + 1] - p->cu_seqlens[n]);
    return s;
}

/* Its element number i, counted in the share, is the tensor's number ... */
static size_t index_in(const share *s, size_t i) {
    const size_t vector = i / s->elements, row = s->row + vector / s->heads, head = s->head + vector % s->heads;
    return (row * s->all_heads + head) * s->elements + i % s->elements;
}

static size_t share_count(const share *s) { return s->rows * s->heads * s->elements; }

static double *gather(const problem *p, problem_tensor t, int32_t n, int32_t head_qk) {
    const share s = share_of(p, t, n, head_qk);
    double *out = (double *)allocate(share_count(&s) * sizeof *out);
    size_t i;
    for (i = 0; i < share_count(&s); i++) out[i] = p->host[t] != NULL ? element(p, t, index_in(&s, i)) : 0.0;
    return out;
}

typedef struct crowd {
    problem *problems;
    int count;
} crowd;

/* All problems are of one layout: number `index` is a sequence of one of them, for one q/k head; the longest sequences come first,
   where the layout has them first. */
static void expect_share(void *user, int index) {
    const crowd *c = (const crowd *)user;
    problem *p = &c->problems[index % c->count];
    const int32_t head_qk = index / c->count % p->heads_qk, n = index / c->count / p->heads_qk;
    double *of[TENSORS];
    oracle reference = { .len = p->cu_seqlens[n + 1] - p->cu_seqlens[n], .heads_qk = 1, .heads_v = p->heads_v / p->heads_qk,
                         .dim_k = DIM, .dim_v = DIM, .head_map = FQLA_HEAD_MAP_DIV, .gate = FQLA_GATE_LOG,
                         .beta_form = FQLA_BETA_PLAIN, .scale = 1.0 / sqrt((double)DIM) };
    const int first = p->backward ? FIRST_GRADIENT : FIRST_OUTPUT, end = p->backward ? TENSORS : FIRST_GRADIENT;
    int t;
    for (t = 0; t < TENSORS; t++) of[t] = gather(p, (problem_tensor)t, n, head_qk);
    reference.q = of[Q], reference.k = of[K], reference.v = of[V], reference.g = of[G], reference.beta = of[BETA];
    reference.h0 = of[H0], reference.do_ = of[DO], reference.dht = of[DHT], reference.o = of[O], reference.ht = of[HT];
    reference.dq = of[DQ], reference.dk = of[DK], reference.dv = of[DV], reference.dg = of[DG], reference.dbeta = of[DBETA];
    reference.dh0 = of[DH0];
    if (p->backward) oracle_backward(&reference);
    else oracle_forward(&reference);
    for (t = first; t < end; t++) {
        const share s = share_of(p, (problem_tensor)t, n, head_qk);
        size_t i;
        for (i = 0; i < share_count(&s); i++) p->expected[t][index_in(&s, i)] = of[t][i];
    }
    for (t = 0; t < TENSORS; t++) free(of[t]);
}

static void fill(void *user, int index) {
    problem *p = &((const crowd *)user)->problems[index];
    const int first = p->backward ? FIRST_GRADIENT : FIRST_OUTPUT, end = p->backward ? TENSORS : FIRST_GRADIENT;
    int t;
    problem_fill_tokens(p, 0, p->cu_seqlens[p->num_seqs]);
    problem_fill_states(p);
    for (t = first; t < end; t++) p->expected[t] = (double *)allocate(count_of(p, (problem_tensor)t) * sizeof(double));
}

double problems_expect(problem *problems, int count) {
    const double start = seconds();
    crowd c = { .problems = problems, .count = count };
    parallel(count, fill, &c);
    parallel(count * problems->num_seqs * problems->heads_qk, expect_share, &c);
    return seconds() - start;
}

double problem_error(const problem *p, problem_tensor tensor) {
    double error = 0.0, norm = 0.0;
    size_t i;
    for (i = 0; i < count_of(p, tensor); i++) {
        const double off = element(p, tensor, i) - p->expected[tensor][i];
        error += off * off;
        norm += p->expected[tensor][i] * p->expected[tensor][i];
    }
    return isfinite(error) ? sqrt(error / norm) : (double)INFINITY;
}
