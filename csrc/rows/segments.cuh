// Segmented sums. Sorted members are cut into tiles, a group of threads each. A block looks up which members and segments its
// tiles have in shared memory, then each group walks its tile. Segments are cut at tiles' bounds, so that all walks are as long:
// the group in whose tile a segment begins adds its parts up in order, and where a segment leaves the block it began in, a
// second launch adds up the blocks'. Which parts there are depends on the segments, the number of members and the width.
#pragma once

#include "../early.cuh"
#include "vector.cuh"

namespace rows {

constexpr int kAhead = 8;  // members in flight per thread
constexpr int kFoldThreads = 512;
constexpr int kFoldBlocks = 2;    // a multiprocessor
constexpr int kMostTileBits = 5;  // longer walks leave more to the end of the launch, shorter ones more parts
constexpr int kCombineThreads = 512;
constexpr int kParts = 8;   // blocks' parts in flight per thread
constexpr int kAlone = 32;  // blocks' parts that one group adds up

// How members are dealt out: `lanes` threads side by side per group, 1 << tile_bits sorted members per group.
struct Deal {
  int lanes, tile_bits;
  int64_t blocks;
  __host__ __device__ int groups() const { return kFoldThreads / lanes; }
  __host__ __device__ int per_block() const { return groups() << tile_bits; }
  __device__ int block_bits() const { return 31 - __clz(per_block()); }
};

template <typename T, int kVector>
struct SumKernel {
  using A = Wide<T>;
  using Load = Vector<T, kVector>;
  struct Accumulator : Vector<A, kVector> {
    __device__ Accumulator() : Vector<A, kVector>{} {}
    template <typename X>
    __device__ void add(const Vector<X, kVector>& x) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) this->at[i] += convert<A>(x.at[i]);
    }
  };
  // What a block keeps of its i-th sorted member, -1 <= i <= per_block, at place(i).
  struct Shared {
    Accumulator* heads;  // (groups, lanes) what tiles hold of the segments that enter them
    int* entering;       // (groups) those segments, -1: none
    int* members;        // (places) numbers
    int* segments;       // (places) -1: none
  };

  const T* values;
  Segments s;
  int64_t width;  // a multiple of kVector
  T* out;
  int64_t* leaving;  // (blocks) the segment that begins in a block and leaves it, or -1
  A* partials;       // (2 * blocks, width): of the segment entering a block, and of the one leaving it
  Deal deal;
  bool has_zeros;  // empty segments are already written

  // In front of a tile is one place more, so that tiles conflict over no bank; of segments it repeats the one behind it.
  __host__ __device__ int place(int i) const { return i + (i >> deal.tile_bits) + 2; }
  __host__ __device__ int places() const { return place(deal.per_block()) + 1; }
  size_t shared_bytes() const {
    return sizeof(Accumulator) * kFoldThreads + sizeof(int) * (deal.groups() + 2 * places());
  }
  __device__ Shared shared(unsigned char* bytes) const {
    auto* heads = reinterpret_cast<Accumulator*>(bytes);
    auto* entering = reinterpret_cast<int*>(heads + kFoldThreads);
    int* members = entering + deal.groups();
    return {heads, entering, members, members + places()};
  }

  __device__ int thread() const { return threadIdx.y * blockDim.x + threadIdx.x; }
  __device__ int64_t column() const { return (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kVector; }
  __device__ void store(int64_t segment, const Accumulator& a) const {
    Load result;
#pragma unroll
    for (int i = 0; i < kVector; ++i) result.at[i] = convert<T>(a.at[i]);
    *reinterpret_cast<Load*>(out + segment * width + column()) = result;
  }

  // By a launch's groups in turns: the empty segments behind the last member of any.
  __device__ void store_rest() const {
    if (has_zeros || column() >= width) return;
    const int64_t members = s.offsets[s.segments], last = members > 0 ? s.index[s.order[members - 1]] : -1;
    const int64_t groups = int64_t(gridDim.x) * blockDim.y;
#pragma unroll 1
    for (int64_t empty = last + 1 + int64_t(blockIdx.x) * blockDim.y + threadIdx.y; empty < s.segments; empty += groups)
      store(empty, Accumulator());
  }

  __device__ Accumulator* partial(int64_t slot) const {
    return reinterpret_cast<Accumulator*>(partials + slot * width + column());
  }

  // Members [first, first + in_block) and the ones before and behind them. Members from offsets[segments] on belong to none, and
  // nothing that `order` says of them is looked at.
  __device__ void look_up(const Shared& shared, int64_t first, int in_block) const {
    const uint64_t members = s.offsets[s.segments];
    for (int i = thread() - 1; i <= in_block; i += kFoldThreads) {
      const bool there = uint64_t(first + i) < uint64_t(s.members);
      const int64_t member = there ? s.order[first + i] : 0;
      const int segment = uint64_t(first + i) < members ? int(s.index[member]) : -1;
      shared.members[place(i)] = int(member);
      shared.segments[place(i)] = segment;
      if ((i & (1 << deal.tile_bits) - 1) == 0) shared.segments[place(i) - 1] = segment;
    }
    __syncthreads();
  }

  // The empty segments between two, of which there are few.
  __device__ void store_empty(int before, int behind) const {
#pragma unroll 1
    for (int empty = before + 1; empty < behind; ++empty) store(empty, Accumulator());
  }

  // A tile of n members from the block's `from`-th on. Returns the segment that begins in it and leaves it, or -1, and in `a` what
  // the tile holds of it; what it holds of the one that enters goes to shared memory.
  __device__ int tile(const Shared& shared, int from, int n, Accumulator& a) const {
    const int* members = shared.members + place(from);
    const int* segments = shared.segments + place(from);
    const T* from_column = values + column();
    int segment = segments[0];
    bool enters = segment == shared.segments[place(from - 1)], gaps = false;
    if (threadIdx.x == 0) shared.entering[threadIdx.y] = enters ? segment : -1;
    for (int j = 0; j < n; j += kAhead) {
      Load x[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)  // past the end the last again: no load depends on a condition
        x[i] = *reinterpret_cast<const Load*>(from_column + members[min(j + i, n - 1)] * width);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (j + i >= n) continue;
        a.add(x[i]);
        const int behind = segments[j + i + 1];
        if (behind == segment) continue;
        if (enters)
          shared.heads[thread()] = a;
        else
          store(segment, a);
        gaps |= behind > segment + 1;
        enters = false;
        a = Accumulator();
        segment = behind;
      }
    }
    if (gaps && !has_zeros)
      for (int j = 0; j < n; ++j) store_empty(segments[j], segments[j + 1]);
    if (segments[n - 1] != segments[n]) return -1;
    if (!enters) return segment;
    shared.heads[thread()] = a;
    return -1;
  }

  __device__ void block(const Shared& shared) const {
    const int64_t first = int64_t(blockIdx.x) * deal.per_block();
    const int in_block = int(min(int64_t(deal.per_block()), s.members - first));
    look_up(shared, first, in_block);
    const int count = int(max(min(int64_t(in_block), s.offsets[s.segments] - first), int64_t(0)));

    const int from = threadIdx.y << deal.tile_bits, n = min(1 << deal.tile_bits, count - from);
    const int before = shared.segments[place(-1)], next = shared.segments[place(count)];
    if (leaving && blockIdx.y == 0 && thread() == 0) {
      const int last = count > 0 ? shared.segments[place(count - 1)] : -1;
      leaving[blockIdx.x] = last == next && last != before ? last : -1;
    }
    Accumulator a;
    int tail = -1;
    const bool works = n > 0 && column() < width;
    if (works && first + from == 0 && !has_zeros) store_empty(-1, shared.segments[place(0)]);
    if (works)
      tail = tile(shared, from, n, a);
    else if (threadIdx.x == 0)
      shared.entering[threadIdx.y] = -1;
    __syncthreads();

    const auto add_heads = [&](Accumulator& a, int segment) {  // of the tiles behind
      for (int g = threadIdx.y + 1; g < blockDim.y && shared.entering[g] == segment; ++g)
        a.add(shared.heads[g * blockDim.x + threadIdx.x]);
    };
    if (tail >= 0) {
      add_heads(a, tail);
      if (tail == next)
        *partial(2 * int64_t(blockIdx.x) + 1) = a;
      else
        store(tail, a);
    }
    if (works && threadIdx.y == 0 && shared.entering[0] >= 0) {
      a = shared.heads[thread()];
      add_heads(a, before);
      *partial(2 * int64_t(blockIdx.x)) = a;
    }
  }

  // By a block: a group adds up a segment's parts, or all groups where there are many, each a run of them.
  __device__ void combine(Accumulator* shared, int64_t* counts) const {
    const int64_t block = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    const int64_t segment = block < deal.blocks ? leaving[block] : -1;
    const bool inside = column() < width;
    const auto add_up = [&](int64_t block, int64_t from, int64_t to) {
      Accumulator a;
      for (int64_t i = from; i < to; i += kParts) {
        Accumulator x[kParts];
#pragma unroll
        for (int j = 0; j < kParts; ++j) {
          const int64_t part = min(i + j, to - 1);
          x[j] = *partial(2 * (block + part) + (part == 0));
        }
#pragma unroll
        for (int j = 0; j < kParts; ++j)
          if (i + j < to) a.add(x[j]);
      }
      return a;
    };
    const int64_t count = segment < 0 ? 0 : (s.offsets[segment + 1] - 1 >> deal.block_bits()) - block + 1;
    if (threadIdx.x == 0) counts[threadIdx.y] = count;
    if (inside && count > 0 && count <= kAlone) store(segment, add_up(block, 0, count));
    if (!__syncthreads_or(count > kAlone)) return;
    for (int y = 0; y < blockDim.y; ++y) {
      const int64_t many = counts[y];
      if (many <= kAlone) continue;
      const int64_t share = ceil_div(many, int64_t(blockDim.y)), from = min(threadIdx.y * share, many);
      const int64_t start = int64_t(blockIdx.x) * blockDim.y + y;
      if (inside) shared[threadIdx.y * blockDim.x + threadIdx.x] = add_up(start, from, min(from + share, many));
      __syncthreads();
      if (threadIdx.y == 0 && inside) {
        Accumulator a = shared[threadIdx.x];
        for (int g = 1; g < ceil_div(many, share); ++g) a.add(shared[g * blockDim.x + threadIdx.x]);
        store(leaving[start], a);
      }
      __syncthreads();
    }
  }
};

