// From words of codes to operands of the matrix unit; K and V share everything here.
//
// A masked code is an fp16 subnormal already: code * 2^-24 * 2^(its lowest bit). Matrix units take subnormals at full
// rate and exactly, so that a conversion is one AND; `unit(f, h)` is what one code of fragment f, rows g + 8 h, is
// worth.
#pragma once
#include "params.cuh"
#include "ptx.cuh"

namespace kvarn {

__host__ __device__ constexpr float code_unit(int shift) { return pow2(shift - 24); }

/// `Words`: what a lane has of one group of 16 tokens. `load(field, high_plane, group, lane)`: `high_plane` is the
/// offset of the 1-bit plane of 3-bit codes. `fragment<SIGNED>(words, f, a)`: operand of fragment f, a constant
/// wherever it is called.
template <int BITS, int D> struct Codes;

template <int D> struct Codes<16, D> {
    static constexpr int FRAGMENTS = D / 16;
    struct Words {
        uint4 w[FRAGMENTS];
    };
    static __host__ __device__ constexpr float unit(int, int) { return 1.f; }
    static DEV Words load(const uint8_t* field, int, int group, int lane) {
        Words r;
        const uint4* from = reinterpret_cast<const uint4*>(field) + group * FRAGMENTS * 32 + lane;
#pragma unroll
        for (int i = 0; i < FRAGMENTS; i++) r.w[i] = from[i * 32];
        return r;
    }
    template <bool SIGNED> static DEV void fragment(const Words& x, int f, uint32_t (&a)[4]) {
        a[0] = x.w[f].x, a[1] = x.w[f].y, a[2] = x.w[f].z, a[3] = x.w[f].w;
    }
};

/// INT8. Signed codes come out with 128 added.
template <int D> struct Codes<8, D> {
    static constexpr int FRAGMENTS = D / 16;
    struct Words {
        uint4 w[FRAGMENTS / 2];
    };
    static __host__ __device__ constexpr float unit(int, int) { return code_unit(0); }
    static DEV Words load(const uint8_t* field, int, int group, int lane) {
        Words r;
        const uint4* from = reinterpret_cast<const uint4*>(field) + group * (FRAGMENTS / 2) * 32 + lane;
#pragma unroll
        for (int i = 0; i < FRAGMENTS / 2; i++) r.w[i] = from[i * 32];
        return r;
    }
    template <bool SIGNED> static DEV void fragment(const Words& x, int f, uint32_t (&a)[4]) {
        uint32_t low = f % 2 ? x.w[f / 2].z : x.w[f / 2].x, high = f % 2 ? x.w[f / 2].w : x.w[f / 2].y;
        if (SIGNED) low ^= 0x80808080u, high ^= 0x80808080u;
        a[0] = __byte_perm(low, 0u, 0x4140), a[2] = __byte_perm(low, 0u, 0x4342);
        a[1] = __byte_perm(high, 0u, 0x4140), a[3] = __byte_perm(high, 0u, 0x4342);
    }
};

template <int D> struct Codes<4, D> {
    static constexpr int FRAGMENTS = D / 16;
    struct Words {
        uint32_t w[FRAGMENTS];
    };
    static __host__ __device__ constexpr float unit(int, int h) { return code_unit(4 * h); }
    static DEV Words load(const uint8_t* field, int, int group, int lane) {
        Words r;
        const uint4* from = reinterpret_cast<const uint4*>(field) + group * (FRAGMENTS / 4) * 32 + lane;
#pragma unroll
        for (int i = 0; i < FRAGMENTS / 4; i++) {
            const uint4 v = from[i * 32];
            r.w[4 * i] = v.x, r.w[4 * i + 1] = v.y, r.w[4 * i + 2] = v.z, r.w[4 * i + 3] = v.w;
        }
        return r;
    }
    template <bool SIGNED> static DEV void fragment(const Words& x, int f, uint32_t (&a)[4]) {
        const uint32_t w = x.w[f], up = w >> 8;
        a[0] = w & 0x000f000fu, a[1] = w & 0x00f000f0u, a[2] = up & 0x000f000fu, a[3] = up & 0x00f000f0u;
    }
};

/// A lane's 2-bit words of a group: D / 32 of them.
template <int D> DEV void load_pairs(const uint8_t* field, int group, int lane, uint32_t (&w)[D / 32]) {
    if constexpr (D == 64) {
        const uint2 v = reinterpret_cast<const uint2*>(field)[group * 32 + lane];
        w[0] = v.x, w[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < D / 128; i++) {
            const uint4 v = reinterpret_cast<const uint4*>(field)[(group * (D / 128) + i) * 32 + lane];
            w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
        }
    }
}

template <int D> struct Codes<2, D> {
    static constexpr int FRAGMENTS = D / 16;
    struct Words {
        uint32_t w[D / 32];
    };
    static __host__ __device__ constexpr float unit(int f, int h) { return code_unit(2 * (f % 2) + 4 * h); }
    static DEV Words load(const uint8_t* field, int, int group, int lane) {
        Words r;
        load_pairs<D>(field, group, lane, r.w);
        return r;
    }
    template <bool SIGNED> static DEV void fragment(const Words& x, int f, uint32_t (&a)[4]) {
        const uint32_t w = x.w[f / 2], up = w >> 8;
        if (f % 2 == 0) {
            a[0] = w & 0x00030003u, a[1] = w & 0x00300030u, a[2] = up & 0x00030003u, a[3] = up & 0x00300030u;
        } else {
            a[0] = w & 0x000c000cu, a[1] = w & 0x00c000c0u, a[2] = up & 0x000c000cu, a[3] = up & 0x00c000c0u;
        }
    }
};

/// A 2-bit plane and a 1-bit plane, which one select puts above it.
template <int D> struct Codes<3, D> {
    static constexpr int FRAGMENTS = D / 16;
    struct Words {
        uint32_t w[D / 32], high[D / 64];
    };
    static __host__ __device__ constexpr float unit(int f, int h) { return code_unit(2 * (f % 2) + 4 * h); }
    static DEV Words load(const uint8_t* field, int high_plane, int group, int lane) {
        Words r;
        load_pairs<D>(field, group, lane, r.w);
        const uint8_t* plane = field + high_plane;
        if constexpr (D == 64) {
            r.high[0] = reinterpret_cast<const uint32_t*>(plane)[group * 32 + lane];
        } else {
#pragma unroll
            for (int i = 0; i < D / 128; i++) {
                const uint2 v = reinterpret_cast<const uint2*>(plane)[(group * 32 + lane) * (D / 128) + i];
                r.high[2 * i] = v.x, r.high[2 * i + 1] = v.y;
            }
        }
        return r;
    }
    template <bool SIGNED> static DEV void fragment(const Words& x, int f, uint32_t (&a)[4]) {
        const uint32_t low = x.w[f / 2], high = x.high[f / 4] >> (f / 2 % 2);
        if (f % 2 == 0) {  // codes in bits 0..2 of each nibble; bit 3 is another's and masked away
            const uint32_t w = (low & 0x33333333u) | (high & 0xccccccccu), up = w >> 8;
            a[0] = w & 0x00070007u, a[1] = w & 0x00700070u, a[2] = up & 0x00070007u, a[3] = up & 0x00700070u;
        } else {  // codes in bits 2..4, the last one's high bit in bit 0 of the word
            const uint32_t w = (low & 0xccccccccu) | (high & 0x33333333u), up = __funnelshift_r(w, w, 8);
            a[0] = w & 0x001c001cu, a[1] = w & 0x01c001c0u, a[2] = up & 0x001c001cu, a[3] = up & 0x01c001c0u;
        }
    }
};

}  // namespace kvarn
