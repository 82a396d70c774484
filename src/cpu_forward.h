// >>cpu_forward: the token recurrence on the CPU, for prefill and decode

/*
    A task is a (sequence, v-head), or one block of columns of it where there are too few of those to occupy the threads. It
    walks the sequence in segments of up to 64 tokens: it prepares the segment's tiles (q and k as float32, gates, products of
    rows) once, then takes every block of the state through all of them while the block stays in L1.
*/
enum { FQLA__SEGMENT = FLASHQLA_CHUNK };

/* A thread's piece of workspace. Float32 throughout. */
typedef struct fqla__forward_slot {
    float *k, *q;      /* [FQLA__SEGMENT, dim_k], normalised where the plan asks for it */
    fqla__tile *tiles; /* [FQLA__SEGMENT]: the segment's, in order */
    float *v, *o;      /* [FQLA__TILE, FQLA__COLUMNS]: where a tensor cannot be used as it is */
    float *state;      /* [blocks, dim_k, FQLA__COLUMNS], columns past dim_v zero */
} fqla__forward_slot;

static int32_t fqla__forward_blocks(const fqla_plan_desc *d) { return (d->dim_v + FQLA__COLUMNS - 1) / FQLA__COLUMNS; }

/* Lay a slot out in memory; with memory NULL only to learn its bytes, under 600 KB. */
static int64_t fqla__forward_slot_layout(const fqla_plan_desc *d, char *memory, fqla__forward_slot *slot) {
    const int64_t rows = (int64_t)FQLA__SEGMENT * d->dim_k, tile = (int64_t)FQLA__TILE * FQLA__COLUMNS;
    const int64_t sizes[6] = { rows * 4, rows * 4, (int64_t)FQLA__SEGMENT * (int64_t)sizeof(fqla__tile), tile * 4, tile * 4,
                               (int64_t)fqla__forward_blocks(d) * d->dim_k * FQLA__COLUMNS * 4 };
    int64_t offsets[7];
    int i;
    offsets[0] = 0;
    for (i = 0; i < 6; i++) offsets[i + 1] = offsets[i] + fqla__round_up(sizes[i], FQLA__ALIGNMENT);
    if (memory == NULL) return offsets[6];
    slot->k = (float *)(void *)(memory + offsets[0]);
    slot->q = (float *)(void *)(memory + offsets[1]);
    slot->tiles = (fqla__tile *)(void *)(memory + offsets[2]);
    slot->v = (float *)(void *)(memory + offsets[3]);
    slot->o = (float *)(void *)(memory + offsets[4]);
    slot->state = (float *)(void *)(memory + offsets[5]);
    return offsets[6];
}

/* Bytes of workspace for forwards and decodes: O(threads). */
static bool fqla__cpu_forward_workspace(const fqla_plan *plan, int64_t *bytes) {
    return fqla__mul(fqla__forward_slot_layout(&plan->desc, NULL, NULL), plan->context->summary.num_threads, bytes);
}

static float fqla__dot(const float *a, const float *b, int32_t count) {
    float sum = 0.0f;
    int32_t i;
    for (i = 0; i < count; i++) sum += a[i] * b[i];
    return sum;
}

static void fqla__scale_row(float *row, float factor, int32_t count) {
    int32_t i;
    for (i = 0; i < count; i++) row[i] *= factor;
}

/* The products of a tile's tokens; alpha, beta [count]. */
static void fqla__tile_prepare(fqla__tile *tile, int32_t count, int32_t dim_k, float scale, const float *alpha, const float *beta) {
    float decay[FQLA__TILE]; /* D_cj of the row at hand */
    float from_start = 1.0f; /* G_c */
    int32_t c, j;
    for (c = 0; c < count; c++) {
        const float *k = tile->k + (int64_t)c * dim_k, *q = tile->q + (int64_t)c * dim_k;
        from_start *= alpha[c];
        tile->v[c] = beta[c];
        tile->ks[c] = -beta[c] * from_start;
        tile->qs[c] = scale * from_start;
        for (j = 0; j < c; j++) {
            decay[j] *= alpha[c];
            tile->ku[c][j] = -beta[c] * decay[j] * fqla__dot(k, tile->k + (int64_t)j * dim_k, dim_k);
            tile->qu[c][j] = scale * decay[j] * fqla__dot(q, tile->k + (int64_t)j * dim_k, dim_k);
        }
        decay[c] = 1.0f;
        tile->qu[c][c] = scale * fqla__dot(q, k, dim_k);
    }
    for (j = 0; j < count; j++) tile->su[j] = decay[j];
    tile->ss = from_start;
}

/* Tokens of the tile at token t of a segment of len. */
static int32_t fqla__tile_count(int32_t t, int32_t len) { return len - t >= FQLA__TILE ? FQLA__TILE : 1; }

