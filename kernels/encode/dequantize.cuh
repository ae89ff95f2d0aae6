// Dequantize: positions of a sequence as values, K and V in the model's frame. A warp has 16 tokens of one head, K or V
// of them.
#pragma once
#include "encode/read_keys.cuh"

namespace kvarn {

/// Stores N neighbouring values of a row.
template <class Out, int N> __device__ __forceinline__ void store_values(Out* to, const float* x, bool is_aligned) {
    if (!is_aligned) {
#pragma unroll
        for (int i = 0; i < N; i++) to[i] = narrow<Out>(x[i]);
    } else if constexpr (sizeof(Out) == 4) {
#pragma unroll
        for (int i = 0; i < N; i += 4)
            *reinterpret_cast<float4*>(to + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 8) {
            const uint32_t a = narrow_pair<Out>(x[i], x[i + 1]), b = narrow_pair<Out>(x[i + 2], x[i + 3]);
            const uint32_t c = narrow_pair<Out>(x[i + 4], x[i + 5]), d = narrow_pair<Out>(x[i + 6], x[i + 7]);
            *reinterpret_cast<uint4*>(to + i) = make_uint4(a, b, c, d);
        }
    }
}

/// The row of a position, or null outside of the range.
template <class Out>
__device__ __forceinline__ Out* out_row(const DequantizeParams& p, const Tensor& tensor, int position, int head) {
    const int row = position - p.start;
    return row < 0 || row >= p.count ? nullptr : const_cast<Out*>(row_of<Out>(tensor, p.rows_per_batch, row, head));
}

template <class Out, int D, int BITS>
__device__ __forceinline__ void dequantize_k(const DequantizeParams& p, const uint8_t* record, int first) {
    KeyReader<BITS, D> reader;
    reader.open(record, p.block_size);
    float x[2][D / 4];
    reader.fetch(warp());
    reader.read(x, -1);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        Out* row = out_row<Out>(p, p.k, first + 16 * warp() + lane() / 4 + 8 * h, blockIdx.y);
        if (!row) continue;
#pragma unroll
        for (int b = 0; b < D / 32; b++)
            store_values<Out, 8>(row + 32 * b + 8 * (lane() % 4), &x[h][8 * b], p.is_aligned);
    }
}

template <class Out, int D, int BITS, bool ROTATED>
__device__ __forceinline__ void dequantize_v(const DequantizeParams& p, const uint8_t* record, int first) {
    constexpr int C = D / 8;  // channels of a lane, side by side
    const int g = lane() / 4, q = lane() % 4, token = 16 * warp() + 2 * q;
    GroupCodes<BITS, D> codes;
    float scale[4], zero[4], x[4][C];  // of tokens 2 q + e + 8 j at e + 2 j
    int first_row = NO_FIRST_ROW;
    const TileView<BITS == 8 ? 4 : BITS, D> tile(record, p.block_size);
    const PageView<D> page(const_cast<uint8_t*>(record), p.block_size);
    if constexpr (BITS == 8)
        codes.load(page.group(token) + page.layout.v(), 16 * warp() % page.layout.tokens() / 16, 0);
    else
        codes.load(tile.v_codes(), warp(), tile.layout.high_plane()), first_row = record[tile.layout.header() + 2];
#pragma unroll
    for (int t = 0; t < 4; t++) {
        const int of = token + t % 2 + t / 2 * 8;
        if constexpr (BITS == 8)
            scale[t] = __half2float(*page.v_token_scale(of)), zero[t] = __half2float(*page.v_token_zero_point(of));
        else
            scale[t] = __half2float(*tile.v_token_scale(of)), zero[t] = __half2float(*tile.v_token_zero_point(of));
    }
#pragma unroll
    for (int f = 0; f < D / 16; f++) {
        uint32_t a[4];
        codes.template operand<false>(f, a);
#pragma unroll
        for (int i = 0; i < 4; i++) {  // i = h + 2 j
            const float2 c = widen_pair<half>(a[i]);
            const int j = 2 * (i / 2), channel = 2 * f + i % 2;
            x[j][channel] = fmaf(c.x, scale[j], zero[j]), x[j + 1][channel] = fmaf(c.y, scale[j + 1], zero[j + 1]);
        }
    }
    if (BITS < 8 && first_row / 16 == warp()) {
        const float by = f16_at(record + tile.layout.first_v_scale()),
                    from = f16_at(record + tile.layout.first_v_zero_point());
#pragma unroll
        for (int t = 0; t < 4; t++)
            if (token + t % 2 + t / 2 * 8 == first_row)
#pragma unroll
                for (int c = 0; c < C; c++) x[t][c] = fmaf(float(record[tile.layout.first_v() + g * C + c]), by, from);
    }
#pragma unroll
    for (int t = 0; t < 4; t++) {
        if constexpr (ROTATED) {
#pragma unroll
            for (int half = 1; half < C; half *= 2)
#pragma unroll
                for (int i = 0; i < C; i++)
                    if (!(i & half)) {
                        const float a = x[t][i], b = x[t][i + half];
                        x[t][i] = a + b, x[t][i + half] = a - b;
                    }
#pragma unroll
            for (int mask = 4; mask < 32; mask *= 2)
#pragma unroll
                for (int i = 0; i < C; i++) {
                    const float other = __shfl_xor_sync(ALL_LANES, x[t][i], mask);
                    x[t][i] = lane() & mask ? other - x[t][i] : x[t][i] + other;
                }
#pragma unroll
            for (int i = 0; i < C; i++) x[t][i] *= ROTATION_NORM<D>;
        }
        Out* row = out_row<Out>(p, p.v, first + token + t % 2 + t / 2 * 8, blockIdx.y);
        if (row) store_values<Out, C>(row + g * C, x[t], p.is_aligned);
    }
}

/// Grid (blocks that the range touches, heads, K | V), two threads a token of a block.
template <class Out, int D, int BITS> __device__ __forceinline__ void dequantize(const DequantizeParams& p) {
    const int place = at_address<const int32_t>(p.places)[blockIdx.x],
              first = (p.start / p.block_size + blockIdx.x) * p.block_size;
    if (place >= 0) {
        const uint8_t* record = record_of(p.pages, place, blockIdx.y);
        if (blockIdx.z == 0)
            dequantize_k<Out, D, 8>(p, record, first);
        else
            dequantize_v<Out, D, 8, BITS != 8>(p, record, first);
    } else if constexpr (BITS != 8) {
        const uint8_t* record = record_of(p.tiles, ~place, blockIdx.y);
        if (blockIdx.z == 0)
            dequantize_k<Out, D, BITS>(p, record, first);
        else
            dequantize_v<Out, D, BITS, true>(p, record, first);
    }
}

/// The same of `raw` pages, a thread a value: grid (tokens, heads, K | V), a thread a channel.
template <class In, class Out, int D> __device__ __forceinline__ void dequantize_raw(const DequantizeParams& p) {
    const int position = p.start + blockIdx.x, token = position % p.block_size, channel = threadIdx.x;
    const int place = at_address<const int32_t>(p.places)[position / p.block_size - p.start / p.block_size];
    const In* group = reinterpret_cast<const In*>(record_of(p.pages, place, blockIdx.y)) + token / 16 * (32 * D) +
                      (blockIdx.z ? 16 * D : 0);
    const In x = group[index16(D, blockIdx.z ? v_place(D, token % 16, channel) : k_place(D, token % 16, channel))];
    out_row<Out>(p, blockIdx.z ? p.v : p.k, position, blockIdx.y)[channel] = narrow<Out>(widen(x));
}

}  // namespace kvarn
