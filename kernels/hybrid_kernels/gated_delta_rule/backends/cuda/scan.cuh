// Parts of the two scans in CUDA C++: the chunks of a block, the warps that load its operands, and how its tiles leave.
//
// A block carries a state S^T [64 values, K] in the registers of one warpgroup along a head's chunks of 64 tokens. One more warp
// fetches the chunks' tiles a few chunks ahead, and one turns the running gate sums G into factors. k serves both in S^T k^T and, read
// in the other direction, in S^T += x k.
#pragma once
#include "warpgroup.cuh"

struct Arguments {
    const float *G, *begin;       // begin: the states before the first chunks [sequences, H, K, V], or null for zero
    float *end;                   // the states after the last chunks [sequences, H, K, width], or null
    __nv_bfloat16 *out;           // [rows, H, V], or null
    const int *cu, *first_chunk;  // of packed sequences, or null
    float scale;
    int length, chunks, segments, heads, key_heads, values;  // length, chunks, segments: per batch row; values: V
    int width;  // V, or more: then blocks past V carry the identity without values, and end with the transition [K, K]
    int documents;  // G has three rows per chunk and head (backends/triton/prepare.py)
};

namespace {

constexpr int SCANNERS = 128, THREADS = SCANNERS + 64;

struct Maps {
    CUtensorMap q, k, v, A, P;  // v: do in the reverse scan
    CUtensorMap out, states, changes;
};

struct Span {
    int start, end, first, count;  // first token, end of its tokens, first chunk, chunks
};

__device__ Span span_of(const Arguments &a, int n) {
    if (a.cu) return {a.cu[n], a.cu[n + 1], a.first_chunk[n], a.first_chunk[n + 1] - a.first_chunk[n]};
    const int row = n / a.segments, per = (a.chunks + a.segments - 1) / a.segments, before = n % a.segments * per;
    return {row * a.length + before * CHUNK, (row + 1) * a.length, row * a.chunks + before, min(per, a.chunks - before)};
}

// This block carries the identity. Its values are zeros, which the bulk copies read beyond the last column.
__device__ __forceinline__ bool is_transition(const Arguments &a) { return blockIdx.x * 64 >= a.values; }

struct alignas(1024) KeyedStage {
    char k[KEYS], A[SQUARE], v[SQUARE];
};

struct alignas(1024) QueriedStage : KeyedStage {
    char q[KEYS], P[SQUARE];
};

template <bool QUERIES>
struct StageOf {
    using type = KeyedStage;
};

template <>
struct StageOf<true> {
    using type = QueriedStage;
};

// OUTPUT: q and P are loaded, and tiles [64 tokens, 64 values] are stored. STATES and CHANGES are stored transposed: [values, K]
// and [values, 64].
template <bool OUTPUT_, bool STATES, bool CHANGES>
struct Shared {
    static constexpr bool OUTPUT = OUTPUT_;
    using Stage = typename StageOf<OUTPUT>::type;
    static constexpr int SENT = 2 * ((OUTPUT + CHANGES) * SQUARE + STATES * KEYS) + 1024;  // bytes of all but the stages
    static constexpr int fitting(int stages) { return stages * (int)(sizeof(Stage) + 1024) + SENT <= MEMORY ? stages : fitting(stages - 1); }
    static constexpr int STAGES = fitting(4);
    Stage stage[STAGES];
    alignas(1024) char out[OUTPUT ? 2 : 0][SQUARE];  // two of each take turns
    alignas(1024) char states[STATES ? 2 : 0][KEYS];
    alignas(1024) char changes[CHANGES ? 2 : 0][SQUARE];
    struct Factors {
        float decay[CHUNK], rest[CHUNK], output[CHUNK];  // exp(G), exp(G_end - G), scale exp(G) or 0 past the end of the tokens
    } factors[STAGES];
    uint64_t full[STAGES], empty[STAGES];
};

// Chunks in the order of the scan: the i-th is chunk i, or from the last on.
template <bool REVERSE>
__device__ __forceinline__ int chunk_of(const Span &span, int i) {
    return REVERSE ? span.count - 1 - i : i;
}

// One thread: the copies of every chunk.
template <bool REVERSE, class Shared>
__device__ void fetch_chunks(Shared &shared, const Maps &maps, Span span, int head, int heads, int key_block, int value_col) {
    for (unsigned i = 0; i < span.count; ++i) {
        auto &to = shared.stage[i % Shared::STAGES];
        uint64_t *full = &shared.full[i % Shared::STAGES];
        const int c = chunk_of<REVERSE>(span, i), token = span.start + c * CHUNK, row = ((span.first + c) * heads + head) * CHUNK;
        await(shared.empty, i, true);
        ptx::expect_bytes(full, sizeof(to));
        ptx::fetch(&maps.k, to.k, full, 0, token, key_block);
        ptx::fetch(&maps.v, to.v, full, value_col, token);
        if constexpr (Shared::OUTPUT) ptx::fetch(&maps.q, to.q, full, 0, token, key_block);
        ptx::fetch(&maps.A, to.A, full, 0, row);
        if constexpr (Shared::OUTPUT) ptx::fetch(&maps.P, to.P, full, 0, row);
    }
}

// One warp: the gate factors of every chunk, two tokens per lane, loaded one chunk ahead.
template <bool REVERSE, class Shared>
__device__ void make_factors(Shared &shared, const Arguments &args, Span span, int head) {
    const int lane = threadIdx.x % 32;
    struct Gates {
        float2 from_start, to_end;  // to_end: with documents
    };
    auto gates = [&](int i) {
        Gates out{};
        if (i >= span.count) return out;
        const long tile = (long)(span.first + chunk_of<REVERSE>(span, i)) * args.heads + head;
        const float *row = args.documents ? args.G + (3 * tile + 1) * CHUNK + 2 * lane : args.G + tile * CHUNK + 2 * lane;
        out.from_start = *(const float2 *)row;
        if (args.documents) out.to_end = *(const float2 *)(row + CHUNK);
        return out;
    };
    Gates next = gates(0);
    for (unsigned i = 0; i < span.count; ++i) {
        const float2 g = next.from_start;
        float2 to_end = next.to_end;
        next = gates(i + 1);
        const float end = __shfl_sync(~0u, g.y, 31);
        if (!args.documents) to_end = make_float2(end - g.x, end - g.y);
        const float2 decay = make_float2(ptx::exp2(g.x), ptx::exp2(g.y));
        // a chunk may reach into the next sequence, where q and do belong to another state; only their GEMM mixes the two
        const int left = span.end - span.start - chunk_of<REVERSE>(span, i) * CHUNK - 2 * lane;
        auto &to = shared.factors[i % Shared::STAGES];
        await(shared.empty, i, true);
        ((float2 *)to.decay)[lane] = decay;
        ((float2 *)to.rest)[lane] = make_float2(ptx::exp2(to_end.x), ptx::exp2(to_end.y));
        ((float2 *)to.output)[lane] =
            make_float2(left > 0 ? decay.x * args.scale : 0.0f, left > 1 ? decay.y * args.scale : 0.0f);
        __syncwarp();
        if (lane == 0) ptx::arrive(&shared.full[i % Shared::STAGES]);
    }
}

// For this thread's two rows of x [64 values, 64 tokens]: the power of two that brings the row's largest entry to [1, 2), and its
// inverse. The row is divided by it before conversion to fp16. See half_rows in triton_support.py.
__device__ __forceinline__ void row_powers(const float (&x)[32], float (&power)[2], float (&inverse)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float m[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) m[j] = fmaxf(fabsf(x[4 * j + 2 * row]), fabsf(x[4 * j + 2 * row + 1]));
#pragma unroll
        for (int step = 4; step; step /= 2)
#pragma unroll
            for (int j = 0; j < step; ++j) m[j] = fmaxf(m[j], m[j + step]);
        float most = fmaxf(m[0], __shfl_xor_sync(~0u, m[0], 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        power[row] = __int_as_float(__float_as_int(most) & 0x7F800000);
        inverse[row] = __int_as_float(0x7F000000 - __float_as_int(power[row]));
    }
}

// One of the threads that run GEMMs. Of an accumulator [64 values, N] it has rows lane / 4 (+ 8) of its warp's 16 and columns
// 8 j + 2 (lane % 4) (+ 1): packed in pairs it is the left operand of the next product as it stands.
struct Scanner {
    const Maps &maps;
    const Arguments &args;
    const Span &span;
    int head, thread, warp, lane, value_col;
    long state_row;  // first row of its state in `begin` and `end`
    int transposed;  // offset of its row of the 8 x 8 matrices in a tile [64 tokens, 64 values]

    __device__ __forceinline__ Scanner(const Maps &maps, const Arguments &args, const Span &span, int n, int head)
        : maps(maps), args(args), span(span), head(head), thread(threadIdx.x % SCANNERS),  // % so that it is known to be >= 0
          warp(thread / 32), lane(thread % 32), value_col(head * args.values + blockIdx.x * 64),
          state_row(((long)n * args.heads + head) * K),
          transposed((lane / 16 * 8 + lane % 8) * 128 + ((2 * warp + lane / 8 % 2) ^ lane % 8) * 16) {}

    // Of element i of S^T in this thread: its key, and its value among all columns
    __device__ __forceinline__ int key(int i) const { return i / 4 * 8 + lane % 4 * 2 + i % 2; }
    __device__ __forceinline__ int value(int i) const { return blockIdx.x * 64 + warp * 16 + lane / 4 + i / 2 % 2 * 8; }
    __device__ __forceinline__ long at(int i, int width) const { return (state_row + key(i)) * width + value(i); }

    __device__ __forceinline__ void begin(float (&S)[K / 2]) const {
        const bool identity = is_transition(args);
#pragma unroll
        for (int i = 0; i < K / 2; ++i)
            S[i] = identity ? (float)(value(i) - args.values == key(i)) : args.begin ? args.begin[at(i, args.values)] : 0.0f;
    }
    __device__ __forceinline__ void end(const float (&S)[K / 2]) const {
        if (args.end)
#pragma unroll
            for (int i = 0; i < K / 2; ++i) args.end[at(i, args.width)] = S[i];
    }
    __device__ __forceinline__ void columns(float2 (&f)[8], const float (&of)[CHUNK]) const {  // this thread's
#pragma unroll
        for (int j = 0; j < 8; ++j) f[j] = ((const float2 *)of)[4 * j + lane % 4];
    }
    __device__ __forceinline__ void release(uint64_t *empty) const {  // this warp is done with a stage
        if (lane == 0) ptx::arrive(empty);
    }

    // Tiles in shared memory ---------------------------------------------------------------------------------------

    __device__ __forceinline__ void load_transposed(const char *tile, uint32_t (&packed)[16]) const {
#pragma unroll
        for (int j = 0; j < 4; ++j) ptx::load_transposed(ptx::address(tile) + transposed + j * 2048, packed + 4 * j);
    }
    __device__ __forceinline__ void store_transposed(char *tile, const uint32_t (&packed)[16]) const {
#pragma unroll
        for (int j = 0; j < 4; ++j) ptx::store_transposed(ptx::address(tile) + transposed + j * 2048, packed + 4 * j);
    }
    __device__ __forceinline__ void store_change(char *tile, const uint32_t (&packed)[16]) const {  // [64 values, 64 tokens]
        store_square(tile, warp, lane, packed);
    }
    __device__ __forceinline__ void store_state(char *tile, const uint32_t (&packed)[K / 4]) const {  // [64 values, K]
        store_blocks(tile, warp, lane, packed);
    }

    // From there to global memory. After `hand_over`, what all threads have written may be copied, and what was copied since the last
    // call may be overwritten.

    __device__ __forceinline__ void hand_over() const {
        ptx::shared_visible_to_copies();
        if (thread == 0) ptx::puts_read();
        ptx::named_barrier(1, SCANNERS);
    }
    __device__ __forceinline__ int row(int c) const {  // of chunk c in `states` and `changes`
        return ((span.first + c) * args.heads + head) * args.values + blockIdx.x * 64;
    }
    __device__ __forceinline__ void put_state(const char *tile, int c) const {
        if (thread == 0) ptx::put(&maps.states, tile, 0, row(c), 0);
    }
    __device__ __forceinline__ void put_change(const char *tile, int c) const {
        if (thread == 0) ptx::put(&maps.changes, tile, 0, row(c));
    }
    __device__ __forceinline__ void put_out(const char *tile, int c) const {
        const int row = span.start + c * CHUNK;
        if (row + CHUNK <= span.end) {
            if (thread == 0) ptx::put(&maps.out, tile, value_col, row);
        } else {  // rows beyond the end belong to another sequence, or to none
            for (int i = thread; i < 8 * (span.end - row); i += SCANNERS) {
                const int t = i / 8, col = i % 8;
                *(uint4 *)(args.out + (long)(row + t) * args.heads * args.values + value_col + 8 * col) =
                    *(const uint4 *)(tile + t * 128 + (col ^ t % 8) * 16);
            }
        }
    }
};

// The roles of a block. `scan(shared, scanner)` is the warpgroup's.
template <bool REVERSE, class Shared, class Scan>
__device__ __forceinline__ void run_block(const Maps &maps, const Arguments &args, Scan scan) {
#ifdef __CUDACC__
    extern __shared__ __align__(1024) char memory[];
#else
    char *memory = cpu::memory;
#endif
    auto &shared = *(Shared *)memory;
    const int n = blockIdx.y / args.heads, head = blockIdx.y % args.heads;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // so that the compiler knows it for the same in a warp
    const Span span = span_of(args, n);
    if (threadIdx.x == 0) {
        if (ptx::address(memory) % 1024) __trap();  // the swizzles count from there
        for (int s = 0; s < Shared::STAGES; ++s) {
            ptx::barrier_init(&shared.full[s], 2);   // the fetching thread, the factors' warp
            ptx::barrier_init(&shared.empty[s], 4);  // every warp that reads it
        }
        ptx::barriers_visible();
    }
    __syncthreads();
    if (warp >= 4) {
        const int key_block = head / (args.heads / args.key_heads) * (K / 32);
        const int value_col = is_transition(args) ? args.heads * args.values : head * args.values + blockIdx.x * 64;
        if (warp == 4 && threadIdx.x % 32 == 0)
            fetch_chunks<REVERSE>(shared, maps, span, head, args.heads, key_block, value_col);
        if (warp == 5) make_factors<REVERSE>(shared, args, span, head);
        __syncwarp();
    } else {
        scan(shared, Scanner(maps, args, span, n, head));
    }
}

}  // namespace
