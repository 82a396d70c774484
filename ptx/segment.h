/* A block's segment: chunks [first, end) of a sequence, for one v-head. Whether it may start from zero some chunks early.

   The norm of a token's transition is at most alpha_t max(1, |1 - beta_t |k_t|^2|). Where the product of the norms of the w chunks
   before a segment is below the tolerance, what the state was before them reaches the segment no more: it is warm, and starts from
   zero w chunks early. Otherwise it is exact: its first state comes from the segments before it (states.cu, scan.cu).
   The answer follows from the head's own gates and the plan alone; every kernel that needs it works it out again. */
#ifndef FLASHQLA_SEGMENT_H
#define FLASHQLA_SEGMENT_H

#include "tile.h"

typedef struct Segment {
    int64_t row;        /* its sequence's first row in q, k, v, o, g, beta */
    int32_t len;        /* its sequence's tokens */
    int32_t first, end; /* its chunks, counted in its sequence */
    int64_t chunk;      /* its sequence's first chunk's number in the batch */
    int64_t snapshot;   /* its sequence's first entry in snapshots */
    int64_t kept;       /* its number among the segments of cut sequences, else -1 */
    int32_t index;      /* in its sequence */
    int32_t segments;   /* of its sequence */
    int32_t head, head_qk;
    int64_t in, out;    /* its sequence's entries of h0 and ht, counted in heads' states; -1: none */
    bool padding;       /* a padding row of a pool: o is zero, nothing else happens */
} Segment;

/* The slot of a sequence in a pool, -1 where there is none; counts what lies outside. */
static __device__ __forceinline__ int64_t pool_slot(const fqla__forward_params &p, const int32_t *slots, int64_t n, bool count) {
    const int32_t slot = slots[n];
    if (slot >= -1 && slot < p.pool_size) return slot;
    if (count && p.bad_index_count) atomicAdd(p.bad_index_count, 1u);
    return -1;
}

/* The number-th segment of the plan's table; false: there are not so many. count: this thread counts bad indices. */
static __device__ __forceinline__ bool find_segment(const fqla__forward_params &p, int64_t number, int head, bool count, Segment *segment) {
    const fqla__device_table *table = p.table;
    const fqla__device_sequence *sequences = (const fqla__device_sequence *)(table + 1);
    const fqla__device_segment *segments = (const fqla__device_segment *)(sequences + table->num_seqs);
    int64_t n = number;
    segment->kept = -1;
    segment->index = 0;
    segment->segments = 1;
    segment->head = head;
    segment->head_qk = p.head_map == 0 ? head / (p.heads_v / p.heads_qk) : head % p.heads_qk;
    if (p.decode_tokens > 0) {
        if (number >= table->num_seqs) return false;
        segment->row = n * p.decode_tokens;
        segment->len = p.decode_tokens;
        segment->chunk = n;
        segment->snapshot = 0;
        segment->first = 0;
        segment->end = 1;
    } else {
        if (number >= table->segments) return false;
        n = segments[number].sequence;
        const fqla__device_sequence sequence = sequences[n];
        const int32_t chunks = (int32_t)((sequence.len + CHUNK - 1) / CHUNK);
        segment->row = sequence.row;
        segment->len = (int32_t)sequence.len;
        segment->chunk = sequence.chunk;
        segment->snapshot = sequence.snapshot;
        segment->first = 0;
        segment->end = chunks;
        if (sequence.kept >= 0) {
            const int32_t step = (int32_t)table->segment_chunks;
            segment->kept = number;
            segment->index = segments[number].index;
            segment->segments = (chunks + step - 1) / step;
            segment->first = segment->index * step;
            segment->end = min(chunks, segment->first + step);
        }
    }
    segment->in = p.h0 ? n : -1;
    segment->out = p.ht ? n : -1;
    segment->padding = false;
    if (p.pool_size > 0) {
        count = count && head == 0 && segment->index == 0;
        segment->in = pool_slot(p, p.state_in, n, count);
        segment->out = pool_slot(p, p.state_out, n, count);
        segment->padding = segment->in < 0 && segment->out < 0;
    }
    if (segment->in >= 0) segment->in = segment->in * p.heads_v + head;
    if (segment->out >= 0) segment->out = segment->out * p.heads_v + head;
    return true;
}

/* The number of the first segment of cut sequence `cut`. */
static __device__ __forceinline__ int64_t first_of_cut(const fqla__device_table *table, int64_t cut) {
    const fqla__device_sequence *sequences = (const fqla__device_sequence *)(table + 1);
    const fqla__device_segment *segments = (const fqla__device_segment *)(sequences + table->num_seqs);
    return ((const int32_t *)(segments + table->segments))[cut];
}

/* How many chunks from `first` on, `step` by `step` and at most `most`, have transitions whose norms' product is below the tolerance; 0:
   not so many. By a whole warp. */
static __device__ __forceinline__ int forgetting_chunks(const fqla__forward_params &p, const Segment &segment, int first, int step, int most,
                                                        int lane) {
    float sum = 0.0f; /* NaN warms nothing up */
    for (int before = 0; before < most; before += WARP) {
        const int chunk = first + step * before + step * lane;
        const bool inside = before + lane < most;
        float norm = inside ? p.prepared[(segment.chunk + chunk) * p.heads_v + segment.head].factors.norm : 0.0f;
#pragma unroll
        for (int distance = 1; distance < WARP; distance *= 2) {
            const float nearer = __shfl_up_sync(0xffffffffu, norm, distance);
            if (lane >= distance) norm += nearer;
        }
        const uint32_t enough = __ballot_sync(0xffffffffu, inside && sum + norm < p.warm_up_log2);
        if (enough) return before + __ffs((int)enough);
        sum += __shfl_sync(0xffffffffu, norm, WARP - 1);
    }
    return 0;
}

/* How many chunks before chunk `boundary` of the segment's sequence a state may start from zero, up to a segment's length; 0: it may
   not. By a whole warp. */
static __device__ __forceinline__ int warm_up_chunks(const fqla__forward_params &p, const Segment &segment, int boundary, int lane) {
    return forgetting_chunks(p, segment, boundary - 1, -1, min(boundary, (int)p.table->segment_chunks), lane);
}

/* Of the chunks from `boundary` on, for the gradients of states, which come from behind. By a whole warp. */
static __device__ __forceinline__ int warm_down_chunks(const fqla__forward_params &p, const Segment &segment, int boundary, int lane) {
    const int chunks = (segment.len + CHUNK - 1) / CHUNK;
    return forgetting_chunks(p, segment, boundary, 1, min(chunks - boundary, (int)p.table->segment_chunks), lane);
}

#endif
