/* The CUDA backend's host side on the fake driver: opening and its refusals, memory, plans, launches, every driver call failing.
   How a plan spreads a forward over the GPU is in test_cuda_schedule.c. */
#include "cuda_faults.h"
#include "cuda_host.h"

static fqla_context_summary summary_of(const fqla_context *context) {
    fqla_context_summary summary;
    memset(&summary, 0, sizeof summary);
    fqla_context_info(context, &summary);
    return summary;
}

enum { HEADS_QK = 2, HEADS_V = 4, SEQS = 3, TOKENS = 200 };
enum { MAX_CHUNKS = TOKENS / 64 + SEQS }; /* however the tokens are divided */
static const int32_t cu_seqlens[SEQS + 1] = {0, 130, 130, 200};

static fqla_plan_desc plan_desc(void) {
    fqla_plan_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.heads_qk = HEADS_QK;
    desc.heads_v = HEADS_V;
    desc.num_seqs = SEQS;
    desc.cu_seqlens = cu_seqlens;
    return desc;
}

/* The tensors of a run of plan_desc(), pieces of one allocation. */
static fqla_forward_args args_in(void *memory) {
    char *at = (char *)memory;
    fqla_forward_args args;
    memset(&args, 0, sizeof args);
    args.q = at, at += TOKENS * HEADS_QK * 256;
    args.k = at, at += TOKENS * HEADS_QK * 256;
    args.v = at, at += TOKENS * HEADS_V * 256;
    args.o = at, at += TOKENS * HEADS_V * 256;
    args.g = at, at += TOKENS * HEADS_V * 4;
    args.beta = at, at += TOKENS * HEADS_V * 4;
    args.ht = at;
    return args;
}
static const size_t args_bytes = TOKENS * (HEADS_QK * 512 + HEADS_V * 520) + SEQS * HEADS_V * 65536;

static fqla_decode_args decode_args_in(void *memory) {
    const fqla_forward_args forward = args_in(memory);
    fqla_decode_args args;
    memset(&args, 0, sizeof args);
    args.q = forward.q, args.k = forward.k, args.v = forward.v, args.g = forward.g, args.beta = forward.beta;
    args.o = forward.o, args.ht = forward.ht;
    return args;
}

/* The blocks of a run's kernels, in the order in which they are launched; 0: it is not launched. */
typedef struct run_blocks {
    unsigned int prepare, states, scan, forward, forward_half;
} run_blocks;

/* Kernel prepare's blocks of a run of plan_desc() have a warp for each of two v-heads, and its V is spread over two blocks. */
static const run_blocks usual_forward = {.prepare = MAX_CHUNKS * HEADS_V / 2, .forward_half = SEQS * HEADS_V * 2};
static const run_blocks usual_decode = {.prepare = SEQS * HEADS_V / 2, .forward = SEQS * HEADS_V};

/* Launches `first` and on, as many as `blocks` has kernels, are a run's: on one stream and with the same parameters, and each but
   the first may start while the one before it runs. type: "bf16" or "fp16". */
static enum greatest_test_res run_launched(int first, const char *type, run_blocks blocks, fqla_stream stream, int captured) {
    const struct {
        const char *name;
        unsigned int blocks, threads, shared_bytes;
    } kernels[] = {{"prepare_", blocks.prepare, FQLA__PREPARE_THREADS, FQLA__PREPARE_SHARED_BYTES},
                   {"states_", blocks.states, FQLA__STATES_THREADS, FQLA__STATES_SHARED_BYTES},
                   {"scan", blocks.scan, FQLA__SCAN_THREADS, FQLA__SCAN_SHARED_BYTES}, /* for either type */
                   {"forward_", blocks.forward, FQLA__FORWARD_THREADS, FQLA__FORWARD_SHARED_BYTES},
                   {"forward_half_", blocks.forward_half, FQLA__HALF_THREADS, FQLA__HALF_SHARED_BYTES}};
    const fake_cuda_launch prepare = fake.fake_cuda_launch_at(first);
    int at = first;
    size_t i;
    for (i = 0; i < sizeof kernels / sizeof kernels[0]; i++) {
        fake_cuda_launch launch;
        char name[64];
        if (kernels[i].blocks == 0) continue;
        ASSERT(at < fake.fake_cuda_launches());
        launch = fake.fake_cuda_launch_at(at);
        snprintf(name, sizeof name, "%s%s", kernels[i].name, strchr(kernels[i].name, '_') != NULL ? type : "");
        ASSERT_STR_EQ(name, launch.kernel);
        ASSERT_EQm(name, kernels[i].blocks, launch.grid[0]);
        ASSERT_EQm(name, 1u, launch.grid[1] * launch.grid[2]);
        ASSERT_EQm(name, kernels[i].threads, launch.block[0]);
        ASSERT_EQm(name, 1u, launch.block[1] * launch.block[2]);
        ASSERT_EQm(name, kernels[i].shared_bytes, launch.shared_bytes);
        ASSERT_EQm(name, at > first, launch.dependent);
        ASSERT_EQm(name, stream, launch.stream);
        ASSERT_EQm(name, primary_context(0), launch.context);
        ASSERT_EQm(name, captured, launch.captured);
        ASSERT_MEM_EQm(name, prepare.parameters, launch.parameters, sizeof launch.parameters);
        at++;
    }
    PASS();
}

static fqla__forward_params parameters_of(int launch) {
    const fake_cuda_launch record = fake.fake_cuda_launch_at(launch);
    fqla__forward_params p;
    memcpy(&p, record.parameters, sizeof p);
    return p;
}

/* ---- opening */

TEST the_primary_context(void) {
    fqla_context_summary summary;
    fqla_context *context = open_cuda();
    ASSERT(context != NULL);
    ASSERT_EQ(1, fake.fake_cuda_count().retains);
    ASSERT_EQ(FQLA__KERNEL_COUNT, fake.fake_cuda_count().modules);
    ASSERT_EQ(0, fake.fake_cuda_count().stack);
    summary = summary_of(context);
    ASSERT_EQ(FQLA_BACKEND_CUDA, summary.backend);
    ASSERT_EQ(1, summary.num_threads);
    ASSERT_STR_EQ("ready", summary.cuda_status);
    ASSERT_STR_EQ("Fake GPU 0", summary.device_name);
    ASSERT_STR_EQ(FORM, summary.kernel_form);
    ASSERT_EQ(90, summary.compute_capability);
    ASSERT_EQ(132, summary.sm_count);
    ASSERT_EQ(13000, summary.driver_version);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    ASSERT_EQ(0, host.errors);
    return clean();
}

TEST auto_takes_the_gpu(void) {
    fqla_context_desc desc = desc_of(FQLA_BACKEND_AUTO);
    fqla_context_summary summary;
    fqla_context *context = NULL;
    ASSERT_EQ(FQLA_OK, fqla_context_create(&desc, &context));
    summary = summary_of(context);
    ASSERT_EQ(FQLA_BACKEND_CUDA, summary.backend);
    fqla_context_destroy(context);
    return clean();
}

TEST cpu_leaves_the_driver_alone(void) {
    fqla_context_desc desc = desc_of(FQLA_BACKEND_CPU);
    fqla_context *context = NULL;
    ASSERT_EQ(FQLA_OK, fqla_context_create(&desc, &context));
    ASSERT_EQ(0, fake.fake_cuda_calls());
    fqla_context_destroy(context);
    return clean();
}

TEST the_second_device(void) {
    fqla_context_desc desc = desc_of(FQLA_BACKEND_CUDA);
    fqla_context *context = NULL;
    fqla_context_summary summary;
    fake.fake_cuda_settings()->devices = 2;
    desc.device = 1;
    ASSERT_EQ(FQLA_OK, fqla_context_create(&desc, &context));
    summary = summary_of(context);
    ASSERT_STR_EQ("Fake GPU 1", summary.device_name);
    ASSERT(context->cuda.context == primary_context(1));
    fqla_context_destroy(context);
    return clean();
}

/* The borrowed context is neither retained nor ended, and what was current before is current after. */
TEST a_borrowed_context(void) {
    fqla_cuda_context borrowed = new_context(), other = new_context();
    fqla_context_desc desc = desc_of(FQLA_BACKEND_CUDA);
    fqla_context *context = NULL;
    void *memory = NULL;
    fake.fake_cuda_push(other);
    desc.cuda_context = borrowed;
    desc.device = 7; /* ignored */
    ASSERT_EQ(FQLA_OK, fqla_context_create(&desc, &context));
    ASSERT_EQ(0, fake.fake_cuda_count().retains);
    ASSERT_EQ(1, fake.fake_cuda_count().stack);
    ASSERT_EQ(other, fake.fake_cuda_current());
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, 100, &memory));
    ASSERT_EQ(FQLA_OK, fqla_free(context, memory));
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    ASSERT_EQ(other, fake.fake_cuda_current());
    fake.fake_cuda_pop();
    fake.fake_cuda_push(borrowed); /* still there */
    fake.fake_cuda_pop();
    fake.fake_cuda_context_destroy(borrowed);
    fake.fake_cuda_context_destroy(other);
    return clean();
}

TEST a_borrowed_context_that_ended(void) {
    fqla_context_desc desc = desc_of(FQLA_BACKEND_CUDA);
    fqla_context *context = NULL;
    desc.cuda_context = new_context();
    fake.fake_cuda_context_destroy(desc.cuda_context);
    CHECK_CALL(refused(FQLA_ERROR_DRIVER, fqla_context_create(&desc, &context),
                       "cuCtxPushCurrent failed: CUDA_ERROR_INVALID_CONTEXT (invalid device context)"));
    ASSERT(context == NULL);
    return clean();
}

