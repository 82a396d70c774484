// >>cuda_params: what the host hands to a kernel, and what a plan keeps on the device.
// Kernel sources in ptx/ include this file too.
#ifndef FLASHQLA__CUDA_PARAMS_H
#define FLASHQLA__CUDA_PARAMS_H

#include <stdint.h>

/* A CUtensorMap; at 64-byte alignment on both sides. */
typedef struct fqla__tensor_map {
    uint64_t opaque[16];
} fqla__tensor_map;

/* Sequence n in a plan's device table, which is int64_t num_seqs and chunks of all sequences, then num_seqs of these: one copy of
   16 + 32 num_seqs bytes. */
typedef struct fqla__device_sequence {
    int64_t row;      /* first row in q, k, v, o, g, beta */
    int64_t len;      /* tokens */
    int64_t chunk;    /* chunks of the sequences before it */
    int64_t snapshot; /* first entry in snapshots */
} fqla__device_sequence;

/* What kernel prepare leaves in the workspace for every chunk and v-head, [chunk][heads_v]: 10.5 KB. gamma, r, rq as in the kernels. */
typedef struct fqla__prepared_chunk {
    uint8_t t[8192];     /* T below its diagonal, zeros elsewhere: 64 rows of 64 elements, 128-byte swizzle */
    float w[64];         /* gamma_j r_j: W = V - w K S0 */
    float update[64];    /* gamma_C / gamma_j r_j: rows of Vn into the update */
    float o[64];         /* gamma_i rq_i: rows of Q S0 into O */
    float beta[64];      /* T's diagonal */
    float sum[64];       /* log2 of the decay from the border of the token's 16-block up to and with the token */
    float head[64];      /* rq_i times exp2 of that */
    float tail[64];      /* r_j times the decay from after the token to the end of its 16-block */
    float r[64], rq[64]; /* l2norm's factors of k and q, or 1 */
    float block[4];      /* the decay of a whole 16-block */
    float gamma_chunk;   /* gamma_C */
    float padding[3];
} fqla__prepared_chunk;

enum {
    FQLA__PREPARE_THREADS = 128,
    FQLA__PREPARE_SHARED_BYTES = 43008,
    FQLA__FORWARD_THREADS = 384, /* two warpgroups that own 64 state columns each, one that makes P */
    FQLA__FORWARD_SHARED_BYTES = 198656, /* dynamic shared memory: ForwardShared in ptx/forward_shared.h */
    FQLA__CHUNK_ROWS = 64,       /* rows of a chunk */
    FQLA__LOAD_COLUMNS = 64      /* columns of the boxes of q, k, v: 128 bytes, CU_TENSOR_MAP_SWIZZLE_128B */
};

/* The parameters of a forward's two kernels, by value; each comes as _bf16 and _fp16, by plan dtype:
   prepare   grid chunks * heads_v / heads_per_block, chunk by chunk; FQLA__PREPARE_THREADS
   forward   grid heads_v * max_seqs, sequence by sequence; FQLA__FORWARD_THREADS
   The tensor maps have three dimensions, innermost first: 128 elements, the heads (stride head), the rows (stride token).
   Boxes: 64 x 1 x load_rows. Rows: max_tokens, or max_seqs for a decode, which loads no row but its own. */
typedef struct fqla__forward_params {
    fqla__tensor_map q, k, v;
    const void *g, *beta;
    const float *A_log, *dt_bias;
    const void *h0;
    void *ht;
    const void *q_rows; /* q again, for the l2norm's sums */
    void *o;
    void *snapshots;
    const int32_t *state_in, *state_out;
    uint32_t *bad_index_count;
    const int64_t *table; /* the plan's device table */
    fqla__prepared_chunk *prepared;
    int64_t q_token, q_head, g_token, g_head, beta_token, beta_head, o_token, o_head; /* strides in elements */
    int32_t heads_qk, heads_v;
    int32_t head_map, state_layout, gate, beta_form; /* the enums of plan_desc */
    int32_t negative_eigenvalues, l2norm;
    int32_t state_bf16;       /* states are bfloat16, else float32 */
    int32_t pool_size;        /* 0: no pool, states are [num_seqs, ...] */
    int32_t checkpoint_every; /* chunks between snapshots; 0: none */
    int32_t decode_tokens;    /* 0: the table's sequences; else sequence n is rows n * decode_tokens and on */
    int32_t load_rows;        /* rows of the boxes of q, k, v: a chunk's, or 1 for a decode */
    float scale;
    int32_t heads_per_block;  /* kernel prepare: v-heads of one q/k head that a block serves */
    int32_t padding[5];      /* up to a multiple of a map's alignment */
} fqla__forward_params;

/* 3 maps of 128 bytes, 14 pointers, 8 strides, 15 words and the padding: the same on both sides */
#ifdef __CUDACC__
/* The copy engine wants its maps at 64 bytes. */
typedef struct __align__(64) fqla__aligned_params {
    fqla__forward_params values;
} fqla__aligned_params;
#endif

typedef char fqla__forward_params_is_640_bytes[sizeof(fqla__forward_params) == 640 ? 1 : -1];

#endif
