// >>cpu_backward: all gradients on the CPU

/*
    A task is a (sequence, q/k head) with the group of v-heads that read it, so that their shares of dq and dk meet in one place, in
    one order. It walks the sequence forward once and keeps the state before every chunk of 64 tokens; then it takes the chunks
    last to first: through a chunk's strips forward again for their states and r, and back through them for p and the gradients.
*/
enum { FQLA__STRIPS = FLASHQLA_CHUNK / FQLA__STRIP };

typedef struct fqla__backward_job {
    const fqla_plan *plan;
    const fqla_backward_args *args;
    int32_t group;      /* v-heads of a q/k head */
    int32_t width;      /* D_v rounded up to what matrix products take */
    int32_t chunks;     /* most of a sequence */
    int64_t slots;      /* pieces of workspace: one a thread, or one a task where there are fewer of those */
    int64_t slot_size;  /* bytes */
    char *workspace;
    double *gate_sums;  /* [max_seqs, heads_v, 2]: a sequence's dA_log and ddt_bias; with FQLA_GATE_RAW alone */
} fqla__backward_job;

/* A piece of workspace: at D_k = D_v = 128 0.7 MB, and 64 KB a chunk and v-head of the group. */
typedef struct fqla__backward_slot {
    float *states;  /* [chunks, group, D_k, width]: before each chunk */
    float *dstates; /* [group, D_k, width]: of the states after the strip at hand, and then before it */
    fqla__strip_desk desk;
    fqla__strip strips[FQLA__STRIPS];
} fqla__backward_slot;

/* The next `count` numbers of memory; with memory NULL they are counted alone. */
static float *fqla__carve(char *memory, int64_t *bytes, int64_t count) {
    float *array = memory != NULL ? (float *)(void *)(memory + *bytes) : NULL;
    *bytes += fqla__round_up(count * (int64_t)sizeof *array, FQLA__ALIGNMENT);
    return array;
}

/* Lay a slot out and return its bytes. */
static int64_t fqla__backward_slot_layout(const fqla__backward_job *job, char *memory, fqla__backward_slot *slot) {
    const fqla_plan_desc *d = &job->plan->desc;
    const int64_t dim_k = d->dim_k, width = job->width, state = dim_k * width, part = FQLA__STRIP * width;
    int64_t bytes = 0;
    int i;
    slot->states = fqla__carve(memory, &bytes, job->chunks * job->group * state);
    slot->dstates = fqla__carve(memory, &bytes, job->group * state);
    slot->desk.level = job->plan->context->summary.cpu_level;
    slot->desk.dim_k = d->dim_k;
    slot->desk.width = job->width;
    slot->desk.scale = d->scale;
    slot->desk.scaled = fqla__carve(memory, &bytes, FQLA__PAIR * width);
    slot->desk.turned = fqla__carve(memory, &bytes, width * FQLA__TRIPLE);
    slot->desk.crossed = fqla__carve(memory, &bytes, dim_k * FQLA__TRIPLE);
    for (i = 0; i < FQLA__STRIPS; i++) {
        fqla__strip *strip = &slot->strips[i];
        strip->q = fqla__carve(memory, &bytes, FQLA__PAIR * dim_k);
        strip->norms = fqla__carve(memory, &bytes, FQLA__PAIR);
        strip->columns = fqla__carve(memory, &bytes, dim_k * FQLA__PAIR);
        strip->qk = fqla__carve(memory, &bytes, FQLA__PAIR * FQLA__STRIP);
        strip->dcolumns = fqla__carve(memory, &bytes, dim_k * FQLA__PAIR);
        strip->mix = fqla__carve(memory, &bytes, FQLA__PAIR * FQLA__PAIR);
        strip->state = fqla__carve(memory, &bytes, state);
        strip->along = fqla__carve(memory, &bytes, 4 * part);
        if (memory == NULL) continue;
        strip->k = strip->q + FQLA__STRIP * dim_k;
        strip->kk = strip->qk + FQLA__STRIP * FQLA__STRIP;
        strip->given = strip->along + part;
        strip->p = strip->given + part;
        strip->r = strip->p + part;
    }
    return bytes;
}

