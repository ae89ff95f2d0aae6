// Prefill: query rows of one (sequence, kv head) against its history, decoded tile by tile, and against the step's own
// tokens as they are given. A block a tile of query rows; a warp has 16 of them.
#pragma once
#include "prefill_tile.cuh"

namespace kvarn {

template <class Cfg> struct Prefill {
    static constexpr int D = Cfg::D, TOKENS = Cfg::TOKENS, SCORES = TOKENS / 8, OUTPUTS = D / 8,
                         WARPS = Cfg::THREADS / 32;
    const PrefillParams& p;
    typename Cfg::Shared& shared;
    const int warp, lane, g, t;
    int sequence, head, first_row, num_rows, num_new, context_len, first_held;
    const int* token_rows;
    float o[OUTPUTS][4], m[2], l[2], unit;  // unit: what the output is in

    DEV Prefill(const PrefillParams& params, typename Cfg::Shared& s)
        : p(params), shared(s), warp(threadIdx.x / 32), lane(threadIdx.x % 32), g(lane / 4), t(lane % 4) {}

    DEV int position(int row) const { return context_len + (first_row + row) / p.attend.group; }
    DEV int first_seen(int row) const { return max(first_held, position(row) + 1 - p.attend.window); }
    DEV int after_seen(int row) const {
        return p.attend.over_history ? min(position(row) + 1, context_len) : position(row) + 1;
    }
    DEV int tensor_row(int row) const { return token_rows[(first_row + row) / p.attend.group]; }
    DEV int q_head(int row) const { return head * p.attend.group + (first_row + row) % p.attend.group; }

    /// q of the warp's rows: normalised by a power of two, in the frames that K may be in.
    DEV void load_queries() {
        constexpr int VALUES = D / 32;
        for (int i = 0; i < 16; i++) {
            const int row = warp * 16 + i;
            const bool there = row < num_rows;
            float x[VALUES], most = 0.f;
            const int from = there ? row : 0;
            load_row(p.attend.q.base, p.q_dtype,
                     element_at(p.attend.q, tensor_row(from), q_head(from), p.attend.rows_per_batch) + lane * VALUES,
                     x);
#pragma unroll
            for (int j = 0; j < VALUES; j++) most = fmaf(x[j], x[j], most);
#pragma unroll
            for (int lanes = 1; lanes < 32; lanes *= 2) most += __shfl_xor_sync(ALL_LANES, most, lanes);
            const float own = unit_above(sqrtf(most));
#pragma unroll
            for (int frame = 0; frame < Cfg::Q_FRAMES; frame++) {
                if (frame == ROTATED) rotate_lanes<D>(x, lane);
                const float norm = frame == ROTATED ? rsqrtf(float(D)) : 1.f;
#pragma unroll
                for (int j = 0; j < VALUES; j++)
                    shared.q[frame][row][lane * VALUES + j] = __float2half_rn(there ? x[j] * norm / own : 0.f);
            }
            if (lane == 0) shared.factor[row] = own * p.attend.scale * LOG2_E;
        }
        __syncwarp();
    }

    DEV uint32_t pair_at(const __half* x) const { return *reinterpret_cast<const uint32_t*>(x); }

    /// Attends to the shared tile, of positions `first`.. up to before `end`.
    DEV void attend(int first, int end) {
        float s[SCORES][4] = {};
#pragma unroll
        for (int group = 0; group < Cfg::GROUPS; group++) {
            const int frame = Cfg::Q_FRAMES > 1 ? shared.frame[group] : 0;
#pragma unroll
            for (int c = 0; c < D / 16; c++) {
                const __half* q = &shared.q[frame][warp * 16 + g][c * 16 + 2 * t];
                const uint32_t a[4] = {pair_at(q), pair_at(q + 8 * Cfg::K_PITCH), pair_at(q + 8),
                                       pair_at(q + 8 * Cfg::K_PITCH + 8)};
#pragma unroll
                for (int n = 2 * group; n < 2 * group + 2; n++) {
                    const __half* k = &shared.k[n * 8 + g][c * 16 + 2 * t];
                    const uint32_t b[2] = {pair_at(k), pair_at(k + 8)};
                    HalfMath::mma(s[n], a, b);
                }
            }
        }
        float top[2] = {-INFINITY, -INFINITY}, most_v = 0.f;
        int low[2], high[2];
        float factor[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = warp * 16 + g + 8 * i;
            low[i] = first_seen(row), high[i] = row < num_rows ? min(after_seen(row), end) : 0,
            factor[i] = shared.factor[row];
        }
#pragma unroll
        for (int n = 0; n < SCORES; n++)
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const int token = n * 8 + 2 * t + r % 2, position = first + token, i = r / 2;
                float x = s[n][r] * factor[i] * shared.k_unit[token];
                if (p.attend.softcap != 0.f) {
                    const float cap = p.attend.softcap * LOG2_E;
                    x = cap * (1.f - 2.f * reciprocal_fast(1.f + exp2_fast(x * (2.f * LOG2_E / cap))));
                }
                s[n][r] = position >= low[i] && position < high[i] ? x : -INFINITY;
                top[i] = fmaxf(top[i], s[n][r]);
            }
        for (int token = lane; token < TOKENS; token += 32) most_v = fmaxf(most_v, shared.v_unit[token]);
        const float to_unit = fmaxf(unit, largest_of_lanes<1, 32>(most_v));
        float alpha[2], sum[2] = {0.f, 0.f};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float highest = fmaxf(m[i], largest_of_lanes<1, 4>(top[i]));
            alpha[i] = exp2_fast(m[i] - highest), m[i] = highest;
        }
#pragma unroll
        for (int n = 0; n < OUTPUTS; n++)
#pragma unroll
            for (int r = 0; r < 4; r++) o[n][r] *= alpha[r / 2] * (unit / to_unit);
        unit = to_unit;
        const float inverse = 1.f / to_unit;
        uint32_t pairs[SCORES][2];
#pragma unroll
        for (int n = 0; n < SCORES; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int token = n * 8 + 2 * t;
                const float low_p = exp2_fast(s[n][2 * i] - m[i]), high_p = exp2_fast(s[n][2 * i + 1] - m[i]);
                sum[i] += low_p + high_p;
                pairs[n][i] =
                    HalfMath::pack(low_p * shared.v_unit[token] * inverse, high_p * shared.v_unit[token + 1] * inverse);
            }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 1), sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 2);
            l[i] = fmaf(l[i], alpha[i], sum[i]);
        }
