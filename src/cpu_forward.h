// >>cpu_forward: the token recurrence on the CPU, for prefill and decode

/*
    A task is a (sequence, v-head), or a block of its columns where there are too few of those to occupy the threads. It walks
    the sequence in segments of up to 64 tokens: it fetches the segment's rows of q, k and v as float32 and prepares its tiles,
    takes every block of the state through all of them, so that the block stays in the L1 cache, and stores the rows of o.
    Fetching and storing whole rows at once matters: rows of one head lie kilobytes apart, where no prefetcher follows, and
    steps that read and write them piecemeal took twice as long.
*/
enum { FQLA__SEGMENT = FLASHQLA_CHUNK };

/* A thread's piece of workspace. */
typedef struct fqla__forward_slot {
    float *k, *q;      /* [FQLA__SEGMENT, D_k], normalised where the plan asks for it */
    float *v, *o;      /* [FQLA__SEGMENT, blocks * FQLA__COLUMNS]; columns from D_v on are zero */
    float *state;      /* [blocks, D_k, FQLA__COLUMNS], likewise */
    float *rows;       /* [8, D_k]: on the way to or from a state of layout VK */
    fqla__tile *tiles; /* the segment's, up to FQLA__SEGMENT */
} fqla__forward_slot;

static int32_t fqla__forward_blocks(const fqla_plan_desc *d) { return (d->dim_v + FQLA__COLUMNS - 1) / FQLA__COLUMNS; }

/* Columns of the slot's v and o: D_v in whole blocks. */
static int32_t fqla__forward_columns(const fqla_plan_desc *d) { return fqla__forward_blocks(d) * FQLA__COLUMNS; }

/* Lay a slot out in memory and return its bytes (540 KB at most); memory NULL: only that. */
static int64_t fqla__forward_slot_layout(const fqla_plan_desc *d, char *memory, fqla__forward_slot *slot) {
    enum { PARTS = 7 };
    const int64_t columns = fqla__forward_columns(d);
    int64_t sizes[PARTS], offsets[PARTS + 1];
    int i;
    sizes[0] = sizes[1] = FQLA__SEGMENT * (int64_t)sizeof(float) * d->dim_k;
    sizes[2] = sizes[3] = FQLA__SEGMENT * (int64_t)sizeof(float) * columns;
    sizes[4] = (int64_t)sizeof(float) * d->dim_k * columns;
    sizes[5] = 8 * (int64_t)sizeof(float) * d->dim_k;
    sizes[6] = FQLA__SEGMENT * (int64_t)sizeof(fqla__tile);
    offsets[0] = 0;
    for (i = 0; i < PARTS; i++) offsets[i + 1] = offsets[i] + fqla__round_up(sizes[i], FQLA__ALIGNMENT);
    if (memory == NULL) return offsets[PARTS];
    slot->k = (float *)(void *)(memory + offsets[0]);
    slot->q = (float *)(void *)(memory + offsets[1]);
    slot->v = (float *)(void *)(memory + offsets[2]);
    slot->o = (float *)(void *)(memory + offsets[3]);
    slot->state = (float *)(void *)(memory + offsets[4]);
    slot->rows = (float *)(void *)(memory + offsets[5]);
    slot->tiles = (fqla__tile *)(void *)(memory + offsets[6]);
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
    int32_t x_begin, x_end; /* this task's columns, whole blocks */
    int32_t columns;        /* those of them that exist, x_end being past D_v where the last block is narrow */
} fqla__forward_head;

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
    const int32_t stride = fqla__forward_columns(d), padding = head->x_end - head->x_begin - head->columns;
    fqla__tile *tile = head->slot.tiles;
    fqla__products products;
    float alpha[FQLA__TILE], beta[FQLA__TILE];
    int32_t t, c;
    for (t = 0; t < segment.len; t += tile->count, tile++) {
        float *k = head->slot.k + t * d->dim_k, *q = head->slot.q + t * d->dim_k, *v = head->slot.v + t * stride + head->x_begin;
        tile->count = fqla__tile_count(segment, t);
        tile->k = k;
        tile->q = q;
        for (c = 0; c < tile->count; c++, k += d->dim_k, q += d->dim_k, v += stride) {
            const int64_t row = head->sequence.row + segment.start + t + c;
            const float g = fqla__load(run->g, row * s->g.token + head->h * s->g.head, fqla__g_dtype(d));
            const float b = fqla__load(run->beta, row * s->beta.token + head->h * s->beta.head, fqla__beta_dtype(d));
            alpha[c] = fqla__alpha(d, g, run->A_log, run->dt_bias, head->h);
            beta[c] = fqla__beta(d, b);
            fqla__row_load(head->level, k, run->k, row * s->k.token + head->h_qk * s->k.head, d->dim_k, d->dtype);
            fqla__row_load(head->level, q, run->q, row * s->q.token + head->h_qk * s->q.head, d->dim_k, d->dtype);
            fqla__row_load(head->level, v, run->v, row * s->v.token + head->h * s->v.head + head->x_begin, head->columns, d->dtype);
            if (padding > 0) memset(v + head->columns, 0, (size_t)padding * sizeof *v);
            if (d->l2norm) {
                fqla__normalise_row(head->level, k, d->dim_k);
                fqla__normalise_row(head->level, q, d->dim_k);
            }
        }
        fqla__tile_products(head->level, &products, tile, d->dim_k);
        fqla__tile_prepare(tile, &products, alpha, beta, d->scale);
    }
}

