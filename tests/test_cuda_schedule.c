/* How a plan spreads a forward and a backward over the GPU, on the fake driver: the choice of V's split and of where sequences are
   cut, and the tables of segments that follow from it, read as the kernels read them (ptx/segment.h, ptx/backward_segment.h). */
#include "cuda_host.h"

enum { MOST_SEQS = 300, MOST_LEN = 30000 };

/* A plan's lengths, as cu_seqlens. */
typedef struct layout {
    int32_t count, cu_seqlens[MOST_SEQS + 1];
} layout;

static void add_length(layout *l, int32_t len) {
    if (l->count == 0) l->cu_seqlens[0] = 0;
    l->cu_seqlens[l->count + 1] = l->cu_seqlens[l->count] + len;
    l->count++;
}

static layout equal_lengths(int32_t count, int32_t len) {
    layout l;
    l.count = 0;
    while (l.count < count) add_length(&l, len);
    return l;
}

static int32_t chunks_of(const layout *l, int32_t n) { return (l->cu_seqlens[n + 1] - l->cu_seqlens[n] + 63) / 64; }

static int32_t longest_of(const layout *l) {
    int32_t n, longest = 0;
    for (n = 0; n < l->count; n++)
        if (chunks_of(l, n) > longest) longest = chunks_of(l, n);
    return longest;
}

/* No workspace of its own: it may be larger than the fake GPU. */
static fqla_plan_desc desc_for(int32_t heads_qk, int32_t heads_v, const layout *l) {
    fqla_plan_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.heads_qk = heads_qk;
    desc.heads_v = heads_v;
    desc.num_seqs = l->count;
    desc.cu_seqlens = l->cu_seqlens;
    desc.external_workspace = 1;
    return desc;
}

/* Sebastiano Vigna's splitmix64, below a bound. */
static uint64_t random_state;
static int32_t random_below(int32_t bound) {
    uint64_t z = random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (int32_t)((z ^ z >> 31) % (uint64_t)bound);
}

/* Mostly few sequences; alike, whole chunks, one long among short ones, many empty, or anything. */
static layout random_layout(int32_t most_seqs) {
    const int style = random_below(5);
    const int32_t few = most_seqs < 9 ? most_seqs : 9, count = 1 + random_below(random_below(2) ? few : most_seqs);
    const int32_t bound = 1 + random_below(MOST_LEN + 1), one = random_below(count);
    layout l;
    l.count = 0;
    while (l.count < count) {
        const int32_t any = random_below(bound);
        switch (style) {
        case 0: add_length(&l, bound - 1); break;
        case 1: add_length(&l, any / 64 * 64); break;
        case 2: add_length(&l, l.count == one ? MOST_LEN - any % 64 : any % 500); break;
        case 3: add_length(&l, random_below(4) > 0 ? 0 : any); break;
        default: add_length(&l, any); break;
        }
    }
    return l;
}

/* ---- the table */

static const fqla__device_table *forward_table(const fqla_plan *plan) { return (const fqla__device_table *)plan->cuda.table; }
static const fqla__device_table *backward_table(const fqla_plan *plan) {
    return (const fqla__device_table *)(plan->cuda.table + plan->cuda.backward_table);
}

/* Is a table on the device right for these lengths and this schedule? Of every chunk exactly one segment. *longest: the segments of
   the sequence that has most. */
