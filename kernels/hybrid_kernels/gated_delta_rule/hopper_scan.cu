// The forward scan of gluon_scan for key heads of 96, in CUDA C++ with roles: the same mathematics, bit for bit.
//
// A block carries S^T [64 values, 96] in the registers of one warpgroup along a head's chunks of 64 tokens. Beside it one
// warp fetches q, k, v, A and P up to four chunks ahead, and one turns the running gate sums G into factors. In shared
// memory q and k lie in blocks of 32 columns (64-byte swizzle), so that 96 is three of them and k serves both in S^T k^T
// and, read the other way, in S^T += x k. The rest is 64 columns wide (128-byte swizzle).
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "hopper_ptx.cuh"

#define INLINE __attribute__((always_inline))

struct Arguments {
    const float *G, *initial;  // initial, final: [sequences, H, K, V], or null
    float *final;
    __nv_bfloat16 *o;
    const int *cu, *first_chunk;  // of documents, or null
    float scale;
    int length, chunks, segments, heads, key_heads, values;  // of a batch row; values: V
};

namespace {

constexpr int K = 96, CHUNK = 64, STAGES = 4;
constexpr int SQUARE = 64 * 64 * 2, KEYS = CHUNK * K * 2;  // bytes
constexpr int SCANNERS = 128, THREADS = SCANNERS + 64;

struct Span {
    int start, end, first, count;  // first token, end of its tokens, first chunk, chunks
};

__device__ Span span_of(const Arguments &a, int n) {
    if (a.cu) return {a.cu[n], a.cu[n + 1], a.first_chunk[n], a.first_chunk[n + 1] - a.first_chunk[n]};
    const int row = n / a.segments, per = (a.chunks + a.segments - 1) / a.segments, before = n % a.segments * per;
    return {row * a.length + before * CHUNK, (row + 1) * a.length, row * a.chunks + before, min(per, a.chunks - before)};
}

struct Shared {
    struct alignas(1024) Stage {
        char k[KEYS], q[KEYS], A[SQUARE], P[SQUARE], v[SQUARE];
    } stage[STAGES];
    alignas(1024) char out[2][SQUARE];
    struct {
        float decay[CHUNK], rest[CHUNK], output[CHUNK];  // exp(G), exp(G_end - G), scale exp(G)
    } factors[STAGES];
    uint64_t full[STAGES], empty[STAGES];
};

// Chunk c's use of its stage: filled, or (`before`) free for it.
__device__ __forceinline__ void await(uint64_t (&bars)[STAGES], int c, bool before = false) {
    ptx::wait(&bars[c % STAGES], (c / STAGES & 1) ^ before);
}

// One thread: the copies of every chunk.
__device__ void fetch_chunks(Shared &shared, const CUtensorMap *q, const CUtensorMap *k, const CUtensorMap *v,
                             const CUtensorMap *A, const CUtensorMap *P, Span span, int head, int heads, int key_block,
                             int value_col) {
    for (int c = 0; c < span.count; ++c) {
        auto &to = shared.stage[c % STAGES];
        uint64_t *full = &shared.full[c % STAGES];
        const int token = span.start + c * CHUNK, row = ((span.first + c) * heads + head) * CHUNK;
        await(shared.empty, c, true);
        ptx::expect_bytes(full, sizeof(to));
        ptx::fetch(k, to.k, full, 0, token, key_block);
        ptx::fetch(v, to.v, full, value_col, token);
        ptx::fetch(q, to.q, full, 0, token, key_block);
        ptx::fetch(A, to.A, full, 0, row);
        ptx::fetch(P, to.P, full, 0, row);
    }
}

// One warp: the gate factors of every chunk, two tokens a lane, loaded a chunk ahead.
__device__ void make_factors(Shared &shared, const Arguments &args, Span span, int head) {
    const int lane = threadIdx.x % 32;
    auto gates = [&](int c) {
        if (c >= span.count) return make_float2(0, 0);
        return *(const float2 *)(args.G + ((long)(span.first + c) * args.heads + head) * CHUNK + 2 * lane);
    };
    float2 next = gates(0);
    for (int c = 0; c < span.count; ++c) {
        const float2 g = next;
        next = gates(c + 1);
        const float end = __shfl_sync(~0u, g.y, 31);
        const float2 decay = make_float2(ptx::exp2(g.x), ptx::exp2(g.y));
        auto &to = shared.factors[c % STAGES];
        await(shared.empty, c, true);
        ((float2 *)to.decay)[lane] = decay;
        ((float2 *)to.rest)[lane] = make_float2(ptx::exp2(end - g.x), ptx::exp2(end - g.y));
        ((float2 *)to.output)[lane] = make_float2(decay.x * args.scale, decay.y * args.scale);
        __syncwarp();
        if (lane == 0) ptx::arrive(&shared.full[c % STAGES]);
    }
}

// Of x [64 values, 64 tokens], for this thread's two rows: the power of two that brings a row's largest to [1, 2), by which
// it is divided before it becomes fp16; and its inverse. See half_rows in triton_support.
__device__ __forceinline__ void row_powers(const float (&x)[32], float (&power)[2], float (&inverse)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float most = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) most = fmaxf(most, fmaxf(fabsf(x[4 * j + 2 * row]), fabsf(x[4 * j + 2 * row + 1])));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        power[row] = __int_as_float(__float_as_int(most) & 0x7F800000);
        inverse[row] = __int_as_float(0x7F000000 - __float_as_int(power[row]));
    }
}

