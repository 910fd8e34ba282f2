// Hopper instructions of the scans, one function each: barriers, bulk copies, GEMMs of a warpgroup.
// Names and constraints: PTX ISA 9.0, "Asynchronous warpgroup level matrix instructions" and "cp.async.bulk.tensor".
#ifndef HYBRID_KERNELS_PTX
#define HYBRID_KERNELS_PTX
#include <cuda.h>

#include "mma.cuh"

namespace ptx {

// Barriers in shared memory ------------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint64_t *bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(bar)), "r"(count));
}

__device__ __forceinline__ void barriers_visible() {  // to the copy engine
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void expect_bytes(uint64_t *bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(bar)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void arrive(uint64_t *bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(bar)) : "memory");
}

__device__ __forceinline__ void wait(uint64_t *bar, uint32_t parity) {
    uint32_t done = 0;
    for (int tries = 0; !done; ++tries) {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(address(bar)), "r"(parity) : "memory");
#ifdef WATCHDOG  // for development: an error instead of a hang
        if (tries > 1 << 22) __trap();
#endif
    }
}

__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A warpgroup's registers per thread: the block has as many in all as at its launch. One takes what others have left.
template <int COUNT>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void leave_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Bulk copies --------------------------------------------------------------------------------------------------------

// A box of `map` at column c0 and row c1, or of one in blocks of columns (c0 in block c2), to `to`.
__device__ __forceinline__ void fetch(const CUtensorMap *map, void *to, uint64_t *bar, int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
        "r"(address(to)), "l"(map), "r"(address(bar)), "r"(c0), "r"(c1) : "memory");
}

__device__ __forceinline__ void fetch(const CUtensorMap *map, void *to, uint64_t *bar, int c0, int c1, int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
        "r"(address(to)), "l"(map), "r"(address(bar)), "r"(c0), "r"(c1), "r"(c2) : "memory");
}

__device__ __forceinline__ void put(const CUtensorMap *map, const void *from, int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\ncp.async.bulk.commit_group;" ::
        "l"(map), "r"(address(from)), "r"(c0), "r"(c1) : "memory");
}

__device__ __forceinline__ void put(const CUtensorMap *map, const void *from, int c0, int c1, int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];\ncp.async.bulk.commit_group;" ::
        "l"(map), "r"(address(from)), "r"(c0), "r"(c1), "r"(c2) : "memory");
}

__device__ __forceinline__ void puts_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

__device__ __forceinline__ void puts_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

__device__ __forceinline__ void shared_visible_to_copies() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// 8 x 8 matrices between shared memory and fragments, optionally transposed ---------------------------

__device__ __forceinline__ void store(uint32_t at, const uint32_t *r) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::
                 "r"(at), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

__device__ __forceinline__ void load_transposed(uint32_t at, uint32_t *r) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

__device__ __forceinline__ void store_transposed(uint32_t at, const uint32_t *r) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::
                 "r"(at), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

// GEMMs of a warpgroup: acc [64, N] (+)= a [64, 16] (registers) b [16, N] (shared memory) ------------------

enum Swizzle : uint64_t { SWIZZLE_128 = 1, SWIZZLE_64 = 2 };

// `leading` and `stride` in bytes: between the blocks of a swizzle's width along N (only where b is transposed), and
// between groups of eight rows.
__device__ __forceinline__ uint64_t descriptor(const void *tile, int leading, int stride, Swizzle swizzle) {
    return (uint64_t)(address(tile) & 0x3FFFF) >> 4 | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32 |
           swizzle << 62;
}

#define R8(d, i)                                                                                                \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define R32(d) R8(d, 0), R8(d, 8), R8(d, 16), R8(d, 24)
#define R48(d) R32(d), R8(d, 32), R8(d, 40)
#define R64(d) R48(d), R8(d, 48), R8(d, 56)
#define A4(a) "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
#define LIST32                                                                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "  \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LIST48 LIST32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define LIST64 LIST48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

__device__ __forceinline__ void product(float (&acc)[32], const uint32_t *a, uint64_t b, bool add) {  // b K-major, bf16
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" LIST32
                 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0; }" : R32(acc) : A4(a), "l"(b), "r"((int)add));
}

