/* dA_log and ddt_bias of a v-head, from the shares that kernel backward_gradients has left of every chunk: a block a v-head, in one
   order whatever the grid did. */
#include "../src/cuda_backward_params.h"
#include "grid.h"

enum { THREADS = FQLA__SUMS_THREADS };

extern "C" __global__ void __launch_bounds__(FQLA__SUMS_THREADS, 1)
    backward_sums(const __grid_constant__ fqla__aligned_backward_params params) {
    const fqla__backward_params &p = params.values;
    __shared__ double sums[2][THREADS];
    const int thread = (int)threadIdx.x, heads = p.forward.heads_v, head = (int)blockIdx.x;
    double dA_log = 0.0, ddt_bias = 0.0;
    grid_wait();
    for (int64_t chunk = thread; chunk < p.forward.table->chunks; chunk += THREADS) {
        const float2 share = *(const float2 *)&p.gate_sums[(chunk * heads + head) * 2];
        dA_log += share.x;
        ddt_bias += share.y;
    }
    sums[0][thread] = dA_log;
    sums[1][thread] = ddt_bias;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (thread < half)
            for (int i = 0; i < 2; i++) sums[i][thread] += sums[i][thread + half];
        __syncthreads();
    }
    if (thread == 0) {
        p.dA_log[head] = (float)sums[0][0];
        p.ddt_bias[head] = (float)sums[1][0];
    }
}
