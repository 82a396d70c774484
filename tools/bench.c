/* flashqla bench: times of shapes, beside a floor and beside peers. */
#include "bench_plans.h"
#include "bench_time.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char usage[] =
    "usage: flashqla bench --rows FILE [--against FILE] [--json OUT] [options]\n"
    "\n"
    "Times rows, a line each: `fwd|bwd HQK HV len,len,...` (q/k heads, v-heads, the lengths of packed sequences) and\n"
    "`decode HQK HV batch` (one token of every sequence, the states in place); # starts a comment. Heads of 128.\n"
    "On a GPU: bf16, a CUDA graph of 10 calls, median of 7 replays. On the CPU: float32, median of up to 7 measurements.\n"
    "bwd times the backward alone.\n"
    "\n"
    "Prints for each row the time; TFLOP/s and GB/s by the operations and bytes that any implementation needs; the floor, which\n"
    "is the larger of those at 750 TFLOP/s and 4.3 TB/s, what an H200 sustains, and how many times that we take; on the CPU,\n"
    "microseconds a token, v-head and thread; how many times as fast as each peer we are; what the plan chose. Geometric means\n"
    "come last.\n"
    "\n"
    "  --rows FILE     the rows\n"
    "  --row ROW       one row, as --row \"fwd 16 32 8192\"; any number of times\n"
    "  --against FILE  peers' times, JSON lines { op, h_qk, h_v, lens, ms: { name: ms } }; any number of times\n"
    "  --json OUT      write such lines, ours as ms.ours, with plan, floor (ms), tflops and gbs\n"
    "  --all-plans     on a GPU, of every fwd row: the time of each way in which a plan can spread it (V over one block or two,\n"
    "                  sequences whole or cut into so many segments), beside the time that the plan's model expects; what the\n"
    "                  plan's own choice lost against the best. --json then has a line a choice: { op: \"plan\", h_qk, h_v, lens,\n"
    "                  v_split, segment_chunks (-1: whole), ms, auto (the plan's own choice), model (ms) }\n"
    "  --low-memory    bwd rows with plan_desc.low_memory: in windows, with less workspace\n"
    COMMON_OPTIONS;

enum { MOST_PEERS = 8 };

typedef struct bench {
    library lib;
    cuda_graph *graph; /* NULL on the CPU */
    bool low_memory;
    row_list rows;
    peer_list peers;
    const char *names[MOST_PEERS]; /* the peers that have a row of ours */
    int name_count;
    FILE *json;
    /* sums of logarithms and their counts: over the floor, and of each peer over us */
    double floor_sum[OPERATION_COUNT], peer_sum[OPERATION_COUNT][MOST_PEERS];
    int floor_count[OPERATION_COUNT], peer_count[OPERATION_COUNT][MOST_PEERS];
} bench;

static void find_names(bench *b) {
    int i, j, n;
    for (i = 0; i < b->peers.count && b->name_count < MOST_PEERS; i++) {
        const char *name = b->peers.peers[i].name;
        bool used = false;
        if (strncmp(name, "floor", 5) == 0) continue; /* a bound beside the peers, no peer */
        for (j = 0; j < b->rows.count && !used; j++) used = peers_find(&b->peers, &b->rows.rows[j], name) > 0;
        for (n = 0; n < b->name_count && used; n++) used = strcmp(b->names[n], name) != 0;
        if (used) b->names[b->name_count++] = name;
    }
}

/* 0.00512, 12.345, 1234.5: five digits or so */
static void print_number(double value, int width) { printf(" %*.*f", width, value < 1 ? 5 : value < 100 ? 3 : 1, value); }

static void print_head(const bench *b) {
    int n;
    printf("%-24s %10s %9s %9s %10s %9s", "row", "ms", "TFLOP/s", "GB/s", "floor ms", "x floor");
    if (b->graph == NULL) printf(" %13s", "us/token-head");
    for (n = 0; n < b->name_count; n++) printf(" %*s", (int)strlen(b->names[n]) > 7 ? (int)strlen(b->names[n]) : 7, b->names[n]);
    printf("\n");
}

