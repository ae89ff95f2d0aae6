// Reading what is stored, sixteen tokens at a time: codes as operands, and K of pages and tiles as values.
#pragma once
#include "encode/fragments.cuh"

namespace kvarn {

/// The fields of a sealed tile.
template <int BITS, int D> struct TileView {
    const uint8_t* record;
    Tile<BITS, D> layout;

    __device__ TileView(const uint8_t* record, int block_size) : record(record), layout{block_size} {}
    __device__ const half* halves(int field) const { return reinterpret_cast<const half*>(record + field); }
    __device__ const half* parameter(int token, int field) const {
        return halves(field) + token_index(min(layout.block_size, 32), token);
    }
    __device__ const uint8_t* k_codes() const { return record + layout.k(); }
    __device__ const uint8_t* v_codes() const { return record + layout.v(); }
    __device__ const half* k_token_scale(int token) const { return parameter(token, layout.k_token_scale()); }
    __device__ const half* v_token_scale(int token) const { return parameter(token, layout.v_token_scale()); }
    __device__ const half* v_token_zero_point(int token) const { return parameter(token, layout.v_token_zero_point()); }
};

/// Codes of sixteen tokens: fragment f is four words of two f16 codes, register h + 2 j.
template <int BITS, int D> struct GroupCodes {
    uint32_t w[D * BITS / 64];  // 3 bits: the words of the 2-bit plane, then those of the 1-bit plane

    template <int COUNT> __device__ __forceinline__ void take(const uint8_t* field, int index, int to) {
        if constexpr (COUNT >= 4) {
            const uint4 v = __ldcs(reinterpret_cast<const uint4*>(field) + index);
            w[to] = v.x, w[to + 1] = v.y, w[to + 2] = v.z, w[to + 3] = v.w;
        } else if constexpr (COUNT == 2) {
            const uint2 v = __ldcs(reinterpret_cast<const uint2*>(field) + index);
            w[to] = v.x, w[to + 1] = v.y;
        } else {
            w[to] = __ldcs(reinterpret_cast<const uint32_t*>(field) + index);
        }
    }
    /// `field`: the codes of K or V of a tile, or of the group of a page; `group` counts sixteen tokens in it.
    __device__ __forceinline__ void load(const uint8_t* field, int group, int high_plane) {
        if constexpr (BITS == 8) {
#pragma unroll
            for (int b = 0; b < D / 32; b++) take<4>(field, (group * (D / 32) + b) * 32 + lane(), 4 * b);
        } else if constexpr (BITS == 4) {
#pragma unroll
            for (int i = 0; i < D / 64; i++) take<4>(field, (group * (D / 64) + i) * 32 + lane(), 4 * i);
        } else {
            take<D / 32>(field, group * 32 + lane(), 0);
            if constexpr (BITS == 3) take<D / 64>(field + high_plane, group * 32 + lane(), D / 32);
        }
    }
    /// Codes of 8 bits are less 128 where `SIGNED` (the sign bit is turned over, so that they are whole numbers from
    /// 0).
    template <bool SIGNED> __device__ __forceinline__ void operand(int f, uint32_t (&a)[4]) const {
        constexpr uint32_t MAGIC = 0x64006400u;  // 1024, twice
#pragma unroll
        for (int i = 0; i < 4; i++) {  // i = h + 2 j
            const int h = i % 2, j = i / 2;
            uint32_t codes;
            if constexpr (BITS == 8)
                codes =
                    __byte_perm(w[4 * (f / 2) + 2 * (f % 2) + h] ^ (SIGNED ? 0x80808080u : 0u), 0, j ? 0x4342 : 0x4140);
            else if constexpr (BITS == 4)
                codes = w[f] >> (8 * j + 4 * h) & 0x000f000fu;
            else
                codes = w[f / 2] >> (8 * j + 4 * h + 2 * (f % 2)) & 0x00030003u;
            if constexpr (BITS == 3) {
                const uint32_t high = w[D / 32 + f / 4],
                               at = 8 * j + 4 * h + 2 * (f % 2) + f / 2 % 2 + 2;  // turned by two
                codes |= (at < 16 ? high >> at : __funnelshift_r(high, high, at)) << 2 & 0x00040004u;
            }
            const half2 x = __hsub2(*reinterpret_cast<const half2*>(&(codes |= MAGIC)),
                                    __half2half2(__ushort_as_half(BITS == 8 && SIGNED ? 0x6480 : 0x6400)));
            a[i] = *reinterpret_cast<const uint32_t*>(&x);
        }
    }
};

/// Decodes K of one record (BITS of 8: an INT8 page), by a warp: tokens g and g + 8, channels 32 b + 8 q .. at 8 b.
template <int BITS, int D> struct KeyReader {
    static constexpr int N = D / 16;
    using View = TileView<BITS == 8 ? 4 : BITS, D>;
    const uint8_t *record, *scales, *zeros;
    int block_size;
    bool rotated;
    GroupCodes<BITS, D> codes;  // of the sixteen tokens that are fetched, and their scales
    float2 by_token;

    __device__ __forceinline__ void open(const uint8_t* from, int tokens) {
        const int q = lane() % 4;
        record = from, block_size = tokens, rotated = false;
        if constexpr (BITS == 8) {
            zeros = record + 16 * q, scales = zeros + 2 * D;
            return;
        }
        const View tile(record, block_size);
        scales = record + tile.layout.k_channel_scale() + 16 * q, zeros = scales + 2 * D;
        rotated = record[tile.layout.header() + 1] & K_ROTATED;
    }
    /// Adds a * diag(channel) * H of sixteen channels.
    __device__ __forceinline__ void turn(float (&c)[2][4], const uint32_t (&a)[4], uint2 channel) const {
        const uint32_t g = lane() / 4, q = lane() % 4,
                       sign = (__popc(q & g >> 1) & 1 ? BOTH_SIGNS : 0u) ^ (g & 1 ? HIGH_SIGN : 0u);
        const uint32_t low = channel.x ^ sign, high = channel.y ^ sign;
        mma<half>(c[0], a, low, high);
        mma<half>(c[1], a, low, high ^ BOTH_SIGNS);
    }
    /// Loads tokens 16 `group` .. of the record.
    __device__ __forceinline__ void fetch(int group) {
        const int token = 16 * group + lane() / 4;
        if constexpr (BITS == 8) {
            const PageView<D> page(const_cast<uint8_t*>(record), block_size);
            codes.load(page.group(token), token % page.layout.tokens() / 16, 0);
            by_token = widen_pair<half>(*reinterpret_cast<const uint32_t*>(page.k_token_scale(token)));
        } else {
            const View tile(record, block_size);
            codes.load(tile.k_codes(), group, tile.layout.high_plane());
            by_token = widen_pair<half>(*reinterpret_cast<const uint32_t*>(tile.k_token_scale(token)));
        }
    }
    /// Decodes what was fetched; fetches `next`, if that is not negative.
    __device__ __forceinline__ void read(float (&x)[2][D / 4], int next) {
        const GroupCodes<BITS, D> now = codes;
        float2 scale = by_token;
        if (next >= 0) fetch(next);
        if (!rotated) {
#pragma unroll
            for (int f = 0; f < N; f++) {
                uint32_t a[4];
                now.template operand<true>(f, a);
                const uint2 s = *reinterpret_cast<const uint2*>(scales + f / 2 * 64 + f % 2 * 8),
                            z = *reinterpret_cast<const uint2*>(zeros + f / 2 * 64 + f % 2 * 8);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float2 c = widen_pair<half>(a[i]), by = widen_pair<half>(i < 2 ? s.x : s.y),
                                 from = widen_pair<half>(i < 2 ? z.x : z.y);
                    const float t = i % 2 ? scale.y : scale.x;
                    float* to = &x[i % 2][4 * f + 2 * (i / 2)];
                    if (BITS == 8)
                        to[0] = fmaf(c.x, by.x * t, from.x), to[1] = fmaf(c.y, by.y * t, from.y);
                    else
                        to[0] = fmaf(c.x, by.x, from.x) * t, to[1] = fmaf(c.y, by.y, from.y) * t;
                }
            }
            return;
        }
        const uint32_t ones[4] = {ONES<half>, ONES<half>, ONES<half>, ONES<half>};
        float acc[N][8];
#pragma unroll
        for (int n = 0; n < N; n++) {
            uint32_t a[4];
            now.template operand<true>(n, a);
            float c[2][4] = {};
            turn(c, ones,
                 *reinterpret_cast<const uint2*>(zeros + n / 2 * 64 + n % 2 * 8));  // what zero points alone come to
            turn(c, a, *reinterpret_cast<const uint2*>(scales + n / 2 * 64 + n % 2 * 8));
#pragma unroll
            for (int i = 0; i < 8; i++) acc[n][i] = c[i / 4][i % 4];
        }
        butterflies(acc);
        scale.x *= ROTATION_NORM<D>, scale.y *= ROTATION_NORM<D>;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 8; i++)
                x[i / 2 % 2][4 * n + 2 * (i / 4) + i % 2] = acc[n][i] * (i / 2 % 2 ? scale.y : scale.x);
    }
};

}  // namespace kvarn
