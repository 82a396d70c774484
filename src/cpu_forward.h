// >>cpu_forward: the token recurrence on the CPU, for prefill and decode

/*
    A task is a (sequence, v-head), or a block of its columns where there are too few of those to occupy the threads. It walks
    the sequence in segments of up to 64 tokens: it prepares the segment's tiles (rows of q and k in float32, gates, dot
    products) once, and then takes every block of the state through all of them, so that the block stays in the L1 cache.

    Rows of one head lie kilobytes apart, where no hardware prefetcher follows. While a segment is computed, the next one's rows
    are prefetched, a share with every step.
*/
enum { FQLA__SEGMENT = FLASHQLA_CHUNK };

/* A thread's piece of workspace. */
typedef struct fqla__forward_slot {
    float *k, *q;      /* [FQLA__SEGMENT, D_k], normalised where the plan asks for it */
    fqla__tile *tiles; /* the segment's, up to FQLA__SEGMENT */
    float *v, *o;      /* [FQLA__TILE, FQLA__COLUMNS]: a block's rows where the tensors' own cannot be used */
    float *rows;       /* [8, D_k]: on the way to or from a state of layout VK */
    float *state;      /* [blocks, D_k, FQLA__COLUMNS]; columns from D_v on hold nothing of interest */
} fqla__forward_slot;

static int32_t fqla__forward_blocks(const fqla_plan_desc *d) { return (d->dim_v + FQLA__COLUMNS - 1) / FQLA__COLUMNS; }

/* Lay a slot out in memory and return its bytes (416 KB at most); memory NULL: only that. */
static int64_t fqla__forward_slot_layout(const fqla_plan_desc *d, char *memory, fqla__forward_slot *slot) {
    enum { PARTS = 7 };
    const int64_t number = (int64_t)sizeof(float), segment = FQLA__SEGMENT * d->dim_k * number;
    const int64_t tile = FQLA__TILE * FQLA__COLUMNS * number, state = fqla__forward_blocks(d) * d->dim_k * FQLA__COLUMNS * number;
    int64_t sizes[PARTS], offsets[PARTS + 1];
    int i;
    sizes[0] = sizes[1] = segment;
    sizes[2] = FQLA__SEGMENT * (int64_t)sizeof(fqla__tile);
    sizes[3] = sizes[4] = tile;
    sizes[5] = 8 * d->dim_k * number;
    sizes[6] = state;
    offsets[0] = 0;
    for (i = 0; i < PARTS; i++) offsets[i + 1] = offsets[i] + fqla__round_up(sizes[i], FQLA__ALIGNMENT);
    if (memory == NULL) return offsets[PARTS];
    slot->k = (float *)(void *)(memory + offsets[0]);
    slot->q = (float *)(void *)(memory + offsets[1]);
    slot->tiles = (fqla__tile *)(void *)(memory + offsets[2]);
    slot->v = (float *)(void *)(memory + offsets[3]);
    slot->o = (float *)(void *)(memory + offsets[4]);
    slot->rows = (float *)(void *)(memory + offsets[5]);
    slot->state = (float *)(void *)(memory + offsets[6]);
    return offsets[PARTS];
}

/* Bytes of workspace for forwards and decodes: O(threads). */
static bool fqla__cpu_forward_workspace(const fqla_plan *plan, int64_t *bytes) {
    return fqla__mul(fqla__forward_slot_layout(&plan->desc, NULL, NULL), plan->context->summary.num_threads, bytes);
}

/* A sequence's v-head on its way through a task. */
typedef struct fqla__forward_head {
    const fqla__run *run;
    const fqla_plan_desc *desc;
    fqla_cpu_level level;
    fqla__forward_slot slot;
    fqla__sequence sequence;
    int32_t h, h_qk;
    int32_t first, last; /* blocks first .. last - 1 are this task's */
} fqla__forward_head;