#pragma unroll
        for (int c = 0; c < TOKENS / 16; c++) {
            const uint32_t a[4] = {pairs[2 * c][0], pairs[2 * c][1], pairs[2 * c + 1][0], pairs[2 * c + 1][1]};
#pragma unroll
            for (int n = 0; n < OUTPUTS; n++) {
                const __half* v = &shared.v[n * 8 + g][c * 16 + 2 * t];
                const uint32_t b[2] = {pair_at(v), pair_at(v + 8)};
                HalfMath::mma(o[n], a, b);
            }
        }
    }

    /// x H of the rows' outputs, without the factor: channel 8 n + 2 t + e.
    DEV void rotate_outputs() {
#pragma unroll
        for (int n = 0; n < OUTPUTS; n++)
#pragma unroll
            for (int r = 0; r < 4; r += 2) {
                const float a = o[n][r], b = o[n][r + 1];
                o[n][r] = a + b, o[n][r + 1] = a - b;
            }
#pragma unroll
        for (int lanes = 1; lanes < 4; lanes *= 2)
#pragma unroll
            for (int n = 0; n < OUTPUTS; n++)
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    const float other = __shfl_xor_sync(ALL_LANES, o[n][r], lanes);
                    o[n][r] = t & lanes ? other - o[n][r] : o[n][r] + other;
                }
#pragma unroll
        for (int half = 1; half < OUTPUTS; half *= 2)
#pragma unroll
            for (int n = 0; n < OUTPUTS; n++)
                if (!(n & half))
