// Write: each token of the step into its page, a warp for its K and one for its V.
#pragma once
#include "token.cuh"

namespace kvarn {

/// How pages of a format hold tokens.
enum class Pages { RAW, INT8, INT8_ROTATED };

constexpr int TOKEN_THREADS = 128;

/// Stores a row of a `raw` page.
template <int D, int C, class In> __device__ __forceinline__ void store_raw_row(uint8_t* record, int token, bool is_v, const float (&x)[C]) {
    // Groups of 16 tokens, each K | V.
    In* group = reinterpret_cast<In*>(record) + token / 16 * (32 * D) + (is_v ? 16 * D : 0);
#pragma unroll
    for (int i = 0; i < C; i++) {
        const int channel = lane() * C + i;
        group[index16(D, is_v ? v_place(D, token % 16, channel) : k_place(token % 16, channel))] = narrow<In>(x[i]);
    }
}

/// Is the page of token `index` written whole by this step? Then `append_pages` has written it. Tokens of a sequence follow
/// each other, so the page's first and last token are where they would be.
__device__ __forceinline__ bool is_whole(const Step& step, int index, int slot, int block_size) {
    const int first = index - slot % block_size, last = first + block_size - 1;
    if (first < 0 || last >= step.num_words(TOKEN_ROWS)) return false;
    const int first_row = step.word(TOKEN_ROWS, first), last_row = step.word(TOKEN_ROWS, last);
    const int first_slot = slot / block_size * block_size;
    return first_row >= 0 && last_row >= 0 && step.word(SLOTS, first_row) == first_slot && step.word(SLOTS, last_row) == first_slot + block_size - 1;
}

template <class In, int D, Pages PAGES> __device__ __forceinline__ void append_tokens(const EncodeParams& p) {
    constexpr int C = D / 32;
    const int unit = blockIdx.x * (TOKEN_THREADS / 32) + warp();
    const int index = unit / 2 / p.num_kv_heads, head = unit / 2 % p.num_kv_heads;
    const bool is_v = unit % 2;
    const Step step(p);
    if (index >= step.num_words(TOKEN_ROWS)) return;
    const int row = step.word(TOKEN_ROWS, index);
    if (row < 0) return;
    const int slot = step.word(SLOTS, row), position = step.word(POSITIONS, row);
    float x[C];
    bool non_finite;
    load_row<In>(row_of<In>(is_v ? p.v : p.k, p.rows_per_batch, row, head), x, non_finite);
    if (slot < 0) return;
    if (p.has_whole_pages && is_whole(step, index, slot, p.block_size)) return;
    const int token = slot % p.block_size;
    uint8_t* record = record_of(layer_records(p, 0).pages, slot / p.block_size, head);
    HealthSlot* health = health_of(p, 0, unit / 2);
    if (non_finite && lane() == 0) count(&health->non_finite, 1);
    if constexpr (PAGES == Pages::RAW) {
        store_raw_row<D, C, In>(record, token, is_v, x);
    } else {
        const PageView<D> page(record, p.block_size);
        bool out_of_range;
        if (is_v) {
            if constexpr (PAGES == Pages::INT8_ROTATED) {
#pragma unroll
                for (int i = 0; i < C; i++) x[i] = bounded(x[i], LARGEST_VALUE);
                rotate_row<D>(x);
            }
            out_of_range = write_v<D>(page, token, x);
        } else {
            LaneStatistics<C> statistics;
            statistics.load(page);
            bool low = false;
            if (position < p.block_size / 2) {
                const int sequence = step.sequence_of(index);
                low = has_low_bytes(token, min(step.seq_len(sequence), p.block_size), p.block_size);
            }
            const Written written = write_k<D>(page, token, statistics, x, low, p.block_size);
            out_of_range = written.out_of_range;
            if (lane() == 0) {
                atomicAdd(&health->squares, double(written.squares));
                count(&health->num_rows, 1);
            }
        }
        if (out_of_range && lane() == 0) count(&health->out_of_range, 1);
    }
}

}  // namespace kvarn
