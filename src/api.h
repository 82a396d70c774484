/*
    flashqla.h -- the gated delta rule (Gated DeltaNet linear attention) in one C header

    Do this:
        #define FLASHQLA_IMPLEMENTATION
    in exactly one C or C++ file before you include this file. All other files include it plain.

        cc -O2 program.c -ldl -lpthread -lm          (Linux; on Windows no libraries are named)

    That is the whole build: no CUDA toolkit, no nvcc, no Python. On a machine with a Hopper GPU (compute
    capability 9.0) the driver's library is opened at run time and the kernels inside this header are used;
    everywhere else the same program runs on the CPU.

    Options, to be defined beside FLASHQLA_IMPLEMENTATION:
        FLASHQLA_NO_CUDA     leave the GPU kernels and the CUDA backend out (the CPU backend alone remains)
        FLASHQLA_STATIC      every function static: a private copy for one file
        FLASHQLA_MALLOC(n)   with FLASHQLA_FREE(p): what is called where the context's desc brings no allocator
                             (default: malloc and free of <stdlib.h>)

    WHAT IT DOES
    ============
    For every sequence and every v-head, with a state S of D_k x D_v float32 numbers (S_0 = h0, or zero):

        S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T          alpha_t = exp(g_t)
        o_t = scale * S_t^T q_t                                                  ht = S after the last token

    This is the operator of Gated DeltaNet (Yang, Kautz, Hatamizadeh 2024, equation 10) as the linear-attention
    layers of Qwen3-Next, Qwen3.5, Kimi Linear's and OLMo's hybrids use it. There are three ways to run it:

        fqla_forward    prompts: any number of packed or padded sequences of any length (also zero)
        fqla_backward   all gradients of fqla_forward
        fqla_decode     1 to 8 further tokens of every sequence, and if you like the state after each

    WHAT IT DOES NOT DO
    ===================
    - It has no convolution, gating of the output, norm or projection of the layer around the operator
      (softplus and sigmoid of raw gates and the l2norm of q and k are inside, see GATES below).
    - It does not run on GPUs other than compute capability 9.0, nor with head dimensions other than 128 there;
      such a request is refused by name, never done slowly in silence. Decodes of more than one token run on the CPU
      backend alone so far; fqla_plan_info says what a plan will run.
    - It moves no data between CPU and GPU behind your back: on the CUDA backend all tensors are device memory.

    STEP BY STEP
    ============
    1. a context: a device (or the CPU with its threads). One for a program is the usual number.

            fqla_context *ctx;
            fqla_context_create(&(fqla_context_desc){0}, &ctx);       // a GPU that can run it, else the CPU

    2. a plan: a batch layout and what its inputs look like. Made once, used by every layer of a model.

            int32_t cu_seqlens[3] = { 0, 100, 164 };                  // two sequences, of 100 and of 64 tokens
            fqla_plan *plan;
            fqla_plan_create(ctx, &(fqla_plan_desc){ .heads_qk = 16, .heads_v = 32,
                                                     .num_seqs = 2, .cu_seqlens = cu_seqlens }, &plan);

    3. run it, as often as you like, with any buffers:

            fqla_forward(plan, &(fqla_forward_args){ .q = q, .k = k, .v = v, .g = g, .beta = beta,
                                                     .o = o, .ht = ht }, stream);

    4. next batch, other lengths: fqla_plan_update(plan, num_seqs, cu_seqlens, stream).
    5. fqla_plan_destroy(plan); fqla_context_destroy(ctx);

    Every desc and args struct is to be zeroed first (a designated initialiser does it): zero means the default.
    In C++11, without designated initialisers, write fqla_plan_desc d = {}; d.heads_qk = 16; ...

    TENSORS
    =======
    T is the number of rows: all tokens of all sequences, one after the other (packed; cu_seqlens marks the borders),
    or num_seqs * padded_len where plan_desc.padded_len is set (padded: sequence n owns rows n*padded_len and on; rows
    past its length are neither read nor written). N is num_seqs, HK heads_qk, HV heads_v, Dk dim_k, Dv dim_v.

        q, k, dq, dk      [T, HK, Dk]     plan_desc.dtype
        v, o, do, dv      [T, HV, Dv]     plan_desc.dtype
        g, beta, dg, dbeta [T, HV]        float32; where a raw form is chosen (see GATES), plan_desc.dtype
        A_log, dt_bias    [HV]            float32
        h0, ht, dh0, dht  [N, HV, Dk, Dv] plan_desc.state_dtype; [N, HV, Dv, Dk] with FQLA_STATE_VK
        checkpoints       [C, HV, ...]    as ht; C = sum over sequences of floor(len / (64 * checkpoint_every))
        states (decode)   [N, T', HV, ...] as ht; entry t is the state after token t
        state_in, state_out [N]           int32; host memory on the CPU, device memory on the GPU

    The last dimension is contiguous. The strides of tokens and heads are plan_desc.strides, counted in elements of the
    tensor; 0 means dense, [T, H, D]. A gradient has the strides of its tensor: dq those of q, do and o share theirs.
    A v-head h reads the q/k head h / (HV/HK) (FQLA_HEAD_MAP_DIV: PyTorch models) or h mod HK (FQLA_HEAD_MAP_MOD: ggml).

    Requirements on values: g_t <= 0 (log), 0 <= alpha_t <= 1 (linear), 0 <= beta_t <= 2 and beta_t |k_t|^2 <= 2, which
    l2-normalised keys and beta <= 1 give you. Larger beta |k|^2 is the unstable regime of the recurrence: allowed on the
    CPU, undefined (never unsafe) on the GPU. g is clamped at -104, where exp is 0 in float32; alpha = 0 means the same.
    A NaN or an infinity in one sequence never changes a bit of another sequence.

    GATES
    =====
        gate FQLA_GATE_LOG      g is log alpha                                                          (default)
             FQLA_GATE_LINEAR   g is alpha itself (forward and decode only)
             FQLA_GATE_RAW      g is a, and log alpha = -exp(A_log[h]) * softplus(a + dt_bias[h]); softplus x = x above 20
        beta FQLA_BETA_PLAIN    beta is beta                                                            (default)
             FQLA_BETA_SIGMOID  beta is b, and beta = sigmoid(b); with negative_eigenvalues 2 sigmoid(b)
        l2norm 1                q and k are divided by sqrt(sum x^2 + 1e-6) inside

    Gradients are those with respect to what was given: dg of a raw gate is da, with dA_log and ddt_bias beside it; dbeta of a
    sigmoid is db; dq and dk with l2norm go through the norm.

    STATES
    ======
    ht may be h0 (in place). With plan_desc.pool_size > 0, h0 and ht are pools [pool_size, HV, ...] (the same one or two), and
    state_in[n], state_out[n] pick sequence n's slots:
        in >= 0, out >= 0   read one, write the other (in = out: in place, the serving case)
        in = -1             starts from zero
        out = -1            the final state is not stored
        both -1             a padding row: its o is zero
    An out slot may appear once a call, and no other sequence may read it in that call. On the CPU a slot outside the pool is
    FQLA_ERROR_INVALID_INDEX and nothing is written; on the GPU it acts as -1 and adds one to *bad_index_count.

    MEMORY
    ======
    A plan may allocate; a run never allocates, never synchronises, never loads a module and never reads device memory back,
    so that it can be captured in a CUDA graph. A plan owns a workspace that serves one run at a time. For concurrent runs of one plan
    pass workspace and workspace_size in the args (fqla_workspace_size says how many bytes, 256-byte aligned); a plan with
    external_workspace = 1 owns none. plan_desc.backward = 1 makes room for the backward.
    How much that is: on the CPU about 1.5 MB a thread, and with backward a state a chunk of the longest sequence; on a GPU 6.5 KB a
    chunk of 64 tokens and v-head (220 MB at 32768 tokens and 64 v-heads), and up to 100 MB where sequences may be cut; with backward 80 KB more
    a chunk and v-head, and 160 KB a segment and v-head where its sequences may be cut. A plan with low_memory goes through the tokens
    in windows: 16/32 heads and a sequence of 131072 tokens take 223 MB for 6 GB, and half as long again. With needs_residuals the backward's
    workspace is without the 6.5 KB, which the residuals hold.

    SCHEDULE
    ========
    On a GPU a state lives on one multiprocessor, and tokens come one after the other. Where that would leave multiprocessors idle a
    forward spreads the columns of a state over two blocks (v_split) and cuts sequences into segments that run at once
    (segment_chunks). A segment whose gates have forgotten what was before it (warm_up_tolerance) starts from zero some chunks
    early; for the others the segments before it are first reduced to their transitions, which costs more and loses nothing. Which
    way a segment goes is decided on the GPU, for every head, from the gates of that head alone. The plan chooses by a
    model of the time: v_split from the maxima, segment_chunks also from the lengths of the moment, so that an update chooses anew.
    fqla_plan_info tells the choice. The two fields force one, for measurements.

    THREADS
    =======
    A context may be used from many threads at once. A plan may be run from many threads at once where each run brings its own
    workspace (or the query says 0 bytes); creating, updating and destroying a plan needs it alone. The CPU backend keeps
    num_threads - 1 helper threads in the context; the calling thread works too. Two callers at once share no helpers:
    the second works alone.

    ERRORS
    ======
    Every function that can fail returns an fqla_status; FQLA_OK is 0. fqla_status_string gives its sentence; context_desc.log gets
    the details: which field, which value, which driver call. On any error nothing is written and nothing launched.
    Pointers are checked for NULL, alignment and overlap, not for being readable. Outputs must not overlap inputs or each
    other, except ht = h0 exactly.
    Buffers hold max_tokens rows, whatever the lengths of the moment; a decode's num_seqs * num_tokens.
    On the CPU pointers are aligned to their element. On the GPU q, k, v, o and all states are aligned to 16 bytes and so are
    their strides; the other tensors are aligned to their element.
    The caller's CUDA context and stream are borrowed: the context stack is as before after every call, also after an error.

    DETERMINISM
    ===========
    Same plan, same inputs, same bits: on the CPU for any number of threads (at one cpu_level), on the GPU for any run. There
    are no float atomics, and nothing depends on timing. After fqla_plan_update the bits are those of a fresh plan with the
    same maxima.

    LICENCE
    =======
    MIT, see the end of the file.
*/
#ifndef FLASHQLA_H
#define FLASHQLA_H

#define FLASHQLA_VERSION_MAJOR 0
#define FLASHQLA_VERSION_MINOR 1
#define FLASHQLA_VERSION_PATCH 0

#include <stddef.h>
#include <stdint.h>

#if defined(FLASHQLA_STATIC) && defined(__GNUC__)
#define FLASHQLA_API static __attribute__((unused))
#elif defined(FLASHQLA_STATIC)
#define FLASHQLA_API static
#else
#define FLASHQLA_API extern
#endif

/* Most tokens of a sequence that one fqla_decode takes. */
#define FLASHQLA_MAX_DECODE_TOKENS 8
/* Tokens in a chunk: checkpoints are counted in these. */
#define FLASHQLA_CHUNK 64

#ifdef __cplusplus
extern "C" {
#endif

/* CUDA's handles, forward-declared: a CUstream and a cudaStream_t both pass as fqla_stream, a CUcontext as
   fqla_cuda_context. NULL is the default stream. The CPU backend ignores streams and returns when the work is done. */
typedef struct CUstream_st *fqla_stream;
typedef struct CUctx_st *fqla_cuda_context;

typedef struct fqla_context fqla_context;
typedef struct fqla_plan fqla_plan;

// >>status
/* X(name, sentence) for every status. */
#define FLASHQLA_STATUSES(X)                                                                                      \
    X(FQLA_OK, "success")                                                                                         \
    X(FQLA_ERROR_NULL_POINTER, "a required pointer is NULL")                                                      \
    X(FQLA_ERROR_INVALID_SIZE, "a size (heads, dimension, count, length) is out of its range")                    \
    X(FQLA_ERROR_INVALID_ENUM, "a field holds a value that its enum does not have")                               \
    X(FQLA_ERROR_INVALID_VALUE, "a number is out of its range")                                                   \
    X(FQLA_ERROR_INVALID_SEQLENS, "cu_seqlens must start at 0, never decrease and end within max_tokens")         \
    X(FQLA_ERROR_INVALID_STRIDE, "a stride is negative, or makes rows or heads overlap")                          \
    X(FQLA_ERROR_INVALID_INDEX, "a state index lies outside the pool, or an output slot is used twice")           \
    X(FQLA_ERROR_MISALIGNED, "a pointer or stride is not aligned as the backend needs it")                        \
    X(FQLA_ERROR_OVERLAP, "an output overlaps another tensor of the call")                                        \
    X(FQLA_ERROR_WORKSPACE_TOO_SMALL, "the workspace or residuals buffer is smaller than the plan's query says")  \
    X(FQLA_ERROR_TOO_LARGE, "a size overflows what can be addressed")                                             \
    X(FQLA_ERROR_UNSUPPORTED, "the chosen backend does not do this")                                              \
    X(FQLA_ERROR_WRONG_CONTEXT, "the stream belongs to another CUDA context than the plan")                       \
    X(FQLA_ERROR_IN_USE, "the object is still in use")                                                            \
    X(FQLA_ERROR_CAPTURING, "this cannot be done while the stream is being captured")                             \
    X(FQLA_ERROR_OUT_OF_MEMORY, "out of memory")                                                                  \
    X(FQLA_ERROR_THREAD, "a thread could not be started")                                                         \
    X(FQLA_ERROR_NO_CUDA, "no CUDA device that can run the kernels")                                              \
    X(FQLA_ERROR_DRIVER, "a CUDA driver call failed")

typedef enum fqla_status {
#define FLASHQLA_X(name, sentence) name,
    FLASHQLA_STATUSES(FLASHQLA_X)
#undef FLASHQLA_X
    FQLA_STATUS_COUNT
} fqla_status;

/* "FQLA_OK" and "success" for FQLA_OK; a name and a sentence for unknown values too. Never NULL. Any thread. */
FLASHQLA_API const char *fqla_status_name(fqla_status status);
FLASHQLA_API const char *fqla_status_string(fqla_status status);

// >>enums
typedef enum fqla_backend {
    FQLA_BACKEND_AUTO, /* CUDA where a device can run the kernels, else the CPU */
    FQLA_BACKEND_CPU,
    FQLA_BACKEND_CUDA,
    FQLA_BACKEND_COUNT
} fqla_backend;

typedef enum fqla_dtype {
    FQLA_DTYPE_DEFAULT, /* bfloat16 for tensors, float32 for states */
    FQLA_DTYPE_BF16,
    FQLA_DTYPE_FP16,
    FQLA_DTYPE_FP32, /* tensors: on the CPU alone */
    FQLA_DTYPE_COUNT
} fqla_dtype;

typedef enum fqla_gate {
    FQLA_GATE_LOG,    /* g = log alpha, float32 */
    FQLA_GATE_LINEAR, /* g = alpha, float32 */
    FQLA_GATE_RAW,    /* g = a, plan_desc.dtype; with A_log and dt_bias */
    FQLA_GATE_COUNT
} fqla_gate;

typedef enum fqla_beta {
    FQLA_BETA_PLAIN,   /* beta, float32 */
    FQLA_BETA_SIGMOID, /* beta = b, plan_desc.dtype; the sigmoid is inside */
    FQLA_BETA_COUNT
} fqla_beta;

typedef enum fqla_head_map {
    FQLA_HEAD_MAP_DIV, /* q/k head = h / (heads_v / heads_qk) */
    FQLA_HEAD_MAP_MOD, /* q/k head = h % heads_qk */
    FQLA_HEAD_MAP_COUNT
} fqla_head_map;

typedef enum fqla_state_layout {
    FQLA_STATE_KV, /* [.., Dk, Dv] */
    FQLA_STATE_VK, /* [.., Dv, Dk] */
    FQLA_STATE_LAYOUT_COUNT
} fqla_state_layout;

/* What the CPU backend may use. Results of two levels differ in the last bits; ask for one by name to get the same bits on
   machines of both kinds. */
typedef enum fqla_cpu_level {
    FQLA_CPU_AUTO,  /* the best this machine has */
    FQLA_CPU_PLAIN, /* plain C */
    FQLA_CPU_AVX2,  /* AVX2 and FMA */
    FQLA_CPU_AVX512,
    FQLA_CPU_LEVEL_COUNT
} fqla_cpu_level;

typedef enum fqla_log_level {
    FQLA_LOG_ERROR, /* a function is about to return a status other than FQLA_OK */
    FQLA_LOG_INFO,  /* worth knowing: why AUTO chose the CPU, say */
    FQLA_LOG_LEVEL_COUNT
} fqla_log_level;

// >>context
typedef struct fqla_context_desc {
    fqla_backend backend;           /* default AUTO */
    int32_t device;                 /* CUDA device ordinal, default 0; ignored where cuda_context is given */
    fqla_cuda_context cuda_context; /* borrowed CUcontext, outlives the fqla_context; NULL: the device's primary context,
                                       retained until fqla_context_destroy */
    int32_t num_threads;            /* CPU threads, the caller's included; 0: one a core; negative: refused; over 1024: refused */
    fqla_cpu_level cpu_level;       /* default AUTO; a level the machine lacks: FQLA_ERROR_UNSUPPORTED */
    void *(*alloc)(size_t bytes, void *user);   /* host memory, aligned as malloc's; with free or not at all */
    void (*free)(void *pointer, void *user);
    void *alloc_user;
    void (*log)(fqla_log_level level, const char *message, void *user); /* NULL: silent. May be called from any thread that
                                                                           calls the library; never from helper threads */
    void *log_user;
} fqla_context_desc;

typedef struct fqla_context_summary {
    fqla_backend backend;      /* what runs: CPU or CUDA */
    int32_t num_threads;       /* of the CPU backend; 1 on CUDA */
    fqla_cpu_level cpu_level;  /* in use on the CPU backend, and what the machine has otherwise; never AUTO */
    char cuda_status[256];     /* "ready", or in words why CUDA is not used */
    char device_name[128];     /* CUDA's name of the device; "" without one */
    int32_t compute_capability;/* 90 for 9.0; 0 without a device */
    int32_t sm_count;          /* multiprocessors; 0 without a device */
    int32_t driver_version;    /* 13000 for CUDA 13.0; 0 without a driver */
    char kernel_form[16];      /* "cubin", or "ptx" where the driver refused the cubin; "" without CUDA */
} fqla_context_summary;

/* Make a context. desc: not NULL. *context: set on success alone. On the CUDA backend this opens the driver, retains the primary
   context (unless one is borrowed) and loads the kernels. Any thread.
   Errors: NULL_POINTER, INVALID_ENUM, INVALID_VALUE (num_threads, device, alloc without free), UNSUPPORTED (cpu_level),
   NO_CUDA (backend CUDA alone), DRIVER, OUT_OF_MEMORY, THREAD. */
FLASHQLA_API fqla_status fqla_context_create(const fqla_context_desc *desc, fqla_context **context);
/* Destroy it. NULL is fine. While plans or buffers of it live: IN_USE, and nothing is destroyed. */
FLASHQLA_API fqla_status fqla_context_destroy(fqla_context *context);
/* What runs here, and why CUDA does not. Any thread. */
FLASHQLA_API fqla_status fqla_context_info(const fqla_context *context, fqla_context_summary *summary);

// >>memory helpers: the same program on both backends
/* Memory of the context's device (host memory on the CPU), 256-byte aligned, uninitialised. bytes 0: refused. Any thread.
   Errors: NULL_POINTER, INVALID_SIZE, OUT_OF_MEMORY, DRIVER. */
FLASHQLA_API fqla_status fqla_alloc(fqla_context *context, size_t bytes, void **pointer);
/* Free it. pointer NULL is fine. The caller makes sure that no run still uses it. */
FLASHQLA_API fqla_status fqla_free(fqla_context *context, void *pointer);
/* Copy from and to host memory, ordered on stream; both return when the copy is done. Refused while capturing. */
FLASHQLA_API fqla_status fqla_upload(fqla_context *context, void *device, const void *host, size_t bytes, fqla_stream stream);
FLASHQLA_API fqla_status fqla_download(fqla_context *context, void *host, const void *device, size_t bytes, fqla_stream stream);
/* Wait until all work enqueued on stream is done; reports what failed in it. */
FLASHQLA_API fqla_status fqla_synchronize(fqla_context *context, fqla_stream stream);

// >>plan
/* Distances in elements from one token (row) to the next and from one head to the next. 0: dense. */
typedef struct fqla_strides {
    int64_t token;
    int64_t head;
} fqla_strides;

/* One for each tensor; its gradient shares it, and do has o's. */
typedef struct fqla_tensor_strides {
    fqla_strides q, k, v, o, g, beta;
} fqla_tensor_strides;

typedef struct fqla_plan_desc {
    int32_t heads_qk, heads_v;  /* required, 1 to 65536; heads_v a multiple of heads_qk */
    int32_t dim_k, dim_v;       /* 0: 128. CPU: multiples of 8 up to 256, apart. CUDA: 128 */
    int32_t num_seqs;           /* required, 1 to 2^20 */
    const int32_t *cu_seqlens;  /* host [num_seqs + 1], starts at 0, never decreases; copied. NULL with padded_len: all are full */
    int32_t padded_len;         /* 0: packed; else rows a sequence owns, none longer */
    int32_t max_seqs;           /* most sequences after an update; 0: num_seqs */
    int32_t max_tokens;         /* packed: rows that the buffers hold, most tokens after an update; 0: cu_seqlens[num_seqs].
                                   Padded: leave 0 (it is max_seqs * padded_len) */
    fqla_dtype dtype;           /* of q, k, v, o, do, their gradients, a and b; default BF16; FP32 on the CPU alone */
    fqla_dtype state_dtype;     /* of h0, ht, dh0, dht, checkpoints, states; default FP32, or BF16 */
    fqla_state_layout state_layout;
    fqla_head_map head_map;
    fqla_gate gate;
    fqla_beta beta;
    int32_t negative_eigenvalues; /* 1: beta = 2 sigmoid(b); with FQLA_BETA_SIGMOID alone */
    int32_t l2norm;               /* 1: normalise q and k inside */
    float scale;                  /* of o; 0: dim_k^-0.5; finite */
    fqla_tensor_strides strides;  /* see TENSORS */
    float warm_up_tolerance;      /* CUDA may start a part of a sequence from zero some chunks early where what the state was before has
                                     decayed below this, relative to it; 0: 1e-7; 1e-30 to 1. See SCHEDULE */
    int32_t v_split;              /* CUDA: blocks that the D_v columns of a forward's state are spread over, 1 or 2; 0: chosen */
    int32_t segment_chunks;       /* CUDA: chunks of 64 tokens of the segments that sequences are cut into, forward and backward, at least
                                     a 64th of max_tokens; 0: chosen from the lengths, for each; -1: sequences stay whole */
    int32_t pool_size;            /* slots of the state pool; 0: no pool */
    int32_t checkpoint_every;     /* chunks of 64 tokens between checkpoints; 0: none */
    int32_t backward;             /* 1: fqla_backward will be called too. Refused with FQLA_GATE_LINEAR and with a pool */
    int32_t external_workspace;   /* 1: the plan owns no workspace, every run brings one */
    int32_t low_memory;           /* CUDA, with backward: 1: fqla_backward goes through the tokens in windows, so that its workspace grows
                                     with the square root of a sequence's length and no more, and goes over the states twice. Such a
                                     plan keeps its lengths (no fqla_plan_update), and fqla_forward needs residuals. CPU: no effect */
    int32_t needs_residuals;      /* CUDA, with backward: 1: fqla_backward always gets residuals, so that the workspace has no room to make
                                     them anew: 80 KB a chunk and v-head instead of 86.5. CPU: no effect */
} fqla_plan_desc;

typedef struct fqla_plan_summary {
    fqla_backend backend;
    int32_t num_seqs;         /* as of the last update */
    int64_t tokens, chunks;   /* of all sequences; chunks are per sequence rounded up */
    int64_t checkpoints;      /* entries of forward_args.checkpoints */
    int32_t v_split;          /* parts that the D_v columns of a state are spread over */
    int32_t segments;         /* parts that a sequence is cut into */
    size_t workspace_size, residuals_size; /* bytes, as the queries */
    char forward[128], backward[128], decode[128]; /* which code will run, or why none */
    char schedule[256];       /* the choice of v_split and segments and its reason, in words */
} fqla_plan_summary;

/* Make a plan. *plan: set on success alone. Any thread. The desc and cu_seqlens are copied.
   Errors: NULL_POINTER, INVALID_SIZE, INVALID_ENUM, INVALID_VALUE, INVALID_SEQLENS, INVALID_STRIDE, MISALIGNED (strides),
   UNSUPPORTED, TOO_LARGE, OUT_OF_MEMORY, DRIVER. */
FLASHQLA_API fqla_status fqla_plan_create(fqla_context *context, const fqla_plan_desc *desc, fqla_plan **plan);
/* Destroy it, once its runs are done. NULL is fine. */
FLASHQLA_API void fqla_plan_destroy(fqla_plan *plan);
/* Other lengths: num_seqs <= max_seqs, cu_seqlens as in the desc with at most max_tokens tokens. Host work and one copy into the plan's
   device tables, ordered on stream: runs enqueued later on that stream, replays of captured graphs among them, see
   the new lengths. On an error the plan is as before.
   Errors: NULL_POINTER, INVALID_SIZE, INVALID_SEQLENS, UNSUPPORTED (low_memory on CUDA), CAPTURING, WRONG_CONTEXT, DRIVER. */
FLASHQLA_API fqla_status fqla_plan_update(fqla_plan *plan, int32_t num_seqs, const int32_t *cu_seqlens, fqla_stream stream);
/* What will run, and the schedule's choice. */
FLASHQLA_API fqla_status fqla_plan_info(const fqla_plan *plan, fqla_plan_summary *summary);
/* Bytes of workspace that any run of this plan needs at most (0 is possible); constant over updates. 256-byte aligned. */
FLASHQLA_API fqla_status fqla_workspace_size(const fqla_plan *plan, size_t *bytes);
/* Bytes of residuals that fqla_forward can save for fqla_backward; constant over updates; 0 where the backend's backward
   recomputes everything (the CPU). */
FLASHQLA_API fqla_status fqla_residuals_size(const fqla_plan *plan, size_t *bytes);

// >>runs
/* The arguments of the three runs: shapes under TENSORS, NULL where "optional". */
typedef struct fqla_forward_args {
    const void *q, *k, *v;           /* required */
    const void *g, *beta;            /* required; in the plan's gate and beta forms */
    const float *A_log, *dt_bias;    /* required with FQLA_GATE_RAW */
    const void *h0;                  /* optional: zero */
    void *o;                         /* required */
    void *ht;                        /* optional: not stored; may be h0 */
    const int32_t *state_in, *state_out; /* required with a pool, as h0 and ht are then; else NULL */
    void *checkpoints;               /* required where the plan has any (plan_summary.checkpoints), else NULL */
    uint32_t *bad_index_count;       /* CUDA, optional: device counter, raised by one for each index outside the pool */
    void *residuals;                 /* optional: saved for fqla_backward; residuals_size bytes */
    size_t residuals_size;
    void *workspace;                 /* NULL: the plan's own */
    size_t workspace_size;
} fqla_forward_args;

typedef struct fqla_backward_args {
    const void *q, *k, *v, *g, *beta; /* as in the forward */
    const float *A_log, *dt_bias;
    const void *h0;                   /* optional, as in the forward */
    const void *do_;                  /* required: gradient of o */
    const void *dht;                  /* optional: gradient of ht, zero */
    void *dq, *dk, *dv, *dg, *dbeta;  /* required, written (not added to) */
    void *dh0;                        /* optional */
    float *dA_log, *ddt_bias;         /* required with FQLA_GATE_RAW: [HV], summed over all tokens */
    const void *residuals;            /* what fqla_forward saved on these inputs; optional but with needs_residuals on CUDA */
    size_t residuals_size;
    void *workspace;
    size_t workspace_size;
} fqla_backward_args;

typedef struct fqla_decode_args {
    int32_t num_tokens;              /* tokens of every sequence, 1 to FLASHQLA_MAX_DECODE_TOKENS; 0: 1. T = num_seqs * num_tokens rows,
                                        sequence n's first at n * num_tokens, whatever cu_seqlens and padded_len say */
    const void *q, *k, *v;
    const void *g, *beta;
    const float *A_log, *dt_bias;
    const void *h0;
    void *o;
    void *ht;
    const int32_t *state_in, *state_out;
    void *states;                    /* optional: the state after every token, [num_seqs, num_tokens, HV, ...] */
    uint32_t *bad_index_count;
    void *workspace;
    size_t workspace_size;
} fqla_decode_args;

/* Run. On CUDA they enqueue on stream and return; on the CPU they return when done.
   Errors: NULL_POINTER, MISALIGNED, OVERLAP, INVALID_INDEX (CPU), INVALID_SIZE (num_tokens), WORKSPACE_TOO_SMALL, UNSUPPORTED,
   WRONG_CONTEXT, TOO_LARGE, DRIVER. */
FLASHQLA_API fqla_status fqla_forward(fqla_plan *plan, const fqla_forward_args *args, fqla_stream stream);
FLASHQLA_API fqla_status fqla_backward(fqla_plan *plan, const fqla_backward_args *args, fqla_stream stream);
FLASHQLA_API fqla_status fqla_decode(fqla_plan *plan, const fqla_decode_args *args, fqla_stream stream);

#ifdef __cplusplus
}
#endif

#endif /* FLASHQLA_H */