static fqla__backward_job fqla__backward_job_of(const fqla_plan *plan) {
    const fqla_plan_desc *d = &plan->desc;
    const int64_t tasks = (int64_t)d->max_seqs * d->heads_qk, threads = plan->context->summary.num_threads;
    const int32_t longest = d->padded_len > 0 ? d->padded_len : d->max_tokens;
    fqla__backward_slot slot;
    fqla__backward_job job;
    memset(&job, 0, sizeof job);
    job.plan = plan;
    job.group = d->heads_v / d->heads_qk;
    job.width = (int32_t)fqla__round_up(d->dim_v, FQLA__MATMUL_COLUMNS);
    job.chunks = longest / FLASHQLA_CHUNK + (longest % FLASHQLA_CHUNK != 0);
    job.slots = tasks < threads ? tasks : threads;
    job.slot_size = fqla__backward_slot_layout(&job, NULL, &slot);
    return job;
}

static int64_t fqla__gate_sums_size(const fqla_plan_desc *d) {
    if (d->gate != FQLA_GATE_RAW) return 0;
    return fqla__round_up((int64_t)d->max_seqs * d->heads_v * 2 * (int64_t)sizeof(double), FQLA__ALIGNMENT);
}

static bool fqla__cpu_backward_workspace(const fqla_plan *plan, int64_t *bytes) {
    const fqla__backward_job job = fqla__backward_job_of(plan);
    int64_t slots;
    return fqla__mul(job.slots, job.slot_size, &slots) && fqla__add(slots, fqla__gate_sums_size(&plan->desc), bytes);
}

/* Element 0 of head h of the strip's token t in a tensor. */
static int64_t fqla__strip_at(const fqla__strip *strip, fqla_strides strides, int32_t t, int32_t h) {
    return (strip->row + t) * strides.token + h * strides.head;
}

/* State number `index` of a tensor to or from [D_k, width]. */
static void fqla__state_load(const fqla__backward_job *job, const fqla__strip_desk *desk, float *state, const void *states,
                             int64_t index) {
    const fqla_plan_desc *d = &job->plan->desc;
    const int64_t base = index * fqla__state_elements(d);
    int32_t i, x;
    memset(state, 0, (size_t)(d->dim_k * desk->width) * sizeof *state);
    if (states == NULL) return;
    for (i = 0; i < d->dim_k; i++)
        if (d->state_layout == FQLA_STATE_KV)
            fqla__row_load(desk->level, state + i * desk->width, states, base + i * d->dim_v, d->dim_v, d->state_dtype);
        else
            for (x = 0; x < d->dim_v; x++)
                state[i * desk->width + x] = fqla__load(states, base + x * d->dim_k + i, d->state_dtype);
}

static void fqla__state_store(const fqla__backward_job *job, const fqla__strip_desk *desk, const float *state, void *states,
                              int64_t index) {
    const fqla_plan_desc *d = &job->plan->desc;
    const int64_t base = index * fqla__state_elements(d);
    int32_t i, x;
    for (i = 0; i < d->dim_k; i++)
        if (d->state_layout == FQLA_STATE_KV)
            fqla__row_store(desk->level, states, base + i * d->dim_v, d->dim_v, d->state_dtype, state + i * desk->width);
        else
            for (x = 0; x < d->dim_v; x++)
                fqla__store(states, base + x * d->dim_k + i, d->state_dtype, state[i * desk->width + x]);
}

/* A row of q or k; returns what l2norm multiplied it with. */
static float fqla__qk_load(const fqla__backward_job *job, const fqla__strip_desk *desk, float *row, const void *tensor,
                           int64_t at) {
    const fqla_plan_desc *d = &job->plan->desc;
    float norm = 1.0f;
    fqla__row_load(desk->level, row, tensor, at, d->dim_k, d->dtype);
    if (d->l2norm) {
        norm = fqla__l2norm_factor(fqla__dot(row, row, d->dim_k));
        fqla__scale_row(row, norm, d->dim_k);
    }
    return norm;
}

/* A row of dq or dk, which changes. Through the norm, y = norm x: dx = norm (dy - y (y . dy)). */
static void fqla__qk_store(const fqla__backward_job *job, const fqla__strip_desk *desk, float *gradient, const float *row,
                           float norm, void *tensor, int64_t at) {
    const fqla_plan_desc *d = &job->plan->desc;
    if (d->l2norm) {
        const float along = fqla__dot(row, gradient, d->dim_k);
        int32_t i;
        for (i = 0; i < d->dim_k; i++) gradient[i] = norm * (gradient[i] - along * row[i]);
    }
    fqla__row_store(desk->level, tensor, at, d->dim_k, d->dtype, gradient);
}