static enum greatest_test_res table_fits(const fqla_plan *plan, const layout *l, const fqla__device_table *table,
                                         const fqla__schedule *schedule, int32_t *longest) {
    static unsigned char covered[MOST_SEQS * (MOST_LEN / 64 + 1)]; /* by chunk of the batch: segments that it is in */
    const fqla__device_sequence *sequences = (const fqla__device_sequence *)(table + 1);
    const fqla__device_segment *segments = (const fqla__device_segment *)(sequences + table->num_seqs);
    const int32_t *cut_first = (const int32_t *)(const void *)(segments + table->segments), step = (int32_t)table->segment_chunks;
    const int64_t extra = schedule->extra_segments, most_seqs = plan->desc.max_seqs;
    int64_t chunk = 0, kept = 0, cut = 0, i;
    int32_t n, most = 1;
    ASSERT_EQ(l->count, (int32_t)table->num_seqs);
    ASSERT_EQ(schedule->segment_chunks, step);
    for (n = 0; n < l->count; n++) {
        const fqla__device_sequence *s = &sequences[n];
        const int32_t chunks = chunks_of(l, n), parts = step > 0 && chunks > step ? (chunks + step - 1) / step : 1;
        ASSERT(s->row == (plan->desc.padded_len > 0 ? (int64_t)n * plan->desc.padded_len : l->cu_seqlens[n]));
        ASSERT(s->len == l->cu_seqlens[n + 1] - l->cu_seqlens[n]);
        ASSERT(s->chunk == chunk);
        if (parts == 1) {
            ASSERT_EQ(-1, (int)s->kept);
        } else { /* its segments stand together, in order, after those of the cut sequences before it */
            ASSERT(s->kept == kept && cut_first[cut] == kept);
            for (i = 0; i < parts; i++) {
                ASSERT_EQ(n, segments[kept + i].sequence);
                ASSERT_EQ((int32_t)i, segments[kept + i].index);
            }
            kept += parts;
            cut++;
        }
        if (parts > most) most = parts;
        chunk += chunks;
    }
    ASSERT(table->chunks == chunk && table->kept == kept);
    ASSERT(table->segments == l->count - cut + kept && table->cut == cut && cut <= fqla__cuda_most_cut(table->num_seqs, table->segments));
    ASSERT(most <= FQLA__MOST_SEGMENTS);
    ASSERT(table->segments - l->count <= extra);
    ASSERT(kept <= extra + (extra < most_seqs ? extra : most_seqs));
    ASSERT(chunk <= fqla__cuda_max_chunks(&plan->desc));

    memset(covered, 0, (size_t)chunk);
    for (i = 0; i < table->segments; i++) {
        const fqla__device_sequence *s = &sequences[segments[i].sequence];
        int32_t c, first = 0, end = chunks_of(l, segments[i].sequence);
        ASSERT(segments[i].sequence >= 0 && segments[i].sequence < l->count);
        ASSERT((i < kept) == (s->kept >= 0));
        if (s->kept >= 0) {
            first = segments[i].index * step;
            if (end > first + step) end = first + step;
            ASSERT(first < end);
        } else {
            ASSERT_EQ(0, segments[i].index);
        }
        for (c = first; c < end; c++) covered[s->chunk + c]++;
        if (i > kept) { /* uncut sequences: the longest first, of equals the first */
            const fqla__device_sequence *before = &sequences[segments[i - 1].sequence];
            ASSERT(before->len > s->len || (before->len == s->len && before < s));
        }
    }
    for (i = 0; i < chunk; i++) ASSERT_EQ(1, covered[i]);
    *longest = most;
    PASS();
}

/* Are both, within what the plan has room for, and does it say so? */
static enum greatest_test_res tables_fit(const fqla_plan *plan, const layout *l) {
    const fqla__schedule *schedule = &plan->cuda.schedule, *backward = &plan->cuda.backward;
    int32_t longest;
    fqla_plan_summary summary;
    CHECK_CALL(table_fits(plan, l, forward_table(plan), schedule, &longest));
    ASSERT(forward_table(plan)->segments <= fqla__cuda_max_segments(plan));
    ASSERT(forward_table(plan)->kept <= fqla__cuda_max_kept(plan));
    ASSERT_EQ(FQLA_OK, fqla_plan_info(plan, &summary));
    ASSERT_EQ(longest, summary.segments);
    ASSERT_EQ(schedule->v_split, summary.v_split);
    if (!plan->desc.backward) PASS();
    ASSERT(plan->cuda.backward_table >= fqla__cuda_table_size(plan->desc.max_seqs, fqla__cuda_max_segments(plan)));
    CHECK_CALL(table_fits(plan, l, backward_table(plan), backward, &longest));
    ASSERT(backward_table(plan)->segments <= fqla__cuda_backward_segments(plan));
    ASSERT(backward_table(plan)->kept <= fqla__cuda_backward_kept(plan));
    PASS();
}

