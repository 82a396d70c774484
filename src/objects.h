// >>objects: what a context, a plan and a run hold

#ifdef FLASHQLA_NO_CUDA
typedef struct fqla__cuda_device { char unused; } fqla__cuda_device;
typedef struct fqla__cuda_plan { char unused; } fqla__cuda_plan;
#endif

struct fqla_context {
    fqla_context_desc desc;       /* as given; desc.backend is resolved: CPU or CUDA */
    fqla_context_summary summary; /* what fqla_context_info says */
    fqla__mutex mutex;            /* guards the counter below */
    int64_t users;                /* plans and buffers that live: a context with users is not destroyed */
    fqla__pool pool;              /* the CPU backend's helper threads; none on CUDA */
    fqla__cuda_device cuda;       /* the CUDA backend's driver, context and kernels; unused on the CPU */
};

struct fqla_plan {
    fqla_context *context;
    fqla_plan_desc desc;      /* every default resolved: dims, dtypes, scale, strides, maxima. cu_seqlens is NULL here */
    int32_t num_seqs;         /* sequences as of the last update */
    int32_t *cu_seqlens;      /* [max_seqs + 1], packed or not: sequence n has cu_seqlens[n + 1] - cu_seqlens[n] tokens */
    int64_t *cu_checkpoints;  /* [max_seqs + 1]: sequence n's first entry in checkpoints */
    int64_t chunks;           /* of all sequences as of the last update, each rounded up */
    size_t workspace_size;    /* bytes of a run, constant over updates */
    void *workspace;          /* the plan's own, NULL where it needs none or is external */
    fqla__cuda_plan cuda;     /* device tables; unused on the CPU */
};

/* One forward or one decode, as both backends take it: a decode is a forward of short sequences that keeps every state. */
typedef struct fqla__run {
    const fqla_plan *plan;
    const void *q, *k, *v, *g, *beta;
    const float *A_log, *dt_bias;
    const void *h0;
    void *o, *ht;
    const int32_t *state_in, *state_out;
    void *snapshots;          /* checkpoints or decode's states; NULL: none */
    int32_t snapshot_every;   /* tokens between snapshots: 64 * checkpoint_every, or 1 */
    int32_t decode_tokens;    /* 0: the plan's sequences; else every sequence has this many tokens, rows n * decode_tokens and on */
    uint32_t *bad_index_count;
    void *residuals;          /* CUDA: what a backward takes over; NULL: none */
    void *workspace;          /* plan->workspace_size bytes */
} fqla__run;

/* Where sequence n of a run lies. */
typedef struct fqla__sequence {
    int64_t row;      /* its first row in q, k, v, o, g, beta */
    int32_t len;      /* its tokens */
    int64_t snapshot; /* its first entry in snapshots */
} fqla__sequence;

static fqla__sequence fqla__run_sequence(const fqla__run *run, int32_t n) {
    const fqla_plan *plan = run->plan;
    fqla__sequence sequence;
    if (run->decode_tokens > 0) {
        sequence.row = sequence.snapshot = (int64_t)n * run->decode_tokens;
        sequence.len = run->decode_tokens;
    } else {
        sequence.row = plan->desc.padded_len > 0 ? (int64_t)n * plan->desc.padded_len : plan->cu_seqlens[n];
        sequence.len = plan->cu_seqlens[n + 1] - plan->cu_seqlens[n];
        sequence.snapshot = plan->cu_checkpoints[n];
    }
    return sequence;
}

/* The q/k head that v-head h reads. */
static int32_t fqla__head_qk(const fqla_plan_desc *desc, int32_t h) {
    return desc->head_map == FQLA_HEAD_MAP_DIV ? h / (desc->heads_v / desc->heads_qk) : h % desc->heads_qk;
}

static int64_t fqla__dtype_size(fqla_dtype dtype) { return dtype == FQLA_DTYPE_FP32 ? 4 : 2; }

/* The dtypes that g and beta have by the plan's forms. */
static fqla_dtype fqla__g_dtype(const fqla_plan_desc *desc) { return desc->gate == FQLA_GATE_RAW ? desc->dtype : FQLA_DTYPE_FP32; }
static fqla_dtype fqla__beta_dtype(const fqla_plan_desc *desc) {
    return desc->beta == FQLA_BETA_SIGMOID ? desc->dtype : FQLA_DTYPE_FP32;
}

/* Elements of one state of one head. */
static int64_t fqla__state_elements(const fqla_plan_desc *desc) { return (int64_t)desc->dim_k * desc->dim_v; }