/* A borrowed context may end first, although it should not: closing then has nothing to unload. */
TEST a_borrowed_context_that_ends_too_early(void) {
    fqla_context_desc desc = desc_of(FQLA_BACKEND_CUDA);
    fqla_context *context = NULL;
    void *memory = NULL;
    desc.cuda_context = new_context();
    ASSERT_EQ(FQLA_OK, fqla_context_create(&desc, &context));
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, 100, &memory));
    fake.fake_cuda_context_destroy(desc.cuda_context);
    ASSERT_EQ(FQLA_ERROR_DRIVER, fqla_free(context, memory));
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* Why a machine cannot: `words` is the reason. AUTO goes to the CPU with one line about it, CUDA is refused with it. */
static enum greatest_test_res falls_back(fqla_cuda_context borrowed, const char *words) {
    fqla_context_desc desc = desc_of(FQLA_BACKEND_AUTO);
    fqla_context_summary summary;
    fqla_context *context = NULL;
    desc.cuda_context = borrowed;
    ASSERT_EQ(FQLA_OK, fqla_context_create(&desc, &context));
    summary = summary_of(context);
    ASSERT_EQ(FQLA_BACKEND_CPU, summary.backend);
    ASSERT_STR_EQ("", summary.kernel_form);
    ASSERT_STR_EQ(words, summary.cuda_status);
    ASSERT(strstr(host.infos_text, words) != NULL);
    ASSERT_EQ(0, host.errors);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    context = NULL;
    desc.backend = FQLA_BACKEND_CUDA;
    CHECK_CALL(refused(FQLA_ERROR_NO_CUDA, fqla_context_create(&desc, &context), words));
    ASSERT(context == NULL);
    return clean();
}

TEST without_a_driver(void) {
    hide_library = 1;
    CHECK_CALL(falls_back(NULL, "no CUDA driver: " FIRST_LIBRARY " cannot be opened"));
#if defined(_WIN32)
    ASSERT_STR_EQ("nvcuda.dll nvcuda.dll ", opened_names);
#else
    ASSERT_STR_EQ("libcuda.so.1 libcuda.so libcuda.so.1 libcuda.so ", opened_names);
#endif
    PASS();
}

TEST without_any_one_symbol(void) {
    static const char *const names[] = {
#define FLASHQLA__X(name, parameters) #name,
        FLASHQLA__CUDA_FUNCTIONS(FLASHQLA__X)
#undef FLASHQLA__X
    };
    const int open_before = libraries_open;
    size_t i;
    for (i = 0; i < sizeof names / sizeof names[0]; i++) {
        char words[128];
        start(NULL);
        hide_symbol = names[i];
        snprintf(words, sizeof words, "the CUDA driver is too old: " FIRST_LIBRARY " has no %s", names[i]);
        CHECK_CALL(falls_back(NULL, words));
        ASSERT_EQ(0, fake.fake_cuda_calls());
        ASSERT_EQ(open_before, libraries_open);
    }
    PASS();
}

TEST without_a_device(void) {
    fake.fake_cuda_settings()->devices = 0;
    return falls_back(NULL, "cuInit failed: CUDA_ERROR_NO_DEVICE (no CUDA-capable device is detected)");
}

TEST a_device_that_is_not_there(void) {
    fqla_context_desc desc = desc_of(FQLA_BACKEND_CUDA);
    fqla_context *context = NULL;
    desc.device = 1;
    CHECK_CALL(refused(FQLA_ERROR_NO_CUDA, fqla_context_create(&desc, &context),
                       "context_desc.device is 1; the CUDA driver has 1 device"));
    fake.fake_cuda_settings()->devices = 2;
    desc.device = 2;
    CHECK_CALL(refused(FQLA_ERROR_NO_CUDA, fqla_context_create(&desc, &context),
                       "context_desc.device is 2; the CUDA driver has 2 devices"));
    return clean();
}

TEST another_compute_capability(void) {
    fqla_cuda_context borrowed;
    fake.fake_cuda_settings()->major = 8;
    CHECK_CALL(falls_back(NULL, "Fake GPU 0 has compute capability 8.0; the kernels need 9.0"));
    borrowed = new_context();
    CHECK_CALL(falls_back(borrowed, "Fake GPU 0 has compute capability 8.0; the kernels need 9.0"));
    fake.fake_cuda_context_destroy(borrowed);
    fake.fake_cuda_settings()->major = 10;
    fake.fake_cuda_settings()->minor = 3;
    return falls_back(NULL, "Fake GPU 0 has compute capability 10.3; the kernels need 9.0");
}

/* The summary tells what device it is although it does not serve. */
TEST the_device_is_named_all_the_same(void) {
    fqla_context_desc desc = desc_of(FQLA_BACKEND_AUTO);
    fqla_context_summary summary;
    fqla_context *context = NULL;
    fake.fake_cuda_settings()->major = 8;
    fake.fake_cuda_settings()->minor = 6;
    ASSERT_EQ(FQLA_OK, fqla_context_create(&desc, &context));
    summary = summary_of(context);
    ASSERT_STR_EQ("Fake GPU 0", summary.device_name);
    ASSERT_EQ(86, summary.compute_capability);
    ASSERT_EQ(132, summary.sm_count);
    ASSERT_EQ(13000, summary.driver_version);
    fqla_context_destroy(context);
    return clean();
}

TEST an_old_driver_takes_the_ptx(void) {
    fqla_context_summary summary;
    fqla_context *context;
    fake.fake_cuda_settings()->driver_version = 12020;
    fake.fake_cuda_settings()->cubin_result = 209;
    context = open_cuda();
    ASSERT(context != NULL);
    summary = summary_of(context);
    ASSERT_STR_EQ("ptx", summary.kernel_form);
    ASSERT_STR_EQ("ready", summary.cuda_status);
    ASSERT_EQ(FQLA__KERNEL_COUNT, fake.fake_cuda_count().modules);
#ifndef FLASHQLA__FORCE_PTX
    ASSERT(strstr(host.infos_text, "the driver (CUDA 12.2) refuses the kernels' cubins") != NULL);
    ASSERT(strstr(host.infos_text, "CUDA_ERROR_NO_BINARY_FOR_GPU") != NULL);
#endif
    ASSERT_EQ(0, host.errors);
    fqla_context_destroy(context);
    return clean();
}

TEST a_driver_too_old_for_either(void) {
    fake.fake_cuda_settings()->driver_version = 11080;
    fake.fake_cuda_settings()->cubin_result = 200;
    fake.fake_cuda_settings()->fatbin_result = 222;
    return falls_back(NULL, "the driver (CUDA 11.8) refuses the kernels: cuModuleLoadData failed: "
                            "CUDA_ERROR_UNSUPPORTED_PTX_VERSION (the provided PTX was compiled with an unsupported toolchain.)");
}

TEST two_contexts(void) {
    fqla_context *a = open_cuda(), *b = open_cuda();
    fqla_plan_desc desc = plan_desc();
    fqla_plan *plan = NULL;
    void *memory = NULL;
    fqla_forward_args args;
    ASSERT(a != NULL && b != NULL);
    ASSERT_EQ(2, fake.fake_cuda_count().retains);
    ASSERT_EQ(2 * FQLA__KERNEL_COUNT, fake.fake_cuda_count().modules);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(a));
    ASSERT_EQ(FQLA__KERNEL_COUNT, fake.fake_cuda_count().modules);
    ASSERT_EQ(FQLA_OK, fqla_plan_create(b, &desc, &plan));
    ASSERT_EQ(FQLA_OK, fqla_alloc(b, args_bytes, &memory));
    args = args_in(memory);
    ASSERT_EQ(FQLA_OK, fqla_forward(plan, &args, NULL));
    ASSERT_EQ(2, fake.fake_cuda_launches());
    CHECK_CALL(run_launched(0, "bf16", usual_forward, NULL, 0));
    CHECK_CALL(refused(FQLA_ERROR_IN_USE, fqla_context_destroy(b), "2 plans and buffers"));
    ASSERT_EQ(FQLA__KERNEL_COUNT, fake.fake_cuda_count().modules);
    fqla_plan_destroy(plan);
    ASSERT_EQ(FQLA_OK, fqla_free(b, memory));
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(b));
    return clean();
}

SUITE(opening) {
    SET_SETUP(start, NULL);
    RUN_TEST(the_primary_context);
    RUN_TEST(auto_takes_the_gpu);
    RUN_TEST(cpu_leaves_the_driver_alone);
    RUN_TEST(the_second_device);
    RUN_TEST(a_borrowed_context);
    RUN_TEST(a_borrowed_context_that_ended);
    RUN_TEST(a_borrowed_context_that_ends_too_early);
    RUN_TEST(without_a_driver);
    RUN_TEST(without_any_one_symbol);
    RUN_TEST(without_a_device);
    RUN_TEST(a_device_that_is_not_there);
    RUN_TEST(another_compute_capability);
    RUN_TEST(the_device_is_named_all_the_same);
    RUN_TEST(an_old_driver_takes_the_ptx);
    RUN_TEST(a_driver_too_old_for_either);
    RUN_TEST(two_contexts);
}

/* ---- memory */

TEST a_round_trip(void) {
    fqla_context *context = open_cuda();
    fqla_stream stream = stream_of(primary_context(0));
    void *memory = NULL;
    char sent[1000], got[1000];
    size_t i;
    for (i = 0; i < sizeof sent; i++) sent[i] = (char)(i * 7);
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, sizeof sent, &memory));
    ASSERT_EQ(0u, (unsigned int)((uintptr_t)memory % 256));
    ASSERT_EQ(FQLA_OK, fqla_upload(context, memory, sent, sizeof sent, stream));
    ASSERT_MEM_EQ(sent, memory, sizeof sent); /* both return when the copy is done */
    ASSERT_EQ(FQLA_OK, fqla_download(context, got, memory, sizeof got, NULL));
    ASSERT_MEM_EQ(sent, got, sizeof sent);
    ASSERT_EQ(2, fake.fake_cuda_copies());
    ASSERT_EQ(stream, fake.fake_cuda_copy_at(0).stream);
    ASSERT_EQ(NULL, fake.fake_cuda_copy_at(1).stream);
    ASSERT_EQ(FQLA_OK, fqla_free(context, memory));
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

