// Channel statistics of a page: moments of rows, merged over lanes and warps, and what is stored of them. The rule is
// that of `quant/statistics.rs`, in f32.
#pragma once
#include "encode/encode.cuh"

namespace kvarn {

constexpr float RELATIVE_FLOOR = 1e-6f, ABSOLUTE_FLOOR = 6e-8f;
constexpr float MODEL_ROWS_FIRST_PAGE = 8.f, MODEL_ROWS = 32.f, POOLED_ROWS = 4.f;
constexpr int MAX_WARPS = 32;

/// How the moments of `count` rows and of `other` rows merge: mean += by_mean * d, squares += by_squares * d * d, d the
/// other mean less this one.
struct Merge {
    float by_mean, by_squares;
    __device__ __forceinline__ Merge(float count, float other) {
        const float both = count + other, share = both > 0.f ? other / both : 0.f;
        by_mean = share, by_squares = count * share;
    }
};

/// Merges moments of lanes that differ in MASK, who had `count` rows each; a lane keeps half of its N channels.
template <int MASK, int N, int SIZE>
__device__ __forceinline__ void merge_lanes(float (&mean)[SIZE], float (&squares)[SIZE], float& count) {
    const bool upper = threadIdx.x & MASK;
    const float other_count = __shfl_xor_sync(ALL_LANES, count, MASK);
    const Merge merge(count, other_count);
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        const float kept = upper ? mean[i + N / 2] : mean[i];
        const float other = __shfl_xor_sync(ALL_LANES, upper ? mean[i] : mean[i + N / 2], MASK);
        const float both = (upper ? squares[i + N / 2] : squares[i]) +
                           __shfl_xor_sync(ALL_LANES, upper ? squares[i] : squares[i + N / 2], MASK);
        const float d = other - kept;
        mean[i] = fmaf(merge.by_mean, d, kept), squares[i] = fmaf(merge.by_squares * d, d, both);
    }
    count += other_count;
}

