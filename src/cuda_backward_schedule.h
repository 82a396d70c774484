// >>cuda_backward_schedule: where a backward cuts sequences
//
// As for a forward (cuda_schedule.h), by a model of the time: of kernel backward_chains, in which a v-head has four blocks a
// segment, one a multiprocessor; where sequences are cut of the first pass and the scan, beside which the main pass begins and
// after which its exact chains do; and of backward_gradients, which follows. Its constants were fitted to the times of eight layouts
// with 2 to 16 v-heads and 2048 to 32768 tokens, each with 6 to 10 cuts, on one H200: of these cuts the one that it picks is at most
// 1.7 % slower than the best of a layout's, 0.5 % in the mean.

/* Microseconds on one multiprocessor of a Hopper GPU. */
static const struct {
    double gradient, state;  /* a chunk of half of V, kernel backward_chains: backwards, forwards */
    double exact;            /* backwards, of an exact head, while the rest of the warm ones' work is under way beside it */
    double first_state;      /* forwards, or a transition, without what it leaves */
    double scan;             /* a segment, kernel backward_scan */
    double rest;             /* a chunk of a v-head, kernel backward_gradients */
    double start, cut, tail; /* launches and first loads; from the first pass to the scan; from cut chains to what follows */
    double block;            /* of backward_chains: its segment's place, first loads, the state in and out */
    double whole;            /* what of all this it takes where nothing is cut: 0.87 to 1 with 16 to 64 v-heads */
} fqla__backward_costs = {1.45, 1.1, 1.8, 0.8, 0.8, 6.9, 5.6, 2.0, 6.5, 4.0, 0.9};

/* Blocks of one kind of all sequences. */
typedef struct fqla__chain_blocks {
    double chunk;           /* microseconds */
    int32_t first, others;  /* blocks of a sequence's first segment, which is all of an uncut one, and of each of the others */
    int32_t skipped;        /* of the others, so many have none */
    int32_t warm_up_chunks; /* of the others */
    double from;            /* not before */
    double mean, last;      /* of their ends, once they are served; 0 where there are none */
} fqla__chain_blocks;

static void fqla__serve_chains(double *heap, int32_t servers, const fqla__lengths *lengths, int32_t segment_chunks, fqla__chain_blocks *b) {
    double sum = 0.0;
    int64_t count = 0;
    int32_t n, i;
    for (n = 0; n < lengths->count; n++) {
        const int64_t length = fqla__chunks_of(lengths, n), step = segment_chunks > 0 ? segment_chunks : length;
        int64_t first;
        for (first = 0; first < length; first += step) {
            const int64_t own = length - first < step ? length - first : step;
            const int32_t blocks = first == 0 ? b->first : first <= b->skipped * step ? 0 : b->others;
            const double time = (double)(own + (first > 0 ? b->warm_up_chunks : 0)) * b->chunk + fqla__backward_costs.block;
            for (i = 0; i < blocks; i++, count++) {
                const double end = fqla__serve(heap, servers, b->from, time);
                sum += end;
                if (end > b->last) b->last = end;
            }
        }
    }
    if (count > 0) b->mean = sum / (double)count;
}

/* Simulated: the first pass, the main pass in the order of its sections (ptx/backward_segment.h), and then the rest's work on the
   multiprocessors that have become free, of which that of the exact heads waits for their chains. */
