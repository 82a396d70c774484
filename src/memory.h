// >>memory: checked sizes and the context's allocator

/* Sizes are multiplied and added here alone, so that none wraps. False: it would not fit in 63 bits. */
static bool fqla__mul(int64_t a, int64_t b, int64_t *product) {
    if (a < 0 || b < 0 || (b != 0 && a > INT64_MAX / b)) return false;
    *product = a * b;
    return true;
}

static bool fqla__add(int64_t a, int64_t b, int64_t *sum) {
    if (a < 0 || b < 0 || a > INT64_MAX - b) return false;
    *sum = a + b;
    return true;
}

/* Everything that a workspace or a helper buffer holds starts on this many bytes: a CUDA allocation's alignment. */
enum { FQLA__ALIGNMENT = 256 };

static int64_t fqla__round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

/* Host memory from the desc's allocator, FQLA__ALIGNMENT aligned; the pointer to free lies right before it. */
static void *fqla__host_alloc(const fqla_context_desc *desc, size_t bytes) {
    const size_t extra = FQLA__ALIGNMENT + sizeof(void *);
    void *raw;
    char *aligned;
    if (bytes > SIZE_MAX - extra) return NULL;
    raw = desc->alloc ? desc->alloc(bytes + extra, desc->alloc_user) : FLASHQLA_MALLOC(bytes + extra);
    if (raw == NULL) return NULL;
    aligned = (char *)raw + sizeof(void *);
    aligned += (FQLA__ALIGNMENT - (uintptr_t)aligned % FQLA__ALIGNMENT) % FQLA__ALIGNMENT;
    memcpy(aligned - sizeof(void *), &raw, sizeof raw);
    return aligned;
}

static void fqla__host_free(const fqla_context_desc *desc, void *pointer) {
    void *raw;
    if (pointer == NULL) return;
    memcpy(&raw, (char *)pointer - sizeof(void *), sizeof raw);
    if (desc->free) desc->free(raw, desc->alloc_user);
    else FLASHQLA_FREE(raw);
}

static void *fqla__host_alloc_zeroed(const fqla_context_desc *desc, size_t bytes) {
    void *pointer = fqla__host_alloc(desc, bytes);
    if (pointer != NULL) memset(pointer, 0, bytes);
    return pointer;
}
