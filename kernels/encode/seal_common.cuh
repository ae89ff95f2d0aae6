// What the seal kernels share: sizes, records of 128 tokens, approximate arithmetic, reductions over their four warps.
#pragma once
#include "encode/fragments.cuh"

namespace kvarn {

constexpr int TILE_TOKENS = 128;  // the only block size that these kernels take
constexpr int SEAL_THREADS = 128, SEAL_WARPS = SEAL_THREADS / 32;
constexpr int BLOCK = 16;                        // channels of a block of the error feedback
constexpr int GROUP = 32, FRAGMENT = 16;         // tokens of a group of an INT8 page, and of an operand
constexpr uint32_t SHIFT_NIBBLES = 0x3f400000u;  // what the bits of eight SHIFTs, each four bits further up, sum up to
constexpr float LARGEST_SQUARES = 1e18f;  // of a row; beyond it there is an infinity, a NaN, or what f32 cannot square

/// The records that they take.
template <int BITS, int D> constexpr Tile<BITS, D> TILE{TILE_TOKENS};
template <int D> constexpr Int8Page<D> PAGE{TILE_TOKENS};
__device__ __forceinline__ int tile_index(int token) { return token_index(GROUP, token); }

// ---------------------------------------------------------------- numbers

/// Root, inverse and quotient to two units in the last place, without the slow paths of the exact ones.
__device__ __forceinline__ float root(float x) {
    float y;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float inverse(float x) {
    float y;
    asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float quotient(float a, float b) { return a * inverse(b); }

/// Byte `k` of `w`, as a float: PRMT and one addition.
__device__ __forceinline__ float byte_of(uint32_t w, uint32_t k) {
    return __uint_as_float(__byte_perm(w, 0x4b000000u, 0x7540u | k)) - 8388608.f;
}

/// x H of D values in a thread.
template <int D> __device__ __forceinline__ void rotate(float (&x)[D]) {
#pragma unroll
    for (int half = 1; half < D; half *= 2)
#pragma unroll
        for (int i = 0; i < D; i++)
            if (!(i & half)) {
                const float a = x[i], b = x[i + half];
                x[i] = a + b, x[i + half] = a - b;
            }
#pragma unroll
    for (int i = 0; i < D; i++) x[i] *= ROTATION_NORM<D>;
}

// ---------------------------------------------------------------- moving rows

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ void copy16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global));
}
__device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---------------------------------------------------------------- reductions

/// Mean and sum of squares about it of 2 * count values from two halves of count; lanes that differ in MASK keep half
/// of N.
template <int MASK, int N, int SIZE>
__device__ __forceinline__ void merge_equal(float (&mean)[SIZE], float (&squares)[SIZE], int count) {
    const bool upper = threadIdx.x & MASK;
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        const float kept = upper ? mean[i + N / 2] : mean[i],
                    other = __shfl_xor_sync(ALL_LANES, upper ? mean[i] : mean[i + N / 2], MASK);
        const float both = (upper ? squares[i + N / 2] : squares[i]) +
                           __shfl_xor_sync(ALL_LANES, upper ? squares[i] : squares[i + N / 2], MASK);
        const float d = other - kept;
        mean[i] = fmaf(0.5f, d, kept), squares[i] = fmaf(d * (0.5f * count), d, both);
    }
}

/// The sum over the four warps.
__device__ __forceinline__ float tile_sum(float x, float* scratch) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    return (scratch[0] + scratch[1]) + (scratch[2] + scratch[3]);
}

/// Bounds of two positive quantities; complete after the next barrier.
__device__ __forceinline__ void post_bounds(float a, float b, uint32_t* scratch) {
    const uint32_t x = __float_as_uint(a), y = __float_as_uint(b);
    const uint32_t a_lo = __reduce_min_sync(ALL_LANES, x), a_hi = __reduce_max_sync(ALL_LANES, x);
    const uint32_t b_lo = __reduce_min_sync(ALL_LANES, y), b_hi = __reduce_max_sync(ALL_LANES, y);
    if (threadIdx.x % 32 == 0) reinterpret_cast<uint4*>(scratch)[threadIdx.x / 32] = make_uint4(a_lo, a_hi, b_lo, b_hi);
}

}  // namespace kvarn
