// Decode attention, its kernels by name. A step: `schedule` once; a layer: `query`, `decode`, `combine`.
//
//   attend_schedule <<<1, 1024>>>
//   query     <<<ceil(sequences * num_kv_heads * column_tiles / 4), 128>>>
//   decode    <<<(blocks, column_tiles), 32 * warps, shared bytes>>>      warps and bytes: the symbol decode_.._shape
//   combine   <<<ceil(rows * num_q_heads / 4), 128>>>
//
// decode and combine may be launched with programmatic stream serialization. Names end with head_dim and columns of a
// tile over 8; `b128` kernels are for blocks of 128 tokens, others for all sizes.
#include "attend/combine.cuh"
#include "attend/decode.cuh"
#include "attend/schedule.cuh"

using namespace kvarn;
using bf16 = __nv_bfloat16;
using f16 = __half;
using f32 = float;

#define DECODE(NAME, ...)                                                                                              \
    using Config_##NAME = Config<__VA_ARGS__>;                                                                         \
    extern "C" __device__ const int decode_##NAME##_shape[2] = {Config_##NAME::WARPS, Config_##NAME::SHARED_BYTES};    \
    extern "C" __global__ void __launch_bounds__(Config_##NAME::WARPS * 32, 1)                                         \
        decode_##NAME(const __grid_constant__ AttendParams p) {                                                        \
        decode<Config_##NAME>(p);                                                                                      \
    }
#define QUERY_OF(NAME, CONFIG, DTYPE, D)                                                                               \
    extern "C" __global__ void __launch_bounds__(128)                                                                  \
        query_##NAME##_##DTYPE##_##D(const __grid_constant__ AttendParams p) {                                         \
        query<CONFIG, DTYPE>(p);                                                                                       \
    }
#define QUERY(NAME, CONFIG, D)       \
    QUERY_OF(NAME, CONFIG, bf16, D)  \
    QUERY_OF(NAME, CONFIG, f16, D)   \
    QUERY_OF(NAME, CONFIG, f32, D)
#define COMBINE(D)                                                                                                     \
    COMBINE_OF(D, bf16) COMBINE_OF(D, f16) COMBINE_OF(D, f32)
#define COMBINE_OF(D, DTYPE)                                                                                           \
    extern "C" __global__ void __launch_bounds__(128) combine_##DTYPE##_d##D(const __grid_constant__ AttendParams p) { \
        combine<D, false, DTYPE>(p);                                                                                   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128)                                                                  \
        combine_rotated_##DTYPE##_d##D(const __grid_constant__ AttendParams p) {                                       \
        combine<D, true, DTYPE>(p);                                                                                    \
    }

extern "C" __global__ void __launch_bounds__(SCHEDULE_THREADS) attend_schedule(const __grid_constant__ AttendParams p) {
    schedule(p);
}

// Warps and stages as measured on an H100 where shared memory is 227 KB.
//     name            bits  D    NT block warps stages element step
DECODE(raw_bf16_d128_n1, 16, 128, 1, 0, 8, 3, bf16)
DECODE(raw_f16_d128_n1, 16, 128, 1, 0, 8, 3, f16)
DECODE(int8_d128_n1, 8, 128, 1, 0, 8, 3)
DECODE(int4_b128_d128_n1, 4, 128, 1, 128, 6, 2)
DECODE(int3_b128_d128_n1, 3, 128, 1, 128, 8, 2)
DECODE(int2_b128_d128_n1, 2, 128, 1, 128, 8, 2)
DECODE(int4_d128_n1, 4, 128, 1, 0, 6, 2)
DECODE(int3_d128_n1, 3, 128, 1, 0, 8, 2)
DECODE(int2_d128_n1, 2, 128, 1, 0, 8, 2)

