/* The forward's shared memory and who hands what to whom. */
#ifndef FLASHQLA_FORWARD_SHARED_H
#define FLASHQLA_FORWARD_SHARED_H

#include "tile.h"

enum { STATE_WARPGROUPS = 2, STATE_WARPS = 4 * STATE_WARPGROUPS, STATE_COLUMNS = DIM / STATE_WARPGROUPS };
enum { CHUNK_SLOTS = 3, V_SLOTS = 2, P_SLOTS = 2 };

/* What a chunk brings besides v. 43 KB */
typedef struct __align__(1024) ChunkSlot {
    Tile k[2], q[2];               /* columns 0-63, 64-127 */
    fqla__prepared_chunk prepared; /* T and the tokens' factors */
} ChunkSlot;

/* The sequence and head of a block. In shared memory: it costs no registers. */
typedef struct Sequence {
    int64_t row;      /* its first row in q, k, v, o, g, beta */
    int32_t len;
    int32_t chunks;
    int64_t chunk;    /* its first chunk's number in the batch */
    int64_t snapshot; /* its first entry in snapshots */
    int32_t head, head_qk;
    int64_t in, out;  /* entries of h0 and ht, counted in heads' states; -1: none */
} Sequence;

typedef struct __align__(1024) ForwardShared {
    ChunkSlot chunk[CHUNK_SLOTS];                 /*                                              129 KB */
    Tile v[V_SLOTS][STATE_WARPGROUPS];            /* a warpgroup's 64 columns                      32 KB */
    Tile p[P_SLOTS];                              /* P, zeros above its diagonal                   16 KB */
    unsigned char o[STATE_WARPS][CHUNK * 32];     /* a warp's 16 columns of O on their way out     16 KB */
    Sequence sequence;
    uint64_t chunk_full[CHUNK_SLOTS];             /* copy engine -> all */
    uint64_t v_full[V_SLOTS][STATE_WARPGROUPS];   /* copy engine -> a state warpgroup */
    uint64_t p_full[P_SLOTS];                     /* scores -> state: P is there, and k's rows past the end are zeros */
    uint64_t chunk_free[CHUNK_SLOTS];             /* state -> scores, which refills the slots */
    uint64_t v_free[V_SLOTS][STATE_WARPGROUPS];
    uint64_t p_free[P_SLOTS];
} ForwardShared;

static_assert(sizeof(ForwardShared) == FQLA__FORWARD_SHARED_BYTES, "what the host asks for");
static_assert(sizeof(ForwardShared) <= 227 * 1024, "what a block can have");

#endif