static bool same_schedule(const fqla__schedule *x, const fqla__schedule *y) {
    return x->v_split == y->v_split && x->extra_segments == y->extra_segments && x->segment_chunks == y->segment_chunks &&
           x->microseconds == y->microseconds && x->uncut == y->uncut;
}

static enum greatest_test_res same_table(const fqla__device_table *a, const fqla__device_table *b) {
    ASSERT_MEM_EQ(b, a, sizeof *a);
    ASSERT_MEM_EQ(b, a, fqla__cuda_table_size(a->num_seqs, a->segments));
    PASS();
}

/* The same tables, grids and words as those of a plan made for these lengths. */
static enum greatest_test_res same_as_fresh(const fqla_plan *plan, const fqla_plan *fresh) {
    fqla_plan_summary info, fresh_info;
    CHECK_CALL(same_table(forward_table(plan), forward_table(fresh)));
    if (plan->desc.backward) CHECK_CALL(same_table(backward_table(plan), backward_table(fresh)));
    ASSERT(same_schedule(&plan->cuda.schedule, &fresh->cuda.schedule));
    ASSERT(same_schedule(&plan->cuda.backward, &fresh->cuda.backward));
    fqla_plan_info(plan, &info);
    fqla_plan_info(fresh, &fresh_info);
    ASSERT_MEM_EQ(&fresh_info, &info, sizeof info);
    PASS();
}

static const int32_t head_counts[][2] = {{1, 1}, {4, 4}, {32, 32}, {2, 16}, {3, 3}, {5, 40}};
enum { HEAD_COUNTS = sizeof head_counts / sizeof head_counts[0] };

/* Plans of any layouts, with room to spare or without, packed or padded, then updated to other layouts. */
TEST any_layout(void) {
    enum { PLANS = 40, UPDATES = 4 };
    fqla_context *context = open_cuda();
    int heads, i, u, cuts = 0, uncuts = 0, backward_cuts = 0, backward_uncuts = 0;
    random_state = 1;
    for (heads = 0; heads < HEAD_COUNTS; heads++)
        for (i = 0; i < PLANS; i++) {
            const int padded = i % 4 == 3;
            layout l = random_layout(padded ? 20 : MOST_SEQS);
            fqla_plan_desc desc = desc_for(head_counts[heads][0], head_counts[heads][1], &l);
            fqla_plan *plan = NULL, *fresh = NULL;
            int32_t most;
            if (i % 4 == 1) desc.max_seqs = MOST_SEQS, desc.max_tokens = l.cu_seqlens[l.count] + random_below(1 << 20);
            if (i % 4 == 2) desc.max_seqs = l.count + random_below(MOST_SEQS - l.count + 1);
            if (padded) desc.padded_len = MOST_LEN;
            desc.backward = i / 4 % 2;
            ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
            CHECK_CALL(tables_fit(plan, &l));
            most = plan->desc.max_seqs;
            for (u = 0; u < UPDATES; u++) {
                layout other = random_layout(most);
                while (other.count > 1 && other.cu_seqlens[other.count] > plan->desc.max_tokens) other.count--;
                if (other.cu_seqlens[other.count] > plan->desc.max_tokens) continue;
                ASSERT_EQ(FQLA_OK, fqla_plan_update(plan, other.count, other.cu_seqlens, NULL));
                ASSERT_EQ(FQLA_OK, fqla_synchronize(context, NULL));
                CHECK_CALL(tables_fit(plan, &other));
                desc.num_seqs = other.count;
                desc.cu_seqlens = other.cu_seqlens;
                desc.max_seqs = plan->desc.max_seqs;
                if (!padded) desc.max_tokens = plan->desc.max_tokens;
                if (!padded && desc.max_tokens == 0) continue; /* a fresh plan would take the 0 for a default */
                ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &fresh));
                CHECK_CALL(same_as_fresh(plan, fresh));
                fqla_plan_destroy(fresh);
                if (plan->cuda.schedule.segment_chunks > 0) cuts++;
                else uncuts++;
                if (plan->cuda.backward.segment_chunks > 0) backward_cuts++;
                else backward_uncuts += desc.backward;
            }
            fqla_plan_destroy(plan);
        }
    ASSERT(cuts > 50 && uncuts > 50 && backward_cuts > 25 && backward_uncuts > 25); /* all were tried */
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* Layouts that serving has, by name, for every number of heads: a plan exists, its choices are no worse than leaving all whole, and
   the workspace is what flashqla.h says: 6.5 KB a chunk and v-head and up to 100 MB where sequences may be cut, 80 KB more with a
   backward. */
