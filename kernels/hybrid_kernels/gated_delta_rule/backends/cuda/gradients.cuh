// Parts of the gradients kernel (gradients.cu): the shared memory of its warps, and the warps that run no GEMM.
//
// A unit is a chunk of 64 tokens of one head. A block runs one unit after another. One warp fetches tiles, up to one unit ahead, so that
// copies overlap with the end of the unit before. One warp computes the gate factors of a unit, and its dg and dbeta after the GEMMs.
// Two warps compute <dS, S>, the gradient of the decay of the whole chunk.
#pragma once
#include "warpgroup.cuh"

struct Given {
    Sizes sizes;
    const float *G, *beta;         // [units, 64] or, with documents, [units, 3, 64]; [rows, heads]
    int values, count, sequences;  // V; chunks; packed sequences
};

struct Results {
    __nv_bfloat16 *dq, *dk;  // [rows, heads, K]
    float *dg, *dbeta;       // [rows, heads]
};

namespace {

constexpr int GROUP = 128, THREADS = 3 * GROUP;      // two warpgroups run GEMMs
constexpr int WARPS = 8, SUMMERS = 2;                // warps that run GEMMs, and that sum dS S
constexpr int REGISTERS = 232, REGISTERS_LEFT = 40;  // per thread of the first two warpgroups, and of the third
static_assert(2 * REGISTERS + REGISTERS_LEFT <= 3 * (65536 / THREADS / 8 * 8));

struct Maps {
    CUtensorMap q, k, d_o, dz, new_values, S, dS;
    CUtensorMap dq, dk;
};

// Tiles of 64 values
struct alignas(1024) Stage {
    char d_o[SQUARE], dz[SQUARE];  // [tokens, values]
    char new_values[SQUARE];       // [values, tokens]
    char S[KEYS], dS[KEYS];        // [values, K]
};

struct alignas(1024) Keys {
    char q[KEYS], k[KEYS];
};

struct Place {
    int start, valid, head;  // first token of a unit, and its number of tokens
};

// Numbers per token. The gates' warp writes the first half for the warps that run GEMMs, and reads their sums in the second.
struct alignas(16) Unit {
    float G[CHUNK], from_start[CHUNK], to_end[CHUNK];  // G: logarithm; the others: decays
    float beta[CHUNK];                                 // rounded as on A's diagonal, so that the rounding cancels
    int position[CHUNK + 1];                           // in the token's document
    int first[CHUNK];                                  // first token that this one sees; past the end, no token is seen
    Place place;
    float of_q[CHUNK], of_k[CHUNK];  // q dq, and k times the difference of dk's parts: the gradient of G
    float at_end[CHUNK];             // k times the part of dk that comes from the state at the end
    float diagonal[CHUNK];           // of R
    float states[SUMMERS];           // parts of <dS, S>
};

constexpr int stages_that_fit(int stages) {
    const int bytes = stages * (int)sizeof(Stage) + 2 * (int)(sizeof(Keys) + sizeof(Unit)) + 2 * SQUARE + KEYS + 1024;
    return bytes <= MEMORY ? stages : stages_that_fit(stages - 1);
}

struct Shared {
    static constexpr int STAGES = stages_that_fit(4);
    Stage stage[STAGES];
    Keys keys[2];  // units use the two in turn
    Unit unit[2];
    alignas(1024) char dP[SQUARE], R[SQUARE];  // [tokens, tokens]; then dk, over both
    alignas(1024) char dq[KEYS];
    uint64_t full[STAGES], empty[STAGES];  // of `stage`
    uint64_t loaded[2], summed[2];         // of `keys` and `unit`: they are written; the GEMMs are done and the sums written
    uint64_t scores[1], no_scores[1];      // dP and R are written; they are read, and dk is copied
};
static_assert(sizeof(Shared) <= MEMORY && 2 * SQUARE >= KEYS);

__device__ __forceinline__ void begin_barriers(Shared &shared) {
    for (int s = 0; s < Shared::STAGES; ++s) {
        ptx::barrier_init(&shared.full[s], 1);  // the fetching thread
        ptx::barrier_init(&shared.empty[s], WARPS + SUMMERS);
    }
    for (int s = 0; s < 2; ++s) {
        ptx::barrier_init(&shared.loaded[s], 2);  // the fetching thread, the gates' warp
        ptx::barrier_init(&shared.summed[s], WARPS + SUMMERS);
    }
    ptx::barrier_init(shared.scores, WARPS / 2);
    ptx::barrier_init(shared.no_scores, 1);
    ptx::barriers_visible();
}

// Number of units, without the chunks past the last packed sequence
__device__ __forceinline__ int count_units(const Given &given) {
    const Sizes &sizes = given.sizes;
    return (sizes.cu ? sizes.first_chunk[given.sequences] : given.count) * sizes.heads;
}

__device__ __forceinline__ void warp_arrives(uint64_t *barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::arrive(barrier);
}

// One thread: fetch the tiles of all units of the block.
__device__ __forceinline__ void fetch_units(Shared &shared, const Maps &maps, const Given &given, int units) {
    const int heads = given.sizes.heads, group = heads / given.sizes.key_heads;
    auto start_of = [&](int unit) { return unit < units ? tokens_of(given.sizes, unit / heads).start : 0; };
    int next = start_of(blockIdx.x);
    unsigned tile = 0;
    for (unsigned i = 0, unit = blockIdx.x; unit < units; ++i, unit += gridDim.x) {
        const int head = unit % heads, token = next;
        next = start_of(unit + gridDim.x);  // ahead: with packed sequences, loads wait for loads
        for (int v = 0; v < given.values; v += 64, ++tile) {
            auto &to = shared.stage[tile % Shared::STAGES];
            uint64_t *full = &shared.full[tile % Shared::STAGES];
            const int col = head * given.values + v, row = unit * given.values + v;
            await(shared.empty, tile, true);
            ptx::expect_bytes(full, sizeof(to));
            ptx::fetch(&maps.d_o, to.d_o, full, col, token);
            ptx::fetch(&maps.new_values, to.new_values, full, 0, row);
            ptx::fetch(&maps.dz, to.dz, full, col, token);
            ptx::fetch(&maps.S, to.S, full, 0, row, 0);
            ptx::fetch(&maps.dS, to.dS, full, 0, row, 0);
        }
        auto &to = shared.keys[i % 2];
        uint64_t *loaded = &shared.loaded[i % 2];
        await(shared.summed, i, true);
        ptx::expect_bytes(loaded, sizeof(to));
        ptx::fetch(&maps.q, to.q, loaded, 0, token, head / group * (K / 32));
        ptx::fetch(&maps.k, to.k, loaded, 0, token, head / group * (K / 32));
    }
}

// Write what the GEMMs of a unit need to know of its tokens. Two tokens per lane.
__device__ __forceinline__ void load_gates(Unit &to, const Given &given, int unit) {
    const Sizes &sizes = given.sizes;
    const int head = unit % sizes.heads, lane = threadIdx.x % 32;
    const Tokens tokens = tokens_of(sizes, unit / sizes.heads);
    const int *positions = sizes.positions ? sizes.positions + tokens.start : nullptr;
    const float *row = given.G + (long)unit * (positions ? 3 : 1) * CHUNK;
    const float end = row[CHUNK - 1];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int t = lane + 32 * i, position = positions ? position_of(positions, t, tokens.valid) : t + 1;
        const bool valid = t < tokens.valid;
        to.G[t] = row[t];
        to.from_start[t] = ptx::exp2(positions ? row[CHUNK + t] : row[t]);
        to.to_end[t] = ptx::exp2(positions ? row[2 * CHUNK + t] : end - row[t]);
        to.beta[t] = ptx::round_to_half(valid ? fmaxf(given.beta[(long)(tokens.start + t) * sizes.heads + head], 0x1p-20f) : 1.0f);
        to.position[t] = position;
        to.first[t] = valid ? t - position : CHUNK;
    }
    if (lane == 0) {
        to.position[CHUNK] = 1;  // sums begin at the chunk's last token in any case
        to.place = {tokens.start, tokens.valid, head};
    }
}

