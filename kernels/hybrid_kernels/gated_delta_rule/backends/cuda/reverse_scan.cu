// Reverse scan (backends/triton/scan.py has the formulas), with one role per warp. S is the gradient of the state, carried from the
// last chunk to the first. `dstates` are the gradients of every chunk's outgoing state. Without OUTPUT, only the gradients of the
// initial states are written.
//
// GEMMs that do not depend on S run while the chain leaves the tensor cores idle: do^T P of the next chunk while this one's change
// is packed, and S += do^T q while the row powers are computed.
#include "launch.cuh"

namespace {

template <bool OUTPUT>
using Tiles = Shared<true, OUTPUT, false>;

template <bool OUTPUT>
__device__ __forceinline__ void scan(Tiles<OUTPUT> &shared, const Scanner &me) {
    constexpr int STAGES = Tiles<OUTPUT>::STAGES;
    const Span &span = me.span;
    float S[K / 2], inside[32];  // inside: do^T P of the next chunk
    uint32_t gradient[16];       // do^T
    me.begin(S);

    auto receive = [&](unsigned i) INLINE {  // load the i-th chunk's do, and start its GEMM with P
        auto &in = shared.stage[i % STAGES];
        const uint64_t P = ptx::descriptor(in.P, 16, 1024, ptx::SWIZZLE_128);
        await(shared.full, i);
        me.load_transposed(in.v, gradient);
        start<4>([&](int step) { ptx::product_rows(inside, gradient + 4 * step, P + 128 * step, step > 0); });
    };
    auto step = [&](unsigned i, bool last) INLINE {
        auto &in = shared.stage[i % STAGES];
        const auto &factors = shared.factors[i % STAGES];
        const int c = span.count - 1 - i;
        const uint64_t k = ptx::descriptor(in.k, 16, 512, ptx::SWIZZLE_64);
        const uint64_t k_rows = ptx::descriptor(in.k, CHUNK * 64, 512, ptx::SWIZZLE_64);
        const uint64_t q_rows = ptx::descriptor(in.q, CHUNK * 64, 512, ptx::SWIZZLE_64);
        const uint64_t A = ptx::descriptor(in.A, 16, 1024, ptx::SWIZZLE_128);
        uint32_t left[K / 4], asked[16], change[16], written[16];
        float x[32], y[32], power[2], inverse[2];
        float2 output[8], rest[8], decay[8];
        pack(S, left);
        start<K / 16>([&](int j) { ptx::product(x, left + 4 * j, k + col_step(j), j > 0); });
        const float end = factors.decay[CHUNK - 1];
#pragma unroll
        for (int j = 0; j < K / 2; ++j) S[j] = ptx::times(S[j], end);
        me.columns(output, factors.output);
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            const float2 g = ptx::unpack_bf16(gradient[j]);
            asked[j] = ptx::pack_bf16(g.x * output[j / 2].x, g.y * output[j / 2].y);
        }
        start<4>([&](int j) { ptx::product_rows(S, asked + 4 * j, q_rows + 64 * j); });
        if constexpr (OUTPUT) me.store_state(shared.states[i % 2], left);
        me.columns(rest, factors.rest);
        ptx::landed<1>(x);
#pragma unroll
        for (int j = 0; j < 32; ++j) x[j] = x[j] * (j % 2 ? rest[j / 4].y : rest[j / 4].x) + inside[j];
        row_powers(x, power, inverse);
#pragma unroll
        for (int j = 0; j < 16; ++j) change[j] = ptx::pack_half(x[2 * j] * inverse[j % 2], x[2 * j + 1] * inverse[j % 2]);
        start<4>([&](int j) { ptx::product_half_rows(y, change + 4 * j, A + 128 * j, j > 0); });
        if (!last) receive(i + 1);
        if constexpr (OUTPUT) {
            me.hand_over();
            me.put_state(shared.states[i % 2], c);
            if (i > 0) me.put_out(shared.out[(i - 1) % 2], c + 1);
        }
        me.columns(decay, factors.decay);
        if (last)
            ptx::landed<0>(y);
        else
            ptx::landed<1>(y);
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            y[2 * j] *= power[j % 2], y[2 * j + 1] *= power[j % 2];
            written[j] = ptx::pack_bf16(y[2 * j] * -decay[j / 2].x, y[2 * j + 1] * -decay[j / 2].y);
        }
        start<4>([&](int j) { ptx::product_rows(S, written + 4 * j, k_rows + 64 * j); });
        if constexpr (OUTPUT) {
            pack(y, change);
            me.store_transposed(shared.out[i % 2], change);
        }
        ptx::landed<0>(S);
        ptx::landed<0>(inside);
        me.release(&shared.empty[i % STAGES]);
    };

    if (span.count > 0) {
        const unsigned last = span.count - 1;
        receive(0);
        ptx::landed<0>(inside);
        for (unsigned i = 0; i < last; ++i) step(i, false);
        step(last, true);
        if constexpr (OUTPUT) {
            me.hand_over();
            me.put_out(shared.out[last % 2], 0);
            if (me.thread == 0) ptx::puts_done();
        }
    }
    me.end(S);
}

template <bool OUTPUT>
__global__ void __launch_bounds__(THREADS, 1)
    reverse_scan_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Arguments args) {
    run_block<true, Tiles<OUTPUT>>(maps, args, [](auto &shared, const Scanner &me) INLINE { scan<OUTPUT>(shared, me); });
}

}  // namespace

#ifdef __CUDACC__
// q, k [rows, key heads, K], do [rows, heads, V] bf16; A fp16, P bf16 [tiles, 64, 64]; dstates [tiles, V, K] bf16 and dv in args->out,
// or both are null. args->begin: the gradient of the final states, args->end: that of the initial ones. Returns null, or the error.
extern "C" const char *reverse_scan(const void *q, const void *k, const void *d_o, const void *A, const void *P, void *dstates,
                                    const Arguments *args, long rows, long tiles, int sequences, void *stream) {
    const Tensors tensors{q, k, d_o, A, P, args->out, dstates, nullptr};
    const cudaError_t error =
        dstates ? launch<Tiles<true>>(reverse_scan_kernel<true>, tensors, *args, rows, tiles, sequences, stream)
                : launch<Tiles<false>>(reverse_scan_kernel<false>, tensors, *args, rows, tiles, sequences, stream);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif
