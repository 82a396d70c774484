/* How exact the forward is by every schedule that a plan can have, and whether its bits repeat. Heads of 128, bfloat16 tensors,
   float32 states.
       build/tests/gpu_errors [--backend cpu|cuda]
           A line a schedule: the median over eight seeds of the relative L2 error of o and of ht, over all sequences, against the
           float64 oracle. The CPU has one schedule. Exit status 1 where a median is over its bar.
       build/tests/gpu_errors [--backend cpu|cuda] --repeat N FILE
           A line a row of FILE (fwd HQK HV len,len,...): N runs of the row's plan on the same buffers, o and ht compared with
           the first run's. Exit status 1 where a bit differs or a number is not finite. */
#include "case.h"
#include "oracle.h"
#include "tools/bench_rows.h"
#include "tools/error.h"
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { DIM = 128, STATE = DIM * DIM, SEEDS = 8, MOST_THREADS = 16 };
/* Of o and ht: up to WHOLE bytes are compared after every run, more after every SELDOM-th and the last; in parts of PIECE. */
enum { WHOLE = 64 << 20, SELDOM = 50, PIECE = 4 << 20 };
enum { Q, K, V, G, BETA, H0, O, HT, TENSORS }; /* bfloat16: q, k, v, o */

typedef enum gate_kind { MILD, ZERO, X64, STRONG, MIXED, QUARTER, GATES } gate_kind;
static const char *const gates_names[GATES] = { "mild", "zero", "x64", "-10", "mixed", "quarter" };

static const double bars[2] = { 3.5e-3, 1.9e-3 }; /* o, ht */

/* The inputs of a forward, its outputs and what they should be. */
typedef struct problem {
    int32_t heads_qk, heads_v, num_seqs;
    int32_t cu_seqlens[CASE_MOST_SEQS + 1];
    gate_kind gates;
    uint64_t seed;
    double (*draw)(uint64_t *random); /* of mean 0 and variance 1 */
    size_t bytes[TENSORS];
    void *host[TENSORS], *device[TENSORS];
    double *expected[2]; /* o, ht */
} problem;

/* ---- help */

static void *allocate(size_t bytes) {
    void *memory = malloc(bytes > 0 ? bytes : 1);
    if (memory == NULL) abort();
    return memory;
}

static void check(fqla_status status) {
    if (status == FQLA_OK) return;
    fprintf(stderr, "%s: %s\n", fqla_status_name(status), test_shared_host.message);
    exit(EXIT_FAILURE);
}

/* job(user, index) for every index below count, on as many threads as there are processors. */
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

static void parallel(int count, void (*job)(void *user, int index), void *user) {
    const long processors = sysconf(_SC_NPROCESSORS_ONLN);
    team t = { .job = job, .user = user, .count = count };
    pthread_t threads[MOST_THREADS];
    int started = 0;
    while (started < MOST_THREADS && started + 1 < processors && started + 1 < count &&
           pthread_create(&threads[started], NULL, team_member, &t) == 0)
        started++;
    team_member(&t);
    while (started > 0) pthread_join(threads[--started], NULL);
}

/* ---- numbers */

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

static double element(const problem *p, int tensor, size_t i) {
    const bool narrow = tensor <= V || tensor == O;
    return narrow ? from_bf16(((const uint16_t *)p->host[tensor])[i]) : (double)((const float *)p->host[tensor])[i];
}

/* Fast, for large rows; of variance 1. */
static double draw_uniform(uint64_t *random) { return (case_uniform(random) - 0.5) * 3.4641016151377544; }

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

static void fill_vector(const problem *p, int tensor, int64_t vector, uint64_t *random) {
    uint16_t *out = (uint16_t *)p->host[tensor] + vector * DIM;
    double x[DIM], norm = 0.0;
    int i;
    for (i = 0; i < DIM; i++) {
        x[i] = p->draw(random);
        norm += x[i] * x[i];
    }
    norm = tensor == V ? 1.0 : 1.0 / sqrt(norm);
    for (i = 0; i < DIM; i++) out[i] = to_bf16(x[i] * norm);
}

