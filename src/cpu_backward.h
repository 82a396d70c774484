// >>cpu_backward: all gradients on the CPU, from products of small matrices

/*
    A task is a (sequence, q/k head) with the group of v-heads that read it. Forward once, keeping the state at every chunk's
    start; then the chunks last to first: the chunk's forward again, and its reverse. Inside a chunk tokens go in strips of 16. Of one
    strip of a v-head, with S the state before it, D the gradient of the state after it, all [dim_k, dim_v], a_i, b_i =
    alpha, beta of token i, L_ij = a_{j+1} .. a_i (i >= j, 1 on the diagonal), c_i = a_0 .. a_i and e_i = a_{i+1} .. a_last:

        r_i  = v_i - c_i S^T k_i - sum_{j<i} L_ij (k_i . k_j) b_j r_j             what token i lacks; it writes k_i (b_i r_i)^T
        S'   = c_last S + sum_i k_i (e_i b_i r_i)^T                               the next strip's S
        p_i  = e_i D^T k_i + sum_{t>=i} L_ti scale (q_t . k_i) do_t
                           - sum_{t>i}  L_ti (k_t . k_i) b_t p_t                  gradient of b_i r_i
        dv_i = b_i p_i,   dbeta_i = p_i . r_i
        D'   = c_last D + sum_t c_t (q_t (scale do_t)^T - k_t (b_t p_t)^T)        the previous strip's D

    With W_ts = scale L_ts b_s (do_t . r_s) for t >= s and Z_ts = L_ts b_t b_s (p_t . r_s) for t > s (0 elsewhere):

        dq_i = scale c_i S do_i + sum_s W_is k_s
        dk_i = e_i b_i D r_i - c_i b_i S p_i + sum_t (W_ti q_t - Z_ti k_t) - sum_s Z_is k_s

    dg_i sums what flows from before token i's decay to behind it: from token s < i or from S, to token t >= i or to D:

        dg_i = c_last <D, S> + sum_{t>=i} c_t (scale q_t . S do_t - b_t k_t . S p_t) + sum_{s<i} e_s b_s k_s . D r_s
             + sum_{s<i<=t} (W_ts (q_t . k_s) - Z_ts (k_t . k_s))

    Each term has a_i in it: nothing is added to be subtracted again, so that a strong gate's small dg keeps its digits, and alpha = 0
    gives 0. W and Z are summed over the group before they meet q and k. All that is large is a product of matrices, with
    the strip's rows side by side: q | k are 32 columns, do | p | r 48 rows.
*/
enum {
    FQLA__STRIP = 16,                            /* tokens */
    FQLA__STRIPS = FLASHQLA_CHUNK / FQLA__STRIP, /* in a chunk */
    FQLA__QK = 2 * FQLA__STRIP                   /* q and k of a strip's tokens */
};

typedef struct fqla__backward_job {
    const fqla_plan *plan;
    const fqla_backward_args *args;
    fqla_cpu_level level;
    int32_t group;     /* v-heads of a q/k head */
    int32_t width;     /* dim_v rounded up to 16: columns of a state in the workspace, zero past dim_v */
    int32_t chunks;    /* most of a sequence */
    int64_t slots;     /* pieces of workspace: one a thread, or one a task where there are fewer of those */
    double *gate_sums; /* [max_seqs, heads_v, 2]: dA_log and ddt_bias of one sequence; with FQLA_GATE_RAW alone */
    char *workspace;
} fqla__backward_job;

/* A strip: its tokens, its pieces of workspace (float32), and the gates of the v-head at hand. Rows past the sequence are zero,
   with alpha 1 and beta 0. */
typedef struct fqla__strip {
    int64_t row; /* of the first token */
    int32_t len; /* tokens, 0 to 16 */
    float *rows;     /* [32, dim_k]: q rows, k rows, normalised where the plan asks for it */
    float *columns;  /* [dim_k, 32]: the same, transposed */
    float *dots;     /* [32, 16]: q_t . k_s, k_t . k_s */
    float *norms;    /* [32]: what l2norm multiplied the rows with */
    float *dcolumns; /* [dim_k, 32]: dq and dk, transposed */
    float *mix;      /* [32, 32]: dq and dk as combinations of q and k: W and Z */
    float *values;   /* [64, width]: rows of S^T k or D^T k, v or do, p, r */
    float *start;    /* [dim_k, width]: S */
    float alpha[FQLA__STRIP], beta[FQLA__STRIP];
    float from_start[FQLA__STRIP];         /* c_i */
    float decay[FQLA__STRIP][FQLA__STRIP]; /* L_ij; 0 for j > i */
} fqla__strip;

enum { FQLA__VALUES_RAW = FQLA__STRIP, FQLA__VALUES_P = 2 * FQLA__STRIP, FQLA__VALUES_R = 3 * FQLA__STRIP, FQLA__LAST = FQLA__STRIP - 1 };

/* A task's piece of workspace, float32 throughout. dim_k and dim_v 128: 1 MB, and 64 KB a chunk and v-head of the group. */
typedef struct fqla__backward_slot {
    float *states;   /* [chunks, group, dim_k, width]: S before each chunk */
    float *dstates;  /* [group, dim_k, width]: D */
    float *scaled;   /* [32, width]: rows of a strip, times the factors with which they enter D or S */
    float *turned;   /* [width, 48]: do, p, r of a strip, transposed */
    float *products; /* [dim_k, 48]: S do | S p | D r; then [32, dim_k]: rows of dq, dk */
    fqla__strip strips[FQLA__STRIPS];
} fqla__backward_slot;

static float *fqla__carve(char *memory, int64_t *bytes, int64_t count) {
    float *array = memory != NULL ? (float *)(void *)(memory + *bytes) : NULL;
    *bytes += fqla__round_up(count * (int64_t)sizeof *array, FQLA__ALIGNMENT);
    return array;
}

/* Lay a slot out in memory, or with memory NULL only learn its bytes. */
static int64_t fqla__backward_slot_layout(const fqla__backward_job *job, char *memory, fqla__backward_slot *slot) {
    const int64_t dim_k = job->plan->desc.dim_k, width = job->width, state = dim_k * width;
    int64_t bytes = 0;
    int i;
    slot->states = fqla__carve(memory, &bytes, job->chunks * job->group * state);
    slot->dstates = fqla__carve(memory, &bytes, job->group * state);
    slot->scaled = fqla__carve(memory, &bytes, FQLA__QK * width);
    slot->turned = fqla__carve(memory, &bytes, width * 3 * FQLA__STRIP);
    slot->products = fqla__carve(memory, &bytes, dim_k * 3 * FQLA__STRIP);
    for (i = 0; i < FQLA__STRIPS; i++) {
        fqla__strip *strip = &slot->strips[i];
        strip->rows = fqla__carve(memory, &bytes, FQLA__QK * dim_k);
        strip->columns = fqla__carve(memory, &bytes, dim_k * FQLA__QK);
        strip->dots = fqla__carve(memory, &bytes, FQLA__QK * FQLA__STRIP);
        strip->norms = fqla__carve(memory, &bytes, FQLA__QK);
        strip->dcolumns = fqla__carve(memory, &bytes, dim_k * FQLA__QK);
        strip->mix = fqla__carve(memory, &bytes, FQLA__QK * FQLA__QK);
        strip->values = fqla__carve(memory, &bytes, 4 * FQLA__STRIP * width);
        strip->start = fqla__carve(memory, &bytes, state);
    }
    return bytes;
}

static fqla__backward_job fqla__backward_job_of(const fqla_plan *plan) {
    const fqla_plan_desc *d = &plan->desc;
    const int64_t tasks = (int64_t)d->max_seqs * d->heads_qk, threads = plan->context->summary.num_threads;
    const int32_t longest = d->padded_len > 0 ? d->padded_len : d->max_tokens;
    fqla__backward_job job;
    memset(&job, 0, sizeof job);
    job.plan = plan;
    job.level = plan->context->summary.cpu_level;
    job.group = d->heads_v / d->heads_qk;
    job.width = (int32_t)fqla__round_up(d->dim_v, FQLA__MATMUL_COLUMNS);
    job.chunks = longest / FLASHQLA_CHUNK + (longest % FLASHQLA_CHUNK != 0);
    job.slots = tasks < threads ? tasks : threads;
    return job;
}

static int64_t fqla__gate_sums_size(const fqla_plan_desc *d) {
    if (d->gate != FQLA_GATE_RAW) return 0;
    return fqla__round_up((int64_t)d->max_seqs * d->heads_v * 2 * (int64_t)sizeof(double), FQLA__ALIGNMENT);
}

/* Bytes of workspace: min(threads, tasks) times the states at the chunks' starts of the longest sequence and a group of v-heads. */
static bool fqla__cpu_backward_workspace(const fqla_plan *plan, int64_t *bytes) {
    const fqla__backward_job job = fqla__backward_job_of(plan);
    fqla__backward_slot slot;
    int64_t slots;
    return fqla__mul(job.slots, fqla__backward_slot_layout(&job, NULL, &slot), &slots) &&
           fqla__add(slots, fqla__gate_sums_size(&plan->desc), bytes);
}

