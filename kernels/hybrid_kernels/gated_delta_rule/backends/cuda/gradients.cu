// Last kernel of the backward pass (backends/triton/gradients.py has the formulas): dq, dk, dg and dbeta of every chunk, from the
// results of the scans. Blocks are persistent, one per SM, with one role per warp (gradients.cuh).
//
// One warpgroup accumulates dP, R and dq. The other accumulates the two parts of dk: `early`, whose decay grows with G (dz S, R k), and
// `late`, whose decay shrinks (new^T dS, dP^T q, R^T k). The first hands dP and R to the second in bf16, through shared memory. Left
// operands are in shared memory, so that GEMMs of the next tile start before those of the last have landed.
#include "gradients.cuh"
#include "maps.cuh"

namespace {

// Distance of 16 columns or rows of a square tile, and of 16 rows of a tile in blocks, in descriptors
constexpr int COLUMNS = 2, ROWS = 128, KEY_ROWS = 64;

__device__ __forceinline__ uint64_t square(const char *tile) { return ptx::descriptor(tile, 16, 1024, ptx::SWIZZLE_128); }

__device__ __forceinline__ uint64_t blocks(const char *tile) { return ptx::descriptor(tile, CHUNK * 64, 512, ptx::SWIZZLE_64); }

// acc [64, N] (+)= a [64, 64] b [64, N]. A: whether the sum is over a's columns or, transposed, over its rows.
template <int A, int B, int N>
__device__ __forceinline__ void multiply(float (&acc)[N], uint64_t a, uint64_t b, bool add = true) {
#pragma unroll
    for (int step = 0; step < 4; ++step) ptx::shared_product<A == ROWS>(acc, a + A * step, b + B * step, add || step > 0);
}

// A thread that runs GEMMs. Of an accumulator [64 tokens, N] it has rows `row(0)` and `row(1)` of its warp's 16 and columns
// 8 j + 2 (lane % 4) (+ 1); element i is in row i / 2 % 2.
template <int BARRIER>
struct Multiplier {
    Shared &shared;
    const Given &given;
    int units, thread, warp, lane;

    __device__ __forceinline__ Multiplier(Shared &shared, const Given &given, int units)
        : shared(shared), given(given), units(units), thread(threadIdx.x % GROUP), warp(thread / 32), lane(thread % 32) {}

    __device__ __forceinline__ int row(int half) const { return warp * 16 + lane / 4 + 8 * half; }

    __device__ __forceinline__ void rows(float (&x)[2], const float (&of)[CHUNK]) const { x[0] = of[row(0)], x[1] = of[row(1)]; }

    __device__ __forceinline__ void synchronize() const { ptx::named_barrier(BARRIER, GROUP); }

    // Run a unit's GEMMs over all values. `multiply(stage, add)` issues those of a tile, and `begun()` runs during the first tile's.
    // Those of the last tile are still in flight at the end.
    template <class Multiply, class Begun>
    __device__ __forceinline__ void over_values(unsigned &tile, Multiply multiply, Begun begun) const {
        for (int v = 0; v < given.values; v += 64, ++tile) {
            await(shared.full, tile);
            ptx::products_follow();
            multiply(shared.stage[tile % Shared::STAGES], v > 0);
            ptx::commit();
            __syncwarp();
            if (v == 0) {
                begun();
            } else {
                ptx::landed<1>();
                warp_arrives(&shared.empty[(tile - 1) % Shared::STAGES]);
            }
        }
    }

    // sums[token] = sum over the columns of keys [tokens, K] times x(element); zero past the end
    template <class X>
    __device__ __forceinline__ void multiply_rows(float (&sums)[CHUNK], const char *keys, X x, int valid) const {
        float sum[2] = {};
#pragma unroll
        for (int j = 0; j < K / 8; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const char *at = keys + j / 4 * CHUNK * 64 + row(half) * 64 + ((j % 4) ^ lane / 8) * 16 + lane % 4 * 4;
                const float2 pair = ptx::unpack_bf16(*(const uint32_t *)at);
                sum[half] += pair.x * x(4 * j + 2 * half);
                sum[half] += pair.y * x(4 * j + 2 * half + 1);
            }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
            sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
            if (lane % 4 == 0) sums[row(half)] = row(half) < valid ? sum[half] : 0.0f;
        }
    }

    // Copy a tile [64 tokens, K] that the warpgroup has written to global memory.
    __device__ __forceinline__ void put(const CUtensorMap *map, __nv_bfloat16 *out, const char *tile, const Place &at) const {
        ptx::shared_visible_to_copies();
        synchronize();
        if (at.valid == CHUNK) {
            if (thread == 0) ptx::put(map, tile, 0, at.start, at.head * (K / 32));
            return;
        }
        // rows beyond the end belong to another sequence, or to none
        for (int i = thread; i < at.valid * (K / 8); i += GROUP) {
            const int t = i / (K / 8), piece = i % (K / 8);
            *(uint4 *)(out + ((long)(at.start + t) * given.sizes.heads + at.head) * K + 8 * piece) =
                *(const uint4 *)(tile + piece / 4 * CHUNK * 64 + t * 64 + ((piece % 4) ^ t / 2 % 4) * 16);
        }
        synchronize();
    }
};

