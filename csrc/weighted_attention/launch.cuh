// What every launch needs on the host: tensor maps.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "../host.h"
#include "api.h"
#include "plan.cuh"

namespace weighted_attention {

// Boxes of 64 columns x 1 head x `rows` tokens with the 128-byte swizzle. An empty tensor gets a map that nothing uses.
inline cudaError_t make_map(CUtensorMap* map, Type type, const Rows& rows, int tokens, int heads, int head_dim,
                            int box_rows) {
  *map = CUtensorMap{};
  if (tokens == 0) return cudaSuccess;
  // The driver's function, found at run time: no link against libcuda.
  static const auto encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[3] = {cuuint64_t(head_dim), cuuint64_t(heads), cuuint64_t(tokens)};
  const cuuint64_t strides[2] = {cuuint64_t(rows.stride_head) * 2, cuuint64_t(rows.stride_token) * 2};
  const cuuint32_t box[3] = {64, 1, cuuint32_t(box_rows)};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result = encode(
      map, type == Type::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
      const_cast<void*>(rows.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

inline Sequences sequences_of(const Problem& p) {
  return {p.cu_seqlens_q, p.cu_seqlens_k, p.cu_chunks, p.k_visible, p.chunks, p.samples};
}

inline cudaError_t multiprocessors(int* count) {
  int device;
  TA_RETURN_IF_ERROR(cudaGetDevice(&device));
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace weighted_attention
