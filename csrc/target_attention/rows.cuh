// Backward, second pass: the parts of a table row's gradient, one for each of its members, added up in member order.
#pragma once

#include "stream.cuh"

namespace target_attention {

constexpr int kSumWarps = 8;
constexpr int kLong = 64;  // members beyond which a row takes the whole block

// The sum of members begin, begin + step, ... < end at four columns.
__device__ __forceinline__ float4 sum_members(const float* members, const int64_t* order, int64_t begin, int64_t end,
                                              int step, int64_t width, int column) {
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
  for (int64_t i = begin; i < end; i += step) {
    const float4 x = *reinterpret_cast<const float4*>(members + order[i] * width + column);
    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
  }
  return sum;
}

// members (keys, width), order and offsets as in Gradients -> rows (table, width), width a multiple of 4. skip_lone: rows with one
// member are written already. A warp takes a row; the block together those with many members.
template <typename T>
__global__ void __launch_bounds__(32 * kSumWarps) sum_members_kernel(const float* members, const int64_t* order,
                                                                     const int64_t* offsets, T* rows, int table,
                                                                     int64_t width, bool skip_lone) {
  __shared__ float4 parts[kSumWarps][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first = int64_t(blockIdx.x) * kSumWarps, row = first + warp;
  if (row < table) {
    const int64_t begin = offsets[row], end = offsets[row + 1];
    if (end - begin <= kLong && !(skip_lone && end - begin == 1))
      for (int64_t c = 4 * lane; c < width; c += 128)
        store_four(rows + row * width + c, sum_members(members, order, begin, end, 1, width, c));
  }
  for (int64_t r = first; r < first + kSumWarps && r < table; ++r) {
    const int64_t begin = offsets[r], end = offsets[r + 1];
    if (end - begin <= kLong) continue;
    for (int64_t c = 4 * lane; c - 4 * lane < width; c += 128) {
      if (c < width) parts[warp][lane] = sum_members(members, order, begin + warp, end, kSumWarps, width, c);
      __syncthreads();
      if (warp == 0 && c < width) {
        float4 sum = parts[0][lane];
        for (int w = 1; w < kSumWarps; ++w) {
          const float4 x = parts[w][lane];
          sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
        }
        store_four(rows + r * width + c, sum);
      }
      __syncthreads();
    }
  }
}

}  // namespace target_attention