/// Moments of D channels over the rows of a block's warps, and what a page stores of them.
template <int D, int NUM_WARPS> struct Statistics {
    float2 of_warp[NUM_WARPS][D];  // mean, squares about it; in the end, what is stored
    float count[NUM_WARPS];
    float scratch[MAX_WARPS];

    /// What is stored, widened: the means of channels, and one over their scales.
    __device__ __forceinline__ float* mean() { return &of_warp[0][0].x; }
    __device__ __forceinline__ float* inverse_scale() { return &of_warp[0][0].x + D; }

    /// A warp's moments, D / 4 channels a lane (32 b + 8 q + i at index 8 b + i), over `rows` rows of the lane.
    __device__ __forceinline__ void put(float (&mean_of)[D / 4], float (&squares_of)[D / 4], float rows) {
        constexpr int N = D / 4;
        merge_lanes<16, N>(mean_of, squares_of, rows);
        merge_lanes<8, N / 2>(mean_of, squares_of, rows);
        merge_lanes<4, N / 4>(mean_of, squares_of, rows);
        const int first = lane() / 4 * (N / 8), q = lane() % 4;
#pragma unroll
        for (int i = 0; i < N / 8; i++)
            of_warp[warp()][(first + i) / 8 * 32 + 8 * q + (first + i) % 8] = make_float2(mean_of[i], squares_of[i]);
        if (lane() == 0) count[warp()] = rows;
    }
    /// Joins the warps' moments, by all threads of the block after a barrier: thread t has channels t, t + blockDim.x,
    /// ..
    template <int PER_THREAD>
    __device__ __forceinline__ float join(float (&mean_of)[PER_THREAD], float (&squares_of)[PER_THREAD]) const {
        const int num_warps = blockDim.x / 32;
        float rows = 0;
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) mean_of[i] = squares_of[i] = 0;
        for (int w = 0; w < num_warps; w++) {
            const Merge merge(rows, count[w]);
#pragma unroll
            for (int i = 0; i < PER_THREAD; i++) {
                const int d = threadIdx.x + i * blockDim.x;
                if (d >= D) continue;
                const float2 of = of_warp[w][d];
                const float off = of.x - mean_of[i];
                mean_of[i] = fmaf(merge.by_mean, off, mean_of[i]),
                squares_of[i] += fmaf(merge.by_squares * off, off, of.y);
            }
            rows += count[w];
        }
        return rows;
    }
    /// Stores the statistics of `rows` rows whose moments are given, by threads as `join` has them; `model` is null or
    /// [mean, deviation, query rms][D].
    template <int PER_THREAD>
    __device__ __forceinline__ void store(float (&mean_of)[PER_THREAD], float (&squares_of)[PER_THREAD], float rows,
                                          const float* model, bool is_first_page, half* k_channel_mean,
                                          half* k_channel_scale) {
        const float known = is_first_page ? MODEL_ROWS_FIRST_PAGE : MODEL_ROWS;
        float weight = known, pooled = 0;
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) {
            const int d = threadIdx.x + i * blockDim.x;
            if (d >= D) continue;
            const float raw = mean_of[i], wanted = model ? fmaf(known, model[d], rows * raw) / (known + rows) : raw;
            mean_of[i] = __half2float(to_half(wanted));
            const float off = raw - mean_of[i];
            squares_of[i] = fmaf(rows * off, off, squares_of[i]);
            pooled += rows > 1.f ? squares_of[i] : raw * raw;
            if (model) {
                const float deviation = model[D + d], by = model[d] - mean_of[i];
                squares_of[i] += known * fmaf(deviation, deviation, by * by);
            }
        }
        if (!model) {
            weight = POOLED_ROWS / rows;
            pooled = weight * block_sum(pooled, scratch) / (D * fmaxf(rows - 1.f, 1.f));
        } else {
            pooled = 0;
        }
        float largest = 0, ratios = 0, scale[PER_THREAD];
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) {
            squares_of[i] = sqrtf((squares_of[i] + pooled) / (weight + rows - 1.f));
            if (threadIdx.x + i * blockDim.x < D) largest = fmaxf(largest, squares_of[i]);
        }
        largest = block_max(largest, scratch);
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) {
            const int d = threadIdx.x + i * blockDim.x;
            if (d >= D) continue;
            const float deviation = fmaxf(squares_of[i], fmaxf(RELATIVE_FLOOR * largest, ABSOLUTE_FLOOR));
            const float q = model ? model[2 * D + d] : 1.f;
            // (deviation^3 / q)^(1/4), without deviation^3
            scale[i] = is_first_page ? deviation : sqrtf(deviation) * sqrtf(sqrtf(deviation / q));
            const float ratio = deviation / scale[i];
            ratios = fmaf(ratio, ratio, ratios);
        }
        const float factor = is_first_page ? 1.f : sqrtf(block_sum(ratios, scratch) * (1.f / D));
        __syncthreads();
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) {
            const int d = threadIdx.x + i * blockDim.x;
            if (d >= D) continue;
            const half stored = to_half(fmaxf(scale[i] * factor, ABSOLUTE_FLOOR));
            k_channel_mean[d] = to_half(mean_of[i]), k_channel_scale[d] = stored;
            mean()[d] = mean_of[i], inverse_scale()[d] = 1.f / __half2float(stored);
        }
    }
};

/// The calibration of a layer's head, or null.
template <int D> __device__ __forceinline__ const float* channels_of(const LayerModel& model, int head) {
    return model.channels ? at_address<const float>(model.channels) + head * (3 * D) : nullptr;
}

/// Zeroes a record, by a block.
__device__ __forceinline__ void clear_record(uint8_t* record, int bytes) {
    for (int i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16)
        *reinterpret_cast<uint4*>(record + i) = make_uint4(0, 0, 0, 0);
}

}  // namespace kvarn
