// What the kernels of attention are given, and what they leave for each other in the workspace.
#pragma once
#include "../layout.cuh"
#include "../records.cuh"

#ifndef DEV
#define DEV __device__ __forceinline__
#endif

namespace kvarn {

/// A sequence of the schedule. `first_unit`: its first unit of work among those of all. Blocks first_block.. are read,
/// of tokens before `end`; none of a sequence that is not attended for.
struct alignas(32) Scheduled {
    int64_t first_unit;
    int row, context_len, num_new, first_held, first_block, end;
};

/// The work of a warp: `units` units from `block` of a head of a sequence on, in the order sequence, head, block.
/// `first` is the number of the first one, `place` the place of its block.
struct alignas(64) Work {
    Scheduled sequence;
    int64_t first;
    int index, head, block, units, place, unused;
};

/// Where the partial results of one (sequence, kv head) are: `ends` of them, from `first` on, `step` apart, and `leave`
/// unless negative.
struct alignas(16) Parts {
    int first, ends, step, leave;
};

constexpr int ROW_PADDING = -1, ROW_OTHERS = -2;

template <class T> DEV T* pointer(uint64_t address) { return reinterpret_cast<T*>(address); }
DEV const uint8_t* record_at(const Records& records, int64_t i, int head) {
    return pointer<const uint8_t>(records.base + i * records.stride + head * records.head_stride);
}
/// Index of the first element of a row; `rows_per_batch`: T.
DEV int64_t element_at(const Tensor& x, int row, int head, int rows_per_batch) {
    return row / rows_per_batch * x.strides[0] + head * x.strides[1] + row % rows_per_batch * x.strides[2];
}
DEV const int* plan_array(const PlanPointers& plan, PlanArray array) {
    return pointer<const int>(plan.words) + plan.starts[array];
}
DEV int num_sequences(const PlanPointers& plan) { return plan.starts[ROWS + 1] - plan.starts[ROWS]; }
DEV int num_rows(const PlanPointers& plan) { return plan.starts[POSITIONS + 1] - plan.starts[POSITIONS]; }
DEV int place_at(const PlanPointers& plan, int row, int block) {
    return pointer<const int>(plan.places)[int64_t(row) * plan.places_stride + block];
}

}  // namespace kvarn