/* Tokens start .. start + len - 1 of the sequence. */
typedef struct fqla__segment {
    int32_t start, len;
} fqla__segment;

/* Tokens of the tile at token t of the segment. */
static int32_t fqla__tile_count(fqla__segment segment, int32_t t) { return segment.len - t >= FQLA__TILE ? FQLA__TILE : 1; }

/* Multiply a tile's scalars out; alpha, beta [count]. */
static void fqla__tile_prepare(fqla__tile *tile, const fqla__products *p, const float *alpha, const float *beta, float scale) {
    float decay[FQLA__TILE]; /* D_cj of the c at hand */
    float from_start = 1.0f; /* G_c */
    int32_t c, j;
    for (c = 0; c < tile->count; c++) {
        from_start *= alpha[c];
        for (j = 0; j < c; j++) decay[j] *= alpha[c];
        decay[c] = 1.0f;
        tile->uv[c] = beta[c];
        tile->us[c] = -beta[c] * from_start;
        for (j = 0; j < c; j++) tile->uu[c][j] = -beta[c] * decay[j] * p->kk[c][j];
        tile->os[c] = scale * from_start;
        for (j = 0; j <= c; j++) tile->ou[c][j] = scale * decay[j] * p->qk[c][j];
    }
    for (j = 0; j < tile->count; j++) tile->su[j] = decay[j];
    tile->ss = from_start;
}

static void fqla__segment_prepare(const fqla__forward_head *head, fqla__segment segment) {
    const fqla__run *run = head->run;
    const fqla_plan_desc *d = head->desc;
    const fqla_tensor_strides *s = &d->strides;
    fqla__tile *tile = head->slot.tiles;
    fqla__products products;
    float alpha[FQLA__TILE], beta[FQLA__TILE];
    int32_t t, c;
    for (t = 0; t < segment.len; t += tile->count, tile++) {
        float *k = head->slot.k + t * d->dim_k, *q = head->slot.q + t * d->dim_k;
        tile->count = fqla__tile_count(segment, t);
        tile->k = k;
        tile->q = q;
        for (c = 0; c < tile->count; c++, k += d->dim_k, q += d->dim_k) {
            const int64_t row = head->sequence.row + segment.start + t + c;
            const float g = fqla__load(run->g, row * s->g.token + head->h * s->g.head, fqla__g_dtype(d));
            const float b = fqla__load(run->beta, row * s->beta.token + head->h * s->beta.head, fqla__beta_dtype(d));
            alpha[c] = fqla__alpha(d, g, run->A_log, run->dt_bias, head->h);
            beta[c] = fqla__beta(d, b);
            fqla__row_load(head->level, k, run->k, row * s->k.token + head->h_qk * s->k.head, d->dim_k, d->dtype);
            fqla__row_load(head->level, q, run->q, row * s->q.token + head->h_qk * s->q.head, d->dim_k, d->dtype);
            if (d->l2norm) {
                fqla__normalise_row(head->level, k, d->dim_k);
                fqla__normalise_row(head->level, q, d->dim_k);
            }
        }
        fqla__tile_products(head->level, &products, tile, d->dim_k);
        fqla__tile_prepare(tile, &products, alpha, beta, d->scale);
    }
}

/* Columns of the block that starts at column x. */
static int32_t fqla__block_columns(const fqla_plan_desc *d, int32_t x) {
    return d->dim_v - x < FQLA__COLUMNS ? d->dim_v - x : FQLA__COLUMNS;
}

/* A block of state in the slot. */
static fqla__rows fqla__slot_state(const fqla__forward_head *head, int32_t x) {
    fqla__rows rows;
    rows.row = head->slot.state + (int64_t)head->desc->dim_k * x;
    rows.stride = FQLA__COLUMNS;
    return rows;
}

/* The head's state in `states` (h0, ht or snapshots): its first element, counted in states of sequences. */
static int64_t fqla__state_base(const fqla__forward_head *head, int64_t entry) {
    return (entry * head->desc->heads_v + head->h) * fqla__state_elements(head->desc);
}

