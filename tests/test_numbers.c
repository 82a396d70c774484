/* Numbers at their edges: rounding of 16-bit outputs to the bit, clamped and extreme gates, sigmoids far out. */
#include "case.h"
#include "greatest.h"
#include <math.h>

/* With alpha 0, beta 1 and q = k = a unit vector, o = scale v: one multiplication and one rounding. */
TEST rounding(fqla_dtype dtype, float scale) {
    static test_case c;
    enum { DIM = 128, TOKENS = 512 }; /* 65536 values */
    case_spec spec = { .name = "rounding", .plan = { .dtype = dtype, .gate = FQLA_GATE_LINEAR, .scale = scale }, .lens = { TOKENS },
                       .no_h0 = true, .seed = 1 };
    int64_t t, i;
    if (!test_on_cuda()) spec.plan.dim_k = 8;
    ASSERT_EQ(FQLA_OK, case_open(&c, test_shared(), &test_shared_host, &spec));
    for (t = 0; t < TOKENS; t++) {
        for (i = 0; i < c.dim_k; i++) {
            case_set(&c, T_Q, t, 0, i, i == 3);
            case_set(&c, T_K, t, 0, i, i == 3);
        }
        case_set(&c, T_G, t, 0, 0, 0.0);
        case_set(&c, T_BETA, t, 0, 0, 1.0);
        /* every finite pattern; for bf16 those whose float32 products are neither subnormal nor infinite */
        for (i = 0; i < DIM; i++) {
            const uint16_t bits = (uint16_t)(t * DIM + i);
            const int exponent = dtype == FQLA_DTYPE_FP16 ? bits >> 10 & 31 : bits >> 7 & 255;
            const bool skip = dtype == FQLA_DTYPE_FP16 ? exponent == 31 : exponent < 4 || exponent > 250;
            memcpy(c.buffers[T_V].before + c.t[T_V].offset + 2 * (size_t)(t * DIM + i), skip ? &(uint16_t){ 0 } : &bits, 2);
        }
    }
    ASSERT_EQ(FQLA_OK, case_run(&c));
    for (t = 0; t < TOKENS; t++)
        for (i = 0; i < DIM; i++) {
            const float exact = scale * (float)case_input(&c, T_V, t, 0, i);
            double expected;
            case_set(&c, T_O, t, 0, i, (double)exact); /* the tests' own rounding */
            expected = case_input(&c, T_O, t, 0, i);
            ASSERT_EQ_FMT(expected, case_get(&c, T_O, t, 0, i), "%.9g");
        }
    case_close(&c);
    PASS();
}

/* Far below -104, at it, and one step above it: alpha is 0 or as good as 0, and nothing is NaN. */
TEST clamped_gates(bool backward) {
    static const double gates[] = { -0.0, 0.0, -103.9, -104.0, -104.1, -1.0e4, -3.0e38, -88.0, -1.0e-30 };
    static test_case c;
    case_spec spec = { .name = "clamped_gates", .plan = { .heads_v = 2, .backward = backward }, .lens = { 72 }, .seed = 2 };
    int64_t t;
    ASSERT_EQ(FQLA_OK, case_open(&c, test_shared(), &test_shared_host, &spec));
    for (t = 0; t < 72; t++)
        if (t % 2 == 0) case_set(&c, T_G, t, 0, 0, gates[t / 2 % 9]);
        else case_set(&c, T_G, t, 1, 0, gates[t / 2 % 9]);
    ASSERT_EQ(FQLA_OK, case_run(&c));
    ASSERT_SILENT(case_compare(&c));
    if (backward) {
        ASSERT_EQ(FQLA_OK, case_run_backward(&c));
        ASSERT_SILENT(case_compare_backward(&c));
    }
    case_close(&c);
    PASS();
}

/* A log alpha of minus infinity is alpha 0. */
TEST infinite_gate(void) {
    static test_case c;
    const case_spec spec = { .name = "infinite_gate", .plan = { .heads_v = 2 }, .lens = { 72 }, .seed = 3 };
    ASSERT_EQ(FQLA_OK, case_open(&c, test_shared(), &test_shared_host, &spec));
    case_set(&c, T_G, 20, 0, 0, -(double)INFINITY);
    case_set(&c, T_G, 71, 1, 0, -(double)INFINITY);
    ASSERT_EQ(FQLA_OK, case_run(&c));
    ASSERT_SILENT(case_compare(&c));
    case_close(&c);
    PASS();
}