static void write_json(bench *b, const row *r, const timing *t, double tflops, double gbs, const char *plan, bool timed) {
    cJSON *json = row_json(r, operation_names[r->op]), *item = cJSON_AddObjectToObject(json, "ms");
    int n;
    if (timed) cJSON_AddNumberToObject(item, "ours", round(t->seconds * 1e8) / 1e5);
    else cJSON_AddNullToObject(item, "ours");
    for (n = 0; n < b->name_count; n++) {
        const double ms = peers_find(&b->peers, r, b->names[n]);
        if (ms > 0 && strcmp(b->names[n], "ours") != 0) cJSON_AddNumberToObject(item, b->names[n], ms);
    }
    cJSON_AddStringToObject(json, "plan", plan);
    cJSON_AddNumberToObject(json, "floor", round(row_floor(r) * 1e8) / 1e5);
    if (timed) {
        cJSON_AddNumberToObject(json, "tflops", round(tflops * 1e4) / 1e4);
        cJSON_AddNumberToObject(json, "gbs", round(gbs * 1e2) / 1e2);
    }
    write_json_line(json, b->json);
}

static void print_row(bench *b, const row *r, const char *label, const timing *t) {
    const double tflops = row_flops(r) / t->seconds * 1e-12, gbs = row_bytes(r, b->graph != NULL ? 2 : 4) / t->seconds * 1e-9;
    const double over_floor = t->seconds / row_floor(r);
    const char *code = r->op == BACKWARD ? t->plan.backward : r->op == DECODE ? t->plan.decode : t->plan.forward;
    char plan[512];
    int n;
    snprintf(plan, sizeof plan, "%s; V in %d, %d segment%s; %s", code, (int)t->plan.v_split, (int)t->plan.segments,
             t->plan.segments == 1 ? "" : "s", t->plan.schedule);
    printf("%-24s", label);
    print_number(t->seconds * 1e3, 10);
    print_number(tflops, 9);
    print_number(gbs, 9);
    print_number(row_floor(r) * 1e3, 10);
    print_number(over_floor, 9);
    if (b->graph == NULL) print_number(t->seconds * 1e6 * b->lib.summary.num_threads / ((double)r->tokens * r->heads_v), 13);
    b->floor_sum[r->op] += log(over_floor);
    b->floor_count[r->op]++;
    for (n = 0; n < b->name_count; n++) {
        const double ms = peers_find(&b->peers, r, b->names[n]), faster = ms / (t->seconds * 1e3);
        const int width = (int)strlen(b->names[n]) > 7 ? (int)strlen(b->names[n]) : 7;
        if (ms > 0) {
            printf(" %*.*fx", width - 1, faster < 1 ? 4 : 2, faster);
            b->peer_sum[r->op][n] += log(faster);
            b->peer_count[r->op][n]++;
        } else {
            printf(" %*s", width, "-");
        }
    }
    printf("\n    %s\n", plan);
    if (b->json != NULL) write_json(b, r, t, tflops, gbs, plan, true);
}

static void print_means(const bench *b) {
    int op, n;
    printf("geometric means\n");
    for (op = 0; op < OPERATION_COUNT; op++) {
        if (b->floor_count[op] == 0) continue;
        printf("%s, %d row%s: %.3g x floor", operation_names[op], b->floor_count[op], b->floor_count[op] == 1 ? "" : "s",
               exp(b->floor_sum[op] / b->floor_count[op]));
        for (n = 0; n < b->name_count; n++)
            if (b->peer_count[op][n] > 0)
                printf(", %.3gx as fast as %s on %d", exp(b->peer_sum[op][n] / b->peer_count[op][n]), b->names[n],
                       b->peer_count[op][n]);
        printf("\n");
    }
}

/* A row's time with the plan's own choice. */
static fqla_status time_row(bench *b, const row *r, timing *t, char *error) {
    const spread own = { 0, 0, b->low_memory };
    bench_inputs *inputs;
    fqla_status status = bench_inputs_make(&b->lib, b->graph, r, &inputs, error);
    if (status != FQLA_OK) return status;
    status = bench_time(inputs, own, t, error);
    bench_inputs_free(inputs);
    return status;
}

/* True: every row was timed, or is one that the backend refuses by name. */
static bool run_rows(bench *b) {
    const bool terminal = isatty(STDERR_FILENO);
    bool ok = true;
    int i;
    print_head(b);
    for (i = 0; i < b->rows.count; i++) {
        const row *r = &b->rows.rows[i];
        char label[64], error[ERROR_SIZE];
        fqla_status status;
        timing t;
        memset(&t, 0, sizeof t);
        row_label(r, label, sizeof label);
        fflush(stdout);
        if (terminal) fprintf(stderr, "[%d/%d] %s", i + 1, b->rows.count, label);
        status = time_row(b, r, &t, error);
        if (terminal) fprintf(stderr, "\r%*s\r", 40 + (int)strlen(label), "");
        if (status == FQLA_OK) {
            print_row(b, r, label, &t);
            continue;
        }
        printf("%-24s %s: %s\n", label, status == FQLA_ERROR_UNSUPPORTED ? "unsupported" : "failed", error);
        if (b->json != NULL) write_json(b, r, &t, 0, 0, error, false);
        if (status != FQLA_ERROR_UNSUPPORTED) {
            complain("%s: %s", label, error);
            ok = false;
        }
    }
    print_means(b);
    return ok;
}