/* A state between a tensor's layout and the workspace's [dim_k, width]; base: its first element. */
static void fqla__state_load(const fqla__backward_job *job, float *state, const void *states, int64_t base) {
    const fqla_plan_desc *d = &job->plan->desc;
    int32_t i, x;
    memset(state, 0, (size_t)d->dim_k * (size_t)job->width * sizeof *state);
    if (states == NULL) return;
    for (i = 0; i < d->dim_k; i++)
        if (d->state_layout == FQLA_STATE_KV)
            fqla__load_row(state + i * job->width, states, base + (int64_t)i * d->dim_v, d->dim_v, d->state_dtype);
        else
            for (x = 0; x < d->dim_v; x++)
                state[i * job->width + x] = fqla__load(states, base + (int64_t)x * d->dim_k + i, d->state_dtype);
}

static void fqla__state_store(const fqla__backward_job *job, const float *state, void *states, int64_t base) {
    const fqla_plan_desc *d = &job->plan->desc;
    int32_t i, x;
    for (i = 0; i < d->dim_k; i++)
        if (d->state_layout == FQLA_STATE_KV)
            fqla__store_row(states, base + (int64_t)i * d->dim_v, d->dim_v, d->state_dtype, state + i * job->width);
        else
            for (x = 0; x < d->dim_v; x++)
                fqla__store(states, base + (int64_t)x * d->dim_k + i, d->state_dtype, state[i * job->width + x]);
}

static void fqla__qk_row_load(const fqla_plan_desc *d, float *row, float *norm, const void *tensor, int64_t index) {
    fqla__load_row(row, tensor, index, d->dim_k, d->dtype);
    *norm = 1.0f;
    if (!d->l2norm) return;
    *norm = fqla__l2norm_factor(fqla__dot(row, row, d->dim_k));
    fqla__scale_row(row, *norm, d->dim_k);
}

/* The chunk of len tokens at `row`: its strips, their q and k and the products of those. Returns how many strips have tokens. */
static int32_t fqla__chunk_load(const fqla__backward_job *job, fqla__backward_slot *slot, int32_t h_qk, int64_t row, int32_t len) {
    const fqla_plan_desc *d = &job->plan->desc;
    const fqla_strides *sq = &d->strides.q, *sk = &d->strides.k;
    const int32_t dim_k = d->dim_k;
    int32_t i, t;
    for (i = 0; i * FQLA__STRIP < len; i++) {
        fqla__strip *strip = &slot->strips[i];
        float *k = strip->rows + FQLA__STRIP * dim_k;
        strip->row = row + i * FQLA__STRIP;
        strip->len = len - i * FQLA__STRIP < FQLA__STRIP ? len - i * FQLA__STRIP : FQLA__STRIP;
        memset(strip->rows, 0, (size_t)(FQLA__QK * dim_k) * sizeof *strip->rows);
        for (t = 0; t < strip->len; t++) {
            const int64_t token = strip->row + t;
            fqla__qk_row_load(d, strip->rows + t * dim_k, strip->norms + t, job->args->q, token * sq->token + h_qk * sq->head);
            fqla__qk_row_load(d, k + t * dim_k, strip->norms + FQLA__STRIP + t, job->args->k, token * sk->token + h_qk * sk->head);
        }
        fqla__transpose(strip->columns, FQLA__QK, strip->rows, dim_k, FQLA__QK, dim_k);
        fqla__multiply(job->level, FQLA__QK, FQLA__STRIP, dim_k, strip->dots, FQLA__STRIP, fqla__matrix_of(strip->rows, dim_k),
                       fqla__matrix_of(strip->columns + FQLA__STRIP, FQLA__QK));
    }
    return i;
}

/* The gates of v-head h. */
static void fqla__strip_gates(const fqla__backward_job *job, fqla__strip *strip, int32_t h) {
    const fqla_plan_desc *d = &job->plan->desc;
    const fqla_strides *sg = &d->strides.g, *sb = &d->strides.beta;
    float whole = 1.0f;
    int32_t i, j;
    for (i = 0; i < FQLA__STRIP; i++) {
        strip->alpha[i] = 1.0f;
        strip->beta[i] = 0.0f;
        if (i < strip->len) {
            const int64_t token = strip->row + i;
            const float g = fqla__load(job->args->g, token * sg->token + h * sg->head, fqla__g_dtype(d));
            const float beta = fqla__load(job->args->beta, token * sb->token + h * sb->head, fqla__beta_dtype(d));
            strip->alpha[i] = fqla__alpha(d, g, job->args->A_log, job->args->dt_bias, h);
            strip->beta[i] = fqla__beta(d, beta);
        }
        whole *= strip->alpha[i];
        strip->from_start[i] = whole;
        for (j = 0; j < FQLA__STRIP; j++) strip->decay[i][j] = j < i ? strip->decay[i - 1][j] * strip->alpha[i] : j == i ? 1.0f : 0.0f;
    }
}

