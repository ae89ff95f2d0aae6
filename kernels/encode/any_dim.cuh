// Statistics and dequantize of INT8 pages of any number of channels, a token by a warp: what `open_window` and
// `dequantize` do for 64 and 128 by sixteen.
#pragma once
#include "encode/dequantize.cuh"
#include "encode/open_window.cuh"
#include "encode/token.cuh"

namespace kvarn {

/// As `open_window`.
template <class In, int D> __device__ __forceinline__ void open_window_any(const EncodeParams& p) {
    constexpr bool HAS_ROWS = sizeof(Eight<In>) > 1;
    constexpr int C = LANE_CHANNELS<D>, PER_THREAD = (D + 32 * WINDOW_WARPS - 1) / (32 * WINDOW_WARPS);
    __shared__ __align__(16) Statistics<D, WINDOW_WARPS> s;
    const Step step(p);
    const int head = blockIdx.y, layer = blockIdx.z, at = blockIdx.x * OPENS_WIDTH, sequence = step.word(OPENS, at);
    if (sequence < 0) return;
    const int block = step.word(OPENS, at + 1), start = step.word(OPENS, at + 2), end = step.word(OPENS, at + 3),
              of = step.word(OPENS, at + 4);
    const int context_len = step.context_len(of), first = block * p.block_size;
    if ((end <= context_len) == HAS_ROWS || (HAS_ROWS && of == sequence && start == first)) return;
    const Records pages = layer_records(p, layer).pages;
    const PageView<D> page(record_of(pages, step.place(sequence, block), head), p.block_size);
    clear_record(page.record, page.layout.bytes());
    LaneStatistics<C> statistics;
    float mean[C] = {}, squares[C] = {}, count = 0;
    int read_block = -1;
    const uint8_t* record = nullptr;
    for (int token = start + warp(); token < end; token += WINDOW_WARPS) {
        float k[C];
        if (!HAS_ROWS || token < context_len) {
            if (token / p.block_size != read_block) {
                read_block = token / p.block_size, record = record_of(pages, step.place(of, read_block), head);
                statistics.load(PageView<D>(const_cast<uint8_t*>(record), p.block_size));
            }
            const PageView<D> from(const_cast<uint8_t*>(record), p.block_size);
            read_first_k<D>(from, token % p.block_size, p.block_size, p.block_size, statistics,
                            k);  // of a full page: no low bytes
        } else if constexpr (HAS_ROWS) {
            load_row<D>(token_of<In>(step, p.k, step.first_token(of) + token - context_len, head), k);
            repair_row<In>(k);
        }
        count += 1.f;
#pragma unroll
        for (int i = 0; i < C; i++) {
            const float off = k[i] - mean[i];
            mean[i] += off / count, squares[i] = fmaf(off, k[i] - mean[i], squares[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < C; i++)
        if (has_channels<D>()) s.of_warp[warp()][lane() * C + i] = make_float2(mean[i], squares[i]);
    if (lane() == 0) s.count[warp()] = count;
    __syncthreads();
    float mean_of[PER_THREAD], squares_of[PER_THREAD];
    const float rows = s.join(mean_of, squares_of);
    s.store(mean_of, squares_of, rows, channels_of<D>(layer_model(p, layer), head), block == 0, page.channel_mean(),
            page.channel_scale());
}

/// As `dequantize`, of pages that do not seal.
template <class Out, int D> __device__ __forceinline__ void dequantize_any(const DequantizeParams& p) {
    constexpr int C = LANE_CHANNELS<D>;
    const int place = at_address<const int32_t>(p.places)[blockIdx.x],
              first = (p.start / p.block_size + blockIdx.x) * p.block_size;
    const PageView<D> page(record_of(p.pages, place, blockIdx.y), p.block_size);
    const bool is_v = blockIdx.z;
    LaneStatistics<C> statistics;
    statistics.load(page);
    for (int token = 16 * warp(); token < 16 * warp() + 16; token++) {
        Out* row = out_row<Out>(p, is_v ? p.v : p.k, first + token, blockIdx.y);
        if (!row) continue;
        float x[C];
        if (!is_v) read_first_k<D>(page, token, p.block_size, p.block_size, statistics, x);
#pragma unroll
        for (int i = 0; i < C; i++) {
            if (!has_channels<D>()) continue;
            if (is_v)
                x[i] = fmaf(float(*page.v_code(token, lane() * C + i)), f16_at(page.v_token_scale(token)),
                            f16_at(page.v_token_zero_point(token)));
            row[lane() * C + i] = narrow<Out>(x[i]);
        }
    }
}

}  // namespace kvarn
