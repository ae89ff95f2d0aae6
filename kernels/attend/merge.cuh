// Partial results, written by warps and, at the end, by blocks.
#pragma once
#include "softmax.cuh"

namespace kvarn {

template <int D, int NT> DEV void sum_lanes(State<D, NT>& st) {
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) {
                st.l[n][j] += __shfl_xor_sync(ALL_LANES, st.l[n][j], lanes);
                st.z[n][j] += __shfl_xor_sync(ALL_LANES, st.z[n][j], lanes);
            }
}

/// A warp's output, in natural units and summed over lanes, times `scale` of each column: [column][D].
template <int D, int NT>
DEV void write_output(const State<D, NT>& st, const float (&scale)[NT][2], float* to, int columns, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int column = 8 * n + 2 * t + j;
            if (column >= columns) continue;
            const float z = st.z[n][j], x = scale[n][j];
            float4* row = reinterpret_cast<float4*>(to + column * D + g * (D / 8));
#pragma unroll
            for (int f = 0; f < D / 16; f += 2)
                row[f / 2] = make_float4((st.o[f][n][j] + z) * x, (st.o[f][n][2 + j] + z) * x,
                                         (st.o[f + 1][n][j] + z) * x, (st.o[f + 1][n][2 + j] + z) * x);
        }
}

/// A warp goes on to another partial result: this one goes to memory, `columns` of it from `row` on. Nothing here
/// waits: a fence or an atomic would take the many microseconds that the copies in flight take.
template <int D, int NT> DEV void leave(const AttendParams& p, State<D, NT>& st, int64_t row, int columns, int lane) {
    const int g = lane / 4, t = lane % 4;
    sum_lanes(st);
    float one[NT][2];
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int column = 8 * n + 2 * t + j;
            one[n][j] = 1.f;
            if (g == 0 && column < columns)
                pointer<float2>(p.part_ml)[row + column] = make_float2(st.m[n][j], st.l[n][j]);
        }
    write_output(st, one, pointer<float>(p.part_o) + row * D, columns, lane);
}

/// The end of a block: warps that share a (sequence, kv head) merge in shared memory into one partial result.
/// `scratch(w)`: warp w's part of the rings; `pair` < 0: the warp had no work; `row`: where the result goes.
template <int D, int NT, int WARPS, class Scratch>
DEV void finish(const AttendParams& p, State<D, NT>& st, int pair, int64_t row, int columns, Scratch scratch,
                int lane) {
    constexpr int COLUMNS = 8 * NT, VALUES = D / 32;
    __shared__ float tops[WARPS][COLUMNS], sums[WARPS][COLUMNS];
    __shared__ int pairs[WARPS];
    const int warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    sum_lanes(st);
    if (lane == 0) pairs[warp] = pair;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int j = 0; j < 2; j++)
            if (g == 0) tops[warp][8 * n + 2 * t + j] = st.m[n][j];
    __syncthreads();
    int low = warp, high = warp;  // the warps of this pair
    while (low > 0 && pairs[low - 1] == pair) low--;
    while (high + 1 < WARPS && pairs[high + 1] == pair) high++;
    float scale[NT][2];
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float top = st.m[n][j];
            for (int w = low; w <= high; w++) top = fmaxf(top, tops[w][8 * n + 2 * t + j]);
            scale[n][j] = exp2_fast(st.m[n][j] - top);
            if (g == 0) sums[warp][8 * n + 2 * t + j] = st.l[n][j] * scale[n][j];
        }
    if (pair >= 0) write_output(st, scale, scratch(warp), columns, lane);
    __syncthreads();
    if (pair < 0) return;
    const int team = high - low + 1;
    for (int column = warp - low; column < columns; column += team) {
        float o[VALUES], sum = 0.f, top = -INFINITY;
#pragma unroll
        for (int i = 0; i < VALUES; i++) o[i] = 0.f;
        for (int w = low; w <= high; w++) {
            sum += sums[w][column], top = fmaxf(top, tops[w][column]);
#pragma unroll
            for (int i = 0; i < VALUES; i++) o[i] += scratch(w)[column * D + lane * VALUES + i];
        }
        if (lane == 0) pointer<float2>(p.part_ml)[row + column] = make_float2(top, sum);
#pragma unroll
        for (int i = 0; i < VALUES; i++) pointer<float>(p.part_o)[(row + column) * D + lane * VALUES + i] = o[i];
    }
}

}  // namespace kvarn
