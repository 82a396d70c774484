/* tests/emulator: ptx/instructions.h */
#ifndef FLASHQLA_INSTRUCTIONS_H
#define FLASHQLA_INSTRUCTIONS_H

#include <stdint.h>

static inline float exp2_fast(float x) { return exp2f(x); }
static inline float log2_fast(float x) { return log2f(x); }
static inline uint64_t nanoseconds(void) {
    static uint64_t time;
    return time += 500;
}
static inline int renewed(int value) { return value; }
template <int number, int threads> static inline void named_barrier(void) { emulator_meet_named(number, threads); }
template <int registers> static inline void shrink_registers(void) {}
template <int registers> static inline void grow_registers(void) {}

#endif
