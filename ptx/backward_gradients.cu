/* All of the backward that needs no other chunk: dq, dk, dg, dbeta of a chunk, after kernel backward_chains has left its S0, dS1,
   Vn and dV (dW in what follows). An item is a chunk of a q/k head: a block takes the v-heads that read it one after the other, a
   step each, then the next item, a grid further on. There are as many blocks as multiprocessors, so that the next item's loads are
   under way while this one's results leave.

   The maths: backward_rows.h and backward_scores.h. Per v-head, 1U = a 64 x 128 x 128 product = 512 tensor cycles:

       dO S0^T, Vn dS1^T, dW S0^T     3 U        dO Vn^T, dW Vn^T     1 U (64 x 64 x 128 each)
       dP K, dP^T Q, dKK K, dKK^T K   2 U        Q K^T, K K^T         1 U a q/k head

   6.5 U = 3300 tensor cycles with two v-heads a q/k head; from memory 114 KB a v-head and 64 KB a q/k head (q, k, dq, dk): 146
   KB, 4.6 us at the copy rate. So it is memory that limits, and the one thing to see to is that loads are always under way.

   Roles, a warpgroup each: QUERIES dq, KEYS dk, SCORES the 64 x 64 matrices, the gates, and loads.

   The pipeline, n the step at hand:

       copy engine   second(n): S0, dO, dW | second(n+1), first(n+2): dS1, Vn, factors   (112 KB under way, never less than 48)
       QUERIES       dO S0^T, dots and sum | dP K
       KEYS          Vn dS1^T, sum (under the loads of second(n)) | dW S0^T, sum | dP^T Q, dKK K, dKK^T K
       SCORES        dO Vn^T, dW Vn^T, under them <dS1, S0> | all used: loads | dP, dKK, Z | dg, dbeta, by one warp

   and after an item's last step dq and dk leave by way of first's place, while q and k of the next come: first(n+2) once they have
   left.

   Shared memory: backward_shared.h. */
#include "backward_scores.h"
#include "grid.h"

enum { ROWS_REGISTERS = 176, SCORES_REGISTERS = 152 };
static_assert(2 * ROWS_REGISTERS + SCORES_REGISTERS <= 504, "three warpgroups share 504 registers a thread triple");

extern "C" __global__ void __launch_bounds__(FQLA__GRADIENTS_THREADS, 1)
#if defined(FLASHQLA_ELEMENT_BF16)
    backward_gradients_bf16(const __grid_constant__ fqla__aligned_backward_params params)
#else
    backward_gradients_fp16(const __grid_constant__ fqla__aligned_backward_params params)
#endif
{
    const fqla__backward_params &p = params.values;
    const fqla__forward_params &f = p.forward;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    GradientsShared &s = *(GradientsShared *)shared_bytes;
    const int thread = (int)threadIdx.x;

    if (thread == 0) {
        mbarrier_init(&s.qk_full, 1);
        mbarrier_init(&s.cleared, FQLA__GRADIENTS_THREADS);
        mbarrier_init(&s.second_full, 1);
        mbarrier_init(&s.qk_free, 2 * WARPGROUP / WARP);
        mbarrier_init(&s.sent, 2);
        mbarrier_init(&s.used, GRADIENTS_WARPS);
        mbarrier_init(&s.scores_ready, WARPGROUP / WARP);
        for (int i = 0; i < 2; i++) {
            mbarrier_init(&s.first_full[i], 1);
            mbarrier_init(&s.dots_ready[i], 2 * WARPGROUP / WARP);
        }
        mbarrier_init_fence();
    }
    clear_tile(&s.dp, thread, FQLA__GRADIENTS_THREADS); /* above their diagonal blocks they stay zero */
    clear_tile(&s.m, thread, FQLA__GRADIENTS_THREADS);
    fence_proxy_async();
    grid_launch_dependents();
    grid_wait();

    const int items = count_items(f);
    if (items <= 0) return;
    for (int item = thread / WARP; item < min(2, items); item += GRADIENTS_WARPS) {
        const Place place = find_place(f, item, thread % WARP);
        if (thread % WARP == 0) s.places[item] = place;
    }
    __syncthreads();
    if (thread == 0) {
        load_chunk_rows(p, s, s.places[0]);
        load_first(p, s, 0, items, 0, 0);
        load_second(p, s, 0, items, 0);
        load_first(p, s, 0, items, 1, 1);
    }
    __syncwarp();

    const int role = __shfl_sync(0xffffffffu, thread / WARPGROUP, 0);
    if (role == SCORES) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"((int)SCORES_REGISTERS));
        run_scores(p, s, items, thread % WARPGROUP);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"((int)ROWS_REGISTERS));
        if (role == QUERIES) run_queries(p, s, items, thread);
        else run_keys(p, s, items, thread % WARPGROUP);
    }
}
