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
    FQLA__STRIP = 16,                           /* tokens */
    FQLA__STRIPS = FLASHQLA_CHUNK / FQLA__STRIP /* in a chunk */
};

typedef struct fqla__backward_job {
    const fqla_plan *plan;
    const fqla_backward_args *args;
    int32_t group;      /* v-heads of a q/k head */
    int32_t width;      /* dim_v rounded up to 16: columns of a state in the workspace, zero past dim_v */
    int32_t chunks;     /* most of a sequence */
    int64_t slots;      /* pieces of workspace: one a thread, or one a task where there are fewer of those */
    double *gate_sums;  /* [max_seqs, heads_v, 2]: dA_log and ddt_bias of one sequence; with FQLA_GATE_RAW alone */
    char *workspace;
} fqla__backward_job;

/* A task's piece of workspace, float32 throughout. dim_k and dim_v 128: 1 MB, and 64 KB a chunk and v-head of the group. */
typedef struct fqla__backward_slot {
    float *states;   /* [chunks, group, dim_k, width]: S before each chunk */
    float *dstates;  /* [group, dim_k, width]: D */
    float *starts;   /* [FQLA__STRIPS, dim_k, width]: S before each strip of the chunk */
    float *rows;     /* [FQLA__STRIPS, 32, dim_k]: q rows, k rows, normalised where the plan asks for it; zero past the sequence */
    float *columns;  /* [FQLA__STRIPS, dim_k, 32]: the same, transposed */
    float *dots;     /* [FQLA__STRIPS, 32, 16]: q_t . k_s, k_t . k_s */
    float *norms;    /* [FQLA__STRIPS, 32]: what l2norm multiplied the rows with */
    float *dcolumns; /* [FQLA__STRIPS, dim_k, 32]: dq and dk, transposed */
    float *mix;      /* [FQLA__STRIPS, 32, 32]: dq | dk of the strip's tokens as combinations of its q and k: W and Z */
    float *values;   /* [FQLA__STRIPS, 48, width]: do, p and r rows; zero past the sequence */
    float *scaled;   /* [48, width]: one strip's, times the factors with which they enter D and S */
    float *turned;   /* [width, 48]: one strip's, transposed */
    float *products; /* [dim_k, 48]: S do | S p | D r */
} fqla__backward_slot;

/* Lay a slot out in memory; with memory NULL only to learn its bytes. */
static int64_t fqla__backward_slot_layout(const fqla__backward_job *job, char *memory, fqla__backward_slot *slot) {
    const int64_t dim_k = job->plan->desc.dim_k, width = job->width, strip = FQLA__STRIP, strips = FQLA__STRIPS;
    const int64_t sizes[13] = { job->chunks * job->group * dim_k * width, job->group * dim_k * width, strips * dim_k * width,
                                strips * 2 * strip * dim_k, strips * 2 * strip * dim_k, strips * 2 * strip * strip, strips * 2 * strip,
                                strips * 2 * strip * dim_k, strips * 4 * strip * strip, strips * 3 * strip * width, 3 * strip * width,
                                3 * strip * width, 3 * strip * dim_k };
    float *arrays[13];
    int64_t bytes = 0;
    int i;
    for (i = 0; i < 13; i++) {
        arrays[i] = memory != NULL ? (float *)(void *)(memory + bytes) : NULL;
        bytes += fqla__round_up(sizes[i] * (int64_t)sizeof(float), FQLA__ALIGNMENT);
    }
    if (memory == NULL) return bytes;
    slot->states = arrays[0], slot->dstates = arrays[1], slot->starts = arrays[2];
    slot->rows = arrays[3], slot->columns = arrays[4], slot->dots = arrays[5], slot->norms = arrays[6];
    slot->dcolumns = arrays[7], slot->mix = arrays[8];
    slot->values = arrays[9], slot->scaled = arrays[10], slot->turned = arrays[11], slot->products = arrays[12];
    return bytes;
}

