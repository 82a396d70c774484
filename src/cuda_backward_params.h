// >>cuda_backward_params: what the kernels of a backward share with the host
// Kernel sources in ptx/ include this file too.
#ifndef FLASHQLA__CUDA_BACKWARD_PARAMS_H
#define FLASHQLA__CUDA_BACKWARD_PARAMS_H

#include "cuda_params.h"

/* What kernel backward_chains leaves of a chunk and v-head, [chunk][heads_v]: 80 KB. Tiles of 64 x 64 elements, 128-byte swizzle,
   as kernel backward_gradients takes them. dS is the gradient of a state divided by fqla__backward_params.unit. */
typedef struct fqla__chunk_states {
    uint8_t s[2][2][8192];  /* S0 transposed, [half of V][half of K]: a row is a column v of the state */
    uint8_t ds[2][2][8192]; /* dS1 transposed, the same */
    uint8_t vn[2][8192];    /* Vn, [half of V]: a row is a token */
} fqla__chunk_states;

enum {
    FQLA__CHAINS_THREADS = 384,          /* a warpgroup that owns 64 state columns, one that makes P, one that copies */
    FQLA__CHAINS_SHARED_BYTES = 227328,  /* ChainShared in ptx/backward_chain_shared.h */
    FQLA__GRADIENTS_THREADS = 512,       /* a warpgroup for dq, one for dk, one for the 64 x 64 matrices, one for loads and gates */
    FQLA__GRADIENTS_SHARED_BYTES = 227328, /* GradientsShared in ptx/backward_shared.h */
    FQLA__SUMS_THREADS = 256,
    FQLA__CARRIED_H0 = 1, FQLA__CARRIED_DHT = 2, FQLA__CARRIED_DH0 = 4 /* float32 whatever the plan's states are */
};

/* The parameters of a backward's kernels, by value. In the order in which they run:
   prepare              the forward's, where it has left no residuals
   backward_chains      grid kept segments * heads_v * 2 halves of V * 3: the first pass          } where the plan may cut
   backward_scan        cut sequences * heads_v * 4 quarters of V * 2 directions; grid: as many,  } sequences
                        but no more than multiprocessors                                          }
   backward_chains      grid segments * heads_v * 2 halves of V * 2: the reverse recurrences, then the passes over the states;
                        twice that after a first pass, which it overlaps
   backward_gradients   grid multiprocessors, or chunks * heads_qk where those are fewer
   backward_sums        grid heads_v; with the raw gates alone
   In a low_memory plan a table describes a window of sequences or a part of one, and these run window by window
   (cuda_windows.h); where a part's first states are wanted, backward_chains with `carry`: grid segments * heads_v * 2 halves of V. */
typedef struct fqla__backward_params {
    fqla__forward_params forward; /* the forward's, but its table is the backward's; o: the map of do; ht is not used */
    fqla__tensor_map dq, dk, dv;
    const void *v_rows;           /* v again, for tokens with a tiny beta */
    void *dq_rows, *dk_rows, *dv_rows; /* dq, dk, dv again, for a sequence's last rows; strides as q's, k's, v's */
    void *dg, *dbeta;             /* strides as g's and beta's */
    const void *dht;
    void *dh0;
    float *dA_log, *ddt_bias;
    fqla__chunk_states *chunks;
    fqla__kept_state *gradients;  /* as forward.states, of dS: a segment's at its start, then at its end */
    float *gate_sums;             /* [chunk][heads_v][2]: a chunk's share of dA_log and of ddt_bias; with the raw gates alone */
    int64_t k_token, k_head, v_token, v_head;
    float unit, per_unit, power;  /* scale = unit * power, a power of two; 1 <= |unit| < 2; per_unit = 1 / unit */
    int32_t first_pass;           /* kernel backward_chains: the first pass over cut sequences */
    int32_t carried;              /* of h0, dht, dh0 those that one part of a sequence hands to another: FQLA__CARRIED_... */
    int32_t overlaps;             /* after a first pass: the main pass and backward_gradients begin with what is there */
    void *carry;                  /* kernel backward_chains: the passes over the states alone, whose last states go here; else NULL */
    int32_t *progress;            /* items of backward_gradients that have been taken beside each block's first; where passes overlap then
                                     [heads_qk], is one of its v-heads exact anywhere? and [chunks][heads_qk], at a segment's first
                                     chunk, blocks of backward_chains that have ended there */
    int32_t pace;                 /* kernel backward_chains: nanoseconds that a pass over the states takes a chunk at least; 0: no matter */
    float rest[3];                /* to the size that the kernels take: a multiple of a map's alignment */
} fqla__backward_params;

#ifdef __CUDACC__
typedef struct __align__(64) fqla__aligned_backward_params {
    fqla__backward_params values;
} fqla__aligned_backward_params;
#endif

typedef char fqla__backward_params_is_1344_bytes[sizeof(fqla__backward_params) == 1344 ? 1 : -1];

#endif