/* Raw a and b from far left to far right: softplus and sigmoid neither overflow nor lose their ends. */
TEST raw_extremes(bool backward) {
    static const double values[] = { -300.0, -100.0, -50.0, -20.0, -1.0, 0.0, 1.0, 19.9, 20.0, 20.1, 50.0, 100.0, 300.0 };
    static test_case c;
    case_spec spec = { .name = "raw_extremes", .lens = { 78 }, .seed = 4,
                       .plan = { .heads_v = 2, .gate = FQLA_GATE_RAW, .beta = FQLA_BETA_SIGMOID, .backward = backward } };
    int64_t t;
    ASSERT_EQ(FQLA_OK, case_open(&c, test_shared(), &test_shared_host, &spec));
    for (t = 0; t < 78; t++) {
        case_set(&c, T_G, t, 0, 0, values[t % 13]);
        case_set(&c, T_G, t, 1, 0, t % 6 == 0 ? values[t / 6] : -3.0);
        case_set(&c, T_BETA, t, 0, 0, values[t * 5 % 13]);
    }
    ASSERT_EQ(FQLA_OK, case_run(&c));
    ASSERT_SILENT(case_compare(&c));
    if (backward) {
        ASSERT_EQ(FQLA_OK, case_run_backward(&c));
        ASSERT_SILENT(case_compare_backward(&c));
    }
    case_close(&c);
    PASS();
}

/* Rows of zeros under l2norm: no division by zero. beta 0 and 1, exactly. */
TEST zero_rows(bool backward) {
    static test_case c;
    case_spec spec = { .name = "zero_rows", .plan = { .heads_v = 2, .l2norm = 1, .backward = backward }, .lens = { 70 },
                       .seed = 5 };
    int64_t i, t;
    ASSERT_EQ(FQLA_OK, case_open(&c, test_shared(), &test_shared_host, &spec));
    for (i = 0; i < 128; i++) {
        case_set(&c, T_Q, 5, 0, i, 0.0);
        case_set(&c, T_K, 6, 0, i, 0.0);
        case_set(&c, T_K, 69, 0, i, 1.0e-4 * (double)(i % 3)); /* so short that 1e-6 counts */
    }
    for (t = 0; t < 70; t++) case_set(&c, T_BETA, t, 1, 0, t % 2 ? 1.0 : 0.0);
    ASSERT_EQ(FQLA_OK, case_run(&c));
    ASSERT_SILENT(case_compare(&c));
    if (backward) {
        ASSERT_EQ(FQLA_OK, case_run_backward(&c));
        ASSERT_SILENT(case_compare_backward(&c));
    }
    case_close(&c);
    PASS();
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__TINYC__)
#include <xmmintrin.h>

/* The caller's floating-point modes are the caller's: as they were after every run. */
TEST float_modes_are_kept(bool backward) {
    static test_host host;
    static test_case c;
    fqla_context *context = test_open(&host, 1); /* all work is the caller's */
    const unsigned int modes = 0x1f80u; /* a program's at its start: no exceptions, to nearest, subnormals kept */
    case_spec spec = { .name = "float_modes", .plan = { .heads_v = 2, .backward = backward }, .lens = { 70 }, .gates = GATES_STRONG,
                       .seed = 6 };
    ASSERT_EQ(FQLA_OK, case_open(&c, context, &host, &spec));
    _mm_setcsr(modes);
    ASSERT_EQ(FQLA_OK, case_run(&c));
    ASSERT_EQ(modes, _mm_getcsr() & 0xffc0u);
    if (backward) {
        ASSERT_EQ(FQLA_OK, case_run_backward(&c));
        ASSERT_EQ(modes, _mm_getcsr() & 0xffc0u);
    }
    case_close(&c);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    PASS();
}
#define MODES_ARE_KEPT(backward) RUN_TESTp(float_modes_are_kept, backward)
#else
#define MODES_ARE_KEPT(backward)
#endif

SUITE(numbers) {
    MODES_ARE_KEPT(true);
    RUN_TESTp(rounding, FQLA_DTYPE_FP16, 1.0f);
    RUN_TESTp(rounding, FQLA_DTYPE_FP16, 1.0f / 3.0f);
    RUN_TESTp(rounding, FQLA_DTYPE_FP16, 1.0f / 4096.0f); /* many subnormals, and ties */
    RUN_TESTp(rounding, FQLA_DTYPE_FP16, 2.5f);           /* up to infinity */
    RUN_TESTp(rounding, FQLA_DTYPE_BF16, 1.0f);
    RUN_TESTp(rounding, FQLA_DTYPE_BF16, 1.0f / 3.0f);
    RUN_TESTp(rounding, FQLA_DTYPE_BF16, 1.00390625f); /* ties that go down */
    RUN_TESTp(rounding, FQLA_DTYPE_BF16, 1.01171875f); /* ties that go up */
    RUN_TESTp(clamped_gates, false);
    RUN_TESTp(clamped_gates, true);
    RUN_TEST(infinite_gate);
    RUN_TESTp(raw_extremes, false);
    RUN_TESTp(raw_extremes, true);
    RUN_TESTp(zero_rows, false);
    RUN_TESTp(zero_rows, true);
}
