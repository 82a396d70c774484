/* The smallest whole program: an associative memory that is written and read through one v-head.

   Token t writes the value t + 1 under a key; keys 0, 1, 2 come first, then key 0 again. All tokens ask for key 0. That the
   answer turns from 1 into 4, and not into 5, is the delta rule: a write replaces what its key held, it does not add to it.

        cc -O2 minimal.c -ldl -lpthread -lm && ./a.out              (on Windows no -ldl) */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FLASHQLA_IMPLEMENTATION
#include "../flashqla.h"

enum { T = 4, D = 128 }; /* tokens, head dimension */

typedef struct tensors {
    uint16_t q[T][D], k[T][D], v[T][D], o[T][D]; /* bfloat16 */
    float g[T], beta[T];
} tensors;

static void must(fqla_status status) {
    if (status == FQLA_OK) return;
    fprintf(stderr, "%s: %s\n", fqla_status_name(status), fqla_status_string(status));
    exit(1);
}

/* bfloat16 is the upper half of a float32; small whole numbers lose nothing when the lower half goes. */
static uint16_t to_bf16(float x) { uint32_t bits; memcpy(&bits, &x, 4); return (uint16_t)(bits >> 16); }
static float from_bf16(uint16_t x) { uint32_t bits = (uint32_t)x << 16; float y; memcpy(&y, &bits, 4); return y; }

int main(void) {
    static tensors host; /* all zero: g = 0 is alpha = exp(0) = 1, nothing fades */
    for (int t = 0; t < T; t++) {
        host.q[t][0] = host.k[t][t % 3] = to_bf16(1); /* key i is the unit vector i */
        for (int d = 0; d < D; d++) host.v[t][d] = to_bf16((float)(t + 1));
        host.beta[t] = 1; /* a full write */
    }

    fqla_context *context; /* a GPU that can run it, else the CPU */
    must(fqla_context_create(&(fqla_context_desc){ 0 }, &context));

    fqla_plan *plan; /* one sequence of T tokens; made once, run for every layer and every batch of this shape */
    const int32_t cu_seqlens[2] = { 0, T };
    must(fqla_plan_create(context, &(fqla_plan_desc){ .heads_qk = 1, .heads_v = 1, .num_seqs = 1, .cu_seqlens = cu_seqlens,
                                                      .scale = 1 }, &plan));

    void *memory; /* the GPU's memory, or the host's on the CPU: the same program runs on both */
    must(fqla_alloc(context, sizeof host, &memory));
    must(fqla_upload(context, memory, &host, sizeof host, NULL));
    tensors *x = memory; /* on a GPU good for addresses alone */
    must(fqla_forward(plan, &(fqla_forward_args){ .q = x->q, .k = x->k, .v = x->v, .g = x->g, .beta = x->beta, .o = x->o }, NULL));
    must(fqla_download(context, host.o, x->o, sizeof host.o, NULL)); /* waits for the forward */

    for (int t = 0; t < T; t++)
        printf("wrote %d under key %d; key 0 holds %g\n", t + 1, t % 3, (double)from_bf16(host.o[t][0]));

    must(fqla_free(context, memory));
    fqla_plan_destroy(plan);
    must(fqla_context_destroy(context));
    return 0;
}