#pragma unroll
                    for (int r = 0; r < 4; r++) {
                        const float a = o[n][r], b = o[n + half][r];
                        o[n][r] = a + b, o[n + half][r] = a - b;
                    }
    }

    DEV void store(uint64_t base, int64_t at, float low, float high) const {
        if (p.out_dtype == F32) store_2(pointer<float>(base) + at, false, low, high);
        else if (p.out_dtype == BF16) store_2(pointer<__nv_bfloat16>(base) + at, false, low, high);
        else store_2(pointer<__half>(base) + at, false, low, high);
    }

    DEV void write() {
        if (Cfg::SEALS) rotate_outputs();
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = warp * 16 + g + 8 * i;
            if (row >= num_rows) continue;
            const int to = tensor_row(row), of_head = q_head(row);
            float highest = m[i], sum = l[i], factor = 1.f;
            if (p.attend.sinks) {
                const float logit = pointer<const float>(p.attend.sinks)[of_head] * LOG2_E;
                highest = fmaxf(m[i], logit), factor = exp2_fast(m[i] - highest);
                sum = fmaf(l[i], factor, exp2_fast(logit - highest));
            }
            const bool seen = sum > 0.f;
            const float norm = seen ? factor * unit * (Cfg::SEALS ? rsqrtf(float(D)) : 1.f) / sum : 0.f;
#pragma unroll
            for (int n = 0; n < OUTPUTS; n++) {
                const int64_t at = element_at(p.attend.out, to, of_head, p.attend.rows_per_batch) + n * 8 + 2 * t;
                store(p.attend.out.base, at, o[n][2 * i] * norm, o[n][2 * i + 1] * norm);
            }
            if (p.attend.lse.base && t == 0) {
                const float lse = seen ? (highest + log2f(sum)) * LN_2 : -INFINITY;
                pointer<float>(p.attend.lse.base)[element_at(p.attend.lse, to, of_head, p.attend.rows_per_batch)] = lse;
            }
        }
    }

    DEV void run() {
        const AttendParams& a = p.attend;
        sequence = blockIdx.z, head = blockIdx.y;
        const int* starts = plan_array(a.plan, TOKEN_START_LOC) + sequence;
        num_new = starts[1] - starts[0], token_rows = plan_array(a.plan, TOKEN_ROWS) + starts[0];
        if (!plan_array(a.plan, IS_PREFILL)[sequence] || num_new > a.max_new) return;
        first_row = blockIdx.x * Cfg::ROWS, num_rows = min(num_new * a.group - first_row, Cfg::ROWS);
        if (num_rows <= 0) return;
        context_len = plan_array(a.plan, CONTEXT_LENS)[sequence], first_held = plan_array(a.plan, FIRST_HELD)[sequence];
        load_queries();
#pragma unroll
        for (int n = 0; n < OUTPUTS; n++)
#pragma unroll
            for (int r = 0; r < 4; r++) o[n][r] = 0.f;
        m[0] = m[1] = NO_MAXIMUM, l[0] = l[1] = 0.f, unit = 1e-30f;

        Decoder<Cfg> decoder(shared, lane);
        const bool as_given = p.has_new && !a.over_history;
        const int from = first_seen(0), seen = after_seen(num_rows - 1), end = as_given ? min(seen, context_len) : seen;
        const int table = plan_array(a.plan, ROWS)[sequence];
        for (int first = from / TOKENS * TOKENS; first < end; first += TOKENS) {
            __syncthreads();
            for (int group = warp; group < Cfg::GROUPS; group += WARPS) {
                const int token = first + group * FRAGMENT_TOKENS,
                          count = token + FRAGMENT_TOKENS <= from ? 0 : end - token;
                const int place = count > 0 ? place_at(a.plan, table, token / a.block_size) : 0;
                if (count > 0) decoder.record(a, place, head, token % a.block_size, count, group * FRAGMENT_TOKENS);
                else clear(group * FRAGMENT_TOKENS);
            }
            __syncthreads();
            attend(first, end);
        }
        const int last = as_given ? seen : 0;
        for (int first = context_len + max(from - context_len, 0) / TOKENS * TOKENS; first < last; first += TOKENS) {
            __syncthreads();
            for (int group = warp; group < Cfg::GROUPS; group += WARPS) {
                const int token = first + group * FRAGMENT_TOKENS, count = last - token;
                if (count > 0) decoder.fresh(p, token_rows + token - context_len, head, count, group * FRAGMENT_TOKENS);
                else clear(group * FRAGMENT_TOKENS);
            }
            __syncthreads();
            attend(first, last);
        }
        write();
    }

    /// Sixteen tokens of the shared tile that do not exist.
    DEV void clear(int to) {
        for (int i = lane; i < FRAGMENT_TOKENS * D; i += 32) {
            shared.k[to + i / D][i % D] = shared.v[i % D][to + i / D] = __float2half_rn(0.f);
        }
        if (lane < FRAGMENT_TOKENS) shared.k_unit[to + lane] = 1.f, shared.v_unit[to + lane] = 0.f;
        if (lane == 0) shared.frame[to / 16] = PLAIN;
    }
};

template <class Cfg> DEV void prefill(const PrefillParams& p) {
    extern __shared__ __align__(16) uint8_t bytes[];
    Prefill<Cfg>(p, *reinterpret_cast<typename Cfg::Shared*>(bytes)).run();
}

}  // namespace kvarn
