/* The chunked forward of the gated delta rule on Hopper, after kernel prepare: the sequential part, from q, k, v, T to o and ht.

   The maths, a chunk of C = 64 tokens (G the running sum of g inside it, gamma_i = exp(G_i), gamma_C the last):

       A = (I + strict_tril(diag(beta) K K^T))^-1       T_ij = exp(G_i - G_j) A_ij beta_j     P_ij = exp(G_i - G_j) (Q K^T)_ij    (i >= j)
       W = V - diag(gamma) K S0                         Vn = T W
       O = scale (diag(gamma) Q S0 + P Vn)              S1 = gamma_C S0 + K^T diag(gamma_C / gamma) Vn

   A block stays on its multiprocessor and takes items one after the other (forward_items.h): a segment's v-head (segment.h) with all
   of V, or as forward_half with half of it. Its warpgroups:

       state 0, state 1    64 of the 128 state columns each, S^T in registers          forward_state.h     208 registers
       scores              P, ahead of the state                                       forward_scores.h     72 registers
       copies              finds items, has the copy engine bring chunks, take O away  forward_copies.h     24 registers

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

#if defined(FLASHQLA_HALF)
enum { STATE_REGISTERS = 240, SCORES_REGISTERS = 128, COPIES_REGISTERS = 40, START_REGISTERS = 168 };
#else
enum { STATE_REGISTERS = 208, SCORES_REGISTERS = 72, COPIES_REGISTERS = 24, START_REGISTERS = 128 };
#endif
static_assert(STATE_WARPGROUPS * STATE_REGISTERS + SCORES_REGISTERS + COPIES_REGISTERS <= (STATE_WARPGROUPS + 2) * START_REGISTERS,
              "the warpgroups share what the block starts with");

static __device__ __forceinline__ void init_barriers(ForwardShared &s) {
    for (int i = 0; i < ITEMS; i++) {
        mbarrier_init(&s.item_full[i], 1);
        mbarrier_init(&s.item_begun[i], STATE_WARPS + WARPGROUP / WARP + 2); /* warps of state and scores, two threads that copy */
    }
    for (int i = 0; i < SLOTS; i++) {
        mbarrier_init(&s.part_full[i], WARPGROUP);
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
    const int thread = (int)threadIdx.x;

    if (thread == 0) init_barriers(s);
    if (thread == FORWARD_THREADS - 1) {
        tma_prefetch(&p.k);
        tma_prefetch(&p.v);
        tma_prefetch(&p.q);
        tma_prefetch(&p.o);
    }
    if (thread == (STATE_WARPGROUPS + 1) * WARPGROUP + ITEMS_WARP * WARP) look_up(p, s.items[0], blockIdx.x);
    for (int i = 0; i < SLOTS; i++) clear_square(&s.chunk[i].t, thread, FORWARD_THREADS); /* above their diagonal blocks they stay zero */
    for (int i = 0; i < OUT_SLOTS; i++) clear_square(&s.p[i], thread, FORWARD_THREADS);
    fence_proxy_async();
    __syncthreads();
    const int role = __shfl_sync(0xffffffffu, thread / WARPGROUP, 0);
    if (role > STATE_WARPGROUPS) {
        shrink_registers<COPIES_REGISTERS>();
        run_copies(p, s, thread % WARPGROUP);
    } else if (role == STATE_WARPGROUPS) {
        shrink_registers<SCORES_REGISTERS>();
        run_scores(s, p.l2norm == FQLA__L2NORM_FORWARD, thread % WARPGROUP);
    } else {
        grow_registers<STATE_REGISTERS>();
        run_state(p, s, role, thread % WARPGROUP);
    }
}
