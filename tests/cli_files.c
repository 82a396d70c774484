/* Files for tests/test_cli.sh:
       cli_files problem OUT [name=value]...    a problem of pseudo-random numbers; see main for the names
       cli_files merge A B OUT                  the tensors of A and of B, the metadata of A
       cli_files poke IN TENSOR VALUE OUT       the first element of an F32 tensor changed */
#include "../tools/half.h"
#include "../tools/safetensors.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_TENSORS = 32 };

static char error[ERROR_SIZE];
static safetensors_tensor tensors[MOST_TENSORS];
static int count;

static void must(bool ok, const char *what) {
    if (ok) return;
    fprintf(stderr, "cli_files: %s: %s\n", what, error);
    exit(1);
}

static uint32_t random_state = 1;

/* -1 to 1 */
static float uniform(void) {
    random_state = random_state * 1664525u + 1013904223u;
    return (float)(random_state >> 8) / 8388608.0f - 1.0f;
}

static uint16_t to_fp16(float value) { /* normal numbers alone, cut off */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return fabsf(value) < 1e-4f ? 0 : (uint16_t)((bits >> 16 & 0x8000) | (((bits & 0x7fffffff) - 0x38000000) >> 13));
}

/* A tensor of scale * uniform + offset, of a dtype by name; "none": left out. */
static void add(const char *name, const char *dtype, int rank, const int64_t *shape, float scale, float offset) {
    safetensors_tensor *t = &tensors[count];
    int64_t elements, i;
    if (strcmp(dtype, "none") == 0) return;
    t->name = name;
    t->rank = rank;
    memcpy(t->shape, shape, (size_t)rank * sizeof *shape);
    t->dtype = strcmp(dtype, "F32") == 0 ? SAFETENSORS_F32 : strcmp(dtype, "F16") == 0 ? SAFETENSORS_F16 : SAFETENSORS_BF16;
    elements = safetensors_elements(t);
    t->size = (size_t)elements * (t->dtype == SAFETENSORS_F32 ? 4 : 2);
    t->data = malloc(t->size + 1);
    for (i = 0; i < elements; i++) {
        const float value = scale * uniform() + offset;
        if (t->dtype == SAFETENSORS_F32) ((float *)t->data)[i] = value;
        else ((uint16_t *)t->data)[i] = t->dtype == SAFETENSORS_F16 ? to_fp16(value) : half_to_bf16(value);
    }
    count++;
}

/* Borders of two sequences and an empty one between. */
static void add_seqlens(const char *dtype, int64_t tokens) {
    static int32_t narrow[4];
    static int64_t wide[4];
    const int64_t borders[4] = { 0, tokens / 3, tokens / 3, tokens };
    safetensors_tensor *t = &tensors[count];
    int i;
    if (strcmp(dtype, "none") == 0) return;
    for (i = 0; i < 4; i++) narrow[i] = (int32_t)borders[i], wide[i] = borders[i];
    t->name = "cu_seqlens";
    t->dtype = strcmp(dtype, "I64") == 0 ? SAFETENSORS_I64 : SAFETENSORS_I32;
    t->rank = 1;
    t->shape[0] = 4;
    t->data = t->dtype == SAFETENSORS_I64 ? (void *)wide : (void *)narrow;
    t->size = t->dtype == SAFETENSORS_I64 ? sizeof wide : sizeof narrow;
    count++;
}

/* The value of name=value among the arguments, or its default. */
static const char *option(int argc, char **argv, const char *name, const char *otherwise) {
    const size_t length = strlen(name);
    int i;
    for (i = 0; i < argc; i++)
        if (strncmp(argv[i], name, length) == 0 && argv[i][length] == '=') return argv[i] + length + 1;
    return otherwise;
}