static double fqla__cut_backward_model(const fqla_plan_desc *d, int32_t servers, const fqla__lengths *lengths, int32_t segment_chunks,
                                       int64_t most, double rest) {
    const bool warms_up = segment_chunks >= FQLA__WARM_UP_CHUNKS;
    const int32_t exact = warms_up ? d->heads_v / FQLA__EXACT_HEADS : d->heads_v, warm = d->heads_v - exact;
    const int32_t warm_up_chunks = warms_up ? FQLA__WARM_UP_CHUNKS : 0;
    const double late = exact < d->heads_qk ? (double)exact / d->heads_qk : 1.0;
    const double gradient = fqla__backward_costs.gradient, state = fqla__backward_costs.state, first_state = fqla__backward_costs.first_state;
    double heap[FQLA__MOST_SERVERS], scanned = 0.0, ready, last, total = rest, waits;
    int32_t i;
    fqla__chain_blocks first[] = {{gradient, 0, 2 * exact, 0, 0, 0.0, 0.0, 0.0},
                                  {first_state, 0, 2 * exact, 0, 0, 0.0, 0.0, 0.0},
                                  {first_state, 0, 2 * exact, 1, 0, 0.0, 0.0, 0.0}}; /* transitions */
    fqla__chain_blocks chains[] = {{gradient, 2 * d->heads_v, 2 * warm, 0, warm_up_chunks, 0.0, 0.0, 0.0},
                                   {fqla__backward_costs.exact, 0, 2 * exact, 0, 0, 0.0, 0.0, 0.0},
                                   {state, 0, 2 * exact, 0, 0, 0.0, 0.0, 0.0},
                                   {state, 2 * d->heads_v, 2 * warm, 0, warm_up_chunks, 0.0, 0.0, 0.0}};
    for (i = 0; i < servers; i++) heap[i] = 0.0;
    for (i = 0; i < 3; i++) {
        fqla__serve_chains(heap, servers, lengths, segment_chunks, &first[i]);
        if (first[i].last > scanned) scanned = first[i].last;
    }
    scanned += fqla__backward_costs.cut + (double)most * fqla__backward_costs.scan;
    chains[1].from = chains[2].from = scanned;
    for (i = 0; i < 4; i++) fqla__serve_chains(heap, servers, lengths, segment_chunks, &chains[i]);
    last = chains[1].last > chains[2].last ? chains[1].last : chains[2].last;
    ready = chains[0].mean > chains[3].mean ? chains[0].mean : chains[3].mean;
    for (i = 0; i < servers; i++) total += heap[i] > ready ? heap[i] : ready;
    waits = last + rest / servers * late;
    return fqla__backward_costs.start + fqla__backward_costs.tail + (total / servers > waits ? total / servers : waits);
}

/* The model's time of a backward over these lengths. segment_chunks 0: uncut. -1 where that cut has more segments than the schedule
   allows. */
static double fqla__backward_model(const fqla_plan *plan, const fqla__schedule *schedule, const fqla__lengths *lengths,
                                   int32_t segment_chunks) {
    const fqla_plan_desc *d = &plan->desc;
    const int32_t servers = fqla__servers(plan);
    double rest, total = 0.0, longest = 0.0;
    int64_t chunks = 0, segments = 0, most = 0;
    int32_t n;
    for (n = 0; n < lengths->count; n++) {
        const int64_t length = fqla__chunks_of(lengths, n);
        const int64_t parts = segment_chunks > 0 && length > segment_chunks ? fqla__ceil_div(length, segment_chunks) : 1;
        const double time = (double)fqla__ceil_div(length, parts) * fqla__backward_costs.gradient + fqla__backward_costs.block;
        chunks += length;
        segments += parts;
        if (parts > most) most = parts;
        total += (double)length * (fqla__backward_costs.gradient + fqla__backward_costs.state) + 2.0 * (double)parts * fqla__backward_costs.block;
        if (time > longest) longest = time;
    }
    if (segments - lengths->count > schedule->extra_segments || most > FQLA__MOST_SEGMENTS) return -1.0;
    rest = (double)chunks * d->heads_v * fqla__backward_costs.rest;
    total *= 2 * d->heads_v;
    if (segments * 2 * d->heads_v > FQLA__SIMULATED_BLOCKS) /* of a way; spread evenly, cut or not */
        return fqla__backward_costs.start + (total + rest) / servers + longest * 0.5;
    if (most <= 1) {
        fqla__chain_blocks gradients = {fqla__backward_costs.gradient, 2 * d->heads_v, 0, 0, 0, 0.0, 0.0, 0.0}, states = gradients;
        double heap[FQLA__MOST_SERVERS];
        int32_t i;
        for (i = 0; i < servers; i++) heap[i] = 0.0;
        states.chunk = fqla__backward_costs.state;
        fqla__serve_chains(heap, servers, lengths, 0, &gradients);
        fqla__serve_chains(heap, servers, lengths, 0, &states);
        return fqla__backward_costs.whole *
               (fqla__backward_costs.start + (gradients.last > states.last ? gradients.last : states.last) + rest / servers);
    }
    return fqla__cut_backward_model(d, servers, lengths, segment_chunks, most, rest);
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