/* Fill the slot's tiles with the tokens of rows row .. row + len - 1. */
static void fqla__segment_prepare(const fqla__run *run, const fqla__forward_slot *slot, int32_t h, int64_t row, int32_t len) {
    const fqla_plan_desc *d = &run->plan->desc;
    const fqla_tensor_strides *s = &d->strides;
    const int32_t h_qk = fqla__head_qk(d, h), dim_k = d->dim_k;
    fqla__tile *tile = slot->tiles;
    float alpha[FQLA__TILE], beta[FQLA__TILE];
    int32_t t, c, count;
    for (t = 0; t < len; t += count) {
        count = fqla__tile_count(t, len);
        for (c = 0; c < count; c++) {
            const int64_t r = row + t + c;
            float *k = slot->k + (int64_t)(t + c) * dim_k, *q = slot->q + (int64_t)(t + c) * dim_k;
            fqla__load_row(k, run->k, r * s->k.token + h_qk * s->k.head, dim_k, d->dtype);
            fqla__load_row(q, run->q, r * s->q.token + h_qk * s->q.head, dim_k, d->dtype);
            if (d->l2norm) {
                fqla__scale_row(k, fqla__l2norm_factor(fqla__dot(k, k, dim_k)), dim_k);
                fqla__scale_row(q, fqla__l2norm_factor(fqla__dot(q, q, dim_k)), dim_k);
            }
            alpha[c] = fqla__alpha(d, fqla__load(run->g, r * s->g.token + h * s->g.head, fqla__g_dtype(d)), run->A_log, run->dt_bias, h);
            beta[c] = fqla__beta(d, fqla__load(run->beta, r * s->beta.token + h * s->beta.head, fqla__beta_dtype(d)));
        }
        tile->k = slot->k + (int64_t)t * dim_k;
        tile->q = slot->q + (int64_t)t * dim_k;
        fqla__tile_prepare(tile, count, dim_k, d->scale, alpha, beta);
        tile++;
    }
}

/* A block of state between the tensors' layouts and the slot's [dim_k, FQLA__COLUMNS]; base: the state's first element,
   x: the block's first column. */
static void fqla__block_load(const fqla_plan_desc *d, float *block, const void *states, int64_t base, int32_t x) {
    const int32_t columns = d->dim_v - x < FQLA__COLUMNS ? d->dim_v - x : FQLA__COLUMNS;
    int32_t i, y;
    if (states == NULL || columns < FQLA__COLUMNS) memset(block, 0, (size_t)d->dim_k * FQLA__COLUMNS * sizeof *block);
    if (states == NULL) return;
    if (d->state_layout == FQLA_STATE_KV) {
        for (i = 0; i < d->dim_k; i++)
            fqla__load_row(block + i * FQLA__COLUMNS, states, base + (int64_t)i * d->dim_v + x, columns, d->state_dtype);
    } else {
        for (y = 0; y < columns; y++)
            for (i = 0; i < d->dim_k; i++)
                block[i * FQLA__COLUMNS + y] = fqla__load(states, base + (int64_t)(x + y) * d->dim_k + i, d->state_dtype);
    }
}

static void fqla__block_store(const fqla_plan_desc *d, const float *block, void *states, int64_t base, int32_t x) {
    const int32_t columns = d->dim_v - x < FQLA__COLUMNS ? d->dim_v - x : FQLA__COLUMNS;
    int32_t i, y;
    if (d->state_layout == FQLA_STATE_KV) {
        for (i = 0; i < d->dim_k; i++)
            fqla__store_row(states, base + (int64_t)i * d->dim_v + x, columns, d->state_dtype, block + i * FQLA__COLUMNS);
    } else {
        for (y = 0; y < columns; y++)
            for (i = 0; i < d->dim_k; i++)
                fqla__store(states, base + (int64_t)(x + y) * d->dim_k + i, d->state_dtype, block[i * FQLA__COLUMNS + y]);
    }
}

/* One block of columns, from x on, through the prepared segment. */
static void fqla__segment_run(const fqla__run *run, const fqla__forward_slot *slot, float *state, int32_t h, int32_t x, int64_t row,
                              int32_t len) {
    const fqla_plan_desc *d = &run->plan->desc;
    const fqla_tensor_strides *s = &d->strides;
    const int32_t columns = d->dim_v - x < FQLA__COLUMNS ? d->dim_v - x : FQLA__COLUMNS;
    const fqla__tile *tile = slot->tiles;
    fqla__block block;
    int32_t t, c, count;
    block.from.first = block.to.first = state;
    block.from.stride = block.to.stride = FQLA__COLUMNS;
    block.v.first = slot->v;
    block.o.first = slot->o;
    block.v.stride = block.o.stride = FQLA__COLUMNS;
    memset(slot->v, 0, (size_t)FQLA__TILE * FQLA__COLUMNS * sizeof *slot->v);
    for (t = 0; t < len; t += count) {
        count = fqla__tile_count(t, len);
        for (c = 0; c < count; c++)
            fqla__load_row(slot->v + c * FQLA__COLUMNS, run->v, (row + t + c) * s->v.token + h * s->v.head + x, columns, d->dtype);
        fqla__step(tile++, count, d->dim_k, &block, run->plan->context->summary.cpu_level);
        for (c = 0; c < count; c++)
            fqla__store_row(run->o, (row + t + c) * s->o.token + h * s->o.head + x, columns, d->dtype, slot->o + c * FQLA__COLUMNS);
    }
}

