/* flashqla info: what this machine can run, and why not. */
#include "command.h"

#include <stdio.h>
#include <string.h>

static const char usage[] =
    "usage: flashqla info [options]\n"
    "\n"
    "Prints what this machine can run, and why not: the CPU's vector instructions, the GPU and its driver, and the code that a\n"
    "plan would run. Exit 0, or 1 where the backend that --backend names cannot run.\n"
    "\n"
    COMMON_OPTIONS;

static const char *const cpu_levels[] = { "", "plain C", "AVX2 and FMA", "AVX-512" };

/* What plans of a usual model run: 16/32 heads of 128, one sequence of 8192 tokens. */
static void print_code(library *lib) {
    static const int32_t cu_seqlens[2] = { 0, 8192 };
    fqla_plan_desc desc;
    fqla_plan *plan;
    fqla_plan_summary summary;
    memset(&desc, 0, sizeof desc);
    desc.heads_qk = 16;
    desc.heads_v = 32;
    desc.num_seqs = 1;
    desc.cu_seqlens = cu_seqlens;
    desc.external_workspace = 1;
    desc.backward = 1;
    if (fqla_plan_create(lib->context, &desc, &plan) != FQLA_OK) {
        desc.backward = 0;
        if (fqla_plan_create(lib->context, &desc, &plan) != FQLA_OK) {
            printf("  plans       none: %s\n", lib->message);
            return;
        }
    }
    if (fqla_plan_info(plan, &summary) == FQLA_OK)
        printf("  forward     %s\n  backward    %s\n  decode      %s\n", summary.forward,
               desc.backward ? summary.backward : lib->message, summary.decode);
    fqla_plan_destroy(plan);
}

static int print_info(const arguments *args) {
    library lib, cpu;
    int version = 0;
    const bool ok = library_open(&lib, args->backend, args->threads);
    printf("flashqla %d.%d.%d\n", FLASHQLA_VERSION_MAJOR, FLASHQLA_VERSION_MINOR, FLASHQLA_VERSION_PATCH);
    if (ok && lib.summary.backend == FQLA_BACKEND_CUDA) {
        version = lib.summary.driver_version;
        printf("cuda: %s\n  device      %s, compute capability %d.%d, %d multiprocessors\n", lib.summary.cuda_status,
               lib.summary.device_name, (int)lib.summary.compute_capability / 10, (int)lib.summary.compute_capability % 10,
               (int)lib.summary.sm_count);
        printf("  driver      CUDA %d.%d, kernels as %s\n", version / 1000, version % 1000 / 10, lib.summary.kernel_form);
        print_code(&lib);
    } else {
        printf("cuda: cannot be used: %s\n", ok ? lib.summary.cuda_status : lib.message);
    }
    if (library_open(&cpu, FQLA_BACKEND_CPU, args->threads)) {
        printf("cpu: ready\n  vectors     %s\n  threads     %d\n", cpu_levels[cpu.summary.cpu_level], (int)cpu.summary.num_threads);
        print_code(&cpu);
        library_close(&cpu);
    } else {
        printf("cpu: cannot be used: %s\n", cpu.message);
    }
    if (ok) {
        printf("default: %s\n", lib.summary.backend == FQLA_BACKEND_CUDA ? "cuda" : "cpu");
        library_close(&lib);
    } else {
        complain("%s", lib.message);
    }
    return ok ? SUCCESS : FAILURE;
}

int info_command(int argc, char **argv) {
    const option options[] = { { NULL, NULL, NULL, NULL } };
    arguments args;
    int exit_code;
    if (!parse_arguments(argc, argv, usage, options, &args, &exit_code)) return exit_code;
    if (args.files.count > 0) {
        misuse("info", "\"%s\" is one too many", args.files.items[0]);
        exit_code = MISUSE;
    } else {
        exit_code = print_info(&args);
    }
    free_arguments(&args, options);
    return exit_code;
}
