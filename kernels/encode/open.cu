// Open: pages whose statistics are taken over tokens before them.
#include "encode/open_window.cuh"

using namespace kvarn;

// Of stored tokens of all layers, and of those that the step brings to one.
#define OPEN_STORED(FORMAT, BITS, D)                                                                              \
    extern "C" __global__ __launch_bounds__(32 * WINDOW_WARPS,                                                    \
                                            BITS == 8 ? 3 : 2) void open_stored_##FORMAT##_d##D(EncodeParams p) { \
        open_window<void, D, BITS>(p);                                                                            \
    }
#define OPEN_ROWS(FORMAT, BITS, NAME, IN, D)                                                             \
    extern "C" __global__ __launch_bounds__(32 * WINDOW_WARPS,                                           \
                                            2) void open_rows_##FORMAT##_##NAME##_d##D(EncodeParams p) { \
        open_window<IN, D, BITS>(p);                                                                     \
    }
#define OPEN(FORMAT, BITS, D)              \
    OPEN_STORED(FORMAT, BITS, D)           \
    OPEN_ROWS(FORMAT, BITS, f16, half, D)  \
    OPEN_ROWS(FORMAT, BITS, bf16, bf16, D) \
    OPEN_ROWS(FORMAT, BITS, f32, float, D)

OPEN(int8, 8, 64)
OPEN(int4, 4, 64)
OPEN(int3, 3, 64)
OPEN(int2, 2, 64)
OPEN(int8, 8, 128)
OPEN(int4, 4, 128)
OPEN(int3, 3, 128)
OPEN(int2, 2, 128)
