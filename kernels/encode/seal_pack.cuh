// From codes to the planes of a tile, in the order of operands. K comes as bytes [token][channel] in shared memory, V
// as nibbles in the registers of a thread per token.
#pragma once
#include "encode/seal_common.cuh"

namespace kvarn {

/// A row of K's bytes has no padding; its words are turned by bits of the token so that a thread per token writes, and
/// a lane per (row, four channels) reads, 32 distinct banks.
template <int D> __device__ __forceinline__ uint32_t row_turn(int token) {
    const uint32_t g = token % 8, h = token / 8 % 2, group = token / 16 % 2;
    return D == 64 ? (g >> 1 & 1) | (g >> 2 & 1) << 3 | h << 1 | group << 2
                   : (g & 1) | (g >> 1) << 3 | h << 1 | group << 2;
}
/// The byte of a channel in its row, before the turn: the middle two of four change places, as operands want them.
__host__ __device__ constexpr uint32_t staged_channel(uint32_t channel) {
    return (channel & ~3u) | (channel & 1) << 1 | (channel >> 1 & 1);
}

template <int WORDS> struct Vector;
template <> struct Vector<4> {
    using Type = uint4;
};
template <> struct Vector<2> {
    using Type = uint2;
};
template <> struct Vector<1> {
    using Type = uint32_t;
};
template <int WORDS> union Words {
    typename Vector<WORDS>::Type vector;
    uint32_t word[WORDS];
};

/// One plane of K: `WIDTH` bits of each code from bit `FROM` on. Bits above the code are ignored.
template <int WIDTH, int FROM, int D> __device__ __forceinline__ void pack_k_plane(const uint8_t* stage, uint8_t* out) {
    constexpr int FRAGMENTS = 4 / WIDTH, WORDS = D / 16 / FRAGMENTS, VECTOR = WORDS < 4 ? WORDS : 4,
                  VECTORS = WORDS / VECTOR;
    constexpr uint32_t MASK = ((1u << WIDTH) - 1) * 0x01010101u;
#pragma unroll 1
    for (int v = threadIdx.x; v < TILE_TOKENS / FRAGMENT * VECTORS * 32; v += SEAL_THREADS) {
        const int lane = v % 32, token = v / 32 / VECTORS * FRAGMENT + lane / 4,
                  first = v / 32 % VECTORS * (VECTOR * FRAGMENTS);
        Words<VECTOR> packed;
#pragma unroll
        for (int w = 0; w < VECTOR; w++) {
            uint32_t word = 0;
#pragma unroll
            for (int i = 0; i < FRAGMENTS; i++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int fragment = first + w * FRAGMENTS + i, row = token + 8 * h;
                    const uint32_t at = (fragment / 2 * 8 + lane % 4 * 2 + fragment % 2) ^ row_turn<D>(row);
                    const uint32_t codes = *reinterpret_cast<const uint32_t*>(stage + row * D + at * 4);
                    word |= (codes >> FROM & MASK) << (4 * h + (WIDTH == 1 ? 2 * (i % 2) + i / 2 : WIDTH * i));
                }
            packed.word[w] = WIDTH == 1 ? __funnelshift_l(word, word, 2) : word;
        }
        reinterpret_cast<typename Vector<VECTOR>::Type*>(out)[v] = packed.vector;
    }
}

template <int BITS, int D> __device__ __forceinline__ void pack_k(const uint8_t* stage, uint8_t* record) {
    if constexpr (BITS == 4)
        pack_k_plane<4, 0, D>(stage, record);
    else
        pack_k_plane<2, 0, D>(stage, record);
    if constexpr (BITS == 3) pack_k_plane<1, 2, D>(stage, record + TILE<BITS, D>.high_plane());
}

/// Four words of four tokens to four words of one byte each, in the order A C B D.
__device__ __forceinline__ void transpose(const uint32_t (&t)[4], uint32_t (&out)[4]) {
    const uint32_t low_a = __byte_perm(t[0], t[2], 0x5140), high_a = __byte_perm(t[0], t[2], 0x7362);
    const uint32_t low_b = __byte_perm(t[1], t[3], 0x5140), high_b = __byte_perm(t[1], t[3], 0x7362);
    out[0] = __byte_perm(low_a, low_b, 0x5410), out[1] = __byte_perm(low_a, low_b, 0x7632);
    out[2] = __byte_perm(high_a, high_b, 0x5410), out[3] = __byte_perm(high_a, high_b, 0x7632);
}

/// One plane of V from its bytes [token][BYTES] (pitch PITCH), a byte for 8 / WIDTH channels.
template <int WIDTH, int D, int PITCH>
__device__ __forceinline__ void pack_v_plane(const uint8_t* stage, uint8_t* out) {
    constexpr int WORDS = D / 64 * WIDTH, VECTOR = WORDS < 4 ? WORDS : 4, VECTORS = WORDS / VECTOR;
#pragma unroll 1
    for (int v = threadIdx.x; v < TILE_TOKENS / FRAGMENT * VECTORS * 32; v += SEAL_THREADS) {
        const int lane = v % 32, token = v / 32 / VECTORS * FRAGMENT + lane % 4 * 2;
        const uint8_t* from = stage + token * PITCH + lane / 4 * WORDS + v / 32 % VECTORS * VECTOR;
        uint32_t tokens[4], words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint8_t* row = from + (i % 2 + i / 2 * 8) * PITCH;
            tokens[i] = VECTOR == 4   ? *reinterpret_cast<const uint32_t*>(row)
                        : VECTOR == 2 ? *reinterpret_cast<const uint16_t*>(row)
                                      : *row;
        }
        transpose(tokens, words);
        Words<VECTOR> packed;
#pragma unroll
        for (int w = 0; w < VECTOR; w++)
            packed.word[w] = WIDTH == 1 ? __funnelshift_l(words[w], words[w], 2) : words[w];
        reinterpret_cast<typename Vector<VECTOR>::Type*>(out)[v] = packed.vector;
    }
}

