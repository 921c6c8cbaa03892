// The last round of tiles of keys, shared out among all multiprocessors.
//
// A block works on one tile of keys and has a multiprocessor to itself, so the tiles run in rounds, and the last round
// would leave multiprocessors idle. Its tiles are therefore cut: each run of queries in `parts` pieces, one block for
// each. A part writes its sums of dk and dv in fp32, and sum_parts_kernel adds them up, in their order.
#pragma once

#include "plan.cuh"
#include "tile.cuh"

namespace weighted_attention {

// Of a block: piece `part` of `parts` of every run of its tile's queries; `slot` is the place of its sums, -1: it has
// the tile to itself.
struct Share {
  int part, parts, slot;
};

// Sums of the parts, those of a tile one after the other: (parts, 2 warpgroups, head_dim / 4, 128 threads).
struct Parts {
  int multiprocessors;
  int most;  // parts of all tiles together
  float4* sums;
};

// With head_dim 64 the walk has no registers left for it, and loses more than the last round gains.
__host__ __device__ constexpr bool shares_rounds(int head_dim) { return head_dim > 64; }

constexpr int kMostRounds = 2;          // that the last round is replaced by
constexpr float kBlockQueries = 160.f;  // what a block's beginning and end cost, in queries that take as long
constexpr int kLeastPartQueries = 512;  // of a part

// How the tiles behind the whole rounds are cut.
struct Cut {
  int whole, rest, parts;
};

__device__ __forceinline__ int whole_rounds(int tiles, const Parts& parts) {
  return tiles / parts.multiprocessors * parts.multiprocessors;
}

__device__ __forceinline__ Cut find_cut(const Plan& plan, int heads, int group, const Parts& parts) {
  const int tiles = *plan.total * heads, whole = whole_rounds(tiles, parts);
  Cut cut{whole, tiles - whole, 1};
  if (cut.rest == 0) return cut;
  const int64_t queries = int64_t(plan.entries[whole / heads].cost) * group;  // of the costliest of them
  float least = float(queries) + kBlockQueries;
  for (int rounds = 1; rounds <= kMostRounds; ++rounds) {
    const int64_t blocks = rounds * parts.multiprocessors / cut.rest;
    const int pieces = int(max(int64_t(1), min(blocks, queries / kLeastPartQueries)));
    const float time = rounds * (float(queries) / pieces + kBlockQueries);
    if (time < least) least = time, cut.parts = pieces;
  }
  return cut;
}

// Of the block `number` behind the whole rounds.
__device__ __forceinline__ Share find_share(const Cut& cut, int number) {
  return {number % cut.parts, cut.parts, cut.parts > 1 ? number : -1};
}

// Visits the places of a lane of `warpgroup` (of the two) in a part's sums, four elements each.
template <int kHeadDim, class Visit>
__device__ __forceinline__ void visit_sums(float4* sums, int64_t part, int warpgroup, float (&dk)[kHeadDim / 2],
                                           float (&dv)[kHeadDim / 2], Visit visit) {
  float4* const begin = sums + (part * 2 + warpgroup) * (kHeadDim / 4) * kWarpgroup + threadIdx.x % kWarpgroup;
#pragma unroll
  for (int i = 0; i < kHeadDim / 8; ++i) {
    visit(begin[i * kWarpgroup], &dk[4 * i]);
    visit(begin[(kHeadDim / 8 + i) * kWarpgroup], &dv[4 * i]);
  }
}

// A lane's two rows of a tile's dk and dv, from `key` on, where the sample has them and they are the tile's own.
template <typename T, int kHeadDim>
__device__ __forceinline__ void store_keys(const float (&dk)[kHeadDim / 2], const float (&dv)[kHeadDim / 2],
                                           const Tile& tile, int key, int heads, float scale, void* all_dk,
                                           void* all_dv) {
  T* rows[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t place = (int64_t(tile.begin + key + 8 * i) * heads + tile.head) * kHeadDim;
    const bool exists = key + 8 * i >= tile.row && key + 8 * i < tile.length;
    rows[0][i] = exists ? static_cast<T*>(all_dk) + place : nullptr;
    rows[1][i] = exists ? static_cast<T*>(all_dv) + place : nullptr;
  }
  store_fragment<T, kHeadDim>(dk, scale, scale, rows[0][0], rows[0][1]);
  store_fragment<T, kHeadDim>(dv, 1.f, 1.f, rows[1][0], rows[1][1]);
}

struct SumPartsParameters {
  Plan plan;  // tiles of keys
  Parts parts;
  void* dk;
  void* dv;
  int heads, group;
  float scale;
};

// One block for each tile that was cut; the threads hold what the two warpgroups held.
template <typename T, int kHeadDim, int kKeys>
__global__ void __launch_bounds__(2 * kWarpgroup) sum_parts_kernel(const SumPartsParameters p) {
  const Cut cut = find_cut(p.plan, p.heads, p.group, p.parts);
  if (cut.parts == 1 || blockIdx.x >= cut.rest) return;
  const int warpgroup = threadIdx.x / kWarpgroup;
  float dk[kHeadDim / 2] = {}, dv[kHeadDim / 2] = {};
  for (int part = 0; part < cut.parts; ++part) {
    visit_sums<kHeadDim>(p.parts.sums, blockIdx.x * cut.parts + part, warpgroup, dk, dv,
                         [](const float4& sum, float* x) {
                           x[0] += sum.x, x[1] += sum.y, x[2] += sum.z, x[3] += sum.w;
                         });
  }
  const Tile tile = find_tile(p.plan, cut.whole + blockIdx.x, p.heads, kKeys);
  const int key = first_row(tile.row, kKeys, tile.length) + warpgroup * 64 + fragment_row();
  store_keys<T, kHeadDim>(dk, dv, tile, key, p.heads, p.scale, p.dk, p.dv);
}

}  // namespace weighted_attention
