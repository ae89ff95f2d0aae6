// A warp's ring of stages in shared memory, filled by bulk copies where there are such, by 16-byte copies elsewhere.
#pragma once
#include "config.cuh"

namespace kvarn {

template <class Cfg> struct Ring {
    uint8_t* base;
    uint32_t address;
    int stage = 0;  // whose content is due next
#if KVARN_SM90
    uint32_t barriers, parity = 0;
    const uint64_t policy = gridDim.y > 1 ? evict_normal() : evict_first();  // others read it too, or nobody
#endif

    DEV Ring(uint8_t* shared, int warp, int lane)
        : base(shared + warp * Cfg::STAGES * Cfg::STAGE_BYTES), address(shared_address(base)) {
#if KVARN_SM90
        barriers = shared_address(shared + Cfg::RING_BYTES) + warp * Cfg::STAGES * 8;
        if (lane == 0) {
            for (int i = 0; i < Cfg::STAGES; i++) barrier_init(barriers + 8 * i);
            barrier_init_done();
        }
        __syncwarp();
#endif
    }

    /// Begins to copy `bytes`, a multiple of 16, to `offset` of a stage. `bytes` 0: there is nothing left to copy.
    DEV void copy(int to, int offset, const uint8_t* from, int bytes, int lane) {
        const uint32_t at = address + to * Cfg::STAGE_BYTES + offset;
#if KVARN_SM90
        if (lane == 0 && bytes)
            barrier_expect(barriers + 8 * to, bytes), bulk_load(at, from, bytes, barriers + 8 * to, policy);
#else
        for (int i = 16 * lane; i < bytes; i += 16 * 32) copy_16(at + i, from + i);
        close_copies();
#endif
    }

    /// Waits for the content of the stage that is due.
    DEV const uint8_t* await() const {
#if KVARN_SM90
        barrier_wait(barriers + 8 * stage, parity);
#else
        wait_copies<Cfg::STAGES - 1>();
        __syncwarp();
#endif
        return base + stage * Cfg::STAGE_BYTES;
    }

    DEV void advance() {
        if (++stage < Cfg::STAGES) return;
        stage = 0;
#if KVARN_SM90
        parity ^= 1;
#endif
    }
};

}  // namespace kvarn
