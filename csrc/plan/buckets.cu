// See buckets.h. The place of an item is the number of items before it that have its owner: counted per tile, added up over tiles, and
// counted again while items are placed. Each of the three launches starts beside the end of the one before it.
#include "buckets.h"

#include "common.cuh"

namespace plan {
namespace {

constexpr int kWarps = kThreads / 32, kRounds = 8;
constexpr int kTile = kThreads * kRounds;  // a warp has 256 items in a row

struct Counted {
  unsigned* tiles;  // (ranks, tiles): items of a tile, then of all tiles before it
  int64_t* sent;    // (ranks)
  int64_t number;   // of tiles

  // Returns the bytes it takes of the workspace.
  static size_t carve(const Items& x, void* workspace, Counted* counted) {
    counted->number = ceil_div(x.n, kTile);
    const size_t bytes = (sizeof(unsigned) * x.ranks * counted->number + 15) / 16 * 16;
    counted->tiles = static_cast<unsigned*>(workspace);
    counted->sent = reinterpret_cast<int64_t*>(static_cast<char*>(workspace) + bytes);
    return bytes + sizeof(int64_t) * x.ranks;
  }
};

// Each item of the warp in a tile, in order, with its owner, -1 where it goes nowhere: from `end` on, and without one of the ranks.
template <typename Visit>
__device__ __forceinline__ void each_item(const Items& x, int64_t tile, int64_t end, Visit visit) {
  const int64_t first = tile * kTile + (threadIdx.x / 32) * (32 * kRounds) + lane();
  int64_t owner[kRounds];
#pragma unroll
  for (int k = 0; k < kRounds; ++k) owner[k] = first + 32 * k < end ? x.owner[first + 32 * k] : -1;
#pragma unroll
  for (int k = 0; k < kRounds; ++k) {
    const bool goes = owner[k] >= 0 && owner[k] < x.ranks;
    visit(k, goes ? int(owner[k]) : -1);
  }
}

// Adds the warp's items to its counters; returns how many of the same owner came before. Every lane calls it.
__device__ __forceinline__ unsigned count(unsigned* counters, int owner) {
  const unsigned peers = __match_any_sync(kFull, owner), before = peers & lanes_below();
  unsigned at = owner >= 0 ? counters[owner] : 0;
  __syncwarp();
  if (owner >= 0 && before == 0) counters[owner] = at + __popc(peers);
  __syncwarp();
  return at + __popc(before);
}

// What each warp of the block counts in a tile before `end`, (warps, ranks) in shared memory.
__device__ __forceinline__ unsigned* count_tile(const Items& x, int64_t tile, int64_t end) {
  extern __shared__ unsigned counters[];
  for (int i = threadIdx.x; i < kWarps * x.ranks; i += kThreads) counters[i] = 0;
  __syncthreads();
  unsigned* mine = counters + (threadIdx.x / 32) * x.ranks;
  each_item(x, tile, end, [&](int, int owner) { count(mine, owner); });
  __syncthreads();
  return counters;
}

__device__ __forceinline__ unsigned sum_of_warps(const Items& x, const unsigned* counters, int rank) {
  unsigned sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += counters[w * x.ranks + rank];
  return sum;
}

__global__ void __launch_bounds__(kThreads) tile_kernel(const Items x, const Counted out) {
  let_next_launch();
  const unsigned* counters = count_tile(x, blockIdx.x, x.bounds[x.samples]);
  for (int r = threadIdx.x; r < x.ranks; r += kThreads) out.tiles[r * out.number + blockIdx.x] = sum_of_warps(x, counters, r);
}

// One block per owner: what lies before each tile.
__global__ void __launch_bounds__(kThreads) scan_kernel(const Counted out) {
  __shared__ unsigned shared[33];
  let_next_launch();
  wait_for_launch_before();
  unsigned* tiles = out.tiles + blockIdx.x * out.number;
  unsigned before = 0;
  for (int64_t first = 0; first < out.number; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    unsigned total;
    const unsigned sum = block_exclusive(i < out.number ? tiles[i] : 0u, shared, &total);
    if (i < out.number) tiles[i] = before + sum;
    before += total;
  }
  if (threadIdx.x == 0) out.sent[blockIdx.x] = before;
}

// How many items the fullest bucket should hold.
__device__ __forceinline__ int64_t fullest(const Items& x, const Counted& counted) {
  int64_t found = 0;
  for (int64_t r = lane(); r < x.ranks; r += 32) found = max(found, counted.sent[r]);
#pragma unroll
  for (int d = 16; d > 0; d /= 2) found = max(found, __shfl_xor_sync(kFull, found, d));
  return found;
}

// Values of items to places of their owners' buckets, as many of each as there are rounds, all read before the first is written. An owner
// of -1 has none.
template <int kNumber>
__device__ __forceinline__ void put(const Values& values, const int64_t (&item)[kNumber], const int (&owner)[kNumber],
                                    const int64_t (&at)[kNumber]) {
  for (int v = 0; v < values.number; ++v) {
    const char* from = static_cast<const char*>(values.from[v]);
    char* to = static_cast<char*>(values.to[v]);
    const int bytes = values.bytes[v], sent = values.sent_bytes[v];
    int64_t value[kNumber];
#pragma unroll
    for (int k = 0; k < kNumber; ++k)
      if (owner[k] >= 0)
        value[k] = bytes == 8 ? reinterpret_cast<const int64_t*>(from)[item[k]] : reinterpret_cast<const int32_t*>(from)[item[k]];
#pragma unroll
    for (int k = 0; k < kNumber; ++k) {
      if (owner[k] < 0) continue;
      char* place = to + owner[k] * values.stride[v] + at[k] * sent;
      if (sent == 8)
        *reinterpret_cast<int64_t*>(place) = value[k];
      else
        *reinterpret_cast<int32_t*>(place) = bytes == 8 && uint64_t(value[k]) > uint64_t(INT32_MAX) ? -1 : int32_t(value[k]);
    }
  }
}

// The items of a tile to their places; and its share of the places without one.
__device__ void place(const Items& x, const Counted& counted, int64_t tile) {
  const int64_t end = x.bounds[x.samples];
  unsigned* counters = count_tile(x, tile, end);
  wait_for_launch_before();
  for (int r = threadIdx.x; r < x.ranks; r += kThreads) {  // where each warp begins
    unsigned at = counted.tiles[r * counted.number + tile];
    for (int w = 0; w < kWarps; ++w) {
      const unsigned own = counters[w * x.ranks + r];
      counters[w * x.ranks + r] = at;
      at += own;
    }
  }
  __syncthreads();
  unsigned* mine = counters + (threadIdx.x / 32) * x.ranks;
  int64_t item[kRounds], at[kRounds];
  int owner[kRounds];
  each_item(x, tile, end, [&](int k, int to) {
    item[k] = tile * kTile + (threadIdx.x / 32) * (32 * kRounds) + lane() + 32 * k;
    at[k] = count(mine, to);
    owner[k] = at[k] < x.bound ? to : -1;
  });
  put(x.values, item, owner, at);
  for (int r = 0; r < x.ranks; ++r)
    for (int64_t i = counted.sent[r] + tile * kThreads + threadIdx.x; i < x.bound; i += counted.number * kThreads)
      put<1>(x.values, {i % x.n}, {r}, {i});
}

// How many of a sample's items go to each rank: what lies before its end, less what lies before its begin. None if a bucket is too small.
__device__ void size(const Items& x, const Counted& counted, int64_t sample, int64_t* sizes, int64_t stride) {
  for (int last = 0; last < 2; ++last) {
    const int64_t end = x.bounds[sample + last], tile = min(end / kTile, counted.number - 1);
    const unsigned* counters = count_tile(x, tile, end);
    wait_for_launch_before();
    const bool fits = fullest(x, counted) <= x.bound;
    for (int r = threadIdx.x; r < x.ranks; r += kThreads) {
      const int64_t before = fits ? counted.tiles[r * counted.number + tile] + sum_of_warps(x, counters, r) : 0;
      int64_t* to = sizes + r * stride + sample;
      *to = last ? before - *to : before;
    }
    __syncthreads();
  }
}

// A block for each tile, then one for each sample.
__global__ void __launch_bounds__(kThreads) place_kernel(const Items x, const Counted counted, int64_t* sizes, int64_t stride,
                                                         int64_t* most) {
  const int64_t sample = int64_t(blockIdx.x) - counted.number;
  if (sample >= 0) return size(x, counted, sample, sizes, stride);
  place(x, counted, blockIdx.x);
  if (blockIdx.x > 0 || threadIdx.x >= 32) return;
  const int64_t found = fullest(x, counted);
  if (threadIdx.x == 0) *most = found;
}

// The bucket of a row that lies at `at` among those together: the last that begins there or before.
__device__ __forceinline__ int64_t bucket_of(const Received& x, int64_t at) {
  int64_t low = 0, high = x.ranks;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (x.bounds[middle * x.samples] <= at ? low : high) = middle;
  }
  return low;
}

// Together, a word of a row becomes a To.
template <typename Word, typename To, bool kTogether>
__global__ void __launch_bounds__(kThreads) move_kernel(const Received x, const char* from, char* to) {
  const int64_t words = x.row / int64_t(sizeof(Word)), i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= x.ranks * x.bound * words) return;
  const int64_t row = words == 1 ? i : i / words, byte = (i - row * words) * int64_t(sizeof(Word));
  if constexpr (kTogether) {
    Word value = 0;
    if (row < x.bounds[x.ranks * x.samples]) {
      const int64_t r = bucket_of(x, row), place = row - x.bounds[r * x.samples];
      value = *reinterpret_cast<const Word*>(from + r * x.stride + place * x.row + byte);
    }
    reinterpret_cast<To*>(to)[i] = To(value);
  } else {
    const int64_t r = row / x.bound, place = row - r * x.bound, begin = x.bounds[r * x.samples];
    const bool there = place < x.bounds[(r + 1) * x.samples] - begin;
    *reinterpret_cast<Word*>(to + r * x.stride + place * x.row + byte) =
        there ? *reinterpret_cast<const Word*>(from + (begin + place) * x.row + byte) : Word(0);
  }
}

