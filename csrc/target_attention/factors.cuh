// What the second pass of backward multiplies, where it is tensor cores that add up: slices of q and dout in shared memory, as factors of a
// warp's products with the members' coefficients.
#pragma once

#include "rows.cuh"
#include "tf32.cuh"

namespace target_attention {

struct Combine {
  Problem p;
  Gradients g;
  Sums sums;
  Records records;
};

// A warp walks kRuns runs of places side by side, a place of each in a step: a product's eight columns are those runs, two for the high and
// the low part of a member's coefficients, its 16 rows are columns of the gradient, its depth the rows of q and of dout in turns. What a step
// needs of its members is asked for kStages - 1 rounds of kSteps ahead, into shared memory: a walk waits for nothing else.
template <typename T_, int kRows_, int kWalkers_, int kStages_, int kSlice_>
struct Walk {
  using T = T_;
  static constexpr int kRows = kRows_, kWalkers = kWalkers_, kStages = kStages_, kSlice = kSlice_;
  static constexpr int kThreads = 32 * kWalkers, kRuns = 4, kSteps = 32 / kRuns;
  static constexpr int kDepth = 2 * kRows, kHalves = kDepth / 8;
  static constexpr int kColumns = kSlice / int(sizeof(T)), kWide = kColumns < 8 ? kColumns : 8;
  static constexpr int kChunks = kColumns / kWide;       // place g of chunk i is column kChunks * g + i of the slice
  static constexpr int kProducts = (kChunks + 1) / 2;
  static constexpr int kSampleBytes = kDepth * kSlice;

  struct alignas(16) Stage {
    uint32_t records[kSteps][kRuns][2 * kRows];
    int rows[kSteps][kRuns];              // of the gradient; -1: no member
    uint16_t samples[kSteps][2][kRuns / 2];  // of runs 0 and 2, then of 1 and 3
  };
  static size_t shared_bytes(const Problem& p) { return size_t(p.samples) * kSampleBytes + sizeof(Stage) * kWalkers * kStages; }
};

// Numbers that are not finite to 0: where a query row holds one, the coefficients of all keys that it sees are not finite either, and
// products of other samples' members meet it with coefficients of 0.
__device__ __forceinline__ uint32_t finite(uint32_t x, float) { return (x & 0x7f800000u) == 0x7f800000u ? 0u : x; }
__device__ __forceinline__ uint32_t finite(uint32_t x, __nv_bfloat16) {
  if ((x & 0x7f80u) == 0x7f80u) x &= 0xffff0000u;
  return (x & 0x7f800000u) == 0x7f800000u ? x & 0xffffu : x;
}
template <typename T>
__device__ __forceinline__ uint4 finite_piece(const T* from, bool present) {
  uint4 x = make_uint4(0, 0, 0, 0);
  if (present) x = *reinterpret_cast<const uint4*>(from);
  return make_uint4(finite(x.x, T{}), finite(x.y, T{}), finite(x.z, T{}), finite(x.w, T{}));
}

template <class Walk, typename T = typename Walk::T>
struct Factors;

// bfloat16: slices lie as (samples, chunks, depth, 8); a lane reads 16 bits of two depths at once, turned.
template <class Walk>
struct Factors<Walk, __nv_bfloat16> {
  using T = __nv_bfloat16;
  using Stage = typename Walk::Stage;
  static constexpr int kHalves = Walk::kHalves, kChunks = Walk::kChunks;
  static constexpr int kPairs = Walk::kRuns * kHalves / 2;  // products to a pair of chunks: two runs share one where eight deep

  struct Members {
    uint32_t samples[kPairs], coefficients[kHalves];

    __device__ void ask(const Stage& stage, int step) {
      const int lane = threadIdx.x % 32;
#pragma unroll
      for (int m = 0; m < kPairs; ++m) samples[m] = kHalves == 1 ? stage.samples[step][lane / 16][m] : stage.samples[step][m % 2][m / 2];
#pragma unroll
      for (int h = 0; h < kHalves; ++h) coefficients[h] = stage.records[step][lane / 8][2 * (lane % 4 + 4 * h) + lane / 4 % 2];
    }
  };

