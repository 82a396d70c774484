/* A problem: the inputs of one forward and backward, as a safetensors file holds them.

       q k          [T, HK, Dk]   BF16, F16 or F32
       v do         [T, HV, Dv]   BF16, F16 or F32; do for the backward alone
       g beta       [T, HV]       F32, BF16 or F16
       cu_seqlens   [N + 1]       I32 or I64; absent: one sequence
       h0 dht       [N, HV, Dk, Dv], or [N, HV, Dv, Dk] by the metadata's state_layout; F32 or BF16; absent: zero
       metadata     scale, state_layout N,H,K,V | N,H,V,K, head_map div | mod, l2norm 0 | 1; absent: the library's defaults

   Other tensors and metadata are ignored. */
#ifndef PROBLEM_H
#define PROBLEM_H

#include "command.h"
#include "safetensors.h"

enum { PROBLEM_MAX_OUTPUTS = 8 };

typedef struct problem {
    safetensors file;
    const safetensors_tensor *q, *k, *v, *g, *beta, *do_, *h0, *dht; /* the last three may be NULL */
    int32_t tokens, num_seqs, heads_qk, heads_v, dim_k, dim_v;
    int32_t *cu_seqlens;
    float scale;
    fqla_state_layout state_layout;
    fqla_head_map head_map;
    int32_t l2norm;
} problem;

/* What came out: o and ht, and with a backward dq, dk, dv, dg, dbeta and dh0. */
typedef struct solution {
    safetensors_tensor tensors[PROBLEM_MAX_OUTPUTS];
    int count;
    double seconds; /* of the runs alone */
} solution;

/* Read and check a file. False: error holds one line, without the path. */
bool problem_read(const char *path, problem *p, char *error);
void problem_free(problem *p);

/* The shape of output `name` in a tensor's name, rank and shape. */
void problem_output_shape(const problem *p, const char *name, safetensors_tensor *tensor);

/* Run it. On the CPU all is float32; on CUDA q, k, v, do, o, dq, dk and dv are of one 16-bit dtype: F16 where all inputs are,
   else BF16, with a word on stderr (about path) for each input that is rounded. Any status but FQLA_OK: error holds one line. */
fqla_status problem_solve(const problem *p, library *lib, bool backward, const char *path, solution *s, char *error);
void solution_free(solution *s);

#endif
