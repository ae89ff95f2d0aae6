// Decode attention over pages and tiles: every warp of the GPU walks through a share of all blocks.
#pragma once
#include "merge.cuh"
#include "walk.cuh"

namespace kvarn {

/// Raw pages: V of tokens that were never written may be NaN, which no weight of 0 cancels.
template <int D> DEV void clear_values(uint8_t* values, int limit, int lane) {
    for (int i = lane; i < FRAGMENT_TOKENS * D; i += 32)
        if (i / D >= limit) reinterpret_cast<uint16_t*>(values)[index16(D, v_place(D, i / D, i % D))] = 0;
    fence_copies();
    __syncwarp();
}

/// A warp's attention over one (sequence, kv head, tile of columns).
template <class Cfg> struct Pair {
    State<Cfg::D, Cfg::NT> state;
    const uint4* operands;
    float factor;
    int columns;               // of the tile
    int whole_from, whole_to;  // what lies within, all columns see
    bool in_tiles;             // whose unit the output is in

    DEV void reset() { state.reset(), in_tiles = Cfg::SEALS; }
    DEV void enter(const AttendParams& p, const Walk<Cfg>& at) {
        const Scheduled& s = pointer<const Scheduled>(p.sequences)[at.sequence];
        const int64_t index = Operands<Cfg>::index(p, at.sequence, at.head, blockIdx.y);
        operands = pointer<const uint4>(p.operands) + index * Operands<Cfg>::TILE,
        factor = pointer<const float>(p.factors)[index];
        columns = min(s.num_new * p.group - int(blockIdx.y) * 8 * Cfg::NT, 8 * Cfg::NT);
        whole_from = max(s.first_held, s.context_len + s.num_new - p.window);
        whole_to = p.softcap != 0.f ? 0 : min(s.context_len + 1, s.end);
        reset();
    }
    DEV bool is_whole(int first, int tokens) const { return first >= whole_from && first + tokens <= whole_to; }
    DEV Mask mask(const AttendParams& p, const Walk<Cfg>& at, int first, int tokens) const {
        const Scheduled& s = pointer<const Scheduled>(p.sequences)[at.sequence];
        return {first,
                tokens,
                s.context_len,
                s.first_held,
                p.window,
                s.end,
                int(blockIdx.y) * 8 * Cfg::NT,
                p.group,
                p.softcap * LOG2_E};
    }
    template <class To> DEV void change_unit() {
        if (in_tiles) state.template change_unit<typename Cfg::TileCodes, To>();
        else state.template change_unit<typename Cfg::PageCodes, To>();
    }
};

template <class Cfg>
DEV void attend_tile(const AttendParams& p, const Walk<Cfg>& at, Pair<Cfg>& pair, const uint8_t* tile, int lane) {
    using Codes = typename Cfg::TileCodes;
    const auto layout = Cfg::tile(p);
    if (!pair.in_tiles) pair.state.template change_unit<typename Cfg::PageCodes, Codes>(), pair.in_tiles = true;
    const uint32_t header = *reinterpret_cast<const uint32_t*>(tile + layout.header());
    const int frame = header >> 8 & 1, first_row = header >> 16 & 255;  // PLAIN or ROTATED
    KeyFrame<Cfg::D, Cfg::NT> key;
    key.template of_tile<Codes>(layout, tile, pair.operands + frame * Operands<Cfg>::FRAME, pair.factor, lane);
    const int size = Cfg::block_size(p), first = at.first_token(p);
    const Fields fields{tile + layout.k(),
                        tile + layout.v(),
                        tile + layout.k_token_scale(),
                        tile + layout.v_token_scale(),
                        tile + layout.v_token_zero_point(),
                        layout.high_plane(),
                        size < 32};
    Attend<Codes, typename Cfg::Math, Cfg::D, Cfg::NT, Cfg::STEP, true> attend(pair.state, key, fields, lane);
    const bool whole = size >= 32 && pair.is_whole(first, size);  // a step may be of 32 tokens
    Mask mask;
    if (Cfg::BLOCK && whole) {
        attend.template run<(Cfg::BLOCK ? Cfg::BLOCK : 128) / FRAGMENT_TOKENS / Cfg::STEP>();
    } else {
        mask = pair.mask(p, at, first, size);
#pragma unroll 1
        for (int group = 0; group < size / FRAGMENT_TOKENS; group += Cfg::STEP) attend.step(group, whole, mask);
    }
    if (first_row != NO_FIRST_ROW) attend.first_value(layout, tile, first_row, whole, mask);
}

template <class Cfg>
DEV void attend_group(const AttendParams& p, const Walk<Cfg>& at, Pair<Cfg>& pair, const KeyFrame<Cfg::D, Cfg::NT>& key,
                      uint8_t* group, int token, int lane) {
    const auto page = Cfg::page(p);
    const int first = at.first_token(p) + token, tokens = page.tokens();
    const bool whole = tokens == Cfg::Page::MOST_TOKENS && pair.is_whole(first, tokens);
    Mask mask;
    if (!whole) mask = pair.mask(p, at, first, tokens);
    if (Cfg::RAW && at.end - first < tokens) clear_values<Cfg::D>(group + page.v(), at.end - first, lane);
    Fields fields{group + page.k(), group + page.v(), nullptr, nullptr, nullptr, 0, false};
    if constexpr (!Cfg::RAW) {
        fields.k_scale = group + page.k_token_scale(), fields.v_scale = group + page.v_token_scale();
        fields.v_zero = group + page.v_token_zero_point(), fields.narrow = tokens == 16;
    }
    Attend<typename Cfg::PageCodes, typename Cfg::Math, Cfg::D, Cfg::NT, Cfg::PAGE_STEP, !Cfg::RAW> attend(
        pair.state, key, fields, lane);
    attend.step(0, whole, mask);
}

/// What every thread of the kernel does: blocks (x, y) take the units of work x and the columns of tile y. Warps share
/// nothing until the end: each has its own units, ring and state.
template <class Cfg> DEV void decode(const AttendParams& p) {
    constexpr int D = Cfg::D, NT = Cfg::NT;
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Ring<Cfg> ring(shared, warp, lane);
    launch_dependents();
    const Work work = pointer<const Work>(p.work)[blockIdx.x * Cfg::WARPS + warp];
    Feed<Cfg> feed(p, work);
    for (int i = 0; i < Cfg::STAGES; i++) feed.issue(p, ring, i, lane);
    wait_for_previous_grid();  // the first copies are of pages that were written before it

    Walk<Cfg> at(p, work);
    Pair<Cfg> pair;
    int64_t unit = work.first;
    const auto row_of = [&](int64_t partial) { return partial * p.columns + int(blockIdx.y) * 8 * NT; };
    const auto pair_index = [&] { return at.sequence * p.num_kv_heads + at.head; };
    const auto await = [&] { return const_cast<uint8_t*>(ring.await()) + feed.phase(ring.stage); };
    const auto release = [&] {
        __syncwarp();
        feed.issue(p, ring, ring.stage, lane);
        ring.advance();
    };
    pair.reset();
    if (at.left) pair.enter(p, at);

    while (at.left) {
        uint8_t* content = await();
        if (Cfg::SEALS && feed.is_tile(ring.stage)) {
            if constexpr (Cfg::SEALS) attend_tile<Cfg>(p, at, pair, content, lane);
            release();
        } else {
            using PageCodes = typename Cfg::PageCodes;
            if (Cfg::SEALS && pair.in_tiles) {
                pair.state.template change_unit<typename Cfg::TileCodes, PageCodes>(), pair.in_tiles = false;
            }
            KeyFrame<D, NT> key;
            const uint4* operands = pair.operands + (Cfg::SEALS ? PAGE : PLAIN) * Operands<Cfg>::FRAME;
            if constexpr (Cfg::RAW) key.of_raw(operands, pair.factor, lane);
            else key.template of_page<PageCodes, typename Cfg::Page>(content, operands, pair.factor, lane);
            const int groups = at.groups(p), tokens = Cfg::page(p).tokens();
            for (int group = 0;; content = await()) {
                attend_group<Cfg>(p, at, pair, key, content + Cfg::Page::CHANNEL_BYTES, group * tokens, lane);
                release();
                if (++group == groups) break;
            }
        }
        const bool ends_unit = at.ends_unit(p);
        const int index = pair_index();
        if (ends_unit) at.left--;
        const bool is_last = at.left == 0, ends_pair = !is_last && at.next(p);
        const bool at_cut = p.chunk_tokens != 0 && ends_unit;
        if (!is_last && !ends_pair && !at_cut) continue;
        pair.template change_unit<Natural>();
        if (is_last && p.chunk_tokens == 0) break;
        const int64_t partial = p.chunk_tokens ? unit++ : 2 * int64_t(blockIdx.x + index) + 1;
        leave<D, NT>(p, pair.state, row_of(partial), pair.columns, lane);
        if (is_last) break;
        if (ends_pair) pair.enter(p, at);
        else pair.reset();
    }
    if (p.chunk_tokens) return;
    const auto scratch = [&](int w) { return reinterpret_cast<float*>(shared + w * Cfg::STAGES * Cfg::STAGE_BYTES); };
    const int index = work.units ? pair_index() : -1;
    finish<D, NT, Cfg::WARPS>(p, pair.state, index, row_of(2 * int64_t(blockIdx.x + index)),
                              index < 0 ? 0 : pair.columns, scratch, lane);
}

}  // namespace kvarn