  Fragment rows[kPairs][Walk::kProducts];
  uint32_t coefficients[kHalves];

  __device__ static void load(unsigned char* to, const Combine& c, int head_kv, int first_column) {
    const Problem& p = c.p;
    for (int i = threadIdx.x; i < p.samples * Walk::kDepth; i += Walk::kThreads) {
      const int sample = i / Walk::kDepth, depth = i % Walk::kDepth, row = depth / 2;
      const QueryRows rows(p, sample, head_kv);
      const T* const from =
          static_cast<const T*>(depth % 2 == 0 ? p.q : c.g.dout) + rows.index(p, row) * p.head_dim + first_column;
      uint32_t words[4 * kChunks];
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        const uint4 piece = finite_piece(from + 8 * j, row < rows.count && first_column + 8 * j < p.head_dim);
        words[4 * j] = piece.x, words[4 * j + 1] = piece.y, words[4 * j + 2] = piece.z, words[4 * j + 3] = piece.w;
      }
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        uint32_t mine[4];
#pragma unroll
        for (int g = 0; g < 4; ++g) {
          const int even = kChunks * 2 * g + j, odd = even + kChunks;
          mine[g] = __byte_perm(words[even / 2], words[odd / 2], (even % 2 ? 0x32 : 0x10) | (odd % 2 ? 0x7600 : 0x5400));
        }
        *reinterpret_cast<uint4*>(to + sample * Walk::kSampleBytes + (j * Walk::kDepth + depth) * 16) =
            make_uint4(mine[0], mine[1], mine[2], mine[3]);
      }
    }
  }

  // Of a product's 16 rows the second eight are those of the next chunk, of its depth the second eight another run's or the later half.
  __device__ static uint32_t at_lane(const unsigned char* slices) {
    const int lane = threadIdx.x % 32;
    return shared_address(slices) + lane % 8 * 16 + (kHalves == 2 ? lane / 16 * 128 : 0) +
           (kChunks > 1 ? lane / 8 % 2 * Walk::kDepth * 16 : 0);
  }
  __device__ void read(const Members& members, uint32_t slices) {
#pragma unroll
    for (int m = 0; m < kPairs; ++m)
#pragma unroll
      for (int n = 0; n < Walk::kProducts; ++n)
        rows[m][n] = load_turned(slices + members.samples[m] * Walk::kSampleBytes + n * 2 * Walk::kDepth * 16);
#pragma unroll
    for (int h = 0; h < kHalves; ++h) coefficients[h] = members.coefficients[h];
  }
  __device__ void add(float (&sum)[kChunks]) const {
    const int of = threadIdx.x % 32 / 8;
    float both[Walk::kProducts][4] = {};
#pragma unroll
    for (int m = 0; m < kPairs; ++m) {
      const uint32_t b0 = of == (kHalves == 1 ? 2 * m : m) ? coefficients[0] : 0u;
      const uint32_t b1 = of == (kHalves == 1 ? 2 * m + 1 : m) ? coefficients[kHalves - 1] : 0u;
#pragma unroll
      for (int n = 0; n < Walk::kProducts; ++n) Half<T>::multiply(both[n], rows[m][n].x, b0, b1);
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) sum[i] += both[i / 2][i % 2 * 2] + both[i / 2][i % 2 * 2 + 1];
  }
};

// float32 in TF32 parts: slices lie as (samples, chunks, depth / 4, kWide, 4), so that a lane reads a depth of a column.
template <class Walk>
struct Factors<Walk, float> {
  using Stage = typename Walk::Stage;
  static constexpr int kHalves = Walk::kHalves, kChunks = Walk::kChunks, kQuads = Walk::kDepth / 4, kQuadBytes = Walk::kWide * 16;

  struct Members {
    uint32_t samples[Walk::kRuns], coefficients[kHalves][2];

