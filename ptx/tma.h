/* The bulk copy engine: boxes of a tensor map into shared memory, and contiguous bytes either way. */
#ifndef FLASHQLA_TMA_H
#define FLASHQLA_TMA_H

#include "mbarrier.h"

/* Box at (column, row, head) into shared memory; completes on the barrier. */
static __device__ __forceinline__ void tma_load(void *to, const void *map, int32_t column, int32_t row, int32_t head, uint64_t *barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
                     shared_address(to)),
                 "l"(map), "r"(column), "r"(row), "r"(head), "r"(shared_address(barrier))
                 : "memory");
}

/* Bring the map itself near: the first copy by it else waits for it. */
static __device__ __forceinline__ void tma_prefetch(const void *map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

/* `bytes` contiguous bytes, a multiple of 16. */
static __device__ __forceinline__ void bulk_load(void *to, const void *from, uint32_t bytes, uint64_t *barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

/* `bytes` contiguous bytes, a multiple of 16, from memory to the L2 cache. */
static __device__ __forceinline__ void bulk_prefetch(const void *from, uint32_t bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

/* Shared memory into the box at (column, row, head). */
static __device__ __forceinline__ void tma_store(const void *map, int32_t column, int32_t row, int32_t head, const void *from) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(map), "r"(column), "r"(row),
                 "r"(head), "r"(shared_address(from))
                 : "memory");
}

/* Shared memory to global memory, contiguous. */
static __device__ __forceinline__ void bulk_store(void *to, const void *from, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)), "r"(bytes)
                 : "memory");
}

static __device__ __forceinline__ void bulk_commit(void) { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

/* Wait until all but the last `pending` of this thread's groups of stores have read their shared memory. */
template <int pending> static __device__ __forceinline__ void bulk_store_wait(void) {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

/* Wait until all of this thread's stores are in memory. */
static __device__ __forceinline__ void bulk_store_landed(void) { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

/* Between ordinary writes to shared memory and the copy engine's or wgmma's reads of it. */
static __device__ __forceinline__ void fence_proxy_async(void) { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#endif
