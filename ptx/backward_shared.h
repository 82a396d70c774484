/* Kernel backward_gradients' shared memory and who hands what to whom. */
#ifndef FLASHQLA_BACKWARD_SHARED_H
#define FLASHQLA_BACKWARD_SHARED_H

#include "backward_common.h"

enum { QUERIES, KEYS, SCORES, ROLES, GRADIENTS_WARPS = ROLES * WARPGROUP / WARP };
static_assert(FQLA__GRADIENTS_THREADS == ROLES * WARPGROUP, "a warpgroup a role");

/* A head's first load: what dK's first product needs. 48 KB, as it lies in fqla__chunk_states */
typedef struct FirstPart {
    Tile ds[2][2]; /* dS1^T / unit, [half of V][half of K] */
    Tile vn[2];    /* [half of V], as the others below */
} FirstPart;

/* Its second load. 64 KB */
typedef struct SecondPart {
    Tile s[2][2];  /* S0^T */
    Tile dout[2], dw[2];
} SecondPart;

/* Of v-head number h of the group; odd and even ones apart. */
typedef struct HeadSums {
    float query[CHUNK];      /* scale o_i q_i . (dO S0^T)_i, by QUERIES */
    float update[CHUNK];     /* H_i = update_i k_i . (Vn dS1^T)_i, by KEYS */
    float key[CHUNK];        /* w_i k_i . (dW S0^T)_i */
    float row[CHUNK];        /* sum_{j<i} Z_ij, by SCORES */
    float column[4][CHUNK];  /* sum_{i>j} Z_ij, by rows' blocks */
    float diagonal[CHUNK];   /* (dW Vn^T)_jj */
    float tiny[CHUNK];       /* dbeta of tokens whose beta is too small to divide by */
    float states[4];         /* <dS1, S0>, a warp's share */
} HeadSums;

typedef struct __align__(1024) GradientsShared {
    Tile q[2], k[2];            /*                                      32 KB */
    FirstPart first[2];         /* v-head number h in h % 2             96 KB */
    SecondPart second;          /* at the end dq's and dk's way out     64 KB */
    Tile dp, m;                 /* dP, and dKK below its diagonal       16 KB */
    fqla__factors factors[3];   /* v-head number h in h % 3            4.6 KB */
    HeadSums sums[2];
    float square_q[CHUNK], square_k[CHUNK]; /* rq_i^2, r_i^2; with l2norm alone, as the next */
    float ratio[CHUNK];         /* r_i / rq_i */
    float tiny_n[CHUNK], tiny_p[CHUNK], tiny_sum[4];
    uint64_t qk_full, first_full[2], second_full; /* copy engine -> all */
    uint64_t used; /* all -> SCORES: the head's first and second part may be overwritten, and dp, m of the head before */
    uint64_t scores_ready;      /* SCORES -> QUERIES, KEYS: dp, m */
    uint64_t dots_ready[2];     /* QUERIES, KEYS -> SCORES: their sums */
} GradientsShared;

static_assert(sizeof(GradientsShared) == FQLA__GRADIENTS_SHARED_BYTES, "what the host asks for");
static_assert(sizeof(GradientsShared) <= 227 * 1024, "what a block can have");
static_assert(sizeof(FirstPart) == sizeof(((fqla__chunk_states *)0)->ds) + sizeof(((fqla__chunk_states *)0)->vn),
              "copied as it is");

/* The block's chunk. */
typedef struct Place {
    int64_t row;    /* its first row */
    int64_t number; /* in the batch */
    int32_t valid;  /* tokens; the rest of the 64 rows is another sequence's */
    int32_t head_qk, heads; /* v-heads of the q/k head */
} Place;

/* Wait for a head's loads; rows past the end are made zeros, by everybody. */
static __device__ __forceinline__ void wait_second(GradientsShared &s, const Place &place, int h) {
    mbarrier_wait(&s.first_full[h % 2], h / 2 % 2);
    mbarrier_wait(&s.second_full, h % 2);
    if (place.valid < CHUNK) {
        for (int i = 0; i < 4; i++)
            clear_tile_rows(&s.second.dout[0] + i, place.valid, (int)threadIdx.x, FQLA__GRADIENTS_THREADS); /* dout, dw */
        fence_proxy_async();
        named_barrier<1, FQLA__GRADIENTS_THREADS>();
    }
}

/* By each role when it has read the head's parts. */
static __device__ __forceinline__ void arrive_warp(uint64_t *barrier, int lane) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier);
}

#endif
