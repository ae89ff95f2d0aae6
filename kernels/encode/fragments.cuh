// Sixteen tokens of a warp as operands of mma.m16n8k16: what kernels that take whole groups share.
//
// Lane (g, q) = (lane / 4, lane % 4) has tokens g and g + 8 of the group, and of each 32 channels 8 q to 8 q + 7:
// 16-byte loads of rows, one 16-byte chunk of INT8 K. As an operand, two registers (four channels 4 f ..) are 16
// channels of the warp: bits 4, 3 (q), 1 and 0 of the channel's number. H of D channels is H of these 16 by one mma,
// then butterflies over the bits that are left, 2 (f) and 5, 6 (the 32 channels), between accumulators of one lane.
// Factors are 1, -1 and 0: products are exact.
#pragma once
#include "encode/encode.cuh"

namespace kvarn {

constexpr uint32_t BOTH_SIGNS = 0x80008000u, HIGH_SIGN = 0x80000000u;

/// The 16-bit type that rows of In are multiplied as. A row of f32 is the sum of three of bf16.
template <class In> struct OperandOf {
    using Type = In;
    static constexpr int PARTS = 1;
};
template <> struct OperandOf<float> {
    using Type = bf16;
    static constexpr int PARTS = 3;
};
template <class T> constexpr uint32_t ONES = 0x3c003c00u;  // 1, twice
template <> constexpr uint32_t ONES<bf16> = 0x3f803f80u;

template <class T> __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> __device__ __forceinline__ void mma<half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ __forceinline__ void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Eight neighbouring values of a row.
template <class In> struct Eight;
template <class T> struct EightHalves {
    uint4 v;
    __device__ __forceinline__ uint32_t word(int i) const { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
    __device__ __forceinline__ void load(const T* from, bool is_aligned) {
        if (is_aligned) {
            v = __ldcs(reinterpret_cast<const uint4*>(from));
            return;
        }
        const uint16_t* x = reinterpret_cast<const uint16_t*>(from);
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; i++) w[i] = __ldg(x + 2 * i) | uint32_t(__ldg(x + 2 * i + 1)) << 16;
        v = make_uint4(w[0], w[1], w[2], w[3]);
    }
    __device__ __forceinline__ float2 pair(int i) const { return widen_pair<T>(word(i)); }
    __device__ __forceinline__ uint32_t part(int i, int) const { return word(i); }
    /// Makes values finite, and holds them within LARGEST_VALUE; not 0 where some were not finite.
    __device__ __forceinline__ uint32_t repair() {
        return make_finite<T>(v.x) | make_finite<T>(v.y) | make_finite<T>(v.z) | make_finite<T>(v.w);
    }
};
template <> struct Eight<void> {};
template <> struct Eight<half> : EightHalves<half> {};
template <> struct Eight<bf16> : EightHalves<bf16> {};
template <> struct Eight<float> {
    float4 v[2];
    __device__ __forceinline__ void load(const float* from, bool is_aligned) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (is_aligned)
                v[i] = __ldcs(reinterpret_cast<const float4*>(from) + i);
            else
                v[i] = make_float4(__ldg(from + 4 * i), __ldg(from + 4 * i + 1), __ldg(from + 4 * i + 2),
                                   __ldg(from + 4 * i + 3));
        }
    }
    __device__ __forceinline__ float2 pair(int i) const {
        return i % 2 ? make_float2(v[i / 2].z, v[i / 2].w) : make_float2(v[i / 2].x, v[i / 2].y);
    }
    /// The bf16 of what parts before it left: three of them are the value to the last bit.
    __device__ __forceinline__ uint32_t part(int i, int which) const {
        float2 x = pair(i);
        uint32_t word = narrow_pair<bf16>(x.x, x.y);
#pragma unroll
        for (int n = 0; n < which; n++) {
            const float2 taken = widen_pair<bf16>(word);
            x.x -= taken.x, x.y -= taken.y;
            word = narrow_pair<bf16>(x.x, x.y);
        }
        return word;
    }
    __device__ __forceinline__ uint32_t repair() {
        uint32_t odd = 0;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float* x = &v[i].x;
#pragma unroll
            for (int j = 0; j < 4; j++) odd |= !is_finite(x[j]), x[j] = bounded(finite<float>(x[j]), LARGEST_VALUE);
        }
        return odd;
    }
};

