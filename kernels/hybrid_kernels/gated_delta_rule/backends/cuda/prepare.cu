// prepare_kernel (triton_prepare.py says what it is) in CUDA C++: one block of four warps for a chunk of a head.
//
// Each warp multiplies 16 rows of q and of k with k^T up to the diagonal, on tensor cores, and writes its rows of P. N goes to
// shared memory in fp32, where q and k were. Then two warps invert I + N by substitution, a column a lane, in blocks of 16
// rows: in fp32 throughout, and with far fewer instructions than by products of small blocks.
#include "chunks.cuh"

namespace {

constexpr int THREADS = 128;
constexpr int KEY_ROW = K + 8, N_ROW = CHUNK + 8;  // elements, so that a warp meets no bank twice
constexpr float LOG2E = 1.4426950408889634f;

struct alignas(16) Shared {
    union {
        struct {
            uint16_t q[CHUNK][KEY_ROW], k[CHUNK][KEY_ROW];  // rows of P, too, over those of q
        };
        struct {
            float N[CHUNK][N_ROW];
            float solved[CHUNK][32];  // rows of the inverse that are needed again: 48 of the first warp's, 16 of the second's
        };
    };
    float G[CHUNK], beta[CHUNK];
    int first[CHUNK];  // first token of each token's document, counted from the chunk's first; with documents
};

__device__ __forceinline__ void fetch_keys(Shared &shared, const uint16_t *q, const uint16_t *k, int stride, int valid) {
    constexpr int PIECES = K / 8;
#pragma unroll
    for (int i = threadIdx.x; i < CHUNK * PIECES; i += THREADS) {
        const int row = i / PIECES, col = i % PIECES * 8;
        const long at = row < valid ? (long)row * stride + col : 0;
        ptx::copy_16(&shared.q[row][col], q + at, row < valid);
        ptx::copy_16(&shared.k[row][col], k + at, row < valid);
    }
}

// One warp: the running sums of g in units of log 2, of two tokens per lane
__device__ __forceinline__ void sum_gates(Shared &shared, float first, float second, float *G) {
    const int lane = threadIdx.x % 32, t = 2 * lane;
    float sum = first + second;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const float before = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) sum += before;
    }
    G[t] = shared.G[t] = (sum - second) * LOG2E;
    G[t + 1] = shared.G[t + 1] = sum * LOG2E;
}

// The same inside documents, and which tokens see what (backends/triton/prepare.py): three rows of G
__device__ __forceinline__ void sum_gates_in_documents(Shared &shared, float first, float second, const int *positions, int valid,
                                                       float *G) {
    const int lane = threadIdx.x % 32, t = 2 * lane;
    const int position[2] = {position_of(positions, t, valid), position_of(positions, t + 1, valid)};
    const int last = position_of(positions, CHUNK - 1, valid);
    if (position[0] == 0) first = 0.f;  // a document's first token decays no state
    if (position[1] == 0) second = 0.f;
    const bool begins = position[0] == 0 || position[1] == 0;
    float sum = position[1] == 0 ? 0.f : first + second;
    const float earlier = sum_before_lane(sum, begins);
    float of[2];
    of[0] = position[0] == 0 ? 0.f : (lane ? earlier : 0.f) + first;
    of[1] = position[1] == 0 ? 0.f : of[0] + second;
    const float end = __shfl_sync(~0u, of[1], 31) * LOG2E, never = __int_as_float(0xFF800000);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float x = of[i] * LOG2E;
        shared.first[t + i] = t + i - position[i];
        G[t + i] = shared.G[t + i] = x;
        G[CHUNK + t + i] = position[i] > t + i ? x : never;
        G[2 * CHUNK + t + i] = CHUNK - 1 - (t + i) <= last ? end - x : never;
    }
}

