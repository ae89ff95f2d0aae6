// K of one (block, kv head) tile: dual scaling, grids, error feedback, in both frames; the better one is packed.
#pragma once
#include "encode/seal_fill.cuh"
#include "encode/seal_pack.cuh"
#include "encode/seal_tile.cuh"

namespace kvarn {

constexpr float SMALLEST_DEVIATION = 1e-3f, LARGEST_DEVIATION = 1e3f;
constexpr float SMALLEST_TOKEN_SCALE = 0.7408182f, LARGEST_TOKEN_SCALE = 22026.465f;  // e^-0.3, e^10

/// What the recursion needs of a frame, by position.
template <int D> struct FrameShared {
    float inverse[D], step[D], weight[D], middle[D];  // middle: what the middle code decodes to
    float4 diagonal[D / BLOCK * TRIANGLE / 4];
};

/// What takes the place of M once it is in registers.
template <int D> struct AfterM {
    uint8_t rotated_u[2 * D * TILE_TOKENS];
    union {
        float partial[2 * SEAL_WARPS * TILE_TOKENS];  // sums of warps
        uint32_t words[2][D / 8][TILE_TOKENS];        // codes of both frames, eight nibbles a word
    };
};

template <int D> struct SealShared {
    union {
        float m[D * TILE_TOKENS];  // M [channel][token]
        AfterM<D> after;
    };
    union {
        uint8_t plain_u[2 * D * TILE_TOKENS];
        uint8_t stage[D * TILE_TOKENS];  // codes as bytes, in the end
    };
    FrameShared<D> frame[2];
    float token[TILE_TOKENS], stored_token[TILE_TOKENS];  // 1 / c, 1 / f16(c)
    union {
        uint32_t order[D];  // p, until M is in registers
        float channel[D];   // 1 / r
    };
    float sums[SEAL_WARPS];
    uint32_t bounds[2][4 * SEAL_WARPS];
    Described described[2];  // this tile and the next
};

__device__ __forceinline__ float bounded_deviation(float x) {
    return fminf(fmaxf(x, SMALLEST_DEVIATION), LARGEST_DEVIATION);
}
__device__ __forceinline__ float refined(float scale, float deviation) {
    return fminf(fmaxf(scale * bounded_deviation(deviation), SMALLEST_TOKEN_SCALE), LARGEST_TOKEN_SCALE);
}
/// I: largest over smallest deviation of the two quantities posted.
__device__ __forceinline__ float imbalance(const uint32_t* bounds) {
    uint4 all = reinterpret_cast<const uint4*>(bounds)[0];
#pragma unroll
    for (int w = 1; w < SEAL_WARPS; w++) {
        const uint4 b = reinterpret_cast<const uint4*>(bounds)[w];
        all = make_uint4(min(all.x, b.x), max(all.y, b.y), min(all.z, b.z), max(all.w, b.w));
    }
    return quotient(bounded_deviation(__uint_as_float(all.y)), bounded_deviation(__uint_as_float(all.x))) +
           quotient(bounded_deviation(__uint_as_float(all.w)), bounded_deviation(__uint_as_float(all.z)));
}

/// What is stored of a frame: the thread's token scale, and the grid of its row (scale low, zero point high). The sign
/// of the scale says that the row is not constant.
struct Stored {
    half token;
    uint32_t grid;
};

/// c of the best of three iterates: the start, and two more.
template <int D>
__device__ __forceinline__ float find_token_scale(SealShared<D>& s, const RegisterTile<D>& tile, float inverse_unit,
                                                  float over_c) {
    constexpr int ITERATIONS = 2;
    float c = refined(1.f, over_c), r = 1, best = 1, lowest = INFINITY, row_deviation;
    s.token[threadIdx.x] = inverse(c);
    post_bounds(over_c, 1.f, s.bounds[0]);
    __syncthreads();
    const float start = imbalance(s.bounds[0]);  // at least: as if M's rows were even
    bool more;
    int i = 1;
    do {  // left at its end alone, so that its code is there once
        row_deviation = root(tile.over_tokens(s.token).y * (1.f / (TILE_TOKENS - 1))) * inverse_unit;
        if (i <= ITERATIONS) {
            r = refined(r, quotient(row_deviation, r));
            row_deviation = quotient(row_deviation, r);
            if (tile.owns()) s.channel[tile.row()] = inverse(r);
            __syncthreads();
            tile.over_channels(s.channel, s.after.partial);
            __syncthreads();
            const float2 sums = tile.joined(s.after.partial);
            over_c =
                quotient(root(fmaxf(sums.y - sums.x * sums.x * (1.f / D), 0.f) * (1.f / (D - 1))) * inverse_unit, c);
            post_bounds(over_c, row_deviation, s.bounds[i % 2]);
            const float next = i < ITERATIONS ? refined(c, over_c) : 1.f;
            s.token[threadIdx.x] = inverse(next);
            __syncthreads();
            const float now = imbalance(s.bounds[i % 2]);
            if (now <= lowest) lowest = now, best = c;
            c = next;
            more = i < ITERATIONS || start < lowest;
        } else {  // rare: the start may win, once its rows are known
            post_bounds(1.f, row_deviation, s.bounds[1]);
            __syncthreads();
            if (start + imbalance(s.bounds[1]) - 2.f < lowest) best = 1.f;
            more = false;
        }
        i++;
    } while (more);
    return best;
}

constexpr uint32_t MOVES = 0x8000;

/// The grid of the thread's row; its parameters as stored.
template <int D, int BITS>
__device__ __forceinline__ uint32_t find_grid(SealShared<D>& s, FrameShared<D>& frame, const RegisterTile<D>& tile,
                                              float weight) {
    constexpr float CODE_MAX = (1 << BITS) - 1, DRAWN_IN = BITS == 2 ? 0.85f : BITS == 3 ? 0.95f : 1.f;
    const float2 bounds = tile.bounds(s.token);
    const float margin = (bounds.y - bounds.x) * ((1.f - DRAWN_IN) / 2.f), lo = bounds.x + margin,
                hi = bounds.y - margin;
    const half scale = to_half((hi - lo) / CODE_MAX), zero = to_half(lo);
    const float step = __half2float(scale);
    if (tile.owns()) {
        const int row = tile.row();
        frame.inverse[row] = step > 0.f ? inverse(step * CODE_MAX) : __int_as_float(0x7fc00000), frame.step[row] = step,
        frame.weight[row] = weight;
        frame.middle[row] = fmaf(step, MIDDLE_CODE<BITS>, __half2float(zero));
    }
    return uint32_t(__half_as_ushort(scale)) | (bounds.x != bounds.y ? MOVES : 0u) |
           uint32_t(__half_as_ushort(zero)) << 16;
}

/// Scales, grids and U of one frame, of `rows` that are loaded; loads those of `next`, if there is one, so that
/// registers are free.
template <int D, int BITS, class Source, class Rows>
__device__ __forceinline__ Stored prepare(SealShared<D>& s, Rows& rows, const Step& step, const Described& tile_of,
                                          const Described* next, bool rotated) {
    using C = Constants<D>;
    const uint8_t* constants = tile_of.feedback + rotated * Constants<D>::BYTES;
    FrameShared<D>& frame = s.frame[rotated];
    if (threadIdx.x < D / 4) copy16(s.order + 4 * threadIdx.x, constants + C::CHANNEL + 16 * threadIdx.x);
    for (int i = threadIdx.x; i < D / BLOCK * TRIANGLE / 4; i += SEAL_THREADS)
        copy16(frame.diagonal + i, constants + C::DIAGONAL + 16 * i);
    const float weight = __ldg(reinterpret_cast<const float*>(constants + C::WEIGHT) + RegisterTile<D>::row());
    fill<D>(s.m, s.token, s.stored_token, rows, rotated, &tile_of.health->non_finite);
    copies_done();
    __syncwarp();
    const float sum = s.token[threadIdx.x], squares = s.stored_token[threadIdx.x];
    const float rms = root(tile_sum(squares, s.sums) * (1.f / (D * TILE_TOKENS))) * 0.25f,
                inverse_unit = rms > 0.f ? inverse(rms) : 1.f;
    RegisterTile<D> tile;
    tile.read(s.m, s.order);
    const float over_c = root(fmaxf(squares - sum * sum * (1.f / D), 0.f) * (1.f / (D - 1))) * inverse_unit;
    const float c = find_token_scale<D>(s, tile, inverse_unit, over_c), norm = rotated ? ROTATION_NORM<D> : 1.f;
    Stored stored;
    stored.token = to_half(c);
    __syncthreads();
    s.token[threadIdx.x] = norm * inverse(c), s.stored_token[threadIdx.x] = norm * inverse(__half2float(stored.token));
    __syncthreads();
    stored.grid = find_grid<D, BITS>(s, frame, tile, weight);
    if (next)
        rows.load(Source(step, *next));
    else
        rows = Rows();
    __syncthreads();
    tile.write(rotated ? s.after.rotated_u : s.plain_u, s.stored_token, frame.middle);
    __syncthreads();
    return stored;
}

/// Counts the tile's tokens as out of range where f16 holds a channel's parameters not, or the scales of none of them.
__device__ __forceinline__ void count_out_of_range(uint32_t grid, bool owns, HealthSlot* health) {
    const half scale = __ushort_as_half(uint16_t(grid & 0x7fff)), zero = __ushort_as_half(uint16_t(grid >> 16));
    const bool beyond = __syncthreads_or(owns && (is_at_the_end(scale) || is_at_the_end(zero)));
    const bool holds = __syncthreads_or(owns && __half2float(scale) >= SMALLEST_F16_SCALE),
               moves = __syncthreads_or(owns && grid & MOVES);
    if (threadIdx.x == 0 && (beyond || (!holds && moves))) count(&health->out_of_range, TILE_TOKENS);
}

/// K of the tile whose `rows` are loaded; loads those of `next`, if there is one.
template <int D, int BITS, class Source, class Rows>
__device__ __forceinline__ void seal_k(SealShared<D>& s, Rows& rows, const Step& step, const Described& tile_of,
                                       const Described* next) {
    constexpr auto T = TILE<BITS, D>;
    constexpr int TOKENS_A_THREAD = 2;  // two warps a frame
    Stored stored[2] = {};
#pragma unroll 1
    for (int f = 0; f < 2; f++) {
        const Stored now = prepare<D, BITS, Source>(s, rows, step, tile_of, f == 0 ? &tile_of : next, f);
        if (f == 0)
            stored[0] = now;
        else
            stored[1] = now;
    }
    // Each warp its frame and tokens. A token's scale is another thread's; its square goes by way of shared memory.
    const int warp = threadIdx.x / 32, frame = warp / 2, first = warp % 2 * 2;
    s.token[threadIdx.x] = __half2float(stored[0].token), s.stored_token[threadIdx.x] = __half2float(stored[1].token);
    __syncthreads();
    const FrameShared<D>& shared = s.frame[frame];
    float loss[TOKENS_A_THREAD], sum = 0;
    int clamped = 0;
    auto fours = [](const float* field) { return reinterpret_cast<const float4*>(field); };
    feed_back<D, BITS, TOKENS_A_THREAD>(
        frame ? s.after.rotated_u : s.plain_u, first, {fours(shared.inverse), fours(shared.step), fours(shared.weight)},
        shared.diagonal, tile_of.feedback + frame * Constants<D>::BYTES, s.after.words[frame][0], loss, clamped);
#pragma unroll
    for (int t = 0; t < TOKENS_A_THREAD; t++) {
        const float c = (frame ? s.stored_token : s.token)[32 * (first + t) + threadIdx.x % 32];
        sum = fmaf(loss[t] * c, c, sum);
    }
    sum = warp_sum(sum), clamped = __reduce_add_sync(ALL_LANES, clamped);
    if (threadIdx.x % 32 == 0) s.sums[warp] = sum;
    __syncthreads();
    const int chosen = s.sums[2] + s.sums[3] <= s.sums[0] + s.sums[1];
    HealthSlot* health = tile_of.health;
    uint8_t* record = tile_of.record;
    if (frame == chosen && threadIdx.x % 32 == 0) {
        count(&health->num_clamped, clamped), count(&health->num_codes, 32 * TOKENS_A_THREAD * D / BLOCK);
    }
    const uint8_t* constants = tile_of.feedback + chosen * Constants<D>::BYTES;
    const Stored best = chosen ? stored[1] : stored[0];
    if (threadIdx.x < D)
        s.order[threadIdx.x] = __ldg(reinterpret_cast<const uint32_t*>(constants + Constants<D>::STAGED) + threadIdx.x);
    reinterpret_cast<half*>(record + T.k_token_scale())[tile_index(threadIdx.x)] = best.token;
    using Own = RegisterTile<D>;
    if (Own::owns()) {
        const uint32_t p = __ldg(reinterpret_cast<const uint32_t*>(constants + Constants<D>::CHANNEL) + Own::row());
        reinterpret_cast<uint16_t*>(record + T.k_channel_scale())[p] = uint16_t(best.grid & 0x7fff);
        reinterpret_cast<uint16_t*>(record + T.k_channel_zero_point())[p] = uint16_t(best.grid >> 16);
    }
    if (threadIdx.x == 0)
        record[T.header()] = TILE_VERSION, record[T.header() + 1] = chosen ? K_ROTATED : 0, record[T.header() + 3] = 0;
    count_out_of_range(best.grid, Own::owns(), health);  // a barrier, too
    const uint32_t row = threadIdx.x * D, turn = row_turn<D>(threadIdx.x) * 4;
#pragma unroll 2
    for (int i = 0; i < D / 8; i++) {
        const uint32_t word = s.after.words[chosen][i][threadIdx.x];
        const uint4 low = reinterpret_cast<const uint4*>(s.order)[2 * i],
                    high = reinterpret_cast<const uint4*>(s.order)[2 * i + 1];
        const uint32_t to[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int j = 0; j < 8; j++) s.stage[row + (to[j] ^ turn)] = uint8_t(word >> (4 * j));
    }
    __syncthreads();
    pack_k<BITS, D>(s.stage, record + T.k());
    __syncthreads();
}

/// K of all tiles of a source: any grid; a block takes tile after tile.
template <int D, int BITS, class Source> __device__ __forceinline__ void seal_keys(const EncodeParams& p) {
    extern __shared__ __align__(16) uint8_t shared[];
    SealShared<D>& s = *reinterpret_cast<SealShared<D>*>(shared);
    typename RowsOf<D, Source>::Type rows;
    const Step step(p);
    Units units{int(blockIdx.x), int(gridDim.x)};
    Unit unit = units.next(step, Source::FROM_PAGE);
    if (unit.seal < 0) return;
    if (threadIdx.x == 0) s.described[0].describe(step, unit);
    __syncthreads();
    rows.load(Source(step, s.described[0]));
#pragma unroll 1
    for (int i = 0; unit.seal >= 0; i ^= 1) {
        unit = units.next(step, Source::FROM_PAGE);
        if (threadIdx.x == SEAL_THREADS - 1 && unit.seal >= 0) s.described[i ^ 1].describe(step, unit);
        seal_k<D, BITS, Source>(s, rows, step, s.described[i], unit.seal >= 0 ? &s.described[i ^ 1] : nullptr);
    }
}

}  // namespace kvarn
