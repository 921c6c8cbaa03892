// Segmented reductions. Sorted members are cut into tiles; the threads of a tile reduce the segments that start in it and have
// at most kPiece members ("cool"), reading on past the tile's end. Hot segments are cut into pieces of kPiece sorted members,
// whose results a block adds up: first those of its own pieces where one segment fills them all, then, in another launch, a
// segment's. Which partial results there are depends on the segments and the width alone.
#pragma once

#include "vector.cuh"

namespace rows {

constexpr int kPiece = 128;  // at least a tile: a hot segment that starts in a tile is the last one there
constexpr int kLongestTile = 64, kShortestTile = 4;
constexpr int kAhead = 8;    // members in flight per thread
constexpr int kPiecesPerBlock = 32;
constexpr int kFoldThreads = 256;
constexpr int kCombineThreads = 512;

template <typename A>
struct SumState {
  static constexpr int kParts = 1;
  A total = 0;
  __device__ void add(A x) { total += x; }
  __device__ void add(const SumState& other) { total += other.total; }
  __device__ A result() const { return total; }
  __device__ A part(int) const { return total; }
  __device__ void set(int, A x) { total = x; }
};

template <typename A>
struct LogSumExpState {
  static constexpr int kParts = 2;
  A peak = negative_infinity<A>(), total = 0;
  __device__ void add(A x) {
    if (x > peak) {
      total = total * exponential(peak - x) + A(1);
      peak = x;
    } else if (!(x == negative_infinity<A>())) {  // NaN comes here and stays
      total += exponential(x - peak);
    }
  }
  __device__ void add(const LogSumExpState& other) {
    if (other.total == A(0)) return;
    if (total == A(0)) {
      *this = other;
      return;
    }
    const A high = peak > other.peak ? peak : other.peak;
    total = total * exponential(peak - high) + other.total * exponential(other.peak - high);
    peak = high;
  }
  __device__ A result() const { return total == A(0) ? negative_infinity<A>() : peak + logarithm(total); }
  __device__ A part(int i) const { return i == 0 ? peak : total; }
  __device__ void set(int i, A x) { (i == 0 ? peak : total) = x; }
};

template <typename T, int kVector, template <typename> class State>
struct FoldKernel {
  using A = Wide<T>;
  using Load = Vector<T, kVector>;
  using Partial = Vector<A, kVector>;
  struct Accumulator {
    State<A> at[kVector];
    __device__ void add(const Load& x) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) at[i].add(convert<A>(x.at[i]));
    }
    __device__ void add(const Accumulator& other) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) at[i].add(other.at[i]);
    }
  };

  const T* values;
  Segments s;
  int64_t width;  // a multiple of kVector
  T* out;
  A* partials;     // (2 * pieces, State::kParts, width)
  int64_t tile_size;
  bool has_zeros;  // empty segments are already written

  __device__ int64_t column() const { return (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kVector; }
  __device__ int64_t segment_of(int64_t position) const { return s.index[s.order[position]]; }
  __device__ bool hot(int64_t segment) const { return s.offsets[segment + 1] - s.offsets[segment] > kPiece; }

  __device__ void store(int64_t segment, const Accumulator& a) const {
    Load result;
#pragma unroll
    for (int i = 0; i < kVector; ++i) result.at[i] = convert<T>(a.at[i].result());
    *reinterpret_cast<Load*>(out + segment * width + column()) = result;
  }

  // The next segment after `segment` with members, the first of them at `position`; writes the empty ones between.
  __device__ int64_t next(int64_t segment, int64_t position) const {
    if (has_zeros) return position < s.members ? segment_of(position) : s.segments;
    for (++segment; segment < s.segments && s.offsets[segment + 1] == position; ++segment) store(segment, Accumulator());
    return segment;
  }

  // each(values, position behind) for sorted members [begin, end): values in flight kAhead at a time, their numbers one step
  // earlier, since one load waits for the other.
  template <typename Each>
  __device__ void walk(int begin, int end, Each each) const {
    const T* from = values + column();
    int member[kAhead];
    const auto look_up = [&](int at) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (at + j < end) member[j] = int(s.order[at + j]);
    };
    look_up(begin);
    for (int at = begin; at < end; at += kAhead) {
      Load x[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (at + j < end) x[j] = *reinterpret_cast<const Load*>(from + int64_t(member[j]) * width);
      look_up(at + kAhead);
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (at + j < end) each(x[j], at + j + 1);
    }
  }

  __device__ void cool(int64_t tile) const {
    const int64_t from = tile * tile_size, to = min(from + tile_size, s.members);
    int64_t segment = segment_of(from);
    const int64_t last = segment_of(to - 1);
    if (tile == 0) next(-1, 0);  // leading empty segments
    int64_t begin = s.offsets[segment];
    if (begin < from) {  // another tile's
      begin = s.offsets[segment + 1];
      if (begin >= to) return;
      segment = segment_of(begin);
    }
    const int64_t end = hot(last) ? s.offsets[last] : s.offsets[last + 1];
    if (begin >= end) return;
    const auto end_of = [&](int64_t i) { return int(i < s.segments ? s.offsets[i + 1] : end); };
    int segment_end = end_of(segment), next_end = end_of(segment + 1);  // one segment ahead: nobody waits for it
    Accumulator a;
    walk(int(begin), int(end), [&](const Load& x, int behind) {
      a.add(x);
      if (behind == segment_end) {
        store(segment, a);
        a = Accumulator();
        if (next_end > behind) {
          ++segment;
          segment_end = next_end;
        } else {  // empty segments, or no more
          segment = next(segment, behind);
          segment_end = end_of(segment);
        }
        next_end = end_of(segment + 1);
      }
    });
  }

  __device__ A* partial(int64_t slot, int part) const {
    return partials + (slot * State<A>::kParts + part) * width + column();
  }

  __device__ Accumulator reduce_piece(int64_t begin, int64_t end) const {
    Accumulator a;
    walk(int(begin), int(end), [&](const Load& x, int) { a.add(x); });
    return a;
  }

  __device__ void store_partial(int64_t slot, const Accumulator& a) const {
#pragma unroll
    for (int part = 0; part < State<A>::kParts; ++part) {
      Partial p;
#pragma unroll
      for (int i = 0; i < kVector; ++i) p.at[i] = a.at[i].part(part);
      *reinterpret_cast<Partial*>(partial(slot, part)) = p;
    }
  }

  __device__ Accumulator load_partial(int64_t slot) const {
    Accumulator a;
#pragma unroll
    for (int part = 0; part < State<A>::kParts; ++part) {
      const Partial p = *reinterpret_cast<const Partial*>(partial(slot, part));
#pragma unroll
      for (int i = 0; i < kVector; ++i) a.at[i].set(part, p.at[i]);
    }
    return a;
  }

  // The sum of what the groups of a block hold, in order, for the group that asks (the first).
  __device__ Accumulator add_groups(Accumulator* shared, int groups) const {
    Accumulator a = shared[threadIdx.x];
    for (int g = 1; g < groups; ++g) a.add(shared[g * blockDim.x + threadIdx.x]);
    return a;
  }

  // A piece holds members of at most two hot segments: its first (slot 2 * piece) and its last (slot 2 * piece + 1). Where one
  // segment fills all pieces of the block, their sum is in the slot of the first.
  __device__ void hot_block(Accumulator* shared) const {
    const int64_t first_piece = int64_t(blockIdx.x) * blockDim.y, piece = first_piece + threadIdx.y;
    const int64_t block_from = first_piece * kPiece, block_to = min(block_from + blockDim.y * kPiece, s.members);
    const int64_t from = piece * kPiece, to = min(from + kPiece, s.members);
    const bool inside = column() < width && from < s.members;
    const int64_t block_first = segment_of(block_from);
    if (block_first == segment_of(block_to - 1) && hot(block_first)) {
      shared[threadIdx.y * blockDim.x + threadIdx.x] = inside ? reduce_piece(from, to) : Accumulator();
      __syncthreads();
      if (threadIdx.y == 0 && inside) store_partial(2 * piece, add_groups(shared, blockDim.y));
      return;
    }
    if (!inside) return;
    const int64_t first = segment_of(from), last = segment_of(to - 1);
    if (hot(first)) store_partial(2 * piece, reduce_piece(from, min(to, s.offsets[first + 1])));
    if (last != first && hot(last)) store_partial(2 * piece + 1, reduce_piece(s.offsets[last], to));
  }

  // The hot segment that starts in a piece, or -1.
  __device__ int64_t starts_in(int64_t piece) const {
    const int64_t from = piece * kPiece, to = min(from + kPiece, s.members);
    if (from >= s.members) return -1;
    const int64_t last = segment_of(to - 1);
    return hot(last) && s.offsets[last] >= from ? last : -1;
  }

  // One block adds up the partials of a hot segment: every group of threads a run of them, then the groups in order.
  __device__ void combine(int64_t piece, int64_t segment, Accumulator* shared, int pieces_per_block) const {
    const int64_t begin = s.offsets[segment], end = s.offsets[segment + 1], last = (end - 1) / kPiece;
    const int64_t block_members = int64_t(pieces_per_block) * kPiece;
    // pieces alone, then blocks that the segment fills, then pieces alone
    const int64_t first_block = (begin + block_members - 1) / block_members;
    const int64_t behind_blocks = end == s.members ? (end + block_members - 1) / block_members : end / block_members;
    const int64_t blocks = behind_blocks > first_block ? behind_blocks - first_block : 0;
    const int64_t leading = blocks > 0 ? first_block * pieces_per_block - piece : last - piece + 1;
    const int64_t trailing = blocks > 0 ? max(last + 1 - behind_blocks * pieces_per_block, int64_t(0)) : 0;
    const int64_t count = leading + blocks + trailing;
    const auto slot = [&](int64_t i) -> int64_t {
      if (i >= leading + blocks) return 2 * (behind_blocks * pieces_per_block + i - leading - blocks);
      if (i >= leading) return 2 * (first_block + i - leading) * pieces_per_block;
      return 2 * (piece + i) + (i == 0 && begin > piece * kPiece ? 1 : 0);
    };
    const int64_t share = (count + blockDim.y - 1) / blockDim.y;
    const int64_t from = threadIdx.y * share, to = min(from + share, count);
    const bool inside = column() < width;
    Accumulator a;
    if (inside) {
#pragma unroll 8
      for (int64_t i = from; i < to; ++i) a.add(load_partial(slot(i)));
    }
    shared[threadIdx.y * blockDim.x + threadIdx.x] = a;
    __syncthreads();
    if (threadIdx.y == 0 && inside) {
      store(segment, add_groups(shared, int((count + share - 1) / share)));
      next(segment, end);
    }
    __syncthreads();
  }
};

template <class Kernel>
__global__ void __launch_bounds__(kFoldThreads, 3) cool_kernel(const Kernel k, int64_t tiles) {
  const int64_t tile = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (tile < tiles && k.column() < k.width) k.cool(tile);
}

template <class Kernel>
__global__ void __launch_bounds__(kFoldThreads) hot_kernel(const Kernel k) {
  extern __shared__ __align__(16) unsigned char bytes[];
  k.hot_block(reinterpret_cast<typename Kernel::Accumulator*>(bytes));
}

template <class Kernel>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(const Kernel k, int pieces_per_block) {
  __shared__ int64_t starting[kPiecesPerBlock];
  extern __shared__ __align__(16) unsigned char bytes[];
  const int64_t first = int64_t(blockIdx.x) * kPiecesPerBlock;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  if (thread < kPiecesPerBlock) starting[thread] = k.starts_in(first + thread);
  __syncthreads();
  for (int i = 0; i < kPiecesPerBlock; ++i)
    if (starting[i] >= 0)
      k.combine(first + i, starting[i], reinterpret_cast<typename Kernel::Accumulator*>(bytes), pieces_per_block);
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