TEST out_of_memory(void) {
    fqla_context *context = open_cuda();
    fqla_plan_desc desc = plan_desc();
    fqla_plan *plan = NULL;
    void *memory = NULL;
    fake.fake_cuda_settings()->memory = 1000;
    CHECK_CALL(refused(FQLA_ERROR_OUT_OF_MEMORY, fqla_alloc(context, 1001, &memory),
                       "bytes: cuMemAlloc failed: CUDA_ERROR_OUT_OF_MEMORY (out of memory)"));
    ASSERT(memory == NULL);
    fake.fake_cuda_settings()->memory = 16;
    CHECK_CALL(refused(FQLA_ERROR_OUT_OF_MEMORY, fqla_plan_create(context, &desc, &plan), "fqla_plan_create: cuMemAlloc failed"));
    ASSERT(plan == NULL);
    fake.fake_cuda_settings()->memory = 1000; /* room for the table, not for the workspace */
    CHECK_CALL(refused(FQLA_ERROR_OUT_OF_MEMORY, fqla_plan_create(context, &desc, &plan), "bytes: cuMemAlloc failed"));
    ASSERT(plan == NULL);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* The host's allocator fails at every allocation in turn. */
TEST out_of_host_memory(void) {
    fqla_context_desc desc = desc_of(FQLA_BACKEND_CUDA);
    fqla_plan_desc plan_as = plan_desc();
    int n, whole = 0;
    for (n = 1; !whole; n++) {
        fqla_context *context = NULL;
        fqla_plan *plan = NULL;
        fqla_status status;
        forget_log();
        host.fail_at = n;
        status = fqla_context_create(&desc, &context);
        if (status == FQLA_OK) status = fqla_plan_create(context, &plan_as, &plan);
        whole = status == FQLA_OK;
        host.fail_at = 0;
        if (!whole) CHECK_CALL(refused(FQLA_ERROR_OUT_OF_MEMORY, status, "no memory"));
        fqla_plan_destroy(plan);
        ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
        CHECK_CALL(clean());
    }
    ASSERT(n > 5);
    PASS();
}

TEST what_is_not_ours_is_not_freed(void) {
    fqla_context *context = open_cuda();
    void *memory = NULL;
    char stranger[16];
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, 100, &memory));
    CHECK_CALL(refused(FQLA_ERROR_INVALID_VALUE, fqla_free(context, stranger), "fqla_free: cuMemFree failed"));
    CHECK_CALL(refused(FQLA_ERROR_IN_USE, fqla_context_destroy(context), "1 plans and buffers"));
    ASSERT_EQ(FQLA_OK, fqla_free(context, memory));
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* While a stream is being captured nothing is copied, nobody waits, and the capture is unharmed. The legacy stream counts too. */
TEST capture_refuses_copies(void) {
    fqla_context *context = open_cuda();
    fqla_stream stream = stream_of(primary_context(0));
    void *memory = NULL;
    fqla_stream both[2] = {stream, NULL};
    char bytes[16];
    int i;
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, sizeof bytes, &memory));
    fake.fake_cuda_capture_begin(stream);
    for (i = 0; i < 2; i++) {
        CHECK_CALL(refused(FQLA_ERROR_CAPTURING, fqla_upload(context, memory, bytes, sizeof bytes, both[i]), "fqla_upload: "));
        CHECK_CALL(refused(FQLA_ERROR_CAPTURING, fqla_download(context, bytes, memory, sizeof bytes, both[i]), "fqla_download: "));
        CHECK_CALL(refused(FQLA_ERROR_CAPTURING, fqla_synchronize(context, both[i]), "fqla_synchronize: "));
    }
    ASSERT_EQ(0, fake.fake_cuda_copies());
    ASSERT_EQ(1, fake.fake_cuda_capture_end(stream));
    ASSERT_EQ(FQLA_OK, fqla_upload(context, memory, bytes, sizeof bytes, both[0]));
    fake.fake_cuda_capture_begin(stream);
    CHECK_CALL(refused(FQLA_ERROR_CAPTURING, fqla_free(context, memory), "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"));
    fake.fake_cuda_capture_end(stream);
    ASSERT_EQ(FQLA_OK, fqla_free(context, memory));
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

TEST streams_of_another_context(void) {
    fqla_context *context = open_cuda();
    fqla_cuda_context other = new_context();
    fqla_stream stream = stream_of(other);
    void *memory = NULL;
    fqla_plan_desc desc = plan_desc();
    fqla_plan *plan = NULL;
    fqla_forward_args args;
    char byte = 0;
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, args_bytes, &memory));
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
    args = args_in(memory);
    fake.fake_cuda_push(other);
    CHECK_CALL(refused(FQLA_ERROR_WRONG_CONTEXT, fqla_upload(context, memory, &byte, 1, stream), "fqla_upload: stream"));
    CHECK_CALL(refused(FQLA_ERROR_WRONG_CONTEXT, fqla_synchronize(context, stream), "belongs to the CUDA context"));
    CHECK_CALL(refused(FQLA_ERROR_WRONG_CONTEXT, fqla_plan_update(plan, SEQS, cu_seqlens, stream), "fqla_plan_update: stream"));
    CHECK_CALL(refused(FQLA_ERROR_WRONG_CONTEXT, fqla_forward(plan, &args, stream), "fqla_forward: stream"));
    ASSERT_EQ(FQLA_OK, fqla_forward(plan, &args, NULL)); /* the default stream of the plan's context, whatever is current */
    ASSERT_EQ(2, fake.fake_cuda_launches());
    CHECK_CALL(run_launched(0, "bf16", usual_forward, NULL, 0));
    ASSERT_EQ(other, fake.fake_cuda_current());
    fake.fake_cuda_pop();
    fqla_plan_destroy(plan);
    fqla_free(context, memory);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    fake.fake_cuda_stream_destroy(stream);
    fake.fake_cuda_context_destroy(other);
    return clean();
}

SUITE(memory) {
    SET_SETUP(start, NULL);
    RUN_TEST(a_round_trip);
    RUN_TEST(out_of_memory);
    RUN_TEST(out_of_host_memory);
    RUN_TEST(what_is_not_ours_is_not_freed);
    RUN_TEST(capture_refuses_copies);
    RUN_TEST(streams_of_another_context);
}

/* ---- plans */

/* The device table of uncut sequences: rows of { row, len, chunk, snapshot }, and a segment each, in this order. */
static enum greatest_test_res table_holds(const fqla_plan *plan, int32_t num_seqs, int64_t chunks, const int64_t (*rows)[4],
                                          const int32_t *order) {
    const fqla__device_table *table = (const fqla__device_table *)plan->cuda.table;
    const fqla__device_sequence *sequences = (const fqla__device_sequence *)(table + 1);
    const fqla__device_segment *segments = (const fqla__device_segment *)(sequences + num_seqs);
    int32_t n;
    ASSERT_EQ(num_seqs, (int32_t)table->num_seqs);
    ASSERT_EQ((int)chunks, (int)table->chunks);
    ASSERT_EQ(num_seqs, (int32_t)table->segments);
    ASSERT_EQ(0, (int)table->kept);
    for (n = 0; n < num_seqs; n++) {
        const fqla__device_sequence *s = &sequences[n];
        ASSERT(s->row == rows[n][0] && s->len == rows[n][1] && s->chunk == rows[n][2] && s->snapshot == rows[n][3]);
        ASSERT_EQ(-1, (int)s->kept);
        ASSERT_EQ(order[n], segments[n].sequence);
        ASSERT_EQ(0, segments[n].index);
    }
    PASS();
}

/* Its bytes. */
static unsigned int table_bytes(int num_seqs, int segments) {
    const int cut = segments - num_seqs < num_seqs ? segments - num_seqs : num_seqs; /* at most */
    return (unsigned int)(48 + 40 * num_seqs + 8 * segments + (4 * cut + 4) / 8 * 8);
}

TEST the_table_of_a_packed_plan(void) {
    static const int64_t first[3][4] = {{0, 130, 0, 0}, {130, 0, 3, 2}, {130, 70, 3, 2}};
    static const int64_t second[2][4] = {{0, 64, 0, 0}, {64, 136, 1, 1}};
    static const int64_t third[3][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}, {0, 65, 0, 0}};
    static const int64_t fourth[3][4] = {{0, 1, 0, 0}, {1, 1, 1, 0}, {2, 191, 2, 0}};
    static const int32_t other[3] = {0, 64, 200}, two_empty[4] = {0, 0, 0, 65}, most_parts[4] = {0, 1, 2, 193};
    static const int32_t first_order[3] = {0, 2, 1}, second_order[2] = {1, 0}, last_order[3] = {2, 0, 1}; /* the longest first */
    fqla_context *context = open_cuda();
    fqla_stream stream = stream_of(primary_context(0));
    fqla_plan_desc desc = plan_desc();
    fqla_plan_summary summary;
    fqla_plan *plan = NULL;
    int before;
    desc.checkpoint_every = 1;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
    CHECK_CALL(table_holds(plan, 3, 5, first, first_order));
    ASSERT_EQ(1, fake.fake_cuda_copies());
    ASSERT_EQ(table_bytes(3, 3), (unsigned int)fake.fake_cuda_copy_at(0).bytes);

    before = fake.fake_cuda_calls();
    ASSERT_EQ(FQLA_OK, fqla_plan_update(plan, 2, other, stream));
    ASSERT_EQ(before + 5, fake.fake_cuda_calls()); /* push, whose stream, capturing, one copy, pop */
    CHECK_CALL(table_holds(plan, 3, 5, first, first_order)); /* ordered on the stream: not yet */
    ASSERT_EQ(FQLA_OK, fqla_synchronize(context, stream));
    CHECK_CALL(table_holds(plan, 2, 4, second, second_order));
    ASSERT_EQ(2, fake.fake_cuda_copies());
    ASSERT_EQ(stream, fake.fake_cuda_copy_at(1).stream);
    ASSERT_EQ(table_bytes(2, 2), (unsigned int)fake.fake_cuda_copy_at(1).bytes);
    fqla_plan_info(plan, &summary);
    ASSERT_EQ(2, summary.num_seqs);
    ASSERT_EQ(4, (int)summary.chunks);
    ASSERT_EQ(3, (int)summary.checkpoints);

    ASSERT_EQ(FQLA_OK, fqla_plan_update(plan, 3, two_empty, stream));
    ASSERT_EQ(FQLA_OK, fqla_synchronize(context, stream));
    CHECK_CALL(table_holds(plan, 3, 2, third, last_order));
    ASSERT_EQ(FQLA_OK, fqla_plan_update(plan, 3, most_parts, stream));
    ASSERT_EQ(FQLA_OK, fqla_synchronize(context, stream));
    CHECK_CALL(table_holds(plan, 3, 5, fourth, last_order));
    fqla_plan_destroy(plan);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