// One warp: the gates, with beta never so small that A's diagonal holds a zero
template <bool DOCUMENTS>
__device__ __forceinline__ void fetch_gates(Shared &shared, const float *g, const float *beta, const int *positions, float *G,
                                            int stride, int valid) {
    const int t = threadIdx.x % 32 * 2;
    const float first = t < valid ? g[(long)t * stride] : 0.f, second = t + 1 < valid ? g[(long)(t + 1) * stride] : 0.f;
    if constexpr (DOCUMENTS)
        sum_gates_in_documents(shared, first, second, positions, valid, G);
    else
        sum_gates(shared, first, second, G);
    shared.beta[t] = t < valid ? fmaxf(beta[(long)t * stride], 0x1p-20f) : 0.f;
    shared.beta[t + 1] = t + 1 < valid ? fmaxf(beta[(long)(t + 1) * stride], 0x1p-20f) : 0.f;
}

// Rows 16 warp ... + 15 of x k^T, up to the block on the diagonal: [columns / 8][fragment]
__device__ __forceinline__ void multiply_keys(const uint16_t (&x)[CHUNK][KEY_ROW], const uint16_t (&k)[CHUNK][KEY_ROW], int warp,
                                              float (&products)[8][4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < K; step += 16) {
        uint32_t a[4], b[4];
        ptx::load_matrices(a, &x[16 * warp + lane % 16][step + lane / 16 * 8]);
#pragma unroll
        for (int block = 0; block < 4; ++block) {
            if (block > warp) continue;
            ptx::load_matrices(b, &k[16 * block + lane % 8 + lane / 16 * 8][step + lane / 8 % 2 * 8]);
            ptx::multiply(products[2 * block], a, b[0], b[1]);
            ptx::multiply(products[2 * block + 1], a, b[2], b[3]);
        }
    }
}

// What the fragments hold, times exp(G_i - G_j) up to the diagonal, which STRICT leaves out, and zero from one document to another:
// two at a time to `use`
template <bool STRICT, bool DOCUMENTS, class Use>
__device__ __forceinline__ void with_decays(const Shared &shared, int warp, const float (&products)[8][4], Use use) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = 16 * warp + lane / 4 + 8 * half;
        const float G = shared.G[row];
        const int begin = DOCUMENTS ? shared.first[row] : 0;
#pragma unroll
        for (int tile = 0; tile < 8; ++tile) {
            const int col = 8 * tile + lane % 4 * 2;
            float x[2] = {0.f, 0.f};
#pragma unroll
            for (int i = 0; i < 2; ++i)
                if (tile / 2 <= warp && row >= col + i + STRICT && (!DOCUMENTS || col + i >= begin))
                    x[i] = products[tile][2 * half + i] * ptx::exp2(G - shared.G[col + i]);
            use(row, col, x[0], x[1]);
        }
    }
}

// This warp's 16 rows of P, through shared memory, where its rows of q were, to where they belong
template <bool DOCUMENTS>
__device__ __forceinline__ void put_scores(Shared &shared, int warp, const float (&qk)[8][4], float scale, uint4 *P) {
    __syncwarp();
    with_decays<false, DOCUMENTS>(shared, warp, qk, [&](int row, int col, float x, float y) {
        *(uint32_t *)&shared.q[row][col] = ptx::two_bf16(x * scale, y * scale);
    });
    __syncwarp();
#pragma unroll
    for (int i = threadIdx.x % 32; i < 16 * 8; i += 32) {
        const int row = 16 * warp + i / 8, piece = i % 8;
        P[row * 8 + piece] = *(const uint4 *)&shared.q[row][8 * piece];
    }
}

