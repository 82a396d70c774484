/*
    greatest.h -- a small test runner with the public macros and command-line options of silentbicycle/greatest, so that
    its header can stand in this one's place unchanged. This is not that header: every line is the project's own.

        TEST adds(void) { ASSERT_EQ(4, 2 + 2); PASS(); }          a test is a function that returns how it went
        SUITE(sums) { RUN_TEST(adds); }                           a suite runs tests
        GREATEST_MAIN_DEFS();
        int main(int argc, char **argv) { GREATEST_MAIN_BEGIN(); RUN_SUITE(sums); GREATEST_MAIN_END(); }

    Left out of the original: shuffling, longjmp, and the typed and enum comparisons.
    Made stricter: a NaN is in no range, and a run in which no test ran (a filter that matches nothing) fails.
    The report ends with a line of its own: `N passed, N failed, N skipped`.
*/
#ifndef GREATEST_H
#define GREATEST_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifndef GREATEST_STDOUT
#define GREATEST_STDOUT stdout
#endif
#define GREATEST_FPRINTF fprintf

typedef enum greatest_test_res {
    GREATEST_TEST_RES_PASS = 0,
    GREATEST_TEST_RES_FAIL = -1,
    GREATEST_TEST_RES_SKIP = 1
} greatest_test_res;

typedef void greatest_suite_cb(void);
typedef void greatest_setup_cb(void *data);
typedef void greatest_teardown_cb(void *data);

struct greatest_report_t {
    unsigned int passed, failed, skipped, assertions;
};

struct greatest_run_info {
    struct greatest_report_t all, suite; /* counts of the run and of the suite at work */
    const char *suite_filter, *test_filter, *test_exclude;
    int exact, list_only, first_fail, abort_on_fail, verbosity;
    char name[256]; /* of the test at work, its suffix included */
    char suffix[128];
    const char *message, *file; /* what the test said last, and where */
    unsigned int line;
    greatest_setup_cb *setup;
    greatest_teardown_cb *teardown;
    void *setup_data, *teardown_data;
    int column; /* dots on the line */
};
extern struct greatest_run_info greatest_info; /* GREATEST_MAIN_DEFS defines it */

/* ---- options */

static inline void greatest_set_suite_filter(const char *filter) { greatest_info.suite_filter = filter; }
static inline void greatest_set_test_filter(const char *filter) { greatest_info.test_filter = filter; }
static inline void greatest_set_test_exclude(const char *filter) { greatest_info.test_exclude = filter; }
static inline void greatest_set_exact_name_match(void) { greatest_info.exact = 1; }
static inline void greatest_stop_at_first_fail(void) { greatest_info.first_fail = 1; }
static inline void greatest_abort_on_fail(void) { greatest_info.abort_on_fail = 1; }
static inline void greatest_list_only(void) { greatest_info.list_only = 1; }
static inline void greatest_set_verbosity(unsigned int verbosity) { greatest_info.verbosity = (int)verbosity; }
static inline unsigned int greatest_get_verbosity(void) { return (unsigned int)greatest_info.verbosity; }

/* Set before a RUN_TEST: the test's name is then name_suffix, for that run alone. */
static inline void greatest_set_test_suffix(const char *suffix) {
    snprintf(greatest_info.suffix, sizeof greatest_info.suffix, "%s", suffix);
}

static inline void greatest_set_setup_cb(greatest_setup_cb *callback, void *data) {
    greatest_info.setup = callback;
    greatest_info.setup_data = data;
}

static inline void greatest_set_teardown_cb(greatest_teardown_cb *callback, void *data) {
    greatest_info.teardown = callback;
    greatest_info.teardown_data = data;
}