__device__ __forceinline__ void product_half(float (&acc)[32], const uint32_t *a, uint64_t b, bool add) {  // fp16
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" LIST32
                 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0; }" : R32(acc) : A4(a), "l"(b), "r"((int)add));
}

// With b stored by rows of the summed dimension ("transposed"): bf16, fp16, and bf16 onto what acc holds
__device__ __forceinline__ void product_rows(float (&acc)[32], const uint32_t *a, uint64_t b, bool add = true) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" LIST32
                 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1; }" : R32(acc) : A4(a), "l"(b), "r"((int)add));
}

__device__ __forceinline__ void product_half_rows(float (&acc)[32], const uint32_t *a, uint64_t b, bool add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" LIST32
                 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1; }" : R32(acc) : A4(a), "l"(b), "r"((int)add));
}

__device__ __forceinline__ void product_rows(float (&acc)[48], const uint32_t *a, uint64_t b) {
    asm volatile("{ .reg .pred p; setp.eq.u32 p, 1, 1; wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {" LIST48
                 "}, {%48, %49, %50, %51}, %52, p, 1, 1, 1; }"
                 : R48(acc) : A4(a), "l"(b));
}

__device__ __forceinline__ void product_rows(float (&acc)[64], const uint32_t *a, uint64_t b) {
    asm volatile("{ .reg .pred p; setp.eq.u32 p, 1, 1; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" LIST64
                 "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1; }"
                 : R64(acc) : A4(a), "l"(b));
}

// With a [64, 16] in shared memory as well (TRANSPOSED: stored by columns) and b by rows, bf16
#define SHARED_PRODUCT(N, REGISTERS, LIST, A, B, P, T)                                                           \
    template <int TRANSPOSED>                                                                                    \
    __device__ __forceinline__ void shared_product(float (&acc)[N / 2], uint64_t a, uint64_t b, bool add) {      \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, " P ", 0; wgmma.mma_async.sync.aligned.m64n" #N             \
                     "k16.f32.bf16.bf16 {" LIST "}, " A ", " B ", p, 1, 1, " T ", 1; }"                          \
                     : REGISTERS(acc) : "l"(a), "l"(b), "r"((int)add), "n"(TRANSPOSED));                         \
    }
SHARED_PRODUCT(64, R32, LIST32, "%32", "%33", "%34", "%35")
SHARED_PRODUCT(96, R48, LIST48, "%48", "%49", "%50", "%51")
SHARED_PRODUCT(128, R64, LIST64, "%64", "%65", "%66", "%67")

__device__ __forceinline__ void products_follow() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most LEFT groups are in flight. `acc` is an operand so that no read of it moves before the wait.
template <int LEFT>
__device__ __forceinline__ void landed(float (&acc)[32]) {
    asm volatile("wgmma.wait_group.sync.aligned %32;" : R32(acc) : "n"(LEFT) : "memory");
}

template <int LEFT>
__device__ __forceinline__ void landed(float (&acc)[48]) {
    asm volatile("wgmma.wait_group.sync.aligned %48;" : R48(acc) : "n"(LEFT) : "memory");
}

template <int LEFT>
__device__ __forceinline__ void landed(float (&acc)[64]) {
    asm volatile("wgmma.wait_group.sync.aligned %64;" : R64(acc) : "n"(LEFT) : "memory");
}

template <int LEFT>
__device__ __forceinline__ void landed() {  // of GEMMs whose accumulators are not read next
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Arithmetic, volatile so that it keeps its place among the GEMMs ----------------------------------------

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t r;
    asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

__device__ __forceinline__ uint32_t pack_half(float low, float high) {
    uint32_t r;
    asm volatile("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

__device__ __forceinline__ float2 unpack_bf16(uint32_t x) {
    float2 r;
    asm volatile("shl.b32 %0, %2, 16;\nand.b32 %1, %2, 0xFFFF0000;" : "=f"(r.x), "=f"(r.y) : "r"(x));
    return r;
}

__device__ __forceinline__ float times(float x, float y) {
    float r;
    asm volatile("mul.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(y));
    return r;
}

}  // namespace ptx
#endif
