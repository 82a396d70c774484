/* A case: a description becomes random tensors in guarded, poisoned buffers, a run through the public API on the backend under
   test, and a comparison of every output with the oracle and of every other byte with what was there before. */
#ifndef CASE_H
#define CASE_H

#include "host.h"

typedef enum case_gates {
    GATES_MILD,     /* about -0.04 a token */
    GATES_ZERO,
    GATES_STRONG,   /* about -10 a token */
    GATES_MIXED,    /* by head: zero, mild, -1, strong */
    GATES_DEAD,     /* mild, with alpha = 0 at every seventh token or so */
    GATES_CLIFF,    /* mild, and one token of -400 in every sequence */
    GATES_COUNT
} case_gates;

typedef enum case_rows {
    ROWS_DENSE,      /* strides left 0 */
    ROWS_FUSED,      /* q | k | v in one row, and so dq | dk | dv, and g | beta where their dtypes agree */
    ROWS_HEAD_MAJOR, /* [H, T, D] with a gap after each head */
    ROWS_GAPPED,     /* [T, H, D] with a gap after each head and each row */
    ROWS_COUNT
} case_rows;

enum { CASE_MOST_SEQS = 512 };

typedef struct case_spec {
    const char *name;
    /* As given to fqla_plan_create, except: cu_seqlens and strides are made here; heads 0: 1; num_seqs 0: 1; and dtype DEFAULT
       is what the backend is most exact in, FP32 on the CPU and BF16 on CUDA. */
    fqla_plan_desc plan;
    int32_t lens[12];   /* of the sequences; those past the twelfth repeat them */
    case_gates gates;
    case_rows rows;
    bool same_keys;     /* all keys of a head nearly parallel */
    bool no_h0, no_ht;
    bool in_place;      /* ht is h0, or one pool for both */
    bool own_workspace; /* the plan's, not a guarded one */
    bool residuals;     /* the forward leaves them and the backward takes them, where the backend has any */
    bool odd_base;      /* tensors aligned to their element and no better */
    bool bad_indices;   /* some indices outside the pool: CUDA treats them as -1 and counts them */
    int32_t decode_tokens; /* > 0: fqla_decode, with states where keep_states */
    bool keep_states;
    uint64_t seed;
} case_spec;

typedef enum case_tensor_name {
    T_Q, T_K, T_V, T_G, T_BETA, T_A_LOG, T_DT_BIAS, T_H0, T_DO, T_DHT, T_STATE_IN, T_STATE_OUT,
    T_O, T_HT, T_SNAPSHOTS, T_DQ, T_DK, T_DV, T_DG, T_DBETA, T_DH0, T_DA_LOG, T_DDT_BIAS, T_BAD_INDEX_COUNT, T_WORKSPACE,
    T_RESIDUALS, T_COUNT
} case_tensor_name;

/* Memory of the context with a guard band on both sides. */
typedef struct case_buffer {
    size_t size;            /* guards included */
    unsigned char *before;  /* what it holds before a run */
    unsigned char *after;   /* and after */
    unsigned char *written; /* 1 for each byte that the run is to write, 2 where it may */
    void *memory;           /* of the context */
} case_buffer;

typedef struct case_tensor {
    case_buffer *buffer; /* NULL: not part of the call */
    size_t offset;       /* bytes from the buffer's start to element 0 */
    fqla_dtype dtype;
    int64_t row_stride, head_stride; /* elements */
    int64_t rows, heads, dim;
} case_tensor;

typedef struct test_case {
    case_spec spec;
    fqla_context *context;
    test_host *host;
    fqla_plan *plan;
    fqla_plan_desc desc; /* as given to fqla_plan_create */
    fqla_plan_summary summary;
    int32_t dim_k, dim_v, num_seqs;
    int32_t cu_seqlens[CASE_MOST_SEQS + 1];
    int64_t rows;        /* that q, k, v, o, ... have */
    int64_t snapshots;   /* checkpoints or decode states */
    int32_t slot_in[CASE_MOST_SEQS], slot_out[CASE_MOST_SEQS]; /* the pool's slots as the call understands them */
    uint32_t bad_indices;
    case_buffer buffers[T_COUNT];
    case_tensor t[T_COUNT];
    int64_t fused_next; /* elements of a fused row handed out so far */
    uint64_t random;
    double *expected[T_COUNT]; /* the oracle's outputs, dense [rows, heads, dim] */
    double *rounded[T_COUNT];  /* those with a Hopper's roundings, where they have been asked for */
} test_case;

/* Make the plan and the tensors. A status other than FQLA_OK is the plan's; then there is nothing to close. */
fqla_status case_open(test_case *c, fqla_context *context, test_host *host, const case_spec *spec);
/* fqla_plan_update to other lengths, and fresh tensors as case_open of a spec with these lengths makes them. */
fqla_status case_relength(test_case *c, int32_t num_seqs, const int32_t *lens);
void case_close(test_case *c);

/* Upload, run, wait, download. What is run: decode where spec.decode_tokens, else the forward. */
fqla_status case_run(test_case *c);
fqla_status case_run_backward(test_case *c); /* with spec.residuals: after case_run */
/* The arguments as the runs above give them, for tests that spoil one. */
fqla_forward_args case_forward_args(const test_case *c);
fqla_backward_args case_backward_args(const test_case *c);
fqla_decode_args case_decode_args(const test_case *c);
/* The upload and the download alone. */
void case_upload(test_case *c);
void case_download(test_case *c);

/* Compare with the oracle what the last run wrote: NULL, or what is wrong with it. */
const char *case_compare(test_case *c);
const char *case_compare_backward(test_case *c);
/* No byte of any buffer but the workspace changed: NULL, or which did. */
const char *case_untouched(const test_case *c);

/* Elements, row by the tensor's rows (sequence, slot or entry for states; 0 for A_log and dt_bias). */
double case_get(const test_case *c, case_tensor_name name, int64_t row, int64_t head, int64_t i);   /* after the run */
double case_input(const test_case *c, case_tensor_name name, int64_t row, int64_t head, int64_t i); /* before */
void case_set(test_case *c, case_tensor_name name, int64_t row, int64_t head, int64_t i, double value); /* before; rounds */
void case_set_index(test_case *c, case_tensor_name name, int32_t n, int32_t index);
/* Sequence n's first row and length. */
int64_t case_row(const test_case *c, int32_t n);
int32_t case_len(const test_case *c, int32_t n);
bool case_is_output(case_tensor_name name);

/* All of it on the shared context: open, run, compare, and backward too where the plan has one. NULL, or what is wrong.
   What CUDA does not do it must refuse as FQLA_ERROR_UNSUPPORTED. */
const char *case_check(const case_spec *spec);
/* The same on another context. */
const char *case_check_on(fqla_context *context, test_host *host, const case_spec *spec);

/* The worst relative L2 error of each tensor over all cases so far, a line. */
void case_print_worst(void);

/* splitmix64, and numbers from it. */
uint64_t case_random(uint64_t *state);
double case_uniform(uint64_t *state); /* [0, 1) */
double case_normal(uint64_t *state);

#endif
