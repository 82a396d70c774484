/* A long prompt fed in pieces. The state of all tokens so far, 64 KB a head whatever the length, is all that one piece needs
   of the earlier ones, so the buffers hold one piece and not the prompt, and other work fits between two pieces.

   The prompt is run in one call, then in pieces of several sizes; the outputs are compared. Where the pieces are multiples of 64
   tokens, the chunk of the kernels, they are the same bits; other cuts agree to rounding.

        cc -O2 chunked_prefill.c -ldl -lpthread -lm && ./a.out [--backend auto|cpu|cuda]              (on Windows no -ldl) */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FLASHQLA_IMPLEMENTATION
#include "../flashqla.h"

enum { T = 2000, HEADS_QK = 2, HEADS_V = 4, D = 128 };

/* One layer's inputs for the whole prompt, as the projections before it make them, piece by piece, in a model. */
typedef struct prompt {
    uint16_t q[T][HEADS_QK][D], k[T][HEADS_QK][D], v[T][HEADS_V][D]; /* bfloat16 */
    float g[T][HEADS_V], beta[T][HEADS_V];                            /* log alpha <= 0; 0 <= beta <= 1 */
} prompt;

typedef struct result {
    uint16_t o[T][HEADS_V][D]; /* bfloat16 */
    float state[HEADS_V][D][D];
} result;

static void must(fqla_status status) {
    if (status == FQLA_OK) return;
    fprintf(stderr, "%s: %s\n", fqla_status_name(status), fqla_status_string(status));
    exit(1);
}

static void log_line(fqla_log_level level, const char *message, void *user) {
    (void)level, (void)user;
    fprintf(stderr, "%s\n", message);
}

static fqla_backend backend_of(int argc, char **argv) {
    if (argc == 1) return FQLA_BACKEND_AUTO;
    if (argc == 3 && strcmp(argv[1], "--backend") == 0) {
        if (strcmp(argv[2], "auto") == 0) return FQLA_BACKEND_AUTO;
        if (strcmp(argv[2], "cpu") == 0) return FQLA_BACKEND_CPU;
        if (strcmp(argv[2], "cuda") == 0) return FQLA_BACKEND_CUDA;
    }
    fprintf(stderr, "usage: %s [--backend auto|cpu|cuda]\n", argv[0]);
    exit(2);
}

/* Uniform in [0, 1), the same numbers on every machine. */
static float uniform(void) {
    static uint32_t x = 1;
    x = x * 1664525u + 1013904223u;
    return (float)(x >> 8) / 16777216.0f;
}

static uint16_t to_bf16(float x) { uint32_t bits; memcpy(&bits, &x, 4); return (uint16_t)((bits + 0x8000u) >> 16); }
static float from_bf16(uint16_t x) { uint32_t bits = (uint32_t)x << 16; float y; memcpy(&y, &bits, 4); return y; }

static void fill(uint16_t *x, size_t count) {
    for (size_t i = 0; i < count; i++) x[i] = to_bf16(2 * uniform() - 1);
}

static void *allocate(fqla_context *context, size_t bytes) {
    void *pointer;
    must(fqla_alloc(context, bytes, &pointer));
    return pointer;
}