/* Read what the options name. *exit_code: set where that fails. */
static bool read_input(bench *b, const char *rows, const text_list *row_texts, const text_list *against, int *exit_code) {
    char error[ERROR_SIZE];
    int i;
    *exit_code = FAILURE;
    if (rows != NULL && !rows_read(&b->rows, rows, error)) goto fail;
    for (i = 0; i < row_texts->count; i++) {
        *exit_code = MISUSE;
        if (!rows_add(&b->rows, row_texts->items[i], error)) goto fail;
    }
    *exit_code = FAILURE;
    for (i = 0; i < against->count; i++)
        if (!peers_read(&b->peers, against->items[i], error)) goto fail;
    find_names(b);
    return true;
fail:
    complain("%s", error);
    return false;
}

/* Rows that a plan for a GPU can be spread over. */
static bool any_forward(const row_list *rows) {
    int i;
    for (i = 0; i < rows->count; i++)
        if (rows->rows[i].op == FORWARD) return true;
    return false;
}

static int run_bench(const arguments *args, bench *b, const char *json, bool all_plans) {
    char error[ERROR_SIZE];
    bool ok;
    if (!library_open(&b->lib, args->backend, args->threads)) {
        complain("%s", b->lib.message);
        return FAILURE;
    }
    if (all_plans && b->lib.summary.backend != FQLA_BACKEND_CUDA) {
        misuse("bench", "--all-plans needs a GPU, for on the CPU a plan has nothing to choose (CUDA: %s)",
               b->lib.summary.cuda_status);
        library_close(&b->lib);
        return MISUSE;
    }
    if (b->lib.summary.backend == FQLA_BACKEND_CUDA) {
        b->graph = cuda_graph_open(0, error);
        ok = b->graph != NULL;
        if (!ok) complain("%s", error);
        else printf("on %s, bf16\n", b->lib.summary.device_name);
    } else {
        ok = true;
        printf("on the CPU, %d thread%s, float32\n", (int)b->lib.summary.num_threads, b->lib.summary.num_threads == 1 ? "" : "s");
    }
    if (ok && json != NULL) {
        b->json = fopen(json, "w");
        ok = b->json != NULL;
        if (!ok) complain("%s: cannot be written: %s", json, strerror(errno));
    }
    if (ok) ok = all_plans ? bench_plans(&b->lib, b->graph, &b->rows, b->json) : run_rows(b);
    if (b->json != NULL) {
        const bool written = !ferror(b->json);
        if (fclose(b->json) != 0 || !written) {
            complain("%s: cannot be written", json);
            ok = false;
        }
    }
    cuda_graph_close(b->graph);
    library_close(&b->lib);
    return ok ? SUCCESS : FAILURE;
}

int bench_command(int argc, char **argv) {
    const char *rows = NULL, *json = NULL;
    bool all_plans = false, low_memory = false;
    text_list row_texts = { NULL, 0 }, against = { NULL, 0 };
    const option options[] = { { "--rows", NULL, &rows, NULL },
                               { "--row", NULL, NULL, &row_texts },
                               { "--against", NULL, NULL, &against },
                               { "--json", NULL, &json, NULL },
                               { "--all-plans", &all_plans, NULL, NULL },
                               { "--low-memory", &low_memory, NULL, NULL },
                               { NULL, NULL, NULL, NULL } };
    arguments args;
    bench b;
    int exit_code = MISUSE;
    memset(&b, 0, sizeof b);
    if (!parse_arguments(argc, argv, usage, options, &args, &exit_code)) return exit_code;
    b.low_memory = low_memory;
    if (args.files.count > 0 || (rows == NULL && row_texts.count == 0)) {
        if (args.files.count > 0) misuse("bench", "\"%s\" is one too many", args.files.items[0]);
        else misuse("bench", "--rows FILE is needed");
    } else if (all_plans && against.count > 0) {
        misuse("bench", "--all-plans compares plans with each other; --against has no place there");
    } else if (read_input(&b, rows, &row_texts, &against, &exit_code)) {
        if (!all_plans || any_forward(&b.rows)) {
            exit_code = run_bench(&args, &b, json, all_plans);
        } else {
            misuse("bench", "--all-plans is about fwd rows, and there is none");
            exit_code = MISUSE;
        }
    }
    rows_free(&b.rows);
    peers_free(&b.peers);
    free_arguments(&args, options);
    return exit_code;
}