// The product of STEPS times 16 of the summed dimension, in flight. All left operands must be there: a fence between
// the steps costs more than an early start of the first gains.
template <int STEPS, class Multiply>
__device__ __forceinline__ void start(Multiply multiply) {
    ptx::products_follow();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) multiply(step);
    ptx::commit();
}

// One warpgroup: a head's chunks for 64 values. Of an accumulator [64, N] a thread has rows lane / 4 (+ 8) and columns
// 8 j + 2 (lane % 4) (+ 1): packed in pairs it is the left operand of the next product as it stands.
__device__ __forceinline__ void scan(Shared &shared, const CUtensorMap *o, const Arguments &args, Span span, int n,
                                     int head) {
    const int thread = threadIdx.x % SCANNERS, warp = thread / 32, lane = thread % 32;  // % so that they are known to be >= 0
    const int value_col = head * args.values + blockIdx.x * 64;
    // where this thread's rows of the 8 x 8 matrices lie in a [64 tokens, 64 values] tile
    const int in_tile = (lane / 16 * 8 + lane % 8) * 128 + ((2 * warp + lane / 8 % 2) ^ lane % 8) * 16;
    const long state_at = ((long)n * args.heads + head) * K * args.values + blockIdx.x * 64 + warp * 16 + lane / 4;
    auto at = [&](int i) { return state_at + (long)(i / 4 * 8 + lane % 4 * 2 + i % 2) * args.values + i / 2 % 2 * 8; };
    auto col_step = [](int i) { return (i / 2 * CHUNK * 64 + i % 2 * 32) >> 4; };  // 16 of q's or k's columns on

    float S[K / 2], out[32];
    float y[32], power[2];  // what is to be written, its rows still to be multiplied by `power`
    float2 rest[8];         // exp(G_end - G)
#pragma unroll
    for (int i = 0; i < K / 2; ++i) S[i] = args.initial ? args.initial[at(i)] : 0.0f;
#pragma unroll
    for (int i = 0; i < 32; ++i) out[i] = 0.0f;

    auto columns = [&](float2 (&f)[8], const float (&of)[CHUNK]) INLINE {  // this thread's
#pragma unroll
        for (int j = 0; j < 8; ++j) f[j] = ((const float2 *)of)[4 * j + lane % 4];
    };
    auto release = [&](int c) INLINE {  // this warp is done with chunk c's stage
        if (lane == 0) ptx::arrive(&shared.empty[c % STAGES]);
    };
    auto put = [&](const uint32_t (&packed)[16], int c) INLINE {  // the outputs of chunk c; two tiles take turns
        char *tile = shared.out[c % 2];
        const int row = span.start + c * CHUNK;
        const uint32_t to = ptx::address(tile) + in_tile;
#pragma unroll
        for (int j = 0; j < 4; ++j) ptx::store_transposed(to + j * 2048, packed + 4 * j);
        ptx::shared_visible_to_copies();
        if (thread == 0) ptx::puts_read();  // of the chunk before: the next one's rows go to its tile
        ptx::named_barrier(1, SCANNERS);
        if (row + CHUNK <= span.end) {
            if (thread == 0) ptx::put(o, tile, value_col, row);
        } else {  // rows beyond the end are another document's, or none
            for (int i = thread; i < 8 * (span.end - row); i += SCANNERS) {
                const int t = i / 8, col = i % 8;
                *(uint4 *)(args.o + (long)(row + t) * args.heads * args.values + value_col + 8 * col) =
                    *(const uint4 *)(tile + t * 128 + (col ^ t % 8) * 16);
            }
        }
    };
    auto pack = [](const float (&x)[32], uint32_t (&packed)[16]) INLINE {
#pragma unroll
        for (int i = 0; i < 16; ++i) packed[i] = ptx::pack_bf16(x[2 * i], x[2 * i + 1]);
    };

    // A chunk in two halves, so that nothing is in flight where the loop closes: ptxas would wait for it there.
    auto predict = [&](int c, bool first) INLINE {
        auto &in = shared.stage[c % STAGES];
        const auto &factors = shared.factors[c % STAGES];
        const uint64_t k = ptx::descriptor(in.k, 16, 512, ptx::SWIZZLE_64);
        const uint64_t q = ptx::descriptor(in.q, 16, 512, ptx::SWIZZLE_64);
        const uint64_t A = ptx::descriptor(in.A, 16, 1024, ptx::SWIZZLE_128);
        uint32_t left[K / 4], packed[16], v[16], change[16];
        float x[32], inverse[2];
        float2 value[16], decay[8], output[8];
        await(shared.full, c);
#pragma unroll
        for (int i = 0; i < K / 4; ++i) left[i] = ptx::pack_bf16(S[2 * i], S[2 * i + 1]);
        start<K / 16>([&](int i) { ptx::product(x, left + 4 * i, k + col_step(i), i > 0); });
        if (!first) {
            ptx::landed<1>(out);  // the last chunk's, whose product with P has run beside the state's
            pack(out, packed);
        }
        start<K / 16>([&](int i) { ptx::product(out, left + 4 * i, q + col_step(i), i > 0); });
        if (!first) release(c - 1), put(packed, c - 1);
        const uint32_t v_at = ptx::address(in.v) + in_tile;
#pragma unroll
        for (int j = 0; j < 4; ++j) ptx::load_transposed(v_at + j * 2048, v + 4 * j);
        columns(decay, factors.decay);
#pragma unroll
        for (int i = 0; i < 16; ++i) value[i] = ptx::unpack_bf16(v[i]);
        ptx::landed<1>(x);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            x[2 * i] = value[i].x - x[2 * i] * decay[i / 2].x;
            x[2 * i + 1] = value[i].y - x[2 * i + 1] * decay[i / 2].y;
        }
        row_powers(x, power, inverse);
#pragma unroll
        for (int i = 0; i < 16; ++i) change[i] = ptx::pack_half(x[2 * i] * inverse[i % 2], x[2 * i + 1] * inverse[i % 2]);
        start<4>([&](int i) { ptx::product_half(y, change + 4 * i, A + 2 * i, i > 0); });
        ptx::landed<1>(out);
        columns(output, factors.output);
        const float end = factors.decay[CHUNK - 1];
#pragma unroll
        for (int i = 0; i < 32; ++i) out[i] = ptx::times(out[i], i % 2 ? output[i / 4].y : output[i / 4].x);
#pragma unroll
        for (int i = 0; i < K / 2; ++i) S[i] = ptx::times(S[i], end);
        columns(rest, factors.rest);
        ptx::landed<0>(y);
    };
    auto write = [&](int c) INLINE {
        auto &in = shared.stage[c % STAGES];
        const uint64_t k = ptx::descriptor(in.k, CHUNK * 64, 512, ptx::SWIZZLE_64);
        const uint64_t P = ptx::descriptor(in.P, 16, 1024, ptx::SWIZZLE_128);
        uint32_t written[16], change[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            y[2 * i] *= power[i % 2], y[2 * i + 1] *= power[i % 2];
            written[i] = ptx::pack_bf16(y[2 * i] * rest[i / 2].x, y[2 * i + 1] * rest[i / 2].y);
        }
        start<4>([&](int i) { ptx::product_rows(S, written + 4 * i, k + 64 * i); });
        pack(y, change);
        start<4>([&](int i) { ptx::product(out, change + 4 * i, P + 2 * i, true); });
        ptx::landed<1>(S);
    };

    if (span.count > 0) {
        const int last = span.count - 1;
        predict(0, true);
        for (int c = 0; c < last; ++c) {
            write(c);
            predict(c + 1, false);
        }
        write(last);
        ptx::landed<0>(out);
        uint32_t packed[16];
        pack(out, packed);
        release(last);
        put(packed, last);
        if (thread == 0) ptx::puts_done();
    }
    if (args.final)
