/* A place in a ring of slots and the parity of its barriers' phase, stepped from chunk to chunk: uniform over a warp. */
#ifndef FLASHQLA_RING_H
#define FLASHQLA_RING_H

#include <stdint.h>

typedef struct Ring {
    int slot;
    uint32_t phase;
} Ring;

template <int slots> static __device__ __forceinline__ void ring_next(Ring &ring) {
    if (++ring.slot == slots) ring.slot = 0, ring.phase ^= 1;
}

/* The same in every lane, and known as such to the compiler, which can then use uniform registers. */
static __device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

#endif