// Multiply dP and R by their decays, zero where a token does not see the other, and pack them. Store R's diagonal.
__device__ __forceinline__ void weigh(const Multiplier<1> &me, Unit &unit, const float (&dP)[32], const float (&R)[32], uint32_t (&p)[16],
                                      uint32_t (&r)[16]) {
    const int first[2] = {unit.first[me.row(0)], unit.first[me.row(1)]};
    const float scale = me.given.sizes.scale;
    float G[2], diagonal[2] = {};
    me.rows(G, unit.G);
#pragma unroll
    for (int j = 0; j < 16; ++j) {
        const int half = j % 2, row = me.row(half), col = j / 2 * 8 + me.lane % 4 * 2;
        const float2 others = *(const float2 *)&unit.G[col];
        float x[2], y[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float between = ptx::exp2(G[half] - (i ? others.y : others.x));
            const bool seen = col + i <= row && col + i >= first[half], same = col + i == row;
            x[i] = seen ? dP[2 * j + i] * between * scale : 0.0f;
            y[i] = seen && !same ? -R[2 * j + i] * between : 0.0f;
            if (same) diagonal[half] = R[2 * j + i];
        }
        p[j] = ptx::pack_bf16(x[0], x[1]);
        r[j] = ptx::pack_bf16(y[0], y[1]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
        if (me.lane / 8 == me.lane % 4) unit.diagonal[me.row(half)] = diagonal[half];
}

__device__ __forceinline__ void make_dq(const Multiplier<1> &me, const Maps &maps, __nv_bfloat16 *out) {
    Shared &shared = me.shared;
    float dP[32], R[32], dq[K / 2];
    unsigned tile = 0;
    for (unsigned i = 0, n = blockIdx.x; n < me.units; ++i, n += gridDim.x) {
        me.over_values(tile, [&](const Stage &in, bool add) INLINE {
            const uint64_t news = square(in.new_values);
            multiply<COLUMNS, ROWS>(dP, square(in.d_o), news, add);
            multiply<COLUMNS, ROWS>(R, square(in.dz), news, add);
            multiply<COLUMNS, KEY_ROWS>(dq, square(in.d_o), blocks(in.S), add);
        }, [] {});
        ptx::landed<0>(dP), ptx::landed<0>(R), ptx::landed<0>(dq);
        warp_arrives(&shared.empty[(tile - 1) % Shared::STAGES]);

        Unit &unit = shared.unit[i % 2];
        const Keys &keys = shared.keys[i % 2];
        uint32_t p[16], r[16], packed[K / 4];
        float decay[2];
        await(shared.loaded, i);
        const Place place = unit.place;
        weigh(me, unit, dP, R, p, r);
        await(shared.no_scores, i, true);
        store_square(shared.dP, me.warp, me.lane, p);
        store_square(shared.R, me.warp, me.lane, r);
        ptx::shared_visible_to_copies();
        warp_arrives(shared.scores);
        me.rows(decay, unit.from_start);
#pragma unroll
        for (int j = 0; j < K / 2; ++j) dq[j] = dq[j] * (decay[j / 2 % 2] * me.given.sizes.scale);
        const uint64_t k = blocks(keys.k);
        start<4>([&](int s) INLINE { ptx::product_rows(dq, p + 4 * s, k + KEY_ROWS * s); });
        ptx::landed<0>(dq);
        me.multiply_rows(unit.of_q, keys.q, [&](int j) INLINE { return dq[j]; }, place.valid);
        warp_arrives(&shared.summed[i % 2]);
        pack(dq, packed);
        if (me.thread == 0) ptx::puts_read();
        me.synchronize();  // the last dq has left
        store_blocks(shared.dq, me.warp, me.lane, packed);
        me.put(&maps.dq, out, shared.dq, place);
    }
    if (me.thread == 0) ptx::puts_done();
}

__device__ __forceinline__ void make_dk(const Multiplier<2> &me, const Maps &maps, __nv_bfloat16 *out) {
    Shared &shared = me.shared;
    float early[K / 2], late[K / 2];  // terms with a decay that grows with G, and with one that shrinks
    unsigned tile = 0;
    for (unsigned i = 0, n = blockIdx.x; n < me.units; ++i, n += gridDim.x) {
        me.over_values(tile, [&](const Stage &in, bool add) INLINE {
            multiply<COLUMNS, KEY_ROWS>(early, square(in.dz), blocks(in.S), add);
            multiply<ROWS, KEY_ROWS>(late, square(in.new_values), blocks(in.dS), add);
        }, [&] INLINE {
            if (i == 0) return;
            if (me.thread == 0) {  // the last dk has left
                ptx::puts_read();
                ptx::arrive(shared.no_scores);
            }
            __syncwarp();
        });
        ptx::landed<0>(early), ptx::landed<0>(late);
        warp_arrives(&shared.empty[(tile - 1) % Shared::STAGES]);

        Unit &unit = shared.unit[i % 2];
        const Keys &keys = shared.keys[i % 2];
        uint32_t packed[K / 4];
        float from_start[2], to_end[2];
        await(shared.loaded, i);
        const Place place = unit.place;
        me.rows(from_start, unit.from_start);
        me.rows(to_end, unit.to_end);
#pragma unroll
        for (int j = 0; j < K / 2; ++j) early[j] *= -from_start[j / 2 % 2], late[j] *= to_end[j / 2 % 2];
        me.multiply_rows(unit.at_end, keys.k, [&](int j) INLINE { return late[j]; }, place.valid);
        await(shared.scores, i);
        ptx::products_follow();
        multiply<COLUMNS, KEY_ROWS>(early, square(shared.R), blocks(keys.k));
        multiply<ROWS, KEY_ROWS>(late, square(shared.dP), blocks(keys.q));
        multiply<ROWS, KEY_ROWS>(late, square(shared.R), blocks(keys.k));
        ptx::commit();
        __syncwarp();
        ptx::landed<0>(early), ptx::landed<0>(late);
        me.multiply_rows(unit.of_k, keys.k, [&](int j) INLINE { return early[j] - late[j]; }, place.valid);
        warp_arrives(&shared.summed[i % 2]);
#pragma unroll
        for (int j = 0; j < K / 4; ++j)
            packed[j] = ptx::pack_bf16(early[2 * j] + late[2 * j], early[2 * j + 1] + late[2 * j + 1]);
        me.synchronize();  // all warps have read dP and R
        store_blocks(shared.dP, me.warp, me.lane, packed);
        me.put(&maps.dk, out, shared.dP, place);
    }
    if (me.thread == 0) ptx::puts_done();
}

__global__ void __launch_bounds__(THREADS, 1)
    gradients_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Given given, const __grid_constant__ Results results) {
#ifdef __CUDACC__
    extern __shared__ __align__(1024) char memory[];
#else
    char *memory = cpu::memory;
#endif
    Shared &shared = *(Shared *)memory;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // so that the compiler knows it for the same in a warp
    if (threadIdx.x == 0) {
        if (ptx::address(memory) % 1024) __trap();  // the swizzles count from there
        begin_barriers(shared);
    }
    __syncthreads();
    const int units = count_units(given);
    if (warp < WARPS / 2) {
        ptx::take_registers<REGISTERS>();
        make_dq(Multiplier<1>(shared, given, units), maps, results.dq);
    } else if (warp < WARPS) {
        ptx::take_registers<REGISTERS>();
        make_dk(Multiplier<2>(shared, given, units), maps, results.dk);
    } else {
        ptx::leave_registers<REGISTERS_LEFT>();
        if (warp == WARPS && threadIdx.x % 32 == 0) fetch_units(shared, maps, given, units);
        if (warp == WARPS + 1) run_gates(shared, given, results, units);
        if (warp >= WARPS + 2) sum_states(shared, given, units, warp - WARPS - 2);
        __syncwarp();
    }
}

}  // namespace

