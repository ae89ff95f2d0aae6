// Rows of tensors in f16, bf16 or f32.
#pragma once
#include "config.cuh"

namespace kvarn {

/// Eight neighbouring elements as f32. `aligned`: they start at a multiple of 16 bytes.
template <class T> DEV void load_8(const T* from, bool aligned, float (&x)[8]) {
    if (!aligned) {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = float(from[i]);
        return;
    }
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            const float4 v = *reinterpret_cast<const float4*>(from + i);
            x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
        }
    } else {
        const uint4 v = *reinterpret_cast<const uint4*>(from);
        const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 both = MathOf<T>::T::widen(w[i]);
            x[2 * i] = both.x, x[2 * i + 1] = both.y;
        }
    }
}

/// Two neighbouring elements. `aligned`: they start at a multiple of their size.
template <class T> DEV void store_2(T* to, bool aligned, float low, float high) {
    if constexpr (sizeof(T) == 4) {
        if (aligned) *reinterpret_cast<float2*>(to) = make_float2(low, high);
        else to[0] = low, to[1] = high;
    } else {
        const uint32_t pair = MathOf<T>::T::pack(low, high);
        if (aligned) {
            *reinterpret_cast<uint32_t*>(to) = pair;
        } else {
            reinterpret_cast<uint16_t*>(to)[0] = uint16_t(pair),
            reinterpret_cast<uint16_t*>(to)[1] = uint16_t(pair >> 16);
        }
    }
}

}  // namespace kvarn
