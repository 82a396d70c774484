// >>cpu_forward: the token recurrence on the CPU, for prefill and decode

/*
    A task is a sequence and a team of v-heads that read the same q/k head, or a head, or a block of a head's columns: what keeps
    the threads busy. It walks its sequence in segments of up to 64 tokens: it fetches the rows of q and k and makes tiles of
    them; then, a head after the other, it fetches the gates and the rows of v, takes every block of the state through all
    tiles, so that the block stays in the L1 cache, and stores the rows of o.

    Rows of one head lie kilobytes apart, each in a page of its own, where no prefetcher follows: even so, getting at them costs
    a quarter of the time. Hence whole rows at once, and teams.
*/
enum {
    FQLA__SEGMENT = FLASHQLA_CHUNK,                            /* tokens */
    FQLA__TILES = FQLA__SEGMENT / FQLA__TILE + FQLA__TILE - 1, /* of a segment, at most */
    FQLA__TEAM = 4                                             /* heads, at most: their states share an L2 cache */
};

/* A thread's piece of workspace. Columns from D_v on are computed like all others, from zeros, and never stored. */
typedef struct fqla__forward_slot {
    float *k, *q;      /* [FQLA__SEGMENT, D_k], normalised where the plan asks for it */
    float *v, *o;      /* [FQLA__SEGMENT, columns] */
    float *state;      /* [team, blocks, D_k, the part's x_width] */
    float *rows;       /* [8, D_k]: on the way from or to a state of layout VK */
    fqla__tile *tiles; /* [FQLA__TILES] */
} fqla__forward_slot;

/* D_v in whole blocks. */
static int32_t fqla__forward_columns(const fqla_plan_desc *d) { return (int32_t)fqla__round_up(d->dim_v, FQLA__COLUMNS); }

/* The largest team that the plan's heads divide into. */
static int32_t fqla__forward_team(const fqla_plan_desc *d) {
    int32_t team = FQLA__TEAM;
    while (d->heads_v / d->heads_qk % team != 0) team--;
    return team;
}

