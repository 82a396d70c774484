/* All of the backward that needs no other chunk: dq, dk, dg, dbeta of a chunk, after kernel backward_chains has left its S0, dS1,
   Vn and dV (dW in what follows). A block is a chunk of a q/k head and takes the v-heads that read it one after the other.

   The maths: backward_rows.h and backward_scores.h. Per v-head, 1U = a 64 x 128 x 128 product = 512 tensor cycles:

       dO S0^T, Vn dS1^T, dW S0^T     3 U        dO Vn^T, dW Vn^T     1 U (64 x 64 x 128 each)
       dP K, dP^T Q, dKK K, dKK^T K   2 U        Q K^T, K K^T         1 U a q/k head

   6.5 U = 3300 tensor cycles with two v-heads a q/k head; from memory 114 KB a v-head and 64 KB a q/k head (q, k, dq, dk): 146
   KB, 4.6 us at the copy rate. So it is memory that limits, and the one thing to see to is that loads are always under way.

   Roles, a warpgroup each: QUERIES dq, KEYS dk, SCORES the 64 x 64 matrices, the gates, and loads.

   The pipeline, h the v-head at hand:

       copy engine   second(h): S0, dO, dW | second(h+1), first(h+2): dS1, Vn, factors   (112 KB under way, never less than 48)
       QUERIES       dO S0^T, dots and sum | dP K
       KEYS          Vn dS1^T, sum (under the loads of second(h)) | dW S0^T, sum | dP^T Q, dKK K, dKK^T K
       SCORES        dO Vn^T, dW Vn^T, under them <dS1, S0> | all used: loads | dP, dKK, Z | dg, dbeta, by one warp

   Shared memory: backward_shared.h. */
#include "backward_scores.h"
#include "grid.h"

enum { ROWS_REGISTERS = 184, SCORES_REGISTERS = 136 };
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
        mbarrier_init(&s.second_full, 1);
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

    Place place;
    place.number = blockIdx.x / (uint32_t)f.heads_qk;
    place.head_qk = (int32_t)(blockIdx.x % (uint32_t)f.heads_qk);
    place.heads = f.heads_v / f.heads_qk;
    if (place.number >= f.table->chunks) return;
    const fqla__device_sequence *sequences = (const fqla__device_sequence *)(f.table + 1);
    const fqla__device_sequence sequence = sequences[find_sequence(sequences, f.table->num_seqs, place.number, thread % WARP)];
    const int64_t in_sequence = (place.number - sequence.chunk) * CHUNK;
    place.row = sequence.row + in_sequence;
    place.valid = (int32_t)min((int64_t)CHUNK, sequence.len - in_sequence);
    __syncthreads();
    if (thread == 0) {
        load_chunk_rows(p, s, place);
        load_first(p, s, place, 0);
        load_second(p, s, place, 0);
        if (place.heads > 1) load_first(p, s, place, 1);
    }
    mbarrier_wait(&s.qk_full, 0);
    if (place.valid < CHUNK) {
        for (int i = 0; i < 4; i++) clear_tile_rows(&s.q[0] + i, place.valid, thread, FQLA__GRADIENTS_THREADS); /* q, k */
        fence_proxy_async();
        __syncthreads();
    }

    const int role = __shfl_sync(0xffffffffu, thread / WARPGROUP, 0);
    if (role == SCORES) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"((int)SCORES_REGISTERS));
        run_scores(p, s, place, thread % WARPGROUP);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"((int)ROWS_REGISTERS));
        if (role == QUERIES) run_queries(p, s, place, thread);
        else run_keys(p, s, place, thread % WARPGROUP);
    }
}