/* Rows of v or do to the strip's values. */
static void fqla__strip_load(const fqla__backward_job *job, const fqla__strip *strip, int32_t h, const void *tensor,
                             const fqla_strides *strides) {
    const fqla_plan_desc *d = &job->plan->desc;
    float *rows = strip->values + FQLA__VALUES_RAW * job->width;
    int32_t t;
    if (strip->len < FQLA__STRIP || d->dim_v < job->width) memset(rows, 0, (size_t)(FQLA__STRIP * job->width) * sizeof *rows);
    for (t = 0; t < strip->len; t++)
        fqla__load_row(rows + t * job->width, tensor, (strip->row + t) * strides->token + h * strides->head, d->dim_v, d->dtype);
}

/* (I + lower)^-1, both of 1 (implied for lower) on the diagonal. What stands above lower's is not read. */
static void fqla__invert(float inverse[FQLA__STRIP][FQLA__STRIP], float lower[FQLA__STRIP][FQLA__STRIP]) {
    int32_t i, j, x;
    for (i = 0; i < FQLA__STRIP; i++) {
        float row[FQLA__STRIP];
        for (x = 0; x < FQLA__STRIP; x++) row[x] = x == i ? 1.0f : 0.0f;
        for (j = 0; j < i; j++)
            for (x = 0; x < FQLA__STRIP; x++) row[x] -= lower[i][j] * inverse[j][x];
        memcpy(inverse[i], row, sizeof row);
    }
}

/* r, from S: r = B (v - c S^T k) with B = (I + L kk b)^-1. */
static void fqla__strip_residuals(const fqla__backward_job *job, const fqla__strip *strip, int32_t h, const float *state) {
    const int32_t dim_k = job->plan->desc.dim_k, width = job->width;
    const float *kk = strip->dots + FQLA__STRIP * FQLA__STRIP;
    float lower[FQLA__STRIP][FQLA__STRIP], inverse[FQLA__STRIP][FQLA__STRIP], factors[FQLA__STRIP][FQLA__QK];
    int32_t i, j;
    fqla__strip_load(job, strip, h, job->args->v, &job->plan->desc.strides.v);
    fqla__multiply(job->level, FQLA__STRIP, width, dim_k, strip->values, width, fqla__matrix_of(strip->rows + FQLA__STRIP * dim_k, dim_k),
                   fqla__matrix_of(state, width));
    for (i = 0; i < FQLA__STRIP; i++)
        for (j = 0; j < FQLA__STRIP; j++) lower[i][j] = strip->decay[i][j] * kk[i * FQLA__STRIP + j] * strip->beta[j];
    fqla__invert(inverse, lower);
    for (i = 0; i < FQLA__STRIP; i++)
        for (j = 0; j < FQLA__STRIP; j++) {
            factors[i][j] = -inverse[i][j] * strip->from_start[j];
            factors[i][FQLA__STRIP + j] = inverse[i][j];
        }
    fqla__multiply(job->level, FQLA__STRIP, width, FQLA__QK, strip->values + FQLA__VALUES_R * width, width,
                   fqla__matrix_of(factors[0], FQLA__QK), fqla__matrix_of(strip->values, width));
}

/* The state after the strip from the one before it; they may coincide. */
static void fqla__strip_advance(const fqla__backward_job *job, const fqla__backward_slot *slot, const fqla__strip *strip, const float *state,
                                float *next) {
    const int32_t width = job->width;
    int32_t t;
    for (t = 0; t < FQLA__STRIP; t++)
        fqla__scale_to(slot->scaled + t * width, strip->values + (FQLA__VALUES_R + t) * width,
                       strip->decay[FQLA__LAST][t] * strip->beta[t], width);
    fqla__multiply_add(job->level, job->plan->desc.dim_k, width, FQLA__STRIP, next, width, strip->from_start[FQLA__LAST], state,
                       fqla__matrix_of(strip->columns + FQLA__STRIP, FQLA__QK), fqla__matrix_of(slot->scaled, width));
}