TEST ragged_layouts(void) {
    enum { LAYOUTS = 6, MB = 1 << 20 };
    static const char *const names[LAYOUTS] = {"300 of 1 to 30000 tokens", "powers of 2 and their neighbours",
                                               "300 of 100 tokens", "one of 30000 among 299 of 100", "30000 and 1 in turn",
                                               "8 of 4096"};
    static layout layouts[LAYOUTS];
    fqla_context *context = open_cuda();
    int heads, which;
    int32_t i;
    random_state = 4;
    memset(layouts, 0, sizeof layouts);
    for (i = 0; i < MOST_SEQS; i++) add_length(&layouts[0], i == 0 ? 1 : i == 1 ? MOST_LEN : 1 + random_below(MOST_LEN));
    for (i = 1; i <= 16384; i *= 2) add_length(&layouts[1], i - 1), add_length(&layouts[1], i), add_length(&layouts[1], i + 1);
    layouts[2] = equal_lengths(MOST_SEQS, 100);
    for (i = 0; i < MOST_SEQS; i++) add_length(&layouts[3], i == 123 ? MOST_LEN : 100);
    for (i = 0; i < 20; i++) add_length(&layouts[4], i % 2 == 0 ? MOST_LEN : 1);
    layouts[5] = equal_lengths(8, 4096);
    for (which = 0; which < LAYOUTS; which++)
        for (heads = 0; heads < HEAD_COUNTS; heads++) {
            const layout *l = &layouts[which];
            fqla_plan_desc desc = desc_for(head_counts[heads][0], head_counts[heads][1], l);
            const double prepared = (double)(l->cu_seqlens[l->count] / 64 + l->count) * desc.heads_v * sizeof(fqla__prepared_chunk);
            const fqla__schedule *schedule;
            fqla_plan *plan = NULL;
            fqla_plan_summary summary;
            char words[128];
            ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
            CHECK_CALL(tables_fit(plan, l));
            ASSERT_EQ(FQLA_OK, fqla_plan_info(plan, &summary));
            schedule = &plan->cuda.schedule;
            snprintf(words, sizeof words, "%d/%d heads, %s: v_split %d, %d segments, %.0f MB", (int)desc.heads_qk,
                     (int)desc.heads_v, names[which], (int)summary.v_split, (int)summary.segments,
                     (double)summary.workspace_size / MB);
            ASSERTm(words, schedule->microseconds > 0.0 && schedule->microseconds <= schedule->uncut);
            ASSERTm(words, (double)summary.workspace_size >= prepared);
            ASSERTm(words, (double)summary.workspace_size <= prepared + (schedule->extra_segments > 0 ? 100.0 * MB : 256.0));
            ASSERTm(words, summary.segments == 1 || schedule->segment_chunks >= FQLA__LEAST_SEGMENT);
            if (which == 2) ASSERT_EQm(words, 1, summary.segments); /* two chunks each: nothing to cut */
            /* the long one would be alone most of the time. Few heads' plans for such maxima are not made ready to cut */
            if (which == 3 && desc.heads_v > 4) ASSERTm(words, summary.segments > 1);
            fqla_plan_destroy(plan);
            desc.backward = 1;
            ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
            CHECK_CALL(tables_fit(plan, l));
            ASSERT_EQ(FQLA_OK, fqla_plan_info(plan, &summary));
            schedule = &plan->cuda.backward;
            ASSERTm(words, schedule->microseconds > 0.0 && schedule->microseconds <= schedule->uncut);
            ASSERTm(words, (double)summary.workspace_size <= 13.5 * prepared + 100.0 * MB); /* 6.5 KB and 80 KB are so much */
            ASSERTm(words, schedule->segment_chunks == 0 || schedule->segment_chunks >= FQLA__LEAST_SEGMENT);
            if (which == 3 && desc.heads_v <= 4) ASSERTm(words, schedule->segment_chunks > 0);
            fqla_plan_destroy(plan);
        }
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

TEST any_number_of_multiprocessors(void) {
    static const int counts[] = {1, 2, 16, 114, 132, 144, 511, 512, 5000};
    size_t i;
    int tries;
    random_state = 2;
    for (i = 0; i < sizeof counts / sizeof counts[0]; i++) {
        fqla_context *context;
        start(NULL);
        fake.fake_cuda_settings()->multiprocessors = counts[i];
        context = open_cuda();
        for (tries = 0; tries < 12; tries++) {
            const layout l = random_layout(MOST_SEQS);
            fqla_plan_desc desc = desc_for(head_counts[tries % HEAD_COUNTS][0], head_counts[tries % HEAD_COUNTS][1], &l);
            fqla_plan *plan = NULL;
            desc.backward = tries / HEAD_COUNTS % 2;
            ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
            CHECK_CALL(tables_fit(plan, &l));
            fqla_plan_destroy(plan);
        }
        ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
        CHECK_CALL(clean());
    }
    PASS();
}

TEST the_longest_first(void) {
    static const int32_t lens[6] = {5, 0, 300, 64, 300, 65}, order[6] = {2, 4, 5, 3, 0, 1};
    fqla_context *context = open_cuda();
    const fqla__device_table *table;
    const fqla__device_segment *segments;
    fqla_plan_desc desc;
    fqla_plan *plan = NULL;
    layout l;
    int i;
    l.count = 0;
    for (i = 0; i < 6; i++) add_length(&l, lens[i]);
    desc = desc_for(1, 1, &l);
    desc.segment_chunks = -1;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
    CHECK_CALL(tables_fit(plan, &l));
    table = (const fqla__device_table *)plan->cuda.table;
    segments = (const fqla__device_segment *)((const fqla__device_sequence *)(table + 1) + 6);
    for (i = 0; i < 6; i++) ASSERT_EQ(order[i], segments[i].sequence);
    fqla_plan_destroy(plan);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* However long a sequence, whatever the chunks of its segments. */
TEST the_most_segments(void) {
    static const int32_t longest[] = {64 * 64, 64 * 64 + 1, 64 * 64 * 8, 1 << 20, INT32_MAX};
    fqla_context *context = open_cuda();
    size_t i;
    for (i = 0; i < sizeof longest / sizeof longest[0]; i++) {
        const int32_t chunks = longest[i] / 64 + (longest[i] % 64 != 0), least = chunks / 64 + (chunks % 64 != 0);
        const layout l = equal_lengths(1, longest[i]);
        fqla_plan_desc desc = desc_for(1, 1, &l);
        fqla_plan *plan = NULL;
        fqla_plan_summary summary;
        ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
        ASSERT_EQ(FQLA_OK, fqla_plan_info(plan, &summary));
        ASSERT(summary.segments > 1 && summary.segments <= 64);
        fqla_plan_destroy(plan);
        desc.segment_chunks = least;
        ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
        ASSERT_EQ(FQLA_OK, fqla_plan_info(plan, &summary));
        ASSERT_EQ((chunks + least - 1) / least, summary.segments);
        fqla_plan_destroy(plan);
        if (least == 1) continue;
        desc.segment_chunks = least - 1;
        plan = NULL;
        ASSERT_EQ(FQLA_ERROR_INVALID_SIZE, fqla_plan_create(context, &desc, &plan));
        ASSERT(plan == NULL && strstr(host.error, "at most 64 segments") != NULL);
        forget_log();
    }
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

SUITE(tables) {
    SET_SETUP(start, NULL);
    RUN_TEST(any_layout);
    RUN_TEST(ragged_layouts);
    RUN_TEST(any_number_of_multiprocessors);
    RUN_TEST(the_longest_first);
    RUN_TEST(the_most_segments);
}

/* ---- the choice */

static const int32_t bench_heads[][2] = {{2, 8}, {8, 32}, {16, 64}, {16, 48}}; /* the rows of the benchmark */
static const int32_t bench_lens[][2] = {{1, 32768}, {1, 8192}, {1, 2048}, {2, 16384}, {8, 4096}, {8, 1024}}; /* count x length */
enum { BENCH_HEADS = sizeof bench_heads / sizeof bench_heads[0], BENCH_LENS = sizeof bench_lens / sizeof bench_lens[0] };

static enum greatest_test_res chosen(fqla_context *context, int heads, int lens, fqla__schedule *schedule) {
    const layout l = equal_lengths(bench_lens[lens][0], bench_lens[lens][1]);
    const fqla_plan_desc desc = desc_for(bench_heads[heads][0], bench_heads[heads][1], &l);
    fqla_plan *plan = NULL;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
    CHECK_CALL(tables_fit(plan, &l));
    *schedule = plan->cuda.schedule;
    fqla_plan_destroy(plan);
    PASS();
}

/* What is beyond doubt: a long sequence of few heads is cut; where there are blocks enough for all multiprocessors nothing is cut
   or split. */
TEST the_clear_cases(void) {
    static const struct {
        int heads, lens;
        bool cut;
    } cases[] = {{0, 0, true}, {0, 1, true}, {0, 3, true}, {1, 0, true},
                 {2, 4, false}, {2, 5, false}, {3, 4, false}, {3, 5, false}, {1, 4, false}, {1, 5, false}};
    fqla_context *context = open_cuda();
    size_t i;
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        fqla__schedule schedule;
        char words[64];
        CHECK_CALL(chosen(context, cases[i].heads, cases[i].lens, &schedule));
        snprintf(words, sizeof words, "case %d: v_split %d, segments of %d chunks", (int)i, (int)schedule.v_split,
                 (int)schedule.segment_chunks);
        ASSERTm(words, (schedule.segment_chunks > 0) == cases[i].cut);
        ASSERTm(words, cases[i].cut || schedule.v_split == 1);
        ASSERTm(words, !cases[i].cut || schedule.microseconds < schedule.uncut / 1.5);
    }
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* The same of a backward: four blocks a segment and v-head, so that 32 heads fill the chip. */
TEST the_clear_cases_of_a_backward(void) {
    fqla_context *context = open_cuda();
    int heads, lens;
    for (heads = 0; heads < BENCH_HEADS; heads++)
        for (lens = 0; lens < BENCH_LENS; lens++) {
            const layout l = equal_lengths(bench_lens[lens][0], bench_lens[lens][1]);
            fqla_plan_desc desc = desc_for(bench_heads[heads][0], bench_heads[heads][1], &l);
            const fqla__schedule *schedule;
            fqla_plan *plan = NULL;
            char words[128];
            desc.backward = 1;
            ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
            CHECK_CALL(tables_fit(plan, &l));
            schedule = &plan->cuda.backward;
            snprintf(words, sizeof words, "%d heads, %d x %d: segments of %d chunks, %.0f us, uncut %.0f", (int)desc.heads_v,
                     (int)l.count, (int)bench_lens[lens][1], (int)schedule->segment_chunks, schedule->microseconds,
                     schedule->uncut);
            ASSERTm(words, schedule->microseconds > 0.0 && schedule->microseconds <= schedule->uncut);
            if (heads == 0 && lens <= 1) ASSERTm(words, schedule->segment_chunks > 0); /* 8 heads, one long sequence */
            if (desc.heads_v >= 48 || l.count == 8) ASSERT_EQm(words, 0, schedule->segment_chunks);
            fqla_plan_destroy(plan);
        }
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* No row leaves over half of the GPU idle with neither of the two, and more heads never mean more segments. */
TEST every_row_of_the_benchmark(void) {
    fqla_context *context = open_cuda();
    int heads, lens;
    for (lens = 0; lens < BENCH_LENS; lens++) {
        int32_t fewest = INT32_MAX;
        for (heads = 0; heads < 3; heads++) { /* 8, 32, 64 */
            const int32_t count = bench_lens[lens][0], chunks = bench_lens[lens][1] / 64;
            fqla__schedule schedule;
            int32_t parts;
            char words[64];
            CHECK_CALL(chosen(context, heads, lens, &schedule));
            parts = schedule.segment_chunks > 0 ? (chunks + schedule.segment_chunks - 1) / schedule.segment_chunks : 1;
            snprintf(words, sizeof words, "%d heads, %d x %d: v_split %d, %d segments", (int)bench_heads[heads][1], (int)count,
                     (int)bench_lens[lens][1], (int)schedule.v_split, (int)parts);
            ASSERTm(words, schedule.microseconds > 0 && schedule.microseconds <= schedule.uncut);
            ASSERTm(words, bench_heads[heads][1] * count * schedule.v_split * parts > 66 || schedule.v_split == 2 || parts > 1);
            ASSERTm(words, parts <= fewest);
            fewest = parts;
        }
    }
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* The planner tries some counts of segments only; no count between them is much better by its own model. */
TEST the_search_is_fine_enough(void) {
    fqla_context *context = open_cuda();
    int heads, lens;
    for (heads = 0; heads < BENCH_HEADS; heads++)
        for (lens = 0; lens < BENCH_LENS; lens++) {
            const layout l = equal_lengths(bench_lens[lens][0], bench_lens[lens][1]);
            const fqla_plan_desc desc = desc_for(bench_heads[heads][0], bench_heads[heads][1], &l);
            fqla_plan *plan = NULL;
            fqla__lengths lengths;
            int32_t step;
            ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
            lengths.cu_seqlens = l.cu_seqlens;
            lengths.count = l.count;
            lengths.each = 0;
            for (step = FQLA__LEAST_SEGMENT; step < longest_of(&l); step++) {
                const double time = fqla__model(plan, &plan->cuda.schedule, &lengths, step);
                ASSERT(time < 0 || time > plan->cuda.schedule.microseconds * 0.9);
            }
            fqla_plan_destroy(plan);
        }
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* v_split and how far sequences may be cut are the maxima's: captured grids depend on them. Where they are cut is not. */
TEST what_an_update_changes(void) {
    const layout one = equal_lengths(1, 32768), many = equal_lengths(256, 128);
    fqla_context *context = open_cuda();
    fqla_plan_desc desc = desc_for(2, 8, &one);
    fqla_plan *plan = NULL;
    fqla__schedule before;
    size_t bytes = 0, after = 0;
    desc.max_seqs = 256;
    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
    CHECK_CALL(tables_fit(plan, &one));
    before = plan->cuda.schedule;
    fqla_workspace_size(plan, &bytes);
    ASSERT_EQ(FQLA_OK, fqla_plan_update(plan, many.count, many.cu_seqlens, NULL));
    ASSERT_EQ(FQLA_OK, fqla_synchronize(context, NULL));
    CHECK_CALL(tables_fit(plan, &many));
    ASSERT_EQ(0, plan->cuda.schedule.segment_chunks);
    ASSERT_EQ(before.v_split, plan->cuda.schedule.v_split);
    ASSERT_EQ(before.extra_segments, plan->cuda.schedule.extra_segments);
    fqla_workspace_size(plan, &after);
    ASSERT_EQ(bytes, after);
    fqla_plan_destroy(plan);
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

/* Forced choices are obeyed, by updates too. */
TEST forced_choices(void) {
    static const int32_t steps[] = {-1, 1, 2, 7, 33, 64, 1000};
    fqla_context *context = open_cuda();
    int heads, v_split, tries;
    size_t i;
    random_state = 3;
    for (heads = 0; heads < HEAD_COUNTS; heads++)
        for (v_split = 0; v_split <= 2; v_split++)
            for (i = 0; i < sizeof steps / sizeof steps[0]; i++)
                for (tries = 0; tries < 3; tries++) {
                    layout l = random_layout(MOST_SEQS), other = random_layout(MOST_SEQS);
                    fqla_plan_desc desc = desc_for(head_counts[heads][0], head_counts[heads][1], &l);
                    fqla_plan *plan = NULL;
                    int32_t chunks, step;
                    while (l.count > 1 && steps[i] > 0 && (l.cu_seqlens[l.count] + 63) / 64 > 64 * steps[i]) l.count--;
                    chunks = (l.cu_seqlens[l.count] + 63) / 64;
                    if (steps[i] > 0 && chunks > 64 * steps[i]) continue; /* refused: test_bad_input.c */
                    desc.num_seqs = l.count;
                    desc.max_seqs = MOST_SEQS;
                    desc.v_split = v_split;
                    desc.segment_chunks = steps[i];
                    desc.backward = tries % 2;
                    ASSERT_EQ(FQLA_OK, fqla_plan_create(context, &desc, &plan));
                    CHECK_CALL(tables_fit(plan, &l));
                    if (v_split > 0) ASSERT_EQ(v_split, plan->cuda.schedule.v_split);
                    step = plan->cuda.schedule.segment_chunks; /* where nothing can be so long, none is cut */
                    ASSERT_EQ(steps[i] > 0 && chunks >= steps[i] ? steps[i] : 0, step);
                    if (desc.backward) ASSERT_EQ(step, plan->cuda.backward.segment_chunks);
                    ASSERT(plan->cuda.schedule.microseconds > 0);
                    while (other.count > 1 && other.cu_seqlens[other.count] > plan->desc.max_tokens) other.count--;
                    if (other.cu_seqlens[other.count] <= plan->desc.max_tokens) {
                        ASSERT_EQ(FQLA_OK, fqla_plan_update(plan, other.count, other.cu_seqlens, NULL));
                        ASSERT_EQ(FQLA_OK, fqla_synchronize(context, NULL));
                        CHECK_CALL(tables_fit(plan, &other));
                        ASSERT_EQ(step, plan->cuda.schedule.segment_chunks);
                        if (desc.backward) ASSERT_EQ(step, plan->cuda.backward.segment_chunks);
                    }
                    fqla_plan_destroy(plan);
                }
    ASSERT_EQ(FQLA_OK, fqla_context_destroy(context));
    return clean();
}

SUITE(choices) {
    SET_SETUP(start, NULL);
    RUN_TEST(the_clear_cases);
    RUN_TEST(the_clear_cases_of_a_backward);
    RUN_TEST(every_row_of_the_benchmark);
    RUN_TEST(the_search_is_fine_enough);
    RUN_TEST(what_an_update_changes);
    RUN_TEST(forced_choices);
}

GREATEST_MAIN_DEFS();

int main(int argc, char **argv) {
    if (!find_fake()) {
        fprintf(stderr, "test_cuda_schedule: " FIRST_LIBRARY " is not the fake driver; LD_LIBRARY_PATH leads to it\n");
        return 2;
    }
    GREATEST_MAIN_BEGIN();
    RUN_SUITE(tables);
    RUN_SUITE(choices);
    GREATEST_MAIN_END();
}
