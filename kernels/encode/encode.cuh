// What all kernels that encode share: rounding, what is not finite, warps and blocks, the plan and the rows of a step.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "layout.cuh"
#include "records.cuh"

namespace kvarn {

using half = __half;
using bf16 = __nv_bfloat16;

constexpr unsigned ALL_LANES = ~0u;
constexpr float F16_MAX = 65504.f;
constexpr float LARGEST_VALUE = 1e30f;  // larger ones are taken for this where sums of them are formed
constexpr float SHIFT = 12582912.f;     // 1.5 * 2^23: adding it rounds to a whole number, which is then the low byte
constexpr uint16_t F16_MAX_BITS = 0x7bff;
constexpr float SMALLEST_F16_SCALE = 4.76837158203125e-7f;  // 2^-21: a smaller f16 has fewer than four bits

// ---------------------------------------------------------------- numbers

/// The nearest f16, clamped to the finite ones.
__device__ __forceinline__ half to_half(float x) { return __float2half_rn(fminf(fmaxf(x, -F16_MAX), F16_MAX)); }
__device__ __forceinline__ float f16_at(const void* p) { return __half2float(*static_cast<const half*>(p)); }
__device__ __forceinline__ bool is_at_the_end(half x) { return (__half_as_ushort(x) & 0x7fff) == F16_MAX_BITS; }

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(half x) { return __half2float(x); }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
template <class T> __device__ __forceinline__ T narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
template <> __device__ __forceinline__ half narrow<half>(float x) { return to_half(x); }
template <> __device__ __forceinline__ bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }

/// A pair of 16-bit values of type T as two floats.
template <class T> __device__ __forceinline__ float2 widen_pair(uint32_t pair);
template <> __device__ __forceinline__ float2 widen_pair<half>(uint32_t pair) {
    return __half22float2(*reinterpret_cast<half2*>(&pair));
}
template <> __device__ __forceinline__ float2 widen_pair<bf16>(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
template <class T> __device__ __forceinline__ uint32_t narrow_pair(float a, float b);
template <> __device__ __forceinline__ uint32_t narrow_pair<half>(float a, float b) {
    const half2 limit = __half2half2(__ushort_as_half(F16_MAX_BITS));
    const half2 x = __hmax2(__hmin2(__floats2half2_rn(a, b), limit), __hneg2(limit));
    return *reinterpret_cast<const uint32_t*>(&x);
}
template <> __device__ __forceinline__ uint32_t narrow_pair<bf16>(float a, float b) {
    const __nv_bfloat162 x = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&x);
}

/// What is stored for a value that is not finite: 0 for a NaN; for an infinity the end of f16, or the bf16 before it.
template <class In> constexpr float END_OF = F16_MAX;
template <> constexpr float END_OF<bf16> = 65280.f;
__device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }
template <class In> __device__ __forceinline__ float finite(float x) {
    return is_finite(x) ? x : x != x ? 0.f : copysignf(END_OF<In>, x);
}
__device__ __forceinline__ float bounded(float x, float limit) { return fminf(fmaxf(x, -limit), limit); }

/// The same of a pair of 16-bit values whose exponents are EXPONENT where they are not finite, and held within LIMIT;
/// not 0 where there was anything to do.
template <uint32_t EXPONENT, uint32_t END, uint32_t LIMIT>
__device__ __forceinline__ uint32_t make_finite(uint32_t& pair) {
    const uint32_t size = pair & 0x7fff7fffu, odd = __vcmpgeu2(size, EXPONENT * 0x10001u),
                   nan = __vcmpgtu2(size, EXPONENT * 0x10001u);
    const uint32_t end = (size & ~odd) | (END * 0x10001u & odd & ~nan);
    pair = __vminu2(end, LIMIT * 0x10001u) | (pair & 0x80008000u & ~nan);
    return odd;
}
template <class T> __device__ __forceinline__ uint32_t make_finite(uint32_t& pair);
template <> __device__ __forceinline__ uint32_t make_finite<half>(uint32_t& pair) {
    return make_finite<0x7c00, F16_MAX_BITS, F16_MAX_BITS>(pair);
}
template <> __device__ __forceinline__ uint32_t make_finite<bf16>(uint32_t& pair) {
    return make_finite<0x7f80, 0x477f, 0x7149>(pair);
}  // 1e30

/// Four floats whose low bytes are codes, as one word.
__device__ __forceinline__ uint32_t low_bytes(float a, float b, float c, float d) {
    const uint32_t low = __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x0040);
    const uint32_t high = __byte_perm(__float_as_uint(c), __float_as_uint(d), 0x0040);
    return __byte_perm(low, high, 0x5410);
}

/// Does f16 not hold a row of V from lo to hi, stored under these parameters?
__device__ __forceinline__ bool v_is_out_of_range(float lo, float hi, half scale, half zero_point) {
    return is_at_the_end(scale) || (is_at_the_end(zero_point) && fabsf(lo) > F16_MAX) ||
           (__half2float(scale) < SMALLEST_F16_SCALE && lo != hi);
}

/// H of D channels is of blocks of so many, the largest power of two that divides D, times one over the root of it.
template <int D> constexpr int ROTATION_BLOCK = D & -D;
template <int D>
constexpr float ROTATION_NORM = ROTATION_BLOCK<D> == 16    ? 0.25f
                                : ROTATION_BLOCK<D> == 32  ? 0.17677669529663687f
                                : ROTATION_BLOCK<D> == 64  ? 0.125f
                                : ROTATION_BLOCK<D> == 128 ? 0.08838834764831845f
                                                           : 0.0625f;

// ---------------------------------------------------------------- warps and blocks

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp() { return threadIdx.x / 32; }

