// Parameters of the kernels that write records.
#pragma once
#include "layout.cuh"

namespace kvarn {

/// What is known of a layer's model. Of a layer without calibration `channels` is 0, `feedback` that of no feedback and
/// `feedback_stride` 0.
struct LayerModel {
    uint64_t channels;         // f32 [num_kv_heads][mean, deviation, query_rms][head_dim]
    uint64_t feedback;         // of each head: the constants of the plain frame, then those of the rotated one
    uint64_t feedback_stride;  // bytes from one head to the next
};

/// Counters of a layer, added to by all kernels that encode; the host sums the slots.
struct HealthSlot {
    double squares;         // of K, in units of the page's channel scales
    uint64_t num_rows;      // (token, head) pairs that `squares` is over
    uint64_t num_codes;     // K codes of tiles
    uint64_t num_clamped;   // those of them that the grid clamped
    uint64_t out_of_range;  // (token, head) pairs whose K or V f16 does not hold
    uint64_t non_finite;    // (token, head) pairs with a NaN or an infinity, which was stored as a finite value
};
constexpr int HEALTH_SLOTS = 32;

struct EncodeParams {
    PlanPointers plan;
    Tensor k, v;            // the step's rows; not read where all tokens are stored ones
    uint64_t layers;        // LayerRecords [num_layers]
    uint64_t models;        // LayerModel [num_layers]
    uint64_t health;        // HealthSlot [num_layers][HEALTH_SLOTS]
    int32_t num_layers, num_kv_heads, block_size;
    int32_t rows_per_batch;  // T of the tensors
    int32_t is_aligned;      // do all rows of k and v start on multiples of 16 bytes?
    int32_t has_whole_pages; // may the step write pages whole? Then single tokens leave those pages alone
};

/// A range of positions of one sequence as values.
struct DequantizeParams {
    Records pages, tiles;   // of the layer
    uint64_t places;        // i32: of the block of position `start`, and on
    Tensor k, v;
    int32_t num_kv_heads, block_size, rows_per_batch, start, count, is_aligned;
};

}  // namespace kvarn
