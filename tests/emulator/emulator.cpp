/* The coroutines, and what is under way beside them. */
#include "emulator.h"
#include "../fake_cuda.h"
#include "launch.h"
#include <functional>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>
#include <vector>

enum { MOST_THREADS = 1024, STACK_BYTES = 1 << 17, SHARED_BYTES = 232448, WARP = 32, WARPGROUP = 128, BARRIERS = 16 };

emulator_index threadIdx, blockIdx, gridDim;
alignas(1024) unsigned char shared_bytes[SHARED_BYTES];

/* ---- the block */

/* Some threads' meeting: the last to come begins its next round. */
struct meeting {
    int come;
    uint32_t round;
};

struct store {
    std::function<void()> run;
    int group;
};

struct thread {
    ucontext_t context;
    bool ended;
    const uint32_t *round; /* waits for another than `seen`; NULL: does not */
    uint32_t seen;
    const uint64_t *barrier; /* waits for its phase of this parity to end; NULL: does not */
    uint32_t parity;
    int asleep; /* until that turn */
    size_t products; /* issued, as its warpgroup's other threads have or will */
    int product_group;
    std::vector<store> stores;
    int store_group;
};

struct warp {
    meeting meet;
    uint64_t values[2][WARP];
};

struct product {
    emulator_product what;
    int group, given;
    float *d[WARPGROUP];
    uint32_t a[WARPGROUP][4];
};

struct warpgroup {
    meeting meet;
    std::vector<product> products;
    size_t done;
};

struct arrival {
    std::function<void()> run;
    int turn;
};

static thread threads[MOST_THREADS];
static warp warps[MOST_THREADS / WARP];
static warpgroup warpgroups[MOST_THREADS / WARPGROUP];
static meeting barriers[BARRIERS];
static std::vector<arrival> under_way;
static ucontext_t scheduler;
static unsigned char *stacks;
static int thread_count, this_thread, turn;
static int slow; /* a warpgroup or a warp of it that seldom has its turn, by its first thread; -1: none */
static int slow_threads;
static std::function<void()> kernel;
static uint64_t random_state;

/* Sebastiano Vigna's splitmix64, below a bound. */
static int below(int bound) {
    uint64_t z = random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (int)((z ^ z >> 31) % (uint64_t)bound);
}

static void leave() { swapcontext(&threads[this_thread].context, &scheduler); }

static void meet(meeting *m, int count) {
    thread &t = threads[this_thread];
    if (++m->come == count) {
        m->come = 0;
        m->round++;
        return;
    }
    t.round = &m->round;
    t.seen = m->round;
    leave();
    t.round = NULL;
}

void emulator_meet_warp() { meet(&warps[this_thread / WARP].meet, WARP); }
void emulator_meet_block() { meet(&barriers[0], thread_count); }
void emulator_meet_named(int number, int count) { meet(&barriers[number], count); }

/* Two sets of values in turn: who reads this one's has not come to the next meeting. */
const uint64_t *emulator_exchange(uint64_t value) {
    warp &w = warps[this_thread / WARP];
    uint64_t *values = w.values[w.meet.round % 2];
    values[this_thread % WARP] = value;
    emulator_meet_warp();
    return values;
}

void emulator_start_barrier(uint64_t *barrier, uint32_t arrivals) {
    *barrier = (uint64_t)arrivals << 48 | (uint64_t)arrivals << 32;
}

void emulator_take(uint64_t *barrier, uint32_t arrivals, int32_t bytes) {
    const uint64_t made_for = *barrier >> 48 & 0x7fff;
    const uint32_t rest = (uint32_t)*barrier - (uint32_t)bytes;
    uint64_t phase = *barrier >> 63, to_come = (*barrier >> 32 & 0xffff) - arrivals;
    if (to_come == 0 && rest == 0) phase ^= 1, to_come = made_for;
    *barrier = phase << 63 | made_for << 48 | to_come << 32 | rest;
}

static bool has_ended(const uint64_t *barrier, uint32_t parity) { return *barrier >> 63 != parity; }

void emulator_wait_barrier(const uint64_t *barrier, uint32_t parity) {
    thread &t = threads[this_thread];
    if (has_ended(barrier, parity)) return;
    t.barrier = barrier;
    t.parity = parity;
    leave();
    t.barrier = NULL;
}

/* ---- products */

static uint16_t shared_element(uint32_t address) {
    uint16_t bits;
    memcpy(&bits, shared_bytes + address, sizeof bits);
    return bits;
}

