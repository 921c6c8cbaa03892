// What backward needs per query row, before and after the main kernel.
//
// Workspaces are laid out by tiles of kRowTile query rows, head by head, each chunk beginning a tile:
// row r of chunk b and head h is at (h * max_tiles + first[b]) * kRowTile + r, except that the rows of a chunk's last
// step are its last ones (first_row); those which the step before holds count for nothing in the last one.
#pragma once

#include "plan.cuh"
#include "tile.cuh"

namespace weighted_attention {

constexpr int kRowTile = 128;

// Queries of a step of the walk over them.
__host__ __device__ constexpr int queries_of_step(int head_dim) { return head_dim == 64 ? 128 : 64; }

struct RowWorkspace {
  Plan plan;   // tiles of kRowTile queries
  int max_tiles;
  float* lse;    // base 2; +inf for rows without keys, rows that count for nothing and padding: 2^(score - lse) is 0
  float* delta;  // sum(out * dout) - dlse: what is subtracted from dP
  float* dq;     // fp32 sums in fragment order
  int* turns;    // how many tiles of keys have added to dq, for each tile of queries (backward_turns.cuh)

  __device__ __forceinline__ int64_t row(int chunk, int head) const {
    return (int64_t(head) * max_tiles + plan.first[chunk]) * kRowTile;
  }
};

struct PrepareParameters {
  RowWorkspace rows;
  const void* out;
  const void* dout;
  int64_t dout_stride_token, dout_stride_head;
  const float* lse;
  const float* dlse;
  int heads;
};

constexpr int kPrepareThreads = 256;

__device__ __forceinline__ float2 unpack(__nv_bfloat162 x) { return __bfloat1622float2(x); }
__device__ __forceinline__ float2 unpack(__half2 x) { return __half22float2(x); }
template <typename T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};
template <>
struct Pair<__half> {
  using Type = __half2;
};

// One block per tile and head: lse and delta of its rows, and zeros for its part of dq.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kPrepareThreads) prepare_rows_kernel(const PrepareParameters p) {
  using Pair = typename Pair<T>::Type;
  constexpr int kLanes = padded_columns(kHeadDim) / 8;  // of one row, 16 bytes each
  constexpr int kStep = queries_of_step(kHeadDim), kTurns = kRowTile / kStep;
  if (blockIdx.x >= *p.rows.plan.total) return;
  const int head = blockIdx.y;
  const TileEntry entry = p.rows.plan.entries[blockIdx.x];
  const int tile_row = (blockIdx.x - entry.first) * kRowTile;
  const int64_t place = (int64_t(head) * p.rows.max_tiles + blockIdx.x) * kRowTile;

  constexpr int kColumns = padded_columns(kHeadDim);
  float4* zeros = reinterpret_cast<float4*>(p.rows.dq + place * kColumns);
  for (int i = threadIdx.x; i < kRowTile * kColumns / 4; i += kPrepareThreads) zeros[i] = make_float4(0, 0, 0, 0);
  if (threadIdx.x < kTurns) p.rows.turns[place / kRowTile * kTurns + threadIdx.x] = 0;
  const int lane = threadIdx.x % kLanes;
#pragma unroll 4
  for (int r = threadIdx.x / kLanes; r < kRowTile; r += kPrepareThreads / kLanes) {
    const int step_row = tile_row + r / kStep * kStep;
    const int row = first_row(step_row, kStep, entry.length) + r % kStep;
    const int64_t token = entry.begin + row;
    const bool exists = row >= step_row && row < entry.length;
    float sum = 0.f;
    if (exists && lane * 8 < kHeadDim) {
      uint4 a = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.out) + (token * p.heads + head) * kHeadDim +
                                                lane * 8);
      uint4 b = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.dout) + token * p.dout_stride_token +
                                                head * p.dout_stride_head + lane * 8);
      const Pair* x = reinterpret_cast<const Pair*>(&a);
      const Pair* y = reinterpret_cast<const Pair*>(&b);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 u = unpack(x[i]), v = unpack(y[i]);
        sum = fmaf(u.x, v.x, fmaf(u.y, v.y, sum));
      }
    }
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) {
      const float lse = exists ? p.lse[token * p.heads + head] : minus_infinity();
      const bool empty = lse == minus_infinity();
      if (!empty && p.dlse != nullptr) sum -= p.dlse[token * p.heads + head];
      p.rows.lse[place + r] = empty ? plus_infinity() : lse * kLog2e;
      p.rows.delta[place + r] = empty ? 0.f : sum;
    }
  }
}

struct FinishParameters {
  RowWorkspace rows;
  void* dq;
  int heads;
  float scale;
};

// dq from its fp32 sums: the same threads hold the same fragments as the warpgroups that added them (see backward.cuh).
template <typename T, int kHeadDim, int kQueries>
__global__ void __launch_bounds__(2 * kWarpgroup) finish_dq_kernel(const FinishParameters p) {
  constexpr int kParts = kRowTile / kQueries;
  const int number = blockIdx.x / kParts;
  if (number >= *p.rows.plan.total) return;
  const int head = blockIdx.y, part = blockIdx.x % kParts;
  const TileEntry entry = p.rows.plan.entries[number];
  const int64_t token = entry.begin;
  const int step_row = (number - entry.first) * kRowTile + part * kQueries;
  if (step_row >= entry.length) return;

  const int consumer = threadIdx.x / kWarpgroup;
  const int64_t place = (int64_t(head) * p.rows.max_tiles + number) * kRowTile + part * kQueries;
  const float4* sums = reinterpret_cast<const float4*>(p.rows.dq + place * padded_columns(kHeadDim)) +
                       consumer * 8 * kWarpgroup + threadIdx.x % kWarpgroup;
  float dq[32];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float4 four = sums[i * kWarpgroup];
    dq[4 * i] = four.x, dq[4 * i + 1] = four.y, dq[4 * i + 2] = four.z, dq[4 * i + 3] = four.w;
  }
  const int row = first_row(step_row, kQueries, entry.length) + fragment_row() + (kQueries == 128 ? consumer * 64 : 0);
  T* address[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    T* begin = static_cast<T*>(p.dq) + ((token + row + 8 * i) * p.heads + head) * kHeadDim;
    const bool own = row + 8 * i >= step_row && row + 8 * i < entry.length;
    address[i] = own ? begin + (kQueries == 128 ? 0 : consumer * 64) : nullptr;
  }
  store_fragment<T, 64>(dq, p.scale, p.scale, address[0], address[1],
                        kQueries == 128 ? kHeadDim : kHeadDim - consumer * 64);
}

}  // namespace weighted_attention