template <class Kernel>
__global__ void __launch_bounds__(kFoldThreads, kFoldBlocks) sum_kernel(const Kernel k) {
  let_next_launch();
  extern __shared__ __align__(16) unsigned char bytes[];
  k.block(k.shared(bytes));
  if (gridDim.x == 1) k.store_rest();
}

template <class Kernel>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(const Kernel k) {
  k.store_rest();
  wait_for_launch_before();
  __shared__ int64_t counts[kCombineThreads];
  extern __shared__ __align__(16) unsigned char bytes[];
  k.combine(reinterpret_cast<typename Kernel::Accumulator*>(bytes), counts);
}

template <class Kernel>
__global__ void __launch_bounds__(kFoldThreads) empty_kernel(const Kernel k) {
  const int64_t segment = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (segment < k.s.segments && k.column() < k.width && k.s.offsets[segment] == k.s.offsets[segment + 1])
    k.store(segment, typename Kernel::Accumulator());
}

// Every thread copies its vector of several members' rows; all loads are in flight before the first store.
constexpr int kCopies = 4, kCopyThreads = 256;

template <typename Unit>
__global__ void __launch_bounds__(kCopyThreads)
    expand_kernel(const Unit* rows, const int64_t* index, int64_t members, int64_t units, Unit* out) {
  const int64_t first = int64_t(blockIdx.x) * blockDim.y * kCopies + threadIdx.y;
  int64_t from[kCopies];
#pragma unroll
  for (int j = 0; j < kCopies; ++j) {
    const int64_t m = first + j * blockDim.y;
    from[j] = m < members ? index[m] * units : -1;
  }
  for (int64_t unit = threadIdx.x; unit < units; unit += blockDim.x) {
    Unit x[kCopies];
#pragma unroll
    for (int j = 0; j < kCopies; ++j)
      if (from[j] >= 0) x[j] = rows[from[j] + unit];
#pragma unroll
    for (int j = 0; j < kCopies; ++j)
      if (from[j] >= 0) out[(first + j * blockDim.y) * units + unit] = x[j];
  }
}

}  // namespace rows
