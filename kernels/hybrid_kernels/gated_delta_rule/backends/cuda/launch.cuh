// Launch of a scan, with the tensor maps of its bulk copies.
#pragma once
#include "maps.cuh"
#include "scan.cuh"

#ifdef __CUDACC__

namespace {

// Tensors of `Maps`; those that the kernel does not use are null. rows: of tokens; tiles: chunks * heads.
struct Tensors {
    const void *q, *k, *v, *A, *P, *out, *states, *changes;
};

template <class Shared>
cudaError_t launch(void (*kernel)(Maps, Arguments), const Tensors &of, const Arguments &args, long rows, long tiles,
                   int sequences, void *stream) {
    Encode encode;
    cudaError_t error = find_encode(encode);
    if (error == cudaSuccess)  // needed once per device; it costs next to nothing
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
    if (error != cudaSuccess) return error;
    Maps maps{};
    const auto BF16 = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, HALF = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const long keys = (long)args.key_heads * K, values = (long)args.heads * args.values;
    auto map = [&](CUtensorMap *to, const void *x, CUtensorMapDataType type, long rows, long cols, bool blocked) {
        return !x || make_map(encode, to, x, type, rows, cols, blocked);
    };
    if (!map(&maps.q, of.q, BF16, rows, keys, true) || !map(&maps.k, of.k, BF16, rows, keys, true) ||
        !map(&maps.v, of.v, BF16, rows, values, false) || !map(&maps.out, of.out, BF16, rows, values, false) ||
        !map(&maps.A, of.A, HALF, tiles * CHUNK, 64, false) || !map(&maps.P, of.P, BF16, tiles * CHUNK, 64, false) ||
        !map(&maps.states, of.states, BF16, tiles * args.values, K, true) ||
        !map(&maps.changes, of.changes, BF16, tiles * args.values, 64, false))
        return cudaErrorInvalidValue;
    kernel<<<dim3(args.width / 64, sequences * args.heads), THREADS, sizeof(Shared), (cudaStream_t)stream>>>(maps, args);
    return cudaGetLastError();
}

}  // namespace
#endif