/* p, from D: p = B (e D^T k + L scale (q . k) do), sums over later tokens, with B the transpose of (I + b L kk)^-1. */
static void fqla__strip_adjoints(const fqla__backward_job *job, const fqla__strip *strip, int32_t h, const float *dstate) {
    const int32_t dim_k = job->plan->desc.dim_k, width = job->width;
    const float *qk = strip->dots, *kk = qk + FQLA__STRIP * FQLA__STRIP;
    float lower[FQLA__STRIP][FQLA__STRIP], inverse[FQLA__STRIP][FQLA__STRIP], later[FQLA__STRIP][FQLA__STRIP];
    float turned[FQLA__STRIP][FQLA__STRIP], factors[FQLA__STRIP][FQLA__QK];
    int32_t i, j;
    fqla__strip_load(job, strip, h, job->args->do_, &job->plan->desc.strides.o);
    fqla__multiply(job->level, FQLA__STRIP, width, dim_k, strip->values, width, fqla__matrix_of(strip->rows + FQLA__STRIP * dim_k, dim_k),
                   fqla__matrix_of(dstate, width));
    for (i = 0; i < FQLA__STRIP; i++)
        for (j = 0; j < FQLA__STRIP; j++) {
            lower[i][j] = strip->decay[i][j] * kk[i * FQLA__STRIP + j] * strip->beta[i];
            later[j][i] = strip->decay[i][j] * qk[i * FQLA__STRIP + j] * job->plan->desc.scale;
        }
    fqla__invert(inverse, lower);
    for (i = 0; i < FQLA__STRIP; i++)
        for (j = 0; j < FQLA__STRIP; j++) {
            turned[i][j] = inverse[j][i];
            factors[i][j] = inverse[j][i] * strip->decay[FQLA__LAST][j];
        }
    fqla__multiply(job->level, FQLA__STRIP, FQLA__STRIP, FQLA__STRIP, factors[0] + FQLA__STRIP, FQLA__QK,
                   fqla__matrix_of(turned[0], FQLA__STRIP), fqla__matrix_of(later[0], FQLA__STRIP));
    fqla__multiply(job->level, FQLA__STRIP, width, FQLA__QK, strip->values + FQLA__VALUES_P * width, width,
                   fqla__matrix_of(factors[0], FQLA__QK), fqla__matrix_of(strip->values, width));
}