/* Lay a slot out in memory and return its bytes (1.4 MB at most); memory NULL: only that. */
static int64_t fqla__forward_slot_layout(const fqla_plan_desc *d, char *memory, fqla__forward_slot *slot) {
    enum { PARTS = 7 };
    const int64_t columns = fqla__forward_columns(d), team = fqla__forward_team(d);
    int64_t sizes[PARTS], offsets[PARTS + 1];
    int i;
    sizes[0] = sizes[1] = FQLA__SEGMENT * (int64_t)sizeof(float) * d->dim_k;
    sizes[2] = sizes[3] = FQLA__SEGMENT * (int64_t)sizeof(float) * columns;
    sizes[4] = (int64_t)sizeof(float) * d->dim_k * columns * team;
    sizes[5] = 8 * (int64_t)sizeof(float) * d->dim_k;
    sizes[6] = FQLA__TILES * (int64_t)sizeof(fqla__tile);
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

/* A task: heads h, h + h_step, .. of a sequence. */
typedef struct fqla__forward_part {
    const fqla__run *run;
    const fqla_plan_desc *desc;
    fqla_cpu_level level;
    fqla__forward_slot slot;
    fqla__sequence sequence;
    const void *h0;         /* NULL: zero */
    void *ht;               /* NULL: not stored */
    int32_t in, out;        /* the sequence's entries in them */
    int32_t h_qk, h, h_step, team;
    int32_t x_begin, x_end; /* columns, multiples of FQLA__COLUMNS */
    int32_t x_count;        /* those of them below D_v */
    int32_t x_width;        /* of a block: FQLA__COLUMNS, which stay in L1; all where there is but one token */
} fqla__forward_part;

/* Tokens start .. start + len - 1 of the sequence. */
typedef struct fqla__segment {
    int32_t start, len;
} fqla__segment;

/* Columns below D_v of the block at column x. */
static int32_t fqla__block_columns(const fqla__forward_part *part, int32_t x) {
    return part->desc->dim_v - x < part->x_width ? part->desc->dim_v - x : part->x_width;
}

/* The block at column x of head h in the slot. */
static fqla__rows fqla__slot_block(const fqla__forward_part *part, int32_t h, int32_t x) {
    const int64_t member = (h - part->h) / part->h_step;
    fqla__rows rows;
    rows.row = part->slot.state + (member * fqla__forward_columns(part->desc) + x) * part->desc->dim_k;
    rows.stride = part->x_width;
    return rows;
}

/* Where in h0, ht or snapshots head h of an entry starts. */
static int64_t fqla__state_base(const fqla_plan_desc *d, int64_t entry, int32_t h) {
    return (entry * d->heads_v + h) * fqla__state_elements(d);
}

/* Whether steps can work on the block at column x of such a tensor where it lies. */
static bool fqla__in_place(const fqla__forward_part *part, const void *states, int32_t x) {
    return states != NULL && part->desc->state_dtype == FQLA_DTYPE_FP32 && part->desc->state_layout == FQLA_STATE_KV &&
           fqla__block_columns(part, x) == part->x_width;
}

static fqla__rows fqla__tensor_block(const fqla_plan_desc *d, const void *states, int64_t base, int32_t x) {
    fqla__rows rows;
    rows.row = (float *)states + base + x;
    rows.stride = d->dim_v;
    return rows;
}

/* From a tensor (NULL: zeros) into the slot. */
static void fqla__block_load(const fqla__forward_part *part, fqla__rows block, const void *states, int64_t base, int32_t x) {
    const fqla_plan_desc *d = part->desc;
    const int32_t columns = fqla__block_columns(part, x);
    int32_t i, y;
    if (states == NULL || columns < part->x_width)
        memset(block.row, 0, (size_t)d->dim_k * (size_t)part->x_width * sizeof *block.row);
    if (states == NULL) return;
    if (d->state_layout == FQLA_STATE_KV) {
        for (i = 0; i < d->dim_k; i++)
            fqla__row_load(part->level, block.row + i * block.stride, states, base + (int64_t)i * d->dim_v + x, columns,
                           d->state_dtype);
        return;
    }
    for (y = 0; y < columns; y += 8) { /* 8 rows of the tensor are 8 columns of the block */
        for (i = 0; i < 8; i++)
            fqla__row_load(part->level, part->slot.rows + i * d->dim_k, states, base + (int64_t)(x + y + i) * d->dim_k, d->dim_k,
                           d->state_dtype);
        fqla__row_transpose(part->level, block.row + y, block.stride, part->slot.rows, d->dim_k, d->dim_k, 8);
    }
}

/* From the slot into a tensor. */
static void fqla__block_store(const fqla__forward_part *part, fqla__rows block, void *states, int64_t base, int32_t x) {
    const fqla_plan_desc *d = part->desc;
    const int32_t columns = fqla__block_columns(part, x);
    int32_t i, y;
    if (d->state_layout == FQLA_STATE_KV) {
        for (i = 0; i < d->dim_k; i++)
            fqla__row_store(part->level, states, base + (int64_t)i * d->dim_v + x, columns, d->state_dtype,
                            block.row + i * block.stride);
        return;
    }
    for (y = 0; y < columns; y += 8) {
        fqla__row_transpose(part->level, part->slot.rows, d->dim_k, block.row + y, block.stride, 8, d->dim_k);
        for (i = 0; i < 8; i++)
            fqla__row_store(part->level, states, base + (int64_t)(x + y + i) * d->dim_k, d->dim_k, d->state_dtype,
                            part->slot.rows + i * d->dim_k);
    }
}

/* Rows of q and k, and the tiles that all heads of the team share. Rows first, so that many are under way at once. */
static void fqla__segment_fetch_qk(const fqla__forward_part *part, fqla__segment segment) {
    const fqla_plan_desc *d = part->desc;
    const fqla_strides sq = d->strides.q, sk = d->strides.k;
    fqla__tile *tile = part->slot.tiles;
    int32_t t;
    for (t = 0; t < segment.len; t++) {
        const int64_t row = part->sequence.row + segment.start + t;
        const int64_t k = row * sk.token + part->h_qk * sk.head, q = row * sq.token + part->h_qk * sq.head;
        fqla__row_load(part->level, part->slot.k + t * d->dim_k, part->run->k, k, d->dim_k, d->dtype);
        fqla__row_load(part->level, part->slot.q + t * d->dim_k, part->run->q, q, d->dim_k, d->dtype);
    }
    for (t = 0; t < segment.len && d->l2norm; t++) {
        fqla__normalise_row(part->level, part->slot.k + t * d->dim_k, d->dim_k);
        fqla__normalise_row(part->level, part->slot.q + t * d->dim_k, d->dim_k);
    }
    for (t = 0; t < segment.len; t += tile->count, tile++) {
        tile->count = segment.len - t >= FQLA__TILE ? FQLA__TILE : 1;
        tile->k = part->slot.k + t * d->dim_k;
        tile->q = part->slot.q + t * d->dim_k;
        fqla__tile_products(part->level, tile, d->dim_k);
    }
}

/* Rows of v of head h, and its gates into the tiles. */
static void fqla__segment_fetch_v(const fqla__forward_part *part, fqla__segment segment, int32_t h) {
    const fqla__run *run = part->run;
    const fqla_plan_desc *d = part->desc;
    const fqla_strides sv = d->strides.v, sg = d->strides.g, sb = d->strides.beta;
    const int64_t first = part->sequence.row + segment.start;
    const int32_t columns = fqla__forward_columns(d), padding = part->x_end - part->x_begin - part->x_count;
    fqla__tile *tile = part->slot.tiles;
    float alpha[FQLA__TILE], beta[FQLA__TILE];
    int32_t t, c;
    for (t = 0; t < segment.len; t++) {
        float *v = part->slot.v + t * columns + part->x_begin;
        fqla__row_load(part->level, v, run->v, (first + t) * sv.token + h * sv.head + part->x_begin, part->x_count, d->dtype);
        if (padding > 0) memset(v + part->x_count, 0, (size_t)padding * sizeof *v);
    }
    for (t = 0; t < segment.len; t += tile->count, tile++) {
        for (c = 0; c < tile->count; c++) {
            const int64_t row = first + t + c;
            const float g = fqla__load(run->g, row * sg.token + h * sg.head, fqla__g_dtype(d));
            alpha[c] = fqla__alpha(d, g, run->A_log, run->dt_bias, h);
            beta[c] = fqla__beta(d, fqla__load(run->beta, row * sb.token + h * sb.head, fqla__beta_dtype(d)));
        }
        fqla__tile_scalars(tile, alpha, beta, d->scale);
    }
}

/* Take the block at column x of head h through the tiles; its state is read from `from` and left in `to`. */
static void fqla__segment_run(const fqla__forward_part *part, fqla__segment segment, int32_t h, int32_t x, fqla__rows from,
                              fqla__rows to) {
    const int32_t columns = fqla__forward_columns(part->desc);
    const fqla__tile *tile = part->slot.tiles;
    fqla__block block;
    int32_t t;
    block.columns = part->x_width;
    block.from = from;
    block.v.stride = block.o.stride = columns;
    for (t = 0; t < segment.len; t += tile->count, tile++) {
        block.to = t + tile->count < segment.len ? fqla__slot_block(part, h, x) : to;
        block.v.row = part->slot.v + t * columns + x;
        block.o.row = part->slot.o + t * columns + x;
        fqla__step(part->level, tile, part->desc->dim_k, &block);
        block.from = block.to;
    }
}

static void fqla__segment_store_o(const fqla__forward_part *part, fqla__segment segment, int32_t h) {
    const fqla_plan_desc *d = part->desc;
    const fqla_strides so = d->strides.o;
    const float *o = part->slot.o + part->x_begin;
    int32_t t;
    for (t = 0; t < segment.len; t++, o += fqla__forward_columns(d)) {
        const int64_t row = part->sequence.row + segment.start + t;
        fqla__row_store(part->level, part->run->o, row * so.token + h * so.head + part->x_begin, part->x_count, d->dtype, o);
    }
}

/* One token from h0 to ht, both float32 of layout VK: has a step of its own, since the others' would need the states transposed. */
static bool fqla__is_vk_step(const fqla__forward_part *part) {
    return part->sequence.len == 1 && part->run->snapshots == NULL && part->h0 != NULL && part->ht != NULL &&
           part->desc->state_layout == FQLA_STATE_VK && part->desc->state_dtype == FQLA_DTYPE_FP32;
}

static void fqla__segment_vk(const fqla__forward_part *part, int32_t h) {
    const fqla_plan_desc *d = part->desc;
    fqla__block block;
    block.columns = part->x_count;
    block.from.row = (float *)part->h0 + fqla__state_base(d, part->in, h) + (int64_t)part->x_begin * d->dim_k;
    block.to.row = (float *)part->ht + fqla__state_base(d, part->out, h) + (int64_t)part->x_begin * d->dim_k;
    block.from.stride = block.to.stride = d->dim_k;
    block.v.row = part->slot.v + part->x_begin;
    block.o.row = part->slot.o + part->x_begin;
    block.v.stride = block.o.stride = fqla__forward_columns(d);
    fqla__step_vk(part->level, part->slot.tiles, d->dim_k, &block);
}

/* Every block of head h through the tiles. Where the layout allows it, the first tile reads h0 and the last writes ht where they
   lie: a decode touches a state twice and copies nothing. snapshot: the entry to store the state in; negative: none. */
static void fqla__segment_head(const fqla__forward_part *part, fqla__segment segment, int32_t h, int64_t snapshot) {
    const fqla_plan_desc *d = part->desc;
    const int64_t h0_base = fqla__state_base(d, part->in, h), ht_base = fqla__state_base(d, part->out, h);
    const bool first = segment.start == 0, last = segment.start + segment.len == part->sequence.len;
    int32_t x;
    for (x = part->x_begin; x < part->x_end; x += part->x_width) {
        const fqla__rows block = fqla__slot_block(part, h, x);
        fqla__rows from = block, to = block;
        if (first && fqla__in_place(part, part->h0, x)) from = fqla__tensor_block(d, part->h0, h0_base, x);
        else if (first) fqla__block_load(part, block, part->h0, h0_base, x);
        if (last && snapshot < 0 && fqla__in_place(part, part->ht, x)) to = fqla__tensor_block(d, part->ht, ht_base, x);
        fqla__segment_run(part, segment, h, x, from, to);
        if (snapshot >= 0) fqla__block_store(part, block, part->run->snapshots, fqla__state_base(d, snapshot, h), x);
        if (last && part->ht != NULL && to.row == block.row) fqla__block_store(part, block, part->ht, ht_base, x);
    }
}

static void fqla__forward_sequence(const fqla__forward_part *part) {
    const int32_t len = part->sequence.len, every = part->run->snapshots != NULL ? part->run->snapshot_every : 0;
    const int32_t most = every > 0 && every < FQLA__SEGMENT ? every : (int32_t)FQLA__SEGMENT;
    fqla__segment segment;
    int32_t h;
    for (segment.start = 0; segment.start < len; segment.start += segment.len) {
        int64_t snapshot = -1;
        segment.len = len - segment.start < most ? len - segment.start : most;
        if (every > 0 && (segment.start + segment.len) % every == 0)
            snapshot = part->sequence.snapshot + (segment.start + segment.len) / every - 1;
        fqla__segment_fetch_qk(part, segment);
        for (h = part->h; h < part->h + part->team * part->h_step; h += part->h_step) {
            fqla__segment_fetch_v(part, segment, h);
            if (fqla__is_vk_step(part)) fqla__segment_vk(part, h);
            else fqla__segment_head(part, segment, h, snapshot);
            fqla__segment_store_o(part, segment, h);
        }
    }
}

/* A sequence of no tokens: ht = h0. */
static void fqla__forward_empty(const fqla__forward_part *part) {
    const fqla_plan_desc *d = part->desc;
    int32_t h, x;
    if (part->ht == NULL) return;
    for (h = part->h; h < part->h + part->team * part->h_step; h += part->h_step)
        for (x = part->x_begin; x < part->x_end; x += part->x_width) {
            const fqla__rows block = fqla__slot_block(part, h, x);
            fqla__block_load(part, block, part->h0, fqla__state_base(d, part->in, h), x);
            fqla__block_store(part, block, part->ht, fqla__state_base(d, part->out, h), x);
        }
}

/* A padding row of a pool: o = 0. */
static void fqla__forward_padding(const fqla__forward_part *part) {
    const fqla_plan_desc *d = part->desc;
    const fqla_strides so = d->strides.o;
    int32_t h, t, x;
    for (h = part->h; h < part->h + part->team * part->h_step; h += part->h_step)
        for (t = 0; t < part->sequence.len; t++)
            for (x = 0; x < part->x_count; x++)
                fqla__store(part->run->o, (part->sequence.row + t) * so.token + h * so.head + part->x_begin + x, d->dtype, 0.0f);
}

/* How a run is divided into tasks. No bit of its results depends on it. */
typedef struct fqla__forward_job {
    const fqla__run *run;
    int32_t team;  /* v-heads of a task */
    int32_t split; /* parts that their columns are split into: 1, or the number of blocks */
    int64_t tasks;
} fqla__forward_job;

/* Rounds of tasks that the threads go through, and half a round in which some are idle, times what a task takes: rows of q and k
   weigh a fifth of what a head's recurrence does. */
static double fqla__forward_cost(const fqla__forward_job *job, int32_t num_threads) {
    const int64_t rounds = (job->tasks + num_threads - 1) / num_threads;
    return ((double)rounds + 0.5) * (1.0 + 5.0 * job->team / job->split);
}

/* Teams for many heads, single heads for some, blocks of a head for few. */
static fqla__forward_job fqla__forward_divide(const fqla__run *run) {
    const fqla_plan_desc *d = &run->plan->desc;
    const int32_t num_threads = run->plan->context->summary.num_threads;
    const int64_t heads = (int64_t)run->plan->num_seqs * d->heads_v;
    fqla__forward_job best, job;
    job.run = run;
    job.team = 1;
    job.split = fqla__forward_columns(d) / FQLA__COLUMNS;
    job.tasks = heads * job.split;
    best = job;
    job.split = 1;
    for (job.team = 1; job.team <= fqla__forward_team(d); job.team++) {
        if (d->heads_v / d->heads_qk % job.team != 0) continue;
        job.tasks = heads / job.team;
        if (fqla__forward_cost(&job, num_threads) < fqla__forward_cost(&best, num_threads)) best = job;
    }
    return best;
}

static void fqla__forward_task(void *context, int64_t task, int32_t slot) {
    const fqla__forward_job *job = (const fqla__forward_job *)context;
    const fqla__run *run = job->run;
    const fqla_plan_desc *d = &run->plan->desc;
    const int32_t heads = d->heads_v / d->heads_qk, width = fqla__forward_columns(d) / job->split;
    const int32_t teams = d->heads_v / job->team, n = (int32_t)(task / job->split / teams);
    const int32_t index = (int32_t)(task / job->split % teams) * job->team; /* of the first head, in the order of q/k heads */
    fqla__forward_part part;
    part.run = run;
    part.desc = d;
    part.level = run->plan->context->summary.cpu_level;
    fqla__forward_slot_layout(d, (char *)run->workspace + slot * fqla__forward_slot_layout(d, NULL, NULL), &part.slot);
    part.sequence = fqla__run_sequence(run, n);
    part.in = run->state_in != NULL ? run->state_in[n] : n;
    part.out = run->state_out != NULL ? run->state_out[n] : n;
    part.h0 = part.in >= 0 ? run->h0 : NULL;
    part.ht = part.out >= 0 ? run->ht : NULL;
    part.team = job->team;
    part.h_step = d->head_map == FQLA_HEAD_MAP_DIV ? 1 : d->heads_qk;
    part.h = d->head_map == FQLA_HEAD_MAP_DIV ? index : index / heads + index % heads * d->heads_qk;
    part.h_qk = fqla__head_qk(d, part.h);
    part.x_begin = (int32_t)(task % job->split) * width;
    part.x_end = part.x_begin + width;
    part.x_width = part.sequence.len == 1 ? width : (int32_t)FQLA__COLUMNS;
    part.x_count = (part.x_end < d->dim_v ? part.x_end : d->dim_v) - part.x_begin;
    if (part.in < 0 && part.out < 0) fqla__forward_padding(&part);
    else if (part.sequence.len == 0) fqla__forward_empty(&part);
    else fqla__forward_sequence(&part);
}

static void fqla__cpu_forward(const fqla__run *run) {
    fqla__forward_job job = fqla__forward_divide(run);
    fqla__pool_run(&run->plan->context->pool, fqla__forward_task, &job, job.tasks);
}
