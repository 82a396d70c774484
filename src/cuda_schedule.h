// >>cuda_schedule: how a forward is spread over the GPU: V over one block or two, sequences cut into segments or not
//
// V's split, the grids and the workspace follow from the plan's maxima alone; where sequences are cut follows from their lengths too,
// so that an update chooses anew. Both minimise a model of the time, whose constants were fitted to 820 times of 42 layouts
// (tools/results/h200_plans.txt), of each of which it picks the best where V's split is right for the lengths, also with all constants
// 2 % off. What the model cannot know is assumed: a quarter of the heads is exact (ptx/segment.h), the others warm up over six chunks;
// where segments are shorter than that, all heads are exact.

/* Microseconds on one multiprocessor of a Hopper GPU. */
typedef struct fqla__walk_costs {
    double chunk;    /* of a v-head */
    double warm_up;  /* of one, the state alone */
    double block;    /* a segment's place, first loads, the state in and out */
} fqla__walk_costs;

static const struct {
    double prepare;               /* a chunk of a v-head, kernel prepare */
    fqla__walk_costs whole, half; /* forward and forward_half */
    double state;                 /* a chunk of half a state or transition, kernel states, two of them on a multiprocessor */
    double scan;                  /* a segment, kernel scan */
    double start, ready, cut;     /* launches: of prepare and forward; of states and scan; what they take where sequences are cut */
} fqla__costs = {0.6, {2.0, 2.2, 6.1}, {1.35, 1.02, 3.2}, 1.15, 1.3, 0.74, 3.44, 1.5};

enum {
    FQLA__WARM_UP_CHUNKS = 6,    /* assumed */
    FQLA__EXACT_HEADS = 4,       /* one head in so many, assumed */
    FQLA__LEAST_SEGMENT = 4,     /* chunks of a segment */
    FQLA__SHORT_MICROSECONDS = 120, /* of a forward whose plan need not be ready to cut: as equal sequences, */
    FQLA__LONG_MICROSECONDS = 960,  /* and as a single one, uncut */
    FQLA__SIMULATED_BLOCKS = 4096, /* with more the blocks are taken to be spread evenly */
    FQLA__MOST_SERVERS = 512
};

static int64_t fqla__ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* The lengths of a layout in chunks: by sequence, or, chunks NULL, `count` equal ones of `each`. */
typedef struct fqla__lengths {
    const int32_t *cu_seqlens;   /* NULL: all of `each` chunks */
    int32_t count, each;
} fqla__lengths;

static int32_t fqla__chunks_of(const fqla__lengths *lengths, int32_t n) {
    if (lengths->cu_seqlens == NULL) return lengths->each;
    return (int32_t)fqla__ceil_div(lengths->cu_seqlens[n + 1] - lengths->cu_seqlens[n], FLASHQLA_CHUNK);
}

/* Multiprocessors, as far as a model knows them. */
static int32_t fqla__servers(const fqla_plan *plan) {
    const int32_t sm_count = plan->context->summary.sm_count;
    return sm_count > 0 && sm_count < FQLA__MOST_SERVERS ? sm_count : FQLA__MOST_SERVERS;
}

/* Every block goes to the first of `servers` that is free, a heap of the times at which they are, and there begins, but not before `from`;
   returns when it is done. */
