// gradients_kernel (triton_gradients.py says what it is) in CUDA C++: dq, dk, dg and dbeta of a chunk and head at a time.
//
// As many blocks as there are multiprocessors, of eight warps each, walk over all chunks and heads. A chunk's values come in
// tiles of 64 by asynchronous copies, two tiles ahead, across chunks: memory never waits for the arithmetic at a chunk's end.
// A warp has 16 rows of tokens and one of two sides: dP, dO S^T and then dq, or R, dz S^T and the part of dk whose decay grows;
// the rest of dk is shared out between the sides by columns.
#include "hopper_mma.cuh"

struct GradientsArguments {
    const uint16_t *q, *k, *d_o, *dz, *new_values, *states, *dstates;
    const float *beta, *G;
    uint16_t *dq, *dk;
    float *dg, *dbeta;
    float scale;
    int length, chunks, heads, key_heads, work;  // length, chunks: of a batch row; work: chunks * heads of all
};

namespace {

constexpr int K = 96, V = 192, CHUNK = 64, THREADS = 256, STAGES = 3, TILES = V / 64;
constexpr int KEY_ROW = K + 8, ROW = CHUNK + 8, EARLY_ROW = K / 2 + 4;  // elements, so that a warp meets no bank twice

struct alignas(16) Stage {
    uint16_t values[2][CHUNK][ROW];      // do and dz: [token][value]
    uint16_t new_values[CHUNK][ROW];     // [value][token]
    uint16_t S[CHUNK][KEY_ROW], dS[CHUNK][KEY_ROW];  // [value][key]
};

struct alignas(16) Shared {
    Stage stages[STAGES];
    uint16_t q[CHUNK][KEY_ROW], k[CHUNK][KEY_ROW];
    union {
        uint16_t inside[2][CHUNK][ROW];  // dP and R as they multiply keys and queries
        float early[CHUNK][EARLY_ROW];
    };
    float G[CHUNK], beta[CHUNK], sums[2][CHUNK], ends[8];
};

// Where a chunk of a head lies
struct Place {
    long key, value, gate, tile;
    int valid;
};

__device__ __forceinline__ Place place_of(const GradientsArguments &a, int work) {
    const int chunk = work / a.heads, head = work % a.heads, token = chunk % a.chunks * CHUNK;
    const long start = (long)(chunk / a.chunks) * a.length + token;
    return {(start * a.key_heads + head / (a.heads / a.key_heads)) * K, (start * a.heads + head) * V, start * a.heads + head, work,
            min(CHUNK, a.length - token)};
}

// ROWS rows of WIDTH elements, those past `valid` as zeros
template <int ROWS, int WIDTH, int PITCH>
__device__ __forceinline__ void fetch(uint16_t (&to)[ROWS][PITCH], const uint16_t *from, long stride, int valid) {
    constexpr int PIECES = WIDTH / 8;
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
        const int row = i / PIECES, col = i % PIECES * 8;
        ptx::copy_16(&to[row][col], from + (row < valid ? row * stride + col : 0), row < valid);
    }
}

__device__ __forceinline__ void fetch_tile(const GradientsArguments &a, Stage &stage, int work, int tile) {
    const Place at = place_of(a, work);
    const long value = at.tile * V + tile * 64;
    fetch<CHUNK, 64>(stage.values[0], a.d_o + at.value + tile * 64, (long)a.heads * V, at.valid);
    fetch<CHUNK, 64>(stage.values[1], a.dz + at.value + tile * 64, (long)a.heads * V, at.valid);
    fetch<CHUNK, 64>(stage.new_values, a.new_values + value * 64, 64, CHUNK);
    fetch<CHUNK, K>(stage.S, a.states + value * K, K, CHUNK);
    fetch<CHUNK, K>(stage.dS, a.dstates + value * K, K, CHUNK);
}

struct Warp {
    int lane, rows, side;  // rows: the first of its 16

