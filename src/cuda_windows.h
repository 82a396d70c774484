// >>cuda_windows: how a low_memory plan's backward goes through the tokens
//
// A window is a run of whole sequences, or a part of one that is longer than a window. Its table on the device describes it as a batch
// of its own. A sequence's parts hand states to one another: first from the first to the last, over the states alone, which leaves
// every part's first state in the workspace; then from the last to the first, where a part gives the one before it the gradient of the
// state between them.
//
// Bytes of a window of w chunks: w (80 KB + 6.5 KB) a v-head; of the parts' states, c / w 64 KB a v-head for c chunks. Their sum is least
// where both are equal. Shorter windows than 512 chunks of a v-head would leave a GPU idle.

enum { FQLA__LEAST_WINDOW = 512 }; /* chunks times v-heads */

typedef struct fqla__window {
    int32_t first, count;  /* its sequences */
    int64_t chunk, chunks; /* its first chunk's number in the batch; how many */
    int32_t part, parts;   /* of a sequence that is longer than a window; 0 of 1: whole sequences */
    size_t table;          /* where its table lies, in bytes from the first table */
} fqla__window;

static int64_t fqla__plan_chunks(const fqla_plan *plan, int32_t n) {
    return fqla__ceil_div((int64_t)plan->cu_seqlens[n + 1] - plan->cu_seqlens[n], FLASHQLA_CHUNK);
}

/* The most chunks of a window. */
static int64_t fqla__window_chunks(const fqla_plan *plan) {
    const double entry = (double)(sizeof(fqla__chunk_states) + sizeof(fqla__prepared_chunk));
    const int64_t least = fqla__ceil_div(FQLA__LEAST_WINDOW, plan->desc.heads_v);
    int64_t longest = 0, chunks;
    int32_t n;
    for (n = 0; n < plan->num_seqs; n++)
        if (fqla__plan_chunks(plan, n) > longest) longest = fqla__plan_chunks(plan, n);
    chunks = (int64_t)sqrt((double)longest * (double)sizeof(fqla__kept_state) / entry);
    return chunks > least ? chunks : least;
}

static fqla__window fqla__before_windows(const fqla_plan *plan) {
    fqla__window window;
    memset(&window, 0, sizeof window);
    window.table = plan->cuda.window_tables;
    return window;
}

/* On to the next window; false: there is none. most: fqla__window_chunks. */
static bool fqla__next_window(const fqla_plan *plan, int64_t most, fqla__window *window) {
    int64_t length;
    if (window->count > 0) window->table += fqla__cuda_table_size(window->count, window->count);
    window->chunk += window->chunks;
    if (window->part + 1 < window->parts) {
        length = fqla__plan_chunks(plan, window->first);
        window->part++;
        window->chunks = length - window->part * most < most ? length - window->part * most : most;
        return true;
    }
    window->first += window->count;
    if (window->first == plan->num_seqs) return false;
    length = fqla__plan_chunks(plan, window->first);
    window->part = 0;
    window->parts = (int32_t)fqla__ceil_div(length, most);
    window->count = 1;
    window->chunks = length < most ? length : most;
    if (window->parts > 1) return true;
    window->parts = 1;
    while (window->first + window->count < plan->num_seqs) {
        length = fqla__plan_chunks(plan, window->first + window->count);
        if (window->chunks + length > most) break;
        window->chunks += length;
        window->count++;
    }
    return true;
}

/* What the workspace and the tables are sized by. */
typedef struct fqla__window_measure {
    int64_t chunks; /* the most of a window */
    int32_t parts;  /* the most of a sequence */
    size_t tables;  /* bytes from the first table of the plan to the end of the last window's */
} fqla__window_measure;

static fqla__window_measure fqla__measure_windows(const fqla_plan *plan) {
    const int64_t most = fqla__window_chunks(plan);
    fqla__window window = fqla__before_windows(plan);
    fqla__window_measure measure = {0, 1, 0};
    while (fqla__next_window(plan, most, &window)) {
        if (window.chunks > measure.chunks) measure.chunks = window.chunks;
        if (window.parts > measure.parts) measure.parts = window.parts;
    }
    measure.tables = window.table;
    return measure;
}

/* Put the windows' tables together behind the others in `tables`; the bytes of all. */
static size_t fqla__fill_windows(const fqla_plan *plan, fqla__device_table *tables) {
    const fqla_plan_desc *d = &plan->desc;
    const int64_t most = fqla__window_chunks(plan), part_rows = most * FLASHQLA_CHUNK;
    fqla__window window = fqla__before_windows(plan);
    while (fqla__next_window(plan, most, &window)) {
        fqla__device_table *table = (fqla__device_table *)(void *)((char *)tables + window.table);
        fqla__device_sequence *sequences = (fqla__device_sequence *)(table + 1);
        fqla__device_segment *segments = (fqla__device_segment *)(sequences + window.count);
        int64_t chunk = 0;
        int32_t i;
        memset(table, 0, sizeof *table);
        table->num_seqs = window.count;
        table->chunks = window.chunks;
        for (i = 0; i < window.count; i++) {
            const int32_t n = window.first + i;
            const int64_t before = window.part * part_rows, rest = (int64_t)plan->cu_seqlens[n + 1] - plan->cu_seqlens[n] - before;
            memset(&sequences[i], 0, sizeof sequences[i]);
            sequences[i].row = (d->padded_len > 0 ? (int64_t)n * d->padded_len : plan->cu_seqlens[n]) + before;
            sequences[i].len = window.parts > 1 && rest > part_rows ? part_rows : rest;
            sequences[i].chunk = chunk;
            sequences[i].kept = -1;
            chunk += fqla__ceil_div(sequences[i].len, FLASHQLA_CHUNK);
            segments[i].sequence = i;
            segments[i].index = (int32_t)sequences[i].len;
        }
        fqla__cuda_order_segments(table, window.count);
    }
    return window.table;
}
