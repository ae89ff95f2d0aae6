// Where a tile comes from: rows of the step, or an INT8 page. Of V, a thread gets the row of its token (K:
// seal_fill.cuh).
#pragma once
#include "encode/seal_common.cuh"

namespace kvarn {

/// A tile of a step: which of the plan's seals, of which head and layer. `seal` is -1 for none.
struct Unit {
    int seal, head_layer;

    __device__ __forceinline__ int head() const { return head_layer & 0xffff; }
    __device__ __forceinline__ int layer() const { return head_layer >> 16; }
    __device__ __forceinline__ int sequence(const Step& step) const { return step.word(SEALS, seal * SEALS_WIDTH); }
    __device__ __forceinline__ int block(const Step& step) const { return step.word(SEALS, seal * SEALS_WIDTH + 1); }
    __device__ __forceinline__ int page(const Step& step) const { return step.word(SEALS, seal * SEALS_WIDTH + 2); }
    __device__ __forceinline__ int first_row(const Step& step) const {
        return step.word(SEALS, seal * SEALS_WIDTH + 3);
    }
};

/// Units from number `at` on, in steps of `by`, whose tokens are in a page, or among the step's rows. They count seals
/// first, then heads, then layers.
struct Units {
    int at, by;

    __device__ __forceinline__ Unit next(const Step& step, bool from_page) {
        const int seals = step.num_words(SEALS) / SEALS_WIDTH, total = seals * step.p.num_kv_heads * step.p.num_layers;
        for (; at < total; at += by) {
            const int rest = at / seals;
            const Unit unit{at % seals, rest % step.p.num_kv_heads | rest / step.p.num_kv_heads << 16};
            if (unit.sequence(step) < 0 || (unit.page(step) >= 0) != from_page) continue;
            at += by;
            return unit;
        }
        return {-1, 0};
    }
};

/// What the plan says of a tile, looked up by one thread long before it is needed: a lookup is a chain of loads.
struct Described {
    uint8_t* record;
    const uint8_t* page;      // null where the tokens are among the step's rows
    const uint8_t* feedback;  // of both frames
    HealthSlot* health;
    int first, head;  // the first token among the step's

    __device__ __forceinline__ void describe(const Step& step, const Unit& unit) {
        describe_tokens(step, unit);
        describe_rest(step, unit);
    }
    __device__ __forceinline__ void describe_tokens(const Step& step, const Unit& unit) {
        const int sequence = unit.sequence(step), page_id = unit.page(step);
        head = unit.head(),
        first = step.first_token(sequence) + unit.block(step) * TILE_TOKENS - step.context_len(sequence);
        page = page_id < 0 ? nullptr : record_of(layer_records(step.p, unit.layer()).pages, page_id, head);
    }
    __device__ __forceinline__ void describe_rest(const Step& step, const Unit& unit) {
        const LayerModel model = layer_model(step.p, unit.layer());
        record = record_of(layer_records(step.p, unit.layer()).tiles,
                           ~step.place(unit.sequence(step), unit.block(step)), head);
        feedback = at_address<const uint8_t>(model.feedback) + head * model.feedback_stride;
        health = health_of(step.p, unit.layer(), unit.seal);
    }
};

/// Bytes of a row of In in shared memory: a quarter warp of rows hits distinct banks.
template <int D, class In> constexpr int ROW_PITCH = int(sizeof(In)) * D + 16;

/// Rows of the step.
template <class In> struct RowSource {
    using Input = In;
    static constexpr bool FROM_PAGE = false, V_IS_ROTATED = false;
    const Step& step;
    int first, head;  // the tile's first token among the step's

    __device__ __forceinline__ RowSource(const Step& step, const Described& tile)
        : step(step), first(tile.first), head(tile.head) {}
    __device__ __forceinline__ const In* row(const Tensor& tensor, int token) const {
        return token_of<In>(step, tensor, first + token, head);
    }
    /// Are rows a stride apart, on multiples of 16 bytes?
    __device__ __forceinline__ bool is_plain() const { return step.p.is_dense && step.p.is_aligned; }

    template <int D> __device__ __forceinline__ void stage_v(uint8_t* stage) const {
        constexpr int CHUNKS = D * int(sizeof(In)) / 16, STEP = SEAL_THREADS / CHUNKS, PER_CHUNK = 16 / int(sizeof(In));
        const int token = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        uint8_t* to = stage + token * ROW_PITCH<D, In> + chunk * 16;
        if (is_plain()) {
            const int64_t stride = step.p.v.strides[2];
            const In* from = row(step.p.v, token) + chunk * PER_CHUNK;
#pragma unroll
            for (int i = 0; i < TILE_TOKENS / STEP; i++, from += STEP * stride)
                copy16(to + i * STEP * ROW_PITCH<D, In>, from);
            return;
        }
#pragma unroll 1
        for (int i = 0; i < TILE_TOKENS / STEP; i++) {
            const In* from = row(step.p.v, token + i * STEP) + chunk * PER_CHUNK;
            for (int j = 0; j < PER_CHUNK; j++) reinterpret_cast<In*>(to + i * STEP * ROW_PITCH<D, In>)[j] = from[j];
        }
    }
    template <int D> __device__ __forceinline__ void read_v(const uint8_t* stage, float (&x)[D]) const {
        const uint8_t* from = stage + threadIdx.x * ROW_PITCH<D, In>;
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            Eight<In> eight;
            uint4* to = reinterpret_cast<uint4*>(&eight);
#pragma unroll
            for (int j = 0; j < int(sizeof(In)) / 2; j++)
                to[j] = *reinterpret_cast<const uint4*>(from + 8 * sizeof(In) * i + 16 * j);
#pragma unroll
            for (int j = 0; j < 4; j++) x[8 * i + 2 * j] = eight.pair(j).x, x[8 * i + 2 * j + 1] = eight.pair(j).y;
        }
    }
    /// Makes the thread's staged row finite; was it not? Seldom called.
    template <int D> __device__ __noinline__ static bool repair(uint8_t* stage) {
        uint32_t odd = 0;
        for (int i = 0; i < D / 8; i++)
            odd |= reinterpret_cast<Eight<In>*>(stage + threadIdx.x * ROW_PITCH<D, In>)[i].repair();
        return odd;
    }
};

