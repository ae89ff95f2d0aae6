// Tokens for a prefill, 16 at a time, in shared memory: decoded from records, or as a step brings them.
//
// K is [token][channel], V is [channel][token], both fp16, each token divided by a unit of its own, so that nothing
// overflows: K of token t is `k_unit[t]` times what is stored.
#pragma once
#include "combine.cuh"
#include "softmax.cuh"

namespace kvarn {

enum Dtype { F16, BF16, F32 };

template <int BITS_, int D_, class Element_ = __half> struct PrefillConfig : Config<BITS_, D_, 1, 0, 1, 2, Element_> {
    static constexpr int D = D_;
    static constexpr int ROWS = D > 128 ? 32 : 64, TOKENS = ROWS, THREADS = ROWS * 2, GROUPS = TOKENS / FRAGMENT_TOKENS;
    static constexpr int Q_FRAMES = BITS_ < 8 ? 2 : 1, K_PITCH = D + 8, V_PITCH = TOKENS + 8;
    struct Shared {
        __half q[Q_FRAMES][ROWS][K_PITCH], k[TOKENS][K_PITCH], v[D][V_PITCH];
        float factor[ROWS], k_unit[TOKENS], v_unit[TOKENS];
        int frame[GROUPS];
    };
};

/// A power of two that x is at most; 2^-99 for less.
DEV float unit_above(float x) { return __int_as_float((min(max(__float_as_int(x) >> 23, 27), 252) + 1) << 23); }

template <int LOW, int HIGH> DEV float largest_of_lanes(float x) {
#pragma unroll
    for (int lanes = LOW; lanes < HIGH; lanes *= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, lanes));
    return x;
}

/// VALUES neighbouring elements of a tensor of any dtype.
template <int VALUES> DEV void load_row(uint64_t base, int dtype, int64_t at, float (&x)[VALUES]) {
#pragma unroll
    for (int i = 0; i < VALUES; i++) {
        if (dtype == F32) x[i] = pointer<const float>(base)[at + i];
        else if (dtype == BF16) x[i] = float(pointer<const __nv_bfloat16>(base)[at + i]);
        else x[i] = float(pointer<const __half>(base)[at + i]);
    }
}

/// Every 32nd element, or zeros.
template <int VALUES> DEV void load_spread(uint64_t base, int dtype, int64_t at, bool there, float (&x)[VALUES]) {
    if (dtype == F32) {
#pragma unroll
        for (int i = 0; i < VALUES; i++) x[i] = there ? pointer<const float>(base)[at + 32 * i] : 0.f;
    } else if (dtype == BF16) {
#pragma unroll
        for (int i = 0; i < VALUES; i++) x[i] = there ? float(pointer<const __nv_bfloat16>(base)[at + 32 * i]) : 0.f;
    } else {
#pragma unroll
        for (int i = 0; i < VALUES; i++) x[i] = there ? float(pointer<const __half>(base)[at + 32 * i]) : 0.f;
    }
}

/// Index of a token's parameter in a field of so many tokens.
DEV int parameter_index(int tokens, int token) { return token_index(tokens < 32 ? 16 : 32, token); }
DEV float parameter_at(const uint8_t* field, int index) {
    return widen(reinterpret_cast<const uint16_t*>(field)[index]);
}

/// Where the 16 tokens of a group are in a record: fields, and the number of tokens that a field of parameters has.
struct Group {
    const uint8_t *k, *v, *k_scale, *v_scale, *v_zero;
    int high_plane, in_field, first,
        tokens;  // `in_field`: the group's number in the fields; `first`: its first parameter
};