/* Element (n, k) of an operand in shared memory; rows: k runs over the rows of its tiles, n along them. */
static uint16_t operand(uint64_t descriptor, bool rows, int n, int k) {
    const uint32_t start = (uint32_t)(descriptor & 0x3fff) * 16, leading = (uint32_t)(descriptor >> 16 & 0x3fff) * 16,
                   stride = (uint32_t)(descriptor >> 32 & 0x3fff) * 16;
    uint32_t address;
    if (descriptor >> 62 == 0) /* 8 x 8 tiles without swizzle */
        return shared_element(start + (uint32_t)(k / 8) * leading + (uint32_t)(n / 8) * stride + (uint32_t)(n % 8 * 16 + k % 8 * 2));
    if (rows) address = start + (uint32_t)(n / 64) * leading + (uint32_t)(k / 8) * stride + (uint32_t)(k % 8 * 128 + n % 64 * 2);
    else address = start + (uint32_t)(n / 8) * stride + (uint32_t)(n % 8 * 128 + k * 2);
    return shared_element(address ^ (address >> 7 & 7) << 4);
}

static void work_out(const product &p) {
    static float a[64][16], b[128][16];
    const emulator_product &w = p.what;
    for (int k = 0; k < 16; k++) {
        for (int n = 0; n < w.n; n++) b[n][k] = w.element(operand(w.b_descriptor, w.b_rows, n, k));
        for (int m = 0; m < 64 && w.a_descriptor != 0; m++) a[m][k] = w.element(operand(w.a_descriptor, w.a_rows, m, k));
    }
    for (int t = 0; t < WARPGROUP && w.a_descriptor == 0; t++)
        for (int pair = 0; pair < 4; pair++)
            for (int e = 0; e < 2; e++)
                a[t / WARP * 16 + t % WARP / 4 + 8 * (pair % 2)][t % 4 * 2 + 8 * (pair / 2) + e] =
                    w.element((uint16_t)(p.a[t][pair] >> 16 * e));
    for (int t = 0; t < WARPGROUP; t++)
        for (int i = 0; i < w.n / 2; i++) {
            const float *row = a[t / WARP * 16 + t % WARP / 4 + 8 * (i % 4 / 2)], *column = b[i / 4 * 8 + t % 4 * 2 + i % 2];
            float sum = w.adds ? p.d[t][i] : 0.0f;
            for (int k = 0; k < 16; k++) sum += row[k] * column[k];
            p.d[t][i] = sum;
        }
}

/* Those of groups up to `last`, in order. */
static void work_out_to(warpgroup &w, int last) {
    while (w.done < w.products.size() && w.products[w.done].given == WARPGROUP && w.products[w.done].group <= last)
        work_out(w.products[w.done++]);
}

void emulator_multiply(const emulator_product &what, float *d, const uint32_t *a) {
    thread &t = threads[this_thread];
    warpgroup &w = warpgroups[this_thread / WARPGROUP];
    const int index = this_thread % WARPGROUP;
    if (t.products == w.products.size()) {
        w.products.emplace_back();
        w.products.back().what = what;
        w.products.back().group = t.product_group;
        w.products.back().given = 0;
    }
    product &p = w.products[t.products++];
    p.d[index] = d;
    for (int i = 0; i < 4; i++) p.a[index][i] = a != NULL ? a[i] : 0;
    if (++p.given == WARPGROUP && below(2)) work_out_to(w, p.group);
}

void emulator_commit_products() { threads[this_thread].product_group++; }

/* A round of all of the warpgroup, before which nothing need be there and after which it is. */
void emulator_wait_products(int pending) {
    thread &t = threads[this_thread];
    warpgroup &w = warpgroups[this_thread / WARPGROUP];
    meet(&w.meet, WARPGROUP);
    work_out_to(w, t.product_group - 1 - pending);
    meet(&w.meet, WARPGROUP);
}

/* ---- copies */

static void later(std::function<void()> run) { under_way.push_back({std::move(run), turn + 1 + below(below(4) ? 20 : 400)}); }

/* A box's rows of 128 bytes, swizzled in shared memory; NULL: outside of the tensor. */
static void each_row(const void *map, int32_t column, int32_t row, int32_t head, const std::function<void(int, unsigned char *)> &take) {
    fake_cuda_tensor_map m;
    memcpy(&m, map, sizeof m);
    if (m.magic != FAKE_CUDA_TENSOR_MAP_MAGIC) {
        fprintf(stderr, "emulator: a copy by what is no tensor map\n");
        abort();
    }
    for (int r = 0; r < (int)m.box[1]; r++) {
        const bool inside = row + r >= 0 && (uint64_t)(row + r) < m.dims[1] && head >= 0 && (uint64_t)head < m.dims[2];
        take(r, inside ? (unsigned char *)(uintptr_t)m.address + (uint64_t)(row + r) * m.strides[0] + (uint64_t)head * m.strides[1] +
                             (uint64_t)column * 2
                       : NULL);
    }
}

static unsigned char *unit_of(void *tile, int row, int unit) { return (unsigned char *)tile + row * 128 + ((unit ^ row % 8) * 16); }

void emulator_load_box(void *to, const void *map, int32_t column, int32_t row, int32_t head, uint64_t *barrier) {
    later([=] {
        uint32_t bytes = 0;
        each_row(map, column, row, head, [&](int r, unsigned char *from) {
            for (int unit = 0; unit < 8; unit++)
                if (from != NULL) memcpy(unit_of(to, r, unit), from + 16 * unit, 16);
                else memset(unit_of(to, r, unit), 0, 16);
            bytes += 128;
        });
        emulator_take(barrier, 0, (int32_t)bytes);
    });
}

