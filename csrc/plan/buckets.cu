// See buckets.h. The place of an item is the number of items before it that have its owner: counted per tile, added up over tiles, and
// counted again while items are placed.
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

// Each item of the warp, in order, with its owner, -1 where it goes nowhere.
template <typename Visit>
__device__ __forceinline__ void each_item(const Items& x, int64_t end, Visit visit) {
  const int64_t first = int64_t(blockIdx.x) * kTile + (threadIdx.x / 32) * (32 * kRounds) + lane();
  int64_t owner[kRounds];
#pragma unroll
  for (int k = 0; k < kRounds; ++k) owner[k] = first + 32 * k < end ? x.owner[first + 32 * k] : -1;
#pragma unroll
  for (int k = 0; k < kRounds; ++k) {
    const bool goes = owner[k] >= 0 && owner[k] < x.ranks;
    visit(first + 32 * k, goes ? int(owner[k]) : -1);
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

__device__ __forceinline__ unsigned* clear_counters(int64_t ranks) {
  extern __shared__ unsigned counters[];  // (warps, ranks)
  for (int i = threadIdx.x; i < kWarps * ranks; i += kThreads) counters[i] = 0;
  __syncthreads();
  return counters;
}

__global__ void __launch_bounds__(kThreads) tile_kernel(const Items x, const Counted out) {
  unsigned* counters = clear_counters(x.ranks);
  unsigned* mine = counters + (threadIdx.x / 32) * x.ranks;
  each_item(x, x.bounds[x.samples], [&](int64_t, int owner) { count(mine, owner); });
  __syncthreads();
  for (int r = threadIdx.x; r < x.ranks; r += kThreads) {
    unsigned sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += counters[w * x.ranks + r];
    out.tiles[r * out.number + blockIdx.x] = sum;
  }
}

// One block per owner: what lies before each tile.
__global__ void __launch_bounds__(kThreads) scan_kernel(const Counted out) {
  __shared__ unsigned shared[33];
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

__global__ void __launch_bounds__(kThreads) place_kernel(const Items x, const Counted counted, int64_t* take) {
  unsigned* counters = clear_counters(x.ranks);
  unsigned* mine = counters + (threadIdx.x / 32) * x.ranks;
  each_item(x, x.bounds[x.samples], [&](int64_t, int owner) { count(mine, owner); });
  __syncthreads();
  for (int r = threadIdx.x; r < x.ranks; r += kThreads) {  // where each warp begins
    unsigned at = counted.tiles[r * counted.number + blockIdx.x];
    for (int w = 0; w < kWarps; ++w) {
      const unsigned own = counters[w * x.ranks + r];
      counters[w * x.ranks + r] = at;
      at += own;
    }
  }
  __syncthreads();
  each_item(x, x.bounds[x.samples], [&](int64_t item, int owner) {
    const unsigned at = count(mine, owner);
    if (owner >= 0 && at < x.bound) take[owner * x.bound + at] = item;
  });
}

// Blocks (sample, part). Counts are whole numbers, so the order of additions does not matter.
__global__ void __launch_bounds__(kThreads) sizes_kernel(const Items x, int64_t* sizes) {
  extern __shared__ unsigned counts[];
  for (int64_t sample = blockIdx.x; sample < x.samples; sample += gridDim.x) {
    const int64_t begin = x.bounds[sample], share = (x.bounds[sample + 1] - begin + gridDim.y - 1) / gridDim.y;
    const int64_t from = begin + share * blockIdx.y, to = min(from + share, int64_t(x.bounds[sample + 1]));
    if (from >= to) continue;
    for (int r = threadIdx.x; r < x.ranks; r += kThreads) counts[r] = 0;
    __syncthreads();
    for (int64_t i = from + threadIdx.x; i - threadIdx.x < to; i += kThreads) {
      const int64_t owner = i < to ? x.owner[i] : -1;
      const bool goes = owner >= 0 && owner < x.ranks;
      const unsigned peers = __match_any_sync(kFull, goes ? int(owner) : -1);
      if (goes && (peers & lanes_below()) == 0) atomicAdd(counts + owner, unsigned(__popc(peers)));
    }
    __syncthreads();
    for (int r = threadIdx.x; r < x.ranks; r += kThreads)
      if (counts[r] > 0)
        atomicAdd(reinterpret_cast<unsigned long long*>(sizes + r * x.samples + sample), (unsigned long long)counts[r]);
    __syncthreads();
  }
}

// Places without an item, and nothing at all where a bucket is too small.
__global__ void __launch_bounds__(kThreads) rest_kernel(const Items x, const Counted counted, int64_t* take, int64_t* sizes,
                                                        int64_t* most) {
  __shared__ int64_t fullest;
  if (threadIdx.x < 32) {
    int64_t found = 0;
    for (int64_t r = lane(); r < x.ranks; r += 32) found = max(found, counted.sent[r]);
#pragma unroll
    for (int d = 16; d > 0; d /= 2) found = max(found, __shfl_xor_sync(kFull, found, d));
    fullest = found;
  }
  __syncthreads();
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i == 0) *most = fullest;
  if (i < x.ranks * x.samples && fullest > x.bound) sizes[i] = 0;
  if (i >= x.ranks * x.bound) return;
  const int64_t place = i % x.bound;
  if (place >= counted.sent[i / x.bound]) take[i] = place % x.n;
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

template <typename Word, bool kTogether>
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
    *reinterpret_cast<Word*>(to + row * x.row + byte) = value;
  } else {
    const int64_t r = row / x.bound, place = row - r * x.bound, begin = x.bounds[r * x.samples];
    const bool there = place < x.bounds[(r + 1) * x.samples] - begin;
    *reinterpret_cast<Word*>(to + r * x.stride + place * x.row + byte) =
        there ? *reinterpret_cast<const Word*>(from + (begin + place) * x.row + byte) : Word(0);
  }
}

template <bool kTogether>
cudaError_t move(const Received& x, const void* from, void* to, cudaStream_t stream) {
  const uint64_t aligned = uint64_t(x.row) | uint64_t(x.stride) | reinterpret_cast<uint64_t>(from) | reinterpret_cast<uint64_t>(to);
  const auto launch = [&](auto word) {
    using Word = decltype(word);
    const int64_t n = x.ranks * x.bound * (x.row / int64_t(sizeof(Word)));
    if (n > 0)
      move_kernel<Word, kTogether><<<unsigned(ceil_div(n, kThreads)), kThreads, 0, stream>>>(
          x, static_cast<const char*>(from), static_cast<char*>(to));
    return cudaGetLastError();
  };
  if (aligned % 8 == 0) return launch(uint64_t(0));
  if (aligned % 4 == 0) return launch(uint32_t(0));
  return aligned % 2 == 0 ? launch(uint16_t(0)) : launch(uint8_t(0));
}

}  // namespace

cudaError_t bucket_workspace_bytes(const Items& x, size_t* bytes) {
  Counted counted;
  *bytes = Counted::carve(x, nullptr, &counted);
  return cudaSuccess;
}

cudaError_t bucket(const Items& x, int64_t* take, int64_t* sizes, int64_t* most, void* workspace, cudaStream_t stream) {
  Counted counted;
  Counted::carve(x, workspace, &counted);
  TA_RETURN_IF_ERROR(cudaMemsetAsync(sizes, 0, sizeof(int64_t) * x.ranks * x.samples, stream));
  const unsigned tiles = unsigned(counted.number);
  const size_t shared = sizeof(unsigned) * kWarps * x.ranks;
  tile_kernel<<<tiles, kThreads, shared, stream>>>(x, counted);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  scan_kernel<<<unsigned(x.ranks), kThreads, 0, stream>>>(counted);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  place_kernel<<<tiles, kThreads, shared, stream>>>(x, counted, take);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  if (x.samples > 0) {
    const int64_t wide = x.samples < 65535 ? x.samples : 65535, parts = wide >= 1024 ? 1 : 1024 / wide;
    sizes_kernel<<<dim3(unsigned(wide), unsigned(parts)), kThreads, sizeof(unsigned) * x.ranks, stream>>>(x, sizes);
    TA_RETURN_IF_ERROR(cudaGetLastError());
  }
  const int64_t rest = x.ranks * (x.bound > x.samples ? x.bound : x.samples);
  rest_kernel<<<unsigned(ceil_div(rest, kThreads)), kThreads, 0, stream>>>(x, counted, take, sizes, most);
  return cudaGetLastError();
}

cudaError_t compact(const Received& x, const void* buckets, void* together, cudaStream_t stream) {
  return move<true>(x, buckets, together, stream);
}

cudaError_t spread(const Received& x, const void* together, void* buckets, cudaStream_t stream) {
  return move<false>(x, together, buckets, stream);
}

}  // namespace plan
