// One token of one head by a warp: lane l has channels [l C, l C + C), of which lanes beyond D have none. Arithmetic is
// that of the scalar specification to the last bit: its order, its divisions. D is any multiple of 16 up to 256.
#pragma once
#include "encode/encode.cuh"

namespace kvarn {

constexpr float K_CODE_MAX = 127.f, V_CODE_MAX = 255.f, K_LOW_STEPS = 256.f;

/// C, and whether a lane has channels.
template <int D> constexpr int LANE_CHANNELS = D == 64 ? 2 : D <= 128 ? 4 : 8;
template <int D> __device__ __forceinline__ bool has_channels() {
    return LANE_CHANNELS<D> * 32 == D || lane() * LANE_CHANNELS<D> < D;
}

/// A row as given; zeros beyond it.
template <int D, class In, int C> __device__ __forceinline__ void load_row(const In* row, float (&x)[C]) {
#pragma unroll
    for (int i = 0; i < C; i++) x[i] = has_channels<D>() ? widen(row[lane() * C + i]) : 0.f;
}
/// Makes it finite; was it not?
template <class In, int C> __device__ __forceinline__ bool repair_row(float (&x)[C]) {
    bool odd = false;
#pragma unroll
    for (int i = 0; i < C; i++) odd |= !is_finite(x[i]), x[i] = finite<In>(x[i]);
    return __any_sync(ALL_LANES, odd);
}

/// x H, butterflies from neighbours to halves.
template <int D, int C> __device__ __forceinline__ void rotate_row(float (&x)[C]) {
#pragma unroll
    for (int half = 1; half < C && half < ROTATION_BLOCK<D>; half *= 2)
#pragma unroll
        for (int i = 0; i < C; i++)
            if (!(i & half)) {
                const float a = x[i], b = x[i + half];
                x[i] = a + b, x[i + half] = a - b;
            }
#pragma unroll
    for (int mask = 1; mask * C < ROTATION_BLOCK<D>; mask *= 2)
#pragma unroll
        for (int i = 0; i < C; i++) {
            const float other = __shfl_xor_sync(ALL_LANES, x[i], mask);
            x[i] = lane() & mask ? other - x[i] : x[i] + other;
        }
#pragma unroll
    for (int i = 0; i < C; i++) x[i] *= ROTATION_NORM<D>;
}

/// The channel statistics of a page, of a lane's channels.
template <int C> struct LaneStatistics {
    float mean[C], scale[C];

    template <int D> __device__ __forceinline__ void load(const PageView<D>& page) {
#pragma unroll
        for (int i = 0; i < C; i++) {
            mean[i] = has_channels<D>() ? __half2float(page.channel_mean()[lane() * C + i]) : 0.f;
            scale[i] = has_channels<D>() ? __half2float(page.channel_scale()[lane() * C + i]) : 1.f;
        }
    }
};

/// Writes codes of K, each in the low byte of a float, to a row of a page.
template <int D, int C>
__device__ __forceinline__ void store_k_row(const PageView<D>& page, int row, const float (&codes)[C],
                                            half token_scale) {
    uint8_t* to = page.k_code(row, lane() * C);  // four channels lie side by side
    if (!has_channels<D>()) return;
    if constexpr (C == 2) {
        *reinterpret_cast<uint16_t*>(to) = uint16_t(low_bytes(codes[0], codes[1], 0.f, 0.f));
    } else {
#pragma unroll
        for (int i = 0; i < C; i += 4)
            *reinterpret_cast<uint32_t*>(page.k_code(row, lane() * C + i)) =
                low_bytes(codes[i], codes[i + 1], codes[i + 2], codes[i + 3]);
    }
    if (lane() == 0) *page.k_token_scale(row) = token_scale;
}

/// What encoding a row says of it, in every lane.
struct Written {
    float squares;  // of K in units of the page's scales
    bool out_of_range;
};

/// Encodes K under a page's statistics, with its low bytes if `low`.
template <int D, int C>
__device__ __forceinline__ Written write_k(const PageView<D>& page, int token, const LaneStatistics<C>& statistics,
                                           const float (&k)[C], bool low, int block_size) {
    float z[C], codes[C], largest = 0;
#pragma unroll
    for (int i = 0; i < C; i++) {
        z[i] = __fdiv_rn(k[i] - statistics.mean[i], statistics.scale[i]);
        largest = fmaxf(largest, fabsf(z[i]));
    }
    largest = __uint_as_float(__reduce_max_sync(ALL_LANES, __float_as_uint(largest)));
    const half stored = to_half(__fdiv_rn(largest, K_CODE_MAX));
    const float scale = __half2float(stored);
    int squares = 0;
#pragma unroll
    for (int i = 0; i < C; i++) {
        const float code = scale > 0.f ? bounded(rintf(__fdiv_rn(z[i], scale)), K_CODE_MAX) : 0.f;
        squares += int(code) * int(code);
        z[i] = scale > 0.f ? bounded(rintf((__fdiv_rn(z[i], scale) - code) * K_LOW_STEPS), K_CODE_MAX) + SHIFT : SHIFT;
        codes[i] = code + SHIFT;
    }
    store_k_row<D>(page, token, codes, stored);
    if (low) store_k_row<D>(page, block_size - 1 - token, z, __ushort_as_half(LOW_BYTES));
    squares = __reduce_add_sync(ALL_LANES, squares);
    return {float(squares) * scale * scale, is_at_the_end(stored)};
}

/// Of the zeros of a row, which may be of both signs, the first.
template <int C> __device__ __forceinline__ float first_zero(const float (&x)[C]) {
    float mine = 1;
#pragma unroll
    for (int i = C - 1; i >= 0; i--) mine = x[i] == 0.f ? x[i] : mine;
    const unsigned lanes = __ballot_sync(ALL_LANES, mine == 0.f);
    return __shfl_sync(ALL_LANES, mine, __ffs(lanes) - 1);
}

/// Encodes V, rotated already where it is stored so; is it out of range?
template <int D, int C>
__device__ __forceinline__ bool write_v(const PageView<D>& page, int token, const float (&v)[C]) {
    float lo = has_channels<D>() ? v[0] : INFINITY, hi = has_channels<D>() ? v[0] : -INFINITY;
#pragma unroll
    for (int i = 1; i < C && has_channels<D>(); i++) lo = fminf(lo, v[i]), hi = fmaxf(hi, v[i]);
    lo = warp_min(lo), hi = warp_max(hi);
    if (lo == 0.f) lo = first_zero(v);
    const half scale = to_half(__fdiv_rn(hi - lo, V_CODE_MAX)), zero_point = to_half(lo);
    const float s = __half2float(scale), zero = __half2float(zero_point);
#pragma unroll
    for (int i = 0; i < C; i++) {
        const float code = s > 0.f ? fminf(fmaxf(rintf(__fdiv_rn(v[i] - zero, s)), 0.f), V_CODE_MAX) : 0.f;
        if (has_channels<D>()) *page.v_code(token, lane() * C + i) = uint8_t(__float_as_uint(code + SHIFT));
    }
    if (lane() == 0) *page.v_token_scale(token) = scale, *page.v_token_zero_point(token) = zero_point;
    return v_is_out_of_range(lo, hi, scale, zero_point);
}

/// Does a first page of `num_tokens` tokens have the low bytes of this one's K?
__device__ __forceinline__ bool has_low_bytes(int token, int num_tokens, int block_size) {
    return token < block_size / 2 && block_size - 1 - token >= num_tokens;
}

/// Decodes K of a token of a first page of `num_tokens`, low bytes included where the page has them.
template <int D, int C>
__device__ __forceinline__ void read_first_k(const PageView<D>& page, int token, int num_tokens, int block_size,
                                             const LaneStatistics<C>& statistics, float (&k)[C]) {
    const float scale = __half2float(*page.k_token_scale(token));
    const int low_row = block_size - 1 - token;
    const bool low =
        has_low_bytes(token, num_tokens, block_size) && __half_as_ushort(*page.k_token_scale(low_row)) == LOW_BYTES;
#pragma unroll
    for (int i = 0; i < C; i++) {
        if (!has_channels<D>()) {
            k[i] = 0.f;
            continue;
        }
        float code = float(int8_t(*page.k_code(token, lane() * C + i)));
        if (low) code += float(int8_t(*page.k_code(low_row, lane() * C + i))) * (1.f / K_LOW_STEPS);
        k[i] = __fadd_rn(statistics.mean[i], __fmul_rn(__fmul_rn(statistics.scale[i], scale), code));
    }
}

}  // namespace kvarn
