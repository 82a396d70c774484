/* Kernel backward_gradients' shared memory and who hands what to whom. */
#ifndef FLASHQLA_BACKWARD_SHARED_H
#define FLASHQLA_BACKWARD_SHARED_H

#include "backward_common.h"
#include "progress.h"

enum { QUERIES, KEYS, SCORES, HELPERS, ROLES };
static_assert(FQLA__GRADIENTS_THREADS == ROLES * WARPGROUP, "a warpgroup a role");
enum { PRODUCERS = HELPERS * WARPGROUP, PRODUCERS_WARPS = PRODUCERS / WARP }; /* the three that multiply */
enum { GATES_WARP, LOADS_WARP }; /* of HELPERS; its other two warps end: setmaxnreg goes by warpgroups */

/* An item of a block's work: a chunk of a q/k head. A block's first is that of its number, the others it takes as it gets to them. */
typedef struct Place {
    int64_t row;     /* its first row */
    int64_t number;  /* in the batch */
    int64_t segment; /* the number of its segment's first chunk */
    int32_t valid;   /* tokens; the rest of the 64 rows is another sequence's. 0: there is no item, and the block's work is done */
    int32_t head_qk;
} Place;

enum { PLACES = 8, SUMS = 3 };

/* The rank-th q/k head, those first whose v-heads wait for nothing in the first pass. By a whole warp. */
static __device__ __forceinline__ int ranked_head(const fqla__backward_params &p, int rank, int lane) {
    for (int late = 0; late < 2; late++)
        for (int first = 0; first < p.forward.heads_qk; first += WARP) {
            const bool is = first + lane < p.forward.heads_qk && load_count(exact_flag(p, first + lane)) == late;
            uint32_t those = __ballot_sync(0xffffffffu, is);
            for (; those != 0; those &= those - 1, rank--)
                if (rank == 0) return first + __ffs((int)those) - 1;
        }
    return 0;
}

/* Of an item of all of the blocks'. By a whole warp. */
static __device__ __forceinline__ Place find_place(const fqla__backward_params &p, int64_t item, int lane) {
    const fqla__forward_params &f = p.forward;
    const fqla__device_sequence *sequences = (const fqla__device_sequence *)(f.table + 1);
    Place place = {0, 0, 0, 0, 0};
    if (item >= f.table->chunks * f.heads_qk) return place;
    place.number = p.overlaps ? item % f.table->chunks : item / f.heads_qk;
    place.head_qk = p.overlaps ? ranked_head(p, (int)(item / f.table->chunks), lane) : (int)(item % f.heads_qk);
    const fqla__device_sequence sequence = sequences[find_sequence(sequences, f.table->num_seqs, place.number, lane)];
    const int64_t in_sequence = place.number - sequence.chunk;
    place.row = sequence.row + in_sequence * CHUNK;
    place.segment = sequence.chunk + (sequence.kept >= 0 ? in_sequence - in_sequence % f.table->segment_chunks : 0);
    place.valid = (int32_t)min((int64_t)CHUNK, sequence.len - in_sequence * CHUNK);
    return place;
}

/* A head's first load. 48 KB, as it lies in fqla__chunk_states */
typedef struct FirstPart {
    Tile ds[2][2]; /* dS1^T / unit, [half of V][half of K] */
    Tile vn[2];    /* [half of V], as the others below */
} FirstPart;

/* Its second load. 64 KB */
typedef struct SecondPart {
    Tile s[2][2];  /* S0^T */
    Tile dout[2], dw[2];
} SecondPart;

/* beta^2 is an exact enough divisor from here on in either 16-bit type. */
#define LEAST_BETA 0.000244140625f

/* Of a step: a v-head of a chunk. */
typedef struct HeadSums {
    float query[2][CHUNK];   /* q_i . (scale o dO S0^T)_i, q_i . (dP K)_i, by QUERIES */
    float key[3][CHUNK];     /* k_i . (-w dW S0^T)_i, k_i . (update Vn dS1^T)_i = H_i, k_i . (dKK K + dP^T Q + dKK^T K)_i, by KEYS */
    float read[CHUNK];       /* k_i . (dKK K)_i, by SCORES */
    float diagonal[CHUNK];   /* (dW Vn^T)_jj */
    float tiny[CHUNK];       /* dbeta of tokens whose beta is too small to divide by */
    float states[CHUNK];     /* of <dS1, S0> the rows i and 64 + i of V, by SCORES */
} HeadSums;

typedef struct __align__(1024) GradientsShared {
    Tile q[2], k[2];            /*                                      32 KB */
    FirstPart first[2];         /* step n in n % 2; of a chunk's last step at its end dq's and dk's way out    96 KB */
    SecondPart second;          /*                                      64 KB */
    Tile dp, m;                 /* dP and dKK below their diagonals     16 KB */
    fqla__factors factors[3];   /* step n in n % 3                     4.6 KB */
    HeadSums sums[SUMS];        /* step n in n % 3                       7 KB */
    float dp_diagonal[2][CHUNK]; /* of item i's v-heads up to this one in i % 2 */
    float square_q[CHUNK], square_k[CHUNK]; /* rq_i^2, r_i^2; with l2norm alone, as the next */
    float ratio[CHUNK];         /* r_i / rq_i */
    float tiny_n[CHUNK], tiny_p[CHUNK], tiny_sum[4];
    Place places[PLACES];       /* the block's item i in i % 8: up to two ahead, and HELPERS up to three steps behind */
    uint64_t q_full, k_full, first_full[2], second_full; /* copy engine -> producers */
    uint64_t cleared;           /* producers -> producers: the rows past a sequence's end are zeros */
    uint64_t qk_free;           /* producers -> HELPERS: q and k may be overwritten */
    uint64_t gradients_full[2]; /* QUERIES, KEYS -> HELPERS: dq and dk of item i lie in first; i % 2, since with one v-head a q/k head
                                   the next item's can before HELPERS look */
    uint64_t first_used[2];     /* producers -> HELPERS: the step's first part may be overwritten; step n in n % 2, since KEYS may be in
                                   step n when the others have used step n + 1's */
    uint64_t second_used;       /* the same of its second */
    uint64_t scores_ready;      /* SCORES -> producers: dp, m */
    uint64_t scores_used;       /* producers -> SCORES: they may be overwritten */
    uint64_t sums_full[SUMS];   /* producers -> HELPERS */
    uint64_t sums_free[SUMS];   /* HELPERS -> producers */
} GradientsShared;

static_assert(sizeof(GradientsShared) == FQLA__GRADIENTS_SHARED_BYTES, "what the host asks for");
static_assert(sizeof(GradientsShared) <= 227 * 1024, "what a block can have");
static_assert(sizeof(FirstPart) == sizeof(((fqla__chunk_states *)0)->ds) + sizeof(((fqla__chunk_states *)0)->vn),
              "copied as it is");

static __device__ __forceinline__ float sum_warp(float value) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
}

/* Rows have been made zeros, by every producer; the role's `clears`-th time. */
static __device__ __forceinline__ void meet_cleared(GradientsShared &s, int &clears) {
    fence_proxy_async();
    mbarrier_arrive(&s.cleared);
    mbarrier_wait(&s.cleared, clears++ % 2);
    __syncwarp();
}

/* An item's place, which is there with the first part of its first step, n; after the last item one without tokens. Rows past the end of
   q and k are made zeros, by every producer, before anything else of such an item. */
static __device__ __forceinline__ const Place &wait_place(GradientsShared &s, int item, int n, int &clears) {
    const Place &place = s.places[item % PLACES];
    mbarrier_wait(&s.first_full[n % 2], n / 2 % 2);
    if (place.valid > 0 && place.valid < CHUNK) {
        mbarrier_wait(&s.q_full, item % 2);
        mbarrier_wait(&s.k_full, item % 2);
        for (int i = 0; i < 4; i++) clear_tile_rows(&s.q[0] + i, place.valid, (int)threadIdx.x, PRODUCERS); /* q, k */
        meet_cleared(s, clears);
    }
    __syncwarp();
    return place;
}

/* Wait for a step's loads, the same. */
static __device__ __forceinline__ void wait_second(GradientsShared &s, const Place &place, int n, int &clears) {
    mbarrier_wait(&s.first_full[n % 2], n / 2 % 2);
    mbarrier_wait(&s.second_full, n % 2);
    if (place.valid < CHUNK) {
        for (int i = 0; i < 4; i++)
            clear_tile_rows(&s.second.dout[0] + i, place.valid, (int)threadIdx.x, PRODUCERS); /* dout, dw */
        meet_cleared(s, clears);
    }
}

/* Before a producer leaves sums of step n: those of step n - 3 have been taken. */
static __device__ __forceinline__ void wait_sums(GradientsShared &s, int n) {
    if (n >= SUMS) mbarrier_wait(&s.sums_free[n % SUMS], (n / SUMS - 1) % 2);
    __syncwarp();
}

/* There is no step n: HELPERS, who wait for its sums, are told. */
static __device__ __forceinline__ void end_sums(GradientsShared &s, int n, int lane) {
    wait_sums(s, n);
    arrive_warp(&s.sums_full[n % SUMS], lane);
}

#endif
