// Write: each token of the step into its page, a warp for its K and one for its V.
#pragma once
#include "encode/token.cuh"

namespace kvarn {

/// How pages of a format hold tokens.
enum class Pages { RAW, INT8, INT8_ROTATED };

constexpr int TOKEN_THREADS = 128;

/// Stores a row of a `raw` page.
template <int D, int C, class In>
__device__ __forceinline__ void store_raw_row(uint8_t* record, int token, bool is_v, const float (&x)[C]) {
    // Groups of 16 tokens, each K | V.
    In* group = reinterpret_cast<In*>(record) + token / 16 * (32 * D) + (is_v ? 16 * D : 0);
#pragma unroll
    for (int i = 0; i < C; i++) {
        const int channel = lane() * C + i;
        if (has_channels<D>())
            group[index16(D, is_v ? v_place(D, token % 16, channel) : k_place(D, token % 16, channel))] =
                narrow<In>(x[i]);
    }
}

/// How many tokens a warp takes, one after the other: few warps look for the tokens of a long step that are not in
/// pages which `append_pages` has written.
__device__ __forceinline__ int tokens_per_warp(const EncodeParams& p, int num_tokens) {
    return p.has_whole_pages ? min(max(num_tokens / 1024, 1), 8) : 1;
}

/// Is the page of token `index` written whole by this step? Then `append_pages` has written it. Tokens of a sequence
/// follow each other, so the page's first and last token are where they would be.
__device__ __forceinline__ bool is_whole(const Step& step, int index, int slot, int block_size) {
    const int first = index - slot % block_size, last = first + block_size - 1;
    if (first < 0 || last >= step.num_words(TOKEN_ROWS)) return false;
    const int first_row = step.word(TOKEN_ROWS, first), last_row = step.word(TOKEN_ROWS, last);
    const int first_slot = slot / block_size * block_size;
    return first_row >= 0 && last_row >= 0 && step.word(SLOTS, first_row) == first_slot &&
           step.word(SLOTS, last_row) == first_slot + block_size - 1;
}

template <class In, int D, Pages PAGES, int C>
__device__ __forceinline__ void append_token(const Step& step, int index, int row, int slot, int head, bool is_v,
                                             float (&x)[C]) {
    const EncodeParams& p = step.p;
    const int token = slot % p.block_size;
    uint8_t* record = record_of(layer_records(p, 0).pages, slot / p.block_size, head);
    HealthSlot* health = health_of(p, 0, index * p.num_kv_heads + head);
    if (repair_row<In>(x) && lane() == 0) count(&health->non_finite, 1);
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
            if (step.word(POSITIONS, row) < p.block_size / 2) {
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

/// Tokens of a layer: a warp for each (run of `tokens_per_warp`, head, K | V).
template <class In, int D, Pages PAGES> __device__ __forceinline__ void append_tokens(const EncodeParams& p) {
    const Step step(p);
    const int unit = blockIdx.x * (TOKEN_THREADS / 32) + warp(), run = unit / 2 / p.num_kv_heads,
              head = unit / 2 % p.num_kv_heads;
    const int num_tokens = step.num_words(TOKEN_ROWS), run_tokens = tokens_per_warp(p, num_tokens);
    int index = run * run_tokens;
    const int end = min(index + run_tokens, num_tokens);
#pragma unroll 1
    while (index < end) {
        const int row = p.is_dense ? index : step.word(TOKEN_ROWS, index);
        if (row < 0) return;
        float x[LANE_CHANNELS<D>];
        load_row<D>(row_of<In>(unit % 2 ? p.v : p.k, p.rows_per_batch, row, head), x);
        const int slot = step.word(SLOTS, row);
        if (slot >= 0 && p.has_whole_pages && is_whole(step, index, slot, p.block_size)) {
            index += p.block_size - slot % p.block_size;
            continue;
        }
        if (slot >= 0) append_token<In, D, PAGES>(step, index, row, slot, head, unit % 2, x);
        index++;
    }
}

}  // namespace kvarn