template <typename Word, typename To, bool kTogether>
cudaError_t move_words(const Received& x, const void* from, void* to, cudaStream_t stream) {
  const int64_t n = x.ranks * x.bound * (x.row / int64_t(sizeof(Word)));
  if (n > 0)
    move_kernel<Word, To, kTogether><<<unsigned(ceil_div(n, kThreads)), kThreads, 0, stream>>>(x, static_cast<const char*>(from),
                                                                                              static_cast<char*>(to));
  return cudaGetLastError();
}

template <bool kTogether>
cudaError_t move(const Received& x, const void* from, void* to, cudaStream_t stream) {
  const uint64_t aligned = uint64_t(x.row) | uint64_t(x.stride) | reinterpret_cast<uint64_t>(from) | reinterpret_cast<uint64_t>(to);
  if (aligned % 8 == 0) return move_words<uint64_t, uint64_t, kTogether>(x, from, to, stream);
  if (aligned % 4 == 0) return move_words<uint32_t, uint32_t, kTogether>(x, from, to, stream);
  if (aligned % 2 == 0) return move_words<uint16_t, uint16_t, kTogether>(x, from, to, stream);
  return move_words<uint8_t, uint8_t, kTogether>(x, from, to, stream);
}

// One block.
constexpr int kBoundsThreads = 1024, kEach = 8;
__global__ void __launch_bounds__(kBoundsThreads) bounds_kernel(const int64_t* sizes, unsigned ranks, unsigned samples, int64_t stride,
                                                                int32_t* bounds) {
  __shared__ int32_t shared[33];
  const unsigned n = ranks * samples;
  int32_t before = 0;
  for (unsigned begin = 0; begin < n; begin += kBoundsThreads * kEach) {
    const unsigned first = begin + threadIdx.x * kEach;
    int32_t size[kEach], sum = 0, total;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const unsigned i = first + k, r = i / samples;
      size[k] = i < n ? int32_t(sizes[r * stride + (i - r * samples)]) : 0;
      sum += size[k];
    }
    int32_t at = before + block_exclusive(sum, shared, &total);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (first + k < n) bounds[first + k] = at;
      at += size[k];
    }
    before += total;
  }
  if (threadIdx.x == 0) bounds[n] = before;
}

}  // namespace

