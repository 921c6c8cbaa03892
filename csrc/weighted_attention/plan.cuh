// The tile list: which rows of which chunk or sample each block works on, most expensive ones first.
//
// Tiles never cross chunks of queries or samples of keys. Each of these owns the consecutive tiles
// first .. first + count - 1 for one head; over all heads the list is walked owner by owner, head by head, so that
// tiles sharing keys run together and find them in L2. Where the tiles of an owner differ in cost (causal), they are
// placed one by one instead, and over the heads the list is walked tile by tile (find_single_tile).
#pragma once

#include "ptx.cuh"

namespace weighted_attention {

// Who sees what: chunk c of queries sees the first keys of its sample (api.h).
struct Sequences {
  const int* cu_seqlens_q;  // (chunks + 1,)
  const int* cu_seqlens_k;  // (samples + 1,)
  const int* cu_chunks;     // (samples + 1,) or null
  const int* k_visible;     // (chunks,) or null
  int chunks, samples;

  __device__ __forceinline__ int first_chunk(int sample) const {
    return cu_chunks == nullptr ? sample : cu_chunks[sample];
  }

  __device__ __forceinline__ int sample_of(int chunk) const {
    if (cu_chunks == nullptr) return chunk;
    int low = 0, high = samples;  // cu_chunks[low] <= chunk < cu_chunks[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (cu_chunks[middle] <= chunk ? low : high) = middle;
    }
    return low;
  }

  // Keys that the chunk sees, of `keys` in its sample.
  __device__ __forceinline__ int visible(int chunk, int keys) const {
    return k_visible == nullptr ? keys : max(0, min(keys, k_visible[chunk]));
  }
};

struct alignas(16) TileEntry {
  int owner;        // the chunk, for tiles of queries; the sample, for tiles of keys
  int first;        // the owner's first tile; of a tile placed by itself: which of its owner's it is
  int count;        // the owner's number of tiles
  int begin;        // the owner's first row
  int length;       // the owner's number of rows
  int other_begin;  // tiles of queries: the sample's first key; tiles of keys: the sample's first chunk
  int other_length; // the number of keys that the chunk sees; of the sample's chunks
  int cost;         // rows on the other side
};

struct Plan {
  int* total;          // number of tiles of one head
  int* next;           // place that the next idle block takes, in launches that share out tiles as they go
  int* first;          // (owners,)
  TileEntry* entries;  // (total,)

  static __host__ __device__ int max_tiles(int tokens, int owners, int tile) { return tokens / tile + owners; }

  static size_t bytes(int tokens, int owners, int tile) {
    return 16 + (size_t(owners) * 4 + 15) / 16 * 16 + size_t(max_tiles(tokens, owners, tile)) * sizeof(TileEntry);
  }

  static Plan at(void* memory, int owners) {
    char* base = static_cast<char*>(memory);
    return {reinterpret_cast<int*>(base), reinterpret_cast<int*>(base + 4), reinterpret_cast<int*>(base + 16),
            reinterpret_cast<TileEntry*>(base + 16 + (size_t(owners) * 4 + 15) / 16 * 16)};
  }
};

struct Tile {
  int owner, head;
  int row;                          // first of the tile's rows, within its owner
  int begin, length;                // of the owner
  int other_begin, other_length;    // see TileEntry
};

// The tile at place `linear` of the walk over all heads; `reverse`: an owner's last tile first.
__device__ __forceinline__ Tile find_tile(const Plan& plan, int linear, int heads, int rows, bool reverse = false) {
  const TileEntry entry = plan.entries[linear / heads];
  const int local = linear - entry.first * heads;
  Tile tile;
  tile.owner = entry.owner;
  tile.head = local / entry.count;
  const int index = local - tile.head * entry.count;
  tile.row = (reverse ? entry.count - 1 - index : index) * rows;
  tile.begin = entry.begin, tile.length = entry.length;
  tile.other_begin = entry.other_begin, tile.other_length = entry.other_length;
  return tile;
}

// The same in another order: so many of an owner's heads together as have up to `rows_together` rows on the other side,
// all their first tiles, then all their second ones; `reverse`: from the last tiles on.
__device__ __forceinline__ Tile find_tile_abreast(const Plan& plan, int linear, int heads, int rows, int rows_together,
                                                  bool reverse) {
  const TileEntry entry = plan.entries[linear / heads];
  const int together = max(1, min(heads, rows_together / max(1, entry.cost)));
  const int batch = together * entry.count;
  int local = linear - entry.first * heads;
  const int first_head = local / batch * together;
  local %= batch;
  const int width = min(together, heads - first_head);
  const int index = reverse ? entry.count - 1 - local / width : local / width;
  return {entry.owner, first_head + local % width, index * rows, entry.begin, entry.length,
          entry.other_begin, entry.other_length};
}

// The same in a list of tiles placed one by one. `together` heads at a time, so many that L2 holds their keys: all tiles
// of the first ones, then of the next.
__device__ __forceinline__ Tile find_single_tile(const Plan& plan, int linear, int heads, int together, int rows) {
  const int batch = *plan.total * together;  // tiles of so many heads
  const int first_head = linear / batch * together;
  const int width = min(together, heads - first_head);
  const int local = linear % batch;
  const TileEntry entry = plan.entries[local / width];
  return {entry.owner, first_head + local % width, entry.first * rows, entry.begin, entry.length,
          entry.other_begin, entry.other_length};
}

// Quarter-octave class of a cost, for the counting sort.
constexpr int kCostClasses = 128;
__device__ __forceinline__ int cost_class(int cost) {
  const int exponent = 31 - __clz(cost + 1);
  const int mantissa = exponent >= 2 ? ((cost + 1) >> (exponent - 2)) & 3 : 0;
  return kCostClasses - 1 - (exponent * 4 + mantissa);
}

// The entry of owner b, its tiles not yet placed.
__device__ __forceinline__ TileEntry chunk_of_queries(const Sequences& s, int b, int rows) {
  const int begin = s.cu_seqlens_q[b], length = s.cu_seqlens_q[b + 1] - begin;
  const int sample = s.sample_of(b), key = s.cu_seqlens_k[sample];
  const int keys = s.visible(b, s.cu_seqlens_k[sample + 1] - key);
  return {b, 0, (length + rows - 1) / rows, begin, length, key, keys, keys};
}

__device__ __forceinline__ TileEntry sample_of_keys(const Sequences& s, int b, int rows) {
  const int begin = s.cu_seqlens_k[b], length = s.cu_seqlens_k[b + 1] - begin;
  const int chunk = s.first_chunk(b), end = s.first_chunk(b + 1);
  const int queries = s.cu_seqlens_q[end] - s.cu_seqlens_q[chunk];
  return {b, 0, (length + rows - 1) / rows, begin, length, chunk, end - chunk, queries};
}

constexpr int kPlanThreads = 1024;

// Block 0 plans tiles of queries, block 1 tiles of keys. The place of an owner among equally expensive ones may differ
// between runs; no result depends on it. `single`: tiles of queries are placed one by one, as causal ones cost.
static __global__ void __launch_bounds__(kPlanThreads)
    plan_kernel(const Sequences sequences, int rows_q, Plan plan_q, int rows_k, Plan plan_k, bool single = false) {
  const bool of_queries = blockIdx.x == 0;
  const int owners = of_queries ? sequences.chunks : sequences.samples;
  const Plan plan = of_queries ? plan_q : plan_k;
  const auto entry_of = [&](int b) {
    return of_queries ? chunk_of_queries(sequences, b, rows_q) : sample_of_keys(sequences, b, rows_k);
  };

  __shared__ int place[kCostClasses];
  for (int c = threadIdx.x; c < kCostClasses; c += kPlanThreads) place[c] = 0;
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const auto class_of_single = [&](const TileEntry& entry, int t) {
    return cost_class(min(entry.cost, (t + 1) * rows_q));
  };
  if (single) {
    for (int b = threadIdx.x / 32; b < owners; b += kPlanThreads / 32) {
      const TileEntry entry = entry_of(b);
      for (int t = lane; t < entry.count; t += 32) atomicAdd(&place[class_of_single(entry, t)], 1);
    }
  } else {
    for (int b = threadIdx.x; b < owners; b += kPlanThreads) {
      const TileEntry entry = entry_of(b);
      atomicAdd(&place[cost_class(entry.cost)], entry.count);
    }
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
  for (int b = threadIdx.x / 32; b < owners; b += kPlanThreads / 32) {
    TileEntry entry = entry_of(b);
    if (single) {
      for (int t = lane; t < entry.count; t += 32) {
        entry.first = t;
        plan.entries[atomicAdd(&place[class_of_single(entry, t)], 1)] = entry;
      }
      continue;
    }
    if (lane == 0) {
      entry.first = atomicAdd(&place[cost_class(entry.cost)], entry.count);
      plan.first[b] = entry.first;
    }
    entry.first = __shfl_sync(0xffffffffu, entry.first, 0);
    for (int t = lane; t < entry.count; t += 32) plan.entries[entry.first + t] = entry;
  }
}

}  // namespace weighted_attention