__device__ __forceinline__ float warp_min(float x) {
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) x = fminf(x, __shfl_xor_sync(ALL_LANES, x, mask));
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, mask));
    return x;
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) x += __shfl_xor_sync(ALL_LANES, x, mask);
    return x;
}

/// Sum or largest over a block of whole warps; `scratch` has an entry a warp and is free again at the next barrier.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    __syncthreads();
    if (lane() == 0) scratch[warp()] = x;
    __syncthreads();
    float sum = 0;
    for (int w = 0; w < blockDim.x / 32; w++) sum += scratch[w];
    return sum;
}
__device__ __forceinline__ float block_max(float x, float* scratch) {
    x = warp_max(x);
    __syncthreads();
    if (lane() == 0) scratch[warp()] = x;
    __syncthreads();
    float most = scratch[0];
    for (int w = 1; w < blockDim.x / 32; w++) most = fmaxf(most, scratch[w]);
    return most;
}

// ---------------------------------------------------------------- records

template <class T> __device__ __forceinline__ T* at_address(uint64_t address) { return reinterpret_cast<T*>(address); }

__device__ __forceinline__ uint8_t* record_of(const Records& records, int id, int head) {
    return at_address<uint8_t>(records.base + uint64_t(id) * records.stride + uint64_t(head) * records.head_stride);
}

/// The fields of an INT8 page.
template <int D> struct PageView {
    uint8_t* record;
    Int8Page<D> layout;

    __device__ PageView(uint8_t* record, int block_size) : record(record), layout{block_size} {}
    __device__ half* channel_mean() const { return reinterpret_cast<half*>(record + layout.K_CHANNEL_MEAN); }
    __device__ half* channel_scale() const { return reinterpret_cast<half*>(record + layout.K_CHANNEL_SCALE); }
    /// The group of a token: its codes of K and V, and three parameters of each token.
    __device__ uint8_t* group(int token) const {
        return record + layout.CHANNEL_BYTES + token / layout.tokens() * layout.group_bytes();
    }
    __device__ half* parameter(int token, int field) const {
        return reinterpret_cast<half*>(group(token) + field) + token_index(layout.tokens(), token % layout.tokens());
    }
    __device__ half* k_token_scale(int token) const { return parameter(token, layout.k_token_scale()); }
    __device__ half* v_token_scale(int token) const { return parameter(token, layout.v_token_scale()); }
    __device__ half* v_token_zero_point(int token) const { return parameter(token, layout.v_token_zero_point()); }
    __device__ uint8_t* k_code(int token, int channel) const {
        return group(token) + layout.k() + index8(D, k_place(D, token % layout.tokens(), channel));
    }
    __device__ uint8_t* v_code(int token, int channel) const {
        return group(token) + layout.v() + index8(D, v_place(D, token % layout.tokens(), channel));
    }
};

// ---------------------------------------------------------------- the step

/// The plan's arrays, and one sequence of it.
struct Step {
    const EncodeParams& p;
    const int32_t* words;

    __device__ explicit Step(const EncodeParams& p) : p(p), words(at_address<const int32_t>(p.plan.words)) {}
    __device__ int word(PlanArray array, int index) const { return __ldg(words + p.plan.starts[array] + index); }
    __device__ int num_words(PlanArray array) const { return p.plan.starts[array + 1] - p.plan.starts[array]; }
    __device__ int context_len(int sequence) const { return word(CONTEXT_LENS, sequence); }
    __device__ int first_token(int sequence) const { return word(TOKEN_START_LOC, sequence); }
    __device__ int seq_len(int sequence) const {
        return context_len(sequence) + first_token(sequence + 1) - first_token(sequence);
    }
    __device__ int place(int sequence, int block) const {
        return __ldg(at_address<const int32_t>(p.plan.places) + int64_t(word(ROWS, sequence)) * p.plan.places_stride +
                     block);
    }
    /// The sequence whose tokens `index` of the step's tokens is among.
    __device__ int sequence_of(int index) const {
        int low = 0, high = num_words(ROWS) - 1;
        while (low < high) {
            const int middle = (low + high + 1) / 2;
            if (first_token(middle) <= index)
                low = middle;
            else
                high = middle - 1;
        }
        return low;
    }
};

/// A row of K or V: `[B, H, T, D]` by strides.
template <class In>
__device__ __forceinline__ const In* row_of(const Tensor& tensor, int rows_per_batch, int row, int head) {
    const int64_t at = int64_t(row / rows_per_batch) * tensor.strides[0] + int64_t(head) * tensor.strides[1] +
                       int64_t(row % rows_per_batch) * tensor.strides[2];
    return at_address<const In>(tensor.base) + at;
}
/// The row of token `index` of the step's tokens.
template <class In>
__device__ __forceinline__ const In* token_of(const Step& step, const Tensor& tensor, int index, int head) {
    if (step.p.is_dense)
        return at_address<const In>(tensor.base) + int64_t(head) * tensor.strides[1] +
               int64_t(index) * tensor.strides[2];
    return row_of<In>(tensor, step.p.rows_per_batch, step.word(TOKEN_ROWS, index), head);
}

__device__ __forceinline__ LayerRecords layer_records(const EncodeParams& p, int layer) {
    return at_address<const LayerRecords>(p.layers)[layer];
}
__device__ __forceinline__ LayerModel layer_model(const EncodeParams& p, int layer) {
    return at_address<const LayerModel>(p.models)[layer];
}

/// One of the counters' slots of a layer; which one says nothing.
__device__ __forceinline__ HealthSlot* health_of(const EncodeParams& p, int layer, unsigned any) {
    return at_address<HealthSlot>(p.health) + layer * HEALTH_SLOTS + any % HEALTH_SLOTS;
}
__device__ __forceinline__ void count(uint64_t* counter, unsigned by) {
    if (by) atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(by));
}

}  // namespace kvarn
