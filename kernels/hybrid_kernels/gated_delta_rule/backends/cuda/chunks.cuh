// Chunks of tokens, for the kernels that run them in parallel.
#pragma once
#include "mma.cuh"

struct Sizes {
    const int *cu, *first_chunk, *sequence;  // bounds of packed sequences, their first chunks, and each chunk's sequence; or null
    const int *positions;                    // of each token in its document, or null
    float scale;
    int length, chunks, heads, key_heads;  // length, chunks: per batch row
};

namespace {

constexpr int K = KEY_DIM, CHUNK = 64;

struct Tokens {
    int start, valid;  // first token of a chunk, and its number of tokens
};

__device__ __forceinline__ Tokens tokens_of(const Sizes &sizes, int chunk) {
    if (sizes.cu) {  // `cu` ends with a repeated bound, so that chunks past the last sequence are empty
        const int sequence = sizes.sequence[chunk];
        const int start = sizes.cu[sequence] + (chunk - sizes.first_chunk[sequence]) * CHUNK;
        return {start, min(CHUNK, sizes.cu[sequence + 1] - start)};
    }
    const int token = chunk % sizes.chunks * CHUNK;
    return {chunk / sizes.chunks * sizes.length + token, min(CHUNK, sizes.length - token)};
}

// Position of a chunk's token in its document. `positions`: from the chunk's first token on. Tokens past the end continue the last
// one's document.
__device__ __forceinline__ int position_of(const int *positions, int token, int valid) {
    const int place = min(token, valid - 1);
    return positions[place] + token - place;
}

// One warp: the sum of the earlier lanes from the last one of them that `begins`. Lane 0 gets its own.
__device__ __forceinline__ float sum_before_lane(float sum, int begins) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const float before = __shfl_up_sync(~0u, sum, step);
        const int begins_before = __shfl_up_sync(~0u, begins, step);
        if (lane >= step) {
            if (!begins) sum += before;
            begins |= begins_before;
        }
    }
    return __shfl_up_sync(~0u, sum, 1);
}

}  // namespace