#pragma unroll
        for (int i = 0; i < K / 2; ++i) args.final[at(i)] = S[i];
}

__global__ void __launch_bounds__(THREADS, 1)
    forward_scan_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                        const __grid_constant__ CUtensorMap v, const __grid_constant__ CUtensorMap A,
                        const __grid_constant__ CUtensorMap P, const __grid_constant__ CUtensorMap o,
                        const __grid_constant__ Arguments args) {
    extern __shared__ __align__(1024) char memory[];
    auto &shared = *(Shared *)memory;
    const int n = blockIdx.y / args.heads, head = blockIdx.y % args.heads;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // so that the compiler knows it for the same in a warp
    const Span span = span_of(args, n);
    if (threadIdx.x == 0) {
        if (ptx::address(memory) % 1024) __trap();  // the swizzles count from there
        for (int s = 0; s < STAGES; ++s) {
            ptx::barrier_init(&shared.full[s], 2);   // the fetching thread, the factors' warp
            ptx::barrier_init(&shared.empty[s], 4);  // every warp that reads it
        }
        ptx::barriers_visible();
    }
    __syncthreads();
    if (warp >= 4) {
        const int key_block = head / (args.heads / args.key_heads) * (K / 32);
        const int value_col = head * args.values + blockIdx.x * 64;
        if (warp == 4 && threadIdx.x % 32 == 0)
            fetch_chunks(shared, &q, &k, &v, &A, &P, span, head, args.heads, key_block, value_col);
        if (warp == 5) make_factors(shared, args, span, head);
        __syncwarp();
    } else {
        scan(shared, &o, args, span, n, head);
    }
}

