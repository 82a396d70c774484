/* What is timed, what it is compared with, and what it costs at least. */
#ifndef BENCH_ROWS_H
#define BENCH_ROWS_H

#include <stdio.h>

#include "safetensors.h"

typedef enum operation { FORWARD, BACKWARD, DECODE, OPERATION_COUNT } operation;

extern const char *const operation_names[OPERATION_COUNT]; /* "fwd", "bwd", "decode" */

/* fwd and bwd: sequences of these lengths. decode: num_seqs sequences of one token. Heads of 128. */
typedef struct row {
    operation op;
    int32_t heads_qk, heads_v, num_seqs;
    int32_t *lens; /* all 1 for decode */
    int64_t tokens;
} row;

typedef struct row_list {
    row *rows;
    int count;
} row_list;

/* One line: `fwd|bwd HQK HV len,len,...` or `decode HQK HV batch`. */
bool rows_add(row_list *list, const char *line, char *error);
/* A file of such lines; # starts a comment. */
bool rows_read(row_list *list, const char *path, char *error);
void rows_free(row_list *list);

/* "fwd 16/64 8x4096" */
void row_label(const row *r, char *label, size_t size);

/* A row as JSON, to be added to: { "op", "h_qk", "h_v", "lens" or "batch" }. */
struct cJSON *row_json(const row *r, const char *op);
/* Written as one line, and deleted. */
void write_json_line(struct cJSON *json, FILE *file);

/* What another library took for a row. */
typedef struct peer {
    row row;
    char name[32];
    double ms;
} peer;

typedef struct peer_list {
    peer *peers;
    int count;
} peer_list;

/* A file of JSON lines { "op", "h_qk", "h_v", "lens" or "batch", "ms": { name: number or null } }; other ops are skipped. */
bool peers_read(peer_list *list, const char *path, char *error);
void peers_free(peer_list *list);
/* The peer's milliseconds for a row, or 0. */
double peers_find(const peer_list *list, const row *r, const char *name);

/* Operations, and the bytes that have to move with elements of a size; both on any hardware. */
double row_flops(const row *r);
double row_bytes(const row *r, int element_size);
/* Seconds on an H200: the larger of the operations at 750 TFLOP/s and the bytes at 4.3 TB/s. */
double row_floor(const row *r);

#endif
