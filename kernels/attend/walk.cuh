// A warp's way through its units of work, and what it copies on it.
#pragma once
#include "ring.cuh"

namespace kvarn {

/// Blocks in the order sequence, kv head, block. A unit of work ends with each block or, where cuts are at fixed
/// positions, with each chunk of blocks.
template <class Cfg> struct Walk {
    int sequence, head, block, left;  // left: units
    int row, first_block, end, end_block;
    DEV Walk(const AttendParams& p, const Work& w) : sequence(w.index), head(w.head), block(w.block), left(w.units) {
        enter(p, w.sequence);
    }
    DEV void enter(const AttendParams& p, const Scheduled& s) {
        const int size = Cfg::block_size(p);
        row = s.row, first_block = s.first_block, end = s.end, end_block = (s.end + size - 1) / size;
    }
    DEV int first_token(const AttendParams& p) const { return block * Cfg::block_size(p); }
    /// Groups of a page that are read.
    DEV int groups(const AttendParams& p) const {
        const int size = Cfg::block_size(p), tokens = Cfg::page(p).tokens();
        return (min(end - block * size, size) + tokens - 1) / tokens;
    }
    DEV bool ends_unit(const AttendParams& p) const {
        if (p.chunk_tokens == 0) return true;
        return block + 1 == end_block || ((block + 1) * Cfg::block_size(p) & (p.chunk_tokens - 1)) == 0;
    }
    /// Is the next block another sequence's or head's? Not to be called with no unit left.
    DEV bool next(const AttendParams& p) {
        if (++block < end_block) return false;
        if (++head == p.num_kv_heads) {
            head = 0;
            do {
                ++sequence;
                enter(p, pointer<const Scheduled>(p.sequences)[sequence]);
            } while (first_block >= end_block);
        }
        block = first_block;
        return true;
    }
};

/// Fills the ring of one warp, one copy a stage: a tile, or a group of a page.
template <class Cfg> struct Feed {
    Walk<Cfg> at;
    int group = 0, place;
    uint32_t phases = 0,
             tiles = 0;  // 4 bits a stage: by how many 16 bytes its content is shifted; a bit a stage: is it a tile?

    DEV Feed(const AttendParams& p, const Work& w) : at(p, w), place(w.place) {}
    DEV int phase(int stage) const { return (phases >> 4 * stage & 15) * 16; }
    DEV bool is_tile(int stage) const { return Cfg::SEALS && (tiles >> stage & 1); }

    DEV void issue(const AttendParams& p, Ring<Cfg>& ring, int stage, int lane) {
        if (at.left == 0) return ring.copy(stage, 0, nullptr, 0, lane);
        const uint8_t* from;
        int bytes, offset = 0;
        bool last = true;
        if (Cfg::SEALS && place < 0) {
            from = record_at(p.tiles, ~place, at.head), bytes = Cfg::tile(p).bytes(), tiles |= 1u << stage;
        } else {  // the first group of a page comes with the page's channel parameters
            const auto page = Cfg::page(p);
            from = record_at(p.pages, place, at.head), bytes = page.group_bytes(), tiles &= ~(1u << stage);
            if (group == 0) bytes += Cfg::Page::CHANNEL_BYTES;
            else offset = Cfg::Page::CHANNEL_BYTES, from += offset + group * page.group_bytes();
            last = ++group == at.groups(p);
        }
        const uint32_t shift = uint32_t(uintptr_t(from)) & (Cfg::PHASES - 1);
        phases = (phases & ~(15u << 4 * stage)) | (shift / 16) << 4 * stage;
        ring.copy(stage, offset + shift, from, bytes, lane);
        if (!last) return;
        group = 0;
        if (at.ends_unit(p) && --at.left == 0) return;
        at.next(p);
        place = place_at(p.plan, at.row, at.block);  // looked up a stage before it is needed
    }
};

}  // namespace kvarn
