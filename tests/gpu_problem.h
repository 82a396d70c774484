/* The tensors of a forward and its backward at random, on the host and on the device, and what the float64 oracle makes of them:
   for programs that tell how exact a GPU is. Heads of 128, head map div, bfloat16 tensors, float32 states. */
#ifndef GPU_PROBLEM_H
#define GPU_PROBLEM_H

#include "case.h"

enum { DIM = 128, STATE = DIM * DIM };

/* Inputs, the forward's outputs, the backward's. */
typedef enum problem_tensor {
    Q, K, V, G, BETA, H0, DO, DHT, O, HT, DQ, DK, DV, DG, DBETA, DH0, TENSORS, FIRST_OUTPUT = O, FIRST_GRADIENT = DQ
} problem_tensor;
extern const char *const problem_names[TENSORS];

typedef enum gate_kind { MILD, ZERO, X64, STRONG, MIXED, QUARTER, GATES } gate_kind;
extern const char *const gate_kinds[GATES];

typedef struct problem {
    int32_t heads_qk, heads_v, num_seqs;
    int32_t cu_seqlens[CASE_MOST_SEQS + 1];
    gate_kind gates;
    uint64_t seed;
    bool backward;                     /* it has the backward's tensors; without, they take no bytes */
    double (*draw)(uint64_t *random);  /* of mean 0 and variance 1 */
    size_t bytes[TENSORS];
    void *host[TENSORS], *device[TENSORS];
    double *expected[TENSORS];         /* outputs; NULL: not computed */
} problem;

/* Host memory, but not yet its contents. */
problem problem_make(int32_t heads_qk, int32_t heads_v, int32_t num_seqs, const int32_t *lens, gate_kind gates, uint64_t seed,
                     bool backward);
/* The inputs of tokens first to end - 1, from the seed and first; of the states. */
void problem_fill_tokens(const problem *p, int64_t first, int64_t end);
void problem_fill_states(const problem *p);
/* Fill problems and expect: the backward's outputs where they have them, else the forward's. On all processors. Seconds it took. */
double problems_expect(problem *problems, int count);
/* Device memory with the inputs in it. */
void problem_upload(problem *p);
void problem_free(problem *p);

/* A plan for it; a refusal is the caller's to judge. */
fqla_status problem_plan(const problem *p, int32_t v_split, int32_t segment_chunks, bool low_memory, fqla_plan **plan);
/* One run; residuals: what the forward leaves and the backward takes, NULL: none. */
void problem_run(const problem *p, fqla_plan *plan, bool backward, void *residuals);
/* Into the host's outputs, over NaNs: what a run does not write shows. */
void problem_run_afresh(const problem *p, fqla_plan *plan, bool backward, void *residuals);
/* The relative L2 error of an output, over all sequences; infinite where anything is not finite. */
double problem_error(const problem *p, problem_tensor tensor);
bool problem_is_finite(const problem *p, problem_tensor tensor);

/* Variance 1, and fast, for large problems. */
double draw_uniform(uint64_t *random);
/* job(user, index) for every index below count, on as many threads as there are processors, up to 16. */
void parallel(int count, void (*job)(void *user, int index), void *user);
void *allocate(size_t bytes);
/* A status other than FQLA_OK ends the program with its sentence. */
void check(fqla_status status);
double seconds(void);

#endif
