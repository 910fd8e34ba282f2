// Tensor maps of bulk copies.
#pragma once
#include "warpgroup.cuh"

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

// The driver's function that encodes a map, looked up once
cudaError_t find_encode(Encode &found) {
    static void *encode = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaError_t error = cudaSuccess;
    if (!encode)
        error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &result);
    found = (Encode)encode;
    return error;
}

}  // namespace
#endif
