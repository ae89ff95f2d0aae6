// Seal: tiles out of pages (all layers at once) and out of the step's rows (one layer).
#include "encode/seal_keys.cuh"
#include "encode/seal_values.cuh"

using namespace kvarn;

// Blocks a multiprocessor: by registers, and 111 KB of shared memory at D = 128.
#define SEAL_FROM(FORMAT, BITS, NAME, SOURCE, D)                                                                       \
    extern "C" __global__ __launch_bounds__(SEAL_THREADS,                                                              \
                                            D == 64 ? 4 : 2) void seal_keys_##FORMAT##_##NAME##_d##D(EncodeParams p) { \
        seal_keys<D, BITS, SOURCE>(p);                                                                                 \
    }                                                                                                                  \
    extern "C" __global__ __launch_bounds__(SEAL_THREADS,                                                              \
                                            3) void seal_values_##FORMAT##_##NAME##_d##D(EncodeParams p) {             \
        seal_values<D, BITS, SOURCE>(p);                                                                               \
    }
#define SEAL(FORMAT, BITS, D)                         \
    SEAL_FROM(FORMAT, BITS, page, PageSource, D)      \
    SEAL_FROM(FORMAT, BITS, f16, RowSource<half>, D)  \
    SEAL_FROM(FORMAT, BITS, bf16, RowSource<bf16>, D) \
    SEAL_FROM(FORMAT, BITS, f32, RowSource<float>, D)

SEAL(int4, 4, 128)
SEAL(int3, 3, 128)
SEAL(int2, 2, 128)
SEAL(int4, 4, 64)
SEAL(int3, 3, 64)
SEAL(int2, 2, 64)
