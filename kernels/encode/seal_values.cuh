// V of one (block, kv head) tile: rotated rows, one grid a token, its ends drawn in where that lowers the squared
// error.
#pragma once
#include "encode/seal_pack.cuh"
#include "encode/seal_source.cuh"

namespace kvarn {

struct TokenGrid {
    half scale, zero;
};

/// The grid from lo to hi, drawn in about its middle by the factor a.
template <int BITS> __device__ __forceinline__ TokenGrid token_grid(float lo, float hi, float a) {
    const float margin = (hi - lo) * ((1.f - a) / 2.f), from = lo + margin, to = hi - margin;
    return {to_half((to - from) / ((1 << BITS) - 1)), to_half(from)};
}

/// What rounds under a grid: x * inverse + bias, saturated, is the code over the largest.
template <int BITS> struct Rounder {
    static constexpr float CODE_MAX = (1 << BITS) - 1;
    float scale, zero, inverse, bias;
    __device__ explicit Rounder(TokenGrid g) : scale(__half2float(g.scale)), zero(__half2float(g.zero)) {
        inverse = scale > 0.f ? 1.f / (scale * CODE_MAX) : 0.f, bias = -zero * inverse;
    }
    /// The code, plus SHIFT.
    __device__ float shifted(float x) const { return fmaf(__saturatef(fmaf(x, inverse, bias)), CODE_MAX, SHIFT); }
    __device__ float error(float x) const { return x - fmaf(shifted(x) - SHIFT, scale, zero); }
};

/// The factors that are tried.
template <int BITS> __device__ __forceinline__ float shrink(int i) {
    if (BITS == 2) return i == 0 ? 1.f : i == 1 ? 0.9f : i == 2 ? 0.8f : i == 3 ? 0.7f : i == 4 ? 0.6f : 0.5f;
    return i == 0 ? 1.f : i == 1 ? 0.95f : i == 2 ? 0.9f : i == 3 ? 0.85f : i == 4 ? 0.8f : 0.7f;
}

template <int D, int BITS> __device__ __forceinline__ TokenGrid best_grid(const float (&x)[D], float lo, float hi) {
    TokenGrid best = token_grid<BITS>(lo, hi, 1.f);
    if constexpr (BITS < 4) {
        float smallest = INFINITY;
#pragma unroll 1
        for (int i = 0; i < 6; i++) {
            const TokenGrid grid = token_grid<BITS>(lo, hi, shrink<BITS>(i));
            const Rounder<BITS> rounder(grid);
            float sum[4] = {};
#pragma unroll
            for (int d = 0; d < D; d++) {
                const float e = rounder.error(x[d]);
                sum[d % 4] = fmaf(e, e, sum[d % 4]);
            }
            const float total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
            if (total < smallest) smallest = total, best = grid;
        }
    }
    return best;
}

template <int D, int BITS, class Source>
__device__ __forceinline__ void seal_v(uint8_t* stage, const Step& step, const Unit& unit) {
    constexpr auto T = TILE<BITS, D>;
    float x[D];
    bool non_finite = false;
    Described tile;
    tile.describe_tokens(step, unit);
    const Source source(step, tile);
    source.template stage_v<D>(stage);
    tile.describe_rest(step, unit);
    uint8_t* record = tile.record;
    HealthSlot* health = tile.health;
    const int first_row = unit.first_row(step) < 0 ? NO_FIRST_ROW : unit.first_row(step);
    copies_done();
    __syncthreads();
#pragma unroll 1
    for (bool repaired = false;; repaired = true) {
        float squares = 0;
        source.read_v(stage, x);
        if (!Source::V_IS_ROTATED)
#pragma unroll
            for (int d = 0; d < D; d++) squares = fmaf(x[d], x[d], squares);
        if (!__syncthreads_or(!(squares < LARGEST_SQUARES)) || repaired) break;
        non_finite = Source::template repair<D>(stage);
    }
    if (!Source::V_IS_ROTATED) rotate(x);
    float lo = INFINITY, hi = -INFINITY;
#pragma unroll
    for (int d = 0; d < D; d++) lo = fminf(lo, x[d]), hi = fmaxf(hi, x[d]);
    TokenGrid grid = best_grid<D, BITS>(x, lo, hi), stored = grid;
    const bool first = int(threadIdx.x) == first_row;
    if (first) {
        stored = token_grid<8>(lo, hi, 1.f);
        const Rounder<8> rounder(stored);
#pragma unroll
        for (int d = 0; d < D; d++) record[T.first_v() + d] = uint8_t(__float_as_uint(rounder.shifted(x[d])));
        reinterpret_cast<half*>(record + T.first_v_scale())[0] = stored.scale;
        reinterpret_cast<half*>(record + T.first_v_scale())[1] = stored.zero;
        grid = {__ushort_as_half(0), __ushort_as_half(0)};
    }
    const Rounder<BITS> rounder(grid);  // without scale every code is 0
    uint32_t nibbles[D / 8];
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
        nibbles[i] = 0u - SHIFT_NIBBLES;
#pragma unroll
        for (int j = 0; j < 8; j++) nibbles[i] += __float_as_uint(rounder.shifted(x[8 * i + j])) << (4 * j);
    }
    reinterpret_cast<half*>(record + T.v_token_scale())[tile_index(threadIdx.x)] = grid.scale;
    reinterpret_cast<half*>(record + T.v_token_zero_point())[tile_index(threadIdx.x)] = grid.zero;
    if (first_row == NO_FIRST_ROW && threadIdx.x < (D + 4) / 4)
        reinterpret_cast<uint32_t*>(record + T.first_v())[threadIdx.x] = 0;
    if (threadIdx.x == 0) record[T.header() + 2] = uint8_t(first_row);
    for (int i = T.header() + 4 + threadIdx.x; i < T.bytes(); i += SEAL_THREADS) record[i] = 0;
    const unsigned out = __reduce_add_sync(ALL_LANES, unsigned(v_is_out_of_range(lo, hi, stored.scale, stored.zero)));
    const unsigned odd = __reduce_add_sync(ALL_LANES, unsigned(non_finite));
    if (threadIdx.x % 32 == 0) count(&health->out_of_range, out), count(&health->non_finite, odd);
    pack_v<BITS, D>(stage, nibbles, record + T.v());
}

/// V of tiles: a block a unit, a thread a token.
template <int D, int BITS, class Source> __device__ __forceinline__ void seal_values(const EncodeParams& p) {
    extern __shared__ __align__(16) uint8_t shared[];
    const Step step(p);
    const Unit unit = Units{int(blockIdx.x), 1 << 30}.next(step, Source::FROM_PAGE);
    if (unit.seal < 0) return;
    seal_v<D, BITS, Source>(shared, step, unit);
}

}  // namespace kvarn