static void fill_tokens(const problem *p, int64_t first, int64_t end) {
    uint64_t random = p->seed << 32 | (uint64_t)first;
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
        }
    }
}

static void fill_h0(const problem *p) {
    uint64_t random = ~p->seed;
    float *h0 = (float *)p->host[H0];
    size_t i;
    for (i = 0; i < p->bytes[H0] / sizeof *h0; i++) h0[i] = (float)p->draw(&random);
}

/* ---- a problem's life */

/* Host memory, but not yet its contents. */
static problem problem_make(int32_t heads_qk, int32_t heads_v, int32_t num_seqs, const int32_t *lens, gate_kind gates,
                            uint64_t seed) {
    problem p = { .heads_qk = heads_qk, .heads_v = heads_v, .num_seqs = num_seqs, .gates = gates, .seed = seed,
                  .draw = case_normal };
    const size_t qk = (size_t)heads_qk * DIM * 2, v = (size_t)heads_v * DIM * 2, gate = (size_t)heads_v * 4;
    const size_t a_token[TENSORS] = { qk, qk, v, gate, gate, 0, v, 0 };
    int32_t n;
    int i;
    if (num_seqs > CASE_MOST_SEQS) abort();
    for (n = 0; n < num_seqs; n++) p.cu_seqlens[n + 1] = p.cu_seqlens[n] + lens[n];
    for (i = 0; i < TENSORS; i++) {
        p.bytes[i] = a_token[i] > 0 ? a_token[i] * (size_t)p.cu_seqlens[num_seqs] : (size_t)(num_seqs * heads_v) * STATE * 4;
        p.host[i] = allocate(p.bytes[i]);
    }
    return p;
}

/* Device memory with the inputs in it. */
static void problem_upload(problem *p) {
    int i;
    for (i = 0; i < TENSORS; i++) {
        check(fqla_alloc(test_shared(), p->bytes[i], &p->device[i]));
        if (i < O) check(fqla_upload(test_shared(), p->device[i], p->host[i], p->bytes[i], NULL));
    }
}

static void problem_free(problem *p) {
    int i;
    for (i = 0; i < TENSORS; i++) {
        check(fqla_free(test_shared(), p->device[i]));
        free(p->host[i]);
    }
    free(p->expected[0]), free(p->expected[1]);
}

static fqla_status plan_for(const problem *p, int32_t v_split, int32_t segment_chunks, fqla_plan **plan) {
    const fqla_plan_desc desc = { .heads_qk = p->heads_qk, .heads_v = p->heads_v, .num_seqs = p->num_seqs,
                                  .cu_seqlens = p->cu_seqlens, .dtype = FQLA_DTYPE_BF16, .state_dtype = FQLA_DTYPE_FP32,
                                  .v_split = v_split, .segment_chunks = segment_chunks };
    return fqla_plan_create(test_shared(), &desc, plan);
}

static void problem_run(const problem *p, fqla_plan *plan) {
    void *const *d = p->device;
    const fqla_forward_args args = { .q = d[Q], .k = d[K], .v = d[V], .g = d[G], .beta = d[BETA], .h0 = d[H0], .o = d[O],
                                     .ht = d[HT] };
    check(fqla_forward(plan, &args, NULL));
}

/* Into the host's o and ht, over NaNs: what a run does not write shows. */
static void problem_run_afresh(const problem *p, fqla_plan *plan) {
    int i;
    for (i = O; i <= HT; i++) {
        memset(p->host[i], 0xff, p->bytes[i]);
        check(fqla_upload(test_shared(), p->device[i], p->host[i], p->bytes[i], NULL));
    }
    problem_run(p, plan);
    for (i = O; i <= HT; i++) check(fqla_download(test_shared(), p->host[i], p->device[i], p->bytes[i], NULL));
}

/* ---- errors */

