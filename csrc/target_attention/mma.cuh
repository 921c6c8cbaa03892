// Products of a warp on tensor cores: queries (or coefficients) as the 16 rows of A, gathered keys from shared memory as B.
#pragma once

#include "stream.cuh"
#include "tf32.cuh"

namespace target_attention {

// Which element of a 16 x 8 accumulator c[i] is: row lane / 4 (+ 8 for i >= 2), column lane % 4 * 2 + i % 2.
__device__ __forceinline__ int row_of(int i) { return int(threadIdx.x) % 32 / 4 + i / 2 * 8; }
__device__ __forceinline__ int column_of(int tile, int i) { return tile * 8 + int(threadIdx.x) % 4 * 2 + i % 2; }

// The same of the sums that `accumulate` leaves: for float32, four tiles take turns in the columns, so that a lane reads four at once.
template <typename T>
__device__ __forceinline__ int column_of_sum(int tile, int i) {
  return sizeof(T) == 4 ? tile / 4 * 32 + column_of(0, i) * 4 + tile % 4 : column_of(tile, i);
}

// c (rows x keys) = a (rows x dim) keys^T; both in shared memory, rows of kStride elements.
template <class Shape, int kGroups>
__device__ __forceinline__ void score(float (&c)[kGroups][Shape::kTile / 8][4], const __nv_bfloat16* a,
                                      const __nv_bfloat16* keys) {
  using T = __nv_bfloat16;
  const int lane = threadIdx.x % 32;
  const T* a_row = a + lane % 16 * Shape::kStride + lane / 16 * 8;
  const T* key_row = keys + (lane % 8 + lane / 16 * 8) * Shape::kStride + lane / 8 % 2 * 8;
#pragma unroll
  for (int g = 0; g < kGroups; ++g)
#pragma unroll
    for (int n = 0; n < Shape::kTile / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[g][n][i] = 0.f;
#pragma unroll
  for (int d = 0; d < Shape::kDim; d += 16) {
    Fragment fa[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) fa[g] = load_matrices(a_row + g * 16 * Shape::kStride + d);
#pragma unroll
    for (int n = 0; n < Shape::kTile / 16; ++n) {
      const Fragment b = load_matrices(key_row + n * 16 * Shape::kStride + d);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        Half<T>::multiply(c[g][2 * n], fa[g].x, b.x[0], b.x[1]);
        Half<T>::multiply(c[g][2 * n + 1], fa[g].x, b.x[2], b.x[3]);
      }
    }
  }
}

// c (rows x dim) += p (rows x keys) keys; p in the accumulator layout that `score` leaves.
template <class Shape, int kGroups>
__device__ __forceinline__ void accumulate(float (&c)[kGroups][Shape::kDim / 8][4],
                                           const float (&p)[kGroups][Shape::kTile / 8][4],
                                           const __nv_bfloat16* keys) {
  using T = __nv_bfloat16;
  const int lane = threadIdx.x % 32;
  const T* key_row = keys + lane % 16 * Shape::kStride + lane / 16 * 8;
#pragma unroll
  for (int n = 0; n < Shape::kTile / 16; ++n) {
    uint32_t a[kGroups][4];
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* from = p[g][2 * n + i / 2] + i % 2 * 2;
        a[g][i] = Half<T>::pack(from[0], from[1]);
      }
#pragma unroll
    for (int d = 0; d < Shape::kDim / 16; ++d) {
      const Fragment b = load_transposed(key_row + n * 16 * Shape::kStride + d * 16);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        Half<T>::multiply(c[g][2 * d], a[g], b.x[0], b.x[1]);
        Half<T>::multiply(c[g][2 * d + 1], a[g], b.x[2], b.x[3]);
      }
    }
  }
}

// Sums of `accumulate` to (rows, kDim), rows kSumStride<kDim> apart: 8 banks.
template <int kDim>
constexpr int kSumStride = kDim + 8;

template <typename T, int kDim, int kGroups>
__device__ __forceinline__ void store_sums(float* to, const float (&c)[kGroups][kDim / 8][4]) {
  constexpr int kTogether = sizeof(T) == 4 ? 4 : 1;  // see column_of_sum
#pragma unroll
  for (int g = 0; g < kGroups; ++g)
#pragma unroll
    for (int d = 0; d < kDim / 8; d += kTogether)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* const row = to + (g * 16 + row_of(2 * half)) * kSumStride<kDim>;
        if constexpr (sizeof(T) == 4) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i)
            store_four(row + column_of_sum<T>(d, i), make_float4(c[g][d][i], c[g][d + 1][i], c[g][d + 2][i], c[g][d + 3][i]));
        } else {
          *reinterpret_cast<float2*>(row + column_of_sum<T>(d, 0)) = make_float2(c[g][d][2 * half], c[g][d][2 * half + 1]);
        }
      }
}

// The weights of a tile's pairs in the accumulator layout, and which rows of this lane exist.
template <class Shape, int kGroups>
class PairWeights {
  using Stage = typename Shape::Stage;

 public:
  __device__ PairWeights(const Problem& p, const QueryRows& rows, int first)
      : p_(p), per_pair_(weights_of(p) == Weights::kPerPair) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first + g * 16 + row_of(2 * half);
        exists_[g][half] = row < rows.count;
        offset_[g][half] = per_pair_ && exists_[g][half] ? rows.weight_offset(p, row) : 0;
      }
  }

  __device__ float operator()(const Stage& stage, int key, int keys_left, int g, int n, int i) const {
    return per_pair_ ? of_pair(stage, key, keys_left, g, n, i) : of_key(stage, n, i);
  }
  __device__ float of_key(const Stage& stage, int n, int i) const { return stage.weight[column_of(n, i)]; }
  __device__ float of_pair(const Stage& stage, int key, int keys_left, int g, int n, int i) const {
    const int column = column_of(n, i);
    if (column >= keys_left) return stage.weight[column];
    if (!exists_[g][i / 2]) return p_.normaliser == Normaliser::kSoftmax ? -CUDART_INF_F : 0.f;
    return p_.weight[offset_[g][i / 2] + (key + column) * p_.weight_stride_key];
  }

  __device__ bool exists(int g, int half) const { return exists_[g][half]; }

  // Softmax with weights per pair: zeroes the rows of keys that no query of the block sees, since 0 * NaN is NaN.
  // absent: bit 2 n + i of a lane, whether column_of(n, i) has weight -inf for all the rows this lane holds.
  __device__ void clear_absent(Stage& stage, uint32_t absent) const {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) absent &= __shfl_xor_sync(~0u, absent, step);
    if (__ballot_sync(~0u, absent != 0) == 0) return;
    const int lane = threadIdx.x % 32;
    __syncwarp();  // the scores have read these rows
    for (int column = 0; column < Shape::kTile; ++column) {
      const uint32_t bits = __shfl_sync(~0u, absent, column % 8 / 2);
      if ((bits >> (column / 8 * 2 + column % 2) & 1) == 0) continue;
      for (int d = lane; d < Shape::kDim; d += 32) {
        stage.k()[column * Shape::kStride + d] = narrow<typename Shape::T>(0.f);
        stage.v()[column * Shape::kStride + d] = narrow<typename Shape::T>(0.f);
      }
    }
    __syncwarp();
  }
  __device__ bool per_pair() const { return per_pair_; }

 private:
  const Problem& p_;
  bool per_pair_;
  bool exists_[kGroups][2];
  int64_t offset_[kGroups][2];
};

}  // namespace target_attention