TEST the_table_of_a_padded_plan(void) {
    static const int64_t full[3][4] = {{0, 70, 0, 0}, {70, 70, 2, 0}, {140, 70, 4, 0}};
    static const int64_t ragged[2][4] = {{0, 3, 0, 0}, {70, 64, 1, 0}};
    static const int32_t lengths[3] = {0, 3, 67};
    static const int32_t full_order[3] = {0, 1, 2}, ragged_order[2] = {1, 0};
    fqla_context *context = open_cuda();
    fqla_plan_desc desc = plan_desc();
    fqla_plan *plan = NULL;
    desc.cu_seqlens = NULL;
    desc.padded_len = 70;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
    CHECK_CALL(table_holds(plan, 3, 6, full, full_order));
    ASSERT_EQ(FQLA_OK, fqla_plan_update(plan, 2, lengths, NULL));
    ASSERT_EQ(FQLA_OK, fqla_synchronize(context, NULL));
    CHECK_CALL(table_holds(plan, 2, 2, ragged, ragged_order));
    ASSERT_EQ(FQLA_OK, fqla_plan_update(plan, 3, NULL, NULL));
    ASSERT_EQ(FQLA_OK, fqla_synchronize(context, NULL));
    CHECK_CALL(table_holds(plan, 3, 6, full, full_order));
    fqla_plan_destroy(plan);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* Refused while the stream is captured, also the legacy one, and when the copy fails: then the plan is as before. */
TEST an_update_that_is_refused(void) {
    static const int64_t rows[3][4] = {{0, 130, 0, 0}, {130, 0, 3, 0}, {130, 70, 3, 0}};
    static const int32_t other[2] = {0, 200}, order[3] = {0, 2, 1};
    fqla_context *context = open_cuda();
    fqla_stream stream = stream_of(primary_context(0));
    fqla_plan_desc desc = plan_desc();
    fqla_plan_summary before, after;
    fqla_plan *plan = NULL;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
    memset(&before, 0, sizeof before), memset(&after, 0, sizeof after);
    fqla_plan_info(plan, &before);
    fake.fake_cuda_capture_begin(stream);
    CHECK_CALL(refused(FQLA_ERROR_CAPTURING, fqla_plan_update(plan, 1, other, stream), "is being captured"));
    CHECK_CALL(refused(FQLA_ERROR_CAPTURING, fqla_plan_update(plan, 1, other, NULL), "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT"));
    ASSERT_EQ(1, fake.fake_cuda_capture_end(stream));
    fake.fake_cuda_settings()->fail_call = 4;
    fake.fake_cuda_settings()->fail_result = 700;
    CHECK_CALL(refused(FQLA_ERROR_DRIVER, fqla_plan_update(plan, 1, other, stream),
                       "fqla_plan_update: cuMemcpyHtoDAsync failed: CUDA_ERROR_ILLEGAL_ADDRESS"));
    fqla_plan_info(plan, &after);
    ASSERT_MEM_EQ(&before, &after, sizeof before);
    ASSERT_EQ(FQLA_OK, fqla_synchronize(context, stream));
    CHECK_CALL(table_holds(plan, 3, 5, rows, order));
    fqla_plan_destroy(plan);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* A plan made while another thread captures some stream would end the capture with its allocation; made while the caller's own
   stream per thread is free, it touches no other stream. */
TEST creation_stays_off_the_legacy_stream(void) {
    fqla_context *context = open_cuda();
    fqla_plan_desc desc = plan_desc();
    fqla_plan *plan = NULL;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
    ASSERT_EQ((void *)2, fake.fake_cuda_copy_at(0).stream);
    fqla_plan_destroy(plan);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

TEST what_cuda_does_not_do(void) {
    fqla_context *context = open_cuda();
    fqla_plan_desc desc = plan_desc();
    fqla_plan *plan = NULL;
    const int before = fake.fake_cuda_calls();
    desc.strides.k.head = (int64_t)1 << 39;
    CHECK_CALL(refused(FQLA_ERROR_UNSUPPORTED, fqla_plan_create(context, &desc, &plan), "plan_desc.strides.k is { token"));
    desc = plan_desc();
    desc.heads_v = 65536;
    desc.max_seqs = 8192;
    CHECK_CALL(refused(FQLA_ERROR_UNSUPPORTED, fqla_plan_create(context, &desc, &plan), "max_seqs 8192; with heads_v 65536"));
    desc.max_seqs = SEQS;
    desc.max_tokens = 64 * (8192 - SEQS); /* 8192 chunks */
    CHECK_CALL(refused(FQLA_ERROR_UNSUPPORTED, fqla_plan_create(context, &desc, &plan), "plan_desc.max_tokens is 524096"));
    desc = plan_desc();
    desc.dtype = FQLA_DTYPE_FP32;
    CHECK_CALL(refused(FQLA_ERROR_UNSUPPORTED, fqla_plan_create(context, &desc, &plan), "FP32"));
    desc = plan_desc();
    desc.dim_k = 64;
    CHECK_CALL(refused(FQLA_ERROR_UNSUPPORTED, fqla_plan_create(context, &desc, &plan), "dim_k"));
    desc = plan_desc();
    desc.strides.q.head = 132;
    CHECK_CALL(refused(FQLA_ERROR_MISALIGNED, fqla_plan_create(context, &desc, &plan), "strides.q"));
    ASSERT_EQ(before, fake.fake_cuda_calls());
    desc = plan_desc();
    desc.heads_v = 65536;
    desc.max_tokens = 64 * (8192 - SEQS) - 1; /* 8191 chunks are not too many, but their workspace is */
    CHECK_CALL(refused(FQLA_ERROR_OUT_OF_MEMORY, fqla_plan_create(context, &desc, &plan), "cuMemAlloc failed"));
    ASSERT(plan == NULL);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* By v_split and segment_chunks, forced. */
TEST the_plan_says_what_runs(void) {
    static const struct {
        fqla_dtype dtype;
        int32_t v_split, segment_chunks, segments;
        const char *forward, *schedule;
    } cases[] = {
        {FQLA_DTYPE_FP16, 1, -1, 1, "cuda prepare, forward, fp16 (" FORM ")", "V over 1 block, sequences uncut: "},
        {FQLA_DTYPE_FP16, 2, -1, 1, "cuda prepare, forward_half, fp16 (" FORM ")", "V over 2 blocks, sequences uncut: "},
        {FQLA_DTYPE_BF16, 1, 2, 2, "cuda prepare, states, scan, forward, bf16 (" FORM ")",
         "V over 1 block, segments of 2 chunks: "},
        {FQLA_DTYPE_BF16, 2, 1, 3, "cuda prepare, states, scan, forward_half, bf16 (" FORM ")",
         "V over 2 blocks, segments of 1 chunks: "},
    };
    fqla_context *context = open_cuda();
    size_t i;
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        fqla_plan_desc desc = plan_desc();
        fqla_plan_summary summary;
        fqla_plan *plan = NULL;
        size_t bytes = 1;
        char decode[128];
        desc.dtype = cases[i].dtype;
        desc.v_split = cases[i].v_split;
        desc.segment_chunks = cases[i].segment_chunks;
        snprintf(decode, sizeof decode, "cuda prepare, forward, %s (" FORM "), as sequences of one token; no more than one",
                 cases[i].dtype == FQLA_DTYPE_FP16 ? "fp16" : "bf16");
        ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
        ASSERT_EQ(FQLA_OK, fqla_plan_info(plan, &summary));
        ASSERT_EQ(FQLA_BACKEND_CUDA, summary.backend);
        ASSERT_STR_EQ(cases[i].forward, summary.forward);
        ASSERT_STR_EQ(decode, summary.decode);
        ASSERT(strstr(summary.backward, "none") != NULL);
        ASSERT(strncmp(summary.schedule, cases[i].schedule, strlen(cases[i].schedule)) == 0);
        ASSERT(strstr(summary.schedule, " us by the model") != NULL);
        ASSERT_EQ(cases[i].v_split, summary.v_split);
        ASSERT_EQ(cases[i].segments, summary.segments); /* of the longest sequence */
        ASSERT_EQ(FQLA_OK, fqla_workspace_size(plan, &bytes));
        ASSERT_EQ(bytes, summary.workspace_size);
        ASSERT_EQ(0u, (unsigned int)summary.residuals_size);
        fqla_plan_destroy(plan);
    }
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* Room for every chunk that max_tokens tokens in max_seqs sequences can have, and for a state and a transition of every segment
   that cut sequences can have; the same over updates; the plan's own or none. */
TEST the_size_of_the_workspace(void) {
    static const int32_t other[2] = {0, 5};
    static const struct {
        int32_t padded_len, max_tokens, segment_chunks;
        unsigned int chunks, extra, kept; /* the most of each; kept: segments of cut sequences */
    } cases[] = {
        {0, 447, -1, 6 + 7, 0, 0},
        {70, 0, -1, 7 + 7, 0, 0}, /* 490 tokens */
        {0, 447, 1, 6 + 7, 7, 7 + 7},
        {0, 447, 2, 6 + 7, 3, 3 + 3},
        {0, 64 * 50, 1, 50 + 7, 50, 50 + 7},
        {70, 0, 4, 7 + 7, 2, 2 + 2},
        {0, 447, 8, 6 + 7, 0, 0}, /* nothing is so long */
    };
    fqla_context *context = open_cuda();
    size_t i;
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const size_t prepared = (cases[i].chunks * HEADS_V * sizeof(fqla__prepared_chunk) + 255) / 256 * 256;
        const size_t kept = cases[i].kept * HEADS_V * (sizeof(fqla__kept_state) + sizeof(fqla__kept_transition));
        fqla_plan_desc desc = plan_desc();
        fqla_plan *plan = NULL;
        size_t bytes = 0, after_update = 0, external = 0, table;
        fake_cuda_census before, after;
        desc.max_seqs = 7;
        desc.max_tokens = cases[i].max_tokens;
        desc.padded_len = cases[i].padded_len;
        desc.segment_chunks = cases[i].segment_chunks;
        if (desc.padded_len > 0) desc.cu_seqlens = NULL;
        table = table_bytes(7, 7 + (int)cases[i].extra);
        before = fake.fake_cuda_count();
        ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
        after = fake.fake_cuda_count();
        ASSERT_EQ(FQLA_OK, fqla_workspace_size(plan, &bytes));
        ASSERT_EQ(prepared + kept, bytes);
        ASSERT_EQ(before.allocations + 2, after.allocations); /* the table and the workspace */
        ASSERT_EQ(before.bytes + table + bytes, after.bytes);
        ASSERT_EQ(FQLA_OK, fqla_plan_update(plan, 1, other, NULL));
        ASSERT_EQ(FQLA_OK, fqla_workspace_size(plan, &after_update));
        ASSERT_EQ(bytes, after_update);
        fqla_plan_destroy(plan);
        desc.external_workspace = 1;
        ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
        after = fake.fake_cuda_count();
        ASSERT_EQ(FQLA_OK, fqla_workspace_size(plan, &external));
        ASSERT_EQ(bytes, external);
        ASSERT_EQ(before.allocations + 1, after.allocations);
        ASSERT_EQ(before.bytes + table, after.bytes);
        fqla_plan_destroy(plan);
    }
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

SUITE(plans) {
    SET_SETUP(start, NULL);
    RUN_TEST(the_table_of_a_packed_plan);
    RUN_TEST(the_table_of_a_padded_plan);
    RUN_TEST(an_update_that_is_refused);
    RUN_TEST(creation_stays_off_the_legacy_stream);
    RUN_TEST(what_cuda_does_not_do);
    RUN_TEST(the_plan_says_what_runs);
    RUN_TEST(the_size_of_the_workspace);
}

/* ---- runs */

/* Every field of the parameters, with no choice of the plan's left at its default. The sequences are cut. */
TEST the_launch_of_a_forward(void) {
    fqla_context *context = open_cuda();
    fqla_stream stream = stream_of(primary_context(0));
    void *memory = NULL, *more = NULL;
    fqla_plan_desc desc = plan_desc();
    fqla_plan *plan = NULL;
    fqla_forward_args args;
    fake_cuda_census before, after;
    fqla__forward_params p;
    const size_t state = HEADS_V * 128 * 128 * 2;
    enum { CHUNKS = 300 / 64 + 5, EXTRA = 2, KEPT = 4 }; /* 300 tokens have 2 segments of 2 chunks more than sequences, at most */
    const run_blocks blocks = {.prepare = CHUNKS * HEADS_V / 2, .states = KEPT * HEADS_V * 4, .scan = EXTRA * HEADS_V * 4,
                               .forward = (5 + EXTRA) * HEADS_V};
    char *workspace;
    int calls;
    desc.max_seqs = 5;
    desc.max_tokens = 300;
    desc.v_split = 1;
    desc.segment_chunks = 2;
    desc.warm_up_tolerance = 0.125f;
    desc.dtype = FQLA_DTYPE_FP16;
    desc.state_dtype = FQLA_DTYPE_BF16;
    desc.state_layout = FQLA_STATE_VK;
    desc.head_map = FQLA_HEAD_MAP_MOD;
    desc.gate = FQLA_GATE_RAW;
    desc.beta = FQLA_BETA_SIGMOID;
    desc.negative_eigenvalues = desc.l2norm = 1;
    desc.scale = 0.5f;
    desc.pool_size = 9;
    desc.checkpoint_every = 2;
    desc.strides.q.head = 136, desc.strides.q.token = 400;
    desc.strides.o.head = 300 * 128 + 64, desc.strides.o.token = 128;
    desc.strides.g.token = 7, desc.strides.beta.token = 9, desc.strides.beta.head = 2;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, (size_t)4 << 20, &memory));
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, state * 20 + 4096, &more));
    memset(&args, 0, sizeof args);
    args.q = memory;
    args.k = (char *)memory + 0x40000;
    args.v = (char *)memory + 0x80000;
    args.o = (char *)memory + 0x100000;
    args.g = (char *)memory + 0x180000;
    args.beta = (char *)memory + 0x190000;
    args.A_log = (const float *)((char *)memory + 0x1a0000);
    args.dt_bias = (const float *)((char *)memory + 0x1b0000);
    args.state_in = (const int32_t *)((char *)memory + 0x1c0000);
    args.state_out = (const int32_t *)((char *)memory + 0x1d0000);
    args.bad_index_count = (uint32_t *)((char *)memory + 0x1e0000);
    args.h0 = more;
    args.ht = (char *)more + 9 * state;
    args.checkpoints = (char *)more + 18 * state;

    before = fake.fake_cuda_count();
    calls = fake.fake_cuda_calls();
    ASSERT_EQ(FQLA_OK, fqla_forward(plan, &args, stream));
    ASSERT_EQ(calls + 11, fake.fake_cuda_calls()); /* push, whose stream, four maps, four launches, pop */
    after = fake.fake_cuda_count();
    ASSERT_MEM_EQ(&before, &after, sizeof before);
    ASSERT_EQ(4, fake.fake_cuda_launches());
    CHECK_CALL(run_launched(0, "fp16", blocks, stream, 0));

    p = parameters_of(0);
    CHECK_CALL(map_holds(&p.q, args.q, HEADS_QK, 300, 136, 400, 64, 6));
    CHECK_CALL(map_holds(&p.k, args.k, HEADS_QK, 300, 128, 256, 64, 6));
    CHECK_CALL(map_holds(&p.v, args.v, HEADS_V, 300, 128, 512, 64, 6));
    CHECK_CALL(map_holds(&p.o, args.o, HEADS_V, 300, 300 * 128 + 64, 128, 64, 6));
    ASSERT(p.g == args.g && p.beta == args.beta && p.A_log == args.A_log && p.dt_bias == args.dt_bias);
    ASSERT(p.h0 == args.h0 && p.ht == args.ht && p.snapshots == args.checkpoints);
    ASSERT(p.q_rows == args.q && p.o_rows == args.o);
    ASSERT(p.state_in == args.state_in && p.state_out == args.state_out && p.bad_index_count == args.bad_index_count);
    ASSERT((uintptr_t)p.table == plan->cuda.table);
    workspace = (char *)plan->workspace;
    ASSERT(workspace != NULL && (char *)p.prepared == workspace);
    workspace += (CHUNKS * HEADS_V * sizeof(fqla__prepared_chunk) + 255) / 256 * 256;
    ASSERT((char *)p.states == workspace);
    workspace += KEPT * HEADS_V * sizeof(fqla__kept_state);
    ASSERT((char *)p.transitions == workspace);
    workspace += KEPT * HEADS_V * sizeof(fqla__kept_transition);
    ASSERT(workspace == (char *)plan->workspace + plan->workspace_size);
    ASSERT(p.q_token == 400 && p.q_head == 136);
    ASSERT(p.g_token == 7 && p.g_head == 1 && p.beta_token == 9 && p.beta_head == 2);
    ASSERT(p.o_token == 128 && p.o_head == 300 * 128 + 64);
    ASSERT(p.heads_qk == HEADS_QK && p.heads_v == HEADS_V);
    ASSERT(p.head_map == FQLA_HEAD_MAP_MOD && p.state_layout == FQLA_STATE_VK);
    ASSERT(p.gate == FQLA_GATE_RAW && p.beta_form == FQLA_BETA_SIGMOID);
    ASSERT(p.negative_eigenvalues == 1 && p.l2norm == FQLA__L2NORM_FORWARD && p.state_bf16 == 1);
    ASSERT(p.pool_size == 9 && p.checkpoint_every == 2 && p.decode_tokens == 0 && p.scale == 0.5f);
    ASSERT(p.load_rows == 64 && p.heads_per_block == 2 && p.warm_up_log2 == -3.0f);
    fqla_free(context, memory);
    fqla_free(context, more);
    fqla_plan_destroy(plan);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

TEST the_launch_of_a_decode(void) {
    fqla_context *context = open_cuda();
    fqla_plan_desc desc = plan_desc();
    fqla_plan *plan = NULL;
    fqla_decode_args args;
    fqla__forward_params p;
    void *memory = NULL;
    int calls;
    desc.checkpoint_every = 1;
    desc.v_split = 2;
    desc.segment_chunks = 1; /* both are the forward's alone */
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, args_bytes, &memory));
    args = decode_args_in(memory);
    calls = fake.fake_cuda_calls();
    ASSERT_EQ(FQLA_OK, fqla_decode(plan, &args, NULL));
    ASSERT_EQ(calls + 8, fake.fake_cuda_calls()); /* push, four maps, two launches, pop: the default stream is nobody's */
    ASSERT_EQ(2, fake.fake_cuda_launches());
    CHECK_CALL(run_launched(0, "bf16", usual_decode, NULL, 0)); /* a token is a chunk */
    p = parameters_of(0);
    ASSERT(p.decode_tokens == 1 && p.checkpoint_every == 0 && p.snapshots == NULL && p.h0 == NULL && p.state_bf16 == 0);
    ASSERT(p.load_rows == 1 && p.heads_per_block == 2);
    ASSERT(p.q_rows == args.q && p.q_token == HEADS_QK * 128 && p.q_head == 128 && (void *)p.prepared == plan->workspace);
    CHECK_CALL(map_holds(&p.q, args.q, HEADS_QK, SEQS, 128, 256, 1, 9));
    CHECK_CALL(map_holds(&p.k, args.k, HEADS_QK, SEQS, 128, 256, 1, 9));
    CHECK_CALL(map_holds(&p.v, args.v, HEADS_V, SEQS, 128, 512, 1, 9));
    CHECK_CALL(map_holds(&p.o, args.o, HEADS_V, SEQS, 128, 512, 1, 9));
    args.num_tokens = 2;
    CHECK_CALL(refused(FQLA_ERROR_UNSUPPORTED, fqla_decode(plan, &args, NULL), "num_tokens is over 1"));
    args.num_tokens = 1;
    args.states = args.ht;
    CHECK_CALL(refused(FQLA_ERROR_UNSUPPORTED, fqla_decode(plan, &args, NULL), "states is given"));
    ASSERT_EQ(2, fake.fake_cuda_launches());
    fqla_free(context, memory);
    fqla_plan_destroy(plan);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* A plan of empty sequences alone: maps have a row, for the driver takes none without. */