/* `count` elements from `first` on. */
static double *gather(const problem *p, int tensor, size_t first, size_t count) {
    double *out = (double *)allocate(count * sizeof *out);
    size_t i;
    for (i = 0; i < count; i++) out[i] = element(p, tensor, first + i);
    return out;
}

static void fill_and_expect(void *user, int index) {
    problem *p = (problem *)user + index;
    const size_t qk = (size_t)p->heads_qk * DIM, v = (size_t)p->heads_v * DIM, heads = (size_t)p->heads_v, state = heads * STATE;
    int32_t n;
    fill_tokens(p, 0, p->cu_seqlens[p->num_seqs]);
    fill_h0(p);
    p->expected[0] = (double *)allocate(p->bytes[O] / 2 * sizeof(double));
    p->expected[1] = (double *)allocate(p->bytes[HT] / 4 * sizeof(double));
    for (n = 0; n < p->num_seqs; n++) {
        const size_t at = (size_t)p->cu_seqlens[n], len = (size_t)p->cu_seqlens[n + 1] - at;
        double *in[O] = { gather(p, Q, at * qk, len * qk), gather(p, K, at * qk, len * qk), gather(p, V, at * v, len * v),
                          gather(p, G, at * heads, len * heads), gather(p, BETA, at * heads, len * heads),
                          gather(p, H0, (size_t)n * state, state) };
        const oracle reference = { .len = (int)len, .heads_qk = p->heads_qk, .heads_v = p->heads_v, .dim_k = DIM, .dim_v = DIM,
                                   .head_map = FQLA_HEAD_MAP_DIV, .gate = FQLA_GATE_LOG, .beta_form = FQLA_BETA_PLAIN,
                                   .scale = 1.0 / sqrt((double)DIM), .q = in[Q], .k = in[K], .v = in[V], .g = in[G],
                                   .beta = in[BETA], .h0 = in[H0], .o = p->expected[0] + at * v,
                                   .ht = p->expected[1] + (size_t)n * state };
        int i;
        oracle_forward(&reference);
        for (i = 0; i < O; i++) free(in[i]);
    }
}

/* Relative L2, over all sequences; infinite where anything is not finite. */
static double error_of(const problem *p, int tensor) {
    const double *expected = p->expected[tensor - O];
    const size_t count = p->bytes[tensor] / (tensor == O ? 2 : 4);
    double error = 0.0, norm = 0.0;
    size_t i;
    for (i = 0; i < count; i++) {
        const double off = element(p, tensor, i) - expected[i];
        error += off * off;
        norm += expected[i] * expected[i];
    }
    return isfinite(error) ? sqrt(error / norm) : (double)INFINITY;
}

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values) {
    qsort(values, SEEDS, sizeof *values, ascending);
    return (values[SEEDS / 2 - 1] + values[SEEDS / 2]) / 2.0;
}

/* A line of the table. False: over a bar. */
static bool measure(const problem *problems, int32_t v_split, int32_t segment_chunks) {
    double errors[2][SEEDS], medians[2];
    fqla_plan *plan;
    fqla_plan_summary summary;
    int seed;
    const fqla_status status = plan_for(problems, v_split, segment_chunks, &plan);
    printf("%-6s %7d %14d ", gates_names[problems->gates], (int)v_split, (int)segment_chunks);
    if (status == FQLA_ERROR_INVALID_SIZE) {
        printf("refused: %s\n", test_shared_host.message);
        return true;
    }
    check(status);
    check(fqla_plan_info(plan, &summary));
    for (seed = 0; seed < SEEDS; seed++) {
        problem_run_afresh(&problems[seed], plan);
        errors[0][seed] = error_of(&problems[seed], O);
        errors[1][seed] = error_of(&problems[seed], HT);
    }
    fqla_plan_destroy(plan);
    medians[0] = median(errors[0]);
    medians[1] = median(errors[1]);
    printf("%9d   o %.2e (bar %.1e) %-4s   ht %.2e (bar %.1e) %s\n", (int)summary.segments, medians[0], bars[0],
           medians[0] <= bars[0] ? "ok" : "OVER", medians[1], bars[1], medians[1] <= bars[1] ? "ok" : "OVER");
    fflush(stdout);
    return medians[0] <= bars[0] && medians[1] <= bars[1];
}

