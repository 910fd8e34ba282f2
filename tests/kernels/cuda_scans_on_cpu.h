// The instructions of backends/cuda/ptx.cuh as functions of the CPU, for warpgroups: barriers, bulk copies with swizzles, and GEMMs
// whose operands are read through descriptors, by the layouts of PTX ISA 9.0. Include after cuda_on_cpu.h, before the kernel, and call
// `cpu::restart` before each block.
//
// Shared memory is one array. A shared address is an offset in it, so that swizzles and descriptors are those of the GPU. Whatever is
// asynchronous happens late, so that a missing wait gives wrong results: GEMMs and copies to global memory when they are waited for,
// copies to shared memory some time after they are issued, in any order.
#pragma once
#define HYBRID_KERNELS_PTX
#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>

#define __grid_constant__

using std::max;

struct __nv_bfloat16 {
    uint16_t bits;
};

inline int __float_as_int(float x) {
    int bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float __int_as_float(int bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// A matrix of 16-bit elements in global memory, copied in boxes of 64 rows: 64 columns wide, or (`blocked`) all of a block's
// KEY_DIM columns, in parts of 32
struct CUtensorMap {
    char *base;
    long rows, cols;
    bool blocked;
};

namespace cpu {

constexpr int MEMORY_BYTES = 227 * 1024;
alignas(1024) inline char memory[MEMORY_BYTES];

struct TransactionBarrier {
    int count, pending, phase;
    long bytes;
    void complete() {
        if (pending == 0 && bytes == 0) phase ^= 1, pending = count;
    }
};

using Action = std::function<void()>;
struct Fetch {
    int rounds;  // until it lands
    Action land;
};
struct Issued {
    std::vector<Action> products, puts;  // products: not yet committed
    std::vector<std::vector<Action>> groups;
};

inline std::map<uint64_t *, TransactionBarrier> barriers;
inline std::map<int, Barrier> named;
inline std::vector<Fetch> fetches;
inline std::map<int, Issued> issued;  // by thread

inline void land_fetches() {
    for (auto &fetch : fetches)
        if (--fetch.rounds == 0) fetch.land();
    auto landed = [](const Fetch &fetch) { return fetch.rounds <= 0; };
    fetches.erase(std::remove_if(fetches.begin(), fetches.end(), landed), fetches.end());
}

inline void restart() {
    barriers.clear(), named.clear(), fetches.clear(), issued.clear();
    each_round = land_fetches;
    std::memset(memory, 0x7F, sizeof(memory));  // NaN in bf16 and fp16
}

inline void perform(std::vector<Action> &actions) {
    for (const Action &act : actions) act();
    actions.clear();
}

inline void check(bool condition, const char *what) {
    if (condition) return;
    std::fprintf(stderr, "%s\n", what);
    std::abort();
}

// Offset in shared memory, with the 16-byte chunk exchanged as the swizzle says
inline uint32_t swizzled(uint32_t offset, int width) {
    return width == 128 ? offset ^ ((offset >> 7 & 7) << 4) : offset ^ ((offset >> 7 & 3) << 4);
}

// Calls use(shared address of 16 bytes, global address or null) for each chunk of a box
template <class Use>
void each_chunk(const CUtensorMap &map, uint32_t at, long col, long row, int block, Use use) {
    const int width = map.blocked ? 64 : 128, parts = map.blocked ? KEY_DIM / 32 : 1;
    for (int part = 0; part < parts; ++part)
        for (int r = 0; r < 64; ++r)
            for (int chunk = 0; chunk < width / 16; ++chunk) {
                const long c = col + (block + part) * 32 * map.blocked + 8 * chunk;
                const bool inside = row + r >= 0 && row + r < map.rows && c < map.cols;
                use(memory + swizzled(at + part * 64 * 64 + r * width + chunk * 16, width),
                    inside ? map.base + ((row + r) * map.cols + c) * 2 : nullptr);
            }
}

inline float from_half(uint32_t bits) {
    const uint16_t low = bits;
    _Float16 x;
    std::memcpy(&x, &low, 2);
    return x;
}

// Element (k, n) of a right operand; `by_rows`: k indexes rows of shared memory
inline uint16_t operand(uint64_t descriptor, int k, int n, bool by_rows) {
    const uint32_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4;
    const uint32_t stride = (descriptor >> 32 & 0x3FFF) << 4;
    const int width = descriptor >> 62 == 1 ? 128 : 64, across = by_rows ? n : k, down = by_rows ? k : n;
    const uint32_t offset = start + across * 2 / width * (by_rows ? leading : 0) + down / 8 * stride + down % 8 * width +
                            across * 2 % width;
    uint16_t bits;
    std::memcpy(&bits, memory + swizzled(offset, width), 2);
    return bits;
}

using Row = std::array<float, 16>;

// acc (+)= the rows of this thread times b, when it is waited for. `rows`: returns the thread's two rows of the left operand.
template <int N, class Rows>
void gemm(float (&acc)[N], Rows rows, uint64_t b, bool add, bool by_rows, bool half) {
    const int lane = current % 32;
    issued[current].products.push_back([=, to = acc] {
        const std::array<Row, 2> left = rows();
        for (int i = 0; i < N; ++i) {
            double sum = 0;
            for (int k = 0; k < 16; ++k) {
                const uint16_t bits = operand(b, k, i / 4 * 8 + lane % 4 * 2 + i % 2, by_rows);
                sum += (double)left[i / 2 % 2][k] * (half ? from_half(bits) : from_bf16(bits));
            }
            to[i] = (add ? to[i] : 0.0f) + (float)sum;
        }
    });
}

// The left operand in registers
template <int N>
void gemm(float (&acc)[N], const uint32_t *a, uint64_t b, bool add, bool by_rows, bool half) {
    struct Fragment {
        uint32_t a[4];
    };
    const int lane = current % 32;
    const auto all = exchange(Fragment{{a[0], a[1], a[2], a[3]}});
    std::array<Row, 2> left;
    for (int row = 0; row < 2; ++row)
        for (int k = 0; k < 16; ++k) {
            const uint32_t pair = all[lane / 4 * 4 + k % 8 / 2].a[row + 2 * (k / 8)];
            const uint32_t bits = k % 2 ? pair >> 16 : pair & 0xFFFF;
            left[row][k] = half ? from_half(bits) : from_bf16(bits);
        }
    gemm(acc, [left] { return left; }, b, add, by_rows, half);
}

}  // namespace cpu

inline float __shfl_sync(unsigned, float x, int lane) { return of_lane(x, lane); }
inline float __shfl_xor_sync(unsigned, float x, int mask) { return of_lane(x, cpu::current % 32 ^ mask); }
inline int __shfl_sync(unsigned, int x, int lane) { return cpu::exchange(x)[lane]; }
inline void __trap() { cpu::check(false, "trap"); }

namespace ptx {

inline uint32_t address(const void *shared) { return (uint32_t)((const char *)shared - cpu::memory); }

inline void barrier_init(uint64_t *bar, int count) { cpu::barriers[bar] = {count, count, 0, 0}; }
inline void barriers_visible() {}
inline void arrive(uint64_t *bar) {
    auto &barrier = cpu::barriers.at(bar);
    cpu::check(--barrier.pending >= 0, "more arrivals at a barrier than it counts");
    barrier.complete();
}
inline void expect_bytes(uint64_t *bar, int bytes) {
    cpu::barriers.at(bar).bytes += bytes;
    arrive(bar);
}
inline void wait(uint64_t *bar, uint32_t parity) {
    while (cpu::barriers.at(bar).phase == (int)parity) cpu::yield();
}
inline void named_barrier(int id, int count) { cpu::wait(cpu::named[id], count); }

inline void fetch(const CUtensorMap *map, void *to, uint64_t *bar, int c0, int c1, int c2 = 0) {
    cpu::fetches.push_back({1 + (int)cpu::draw(cpu::draw(8) ? 16 : 200), [=, map = *map] {
        auto &barrier = cpu::barriers.at(bar);
        cpu::each_chunk(map, address(to), c0, c1, c2, [&](char *shared, const char *global) {
            cpu::Copy{shared, global, global != nullptr}.land();
            barrier.bytes -= 16;
        });
        barrier.complete();
    }});
}
inline void put(const CUtensorMap *map, const void *from, int c0, int c1, int c2 = 0) {
    cpu::issued[cpu::current].puts.push_back([=, map = *map] {
        cpu::each_chunk(map, address(from), c0, c1, c2, [&](const char *shared, char *global) {
            if (global) std::memcpy(global, shared, 16);
        });
    });
}
inline void puts_read() { cpu::perform(cpu::issued[cpu::current].puts); }
inline void puts_done() { puts_read(); }
inline void shared_visible_to_copies() {}

inline void store(uint32_t at, const uint32_t *r) {
    const auto rows = cpu::exchange(at);
    const int lane = cpu::current % 32;
    for (int m = 0; m < 4; ++m) std::memcpy(cpu::memory + rows[8 * m + lane / 4] + 4 * (lane % 4), r + m, 4);
    __syncwarp();
}
inline void load_transposed(uint32_t at, uint32_t *r) {
    const auto rows = cpu::exchange(at);
    const int lane = cpu::current % 32;
    for (int m = 0; m < 4; ++m)
        for (int half = 0; half < 2; ++half)
            std::memcpy((char *)(r + m) + 2 * half, cpu::memory + rows[8 * m + lane % 4 * 2 + half] + lane / 4 * 2, 2);
}
inline void store_transposed(uint32_t at, const uint32_t *r) {
    const auto rows = cpu::exchange(at);
    const int lane = cpu::current % 32;
    for (int m = 0; m < 4; ++m)
        for (int half = 0; half < 2; ++half)
            std::memcpy(cpu::memory + rows[8 * m + lane % 4 * 2 + half] + lane / 4 * 2, (const char *)(r + m) + 2 * half, 2);
    __syncwarp();
}

enum Swizzle : uint64_t { SWIZZLE_128 = 1, SWIZZLE_64 = 2 };

inline uint64_t descriptor(const void *tile, int leading, int stride, Swizzle swizzle) {
    return (uint64_t)(address(tile) & 0x3FFFF) >> 4 | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32 |
           (uint64_t)swizzle << 62;
}

inline void product(float (&acc)[32], const uint32_t *a, uint64_t b, bool add) { cpu::gemm(acc, a, b, add, false, false); }
inline void product_half(float (&acc)[32], const uint32_t *a, uint64_t b, bool add) { cpu::gemm(acc, a, b, add, false, true); }
inline void product_half_rows(float (&acc)[32], const uint32_t *a, uint64_t b, bool add) {
    cpu::gemm(acc, a, b, add, true, true);
}
template <int N>
void product_rows(float (&acc)[N], const uint32_t *a, uint64_t b, bool add = true) {
    cpu::gemm(acc, a, b, add, true, false);
}
template <int TRANSPOSED, int N>
void shared_product(float (&acc)[N], uint64_t a, uint64_t b, bool add) {
    const int first = cpu::current / 32 % 4 * 16 + cpu::current % 32 / 4;
    auto rows = [=] {
        std::array<cpu::Row, 2> left;
        for (int row = 0; row < 2; ++row)
            for (int k = 0; k < 16; ++k) left[row][k] = cpu::from_bf16(cpu::operand(a, k, first + 8 * row, TRANSPOSED));
        return left;
    };
    cpu::gemm(acc, rows, b, add, true, false);
}
inline void products_follow() {}
inline void commit() {
    auto &issued = cpu::issued[cpu::current];
    issued.groups.push_back(std::move(issued.products));
    issued.products.clear();
}
template <int LEFT>
void landed() {
    auto &groups = cpu::issued[cpu::current].groups;
    for (; groups.size() > LEFT; groups.erase(groups.begin())) cpu::perform(groups.front());
}
template <int LEFT, int N>
void landed(float (&)[N]) {
    landed<LEFT>();
}
template <int COUNT>
void take_registers() {}
template <int COUNT>
void leave_registers() {}

inline uint32_t pack_bf16(float low, float high) { return two_bf16(low, high); }
inline uint32_t pack_half(float low, float high) { return half(low) | (uint32_t)half(high) << 16; }
inline float2 unpack_bf16(uint32_t x) { return {cpu::from_bf16(x & 0xFFFF), cpu::from_bf16(x >> 16)}; }
inline float times(float x, float y) { return x * y; }

}  // namespace ptx
