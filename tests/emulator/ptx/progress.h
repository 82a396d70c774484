/* tests/emulator: ptx/progress.h. A kernel starts when the one before it has ended: what it waits for is there. */
#ifndef FLASHQLA_PROGRESS_H
#define FLASHQLA_PROGRESS_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static inline void count_up(int32_t *count) { ++*count; }
static inline void set_count(int32_t *count, int32_t value) { *count = value; }
static inline int32_t load_count(const int32_t *count) { return *count; }
static inline int32_t take_number(int32_t *next) { return (*next)++; }
static inline void wait_count(const int32_t *count, int32_t wanted) {
    if (*count == wanted) return;
    fprintf(stderr, "emulator: %d have counted up where %d are waited for\n", *count, wanted);
    abort();
}

#endif
