// >>cuda_params: what the host hands to a kernel, and what a plan keeps on the device.
// Kernel sources in ptx/ include this file too.
#ifndef FLASHQLA__CUDA_PARAMS_H
#define FLASHQLA__CUDA_PARAMS_H

#include <stdint.h>

/* A CUtensorMap; at 64-byte alignment on both sides. */
typedef struct fqla__tensor_map {
    uint64_t opaque[16];
} fqla__tensor_map;

/* A plan's table on the device, one copy: this, then num_seqs fqla__device_sequence, then `segments` fqla__device_segment, then `cut`
   int32_t: the numbers of the cut sequences' first segments. */
typedef struct fqla__device_table {
    int64_t num_seqs;
    int64_t chunks;         /* of all sequences, each rounded up */
    int64_t segments;       /* of all sequences: an uncut one is one segment, an empty one too */
    int64_t kept;           /* the first so many segments belong to cut sequences; each keeps a state in the workspace */
    int64_t cut;            /* sequences */
    int64_t segment_chunks; /* of every segment of a cut sequence but its last */
} fqla__device_table;

typedef struct fqla__device_sequence {
    int64_t row;      /* first row in q, k, v, o, g, beta */
    int64_t len;      /* tokens */
    int64_t chunk;    /* chunks of the sequences before it */
    int64_t snapshot; /* first entry in snapshots */
    int64_t kept;     /* the number of its first segment if it is cut, else -1 */
} fqla__device_sequence;

/* The segments in the order in which they are worked off: those of cut sequences, sequence by sequence, then the uncut sequences, the
   longest first, so that the last blocks to run are short ones. */
typedef struct fqla__device_segment {
    int32_t sequence;
    int32_t index; /* in its sequence */
} fqla__device_segment;

/* A chunk's tokens' factors for one v-head, by kernel prepare. gamma, r, rq as in the kernels; with FQLA__L2NORM_FORWARD rq is 1. */
typedef struct fqla__factors {
    float w[64];       /* gamma_j r_j: W = V - w K S0 */
    float update[64];  /* gamma_C / gamma_j r_j: rows of Vn into the update */
    float o[64];       /* gamma_i rq_i: rows of Q S0 into O */
    float beta[64];    /* T's diagonal */
    float row[64];     /* log2 of rq_i and the decay from the border of the token's 16-block up to and with the token */
    float column[64];  /* the same decay's log2 less that of r_j */
    float block[4];    /* log2 of a whole 16-block's decay */
    float gamma_chunk; /* gamma_C */
    float norm;        /* at most log2 of the chunk's transition's norm: the sum of log2 alpha_t + log2 max(1, |1 - beta_t |k_t|^2|) */
    uint32_t taken;    /* the first chunk's and head's: items that kernel forward's blocks have taken but for each one's first */
    float padding;
} fqla__factors;

/* What kernel prepare leaves in the workspace for every chunk and v-head, [chunk][heads_v]: 6.5 KB. */
typedef struct fqla__prepared_chunk {
    uint8_t t[5120]; /* T below its diagonal, by the blocks of a triangle: ptx/tile.h */
    fqla__factors factors;
} fqla__prepared_chunk;

/* A state of a v-head between kernels, as the threads of its two halves' warpgroups hold it: [quarter of V, two warps'][i][thread of the
   two], 64 KB. */
typedef struct fqla__kept_state {
    float values[4][16][64][4];
} fqla__kept_state;

/* A segment's transition M, transposed: 128 x 128 fp16, four tiles of 64 x 64, 128-byte swizzle: [rows / 64][columns / 64]. 32 KB */
typedef struct fqla__kept_transition {
    uint8_t tiles[4][8192];
} fqla__kept_transition;