static inline void greatest_usage(const char *program) {
    GREATEST_FPRINTF(GREATEST_STDOUT,
                     "Usage: %s [-hlfavex] [-s SUITE] [-t TEST] [-x EXCLUDE]\n"
                     "  -h, --help  print this help\n"
                     "  -l          list suites and tests, then exit\n"
                     "  -f          stop at the first failure\n"
                     "  -a          abort on the first failure\n"
                     "  -v          verbose\n"
                     "  -s SUITE    only suites whose name contains SUITE\n"
                     "  -t TEST     only tests whose name contains TEST\n"
                     "  -e          exact names in -s and -t\n"
                     "  -x EXCLUDE  leave out tests whose name contains EXCLUDE\n",
                     program);
}

static inline void greatest_parse_options(int argc, char **argv) {
    int i;
    for (i = 1; i < argc; i++) {
        const char *option = argv[i];
        const int takes_value = strcmp(option, "-s") == 0 || strcmp(option, "-t") == 0 || strcmp(option, "-x") == 0;
        if (strcmp(option, "--") == 0) return;
        if (strcmp(option, "-h") == 0 || strcmp(option, "--help") == 0) {
            greatest_usage(argv[0]);
            exit(EXIT_SUCCESS);
        } else if (takes_value && i + 1 < argc) {
            const char *value = argv[++i];
            if (option[1] == 's') greatest_set_suite_filter(value);
            else if (option[1] == 't') greatest_set_test_filter(value);
            else greatest_set_test_exclude(value);
        } else if (strcmp(option, "-e") == 0) {
            greatest_set_exact_name_match();
        } else if (strcmp(option, "-f") == 0) {
            greatest_stop_at_first_fail();
        } else if (strcmp(option, "-a") == 0) {
            greatest_abort_on_fail();
        } else if (strcmp(option, "-l") == 0) {
            greatest_list_only();
        } else if (strncmp(option, "-v", 2) == 0 && strspn(option + 1, "v") == strlen(option + 1)) {
            greatest_info.verbosity += (int)strlen(option + 1);
        } else {
            GREATEST_FPRINTF(GREATEST_STDOUT, "%s '%s'\n", takes_value ? "A value must follow" : "Unknown argument", option);
            greatest_usage(argv[0]);
            exit(EXIT_FAILURE);
        }
    }
}

static inline void greatest_init(void) { memset(&greatest_info, 0, sizeof greatest_info); }

/* ---- running */

static inline int greatest_matches(const char *name, const char *filter, int exact) {
    return exact ? strcmp(name, filter) == 0 : strstr(name, filter) != NULL;
}

static inline int greatest_stopped(void) { return greatest_info.first_fail && greatest_info.all.failed > 0; }

/* Called before a test; false: leave it out. */
static inline int greatest_test_pre(const char *name) {
    struct greatest_run_info *g = &greatest_info;
    snprintf(g->name, sizeof g->name, "%s%s%s", name, g->suffix[0] != '\0' ? "_" : "", g->suffix);
    g->suffix[0] = '\0';
    if (greatest_stopped()) return 0;
    if (g->test_filter != NULL && !greatest_matches(g->name, g->test_filter, g->exact)) return 0;
    if (g->test_exclude != NULL && greatest_matches(g->name, g->test_exclude, g->exact)) return 0;
    if (g->list_only) {
        GREATEST_FPRINTF(GREATEST_STDOUT, "  %s\n", g->name);
        return 0;
    }
    g->message = NULL;
    if (g->setup != NULL) g->setup(g->setup_data);
    return 1;
}