/* The strips of a chunk of len tokens at `row`, with q and k. Returns how many there are. */
static int32_t fqla__chunk_load(const fqla__backward_job *job, fqla__backward_slot *slot, int32_t h_qk, int64_t row, int32_t len) {
    const fqla_plan_desc *d = &job->plan->desc;
    const fqla__strip_desk *desk = &slot->desk;
    int32_t i, t;
    for (i = 0; i * FQLA__STRIP < len; i++) {
        fqla__strip *strip = &slot->strips[i];
        strip->row = row + i * FQLA__STRIP;
        strip->len = len - i * FQLA__STRIP < FQLA__STRIP ? len - i * FQLA__STRIP : FQLA__STRIP;
        memset(strip->q, 0, (size_t)(FQLA__PAIR * d->dim_k) * sizeof *strip->q);
        for (t = 0; t < strip->len; t++) {
            const int64_t q_at = fqla__strip_at(strip, d->strides.q, t, h_qk), k_at = fqla__strip_at(strip, d->strides.k, t, h_qk);
            strip->norms[t] = fqla__qk_load(job, desk, strip->q + t * d->dim_k, job->args->q, q_at);
            strip->norms[FQLA__STRIP + t] = fqla__qk_load(job, desk, strip->k + t * d->dim_k, job->args->k, k_at);
        }
        fqla__strip_set_qk(desk, strip);
    }
    return i;
}

/* dq and dk of a chunk's strips. */
static void fqla__chunk_store(const fqla__backward_job *job, const fqla__backward_slot *slot, int32_t h_qk, int32_t strips) {
    const fqla_plan_desc *d = &job->plan->desc;
    const fqla__strip_desk *desk = &slot->desk;
    float *dq = desk->crossed, *dk = dq + FQLA__STRIP * d->dim_k; /* it is free now */
    int32_t i, t;
    for (i = 0; i < strips; i++) {
        const fqla__strip *strip = &slot->strips[i];
        fqla__strip_finish(desk, strip, dq);
        for (t = 0; t < strip->len; t++) {
            const int64_t q_at = fqla__strip_at(strip, d->strides.q, t, h_qk), k_at = fqla__strip_at(strip, d->strides.k, t, h_qk);
            const int32_t x = t * d->dim_k;
            fqla__qk_store(job, desk, dq + x, strip->q + x, strip->norms[t], job->args->dq, q_at);
            fqla__qk_store(job, desk, dk + x, strip->k + x, strip->norms[FQLA__STRIP + t], job->args->dk, k_at);
        }
    }
}

/* v-head h's alpha and beta. */
static void fqla__gates_load(const fqla__backward_job *job, fqla__strip *strip, int32_t h) {
    const fqla_plan_desc *d = &job->plan->desc;
    const fqla_backward_args *args = job->args;
    int32_t t;
    for (t = 0; t < FQLA__STRIP; t++) {
        strip->alpha[t] = 1.0f;
        strip->beta[t] = 0.0f;
        if (t < strip->len) {
            const float g = fqla__load(args->g, fqla__strip_at(strip, d->strides.g, t, h), fqla__g_dtype(d));
            const float beta = fqla__load(args->beta, fqla__strip_at(strip, d->strides.beta, t, h), fqla__beta_dtype(d));
            strip->alpha[t] = fqla__alpha(d, g, args->A_log, args->dt_bias, h);
            strip->beta[t] = fqla__beta(d, beta);
        }
    }
    fqla__strip_set_alpha(strip);
}

/* v-head h's dg and dbeta, through the raw forms where the plan has them. */
static void fqla__gates_store(const fqla__backward_job *job, const fqla__strip *strip, int32_t h, double *gate_sums) {
    const fqla_plan_desc *d = &job->plan->desc;
    const fqla_backward_args *args = job->args;
    int32_t t;
    for (t = strip->len - 1; t >= 0; t--) {
        const int64_t g_at = fqla__strip_at(strip, d->strides.g, t, h), beta_at = fqla__strip_at(strip, d->strides.beta, t, h);
        float dg = strip->alpha[t] == 0.0f ? 0.0f : strip->dg[t], dbeta = strip->dbeta[t];
        if (d->gate == FQLA_GATE_RAW && strip->alpha[t] != 0.0f) { /* g = rate softplus(raw) */
            const float raw = fqla__load(args->g, g_at, d->dtype) + args->dt_bias[h], rate = -expf(args->A_log[h]);
            gate_sums[0] += (double)dg * (double)(rate * fqla__softplus(raw));
            dg *= rate * (raw > 20.0f ? 1.0f : fqla__sigmoid(raw));
            gate_sums[1] += (double)dg;
        }
        if (d->beta == FQLA_BETA_SIGMOID) /* the derivative is beta (1 - sigmoid b) */
            dbeta *= strip->beta[t] * fqla__sigmoid(-fqla__load(args->beta, beta_at, d->dtype));
        fqla__store(args->dg, g_at, fqla__g_dtype(d), dg);
        fqla__store(args->dbeta, beta_at, fqla__beta_dtype(d), dbeta);
    }
}

