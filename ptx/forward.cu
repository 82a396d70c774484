/* The chunked forward of the gated delta rule on Hopper, after kernel prepare: the sequential part, from q, k, v, T to o and ht.

   The maths, a chunk of C = 64 tokens (G the running sum of g inside it, gamma_i = exp(G_i), gamma_C the last):

       A = (I + strict_tril(diag(beta) K K^T))^-1       T_ij = exp(G_i - G_j) A_ij beta_j     P_ij = exp(G_i - G_j) (Q K^T)_ij    (i >= j)
       W = V - diag(gamma) K S0                         Vn = T W
       O = scale (diag(gamma) Q S0 + P Vn)              S1 = gamma_C S0 + K^T diag(gamma_C / gamma) Vn

   A block is a segment's v-head (segment.h) on one multiprocessor, with all of V, or as forward_half with half of it. Its warpgroups:

       state 0, state 1    64 of the 128 state columns each, S^T in registers          forward_state.h     208 registers
       scores              P, ahead of the state                                       forward_scores.h     72 registers
       copies              has the copy engine bring a chunk and take O away           forward_copies.h     24 registers

       copy engine   q k v T(c+2)                           O(c-1)
       scores                      Q K^T, P of c+1
       state         K S0(c) -> W -> T W -> update -> K S0(c+1) ...
                          Q S0(c)                P Vn -> O

   Shared memory: forward_shared.h has the map in bytes. Cost and floor: LADDER.md. */
#include <stddef.h>

#include "forward_copies.h"
#include "forward_scores.h"
#include "forward_shared.h"
#include "forward_state.h"
#include "grid.h"

#if defined(FLASHQLA_HALF)
enum { STATE_REGISTERS = 240, SCORES_REGISTERS = 128, COPIES_REGISTERS = 24, START_REGISTERS = 168 };
#else
enum { STATE_REGISTERS = 208, SCORES_REGISTERS = 72, COPIES_REGISTERS = 24, START_REGISTERS = 128 };
#endif
static_assert(STATE_WARPGROUPS * STATE_REGISTERS + SCORES_REGISTERS + COPIES_REGISTERS <= (STATE_WARPGROUPS + 2) * START_REGISTERS,
              "the warpgroups share what the block starts with");

static __device__ __forceinline__ void zero_output(const fqla__forward_params &p, const Segment &segment, int first_v, int thread) {
    enum { UNITS = STATE_WARPGROUPS * STATE_COLUMNS / 8 };
    const int64_t rows = min(segment.len, segment.end * CHUNK) - segment.first * CHUNK;
    for (int64_t unit = thread; unit < rows * UNITS; unit += FORWARD_THREADS)
        *(uint4 *)((uint16_t *)p.o_rows + (segment.row + segment.first * CHUNK + unit / UNITS) * p.o_token + segment.head * p.o_head + first_v +
                   unit % UNITS * 8) = make_uint4(0, 0, 0, 0);
}

/* A block's first state on its way to the L2 cache: the threads read it 32 bytes at a time, which takes memory 6 us when all blocks do. By
   one thread. part: of SPLIT blocks. */
static __device__ __forceinline__ void prefetch_state(const fqla__forward_params &p, const Segment &segment, int part) {
    const uint32_t bytes = DIM * DIM * (p.state_bf16 ? 2 : 4), share = bytes / SPLIT;
    if (segment.kept < 0 && segment.in >= 0) bulk_prefetch((const char *)p.h0 + segment.in * bytes + part * share, share);
}

/* The same for the block that will follow on this multiprocessor, more or less. */
static __device__ __forceinline__ void prefetch_next_state(const fqla__forward_params &p, uint32_t parts) {
    const uint32_t block = blockIdx.x + count_multiprocessors();
    Segment segment;
    if (block < gridDim.x && find_segment(p, block / parts, (int)(block % parts / SPLIT), false, &segment))
        prefetch_state(p, segment, (int)(block % SPLIT));
}

