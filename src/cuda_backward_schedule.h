// >>cuda_backward_schedule: where a backward cuts sequences
//
// As for a forward (cuda_schedule.h), by a model of the time: of kernel backward_chains, in which a v-head has four blocks a
// segment, one a multiprocessor, and of the first pass and the scan before it where sequences are cut. Its constants were fitted to the
// times of six layouts with 2 to 32 v-heads and 8192 to 32768 tokens, each with 9 to 13 cuts, on one H200: it picks the best of each.

/* Microseconds on one multiprocessor of a Hopper GPU. */
static const struct {
    double gradient, state;  /* a chunk of half of V, kernel backward_chains: backwards, forwards */
    double first_pass;       /* the same without what it leaves */
    double scan;             /* a segment, kernel backward_scan */
    double rest;             /* a chunk of a v-head, kernel backward_gradients */
    double start, cut;       /* launches and first loads: of backward_chains and backward_gradients, of first pass and scan */
    double block;            /* of backward_chains: its segment's place, first loads, the state in and out */
} fqla__backward_costs = {1.44, 0.88, 1.28, 1.66, 7.45, 4.9, 15.0, 2.45};

/* The model's time of a backward over these lengths. segment_chunks 0: uncut. -1 where that cut has more segments than the schedule
   allows. */
static double fqla__backward_model(const fqla_plan *plan, const fqla__schedule *schedule, const fqla__lengths *lengths,
                                   int32_t segment_chunks) {
    enum { MOST_SERVERS = 512 };
    const fqla_plan_desc *d = &plan->desc;
    const int32_t sm_count = plan->context->summary.sm_count;
    const int32_t servers = sm_count > 0 && sm_count < MOST_SERVERS ? sm_count : MOST_SERVERS;
    const int32_t copies = 2 * d->heads_v, warm_up_chunks = segment_chunks >= FQLA__WARM_UP_CHUNKS ? FQLA__WARM_UP_CHUNKS : 0;
    const int32_t exact = segment_chunks >= FQLA__WARM_UP_CHUNKS ? d->heads_v / FQLA__EXACT_HEADS : d->heads_v;
    double heap[MOST_SERVERS], total = 0.0, longest = 0.0, end = 0.0, first_pass = 0.0;
    int64_t chunks = 0, segments = 0, first_pass_blocks = 0, most = 0;
    int32_t n, i, way;
    bool simulated;
    for (n = 0; n < lengths->count; n++) {
        const int64_t length = fqla__chunks_of(lengths, n);
        const int64_t parts = segment_chunks > 0 && length > segment_chunks ? fqla__ceil_div(length, segment_chunks) : 1;
        chunks += length;
        segments += parts;
        if (parts > most) most = parts;
        if (parts > 1) first_pass_blocks += exact * (2 * 2 * (parts - 1) + 2 * (parts - 2));
    }
    if (segments - lengths->count > schedule->extra_segments || most > FQLA__MOST_SEGMENTS) return -1.0;
    simulated = segments * copies <= FQLA__SIMULATED_BLOCKS;
    for (i = 0; i < servers; i++) heap[i] = 0.0;
    for (way = 0; way < 2; way++)
        for (n = 0; n < lengths->count; n++) {
            const int64_t length = fqla__chunks_of(lengths, n);
            const int64_t step = segment_chunks > 0 && length > segment_chunks ? segment_chunks : length;
            int64_t first;
            for (first = 0; first < length; first += step) {
                const int64_t own = length - first < step ? length - first : step, warm_up = first > 0 ? warm_up_chunks : 0;
                const double time = (double)own * (way == 0 ? fqla__backward_costs.gradient : fqla__backward_costs.state) +
                                    (double)warm_up * fqla__backward_costs.first_pass + fqla__backward_costs.block;
                total += time * copies;
                if (time > longest) longest = time;
                for (i = 0; simulated && i < copies; i++) fqla__serve(heap, servers, time);
            }
        }
    if (simulated) {
        for (i = 0; i < servers; i++)
            if (heap[i] > end) end = heap[i];
    } else {
        end = total / servers + longest * 0.5;
    }
    if (most > 1)
        first_pass = fqla__backward_costs.cut + (double)most * fqla__backward_costs.scan +
                     (double)fqla__ceil_div(first_pass_blocks, servers) * segment_chunks * fqla__backward_costs.first_pass;
    return fqla__backward_costs.start + first_pass + end + (double)chunks * d->heads_v * fqla__backward_costs.rest / servers;
}

/* How far sequences may be cut, from the maxima. Where neither equally long sequences nor one that is as long as all gains from
   being cut, the kernels for it are left out. */
static void fqla__choose_backward_schedule(const fqla_plan *plan, fqla__schedule *schedule) {
    const fqla_plan_desc *d = &plan->desc;
    const int64_t most_chunks = fqla__ceil_div(d->max_tokens, FLASHQLA_CHUNK);
    int64_t extra = 2 * (int64_t)plan->context->summary.sm_count / (4 * (int64_t)d->heads_v);
    fqla__lengths lengths;
    int pass;
    memset(schedule, 0, sizeof *schedule);
    schedule->v_split = 2;
    if (!d->backward || d->low_memory || d->segment_chunks < 0) return;
    if (extra > most_chunks / FQLA__LEAST_SEGMENT) extra = most_chunks / FQLA__LEAST_SEGMENT;
    if (d->segment_chunks > 0) extra = most_chunks / d->segment_chunks;
    schedule->extra_segments = (int32_t)extra;
    if (d->segment_chunks > 0) return;
    lengths.cu_seqlens = NULL;
    for (pass = 0; pass < 2; pass++) {
        lengths.count = pass == 0 ? d->max_seqs : 1;
        lengths.each = (int32_t)fqla__ceil_div(most_chunks, lengths.count);
        fqla__choose_cut(plan, schedule, &lengths, fqla__backward_model);
        if (schedule->segment_chunks > 0) return;
    }
    schedule->extra_segments = 0;
}
