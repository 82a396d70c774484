/* The state's warpgroup of backward_chains forwards; the transition, which has no v, too. What a step needs from others it waits for
   while its products run; the next chunk's K S0 is issued as soon as the state is there, after the last one's once more, of whatever lies
   in the slot, and not used. A chunk's products in the order in which they are issued, and what the warps do meanwhile:

       K S0        V^T comes, S0's copy is staged
       T W         the state is scaled
       update      its operands are packed a step of 16 tokens ahead; Vn is staged */
#ifndef FLASHQLA_BACKWARD_CHAIN_FORWARDS_H
#define FLASHQLA_BACKWARD_CHAIN_FORWARDS_H

#include "backward_chain_state.h"

static __device__ void run_states(const fqla__backward_params &p, ChainShared &s, int thread) {
    const Chain &c = s.chain;
    const int numbers = uniform(c.numbers), silent = uniform(c.silent), lane = thread % WARP, warp = thread / WARP;
    const uint32_t first_slot = shared_units(s.states);
    const Lane place = find_lane(thread);
    const uint32_t rows = operand_place(warp, lane);
    Ring ring = {0, 0}, ring_out = {0, 0};
    float state[64], ks[32];
    uint32_t state16[32];

    start_state(p, c, state, p.forward.h0, FQLA__CARRIED_H0, p.forward.states, thread);
    pack_operand(state16, state);
    wait_chunk(s, ring, 0, numbers);
#pragma unroll
    for (int i = 0; i < 32; i++) ks[i] = 0.0f;
    wgmma_fence();
    multiply_rows_again(ks, state16, first_slot);
    wgmma_commit();
    for (int number = 0; number < numbers; number++) {
        const uint32_t units = first_slot + ring.slot * (sizeof(StatesSlot) / 16);
        const StatesSlot &in = s.states[ring.slot];
        OutSlot &out = s.out[ring_out.slot];
        const Ring now = ring;
        uint32_t v16[16], w16[16], update16[16];
        ring_next<SLOTS>(ring);

        load_v(v16, &in.v, place);
        if (number >= silent) {
            if (number >= silent + RINGS) mbarrier_wait(&s.out_free[ring_out.slot], ring_out.phase ^ 1);
            stage_state(state16, out.state, rows);
        }
        wgmma_wait<0>();
        wgmma_settle(ks);
        start_vn(ks, w16, v16, in.factors, place); /* w16 is W until Vn is there */
        wgmma_fence();
        multiply_square(ks, w16, units + offsetof(StatesSlot, t) / 16);
        wgmma_commit();
        scale_state(state, in.factors.gamma_chunk);
        wgmma_wait<0>();
        wgmma_settle(ks);
        start_update(state, w16, update16, ks, in.factors.update, units, place);
        wgmma_commit();
        if (number >= silent) stage_rows(w16, &out.rows, place);
        wgmma_wait<0>();
        wgmma_settle(state);
        arrive_warp(&s.free[now.slot], lane);
        pack_operand(state16, state);
        wait_chunk(s, ring, number + 1, numbers);
        wgmma_fence();
        multiply_rows_again(ks, state16, first_slot + ring.slot * (sizeof(StatesSlot) / 16));
        wgmma_commit();
        if (number >= silent) {
            fence_proxy_async(); /* S0 and Vn go to the copy engine */
            arrive_warp(&s.out_full[ring_out.slot], lane);
            ring_next<RINGS>(ring_out);
        }
    }
    wgmma_wait<0>();
    if (c.keeps) {
        const int64_t kept = c.segment.kept * p.forward.heads_v + c.segment.head;
        if (c.way == TRANSITION) store_transition(state, &p.forward.transitions[kept], c.half, warp, lane);
        else store_kept(state, &p.forward.states[kept], c.half, thread);
    } else if (c.carries) {
        StatePlace to = state_place(p.forward, c.half * STATE_COLUMNS, thread);
        to.bf16 = false;
        store_state(state, p.carry, c.entry, to);
    }
}

#endif
