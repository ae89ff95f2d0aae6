// Where a code of (token, channel) lies in its field: Arrangement::Cuda of src/format/order/cuda.rs, which says why, as
// formulas. `dim` is head_dim, any multiple of 16. layout_check.cu compares both.
#pragma once
#include "types.cuh"

namespace kvarn {

constexpr int FRAGMENT_TOKENS = 16;  // tokens of a fragment: its rows in K, its columns in V

/// A code's place among the fragments of 16 x 16: lane 4 g + t, register h + 2 j, half e of the register.
struct Place {
    int group, fragment, g, t, h, j, e;
    __host__ __device__ constexpr int lane() const { return 4 * g + t; }
};

/// K: rows are tokens. Lane t has channels [32 b + 8 t, + 8) of each 32; of the last 16 of an odd number of them, four.
__host__ __device__ constexpr Place k_place(int dim, int token, int channel) {
    const bool whole = channel / 32 < dim / 32;
    return {token / 16,    whole ? channel / 32 * 2 + channel / 4 % 2 : channel / 16,
            token % 8,     whole ? channel / 8 % 4 : channel / 4 % 4,
            token / 8 % 2, channel / 2 % 2,
            channel % 2};
}
/// The same of a multiple of 32 channels.
__host__ __device__ constexpr Place k_place(int token, int channel) { return k_place(channel + 32, token, channel); }

/// V: rows are channels. Lane g has the channels [g dim/8, + dim/8), so that it writes its outputs contiguously.
__host__ __device__ constexpr Place v_place(int dim, int token, int channel) {
    return {token / 16,  channel % (dim / 8) / 2, channel / (dim / 8), token % 8 / 2,
            channel % 2, token / 8 % 2,           token % 2};
}

/// Fragments that share 32 bits of a plane of codes of so many bits: all that fit, or a half or quarter of these where
/// the number of fragments is no multiple.
__host__ __device__ constexpr int unit_fragments(int bits, int dim) {
    const int most = bits > 2 ? 1 : 4 / bits, num = dim / 16;
    return num % most == 0 ? most : num % (most / 2) == 0 ? most / 2 : 1;
}
/// Units of a lane side by side: a 16-byte load's, or all where they do not fill such loads. `bits` of a code.
__host__ __device__ constexpr int units_together(int bits, int dim) {
    const int fragments = unit_fragments(bits, dim), units = dim / 16 / fragments;
    const int loads = 16 / (bits * fragments) > 0 ? 16 / (bits * fragments) : 1;
    return units % loads == 0 ? loads : units;
}
/// Index of code `within` of the unit that the place is in.
__host__ __device__ constexpr int index_of(int bits, int dim, Place p, int within) {
    const int fragments = unit_fragments(bits, dim), units = dim / 16 / fragments, unit = p.fragment / fragments;
    const int together = units_together(bits, dim);
    const int load = p.group * (units / together) + unit / together;
    return ((load * 32 + p.lane()) * together + unit % together) * 8 * fragments + within;
}

/// Index of a raw element: a fragment of 16-bit elements is one 16-byte load.
__host__ __device__ constexpr int index16(int dim, Place p) {
    return index_of(16, dim, p, (p.h + 2 * p.j) * 2 + p.e);
}
/// Index of an INT8 code. Four neighbouring bytes share a row: also the order of mma.m16n8k32.s8.
__host__ __device__ constexpr int index8(int dim, Place p) { return index_of(8, dim, p, p.h * 4 + p.j * 2 + p.e); }
/// Index of a 4-bit code: a fragment a word.
__host__ __device__ constexpr int index4(int dim, Place p) { return index_of(4, dim, p, p.e * 4 + p.j * 2 + p.h); }
/// Index of a 2-bit code, in 2-bit tiles and in the low plane of 3-bit ones: two fragments a word, side by side in
/// nibbles. Of an odd number of fragments each is 16 bits, in which the halves of a register are side by side.
__host__ __device__ constexpr int index2(int dim, Place p) {
    return index_of(2, dim, p,
                    unit_fragments(2, dim) == 2 ? p.e * 8 + p.j * 4 + p.h * 2 + p.fragment % 2 : p.j * 4 + p.h * 2 + p.e);
}
/// Index of a bit of the high plane of 3-bit tiles: four fragments a word. It sits where, after a shift by
/// `fragment / 2 % 2`, one select puts it above the low two bits of its code: bit 2 of the nibble of even fragments, bit
/// 0 of the next nibble of odd ones.
__host__ __device__ constexpr int index1(int dim, Place p) {
    const int nibble = p.e * 4 + p.j * 2 + p.h, second = p.fragment / 2 % 2, odd = p.fragment % 2;
    const int of_four = odd ? (4 * (nibble + 1) + second) % 32 : 4 * nibble + 2 + second;
    const int of_two = (p.j * 2 + p.h) * 4 + odd * 2 + p.e;
    const int fragments = unit_fragments(1, dim);
    return index_of(1, dim, p, fragments == 4 ? of_four : fragments == 2 ? of_two : nibble);
}
/// Index of a token's parameter, in groups of 32 tokens (16, in a block of 16): a lane's four tokens of 32 are one 8-byte
/// load.
__host__ __device__ constexpr int token_index(int group_tokens, int token) {
    return token / group_tokens * group_tokens + token % 8 * (group_tokens / 8) + token % group_tokens / 16 * 2 + token / 8 % 2;
}

}  // namespace kvarn