/* Take the block at column x through the segment; its state is read from `from` and left in `to`. */
static void fqla__segment_run(const fqla__forward_head *head, fqla__segment segment, int32_t x, fqla__rows from, fqla__rows to) {
    const fqla_plan_desc *d = head->desc;
    const int32_t stride = fqla__forward_columns(d);
    const fqla__tile *tile = head->slot.tiles;
    fqla__block block;
    int32_t t;
    block.from = from;
    block.v.stride = block.o.stride = stride;
    for (t = 0; t < segment.len; t += tile->count, tile++) {
        block.to = t + tile->count < segment.len ? fqla__slot_state(head, x) : to;
        block.v.row = head->slot.v + t * stride + x;
        block.o.row = head->slot.o + t * stride + x;
        fqla__step(head->level, tile, d->dim_k, &block);
        block.from = block.to;
    }
}

static void fqla__segment_store(const fqla__forward_head *head, fqla__segment segment) {
    const fqla_plan_desc *d = head->desc;
    const fqla_strides so = d->strides.o;
    const float *o = head->slot.o + head->x_begin;
    int32_t t;
    for (t = 0; t < segment.len; t++, o += fqla__forward_columns(d)) {
        const int64_t row = head->sequence.row + segment.start + t;
        fqla__row_store(head->level, head->run->o, row * so.token + head->h * so.head + head->x_begin, head->columns, d->dtype, o);
    }
}

/* o = 0 for a padding row of a pool. */
static void fqla__head_zero(const fqla__forward_head *head) {
    const fqla_strides so = head->desc->strides.o;
    int32_t t, i;
    for (t = 0; t < head->sequence.len; t++)
        for (i = 0; i < head->columns; i++)
            fqla__store(head->run->o, (head->sequence.row + t) * so.token + head->h * so.head + head->x_begin + i, head->desc->dtype, 0.0f);
}

/* States are used where they lie when their layout allows it, else by way of the slot: h0 by the first tile, ht by the last. */
static void fqla__head_run(const fqla__forward_head *head, const void *h0, int64_t h0_base, void *ht, int64_t ht_base) {
    const fqla__run *run = head->run;
    const fqla_plan_desc *d = head->desc;
    const int32_t len = head->sequence.len, every = run->snapshots != NULL ? run->snapshot_every : 0;
    fqla__segment segment;
    int32_t x;
    for (x = head->x_begin; x < head->x_end; x += FQLA__COLUMNS)
        if (len == 0 || !fqla__state_in_place(d, h0, x)) fqla__block_load(head, h0, h0_base, x);
    for (segment.start = 0; segment.start < len; segment.start += segment.len) {
        const int32_t most = every > 0 && every < FQLA__SEGMENT ? every : FQLA__SEGMENT;
        bool snapshot;
        segment.len = len - segment.start < most ? len - segment.start : most;
        snapshot = every > 0 && (segment.start + segment.len) % every == 0;
        fqla__segment_prepare(head, segment);
        for (x = head->x_begin; x < head->x_end; x += FQLA__COLUMNS) {
            fqla__rows from = fqla__slot_state(head, x), to = from;
            if (segment.start == 0 && fqla__state_in_place(d, h0, x)) from = fqla__tensor_state(d, h0, h0_base, x);
            if (segment.start + segment.len == len && !snapshot && fqla__state_in_place(d, ht, x))
                to = fqla__tensor_state(d, ht, ht_base, x);
            fqla__segment_run(head, segment, x, from, to);
            if (snapshot) {
                const int64_t entry = head->sequence.snapshot + (segment.start + segment.len) / every - 1;
                fqla__block_store(head, run->snapshots, fqla__state_base(head, entry), x);
            }
        }
        fqla__segment_store(head, segment);
    }
    if (ht == NULL) return;
    for (x = head->x_begin; x < head->x_end; x += FQLA__COLUMNS)
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
    const int32_t width = fqla__forward_columns(d) / job->split;
    fqla__forward_head head;
    head.run = run;
    head.desc = d;
    head.level = run->plan->context->summary.cpu_level;
    fqla__forward_slot_layout(d, (char *)run->workspace + index * slot_size, &head.slot);
    head.sequence = fqla__run_sequence(run, n);
    head.h = (int32_t)(task / job->split % d->heads_v);
    head.h_qk = fqla__head_qk(d, head.h);
    head.x_begin = part * width;
    head.x_end = head.x_begin + width;
    head.columns = (head.x_end < d->dim_v ? head.x_end : d->dim_v) - head.x_begin;
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