    __device__ void ask(const Stage& stage, int step) {
      const int lane = threadIdx.x % 32;
#pragma unroll
      for (int m = 0; m < Walk::kRuns; ++m) samples[m] = stage.samples[step][m % 2][m / 2];
#pragma unroll
      for (int h = 0; h < kHalves; ++h)
#pragma unroll
        for (int i = 0; i < 2; ++i) coefficients[h][i] = stage.records[step][lane / 8][8 * h + 4 * i + lane % 4];
    }
  };

  Fragment rows[Walk::kRuns][kHalves][Walk::kProducts];
  uint32_t coefficients[kHalves][2];

  __device__ static void load(unsigned char* to, const Combine& c, int head_kv, int first_column) {
    constexpr int kPieces = Walk::kColumns / 4;
    const Problem& p = c.p;
    for (int i = threadIdx.x; i < p.samples * kQuads * kPieces; i += Walk::kThreads) {
      const int sample = i / (kQuads * kPieces), quad = i / kPieces % kQuads, column = i % kPieces * 4;
      const QueryRows rows(p, sample, head_kv);
      uint4 x[4];
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        const int row = quad * 2 + d / 2;
        x[d] = finite_piece(static_cast<const float*>(d % 2 == 0 ? p.q : c.g.dout) + rows.index(p, row) * p.head_dim + first_column + column,
                            row < rows.count && first_column + column < p.head_dim);
      }
      const uint4 turned[4] = {make_uint4(x[0].x, x[1].x, x[2].x, x[3].x), make_uint4(x[0].y, x[1].y, x[2].y, x[3].y),
                               make_uint4(x[0].z, x[1].z, x[2].z, x[3].z), make_uint4(x[0].w, x[1].w, x[2].w, x[3].w)};
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const int chunk = (column + t) % kChunks, place = (column + t) / kChunks;
        *reinterpret_cast<uint4*>(to + sample * Walk::kSampleBytes + (chunk * kQuads + quad) * kQuadBytes + place * 16) = turned[t];
      }
    }
  }

  __device__ static uint32_t at_lane(const unsigned char* slices) {
    const int lane = threadIdx.x % 32;
    return shared_address(slices) + lane % Walk::kWide * 16 + (lane / 16 + (kChunks > 1 ? lane / 8 % 2 * kQuads : 0)) * kQuadBytes;
  }
  __device__ void read(const Members& members, uint32_t slices) {
#pragma unroll
    for (int m = 0; m < Walk::kRuns; ++m)
#pragma unroll
      for (int h = 0; h < kHalves; ++h)
#pragma unroll
        for (int n = 0; n < Walk::kProducts; ++n)
          rows[m][h][n] = load_unturned(slices + members.samples[m] * Walk::kSampleBytes + (n * 2 * kQuads + 2 * h) * kQuadBytes);
#pragma unroll
    for (int h = 0; h < kHalves; ++h)
#pragma unroll
      for (int i = 0; i < 2; ++i) coefficients[h][i] = members.coefficients[h][i];
  }
  __device__ void add(float (&sum)[kChunks]) const {
    const int lane = threadIdx.x % 32, of = lane / 8;
    float lead[Walk::kProducts][4] = {}, rest[Walk::kProducts][4] = {};
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      uint32_t part[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Parts parts = parts_of(coefficients[h][i]);
        part[i] = lane / 4 % 2 == 0 ? parts.high : parts.low;
      }
#pragma unroll
      for (int m = 0; m < Walk::kRuns; ++m) {
        const uint32_t b0 = of == m ? part[0] : 0u, b1 = of == m ? part[1] : 0u;
#pragma unroll
        for (int n = 0; n < Walk::kProducts; ++n) {
          uint32_t high[4], low[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const Parts parts = parts_of(rows[m][h][n].x[i]);
            high[i] = parts.high, low[i] = parts.low;
          }
          multiply_tf32(rest[n], low, b0, b1);
          multiply_tf32(lead[n], high, b0, b1);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int at = i % 2 * 2;
      sum[i] += lead[i / 2][at] + (lead[i / 2][at + 1] + rest[i / 2][at]);
    }
  }
};

}  // namespace target_attention