// Write a unit's dg, the sum of G's gradients from the token to the end of its document, and dbeta, R's diagonal divided by beta twice.
// Lane 0 has the last two tokens: a sum over later tokens is one over earlier lanes.
__device__ __forceinline__ void store_gates(const Unit &of, const Results &results, int heads) {
    const int lane = threadIdx.x % 32, t = CHUNK - 2 - 2 * lane;
    float last = of.at_end[t] + of.at_end[t + 1];
#pragma unroll
    for (int step = 16; step; step /= 2) last += __shfl_xor_sync(~0u, last, step);
    last += (of.states[0] + of.states[1]) * of.from_start[CHUNK - 1];
    const float second = of.of_q[t + 1] + of.of_k[t + 1], first = of.of_q[t] + of.of_k[t];
    const bool second_ends = of.position[t + 2] == 0, first_ends = of.position[t + 1] == 0;
    float sum = first_ends ? first : second + first;
    const bool begins = first_ends || second_ends;
    const float later = sum_before_lane(sum, begins);
    float dG[2];
    dG[1] = (lane && !second_ends ? later : 0.0f) + second;
    dG[0] = (first_ends ? 0.0f : dG[1]) + first;
    const long at = (long)(of.place.start + t) * heads + of.place.head;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (t + i >= of.place.valid) continue;
        if (CHUNK - 1 - (t + i) <= of.position[CHUNK - 1]) dG[i] += last;  // the state at the end is of its document
        // a document's first token decays no state
        results.dg[at + i * heads] = of.position[t + i] > 0 ? dG[i] : 0.0f;
        results.dbeta[at + i * heads] = of.diagonal[t + i] / of.beta[t + i] / of.beta[t + i];
    }
}

// One warp: factors of all units of the block, and the results of each after the factors of the next.
__device__ __forceinline__ void run_gates(Shared &shared, const Given &given, const Results &results, int units) {
    unsigned i = 0;
    auto finish = [&](unsigned i) {
        await(shared.summed, i);
        store_gates(shared.unit[i % 2], results, given.sizes.heads);
        __syncwarp();
    };
    for (int unit = blockIdx.x; unit < units; ++i, unit += gridDim.x) {
        load_gates(shared.unit[i % 2], given, unit);
        warp_arrives(&shared.loaded[i % 2]);
        if (i > 0) finish(i - 1);
    }
    if (i > 0) finish(i - 1);
}

// Two warps: <dS, S> of all units of the block.
__device__ __forceinline__ void sum_states(Shared &shared, const Given &given, int units, int summer) {
    const int lane = threadIdx.x % 32;
    unsigned tile = 0;
    for (unsigned i = 0, unit = blockIdx.x; unit < units; ++i, unit += gridDim.x) {
        float sum = 0.0f;
        for (int v = 0; v < given.values; v += 64, ++tile) {
            const auto &in = shared.stage[tile % Shared::STAGES];
            await(shared.full, tile);
#pragma unroll 4
            for (int at = 32 * summer + lane; at < KEYS / 16; at += 32 * SUMMERS) {
                const uint4 x = ((const uint4 *)in.S)[at], y = ((const uint4 *)in.dS)[at];
                const uint32_t pairs[2][4] = {{x.x, x.y, x.z, x.w}, {y.x, y.y, y.z, y.w}};
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float2 a = ptx::unpack_bf16(pairs[0][j]), b = ptx::unpack_bf16(pairs[1][j]);
                    sum += a.x * b.x;
                    sum += a.y * b.y;
                }
            }
            warp_arrives(&shared.empty[tile % Shared::STAGES]);
        }
#pragma unroll
        for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        await(shared.loaded, i);  // the sums of the unit before last are read
        if (lane == 0) shared.unit[i % 2].states[summer] = sum;
        warp_arrives(&shared.summed[i % 2]);
    }
}

}  // namespace
