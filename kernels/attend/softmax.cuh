// Attention of one warp over stages of its ring: S^T = K Q^T, online softmax, O^T = V^T P^T, all in registers.
// A matrix tile has 8 columns; lane (g, t) holds columns 2 t and 2 t + 1 of rows g and g + 8.
#pragma once
#include "key_frame.cuh"

namespace kvarn {

constexpr float NO_MAXIMUM = -1e30f;

template <int D, int NT> struct State {
    float o[D / 16][NT][4], m[NT][2], l[NT][2], z[NT][2];  // z: sum of p * zero point, which all channels share
    DEV void reset() {
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int c = 0; c < 2; c++) m[n][c] = NO_MAXIMUM, l[n][c] = 0.f, z[n][c] = 0.f;
#pragma unroll
        for (int f = 0; f < D / 16; f++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) o[f][n][i] = 0.f;
    }
    template <class From, class To> DEV void change_unit() {
#pragma unroll
        for (int f = 0; f < D / 16; f++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) o[f][n][i] *= To::unit(f, i / 2) / From::unit(f, i / 2);
    }
};
struct Natural {
    static __host__ __device__ constexpr float unit(int, int) { return 1.f; }
};

/// Scales of a lane's tokens: rows g + 8 h of each group. `narrow`: the field has 16 tokens, else groups of 32.
template <int MTS> struct TokenValues {
    float x[MTS][2];
    DEV void load(const uint8_t* field, bool narrow, int group, int g) {
        if constexpr (MTS == 1) {
            const int at = narrow ? g * 4 : group / 2 * 64 + g * 8 + group % 2 * 4;
            const float2 a = widen(*reinterpret_cast<const uint32_t*>(field + at));
            x[0][0] = a.x, x[0][1] = a.y;
        } else {
#pragma unroll
            for (int m = 0; m < MTS; m += 2) {
                const uint2 v = narrow ? make_uint2(*reinterpret_cast<const uint32_t*>(field + g * 4), 0)
                                       : *reinterpret_cast<const uint2*>(field + (group + m) * 32 + g * 8);
                const float2 a = widen(v.x), b = widen(v.y);
                x[m][0] = a.x, x[m][1] = a.y, x[m + 1][0] = b.x, x[m + 1][1] = b.y;
            }
        }
    }
    DEV void fill(float v) {
#pragma unroll
        for (int m = 0; m < MTS; m++) x[m][0] = x[m][1] = v;
    }
};

/// What columns see of a stage that begins at position `first`, and the cap on their scores.
struct Mask {
    int first, tokens;  // tokens of the stage that exist
    int context_len, first_held, window, end;
    int first_column, group;
    float softcap;  // log2 units; 0: none
    /// Positions seen by a column: from `low` to before `high`, counted from the stage's first.
    DEV void of_column(int column, int& low, int& high) const {
        const int position = context_len + (first_column + column) / group;
        low = max(first_held, position + 1 - window) - first, high = min(min(position + 1, end) - first, tokens);
    }
};

/// Where a stage has its fields.
struct Fields {
    const uint8_t *k, *v, *k_scale, *v_scale, *v_zero;
    int high_plane;
    bool narrow;
};

