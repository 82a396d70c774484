#include "bench_rows.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *const operation_names[OPERATION_COUNT] = { "fwd", "bwd", "decode" };

static bool find_operation(const char *name, operation *op) {
    int i;
    for (i = 0; i < OPERATION_COUNT; i++) {
        if (strcmp(operation_names[i], name) != 0) continue;
        *op = (operation)i;
        return true;
    }
    return false;
}

/* A file as text; free it. */
static char *read_text(const char *path, char *error) {
    FILE *file = fopen(path, "rb");
    size_t size = 0, capacity = 1 << 16, count = 1;
    char *text = NULL, *grown;
    bool ok = file != NULL;
    while (ok && count > 0) {
        grown = realloc(text, capacity);
        ok = grown != NULL;
        if (!ok) break;
        text = grown;
        count = fread(text + size, 1, capacity - size - 1, file);
        size += count;
        if (size + 1 == capacity) capacity *= 2;
    }
    if (ok) ok = !ferror(file);
    if (!ok) {
        fail(error, "%s: cannot be read: %s", path, strerror(errno));
        free(text);
        text = NULL;
    } else {
        text[size] = '\0';
    }
    if (file != NULL) fclose(file);
    return text;
}

/* The next line of *text, ended in place; NULL after the last. */
static char *next_line(char **text) {
    char *line = *text;
    const size_t length = strcspn(line, "\n");
    if (*line == '\0') return NULL;
    *text = line + length + (line[length] == '\n');
    line[length] = '\0';
    return line;
}

// >>rows

static bool parse_count(const char **text, int32_t least, int32_t *value) {
    char *end;
    const long number = strtol(*text, &end, 10);
    if (end == *text || number < least || number > INT32_MAX) return false;
    *text = end;
    *value = (int32_t)number;
    return true;
}

static bool add_length(row *r, int32_t len) {
    int32_t *lens = realloc(r->lens, ((size_t)r->num_seqs + 1) * sizeof *lens);
    if (lens == NULL) return false;
    r->lens = lens;
    r->lens[r->num_seqs++] = len;
    r->tokens += len;
    return r->tokens <= INT32_MAX;
}

/* The lengths of a row: a list, or a batch of single tokens. */
static bool parse_lengths(row *r, const char **text) {
    int32_t value;
    if (r->op == DECODE) {
        if (!parse_count(text, 1, &value) || value > 1 << 20) return false;
        while (r->num_seqs < value)
            if (!add_length(r, 1)) return false;
        return true;
    }
    do {
        if (!parse_count(text, 0, &value) || !add_length(r, value)) return false;
    } while (*(*text)++ == ',');
    *text -= 1;
    return true;
}

bool rows_add(row_list *list, const char *line, char *error) {
    const char *text;
    char name[8];
    row *rows, r;
    int length = 0;
    memset(&r, 0, sizeof r);
    if (sscanf(line, " %7s%n", name, &length) != 1 || !find_operation(name, &r.op)) goto malformed;
    text = line + length;
    if (!parse_count(&text, 1, &r.heads_qk) || !parse_count(&text, 1, &r.heads_v) || !parse_lengths(&r, &text) ||
        text[strspn(text, " \t\r")] != '\0')
        goto malformed;
    rows = realloc(list->rows, ((size_t)list->count + 1) * sizeof *rows);
    if (rows == NULL) goto malformed;
    list->rows = rows;
    list->rows[list->count++] = r;
    return true;
malformed:
    free(r.lens);
    return fail(error, "\"%.60s\" is no row: fwd|bwd HQK HV len,len,... or decode HQK HV batch", line);
}

bool rows_read(row_list *list, const char *path, char *error) {
    char *text = read_text(path, error), *next = text, *line, reason[ERROR_SIZE];
    const int before = list->count;
    bool ok = text != NULL;
    int number = 1;
    for (; ok && (line = next_line(&next)) != NULL; number++) {
        line[strcspn(line, "#")] = '\0';
        if (line[strspn(line, " \t\r")] == '\0') continue;
        ok = rows_add(list, line, reason);
        if (!ok) fail(error, "%s:%d: %.300s", path, number, reason);
    }
    free(text);
    return ok && (list->count > before || fail(error, "%s: no rows", path));
}

void rows_free(row_list *list) {
    int i;
    for (i = 0; i < list->count; i++) free(list->rows[i].lens);
    free(list->rows);
}

void row_label(const row *r, char *label, size_t size) {
    bool equal = true;
    int32_t n;
    int length = snprintf(label, size, "%s %d/%d ", operation_names[r->op], (int)r->heads_qk, (int)r->heads_v);
    for (n = 1; n < r->num_seqs; n++) equal = equal && r->lens[n] == r->lens[0];
    if (r->op == DECODE) snprintf(label + length, size - (size_t)length, "%d", (int)r->num_seqs);
    else if (equal) snprintf(label + length, size - (size_t)length, "%dx%d", (int)r->num_seqs, (int)r->lens[0]);
    else snprintf(label + length, size - (size_t)length, "%d of %lld", (int)r->num_seqs, (long long)r->tokens);
}

cJSON *row_json(const row *r, const char *op) {
    cJSON *json = cJSON_CreateObject();
    cJSON_AddStringToObject(json, "op", op);
    cJSON_AddNumberToObject(json, "h_qk", r->heads_qk);
    cJSON_AddNumberToObject(json, "h_v", r->heads_v);
    if (r->op == DECODE) cJSON_AddNumberToObject(json, "batch", r->num_seqs);
    else cJSON_AddItemToObject(json, "lens", cJSON_CreateIntArray(r->lens, r->num_seqs));
    return json;
}

void write_json_line(cJSON *json, FILE *file) {
    char *text = cJSON_PrintUnformatted(json);
    if (text != NULL) fprintf(file, "%s\n", text);
    fflush(file);
    cJSON_free(text);
    cJSON_Delete(json);
}

static bool same_row(const row *a, const row *b) {
    return a->op == b->op && a->heads_qk == b->heads_qk && a->heads_v == b->heads_v && a->num_seqs == b->num_seqs &&
           memcmp(a->lens, b->lens, (size_t)a->num_seqs * sizeof a->lens[0]) == 0;
}

// >>peers

static bool to_count(const cJSON *item, int32_t *value) {
    if (!cJSON_IsNumber(item) || !(item->valuedouble >= 0) || item->valuedouble > INT32_MAX) return false;
    *value = (int32_t)item->valuedouble;
    return true;
}

/* The row of a JSON line. */
static bool parse_peer_row(const cJSON *json, row *r) {
    const cJSON *lens = cJSON_GetObjectItemCaseSensitive(json, "lens"), *item;
    int32_t value;
    if (!to_count(cJSON_GetObjectItemCaseSensitive(json, "h_qk"), &r->heads_qk) ||
        !to_count(cJSON_GetObjectItemCaseSensitive(json, "h_v"), &r->heads_v))
        return false;
    if (r->op == DECODE && lens == NULL) {
        if (!to_count(cJSON_GetObjectItemCaseSensitive(json, "batch"), &value) || value > 1 << 20) return false;
        while (r->num_seqs < value)
            if (!add_length(r, 1)) return false;
        return true;
    }
    cJSON_ArrayForEach(item, lens)
        if (!to_count(item, &value) || !add_length(r, value)) return false;
    return r->num_seqs > 0;
}

static bool copy_row(const row *from, row *to) {
    const size_t bytes = (size_t)from->num_seqs * sizeof *from->lens;
    *to = *from;
    to->lens = malloc(bytes + 1);
    if (to->lens != NULL) memcpy(to->lens, from->lens, bytes);
    return to->lens != NULL;
}

