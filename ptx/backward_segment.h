/* What a block of kernel backward_chains walks: a part of a sequence, for one v-head and half of V, in one of three ways.

   The forward's states go from a sequence's first segment to its last, the gradients of the states from the last to the first. Both
   are cut at the same borders, and each asks for itself whether what lies beyond a border has been forgotten (segment.h): the
   states look at the chunks before it, their gradients at those after it, whose transitions' transposes have the same norms. Where
   it has been, the block starts from zero some chunks early. Elsewhere it starts from the exact state or gradient, which a first
   pass and kernel backward_scan have made:

       first pass      S_loc, the segment's last state from zero (from h0 in the first segment; a warm one needs no more)
                       dS_loc, likewise backwards, from dht
                       M, the transition, where one of the two will be carried over the segment: S = M S_in + S_loc, and
                       dS_in = M^T dS + dS_loc

   A low_memory plan gives parts of a sequence one by one, each as a sequence of its own: h0, dht and dh0 are then states that one part
   hands to another, and the passes over the states run once before, alone, for nothing but the parts' last states (p.carry). */
#ifndef FLASHQLA_BACKWARD_SEGMENT_H
#define FLASHQLA_BACKWARD_SEGMENT_H

#include "../src/cuda_backward_params.h"
#include "grid.h"
#include "segment.h"

enum { STATE_COLUMNS = 64, HALVES = DIM / STATE_COLUMNS };
enum { STATES, GRADIENTS, TRANSITION, WAYS };                /* which way a block goes */
enum { FROM_ZERO, FROM_GIVEN, FROM_KEPT, FROM_IDENTITY };    /* what it starts from */

typedef struct Chain {
    Segment segment;
    int64_t entry;    /* of h0, dht, dh0, counted in heads' states */
    int32_t way, half;
    int32_t from;
    int32_t start;    /* the chunk where it starts; it goes on to the next or to the one before */
    int32_t numbers;  /* chunks that it walks */
    int32_t silent;   /* the first so many leave nothing: a warm-up, or all of the first pass */
    int32_t part;     /* the number of the chunk that is not whole, else -1 */
    int32_t keeps;    /* first pass: where it ends goes to the workspace */
    int32_t carries;  /* where it ends goes to the next part of its sequence */
} Chain;

static __device__ __forceinline__ int chunk_of(const Chain &c, int number) {
    return c.way == GRADIENTS ? c.start - number : c.start + number;
}

/* What block `block` does; false: nothing. By a whole warp, which waits for the kernels before once it needs them.

   The blocks in sections, those that take longest first:

       first pass           gradients | states | transitions
       main pass            gradients | states
       beside the first     gradients from zero or dht | from what was kept | states from what was kept | from zero or h0

   Those from what was kept hold their multiprocessors while they wait for the scan, so that they begin as soon as they can: the whole
   waits for them. */
static __device__ __forceinline__ bool find_chain(const fqla__backward_params &p, uint32_t block, uint32_t blocks, int lane,
                                                  Chain *c) {
    const fqla__forward_params &f = p.forward;
    const bool first_pass = p.first_pass != 0;
    const bool carries = p.carry != NULL, overlaps = p.overlaps != 0;
    const uint32_t of_a_way = blocks / (first_pass ? WAYS : carries ? 1 : overlaps ? 4 : 2), section = block / of_a_way;
    const uint32_t rest = block % of_a_way, parts = (uint32_t)f.heads_v * HALVES;
    const int64_t number = rest / parts;
    Segment &segment = c->segment;
    c->way = carries ? STATES : section == 0 || (overlaps && section == 1) ? GRADIENTS : first_pass && section == 2 ? TRANSITION : STATES;
    c->half = (int32_t)(rest % HALVES);
    if (number >= (first_pass ? f.table->kept : f.table->segments)) return false;
    find_segment(f, number, (int)(rest % parts / HALVES), false, &segment);
    if (!overlaps) grid_wait();
    const fqla__device_sequence *sequences = (const fqla__device_sequence *)(f.table + 1);
    const fqla__device_segment *segments = (const fqla__device_segment *)(sequences + f.table->num_seqs);
    c->entry = segments[number].sequence * (int64_t)f.heads_v + segment.head;
    c->keeps = first_pass;
    c->carries = carries;

    const bool is_first = segment.index == 0, is_last = segment.index == segment.segments - 1;
    int warm = 0;
    if (c->way == GRADIENTS) {
        if (first_pass && (is_first || warm_down_chunks(f, segment, segment.first, lane) > 0)) return false;
        if (!is_last) warm = warm_down_chunks(f, segment, segment.end, lane);
        c->from = is_last ? FROM_GIVEN : first_pass || warm > 0 ? FROM_ZERO : FROM_KEPT;
        c->start = segment.end - 1 + warm;
        c->numbers = c->start - segment.first + 1;
    } else {
        if (c->way == STATES) {
            if (first_pass && (is_last || warm_up_chunks(f, segment, segment.end, lane) > 0)) return false;
            if (!is_first) warm = warm_up_chunks(f, segment, segment.first, lane);
            c->from = is_first ? FROM_GIVEN : first_pass || warm > 0 ? FROM_ZERO : FROM_KEPT;
        } else {
            if (is_first || is_last) return false;
            const bool up = warm_up_chunks(f, segment, segment.first, lane) == 0 &&
                            warm_up_chunks(f, segment, segment.end, lane) == 0;
            const bool down = warm_down_chunks(f, segment, segment.first, lane) == 0 &&
                              warm_down_chunks(f, segment, segment.end, lane) == 0;
            if (!up && !down) return false;
            c->from = FROM_IDENTITY;
        }
        c->start = segment.first - warm;
        c->numbers = segment.end - c->start;
    }
    if (overlaps && (c->from == FROM_KEPT) != (section == 1 || section == 2)) return false;
    c->silent = first_pass || carries ? c->numbers : warm;
    const int part = segment.len / CHUNK, part_number = c->way == GRADIENTS ? c->start - part : part - c->start;
    c->part = segment.len % CHUNK > 0 && part_number >= 0 && part_number < c->numbers ? part_number : -1;
    return true;
}

#endif