/// V's codes, eight nibbles a word, to `planes`.
template <int BITS, int D>
__device__ __forceinline__ void pack_v(uint8_t* stage, const uint32_t (&nibbles)[D / 8], uint8_t* out) {
    constexpr int PITCH = (BITS == 4 ? D / 2 : D / 4) + 4, HIGH = TILE_TOKENS * PITCH,
                  HIGH_PITCH = D / 8 + 4;  // odd numbers of words
    constexpr uint32_t TO_A_BYTE =
        1u << 24 | 1u << 18 | 1u << 9 | 1u << 3;  // bits 4 i to bits 4 (i % 2) + 2 (i / 2 % 2) + i / 4 of byte 3
    uint32_t* row = reinterpret_cast<uint32_t*>(stage + threadIdx.x * PITCH);
    uint32_t* high = reinterpret_cast<uint32_t*>(stage + HIGH + threadIdx.x * HIGH_PITCH);
    if constexpr (BITS == 4) {
#pragma unroll
        for (int i = 0; i < D / 8; i++) row[i] = nibbles[i];
    } else {
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            const uint32_t a = nibbles[2 * i], b = nibbles[2 * i + 1];
            row[i] = __byte_perm((a & 0x00330033u) | (a >> 6 & 0x00cc00ccu), (b & 0x00330033u) | (b >> 6 & 0x00cc00ccu),
                                 0x6420);
        }
    }
    if constexpr (BITS == 3) {
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            uint32_t bytes[4];
#pragma unroll
            for (int j = 0; j < 4; j++) bytes[j] = (nibbles[4 * i + j] >> 2 & 0x11111111u) * TO_A_BYTE;
            high[i] =
                __byte_perm(__byte_perm(bytes[0], bytes[1], 0x0073), __byte_perm(bytes[2], bytes[3], 0x0073), 0x5410);
        }
    }
    __syncthreads();
    pack_v_plane<BITS == 4 ? 4 : 2, D, PITCH>(stage, out);
    if constexpr (BITS == 3) pack_v_plane<1, D, HIGH_PITCH>(stage + HIGH, out + TILE<BITS, D>.high_plane());
}

}  // namespace kvarn
