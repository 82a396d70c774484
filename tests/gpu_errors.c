/* How exact the forward and the backward are by every schedule that a plan can have, and whether their bits repeat.
       build/tests/gpu_errors [--backend cpu|cuda] [--only forward|backward]
           A line a schedule: the median over eight seeds of the relative L2 error of each output, over all sequences, against the
           float64 oracle. The CPU has one schedule. Exit status 1 where a median is over its bar, but of the longest sequences.
       build/tests/gpu_errors [--backend cpu|cuda] --repeat N FILE
           A line a row of FILE (fwd|bwd HQK HV len,len,...): N runs of the row's plan on the same buffers, the outputs compared
           with the first run's. Exit status 1 where a bit differs or a number is not finite. */
#include "gpu_problem.h"
#include "gpu_repeat.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SEEDS = 8 };

/* By tensor: the bar of its median. */
static const double bars[TENSORS] = { [O] = 3.5e-3, [HT] = 1.9e-3, [DQ] = 3.9e-3, [DK] = 5.3e-3, [DV] = 3.5e-3, [DG] = 4.5e-3,
                                      [DBETA] = 4.2e-3, [DH0] = 1.6e-3 };

/* A schedule: the plan's, and whether the backward is given what a forward has left. */
typedef struct way {
    int32_t v_split, segment_chunks;
    bool residuals, low_memory;
} way;

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values) {
    qsort(values, SEEDS, sizeof *values, ascending);
    return (values[SEEDS / 2 - 1] + values[SEEDS / 2]) / 2.0;
}

/* The medians of a schedule's outputs, on one line. False: one is over its bar. */
static bool measure(const problem *problems, way w) {
    const bool backward = problems->backward;
    const int first = backward ? FIRST_GRADIENT : FIRST_OUTPUT, end = backward ? TENSORS : FIRST_GRADIENT;
    double errors[TENSORS][SEEDS];
    void *residuals = NULL;
    size_t bytes = 0;
    fqla_plan *plan;
    fqla_plan_summary summary;
    bool ok = true;
    int seed, t;
    const fqla_status status = problem_plan(problems, w.v_split, w.segment_chunks, w.low_memory, &plan);
    printf("%-6s %7d ", gate_kinds[problems->gates], (int)w.v_split);
    if (w.low_memory) printf("%14s ", "low memory");
    else printf("%14d ", (int)w.segment_chunks);
    if (backward) printf("%9s ", w.residuals ? "given" : "none");
    if (status == FQLA_ERROR_INVALID_SIZE) {
        printf("refused: %s\n", test_shared_host.message);
        return true;
    }
    check(status);
    check(fqla_plan_info(plan, &summary));
    check(fqla_residuals_size(plan, &bytes));
    if (w.residuals && bytes > 0) check(fqla_alloc(test_shared(), bytes, &residuals));
    for (seed = 0; seed < SEEDS; seed++) {
        if (residuals != NULL) problem_run(&problems[seed], plan, false, residuals);
        problem_run_afresh(&problems[seed], plan, backward, residuals);
        for (t = first; t < end; t++) errors[t][seed] = problem_error(&problems[seed], (problem_tensor)t);
    }
    check(fqla_free(test_shared(), residuals));
    fqla_plan_destroy(plan);
    printf("%8d", (int)summary.segments);
    for (t = first; t < end; t++) {
        const double middle = median(errors[t]);
        printf("  %8.2e%c", middle, middle <= bars[t] ? ' ' : '*');
        ok = middle <= bars[t] && ok;
    }
    printf("%s\n", ok ? " ok" : " OVER");
    fflush(stdout);
    return ok;
}

static void print_head(int32_t heads_v, int32_t num_seqs, const int32_t *lens, bool backward) {
    const int first = backward ? FIRST_GRADIENT : FIRST_OUTPUT, end = backward ? TENSORS : FIRST_GRADIENT;
    int32_t n;
    int t;
    printf("%s, heads 2/%d, lengths", backward ? "backward, h0 and dht given" : "forward, h0 given", (int)heads_v);
    for (n = 0; n < num_seqs; n++) printf("%c%d", n == 0 ? ' ' : ',', (int)lens[n]);
    printf(", median of %d seeds; * over its bar\ngates  v_split segment_chunks %ssegments", SEEDS, backward ? "residuals " : "");
    for (t = first; t < end; t++) printf("  %-9s", problem_names[t]);
    printf("\n%*s", backward ? 48 : 38, "bars");
    for (t = first; t < end; t++) printf("  %-9.1e", bars[t]);
    printf("\n");
}