/* Sequences of one layout with some gates, cut in some ways; both lists end with GATES or 0. */
static bool table(int32_t num_seqs, const int32_t *lens, const gate_kind *some_gates, const int32_t *cuts) {
    bool ok = true;
    int32_t n;
    printf("heads 2/4, lengths");
    for (n = 0; n < num_seqs; n++) printf("%c%d", n == 0 ? ' ' : ',', (int)lens[n]);
    printf(", median of %d seeds\ngates  v_split segment_chunks  segments\n", SEEDS);
    for (; *some_gates != GATES; some_gates++) {
        problem problems[SEEDS];
        int seed, cut;
        int32_t v_split;
        for (seed = 0; seed < SEEDS; seed++)
            problems[seed] = problem_make(2, 4, num_seqs, lens, *some_gates, (uint64_t)(100 * *some_gates) + (uint64_t)seed + 1);
        parallel(SEEDS, fill_and_expect, problems);
        for (seed = 0; seed < SEEDS; seed++) problem_upload(&problems[seed]);
        if (!test_on_cuda()) ok = measure(problems, 0, 0) && ok;
        for (v_split = 1; test_on_cuda() && v_split <= 2; v_split++)
            for (cut = 0; cuts[cut] != 0; cut++) ok = measure(problems, v_split, cuts[cut]) && ok;
        for (seed = 0; seed < SEEDS; seed++) problem_free(&problems[seed]);
    }
    return ok;
}

static bool errors_of_all(void) {
    static const gate_kind all[] = { MILD, ZERO, X64, STRONG, MIXED, GATES }, two[] = { ZERO, MIXED, GATES };
    const bool ok = table(5, (const int32_t[]){ 1024, 513, 64, 1, 200 }, all, (const int32_t[]){ -1, 1, 2, 4, 8, 0 });
    return table(2, (const int32_t[]){ 8192, 4096 + 37 }, two, (const int32_t[]){ -1, 4, 16, 32, 0 }) && ok;
}

/* ---- repeats */

enum { FILL = 256 }; /* tokens that a thread fills at once */

static void fill_some(void *user, int index) {
    const problem *p = (const problem *)user;
    const int64_t first = (int64_t)index * FILL, tokens = p->cu_seqlens[p->num_seqs];
    fill_tokens(p, first, first + FILL < tokens ? first + FILL : tokens);
}

static bool all_finite(const problem *p) {
    const uint16_t *o = (const uint16_t *)p->host[O];
    const float *ht = (const float *)p->host[HT];
    bool finite = true;
    size_t i;
    for (i = 0; i < p->bytes[O] / sizeof *o; i++) finite &= (o[i] & 0x7f80) != 0x7f80;
    for (i = 0; i < p->bytes[HT] / sizeof *ht; i++) finite &= isfinite(ht[i]) != 0;
    return finite;
}

/* A later run's o and ht beside the first's, which are the problem's on the host. */
typedef struct comparison {
    const problem *p;
    unsigned char *again[2];
    atomic_int differ; /* pieces */
} comparison;

static int pieces(size_t bytes) { return (int)((bytes + PIECE - 1) / PIECE); }

static void compare_piece(void *user, int index) {
    comparison *c = (comparison *)user;
    const int of_o = pieces(c->p->bytes[O]), tensor = index < of_o ? O : HT;
    const size_t at = (size_t)(index < of_o ? index : index - of_o) * PIECE, left = c->p->bytes[tensor] - at;
    const size_t bytes = left < PIECE ? left : PIECE;
    unsigned char *again = c->again[tensor - O] + at;
    check(fqla_download(test_shared(), again, (const char *)c->p->device[tensor] + at, bytes, NULL));
    if (memcmp(again, (const char *)c->p->host[tensor] + at, bytes) != 0) atomic_fetch_add(&c->differ, 1);
}