/* Can the steps work on a block of a state where it lies? */
static bool fqla__state_in_place(const fqla_plan_desc *d, const void *states, int32_t x) {
    return states != NULL && d->state_dtype == FQLA_DTYPE_FP32 && d->state_layout == FQLA_STATE_KV &&
           fqla__block_columns(d, x) == FQLA__COLUMNS;
}

static fqla__rows fqla__tensor_state(const fqla_plan_desc *d, const void *states, int64_t base, int32_t x) {
    fqla__rows rows;
    rows.row = (float *)states + base + x;
    rows.stride = d->dim_v;
    return rows;
}

/* Into the slot; states NULL: zero. */
static void fqla__block_load(const fqla__forward_head *head, const void *states, int64_t base, int32_t x) {
    const fqla_plan_desc *d = head->desc;
    const fqla__rows block = fqla__slot_state(head, x);
    const int32_t columns = fqla__block_columns(d, x);
    int32_t i, y;
    if (states == NULL || columns < FQLA__COLUMNS)
        memset(block.row, 0, (size_t)d->dim_k * FQLA__COLUMNS * sizeof *block.row);
    if (states == NULL) return;
    if (d->state_layout == FQLA_STATE_KV) {
        for (i = 0; i < d->dim_k; i++)
            fqla__row_load(head->level, block.row + i * block.stride, states, base + (int64_t)i * d->dim_v + x, columns, d->state_dtype);
        return;
    }
    for (y = 0; y < columns; y += 8) { /* 8 rows of the tensor are 8 columns here */
        for (i = 0; i < 8; i++)
            fqla__row_load(head->level, head->slot.rows + i * d->dim_k, states, base + (int64_t)(x + y + i) * d->dim_k, d->dim_k,
                           d->state_dtype);
        fqla__row_transpose(head->level, block.row + y, block.stride, head->slot.rows, d->dim_k, d->dim_k, 8);
    }
}

static void fqla__block_store(const fqla__forward_head *head, void *states, int64_t base, int32_t x) {
    const fqla_plan_desc *d = head->desc;
    const fqla__rows block = fqla__slot_state(head, x);
    const int32_t columns = fqla__block_columns(d, x);
    int32_t i, y;
    if (d->state_layout == FQLA_STATE_KV) {
        for (i = 0; i < d->dim_k; i++)
            fqla__row_store(head->level, states, base + (int64_t)i * d->dim_v + x, columns, d->state_dtype, block.row + i * block.stride);
        return;
    }
    for (y = 0; y < columns; y += 8) {
        fqla__row_transpose(head->level, head->slot.rows, d->dim_k, block.row + y, block.stride, 8, d->dim_k);
        for (i = 0; i < 8; i++)
            fqla__row_store(head->level, states, base + (int64_t)(x + y + i) * d->dim_k, d->dim_k, d->state_dtype,
                            head->slot.rows + i * d->dim_k);
    }
}

static void fqla__prefetch_row(const void *tensor, int64_t index, int32_t count, fqla_dtype dtype) {
#if defined(__GNUC__) && !defined(__TINYC__)
    const char *from = (const char *)tensor + index * fqla__dtype_size(dtype), *end = from + count * fqla__dtype_size(dtype);
    for (; from < end; from += 64) __builtin_prefetch(from);
#else
    (void)tensor, (void)index, (void)count, (void)dtype;
#endif
}