/// Sixteen-byte chunks of codes are turned so that the chunks of a fragment's eight rows lie in distinct banks.
__device__ __forceinline__ int turned(int chunk) { return chunk ^ (chunk >> 3 & 3); }

/// An INT8 page of a format that seals: V is rotated already, and all is finite.
struct PageSource {
    static constexpr bool FROM_PAGE = true, V_IS_ROTATED = true;
    const uint8_t* page;

    __device__ __forceinline__ PageSource(const Step&, const Described& tile) : page(tile.page) {}
    /// Codes of all groups, in their order but for `turned`.
    template <int D> __device__ __forceinline__ void stage_v(uint8_t* stage) const {
        constexpr int CHUNKS = GROUP * D / 16;
#pragma unroll
        for (int i = 0; i < TILE_TOKENS * D / 16; i += SEAL_THREADS)
            copy16(stage + 16 * (i + turned(threadIdx.x)), page + Int8Page<D>::CHANNEL_BYTES +
                                                               i / CHUNKS * PAGE<D>.group_bytes() + PAGE<D>.v() +
                                                               (i % CHUNKS + threadIdx.x) * 16);
    }
    template <int D> __device__ static bool repair(uint8_t*) { return false; }
    template <int D> __device__ __forceinline__ float token_field(int field) const {
        const int t = threadIdx.x;
        const uint8_t* group = page + Int8Page<D>::CHANNEL_BYTES + t / GROUP * PAGE<D>.group_bytes();
        return __half2float(reinterpret_cast<const half*>(group + field)[token_index(GROUP, t % GROUP)]);
    }
    template <int D> __device__ __forceinline__ void read_v(const uint8_t* stage, float (&x)[D]) const {
        const float scale = token_field<D>(PAGE<D>.v_token_scale()),
                    zero = token_field<D>(PAGE<D>.v_token_zero_point());
        const int t = threadIdx.x;
        const uint32_t byte = t / 8 % 2 * 2 + t % 2;
#pragma unroll
        for (int i = 0; i < D / 4; i++) {  // four channels are the words of a chunk
            const int g = i / (D / 32), pair = i % (D / 32);
            const uint4 v = *reinterpret_cast<const uint4*>(
                stage + 16 * ((t / FRAGMENT * (D / 32) + pair) * 32 + turned(4 * g + t % 8 / 2)));
            const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 4; j++) x[4 * i + j] = fmaf(byte_of(words[j], byte), scale, zero);
        }
    }
};

}  // namespace kvarn