// Host ---------------------------------------------------------------------------------------------------------------

using Encode = decltype(&cuTensorMapEncodeTiled);

// x as rows of `cols` elements of 16 bits, in boxes of 64 by 64; or (`blocked`) of 64 rows by K columns, 32 by 32
bool make_map(Encode encode, CUtensorMap *map, const void *x, CUtensorMapDataType type, long rows, long cols, bool blocked) {
    const cuuint64_t dims[3] = {blocked ? 32u : (cuuint64_t)cols, (cuuint64_t)rows, (cuuint64_t)cols / 32};
    const cuuint64_t strides[2] = {(cuuint64_t)cols * 2, 64};
    const cuuint32_t box[3] = {blocked ? 32u : 64u, CHUNK, K / 32}, step[3] = {1, 1, 1};
    const auto swizzle = blocked ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B;
    return encode(map, type, blocked ? 3 : 2, (void *)x, dims, strides, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

cudaError_t launch(const void *q, const void *k, const void *v, const void *A, const void *P, const Arguments &args, long rows,
                   long tiles, int sequences, cudaStream_t stream) {
    static void *encode = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaError_t error = cudaSuccess;
    if (!encode)
        error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found);
    if (error == cudaSuccess)  // once a device, but it costs next to nothing
        error = cudaFuncSetAttribute(forward_scan_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
    if (error != cudaSuccess) return error;
    CUtensorMap maps[6];  // q, k, v, A, P, o
    const auto BF16 = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, HALF = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const long keys = (long)args.key_heads * K, values = (long)args.heads * args.values;
    auto map = [&](int i, const void *x, CUtensorMapDataType type, long rows, long cols, bool blocked) {
        return make_map((Encode)encode, &maps[i], x, type, rows, cols, blocked);
    };
    if (!map(0, q, BF16, rows, keys, true) || !map(1, k, BF16, rows, keys, true) || !map(2, v, BF16, rows, values, false) ||
        !map(3, A, HALF, tiles * CHUNK, 64, false) || !map(4, P, BF16, tiles * CHUNK, 64, false) ||
        !map(5, args.o, BF16, rows, values, false))
        return cudaErrorInvalidValue;
    const dim3 blocks(args.values / 64, sequences * args.heads);
    forward_scan_kernel<<<blocks, THREADS, sizeof(Shared), stream>>>(maps[0], maps[1], maps[2], maps[3], maps[4], maps[5], args);
    return cudaGetLastError();
}

}  // namespace

// q, k [rows, key heads, K], v [rows, heads, V] bf16; A fp16, P bf16 [tiles, 64, 64]. Returns null, or what went wrong.
extern "C" const char *forward_scan(const void *q, const void *k, const void *v, const void *A, const void *P,
                                    const Arguments *args, long rows, long tiles, int sequences, void *stream) {
    const cudaError_t error = launch(q, k, v, A, P, *args, rows, tiles, sequences, (cudaStream_t)stream);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
