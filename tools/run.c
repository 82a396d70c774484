/* flashqla run: the tensors of one file in, the results into another. */
#include "problem.h"

#include <stdio.h>

static const char usage[] =
    "usage: flashqla run IN.safetensors -o OUT.safetensors [--backward] [options]\n"
    "\n"
    "Computes the gated delta rule on the tensors of a file.\n"
    "  in:       q k [T,HK,Dk], v [T,HV,Dv] (BF16, F16 or F32), g beta [T,HV] (F32, BF16 or F16);\n"
    "            if there: cu_seqlens [N+1] (I32 or I64; absent: one sequence), h0 [N,HV,Dk,Dv] (F32 or BF16; absent: zero)\n"
    "  out:      o [T,HV,Dv], ht [N,HV,Dk,Dv]\n"
    "  backward: in too: do [T,HV,Dv], and if there dht (absent: zero); out too: dq dk dv dg dbeta dh0\n"
    "  metadata: scale (default Dk^-0.5), state_layout N,H,K,V or N,H,V,K, head_map div or mod, l2norm 0 or 1\n"
    "On the CPU everything is widened to float32 and written as F32. On CUDA q k v do o dq dk dv are 16-bit.\n"
    "\n"
    "  -o OUT        where to write, completely or not at all\n"
    "  --backward    gradients too\n"
    COMMON_OPTIONS;

static int run_file(const char *in, const char *out, bool backward, library *lib) {
    problem p;
    solution s;
    char error[ERROR_SIZE], scale[32];
    const char *metadata[9] = { "scale", scale, "state_layout", NULL, "head_map", NULL, "l2norm", NULL, NULL };
    bool ok = false;
    if (!problem_read(in, &p, error)) {
        complain("%s: %s", in, error);
        return FAILURE;
    }
    if (backward && p.do_ == NULL) {
        complain("%s: tensor \"do\" is missing; --backward needs it", in);
    } else if (problem_solve(&p, lib, backward, in, &s, error) != FQLA_OK) {
        complain("%s: %s", in, error);
    } else {
        snprintf(scale, sizeof scale, "%.9g", (double)p.scale);
        metadata[3] = p.state_layout == FQLA_STATE_KV ? "N,H,K,V" : "N,H,V,K";
        metadata[5] = p.head_map == FQLA_HEAD_MAP_DIV ? "div" : "mod";
        metadata[7] = p.l2norm ? "1" : "0";
        ok = safetensors_write(out, s.tensors, s.count, metadata, error);
        if (!ok) complain("%s: %s", out, error);
        solution_free(&s);
    }
    problem_free(&p);
    return ok ? SUCCESS : FAILURE;
}

int run_command(int argc, char **argv) {
    const char *out = NULL;
    bool backward = false;
    const option options[] = { { "-o", NULL, &out, NULL }, { "--backward", &backward, NULL, NULL }, { NULL, NULL, NULL, NULL } };
    arguments args;
    library lib;
    int exit_code;
    if (!parse_arguments(argc, argv, usage, options, &args, &exit_code)) return exit_code;
    if (args.files.count != 1 || out == NULL) {
        misuse("run", args.files.count != 1 ? "one input file is needed" : "-o OUT is needed");
        exit_code = MISUSE;
    } else if (!library_open(&lib, args.backend, args.threads)) {
        complain("%s", lib.message);
        exit_code = FAILURE;
    } else {
        exit_code = run_file(args.files.items[0], out, backward, &lib);
        library_close(&lib);
    }
    free_arguments(&args, options);
    return exit_code;
}