static inline void greatest_test_post(int result) {
    struct greatest_run_info *g = &greatest_info;
    const char *word = result == GREATEST_TEST_RES_PASS ? "PASS" : result == GREATEST_TEST_RES_SKIP ? "SKIP" : "FAIL";
    const char *said = g->message != NULL ? g->message : "";
    if (g->teardown != NULL) g->teardown(g->teardown_data);
    if (result == GREATEST_TEST_RES_PASS) g->suite.passed++, g->all.passed++;
    else if (result == GREATEST_TEST_RES_SKIP) g->suite.skipped++, g->all.skipped++;
    else g->suite.failed++, g->all.failed++;
    if (result != GREATEST_TEST_RES_PASS && result != GREATEST_TEST_RES_SKIP) {
        GREATEST_FPRINTF(GREATEST_STDOUT, "%sFAIL %s: %s (%s:%u)\n", g->column > 0 ? "\n" : "", g->name, said,
                         g->file != NULL ? g->file : "", g->line);
        g->column = 0;
        if (g->abort_on_fail) abort();
    } else if (g->verbosity > 0) {
        GREATEST_FPRINTF(GREATEST_STDOUT, "%s %s%s%s\n", word, g->name, said[0] != '\0' ? ": " : "", said);
    } else {
        GREATEST_FPRINTF(GREATEST_STDOUT, "%s", result == GREATEST_TEST_RES_SKIP ? "s" : ".");
        if (++g->column % 80 == 0) GREATEST_FPRINTF(GREATEST_STDOUT, "\n");
    }
    fflush(GREATEST_STDOUT);
}

static inline void greatest_run_suite(greatest_suite_cb *suite, const char *name) {
    struct greatest_run_info *g = &greatest_info;
    const clock_t start = clock();
    if (greatest_stopped()) return;
    if (g->suite_filter != NULL && !greatest_matches(name, g->suite_filter, g->exact)) return;
    memset(&g->suite, 0, sizeof g->suite);
    g->column = 0;
    GREATEST_FPRINTF(GREATEST_STDOUT, "* Suite %s:\n", name);
    suite();
    g->setup = NULL;
    g->teardown = NULL;
    if (g->list_only) return;
    GREATEST_FPRINTF(GREATEST_STDOUT, "%s%u tests - %u passed, %u failed, %u skipped (%.2f s of CPU)\n", g->column > 0 ? "\n" : "",
                     g->suite.passed + g->suite.failed + g->suite.skipped, g->suite.passed, g->suite.failed, g->suite.skipped,
                     (double)(clock() - start) / CLOCKS_PER_SEC);
    g->column = 0;
}

static inline void greatest_get_report(struct greatest_report_t *report) { *report = greatest_info.all; }

/* Did everything that ran pass, and did anything run? */
static inline int greatest_all_passed(void) {
    const struct greatest_report_t *all = &greatest_info.all;
    return greatest_info.list_only || (all->failed == 0 && all->passed + all->skipped > 0);
}

static inline void greatest_print_report(void) {
    const struct greatest_report_t *all = &greatest_info.all;
    if (greatest_info.list_only) return;
    if (all->passed + all->failed + all->skipped == 0) GREATEST_FPRINTF(GREATEST_STDOUT, "No test ran: no name matches.\n");
    GREATEST_FPRINTF(GREATEST_STDOUT, "%u passed, %u failed, %u skipped\n", all->passed, all->failed, all->skipped);
}

/* Remember what a test says of itself; returns the result, so that assertions are one expression. */
static inline greatest_test_res greatest_say(greatest_test_res result, const char *message, const char *file, unsigned int line) {
    greatest_info.message = message;
    greatest_info.file = file;
    greatest_info.line = line;
    return result;
}

static inline int greatest_same_memory(const void *expected, const void *got, size_t size) {
    const unsigned char *a = (const unsigned char *)expected, *b = (const unsigned char *)got;
    size_t i = 0;
    while (i < size && a[i] == b[i]) i++;
    if (i == size) return 1;
    GREATEST_FPRINTF(GREATEST_STDOUT, "\nExpected byte %02x, got %02x at %lu of %lu\n", a[i], b[i], (unsigned long)i,
                     (unsigned long)size);
    return 0;
}