DECODE(raw_bf16_d128_n2, 16, 128, 2, 0, 8, 3, bf16)
DECODE(raw_f16_d128_n2, 16, 128, 2, 0, 8, 3, f16)
DECODE(int8_d128_n2, 8, 128, 2, 0, 8, 3)
DECODE(int4_b128_d128_n2, 4, 128, 2, 128, 6, 2, f16, 1)
DECODE(int3_b128_d128_n2, 3, 128, 2, 128, 8, 2, f16, 1)
DECODE(int2_b128_d128_n2, 2, 128, 2, 128, 8, 2, f16, 1)
DECODE(int4_d128_n2, 4, 128, 2, 0, 6, 2, f16, 1)
DECODE(int3_d128_n2, 3, 128, 2, 0, 8, 2, f16, 1)
DECODE(int2_d128_n2, 2, 128, 2, 0, 8, 2, f16, 1)

DECODE(raw_bf16_d64_n1, 16, 64, 1, 0, 8, 6, bf16)
DECODE(raw_f16_d64_n1, 16, 64, 1, 0, 8, 6, f16)
DECODE(int8_d64_n1, 8, 64, 1, 0, 8, 5)
DECODE(int4_b128_d64_n1, 4, 64, 1, 128, 8, 2)
DECODE(int3_b128_d64_n1, 3, 64, 1, 128, 8, 3)
DECODE(int2_b128_d64_n1, 2, 64, 1, 128, 8, 4)
DECODE(int4_d64_n1, 4, 64, 1, 0, 8, 2)
DECODE(int3_d64_n1, 3, 64, 1, 0, 8, 3)
DECODE(int2_d64_n1, 2, 64, 1, 0, 8, 4)

DECODE(raw_bf16_d64_n2, 16, 64, 2, 0, 8, 6, bf16)
DECODE(raw_f16_d64_n2, 16, 64, 2, 0, 8, 6, f16)
DECODE(int8_d64_n2, 8, 64, 2, 0, 8, 5)
DECODE(int4_b128_d64_n2, 4, 64, 2, 128, 8, 2)
DECODE(int3_b128_d64_n2, 3, 64, 2, 128, 8, 3)
DECODE(int2_b128_d64_n2, 2, 64, 2, 128, 8, 4)
DECODE(int4_d64_n2, 4, 64, 2, 0, 8, 2)
DECODE(int3_d64_n2, 3, 64, 2, 0, 8, 3)
DECODE(int2_d64_n2, 2, 64, 2, 0, 8, 4)

// Two tiles of columns do not fit the registers: more than 8 columns are as many more tiles of the grid.
DECODE(raw_bf16_d256_n1, 16, 256, 1, 0, 6, 2, bf16)
DECODE(raw_f16_d256_n1, 16, 256, 1, 0, 6, 2, f16)
DECODE(int8_d256_n1, 8, 256, 1, 0, 6, 2)
DECODE(int4_b128_d256_n1, 4, 256, 1, 128, 3, 2)
DECODE(int3_b128_d256_n1, 3, 256, 1, 128, 4, 2)
DECODE(int2_b128_d256_n1, 2, 256, 1, 128, 6, 2)
DECODE(int4_d256_n1, 4, 256, 1, 0, 3, 2)
DECODE(int3_d256_n1, 3, 256, 1, 0, 4, 2)
DECODE(int2_d256_n1, 2, 256, 1, 0, 6, 2)

#define QUERIES(D)                        \
    QUERY(raw_bf16, Config_raw_bf16_##D, D) \
    QUERY(raw_f16, Config_raw_f16_##D, D)   \
    QUERY(int8, Config_int8_##D, D)         \
    QUERY(int4, Config_int4_##D, D)         \
    QUERY(int3, Config_int3_##D, D)         \
    QUERY(int2, Config_int2_##D, D)
QUERIES(d128_n1)
QUERIES(d128_n2)
QUERIES(d64_n1)
QUERIES(d64_n2)
QUERIES(d256_n1)

COMBINE(64)
COMBINE(128)
COMBINE(256)