TEST no_tokens_at_all(void) {
    static const int32_t none[2] = {0, 0};
    static const int64_t row[1][4] = {{0, 0, 0, 0}};
    static const int32_t order[1] = {0};
    fqla_context *context = open_cuda();
    fqla_plan_desc desc = plan_desc();
    fqla_plan *plan = NULL;
    fqla_forward_args args;
    void *memory = NULL;
    desc.num_seqs = 1;
    desc.cu_seqlens = none;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, args_bytes, &memory));
    args = args_in(memory);
    ASSERT_EQ(FQLA_OK, fqla_forward(plan, &args, NULL));
    ASSERT_EQ(2, fake.fake_cuda_launches());
    CHECK_CALL(run_launched(0, "bf16", (run_blocks){.prepare = HEADS_V / 2, .forward = HEADS_V}, NULL, 0));
    CHECK_CALL(table_holds(plan, 1, 0, row, order));
    fqla_free(context, memory);
    fqla_plan_destroy(plan);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* A forward and a decode are captured; the capture is whole, and updates afterwards reach its table without another launch, where
   they cut other sequences too. */
TEST a_run_is_captured(void) {
    static const int32_t other[2] = {0, 5};
    const run_blocks blocks = {.prepare = MAX_CHUNKS * HEADS_V / 2, .states = 4 * HEADS_V * 4, .scan = 2 * HEADS_V * 4,
                               .forward_half = (SEQS + 2) * HEADS_V * 2}; /* 200 tokens: 2 segments of 2 chunks more, at most */
    fqla_context *context = open_cuda();
    fqla_stream stream = stream_of(primary_context(0));
    void *memory = NULL;
    fqla_plan_desc desc = plan_desc();
    fqla_plan *plan = NULL;
    fqla_forward_args args;
    fqla_decode_args decode;
    const fqla__device_table *table;
    const fqla__device_sequence *sequences;
    desc.v_split = desc.segment_chunks = 2;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, args_bytes, &memory));
    args = args_in(memory);
    decode = decode_args_in(memory);
    fake.fake_cuda_capture_begin(stream);
    ASSERT_EQ(FQLA_OK, fqla_forward(plan, &args, stream));
    ASSERT_EQ(FQLA_OK, fqla_decode(plan, &decode, stream));
    ASSERT_EQ(1, fake.fake_cuda_capture_end(stream));
    ASSERT_EQ(6, fake.fake_cuda_launches());
    CHECK_CALL(run_launched(0, "bf16", blocks, stream, 1));
    CHECK_CALL(run_launched(4, "bf16", usual_decode, stream, 1));
    table = parameters_of(0).table;
    sequences = (const fqla__device_sequence *)(table + 1);
    ASSERT(table->num_seqs == SEQS && table->chunks == 5 && table->segments == SEQS + 1 && table->kept == 2);
    ASSERT(sequences[0].kept == 0 && sequences[1].kept == -1 && sequences[2].kept == -1);
    ASSERT_EQ(FQLA_OK, fqla_plan_update(plan, 1, other, stream));
    ASSERT_EQ(FQLA_OK, fqla_synchronize(context, stream));
    ASSERT(table->num_seqs == 1 && table->chunks == 1 && table->segments == 1 && table->kept == 0);
    ASSERT(sequences[0].len == 5 && sequences[0].kept == -1);
    ASSERT_EQ(6, fake.fake_cuda_launches());
    fqla_free(context, memory);
    fqla_plan_destroy(plan);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* Where there are more items the forward's blocks take one after the other. */
TEST no_more_blocks_than_multiprocessors(void) {
    enum { MOST = 40, MULTIPROCESSORS = 132 };
    const run_blocks decode = {.prepare = MOST * HEADS_V / 2, .forward = MULTIPROCESSORS};
    fqla_context *context = open_cuda();
    void *memory = NULL;
    int32_t split;
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, args_bytes + MOST * HEADS_V * 65536, &memory));
    for (split = 1; split <= 2; split++) {
        run_blocks forward = {.prepare = (TOKENS / 64 + MOST) * HEADS_V / 2};
        const fqla_forward_args args = args_in(memory);
        const fqla_decode_args decode_args = decode_args_in(memory);
        const int launches = fake.fake_cuda_launches();
        fqla_plan_desc desc = plan_desc();
        fqla_plan *plan = NULL;
        desc.max_seqs = MOST;
        desc.v_split = split;
        desc.segment_chunks = -1;
        *(split == 1 ? &forward.forward : &forward.forward_half) = MULTIPROCESSORS;
        ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
        ASSERT_EQ(FQLA_OK, fqla_forward(plan, &args, NULL));
        ASSERT_EQ(FQLA_OK, fqla_decode(plan, &decode_args, NULL));
        CHECK_CALL(run_launched(launches, "bf16", forward, NULL, 0));
        CHECK_CALL(run_launched(launches + 2, "bf16", decode, NULL, 0));
        fqla_plan_destroy(plan);
    }
    fqla_free(context, memory);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* A block of kernel prepare serves up to four v-heads of a q/k head, a warp each: a divisor of their number. */
TEST heads_per_block(void) {
    static const int per_ratio[] = {0, 1, 2, 3, 4, 1, 3, 1, 4, 3, 2, 1, 4}; /* by v-heads of a q/k head */
    fqla_context *context = open_cuda();
    void *memory = NULL;
    int ratio, heads_qk;
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, (size_t)64 << 20, &memory));
    for (ratio = 1; ratio < (int)(sizeof per_ratio / sizeof per_ratio[0]); ratio++)
        for (heads_qk = 1; heads_qk <= 3; heads_qk++) {
            const unsigned int heads = (unsigned int)(heads_qk * ratio), per = (unsigned int)per_ratio[ratio];
            const run_blocks forward = {.prepare = MAX_CHUNKS * heads / per, .forward = SEQS * heads};
            const run_blocks decode = {.prepare = SEQS * heads / per, .forward = SEQS * heads};
            const int launches = fake.fake_cuda_launches();
            fqla_plan_desc desc = plan_desc();
            fqla_plan *plan = NULL;
            fqla_forward_args args;
            fqla_decode_args decode_args;
            memset(&args, 0, sizeof args), memset(&decode_args, 0, sizeof decode_args);
            decode_args.q = args.q = memory;
            decode_args.k = args.k = (char *)memory + (8 << 20);
            decode_args.v = args.v = (char *)memory + (16 << 20);
            decode_args.g = args.g = (char *)memory + (32 << 20);
            decode_args.beta = args.beta = (char *)memory + (40 << 20);
            decode_args.o = args.o = (char *)memory + (48 << 20);
            desc.heads_qk = heads_qk;
            desc.heads_v = (int32_t)heads;
            desc.v_split = 1;
            ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
            ASSERT_EQ(FQLA_OK, fqla_forward(plan, &args, NULL));
            ASSERT_EQ(FQLA_OK, fqla_decode(plan, &decode_args, NULL));
            ASSERT_EQ(launches + 4, fake.fake_cuda_launches());
            CHECK_CALL(run_launched(launches, "bf16", forward, NULL, 0));
            CHECK_CALL(run_launched(launches + 2, "bf16", decode, NULL, 0));
            ASSERT_EQ(per_ratio[ratio], parameters_of(launches).heads_per_block);
            ASSERT_EQ(per_ratio[ratio], parameters_of(launches + 2).heads_per_block);
            fqla_plan_destroy(plan);
        }
    fqla_free(context, memory);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* The caller's workspace goes before the plan's own. A plan with neither does not run, nor does one with too few bytes; the driver
   is not asked. */
TEST whose_workspace(void) {
    fqla_context *context = open_cuda();
    fqla_plan_desc desc = plan_desc();
    fqla_plan *plan = NULL;
    fqla_forward_args args;
    fqla_decode_args decode;
    void *memory = NULL, *workspace = NULL;
    size_t bytes = 0;
    int external, calls;
    for (external = 0; external < 2; external++) {
        int launches = fake.fake_cuda_launches();
        desc.external_workspace = external;
        ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
        ASSERT_EQ(FQLA_OK, fqla_workspace_size(plan, &bytes));
        ASSERT_EQ(FQLA_OK, fqla_alloc(context, args_bytes, &memory));
        ASSERT_EQ(FQLA_OK, fqla_alloc(context, bytes, &workspace));
        args = args_in(memory);
        decode = decode_args_in(memory);
        calls = fake.fake_cuda_calls();
        if (external) {
            ASSERT(plan->workspace == NULL);
            CHECK_CALL(refused(FQLA_ERROR_NULL_POINTER, fqla_forward(plan, &args, NULL), "fqla_forward: workspace is NULL"));
            CHECK_CALL(refused(FQLA_ERROR_NULL_POINTER, fqla_decode(plan, &decode, NULL), "fqla_decode: workspace is NULL"));
            ASSERT_EQ(calls, fake.fake_cuda_calls());
        } else {
            ASSERT(plan->workspace != NULL);
            ASSERT_EQ(FQLA_OK, fqla_forward(plan, &args, NULL));
            ASSERT_EQ(FQLA_OK, fqla_decode(plan, &decode, NULL));
            ASSERT((void *)parameters_of(launches).prepared == plan->workspace);
            ASSERT((void *)parameters_of(launches + 2).prepared == plan->workspace);
            launches += 4;
        }
        args.workspace = decode.workspace = workspace;
        args.workspace_size = decode.workspace_size = bytes - 1;
        calls = fake.fake_cuda_calls();
        CHECK_CALL(refused(FQLA_ERROR_WORKSPACE_TOO_SMALL, fqla_forward(plan, &args, NULL), "fqla_forward: workspace_size is"));
        CHECK_CALL(refused(FQLA_ERROR_WORKSPACE_TOO_SMALL, fqla_decode(plan, &decode, NULL), "fqla_decode: workspace_size is"));
        args.workspace = (char *)workspace + 128;
        args.workspace_size = decode.workspace_size = bytes;
        CHECK_CALL(refused(FQLA_ERROR_MISALIGNED, fqla_forward(plan, &args, NULL), "workspace"));
        args.workspace = args.ht;
        CHECK_CALL(refused(FQLA_ERROR_OVERLAP, fqla_forward(plan, &args, NULL), "workspace"));
        ASSERT_EQ(calls, fake.fake_cuda_calls());
        ASSERT_EQ(launches, fake.fake_cuda_launches());
        args.workspace = workspace;
        ASSERT_EQ(FQLA_OK, fqla_forward(plan, &args, NULL));
        ASSERT_EQ(FQLA_OK, fqla_decode(plan, &decode, NULL));
        ASSERT_EQ(launches + 4, fake.fake_cuda_launches());
        CHECK_CALL(run_launched(launches, "bf16", usual_forward, NULL, 0));
        CHECK_CALL(run_launched(launches + 2, "bf16", usual_decode, NULL, 0));
        ASSERT((void *)parameters_of(launches).prepared == workspace);
        ASSERT((void *)parameters_of(launches + 2).prepared == workspace);
        fqla_free(context, workspace);
        fqla_free(context, memory);
        fqla_plan_destroy(plan);
    }
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* Bad arguments never reach the driver. */
TEST bad_arguments(void) {
    fqla_context *context = open_cuda();
    fqla_plan_desc desc = plan_desc();
    fqla_plan *plan = NULL;
    fqla_forward_args args;
    fqla_backward_args backward;
    void *memory = NULL;
    int calls;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, args_bytes, &memory));
    calls = fake.fake_cuda_calls();
    args = args_in(memory);
    args.q = (const char *)args.q + 8;
    CHECK_CALL(refused(FQLA_ERROR_MISALIGNED, fqla_forward(plan, &args, NULL), "q is"));
    args = args_in(memory);
    args.beta = NULL;
    CHECK_CALL(refused(FQLA_ERROR_NULL_POINTER, fqla_forward(plan, &args, NULL), "beta"));
    args = args_in(memory);
    args.o = (void *)(uintptr_t)args.v;
    CHECK_CALL(refused(FQLA_ERROR_OVERLAP, fqla_forward(plan, &args, NULL), "overlaps"));
    memset(&backward, 0, sizeof backward);
    CHECK_CALL(refused(FQLA_ERROR_UNSUPPORTED, fqla_backward(plan, &backward, NULL), "backward"));
    ASSERT_EQ(calls, fake.fake_cuda_calls());
    fqla_free(context, memory);
    fqla_plan_destroy(plan);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

SUITE(runs) {
    SET_SETUP(start, NULL);
    RUN_TEST(the_launch_of_a_forward);
    RUN_TEST(the_launch_of_a_decode);
    RUN_TEST(no_tokens_at_all);
    RUN_TEST(a_run_is_captured);
    RUN_TEST(no_more_blocks_than_multiprocessors);
    RUN_TEST(heads_per_block);
    RUN_TEST(whose_workspace);
    RUN_TEST(bad_arguments);
}

/* ---- every driver call fails */

/* A plan whose forward has all four launches: it may cut sequences. */
static fqla_plan_desc cutting_plan_desc(void) {
    fqla_plan_desc desc = plan_desc();
    desc.segment_chunks = 2;
    return desc;
}

/* A life from context to context. Stops at the first failure, cleans up and returns it. *launched: launches before the clean-up. */
static fqla_status live(const fqla_context_desc *desc, int *launched) {
    static const int32_t other[3] = {0, 10, 20};
    const fqla_plan_desc plan_as = cutting_plan_desc();
    fqla_context *context = NULL;
    fqla_plan *plan = NULL;
    fqla_forward_args args;
    fqla_decode_args decode;
    fqla_stream stream = NULL;
    void *memory = NULL;
    char bytes[64] = {0};
    fqla_status status = fqla_context_create(desc, &context), last;
    if (status == FQLA_OK) {
        stream = stream_of(desc->cuda_context != NULL ? desc->cuda_context : primary_context(0));
        status = fqla_alloc(context, args_bytes, &memory);
    }
    if (status == FQLA_OK) {
        args = args_in(memory);
        decode = decode_args_in(memory);
        status = fqla_upload(context, memory, bytes, sizeof bytes, stream);
    }
    if (status == FQLA_OK) status = fqla_plan_create(context, &plan_as, &plan);
    if (status == FQLA_OK) status = fqla_forward(plan, &args, stream);
    if (status == FQLA_OK) status = fqla_plan_update(plan, 2, other, stream);
    if (status == FQLA_OK) status = fqla_decode(plan, &decode, NULL);
    if (status == FQLA_OK) status = fqla_synchronize(context, stream);
    if (status == FQLA_OK) status = fqla_download(context, bytes, memory, sizeof bytes, NULL);
    *launched = fake.fake_cuda_launches();
    fqla_plan_destroy(plan);
    last = memory != NULL ? fqla_free(context, memory) : FQLA_OK;
    if (status == FQLA_OK) status = last;
    if (stream != NULL) fake.fake_cuda_stream_destroy(stream);
    last = fqla_context_destroy(context);
    return status != FQLA_OK ? status : last;
}

static enum greatest_test_res every_call_fails(int borrow, int result, const char *result_name, fqla_status expected) {
    fqla_context_desc desc = desc_of(FQLA_BACKEND_CUDA);
    static const char *const kernels[] = {"prepare_bf16", "states_bf16", "scan", "forward_half_bf16",
                                          "prepare_bf16", "forward_bf16"}; /* of the forward, of the decode */
    int n, i, launched, parts = 0, hit = 1;
    for (n = 1; hit; n++) {
        char words[128];
        const char *name;
        fqla_status status;
        start(NULL);
        if (borrow) desc.cuda_context = new_context();
        fake.fake_cuda_settings()->fail_call = n;
        fake.fake_cuda_settings()->fail_result = result;
        status = live(&desc, &launched);
        name = failed_call();
        hit = name[0] != '\0';
        snprintf(words, sizeof words, "%s failed: %s", name, result_name);
        CHECK_CALL(failure_is_told(name, words, expected, status));
        ASSERT_EQm(name, launched, fake.fake_cuda_launches());
        for (i = 0; i < launched; i++) ASSERT_STR_EQ(kernels[i], fake.fake_cuda_launch_at(i).kernel);
        if (launched % 4 != 0 && launched < 6) { /* a run's later launch failed; those before it write the workspace alone */
            ASSERT_STR_EQ("cuLaunchKernelEx", name);
            parts++;
        }
        /* a context that cannot be entered has ended, and took along what was in it; here it still has to */
        if (borrow && strcmp(name, "cuCtxPushCurrent") == 0) fake.fake_cuda_context_destroy(desc.cuda_context);
        CHECK_CALL(clean());
        if (borrow) fake.fake_cuda_context_destroy(desc.cuda_context);
    }
    ASSERT(n > 60);
    ASSERT_EQ(3 + 1, parts); /* of the forward and of the decode */
    return clean();
}

static const char illegal_address[] = "CUDA_ERROR_ILLEGAL_ADDRESS (an illegal memory access was encountered)";

TEST every_call_fails_on_the_primary_context(void) {
    CHECK_CALL(every_call_fails(0, 700, illegal_address, FQLA_ERROR_DRIVER));
    CHECK_CALL(every_call_fails(0, 2, "CUDA_ERROR_OUT_OF_MEMORY (out of memory)", FQLA_ERROR_OUT_OF_MEMORY));
    return every_call_fails(0, 4711, "unknown error 4711", FQLA_ERROR_DRIVER);
}

TEST every_call_fails_on_a_borrowed_context(void) {
    return every_call_fails(1, 700, illegal_address, FQLA_ERROR_DRIVER);
}

/* Under AUTO whatever fails while the context opens is the reason for the CPU; only memory that ran out is a failure. */
TEST every_call_fails_under_auto(void) {
    fqla_context_desc desc = desc_of(FQLA_BACKEND_AUTO);
    int n, hit = 1;
    for (n = 1; hit; n++) {
        fqla_context_summary summary;
        fqla_context *context = NULL;
        const char *name;
        start(NULL);
        fake.fake_cuda_settings()->fail_call = n;
        fake.fake_cuda_settings()->fail_result = 700;
        ASSERT_EQ(FQLA_OK, fqla_context_create(&desc, &context));
        fake.fake_cuda_settings()->fail_call = 0;
        name = failed_call();
        hit = name[0] != '\0';
        summary = summary_of(context);
        if (summary.backend == FQLA_BACKEND_CPU) {
            ASSERTm(name, strstr(summary.cuda_status, name) != NULL);
            ASSERT_STR_EQ("", summary.kernel_form);
            ASSERT_EQ(census_before.modules, fake.fake_cuda_count().modules);
            ASSERT_EQ(census_before.retains, fake.fake_cuda_count().retains);
        } else {
            ASSERT_STR_EQ("ready", summary.cuda_status);
            ASSERTm(name, !hit || is_one_of(name, noted) || is_one_of(name, loading));
        }
        ASSERT_EQ(0, host.errors);
        ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
        CHECK_CALL(clean());
    }
    ASSERT(n > 10);
    PASS();
}

/* Each entry point on objects that live on: fails at each of its calls, and works the next time. A run that fails has launched
   nothing, but for one of whose launches a later one fails: the last, which alone writes outputs, is not there. */
TEST a_later_call_works(void) {
    enum { FIRST_LAUNCH = 7 }; /* a run's calls: push, whose stream, four maps, launches, pop */
    enum { ALLOC, UPLOAD, DOWNLOAD, WAIT, PLAN, UPDATE, FORWARD, DECODE, ENTRY_POINTS };
    fqla_context *context = open_cuda();
    fqla_stream stream = stream_of(primary_context(0));
    void *memory = NULL;
    const fqla_plan_desc desc = cutting_plan_desc();
    fqla_plan *plan = NULL;
    fqla_forward_args args;
    fqla_decode_args decode;
    char bytes[64] = {0};
    int entry, n, again;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, args_bytes, &memory));
    args = args_in(memory);
    decode = decode_args_in(memory);
    for (entry = 0; entry < ENTRY_POINTS; entry++) {
        const fake_cuda_census before = fake.fake_cuda_count();
        const int run_launches = entry == FORWARD ? 4 : 2;
        int hit = 1;
        for (n = 1; hit; n++)
            for (again = 0; again < 2; again++) {
                const int launches = fake.fake_cuda_launches(), copies = fake.fake_cuda_copies();
                fqla_status status = FQLA_OK;
                fake_cuda_census after;
                fqla_plan *made_plan = NULL;
                void *made = NULL;
                fake.fake_cuda_settings()->fail_call = again ? 0 : n;
                fake.fake_cuda_settings()->fail_result = 700;
                switch (entry) {
                case ALLOC: status = fqla_alloc(context, 100, &made); break;
                case UPLOAD: status = fqla_upload(context, memory, bytes, sizeof bytes, stream); break;
                case DOWNLOAD: status = fqla_download(context, bytes, memory, sizeof bytes, stream); break;
                case WAIT: status = fqla_synchronize(context, stream); break;
                case PLAN: status = fqla_plan_create(context, &desc, &made_plan); break;
                case UPDATE: status = fqla_plan_update(plan, SEQS, cu_seqlens, stream); break;
                case FORWARD: status = fqla_forward(plan, &args, stream); break;
                default: status = fqla_decode(plan, &decode, stream); break;
                }
                if (fake.fake_cuda_settings()->fail_call > 0) hit = 0; /* n is more than it has calls */
                fake.fake_cuda_settings()->fail_call = 0;
                if (again || !hit) ASSERT_EQ(FQLA_OK, status);
                if (status != FQLA_OK) {
                    const int part = entry >= FORWARD && n > FIRST_LAUNCH ? n - FIRST_LAUNCH : 0;
                    ASSERT_EQ(FQLA_ERROR_DRIVER, status);
                    ASSERT_EQ(launches + part, fake.fake_cuda_launches());
                    ASSERT(part < run_launches);
                    ASSERT(entry < FORWARD || (strcmp(failed_call(), "cuLaunchKernelEx") == 0) == (n >= FIRST_LAUNCH));
                    ASSERT(made == NULL && made_plan == NULL);
                } else if (entry >= FORWARD) {
                    ASSERT_EQ(launches + run_launches, fake.fake_cuda_launches());
                } else if (entry == UPDATE) {
                    ASSERT_EQ(copies + 1, fake.fake_cuda_copies());
                }
                fqla_plan_destroy(made_plan);
                if (made != NULL) ASSERT_EQ(FQLA_OK, fqla_free(context, made));
                after = fake.fake_cuda_count();
                ASSERT_MEM_EQ(&before, &after, sizeof before);
            }
        ASSERT(n > 3);
    }
    fqla_plan_destroy(plan);
    ASSERT_EQ(FQLA_OK, fqla_free(context, memory));
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

SUITE(failures) {
    SET_SETUP(start, NULL);
    RUN_TEST(every_call_fails_on_the_primary_context);
    RUN_TEST(every_call_fails_on_a_borrowed_context);
    RUN_TEST(every_call_fails_under_auto);
    RUN_TEST(a_later_call_works);
}

/* ---- threads */

enum { THREADS = 4, ROUNDS = 50 };

typedef struct worker {
    fqla_context *context;
    fqla_plan *shared; /* run by all, each with a workspace of its own */
    fqla_cuda_context current;
    fqla_stream stream;
    int failures;
} worker;

static FLASHQLA__THREAD_RETURN work(void *argument) {
    worker *w = (worker *)argument;
    const fqla_plan_desc desc = plan_desc();
    int i;
    fake.fake_cuda_push(w->current);
    for (i = 0; i < ROUNDS; i++) {
        fqla_forward_args args;
        fqla_plan *plan = NULL;
        void *memory = NULL, *workspace = NULL;
        size_t bytes = 0;
        char sent = (char)i, got = 0;
        w->failures += fqla_alloc(w->context, args_bytes, &memory) != FQLA_OK;
        w->failures += fqla_workspace_size(w->shared, &bytes) != FQLA_OK;
        w->failures += fqla_alloc(w->context, bytes, &workspace) != FQLA_OK;
        args = args_in(memory);
        w->failures += fqla_plan_create(w->context, &desc, &plan) != FQLA_OK;
        w->failures += fqla_upload(w->context, memory, &sent, 1, w->stream) != FQLA_OK;
        w->failures += fqla_forward(plan, &args, w->stream) != FQLA_OK;
        args.workspace = workspace;
        args.workspace_size = bytes;
        w->failures += fqla_forward(w->shared, &args, w->stream) != FQLA_OK;
        w->failures += fqla_download(w->context, &got, memory, 1, w->stream) != FQLA_OK;
        w->failures += got != sent || fake.fake_cuda_current() != w->current;
        fqla_plan_destroy(plan);
        w->failures += fqla_free(w->context, workspace) != FQLA_OK;
        w->failures += fqla_free(w->context, memory) != FQLA_OK;
    }
    fake.fake_cuda_pop();
    w->failures += fake.fake_cuda_count().stack;
    return 0;
}

TEST threads_share_a_context(void) {
    fqla_context_desc desc = desc_of(FQLA_BACKEND_CUDA);
    fqla_plan_desc plan_as = plan_desc();
    fqla__thread threads[THREADS];
    worker workers[THREADS];
    fqla_context *context = NULL;
    fqla_plan *shared = NULL;
    fqla_cuda_context other = new_context();
    int i;
    desc.alloc = NULL; /* the counting one and the logger are for one thread */
    desc.free = NULL;
    desc.log = NULL;
    ASSERT_EQ(FQLA_OK, fqla_context_create(&desc, &context));
    plan_as.external_workspace = 1;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &plan_as, &shared));
    for (i = 0; i < THREADS; i++) {
        workers[i].context = context;
        workers[i].shared = shared;
        workers[i].current = other;
        workers[i].stream = stream_of(primary_context(0));
        workers[i].failures = 0;
        ASSERT(fqla__thread_start(&threads[i], work, &workers[i]));
    }
    for (i = 0; i < THREADS; i++) fqla__thread_join(threads[i]);
    for (i = 0; i < THREADS; i++) ASSERT_EQ(0, workers[i].failures);
    ASSERT_EQ(2 * 2 * THREADS * ROUNDS, fake.fake_cuda_launches());
    fqla_plan_destroy(shared);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    fake.fake_cuda_context_destroy(other);
    return clean();
}

SUITE(threads) {
    SET_SETUP(start, NULL);
    RUN_TEST(threads_share_a_context);
}

GREATEST_MAIN_DEFS();

int main(int argc, char **argv) {
    if (!find_fake()) {
        fprintf(stderr, "test_cuda_host: " FIRST_LIBRARY " is not the fake driver; LD_LIBRARY_PATH leads to it\n");
        return 2;
    }
    GREATEST_MAIN_BEGIN();
    RUN_SUITE(opening);
    RUN_SUITE(memory);
    RUN_SUITE(plans);
    RUN_SUITE(runs);
    RUN_SUITE(failures);
    RUN_SUITE(threads);
    GREATEST_MAIN_END();
}
