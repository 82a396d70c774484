// >>cuda_table: what a plan's tables on the device say of its sequences (cuda_params.h)

/* The most cut sequences of num_seqs with so many segments: each has one more than an uncut one at least. */
static int64_t fqla__cuda_most_cut(int64_t num_seqs, int64_t segments) {
    return segments - num_seqs < num_seqs ? segments - num_seqs : num_seqs;
}

/* Bytes of the list of the cut sequences' first segments: to a multiple of 8. */
static size_t fqla__cuda_cut_bytes(int64_t num_seqs, int64_t segments) {
    return (size_t)fqla__round_up(fqla__cuda_most_cut(num_seqs, segments) * (int64_t)sizeof(int32_t), 8);
}

/* Bytes of the table of num_seqs sequences and so many segments. */
static size_t fqla__cuda_table_size(int64_t num_seqs, int64_t segments) {
    return sizeof(fqla__device_table) + (size_t)num_seqs * sizeof(fqla__device_sequence) + (size_t)segments * sizeof(fqla__device_segment) +
           fqla__cuda_cut_bytes(num_seqs, segments);
}

/* The longer sequence first, of equals the first. While it is sorted an entry's index is its sequence's length. */
static int fqla__compare_segments(const void *a, const void *b) {
    const fqla__device_segment *x = (const fqla__device_segment *)a, *y = (const fqla__device_segment *)b;
    if (x->index != y->index) return x->index > y->index ? -1 : 1;
    return x->sequence < y->sequence ? -1 : 1;
}

/* The last of putting a table together: its uncut sequences' segments, entered with their lengths as indices, in their order, and the
   list of the cut ones. The table's bytes. */
static size_t fqla__cuda_order_segments(fqla__device_table *table, int64_t count) {
    fqla__device_segment *segments = (fqla__device_segment *)((fqla__device_sequence *)(table + 1) + table->num_seqs);
    int32_t *cut = (int32_t *)(void *)(segments + count);
    int64_t i;
    table->segments = count;
    qsort(segments + table->kept, (size_t)(count - table->kept), sizeof *segments, fqla__compare_segments);
    for (i = table->kept; i < count; i++) segments[i].index = 0;
    memset(cut, 0, fqla__cuda_cut_bytes(table->num_seqs, count));
    table->cut = 0;
    for (i = 0; i < table->kept; i++)
        if (segments[i].index == 0) cut[table->cut++] = (int32_t)i;
    return fqla__cuda_table_size(table->num_seqs, count);
}

/* Put the table of these sequences together; its bytes. cu_seqlens NULL: all have padded_len tokens. */
static size_t fqla__cuda_fill_table(const fqla_plan *plan, fqla__device_table *table, int32_t num_seqs, const int32_t *cu_seqlens,
                                    int32_t segment_chunks) {
    const fqla_plan_desc *d = &plan->desc;
    const int64_t every = (int64_t)FLASHQLA_CHUNK * d->checkpoint_every;
    fqla__device_sequence *sequences = (fqla__device_sequence *)(table + 1), *sequence;
    fqla__device_segment *segments = (fqla__device_segment *)(sequences + num_seqs);
    int64_t snapshot = 0, chunk = 0, count = 0, length, first;
    int32_t n;
    for (n = 0; n < num_seqs; n++) {
        sequence = &sequences[n];
        sequence->len = cu_seqlens != NULL ? cu_seqlens[n + 1] - cu_seqlens[n] : d->padded_len;
        sequence->row = d->padded_len > 0 ? (int64_t)n * d->padded_len : cu_seqlens[n];
        sequence->chunk = chunk;
        sequence->snapshot = snapshot;
        sequence->kept = -1;
        length = fqla__ceil_div(sequence->len, FLASHQLA_CHUNK);
        chunk += length;
        snapshot += every > 0 ? sequence->len / every : 0;
        if (segment_chunks == 0 || length <= segment_chunks) continue;
        sequence->kept = count;
        for (first = 0; first < length; first += segment_chunks) {
            segments[count].sequence = n;
            segments[count++].index = (int32_t)(first / segment_chunks);
        }
    }
    table->num_seqs = num_seqs;
    table->chunks = chunk;
    table->kept = count;
    table->segment_chunks = segment_chunks;
    for (n = 0; n < num_seqs; n++)
        if (sequences[n].kept < 0) {
            segments[count].sequence = n;
            segments[count++].index = (int32_t)sequences[n].len;
        }
    return fqla__cuda_order_segments(table, count);
}
