// Products of a warp on scalar units, for float32 tables.
#pragma once

#include "stream.cuh"

namespace target_attention {

// s[r] = a[r].key: 16 keys a tile, a key to lanes l and l + 16, which take alternate pieces of four columns and then share.
template <class Shape, int kRows>
__device__ __forceinline__ void dots(float (&s)[kRows], const float* a, const float* keys) {
  const int lane = threadIdx.x % 32;
  const float* key = keys + lane % 16 * Shape::kStride;
#pragma unroll
  for (int r = 0; r < kRows; ++r) s[r] = 0.f;
#pragma unroll 4
  for (int d = lane / 16 * 4; d < Shape::kDim; d += 8) {
    const float4 k = *reinterpret_cast<const float4*>(key + d);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float4 x = *reinterpret_cast<const float4*>(a + r * Shape::kStride + d);
      s[r] += x.x * k.x + x.y * k.y + x.z * k.z + x.w * k.w;
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) s[r] += __shfl_xor_sync(~0u, s[r], 16);
}

}  // namespace target_attention