/// Rows of sixteen tokens.
template <int D, class In> struct FragmentRows {
    using Operand = typename OperandOf<In>::Type;
    Eight<In> v[2][D / 32];  // of tokens g and g + 8

    __device__ __forceinline__ void load(const In* row, const In* row_8, bool is_aligned) {
#pragma unroll
        for (int b = 0; b < D / 32; b++)
            v[0][b].load(row + 32 * b + 8 * (lane() % 4), is_aligned),
                v[1][b].load(row_8 + 32 * b + 8 * (lane() % 4), is_aligned);
    }
    /// Adds a times the channels of fragment n, of tokens g (half 0) or g + 8.
    __device__ __forceinline__ void product(float (&c)[4], const uint32_t (&a)[4], int half_of, int n) const {
#pragma unroll
        for (int part = OperandOf<In>::PARTS - 1; part >= 0; part--)
            mma<Operand>(c, a, v[half_of][n / 2].part(2 * (n % 2), part),
                         v[half_of][n / 2].part(2 * (n % 2) + 1, part));
    }
    /// Makes all values finite; gives how many of the warp's tokens had others, in every lane.
    __device__ __forceinline__ int repair() { return repair_half<0>() + repair_half<1>(); }
    template <int H> __device__ __forceinline__ int repair_half() {
        uint32_t odd = 0;
#pragma unroll
        for (int b = 0; b < D / 32; b++) odd |= v[H][b].repair();
        unsigned lanes = __ballot_sync(ALL_LANES, odd != 0);
        lanes |= lanes >> 1, lanes |= lanes >> 2;
        return __popc(lanes & 0x11111111u);
    }
};

/// Operand A whose rows are output channels (bits 4, 1, 0 of the channel are g, bit 3 the half) and whose columns are
/// 16 channels of tokens as `FragmentRows` has them: H of the 16, or the identity, by which an mma only turns channels
/// and tokens round.
template <class T> __device__ __forceinline__ void channels_operand(bool rotate, uint32_t (&a)[4]) {
    const uint32_t g = lane() / 4, q = lane() % 4;
    const uint32_t q_sign = q & 1 ? BOTH_SIGNS : 0u, g_sign = g >> 1 & 1 ? BOTH_SIGNS : 0u;
    if (rotate) {
        a[0] = ONES<T> ^ (g >> 2 & q >> 1 ? BOTH_SIGNS : 0u) ^ (g & 1 ? HIGH_SIGN : 0u), a[1] = a[0] ^ q_sign;
        a[2] = a[0] ^ g_sign, a[3] = a[1] ^ g_sign;
    } else {
        const uint32_t one = g >> 2 == q >> 1 ? ONES<T> & (g & 1 ? 0xffff0000u : 0xffffu) : 0u;
        a[0] = !q_sign && !g_sign ? one : 0u, a[1] = q_sign && !g_sign ? one : 0u;
        a[2] = !q_sign && g_sign ? one : 0u, a[3] = q_sign && g_sign ? one : 0u;
    }
}

/// Butterflies over bits of the first index of `acc`: what is left of H once mma has done its sixteen channels.
template <int N, int M> __device__ __forceinline__ void butterflies(float (&acc)[N][M]) {
#pragma unroll
    for (int half = 1; half < N; half *= 2)
#pragma unroll
        for (int i = 0; i < N; i++)
            if (!(i & half))
#pragma unroll
                for (int j = 0; j < M; j++) {
                    const float a = acc[i][j], b = acc[i + half][j];
                    acc[i][j] = a + b, acc[i + half][j] = a - b;
                }
}

}  // namespace kvarn