/* What the strip adds to dq and dk, and all of its dg and dbeta, which are those of log alpha and beta. dstate: D, and then D'. */
static void fqla__strip_gradients(const fqla__backward_job *job, const fqla__backward_slot *slot, const fqla__strip *strip,
                                  const float *state, float *dstate, float *dg, float *dbeta) {
    const int32_t dim_k = job->plan->desc.dim_k, width = job->width;
    const float scale = job->plan->desc.scale, whole = strip->from_start[FQLA__LAST];
    const float *qk = strip->dots, *kk = qk + FQLA__STRIP * FQLA__STRIP;
    const float *values = strip->values + FQLA__VALUES_RAW * width; /* do, p, r */
    const fqla__matrix turned = fqla__matrix_of(slot->turned, 3 * FQLA__STRIP);
    const fqla__matrix turned_r = fqla__matrix_of(slot->turned + FQLA__QK, 3 * FQLA__STRIP);
    float factors[3 * FQLA__STRIP];                /* of do, p, r as they enter D', D' and S' */
    float flows[3 * FQLA__STRIP];                  /* to dg: from S to t through q, from S to t through k, from s to D */
    float crossing[FQLA__STRIP];                   /* to dg_i: from all s < i to t */
    float between[FQLA__STRIP][FQLA__STRIP];       /* from s to t, at [s][t] */
    float products[2 * FQLA__STRIP * FQLA__STRIP]; /* do_t . r_s, p_t . r_s */
    float through;                                 /* from S to D */
    int32_t i, x, s, t;
    for (t = 0; t < FQLA__STRIP; t++) {
        factors[t] = scale * strip->from_start[t];
        factors[FQLA__STRIP + t] = -strip->from_start[t] * strip->beta[t];
        factors[FQLA__QK + t] = strip->decay[FQLA__LAST][t] * strip->beta[t];
    }
    fqla__transpose(slot->turned, 3 * FQLA__STRIP, values, width, 3 * FQLA__STRIP, width);
    fqla__multiply(job->level, FQLA__QK, FQLA__STRIP, width, products, FQLA__STRIP, fqla__matrix_of(values, width), turned_r);
    fqla__multiply(job->level, dim_k, FQLA__QK, width, slot->products, 3 * FQLA__STRIP, fqla__matrix_of(state, width), turned);
    fqla__multiply(job->level, dim_k, FQLA__STRIP, width, slot->products + FQLA__QK, 3 * FQLA__STRIP, fqla__matrix_of(dstate, width),
                   turned_r);

    /* across the strip's borders */
    through = whole * fqla__inner_product(dstate, state, dim_k * width);
    for (x = 0; x < 3 * FQLA__STRIP; x++) flows[x] = 0.0f;
    for (i = 0; i < dim_k; i++) {
        const float *__restrict from = slot->products + i * 3 * FQLA__STRIP, *__restrict column = strip->columns + i * FQLA__QK;
        float *__restrict to = strip->dcolumns + i * FQLA__QK;
        for (x = 0; x < FQLA__STRIP; x++) {
            const float dq = factors[x] * from[x], dk = factors[FQLA__STRIP + x] * from[FQLA__STRIP + x];
            const float dr = factors[FQLA__QK + x] * from[FQLA__QK + x];
            to[x] += dq;
            to[FQLA__STRIP + x] += dk + dr;
            flows[x] += column[x] * dq;
            flows[FQLA__STRIP + x] += column[FQLA__STRIP + x] * dk;
            flows[FQLA__QK + x] += column[FQLA__STRIP + x] * dr;
        }
    }

    /* inside it */
    for (t = 0; t < FQLA__STRIP; t++) {
        dbeta[t] = products[(FQLA__STRIP + t) * FQLA__STRIP + t];
        for (s = 0; s <= t; s++) {
            const float decay = strip->decay[t][s] * strip->beta[s];
            const float w = scale * decay * products[t * FQLA__STRIP + s];
            const float z = s < t ? decay * strip->beta[t] * products[(FQLA__STRIP + t) * FQLA__STRIP + s] : 0.0f;
            between[s][t] = w * qk[t * FQLA__STRIP + s] - z * kk[t * FQLA__STRIP + s];
            strip->mix[(FQLA__STRIP + s) * FQLA__QK + t] += w;               /* k_s in dq_t */
            strip->mix[t * FQLA__QK + FQLA__STRIP + s] += w;                 /* q_t in dk_s */
            strip->mix[(FQLA__STRIP + s) * FQLA__QK + FQLA__STRIP + t] -= z; /* k_s in dk_t */
            strip->mix[(FQLA__STRIP + t) * FQLA__QK + FQLA__STRIP + s] -= z; /* k_t in dk_s */
        }
    }
    for (t = 0; t < FQLA__STRIP; t++) crossing[t] = flows[t] + flows[FQLA__STRIP + t];
    for (i = 0; i < FQLA__STRIP; i++) {
        dg[i] = through;
        for (t = i; t < FQLA__STRIP; t++) dg[i] += crossing[t];
        through += flows[FQLA__QK + i];
        for (t = i + 1; t < FQLA__STRIP; t++) crossing[t] += between[i][t];
    }

    for (t = 0; t < FQLA__QK; t++) fqla__scale_to(slot->scaled + t * width, values + t * width, factors[t], width);
    fqla__multiply_add(job->level, dim_k, width, FQLA__QK, dstate, width, whole, dstate, fqla__matrix_of(strip->columns, FQLA__QK),
                       fqla__matrix_of(slot->scaled, width));
}

/* dv, dg and dbeta of a strip's tokens to their tensors; through the raw forms where the plan has them. */
static void fqla__strip_store(const fqla__backward_job *job, const fqla__strip *strip, int32_t h, const float *dg, const float *dbeta,
                              double *gate_sums) {
    const fqla_plan_desc *d = &job->plan->desc;
    const fqla_backward_args *args = job->args;
    const fqla_tensor_strides *s = &d->strides;
    float dv[256];
    int32_t t;
    for (t = strip->len - 1; t >= 0; t--) {
        const int64_t token = strip->row + t;
        const int64_t g_at = token * s->g.token + h * s->g.head, beta_at = token * s->beta.token + h * s->beta.head;
        const float *p = strip->values + (FQLA__VALUES_P + t) * job->width;
        float to_g = strip->alpha[t] == 0.0f ? 0.0f : dg[t], to_beta = dbeta[t];
        fqla__scale_to(dv, p, strip->beta[t], job->width);
        fqla__store_row(args->dv, token * s->v.token + h * s->v.head, d->dim_v, d->dtype, dv);
        if (d->gate == FQLA_GATE_RAW && strip->alpha[t] != 0.0f) {
            const float raw = fqla__load(args->g, g_at, d->dtype) + args->dt_bias[h], rate = -expf(args->A_log[h]);
            gate_sums[0] += (double)to_g * (double)(rate * fqla__softplus(raw));
            to_g *= rate * (raw > 20.0f ? 1.0f : fqla__sigmoid(raw));
            gate_sums[1] += (double)to_g;
        }
        if (d->beta == FQLA_BETA_SIGMOID) /* beta (1 - sigmoid b) */
            to_beta *= strip->beta[t] * fqla__sigmoid(-fqla__load(args->beta, beta_at, d->dtype));
        fqla__store(args->dg, g_at, fqla__g_dtype(d), to_g);
        fqla__store(args->dbeta, beta_at, fqla__beta_dtype(d), to_beta);
    }
}

