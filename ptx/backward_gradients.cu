/* All of the backward that needs no other chunk: dq, dk, dg, dbeta of a chunk, after kernel backward_chains has left its S0, dS1,
   Vn and dV (dW in what follows). An item is a chunk of a q/k head: a block takes the v-heads that read it one after the other, a
   step each, then the next item that no block has taken. There are as many blocks as multiprocessors, so that the next item's loads are
   under way while this one's results leave. Where the main pass overlaps the first, so do these blocks the end of it: the q/k heads
   whose chains wait for nothing come first, and an item's loads wait for its chains (progress.h).

   The maths: backward_rows.h and backward_scores.h. Per v-head, 1U = a 64 x 128 x 128 product = 512 tensor cycles:

       dO S0^T, Vn dS1^T, dW S0^T     3 U        dO Vn^T, dW Vn^T     1 U (64 x 64 x 128 each)
       dP K, dP^T Q, dKK^T K          1.5 U      <dS1, S0>            1 U (a diagonal's worth of it used)
       dKK K, twice                   1 U

   7.5 U = 3840 tensor cycles; from memory 114 KB a v-head and 64 KB a q/k head (q, k, dq, dk): with two v-heads 146 KB, 5.0 us at
   the rate of a copy.

   Roles, a warpgroup each:
       QUERIES    dq                                              backward_rows.h       160 registers
       KEYS       dk                                              backward_rows.h       160 registers
       SCORES     the 64 x 64 matrices, <dS1, S0>                 backward_scores.h     152 registers
       HELPERS    a warp loads and sends, one finishes dg, dbeta  backward_loads.h, backward_gates.h    40 registers

   The pipeline, n the step at hand:

       copy engine   second(n): S0, dO, dW | second(n+1), first(n+2): dS1, Vn, factors   (112 KB under way, never less than 48)
       QUERIES       dO S0^T, dots and sum | dP K, dots and sum
       KEYS          dW S0^T, dots and sum, Vn dS1^T, dots and sum | dKK K + dP^T Q + dKK^T K, dots and sum
       SCORES        dO Vn^T, dW Vn^T, <dS1, S0> | dP, dKK | dKK K, dots
       HELPERS       dg, dbeta of n-1

   and after an item's last step dq and dk leave by way of first's place, while q and k of the next come: first(n+2) once they have
   left. QUERIES and KEYS run through the same instructions (LADDER.md, backward 18).

   Shared memory: backward_shared.h. */
#include "backward_gates.h"
#include "backward_loads.h"
#include "backward_scores.h"
#include "grid.h"

enum { ROWS_REGISTERS = 160, SCORES_REGISTERS = 152, HELPERS_REGISTERS = 40, START_REGISTERS = 128 };
static_assert(2 * ROWS_REGISTERS + SCORES_REGISTERS + HELPERS_REGISTERS <= ROLES * START_REGISTERS,
              "the warpgroups share what the block starts with");
static_assert(ROWS_REGISTERS >= START_REGISTERS && SCORES_REGISTERS >= START_REGISTERS && HELPERS_REGISTERS <= START_REGISTERS,
              "setmaxnreg.inc to fewer, or .dec to more, is an illegal instruction");

static __device__ __forceinline__ void run_role(const fqla__backward_params &p, GradientsShared &s, int thread) {
    const int role = __shfl_sync(0xffffffffu, thread / WARPGROUP, 0);
    if (role == HELPERS) {
        shrink_registers<HELPERS_REGISTERS>();
        const int warp = thread % WARPGROUP / WARP;
        if (warp == GATES_WARP) run_gates(p, s, thread % WARP);
        else if (warp == LOADS_WARP) run_loads(p, s, thread % WARP);
    } else if (role == SCORES) {
        grow_registers<SCORES_REGISTERS>();
        run_scores(p, s, thread % WARPGROUP);
    } else {
        grow_registers<ROWS_REGISTERS>();
        run_rows(p, s, thread % WARPGROUP, role == KEYS);
    }
}

extern "C" __global__ void __launch_bounds__(FQLA__GRADIENTS_THREADS, 1)
#if defined(FLASHQLA_ELEMENT_BF16)
    backward_gradients_bf16(const __grid_constant__ fqla__aligned_backward_params params)
#else
    backward_gradients_fp16(const __grid_constant__ fqla__aligned_backward_params params)
#endif
{
    const fqla__backward_params &p = params.values;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    GradientsShared &s = *(GradientsShared *)shared_bytes;
    const int thread = (int)threadIdx.x;

    if (thread == 0) {
        mbarrier_init(&s.q_full, 1);
        mbarrier_init(&s.k_full, 1);
        mbarrier_init(&s.cleared, PRODUCERS);
        mbarrier_init(&s.second_full, 1);
        mbarrier_init(&s.qk_free, PRODUCERS_WARPS);
        mbarrier_init(&s.second_used, PRODUCERS_WARPS);
        mbarrier_init(&s.scores_ready, WARPGROUP / WARP);
        mbarrier_init(&s.scores_used, PRODUCERS_WARPS);
        for (int i = 0; i < 2; i++) {
            mbarrier_init(&s.first_full[i], 1);
            mbarrier_init(&s.first_used[i], PRODUCERS_WARPS);
            mbarrier_init(&s.gradients_full[i], 2 * WARPGROUP / WARP);
        }
        for (int i = 0; i < SUMS; i++) {
            mbarrier_init(&s.sums_full[i], PRODUCERS_WARPS);
            mbarrier_init(&s.sums_free[i], 1);
        }
        mbarrier_init_fence();
    }
    clear_tile(&s.dp, thread, FQLA__GRADIENTS_THREADS); /* above their diagonal blocks they stay zero */
    clear_tile(&s.m, thread, FQLA__GRADIENTS_THREADS);
    fence_proxy_async();
    grid_launch_dependents();

    __syncthreads();
    if (thread / WARP != PRODUCERS_WARPS + LOADS_WARP && !p.overlaps) grid_wait(); /* that one does when it needs what the kernels before leave */
    run_role(p, s, thread);
    if (blockIdx.x == 0) grid_wait(); /* the next kernel takes this one's end for that of all before it */
}
