/* The sequential part of the backward: all states S0 and all their gradients dS1, chunk by chunk, in one grid of two kinds of
   blocks that need nothing of each other.

   The maths, a chunk of C = 64 tokens (symbols as in forward.cu; dO, dht given):

       forwards    W = V - w K S0                              Vn = beta W + T W            S1 = gamma_C S0 + K^T (update Vn)
       backwards   dVn = scale P^T dO + update K dS1           dW = beta dVn + T^T dVn      dV = dW
                   dS0 = gamma_C dS1 + scale Q^T (o dO) - K^T (w dW)

   A block walks 64 columns of V of a segment's v-head, forwards or backwards (backward_segment.h). It leaves for every chunk S0 and
   Vn, or dS1 and dV: kernel backward_gradients makes all else of them, a block a chunk. Where sequences are cut a first pass of the
   same kernel comes before, which leaves for every segment but what the next needs to start, then kernel backward_scan; the main pass
   runs beside both, but for the chains that start from what they leave, and backward_gradients begins beside the main pass's end.

   scale = unit * a power of two. Everything of the gradient's is divided by unit until it leaves, so that scale costs a 16-bit
   operand no digit: with zero gates o dO is dO with another exponent. dh0's last chunk adds what rounding o dO has left (the
   relative error of dh0 would be that of one rounding, 1.7e-3).

   Roles, a warpgroup each:
       state     S^T or dS^T in registers                                        backward_chain_forwards.h,   240 registers
                                                                                 backward_chain_backwards.h
       scores    backwards P; zeros past a sequence's end                        backward_chain_scores.h      128 registers
       copies    have the copy engine bring a chunk and take the results away;   backward_chain_copies.h       56 registers
                 backwards T from its blocks to a tile

   The pipeline; c is the chunk at hand, c+1 the next one in the block's direction:

       copy engine   all of c+2                                                   S0 Vn / dS1 dV of c-1
       scores                 Q K^T, P of c+1
       copies                 T of c+1
       state forwards     K S0 (256 tensor cycles), under it S0's copy out | W | T W (128) | Vn, update (256), under it Vn out
       state backwards    K dS1 (256) and P^T dO (128), under them dS1's copy out | dVn | T^T dVn (128) | w dW, under it Q's update
                          (256) | K's update (256), under it dV out and o dO of c+1

   and K S0 or K dS1 of c+1 as soon as the state is there. By count: forwards 640 tensor cycles, backwards 1024 and 256 of the scores'; what a
   step takes is the state's instructions, 20 cycles a wgmma and 2 to 4 each of the others: alone .77 and 1.3 us, with all blocks of
   16/32 1x8192 beside 1.1 and 1.6, since memory is full. From memory k 16 (the halves and v-heads of a q/k head find it in the cache) v
   8 T 6.7 S0 16 Vn 8 forwards, q k 32 do 8 T 6.7 dS1 16 dv 8 backwards, KB.

   Shared memory: backward_chain_shared.h. */
#include "backward_chain_backwards.h"
#include "backward_chain_copies.h"
#include "backward_chain_forwards.h"
#include "backward_chain_scores.h"
#include "grid.h"

enum { STATE_REGISTERS = 240, SCORES_REGISTERS = 128, COPIES_REGISTERS = 56, START_REGISTERS = 168 };
static_assert(STATE_REGISTERS + SCORES_REGISTERS + COPIES_REGISTERS <= ROLES * START_REGISTERS,
              "the warpgroups share what the block starts with");

static __device__ __forceinline__ void init_barriers(ChainShared &s) {
    mbarrier_init(&s.part_full, 1);
    for (int i = 0; i < SLOTS; i++) {
        mbarrier_init(&s.full[i], 1);
        mbarrier_init(&s.free[i], STATE_WARPS);
    }
    for (int i = 0; i < RINGS; i++) {
        mbarrier_init(&s.pt_full[i], WARPGROUP / WARP + SPREADERS / WARP);
        mbarrier_init(&s.out_full[i], STATE_WARPS);
        mbarrier_init(&s.out_free[i], 1);
    }
    mbarrier_init_fence();
}

/* What no copy brings: zeros above the diagonal blocks of T and P, and in a transition's v. */
static __device__ __forceinline__ void clear_blocks(ChainShared &s, int thread) {
    if (s.chain.way == GRADIENTS) {
        for (int i = 0; i < RINGS; i++) {
            clear_tile(&s.p[i], thread, FQLA__CHAINS_THREADS);
            clear_tile(&s.t[i], thread, FQLA__CHAINS_THREADS);
        }
    } else {
        for (int i = 0; i < SLOTS; i++) {
            clear_square(&s.states[i].t, thread, FQLA__CHAINS_THREADS);
            if (s.chain.way == TRANSITION) clear_tile(&s.states[i].v, thread, FQLA__CHAINS_THREADS);
        }
    }
    fence_proxy_async();
}

/* Nothing is taken and nothing has ended, before the next kernel starts. By the threads but for the first warp's, in the first pass of all
   blocks. */
static __device__ __forceinline__ void clear_progress(const fqla__backward_params &p, int thread) {
    const int64_t threads = FQLA__CHAINS_THREADS - WARP, first = blockIdx.x * threads + thread;
    if (p.first_pass)
        for (int64_t i = first; i <= (p.forward.table->chunks + 1) * p.forward.heads_qk; i += gridDim.x * threads) set_count(&p.progress[i], 0);
    else if (!p.overlaps && first == 0)
        set_count(taken_items(p), 0);
}

extern "C" __global__ void __launch_bounds__(FQLA__CHAINS_THREADS, 1)
#if defined(FLASHQLA_ELEMENT_BF16)
    backward_chains_bf16(const __grid_constant__ fqla__aligned_backward_params params)
#else
    backward_chains_fp16(const __grid_constant__ fqla__aligned_backward_params params)
#endif
{
    const fqla__backward_params &p = params.values;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    ChainShared &s = *(ChainShared *)shared_bytes;
    const int thread = (int)threadIdx.x;

    if (thread == 0) init_barriers(s);
    if (thread >= WARP && !p.overlaps) grid_wait();
    if (thread < WARP) { /* every lane the same, but that one writes */
        Chain chain;
        const bool found = find_chain(p, blockIdx.x, gridDim.x, thread, &chain);
        if (thread == 0) {
            s.chain = chain;
            s.idle = !found;
            if (p.overlaps && found && chain.from == FROM_KEPT) set_count(exact_flag(p, chain.segment.head_qk), 1);
        }
    }
    if (thread >= WARP) clear_progress(p, thread - WARP);
    __syncthreads();
    grid_launch_dependents(); /* not before: the kernels that overlap rely on what the first pass has waited for and done */
    if (s.idle) {
        if (blockIdx.x == 0) grid_wait(); /* as at the end */
        return;
    }
    if (s.chain.from == FROM_KEPT) grid_wait();
    clear_blocks(s, thread);
    __syncthreads();

    const int role = __shfl_sync(0xffffffffu, thread / WARPGROUP, 0);
    if (role == COPIES) {
        shrink_registers<COPIES_REGISTERS>();
        run_copies(p, s, thread % WARPGROUP);
    } else if (role == SCORES) {
        shrink_registers<SCORES_REGISTERS>();
        run_scores(p, s, thread % WARPGROUP);
    } else {
        grow_registers<STATE_REGISTERS>();
        if (s.chain.way == GRADIENTS) run_gradients(p, s, thread);
        else run_states(p, s, thread);
    }
    if (blockIdx.x == 0) grid_wait(); /* the next kernel takes this one's end for that of all before it */
}
