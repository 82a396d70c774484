/* Every way in which a plan can spread its work over a GPU, on short sequences: for a GPU, and for the emulation of one
   (tests/emulator), where other orders of what runs at once are other seeds. */
#include "case.h"
#include "greatest.h"

TEST matches(const case_spec *spec) {
    ASSERT_SILENT(case_check(spec));
    PASS();
}

static void run(const char *way, int32_t cut, case_spec spec) {
    char name[64];
    snprintf(name, sizeof name, "%s_%s_%d", spec.name, way, (int)cut);
    spec.name = name;
    spec.plan.segment_chunks = cut;
    greatest_set_test_suffix(name);
    RUN_TESTp(matches, &spec);
}

/* Exact segments, warm ones and both; parts of chunks at every end; what follows a sequence is NaN (case.h). */
static const case_spec layouts[] = {
    { .name = "mild", .plan = { .heads_qk = 1, .heads_v = 2, .num_seqs = 3 }, .lens = { 260, 0, 90 }, .seed = 60 },
    { .name = "ungated", .plan = { .heads_qk = 1, .heads_v = 1, .dtype = FQLA_DTYPE_FP16 }, .lens = { 321 }, .gates = GATES_ZERO, .seed = 61 },
    { .name = "strong", .plan = { .heads_qk = 1, .heads_v = 2, .l2norm = 1, .beta = FQLA_BETA_SIGMOID }, .lens = { 256 },
      .gates = GATES_STRONG, .seed = 62 },
    { .name = "as_many_heads", .plan = { .heads_qk = 4, .heads_v = 4, .num_seqs = 2 }, .lens = { 200, 140 }, .seed = 63 },
};

SUITE(schedules) {
    static const int32_t cuts[] = { -1, 1, 2 };
    size_t l, c;
    for (l = 0; l < sizeof layouts / sizeof layouts[0]; l++)
        for (c = 0; c < sizeof cuts / sizeof cuts[0]; c++) {
            case_spec spec = layouts[l];
            for (spec.plan.v_split = 1; spec.plan.v_split <= 2; spec.plan.v_split++)
                run(spec.plan.v_split == 1 ? "whole" : "half", cuts[c], spec);
            spec.plan.v_split = 0;
            spec.plan.backward = 1;
            spec.residuals = l == 0;
            run("backward", cuts[c], spec);
        }
}
