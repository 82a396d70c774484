#include "gpu_repeat.h"
#include "gpu_problem.h"
#include "tools/bench_rows.h"
#include "tools/error.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Of the outputs: up to WHOLE bytes are compared after every run, more after every SELDOM-th and the last; in parts of PIECE. */
enum { WHOLE = 64 << 20, SELDOM = 50, PIECE = 4 << 20, FILL = 256 }; /* FILL: tokens that a thread fills at once */

static void fill_some(void *user, int index) {
    const problem *p = (const problem *)user;
    const int64_t first = (int64_t)index * FILL, tokens = p->cu_seqlens[p->num_seqs];
    problem_fill_tokens(p, first, first + FILL < tokens ? first + FILL : tokens);
}

/* A later run's outputs, tensors first to end - 1, beside the first run's, which are the problem's on the host. */
typedef struct comparison {
    const problem *p;
    int first, end;
    unsigned char *again[TENSORS];
    atomic_int differ; /* pieces */
} comparison;

static int pieces(size_t bytes) { return (int)((bytes + PIECE - 1) / PIECE); }

static void compare_piece(void *user, int index) {
    comparison *c = (comparison *)user;
    size_t at, bytes;
    int t;
    for (t = c->first; index >= pieces(c->p->bytes[t]); t++) index -= pieces(c->p->bytes[t]);
    at = (size_t)index * PIECE;
    bytes = c->p->bytes[t] - at < PIECE ? c->p->bytes[t] - at : PIECE;
    check(fqla_download(test_shared(), c->again[t] + at, (const char *)c->p->device[t] + at, bytes, NULL));
    if (memcmp(c->again[t] + at, (const char *)c->p->host[t] + at, bytes) != 0) atomic_fetch_add(&c->differ, 1);
}

static bool repeat_row(const row *r, long runs) {
    const double start = seconds();
    const bool backward = r->op == BACKWARD;
    problem p = problem_make(r->heads_qk, r->heads_v, r->num_seqs, r->lens, QUARTER, 1, backward);
    comparison c = { .p = &p, .first = backward ? FIRST_GRADIENT : FIRST_OUTPUT, .end = backward ? TENSORS : FIRST_GRADIENT };
    long run, compared = 1, differing = 0, first_differing = 0;
    size_t bytes = 0, residuals_bytes = 0;
    int all_pieces = 0, every, t;
    bool finite = true;
    void *residuals = NULL;
    fqla_plan *plan;
    fqla_plan_summary summary;
    char label[64];
    p.draw = draw_uniform;
    parallel((int)((r->tokens + FILL - 1) / FILL), fill_some, &p);
    problem_fill_states(&p);
    problem_upload(&p);
    for (t = c.first; t < c.end; t++) {
        c.again[t] = (unsigned char *)allocate(p.bytes[t]);
        bytes += p.bytes[t];
        all_pieces += pieces(p.bytes[t]);
    }
    every = bytes <= WHOLE ? 1 : SELDOM;
    check(problem_plan(&p, 0, 0, false, &plan));
    check(fqla_plan_info(plan, &summary));
    check(fqla_residuals_size(plan, &residuals_bytes));
    if (backward && residuals_bytes > 0) {
        check(fqla_alloc(test_shared(), residuals_bytes, &residuals));
        problem_run(&p, plan, false, residuals);
    }
    problem_run_afresh(&p, plan, backward, residuals);
    for (t = c.first; t < c.end; t++) finite = problem_is_finite(&p, (problem_tensor)t) && finite;
    for (run = 2; run <= runs; run++) {
        problem_run(&p, plan, backward, residuals);
        if (run % every != 0 && run != runs) continue;
        atomic_store(&c.differ, 0);
        parallel(all_pieces, compare_piece, &c);
        compared++;
        if (atomic_load(&c.differ) == 0) continue;
        if (differing++ == 0) first_differing = run;
    }
    row_label(r, label, sizeof label);
    printf("%-18s %6.1f MB of outputs, %ld runs, ", label, (double)bytes / 1e6, runs);
    if (every == 1) printf("every run compared: ");
    else printf("%ld compared (the first, every %dth and the last): ", compared, every);
    if (differing > 0) printf("%ld DIFFER, the first is run %ld", differing, first_differing);
    else printf("the same bits");
    printf("%s; %.1f s; %s\n", finite ? "" : ", NOT FINITE", seconds() - start, backward ? summary.backward : summary.schedule);
    fflush(stdout);
    check(fqla_free(test_shared(), residuals));
    fqla_plan_destroy(plan);
    problem_free(&p);
    for (t = c.first; t < c.end; t++) free(c.again[t]);
    return finite && differing == 0;
}

bool repeat_rows(long runs, const char *path) {
    row_list list = { NULL, 0 };
    char error[ERROR_SIZE];
    bool ok = true;
    int i;
    if (!rows_read(&list, path, error)) {
        fprintf(stderr, "%s\n", error);
        exit(2);
    }
    for (i = 0; i < list.count; i++)
        if (list.rows[i].op != DECODE) ok = repeat_row(&list.rows[i], runs) && ok;
    rows_free(&list);
    return ok;
}
