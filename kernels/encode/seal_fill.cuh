// M of one frame, [channel][token] in shared memory, from rows or from a page: a warp loads its 32 tokens straight into
// operands. An mma rotates sixteen channels (or, in the plain frame, only turns rows into columns), butterflies between
// accumulators do the rest. Products are exact; sums are f32.
#pragma once
#include "encode/seal_source.cuh"

namespace kvarn {

/// M has its 16-byte vectors turned so that a lane's accumulators, rows of M, find distinct banks.
__host__ __device__ constexpr uint32_t vector_turn(uint32_t channel) { return (channel & 3) << 1 | (channel >> 4 & 1); }

/// Rows of the step: tokens 8 i + g, channels 32 b + 8 q ..
template <int D, class In> struct StepRows {
    static constexpr int N = D / 16;
    using Operand = typename OperandOf<In>::Type;
    Eight<In> raw[4][D / 32];
    uint32_t a[4];

    __device__ __forceinline__ void load(const RowSource<In>& source) {
        if (!source.is_plain()) {
            load_any(source);
            return;
        }
        const int64_t stride = source.step.p.k.strides[2];
        const In* rows =
            source.row(source.step.p.k, threadIdx.x / 32 * 32 + threadIdx.x % 32 / 4) + 8 * (threadIdx.x % 4);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int b = 0; b < D / 32; b++)
                raw[i][b].v = __ldg(reinterpret_cast<const uint4*>(rows + 8 * i * stride + 32 * b));
    }
    __device__ __forceinline__ void load_any(const RowSource<In>& source) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const In* row = source.row(source.step.p.k, threadIdx.x / 32 * 32 + 8 * i + threadIdx.x % 32 / 4) +
                            8 * (threadIdx.x % 4);
#pragma unroll
            for (int b = 0; b < D / 32; b++) raw[i][b].load(row + 32 * b, false);
        }
    }
    __device__ __forceinline__ void turn(bool rotated) { channels_operand<Operand>(rotated, a); }
    __device__ __forceinline__ void product(int i, float (&acc)[N][4]) const {
#pragma unroll
        for (int n = 0; n < N; n++)
            mma<Operand>(acc[n], a, raw[i][n / 2].part(2 * (n % 2), 0), raw[i][n / 2].part(2 * (n % 2) + 1, 0));
    }
    __device__ __forceinline__ void finish(int, float (&)[N][4]) const {}
    __device__ __forceinline__ int repair() {
        return repair_row<0>() + repair_row<1>() + repair_row<2>() + repair_row<3>();
    }
    template <int I> __device__ __forceinline__ int repair_row() {
        uint32_t odd = 0;
#pragma unroll
        for (int b = 0; b < D / 32; b++) odd |= raw[I][b].repair();
        unsigned lanes = __ballot_sync(ALL_LANES, odd != 0);
        lanes |= lanes >> 1, lanes |= lanes >> 2;
        return __popc(lanes & 0x11111111u);
    }
};
/// Rows of f32 do not fit in registers beside M: they are read when they are multiplied.
template <int D> struct StepRows<D, float> {
    static constexpr int N = D / 16;
    const float* row[4];
    uint32_t a[4];
    bool is_aligned, is_repaired;

    __device__ __forceinline__ void load(const RowSource<float>& source) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            row[i] = source.row(source.step.p.k, threadIdx.x / 32 * 32 + 8 * i + threadIdx.x % 32 / 4) +
                     8 * (threadIdx.x % 4);
        is_aligned = source.step.p.is_aligned, is_repaired = false;
    }
    __device__ __forceinline__ void turn(bool rotated) { channels_operand<bf16>(rotated, a); }
    __device__ __forceinline__ void product(int i, float (&acc)[N][4]) const {
#pragma unroll
        for (int b = 0; b < D / 32; b++) {
            Eight<float> eight;
            eight.load(row[i] + 32 * b, is_aligned);
            if (is_repaired) eight.repair();
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int part = 2; part >= 0; part--)
                    mma<bf16>(acc[2 * b + n], a, eight.part(2 * n, part), eight.part(2 * n + 1, part));
        }
    }
    __device__ __forceinline__ void finish(int, float (&)[N][4]) const {}
    /// How many tokens had other values than finite ones is not known: one at least.
    __device__ __forceinline__ int repair() {
        is_repaired = true;
        return 1;
    }
};

