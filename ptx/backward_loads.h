/* The loads of backward_gradients, by a warp of its own, so that no producer waits for a place: it takes items and finds out where they
   lie, as late as their loads allow, and one thread has the copy engine bring what the producers have made room for. */
#ifndef FLASHQLA_BACKWARD_LOADS_H
#define FLASHQLA_BACKWARD_LOADS_H

#include "backward_shared.h"
#include "grid.h"

/* Step n's first part: v-head h of the block's item, h counted on into the next. Where passes overlap, once the chains of all of the item's
   v-heads have ended. Where there is no item, word of that. */
static __device__ __forceinline__ void load_first(const fqla__backward_params &p, GradientsShared &s, int item, int h, int n) {
    const int heads = p.forward.heads_v / p.forward.heads_qk;
    if (h >= heads) h -= heads, item++;
    const Place &place = s.places[item % PLACES];
    uint64_t *full = &s.first_full[n % 2];
    if (place.valid == 0) {
        if (h == 0) mbarrier_arrive(full);
        return;
    }
    if (p.overlaps && h == 0) wait_count(ended_chains(p, place.segment, place.head_qk), 4 * heads);
    const int64_t entry = place.number * p.forward.heads_v + group_head(p.forward, place.head_qk, h);
    mbarrier_arrive_expect(full, sizeof(FirstPart) + sizeof(fqla__factors));
    bulk_load(&s.first[n % 2], p.chunks[entry].ds, sizeof(FirstPart), full);
    bulk_load(&s.factors[n % 3], &p.forward.prepared[entry].factors, sizeof(fqla__factors), full);
}

/* Its second. */
static __device__ __forceinline__ void load_second(const fqla__backward_params &p, GradientsShared &s, int item, int h) {
    const int heads = p.forward.heads_v / p.forward.heads_qk;
    if (h >= heads) h -= heads, item++;
    const Place &place = s.places[item % PLACES];
    const int head = group_head(p.forward, place.head_qk, h);
    if (place.valid == 0) return;
    mbarrier_arrive_expect(&s.second_full, sizeof(SecondPart));
    bulk_load(s.second.s, p.chunks[place.number * p.forward.heads_v + head].s, sizeof s.second.s, &s.second_full);
    for (int half = 0; half < 2; half++) {
        tma_load(&s.second.dout[half], &p.forward.o, half * FQLA__LOAD_COLUMNS, (int32_t)place.row, head, &s.second_full);
        tma_load(&s.second.dw[half], &p.dv, half * FQLA__LOAD_COLUMNS, (int32_t)place.row, head, &s.second_full);
    }
}

static __device__ __forceinline__ void load_chunk_rows(const fqla__backward_params &p, GradientsShared &s, const Place &place) {
    if (place.valid == 0) return;
    mbarrier_arrive_expect(&s.k_full, sizeof s.k);
    for (int half = 0; half < 2; half++)
        tma_load(&s.k[half], &p.forward.k, half * FQLA__LOAD_COLUMNS, (int32_t)place.row, place.head_qk, &s.k_full);
    mbarrier_arrive_expect(&s.q_full, sizeof s.q);
    for (int half = 0; half < 2; half++)
        tma_load(&s.q[half], &p.forward.q, half * FQLA__LOAD_COLUMNS, (int32_t)place.row, place.head_qk, &s.q_full);
}

/* dq and dk leave by way of the place of the item's last first part, to which the next load goes. Parts of chunks have left. */
static __device__ __forceinline__ void send_gradients(const fqla__backward_params &p, const FirstPart &first, const Place &place) {
    if (place.valid < CHUNK) return;
    for (int half = 0; half < 2; half++) {
        tma_store(&p.dq, half * FQLA__LOAD_COLUMNS, (int32_t)place.row, place.head_qk, &first.ds[0][half]);
        tma_store(&p.dk, half * FQLA__LOAD_COLUMNS, (int32_t)place.row, place.head_qk, &first.ds[1][half]);
    }
    bulk_commit();
    bulk_store_wait<0>();
}

/* The block's item number `item`; after one that is none there are no more. */
static __device__ __forceinline__ void find_item(const fqla__backward_params &p, GradientsShared &s, int item, int lane) {
    int32_t number = (int32_t)blockIdx.x;
    if (item > 0 && lane == 0) number = (int32_t)gridDim.x + take_number(taken_items(p));
    const Place place = find_place(p, __shfl_sync(0xffffffffu, number, 0), lane);
    if (lane == 0) s.places[item % PLACES] = place;
    __syncwarp();
}

static __device__ void run_loads(const fqla__backward_params &p, GradientsShared &s, int lane) {
    const int heads = p.forward.heads_v / p.forward.heads_qk, ahead = heads > 1 ? 1 : 2; /* items whose loads begin during one */
    find_item(p, s, 0, lane);
    if (!p.overlaps) grid_wait();
    if (ahead > 1) find_item(p, s, 1, lane);
    if (lane == 0) {
        load_chunk_rows(p, s, s.places[0]);
        load_first(p, s, 0, 0, 0);
        load_second(p, s, 0, 0);
        if (s.places[0].valid > 0) load_first(p, s, 0, 1, 1);
    }
    for (int item = 0, n = 0; s.places[item % PLACES].valid > 0; item++) {
        __syncwarp();
        find_item(p, s, item + ahead, lane);
        if (lane == 0) {
            for (int h = 0; h < heads; h++) {
                mbarrier_wait(&s.second_used, (n + h) % 2);
                load_second(p, s, item, h + 1);
                mbarrier_wait(&s.first_used[(n + h) % 2], (n + h) / 2 % 2);
                if (h + 1 < heads) load_first(p, s, item, h + 2, n + h + 2);
            }
            mbarrier_wait(&s.qk_free, item % 2);
            load_chunk_rows(p, s, s.places[(item + 1) % PLACES]);
            mbarrier_wait(&s.gradients_full[item % 2], item / 2 % 2);
            send_gradients(p, s.first[(n + heads - 1) % 2], s.places[item % PLACES]);
            if (s.places[(item + 1) % PLACES].valid > 0) load_first(p, s, item + 1, 1, n + heads + 1);
        }
        n += heads;
    }
}

#endif