/* v-head h's rows of v or do. */
static void fqla__given_load(const fqla__backward_job *job, const fqla__strip_desk *desk, const fqla__strip *strip, int32_t h,
                             const void *tensor, fqla_strides strides) {
    const fqla_plan_desc *d = &job->plan->desc;
    int32_t t;
    if (strip->len < FQLA__STRIP || d->dim_v < desk->width)
        memset(strip->given, 0, (size_t)(FQLA__STRIP * desk->width) * sizeof *strip->given);
    for (t = 0; t < strip->len; t++)
        fqla__row_load(desk->level, strip->given + t * desk->width, tensor, fqla__strip_at(strip, strides, t, h), d->dim_v,
                       d->dtype);
}

static void fqla__dv_store(const fqla__backward_job *job, const fqla__strip_desk *desk, const fqla__strip *strip, int32_t h) {
    const fqla_plan_desc *d = &job->plan->desc;
    float dv[256];
    int32_t t;
    for (t = 0; t < strip->len; t++) {
        fqla__scale_to(dv, strip->p + t * desk->width, strip->beta[t], desk->width);
        fqla__row_store(desk->level, job->args->dv, fqla__strip_at(strip, d->strides.v, t, h), d->dim_v, d->dtype, dv);
    }
}

/* v-head h forward through a strip: its r, and, unless next is NULL, the state after it. */
static void fqla__strip_forward(const fqla__backward_job *job, const fqla__strip_desk *desk, fqla__strip *strip, int32_t h,
                                const float *state, float *next) {
    fqla__gates_load(job, strip, h);
    fqla__given_load(job, desk, strip, h, job->args->v, job->plan->desc.strides.v);
    fqla__strip_residuals(desk, strip, state);
    if (next != NULL) fqla__strip_advance(desk, strip, state, next);
}

/* v-head h through the chunk's strips and back; state: before the chunk, dstate: of the state after it, and then before it. */
static void fqla__chunk_reverse(const fqla__backward_job *job, fqla__backward_slot *slot, int32_t h, int32_t strips,
                                const float *state, float *dstate, double *gate_sums) {
    const fqla__strip_desk *desk = &slot->desk;
    int32_t i;
    for (i = 0; i < strips; i++)
        fqla__strip_forward(job, desk, &slot->strips[i], h, i > 0 ? slot->strips[i].state : state,
                            i + 1 < strips ? slot->strips[i + 1].state : NULL);
    for (i = strips - 1; i >= 0; i--) {
        fqla__strip *strip = &slot->strips[i];
        fqla__given_load(job, desk, strip, h, job->args->do_, job->plan->desc.strides.o);
        fqla__strip_adjoints(desk, strip, dstate);
        fqla__strip_gradients(desk, strip, i > 0 ? strip->state : state, dstate);
        fqla__dv_store(job, desk, strip, h);
        fqla__gates_store(job, strip, h, gate_sums);
    }
}

/* The j-th v-head that reads q/k head h_qk. */
static int32_t fqla__group_head(const fqla_plan_desc *d, int32_t h_qk, int32_t j) {
    return d->head_map == FQLA_HEAD_MAP_DIV ? h_qk * (d->heads_v / d->heads_qk) + j : h_qk + j * d->heads_qk;
}

