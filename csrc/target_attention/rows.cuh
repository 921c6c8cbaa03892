// Backward, second pass: the parts of a table row's gradient, one for each of its members, added up in member order.
#pragma once

#include "stream.cuh"

namespace target_attention {

constexpr int kSumWarps = 8;
constexpr int kSumRows = 8;  // table rows of a warp
constexpr int kAhead = 8;
constexpr int kLong = 64;  // members beyond which a row takes the whole block

// The sum of members begin, begin + step, ... < end at four columns.
__device__ __forceinline__ float4 sum_members(const float* members, const int64_t* order, int64_t begin, int64_t end,
                                              int step, int64_t width, int column) {
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
  for (int64_t i = begin; i < end; i += step) {
    const float4 x = *reinterpret_cast<const float4*>(members + order[i] * width + column);
    add_four(sum, x);
  }
  return sum;
}

// members (keys, width), order and offsets as in Gradients -> rows (table, width), width a multiple of 4. skip_lone: rows with one
// member are written already. A warp streams the members of kSumRows table rows, which lie together in `order`, as one list:
// kAhead of them under way at a time, whatever the rows' bounds. The block together takes rows with many members.
template <typename T>
__global__ void __launch_bounds__(32 * kSumWarps) sum_members_kernel(const float* members, const int64_t* order,
                                                                     const int64_t* offsets, T* rows, int table,
                                                                     int64_t width, bool skip_lone) {
  __shared__ float4 parts[kSumWarps][32];
  __shared__ uint32_t many_of[kSumWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t block_first = int64_t(blockIdx.x) * kSumWarps * kSumRows, first = block_first + warp * kSumRows;
  // Lane r < kSumRows: bounds of row first + r.
  const int64_t row = min(first + lane % kSumRows, int64_t(table) - 1);
  const int64_t begin = offsets[row];
  const int mine = lane < kSumRows && first + lane < table ? int(min(offsets[row + 1] - begin, int64_t(kLong) + 1)) : 0;
  const bool many = mine > kLong, lone = skip_lone && mine == 1;
  const int taken = many || lone ? 0 : mine;
  int last = taken;  // of the list: members of rows 0 .. r
#pragma unroll
  for (int step = 1; step < kSumRows; step *= 2) {
    const int before = __shfl_up_sync(~0u, last, step);
    if (lane >= step) last += before;
  }
  const int count = __shfl_sync(~0u, last, kSumRows - 1);
  const uint32_t empty = __ballot_sync(~0u, lane < kSumRows && first + lane < table && mine == 0);

  for (int64_t c = 4 * lane; c - 4 * lane < width; c += 128) {
    const bool inside = c < width;
    if (inside)
      for (uint32_t left = empty; left != 0; left &= left - 1)
        store_four(rows + (first + __ffs(left) - 1) * width + c, make_float4(0.f, 0.f, 0.f, 0.f));
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int i = 0; i < count; i += 32) {
      // Lane l: member i + l of the list, the row it belongs to, and whether it is that row's last.
      int r = 0, start = 0;
      bool ends = false;
#pragma unroll
      for (int s = 0; s < kSumRows; ++s) {
        const int end = __shfl_sync(~0u, last, s);
        if (end <= i + lane) r = s + 1, start = end;
        ends |= end == i + lane + 1;
      }
      const int64_t row_begin = __shfl_sync(~0u, begin, r % kSumRows);
      const int member = i + lane < count ? int(order[row_begin + (i + lane - start)]) : 0;
      const uint32_t row_ends = __ballot_sync(~0u, ends && i + lane < count);
      const int here = min(32, count - i);
      for (int j = 0; j < here; j += kAhead) {
        float4 x[kAhead];
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          const int m = __shfl_sync(~0u, member, (j + a) % 32);
          if (j + a < here && inside) x[a] = *reinterpret_cast<const float4*>(members + int64_t(m) * width + c);
        }
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          const int of = __shfl_sync(~0u, r, (j + a) % 32);
          if (j + a >= here || !inside) continue;
          add_four(sum, x[a]);
          if ((row_ends >> (j + a) & 1) == 0) continue;
          store_four(rows + (first + of) * width + c, sum);
          sum = make_float4(0.f, 0.f, 0.f, 0.f);
        }
      }
    }
  }

  const uint32_t with_many = __ballot_sync(~0u, many);
  if (lane == 0) many_of[warp] = with_many;
  if (!__syncthreads_or(with_many != 0)) return;
  for (int i = 0; i < kSumWarps * kSumRows; ++i) {
    if ((many_of[i / kSumRows] >> (i % kSumRows) & 1) == 0) continue;
    const int64_t r = block_first + i, begin = offsets[r], end = offsets[r + 1];
    for (int64_t c = 4 * lane; c - 4 * lane < width; c += 128) {
      if (c < width) parts[warp][lane] = sum_members(members, order, begin + warp, end, kSumWarps, width, c);
      __syncthreads();
      if (warp == 0 && c < width) {
        float4 sum = parts[0][lane];
        for (int w = 1; w < kSumWarps; ++w) {
          add_four(sum, parts[w][lane]);
        }
        store_four(rows + r * width + c, sum);
      }
      __syncthreads();
    }
  }
}

}  // namespace target_attention
