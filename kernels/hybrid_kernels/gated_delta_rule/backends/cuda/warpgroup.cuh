// Parts of kernels whose warpgroups multiply tiles that bulk copies fetch: sizes, stages, and tiles in shared memory.
//
// Tiles of q, k and the states are in blocks of 32 columns (64-byte swizzle), so that K may be 64, 96 or 128, and serve as right
// operands in either direction. All other tiles are 64 columns wide (128-byte swizzle).
#pragma once
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#endif

#include "chunks.cuh"
#include "ptx.cuh"

#define INLINE __attribute__((always_inline))

namespace {

constexpr int SQUARE = 64 * 64 * 2, KEYS = CHUNK * K * 2;  // bytes
constexpr int MEMORY = 227 * 1024;                         // bytes of shared memory per block

// Wait until the i-th use of a ring's stage may begin: the stage is filled, or (`before`) free.
template <int STAGES>
__device__ __forceinline__ void await(uint64_t (&bars)[STAGES], unsigned i, bool before = false) {
    ptx::wait(&bars[i % STAGES], (i / STAGES & 1) ^ before);
}

// Start a GEMM over STEPS times 16 of the summed dimension. All left operands must be in registers: a fence between the steps costs
// more than an early start of the first gains. ptxas moves no memory access across the last line; otherwise it would place later
// accesses between the steps and delay them.
template <int STEPS, class Multiply>
__device__ __forceinline__ void start(Multiply multiply) {
    ptx::products_follow();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) multiply(step);
    ptx::commit();
    __syncwarp();
}

// Offset of q's or k's i-th 16 columns in a descriptor
__device__ __forceinline__ int col_step(int i) { return (i / 2 * CHUNK * 64 + i % 2 * 32) >> 4; }

template <int N>
__device__ __forceinline__ void pack(const float (&x)[N], uint32_t (&packed)[N / 2]) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) packed[i] = ptx::pack_bf16(x[2 * i], x[2 * i + 1]);
}

// A thread's part of a packed accumulator, to a tile [64, 64] or to one [64, K] in blocks of 32 columns
__device__ __forceinline__ void store_square(char *tile, int warp, int lane, const uint32_t (&packed)[16]) {
    const int row = warp * 16 + lane % 16;
#pragma unroll
    for (int j = 0; j < 4; ++j)
        ptx::store(ptx::address(tile) + row * 128 + ((2 * j + lane / 16) ^ row % 8) * 16, packed + 4 * j);
}

__device__ __forceinline__ void store_blocks(char *tile, int warp, int lane, const uint32_t (&packed)[K / 4]) {
    const int row = warp * 16 + lane % 16;
#pragma unroll
    for (int j = 0; j < K / 16; ++j)
        ptx::store(ptx::address(tile) + j / 2 * CHUNK * 64 + row * 64 + ((j % 2 * 2 + lane / 16) ^ row / 2 % 4) * 16,
                   packed + 4 * j);
}

}  // namespace
