/* The chunked forward of the gated delta rule on Hopper, after kernel prepare: the sequential part, from q, k, v, T to o and ht.

   The maths, a chunk of C = 64 tokens (G the running sum of g inside it, gamma_i = exp(G_i), gamma_C the last):

       A = (I + strict_tril(diag(beta) K K^T))^-1       T_ij = exp(G_i - G_j) A_ij beta_j     P_ij = exp(G_i - G_j) (Q K^T)_ij    (i >= j)
       W = V - diag(gamma) K S0                         Vn = T W
       O = scale (diag(gamma) Q S0 + P Vn)              S1 = gamma_C S0 + K^T diag(gamma_C / gamma) Vn

   A block is a sequence's v-head on one multiprocessor. Roles of its three warpgroups:

       state 0, state 1    64 of the 128 state columns each, S^T in registers          forward_state.h     208 registers
       scores              P, ahead of the state                                       forward_scores.h     88 registers

   There is no loading warp: the last reader of a slot of shared memory issues its refill.

       copy engine   q k T(c+2) | v(c+1) |
       scores                   Q K^T, P of c+1 |
       state                    K S0(c) -> W -> T W -> update -> K S0(c+1) ...
                                           Q S0(c)  P Vn -> O out, under K S0(c+1)

   Shared memory: forward_shared.h has the map in bytes. Cost and floor: LADDER.md. */
#include <stddef.h>

#include "forward_scores.h"
#include "forward_shared.h"
#include "forward_state.h"

enum Role { STATE_0, STATE_1, SCORES };
enum { STATE_REGISTERS = 208, SCORES_REGISTERS = 88 };
static_assert(FQLA__FORWARD_THREADS == 3 * WARPGROUP, "a warpgroup a role");
static_assert(2 * STATE_REGISTERS + SCORES_REGISTERS <= 504, "three warpgroups share 504 registers a thread triple");

/* The slot of a sequence in a pool, -1 where there is none; counts what lies outside. */
static __device__ __forceinline__ int64_t pool_slot(const fqla__forward_params &p, const int32_t *slots, int64_t n, bool count) {
    const int32_t slot = slots[n];
    if (slot >= -1 && slot < p.pool_size) return slot;
    if (count && p.bad_index_count) atomicAdd(p.bad_index_count, 1u);
    return -1;
}

static __device__ __forceinline__ void zero_output(const fqla__forward_params &p, const Sequence &sequence, int thread) {
    for (int64_t unit = thread; unit < (int64_t)sequence.len * (DIM / 8); unit += FQLA__FORWARD_THREADS)
        *(uint4 *)((uint16_t *)p.o + (sequence.row + unit / (DIM / 8)) * p.o_token + sequence.head * p.o_head + unit % (DIM / 8) * 8) =
            make_uint4(0, 0, 0, 0);
}

static __device__ __forceinline__ void init_shared(ForwardShared &s, int thread) {
    if (thread == 0) {
        for (int i = 0; i < CHUNK_SLOTS; i++) {
            mbarrier_init(&s.chunk_full[i], 1);
            mbarrier_init(&s.chunk_free[i], STATE_WARPS);
        }
        for (int i = 0; i < V_SLOTS; i++)
            for (int w = 0; w < STATE_WARPGROUPS; w++) {
                mbarrier_init(&s.v_full[i][w], 1);
                mbarrier_init(&s.v_free[i][w], STATE_WARPS / STATE_WARPGROUPS);
            }
        for (int i = 0; i < P_SLOTS; i++) {
            mbarrier_init(&s.p_full[i], WARPGROUP / WARP);
            mbarrier_init(&s.p_free[i], STATE_WARPS);
        }
        mbarrier_init_fence();
    }
    for (int unit = thread; unit < (int)(sizeof s.p / 16); unit += FQLA__FORWARD_THREADS) /* above its diagonal blocks P stays zero */
        ((uint4 *)s.p)[unit] = make_uint4(0, 0, 0, 0);
}

extern "C" __global__ void __launch_bounds__(FQLA__FORWARD_THREADS, 1)
#if defined(FLASHQLA_ELEMENT_BF16)
    forward_bf16(const __grid_constant__ fqla__aligned_params params)
#else
    forward_fp16(const __grid_constant__ fqla__aligned_params params)
#endif
{
    const fqla__forward_params &p = params.values;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    ForwardShared &s = *(ForwardShared *)shared_bytes;
    const int64_t n = blockIdx.x / (uint32_t)p.heads_v;
    const int thread = (int)threadIdx.x;
    Sequence sequence;

    if (n >= p.table[0]) return;
    sequence.in = p.h0 ? n : -1;
    sequence.out = p.ht ? n : -1;
    sequence.head = (int32_t)(blockIdx.x % (uint32_t)p.heads_v);
    sequence.head_qk = p.head_map == 0 ? sequence.head / (p.heads_v / p.heads_qk) : sequence.head % p.heads_qk;
    if (p.decode_tokens > 0) {
        sequence.row = n * p.decode_tokens;
        sequence.len = p.decode_tokens;
        sequence.chunk = n;
        sequence.snapshot = 0;
    } else {
        const fqla__device_sequence *entry = (const fqla__device_sequence *)(p.table + 2) + n;
        sequence.row = entry->row;
        sequence.len = (int32_t)entry->len;
        sequence.chunk = entry->chunk;
        sequence.snapshot = entry->snapshot;
    }
    sequence.chunks = (sequence.len + CHUNK - 1) / CHUNK;
    if (p.pool_size > 0) {
        const bool count = sequence.head == 0 && thread == 0;
        sequence.in = pool_slot(p, p.state_in, n, count);
        sequence.out = pool_slot(p, p.state_out, n, count);
        if (sequence.in < 0 && sequence.out < 0) { /* a padding row */
            zero_output(p, sequence, thread);
            return;
        }
    }
    if (sequence.in >= 0) sequence.in = sequence.in * p.heads_v + sequence.head;
    if (sequence.out >= 0) sequence.out = sequence.out * p.heads_v + sequence.head;

    init_shared(s, thread);
    if (thread == 0) s.sequence = sequence;
    fence_proxy_async();
    __syncthreads();
    if (thread == 0) {
        for (int chunk = 0; chunk < min(CHUNK_SLOTS, sequence.chunks); chunk++) load_chunk(p, s, sequence, chunk);
        for (int chunk = 0; chunk < min(V_SLOTS, sequence.chunks); chunk++)
            for (int w = 0; w < STATE_WARPGROUPS; w++) load_v(p, s, sequence, chunk, w);
    }
    const int role = __shfl_sync(0xffffffffu, thread / WARPGROUP, 0);
    if (role == SCORES) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"((int)SCORES_REGISTERS));
        run_scores(p, s, thread % WARPGROUP);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"((int)STATE_REGISTERS));
        run_state(p, s, role, thread % WARPGROUP);
    }
}
