/* Which sequence a chunk of the batch belongs to: for the kernels that take chunks one by one. */
#ifndef FLASHQLA_SEQUENCE_H
#define FLASHQLA_SEQUENCE_H

#include "tile.h"

/* The chunk of the whole batch: its sequence's number, by a search in steps of 32. By whole warps. */
static __device__ __forceinline__ int64_t find_sequence(const fqla__device_sequence *sequences, int64_t count, int64_t chunk,
                                                        int lane) {
    int64_t first = 0;
    while (count > 1) {
        const int64_t step = (count + WARP - 1) / WARP, probe = first + lane * step;
        const bool before = lane * step < count && sequences[probe].chunk <= chunk;
        const int passed = __popc(__ballot_sync(0xffffffffu, before)) - 1;
        first += passed * step;
        count = min(step, count - passed * step);
    }
    return first;
}

#endif