/* The rows of a tile of the next segment: v's and o's for the block at column x, and that block's share of q's and k's. */
static void fqla__prefetch_tile(const fqla__forward_head *head, int32_t token, int32_t count, int32_t x) {
    const fqla__run *run = head->run;
    const fqla_plan_desc *d = head->desc;
    const fqla_tensor_strides *s = &d->strides;
    const int32_t blocks = head->last - head->first, part = x / FQLA__COLUMNS - head->first;
    const int32_t i = d->dim_k * part / blocks, share = d->dim_k * (part + 1) / blocks - i, columns = fqla__block_columns(d, x);
    int32_t c;
    for (c = 0; c < count && token + c < head->sequence.len; c++) {
        const int64_t row = head->sequence.row + token + c;
        fqla__prefetch_row(run->k, row * s->k.token + head->h_qk * s->k.head + i, share, d->dtype);
        fqla__prefetch_row(run->q, row * s->q.token + head->h_qk * s->q.head + i, share, d->dtype);
        fqla__prefetch_row(run->v, row * s->v.token + head->h * s->v.head + x, columns, d->dtype);
        fqla__prefetch_row(run->o, row * s->o.token + head->h * s->o.head + x, columns, d->dtype);
    }
}

/* Take the block at column x through the prepared segment; its state is read from `from` and left in `to`. */
static void fqla__block_run(const fqla__forward_head *head, fqla__segment segment, int32_t x, fqla__rows from, fqla__rows to) {
    const fqla__run *run = head->run;
    const fqla_plan_desc *d = head->desc;
    const fqla_strides sv = d->strides.v, so = d->strides.o;
    const int32_t columns = fqla__block_columns(d, x);
    const bool in_place = d->dtype == FQLA_DTYPE_FP32 && columns == FQLA__COLUMNS;
    const fqla__tile *tile = head->slot.tiles;
    fqla__block block;
    int32_t t, c;
    block.from = from;
    block.v.row = head->slot.v;
    block.o.row = head->slot.o;
    block.v.stride = in_place ? sv.token : (int64_t)FQLA__COLUMNS;
    block.o.stride = in_place ? so.token : (int64_t)FQLA__COLUMNS;
    if (columns < FQLA__COLUMNS) memset(head->slot.v, 0, FQLA__TILE * FQLA__COLUMNS * sizeof *head->slot.v);
    for (t = 0; t < segment.len; t += tile->count, tile++) {
        const int64_t row = head->sequence.row + segment.start + t;
        const int64_t v = row * sv.token + head->h * sv.head + x, o = row * so.token + head->h * so.head + x;
        block.to = t + tile->count < segment.len ? fqla__slot_state(head, x) : to;
        if (in_place) {
            block.v.row = (float *)run->v + v;
            block.o.row = (float *)run->o + o;
        } else {
            for (c = 0; c < tile->count; c++)
                fqla__row_load(head->level, head->slot.v + c * FQLA__COLUMNS, run->v, v + c * sv.token, columns, d->dtype);
        }
        fqla__prefetch_tile(head, segment.start + segment.len + t, tile->count, x);
        fqla__step(head->level, tile, d->dim_k, &block);
        if (!in_place)
            for (c = 0; c < tile->count; c++)
                fqla__row_store(head->level, run->o, o + c * so.token, columns, d->dtype, head->slot.o + c * FQLA__COLUMNS);
        block.from = block.to;
    }
}

/* o = 0 for a padding row of a pool. */
static void fqla__head_zero(const fqla__forward_head *head) {
    const fqla_plan_desc *d = head->desc;
    const fqla_strides so = d->strides.o;
    int32_t t, x;
    for (t = 0; t < head->sequence.len; t++)
        for (x = head->first * FQLA__COLUMNS; x < d->dim_v && x < head->last * FQLA__COLUMNS; x++)
            fqla__store(head->run->o, (head->sequence.row + t) * so.token + head->h * so.head + x, d->dtype, 0.0f);
}