/* v-head h's reverse through the chunk that is loaded; state: before it, dstate: D behind it, and then before it. */
static void fqla__chunk_reverse(const fqla__backward_job *job, fqla__backward_slot *slot, int32_t strips, int32_t h, const float *state,
                                float *dstate, double *gate_sums) {
    float dg[FQLA__STRIP], dbeta[FQLA__STRIP];
    int32_t i;
    for (i = 0; i < strips; i++) {
        fqla__strip *strip = &slot->strips[i];
        const float *start = i > 0 ? strip->start : state;
        fqla__strip_gates(job, strip, h);
        fqla__strip_residuals(job, strip, h, start);
        if (i + 1 < strips) fqla__strip_advance(job, slot, strip, start, slot->strips[i + 1].start);
    }
    for (i = strips - 1; i >= 0; i--) {
        const fqla__strip *strip = &slot->strips[i];
        fqla__strip_adjoints(job, strip, h, dstate);
        fqla__strip_gradients(job, slot, strip, i > 0 ? strip->start : state, dstate, dg, dbeta);
        fqla__strip_store(job, strip, h, dg, dbeta, gate_sums);
    }
}

/* A row of dq or dk, which changes; through the norm y = x norm: dx = norm (dy - y (y . dy)). */
static void fqla__qk_row_store(const fqla_plan_desc *d, void *tensor, int64_t index, float *gradient, const float *row, float norm) {
    if (d->l2norm) {
        const float along = fqla__dot(row, gradient, d->dim_k);
        int32_t i;
        for (i = 0; i < d->dim_k; i++) gradient[i] = norm * (gradient[i] - along * row[i]);
    }
    fqla__store_row(tensor, index, d->dim_k, d->dtype, gradient);
}

/* dq and dk of a chunk, once all heads of the group have added to them. */
static void fqla__chunk_store(const fqla__backward_job *job, const fqla__backward_slot *slot, int32_t strips, int32_t h_qk) {
    const fqla_plan_desc *d = &job->plan->desc;
    const fqla_strides *sq = &d->strides.q, *sk = &d->strides.k;
    const int32_t dim_k = d->dim_k;
    int32_t i, t;
    for (i = 0; i < strips; i++) {
        const fqla__strip *strip = &slot->strips[i];
        fqla__multiply_add(job->level, dim_k, FQLA__QK, FQLA__QK, strip->dcolumns, FQLA__QK, 1.0f, strip->dcolumns,
                           fqla__matrix_of(strip->columns, FQLA__QK), fqla__matrix_of(strip->mix, FQLA__QK));
        fqla__transpose(slot->products, dim_k, strip->dcolumns, FQLA__QK, dim_k, FQLA__QK);
        for (t = 0; t < strip->len; t++) {
            const int64_t token = strip->row + t;
            const int32_t k = FQLA__STRIP + t;
            fqla__qk_row_store(d, job->args->dq, token * sq->token + h_qk * sq->head, slot->products + t * dim_k, strip->rows + t * dim_k,
                               strip->norms[t]);
            fqla__qk_row_store(d, job->args->dk, token * sk->token + h_qk * sk->head, slot->products + k * dim_k, strip->rows + k * dim_k,
                               strip->norms[k]);
        }
    }
}

/* The j-th v-head of q/k head h_qk. */
static int32_t fqla__group_head(const fqla_plan_desc *d, int32_t h_qk, int32_t j) {
    return d->head_map == FQLA_HEAD_MAP_DIV ? h_qk * (d->heads_v / d->heads_qk) + j : h_qk + j * d->heads_qk;
}

