/* All suites in one program, on one backend: build/tests/suite [--backend cpu|cuda] [--cpu-level plain|avx2|avx512]
   [greatest's options] */
#include "case.h"
#include "greatest.h"

SUITE_EXTERN(oracle_and_golden);
SUITE_EXTERN(roundings);
SUITE_EXTERN(api);
SUITE_EXTERN(bad_input);
SUITE_EXTERN(failures);
SUITE_EXTERN(forward);
SUITE_EXTERN(decode);
SUITE_EXTERN(backward);
SUITE_EXTERN(gradient);
SUITE_EXTERN(numbers);
SUITE_EXTERN(random_cases);
SUITE_EXTERN(random_backward);
SUITE_EXTERN(bits);
SUITE_EXTERN(threads);
SUITE_EXTERN(far);
SUITE_EXTERN(schedules);

/* What the arithmetic of a backend, or of one of the CPU's levels, must get right. */
static void run_arithmetic(void) {
    RUN_SUITE(forward);
    RUN_SUITE(decode);
    RUN_SUITE(backward);
    RUN_SUITE(numbers);
    RUN_SUITE(random_cases);
}

static void run_arithmetic_at_every_level(void) {
    static const char *const names[] = { "auto", "plain", "avx2", "avx512" };
    fqla_context_summary summary;
    int level;
    if (fqla_context_info(test_shared(), &summary) != FQLA_OK) abort();
    for (level = FQLA_CPU_PLAIN; level <= (int)summary.cpu_level; level++) {
        if (test_shared_close() != NULL) abort();
        test_cpu_level = (fqla_cpu_level)level;
        printf("At cpu_level %s:\n", names[level]);
        run_arithmetic();
    }
}

/* After all others: what they shared is given back, to the last block. */
TEST nothing_is_left(void) {
    ASSERT_SILENT(test_shared_close());
    PASS();
}

SUITE(closing) { RUN_TEST(nothing_is_left); }

GREATEST_MAIN_DEFS();

/* Take `--name value` out of argv; NULL where it is not there. */
static const char *take_option(int *argc, char **argv, const char *name) {
    const char *value;
    int i;
    for (i = 1; i + 1 < *argc && strcmp(argv[i], name) != 0; i++) continue;
    if (i + 1 >= *argc) return NULL;
    value = argv[i + 1];
    for (*argc -= 2; i < *argc; i++) argv[i] = argv[i + 2];
    return value;
}

/* A value's place in a list that ends with NULL; a word on stderr and exit status 2 where it has none. */
static int choose(const char *option, const char *value, const char *const *list) {
    int i;
    for (i = 0; list[i] != NULL; i++)
        if (strcmp(value, list[i]) == 0) return i;
    fprintf(stderr, "%s does not take '%s'\n", option, value);
    exit(2);
}

int main(int argc, char **argv) {
    static const char *const backends[] = { "auto", "cpu", "cuda", NULL },
        *const levels[] = { "auto", "plain", "avx2", "avx512", NULL };
    const char *backend = take_option(&argc, argv, "--backend"), *level = take_option(&argc, argv, "--cpu-level");
    if (backend != NULL) test_backend = (fqla_backend)choose("--backend", backend, backends);
    if (level != NULL) test_cpu_level = (fqla_cpu_level)choose("--cpu-level", level, levels);
    GREATEST_MAIN_BEGIN();
    RUN_SUITE(oracle_and_golden);
    RUN_SUITE(roundings);
    RUN_SUITE(api);
    RUN_SUITE(bad_input);
    RUN_SUITE(failures);
    RUN_SUITE(bits);
    RUN_SUITE(far);
    RUN_SUITE(random_backward);
    if (test_on_cuda()) RUN_SUITE(schedules);
    if (!test_on_cuda()) {
        RUN_SUITE(gradient);
        RUN_SUITE(threads);
    }
    if (test_on_cuda() || level != NULL) run_arithmetic();
    else run_arithmetic_at_every_level();
    RUN_SUITE(closing);
    case_print_worst();
    GREATEST_MAIN_END();
}
