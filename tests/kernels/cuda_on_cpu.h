// A CUDA kernel as a function of the CPU. The threads of a block are coroutines that switch at barriers; one block runs at a time. Its
// warps pause at random, so that no result may depend on which is first.
// The instructions of backends/cuda/mma.cuh are functions here, by the layouts of their fragments.
//
// Include before the kernel; `run_block(x, y, threads, call)` runs one block of it. Asynchronous copies complete when they are waited
// for, not before, so that a missing wait gives wrong results.
#pragma once
#define HYBRID_KERNELS_MMA
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

using std::min;

struct Index {
    int x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

namespace cpu {

struct Copy {
    void *to;
    const void *from;
    bool valid;
    void land() const {
        if (valid)
            std::memcpy(to, from, 16);
        else
            std::memset(to, 0, 16);
    }
};

struct Thread {
    ucontext_t beginning;
    jmp_buf place;  // where it waits
    std::vector<char> stack = std::vector<char>(1 << 16);
    std::vector<Copy> copies;  // that have not landed
    bool begun, done;
};

struct Barrier {
    int arrived = 0;
    long generation = 0;
};

inline jmp_buf scheduler;
inline std::vector<std::unique_ptr<Thread>> threads;
inline int current;
inline Barrier of_block, of_warp[32];
inline char exchanged[32][32][64];  // by warp and lane
inline std::function<void()> body, each_round = [] {};  // each_round: runs whenever every thread has had its turn

// Switches by jumps between stacks: swapcontext makes a system call each time
inline void yield() {
    if (!_setjmp(threads[current]->place)) _longjmp(scheduler, 1);
}

inline void resume(Thread &thread) {
    if (_setjmp(scheduler)) return;
    if (thread.begun) _longjmp(thread.place, 1);
    thread.begun = true;
    setcontext(&thread.beginning);
}

inline void wait(Barrier &barrier, int count) {
    const long mine = barrier.generation;
    if (++barrier.arrived == count) {
        barrier.arrived = 0;
        ++barrier.generation;
    }
    while (barrier.generation == mine) yield();
}

inline uint32_t draw(uint32_t bound) {  // the same numbers in every run
    static uint32_t state = 1;
    state = state * 1664525 + 1013904223;
    return (state >> 8) % bound;
}

inline void start() {
    body();
    threads[current]->done = true;
    _longjmp(scheduler, 1);
}

// What every lane of this warp hands in; valid until the warp's next exchange
template <class T>
struct Lanes {
    const char (*all)[64];
    T operator[](int lane) const {
        T x;
        std::memcpy(&x, all[lane], sizeof(T));
        return x;
    }
};

}  // namespace cpu

inline Index blockIdx, gridDim;
struct {
    operator Index() const { return {cpu::current, 0}; }
    struct {
        operator int() const { return cpu::current; }
    } x;
} inline threadIdx;

inline void __syncthreads() { cpu::wait(cpu::of_block, cpu::threads.size()); }
inline void __syncwarp() { cpu::wait(cpu::of_warp[cpu::current / 32], 32); }

namespace cpu {

template <class T>
Lanes<T> exchange(const T &mine) {
    static_assert(sizeof(T) <= 64);
    __syncwarp();
    std::memcpy(exchanged[current / 32][current % 32], &mine, sizeof(T));
    __syncwarp();
    return {exchanged[current / 32]};
}

inline void run_block(int x, int y, int count, std::function<void()> kernel) {
    blockIdx = {x, y};
    body = kernel;
    threads.resize(count);
    for (auto &thread : threads) {
        if (!thread) thread = std::make_unique<Thread>();
        thread->begun = thread->done = false;
        thread->copies.clear();
        getcontext(&thread->beginning);
        thread->beginning.uc_stack.ss_sp = thread->stack.data();
        thread->beginning.uc_stack.ss_size = thread->stack.size();
        makecontext(&thread->beginning, start, 0);
    }
    int pauses[32] = {};
    for (bool left = true; left;) {
        left = false;
        for (int &pause : pauses) pause = pause ? pause - 1 : draw(32) ? 0 : draw(64);
        for (current = 0; current < count; ++current)
            if (!threads[current]->done) {
                if (!pauses[current / 32]) resume(*threads[current]);
                left = left || !threads[current]->done;
            }
        each_round();
    }
}

inline float from_bf16(uint32_t bits) {
    float x;
    bits <<= 16;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t to_bf16(float x) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

}  // namespace cpu

inline float of_lane(float x, int lane) { return cpu::exchange(x)[lane >= 0 && lane < 32 ? lane : cpu::current % 32]; }
inline float __shfl_up_sync(unsigned, float x, int by) { return of_lane(x, cpu::current % 32 - by); }
inline int __shfl_up_sync(unsigned, int x, int by) {
    const int lane = cpu::current % 32;
    return cpu::exchange(x)[lane < by ? lane : lane - by];
}

namespace ptx {

inline void copy_16(void *to, const void *from, bool valid) {
    cpu::threads[cpu::current]->copies.push_back({to, from, valid});
}

inline void copies_landed() {
    auto &copies = cpu::threads[cpu::current]->copies;
    for (const cpu::Copy &copy : copies) copy.land();
    copies.clear();
}

inline void load_matrices(uint32_t (&r)[4], const void *row) {
    const int lane = cpu::current % 32;
    const auto rows = cpu::exchange(row);
    for (int matrix = 0; matrix < 4; ++matrix)
        std::memcpy(&r[matrix], (const char *)rows[8 * matrix + lane / 4] + 4 * (lane % 4), 4);
}

struct Operands {
    uint32_t a[4], b[2];
};

inline void multiply(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const int lane = cpu::current % 32;
    const auto all = cpu::exchange(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    auto element = [](uint32_t pair, int odd) { return cpu::from_bf16(odd ? pair >> 16 : pair & 0xFFFF); };
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
        double sum = 0;
        for (int k = 0; k < 16; ++k) {
            const int pair = k % 8 / 2, high = k / 8;
            sum += (double)element(all[row % 8 * 4 + pair].a[row / 8 + 2 * high], k % 2) *
                   element(all[col * 4 + pair].b[high], k % 2);
        }
        acc[i] += (float)sum;
    }
}

inline uint32_t two_bf16(float low, float high) { return cpu::to_bf16(low) | cpu::to_bf16(high) << 16; }

inline uint16_t half(float x) {
    const _Float16 y = (_Float16)x;
    uint16_t bits;
    std::memcpy(&bits, &y, 2);
    return bits;
}

inline float round_to_half(float x) { return (float)(_Float16)x; }

inline float exp2(float x) { return std::exp2(x); }

}  // namespace ptx