#ifdef __CUDACC__
// q, k [rows, key heads, K], do, dv [rows, heads, V], states and dstates [units, V, K], new values [units, V, 64] bf16. Writes dq, dk
// [rows, heads, K] bf16, dg and dbeta [rows, heads] fp32. A unit is a chunk of a head. Returns null, or the error.
extern "C" const char *gradients(const void *q, const void *k, const void *d_o, const void *dv, const void *states,
                                 const void *new_values, const void *dstates, void *dq, void *dk, void *dg, void *dbeta,
                                 const Given *given, int rows, void *stream) {
    Encode encode;
    int device, processors;
    cudaError_t error = find_encode(encode);
    if (error == cudaSuccess) error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess)  // needed once per device; it costs next to nothing
        error = cudaFuncSetAttribute(gradients_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
    if (error != cudaSuccess) return cudaGetErrorString(error);
    const int heads = given->sizes.heads;
    const long units = (long)given->count * heads, keys = (long)given->sizes.key_heads * K, values = (long)heads * given->values;
    Maps maps{};
    auto map = [&](CUtensorMap *to, const void *x, long rows, long cols, bool blocked) {
        return make_map(encode, to, x, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rows, cols, blocked);
    };
    if (!map(&maps.q, q, rows, keys, true) || !map(&maps.k, k, rows, keys, true) || !map(&maps.d_o, d_o, rows, values, false) ||
        !map(&maps.dz, dv, rows, values, false) || !map(&maps.new_values, new_values, units * given->values, 64, false) ||
        !map(&maps.S, states, units * given->values, K, true) || !map(&maps.dS, dstates, units * given->values, K, true) ||
        !map(&maps.dq, dq, rows, (long)heads * K, true) || !map(&maps.dk, dk, rows, (long)heads * K, true))
        return cudaGetErrorString(cudaErrorInvalidValue);
    const Results results{(__nv_bfloat16 *)dq, (__nv_bfloat16 *)dk, (float *)dg, (float *)dbeta};
    gradients_kernel<<<min(units, (long)processors), THREADS, sizeof(Shared), (cudaStream_t)stream>>>(maps, *given, results);
    error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif
