// Heads of other sizes than 64 and 128, in `raw` and `int8`.
#include "encode/any_dim.cuh"
#include "encode/append_tokens.cuh"
#include "encode/open_first.cuh"

using namespace kvarn;

#define ANY_OF(NAME, T, D)                                                                                         \
    extern "C" __global__ __launch_bounds__(TOKEN_THREADS) void append_tokens_raw_##NAME##_d##D(EncodeParams p) {  \
        append_tokens<T, D, Pages::RAW>(p);                                                                        \
    }                                                                                                              \
    extern "C" __global__ __launch_bounds__(TOKEN_THREADS) void append_tokens_int8_##NAME##_d##D(EncodeParams p) { \
        append_tokens<T, D, Pages::INT8>(p);                                                                       \
    }                                                                                                              \
    extern "C" __global__ __launch_bounds__(FIRST_THREADS) void open_first_##NAME##_d##D(EncodeParams p) {         \
        open_first<T, D>(p);                                                                                       \
    }                                                                                                              \
    extern "C" __global__ __launch_bounds__(32 * WINDOW_WARPS) void open_rows_int8_##NAME##_d##D(EncodeParams p) { \
        open_window_any<T, D>(p);                                                                                  \
    }                                                                                                              \
    extern "C" __global__ __launch_bounds__(256) void dequantize_int8_##NAME##_d##D(DequantizeParams p) {          \
        dequantize_any<T, D>(p);                                                                                   \
    }                                                                                                              \
    extern "C" __global__ __launch_bounds__(D) void dequantize_raw_f16_##NAME##_d##D(DequantizeParams p) {         \
        dequantize_raw<half, T, D>(p);                                                                             \
    }                                                                                                              \
    extern "C" __global__ __launch_bounds__(D) void dequantize_raw_bf16_##NAME##_d##D(DequantizeParams p) {        \
        dequantize_raw<bf16, T, D>(p);                                                                             \
    }                                                                                                              \
    extern "C" __global__ __launch_bounds__(D) void dequantize_raw_f32_##NAME##_d##D(DequantizeParams p) {         \
        dequantize_raw<float, T, D>(p);                                                                            \
    }
#define ANY(D)                                                                                                    \
    ANY_OF(f16, half, D)                                                                                          \
    ANY_OF(bf16, bf16, D)                                                                                         \
    ANY_OF(f32, float, D)                                                                                         \
    extern "C" __global__ __launch_bounds__(FIRST_THREADS) void refit_d##D(EncodeParams p) { refit_first<D>(p); } \
    extern "C" __global__ __launch_bounds__(32 * WINDOW_WARPS) void open_stored_int8_d##D(EncodeParams p) {       \
        open_window_any<void, D>(p);                                                                              \
    }

ANY(80)
ANY(96)
ANY(112)
ANY(256)
