// Forward scan (backends/triton/scan.py has the formulas), with one role per warp. It writes the outputs, or every chunk's incoming
// state and its new values, or both, or only the final states and transitions.
#include "launch.cuh"

namespace {

template <bool OUTPUT, bool STATES>
using SharedOf = Shared<OUTPUT, STATES, STATES>;

template <bool OUTPUT, bool STATES>
__device__ __forceinline__ void scan(SharedOf<OUTPUT, STATES> &shared, const Scanner &me) {
    constexpr int STAGES = SharedOf<OUTPUT, STATES>::STAGES;
    constexpr int BESIDE = OUTPUT ? 1 : 0;  // GEMMs in flight besides the one that is waited for
    const Span &span = me.span;
    float S[K / 2], out[32];
    float y[32], power[2];  // the change of the state, with rows still to be multiplied by `power`
    float2 rest[8];         // exp(G_end - G)
    me.begin(S);
#pragma unroll
    for (int i = 0; i < 32; ++i) out[i] = 0.0f;

    // Store what is ready before chunk c's change: its incoming state, and the outputs and new values of the chunk before.
    auto leave = [&](unsigned c, bool first) INLINE {
        if constexpr (!OUTPUT && !STATES) return;
        me.hand_over();
        if constexpr (STATES) me.put_state(shared.states[c % 2], c);
        if (STATES && !first) me.put_change(shared.changes[(c - 1) % 2], c - 1);
        if (OUTPUT && !first) me.put_out(shared.out[(c - 1) % 2], c - 1);
    };
    auto fade = [&](unsigned c) INLINE {
        const float end = shared.factors[c % STAGES].decay[CHUNK - 1];
#pragma unroll
        for (int i = 0; i < K / 2; ++i) S[i] = ptx::times(S[i], end);
    };
    // A chunk in two halves, so that no GEMM is in flight where the loop closes: ptxas would wait for it there.
    auto predict = [&](unsigned c, bool first) INLINE {
        auto &in = shared.stage[c % STAGES];
        const auto &factors = shared.factors[c % STAGES];
        const uint64_t k = ptx::descriptor(in.k, 16, 512, ptx::SWIZZLE_64);
        const uint64_t A = ptx::descriptor(in.A, 16, 1024, ptx::SWIZZLE_128);
        uint32_t left[K / 4], packed[16], v[16], change[16];
        float x[32], inverse[2];
        float2 value[16], decay[8], output[8];
        await(shared.full, c);
        pack(S, left);
        start<K / 16>([&](int i) { ptx::product(x, left + 4 * i, k + col_step(i), i > 0); });
        if constexpr (OUTPUT) {
            const uint64_t q = ptx::descriptor(in.q, 16, 512, ptx::SWIZZLE_64);
            if (!first) {
                ptx::landed<1>(out);  // of the last chunk: its GEMM with P overlapped with the state's
                pack(out, packed);
            }
            start<K / 16>([&](int i) { ptx::product(out, left + 4 * i, q + col_step(i), i > 0); });
        }
        if (!first) me.release(&shared.empty[(c - 1) % STAGES]);
        if constexpr (STATES) me.store_state(shared.states[c % 2], left);
        if (OUTPUT && !first) me.store_transposed(shared.out[(c - 1) % 2], packed);
        if (!STATES && !first) leave(c, first);
        me.load_transposed(in.v, v);
        me.columns(decay, factors.decay);
#pragma unroll
        for (int i = 0; i < 16; ++i) value[i] = ptx::unpack_bf16(v[i]);
        ptx::landed<BESIDE>(x);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            x[2 * i] = value[i].x - x[2 * i] * decay[i / 2].x;
            x[2 * i + 1] = value[i].y - x[2 * i + 1] * decay[i / 2].y;
        }
        row_powers(x, power, inverse);
#pragma unroll
        for (int i = 0; i < 16; ++i) change[i] = ptx::pack_half(x[2 * i] * inverse[i % 2], x[2 * i + 1] * inverse[i % 2]);
        start<4>([&](int i) { ptx::product_half(y, change + 4 * i, A + 2 * i, i > 0); });
        if constexpr (STATES) {
            fade(c);
            leave(c, first);  // together with the state's stores it would not overlap with the first GEMM
        }
        if constexpr (OUTPUT) {
            ptx::landed<1>(out);
            me.columns(output, factors.output);
#pragma unroll
            for (int i = 0; i < 32; ++i) out[i] = ptx::times(out[i], i % 2 ? output[i / 4].y : output[i / 4].x);
        }
        if constexpr (!STATES) fade(c);
        me.columns(rest, factors.rest);
        ptx::landed<0>(y);
    };
    auto write = [&](unsigned c) INLINE {
        auto &in = shared.stage[c % STAGES];
        const uint64_t k = ptx::descriptor(in.k, CHUNK * 64, 512, ptx::SWIZZLE_64);
        uint32_t written[16], change[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            y[2 * i] *= power[i % 2], y[2 * i + 1] *= power[i % 2];
            written[i] = ptx::pack_bf16(y[2 * i] * rest[i / 2].x, y[2 * i + 1] * rest[i / 2].y);
        }
        start<4>([&](int i) { ptx::product_rows(S, written + 4 * i, k + 64 * i); });
        pack(y, change);
        if constexpr (OUTPUT) {
            const uint64_t P = ptx::descriptor(in.P, 16, 1024, ptx::SWIZZLE_128);
            start<4>([&](int i) { ptx::product(out, change + 4 * i, P + 2 * i, true); });
        }
        if constexpr (STATES) me.store_change(shared.changes[c % 2], change);
        ptx::landed<BESIDE>(S);
    };

