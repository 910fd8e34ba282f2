// Launch of a scan, with the tensor maps of its bulk copies.
#pragma once
#include "scan.cuh"

#ifdef __CUDACC__

namespace {

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

// Tensors of `Maps`; those that the kernel does not use are null. rows: of tokens; tiles: chunks * heads.
struct Tensors {
    const void *q, *k, *v, *A, *P, *out, *states, *changes;
};

template <class Shared>
cudaError_t launch(void (*kernel)(Maps, Arguments), const Tensors &of, const Arguments &args, long rows, long tiles,
                   int sequences, void *stream) {
    static void *encode = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaError_t error = cudaSuccess;
    if (!encode)
        error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found);
    if (error == cudaSuccess)  // needed once per device; it costs next to nothing
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
    if (error != cudaSuccess) return error;
    Maps maps{};
    const auto BF16 = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, HALF = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const long keys = (long)args.key_heads * K, values = (long)args.heads * args.values;
    auto map = [&](CUtensorMap *to, const void *x, CUtensorMapDataType type, long rows, long cols, bool blocked) {
        return !x || make_map((Encode)encode, to, x, type, rows, cols, blocked);
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
