// What the keys of a record share: q times its channel scales, and what its zero points or means add.
#pragma once
#include "query.cuh"

namespace kvarn {

/// score (log2 units) = dot * factor[h] * token scale + bias, where `dot` starts from `init`.
template <int D, int NT> struct KeyFrame {
    uint32_t q[D / 16][NT][2];
    float init[NT][4], factor[2], bias[NT][2];

    DEV void load(const uint4* operands, int lane) {
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int b = 0; b < D / 32; b++) {
                const uint4 v = operands[(n * (D / 32) + b) * 32 + lane];
                q[2 * b][n][0] = v.x, q[2 * b][n][1] = v.y, q[2 * b + 1][n][0] = v.z, q[2 * b + 1][n][1] = v.w;
            }
    }
    /// sum over channels of q * x, x [D] fp16; `odd`: what the q of odd fragments was divided by.
    DEV void dot(const uint8_t* x, int t, float odd, float (&sum)[NT][2]) const {
        float part[2][NT][4] = {};
#pragma unroll
        for (int b = 0; b < D / 32; b++) {
            const uint4 v = reinterpret_cast<const uint4*>(x)[4 * b + t];
            const uint32_t even_rows[4] = {v.x, v.x, v.y, v.y}, odd_rows[4] = {v.z, v.z, v.w, v.w};  // all rows alike
#pragma unroll
            for (int n = 0; n < NT; n++) {
                HalfMath::mma(part[0][n], even_rows, q[2 * b][n]);
                HalfMath::mma(part[1][n], odd_rows, q[2 * b + 1][n]);
            }
        }
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) sum[n][j] = part[0][n][j] + part[1][n][j] * odd;
    }
    DEV void scale_channels(const uint8_t* scales, int t) {
#pragma unroll
        for (int b = 0; b < D / 32; b++) {
            const uint4 v = reinterpret_cast<const uint4*>(scales)[4 * b + t];
            const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int n = 0; n < NT; n++) q[2 * b + i / 2][n][i % 2] = half_mul(q[2 * b + i / 2][n][i % 2], w[i]);
        }
    }
    template <class Codes, class Tile>
    DEV void of_tile(const Tile& at, const uint8_t* tile, const uint4* operands, float scale, int lane) {
        load(operands, lane);
        float zero[NT][2];
        dot(tile + at.k_channel_zero_point(), lane % 4, Codes::unit(1, 0) / Codes::unit(0, 0), zero);
        scale_channels(tile + at.k_channel_scale(), lane % 4);
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) init[n][i] = zero[n][i % 2] * Codes::unit(0, i / 2), bias[n][i % 2] = 0.f;
#pragma unroll
        for (int h = 0; h < 2; h++) factor[h] = scale * (1.f / Codes::unit(0, h));
    }
    template <class Codes, class Page>
    DEV void of_page(const uint8_t* page, const uint4* operands, float scale, int lane) {
        load(operands, lane);
        float mean[NT][2];
        dot(page + Page::K_CHANNEL_MEAN, lane % 4, 1.f, mean);
        scale_channels(page + Page::K_CHANNEL_SCALE, lane % 4);
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) init[n][i] = 0.f, bias[n][i % 2] = mean[n][i % 2] * scale;
            // -128 * sum of q, for codes come with 128 added: the operand -128 * 2^-24 everywhere
            const uint32_t rows[4] = {0x80808080u, 0x80808080u, 0x80808080u, 0x80808080u};
#pragma unroll
            for (int f = 0; f < D / 16; f++) HalfMath::mma(init[n], rows, q[f][n]);
        }
        factor[0] = factor[1] = scale * (1.f / Codes::unit(0, 0));
    }
    DEV void of_raw(const uint4* operands, float scale, int lane) {
        load(operands, lane);
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) init[n][i] = 0.f, bias[n][i % 2] = 0.f;
        factor[0] = factor[1] = scale;
    }
};

}  // namespace kvarn
