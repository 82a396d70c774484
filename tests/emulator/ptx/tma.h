/* tests/emulator: ptx/tma.h */
#ifndef FLASHQLA_TMA_H
#define FLASHQLA_TMA_H

#include "mbarrier.h"

static inline void tma_load(void *to, const void *map, int32_t column, int32_t row, int32_t head, uint64_t *barrier) {
    emulator_load_box(to, map, column, row, head, barrier);
}
static inline void tma_prefetch(const void *) {}
static inline void bulk_load(void *to, const void *from, uint32_t bytes, uint64_t *barrier) { emulator_load_bytes(to, from, bytes, barrier); }
static inline void bulk_prefetch(const void *, uint32_t) {}
static inline void tma_store(const void *map, int32_t column, int32_t row, int32_t head, const void *from) {
    emulator_store_box(map, column, row, head, from);
}
static inline void bulk_store(void *to, const void *from, uint32_t bytes) { emulator_store_bytes(to, from, bytes); }
static inline void bulk_commit(void) { emulator_commit_stores(); }
template <int pending> static inline void bulk_store_wait(void) { emulator_wait_stores(pending); }
static inline void bulk_store_landed(void) { emulator_wait_stores(0); }
static inline void fence_proxy_async(void) {}

#endif
