// One-instruction wrappers.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../order.cuh"

#ifndef DEV
#define DEV __device__ __forceinline__
#endif
// Bulk copies, transaction barriers and programmatic launches; without them, copies are cp.async.
#define KVARN_SM90 (__CUDA_ARCH__ >= 900)

namespace kvarn {

constexpr unsigned ALL_LANES = 0xffffffffu;

// ---------------------------------------------------------------- copies to shared memory
DEV uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
DEV void copy_16(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
DEV void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most PENDING groups of copies are under way.
template <int PENDING> DEV void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

#if KVARN_SM90
DEV void barrier_init(uint32_t barrier) { asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier)); }
DEV void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEV void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEV void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\nWAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra WAIT;\n}" ::
            "r"(barrier),
        "r"(parity)
        : "memory");
}
DEV uint64_t evict_first() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
DEV uint64_t evict_normal() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
DEV void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(to),
        "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}
#endif

/// Orders this thread's accesses to shared memory before later ones of the copy engine.
DEV void fence_copies() {
#if KVARN_SM90
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
/// The next kernel of the stream may start, if it is launched so that it waits itself.
DEV void launch_dependents() {
#if KVARN_SM90
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
/// Waits until all kernels before this one have ended and their writes are visible.
DEV void wait_for_previous_grid() {
#if KVARN_SM90
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---------------------------------------------------------------- matrix units
struct HalfMath {
    using T = __half;
    static DEV void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
    static DEV uint32_t pack(float low, float high) {
        uint32_t r;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
        return r;
    }
    static DEV float2 widen(uint32_t pair) { return __half22float2(*reinterpret_cast<const __half2*>(&pair)); }
    static DEV uint32_t max2(uint32_t a, uint32_t b) {
        uint32_t r;
        asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
        return r;
    }
    /// Is a half of any lane's pair beyond 2048, or NaN?
    static DEV bool any_beyond(uint32_t pair) {
        int r;
        asm volatile(
            "{\n.reg .pred p, q;\nsetp.gtu.f16x2 p|q, %1, %2;\nor.pred p, p, q;\n"
            "vote.sync.any.pred p, p, 0xffffffff;\nselp.s32 %0, 1, 0, p;\n}"
            : "=r"(r)
            : "r"(pair), "r"(0x68006800u));
        return r;
    }
};
struct Bf16Math {
    using T = __nv_bfloat16;
    static DEV void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
    static DEV uint32_t pack(float low, float high) {
        uint32_t r;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
        return r;
    }
    static DEV float2 widen(uint32_t pair) {
        return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
    }
    static DEV uint32_t max2(uint32_t a, uint32_t b) {
        uint32_t r;
        asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
        return r;
    }
    /// Is a half of any lane's pair beyond 2048, or NaN? Halves that are not negative, as here, are ordered as
    /// integers.
    static DEV bool any_beyond(uint32_t pair) {
        return __any_sync(ALL_LANES, (pair & 0xffffu) > 0x4500u || pair > 0x4500ffffu);
    }
};
/// S^T tile (rows tokens, columns queries) to an operand of P^T.
DEV uint32_t transpose(uint32_t x) {
    uint32_t r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
    return r;
}

// ---------------------------------------------------------------- arithmetic
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

DEV float exp2_fast(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
DEV float log2_fast(float x) {
    float r;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
DEV float reciprocal_fast(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
DEV uint32_t half_mul(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
DEV float2 widen(uint32_t pair) { return HalfMath::widen(pair); }
DEV float widen(uint16_t x) { return __half2float(__ushort_as_half(x)); }
/// |n| < 31; folds to a constant wherever n does.
__host__ __device__ constexpr float pow2(int n) { return n < 0 ? 1.f / float(1 << -n) : float(1 << n); }

}  // namespace kvarn
