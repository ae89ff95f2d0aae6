// Append: tokens into pages, pages opened by the step's rows, first pages refitted.
#include "encode/append_pages.cuh"
#include "encode/open_first.cuh"

namespace kvarn {

/// Clears `raw` pages that the step opens and does not write whole, those whose statistics would be of stored tokens or
/// the others: grid (opens, heads, layers).
__device__ __forceinline__ void open_raw(const EncodeParams& p, int record_bytes, bool of_stored) {
    const Step step(p);
    const int at = blockIdx.x * OPENS_WIDTH, sequence = step.word(OPENS, at);
    if (sequence < 0) return;
    const int block = step.word(OPENS, at + 1), context_len = step.context_len(sequence), first = block * p.block_size;
    if ((step.word(OPENS, at + 3) <= step.context_len(step.word(OPENS, at + 4))) != of_stored) return;
    if (context_len > first || step.seq_len(sequence) >= first + p.block_size) return;
    clear_record(record_of(layer_records(p, blockIdx.z).pages, step.place(sequence, block), blockIdx.y), record_bytes);
}

}  // namespace kvarn

using namespace kvarn;

extern "C" __global__ __launch_bounds__(256) void open_raw(EncodeParams p, int record_bytes, int of_stored) {
    kvarn::open_raw(p, record_bytes, of_stored);
}

#define REFIT(D) \
    extern "C" __global__ __launch_bounds__(FIRST_THREADS) void refit_d##D(EncodeParams p) { refit_first<D>(p); }

// Two blocks a multiprocessor of 16-bit rows, by registers; one of f32.
#define APPEND(NAME, IN, D, BLOCKS)                                                                                   \
    extern "C" __global__ __launch_bounds__(TOKEN_THREADS) void append_tokens_raw_##NAME##_d##D(EncodeParams p) {     \
        append_tokens<IN, D, Pages::RAW>(p);                                                                          \
    }                                                                                                                 \
    extern "C" __global__ __launch_bounds__(TOKEN_THREADS) void append_tokens_int8_##NAME##_d##D(EncodeParams p) {    \
        append_tokens<IN, D, Pages::INT8>(p);                                                                         \
    }                                                                                                                 \
    extern "C" __global__ __launch_bounds__(TOKEN_THREADS) void append_tokens_sealing_##NAME##_d##D(EncodeParams p) { \
        append_tokens<IN, D, Pages::INT8_ROTATED>(p);                                                                 \
    }                                                                                                                 \
    extern "C" __global__ __launch_bounds__(32 * APPEND_WARPS,                                                        \
                                            BLOCKS) void append_pages_int8_##NAME##_d##D(EncodeParams p) {            \
        append_pages<IN, D, Pages::INT8>(p);                                                                          \
    }                                                                                                                 \
    extern "C" __global__ __launch_bounds__(32 * APPEND_WARPS,                                                        \
                                            BLOCKS) void append_pages_sealing_##NAME##_d##D(EncodeParams p) {         \
        append_pages<IN, D, Pages::INT8_ROTATED>(p);                                                                  \
    }                                                                                                                 \
    extern "C" __global__ __launch_bounds__(FIRST_THREADS) void open_first_##NAME##_d##D(EncodeParams p) {            \
        open_first<IN, D>(p);                                                                                         \
    }

// `raw` pages of f32 are written token by token.
#define APPEND_RAW(NAME, IN, D)                                                                      \
    extern "C" __global__ __launch_bounds__(32 * APPEND_WARPS,                                       \
                                            2) void append_pages_raw_##NAME##_d##D(EncodeParams p) { \
        append_pages<IN, D, Pages::RAW>(p);                                                          \
    }

APPEND_RAW(f16, half, 64)
APPEND_RAW(bf16, bf16, 64)
APPEND_RAW(f16, half, 128)
APPEND_RAW(bf16, bf16, 128)
REFIT(64)
REFIT(128)
APPEND(f16, half, 64, 2)
APPEND(bf16, bf16, 64, 2)
APPEND(f32, float, 64, 1)
APPEND(f16, half, 128, 2)
APPEND(bf16, bf16, 128, 2)
APPEND(f32, float, 128, 1)
