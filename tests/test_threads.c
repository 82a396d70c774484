/* The CPU backend's threads: the same bits for any number of them, and many callers at once. */
#include "case.h"
#include "greatest.h"
#include <pthread.h>

static const case_spec specs[] = {
    { .name = "forward", .plan = { .heads_qk = 2, .heads_v = 6, .num_seqs = 5, .dim_k = 64, .dim_v = 96, .checkpoint_every = 1 },
      .lens = { 130, 0, 1, 64, 77 }, .gates = GATES_MIXED, .seed = 1 },
    { .name = "forward_one_head", .plan = { .heads_v = 1, .dim_k = 128, .dim_v = 256 }, .lens = { 100 }, .seed = 2 },
    { .name = "decode", .plan = { .heads_qk = 2, .heads_v = 4, .num_seqs = 9, .pool_size = 20, .dim_k = 64, .dim_v = 64,
                                  .l2norm = 1 },
      .decode_tokens = 3, .keep_states = true, .in_place = true, .seed = 3 },
    { .name = "backward", .plan = { .heads_qk = 2, .heads_v = 6, .num_seqs = 4, .dim_k = 64, .dim_v = 40, .backward = 1,
                                    .gate = FQLA_GATE_RAW, .l2norm = 1 }, .lens = { 130, 0, 1, 77 }, .seed = 4 },
    { .name = "backward_one_head", .plan = { .heads_v = 1, .backward = 1 }, .lens = { 130 }, .seed = 5 },
};

static const char *run_all(test_case *c) {
    if (case_run(c) != FQLA_OK) return "the run failed";
    return c->desc.backward && case_run_backward(c) != FQLA_OK ? "the backward failed" : NULL;
}

/* Where two runs of one spec differ, the workspace apart. */
static const char *difference(const test_case *a, const test_case *b) {
    int name;
    for (name = 0; name < T_WORKSPACE; name++)
        if (a->buffers[name].size != b->buffers[name].size ||
            (a->buffers[name].size > 0 && memcmp(a->buffers[name].after, b->buffers[name].after, a->buffers[name].size) != 0))
            return "the bits differ";
    return NULL;
}

TEST same_bits(const case_spec *spec) {
    static const int32_t threads[] = { 2, 3, 7, 0 };
    static test_host hosts[2];
    static test_case one, many;
    fqla_context *alone = test_open(&hosts[0], 1);
    size_t i;
    ASSERT_EQ(FQLA_OK, case_open(&one, alone, &hosts[0], spec));
    ASSERT_SILENT(run_all(&one));
    for (i = 0; i < sizeof threads / sizeof threads[0]; i++) {
        fqla_context *context = test_open(&hosts[1], threads[i]);
        ASSERT_EQ(FQLA_OK, case_open(&many, context, &hosts[1], spec));
        ASSERT_SILENT(run_all(&many));
        ASSERT_SILENT(difference(&one, &many));
        case_close(&many);
        ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
        ASSERT_EQ(0, atomic_load(&hosts[1].live));
    }
    case_close(&one);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(alone));
    PASS();
}

/* ---- many callers */

enum { CALLERS = 4, ROUNDS = 8 };

typedef struct caller {
    fqla_context *context;
    const case_spec *spec;
    const test_case *expected;
    fqla_plan *plan; /* NULL: each round makes its own; else shared, run with a workspace of the caller's */
    const char *wrong;
} caller;

static void *call(void *argument) {
    caller *me = (caller *)argument;
    test_case *c = (test_case *)malloc(sizeof *c);
    int round;
    for (round = 0; round < ROUNDS && me->wrong == NULL; round++) {
        fqla_plan *own = NULL;
        if (case_open(c, me->context, NULL, me->spec) != FQLA_OK) {
            me->wrong = "no plan";
            break;
        }
        if (me->plan != NULL) own = c->plan, c->plan = me->plan;
        me->wrong = run_all(c);
        if (me->wrong == NULL) me->wrong = difference(me->expected, c);
        if (me->plan != NULL) c->plan = own;
        case_close(c);
    }
    free(c);
    return NULL;
}

TEST many_callers(const case_spec *spec, bool share_plan) {
    static test_host host;
    static test_case expected;
    static caller callers[CALLERS];
    fqla_context *context = test_open(&host, 3);
    pthread_t threads[CALLERS];
    int i;
    ASSERT_EQ(FQLA_OK, case_open(&expected, context, &host, spec));
    ASSERT_SILENT(run_all(&expected));
    for (i = 0; i < CALLERS; i++) {
        callers[i] = (caller){ .context = context, .spec = spec, .expected = &expected, .plan = share_plan ? expected.plan : NULL };
        ASSERT_EQ(0, pthread_create(&threads[i], NULL, call, &callers[i]));
    }
    for (i = 0; i < CALLERS; i++) pthread_join(threads[i], NULL);
    for (i = 0; i < CALLERS; i++) ASSERT_SILENT(callers[i].wrong);
    case_close(&expected);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    ASSERT_EQ(0, atomic_load(&host.live));
    PASS();
}

SUITE(threads) {
    size_t i;
    for (i = 0; i < sizeof specs / sizeof specs[0]; i++) {
        greatest_set_test_suffix(specs[i].name);
        RUN_TESTp(same_bits, &specs[i]);
    }
    for (i = 0; i < sizeof specs / sizeof specs[0]; i++) {
        greatest_set_test_suffix(specs[i].name);
        RUN_TESTp(many_callers, &specs[i], false);
        greatest_set_test_suffix(specs[i].name);
        RUN_TESTp(many_callers, &specs[i], true);
    }
}