    if (span.count > 0) {
        const unsigned last = span.count - 1;
        predict(0, true);
        for (unsigned c = 0; c < last; ++c) {
            write(c);
            predict(c + 1, false);
        }
        write(last);
        if constexpr (OUTPUT) {
            uint32_t packed[16];
            ptx::landed<0>(out);
            pack(out, packed);
            me.store_transposed(shared.out[last % 2], packed);
        }
        if constexpr (OUTPUT || STATES) me.hand_over();
        if constexpr (STATES) me.put_change(shared.changes[last % 2], last);
        if constexpr (OUTPUT) me.put_out(shared.out[last % 2], last);
        if (me.thread == 0) ptx::puts_done();
    }
    me.end(S);
}

template <bool OUTPUT, bool STATES>
__global__ void __launch_bounds__(THREADS, 1)
    forward_scan_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Arguments args) {
    run_block<false, SharedOf<OUTPUT, STATES>>(maps, args, [](auto &shared, const Scanner &me) INLINE {
        scan<OUTPUT, STATES>(shared, me);
    });
}

}  // namespace

#ifdef __CUDACC__
// q, k [rows, key heads, K], v [rows, heads, V] bf16; A fp16, P bf16 [tiles, 64, 64]. Writes outputs to args->out, states
// [tiles, V, K] and new values [tiles, V, 64], each unless it is null. Returns null, or the error.
extern "C" const char *forward_scan(const void *q, const void *k, const void *v, const void *A, const void *P, void *states,
                                    void *new_values, const Arguments *args, long rows, long tiles, int sequences,
                                    void *stream) {
    const Tensors tensors{q, k, v, A, P, args->out, states, new_values};
    auto run = [&](auto output, auto states) {
        constexpr bool OUTPUT = decltype(output)::value, STATES = decltype(states)::value;
        return launch<SharedOf<OUTPUT, STATES>>(forward_scan_kernel<OUTPUT, STATES>, tensors, *args, rows, tiles, sequences, stream);
    };
    const std::true_type yes;
    const std::false_type no;
    const cudaError_t error = args->out ? (states ? run(yes, yes) : run(yes, no)) : (states ? run(no, yes) : run(no, no));
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif
