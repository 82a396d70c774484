/* Contexts, memory and plans as they should work: names, defaults, summaries, updates. What is refused is in test_bad_input.c. */
#include "case.h"
#include "greatest.h"

TEST status_texts(void) {
    int status, other;
    for (status = 0; status < FQLA_STATUS_COUNT; status++) {
        const char *name = fqla_status_name((fqla_status)status), *sentence = fqla_status_string((fqla_status)status);
        ASSERT(strncmp(name, status == 0 ? "FQLA_OK" : "FQLA_ERROR_", 7) == 0 && sentence[0] != '\0');
        for (other = 0; other < status; other++) {
            ASSERT(strcmp(name, fqla_status_name((fqla_status)other)) != 0);
            ASSERT(strcmp(sentence, fqla_status_string((fqla_status)other)) != 0);
        }
    }
    ASSERT_STR_EQ("FQLA_OK", fqla_status_name(FQLA_OK));
    ASSERT_STR_EQ("success", fqla_status_string(FQLA_OK));
    ASSERT(fqla_status_name(FQLA_STATUS_COUNT)[0] != '\0' && fqla_status_string(FQLA_STATUS_COUNT)[0] != '\0');
    ASSERT(fqla_status_name((fqla_status)999)[0] != '\0' && fqla_status_string((fqla_status)-1)[0] != '\0');
    PASS();
}

TEST context_info(void) {
    static test_host host;
    fqla_context *context = test_open(&host, 3);
    fqla_context_summary summary;
    memset(&summary, 0xff, sizeof summary);
    ASSERT_EQ(FQLA_OK, fqla_context_info(context, &summary));
    ASSERT_EQ(test_backend, summary.backend);
    ASSERT(summary.cpu_level >= FQLA_CPU_PLAIN && summary.cpu_level <= FQLA_CPU_AVX512);
    if (test_on_cuda()) {
        ASSERT_EQ(1, summary.num_threads);
        ASSERT_STR_EQ("ready", summary.cuda_status);
        ASSERT_EQ(90, summary.compute_capability);
        ASSERT(summary.sm_count > 0 && summary.driver_version >= 12000 && summary.device_name[0] != '\0');
        ASSERT(strcmp(summary.kernel_form, "cubin") == 0 || strcmp(summary.kernel_form, "ptx") == 0);
        printf("\n%s, driver %d, kernels as %s\n", summary.device_name, (int)summary.driver_version, summary.kernel_form);
    } else {
        ASSERT_EQ(3, summary.num_threads);
        ASSERT(summary.cuda_status[0] != '\0'); /* why not */
        ASSERT_STR_EQ("", summary.device_name);
        ASSERT_STR_EQ("", summary.kernel_form);
        ASSERT_EQ(0, summary.compute_capability);
    }
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    ASSERT_EQ(0, atomic_load(&host.live));
    PASS();
}

/* The desc of zeros: malloc, no logger, whatever backend there is. It runs. */
TEST default_context(void) {
    fqla_context *context = NULL;
    fqla_context_summary summary;
    const fqla_context_desc desc = { .backend = FQLA_BACKEND_AUTO };
    void *memory = NULL;
    ASSERT_EQ(FQLA_OK, fqla_context_create(&desc, &context));
    ASSERT_EQ(FQLA_OK, fqla_context_info(context, &summary));
    ASSERT(summary.backend == FQLA_BACKEND_CPU || summary.backend == FQLA_BACKEND_CUDA);
    ASSERT(summary.num_threads >= 1 && summary.cuda_status[0] != '\0');
    ASSERT_EQ(FQLA_ERROR_INVALID_SIZE, fqla_alloc(context, 0, &memory)); /* nobody listens: no crash */
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    PASS();
}

/* A CPU context does not touch the driver; a CUDA one where there is none says why. */
TEST backend_by_name(void) {
    static test_host host;
    fqla_context *context = NULL;
    fqla_context_desc desc = test_desc(&host);
    fqla_context_summary summary;
    desc.backend = FQLA_BACKEND_CPU;
    desc.num_threads = 1;
    ASSERT_EQ(FQLA_OK, fqla_context_create(&desc, &context));
    ASSERT_EQ(FQLA_OK, fqla_context_info(context, &summary));
    ASSERT_EQ(FQLA_BACKEND_CPU, summary.backend);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    ASSERT_EQ(0, atomic_load(&host.live));
    PASS();
}

TEST memory(void) {
    enum { BYTES = 1000 };
    fqla_context *context = test_shared();
    unsigned char out[BYTES], back[BYTES];
    void *memory = NULL, *other = NULL;
    int i;
    for (i = 0; i < BYTES; i++) out[i] = (unsigned char)(i * 7);
    memset(back, 0, sizeof back);
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, BYTES, &memory));
    ASSERT_EQ(FQLA_OK, fqla_alloc(context, 1, &other));
    ASSERT_EQ(0, (int)((uintptr_t)memory % 256));
    ASSERT_EQ(0, (int)((uintptr_t)other % 256));
    ASSERT_EQ(FQLA_OK, fqla_upload(context, memory, out, BYTES, NULL));
    ASSERT_EQ(FQLA_OK, fqla_download(context, back, memory, BYTES, NULL));
    ASSERT_MEM_EQ(out, back, BYTES);
    memset(out, 3, 10); /* a part, at an odd place */
    ASSERT_EQ(FQLA_OK, fqla_upload(context, (char *)memory + 333, out, 10, NULL));
    ASSERT_EQ(FQLA_OK, fqla_download(context, back, (char *)memory + 333, 10, NULL));
    ASSERT_MEM_EQ(out, back, 10);
    ASSERT_EQ(FQLA_OK, fqla_upload(context, NULL, NULL, 0, NULL));
    ASSERT_EQ(FQLA_OK, fqla_synchronize(context, NULL));
    ASSERT_EQ(FQLA_OK, fqla_free(context, memory));
    ASSERT_EQ(FQLA_OK, fqla_free(context, other));
    PASS();
}

TEST plan_info(void) {
    static const int32_t cu[5] = { 0, 64, 64, 265, 266 }, other[3] = { 0, 128, 129 };
    fqla_plan_desc desc = { .heads_qk = 2, .heads_v = 4, .num_seqs = 4, .cu_seqlens = cu, .checkpoint_every = 1,
                            .max_tokens = 300 };
    fqla_plan *plan = NULL;
    fqla_plan_summary summary;
    size_t bytes = 1, residuals = 1, after;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(test_shared(), &desc, &plan));
    ASSERT_EQ(FQLA_OK, fqla_plan_info(plan, &summary));
    ASSERT_EQ(test_backend, summary.backend);
    ASSERT_EQ(4, summary.num_seqs);
    ASSERT_EQ(266, summary.tokens);
    ASSERT_EQ(1 + 0 + 4 + 1, summary.chunks);
    ASSERT_EQ(1 + 0 + 3 + 0, summary.checkpoints);
    ASSERT(summary.v_split >= 1 && summary.segments >= 1);
    ASSERT(summary.forward[0] != '\0' && summary.backward[0] != '\0' && summary.decode[0] != '\0' && summary.schedule[0] != '\0');
    ASSERT_EQ(FQLA_OK, fqla_workspace_size(plan, &bytes));
    ASSERT_EQ(FQLA_OK, fqla_residuals_size(plan, &residuals));
    ASSERT_EQ(summary.workspace_size, bytes);
    ASSERT_EQ(summary.residuals_size, residuals);
    ASSERT_EQ(FQLA_OK, fqla_plan_update(plan, 2, other, NULL));
    ASSERT_EQ(FQLA_OK, fqla_plan_info(plan, &summary));
    ASSERT_EQ(2, summary.num_seqs);
    ASSERT_EQ(129, summary.tokens);
    ASSERT_EQ(3, summary.chunks);
    ASSERT_EQ(2, summary.checkpoints);
    ASSERT_EQ(FQLA_OK, fqla_workspace_size(plan, &after));
    ASSERT_EQ(bytes, after); /* constant over updates */
    fqla_plan_destroy(plan);
    PASS();
}

TEST padded_plan_info(void) {
    static const int32_t cu[4] = { 0, 3, 3, 68 };
    fqla_plan_desc desc = { .heads_qk = 1, .heads_v = 1, .num_seqs = 3, .padded_len = 70, .max_seqs = 5 };
    fqla_plan *plan = NULL;
    fqla_plan_summary summary;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(test_shared(), &desc, &plan)); /* no cu_seqlens: all full */
    ASSERT_EQ(FQLA_OK, fqla_plan_info(plan, &summary));
    ASSERT_EQ(210, summary.tokens);
    ASSERT_EQ(6, summary.chunks);
    ASSERT_EQ(FQLA_OK, fqla_plan_update(plan, 3, cu, NULL));
    ASSERT_EQ(FQLA_OK, fqla_plan_info(plan, &summary));
    ASSERT_EQ(68, summary.tokens);
    ASSERT_EQ(3, summary.chunks);
    ASSERT_EQ(FQLA_OK, fqla_plan_update(plan, 5, NULL, NULL));
    ASSERT_EQ(FQLA_OK, fqla_plan_info(plan, &summary));
    ASSERT_EQ(350, summary.tokens);
    fqla_plan_destroy(plan);
    PASS();
}

/* A forced schedule is told; the CPU has none to force, and takes the fields all the same: one desc for both. */
TEST forced_schedule_info(void) {
    static const int32_t cu[4] = { 0, 64, 64, 265 }, other[3] = { 0, 128, 129 };
    fqla_plan_desc desc = { .heads_qk = 2, .heads_v = 4, .num_seqs = 3, .cu_seqlens = cu, .segment_chunks = 1,
                            .warm_up_tolerance = 0.5f };
    fqla_plan_summary summary;
    for (desc.v_split = 1; desc.v_split <= 2; desc.v_split++) {
        fqla_plan *plan = NULL;
        ASSERT_EQ(FQLA_OK, fqla_plan_create(test_shared(), &desc, &plan));
        ASSERT_EQ(FQLA_OK, fqla_plan_info(plan, &summary));
        ASSERT_EQ(test_on_cuda() ? desc.v_split : 1, summary.v_split);
        ASSERT_EQ(test_on_cuda() ? 4 : 1, summary.segments); /* of the longest sequence */
        ASSERT_EQ(FQLA_OK, fqla_plan_update(plan, 2, other, NULL));
        ASSERT_EQ(FQLA_OK, fqla_plan_info(plan, &summary));
        ASSERT_EQ(test_on_cuda() ? desc.v_split : 1, summary.v_split);
        ASSERT_EQ(test_on_cuda() ? 2 : 1, summary.segments);
        fqla_plan_destroy(plan);
    }
    PASS();
}

/* The desc's array need not outlive the call. */
TEST desc_is_copied(void) {
    static test_case c;
    const case_spec spec = { .name = "copied", .plan = { .heads_v = 2, .num_seqs = 2 }, .lens = { 66, 4 }, .seed = 4 };
    int32_t kept[3];
    ASSERT_EQ(FQLA_OK, case_open(&c, test_shared(), &test_shared_host, &spec));
    memcpy(kept, c.cu_seqlens, sizeof kept);
    memset(c.cu_seqlens, 0xff, sizeof kept);
    memset(&c.desc.strides, 0x7f, sizeof c.desc.strides);
    ASSERT_EQ(FQLA_OK, case_run(&c));
    memcpy(c.cu_seqlens, kept, sizeof kept);
    ASSERT_SILENT(case_compare(&c));
    case_close(&c);
    PASS();
}

/* A run of both: right, and with the same bits. */
static enum greatest_test_res run_alike(test_case *c, test_case *fresh, bool backward) {
    int name;
    ASSERT_EQ(FQLA_OK, backward ? case_run_backward(c) : case_run(c));
    ASSERT_SILENT(backward ? case_compare_backward(c) : case_compare(c));
    ASSERT_EQ(FQLA_OK, backward ? case_run_backward(fresh) : case_run(fresh));
    for (name = 0; name < T_WORKSPACE; name++) {
        ASSERT_EQ(fresh->buffers[name].size, c->buffers[name].size);
        if (c->buffers[name].size > 0) ASSERT_MEM_EQ(fresh->buffers[name].after, c->buffers[name].after, c->buffers[name].size);
    }
    PASS();
}

/* After an update: right, and with the bits of a fresh plan of the same maxima. */
TEST update(const case_spec *spec) {
    static const struct { int32_t num_seqs, lens[12]; } steps[] = { { 1, { 1 } }, { 4, { 0, 65, 3, 64 } }, { 2, { 0, 0 } },
                                                                    { 3, { 64, 64, 64 } },
                                                                    { 1, { 200 } }, { 4, { 50, 50, 50, 50 } } };
    static test_case c, fresh;
    size_t i;
    ASSERT_EQ(FQLA_OK, case_open(&c, test_shared(), &test_shared_host, spec));
    for (i = 0; i < sizeof steps / sizeof steps[0]; i++) {
        case_spec again = *spec;
        int name;
        int32_t lens[12];
        memcpy(lens, steps[i].lens, sizeof lens);
        for (name = 0; name < 12; name++)
            if (spec->plan.padded_len > 0 && lens[name] > spec->plan.padded_len) lens[name] = spec->plan.padded_len;
        ASSERT_EQ(FQLA_OK, case_relength(&c, steps[i].num_seqs, lens));
        again.plan.num_seqs = steps[i].num_seqs;
        memcpy(again.lens, lens, sizeof lens);
        ASSERT_EQ(FQLA_OK, case_open(&fresh, test_shared(), &test_shared_host, &again));
        CHECK_CALL(run_alike(&c, &fresh, false));
        if (spec->plan.backward) CHECK_CALL(run_alike(&c, &fresh, true));
        case_close(&fresh);
    }
    case_close(&c);
    PASS();
}

static const case_spec updates[] = {
    { .name = "packed", .plan = { .heads_v = 2, .num_seqs = 2, .max_seqs = 4, .max_tokens = 200 }, .lens = { 20, 7 }, .seed = 1 },
    { .name = "padded", .plan = { .heads_v = 2, .num_seqs = 2, .max_seqs = 4, .padded_len = 70 }, .lens = { 20, 7 }, .seed = 2 },
    { .name = "checkpoints", .plan = { .heads_v = 2, .num_seqs = 2, .max_seqs = 4, .max_tokens = 200, .checkpoint_every = 1 },
      .lens = { 20, 7 }, .seed = 3 },
    { .name = "pool", .plan = { .heads_v = 2, .num_seqs = 2, .max_seqs = 4, .max_tokens = 200, .pool_size = 9 }, .lens = { 20, 7 },
      .in_place = true, .seed = 4 },
    { .name = "decode", .plan = { .heads_v = 2, .num_seqs = 2, .max_seqs = 4, .max_tokens = 200 }, .lens = { 20, 7 },
      .decode_tokens = 1, .seed = 5 },
    { .name = "mixed_gates", .plan = { .heads_v = 4, .num_seqs = 4, .max_seqs = 4, .max_tokens = 200 }, .lens = { 50 },
      .gates = GATES_MIXED, .seed = 6 },
    { .name = "backward", .plan = { .heads_v = 2, .num_seqs = 2, .max_seqs = 4, .max_tokens = 200, .backward = 1 },
      .lens = { 20, 7 }, .seed = 7 },
    { .name = "backward_residuals", .plan = { .heads_qk = 1, .heads_v = 2, .num_seqs = 2, .max_seqs = 4, .padded_len = 130,
                                              .gate = FQLA_GATE_RAW, .backward = 1 },
      .lens = { 20, 7 }, .residuals = true, .seed = 8 },
};

SUITE(api) {
    size_t i;
    RUN_TEST(status_texts);
    RUN_TEST(context_info);
    RUN_TEST(default_context);
    RUN_TEST(backend_by_name);
    RUN_TEST(memory);
    RUN_TEST(plan_info);
    RUN_TEST(padded_plan_info);
    RUN_TEST(forced_schedule_info);
    RUN_TEST(desc_is_copied);
    for (i = 0; i < sizeof updates / sizeof updates[0]; i++) {
        greatest_set_test_suffix(updates[i].name);
        RUN_TESTp(update, &updates[i]);
    }
}
