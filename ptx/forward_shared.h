/* The forward's shared memory and who hands what to whom. */
#ifndef FLASHQLA_FORWARD_SHARED_H
#define FLASHQLA_FORWARD_SHARED_H

#include <stddef.h>

#include "ring.h"
#include "segment.h"

/* A block has all of V, or half of it: -DFLASHQLA_HALF. */
#if defined(FLASHQLA_HALF)
enum { STATE_WARPGROUPS = 1, FORWARD_THREADS = FQLA__HALF_THREADS, FORWARD_SHARED_BYTES = FQLA__HALF_SHARED_BYTES };
#else
enum { STATE_WARPGROUPS = 2, FORWARD_THREADS = FQLA__FORWARD_THREADS, FORWARD_SHARED_BYTES = FQLA__FORWARD_SHARED_BYTES };
#endif
enum { STATE_WARPS = 4 * STATE_WARPGROUPS, STATE_COLUMNS = 64, SPLIT = DIM / STATE_COLUMNS / STATE_WARPGROUPS };
enum { SLOTS = 3, OUT_SLOTS = 2, ITEMS = 2 };
static_assert(FORWARD_THREADS == (STATE_WARPGROUPS + 2) * WARPGROUP, "a warpgroup a role");

/* What a chunk brings: 58 KB, or 50 KB with half of V */
typedef struct __align__(1024) ChunkSlot {
    Tile k[2], q[2];          /* columns 0-63, 64-127 */
    Tile v[STATE_WARPGROUPS]; /* a warpgroup's 64 columns */
    Square t;                 /* T below its diagonal */
    fqla__factors factors;
} ChunkSlot;

/* What a block works off at a time: a segment of a v-head, and of V all or half. */
typedef struct Item {
    Segment segment; /* row < 0: there are no more */
    int32_t start;   /* the chunk where the state starts: the segment's first, or earlier where it is warm */
    int32_t first_v; /* of its columns */
} Item;

/* A block's chunks are counted on from item to item. Number i uses slot i % 3 of what comes in, of P and of what goes out i % 2;
   the phase of a barrier is i / 3 or i / 2. Items have their own count. Who waits for a place to be free waits for the phase before
   its own: by the parity the one before the first is over. */
typedef struct __align__(1024) ForwardShared {
    ChunkSlot chunk[SLOTS];              /*                                                       174 KB or 150 KB */
    Tile o[OUT_SLOTS][STATE_WARPGROUPS]; /* a state warpgroup's columns of O                      32 KB or 16 KB */
    Square p[OUT_SLOTS];                 /*                                                       16 KB */
    Item items[ITEMS];
    uint64_t item_full[ITEMS];           /* items -> all others */
    uint64_t item_begun[ITEMS];          /* all others -> items: the one before is left, this one nearly loaded */
    uint64_t chunk_full[SLOTS];          /* copy engine -> scores, state */
    uint64_t chunk_free[SLOTS];          /* state -> copies */
    uint64_t p_full[OUT_SLOTS];          /* scores -> state: P is there */
    uint64_t out_full[OUT_SLOTS];        /* state -> copies, scores: O is there and P is used */
    uint64_t out_free[OUT_SLOTS];        /* copies -> state: O has left */
    uint64_t part_full[SLOTS];           /* scores -> state: a last chunk, a part of one, has zeros in the rows past its end */
} ForwardShared;

static_assert(sizeof(ForwardShared) == FORWARD_SHARED_BYTES, "what the host asks for");
static_assert(sizeof(ForwardShared) <= 227 * 1024, "what a block can have");

#endif
