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

static void print_cuda(library *lib) {
    const fqla_context_summary *c = &lib->summary;
    if (c->backend != FQLA_BACKEND_CUDA) {
        printf("cuda: cannot be used: %s\n", c->cuda_status);
        return;
    }
    printf("cuda: %s\n  device      %s, compute capability %d.%d, %d multiprocessors\n", c->cuda_status, c->device_name,
           (int)c->compute_capability / 10, (int)c->compute_capability % 10, (int)c->sm_count);
    printf("  driver      CUDA %d.%d, kernels as %s\n", (int)c->driver_version / 1000, (int)c->driver_version % 1000 / 10,
           c->kernel_form);
    print_code(lib);
}

static void print_cpu(int32_t threads) {
    library cpu;
    if (!library_open(&cpu, FQLA_BACKEND_CPU, threads)) {
        printf("cpu: cannot be used: %s\n", cpu.message);
        return;
    }
    printf("cpu: ready\n  vectors     %s\n  threads     %d\n", cpu_levels[cpu.summary.cpu_level], (int)cpu.summary.num_threads);
    print_code(&cpu);
    library_close(&cpu);
}

/* AUTO stands in for CUDA, since it says why there is none and goes on. */
static int print_info(const arguments *args) {
    library lib;
    bool ok = library_open(&lib, args->backend == FQLA_BACKEND_CUDA ? FQLA_BACKEND_AUTO : args->backend, args->threads);
    if (!ok) {
        complain("%s", lib.message);
        return FAILURE;
    }
    printf("flashqla %d.%d.%d\n", FLASHQLA_VERSION_MAJOR, FLASHQLA_VERSION_MINOR, FLASHQLA_VERSION_PATCH);
    print_cuda(&lib);
    print_cpu(args->threads);
    if (args->backend == FQLA_BACKEND_CUDA && lib.summary.backend != FQLA_BACKEND_CUDA) {
        fflush(stdout);
        complain("%s", lib.summary.cuda_status);
        ok = false;
    } else {
        printf("runs on: %s\n", lib.summary.backend == FQLA_BACKEND_CUDA ? "cuda" : "cpu");
    }
    library_close(&lib);
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
