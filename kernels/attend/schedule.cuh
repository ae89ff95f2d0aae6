// Schedule: shares a step's work out among the warps of the decode kernel, once a step; all layers use it.
#pragma once
#include "params.cuh"

namespace kvarn {

constexpr int SCHEDULE_THREADS = 1024;

/// What is read of a sequence: nothing of those that other kernels attend for, `first_unit` missing.
DEV Scheduled scheduled(const AttendParams& p, int sequence) {
    const int* starts = plan_array(p.plan, TOKEN_START_LOC);
    const int context_len = plan_array(p.plan, CONTEXT_LENS)[sequence],
              first_held = plan_array(p.plan, FIRST_HELD)[sequence];
    const int num_new = starts[sequence + 1] - starts[sequence];
    Scheduled s{0, plan_array(p.plan, ROWS)[sequence], context_len, 0, first_held, 0, 0};
    if (num_new < max(p.min_new, 1) || num_new > p.max_new || plan_array(p.plan, IS_PREFILL)[sequence]) return s;
    s.num_new = num_new;
    const int from = max(first_held, context_len + 1 - p.window), to = context_len + (p.over_history ? 0 : num_new);
    if (from < to) s.first_block = from / p.block_size, s.end = to;
    return s;
}

/// Units of work of one kv head: blocks, or chunks of them.
DEV int units_of(const AttendParams& p, const Scheduled& s) {
    if (s.end == 0) return 0;
    const int unit = p.chunk_tokens ? p.chunk_tokens : p.block_size;
    return (s.end + unit - 1) / unit - s.first_block * p.block_size / unit;
}

/// Sums over the threads before this one, and over all.
DEV int64_t scan(int64_t mine, int64_t (&shared)[SCHEDULE_THREADS + 1], int64_t& total) {
    const int i = threadIdx.x;
    shared[i + 1] = mine;
    if (i == 0) shared[0] = 0;
    __syncthreads();
    for (int step = 1; step < SCHEDULE_THREADS; step *= 2) {
        const int64_t before = i + 1 > step ? shared[i + 1 - step] : 0;
        __syncthreads();
        shared[i + 1] += before;
        __syncthreads();
    }
    total = shared[SCHEDULE_THREADS];
    return shared[i];
}

/// Runs of units among workers, as equal as can be, and workers among blocks.
struct Runs {
    int64_t total, workers;
    int blocks;
    DEV int64_t begin(int64_t worker) const { return worker * total / workers; }
    DEV int64_t worker_of(int64_t unit) const { return ((unit + 1) * workers - 1) / total; }
    DEV int64_t first_worker(int64_t block) const { return block * workers / blocks; }
    DEV int block_of(int64_t worker) const { return int(((worker + 1) * blocks - 1) / workers); }
};

DEV Work work_of(const AttendParams& p, const Runs& runs, int block, int warp) {
    Work work{};
    if (block >= runs.blocks) return work;
    const int64_t worker = runs.first_worker(block) + warp;
    if (worker >= runs.first_worker(block + 1)) return work;
    const Scheduled* sequences = pointer<const Scheduled>(p.sequences);
    const int64_t begin = runs.begin(worker);
    int low = 0, high = num_sequences(p.plan) - 1;  // the last sequence that starts at or before `begin`
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (sequences[middle].first_unit <= begin) low = middle;
        else high = middle - 1;
    }
    const Scheduled s = sequences[low];
    const int units = units_of(p, s), rest = int(begin - s.first_unit), unit = rest % units;
    int at = s.first_block + unit;
    if (p.chunk_tokens) {
        const int chunk = s.first_block * p.block_size / p.chunk_tokens + unit;
        at = max(s.first_block, chunk * (p.chunk_tokens / p.block_size));
    }
    return {s, begin, low, rest / units, at, int(runs.begin(worker + 1) - begin), place_at(p.plan, s.row, at), 0};
}

/// In equal runs, a block has two partial results of a pair: number 2 (block + pair) of its warps that end there, the
/// next of the warp that goes on to another pair, which only the pair's last block can have. With chunks, one a unit.
DEV Parts parts_of(const AttendParams& p, const Runs& runs, int pair) {
    const Scheduled s = pointer<const Scheduled>(p.sequences)[pair / p.num_kv_heads];
    const int units = units_of(p, s);
    const int64_t begin = s.first_unit + int64_t(pair % p.num_kv_heads) * units;
    if (units == 0) return {0, 0, 0, -1};
    if (p.chunk_tokens) return {int(begin), units, 1, -1};
    const int64_t last = begin + units - 1, worker = runs.worker_of(last);
    const int low = runs.block_of(runs.worker_of(begin)), high = runs.block_of(worker);
    const bool ends = runs.begin(worker + 1) == last + 1;  // its last unit is that of a run
    const bool before = runs.begin(worker) > begin && worker > runs.first_worker(high);
    return {2 * (low + pair), high - low + (ends || before), 2, ends ? -1 : 2 * (high + pair) + 1};
}

/// One block.
DEV void schedule(const AttendParams& p) {
    __shared__ int64_t sums[SCHEDULE_THREADS + 1];
    const int i = threadIdx.x, count = num_sequences(p.plan), each = (count + SCHEDULE_THREADS - 1) / SCHEDULE_THREADS;
    const int from = min(i * each, count), to = min(from + each, count);
    Scheduled* sequences = pointer<Scheduled>(p.sequences);
    int64_t units = 0;
    for (int sequence = from; sequence < to; sequence++) {
        const Scheduled s = scheduled(p, sequence);
        sequences[sequence] = s, units += int64_t(units_of(p, s)) * p.num_kv_heads;
    }
    Runs runs;
    units = scan(units, sums, runs.total);
    for (int sequence = from; sequence < to; sequence++) {
        sequences[sequence].first_unit = units;
        units += int64_t(units_of(p, sequences[sequence])) * p.num_kv_heads;
    }
    int2* row_tokens = pointer<int2>(p.row_tokens);
    for (int row = i; row < num_rows(p.plan); row += SCHEDULE_THREADS) {
        row_tokens[row] = make_int2(plan_array(p.plan, POSITIONS)[row] < 0 ? ROW_PADDING : ROW_OTHERS, 0);
    }
    __syncthreads();
    runs.workers = min(int64_t(p.blocks) * p.warps, runs.total);
    runs.blocks = int(min(int64_t(p.blocks), runs.workers));
    for (int w = i; w < p.blocks * p.warps; w += SCHEDULE_THREADS) {
        pointer<Work>(p.work)[w] = work_of(p, runs, w / p.warps, w % p.warps);
    }
    for (int pair = i; pair < count * p.num_kv_heads; pair += SCHEDULE_THREADS) {
        pointer<Parts>(p.parts)[pair] = parts_of(p, runs, pair);
    }
    for (int sequence = i / 32; sequence < count; sequence += SCHEDULE_THREADS / 32) {
        const int* rows = plan_array(p.plan, TOKEN_ROWS) + plan_array(p.plan, TOKEN_START_LOC)[sequence];
        for (int token = i % 32; token < sequences[sequence].num_new; token += 32) {
            row_tokens[rows[token]] = make_int2(sequence, token);
        }
    }
}

}  // namespace kvarn
