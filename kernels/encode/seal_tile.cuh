// M of one frame in the registers of a block of 128 threads: what dual scaling and grids need, with little
// shared-memory traffic. Takes up to 255 registers, so two blocks a multiprocessor.
//
// Thread (y, x) = (tid / 8, tid % 8) has ROWS positions from ROWS y on, and tokens 32 k + 4 x + i (k, i = 0..3). After
// a reduction over a row's eight threads, the row belongs to one of them: `row()`, at D = 128 thread d has row d.
#pragma once
#include "encode/seal_feedback.cuh"
#include "encode/seal_fill.cuh"

namespace kvarn {

template <int D> struct RegisterTile {
    static constexpr int ROWS = D / 16;
    static_assert(ROWS == 4 || ROWS == 8, "D of 64 or 128; 256 takes twice the threads");
    float m[ROWS][16];

    static __device__ __forceinline__ int x() { return threadIdx.x % 8; }
    static __device__ __forceinline__ int first_row() { return threadIdx.x / 8 * ROWS; }
    static __device__ __forceinline__ int row() { return first_row() + (ROWS == 8 ? x() : x() % 4); }
    static __device__ __forceinline__ bool owns() { return ROWS == 8 || x() < 4; }

    /// The thread's four tokens of `k` of a field of tokens.
    static __device__ __forceinline__ void four(const float* field, int k, float (&out)[4]) {
        const float4 v = *reinterpret_cast<const float4*>(field + 4 * x() + 32 * k);
        out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
    }
    /// Takes rows of [channel][token] in the order of p.
    __device__ __forceinline__ void read(const float* rows, const uint32_t* order) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const uint32_t channel = order[first_row() + r];
            const float4* row =
                reinterpret_cast<const float4*>(rows + channel * TILE_TOKENS) + (x() ^ vector_turn(channel));
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const float4 v = row[8 * k];
                m[r][4 * k] = v.x, m[r][4 * k + 1] = v.y, m[r][4 * k + 2] = v.z, m[r][4 * k + 3] = v.w;
            }
        }
    }
    /// Halves `values` N at a time between lanes that differ in bit MASK: those with the bit keep the upper half.
    template <int MASK, int N, class Join>
    static __device__ __forceinline__ void exchange(float (&values)[N], const Join& join) {
        const bool upper = threadIdx.x & MASK;
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            const float sent = upper ? values[i] : values[i + N / 2], kept = upper ? values[i + N / 2] : values[i];
            values[i] = join(kept, __shfl_xor_sync(ALL_LANES, sent, MASK));
        }
    }
    /// Mean and sum of squares about it of every row over its tokens, of m * token; gives those of the thread's own
    /// row. Sums are about a thread's first value: channels can have large means.
    __device__ __forceinline__ float2 over_tokens(const float* field) const {
        float mean[ROWS] = {}, squares[ROWS] = {};
        const float zeroth = field[4 * x()];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float token[4];
            four(field, k, token);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const float first = m[r][0] * zeroth;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float d = fmaf(m[r][4 * k + i], token[i], -first);
                    mean[r] += d, squares[r] = fmaf(d, d, squares[r]);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float total = mean[r];
            mean[r] = fmaf(total, 1.f / 16, m[r][0] * zeroth),
            squares[r] = fmaf(-total * (1.f / 16), total, squares[r]);
        }
        if (ROWS == 8) merge_equal<4, ROWS>(mean, squares, 16);
        merge_equal<2, 4>(mean, squares, ROWS == 8 ? 32 : 16);
        merge_equal<1, 2>(mean, squares, ROWS == 8 ? 64 : 32);
        if (ROWS == 4) {
            const float other = __shfl_xor_sync(ALL_LANES, mean[0], 4), d = other - mean[0];
            squares[0] += __shfl_xor_sync(ALL_LANES, squares[0], 4) + d * d * 32.f, mean[0] += 0.5f * d;
        }
        return make_float2(mean[0], squares[0]);
    }
    /// Sums and sums of squares of every token over the channels of m * channel, by warps:
    /// partial[2][SEAL_WARPS][TILE_TOKENS].
    __device__ __forceinline__ void over_channels(const float* field, float* partial) const {
        float channel[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r += 4) {
            const float4 v = *reinterpret_cast<const float4*>(field + first_row() + r);
            channel[r] = v.x, channel[r + 1] = v.y, channel[r + 2] = v.z, channel[r + 3] = v.w;
        }
        const int lane = threadIdx.x % 32;
        float* to = partial + (lane / 16 * SEAL_WARPS + threadIdx.x / 32) * TILE_TOKENS + 4 * x() + lane / 8 % 2 * 2;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float v[8] = {};
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float y = m[r][4 * k + i] * channel[r];
                    v[i] += y, v[4 + i] = fmaf(y, y, v[4 + i]);
                }
            auto add = [](float a, float b) { return a + b; };
            exchange<16, 8>(v, add);
            float w[4] = {v[0], v[1], v[2], v[3]};
            exchange<8, 4>(w, add);
            *reinterpret_cast<float2*>(to + 32 * k) = make_float2(w[0], w[1]);
        }
    }
    static __device__ __forceinline__ float2 joined(const float* partial) {
        float sum = 0, squares = 0;
#pragma unroll
        for (int w = 0; w < SEAL_WARPS; w++)
            sum += partial[w * TILE_TOKENS + threadIdx.x],
                squares += partial[(SEAL_WARPS + w) * TILE_TOKENS + threadIdx.x];
        return make_float2(sum, squares);
    }
    /// Smallest and largest of the thread's own row of m * token.
    __device__ __forceinline__ float2 bounds(const float* field) const {
        float low[ROWS], high[ROWS];  // -smallest, largest
#pragma unroll
        for (int r = 0; r < ROWS; r++) low[r] = high[r] = -INFINITY;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float token[4];
            four(field, k, token);
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float y = m[r][4 * k + i] * token[i];
                    low[r] = fmaxf(low[r], -y), high[r] = fmaxf(high[r], y);
                }
        }
        auto larger = [](float a, float b) { return fmaxf(a, b); };
        float l[4], h[4];
        if constexpr (ROWS == 8) exchange<4, 8>(low, larger), exchange<4, 8>(high, larger);
#pragma unroll
        for (int i = 0; i < 4; i++) l[i] = low[i], h[i] = high[i];
        exchange<2, 4>(l, larger), exchange<2, 4>(h, larger);
        float l2[2] = {l[0], l[1]}, h2[2] = {h[0], h[1]};
        exchange<1, 2>(l2, larger), exchange<1, 2>(h2, larger);
        if (ROWS == 4)
            l2[0] = fmaxf(l2[0], __shfl_xor_sync(ALL_LANES, l2[0], 4)),
            h2[0] = fmaxf(h2[0], __shfl_xor_sync(ALL_LANES, h2[0], 4));
        return make_float2(-l2[0], h2[0]);
    }
    /// U: m * token - middle, where the recursion reads it.
    __device__ __forceinline__ void write(uint8_t* u, const float* field, const float* middles) const {
        float middle[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) middle[r] = middles[first_row() + r];
        uint8_t* to = u + first_row() / BLOCK * BLOCK_BYTES + first_row() % 8 * 2;
        const uint32_t c = first_row() % BLOCK / 8;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float token[4];
            four(field, k, token);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint32_t pairs[ROWS / 2];
#pragma unroll
                for (int r = 0; r < ROWS; r += 2)
                    pairs[r / 2] = halves_of(fmaf(m[r][4 * k + i], token[i], -middle[r]),
                                             fmaf(m[r + 1][4 * k + i], token[i], -middle[r + 1]));
                const uint32_t offset = chunk_at(32 * k + 4 * x() + i, c);
                if constexpr (ROWS == 8)
                    at<uint4>(to, offset) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
                else
                    at<uint2>(to, offset) = make_uint2(pairs[0], pairs[1]);
            }
        }
    }
};

}  // namespace kvarn