cudaError_t bucket_workspace_bytes(const Items& x, size_t* bytes) {
  Counted counted;
  *bytes = Counted::carve(x, nullptr, &counted);
  return cudaSuccess;
}

cudaError_t bucket(const Items& x, int64_t* sizes, int64_t stride, int64_t* most, void* workspace, cudaStream_t stream) {
  Counted counted;
  Counted::carve(x, workspace, &counted);
  const size_t shared = sizeof(unsigned) * kWarps * x.ranks;
  tile_kernel<<<unsigned(counted.number), kThreads, shared, stream>>>(x, counted);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  TA_RETURN_IF_ERROR(launch_early(scan_kernel, dim3(unsigned(x.ranks)), dim3(kThreads), 0, stream, counted));
  return launch_early(place_kernel, dim3(unsigned(counted.number + x.samples)), dim3(kThreads), shared, stream, x, counted, sizes, stride,
                      most);
}

cudaError_t bounds(const int64_t* sizes, int64_t ranks, int64_t samples, int64_t stride, int32_t* bounds, cudaStream_t stream) {
  bounds_kernel<<<1, kBoundsThreads, 0, stream>>>(sizes, unsigned(ranks), unsigned(samples), stride, bounds);
  return cudaGetLastError();
}

cudaError_t compact(const Received& x, const void* buckets, void* together, cudaStream_t stream) {
  return move<true>(x, buckets, together, stream);
}

cudaError_t compact_widened(const Received& x, const int32_t* buckets, int64_t* together, cudaStream_t stream) {
  return move_words<int32_t, int64_t, true>(x, buckets, together, stream);
}

cudaError_t spread(const Received& x, const void* together, void* buckets, cudaStream_t stream) {
  return move<false>(x, together, buckets, stream);
}

}  // namespace plan