static double seconds(void) {
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static bool repeat_row(const row *r, long runs) {
    const double start = seconds();
    problem p = problem_make(r->heads_qk, r->heads_v, r->num_seqs, r->lens, QUARTER, 1);
    const int32_t every = p.bytes[O] + p.bytes[HT] <= WHOLE ? 1 : SELDOM;
    comparison c = { .p = &p, .again = { (unsigned char *)allocate(p.bytes[O]), (unsigned char *)allocate(p.bytes[HT]) } };
    long run, compared = 1, differing = 0, first_differing = 0;
    bool finite;
    fqla_plan *plan;
    fqla_plan_summary summary;
    char label[64];
    p.draw = draw_uniform;
    parallel((int)((r->tokens + FILL - 1) / FILL), fill_some, &p);
    fill_h0(&p);
    problem_upload(&p);
    check(plan_for(&p, 0, 0, &plan));
    check(fqla_plan_info(plan, &summary));
    problem_run_afresh(&p, plan);
    finite = all_finite(&p);
    for (run = 2; run <= runs; run++) {
        problem_run(&p, plan);
        if (run % every != 0 && run != runs) continue;
        atomic_store(&c.differ, 0);
        parallel(pieces(p.bytes[O]) + pieces(p.bytes[HT]), compare_piece, &c);
        compared++;
        if (atomic_load(&c.differ) == 0) continue;
        if (differing++ == 0) first_differing = run;
    }
    row_label(r, label, sizeof label);
    printf("%-18s %6.1f MB of o and ht, %ld runs, ", label, (double)(p.bytes[O] + p.bytes[HT]) / 1e6, runs);
    if (every == 1) printf("every run compared: ");
    else printf("%ld compared (the first, every %dth and the last): ", compared, every);
    if (differing > 0) printf("%ld DIFFER, the first is run %ld", differing, first_differing);
    else printf("the same bits");
    printf("%s; %.1f s; %s\n", finite ? "" : ", NOT FINITE", seconds() - start, summary.schedule);
    fflush(stdout);
    fqla_plan_destroy(plan);
    problem_free(&p);
    free(c.again[0]), free(c.again[1]);
    return finite && differing == 0;
}

static bool repeats(long runs, const char *path) {
    row_list list = { NULL, 0 };
    char error[ERROR_SIZE];
    bool ok = true;
    int i;
    if (!rows_read(&list, path, error)) {
        fprintf(stderr, "%s\n", error);
        exit(2);
    }
    for (i = 0; i < list.count; i++) {
        if (list.rows[i].op != FORWARD) continue;
        ok = repeat_row(&list.rows[i], runs) && ok;
    }
    rows_free(&list);
    return ok;
}

int main(int argc, char **argv) {
    const char *path = NULL;
    long runs = 0;
    bool ok, known = true;
    int i;
    for (i = 1; i < argc && known; i++) {
        if (strcmp(argv[i], "--backend") == 0 && i + 1 < argc) {
            const char *backend = argv[++i];
            known = strcmp(backend, "cpu") == 0 || strcmp(backend, "cuda") == 0;
            test_backend = strcmp(backend, "cuda") == 0 ? FQLA_BACKEND_CUDA : FQLA_BACKEND_CPU;
        } else if (strcmp(argv[i], "--repeat") == 0 && i + 2 < argc) {
            runs = strtol(argv[++i], NULL, 10);
            path = argv[++i];
            known = runs > 0;
        } else {
            known = false;
        }
    }
    if (!known) {
        fprintf(stderr, "usage: gpu_errors [--backend cpu|cuda] [--repeat N FILE]\n");
        return 2;
    }
    ok = path != NULL ? repeats(runs, path) : errors_of_all();
    return test_shared_close() == NULL && ok ? EXIT_SUCCESS : EXIT_FAILURE;
}