/// Attention over a stage, in steps of MTS groups. The scores of a step are computed beside the softmax of the one
/// before, which alone would leave the units idle: its chain is long and its instructions few.
template <class Codes, class Math, int D, int NT, int MTS, bool SCALED> struct Attend {
    State<D, NT>& st;
    const KeyFrame<D, NT>& key;
    const Fields& at;
    const int lane, g, t;

    struct Scores {
        float c[MTS][NT][4];
        TokenValues<MTS> ks;
    };
    struct Weights {
        float l[NT][2], z[NT][2];  // what the step adds to the state's
        uint32_t p[MTS][NT][2];    // P^T as operand
        TokenValues<MTS> vs, vz;
    };

    DEV Attend(State<D, NT>& state, const KeyFrame<D, NT>& frame, const Fields& fields, int l)
        : st(state), key(frame), at(fields), lane(l), g(l / 4), t(l % 4) {}

    DEV void scores(int group, Scores& s) {
        typename Codes::Words w[MTS];
#pragma unroll
        for (int m = 0; m < MTS; m++) {
            w[m] = Codes::load(at.k, at.high_plane, group + m, lane);
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) s.c[m][n][i] = key.init[n][i];
        }
        if (SCALED) s.ks.load(at.k_scale, at.narrow, group, g);
        else s.ks.fill(1.f);
#pragma unroll
        for (int f = 0; f < Codes::FRAGMENTS; f++)
#pragma unroll
            for (int m = 0; m < MTS; m++) {
                uint32_t a[4];
                Codes::template fragment<true>(w[m], f, a);
#pragma unroll
                for (int n = 0; n < NT; n++) Math::mma(s.c[m][n], a, key.q[f][n]);
            }
#pragma unroll
        for (int m = 0; m < MTS; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) s.ks.x[m][h] *= key.factor[h];
    }

    /// Caps scores: x becomes cap * tanh(x / cap).
    DEV void cap(float softcap, Scores& s) {
        const float inward = 2.f * LOG2_E / softcap;
#pragma unroll
        for (int m = 0; m < MTS; m++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float x = fmaf(s.c[m][n][i], s.ks.x[m][i / 2], key.bias[n][i % 2]);
                    const float tanh = 1.f - 2.f * reciprocal_fast(1.f + exp2_fast(x * inward));
                    s.c[m][n][i] = fmaf(softcap, tanh, -key.bias[n][i % 2]);
                }
        s.ks.fill(1.f);
    }

    /// Takes out what a column does not see. Parameters of tokens that were never written may be anything.
    DEV void hide(const Mask& mask, int group, Scores& s, Weights& w) {
#pragma unroll
        for (int m = 0; m < MTS; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int token = (group + m) * 16 + g + 8 * h;
                if (token >= min(mask.tokens, mask.end - mask.first))
                    s.ks.x[m][h] = 1.f, w.vs.x[m][h] = w.vz.x[m][h] = 0.f;
            }
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                int low, high;
                mask.of_column(8 * n + 2 * t + j, low, high);
#pragma unroll
                for (int m = 0; m < MTS; m++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const int token = (group + m) * 16 + g + 8 * h;
                        if (token < low || token >= high) {
                            s.ks.x[m][h] = fmaxf(s.ks.x[m][h], 1e-30f), s.c[m][n][2 * h + j] = -INFINITY;
                        }
                    }
            }
    }

    DEV void adjust(const Mask& mask, int group, Scores& s, Weights& w) {
        if (mask.softcap != 0.f) cap(mask.softcap, s);
        hide(mask, group, s, w);
    }

    /// New maxima: of score + log2(scale of V), so that what the matrix unit gets, p * scale, is at most 1.
    DEV void raise(const Scores& s, const Weights& w) {
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float top = -INFINITY;
#pragma unroll
                for (int m = 0; m < MTS; m++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        float x = fmaf(s.c[m][n][2 * h + j], s.ks.x[m][h], key.bias[n][j]);
                        if (SCALED) x += log2_fast(fmaxf(w.vs.x[m][h], 6e-8f));
                        top = fmaxf(top, x);
                    }
#pragma unroll
                for (int lanes = 4; lanes < 32; lanes *= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, lanes));
                const float m = fmaxf(st.m[n][j], top), alpha = exp2_fast(st.m[n][j] - m);
                st.m[n][j] = m, st.l[n][j] *= alpha, st.z[n][j] *= alpha;