static inline int greatest_same_string(const char *expected, const char *got, size_t most) {
    size_t i = 0;
    if (expected != NULL && got != NULL) {
        while (i < most && expected[i] == got[i] && expected[i] != '\0') i++;
        if (i == most || expected[i] == got[i]) return 1;
    }
    GREATEST_FPRINTF(GREATEST_STDOUT, "\nExpected \"%s\",\n     got \"%s\"\n", expected != NULL ? expected : "(null)",
                     got != NULL ? got : "(null)");
    return 0;
}

static inline int greatest_in_range(double expected, double got, double tolerance) {
    const double error = got - expected;
    if (error <= tolerance && -error <= tolerance) return 1; /* a NaN is neither */
    GREATEST_FPRINTF(GREATEST_STDOUT, "\nExpected %g +/- %g, got %g\n", expected, tolerance, got);
    return 0;
}

/* ---- the public macros, with the GREATEST_ prefix and without */

#define GREATEST_SUITE(NAME) \
    void NAME(void);         \
    void NAME(void)
#define GREATEST_SUITE_EXTERN(NAME) void NAME(void)
#define GREATEST_TEST static enum greatest_test_res

#define GREATEST_MAIN_DEFS() struct greatest_run_info greatest_info
#define GREATEST_INIT() greatest_init()
#define GREATEST_MAIN_BEGIN()               \
    do {                                    \
        GREATEST_INIT();                    \
        greatest_parse_options(argc, argv); \
    } while (0)
#define GREATEST_PRINT_REPORT() greatest_print_report()
#define GREATEST_MAIN_END()                                         \
    do {                                                            \
        GREATEST_PRINT_REPORT();                                    \
        return greatest_all_passed() ? EXIT_SUCCESS : EXIT_FAILURE; \
    } while (0)

