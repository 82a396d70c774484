/* Kernel backward_chains' shared memory and who hands what to whom. */
#ifndef FLASHQLA_BACKWARD_CHAIN_SHARED_H
#define FLASHQLA_BACKWARD_CHAIN_SHARED_H

#include <stddef.h>

#include "backward_common.h"
#include "backward_segment.h"
#include "ring.h"

enum { STATE, SCORES, COPIES, ROLES };
static_assert(FQLA__CHAINS_THREADS == ROLES * WARPGROUP, "a warpgroup a role");
enum { SLOTS = 3, RINGS = 2, STATE_WARPS = WARPGROUP / WARP, SPREADERS = 2 * WARP };

/* What a chunk brings to the states and the transitions: 34 KB */
typedef struct __align__(1024) StatesSlot {
    Tile k[2];
    Tile v;   /* the block's 64 columns; zeros for a transition */
    Square t; /* T below its diagonal */
    fqla__factors factors;
} StatesSlot;

/* and to the gradients: 47 KB */
typedef struct __align__(1024) GradientsSlot {
    Tile k[2];
    Tile dout;                     /* dO, the block's 64 columns */
    Tile q[2];
    fqla__prepared_chunk prepared; /* T by its blocks, and the factors */
} GradientsSlot;

/* What leaves: 24 KB */
typedef struct __align__(1024) OutSlot {
    Tile state[2]; /* S0^T or dS1^T */
    Tile rows;     /* Vn or dV */
} OutSlot;

/* Chunk number i of a block uses slot i % 3, and of P and T i % 2; the i-th of those that leave something uses out[i % 2]. The
   phase of a barrier is i / 3 or i / 2. */
typedef struct __align__(1024) ChainShared {
    union {
        StatesSlot states[SLOTS];
        GradientsSlot gradients[SLOTS]; /*                                      141 KB */
    };
    Tile p[RINGS], t[RINGS];   /* GRADIENTS: P / unit, T below its diagonal       32 KB */
    OutSlot out[RINGS];        /*                                           48 KB */
    Chain chain;
    int32_t idle;              /* nothing to do */
    uint64_t full[SLOTS];      /* copy engine, or for the chunk that is not whole scores -> scores, copies, state */
    uint64_t free[SLOTS];      /* state -> copies, scores: the chunk is used, and P and T of it */
    uint64_t pt_full[RINGS];   /* scores, copies -> state: P and T are there, and a place for what leaves */
    uint64_t out_full[RINGS];  /* state -> copies */
    uint64_t out_free[RINGS];  /* copies -> state: the copy engine has read it */
    uint64_t part_full;        /* copy engine -> scores: the chunk that is not whole, whose rows past its end become zeros */
} ChainShared;

static_assert(sizeof(ChainShared) == FQLA__CHAINS_SHARED_BYTES, "what the host asks for");
static_assert(sizeof(ChainShared) <= 227 * 1024, "what a block can have");

/* Wait until chunk number i is there. Past the last there is nothing to wait for. */
static __device__ __forceinline__ void wait_chunk(ChainShared &s, const Ring &ring, int number, int numbers) {
    if (number < numbers) mbarrier_wait(&s.full[ring.slot], ring.phase);
}

#endif
