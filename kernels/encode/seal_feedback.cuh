// Error feedback over the channels of one frame: 16 channels at a time in the registers of a thread with T tokens; what
// earlier blocks send to a block comes by tensor cores.
//
// Everything is about the grid's middle, in units of its input: u = w / k_token_scale - what the middle code decodes
// to. The token scale leaves the recursion, since a token's scale is the same in all its channels; so does the middle,
// since it moves both w and what codes decode to, and then u is small enough for f16. A warp has 32 T tokens and needs
// no other warp.
#pragma once
#include "encode/seal_common.cuh"

namespace kvarn {

/// Of each block, this position is looked at for codes that the grid clamped.
constexpr int SAMPLED = 7;

constexpr int TRIANGLE = BLOCK * (BLOCK - 1) / 2;  // entries of F within a block

/// The constants of one (kv head, frame), as bytes from its start. Made once, when the moments are factored.
template <int D> struct Constants {
    static constexpr int BLOCKS = D / BLOCK, LINKED = BLOCKS * (BLOCKS - 1) / 2;
    static constexpr int CHANNEL = 0;  // u32 [D]: p
    static constexpr int STAGED =
        CHANNEL + 4 * D;                           // u32 [D]: where the code of position d is staged in its token's row
    static constexpr int WEIGHT = STAGED + 4 * D;  // f32 [D]: m / (s U)^2, of position d
    static constexpr int DIAGONAL = WEIGHT + 4 * D;  // f32 [BLOCKS][TRIANGLE]: F within blocks
    static constexpr int LINKS =
        DIAGONAL + 4 * BLOCKS * TRIANGLE;  // bf16 B operands of -F between blocks (b, a), a < b
    static constexpr int BYTES = LINKS + LINKED * 32 * 16;
};

// U is f16, in shared memory by blocks of 16 channels (4 KB), each block in 8 lines of 512 bytes, 32 tokens in their
// own 128 bytes of each. Chunk c (eight channels) of token l of the 32: line 2 (l / 8) + c, slot (l & 7) ^ (l >> 3). A
// thread per token, accumulators and operands of mma, and the tiles of `RegisterTile` all find eight distinct slots.
// Used up, a block keeps its errors, bf16, in the same places.
constexpr uint32_t LINE = TILE_TOKENS * 4, BLOCK_BYTES = BLOCK / 2 * LINE;
__device__ __forceinline__ uint32_t chunk_at(uint32_t token, uint32_t c) {
    const uint32_t l = token % 32;
    return (l / 8 * 2 + c) * LINE + token / 32 * 128 + ((l & 7) ^ (l >> 3)) * 16;
}

template <class T> __device__ __forceinline__ T& at(void* base, uint32_t offset) {
    return *reinterpret_cast<T*>(reinterpret_cast<uint8_t*>(base) + offset);
}
__device__ __forceinline__ float2 floats_of(uint32_t halves) {
    return __half22float2(*reinterpret_cast<const half2*>(&halves));
}
__device__ __forceinline__ uint32_t halves_of(float a, float b) {
    const half2 pair = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ void load_matrices(uint32_t (&a)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(address)
                 : "memory");
}

/// The code that u is about: even, so that ties still go to even codes.
template <int BITS> constexpr int MIDDLE_CODE = 1 << (BITS - 1);

/// Grids of positions, for the recursion, each [D] and read by fours: a uniform 16-byte load takes two cycles of the
/// shared-memory pipe, which bounds the recursion; two tokens a thread halve that.
struct Grids {
    const float4 *inverse, *step,
        *weight;  // 1 / (scale * code_max), or NaN without scale; scale; what a squared error counts
};

/// Sixteen channels of T tokens: u becomes the errors.
template <int BITS, int T>
__device__ __forceinline__ void round_block(float (&u)[T][BLOCK], Grids grids, const float4* triangle,
                                            uint32_t (&words)[T][2], float (&loss)[T], int& clamped) {
    constexpr float CODE_MAX = (1 << BITS) - 1, MIDDLE = MIDDLE_CODE<BITS>;
    auto part = [](const float4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; };
    float4 f, inverse, step, weight;
#pragma unroll
    for (int t = 0; t < T; t++) words[t][0] = words[t][1] = MIDDLE_CODE<BITS> * 0x11111111u - SHIFT_NIBBLES;
#pragma unroll
    for (int i = 0; i < BLOCK; i++) {
        if (i % 4 == 0) inverse = grids.inverse[i / 4], step = grids.step[i / 4], weight = grids.weight[i / 4];
        float e[T];
#pragma unroll
        for (int t = 0; t < T; t++) {
            // NaN saturates to 0, the code of channels without scale
            const float share = fmaf(u[t][i], part(inverse, i % 4), MIDDLE / CODE_MAX);  // the code over the largest
            const float shifted = fmaf(__saturatef(share), CODE_MAX, SHIFT - MIDDLE);
            if (i == SAMPLED) clamped += fabsf(share - 0.5f) > 0.5f + 0.5f / CODE_MAX;
            e[t] = fmaf(shifted - SHIFT, -part(step, i % 4), u[t][i]);
            loss[t] = fmaf(e[t] * part(weight, i % 4), e[t], loss[t]);
            words[t][i / 8] += __float_as_uint(shifted) << (4 * (i % 8));
            u[t][i] = e[t];
        }
#pragma unroll
        for (int j = i + 1; j < BLOCK; j++) {
            const int at = i * (2 * BLOCK - i - 1) / 2 + j - i - 1;
            if (at % 4 == 0) f = triangle[at / 4];
#pragma unroll
            for (int t = 0; t < T; t++) u[t][j] = fmaf(-part(f, at % 4), e[t], u[t][j]);
        }
    }
}

/// The recursion over all of U by one warp, for tokens 32 (first + t) + lane, t < T. Codes, eight nibbles a word, go to
/// `codes`, [D / 8][TILE_TOKENS]. Gives the tokens' losses over their scales squared.
template <int D, int BITS, int T>
__device__ __forceinline__ void feed_back(uint8_t* u_all, uint32_t first, Grids grids, const float4* diagonal,
                                          const uint8_t* constants, uint32_t* codes, float (&loss)[T], int& clamped) {
    using C = Constants<D>;
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    uint8_t* block = u_all + first * 128;
    const uint32_t mine = chunk_at(lane, 0);
    uint32_t accumulator[4], operand[2];
#pragma unroll
    for (uint32_t h = 0; h < 4; h++)
        accumulator[h] = chunk_at(8 * h + g, 0) + q * 4;  // tokens g + 8 h, channels 2 q, + 1
#pragma unroll
    for (uint32_t i = 0; i < 2; i++)
        operand[i] = shared_address(block) + chunk_at(16 * i + lane / 8 % 2 * 8 + lane % 8, lane / 16);
    const uint4* links = reinterpret_cast<const uint4*>(constants + C::LINKS) + lane;
    uint4 f[C::BLOCKS - 1];
#pragma unroll
    for (int t = 0; t < T; t++) loss[t] = 0;
#pragma unroll 1
    for (int b = 0; b < C::BLOCKS; b++, block += BLOCK_BYTES) {
        if (b > 0) {
            float c[T][2][2][4];
#pragma unroll
            for (int t = 0; t < T; t++)
#pragma unroll
                for (int h = 0; h < 4; h++)
#pragma unroll
                    for (int n = 0; n < 2; n++) {
                        const float2 v = floats_of(at<uint32_t>(block, accumulator[h] + n * LINE + t * 128));
                        c[t][h / 2][n][h % 2 * 2] = v.x, c[t][h / 2][n][h % 2 * 2 + 1] = v.y;
                    }
#pragma unroll
            for (int k = 0; k < C::BLOCKS - 1; k++)
                if (k < b) {
#pragma unroll
                    for (int t = 0; t < T; t++)
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            uint32_t a[4];
                            load_matrices(a, operand[i] + k * BLOCK_BYTES + t * 128);
                            mma<bf16>(c[t][i][0], a, f[k].x, f[k].y);
                            mma<bf16>(c[t][i][1], a, f[k].z, f[k].w);
                        }
                }
#pragma unroll
            for (int t = 0; t < T; t++)
#pragma unroll
                for (int h = 0; h < 4; h++)
#pragma unroll
                    for (int n = 0; n < 2; n++)
                        at<uint32_t>(block, accumulator[h] + n * LINE + t * 128) =
                            halves_of(c[t][h / 2][n][h % 2 * 2], c[t][h / 2][n][h % 2 * 2 + 1]);
            __syncwarp();
        }
        float u[T][BLOCK];
#pragma unroll
        for (int t = 0; t < T; t++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const uint4 v = at<uint4>(block, mine + c * LINE + t * 128);
                const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float2 x = floats_of(pairs[i]);
                    u[t][8 * c + 2 * i] = x.x, u[t][8 * c + 2 * i + 1] = x.y;
                }
            }
        if (b + 1 < C::BLOCKS) {  // of the next block, long before they are needed
#pragma unroll
            for (int k = 0; k < C::BLOCKS - 1; k++)
                if (k <= b) f[k] = __ldg(links + k * 32);
            links += (b + 1) * 32;
        }
        uint32_t words[T][2];
        round_block<BITS, T>(u, grids, diagonal + b * (TRIANGLE / 4), words, loss, clamped);
        grids.inverse += BLOCK / 4, grids.step += BLOCK / 4, grids.weight += BLOCK / 4;
#pragma unroll
        for (int t = 0; t < T; t++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                uint32_t pairs[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const __nv_bfloat162 pair = __floats2bfloat162_rn(u[t][8 * c + 2 * i], u[t][8 * c + 2 * i + 1]);
                    pairs[i] = *reinterpret_cast<const uint32_t*>(&pair);
                }
                at<uint4>(block, mine + c * LINE + t * 128) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
            }
#pragma unroll
            for (int w = 0; w < 2; w++) codes[(2 * b + w) * TILE_TOKENS + 32 * (first + t) + lane] = words[t][w];
        }
        __syncwarp();
    }
}

}  // namespace kvarn
