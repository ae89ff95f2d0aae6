// A decode kernel's configuration: format, sizes, and how much shared memory its rings take.
#pragma once
#include "codes.cuh"

// Shared memory that a block may take, in KiB.
#ifndef KVARN_SHARED_KB
#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)
#define KVARN_SHARED_KB 227
#elif __CUDA_ARCH__ == 800
#define KVARN_SHARED_KB 163
#else
#define KVARN_SHARED_KB 99
#endif
#endif

namespace kvarn {

template <bool WHICH, class A, class B> struct ChooseT {
    using T = A;
};
template <class A, class B> struct ChooseT<false, A, B> {
    using T = B;
};
template <bool WHICH, class A, class B> using Choose = typename ChooseT<WHICH, A, B>::T;

template <class E> struct MathOf { using T = HalfMath; };
template <> struct MathOf<__nv_bfloat16> { using T = Bf16Math; };

/// Formats, by the bits of a code: raw, INT8 pages, and tiles of 4, 3 or 2 bits with INT8 pages for what is not sealed.
/// `Element` is that of raw pages. NT: tiles of 8 columns. BLOCK: tokens of a tile; 0: what the launch says. STEP:
/// groups of 16 tokens that a tile's softmax takes at once. WARPS and STAGES are cut down to what shared memory holds.
template <int BITS_, int D_, int NT_, int BLOCK_, int WARPS_, int STAGES_, class Element_ = __half, int STEP_ = 2>
struct Config {
    static constexpr int BITS = BITS_, D = D_, NT = NT_, BLOCK = BLOCK_, STEP = STEP_, MOST_BLOCK = BLOCK ? BLOCK : 128;
    static constexpr bool RAW = BITS == 16, SEALS = BITS < 8;
    using Element = Element_;
    using QueryMath = typename MathOf<Element>::T;
    using Math = Choose<RAW, QueryMath, HalfMath>;
    using PageCodes = Codes<RAW ? 16 : 8, D>;
    using TileCodes = Codes<SEALS ? BITS : 4, D>;
    using Page = Choose<RAW, RawPage<D>, Int8Page<D>>;
    using TileT = Tile<SEALS ? BITS : 4, D>;
    static constexpr int FRAMES = SEALS ? 3 : 1;  // of q
    static constexpr int PAGE_STEP = Page::MOST_TOKENS / FRAGMENT_TOKENS;

    /// A stage's address agrees with its record's modulo this: else every 128 bytes of shared memory take two lines of
    /// L2.
    static constexpr int PHASES = 128;
    static constexpr int PAGE_STAGE = Page::CHANNEL_BYTES + Page{128}.group_bytes();
    static constexpr int TILE_STAGE = SEALS ? TileT{MOST_BLOCK}.bytes() : 0;
    static constexpr int LARGEST = TILE_STAGE > PAGE_STAGE ? TILE_STAGE : PAGE_STAGE;
    static constexpr int STAGE_BYTES = (LARGEST + PHASES - 16 + PHASES - 1) / PHASES * PHASES;
    // Beside the rings: their barriers, and what warps tell each other at the end.
    static constexpr int SHARED = KVARN_SHARED_KB * 1024 - 2048;
    static constexpr bool FITS = WARPS_ * STAGES_ * (STAGE_BYTES + 8) <= SHARED;
    static constexpr int STAGES = FITS ? STAGES_ : 2;
    static constexpr int WARPS = FITS ? WARPS_
                                 : SHARED / (STAGES * (STAGE_BYTES + 8)) < WARPS_
                                     ? SHARED / (STAGES * (STAGE_BYTES + 8))
                                     : WARPS_;
    static constexpr int RING_BYTES = WARPS * STAGES * STAGE_BYTES, SHARED_BYTES = RING_BYTES + WARPS * STAGES * 8;
    static_assert(STAGES <= 8 && WARPS >= 1, "four bits of phase a stage");

    static DEV int block_size(const AttendParams& p) { return BLOCK ? BLOCK : p.block_size; }
    static DEV Page page(const AttendParams& p) { return Page{block_size(p)}; }
    static DEV TileT tile(const AttendParams& p) { return TileT{block_size(p)}; }
};

}  // namespace kvarn