static void fqla__backward_task(void *context, int64_t task, int32_t index) {
    const fqla__backward_job *job = (const fqla__backward_job *)context;
    const fqla_plan *plan = job->plan;
    const fqla_plan_desc *d = &plan->desc;
    const int64_t state_size = (int64_t)d->dim_k * job->width;
    const int32_t n = (int32_t)(task / d->heads_qk), h_qk = (int32_t)(task % d->heads_qk);
    const int64_t first = d->padded_len > 0 ? (int64_t)n * d->padded_len : plan->cu_seqlens[n];
    const int32_t len = plan->cu_seqlens[n + 1] - plan->cu_seqlens[n];
    const int32_t chunks = len / FLASHQLA_CHUNK + (len % FLASHQLA_CHUNK != 0);
    const int64_t piece = (int64_t)d->max_seqs * d->heads_qk == job->slots ? task : index;
    fqla__backward_slot slot;
    int32_t c, i, j, strips;
    fqla__backward_slot_layout(job, job->workspace + piece * fqla__backward_slot_layout(job, NULL, &slot), &slot);

    for (j = 0; j < job->group; j++) {
        const int64_t head = (int64_t)n * d->heads_v + fqla__group_head(d, h_qk, j);
        if (chunks > 0) fqla__state_load(job, slot.states + j * state_size, job->args->h0, head * fqla__state_elements(d));
        fqla__state_load(job, slot.dstates + j * state_size, job->args->dht, head * fqla__state_elements(d));
        if (d->gate == FQLA_GATE_RAW) job->gate_sums[head * 2] = job->gate_sums[head * 2 + 1] = 0.0;
    }
    for (c = 0; c + 1 < chunks; c++) {
        strips = fqla__chunk_load(job, &slot, h_qk, first + (int64_t)c * FLASHQLA_CHUNK, FLASHQLA_CHUNK);
        for (j = 0; j < job->group; j++) {
            const int32_t h = fqla__group_head(d, h_qk, j);
            const float *state = slot.states + (c * job->group + j) * state_size;
            float *next = slot.states + ((c + 1) * job->group + j) * state_size;
            for (i = 0; i < strips; i++) {
                fqla__strip_gates(job, &slot.strips[i], h);
                fqla__strip_residuals(job, &slot.strips[i], h, i > 0 ? next : state);
                fqla__strip_advance(job, &slot, &slot.strips[i], i > 0 ? next : state, next);
            }
        }
    }
    for (c = chunks - 1; c >= 0; c--) {
        const int32_t left = len - c * FLASHQLA_CHUNK;
        strips = fqla__chunk_load(job, &slot, h_qk, first + (int64_t)c * FLASHQLA_CHUNK, left < FLASHQLA_CHUNK ? left : FLASHQLA_CHUNK);
        for (i = 0; i < strips; i++) {
            memset(slot.strips[i].dcolumns, 0, (size_t)(d->dim_k * FQLA__QK) * sizeof *slot.strips[i].dcolumns);
            memset(slot.strips[i].mix, 0, (size_t)(FQLA__QK * FQLA__QK) * sizeof *slot.strips[i].mix);
        }
        for (j = 0; j < job->group; j++) {
            const int32_t h = fqla__group_head(d, h_qk, j);
            double *gate_sums = d->gate == FQLA_GATE_RAW ? job->gate_sums + ((int64_t)n * d->heads_v + h) * 2 : NULL;
            fqla__chunk_reverse(job, &slot, strips, h, slot.states + (c * job->group + j) * state_size, slot.dstates + j * state_size,
                                gate_sums);
        }
        fqla__chunk_store(job, &slot, strips, h_qk);
    }
    for (j = 0; j < job->group && job->args->dh0 != NULL; j++)
        fqla__state_store(job, slot.dstates + j * state_size, job->args->dh0,
                          ((int64_t)n * d->heads_v + fqla__group_head(d, h_qk, j)) * fqla__state_elements(d));
}

static void fqla__cpu_backward(const fqla_plan *plan, const fqla_backward_args *args, void *workspace) {
    const fqla_plan_desc *d = &plan->desc;
    fqla__backward_job job = fqla__backward_job_of(plan);
    int32_t n, h;
    job.args = args;
    job.gate_sums = (double *)workspace;
    job.workspace = (char *)workspace + fqla__gate_sums_size(d);
    fqla__pool_run(&plan->context->pool, fqla__backward_task, &job, (int64_t)plan->num_seqs * d->heads_qk);
    for (h = 0; h < d->heads_v && d->gate == FQLA_GATE_RAW; h++) {
        double dA_log = 0.0, ddt_bias = 0.0;
        for (n = 0; n < plan->num_seqs; n++) {
            dA_log += job.gate_sums[((int64_t)n * d->heads_v + h) * 2];
            ddt_bias += job.gate_sums[((int64_t)n * d->heads_v + h) * 2 + 1];
        }
        args->dA_log[h] = (float)dA_log;
        args->ddt_bias[h] = (float)ddt_bias;
    }
}