    // Fragments of 16 x 16: as the left operand from [row][summed], the same from [summed][row], the right one from [summed][column]
    template <int PITCH>
    __device__ __forceinline__ void left(uint32_t (&a)[4], const uint16_t (&x)[CHUNK][PITCH], int row, int summed) const {
        ptx::load_matrices(a, &x[row + lane % 16][summed + lane / 16 * 8]);
    }
    template <int PITCH>
    __device__ __forceinline__ void left_of_columns(uint32_t (&a)[4], const uint16_t (&x)[CHUNK][PITCH], int row, int summed) const {
        ptx::load_transposed_matrices(a, &x[summed + lane % 8 + lane / 16 * 8][row + lane / 8 % 2 * 8]);
    }
    template <int PITCH>
    __device__ __forceinline__ void right(uint32_t (&b)[4], const uint16_t (&x)[CHUNK][PITCH], int summed, int column) const {
        ptx::load_transposed_matrices(b, &x[summed + lane % 8 + lane / 8 % 2 * 8][column + lane / 16 * 8]);
    }
    // acc [16, 16 N] += a x[summed ..., column ...]
    template <int N, int PITCH>
    __device__ __forceinline__ void add(float (*acc)[4], const uint32_t (&a)[4], const uint16_t (&x)[CHUNK][PITCH], int summed,
                                        int column) const {
#pragma unroll
        for (int pair = 0; pair < N; ++pair) {
            uint32_t b[4];
            right(b, x, summed, column + 16 * pair);
            ptx::multiply(acc[2 * pair], a, b[0], b[1]);
            ptx::multiply(acc[2 * pair + 1], a, b[2], b[3]);
        }
    }
    // Row of the fragments' elements 0 and 1 (half 0) or 2 and 3 (half 1); column in a tile of eight of the first of them
    __device__ __forceinline__ int row(int half) const { return rows + lane / 4 + 8 * half; }
    __device__ __forceinline__ int column() const { return lane % 4 * 2; }
};

__device__ __forceinline__ float sum_of_lanes(float x, int lanes) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2)
        if (step < lanes) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// What one tile of values adds
__device__ __forceinline__ void add_values(const Stage &stage, const Warp &me, float (&scores)[8][4], float (&from_S)[12][4],
                                           float (&from_dS)[6][4], float &kept) {
#pragma unroll
    for (int step = 0; step < 64; step += 16) {
        uint32_t a[4], b[4];
        me.left(a, stage.values[me.side], me.rows, step);
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            if (16 * pair > me.rows) continue;  // above the diagonal
            me.right(b, stage.new_values, step, 16 * pair);
            ptx::multiply(scores[2 * pair], a, b[0], b[1]);
            ptx::multiply(scores[2 * pair + 1], a, b[2], b[3]);
        }
        me.add<6>(from_S, a, stage.S, step, 0);
        me.left_of_columns(a, stage.new_values, me.rows, step);
        me.add<3>(from_dS, a, stage.dS, step, K / 2 * me.side);
    }
#pragma unroll
    for (int i = threadIdx.x; i < CHUNK * K / 2; i += THREADS) {  // <dS', S>
        const int row = i / (K / 2), col = i % (K / 2) * 2;
        const float2 x = ptx::two_floats(*(const uint32_t *)&stage.S[row][col]);
        const float2 y = ptx::two_floats(*(const uint32_t *)&stage.dS[row][col]);
        kept += x.x * y.x + x.y * y.y;
    }
}

// dP or R with their decays, as left operands and in shared memory; dbeta from R's diagonal
__device__ __forceinline__ void finish_scores(Shared &shared, const Warp &me, float (&scores)[8][4], uint32_t (&left)[4][4],
                                              float scale, float *dbeta, int heads, int valid) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = me.row(half);
        const float G = shared.G[row];
#pragma unroll
        for (int tile = 0; tile < 8; ++tile) {
            const int col = 8 * tile + me.column();
            float x[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float score = scores[tile][2 * half + i];
                if (me.side && row == col + i && row < valid) {
                    const float beta = ptx::rounded_to_half(fmaxf(shared.beta[row], 0x1p-20f));  // as A's diagonal holds it
                    dbeta[(long)row * heads] = score / beta / beta;
                }
                x[i] = 0.f;
                if (row >= col + i + me.side) x[i] = score * ptx::power_of_2(G - shared.G[col + i]) * (me.side ? -1.f : scale);
            }
            left[tile / 2][half + tile % 2 * 2] = ptx::two_bf16(x[0], x[1]);
            *(uint32_t *)&shared.inside[me.side][row][col] = left[tile / 2][half + tile % 2 * 2];
        }
    }
}

// A row's factors on its fragments
template <int N, class Factor>
__device__ __forceinline__ void scale_rows(const Warp &me, float (&acc)[N][4], Factor factor) {
    const float f[2] = {factor(me.row(0)), factor(me.row(1))};
#pragma unroll
    for (int tile = 0; tile < N; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[tile][i] *= f[i / 2];
}

// For each two elements of the fragments in tiles FIRST ... FIRST + N - 1: use(tile - FIRST, half, row, column)
template <int FIRST, int N, class Use>
__device__ __forceinline__ void each(const Warp &me, Use use) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int tile = 0; tile < N; ++tile) use(tile, half, me.row(half), 8 * (FIRST + tile) + me.column());
}

__device__ __forceinline__ float2 pair_at(const uint16_t (&x)[CHUNK][KEY_ROW], int row, int col) {
    return ptx::two_floats(*(const uint32_t *)&x[row][col]);
}

// The end of a chunk: what the tiles' sums and its own q and k make of dq, dk, dg and dbeta
__device__ __forceinline__ void finish_chunk(const GradientsArguments &a, Shared &shared, const Warp &me, int work,
                                             float (&scores)[8][4], float (&from_S)[12][4], float (&late)[6][4], float kept) {
    const Place at = place_of(a, work);
    const long stride = (long)a.heads * K;
    const int first = K / 2 * me.side;  // of this side's columns of dk
    uint32_t left[4][4];
    finish_scores(shared, me, scores, left, a.scale, a.dbeta + at.gate, a.heads, at.valid);
    scale_rows(me, from_S, [&](int row) { return ptx::power_of_2(shared.G[row]) * (me.side ? -1.f : a.scale); });
#pragma unroll
    for (int block = 0; block < 4; ++block)
        if (16 * block <= me.rows) me.add<6>(from_S, left[block], shared.k, 16 * block, 0);  // dq, or dk's early terms

    const float G_end = shared.G[CHUNK - 1];
    float ends = kept * ptx::power_of_2(G_end);
    scale_rows(me, late, [&](int row) { return ptx::power_of_2(G_end - shared.G[row]); });
    each<0, 6>(me, [&](int tile, int half, int row, int col) {
        const float2 k = pair_at(shared.k, row, first + col);
        ends += k.x * late[tile][2 * half] + k.y * late[tile][2 * half + 1];
    });
    ends = sum_of_lanes(ends, 32);
    if (me.lane == 0) shared.ends[threadIdx.x / 32] = ends;
    __syncthreads();  // all of dP and R are there
#pragma unroll
    for (int block = 0; block < 4; ++block) {
        if (16 * block < me.rows) continue;
        uint32_t x[4];
        me.left_of_columns(x, shared.inside[0], me.rows, 16 * block);
        me.add<3>(late, x, shared.q, 16 * block, first);
        me.left_of_columns(x, shared.inside[1], me.rows, 16 * block);
        me.add<3>(late, x, shared.k, 16 * block, first);
    }
    __syncthreads();  // and read
    if (me.side)
        each<0, 6>(me, [&](int tile, int half, int row, int col) {
            *(float2 *)&shared.early[row][col] = make_float2(from_S[tile][2 * half], from_S[tile][2 * half + 1]);
        });
    __syncthreads();
    float sums[2] = {0.f, 0.f};
    uint16_t *dk = a.dk + at.gate * K;
    auto finish = [&](int half, int row, int col, float early_x, float early_y, float late_x, float late_y) {
        const float2 k = pair_at(shared.k, row, col);
        sums[half] += k.x * (early_x - late_x) + k.y * (early_y - late_y);
        if (row < at.valid) *(uint32_t *)(dk + row * stride + col) = ptx::two_bf16(early_x + late_x, early_y + late_y);
    };
    if (me.side) {
        each<6, 6>(me, [&](int tile, int half, int row, int col) {
            const float *early = &from_S[6 + tile][2 * half], *more = &late[tile][2 * half];
            finish(half, row, col, early[0], early[1], more[0], more[1]);
        });
    } else {
        uint16_t *dq = a.dq + at.gate * K;
        each<0, 12>(me, [&](int tile, int half, int row, int col) {
            const float2 q = pair_at(shared.q, row, col);
            const float x = from_S[tile][2 * half], y = from_S[tile][2 * half + 1];
            sums[half] += q.x * x + q.y * y;
            if (row < at.valid) *(uint32_t *)(dq + row * stride + col) = ptx::two_bf16(x, y);
        });
        each<0, 6>(me, [&](int tile, int half, int row, int col) {
            const float2 early = *(const float2 *)&shared.early[row][col];
            finish(half, row, col, early.x, early.y, late[tile][2 * half], late[tile][2 * half + 1]);
        });
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float sum = sum_of_lanes(sums[half], 4);
        if (me.lane % 4 == 0) shared.sums[me.side][me.row(half)] = sum;
    }
    __syncthreads();
    if (threadIdx.x < 32) {  // dg: sums from a token to the chunk's end
        const int t = 2 * me.lane;
        float last = 0.f;
#pragma unroll
        for (int warp = 0; warp < 8; ++warp) last += shared.ends[warp];
        const float x = shared.sums[0][t] + shared.sums[1][t], y = shared.sums[0][t + 1] + shared.sums[1][t + 1];
        float sum = x + y;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const float after = __shfl_down_sync(~0u, sum, step);
            if (me.lane + step < 32) sum += after;
        }
        if (t < at.valid) a.dg[at.gate + (long)t * a.heads] = sum + last;
        if (t + 1 < at.valid) a.dg[at.gate + (long)(t + 1) * a.heads] = sum - x + last;
    }
}