void emulator_load_bytes(void *to, const void *from, uint32_t bytes, uint64_t *barrier) {
    later([=] {
        memcpy(to, from, bytes);
        emulator_take(barrier, 0, (int32_t)bytes);
    });
}

static void begin_store(std::function<void()> run) {
    thread &t = threads[this_thread];
    if (below(2)) run();
    else t.stores.push_back({std::move(run), t.store_group});
}

void emulator_store_box(const void *map, int32_t column, int32_t row, int32_t head, const void *from) {
    begin_store([=] {
        each_row(map, column, row, head, [&](int r, unsigned char *to) {
            for (int unit = 0; unit < 8 && to != NULL; unit++) memcpy(to + 16 * unit, unit_of((void *)(uintptr_t)from, r, unit), 16);
        });
    });
}

void emulator_store_bytes(void *to, const void *from, uint32_t bytes) {
    begin_store([=] { memcpy(to, from, bytes); });
}

void emulator_commit_stores() { threads[this_thread].store_group++; }

void emulator_wait_stores(int pending) {
    thread &t = threads[this_thread];
    size_t done = 0;
    while (done < t.stores.size() && t.stores[done].group < t.store_group - pending) t.stores[done++].run();
    t.stores.erase(t.stores.begin(), t.stores.begin() + (long)done);
}

/* ---- a block's run */

static void run_thread() {
    kernel();
    emulator_wait_stores(0);
    threads[this_thread].ended = true;
    leave();
}

static bool can_go_on(const thread &t) {
    if (t.ended || t.asleep > turn) return false;
    if (t.round != NULL) return *t.round != t.seen;
    return t.barrier == NULL || has_ended(t.barrier, t.parity);
}

static void start_block() {
    turn = 0;
    slow_threads = below(2) ? WARPGROUP : WARP;
    slow = below(4) ? below(thread_count / slow_threads) * slow_threads : -1;
    under_way.clear();
    memset(barriers, 0, sizeof barriers);
    memset(shared_bytes, 0xff, sizeof shared_bytes); /* NaN */
    for (warp &w : warps) memset(&w, 0, sizeof w);
    for (warpgroup &w : warpgroups) w.meet = {0, 0}, w.products.clear(), w.done = 0;
    for (int i = 0; i < thread_count; i++) {
        thread &t = threads[i];
        t.ended = false;
        t.round = NULL, t.barrier = NULL;
        t.asleep = 0;
        t.products = 0, t.product_group = t.store_group = 0;
        t.stores.clear();
        getcontext(&t.context);
        t.context.uc_stack.ss_sp = stacks + (size_t)i * STACK_BYTES;
        t.context.uc_stack.ss_size = STACK_BYTES;
        t.context.uc_link = NULL;
        makecontext(&t.context, run_thread, 0);
    }
}

/* A turn: what copies bring by now, then every thread that can, warp by warp from a random one on. False: all have ended. */
static bool take_turn() {
    const int first = below(thread_count / WARP) * WARP;
    bool going = false, waiting = false;
    turn++;
    for (size_t i = 0; i < under_way.size();) {
        if (under_way[i].turn > turn) {
            i++;
            continue;
        }
        const std::function<void()> run = std::move(under_way[i].run);
        under_way[i] = std::move(under_way.back());
        under_way.pop_back();
        run();
        going = true;
    }
    for (int i = 0; i < thread_count; i++) {
        this_thread = (first + i) % thread_count;
        thread &t = threads[this_thread];
        const bool is_slow = slow >= 0 && this_thread >= slow && this_thread < slow + slow_threads;
        if (this_thread % WARP == 0 && (is_slow ? below(4) > 0 : below(300) == 0)) {
            const int until = turn + 1 + below(is_slow ? 30 : 200);
            for (int lane = 0; lane < WARP; lane++) threads[this_thread + lane].asleep = until;
        }
        waiting = waiting || !t.ended;
        if (t.asleep > turn) going = true;
        if (!can_go_on(t)) continue;
        going = true;
        threadIdx.x = (unsigned int)this_thread;
        swapcontext(&scheduler, &t.context);
    }
    if (waiting && !going && under_way.empty()) {
        fprintf(stderr, "emulator: block %u of %u: every thread waits for another\n", blockIdx.x, gridDim.x);
        abort();
    }
    return waiting;
}

void emulator_launch(std::function<void()> call, unsigned int blocks, unsigned int block_threads) {
    const char *seed = getenv("EMULATOR_SEED");
    if (stacks == NULL) stacks = (unsigned char *)malloc((size_t)MOST_THREADS * STACK_BYTES);
    if (stacks == NULL || block_threads > MOST_THREADS) abort();
    if (random_state == 0) random_state = seed != NULL ? strtoull(seed, NULL, 10) : 1;
    kernel = std::move(call);
    thread_count = (int)block_threads;
    gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (start_block(); take_turn();) continue;
}
