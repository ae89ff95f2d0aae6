// Combine: merges the partial results of each query row, adds the sink, un-rotates, rounds and writes.
#pragma once
#include "tensor.cuh"

namespace kvarn {

/// x H, x[i] of a lane being channel `lane * D / 32 + i`; without the factor of H.
template <int D> DEV void rotate_lanes(float (&x)[D / 32], int lane) {
    constexpr int VALUES = D / 32;
    static_assert((D & (D - 1)) == 0, "one block of H, VALUES a power of two");
#pragma unroll
    for (int half = 1; half < VALUES; half *= 2)
#pragma unroll
        for (int i = 0; i < VALUES; i++)
            if (!(i & half)) {
                const float a = x[i], b = x[i + half];
                x[i] = a + b, x[i + half] = a - b;
            }
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2)
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            const float other = __shfl_xor_sync(ALL_LANES, x[i], lanes);
            x[i] = lane & lanes ? other - x[i] : x[i] + other;
        }
}

/// A row's partial results, merged in their order.
template <int D> struct Merged {
    static constexpr int VALUES = D / 32, FLIGHT = 4;
    float top = -INFINITY, sum = 0.f, o[VALUES];

    DEV void merge(const AttendParams& p, const Parts& parts, int column, int lane) {
        const int count = parts.ends + (parts.leave >= 0);
        const auto row_of = [&](int i) {
            const int partial = i < parts.ends ? parts.first + i * parts.step : parts.leave;
            return int64_t(partial) * p.columns + column;
        };
        const auto load = [&](int i, float (&v)[VALUES]) {
            const float* from = pointer<const float>(p.part_o) + row_of(i) * D + lane * VALUES;
#pragma unroll
            for (int j = 0; j < VALUES; j += 2) {
                const float2 x = __ldcg(reinterpret_cast<const float2*>(from + j));
                v[j] = x.x, v[j + 1] = x.y;
            }
        };
#pragma unroll
        for (int i = 0; i < VALUES; i++) o[i] = 0.f;
        for (int first = 0; first < count; first += 32) {  // 32 at a time, weighed against the largest so far
            const float2 mine = first + lane < count ? __ldcg(pointer<const float2>(p.part_ml) + row_of(first + lane))
                                                     : make_float2(-INFINITY, 0.f);
            float v[FLIGHT][VALUES];  // the first few without waiting for their weights
#pragma unroll
            for (int i = 0; i < FLIGHT; i++) load(min(first + i, count - 1), v[i]);
            float before = top;
            top = fmaxf(top, mine.x);
#pragma unroll
            for (int lanes = 1; lanes < 32; lanes *= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, lanes));
            before = exp2_fast(before - top), sum *= before;
#pragma unroll
            for (int i = 0; i < VALUES; i++) o[i] *= before;
            const float weight = mine.y > 0.f ? exp2_fast(mine.x - top) : 0.f;
            sum = fmaf(weight, mine.y, sum);
            uint32_t valid = __ballot_sync(ALL_LANES, weight > 0.f);
            const auto add = [&](int from, const float (&x)[VALUES]) {
                const float w = __shfl_sync(ALL_LANES, weight, from);
#pragma unroll
                for (int j = 0; j < VALUES; j++) o[j] = w > 0.f ? fmaf(w, x[j], o[j]) : o[j];
            };
#pragma unroll
            for (int i = 0; i < FLIGHT; i++) add(i, v[i]);
            valid &= ~((1u << FLIGHT) - 1);
            while (valid) {
                int from[FLIGHT];
#pragma unroll
                for (int i = 0; i < FLIGHT; i++) {
                    from[i] = valid ? __ffs(valid) - 1 : -1, valid &= valid - 1;
                    load(first + max(from[i], 0), v[i]);
                }
#pragma unroll
                for (int i = 0; i < FLIGHT; i++)
                    if (from[i] >= 0) add(from[i], v[i]);
            }
        }
#pragma unroll
        for (int lanes = 1; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
    }

    /// A logit (log2 units) that takes part in the softmax and has no value.
    DEV void add_sink(float logit) {
        const float highest = fmaxf(top, logit), factor = exp2_fast(top - highest);
        sum = fmaf(sum, factor, exp2_fast(logit - highest)), top = highest;
#pragma unroll
        for (int i = 0; i < VALUES; i++) o[i] *= factor;
    }
};

/// A warp a (row, query head). Rows of padding, and those that see nothing, are zero.
template <int D, bool ROTATED, class T> DEV void combine(const AttendParams& p) {
    constexpr int VALUES = D / 32;
    const int num_heads = p.num_kv_heads * p.group, lane = threadIdx.x % 32;
    const int task = blockIdx.x * 4 + threadIdx.x / 32, row = task / num_heads, q_head = task % num_heads;
    launch_dependents();
    if (row >= num_rows(p.plan)) return;
    const int2 token = pointer<const int2>(p.row_tokens)[row];
    if (token.x == ROW_OTHERS) return;
    const bool padding = token.x == ROW_PADDING;
    Parts parts{0, 0, 0, -1};
    if (!padding) parts = pointer<const Parts>(p.parts)[token.x * p.num_kv_heads + q_head / p.group];
    wait_for_previous_grid();
    Merged<D> merged;
    merged.merge(p, parts, token.y * p.group + q_head % p.group, lane);
    if (p.sinks && !padding) merged.add_sink(pointer<const float>(p.sinks)[q_head] * LOG2_E);
    if (ROTATED) rotate_lanes<D>(merged.o, lane);
    const bool seen = merged.sum > 0.f;
    const float norm = seen ? (ROTATED ? rsqrtf(float(D)) : 1.f) / merged.sum : 0.f;
    T* to = pointer<T>(p.out.base) + element_at(p.out, row, q_head, p.rows_per_batch) + lane * VALUES;
    const bool aligned = uintptr_t(to) % (2 * sizeof(T)) == 0;
#pragma unroll
    for (int i = 0; i < VALUES; i += 2) store_2(to + i, aligned, merged.o[i] * norm, merged.o[i + 1] * norm);
    if (p.lse.base && lane == 0) {
        const float lse = seen ? (merged.top + log2f(merged.sum)) * LN_2 : -INFINITY;
        pointer<float>(p.lse.base)[element_at(p.lse, row, q_head, p.rows_per_batch)] = lse;
    }
}

}  // namespace kvarn
