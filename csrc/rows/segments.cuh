// Segmented sums. Sorted members are cut into tiles, a group of threads each, and a block's look-ups (which member, which
// segment) go to shared memory first. Segments of at most kWhole members are reduced by the tile they start in, which reads on past
// its end. Longer ones are cut at the tiles' bounds: the block adds its parts up in order, and where a segment leaves the
// block it began in, a second launch adds up the blocks'. Which parts there are depends on the segments and the width alone.
#pragma once

#include "../early.cuh"
#include "vector.cuh"

namespace rows {

constexpr int kWhole = 64;
constexpr int kAhead = 6;  // members in flight per thread
constexpr int kFoldThreads = 256;
constexpr int kFoldBlocks = 4;  // a multiprocessor
constexpr int kCombineThreads = 512;
constexpr int kAlone = 32;  // blocks' parts that one group adds up

// How members are dealt out: `lanes` threads side by side per group, 1 << tile_bits sorted members per group.
struct Deal {
  int lanes, tile_bits;
  int64_t blocks;
  __host__ __device__ int groups() const { return kFoldThreads / lanes; }
  __host__ __device__ int per_block() const { return groups() << tile_bits; }
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
  // Of a sorted member: its number, negative (bitwise not) if it is the last of its segment; and its segment, -1 for none.
  struct Entry {
    int member, segment;
  };
  // What a group of threads holds of a hot segment that it does not have whole.
  struct Parts {
    int head, tail;  // segments: entering the tile, and leaving it after starting there; -1: none
  };
  struct Shared {
    Entry* entries;      // of the block's members, one unused between two tiles: no conflicts among banks
    Accumulator* parts;  // (groups, 2, lanes)
    Parts* segments;     // (groups)
  };

  const T* values;
  Segments s;
  int64_t width;  // a multiple of kVector
  T* out;
  int64_t* leaving;  // (blocks) the hot segment that starts in a block and leaves it, or -1
  A* partials;       // (2 * blocks, width): of the segment entering a block, and of the one leaving it
  Deal deal;
  bool has_zeros;  // empty segments are already written

  static size_t shared_bytes(const Deal& deal) {
    return sizeof(Accumulator) * 2 * kFoldThreads + sizeof(Parts) * deal.groups() +
           sizeof(Entry) * (deal.per_block() + deal.groups() + 1);
  }

