// float32 products of a warp on tensor cores. A factor is the sum of two TF32 numbers, its leading 11 bits and the next 11; of the
// four products the one of both remainders, some 2^-22 of the whole, is left out. Cross products add up apart from the leading
// ones, and tiles apart from each other, because tensor cores cut sums off where scalar units round.
#pragma once

#include "stream.cuh"

namespace target_attention {

struct Parts {
  uint32_t high, low;
};

__device__ __forceinline__ Parts parts_of(uint32_t x) {
  const uint32_t high = x & 0xffffe000u;
  return {high, __float_as_uint(__uint_as_float(x) - __uint_as_float(high))};
}

// c (16 x 8) += a (16 x 8) b (8 x 8)
__device__ __forceinline__ void multiply_tf32(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The three products that count; lead and rest may be the same sums.
__device__ __forceinline__ void multiply_parts(float* lead, float* rest, const uint32_t* a_high, const uint32_t* a_low,
                                               const Parts& b0, const Parts& b1) {
  multiply_tf32(rest, a_high, b0.low, b1.low);
  multiply_tf32(rest, a_low, b0.high, b1.high);
  multiply_tf32(lead, a_high, b0.high, b1.high);
}

// As `score`: ldmatrix moves 16 bytes of a row, here four columns, one to a lane.
template <class Shape, int kGroups>
__device__ __forceinline__ void score(float (&c)[kGroups][Shape::kTile / 8][4], const float* a,
                                      const float* keys) {
  static_assert(Shape::kTile == 16);
  const int lane = threadIdx.x % 32;
  const float* a_row = a + lane % 16 * Shape::kStride + lane / 16 * 4;
  const float* key_row = keys + (lane % 8 + lane / 16 * 8) * Shape::kStride + lane / 8 % 2 * 4;
  float rest[kGroups][2][4] = {};
#pragma unroll
  for (int g = 0; g < kGroups; ++g)
#pragma unroll
    for (int i = 0; i < 8; ++i) c[g][i / 4][i % 4] = 0.f;
#pragma unroll 2
  for (int d = 0; d < Shape::kDim; d += 8) {
    const Fragment b = load_matrices(key_row + d);
    const Parts b00 = parts_of(b.x[0]), b01 = parts_of(b.x[1]), b10 = parts_of(b.x[2]), b11 = parts_of(b.x[3]);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const Fragment whole = load_matrices(a_row + g * 16 * Shape::kStride + d);
      uint32_t high[4], low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Parts parts = parts_of(whole.x[i]);
        high[i] = parts.high, low[i] = parts.low;
      }
      multiply_parts(c[g][0], rest[g][0], high, low, b00, b01);
      multiply_parts(c[g][1], rest[g][1], high, low, b10, b11);
    }
  }
#pragma unroll
  for (int g = 0; g < kGroups; ++g)
#pragma unroll
    for (int i = 0; i < 8; ++i) c[g][i / 4][i % 4] += rest[g][i / 4][i % 4];
}

// As `accumulate`, into the columns of column_of_sum. The products' inner index runs over the keys in the order in which a lane
// holds its weights: places t and t + 4 of eight are keys 2 t and 2 t + 1.
template <class Shape, int kGroups>
__device__ __forceinline__ void accumulate(float (&c)[kGroups][Shape::kDim / 8][4],
                                           const float (&p)[kGroups][Shape::kTile / 8][4], const float* keys) {
  const int lane = threadIdx.x % 32;
  constexpr int kSteps = Shape::kTile / 8;
  uint32_t high[kGroups][kSteps][4], low[kGroups][kSteps][4];
#pragma unroll
  for (int g = 0; g < kGroups; ++g)
#pragma unroll
    for (int n = 0; n < kSteps; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Parts parts = parts_of(__float_as_uint(p[g][n][i % 2 * 2 + i / 2]));
        high[g][n][i] = parts.high, low[g][n][i] = parts.low;
      }
#pragma unroll
  for (int d = 0; d < Shape::kDim / 8; d += 4) {
    float sum[kGroups][4][4] = {};
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
      const float* from = keys + (n * 8 + lane % 4 * 2) * Shape::kStride + d * 8 + lane / 4 * 4;
      const uint4 even = *reinterpret_cast<const uint4*>(from);
      const uint4 odd = *reinterpret_cast<const uint4*>(from + Shape::kStride);
      const Parts b0[4] = {parts_of(even.x), parts_of(even.y), parts_of(even.z), parts_of(even.w)};
      const Parts b1[4] = {parts_of(odd.x), parts_of(odd.y), parts_of(odd.z), parts_of(odd.w)};
#pragma unroll
      for (int g = 0; g < kGroups; ++g)
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply_parts(sum[g][j], sum[g][j], high[g][n], low[g][n], b0[j], b1[j]);
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) c[g][d + j][i] += sum[g][j][i];
  }
}

}  // namespace target_attention
