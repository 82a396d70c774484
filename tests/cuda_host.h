/* What the tests of the CUDA backend's host side stand on: the library itself, included here, on the fake driver. The driver's
   library is found as a user's program finds it (the test's command sets LD_LIBRARY_PATH), through two stand-ins that can hide the
   library or one of its symbols, and a third that counts what is closed. */
#ifndef CUDA_HOST_H
#define CUDA_HOST_H

#include <stdio.h>
#include <string.h>
#if defined(_WIN32)
#include <windows.h>
#define FIRST_LIBRARY "nvcuda.dll"
static void *real_open(const char *name) { return (void *)LoadLibraryA(name); }
static int real_close(void *library) { return FreeLibrary((HMODULE)library); }
static void *real_symbol(void *library, const char *name) {
    FARPROC address = GetProcAddress((HMODULE)library, name);
    void *pointer;
    memcpy(&pointer, &address, sizeof pointer);
    return pointer;
}
#else
#include <dlfcn.h>
#define FIRST_LIBRARY "libcuda.so.1"
static void *real_open(const char *name) { return dlopen(name, RTLD_NOW | RTLD_LOCAL); }
static int real_close(void *library) { return dlclose(library); }
static void *real_symbol(void *library, const char *name) { return dlsym(library, name); }
#endif

static int hide_library;
static const char *hide_symbol;
static char opened_names[128];
static int libraries_open;

static void *open_or_hide(const char *name) {
    if (!hide_library) {
        void *library = real_open(name);
        libraries_open += library != NULL;
        return library;
    }
    strncat(opened_names, name, sizeof opened_names - strlen(opened_names) - 2);
    strcat(opened_names, " ");
    return NULL;
}

static int close_and_count(void *library) {
    libraries_open--;
    return real_close(library);
}

static void *symbol_or_hide(void *library, const char *name) {
    return hide_symbol != NULL && strcmp(name, hide_symbol) == 0 ? NULL : real_symbol(library, name);
}

#if defined(_WIN32)
static FARPROC proc_or_hide(HMODULE library, const char *name) {
    void *pointer = symbol_or_hide((void *)library, name);
    FARPROC address;
    memcpy(&address, &pointer, sizeof address);
    return address;
}
#define LoadLibraryA(name) ((HMODULE)open_or_hide(name))
#define FreeLibrary(library) close_and_count(library)
#define GetProcAddress(library, name) proc_or_hide(library, name)
#else
#define dlopen(name, flags) open_or_hide(name)
#define dlclose(library) close_and_count(library)
#define dlsym(library, name) symbol_or_hide(library, name)
#endif

#define FLASHQLA_IMPLEMENTATION
#include "flashqla.h"

#include "fake_cuda.h"
#include "greatest.h"

#ifdef FLASHQLA__FORCE_PTX
#define FORM "ptx"
#else
#define FORM "cubin"
#endif

/* ---- what the tests stand on */

/* The control interface, found in the library that the header opens too. */
static struct {
#define FAKE_CUDA_X(type, name, parameters) type(*name) parameters;
    FAKE_CUDA_FUNCTIONS(FAKE_CUDA_X)
#undef FAKE_CUDA_X
} fake;