#pragma unroll
                for (int f = 0; f < D / 16; f++) st.o[f][n][j] *= alpha, st.o[f][n][2 + j] *= alpha;
            }
    }

    /// p under the maxima so far, which may be stale: no shuffle and no rescaling in the common case. Is p * scale
    /// beyond 2^11 anywhere?
    DEV bool weigh(const Scores& s, Weights& w) {
        uint32_t top = 0;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const float shift[2] = {key.bias[n][0] - st.m[n][0], key.bias[n][1] - st.m[n][1]};
#pragma unroll
            for (int m = 0; m < MTS; m++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float x[2];
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        x[j] = exp2_fast(fmaf(s.c[m][n][2 * h + j], s.ks.x[m][h], shift[j]));
                        w.l[n][j] = m + h ? w.l[n][j] + x[j] : x[j];
                        if (SCALED) w.z[n][j] = m + h ? fmaf(x[j], w.vz.x[m][h], w.z[n][j]) : x[j] * w.vz.x[m][h];
                    }
                    const float scale = SCALED ? w.vs.x[m][h] : 1.f;
                    const uint32_t pair = Math::pack(x[0] * scale, x[1] * scale);
                    top = Math::max2(top, pair);
                    w.p[m][n][h] = transpose(pair);
                }
        }
        return Math::any_beyond(top);
    }

    DEV void accumulate(const typename Codes::Words (&v)[MTS], const Weights& w) {
#pragma unroll
        for (int m = 0; m < MTS; m++)
#pragma unroll
            for (int f = 0; f < Codes::FRAGMENTS; f++) {
                uint32_t a[4];
                Codes::template fragment<false>(v[m], f, a);
#pragma unroll
                for (int n = 0; n < NT; n++) Math::mma(st.o[f][n], a, w.p[m][n]);
            }
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                st.l[n][j] += w.l[n][j];
                if (SCALED) st.z[n][j] += w.z[n][j];
            }
    }

    DEV void load_scales(int group, Weights& w) {
        if (SCALED) w.vs.load(at.v_scale, at.narrow, group, g), w.vz.load(at.v_zero, at.narrow, group, g);
        else w.vs.fill(1.f), w.vz.fill(0.f);
    }
    DEV void load_values(int group, typename Codes::Words (&v)[MTS]) {
#pragma unroll
        for (int m = 0; m < MTS; m++) v[m] = Codes::load(at.v, at.high_plane, group + m, lane);
    }

    /// A stage of STEPS steps that all columns see whole.
    template <int STEPS> DEV void run() {
        Scores s[2];
        scores(0, s[0]);
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const int group = i * MTS;
            Scores &now = s[i % 2], &next = s[(i + 1) % 2];
            typename Codes::Words v[MTS];
            Weights w;
            load_scales(group, w);
            constexpr bool EARLY = NT == 1;  // where registers allow: the loads' latency then passes unseen
            if (EARLY) load_values(group, v);
            const bool beyond = weigh(now, w);
            if (i + 1 < STEPS) scores(group + MTS, next);
            if (__builtin_expect(beyond, 0)) raise(now, w), weigh(now, w);
            if (!EARLY) load_values(group, v);
            accumulate(v, w);
        }
    }

    /// The step of some groups of which columns may see parts.
    DEV void step(int group, bool whole, const Mask& mask) {
        Scores s;
        Weights w;
        typename Codes::Words v[MTS];
        scores(group, s);
        load_scales(group, w);
        if (NT == 1) load_values(group, v);
        if (!whole) adjust(mask, group, s, w);
        if (__builtin_expect(weigh(s, w), 0)) raise(s, w), weigh(s, w);
        if (NT != 1) load_values(group, v);
        accumulate(v, w);
    }

    /// The sequence's first token, whose V a tile holds apart with 8 bits. Its weight under the maxima now, anew.
    template <class Tile>
    DEV void first_value(const Tile& layout, const uint8_t* tile, int row, bool whole, const Mask& mask) {
        const float scale = widen(*reinterpret_cast<const uint16_t*>(tile + layout.first_v_scale()));
        const float zero = widen(*reinterpret_cast<const uint16_t*>(tile + layout.first_v_scale() + 2));
        const int group = row / (16 * MTS) * MTS;
        Scores s;
        Weights w;
        scores(group, s);
        if (!whole) adjust(mask, group, s, w);
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float p = 0.f;
#pragma unroll
                for (int m = 0; m < MTS; m++)
#pragma unroll
                    for (int h = 0; h < 2; h++)
                        if (row / 8 == (group + m) * 2 + h) {
                            p = exp2_fast(fmaf(s.c[m][n][2 * h + j], s.ks.x[m][h], key.bias[n][j] - st.m[n][j]));
                        }
                p = __shfl_sync(ALL_LANES, p, row % 8 * 4 + t);
#pragma unroll
                for (int f = 0; f < D / 16; f++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const float v = fmaf(float(tile[layout.first_v() + g * (D / 8) + 2 * f + h]), scale, zero);
                        st.o[f][n][2 * h + j] = fmaf(p, v * Codes::unit(f, h), st.o[f][n][2 * h + j]);
                    }
            }
    }
};

}  // namespace kvarn
