// What moves whole pages, and keeps the table of places of a device.
#include "layout.cuh"

using namespace kvarn;

/// Copies pages in order; grid (heads, layers), 256 threads.
extern "C" __global__ void __launch_bounds__(256) copy_pages(const __grid_constant__ CopyParams p) {
    const Records pages = reinterpret_cast<const LayerRecords*>(p.layers)[blockIdx.y].pages;
    const uint64_t base = pages.base + blockIdx.x * pages.head_stride;
    for (int copy = 0; copy < p.num_copies; copy++) {
        const uint4* from = reinterpret_cast<const uint4*>(base + uint64_t(p.copies[2 * copy]) * pages.stride);
        uint4* to = reinterpret_cast<uint4*>(base + uint64_t(p.copies[2 * copy + 1]) * pages.stride);
        for (int i = threadIdx.x; i < p.record_bytes / 16; i += blockDim.x) to[i] = from[i];
        __syncthreads();  // the next copy may be of this one
    }
}

/// Enters a plan's changes into the table of places; one block of 256 threads. Each row has its thread, so that of two
/// changes of an entry the later one stays.
extern "C" __global__ void __launch_bounds__(256) change_places(const __grid_constant__ PlanPointers plan) {
    const int32_t* changes = reinterpret_cast<const int32_t*>(plan.words) + plan.starts[CHANGES];
    const int num = (plan.starts[CHANGES + 1] - plan.starts[CHANGES]) / CHANGES_WIDTH;
    int32_t* places = reinterpret_cast<int32_t*>(plan.places);
    for (int i = 0; i < num; i++) {
        const int32_t* change = changes + i * CHANGES_WIDTH;
        if (change[0] % 256 == threadIdx.x) places[int64_t(change[0]) * plan.places_stride + change[1]] = change[2];
    }
}