/* States are used where they lie when their layout allows it, else by way of the slot: h0 by the first tile, ht by the last. */
static void fqla__head_run(const fqla__forward_head *head, const void *h0, int64_t h0_base, void *ht, int64_t ht_base) {
    const fqla__run *run = head->run;
    const fqla_plan_desc *d = head->desc;
    const int32_t len = head->sequence.len, every = run->snapshots != NULL ? run->snapshot_every : 0;
    const int32_t x_first = head->first * FQLA__COLUMNS, x_last = head->last * FQLA__COLUMNS;
    fqla__segment segment;
    int32_t x;
    for (x = x_first; x < x_last; x += FQLA__COLUMNS)
        if (len == 0 || !fqla__state_in_place(d, h0, x)) fqla__block_load(head, h0, h0_base, x);
    for (segment.start = 0; segment.start < len; segment.start += segment.len) {
        const int32_t most = every > 0 && every < FQLA__SEGMENT ? every : FQLA__SEGMENT;
        bool snapshot;
        segment.len = len - segment.start < most ? len - segment.start : most;
        snapshot = every > 0 && (segment.start + segment.len) % every == 0;
        fqla__segment_prepare(head, segment);
        for (x = x_first; x < x_last; x += FQLA__COLUMNS) {
            fqla__rows from = fqla__slot_state(head, x), to = from;
            if (segment.start == 0 && fqla__state_in_place(d, h0, x)) from = fqla__tensor_state(d, h0, h0_base, x);
            if (segment.start + segment.len == len && !snapshot && fqla__state_in_place(d, ht, x))
                to = fqla__tensor_state(d, ht, ht_base, x);
            fqla__block_run(head, segment, x, from, to);
            if (snapshot) {
                const int64_t entry = head->sequence.snapshot + (segment.start + segment.len) / every - 1;
                fqla__block_store(head, run->snapshots, fqla__state_base(head, entry), x);
            }
        }
    }
    if (ht == NULL) return;
    for (x = x_first; x < x_last; x += FQLA__COLUMNS)
        if (len == 0 || (every > 0 && len % every == 0) || !fqla__state_in_place(d, ht, x)) fqla__block_store(head, ht, ht_base, x);
}

typedef struct fqla__forward_job {
    const fqla__run *run;
    int32_t split; /* tasks of a head: 1, or one a block */
} fqla__forward_job;

static void fqla__forward_task(void *context, int64_t task, int32_t index) {
    const fqla__forward_job *job = (const fqla__forward_job *)context;
    const fqla__run *run = job->run;
    const fqla_plan_desc *d = &run->plan->desc;
    const int32_t n = (int32_t)(task / job->split / d->heads_v), part = (int32_t)(task % job->split);
    const int32_t in = run->state_in != NULL ? run->state_in[n] : n, out = run->state_out != NULL ? run->state_out[n] : n;
    const int64_t slot_size = fqla__forward_slot_layout(d, NULL, NULL);
    const int32_t blocks = fqla__forward_blocks(d) / job->split;
    fqla__forward_head head;
    head.run = run;
    head.desc = d;
    head.level = run->plan->context->summary.cpu_level;
    fqla__forward_slot_layout(d, (char *)run->workspace + index * slot_size, &head.slot);
    head.sequence = fqla__run_sequence(run, n);
    head.h = (int32_t)(task / job->split % d->heads_v);
    head.h_qk = fqla__head_qk(d, head.h);
    head.first = part * blocks;
    head.last = head.first + blocks;
    if (in < 0 && out < 0)
        fqla__head_zero(&head);
    else
        fqla__head_run(&head, in >= 0 ? run->h0 : NULL, fqla__state_base(&head, in), out >= 0 ? run->ht : NULL,
                       fqla__state_base(&head, out));
}

static void fqla__cpu_forward(const fqla__run *run) {
    fqla_context *context = run->plan->context;
    const int64_t heads = (int64_t)run->plan->num_seqs * run->plan->desc.heads_v;
    fqla__forward_job job;
    job.run = run;
    job.split = heads < 4 * (int64_t)context->summary.num_threads ? fqla__forward_blocks(&run->plan->desc) : 1;
    fqla__pool_run(&context->pool, fqla__forward_task, &job, heads * job.split);
}