enum {
    FQLA__PREPARE_THREADS = 128,
    FQLA__PREPARE_SHARED_BYTES = 35840,  /* dynamic shared memory: PrepareShared in ptx/prepare.cu */
    FQLA__STATES_THREADS = 256,          /* a warpgroup that owns 64 state columns, one that loads */
    FQLA__STATES_SHARED_BYTES = 105472,  /* StatesShared in ptx/states.cu */
    FQLA__SCAN_THREADS = 288,            /* scan and backward_scan: two warpgroups that multiply, a warp that loads */
    FQLA__SCAN_SHARED_BYTES = 205824,    /* ScanShared in ptx/scan_step.h */
    FQLA__FORWARD_THREADS = 512,         /* whole V: two warpgroups that own 64 state columns each, one that makes P, one that copies */
    FQLA__FORWARD_SHARED_BYTES = 228352, /* ForwardShared in ptx/forward_shared.h */
    FQLA__HALF_THREADS = 384,            /* V over two blocks: one of each */
    FQLA__HALF_SHARED_BYTES = 187392,
    FQLA__CHUNK_ROWS = 64,               /* rows of a chunk */
    FQLA__LOAD_COLUMNS = 64,             /* columns of the boxes of q, k, v, o: 128 bytes, CU_TENSOR_MAP_SWIZZLE_128B */
    FQLA__MOST_SEGMENTS = 64,            /* of a sequence */
    FQLA__L2NORM_PREPARE = 1,            /* rq is in what kernel prepare leaves, as a backward takes it */
    FQLA__L2NORM_FORWARD = 2             /* kernel forward makes it of the q that it has, which spares prepare reading q */
};

/* The parameters of a forward's kernels, by value; each comes as _bf16 and _fp16, by plan dtype. In the order in which they run:
   prepare   grid chunks * heads_v / heads_per_block, chunk by chunk
   states    grid kept segments * heads_v * 4: the halves of a segment's state, then of its transition    } where the plan may cut
   scan      cut sequences * heads_v * 4 quarters of V; grid: as many, but no more than multiprocessors     } sequences
   forward   segments * heads_v items, or, with V over two blocks, half: segments * heads_v * 2; grid: as many, but no more than
             multiprocessors
   The tensor maps have three dimensions, innermost first: 128 elements, the rows (stride token), the heads (stride head).
   Boxes: 64 x load_rows x 1. Rows: max_tokens, or max_seqs for a decode, which loads no row but its own. */
typedef struct fqla__forward_params {
    fqla__tensor_map q, k, v, o;
    const void *g, *beta;
    const float *A_log, *dt_bias;
    const void *h0;
    void *ht;
    const void *q_rows; /* q again, for the l2norm's sums in kernel prepare */
    void *o_rows;       /* o again, for a sequence's last rows */
    void *snapshots;
    const int32_t *state_in, *state_out;
    uint32_t *bad_index_count;
    const fqla__device_table *table;
    fqla__prepared_chunk *prepared;
    fqla__kept_state *states;            /* [kept segments][heads_v]: a segment's last state, then its first */
    fqla__kept_transition *transitions;  /* the same */
    int64_t q_token, q_head, g_token, g_head, beta_token, beta_head, o_token, o_head; /* strides in elements */
    int32_t heads_qk, heads_v;
    int32_t head_map, state_layout, gate, beta_form; /* the enums of plan_desc */
    int32_t negative_eigenvalues;
    int32_t l2norm;           /* 0: none; else who multiplies by rq: FQLA__L2NORM_... */
    int32_t state_bf16;       /* states are bfloat16, else float32 */
    int32_t pool_size;        /* 0: no pool, states are [num_seqs, ...] */
    int32_t checkpoint_every; /* chunks between snapshots; 0: none */
    int32_t decode_tokens;    /* 0: the table's sequences; else sequence n is rows n * decode_tokens and on, uncut */
    int32_t load_rows;        /* rows of the boxes of q, k, v: a chunk's, or 1 for a decode */
    int32_t heads_per_block;  /* kernel prepare: v-heads of one q/k head that a block serves, at most 4 */
    float scale;
    float warm_up_log2;       /* log2 of the tolerance: a segment may start from zero where the norm falls below it */
} fqla__forward_params;

/* 4 maps of 128 bytes, 16 pointers, 8 strides and 16 words: the same on both sides, and a multiple of a map's alignment */
#ifdef __CUDACC__
/* The copy engine wants its maps at 64 bytes. */
typedef struct __align__(64) fqla__aligned_params {
    fqla__forward_params values;
} fqla__aligned_params;
#endif

typedef char fqla__forward_params_is_768_bytes[sizeof(fqla__forward_params) == 768 ? 1 : -1];

#endif