static double fqla__serve(double *heap, int32_t servers, double from, double cost) {
    int32_t i = 0;
    const double time = (heap[0] > from ? heap[0] : from) + cost;
    for (;;) {
        int32_t child = 2 * i + 1;
        if (child >= servers) break;
        if (child + 1 < servers && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= time) break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = time;
    return time;
}

/* The model's time of a forward over these lengths. segment_chunks 0: uncut. -1 where that cut has more segments than the schedule allows. */
static double fqla__model(const fqla_plan *plan, const fqla__schedule *schedule, const fqla__lengths *lengths, int32_t segment_chunks) {
    const fqla_plan_desc *d = &plan->desc;
    const int32_t servers = fqla__servers(plan), copies = d->heads_v * schedule->v_split;
    const int32_t warm_up = segment_chunks >= FQLA__WARM_UP_CHUNKS ? FQLA__WARM_UP_CHUNKS : 0;
    const int32_t exact = segment_chunks >= FQLA__WARM_UP_CHUNKS ? d->heads_v / FQLA__EXACT_HEADS : d->heads_v;
    const fqla__walk_costs cost = schedule->v_split == 2 ? fqla__costs.half : fqla__costs.whole;
    double heap[FQLA__MOST_SERVERS], total = 0.0, longest = 0.0, end = 0.0, first_pass = 0.0;
    int64_t chunks = 0, segments = 0, first_pass_blocks = 0, most = 0;
    int32_t n, i, pass;
    for (n = 0; n < lengths->count; n++) {
        const int64_t length = fqla__chunks_of(lengths, n), parts = segment_chunks > 0 && length > segment_chunks ? fqla__ceil_div(length, segment_chunks) : 1;
        chunks += length;
        segments += parts;
        if (parts > most) most = parts;
        if (parts > 1) first_pass_blocks += exact * (2 * (parts - 1) + 2 * (parts - 2));
    }
    if (segments - lengths->count > schedule->extra_segments || most > FQLA__MOST_SEGMENTS) return -1.0;
    for (i = 0; i < servers; i++) heap[i] = 0.0;
    /* cut sequences first, then the others; in what order within them is of little weight */
    for (pass = 0; pass < 2; pass++)
        for (n = 0; n < lengths->count; n++) {
            const int64_t length = fqla__chunks_of(lengths, n);
            const bool cut = segment_chunks > 0 && length > segment_chunks;
            int64_t first;
            if (cut != (pass == 0)) continue;
            for (first = 0; first < length; first += cut ? segment_chunks : length) {
                const int64_t own = cut && length - first > segment_chunks ? segment_chunks : length - first;
                const double time = (double)own * cost.chunk + (first > 0 ? warm_up * cost.warm_up : 0.0) + cost.block;
                total += time * copies;
                if (time > longest) longest = time;
                if (segments * copies <= FQLA__SIMULATED_BLOCKS)
                    for (i = 0; i < copies; i++) (void)fqla__serve(heap, servers, 0.0, time);
            }
        }
    if (segments * copies <= FQLA__SIMULATED_BLOCKS) {
        for (i = 0; i < servers; i++)
            if (heap[i] > end) end = heap[i];
    } else {
        end = total / servers + longest * 0.5;
    }
    if (first_pass_blocks > 0)
        first_pass = (double)fqla__ceil_div(first_pass_blocks, 2 * servers) * segment_chunks * fqla__costs.state + (double)most * fqla__costs.scan;
    if (most > 1) first_pass += fqla__costs.cut;
    return fqla__costs.start + (schedule->extra_segments > 0 ? fqla__costs.ready : 0.0) +
           (double)chunks * d->heads_v * fqla__costs.prepare / servers + first_pass + end;
}

/* A model's time of one operation over these lengths, as fqla__model. */
typedef double fqla__model_function(const fqla_plan *plan, const fqla__schedule *schedule, const fqla__lengths *lengths,
                                    int32_t segment_chunks);

/* Where to cut these lengths, by a model. */
static void fqla__choose_cut(const fqla_plan *plan, fqla__schedule *schedule, const fqla__lengths *lengths, fqla__model_function *model) {
    int32_t n, parts, longest = 0;
    const int32_t forced = plan->desc.segment_chunks;
    schedule->segment_chunks = 0;
    schedule->uncut = schedule->microseconds = model(plan, schedule, lengths, 0);
    if (schedule->extra_segments == 0) return;
    if (forced > 0) {
        schedule->segment_chunks = forced;
        schedule->microseconds = model(plan, schedule, lengths, forced);
        return;
    }
    for (n = 0; n < lengths->count; n++)
        if (fqla__chunks_of(lengths, n) > longest) longest = fqla__chunks_of(lengths, n);
    for (parts = 2; parts <= FQLA__MOST_SEGMENTS; parts++) {
        const int32_t step = (int32_t)fqla__ceil_div(longest, parts);
        double time;
        if (step < FQLA__LEAST_SEGMENT) break;
        if (step == fqla__ceil_div(longest, parts - 1)) continue;
        time = model(plan, schedule, lengths, step);
        if (time >= 0.0 && time < schedule->microseconds) {
            schedule->microseconds = time;
            schedule->segment_chunks = step;
        }
    }
}

/* V's split and how far sequences may be cut, from the maxima: as if all sequences were equally long. Where they gain nothing from being
   cut the kernels for it, 5 to 8 us, are left out only if the whole is short, and not long either as one sequence: a plan may be given
   other lengths, and one long sequence among short ones does gain. */
static void fqla__choose_schedule(fqla_plan *plan, fqla__schedule *schedule) {
    const fqla_plan_desc *d = &plan->desc;
    const int64_t blocks = 2 * (int64_t)plan->context->summary.sm_count, most_chunks = fqla__ceil_div(d->max_tokens, FLASHQLA_CHUNK);
    fqla__lengths lengths;
    fqla__schedule best;
    int32_t split, may_cut;
    lengths.cu_seqlens = NULL;
    lengths.count = d->max_seqs;
    lengths.each = (int32_t)fqla__ceil_div(most_chunks, d->max_seqs);
    memset(&best, 0, sizeof best);
    for (split = 1; split <= 2; split++)
        for (may_cut = 0; may_cut <= 1; may_cut++) {
            fqla__schedule one;
            int64_t extra = blocks / ((int64_t)d->heads_v * split);
            if (d->v_split != 0 && d->v_split != split) continue;
            memset(&one, 0, sizeof one);
            if (extra > most_chunks / FQLA__LEAST_SEGMENT) extra = most_chunks / FQLA__LEAST_SEGMENT;
            if (d->segment_chunks > 0) extra = most_chunks / d->segment_chunks;
            if (d->segment_chunks < 0 || !may_cut) extra = 0;
            if (d->segment_chunks > 0 && !may_cut) continue;
            one.v_split = split;
            one.extra_segments = (int32_t)extra;
            fqla__choose_cut(plan, &one, &lengths, fqla__model);
            if (!may_cut && d->segment_chunks == 0 &&
                (one.microseconds > (double)FQLA__SHORT_MICROSECONDS ||
                 (double)most_chunks * (split == 2 ? fqla__costs.half : fqla__costs.whole).chunk > (double)FQLA__LONG_MICROSECONDS))
                continue;
            if (best.v_split == 0 || one.microseconds < best.microseconds) best = one;
        }
    *schedule = best;
}
