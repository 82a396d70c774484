#include "bench_plans.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { CHUNK = 64 };

/* What is tried of the longest sequence's segments, besides none. */
static const int32_t parts_tried[] = { 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32 };
enum { PARTS_TRIED = sizeof parts_tried / sizeof parts_tried[0], MOST_CHOICES = 2 * (1 + PARTS_TRIED) };

/* Where a plan's own choice stands, over all rows. */
typedef struct losses {
    double sum, most;
    char label[64]; /* of the row that lost most */
    int count;
} losses;

/* Whatever can be forced. */
static int list_choices(const row *r, spread *choices) {
    int32_t n, longest = 0, v_split, before, count = 0;
    int i;
    for (n = 0; n < r->num_seqs; n++)
        if ((r->lens[n] + CHUNK - 1) / CHUNK > longest) longest = (r->lens[n] + CHUNK - 1) / CHUNK;
    for (v_split = 1; v_split <= 2; v_split++) {
        choices[count++] = (spread){ v_split, -1, 0 };
        before = longest; /* a segment as long as the longest sequence cuts nothing */
        for (i = 0; i < PARTS_TRIED; i++) {
            const int32_t chunks = (longest + parts_tried[i] - 1) / parts_tried[i];
            if (chunks == before) continue;
            choices[count++] = (spread){ v_split, chunks, 0 };
            before = chunks;
        }
    }
    return count;
}

/* Of a plan's schedule in words: chunks of a segment, -1 where no sequence is cut. */
static int32_t told_chunks(const fqla_plan_summary *plan) {
    static const char before[] = "segments of ";
    const char *at = strstr(plan->schedule, before);
    return at != NULL ? (int32_t)strtol(at + sizeof before - 1, NULL, 10) : -1;
}

/* And the time that its model expects in ms; 0 where none is told. */
static double told_ms(const fqla_plan_summary *plan) {
    const char *at = strstr(plan->schedule, " us by the model");
    if (at == NULL) return 0;
    while (at > plan->schedule && at[-1] != ' ') at--;
    return strtod(at, NULL) * 1e-3;
}

static void print_choice(const timing *t, bool own) {
    const int32_t chunks = told_chunks(&t->plan);
    const double model = told_ms(&t->plan);
    printf("%2s %6d %9d", own ? "*" : "", (int)t->plan.v_split, (int)t->plan.segments);
    if (chunks > 0) printf(" %12d", (int)chunks);
    else printf(" %12s", "-");
    printf(" %10.4f", t->seconds * 1e3);
    if (model > 0) printf(" %10.3f\n", model);
    else printf(" %10s\n", "-");
}

static void write_choice(FILE *json, const row *r, const timing *t, bool own) {
    cJSON *line = row_json(r, "plan");
    cJSON_AddNumberToObject(line, "v_split", t->plan.v_split);
    cJSON_AddNumberToObject(line, "segment_chunks", told_chunks(&t->plan));
    cJSON_AddNumberToObject(line, "ms", round(t->seconds * 1e8) / 1e5);
    cJSON_AddBoolToObject(line, "auto", own);
    if (told_ms(&t->plan) > 0) cJSON_AddNumberToObject(line, "model", told_ms(&t->plan));
    write_json_line(line, json);
}

static void report(const timing *t, const row *r, bool own, FILE *json) {
    print_choice(t, own);
    fflush(stdout);
    if (json != NULL) write_choice(json, r, t, own);
}

/* "V in 2, 8 segments" */
static void describe(const timing *t, char *words, size_t size) {
    snprintf(words, size, "V in %d, %d segment%s", (int)t->plan.v_split, (int)t->plan.segments, t->plan.segments == 1 ? "" : "s");
}

/* Time a row's choices. False: one could not be timed, and error holds why; those before it are printed. */
static bool time_choices(bench_inputs *inputs, const row *r, const char *label, FILE *json, losses *sum, char *error) {
    const spread any = { 0, 0, 0 };
    spread choices[MOST_CHOICES];
    const int count = list_choices(r, choices);
    timing own, best, t;
    char own_words[64], best_words[64];
    double loss;
    int i;
    printf("%s\n   %6s %9s %12s %10s %10s\n", label, "V in", "segments", "chunks each", "ms", "model ms");
    if (bench_time(inputs, any, &own, error) != FQLA_OK) return false;
    report(&own, r, true, json);
    best = own;
    for (i = 0; i < count; i++) {
        const fqla_status status = bench_time(inputs, choices[i], &t, error);
        if (status == FQLA_ERROR_INVALID_SIZE) continue; /* more segments than a sequence may have */
        if (status != FQLA_OK) return false;
        report(&t, r, false, json);
        if (t.seconds < best.seconds) best = t;
    }
    loss = own.seconds / best.seconds - 1;
    describe(&own, own_words, sizeof own_words);
    describe(&best, best_words, sizeof best_words);
    printf("   * the plan's own choice, %s, lost %.1f%% against %s\n", own_words, loss * 100, best_words);
    sum->sum += loss;
    if (sum->count++ == 0 || loss > sum->most) {
        sum->most = loss;
        snprintf(sum->label, sizeof sum->label, "%s", label);
    }
    return true;
}

bool bench_plans(library *lib, cuda_graph *graph, const row_list *rows, FILE *json) {
    const bool terminal = isatty(STDERR_FILENO);
    losses sum;
    bool ok = true;
    int i;
    memset(&sum, 0, sizeof sum);
    for (i = 0; i < rows->count; i++) {
        const row *r = &rows->rows[i];
        bench_inputs *inputs = NULL;
        char label[64], error[ERROR_SIZE];
        row_label(r, label, sizeof label);
        if (r->op != FORWARD) {
            printf("%s: no fwd row, left out\n", label);
            continue;
        }
        fflush(stdout);
        if (terminal) fprintf(stderr, "[%d/%d] %s: making inputs", i + 1, rows->count, label);
        error[0] = '\0';
        (void)bench_inputs_make(lib, graph, r, &inputs, error);
        if (terminal) fprintf(stderr, "\r%*s\r", 60 + (int)strlen(label), "");
        if (inputs == NULL || !time_choices(inputs, r, label, json, &sum, error)) {
            printf("%s: failed: %s\n", label, error);
            complain("%s: %s", label, error);
            ok = false;
        }
        bench_inputs_free(inputs);
    }
    if (sum.count > 0)
        printf("%d row%s: the plan's own choice lost %.1f%% at most (%s), %.1f%% in the mean\n", sum.count,
               sum.count == 1 ? "" : "s", sum.most * 100, sum.label, sum.sum / sum.count * 100);
    return ok;
}