/* Run the prompt through one layer, `piece` tokens a call. */
static void prefill(fqla_context *context, const prompt *in, int32_t piece, result *out) {
    const int32_t cu_piece[2] = { 0, piece };
    const size_t rows = (size_t)piece;
    fqla_plan *plan;
    must(fqla_plan_create(context, &(fqla_plan_desc){ .heads_qk = HEADS_QK, .heads_v = HEADS_V, .num_seqs = 1,
                                                      .cu_seqlens = cu_piece, .l2norm = 1 }, &plan));
    void *q = allocate(context, rows * sizeof in->q[0]), *k = allocate(context, rows * sizeof in->k[0]);
    void *v = allocate(context, rows * sizeof in->v[0]), *o = allocate(context, rows * sizeof out->o[0]);
    void *g = allocate(context, rows * sizeof in->g[0]), *beta = allocate(context, rows * sizeof in->beta[0]);
    void *state = allocate(context, sizeof out->state);

    for (int32_t first = 0; first < T; first += piece) {
        const int32_t len = T - first < piece ? T - first : piece, cu_len[2] = { 0, len };
        const size_t n = (size_t)len;
        if (len < piece) must(fqla_plan_update(plan, 1, cu_len, NULL)); /* the last piece may be shorter */
        must(fqla_upload(context, q, in->q[first], n * sizeof in->q[0], NULL));
        must(fqla_upload(context, k, in->k[first], n * sizeof in->k[0], NULL));
        must(fqla_upload(context, v, in->v[first], n * sizeof in->v[0], NULL));
        must(fqla_upload(context, g, in->g[first], n * sizeof in->g[0], NULL));
        must(fqla_upload(context, beta, in->beta[first], n * sizeof in->beta[0], NULL));
        must(fqla_forward(plan, &(fqla_forward_args){ .q = q, .k = k, .v = v, .g = g, .beta = beta, .o = o,
                                                      .h0 = first == 0 ? NULL : state, /* NULL: from zero */
                                                      .ht = state /* in place */ }, NULL));
        must(fqla_download(context, out->o[first], o, n * sizeof out->o[0], NULL));
    }
    must(fqla_download(context, out->state, state, sizeof out->state, NULL));

    void *all[] = { q, k, v, o, g, beta, state };
    for (int i = 0; i < 7; i++) must(fqla_free(context, all[i]));
    fqla_plan_destroy(plan);
}

int main(int argc, char **argv) {
    static prompt in;
    static result whole, pieces;
    static const int32_t sizes[] = { 1024, 512, 64, 500, 37 };
    int wrong = 0;

    fill(&in.q[0][0][0], sizeof in.q / 2);
    fill(&in.k[0][0][0], sizeof in.k / 2);
    fill(&in.v[0][0][0], sizeof in.v / 2);
    for (int t = 0; t < T; t++)
        for (int h = 0; h < HEADS_V; h++) {
            in.g[t][h] = -0.1f * (float)h * uniform(); /* head 0 never forgets, the others ever faster */
            in.beta[t][h] = uniform();
        }

    fqla_context *context;
    fqla_context_summary summary;
    must(fqla_context_create(&(fqla_context_desc){ .backend = backend_of(argc, argv), .log = log_line }, &context));
    must(fqla_context_info(context, &summary));
    printf("%d tokens, heads %d/%d, on the %s\n", T, HEADS_QK, HEADS_V, summary.backend == FQLA_BACKEND_CUDA ? "GPU" : "CPU");

    prefill(context, &in, T, &whole);
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        const uint16_t *o = &whole.o[0][0][0], *o_pieces = &pieces.o[0][0][0];
        const float *state = &whole.state[0][0][0], *state_pieces = &pieces.state[0][0][0];
        float o_most = 0, o_difference = 0, state_most = 0, state_difference = 0;
        memset(&pieces, 0, sizeof pieces);
        prefill(context, &in, sizes[i], &pieces);
        for (size_t j = 0; j < sizeof whole.o / sizeof *o; j++) {
            o_most = fmaxf(o_most, fabsf(from_bf16(o[j])));
            o_difference = fmaxf(o_difference, fabsf(from_bf16(o_pieces[j]) - from_bf16(o[j])));
        }
        for (size_t j = 0; j < sizeof whole.state / sizeof *state; j++) {
            state_most = fmaxf(state_most, fabsf(state[j]));
            state_difference = fmaxf(state_difference, fabsf(state_pieces[j] - state[j]));
        }
        printf("pieces of %4d: o differs by at most %.1e of %.2f, the state by %.1e of %.2f: %s\n", (int)sizes[i],
               (double)o_difference, (double)o_most, (double)state_difference, (double)state_most,
               memcmp(&whole, &pieces, sizeof whole) == 0 ? "the same bits" : "other bits");
        if (!(o_difference <= 0.02f * o_most && state_difference <= 0.02f * state_most)) wrong = 1;
    }
    must(fqla_context_destroy(context));
    if (wrong) fprintf(stderr, "the pieces do not add up to the whole\n");
    return wrong;
}
