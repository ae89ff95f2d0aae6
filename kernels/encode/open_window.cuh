// Pages whose statistics are taken over the tokens before them: stored ones, in pages and tiles, and those that the
// step itself brings for the sequence that they are of. A block of four warps has one page of one head; a warp takes a
// quarter of the groups.
#pragma once
#include "encode/read_keys.cuh"
#include "encode/statistics.cuh"

namespace kvarn {

constexpr int WINDOW_WARPS = 4;

/// Takes in a value of each of two tokens, or of one of them.
template <int N> struct RunningMoments {
    float mean[N], squares[N], count;

    __device__ __forceinline__ RunningMoments() : count(0) {
#pragma unroll
        for (int i = 0; i < N; i++) mean[i] = squares[i] = 0;
    }
    __device__ __forceinline__ void add(const float (&x)[2][N], bool first, bool second) {
        const float rows = float(first) + float(second);
        if (rows == 0.f) return;
        const Merge merge(count, rows);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float a = first ? x[0][i] : x[1][i],
                        b = second ? x[1][i] : x[0][i];  // alone, a token stands for both
            const float d = a - b, off = fmaf(0.5f, a + b, -mean[i]);
            mean[i] = fmaf(off, merge.by_mean, mean[i]);
            squares[i] += fmaf(off * merge.by_squares, off, 0.5f * d * d);
        }
        count += rows;
    }
    __device__ __forceinline__ void add(const float (&x)[2][N]) {
        const Merge merge(count, 2.f);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float d = x[0][i] - x[1][i], off = fmaf(0.5f, x[0][i] + x[1][i], -mean[i]);
            mean[i] = fmaf(off, merge.by_mean, mean[i]);
            squares[i] += fmaf(off * merge.by_squares, off, 0.5f * d * d);
        }
        count += 2.f;
    }
};

/// Grid (opens, heads, layers). In is void where all tokens of the statistics are stored ones, else the type of the
/// step's rows; records are INT8 pages, and tiles of BITS where that is not 8.
template <class In, int D, int BITS> __device__ __forceinline__ void open_window(const EncodeParams& p) {
    constexpr bool HAS_ROWS = sizeof(Eight<In>) > 1;
    __shared__ __align__(16) Statistics<D, WINDOW_WARPS> s;
    const Step step(p);
    const int head = blockIdx.y, layer = blockIdx.z, at = blockIdx.x * OPENS_WIDTH, sequence = step.word(OPENS, at);
    if (sequence < 0) return;
    const int block = step.word(OPENS, at + 1), start = step.word(OPENS, at + 2), end = step.word(OPENS, at + 3),
              of = step.word(OPENS, at + 4);
    const int context_len = step.context_len(of), first = block * p.block_size;
    const bool is_of_stored = end <= context_len;
    if (is_of_stored == HAS_ROWS || (HAS_ROWS && of == sequence && start == first))
        return;  // the rest are of `open_first`
    const LayerRecords records = layer_records(p, layer);
    const PageView<D> page(record_of(records.pages, step.place(sequence, block), head), p.block_size);
    clear_record(page.record,
                 page.layout.bytes());  // it is new: nobody reads it; written whole, it would have its own statistics
    KeyReader<8, D> page_reader;
    KeyReader<BITS, D> tile_reader;
    RunningMoments<D / 4> moments;
    const int g = lane() / 4, first_group = start / 16, num_groups = (end + 15) / 16 - first_group;
    const int per_warp = (num_groups + WINDOW_WARPS - 1) / WINDOW_WARPS, from = first_group + warp() * per_warp;
    const int to = min(from + per_warp, first_group + num_groups);
    int read_block = -1, place = 0;
#pragma unroll 1
    for (int group = from; group < to; group++) {
        const int position = 16 * group;
        float x[2][D / 4];
        if (!HAS_ROWS || position < context_len) {
            const int of_block = position / p.block_size, within = position % p.block_size / 16;
            if (of_block != read_block) {
                place = step.place(of, read_block = of_block);
                if (BITS < 8 && place < 0)
                    tile_reader.open(record_of(records.tiles, ~place, head), p.block_size), tile_reader.fetch(within);
                else
                    page_reader.open(record_of(records.pages, place, head), p.block_size), page_reader.fetch(within);
            }
            const int next =
                group + 1 < to && 16 * (within + 1) < p.block_size ? within + 1 : -1;  // of the same record
            if (BITS < 8 && place < 0)
                tile_reader.read(x, next);
            else
                page_reader.read(x, next);
        }
        if constexpr (HAS_ROWS) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int token = position + g + 8 * h;
                if (token < context_len || token >= end) continue;
                const In* row = token_of<In>(step, p.k, step.first_token(of) + token - context_len, head);
#pragma unroll
                for (int b = 0; b < D / 32; b++) {
                    Eight<In> values;
                    values.load(row + 32 * b + 8 * (lane() % 4), p.is_aligned);
                    values.repair();
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        x[h][8 * b + 2 * i] = values.pair(i).x, x[h][8 * b + 2 * i + 1] = values.pair(i).y;
                }
            }
        }
        const int token = position + g;
        if (position >= start && position + 16 <= end)
            moments.add(x);
        else
            moments.add(x, token >= start && token < end, token + 8 >= start && token + 8 < end);
    }
    s.put(moments.mean, moments.squares, moments.count);
    __syncthreads();
    float mean[D / 128 + 1], squares[D / 128 + 1];
    const float rows = s.join(mean, squares);
    s.store(mean, squares, rows, channels_of<D>(layer_model(p, layer), head), block == 0, page.channel_mean(),
            page.channel_scale());
}

}  // namespace kvarn