static __device__ __forceinline__ void init_barriers(ForwardShared &s) {
    mbarrier_init(&s.part_full, WARPGROUP);
    for (int i = 0; i < SLOTS; i++) {
        mbarrier_init(&s.chunk_full[i], 1);
        mbarrier_init(&s.chunk_free[i], STATE_WARPS);
    }
    for (int i = 0; i < OUT_SLOTS; i++) {
        mbarrier_init(&s.p_full[i], WARPGROUP / WARP);
        mbarrier_init(&s.out_full[i], STATE_WARPS);
        mbarrier_init(&s.out_free[i], 1);
    }
    mbarrier_init_fence();
}

extern "C" __global__ void __launch_bounds__(FORWARD_THREADS, 1)
#if defined(FLASHQLA_HALF) && defined(FLASHQLA_ELEMENT_BF16)
    forward_half_bf16(const __grid_constant__ fqla__aligned_params params)
#elif defined(FLASHQLA_HALF)
    forward_half_fp16(const __grid_constant__ fqla__aligned_params params)
#elif defined(FLASHQLA_ELEMENT_BF16)
    forward_bf16(const __grid_constant__ fqla__aligned_params params)
#else
    forward_fp16(const __grid_constant__ fqla__aligned_params params)
#endif
{
    const fqla__forward_params &p = params.values;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    ForwardShared &s = *(ForwardShared *)shared_bytes;
    const uint32_t parts = (uint32_t)p.heads_v * SPLIT;
    const int head = (int)(blockIdx.x % parts / SPLIT), first_v = (int)(blockIdx.x % SPLIT) * STATE_COLUMNS * STATE_WARPGROUPS;
    const int thread = (int)threadIdx.x;

    /* what needs nothing of the kernels before this one */
    Segment segment;
    bool found = false;
    if (thread == 0) init_barriers(s);
    if (thread == FORWARD_THREADS - 1) {
        tma_prefetch(&p.k);
        tma_prefetch(&p.v);
        tma_prefetch(&p.q);
        tma_prefetch(&p.o);
    }
    if (thread < WARP) found = find_segment(p, blockIdx.x / parts, head, thread == 0 && first_v == 0, &segment);
    if (thread == 0 && found) prefetch_state(p, segment, (int)(blockIdx.x % SPLIT));
    for (int i = 0; i < SLOTS; i++) clear_square(&s.chunk[i].t, thread, FORWARD_THREADS); /* above their diagonal blocks they stay zero */
    for (int i = 0; i < OUT_SLOTS; i++) clear_square(&s.p[i], thread, FORWARD_THREADS);
    fence_proxy_async();
    grid_wait();
    if (thread < WARP) { /* every lane knows, one writes */
        int warm_up = 0;
        if (!found) segment.row = -1;
        else if (segment.index > 0) warm_up = warm_up_chunks(p, segment, segment.first, thread);
        if (thread == 0) {
            s.segment = segment;
            s.start = segment.first - warm_up;
        }
    }
    __syncthreads();
    if (s.segment.row < 0) return;
    if (s.segment.padding) {
        zero_output(p, s.segment, first_v, thread);
        return;
    }
    const int role = __shfl_sync(0xffffffffu, thread / WARPGROUP, 0);
    if (role > STATE_WARPGROUPS) {
        shrink_registers<COPIES_REGISTERS>();
        if (thread == FORWARD_THREADS - 1) prefetch_next_state(p, parts);
        run_copies(p, s, first_v, thread % WARPGROUP);
    } else if (role == STATE_WARPGROUPS) {
        shrink_registers<SCORES_REGISTERS>();
        run_scores(s, p.l2norm == FQLA__L2NORM_FORWARD, thread % WARPGROUP);
    } else {
        grow_registers<STATE_REGISTERS>();
        run_state(p, s, first_v, role, thread % WARPGROUP, s.start < s.segment.first);
    }
}
