// Pages that a step writes whole: statistics of their own rows, K and V, in one pass over the rows. A warp has 16
// tokens, a block a page of one head, K or V of it.
#pragma once
#include "encode/append_tokens.cuh"
#include "encode/fragments.cuh"
#include "encode/statistics.cuh"

namespace kvarn {

constexpr int APPEND_WARPS = 8;  // of a block of 128 tokens

/// A K code, plus SHIFT: `z * inverse` is the code over 254, whose half is added so that saturation clamps.
__device__ __forceinline__ float k_code(float z, float inverse) {
    return fmaf(__saturatef(fmaf(z, inverse, 0.5f)), 2 * K_CODE_MAX, SHIFT - K_CODE_MAX);
}

template <int D, class In>
__device__ __forceinline__ void append_k(Statistics<D, APPEND_WARPS>& s, FragmentRows<D, In>& rows,
                                         const PageView<D>& page, const float* model, bool is_first_page,
                                         HealthSlot* health) {
    constexpr int PER_THREAD = D / 32;
    const int g = lane() / 4, q = lane() % 4, token = 16 * warp() + g;
    int non_finite = 0;
#pragma unroll 1
    for (bool repaired = false;; repaired = true) {
        float mean[D / 4], squares[D / 4];
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            const float2 a = rows.v[0][i / 4].pair(i % 4), b = rows.v[1][i / 4].pair(i % 4);
            mean[2 * i] = 0.5f * (a.x + b.x), mean[2 * i + 1] = 0.5f * (a.y + b.y);
            squares[2 * i] = 0.5f * (a.x - b.x) * (a.x - b.x), squares[2 * i + 1] = 0.5f * (a.y - b.y) * (a.y - b.y);
        }
        s.put(mean, squares, 2.f);
        __syncthreads();
        float mean_of[PER_THREAD], squares_of[PER_THREAD];
        const float count_of = s.join(mean_of, squares_of);
        bool odd = false;
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) odd |= !(squares_of[i] < INFINITY);
        if (!__syncthreads_or(odd) || repaired) {
            s.store(mean_of, squares_of, count_of, model, is_first_page, page.channel_mean(), page.channel_scale());
            break;
        }
        non_finite = rows.repair();
    }
    __syncthreads();
    float z[2][D / 4], largest[2] = {}, squares = 0;
#pragma unroll
    for (int b = 0; b < D / 32; b++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int channel = 32 * b + 8 * q + 4 * i;
            const float4 m = *reinterpret_cast<const float4*>(s.mean() + channel),
                         c = *reinterpret_cast<const float4*>(s.inverse_scale() + channel);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float2 x = rows.v[h][b].pair(2 * i), y = rows.v[h][b].pair(2 * i + 1);
                float* to = &z[h][8 * b + 4 * i];
                to[0] = (x.x - m.x) * c.x, to[1] = (x.y - m.y) * c.y, to[2] = (y.x - m.z) * c.z,
                to[3] = (y.y - m.w) * c.w;
#pragma unroll
                for (int j = 0; j < 4; j++)
                    largest[h] = fmaxf(largest[h], fabsf(to[j])), squares = fmaf(to[j], to[j], squares);
            }
        }
    half scale[2];
    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        largest[h] = fmaxf(largest[h], __shfl_xor_sync(ALL_LANES, largest[h], 1));
        largest[h] = fmaxf(largest[h], __shfl_xor_sync(ALL_LANES, largest[h], 2));
        scale[h] = to_half(largest[h] / K_CODE_MAX);
        const float stored = __half2float(scale[h]);
        inverse[h] = stored > 0.f ? 1.f / (stored * (2 * K_CODE_MAX)) : 0.f;
    }
    uint4* codes = reinterpret_cast<uint4*>(page.group(token) + token % page.layout.tokens() / 16 * (16 * D)) + lane();