static fqla__backward_job fqla__backward_job_of(const fqla_plan *plan) {
    const fqla_plan_desc *d = &plan->desc;
    const int64_t tasks = (int64_t)d->max_seqs * d->heads_qk, threads = plan->context->summary.num_threads;
    const int32_t longest = d->padded_len > 0 ? d->padded_len : d->max_tokens;
    fqla__backward_job job;
    memset(&job, 0, sizeof job);
    job.plan = plan;
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
    int64_t slots;
    return fqla__mul(job.slots, fqla__backward_slot_layout(&job, NULL, NULL), &slots) &&
           fqla__add(slots, fqla__gate_sums_size(&plan->desc), bytes);
}

static void fqla__matmul_of(const fqla__backward_job *job, float *c, int32_t ldc, float keep, const float *a, int32_t lda, const float *b,
                            int32_t ldb, int32_t m, int32_t n, int32_t k) {
    fqla__matmul_sizes sizes;
    sizes.m = m, sizes.n = n, sizes.k = k;
    sizes.ldc = ldc, sizes.lda = lda, sizes.ldb = ldb;
    fqla__matmul(job->plan->context->summary.cpu_level, c, a, b, sizes, keep);
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

static void fqla__transpose(float *to, int32_t ldto, const float *from, int32_t ldfrom, int32_t m, int32_t n) {
    int32_t i, j;
    for (i = 0; i < m; i++)
        for (j = 0; j < n; j++) to[j * ldto + i] = from[i * ldfrom + j];
}

/* Tokens of strip i of a chunk that has len; rows past them are zero everywhere, with alpha 1 and beta 0. */
static int32_t fqla__strip_len(int32_t len, int32_t i) {
    const int32_t left = len - i * FQLA__STRIP;
    return left < 0 ? 0 : left < FQLA__STRIP ? left : FQLA__STRIP;
}

static void fqla__row_load(const fqla_plan_desc *d, float *row, float *norm, const void *tensor, int64_t index) {
    fqla__load_row(row, tensor, index, d->dim_k, d->dtype);
    *norm = 1.0f;
    if (!d->l2norm) return;
    *norm = fqla__l2norm_factor(fqla__dot(row, row, d->dim_k));
    fqla__scale_row(row, *norm, d->dim_k);
}

/* q, k and their products of the chunk of len tokens at `row`. */
static void fqla__chunk_load(const fqla__backward_job *job, const fqla__backward_slot *slot, int32_t h_qk, int64_t row, int32_t len) {
    const fqla_plan_desc *d = &job->plan->desc;
    const fqla_strides *sq = &d->strides.q, *sk = &d->strides.k;
    const int32_t strip = FQLA__STRIP, dim_k = d->dim_k;
    int32_t i, t;
    memset(slot->rows, 0, (size_t)(FQLA__STRIPS * 2 * strip * dim_k) * sizeof *slot->rows);
    for (t = 0; t < len; t++) {
        const int32_t at = t / strip * 2 * strip + t % strip;
        fqla__row_load(d, slot->rows + at * dim_k, slot->norms + at, job->args->q, (row + t) * sq->token + h_qk * sq->head);
        fqla__row_load(d, slot->rows + (at + strip) * dim_k, slot->norms + at + strip, job->args->k,
                       (row + t) * sk->token + h_qk * sk->head);
    }
    for (i = 0; i * strip < len; i++) {
        const float *rows = slot->rows + i * 2 * strip * dim_k;
        float *columns = slot->columns + i * 2 * strip * dim_k;
        fqla__transpose(columns, 2 * strip, rows, dim_k, 2 * strip, dim_k);
        fqla__matmul_of(job, slot->dots + i * 2 * strip * strip, strip, 0.0f, rows, dim_k, columns + strip, 2 * strip, 2 * strip, strip,
                        dim_k);
    }
}

/* The gates of a strip. */
typedef struct fqla__strip {
    float alpha[FQLA__STRIP], beta[FQLA__STRIP];
    float decay[FQLA__STRIP][FQLA__STRIP]; /* L_ij; 0 for j > i */
    float from_start[FQLA__STRIP];         /* c_i */
    const float *to_end;                   /* e_i: the last row of L */
    float whole;                           /* c_last */
} fqla__strip;

static void fqla__strip_load(const fqla__backward_job *job, fqla__strip *strip, int32_t h, int64_t row, int32_t len) {
    const fqla_plan_desc *d = &job->plan->desc;
    const fqla_strides *sg = &d->strides.g, *sb = &d->strides.beta;
    float whole = 1.0f;
    int32_t i, j;
    for (i = 0; i < FQLA__STRIP; i++) {
        strip->alpha[i] = 1.0f;
        strip->beta[i] = 0.0f;
        if (i < len) {
            const float g = fqla__load(job->args->g, (row + i) * sg->token + h * sg->head, fqla__g_dtype(d));
            const float beta = fqla__load(job->args->beta, (row + i) * sb->token + h * sb->head, fqla__beta_dtype(d));
            strip->alpha[i] = fqla__alpha(d, g, job->args->A_log, job->args->dt_bias, h);
            strip->beta[i] = fqla__beta(d, beta);
        }
        whole *= strip->alpha[i];
        strip->from_start[i] = whole;
        for (j = 0; j < FQLA__STRIP; j++) strip->decay[i][j] = j < i ? strip->decay[i - 1][j] * strip->alpha[i] : j == i ? 1.0f : 0.0f;
    }
    strip->to_end = strip->decay[FQLA__STRIP - 1];
    strip->whole = whole;
}

/* x_i -= sum_{j<i} factors_ij x_j for i = 1 .. 15 in turn, on rows of `width`, `stride` apart (negative: last row first). */
static void fqla__substitute(float *x, int32_t stride, int32_t width, float factors[FQLA__STRIP][FQLA__STRIP]) {
    int32_t i, j, y;
    for (i = 1; i < FQLA__STRIP; i++)
        for (j = 0; j < i; j++)
            for (y = 0; y < width; y++) x[i * stride + y] -= factors[i][j] * x[j * stride + y];
}

/* r of the strip whose first row is `row`, from the state before it. */
static void fqla__strip_residuals(const fqla__backward_job *job, const fqla__backward_slot *slot, const fqla__strip *strip, int32_t index,
                                  const float *state, int32_t h, int64_t row, int32_t len) {
    const fqla_plan_desc *d = &job->plan->desc;
    const fqla_strides *sv = &d->strides.v;
    const int32_t dim_k = d->dim_k, width = job->width, size = FQLA__STRIP;
    const float *k = slot->rows + (2 * index + 1) * size * dim_k, *dots = slot->dots + (2 * index + 1) * size * size;
    float *r = slot->values + (3 * index + 2) * size * width;
    float factors[FQLA__STRIP][FQLA__STRIP];
    float v[256];
    int32_t i, j, x;
    fqla__matmul_of(job, r, width, 0.0f, k, dim_k, state, width, size, width, dim_k);
    for (i = 0; i < size; i++) {
        if (i < len) {
            fqla__load_row(v, job->args->v, (row + i) * sv->token + h * sv->head, d->dim_v, d->dtype);
            for (x = 0; x < d->dim_v; x++) r[i * width + x] = v[x] - strip->from_start[i] * r[i * width + x];
        }
        for (j = 0; j < i; j++) factors[i][j] = strip->decay[i][j] * dots[i * size + j] * strip->beta[j];
    }
    fqla__substitute(r, width, width, factors);
}

/* The state after the strip, in place. */
static void fqla__strip_advance(const fqla__backward_job *job, const fqla__backward_slot *slot, const fqla__strip *strip, int32_t index,
                                float *state) {
    const int32_t dim_k = job->plan->desc.dim_k, width = job->width, size = FQLA__STRIP;
    const float *r = slot->values + (3 * index + 2) * size * width;
    int32_t i, x;
    for (i = 0; i < size; i++)
        for (x = 0; x < width; x++) slot->scaled[i * width + x] = strip->to_end[i] * strip->beta[i] * r[i * width + x];
    fqla__matmul_of(job, state, width, strip->whole, slot->columns + index * 2 * size * dim_k + size, 2 * size, slot->scaled, width, dim_k,
                    width, size);
}

/* p of the strip from D, the gradient of the state after it. */
static void fqla__strip_adjoints(const fqla__backward_job *job, const fqla__backward_slot *slot, const fqla__strip *strip, int32_t index,
                                 const float *dstate, int32_t h, int64_t row, int32_t len) {
    const fqla_plan_desc *d = &job->plan->desc;
    const fqla_strides *so = &d->strides.o;
    const int32_t dim_k = d->dim_k, width = job->width, size = FQLA__STRIP, last = FQLA__STRIP - 1;
    const float *k = slot->rows + (2 * index + 1) * size * dim_k;
    const float *qk = slot->dots + 2 * index * size * size, *kk = qk + size * size;
    float *dout = slot->values + 3 * index * size * width, *p = dout + size * width;
    float factors[FQLA__STRIP][FQLA__STRIP];
    int32_t i, t, x;
    memset(dout, 0, (size_t)(size * width) * sizeof *dout);
    for (i = 0; i < len; i++)
        fqla__load_row(dout + i * width, job->args->do_, (row + i) * so->token + h * so->head, d->dim_v, d->dtype);
    fqla__matmul_of(job, p, width, 0.0f, k, dim_k, dstate, width, size, width, dim_k);
    for (i = 0; i < size; i++) {
        for (x = 0; x < width; x++) p[i * width + x] *= strip->to_end[i];
        for (t = 0; t < size; t++) factors[i][t] = d->scale * strip->decay[t][i] * qk[t * size + i];
    }
    fqla__matmul_of(job, p, width, 1.0f, factors[0], size, dout, width, size, width, size);
    for (i = 0; i < size; i++)
        for (t = i + 1; t < size; t++) factors[last - i][last - t] = strip->decay[t][i] * kk[t * size + i] * strip->beta[t];
    fqla__substitute(p + last * width, -width, width, factors);
}

/* Everything that the strip adds to the gradients, given S before it and D behind it; D becomes that before it.
   dg, dbeta [16]: of the token's log alpha and beta. */
static void fqla__strip_gradients(const fqla__backward_job *job, const fqla__backward_slot *slot, const fqla__strip *strip, int32_t index,
                                  const float *state, float *dstate, float *dg, float *dbeta) {
    const int32_t dim_k = job->plan->desc.dim_k, width = job->width, size = FQLA__STRIP;
    const float scale = job->plan->desc.scale;
    const float *columns = slot->columns + index * 2 * size * dim_k;
    const float *qk = slot->dots + 2 * index * size * size, *kk = qk + size * size;
    const float *values = slot->values + 3 * index * size * width;
    float *dcolumns = slot->dcolumns + index * 2 * size * dim_k, *mix = slot->mix + index * 4 * size * size;
    float factors[3 * FQLA__STRIP];                   /* of do, p, r as they enter D', D' and S' */
    float flows[3 * FQLA__STRIP];                     /* from S to t by q, from S to t by k, from s to D */
    float between[FQLA__STRIP][FQLA__STRIP];          /* from s to t */
    float products[2 * FQLA__STRIP * FQLA__STRIP];    /* do_t . r_s, p_t . r_s */
    float through = 0.0f;                             /* from S to D */
    int32_t i, x, s, t;
    for (t = 0; t < size; t++) {
        factors[t] = scale * strip->from_start[t];
        factors[size + t] = -strip->from_start[t] * strip->beta[t];
        factors[2 * size + t] = strip->to_end[t] * strip->beta[t];
    }
    fqla__transpose(slot->turned, 3 * size, values, width, 3 * size, width);
    fqla__matmul_of(job, products, size, 0.0f, values, width, slot->turned + 2 * size, 3 * size, 2 * size, size, width);
    fqla__matmul_of(job, slot->products, 3 * size, 0.0f, state, width, slot->turned, 3 * size, dim_k, 2 * size, width);
    fqla__matmul_of(job, slot->products + 2 * size, 3 * size, 0.0f, dstate, width, slot->turned + 2 * size, 3 * size, dim_k, size, width);

    /* across the strip's borders */
    for (i = 0; i < dim_k * width; i++) through += dstate[i] * state[i];
    through *= strip->whole;
    for (x = 0; x < 3 * size; x++) flows[x] = 0.0f;
    for (i = 0; i < dim_k; i++) {
        const float *from = slot->products + i * 3 * size, *column = columns + i * 2 * size;
        float *to = dcolumns + i * 2 * size;
        for (x = 0; x < size; x++) {
            const float dq = factors[x] * from[x], dk = factors[size + x] * from[size + x], dr = factors[2 * size + x] * from[2 * size + x];
            to[x] += dq;
            to[size + x] += dk + dr;
            flows[x] += column[x] * dq;
            flows[size + x] += column[size + x] * dk;
            flows[2 * size + x] += column[size + x] * dr;
        }
    }

    /* inside it */
    for (t = 0; t < size; t++) {
        dbeta[t] = products[(size + t) * size + t];
        for (s = 0; s <= t; s++) {
            const float decay = strip->decay[t][s] * strip->beta[s];
            const float w = scale * decay * products[t * size + s];
            const float z = s < t ? decay * strip->beta[t] * products[(size + t) * size + s] : 0.0f;
            between[t][s] = w * qk[t * size + s] - z * kk[t * size + s];
            mix[(size + s) * 2 * size + t] += w;        /* k_s in dq_t */
            mix[t * 2 * size + size + s] += w;          /* q_t in dk_s */
            mix[(size + s) * 2 * size + size + t] -= z; /* k_s in dk_t */
            mix[(size + t) * 2 * size + size + s] -= z; /* k_t in dk_s */
        }
    }
    for (i = 0; i < size; i++) {
        float sum = through;
        for (s = 0; s < i; s++) sum += flows[2 * size + s];
        for (t = i; t < size; t++) {
            sum += flows[t] + flows[size + t];
            for (s = 0; s < i; s++) sum += between[t][s];
        }
        dg[i] = sum;
    }

    for (i = 0; i < 2 * size; i++)
        for (x = 0; x < width; x++) slot->scaled[i * width + x] = factors[i] * values[i * width + x];
    fqla__matmul_of(job, dstate, width, strip->whole, columns, 2 * size, slot->scaled, width, dim_k, width, 2 * size);
}

/* dv, dg and dbeta of a strip's tokens to their tensors; through the raw forms where the plan has them. */
static void fqla__strip_store(const fqla__backward_job *job, const fqla__backward_slot *slot, const fqla__strip *strip, int32_t index,
                              int32_t h, int64_t row, int32_t len, const float *dg, const float *dbeta, double *gate_sums) {
    const fqla_plan_desc *d = &job->plan->desc;
    const fqla_backward_args *args = job->args;
    const fqla_tensor_strides *s = &d->strides;
    const float *p = slot->values + (3 * index + 1) * FQLA__STRIP * job->width;
    float dv[256];
    int32_t i, x;
    for (i = len - 1; i >= 0; i--) {
        const int64_t g_at = (row + i) * s->g.token + h * s->g.head, beta_at = (row + i) * s->beta.token + h * s->beta.head;
        float to_g = strip->alpha[i] == 0.0f ? 0.0f : dg[i], to_beta = dbeta[i];
        for (x = 0; x < d->dim_v; x++) dv[x] = strip->beta[i] * p[i * job->width + x];
        fqla__store_row(args->dv, (row + i) * s->v.token + h * s->v.head, d->dim_v, d->dtype, dv);
        if (d->gate == FQLA_GATE_RAW && strip->alpha[i] != 0.0f) {
            const float raw = fqla__load(args->g, g_at, d->dtype) + args->dt_bias[h], rate = -expf(args->A_log[h]);
            gate_sums[0] += (double)to_g * (double)(rate * fqla__softplus(raw));
            to_g *= rate * (raw > 20.0f ? 1.0f : fqla__sigmoid(raw));
            gate_sums[1] += (double)to_g;
        }
        if (d->beta == FQLA_BETA_SIGMOID) /* beta (1 - sigmoid b) */
            to_beta *= strip->beta[i] * fqla__sigmoid(-fqla__load(args->beta, beta_at, d->dtype));
        fqla__store(args->dg, g_at, fqla__g_dtype(d), to_g);
        fqla__store(args->dbeta, beta_at, fqla__beta_dtype(d), to_beta);
    }
}

/* One v-head's reverse through the chunk of len tokens at `row`, from the state before it; dstate as in fqla__strip_gradients. */
static void fqla__chunk_reverse(const fqla__backward_job *job, const fqla__backward_slot *slot, int32_t h, int64_t row, int32_t len,
                                const float *state, float *dstate, double *gate_sums) {
    const int64_t state_size = (int64_t)job->plan->desc.dim_k * job->width;
    fqla__strip strips[FQLA__STRIPS];
    float dg[FQLA__STRIP], dbeta[FQLA__STRIP];
    int32_t i;
    memcpy(slot->starts, state, (size_t)state_size * sizeof *state);
    for (i = 0; i * FQLA__STRIP < len; i++) {
        float *start = slot->starts + i * state_size;
        fqla__strip_load(job, &strips[i], h, row + i * FQLA__STRIP, fqla__strip_len(len, i));
        fqla__strip_residuals(job, slot, &strips[i], i, start, h, row + i * FQLA__STRIP, fqla__strip_len(len, i));
        if ((i + 1) * FQLA__STRIP >= len) break;
        memcpy(start + state_size, start, (size_t)state_size * sizeof *start);
        fqla__strip_advance(job, slot, &strips[i], i, start + state_size);
    }
    for (; i >= 0; i--) {
        const int64_t strip_row = row + i * FQLA__STRIP;
        const int32_t strip_len = fqla__strip_len(len, i);
        fqla__strip_adjoints(job, slot, &strips[i], i, dstate, h, strip_row, strip_len);
        fqla__strip_gradients(job, slot, &strips[i], i, slot->starts + i * state_size, dstate, dg, dbeta);
        fqla__strip_store(job, slot, &strips[i], i, h, strip_row, strip_len, dg, dbeta, gate_sums);
    }
}

/* A row of dq or dk from its column; through the norm y = x norm: dx = norm (dy - y (y . dy)). */
static void fqla__row_store(const fqla_plan_desc *d, void *tensor, int64_t index, const float *dcolumn, const float *row, float norm) {
    float gradient[256];
    int32_t i;
    for (i = 0; i < d->dim_k; i++) gradient[i] = dcolumn[i * 2 * FQLA__STRIP];
    if (d->l2norm) {
        const float along = fqla__dot(row, gradient, d->dim_k);
        for (i = 0; i < d->dim_k; i++) gradient[i] = norm * (gradient[i] - along * row[i]);
    }
    fqla__store_row(tensor, index, d->dim_k, d->dtype, gradient);
}

/* dq and dk of a chunk, once all heads of the group have added to them. */
static void fqla__chunk_store(const fqla__backward_job *job, const fqla__backward_slot *slot, int32_t h_qk, int64_t row, int32_t len) {
    const fqla_plan_desc *d = &job->plan->desc;
    const fqla_strides *sq = &d->strides.q, *sk = &d->strides.k;
    const int32_t size = FQLA__STRIP, dim_k = d->dim_k;
    int32_t i, t;
    for (i = 0; i * size < len; i++) {
        const int32_t first = i * 2 * size; /* of the strip's 32 rows */
        fqla__matmul_of(job, slot->dcolumns + first * dim_k, 2 * size, 1.0f, slot->columns + first * dim_k, 2 * size,
                        slot->mix + first * 2 * size, 2 * size, dim_k, 2 * size, 2 * size);
        for (t = 0; t < fqla__strip_len(len, i); t++) {
            const int64_t token = row + i * size + t;
            const int32_t q = first + t, k = first + size + t;
            fqla__row_store(d, job->args->dq, token * sq->token + h_qk * sq->head, slot->dcolumns + first * dim_k + t,
                            slot->rows + q * dim_k, slot->norms[q]);
            fqla__row_store(d, job->args->dk, token * sk->token + h_qk * sk->head, slot->dcolumns + first * dim_k + size + t,
                            slot->rows + k * dim_k, slot->norms[k]);
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
    int32_t c, i, j;
    fqla__backward_slot_layout(job, job->workspace + piece * fqla__backward_slot_layout(job, NULL, NULL), &slot);

    for (j = 0; j < job->group; j++) {
        const int64_t head = (int64_t)n * d->heads_v + fqla__group_head(d, h_qk, j);
        if (chunks > 0) fqla__state_load(job, slot.states + j * state_size, job->args->h0, head * fqla__state_elements(d));
        fqla__state_load(job, slot.dstates + j * state_size, job->args->dht, head * fqla__state_elements(d));
        if (d->gate == FQLA_GATE_RAW) job->gate_sums[head * 2] = job->gate_sums[head * 2 + 1] = 0.0;
    }
    for (c = 0; c + 1 < chunks; c++) {
        const int64_t row = first + (int64_t)c * FLASHQLA_CHUNK;
        float *states = slot.states + c * job->group * state_size, *next = states + job->group * state_size;
        fqla__chunk_load(job, &slot, h_qk, row, FLASHQLA_CHUNK);
        memcpy(next, states, (size_t)(job->group * state_size) * sizeof *next);
        for (j = 0; j < job->group; j++)
            for (i = 0; i < FQLA__STRIPS; i++) {
                const int32_t h = fqla__group_head(d, h_qk, j);
                float *state = next + j * state_size;
                fqla__strip strip;
                fqla__strip_load(job, &strip, h, row + i * FQLA__STRIP, FQLA__STRIP);
                fqla__strip_residuals(job, &slot, &strip, i, state, h, row + i * FQLA__STRIP, FQLA__STRIP);
                fqla__strip_advance(job, &slot, &strip, i, state);
            }
    }
    for (c = chunks - 1; c >= 0; c--) {
        const int32_t left = len - c * FLASHQLA_CHUNK, chunk_len = left < FLASHQLA_CHUNK ? left : FLASHQLA_CHUNK;
        const int64_t row = first + (int64_t)c * FLASHQLA_CHUNK;
        fqla__chunk_load(job, &slot, h_qk, row, chunk_len);
        memset(slot.dcolumns, 0, (size_t)(FLASHQLA_CHUNK * 2 * d->dim_k) * sizeof *slot.dcolumns);
        memset(slot.mix, 0, (size_t)(FLASHQLA_CHUNK * 4 * FQLA__STRIP) * sizeof *slot.mix);
        for (j = 0; j < job->group; j++) {
            const int32_t h = fqla__group_head(d, h_qk, j);
            double *gate_sums = d->gate == FQLA_GATE_RAW ? job->gate_sums + ((int64_t)n * d->heads_v + h) * 2 : NULL;
            fqla__chunk_reverse(job, &slot, h, row, chunk_len, slot.states + (c * job->group + j) * state_size,
                                slot.dstates + j * state_size, gate_sums);
        }
        fqla__chunk_store(job, &slot, h_qk, row, chunk_len);
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