template <class Cfg> struct Decoder {
    static constexpr int D = Cfg::D, FRAGMENTS = D / 16;
    typename Cfg::Shared& shared;
    const int lane, g, t;

    DEV Decoder(typename Cfg::Shared& s, int l) : shared(s), lane(l), g(l / 4), t(l % 4) {}

    /// Stores K of tokens `to + g` and `+ 8`: (code * scale[channel] * by[h] + offset[channel]) / unit[h].
    template <class Codes, class Math, bool RAW>
    DEV void keys(const Group& at, const uint8_t* scales, const uint8_t* offsets, float bias, const float (&by)[2],
                  const float (&unit)[2], const bool (&there)[2], int to) {
        const typename Codes::Words words = Codes::load(at.k, at.high_plane, at.in_field, lane);
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) {
            uint32_t a[4];
            Codes::template fragment<true>(words, f, a);
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const int h = r % 2, channel = f / 2 * 32 + 8 * t + f % 2 * 4 + r / 2 * 2;
                float2 x = Math::widen(a[r]);
                if (!RAW) {
                    const float2 scale = widen(*reinterpret_cast<const uint32_t*>(scales + 2 * channel));
                    const float2 offset = widen(*reinterpret_cast<const uint32_t*>(offsets + 2 * channel));
                    const float code = 1.f / Codes::unit(f, h);
                    x.x = fmaf((x.x * code - bias) * scale.x, by[h], offset.x);
                    x.y = fmaf((x.y * code - bias) * scale.y, by[h], offset.y);
                }
                const float inverse = 1.f / unit[h];
                const uint32_t pair = there[h] ? HalfMath::pack(x.x * inverse, x.y * inverse) : 0u;
                *reinterpret_cast<uint32_t*>(&shared.k[to + g + 8 * h][channel]) = pair;
            }
        }
    }

    /// The largest magnitude of raw K in rows g and g + 8, of raw V in columns 2 t + 8 j + e.
    template <class Codes, class Math> DEV void largest_raw(const Group& at, float (&k)[2], float (&v)[2][2]) {
        const typename Codes::Words kw = Codes::load(at.k, 0, 0, lane), vw = Codes::load(at.v, 0, 0, lane);
#pragma unroll
        for (int i = 0; i < 2; i++) k[i] = v[i][0] = v[i][1] = 0.f;
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) {
            uint32_t a[4];
            Codes::template fragment<true>(kw, f, a);
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const float2 x = Math::widen(a[r]);
                k[r % 2] = fmaxf(k[r % 2], fmaxf(fabsf(x.x), fabsf(x.y)));
            }
            Codes::template fragment<false>(vw, f, a);
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const float2 x = Math::widen(a[r]);
                v[r / 2][0] = fmaxf(v[r / 2][0], fabsf(x.x)), v[r / 2][1] = fmaxf(v[r / 2][1], fabsf(x.y));
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            k[i] = largest_of_lanes<1, 4>(k[i]);
            v[i][0] = largest_of_lanes<4, 32>(v[i][0]), v[i][1] = largest_of_lanes<4, 32>(v[i][1]);
        }
    }

    /// Stores V of tokens 2 t + 8 j + e: (code * scale[j][e] + zero[j][e]) / unit[j][e].
    template <class Codes, class Math, bool RAW>
    DEV void values(const Group& at, const float (&scale)[2][2], const float (&zero)[2][2], const float (&unit)[2][2],
                    const bool (&there)[2][2], int to) {
        const typename Codes::Words words = Codes::load(at.v, at.high_plane, at.in_field, lane);
        const float inverse[2][2] = {{1.f / unit[0][0], 1.f / unit[0][1]}, {1.f / unit[1][0], 1.f / unit[1][1]}};
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) {
            uint32_t a[4];
            Codes::template fragment<false>(words, f, a);
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const int h = r % 2, j = r / 2;
                const float2 both = Math::widen(a[r]);
                float x[2] = {both.x, both.y};
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    if (!RAW) x[e] = fmaf(x[e] * (1.f / Codes::unit(f, h)), scale[j][e], zero[j][e]);
                    x[e] = there[j][e] ? x[e] * inverse[j][e] : 0.f;
                }
                *reinterpret_cast<uint32_t*>(&shared.v[g * (D / 8) + 2 * f + h][to + 2 * t + 8 * j]) =
                    HalfMath::pack(x[0], x[1]);
            }
        }
    }

    /// Of channel scales and offsets, the largest magnitude: `scale * by + offset` of any channel is at most x * by +
    /// y.
    DEV float2 largest_channel(const uint8_t* scales, const uint8_t* offsets) {
        float x = 0.f, y = 0.f;
        for (int channel = lane; channel < D; channel += 32) {
            x = fmaxf(x, parameter_at(scales, channel)), y = fmaxf(y, fabsf(parameter_at(offsets, channel)));
        }
        return make_float2(largest_of_lanes<1, 32>(x), largest_of_lanes<1, 32>(y));
    }

    /// Decodes the 16 tokens from `token` on of a record into rows `to`.. of the shared tile; `there` of them are
    /// tokens.
    DEV void record(const AttendParams& p, int place, int head, int token, int count, int to) {
        using Page = typename Cfg::Page;
        const bool k_there[2] = {g < count, g + 8 < count};
        bool v_there[2][2];
        int k_token[2] = {g, g + 8}, v_token[2][2];
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) v_token[j][e] = 2 * t + 8 * j + e, v_there[j][e] = v_token[j][e] < count;
        float k_by[2] = {1.f, 1.f}, k_unit[2], k_store[2], v_scale[2][2], v_zero[2][2], v_unit[2][2];
        int frame = PLAIN;
        if constexpr (Cfg::RAW) {
            const auto page = Cfg::page(p);
            const uint8_t* group = record_at(p.pages, place, head) + token / 16 * page.group_bytes();
            const Group at{group + page.k(), group + page.v(), nullptr, nullptr, nullptr, 0, 0, 0, 16};
            largest_raw<typename Cfg::PageCodes, typename Cfg::Math>(at, k_unit, v_unit);
            for (int i = 0; i < 2; i++) {
                k_unit[i] = k_store[i] = unit_above(k_there[i] ? k_unit[i] : 0.f);
                for (int e = 0; e < 2; e++) v_unit[i][e] = unit_above(v_there[i][e] ? v_unit[i][e] : 0.f);
            }
            keys<typename Cfg::PageCodes, typename Cfg::Math, true>(at, nullptr, nullptr, 0.f, k_by, k_unit, k_there,
                                                                    to);
            values<typename Cfg::PageCodes, typename Cfg::Math, true>(at, v_scale, v_zero, v_unit, v_there, to);
        } else if (Cfg::SEALS && place < 0) {
            if constexpr (Cfg::SEALS) {
                const auto tile = Cfg::tile(p);
                const uint8_t *record = record_at(p.tiles, ~place, head), *header = record + tile.header();
                const Group at{record + tile.k(),
                               record + tile.v(),
                               record + tile.k_token_scale(),
                               record + tile.v_token_scale(),
                               record + tile.v_token_zero_point(),
                               tile.high_plane(),
                               token / 16,
                               token,
                               tile.block_size};
                const uint8_t *scales = record + tile.k_channel_scale(), *zeros = record + tile.k_channel_zero_point();
                constexpr float MOST = float((1 << Cfg::BITS) - 1);
                const float2 largest = largest_channel(scales, zeros);
                const float unit = unit_above(fmaf(largest.x, MOST, largest.y)), units[2] = {unit, unit};
                for (int h = 0; h < 2; h++)
                    k_store[h] = unit * parameter_at(at.k_scale, parameter_index(at.tokens, token + k_token[h]));
                frame = header[1] & 1;
                keys<typename Cfg::TileCodes, HalfMath, false>(at, scales, zeros, 0.f, k_by, units, k_there, to);
                token_parameters(at, MOST, v_token, v_there, v_scale, v_zero, v_unit);
                values<typename Cfg::TileCodes, HalfMath, false>(at, v_scale, v_zero, v_unit, v_there, to);
                const int first = int(header[2]) - token;  // the sequence's first token has a V of its own
                if (header[2] != NO_FIRST_ROW && first >= 0 && first < 16) {
                    __syncwarp();
                    const float scale = parameter_at(record + tile.first_v_scale(), 0),
                                zero = parameter_at(record + tile.first_v_scale(), 1);
                    const float own = unit_above(fmaf(255.f, scale, fabsf(zero)));
                    for (int channel = lane; channel < D; channel += 32) {
                        const float x = fmaf(float(record[tile.first_v() + channel]), scale, zero) / own;
                        shared.v[channel][to + first] = __float2half_rn(first < count ? x : 0.f);
                    }
                    for (int j = 0; j < 2; j++)
                        for (int e = 0; e < 2; e++)
                            if (v_token[j][e] == first) v_unit[j][e] = own;
                }
            }
        } else {
            const auto page = Cfg::page(p);
            const uint8_t* record = record_at(p.pages, place, head);
            const int tokens = page.tokens();
            const uint8_t* group = record + Page::CHANNEL_BYTES + token / tokens * page.group_bytes();
            const Group at{group + page.k(),
                           group + page.v(),
                           group + page.k_token_scale(),
                           group + page.v_token_scale(),
                           group + page.v_token_zero_point(),
                           0,
                           token % tokens / 16,
                           token % tokens,
                           tokens};
            const uint8_t *scales = record + 2 * D, *means = record;
            const float2 largest = largest_channel(scales, means);
            for (int h = 0; h < 2; h++) {
                k_by[h] = parameter_at(at.k_scale, parameter_index(tokens, at.first + k_token[h]));
                if (!k_there[h]) k_by[h] = 0.f;
                k_unit[h] = k_store[h] = unit_above(fmaf(128.f * largest.x, k_by[h], largest.y));
            }
            keys<Codes<8, D>, HalfMath, false>(at, scales, means, 128.f, k_by, k_unit, k_there, to);
            token_parameters(at, 255.f, v_token, v_there, v_scale, v_zero, v_unit);
            values<Codes<8, D>, HalfMath, false>(at, v_scale, v_zero, v_unit, v_there, to);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (t == 0) shared.k_unit[to + g + 8 * i] = k_there[i] ? k_store[i] : 1.f;
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (g == 0) shared.v_unit[to + v_token[i][e]] = v_there[i][e] ? v_unit[i][e] : 0.f;
        }
        if (lane == 0) shared.frame[to / 16] = frame;
    }

    DEV void token_parameters(const Group& at, float most, const int (&token)[2][2], const bool (&there)[2][2],
                              float (&scale)[2][2], float (&zero)[2][2], float (&unit)[2][2]) {
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int index = parameter_index(at.tokens, at.first + token[j][e]);
                scale[j][e] = there[j][e] ? parameter_at(at.v_scale, index) : 0.f;
                zero[j][e] = there[j][e] ? parameter_at(at.v_zero, index) : 0.f;
                unit[j][e] = unit_above(fmaf(most, scale[j][e], fabsf(zero[j][e])));
            }
    }

    /// 16 of the step's own tokens, as they are; V rotated where records have it so. A lane has channels 32 i + lane.
    DEV void fresh(const PrefillParams& p, const int* token_rows, int head, int count, int to) {
        constexpr int VALUES = D / 32, FLIGHT = D > 64 ? 2 : 4;
        for (int first = 0; first < FRAGMENT_TOKENS; first += FLIGHT) {
            float k[FLIGHT][VALUES], v[FLIGHT][VALUES];
#pragma unroll
            for (int i = 0; i < FLIGHT; i++) {
                const bool there = first + i < count;
                const int row = token_rows[there ? first + i : 0], rows = p.attend.rows_per_batch;
                load_spread(p.k.base, p.kv_dtype, element_at(p.k, row, head, rows) + lane, there, k[i]);
                load_spread(p.v.base, p.kv_dtype, element_at(p.v, row, head, rows) + lane, there, v[i]);
            }
#pragma unroll
            for (int i = 0; i < FLIGHT; i++) {
                const int token = to + first + i;
                float k_most = 0.f, v_most = 0.f;
                if (Cfg::SEALS) rotate_lanes<D>(v[i], lane);
#pragma unroll
                for (int c = 0; c < VALUES; c++) {
                    if (Cfg::SEALS) v[i][c] *= rsqrtf(float(D));
                    k_most = fmaxf(k_most, fabsf(k[i][c])), v_most = fmaxf(v_most, fabsf(v[i][c]));
                }
                const float k_unit = unit_above(largest_of_lanes<1, 32>(k_most));
                const float v_unit = unit_above(largest_of_lanes<1, 32>(v_most));
                const float k_inverse = 1.f / k_unit, v_inverse = 1.f / v_unit;
#pragma unroll
                for (int c = 0; c < VALUES; c++) {
                    shared.k[token][32 * c + lane] = __float2half_rn(k[i][c] * k_inverse), v[i][c] *= v_inverse;
                }
                if (lane == 0) shared.k_unit[token] = k_unit, shared.v_unit[token] = first + i < count ? v_unit : 0.f;
            }
#pragma unroll
            for (int i = 0; i < FLIGHT; i += 2)
#pragma unroll
                for (int c = 0; c < VALUES; c++) {
                    uint32_t* pair = reinterpret_cast<uint32_t*>(&shared.v[32 * c + lane][to + first + i]);
                    *pair = HalfMath::pack(v[i][c], v[i + 1][c]);
                }
        }
        if (lane == 0) shared.frame[to / 16] = PLAIN;
    }
};

}  // namespace kvarn