__global__ void __launch_bounds__(THREADS, 1) gradients_kernel(const GradientsArguments a) {
    DYNAMIC_SHARED(Shared, shared);
    const int warp = threadIdx.x / 32;
    const Warp me{(int)threadIdx.x % 32, 16 * (warp % 4), warp / 4};
    const int mine = (a.work - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;  // chunks of heads
    auto work = [&](int i) { return (int)blockIdx.x + i * (int)gridDim.x; };
    auto ahead = [&](int step) {
        if (step < TILES * mine) fetch_tile(a, shared.stages[step % STAGES], work(step / TILES), step % TILES);
    };
    for (int step = 0; step < STAGES - 1; ++step) {
        ahead(step);
        ptx::copies_end();
    }
    for (int i = 0; i < mine; ++i) {
        float scores[8][4] = {}, from_S[12][4] = {}, from_dS[6][4] = {}, kept = 0.f;
#pragma unroll 1
        for (int tile = 0; tile < TILES; ++tile) {
            const int step = TILES * i + tile;
            ptx::copies_landed_but<STAGES - 2>();
            __syncthreads();  // for everyone; and nobody reads the stage before any more
            ahead(step + STAGES - 1);
            if (tile == 0) {
                const Place at = place_of(a, work(i));
                fetch<CHUNK, K>(shared.q, a.q + at.key, (long)a.key_heads * K, at.valid);
                fetch<CHUNK, K>(shared.k, a.k + at.key, (long)a.key_heads * K, at.valid);
                if (const int t = threadIdx.x; t < CHUNK) {
                    ptx::copy_4(&shared.G[t], a.G + at.tile * CHUNK + t, true);
                    ptx::copy_4(&shared.beta[t], a.beta + at.gate + (t < at.valid ? (long)t * a.heads : 0), t < at.valid);
                }
            }
            ptx::copies_end();
            add_values(shared.stages[step % STAGES], me, scores, from_S, from_dS, kept);
        }
        finish_chunk(a, shared, me, work(i), scores, from_S, from_dS, kept);
    }
}

}  // namespace

#ifdef __CUDACC__
// Tensors as triton_op.gradients has them, without documents; g, beta, dg and dbeta in fp32. Returns null, or what went wrong.
extern "C" const char *gradients(const GradientsArguments *args, int blocks, void *stream) {
    const int bytes = sizeof(Shared);
    cudaError_t error = cudaFuncSetAttribute(gradients_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess) {
        gradients_kernel<<<min(blocks, args->work), THREADS, bytes, (cudaStream_t)stream>>>(*args);
        error = cudaGetLastError();
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif
