/* A program with a private copy of its own (FLASHQLA_STATIC, FLASHQLA_MALLOC) beside the public one of another unit. */
#include <stdio.h>
#include <stdlib.h>

static int counted_blocks, allocations;

static void *counted_malloc(size_t bytes) {
    counted_blocks++;
    allocations++;
    return malloc(bytes);
}

static void counted_free(void *pointer) {
    counted_blocks--;
    free(pointer);
}

#define FLASHQLA_MALLOC(bytes) counted_malloc(bytes)
#define FLASHQLA_FREE(pointer) counted_free(pointer)
#define FLASHQLA_STATIC
#define FLASHQLA_IMPLEMENTATION
#include "flashqla.h"

int main(void) {
    fqla_context_desc desc;
    fqla_context *context = NULL;
    void *memory = NULL;
    memset(&desc, 0, sizeof desc);
    desc.backend = FQLA_BACKEND_CPU;
    if (fqla_context_create(&desc, &context) != FQLA_OK || fqla_alloc(context, 100, &memory) != FQLA_OK) return 1;
    if (fqla_free(context, memory) != FQLA_OK || fqla_context_destroy(context) != FQLA_OK) return 1;
    printf("%d allocations, %d blocks left\n", allocations, counted_blocks);
    return allocations >= 2 && counted_blocks == 0 ? 0 : 1;
}
