// Backward, first pass where a sample has up to eight query rows: it leaves ds and p of every pair to the second (combine.cuh).
#pragma once

#include "backward.cuh"

namespace target_attention {

// As Records hold them.
template <typename T>
__device__ __forceinline__ float2 recorded(float ds, float p) {
  if constexpr (sizeof(T) == 4) return make_float2(ds, p);
  const uint32_t high = Half<__nv_bfloat16>::pack(ds, p);
  const uint32_t low = Half<__nv_bfloat16>::pack(ds - __uint_as_float(high << 16), p - __uint_as_float(high & 0xffff0000u));
  return make_float2(__uint_as_float(high), __uint_as_float(low));
}

// Rows of q and of dout fill the 16 of a product together: one gives q.k and dout.k of a query row, in the same lane.
// kPlain: is_plain, and no gradient of weights.
template <typename T, int kDim, bool kPlain>
class CoefficientWorker {
  static constexpr bool kWide = sizeof(T) == 4;

 public:
  using Shape = TileShape<T, kDim, !kWide && kDim <= 128 ? 32 : 16, kDim * int(sizeof(T)) <= 256 ? 3 : 2, true>;
  static constexpr int kRows = kMostRecordedRows, kBlocks = 2, kTile = Shape::kTile;
  struct Scratch {};

  __device__ CoefficientWorker(const BackwardParameters& b, const QueryRows& rows, int first,
                               const QueryTile<Shape, kRows>& tile, Scratch&, int sample, int head_kv)
      : b_(b), rows_(rows), tile_(tile), weights_(b.p, rows, first), sample_(sample), head_kv_(head_kv) {
#pragma unroll
    for (int i = 0; i < kSums; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) dq_[0][i][j] = 0.f;
  }

  __device__ void consume(typename Shape::Stage& stage, int key, int keys_left) {
    const int lane = threadIdx.x % 32, row = row_of(0);
    float both[1][kTile / 8][4], p[kTile / 8][2], ds[1][kTile / 8][4];
    score<Shape, 1>(both, tile_.q(), stage.k());
    uint32_t absent = ~0u;
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = column_of(n, i);
        const float w = kPlain ? weights_.of_key(stage, n, i) : weights_(stage, key, keys_left, 0, n, i);
        if (!kPlain && w != -CUDART_INF_F) absent &= ~(1u << (n * 2 + i));
        const PairGradient pair = pair_gradient<kPlain>(b_.p, both[0][n][i], both[0][n][i + 2], w, tile_.lse[row], tile_.delta[row]);
        if (!kPlain && b_.g.dweight != nullptr && weights_.exists(0, 0) && column < keys_left)
          b_.g.dweight[(int64_t(key + column) * b_.p.targets + rows_.target(row)) * b_.p.heads + rows_.head_of(row)] = pair.dw;
        p[n][i] = pair.p;
        ds[0][n][i] = pair.ds * b_.p.scale;
        ds[0][n][i + 2] = 0.f;
      }
    if (!kPlain && b_.p.normaliser == Normaliser::kSoftmax && weights_.per_pair()) weights_.clear_absent(stage, absent);
    add(ds, stage.k());
    if (head_kv_ == 0 && lane < keys_left) b_.records.samples[key + lane] = sample_;
    const int pairs = record_pairs(b_.row_slots);
    if (row >= pairs) return;
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (const int column = column_of(n, i); column < keys_left)
          b_.records.pairs[(int64_t(key + column) * b_.p.heads_kv + head_kv_) * pairs + row] =
              row < rows_.count ? recorded<T>(ds[0][n][i], p[n][i]) : make_float2(0.f, 0.f);
  }

  // (kRows, kDim), rows kSumStride<kDim> apart
  __device__ void store(float* dq) {
#pragma unroll
    for (int d = 0; d < kSums; ++d)
#pragma unroll
      for (int i = 0; i < (kWide ? 2 : 4); ++i) {
        const int row = kWide ? row_of(0) : column_of(0, i);
        const int column = kWide ? column_of_sum<T>(d, i) : d * 16 + row_of(i);
        dq[row * kSumStride<kDim> + column] = dq_[0][d][i];
      }
  }

 private:
  // Of bfloat16 the sums are turned: 16 columns of dq by eight query rows, so that no row of a product stays empty.
  static constexpr int kSums = kWide ? kDim / 8 : kDim / 16;

  __device__ void add(const float (&ds)[1][kTile / 8][4], const T* keys) {
    if constexpr (kWide) {
      accumulate<Shape, 1>(dq_, ds, keys);
    } else {
      const int lane = threadIdx.x % 32;
      const T* const key_row = keys + (lane % 8 + lane / 16 * 8) * Shape::kStride + lane / 8 % 2 * 8;
#pragma unroll
      for (int n = 0; n < kTile / 16; ++n) {
        const uint32_t b0 = Half<T>::pack(ds[0][2 * n][0], ds[0][2 * n][1]);
        const uint32_t b1 = Half<T>::pack(ds[0][2 * n + 1][0], ds[0][2 * n + 1][1]);
#pragma unroll
        for (int d = 0; d < kSums; ++d)
          Half<T>::multiply(dq_[0][d], load_transposed(key_row + n * 16 * Shape::kStride + d * 16).x, b0, b1);
      }
    }
  }

  const BackwardParameters& b_;
  const QueryRows& rows_;
  const QueryTile<Shape, kRows>& tile_;
  PairWeights<Shape, 1> weights_;
  int sample_, head_kv_;
  float dq_[1][kSums][4];
};

}  // namespace target_attention
