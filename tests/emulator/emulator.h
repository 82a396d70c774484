/* A GPU made of coroutines, on which the kernels of ptx/ run as C++: what they take for CUDA's language and library. Their own
   instructions are in tests/emulator/ptx, headers in place of those of the same name.

   A block at a time; every thread of it is a coroutine, which goes on until it waits for others. Order is random, by a seed: warps
   are put to sleep, in most blocks some have hardly a turn, copies land late, a product of wgmma is worked out when it is issued or
   when it is waited for, a store reads its shared memory then or when it is waited for. So a kernel that relies on what it has not
   waited for goes wrong here sooner than on a GPU, and one in which all wait for one another is found at once. What is not here:
   time, registers, caches, the order of writes that reach other threads. */
#ifndef EMULATOR_H
#define EMULATOR_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* ---- the language */

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#if defined(EMULATOR_STATIC_SHARED) /* of a kernel whose shared memory is not `extern` */
#define __shared__ static
#else
#define __shared__
#endif
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct emulator_index {
    unsigned int x;
};
extern emulator_index threadIdx, blockIdx, gridDim;
extern unsigned char shared_bytes[]; /* the block's */

struct __align__(8) float2 {
    float x, y;
};
struct __align__(16) float4 {
    float x, y, z, w;
};
struct __align__(16) uint4 {
    uint32_t x, y, z, w;
};
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

/* ---- threads that wait for one another */

void emulator_meet_warp();
void emulator_meet_block();
void emulator_meet_named(int number, int threads);
/* Every lane gives a value and sees all 32, until the warp's next meeting. */
const uint64_t *emulator_exchange(uint64_t value);
/* An mbarrier: bit 63 its phase, then 15 bits of arrivals it is made for and 16 that are to come, 32 bits of bytes to come. */
void emulator_start_barrier(uint64_t *barrier, uint32_t arrivals);
void emulator_take(uint64_t *barrier, uint32_t arrivals, int32_t bytes); /* so many fewer are to come */
void emulator_wait_barrier(const uint64_t *barrier, uint32_t parity);

/* ---- products and copies under way */

/* d [64 x n] = or += a b: what a thread gives of it. a: four registers, or NULL and a descriptor; a_rows, b_rows: k runs over the
   rows of their tiles. */
struct emulator_product {
    int n;
    bool adds, a_rows, b_rows;
    uint64_t a_descriptor, b_descriptor;
    float (*element)(uint16_t bits); /* of the 16-bit type */
};
void emulator_multiply(const emulator_product &product, float *d, const uint32_t *a);
void emulator_commit_products();
void emulator_wait_products(int pending);

/* Box or bytes into shared memory, whenever; then so many bytes of the barrier's are there. */
void emulator_load_box(void *to, const void *map, int32_t column, int32_t row, int32_t head, uint64_t *barrier);
void emulator_load_bytes(void *to, const void *from, uint32_t bytes, uint64_t *barrier);
void emulator_store_box(const void *map, int32_t column, int32_t row, int32_t head, const void *from);
void emulator_store_bytes(void *to, const void *from, uint32_t bytes);
void emulator_commit_stores();
void emulator_wait_stores(int pending);

/* ---- the library */

template <typename T> static inline T emulator_lane(T value, int lane) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = emulator_exchange(bits)[lane];
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline int emulator_this_lane() { return (int)(threadIdx.x % 32); }
template <typename T> static inline T __shfl_sync(uint32_t, T value, int lane) { return emulator_lane(value, lane & 31); }
template <typename T> static inline T __shfl_xor_sync(uint32_t, T value, int mask) {
    return emulator_lane(value, emulator_this_lane() ^ mask);
}
template <typename T> static inline T __shfl_up_sync(uint32_t, T value, int by, int width = 32) {
    return emulator_lane(value, emulator_this_lane() % width >= by ? emulator_this_lane() - by : emulator_this_lane());
}
template <typename T> static inline T __shfl_down_sync(uint32_t, T value, int by, int width = 32) {
    return emulator_lane(value, emulator_this_lane() % width + by < width ? emulator_this_lane() + by : emulator_this_lane());
}
static inline uint32_t __ballot_sync(uint32_t, bool vote) {
    const uint64_t *votes = emulator_exchange(vote);
    uint32_t ballot = 0;
    for (int i = 0; i < 32; i++) ballot |= (uint32_t)votes[i] << i;
    return ballot;
}
static inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
    const uint64_t *values = emulator_exchange(value);
    for (int i = 0; i < 32; i++) value = values[i] > value ? (uint32_t)values[i] : value;
    return value;
}
static inline bool __any_sync(uint32_t mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
static inline void __syncwarp() { emulator_meet_warp(); }
static inline void __syncthreads() { emulator_meet_block(); }

template <typename T> static inline T __ldg(const T *at) { return *at; }
static inline float __uint_as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
static inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
static inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
static inline int __ffs(int bits) { return __builtin_ffs(bits); }
static inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline uint32_t atomicAdd(uint32_t *at, uint32_t value) {
    const uint32_t before = *at;
    *at += value;
    return before;
}
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }
static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

#endif