#pragma unroll
    for (int b = 0; b < D / 32; b++) {
        uint32_t w[4];  // channels 4 f .. of tokens g + 8 h
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float* v = &z[i % 2][8 * b + 4 * (i / 2)];
            const float by = inverse[i % 2];
            w[i] = low_bytes(k_code(v[0], by), k_code(v[1], by), k_code(v[2], by), k_code(v[3], by));
        }
        codes[b * 32] = make_uint4(w[0], w[1], w[2], w[3]);
    }
    if (q == 0) *reinterpret_cast<half2*>(page.k_token_scale(token)) = __halves2half2(scale[0], scale[1]);
    squares = warp_sum(squares);
    const unsigned out = (q == 0 && is_at_the_end(scale[0])) + (q == 0 && is_at_the_end(scale[1]));
    const unsigned out_of_range = __reduce_add_sync(ALL_LANES, out);
    if (lane() == 0) {
        atomicAdd(&health->squares, double(squares));
        count(&health->num_rows, 16), count(&health->non_finite, non_finite),
            count(&health->out_of_range, out_of_range);
    }
}

/// Where, in the codes of V of sixteen tokens, the word of a channel and four tokens lies: of bits of the channel's
/// number.
template <int D> __device__ __forceinline__ int v_word(int half, int n, int g, int q) {
    const int channel = n / 2 * 32 + (g >> 2) * 16 + half * 8 + n % 2 * 4 + (g & 3);
    return index8(D, v_place(D, 2 * q, channel));
}

template <int D, class In, bool ROTATE>
__device__ __forceinline__ void append_v(FragmentRows<D, In>& rows, const PageView<D>& page, HealthSlot* health) {
    constexpr int N = D / 16;
    const int g = lane() / 4, q = lane() % 4;
    uint32_t a[4];
    channels_operand<typename OperandOf<In>::Type>(ROTATE, a);
    float acc[N][8];  // [fragment][half, tokens 2q, 2q + 1 (+ 8)]: index 4 i + 2 half + e
    int non_finite = 0;
#pragma unroll 1
    for (bool repaired = false;; repaired = true) {
        float probe = 0;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float c[4] = {};
                rows.product(c, a, i, n);
#pragma unroll
                for (int j = 0; j < 4; j++) acc[n][4 * i + j] = c[j];
                if (!ROTATE)
                    probe += c[0] * 0.f + c[1] * 0.f;  // whatever is not finite in a token reaches all rows of its mma
            }
        if (ROTATE) {
            butterflies(acc);
#pragma unroll
            for (int i = 0; i < 8; i++) probe += acc[0][i] * 0.f;  // and all of its channels
        }
        if (__all_sync(ALL_LANES, probe == 0.f) || repaired) break;
        non_finite = rows.repair();
    }
    const float norm = ROTATE ? ROTATION_NORM<D> : 1.f;
    float inverse[4], bias[4];
    half scale[4], zero[4];
    unsigned out = 0;
#pragma unroll
    for (int t = 0; t < 4; t++) {
        const int at = t / 2 * 4 + t % 2;
        float lo = INFINITY, hi = -INFINITY;
#pragma unroll
        for (int n = 0; n < N; n++)
            lo = fminf(lo, fminf(acc[n][at], acc[n][at + 2])), hi = fmaxf(hi, fmaxf(acc[n][at], acc[n][at + 2]));
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) {
            lo = fminf(lo, __shfl_xor_sync(ALL_LANES, lo, mask)), hi = fmaxf(hi, __shfl_xor_sync(ALL_LANES, hi, mask));
        }
        lo *= norm, hi *= norm;
        scale[t] = to_half((hi - lo) / V_CODE_MAX), zero[t] = to_half(lo);
        out += g == 0 && v_is_out_of_range(lo, hi, scale[t], zero[t]);
        const float s = __half2float(scale[t]);
        inverse[t] = s > 0.f ? 1.f / (s * V_CODE_MAX) : 0.f, bias[t] = -__half2float(zero[t]) * inverse[t],
        inverse[t] *= norm;
    }
    const int token = 16 * warp() + 2 * q;
    uint8_t* codes = page.group(token) + page.layout.v() + 16 * warp() % page.layout.tokens() / 16 * (16 * D);
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float v[4];
#pragma unroll
            for (int t = 0; t < 4; t++)
                v[t] = fmaf(__saturatef(fmaf(acc[n][t / 2 * 4 + t % 2 + 2 * half], inverse[t], bias[t])), V_CODE_MAX,
                            SHIFT);
            *reinterpret_cast<uint32_t*>(codes + v_word<D>(half, n, g, q)) = low_bytes(v[0], v[1], v[2], v[3]);
        }
    if (g == 0)