static bool add_peer(peer_list *list, const row *r, const char *name, double ms) {
    peer *peers = realloc(list->peers, ((size_t)list->count + 1) * sizeof *peers), *added;
    if (peers == NULL) return false;
    list->peers = peers;
    added = &list->peers[list->count];
    if (!copy_row(r, &added->row)) return false;
    snprintf(added->name, sizeof added->name, "%s", name);
    added->ms = ms;
    list->count++;
    return true;
}

/* One line; false where it is none that a peer would write. */
static bool parse_peers(peer_list *list, const char *line) {
    cJSON *json = cJSON_Parse(line);
    const char *op = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(json, "op"));
    const cJSON *times = cJSON_GetObjectItemCaseSensitive(json, "ms"), *time;
    bool ok = op != NULL;
    row r;
    memset(&r, 0, sizeof r);
    if (ok && find_operation(op, &r.op)) {
        ok = parse_peer_row(json, &r) && cJSON_IsObject(times);
        if (ok) {
            cJSON_ArrayForEach(time, times) {
                if (cJSON_IsNull(time)) continue;
                ok = ok && cJSON_IsNumber(time) && time->valuedouble > 0 && add_peer(list, &r, time->string, time->valuedouble);
            }
        }
    }
    free(r.lens);
    cJSON_Delete(json);
    return ok;
}

bool peers_read(peer_list *list, const char *path, char *error) {
    char *text = read_text(path, error), *next = text, *line;
    bool ok = text != NULL;
    int number = 1;
    for (; ok && (line = next_line(&next)) != NULL; number++) {
        if (line[strspn(line, " \t\r")] == '\0') continue;
        ok = parse_peers(list, line);
        if (!ok) fail(error, "%s:%d: no line of { \"op\", \"h_qk\", \"h_v\", \"lens\", \"ms\" }", path, number);
    }
    free(text);
    return ok;
}

void peers_free(peer_list *list) {
    int i;
    for (i = 0; i < list->count; i++) free(list->peers[i].row.lens);
    free(list->peers);
}

double peers_find(const peer_list *list, const row *r, const char *name) {
    int i;
    for (i = 0; i < list->count; i++)
        if (strcmp(list->peers[i].name, name) == 0 && same_row(&list->peers[i].row, r)) return list->peers[i].ms;
    return 0;
}

// >>costs

static const double dim = 128, chunk = 64;

/* Forward and backward: 5 and 15 products of 64x128x128 a chunk and v-head. Decode: three matrix-vector products a v-head. */
double row_flops(const row *r) {
    double chunks = 0;
    int32_t n;
    if (r->op == DECODE) return 3 * 2 * dim * dim * r->heads_v * r->num_seqs;
    for (n = 0; n < r->num_seqs; n++) chunks += ceil(r->lens[n] / chunk);
    return (r->op == FORWARD ? 5 : 15) * 2 * chunk * dim * dim * chunks * r->heads_v;
}

/* float32 states, each of h0 and ht (dht, dh0) once. */
static double state_bytes(const row *r) { return 4 * dim * dim * r->heads_v * r->num_seqs; }

double row_bytes(const row *r, int element_size) {
    const double qk = element_size * dim * r->heads_qk * (double)r->tokens, v = element_size * dim * r->heads_v * (double)r->tokens;
    const double gates = 2 * 4 * r->heads_v * (double)r->tokens;
    if (r->op == BACKWARD) /* q k dq dk, v do dv, g beta dg dbeta, h0 dht dh0 */
        return 4 * qk + 3 * v + 2 * gates + 3 * state_bytes(r);
    return 2 * qk + 2 * v + gates + 2 * state_bytes(r); /* q k, v o, g beta, h0 ht */
}

double row_floor(const row *r) {
    const double compute = row_flops(r) / 750e12, traffic = (r->op == DECODE ? 2 * state_bytes(r) : row_bytes(r, 2)) / 4.3e12;
    return compute > traffic ? compute : traffic;
}