/* Sequences of one layout with some gates, cut in some ways; both lists end with GATES or 0. */
enum { LOW_MEMORY = -2 };
static bool table(int32_t heads_v, int32_t num_seqs, const int32_t *lens, bool backward, const gate_kind *some_gates, const int32_t *cuts) {
    double oracle_seconds = 0.0;
    const double start = seconds();
    bool ok = true;
    print_head(heads_v, num_seqs, lens, backward);
    for (; *some_gates != GATES; some_gates++) {
        problem problems[SEEDS];
        int seed, cut;
        int32_t v_split, residuals;
        for (seed = 0; seed < SEEDS; seed++)
            problems[seed] = problem_make(2, heads_v, num_seqs, lens, *some_gates, (uint64_t)(100 * *some_gates) + (uint64_t)seed + 1,
                                          backward);
        oracle_seconds += problems_expect(problems, SEEDS); /* once for all schedules */
        for (seed = 0; seed < SEEDS; seed++) problem_upload(&problems[seed]);
        if (!test_on_cuda()) ok = measure(problems, (way){ 0, 0, false, false }) && ok;
        for (cut = 0; test_on_cuda() && cuts[cut] != 0; cut++) {
            for (v_split = 1; !backward && v_split <= 2; v_split++)
                ok = measure(problems, (way){ v_split, cuts[cut], false, false }) && ok;
            for (residuals = 0; backward && residuals <= 1; residuals++)
                ok = measure(problems, (way){ 0, cuts[cut] == LOW_MEMORY ? 0 : cuts[cut], residuals != 0, cuts[cut] == LOW_MEMORY }) && ok;
        }
        for (seed = 0; seed < SEEDS; seed++) problem_free(&problems[seed]);
    }
    printf("%.1f s, %.1f of them the oracle's\n\n", seconds() - start, oracle_seconds);
    return ok;
}

static const gate_kind all_gates[] = { MILD, ZERO, X64, STRONG, MIXED, GATES };
static const int32_t lens[5] = { 1024, 513, 64, 1, 200 }, cuts[] = { -1, 1, 2, 4, 8, 0 };

static bool forward_errors(void) {
    static const gate_kind two[] = { ZERO, MIXED, GATES };
    const bool ok = table(4, 5, lens, false, all_gates, cuts);
    printf("How errors grow with the length, where nothing is forgotten; the bars are not meant for these and decide nothing.\n");
    table(4, 2, (const int32_t[]){ 8192, 4096 + 37 }, false, two, (const int32_t[]){ -1, 4, 16, 32, 0 });
    return ok;
}

/* With 64 v-heads a low_memory plan has parts of eight chunks. */
static bool backward_errors(void) {
    static const gate_kind two[] = { ZERO, MIXED, GATES };
    const bool ok = table(4, 5, lens, true, all_gates, cuts);
    return table(64, 2, (const int32_t[]){ 600, 70 }, true, two, (const int32_t[]){ -1, LOW_MEMORY, 0 }) && ok;
}

int main(int argc, char **argv) {
    const char *path = NULL, *only = "";
    long runs = 0;
    bool ok = true, known = true;
    int i;
    for (i = 1; i < argc && known; i++) {
        if (strcmp(argv[i], "--backend") == 0 && i + 1 < argc) {
            const char *backend = argv[++i];
            known = strcmp(backend, "cpu") == 0 || strcmp(backend, "cuda") == 0;
            test_backend = strcmp(backend, "cuda") == 0 ? FQLA_BACKEND_CUDA : FQLA_BACKEND_CPU;
        } else if (strcmp(argv[i], "--only") == 0 && i + 1 < argc) {
            only = argv[++i];
            known = strcmp(only, "forward") == 0 || strcmp(only, "backward") == 0;
        } else if (strcmp(argv[i], "--repeat") == 0 && i + 2 < argc) {
            runs = strtol(argv[++i], NULL, 10);
            path = argv[++i];
            known = runs > 0;
        } else {
            known = false;
        }
    }
    if (!known) {
        fprintf(stderr, "usage: gpu_errors [--backend cpu|cuda] [--only forward|backward] [--repeat N FILE]\n");
        return 2;
    }
    if (path != NULL) {
        ok = repeat_rows(runs, path);
    } else {
        if (strcmp(only, "backward") != 0) ok = forward_errors() && ok;
        if (strcmp(only, "forward") != 0) ok = backward_errors() && ok;
    }
    return test_shared_close() == NULL && ok ? EXIT_SUCCESS : EXIT_FAILURE;
}
