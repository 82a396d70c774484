// >>cuda_params: what the host hands to a kernel, and what a plan keeps on the device.
// Kernel sources in ptx/ include this file too.
#ifndef FLASHQLA__CUDA_PARAMS_H
#define FLASHQLA__CUDA_PARAMS_H

#include <stdint.h>

/* A CUtensorMap; at 64-byte alignment on both sides. */
typedef struct fqla__tensor_map {
    uint64_t opaque[16];
} fqla__tensor_map;

/* Sequence n in a plan's device table, which is int64_t num_seqs, then num_seqs of these: one copy of 8 + 24 num_seqs bytes. */
typedef struct fqla__device_sequence {
    int64_t row;      /* first row in q, k, v, o, g, beta */
    int64_t len;      /* tokens */
    int64_t snapshot; /* first entry in snapshots */
} fqla__device_sequence;

enum {
    FQLA__FORWARD_THREADS = 384, /* two warpgroups that own 64 state columns each, one that prepares */
    FQLA__FORWARD_SHARED_BYTES = 209920, /* dynamic shared memory: ForwardShared in ptx/forward_shared.h */
    FQLA__CHUNK_ROWS = 64,       /* rows of a chunk */
    FQLA__LOAD_COLUMNS = 64,     /* columns of the boxes of q, k, v: 128 bytes, CU_TENSOR_MAP_SWIZZLE_128B */
    FQLA__STORE_COLUMNS = 16     /* columns of the box of o: a warp's 32 bytes, CU_TENSOR_MAP_SWIZZLE_32B */
};

/* Kernel forward_bf16 or forward_fp16 (by plan dtype), grid (heads_v * max_seqs), sequence by sequence, block
   FQLA__FORWARD_THREADS; by value.
   The tensor maps have three dimensions, innermost first: 128 elements, the heads (stride head), the rows (stride token).
   Boxes: q, k, v 64 x 1 x load_rows; o 16 x 1 x 64. Rows: max_tokens, or max_seqs for a decode, which loads no row but its own. */
typedef struct fqla__forward_params {
    fqla__tensor_map q, k, v, o;
    const void *g, *beta;
    const float *A_log, *dt_bias;
    const void *h0;
    void *ht;
    void *o_rows;     /* o again: a tail chunk's rows are stored one by one */
    void *snapshots;
    const int32_t *state_in, *state_out;
    uint32_t *bad_index_count;
    const int64_t *table; /* the plan's device table */
    int64_t g_token, g_head, beta_token, beta_head, o_token, o_head; /* strides in elements */
    int32_t heads_qk, heads_v;
    int32_t head_map, state_layout, gate, beta_form; /* the enums of plan_desc */
    int32_t negative_eigenvalues, l2norm;
    int32_t state_bf16;       /* states are bfloat16, else float32 */
    int32_t pool_size;        /* 0: no pool, states are [num_seqs, ...] */
    int32_t checkpoint_every; /* chunks between snapshots; 0: none */
    int32_t decode_tokens;    /* 0: the table's sequences; else sequence n is rows n * decode_tokens and on */
    int32_t load_rows;        /* rows of the boxes of q, k, v: a chunk's, or 1 for a decode */
    float scale;
    int32_t padding[14];      /* up to a multiple of a map's alignment */
} fqla__forward_params;

/* 4 maps of 128 bytes, 12 pointers, 6 strides, 14 words and the padding: the same on both sides */
typedef char fqla__forward_params_is_768_bytes[sizeof(fqla__forward_params) == 768 ? 1 : -1];

#endif