/// INT8 K: mean + scale * token scale * code. The scale of a channel goes into A, with the signs of H.
template <int D> struct PageRows {
    static constexpr int N = D / 16;
    uint4 codes[2][D / 32];
    uint32_t a[N][4];
    float mean[N][2];    // rotated like the rest, of the lane's output channels
    uint32_t tokens[4];  // scales of tokens 8 i + 2 q, + 1
    const uint8_t* channels;

    __device__ __forceinline__ void load(const PageSource& source) {
        const uint32_t lane = threadIdx.x % 32, q = lane % 4;
        const uint8_t* group = source.page + Int8Page<D>::CHANNEL_BYTES + threadIdx.x / 32 * PAGE<D>.group_bytes();
        channels = source.page + q * 16;
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int b = 0; b < D / 32; b++)
                codes[i][b] =
                    __ldg(reinterpret_cast<const uint4*>(group + PAGE<D>.k()) + (i * (D / 32) + b) * 32 + lane);
        const uint16_t* scales = reinterpret_cast<const uint16_t*>(group + PAGE<D>.k_token_scale());
#pragma unroll
        for (int i = 0; i < 4; i++)
            tokens[i] = __ldg(scales + token_index(GROUP, 8 * i + 2 * q)) |
                        uint32_t(__ldg(scales + token_index(GROUP, 8 * i + 2 * q + 1))) << 16;
    }
    __device__ __forceinline__ void turn(bool rotated) {
        uint32_t one[4];
        channels_operand<half>(rotated, one);
#pragma unroll
        for (int n = 0; n < N; n++) {
            const uint2 m =
                __ldg(reinterpret_cast<const uint2*>(channels + Int8Page<D>::K_CHANNEL_MEAN + n / 2 * 64 + n % 2 * 8));
            const uint2 s =
                __ldg(reinterpret_cast<const uint2*>(channels + Int8Page<D>::K_CHANNEL_SCALE + n / 2 * 64 + n % 2 * 8));
            uint32_t of_mean[4];
            float c[4] = {};
#pragma unroll
            for (int i = 0; i < 4; i++) {  // times 1, -1 or 0: exact
                const half2 by = *reinterpret_cast<const half2*>(&one[i]);
                const uint32_t pair = i < 2 ? s.x : s.y, mean_pair = i < 2 ? m.x : m.y;
                const half2 x = __hmul2(*reinterpret_cast<const half2*>(&pair), by),
                            y = __hmul2(*reinterpret_cast<const half2*>(&mean_pair), by);
                a[n][i] = *reinterpret_cast<const uint32_t*>(&x), of_mean[i] = *reinterpret_cast<const uint32_t*>(&y);
            }
            mma<half>(c, of_mean, ONES<half>, ONES<half>);
            mean[n][0] = c[0], mean[n][1] = c[2];
        }
        if (rotated) butterflies(mean);
    }
    __device__ __forceinline__ void product(int i, float (&acc)[N][4]) const {
        const half2 bias = __half2half2(__ushort_as_half(0x6480));  // 1024 + 128
#pragma unroll
        for (int n = 0; n < N; n++) {
            const uint4 v = codes[i / 2][n / 2];
            const uint32_t w = (n % 2 ? (i % 2 ? v.w : v.z) : (i % 2 ? v.y : v.x)) ^ 0x80808080u;
            const uint32_t low = __byte_perm(w, 0x64646464u, 0x4140), high = __byte_perm(w, 0x64646464u, 0x4342);
            const half2 x = __hsub2(*reinterpret_cast<const half2*>(&low), bias),
                        y = __hsub2(*reinterpret_cast<const half2*>(&high), bias);
            mma<half>(acc[n], a[n], *reinterpret_cast<const uint32_t*>(&x), *reinterpret_cast<const uint32_t*>(&y));
        }
    }
    __device__ __forceinline__ void finish(int i, float (&acc)[N][4]) const {
        const float2 token = widen_pair<half>(tokens[i]);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[n][j] = fmaf(acc[n][j], j % 2 ? token.y : token.x, mean[n][j / 2]);
    }
    __device__ __forceinline__ int repair() { return 0; }
};
template <int D, class Source> struct RowsOf;
template <int D, class In> struct RowsOf<D, RowSource<In>> {
    using Type = StepRows<D, In>;
};
template <int D> struct RowsOf<D, PageSource> {
    using Type = PageRows<D>;
};

/// Fills M (times sqrt(D) where it is rotated); leaves sums and sums of squares of tokens over their channels.
template <int D, class Rows>
__device__ __forceinline__ void fill(float* m, float* sums, float* squares, Rows& rows, bool rotated,
                                     uint64_t* non_finite) {
    constexpr int N = D / 16;
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    // A lane's first accumulators are rows of the channel with bits 4, 1, 0 of g; the second ones' have bit 3 too.
    const uint32_t channel = (g >> 2) << 4 | (g & 3),
                   row = channel * (TILE_TOKENS * 4) + threadIdx.x / 32 * 128 + (q & 1) * 8,
                   turn = vector_turn(channel);
    rows.turn(rotated);
    int attempt = 0;
#pragma unroll 1
    do {
        bool finite = true;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float acc[N][4] = {}, sum[4] = {};  // of both tokens, then squares
            rows.product(i, acc);
            if (rotated) butterflies(acc);
            rows.finish(i, acc);
            uint8_t* to = reinterpret_cast<uint8_t*>(m) + row + ((2 * i + (q >> 1)) ^ turn) * 16;
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float x = acc[n][2 * half], y = acc[n][2 * half + 1];
                    sum[0] += x, sum[1] += y, sum[2] = fmaf(x, x, sum[2]), sum[3] = fmaf(y, y, sum[3]);
                    *reinterpret_cast<float2*>(to + (n / 2 * 32 + n % 2 * 4 + half * 8) * (TILE_TOKENS * 4)) =
                        make_float2(x, y);
                }
#pragma unroll
            for (int mask = 4; mask < 32; mask *= 2)
#pragma unroll
                for (int j = 0; j < 4; j++) sum[j] += __shfl_xor_sync(ALL_LANES, sum[j], mask);
            finite &= sum[2] < LARGEST_SQUARES && sum[3] < LARGEST_SQUARES;
            const int token = threadIdx.x / 32 * 32 + 8 * i + 2 * q;
            if (g == 0) {
                *reinterpret_cast<float2*>(sums + token) = make_float2(sum[0], sum[1]);
                *reinterpret_cast<float2*>(squares + token) = make_float2(sum[2], sum[3]);
            }
        }
        if (__all_sync(ALL_LANES, finite) || attempt) break;
        const int repaired = rows.repair();
        if (!rotated && lane == 0) count(non_finite, repaired);
        asm volatile("mov.b32 %0, 1;" : "=r"(attempt));  // opaque, so that the loop's body is there once
    } while (true);
}

}  // namespace kvarn