#define GREATEST_RUN_SUITE(NAME) greatest_run_suite(NAME, #NAME)
#define GREATEST_RUN_TEST(TEST)                                         \
    do {                                                                \
        if (greatest_test_pre(#TEST)) greatest_test_post((int)TEST()); \
    } while (0)
#define GREATEST_RUN_TEST1(TEST, ENV)                                      \
    do {                                                                   \
        if (greatest_test_pre(#TEST)) greatest_test_post((int)TEST(ENV)); \
    } while (0)
#define GREATEST_RUN_TESTp(TEST, ...)                                              \
    do {                                                                           \
        if (greatest_test_pre(#TEST)) greatest_test_post((int)TEST(__VA_ARGS__)); \
    } while (0)
#define GREATEST_IGNORE_TEST(TEST) (void)TEST
#define GREATEST_IS_VERBOSE() (greatest_get_verbosity() > 0)
#define GREATEST_LIST_ONLY() (greatest_info.list_only)
#define GREATEST_FAILURE_ABORT() (greatest_info.abort_on_fail)

#define GREATEST_PASSm(MSG) return greatest_say(GREATEST_TEST_RES_PASS, MSG, __FILE__, __LINE__)
#define GREATEST_FAILm(MSG) return greatest_say(GREATEST_TEST_RES_FAIL, MSG, __FILE__, __LINE__)
#define GREATEST_SKIPm(MSG) return greatest_say(GREATEST_TEST_RES_SKIP, MSG, __FILE__, __LINE__)
#define GREATEST_PASS() GREATEST_PASSm(NULL)
#define GREATEST_FAIL() GREATEST_FAILm(NULL)
#define GREATEST_SKIP() GREATEST_SKIPm(NULL)

#define GREATEST_ASSERTm(MSG, COND)        \
    do {                                   \
        greatest_info.all.assertions++;    \
        if (!(COND)) GREATEST_FAILm(MSG); \
    } while (0)
#define GREATEST_ASSERT_OP(MSG, OP, A, B) GREATEST_ASSERTm(MSG, (A)OP(B))
#define GREATEST_ASSERT_FALSEm(MSG, COND) GREATEST_ASSERTm(MSG, !(COND))
#define GREATEST_ASSERT_EQm(MSG, EXP, GOT) GREATEST_ASSERT_OP(MSG, ==, EXP, GOT)
#define GREATEST_ASSERT_NEQm(MSG, EXP, GOT) GREATEST_ASSERT_OP(MSG, !=, EXP, GOT)
#define GREATEST_ASSERT_GTm(MSG, A, B) GREATEST_ASSERT_OP(MSG, >, A, B)
#define GREATEST_ASSERT_GTEm(MSG, A, B) GREATEST_ASSERT_OP(MSG, >=, A, B)
#define GREATEST_ASSERT_LTm(MSG, A, B) GREATEST_ASSERT_OP(MSG, <, A, B)
#define GREATEST_ASSERT_LTEm(MSG, A, B) GREATEST_ASSERT_OP(MSG, <=, A, B)
#define GREATEST_ASSERT_EQ_FMTm(MSG, EXP, GOT, FMT)                             \
    do {                                                                        \
        greatest_info.all.assertions++;                                         \
        if (!((EXP) == (GOT))) {                                                \
            GREATEST_FPRINTF(GREATEST_STDOUT, "\nExpected " FMT ", got " FMT "\n", EXP, GOT); \
            GREATEST_FAILm(MSG);                                                \
        }                                                                       \
    } while (0)
#define GREATEST_ASSERT_IN_RANGEm(MSG, EXP, GOT, TOL)                        \
    do {                                                                     \
        greatest_info.all.assertions++;                                      \
        if (!greatest_in_range(EXP, GOT, TOL)) GREATEST_FAILm(MSG);         \
    } while (0)
#define GREATEST_ASSERT_STR_EQm(MSG, EXP, GOT) GREATEST_ASSERTm(MSG, greatest_same_string(EXP, GOT, (size_t)-1 >> 1))
#define GREATEST_ASSERT_STRN_EQm(MSG, EXP, GOT, SIZE) GREATEST_ASSERTm(MSG, greatest_same_string(EXP, GOT, SIZE))
#define GREATEST_ASSERT_MEM_EQm(MSG, EXP, GOT, SIZE) GREATEST_ASSERTm(MSG, greatest_same_memory(EXP, GOT, SIZE))

#define GREATEST_ASSERT(COND) GREATEST_ASSERTm(#COND, COND)
#define GREATEST_ASSERT_FALSE(COND) GREATEST_ASSERT_FALSEm("not " #COND, COND)
#define GREATEST_ASSERT_EQ(EXP, GOT) GREATEST_ASSERT_EQm(#EXP " == " #GOT, EXP, GOT)
#define GREATEST_ASSERT_NEQ(EXP, GOT) GREATEST_ASSERT_NEQm(#EXP " != " #GOT, EXP, GOT)
#define GREATEST_ASSERT_GT(A, B) GREATEST_ASSERT_GTm(#A " > " #B, A, B)
#define GREATEST_ASSERT_GTE(A, B) GREATEST_ASSERT_GTEm(#A " >= " #B, A, B)
#define GREATEST_ASSERT_LT(A, B) GREATEST_ASSERT_LTm(#A " < " #B, A, B)
#define GREATEST_ASSERT_LTE(A, B) GREATEST_ASSERT_LTEm(#A " <= " #B, A, B)
#define GREATEST_ASSERT_EQ_FMT(EXP, GOT, FMT) GREATEST_ASSERT_EQ_FMTm(#EXP " == " #GOT, EXP, GOT, FMT)
#define GREATEST_ASSERT_IN_RANGE(EXP, GOT, TOL) GREATEST_ASSERT_IN_RANGEm(#GOT " within " #TOL " of " #EXP, EXP, GOT, TOL)
#define GREATEST_ASSERT_STR_EQ(EXP, GOT) GREATEST_ASSERT_STR_EQm(#EXP " equals " #GOT, EXP, GOT)
#define GREATEST_ASSERT_STRN_EQ(EXP, GOT, SIZE) GREATEST_ASSERT_STRN_EQm(#EXP " starts as " #GOT, EXP, GOT, SIZE)
#define GREATEST_ASSERT_MEM_EQ(EXP, GOT, SIZE) GREATEST_ASSERT_MEM_EQm(#EXP " equals " #GOT, EXP, GOT, SIZE)

/* Run a helper that returns as a test does; where it did not pass, the test ends as it did. */
#define GREATEST_CHECK_CALL(RES)                                                  \
    do {                                                                          \
        const enum greatest_test_res greatest_result = (RES);                     \
        if (greatest_result != GREATEST_TEST_RES_PASS) return greatest_result;   \
    } while (0)

#define GREATEST_SET_SETUP_CB(CB, DATA) greatest_set_setup_cb(CB, DATA)
#define GREATEST_SET_TEARDOWN_CB(CB, DATA) greatest_set_teardown_cb(CB, DATA)

#define TEST GREATEST_TEST
#define SUITE GREATEST_SUITE
#define SUITE_EXTERN GREATEST_SUITE_EXTERN
#define RUN_TEST GREATEST_RUN_TEST
#define RUN_TEST1 GREATEST_RUN_TEST1
#define RUN_TESTp GREATEST_RUN_TESTp
#define RUN_SUITE GREATEST_RUN_SUITE
#define IGNORE_TEST GREATEST_IGNORE_TEST
#define ASSERT GREATEST_ASSERT
#define ASSERTm GREATEST_ASSERTm
#define ASSERT_FALSE GREATEST_ASSERT_FALSE
#define ASSERT_FALSEm GREATEST_ASSERT_FALSEm
#define ASSERT_EQ GREATEST_ASSERT_EQ
#define ASSERT_EQm GREATEST_ASSERT_EQm
#define ASSERT_NEQ GREATEST_ASSERT_NEQ
#define ASSERT_NEQm GREATEST_ASSERT_NEQm
#define ASSERT_GT GREATEST_ASSERT_GT
#define ASSERT_GTm GREATEST_ASSERT_GTm
#define ASSERT_GTE GREATEST_ASSERT_GTE
#define ASSERT_GTEm GREATEST_ASSERT_GTEm
#define ASSERT_LT GREATEST_ASSERT_LT
#define ASSERT_LTm GREATEST_ASSERT_LTm
#define ASSERT_LTE GREATEST_ASSERT_LTE
#define ASSERT_LTEm GREATEST_ASSERT_LTEm
#define ASSERT_EQ_FMT GREATEST_ASSERT_EQ_FMT
#define ASSERT_EQ_FMTm GREATEST_ASSERT_EQ_FMTm
#define ASSERT_IN_RANGE GREATEST_ASSERT_IN_RANGE
#define ASSERT_IN_RANGEm GREATEST_ASSERT_IN_RANGEm
#define ASSERT_STR_EQ GREATEST_ASSERT_STR_EQ
#define ASSERT_STR_EQm GREATEST_ASSERT_STR_EQm
#define ASSERT_STRN_EQ GREATEST_ASSERT_STRN_EQ
#define ASSERT_STRN_EQm GREATEST_ASSERT_STRN_EQm
#define ASSERT_MEM_EQ GREATEST_ASSERT_MEM_EQ
#define ASSERT_MEM_EQm GREATEST_ASSERT_MEM_EQm
#define PASS GREATEST_PASS
#define PASSm GREATEST_PASSm
#define FAIL GREATEST_FAIL
#define FAILm GREATEST_FAILm
#define SKIP GREATEST_SKIP
#define SKIPm GREATEST_SKIPm
#define CHECK_CALL GREATEST_CHECK_CALL
#define SET_SETUP GREATEST_SET_SETUP_CB
#define SET_TEARDOWN GREATEST_SET_TEARDOWN_CB

#endif /* GREATEST_H */