#pragma unroll
        for (int t = 0; t < 4; t++)
            *page.v_token_scale(token + t % 2 + t / 2 * 8) = scale[t],
                                                        *page.v_token_zero_point(token + t % 2 + t / 2 * 8) = zero[t];
    const unsigned out_of_range = __reduce_add_sync(ALL_LANES, out);
    if (lane() == 0) count(&health->non_finite, non_finite), count(&health->out_of_range, out_of_range);
}

/// Rows of a `raw` page, whose codes are operands as they come: those of V are turned round, eight by eight.
template <int D, class In>
__device__ __forceinline__ void append_raw(FragmentRows<D, In>& rows, uint8_t* record, bool is_v, HealthSlot* health) {
    const int g = lane() / 4, q = lane() % 4, non_finite = rows.repair();
    uint32_t* group =
        reinterpret_cast<uint32_t*>(record + RawPage<D>{0}.group_bytes() * warp() + (is_v ? RawPage<D>{0}.v() : 0));
#pragma unroll
    for (int b = 0; b < D / 32; b++)
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            if (!is_v) {
                const uint4 w = make_uint4(rows.v[0][b].word(i), rows.v[1][b].word(i), rows.v[0][b].word(i + 1),
                                           rows.v[1][b].word(i + 1));
                reinterpret_cast<uint4*>(group)[(2 * b + i / 2) * 32 + lane()] = w;
                continue;
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int word = i + j % 2, channel = 32 * b + 8 * (g / 2) + 2 * word + g % 2;
                uint32_t turned;
                asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;"
                             : "=r"(turned)
                             : "r"(rows.v[j / 2][b].word(word)));
                group[index16(D, v_place(D, 2 * q + 8 * (j / 2), channel)) / 2] = turned;
            }
        }
    if (lane() == 0) count(&health->non_finite, non_finite);
}

/// Pages of a layer: grid (opens, heads, K | V), two threads a token of a block.
template <class In, int D, Pages PAGES> __device__ __forceinline__ void append_pages(const EncodeParams& p) {
    __shared__ __align__(16) Statistics<D, APPEND_WARPS> s;
    const Step step(p);
    const int head = blockIdx.y, at = blockIdx.x * OPENS_WIDTH, sequence = step.word(OPENS, at);
    if (sequence < 0) return;
    const int block = step.word(OPENS, at + 1), first = block * p.block_size, context_len = step.context_len(sequence);
    if (step.word(OPENS, at + 2) != first || step.word(OPENS, at + 3) != first + p.block_size || context_len > first)
        return;
    const bool is_v = blockIdx.z;
    const int token = step.first_token(sequence) + first - context_len + 16 * warp() + lane() / 4;
    const Tensor& tensor = is_v ? p.v : p.k;
    FragmentRows<D, In> rows;
    rows.load(token_of<In>(step, tensor, token, head), token_of<In>(step, tensor, token + 8, head), p.is_aligned);
    const PageView<D> page(record_of(layer_records(p, 0).pages, step.place(sequence, block), head), p.block_size);
    HealthSlot* health = health_of(p, 0, blockIdx.x * p.num_kv_heads + head);
    if constexpr (PAGES == Pages::RAW)
        append_raw<D, In>(rows, page.record, is_v, health);
    else if (is_v)
        append_v<D, In, PAGES == Pages::INT8_ROTATED>(rows, page, health);
    else
        append_k<D, In>(s, rows, page, channels_of<D>(layer_model(p, 0), head), block == 0, health);
}

}  // namespace kvarn