  __device__ int64_t column() const { return (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kVector; }
  __device__ bool hot(int64_t segment) const { return s.offsets[segment + 1] - s.offsets[segment] > kWhole; }
  __device__ int entry(int i) const { return i + (i >> deal.tile_bits); }

  __device__ void store(int64_t segment, const Accumulator& a) const {
    Load result;
#pragma unroll
    for (int i = 0; i < kVector; ++i) result.at[i] = convert<T>(a.at[i]);
    *reinterpret_cast<Load*>(out + segment * width + column()) = result;
  }

  // Stores a segment and the empty ones since `previous`.
  __device__ void finish(int64_t previous, int64_t segment, const Accumulator& a) const {
    store(segment, a);
    if (has_zeros) return;
#pragma unroll 1  // there are few, and this stands in the loop over members
    for (int64_t empty = previous + 1; empty < segment; ++empty) store(empty, Accumulator());
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

  // Members [first, first + count) of the block: entries, and behind them the next member's segment (-1: there is none).
  // Members from offsets[segments] on belong to none, and nothing that `order` says of them is looked at: they lower `count`.
  // Returns the segment of the member before them.
  __device__ int look_up(int64_t first, int& count, Entry* entries) const {
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    const int64_t members = s.offsets[s.segments], member_before = first > 0 ? s.order[first - 1] : 0;
    const int before = first > 0 && first <= members ? int(s.index[member_before]) : -1;
    for (int i = thread; i <= count; i += kFoldThreads) {
      Entry e{0, -1};
      if (first + i < s.members) e.member = int(s.order[first + i]);
      if (first + i < members) e.segment = int(s.index[e.member]);
      entries[entry(i)] = e;
    }
    count = int(min(int64_t(count), members - first));
    __syncthreads();
    for (int i = thread; i < count; i += kFoldThreads)
      if (entries[entry(i)].segment != entries[entry(i + 1)].segment) entries[entry(i)].member = ~entries[entry(i)].member;
    __syncthreads();
    return before;
  }

  // A tile: members [from, to) of the block's `count`. `previous` becomes the segment before the one that leaves.
  __device__ void tile(const Shared& shared, int64_t first, int count, int from, int to, int before, int& previous,
                       Parts& parts) const {
    const Entry* entries = shared.entries;
    const int opening = entries[entry(from)].segment, closing = entries[entry(to - 1)].segment;
    const bool enters = (from == 0 ? before : entries[entry(from - 1)].segment) == opening;
    const bool leaves = entries[entry(to)].segment == closing && !(enters && opening == closing);
    int begin = from, end = to;
    previous = from == 0 ? before : entries[entry(from - 1)].segment;
    if (enters && hot(opening)) {
      parts.head = opening;
    } else if (enters) {  // another tile's
      begin = int(min(s.offsets[opening + 1] - first, int64_t(to)));
      if (begin == to) return;
    }
    if (leaves && hot(closing))
      parts.tail = closing;
    else if (leaves)
      end = int(s.offsets[closing + 1] - first);

    const T* from_column = values + column();
    Accumulator a;
    bool entering = parts.head >= 0;
    const auto value = [&](int member) { return *reinterpret_cast<const Load*>(from_column + int64_t(member) * width); };
    const auto close = [&](int segment, int behind) {
      if (entering || (behind == end && parts.tail >= 0)) {
        shared.parts[(2 * threadIdx.y + (entering ? 0 : 1)) * blockDim.x + threadIdx.x] = a;
        entering = false;
        if (behind == end) return;  // `previous` stays
      } else {
        finish(previous, segment, a);
      }
      previous = segment;
      a = Accumulator();
    };
    const int known = min(end, count);
    for (int at = begin; at < known; at += kAhead) {
      int member[kAhead];
      Load x[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) member[j] = entries[entry(min(at + j, known - 1))].member;
#pragma unroll
      for (int j = 0; j < kAhead; ++j) x[j] = value(member[j] < 0 ? ~member[j] : member[j]);
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (at + j < known) {
          a.add(x[j]);
          if (member[j] < 0 || at + j + 1 == end) close(entries[entry(at + j)].segment, at + j + 1);
        }
    }
    for (int at = known; at < end; ++at) {  // past the block
      a.add(value(int(s.order[first + at])));
      if (at + 1 == end) close(closing, end);
    }
  }

  __device__ void block(const Shared& shared) const {
    const int64_t first = int64_t(blockIdx.x) * deal.per_block();
    int count = int(min(int64_t(deal.per_block()), s.members - first));
    const int before = look_up(first, count, shared.entries);
    const bool says = leaving && blockIdx.y == 0 && threadIdx.x == 0 && threadIdx.y == 0;
    if (count <= 0) {
      if (says) leaving[blockIdx.x] = -1;
      return;
    }
    const int from = threadIdx.y << deal.tile_bits, to = min(from + (1 << deal.tile_bits), count);
    const bool inside = column() < width;
    int previous = -1;
    Parts parts{-1, -1};
    if (inside && from < count) tile(shared, first, count, from, to, before, previous, parts);
    if (threadIdx.x == 0) shared.segments[threadIdx.y] = parts;
    const int last = shared.entries[entry(count - 1)].segment, next = shared.entries[entry(count)].segment;
    if (says) leaving[blockIdx.x] = last == next && last != before && hot(last) ? last : -1;
    if (!__syncthreads_or(parts.head >= 0 || parts.tail >= 0) || !inside) return;
    const auto add_heads = [&](Accumulator a, int segment) {
      for (int g = threadIdx.y + 1; g < blockDim.y && shared.segments[g].head == segment; ++g)
        a.add(shared.parts[2 * g * blockDim.x + threadIdx.x]);
      return a;
    };
    const Accumulator* mine = shared.parts + 2 * threadIdx.y * blockDim.x + threadIdx.x;
    if (threadIdx.y == 0 && parts.head >= 0) *partial(2 * int64_t(blockIdx.x)) = add_heads(*mine, parts.head);
    if (parts.tail < 0) return;
    const Accumulator a = add_heads(mine[blockDim.x], parts.tail);
    if (parts.tail == next)
      *partial(2 * int64_t(blockIdx.x) + 1) = a;
    else
      finish(previous, parts.tail, a);
  }

  // Stores a segment whose parts were added up.
  __device__ void finish_hot(int64_t segment, const Accumulator& a) const {
    const int64_t begin = s.offsets[segment];
    const int64_t previous = has_zeros || begin == 0 ? -1 : s.index[s.order[begin - 1]];
    finish(previous, segment, a);
  }

  // By a block: a group adds up a segment's parts, or all groups where there are many, each a run of them.
  __device__ void combine(Accumulator* shared, int64_t* counts) const {
    const int64_t block = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    const int64_t segment = block < deal.blocks ? leaving[block] : -1;
    const bool inside = column() < width;
    const auto parts_of = [&](int64_t block, int64_t segment) {
      return (s.offsets[segment + 1] - 1) / deal.per_block() - block + 1;
    };
    const auto add_up = [&](int64_t block, int64_t from, int64_t to) {
      Accumulator a;
#pragma unroll 4
      for (int64_t i = from; i < to; ++i) {
        const Accumulator part = *partial(i == 0 ? 2 * block + 1 : 2 * (block + i));
        a.add(part);
      }
      return a;
    };
    const int64_t count = segment < 0 ? 0 : parts_of(block, segment);
    if (threadIdx.x == 0) counts[threadIdx.y] = count;
    if (inside && count > 0 && count <= kAlone) finish_hot(segment, add_up(block, 0, count));
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
        finish_hot(leaving[start], a);
      }
      __syncthreads();
    }
  }
};

template <class Kernel>
__global__ void __launch_bounds__(kFoldThreads, kFoldBlocks) sum_kernel(const Kernel k) {
  let_next_launch();
  extern __shared__ __align__(16) unsigned char bytes[];
  auto* parts = reinterpret_cast<typename Kernel::Accumulator*>(bytes);
  auto* segments = reinterpret_cast<typename Kernel::Parts*>(parts + 2 * kFoldThreads);
  k.block({reinterpret_cast<typename Kernel::Entry*>(segments + blockDim.y), parts, segments});
  if (gridDim.x == 1) k.store_rest();
}

template <class Kernel>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(const Kernel k) {
  wait_for_launch_before();
  __shared__ int64_t counts[kCombineThreads];
  extern __shared__ __align__(16) unsigned char bytes[];
  k.combine(reinterpret_cast<typename Kernel::Accumulator*>(bytes), counts);
  k.store_rest();
}

template <class Kernel>
__global__ void __launch_bounds__(kFoldThreads) empty_kernel(const Kernel k) {
  const int64_t segment = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (segment < k.s.segments && k.column() < k.width && k.s.offsets[segment] == k.s.offsets[segment + 1])
    k.store(segment, typename Kernel::Accumulator());
}

// Every thread copies its vector of several members' rows; all loads are in flight before the first store.
constexpr int kCopies = 4;

template <typename Unit>
__global__ void __launch_bounds__(kFoldThreads)
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