static void make_problem(const char *out, int argc, char **argv) {
    const int64_t tokens = atoi(option(argc, argv, "tokens", "70")), hk = atoi(option(argc, argv, "hk", "1"));
    const int64_t hv = atoi(option(argc, argv, "hv", "2")), dk = atoi(option(argc, argv, "dk", "128"));
    const int64_t dv = atoi(option(argc, argv, "dv", "128"));
    const char *dtype = option(argc, argv, "dtype", "BF16"), *gates = option(argc, argv, "gates", "F32");
    const char *states = option(argc, argv, "states", "F32"), *seqlens = option(argc, argv, "seqlens", "I32");
    const char *layout = option(argc, argv, "layout", "N,H,K,V");
    const bool kv = strcmp(layout, "N,H,K,V") == 0;
    const int64_t q[3] = { tokens, hk, dk }, v[3] = { tokens, hv, dv }, g[2] = { tokens, hv };
    const int64_t h[4] = { strcmp(seqlens, "none") == 0 ? 1 : 3, hv, kv ? dk : dv, kv ? dv : dk };
    const char *metadata[11] = { "state_layout", layout, "made_by", "tests/cli_files.c", NULL };
    const char *scale = option(argc, argv, "scale", NULL), *map = option(argc, argv, "map", NULL);
    const char *l2norm = option(argc, argv, "l2norm", NULL);
    int i = 4;
    if (scale != NULL) metadata[i++] = "scale", metadata[i++] = scale;
    if (map != NULL) metadata[i++] = "head_map", metadata[i++] = map;
    if (l2norm != NULL) metadata[i++] = "l2norm", metadata[i++] = l2norm;
    add("q", dtype, 3, q, 0.15f, 0);
    add("k", dtype, 3, q, 0.1f, 0);
    add("v", dtype, 3, v, 1, 0);
    add("do", option(argc, argv, "do", dtype), 3, v, 1, 0);
    add("g", gates, 2, g, 0.1f, -0.1f);
    add("beta", gates, 2, g, 0.5f, 0.5f);
    add("h0", states, 4, h, 1, 0);
    add("dht", states, 4, h, 0.1f, 0);
    add_seqlens(seqlens, tokens);
    must(safetensors_write(out, tensors, count, metadata, error), out);
}

/* The metadata of a file as safetensors_write takes it. */
static void write_like(const safetensors *file, const char *out) {
    static const char *const keys[] = { "scale", "state_layout", "head_map", "l2norm" };
    const char *metadata[9];
    int i, n = 0;
    for (i = 0; i < 4; i++) {
        const char *text = safetensors_metadata(file, keys[i]);
        if (text != NULL) metadata[n++] = keys[i], metadata[n++] = text;
    }
    metadata[n] = NULL;
    must(safetensors_write(out, tensors, count, metadata, error), out);
}

static void add_all(const safetensors *file) {
    must(count + file->count <= MOST_TENSORS, "too many tensors");
    memcpy(tensors + count, file->tensors, (size_t)file->count * sizeof *tensors);
    count += file->count;
}

int main(int argc, char **argv) {
    safetensors a, b;
    int i;
    memset(&a, 0, sizeof a);
    memset(&b, 0, sizeof b);
    if (argc >= 3 && strcmp(argv[1], "problem") == 0) {
        make_problem(argv[2], argc - 3, argv + 3);
    } else if (argc == 5 && strcmp(argv[1], "merge") == 0) {
        must(safetensors_read(argv[2], &a, error), argv[2]);
        must(safetensors_read(argv[3], &b, error), argv[3]);
        add_all(&a);
        add_all(&b);
        write_like(&a, argv[4]);
    } else if (argc == 6 && strcmp(argv[1], "poke") == 0) {
        const float value = strtof(argv[4], NULL);
        must(safetensors_read(argv[2], &a, error), argv[2]);
        add_all(&a);
        for (i = 0; i < count && strcmp(tensors[i].name, argv[3]) != 0;) i++;
        must(i < count && tensors[i].dtype == SAFETENSORS_F32, argv[3]);
        memcpy((void *)tensors[i].data, &value, sizeof value);
        write_like(&a, argv[5]);
    } else {
        fputs("usage: cli_files problem OUT [name=value]... | merge A B OUT | poke IN TENSOR VALUE OUT\n", stderr);
        return 2;
    }
    safetensors_free(&a);
    safetensors_free(&b);
    return 0;
}
