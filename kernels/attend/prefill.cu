// Attention of prefills, its kernels by name.
//
//   prefill   <<<(ceil(most new tokens * group / rows), num_kv_heads, sequences), threads, shared bytes>>>
//             rows, threads and bytes: the symbol prefill_.._shape
#include "attend/prefill.cuh"

using namespace kvarn;

#define PREFILL(NAME, ...) \
    using Config_##NAME = PrefillConfig<__VA_ARGS__>; \
    extern "C" __device__ const int prefill_##NAME##_shape[3] = {Config_##NAME::ROWS, Config_##NAME::THREADS, \
                                                                 int(sizeof(Config_##NAME::Shared))}; \
    extern "C" __global__ void __launch_bounds__(Config_##NAME::THREADS) \
        prefill_##NAME(const __grid_constant__ PrefillParams p) { \
        prefill<Config_##NAME>(p); \
    }
#define PREFILLS(D) \
    PREFILL(raw_bf16_d##D, 16, D, __nv_bfloat16) \
    PREFILL(raw_f16_d##D, 16, D, __half) \
    PREFILL(int8_d##D, 8, D) \
    PREFILL(int4_d##D, 4, D) \
    PREFILL(int3_d##D, 3, D) \
    PREFILL(int2_d##D, 2, D)
PREFILLS(64)
PREFILLS(128)
PREFILLS(256)