static int find_fake(void) {
    void *library = real_open(FIRST_LIBRARY), *address;
    int found = library != NULL;
#define FAKE_CUDA_X(type, name, parameters)                                  \
    address = found ? real_symbol(library, #name) : NULL;                    \
    found = found && address != NULL;                                        \
    memcpy((void *)&fake.name, (const void *)&address, sizeof fake.name);
    FAKE_CUDA_FUNCTIONS(FAKE_CUDA_X)
#undef FAKE_CUDA_X
    return found;
}

/* What the header allocated on the host and logged. */
static struct {
    long live, fail_at; /* blocks; the allocation that fails, counted from now; 0: none */
    int errors, infos;
    char error[512], infos_text[4096];
} host;

static void *host_alloc(size_t bytes, void *user) {
    void *pointer;
    (void)user;
    if (host.fail_at > 0 && --host.fail_at == 0) return NULL;
    pointer = malloc(bytes);
    if (pointer != NULL) host.live++;
    return pointer;
}

static void host_free(void *pointer, void *user) {
    (void)user;
    host.live--;
    free(pointer);
}

static void host_log(fqla_log_level level, const char *message, void *user) {
    (void)user;
    if (level == FQLA_LOG_ERROR) {
        host.errors++;
        snprintf(host.error, sizeof host.error, "%s", message);
    } else {
        host.infos++;
        strncat(host.infos_text, message, sizeof host.infos_text - strlen(host.infos_text) - 1);
    }
}

static void forget_log(void) {
    host.errors = host.infos = 0;
    host.error[0] = host.infos_text[0] = '\0';
}

/* What there was when the test started. */
static fake_cuda_census census_before;
static long live_before;

static void start(void *unused) {
    (void)unused;
    census_before = fake.fake_cuda_count();
    live_before = host.live;
    fake.fake_cuda_reset();
    fake.fake_cuda_settings()->parameter_bytes = sizeof(fqla__forward_params);
    hide_library = 0;
    hide_symbol = NULL;
    opened_names[0] = '\0';
    host.fail_at = 0;
    forget_log();
}

static fqla_context_desc desc_of(fqla_backend backend) {
    fqla_context_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.backend = backend;
    desc.num_threads = 1;
    desc.alloc = host_alloc;
    desc.free = host_free;
    desc.log = host_log;
    return desc;
}

static fqla_context *open_cuda(void) {
    fqla_context_desc desc = desc_of(FQLA_BACKEND_CUDA);
    fqla_context *context = NULL;
    fqla_context_create(&desc, &context);
    return context;
}

/* Nothing is left over, on either side, and no rule was broken. */
static enum greatest_test_res clean(void) {
    const fake_cuda_census census = fake.fake_cuda_count();
    ASSERT_STR_EQ("", fake.fake_cuda_misuse());
    ASSERT_EQ(census_before.allocations, census.allocations);
    ASSERT_EQ(census_before.modules, census.modules);
    ASSERT_EQ(census_before.retains, census.retains);
    ASSERT_EQ(census_before.stack, census.stack);
    ASSERT_EQ(live_before, host.live);
    PASS();
}

/* ---- what more than one of them stands on */

static inline fqla_stream stream_of(fqla_cuda_context owner) { return (fqla_stream)fake.fake_cuda_stream_create(owner); }
static inline fqla_cuda_context primary_context(int device) { return (fqla_cuda_context)fake.fake_cuda_primary_context(device); }
static inline fqla_cuda_context new_context(void) { return (fqla_cuda_context)fake.fake_cuda_context_create(0); }

/* Was this refused with `expected`, in one sentence that holds `words`? */
static inline enum greatest_test_res refused(fqla_status expected, fqla_status status, const char *words) {
    if (status != expected || host.errors != 1 || strstr(host.error, words) == NULL)
        printf("\n%s, %d errors, last \"%s\"; expected %s, \"%s\"\n", fqla_status_name(status), host.errors, host.error,
               fqla_status_name(expected), words);
    ASSERT_EQ(expected, status);
    ASSERT_EQ(1, host.errors);
    ASSERT(strstr(host.error, words) != NULL);
    forget_log();
    PASS();
}

static inline enum greatest_test_res map_holds(const fqla__tensor_map *map, const void *tensor, uint64_t heads, uint64_t rows,
                                               uint64_t head_stride, uint64_t token_stride, uint32_t box_rows, uint32_t type) {
    fake_cuda_tensor_map m;
    memcpy(&m, map, sizeof m);
    ASSERT(m.magic == FAKE_CUDA_TENSOR_MAP_MAGIC);
    ASSERT(m.address == (uintptr_t)tensor);
    ASSERT(m.dims[0] == 128 && m.dims[1] == rows && m.dims[2] == heads);
    ASSERT(m.strides[0] == token_stride * 2 && m.strides[1] == head_stride * 2);
    ASSERT(m.box[0] == 64 && m.box[1] == box_rows && m.box[2] == 1);
    ASSERT_EQ(type, m.type);
    ASSERT_EQ(3, m.swizzle); /* 128 bytes */
    PASS();
}

#endif