/* A sequence's v-head, blocks first .. last - 1 of its columns. */
static void fqla__forward_head(const fqla__run *run, const fqla__forward_slot *slot, int32_t n, int32_t h, int32_t first,
                               int32_t last) {
    const fqla_plan_desc *d = &run->plan->desc;
    const fqla__sequence sequence = fqla__run_sequence(run, n);
    const int64_t state_size = fqla__state_elements(d), block_size = (int64_t)d->dim_k * FQLA__COLUMNS;
    const int32_t in = run->state_in != NULL ? run->state_in[n] : n, out = run->state_out != NULL ? run->state_out[n] : n;
    const void *h0 = in >= 0 ? run->h0 : NULL;
    void *ht = out >= 0 ? run->ht : NULL;
    int32_t t, len, b;
    if (in < 0 && out < 0) { /* a padding row */
        const int32_t begin = first * FQLA__COLUMNS, end = last * FQLA__COLUMNS < d->dim_v ? last * FQLA__COLUMNS : d->dim_v;
        for (t = 0; t < sequence.len; t++)
            for (b = begin; b < end; b++)
                fqla__store(run->o, (sequence.row + t) * d->strides.o.token + h * d->strides.o.head + b, d->dtype, 0.0f);
        return;
    }
    for (b = first; b < last; b++)
        fqla__block_load(d, slot->state + b * block_size, h0, ((int64_t)in * d->heads_v + h) * state_size, b * FQLA__COLUMNS);
    for (t = 0; t < sequence.len; t += len) {
        len = sequence.len - t < FQLA__SEGMENT ? sequence.len - t : FQLA__SEGMENT;
        if (run->snapshots != NULL && len > run->snapshot_every) len = run->snapshot_every;
        fqla__segment_prepare(run, slot, h, sequence.row + t, len);
        for (b = first; b < last; b++)
            fqla__segment_run(run, slot, slot->state + b * block_size, h, b * FQLA__COLUMNS, sequence.row + t, len);
        if (run->snapshots != NULL && (t + len) % run->snapshot_every == 0) {
            const int64_t entry = sequence.snapshot + (t + len) / run->snapshot_every - 1;
            for (b = first; b < last; b++)
                fqla__block_store(d, slot->state + b * block_size, run->snapshots, (entry * d->heads_v + h) * state_size,
                                  b * FQLA__COLUMNS);
        }
    }
    for (b = first; b < last && ht != NULL; b++)
        fqla__block_store(d, slot->state + b * block_size, ht, ((int64_t)out * d->heads_v + h) * state_size, b * FQLA__COLUMNS);
}

typedef struct fqla__forward_job {
    const fqla__run *run;
    int32_t blocks, split; /* blocks of a head, and the tasks that share them: 1 or one a block */
} fqla__forward_job;

static void fqla__forward_task(void *context, int64_t task, int32_t index) {
    const fqla__forward_job *job = (const fqla__forward_job *)context;
    const fqla_plan_desc *d = &job->run->plan->desc;
    const int32_t part = (int32_t)(task % job->split), h = (int32_t)(task / job->split % d->heads_v);
    const int32_t n = (int32_t)(task / job->split / d->heads_v), width = job->blocks / job->split;
    char *workspace = (char *)job->run->workspace;
    fqla__forward_slot slot;
    fqla__forward_slot_layout(d, workspace + index * fqla__forward_slot_layout(d, NULL, NULL), &slot);
    fqla__forward_head(job->run, &slot, n, h, part * width, (part + 1) * width);
}

static void fqla__cpu_forward(const fqla__run *run) {
    fqla_context *context = run->plan->context;
    const int64_t heads = (int64_t)run->plan->num_seqs * run->plan->desc.heads_v;
    fqla__forward_job job;
    job.run = run;
    job.blocks = fqla__forward_blocks(&run->plan->desc);
    job.split = heads < 4 * (int64_t)context->summary.num_threads ? job.blocks : 1;
    fqla__pool_run(&context->pool, fqla__forward_task, &job, heads * job.split);
}