static void fqla__backward_task(void *context, int64_t task, int32_t index) {
    const fqla__backward_job *job = (const fqla__backward_job *)context;
    const fqla_plan *plan = job->plan;
    const fqla_plan_desc *d = &plan->desc;
    const int64_t state_size = (int64_t)d->dim_k * job->width, group_size = job->group * state_size;
    const int32_t n = (int32_t)(task / d->heads_qk), h_qk = (int32_t)(task % d->heads_qk);
    const int64_t first = d->padded_len > 0 ? (int64_t)n * d->padded_len : plan->cu_seqlens[n];
    const int32_t len = plan->cu_seqlens[n + 1] - plan->cu_seqlens[n];
    const int32_t chunks = len / FLASHQLA_CHUNK + (len % FLASHQLA_CHUNK != 0);
    const int64_t piece = job->slots == (int64_t)d->max_seqs * d->heads_qk ? task : index;
    const unsigned mode = fqla__subnormals_off();
    fqla__backward_slot slot;
    double no_sums[2]; /* for gates that need none */
    int32_t c, i, j, strips;
    fqla__backward_slot_layout(job, job->workspace + piece * job->slot_size, &slot);

    for (j = 0; j < job->group; j++) {
        const int64_t head = (int64_t)n * d->heads_v + fqla__group_head(d, h_qk, j);
        if (chunks > 0) fqla__state_load(job, &slot.desk, slot.states + j * state_size, job->args->h0, head);
        fqla__state_load(job, &slot.desk, slot.dstates + j * state_size, job->args->dht, head);
        if (d->gate == FQLA_GATE_RAW) job->gate_sums[head * 2] = job->gate_sums[head * 2 + 1] = 0.0;
    }
    for (c = 0; c + 1 < chunks; c++) {
        strips = fqla__chunk_load(job, &slot, h_qk, first + (int64_t)c * FLASHQLA_CHUNK, FLASHQLA_CHUNK);
        for (j = 0; j < job->group; j++) {
            const float *state = slot.states + c * group_size + j * state_size;
            float *next = slot.states + (c + 1) * group_size + j * state_size;
            for (i = 0; i < strips; i++)
                fqla__strip_forward(job, &slot.desk, &slot.strips[i], fqla__group_head(d, h_qk, j), i > 0 ? next : state, next);
        }
    }
    for (c = chunks - 1; c >= 0; c--) {
        const int32_t left = len - c * FLASHQLA_CHUNK;
        strips = fqla__chunk_load(job, &slot, h_qk, first + (int64_t)c * FLASHQLA_CHUNK,
                                  left < FLASHQLA_CHUNK ? left : FLASHQLA_CHUNK);
        for (i = 0; i < strips; i++) {
            memset(slot.strips[i].dcolumns, 0, (size_t)(d->dim_k * FQLA__PAIR) * sizeof(float));
            memset(slot.strips[i].mix, 0, (size_t)(FQLA__PAIR * FQLA__PAIR) * sizeof(float));
        }
        for (j = 0; j < job->group; j++) {
            const int32_t h = fqla__group_head(d, h_qk, j);
            fqla__chunk_reverse(job, &slot, h, strips, slot.states + c * group_size + j * state_size, slot.dstates + j * state_size,
                                d->gate == FQLA_GATE_RAW ? job->gate_sums + ((int64_t)n * d->heads_v + h) * 2 : no_sums);
        }
        fqla__chunk_store(job, &slot, h_qk, strips);
    }
    for (j = 0; j < job->group && job->args->dh0 != NULL; j++)
        fqla__state_store(job, &slot.desk, slot.dstates + j * state_size, job->args->dh0,
                          (int64_t)n * d->heads_v + fqla__group_head(d, h_qk, j));
    fqla__subnormals_restore(mode);
}

static void fqla__cpu_backward(const fqla_plan *plan, const fqla_backward_args *args, void *workspace) {
    const fqla_plan_desc *d = &plan->desc;
    fqla__backward_job job = fqla__backward_job_of(plan);
    int32_t n, h;
    job.args = args;
    job.workspace = (char *)workspace + fqla__gate_sums_size(d);
    job.gate_sums = (double *)workspace;
    fqla__pool_run(&plan->context->pool, fqla__backward_task, &job, (int64_t)plan->num_seqs * d->heads_qk);
    for (h = 0; h < d->heads_v && d->gate == FQLA_GATE_RAW; h++) {
        double dA_log = 0.0, ddt_bias = 0.0;
        for (n = 0; n < plan->num_seqs; n++) {
            const double *sums = job.gate_sums + ((int64_t)n * d->heads_v + h) * 2;
            dA_log += sums[0];
            ddt_bias += sums[1];
        }
        args->dA_log[h] = (float)dA_log;
        args->ddt_bias[h] = (float)ddt_bias;
    }
}
