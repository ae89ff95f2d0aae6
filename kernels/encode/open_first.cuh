// First pages: opened by a step that writes few of their rows, opened again by one that crosses their middle, and
// refitted when a step is committed. Their rows are decoded with low bytes and encoded anew; a page that has no rows
// yet is cleared. A block has one page of one head, its rows as f32 in shared memory.
#pragma once
#include "encode/statistics.cuh"
#include "encode/token.cuh"

namespace kvarn {

constexpr int FIRST_THREADS = 256, FIRST_WARPS = FIRST_THREADS / 32;

template <int D> struct FirstShared {
    Statistics<D, 1> statistics;
    float rows[1][D];  // as many as the block has tokens
};
/// Stores the statistics of the first `num_rows` rows, and encodes the first `num_stored` of them again for a page of
/// `num_tokens`.
template <int D>
__device__ __forceinline__ void rewrite_first_k(FirstShared<D>& s, const PageView<D>& page, int num_rows,
                                                int num_stored, int num_tokens, int block_size, const float* model,
                                                bool is_first_page) {
    constexpr int C = LANE_CHANNELS<D>;
    float mean[1] = {}, squares[1] = {};
    static_assert(D <= FIRST_THREADS, "a thread for each channel");
    if (threadIdx.x < D) {
        double sum = 0, about = 0;
        for (int t = 0; t < num_rows; t++) sum += s.rows[t][threadIdx.x];
        const double middle = sum / num_rows;
        for (int t = 0; t < num_rows; t++)
            about += (s.rows[t][threadIdx.x] - middle) * (s.rows[t][threadIdx.x] - middle);
        mean[0] = float(middle), squares[0] = float(about);
    }
    s.statistics.store(mean, squares, float(num_rows), model, is_first_page, page.channel_mean(), page.channel_scale());
    __syncthreads();
    LaneStatistics<C> statistics;
    statistics.load(page);
    for (int t = warp(); t < num_stored; t += FIRST_WARPS) {
        float k[C];
#pragma unroll
        for (int i = 0; i < C; i++) k[i] = has_channels<D>() ? s.rows[t][lane() * C + i] : 0.f;
        write_k<D>(page, t, statistics, k, has_low_bytes(t, num_tokens, block_size), block_size);
    }
}

/// Decodes the first `num_stored` rows of a page of `num_stored` tokens.
template <int D>
__device__ __forceinline__ void read_first_rows(FirstShared<D>& s, const PageView<D>& page, int num_stored,
                                                int block_size) {
    constexpr int C = LANE_CHANNELS<D>;
    LaneStatistics<C> statistics;
    statistics.load(page);
    for (int t = warp(); t < num_stored; t += FIRST_WARPS) {
        float k[C];
        read_first_k<D>(page, t, num_stored, block_size, statistics, k);
#pragma unroll
        for (int i = 0; i < C; i++)
            if (has_channels<D>()) s.rows[t][lane() * C + i] = k[i];
    }
}

/// Opens, in a layer, pages whose statistics are of their own rows, some of them the step's: grid (opens, heads).
template <class In, int D> __device__ __forceinline__ void open_first(const EncodeParams& p) {
    extern __shared__ __align__(16) uint8_t shared[];
    FirstShared<D>& s = *reinterpret_cast<FirstShared<D>*>(shared);
    constexpr int C = LANE_CHANNELS<D>;
    const Step step(p);
    const int head = blockIdx.y, at = blockIdx.x * OPENS_WIDTH;
    const int sequence = step.word(OPENS, at);
    if (sequence < 0) return;
    const int block = step.word(OPENS, at + 1), start = step.word(OPENS, at + 2), end = step.word(OPENS, at + 3),
              of = step.word(OPENS, at + 4);
    const int context_len = step.context_len(sequence), first = block * p.block_size;
    const bool is_whole = start == first && end == first + p.block_size && context_len <= first;
    if (of != sequence || start != first || end <= context_len || (is_whole && p.has_whole_pages)) return;
    const PageView<D> page(record_of(layer_records(p, 0).pages, step.place(sequence, block), head), p.block_size);
    const int num_tokens = min(step.seq_len(sequence) - first, p.block_size), num_stored = max(context_len - first, 0);
    read_first_rows<D>(s, page, num_stored, p.block_size);
    const int first_token = step.first_token(sequence) - context_len;
    for (int t = num_stored + warp(); t < end - first; t += FIRST_WARPS) {
        float k[C];
        load_row<D>(token_of<In>(step, p.k, first_token + first + t, head), k);
        repair_row<In>(k);
#pragma unroll
        for (int i = 0; i < C; i++)
            if (has_channels<D>()) s.rows[t][lane() * C + i] = k[i];
    }
    __syncthreads();
    if (num_stored == 0 && num_tokens < p.block_size) {
        clear_record(page.record, page.layout.bytes());
        __syncthreads();
    }
    rewrite_first_k<D>(s, page, end - first, num_stored, num_tokens, p.block_size,
                       channels_of<D>(layer_model(p, 0), head), block == 0);
}

/// Refits pages: grid (refits, heads, layers).
template <int D> __device__ __forceinline__ void refit_first(const EncodeParams& p) {
    extern __shared__ __align__(16) uint8_t shared[];
    FirstShared<D>& s = *reinterpret_cast<FirstShared<D>*>(shared);
    const Step step(p);
    const int head = blockIdx.y, layer = blockIdx.z, sequence = step.word(REFITS, blockIdx.x * REFITS_WIDTH);
    if (sequence < 0) return;
    const int num_tokens = step.word(REFITS, blockIdx.x * REFITS_WIDTH + 1), place = step.place(sequence, 0);
    if (place < 0) return;
    const PageView<D> page(record_of(layer_records(p, layer).pages, place, head), p.block_size);
    read_first_rows<D>(s, page, num_tokens, p.block_size);
    __syncthreads();
    rewrite_first_k<D>(s, page, num_tokens, num_tokens, num_tokens, p.block_size,
                       channels_of<D>(layer_model(p, layer), head), true);
}

}  // namespace kvarn
