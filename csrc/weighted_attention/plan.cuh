// The tile list: which rows of which sample each block works on, most expensive samples first.
//
// Tiles never cross samples. Sample b owns the consecutive tiles first[b] .. first[b] + count - 1 for one head; over
// all heads the list is walked sample by sample, head by head, so that tiles sharing keys run together and find them in
// L2.
#pragma once

#include "ptx.cuh"

namespace weighted_attention {

struct alignas(16) TileEntry {
  int sample;
  int first;        // the sample's first tile
  int count;        // the sample's number of tiles
  int begin;        // the sample's first row
  int length;       // the sample's number of rows
  int other_begin;  // the same of the other side: keys for tiles of queries, queries for tiles of keys
  int other_length;
  int unused;
};

struct Plan {
  int* total;          // number of tiles of one head
  int* next;           // place that the next idle block takes, in launches that share out tiles as they go
  int* first;          // (samples,)
  TileEntry* entries;  // (total,)

  static __host__ __device__ int max_tiles(int tokens, int samples, int tile) { return tokens / tile + samples; }

  static size_t bytes(int tokens, int samples, int tile) {
    return 16 + (size_t(samples) * 4 + 15) / 16 * 16 + size_t(max_tiles(tokens, samples, tile)) * sizeof(TileEntry);
  }

  static Plan at(void* memory, int samples) {
    char* base = static_cast<char*>(memory);
    return {reinterpret_cast<int*>(base), reinterpret_cast<int*>(base + 4), reinterpret_cast<int*>(base + 16),
            reinterpret_cast<TileEntry*>(base + 16 + (size_t(samples) * 4 + 15) / 16 * 16)};
  }
};

struct Tile {
  int sample, head, index;
  int row;                          // first of the tile's rows, within the sample
  int begin, length;                // of the sample
  int other_begin, other_length;    // likewise, on the other side
};

// The tile at place `linear` of the walk over all heads.
__device__ __forceinline__ Tile find_tile(const Plan& plan, int linear, int heads, int rows) {
  const TileEntry entry = plan.entries[linear / heads];
  const int local = linear - entry.first * heads;
  Tile tile;
  tile.sample = entry.sample;
  tile.head = local / entry.count;
  tile.index = local - tile.head * entry.count;
  tile.row = tile.index * rows;
  tile.begin = entry.begin, tile.length = entry.length;
  tile.other_begin = entry.other_begin, tile.other_length = entry.other_length;
  return tile;
}

// Quarter-octave class of a cost, for the counting sort.
constexpr int kCostClasses = 128;
__device__ __forceinline__ int cost_class(int cost) {
  const int exponent = 31 - __clz(cost + 1);
  const int mantissa = exponent >= 2 ? ((cost + 1) >> (exponent - 2)) & 3 : 0;
  return kCostClasses - 1 - (exponent * 4 + mantissa);
}

constexpr int kPlanThreads = 1024;

// Block 0 plans tiles of `rows` of `cu_seqlens`, whose cost is the other side's length; block 1 the other way round.
// The place of a sample among equally expensive ones may differ between runs; no result depends on it.
static __global__ void __launch_bounds__(kPlanThreads) plan_kernel(const int* cu_first, int rows_first, Plan plan_first,
                                                            const int* cu_second, int rows_second, Plan plan_second,
                                                            int samples) {
  const int* cu = blockIdx.x == 0 ? cu_first : cu_second;
  const int* cu_other = blockIdx.x == 0 ? cu_second : cu_first;
  const int rows = blockIdx.x == 0 ? rows_first : rows_second;
  const Plan plan = blockIdx.x == 0 ? plan_first : plan_second;

  __shared__ int place[kCostClasses];
  for (int c = threadIdx.x; c < kCostClasses; c += kPlanThreads) place[c] = 0;
  __syncthreads();
  for (int b = threadIdx.x; b < samples; b += kPlanThreads) {
    const int tiles = (cu[b + 1] - cu[b] + rows - 1) / rows;
    atomicAdd(&place[cost_class(cu_other[b + 1] - cu_other[b])], tiles);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int sum = 0;
    for (int c = 0; c < kCostClasses; ++c) {
      const int tiles = place[c];
      place[c] = sum;
      sum += tiles;
    }
    *plan.total = sum;
    *plan.next = 0;
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  for (int b = threadIdx.x / 32; b < samples; b += kPlanThreads / 32) {
    const int tiles = (cu[b + 1] - cu[b] + rows - 1) / rows;
    int first = 0;
    if (lane == 0) {
      first = atomicAdd(&place[cost_class(cu_other[b + 1] - cu_other[b])], tiles);
      plan.first[b] = first;
    }
    first = __shfl_sync(0xffffffffu, first, 0);
    const TileEntry entry{b, first, tiles, cu[b], cu[b + 1] - cu[b], cu_other[b], cu_other[b + 1] - cu_other[b], 0};
    for (int t = lane; t < tiles; t += 32) plan.entries[first + t] = entry;
  }
}

}  // namespace weighted_attention
