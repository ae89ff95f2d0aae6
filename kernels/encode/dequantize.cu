// Dequantize: a range of a sequence as values.
#include "encode/dequantize.cuh"

using namespace kvarn;

#define DEQUANTIZE_TO(FORMAT, BITS, NAME, OUT, D)                                                                  \
    extern "C" __global__ __launch_bounds__(256, 2) void dequantize_##FORMAT##_##NAME##_d##D(DequantizeParams p) { \
        dequantize<OUT, D, BITS>(p);                                                                               \
    }
#define DEQUANTIZE_RAW(FROM, IN, NAME, OUT, D)                                                                  \
    extern "C" __global__ __launch_bounds__(D) void dequantize_raw_##FROM##_##NAME##_d##D(DequantizeParams p) { \
        dequantize_raw<IN, OUT, D>(p);                                                                          \
    }
#define DEQUANTIZE(NAME, OUT, D)             \
    DEQUANTIZE_TO(int8, 8, NAME, OUT, D)     \
    DEQUANTIZE_TO(int4, 4, NAME, OUT, D)     \
    DEQUANTIZE_TO(int3, 3, NAME, OUT, D)     \
    DEQUANTIZE_TO(int2, 2, NAME, OUT, D)     \
    DEQUANTIZE_RAW(f16, half, NAME, OUT, D)  \
    DEQUANTIZE_RAW(bf16, bf16, NAME, OUT, D) \
    DEQUANTIZE_RAW(f32, float, NAME, OUT, D)

DEQUANTIZE(f16, half, 64)
DEQUANTIZE(bf16, bf16, 64)
DEQUANTIZE(f32, float, 64)
DEQUANTIZE(f16, half, 128)
DEQUANTIZE(bf16, bf16, 128)
DEQUANTIZE(f32, float, 128)
