// Where the fields of a record start, in bytes, in Arrangement::Cuda. layout_check.cu compares them with src/format.
#pragma once
#include "order.cuh"

namespace kvarn {

/// Sealed tile: every field whole.
template <int BITS, int D> struct Tile {
    int block_size;
    __host__ __device__ constexpr int code_bytes() const { return block_size * D * BITS / 8; }
    /// Of the 1-bit plane of 3-bit codes, in the codes of K or of V.
    __host__ __device__ constexpr int high_plane() const { return block_size * D / 4; }
    __host__ __device__ constexpr int k() const { return 0; }
    __host__ __device__ constexpr int v() const { return code_bytes(); }
    __host__ __device__ constexpr int k_channel_scale() const { return 2 * code_bytes(); }
    __host__ __device__ constexpr int k_channel_zero_point() const { return k_channel_scale() + 2 * D; }
    __host__ __device__ constexpr int k_token_scale() const { return k_channel_zero_point() + 2 * D; }
    __host__ __device__ constexpr int v_token_scale() const { return k_token_scale() + 2 * block_size; }
    __host__ __device__ constexpr int v_token_zero_point() const { return v_token_scale() + 2 * block_size; }
    __host__ __device__ constexpr int first_v() const { return v_token_zero_point() + 2 * block_size; }
    __host__ __device__ constexpr int first_v_scale() const { return first_v() + D; }
    __host__ __device__ constexpr int first_v_zero_point() const { return first_v_scale() + 2; }
    /// Version, flags, first row, 0.
    __host__ __device__ constexpr int header() const { return first_v_zero_point() + 2; }
    __host__ __device__ constexpr int bytes() const { return (header() + 4 + 15) / 16 * 16; }
};

/// INT8 page: channel means and scales, then groups of 32 tokens (of 16, in a block of 16), each K | V | K scales |
/// V scales | V zero points. Offsets but for those of channels are within a group.
template <int D> struct Int8Page {
    static constexpr int MOST_TOKENS = 32;
    static constexpr int K_CHANNEL_MEAN = 0, K_CHANNEL_SCALE = 2 * D, CHANNEL_BYTES = 4 * D;
    int block_size;
    __host__ __device__ constexpr int tokens() const { return block_size < MOST_TOKENS ? block_size : MOST_TOKENS; }
    __host__ __device__ constexpr int k() const { return 0; }
    __host__ __device__ constexpr int v() const { return tokens() * D; }
    __host__ __device__ constexpr int k_token_scale() const { return 2 * tokens() * D; }
    __host__ __device__ constexpr int v_token_scale() const { return k_token_scale() + 2 * tokens(); }
    __host__ __device__ constexpr int v_token_zero_point() const { return v_token_scale() + 2 * tokens(); }
    __host__ __device__ constexpr int group_bytes() const { return v_token_zero_point() + 2 * tokens(); }
    __host__ __device__ constexpr int bytes() const { return CHANNEL_BYTES + block_size / tokens() * group_bytes(); }
};

/// Raw page of elements of so many bytes: groups of 16 tokens, each K | V.
template <int D, int ELEMENT_BYTES = 2> struct RawPage {
    static constexpr int MOST_TOKENS = FRAGMENT_TOKENS, CHANNEL_BYTES = 0;
    int block_size;
    __host__ __device__ constexpr int tokens() const { return MOST_TOKENS; }
    __host__ __device__ constexpr int k() const { return 0; }
    __host__ __device__ constexpr int v() const { return ELEMENT_BYTES * tokens() * D; }
    __host__ __device__ constexpr int group_bytes() const { return 2 * ELEMENT_BYTES * tokens() * D; }
    __host__ __device__ constexpr int bytes() const { return block_size / tokens() * group_bytes(); }
};

}  // namespace kvarn
