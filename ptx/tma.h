/* The bulk copy engine: boxes of a tensor map into shared memory, and contiguous bytes either way. */
#ifndef FLASHQLA_TMA_H
#define FLASHQLA_TMA_H

#include "mbarrier.h"

/* Box at (column, head, row) into shared memory; completes on the barrier. */
static __device__ __forceinline__ void tma_load(void *to, const void *map, int32_t column, int32_t head, int32_t row, uint64_t *barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
                     shared_address(to)),
                 "l"(map), "r"(column), "r"(head), "r"(row), "r"(shared_address(barrier))
                 : "memory");
}

/* `bytes` contiguous bytes, a multiple of 16, either way. */
static __device__ __forceinline__ void bulk_load(void *to, const void *from, uint32_t bytes, uint64_t *barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

static __device__ __forceinline__ void bulk_store(void *to, const void *from, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/* Wait until all but the last `pending` of this thread's stores have read their shared memory. */
template <int pending> static __device__ __forceinline__ void bulk_store_wait(void) {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

/* Between ordinary writes to shared memory and the copy engine's or wgmma's reads of it. */
static __device__ __forceinline__ void fence_proxy_async(void) { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#endif
