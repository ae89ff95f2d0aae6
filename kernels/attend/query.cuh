// Query: q as operands of the matrix unit, once a layer.
#pragma once
#include "tensor.cuh"

namespace kvarn {

constexpr int PLAIN = 0, ROTATED = 1, PAGE = 2;  // frames of q; PAGE: plain, for INT8 pages of formats that seal

/// The operands of one frame and tile of columns: a lane's words for channels [32 b, + 32), `[b][32 lanes]`.
template <class Cfg> struct Operands {
    static constexpr int FRAME = Cfg::NT * (Cfg::D / 32) * 32, TILE = Cfg::FRAMES * FRAME;  // in uint4
    static DEV int64_t index(const AttendParams& p, int sequence, int head, int column_tile) {
        return (int64_t(sequence) * p.num_kv_heads + head) * p.column_tiles + column_tile;
    }
};

/// x H over the channels of a row that four lanes t share: x[b][i] is channel 32 b + 8 t + i. H is block-diagonal, of
/// blocks of the largest power of two that divides D.
template <int D> DEV void rotate_row(float (&x)[D / 32][8], int t) {
    constexpr int BLOCK = D & -D;
    static_assert(BLOCK >= 32, "spans within a lane's channels and between lanes");
#pragma unroll
    for (int half = 1; half < 8; half *= 2)
#pragma unroll
        for (int b = 0; b < D / 32; b++)
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (!(i & half)) {
                    const float low = x[b][i], high = x[b][i + half];
                    x[b][i] = low + high, x[b][i + half] = low - high;
                }
#pragma unroll
    for (int half = 1; half < BLOCK / 32; half *= 2)
#pragma unroll
        for (int b = 0; b < D / 32; b++)
            if (!(b & half))
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const float low = x[b][i], high = x[b + half][i];
                    x[b][i] = low + high, x[b + half][i] = low - high;
                }
#pragma unroll
    for (int half = 1; half < 4; half *= 2)
#pragma unroll
        for (int b = 0; b < D / 32; b++)
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float other = __shfl_xor_sync(ALL_LANES, x[b][i], half);
                x[b][i] = t & half ? other - x[b][i] : x[b][i] + other;
            }
    const float norm = rsqrtf(float(BLOCK));
#pragma unroll
    for (int b = 0; b < D / 32; b++)
#pragma unroll
        for (int i = 0; i < 8; i++) x[b][i] *= norm;
}

/// A warp a (sequence, kv head, tile of columns). q is normalised by a power of two to length at most 1, so that q
/// times any channel scale fits fp16; `factors` takes it back. The q of a tile's odd fragments is divided by how much
/// further up their codes sit.
template <class Cfg, class T> DEV void query(const AttendParams& p) {
    constexpr int D = Cfg::D, NT = Cfg::NT;
    const int task = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    launch_dependents();
    const int column_tile = task % p.column_tiles, head = task / p.column_tiles % p.num_kv_heads;
    const int sequence = task / p.column_tiles / p.num_kv_heads;
    if (sequence >= num_sequences(p.plan)) return;
    const int columns = pointer<const Scheduled>(p.sequences)[sequence].num_new * p.group, first = column_tile * 8 * NT;
    if (columns == 0) return;
    const int* token_rows = plan_array(p.plan, TOKEN_ROWS) + plan_array(p.plan, TOKEN_START_LOC)[sequence];
    float x[NT][D / 32][8], largest = 0.f;
#pragma unroll
    for (int n = 0; n < NT; n++) {
        const int column = first + 8 * n + g;
        const bool valid = column < columns;
        const int row = token_rows[valid ? column / p.group : 0],
                  q_head = head * p.group + (valid ? column % p.group : 0);
        const T* from = pointer<const T>(p.q.base) + element_at(p.q, row, q_head, p.rows_per_batch) + 8 * t;
        const bool aligned = uintptr_t(from) % 16 == 0;
        float square = 0.f;
#pragma unroll
        for (int b = 0; b < D / 32; b++) {
            load_8(from + 32 * b, aligned, x[n][b]);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (!valid) x[n][b][i] = 0.f;
                square = fmaf(x[n][b][i], x[n][b][i], square);
            }
        }
        square += __shfl_xor_sync(ALL_LANES, square, 1);
        square += __shfl_xor_sync(ALL_LANES, square, 2);
        largest = fmaxf(largest, square);
    }
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, lanes));
    // 2^-e with |q| <= 2^e, in the plain and, the rotation keeping lengths, in the rotated frame
    const int exponent = min(max(__float_as_int(sqrtf(largest)) >> 23, 27), 227);
    const float scale = __int_as_float((253 - exponent) << 23);
    const int64_t index = Operands<Cfg>::index(p, sequence, head, column_tile);
    if (lane == 0) pointer<float>(p.factors)[index] = p.scale * LOG2_E * __int_as_float((exponent + 1) << 23);
    uint4* to = pointer<uint4>(p.operands) + index * Operands<Cfg>::TILE + lane;
#pragma unroll
    for (int n = 0; n < NT; n++) {
        const auto write = [&](int frame, float odd) {
#pragma unroll
            for (int b = 0; b < D / 32; b++) {
                uint32_t w[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float unit = scale * (i < 2 ? 1.f : odd);
                    w[i] = Cfg::Math::pack(x[n][b][2 * i] * unit, x[n][b][2 * i + 1] * unit);
                }
                to[((frame * NT + n) * (D / 32) + b) * 32] = make_uint4(w[0], w[1], w[2], w[3]);
            }
        };
        const float odd = Cfg::SEALS ? Cfg::TileCodes::unit(0, 0) / Cfg::TileCodes::unit(1, 0) : 1.f;
        write(PLAIN, odd);
        if constexpr (Cfg::SEALS) write(PAGE, 1.f), rotate_row<D>(x[n], t), write(ROTATED, odd);
    }
}

}  // namespace kvarn