// Columns 32 warp ... + 31 of A = (I + N)^-1 diag(beta), one a lane, from the row where they begin
__device__ __forceinline__ void invert(Shared &shared, int warp, uint16_t *A) {
    const int lane = threadIdx.x % 32, column = 32 * warp + lane, first = 2 * warp;
    const float beta = shared.beta[column];
    float(*const solved)[32] = shared.solved + (CHUNK - 16) * warp;
#pragma unroll 1
    for (int block = first; block < 4; ++block) {
        const float(*N)[N_ROW] = shared.N + 16 * block;
        float x[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) x[i] = 16 * block + i == column ? 1.f : 0.f;
#pragma unroll 1
        for (int before = first; before < block; ++before) {
            float y[16];
#pragma unroll
            for (int j = 0; j < 16; ++j) y[j] = solved[16 * (before - first) + j][lane];
#pragma unroll
            for (int i = 0; i < 16; ++i) {
#pragma unroll
                for (int j = 0; j < 16; j += 4) {
                    const float4 n = *(const float4 *)&N[i][16 * before + j];
                    x[i] -= n.x * y[j];
                    x[i] -= n.y * y[j + 1];
                    x[i] -= n.z * y[j + 2];
                    x[i] -= n.w * y[j + 3];
                }
            }
        }
#pragma unroll
        for (int i = 1; i < 16; ++i) {
#pragma unroll
            for (int j = 0; j < i; j += 4) {
                const float4 n = *(const float4 *)&N[i][16 * block + j];
                x[i] -= n.x * x[j];
                if (j + 1 < i) x[i] -= n.y * x[j + 1];
                if (j + 2 < i) x[i] -= n.z * x[j + 2];
                if (j + 3 < i) x[i] -= n.w * x[j + 3];
            }
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            if (block < 3) solved[16 * (block - first) + i][lane] = x[i];
            A[(16 * block + i) * CHUNK + column] = ptx::half(x[i] * beta);
        }
    }
}

template <bool DOCUMENTS>
__global__ void __launch_bounds__(THREADS, 7)
    prepare_kernel(const uint16_t *q, const uint16_t *k, const float *g, const float *beta, uint16_t *A, uint16_t *P, float *G,
                   Sizes sizes) {
    __shared__ Shared shared;
    const int head = blockIdx.x, chunk = blockIdx.y, warp = threadIdx.x / 32;
    const auto [start, valid] = tokens_of(sizes, chunk);
    if (valid <= 0) return;
    const long tile = (long)chunk * sizes.heads + head;
    const long key = ((long)start * sizes.key_heads + head / (sizes.heads / sizes.key_heads)) * K, gate = (long)start * sizes.heads + head;

    fetch_keys(shared, q + key, k + key, sizes.key_heads * K, valid);
    if (warp == 0)
        fetch_gates<DOCUMENTS>(shared, g + gate, beta + gate, DOCUMENTS ? sizes.positions + start : nullptr,
                               G + tile * (DOCUMENTS ? 3 * CHUNK : CHUNK), sizes.heads, valid);
    ptx::copies_landed();
    __syncthreads();
    {
        float qk[8][4] = {};
        multiply_keys(shared.q, shared.k, warp, qk);
        put_scores<DOCUMENTS>(shared, warp, qk, sizes.scale, (uint4 *)(P + tile * CHUNK * CHUNK));
    }
    float kk[8][4] = {};
    multiply_keys(shared.k, shared.k, warp, kk);
    __syncthreads();  // N lies where q and k were
    with_decays<true, DOCUMENTS>(shared, warp, kk, [&](int row, int col, float x, float y) {
        const float beta = shared.beta[row];
        *(float2 *)&shared.N[row][col] = make_float2(x * beta, y * beta);
    });
    __syncthreads();
    A += tile * CHUNK * CHUNK;
    if (warp < 2)
        invert(shared, warp, A);
    else if (warp == 2)  // what lies above the second half of the diagonal
        for (int i = threadIdx.x % 32; i < 32 * 4; i += 32) *(uint4 *)(A + i / 4 * CHUNK + 32 + i % 4 * 8) = uint4{};
}

}  // namespace

#ifdef __CUDACC__
// q, k [rows, key heads, K] bf16, g, beta [rows, heads] fp32; A fp16, P bf16 [count, heads, 64, 64], G fp32 [count, heads, 64] or,
// with documents, [count, heads, 3, 64]. Returns null, or what went wrong.
extern "C" const char *prepare(const void *q, const void *k, const void *g, const void *beta, void *A, void *P, void *G,
                               const Sizes *sizes, int count, void *stream) {
    auto kernel = sizes->positions ? prepare_kernel<true> : prepare_kernel<false>;
    kernel<<<dim3(sizes->heads, count), THREADS, 0, (cudaStream_t)stream>>>(
        (const uint16_t *)q, (const uint16_t *)k, (const float *)g, (const float *)beta, (uint16_t *)A, (uint16_t *)P,
        (float *)G, *sizes);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif
