// Segmented reductions. Sorted members are cut into tiles of 32; the threads of a tile reduce the segments that start in it
// and have at most kPiece members ("cool"), reading on past the tile's end. Hot segments are cut into pieces of kPiece sorted
// members, and their partial results are added up by a block each. Which partials there are depends on the segments alone.
#pragma once

#include "vector.cuh"

namespace rows {

constexpr int kTile = 32;
constexpr int kPiece = 128;  // at least kTile: a hot segment that starts in a tile is the last one there
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

  // Sorted members [begin, end), which all belong to whole segments from `segment` on, or to one if `whole` is null.
  template <typename Each>
  __device__ void walk(int64_t begin, int64_t end, Each each) const {
    for (int64_t at = begin; at < end; at += kAhead) {
      Load x[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (at + j < end) x[j] = *reinterpret_cast<const Load*>(values + s.order[at + j] * width + column());
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (at + j < end) each(x[j], at + j + 1);
    }
  }

  __device__ void cool(int64_t tile) const {
    const int64_t from = tile * kTile, to = min(from + kTile, s.members);
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
    int64_t segment_end = s.offsets[segment + 1];
    Accumulator a;
    walk(begin, end, [&](const Load& x, int64_t behind) {
      a.add(x);
      if (behind == segment_end) {
        store(segment, a);
        a = Accumulator();
        segment = next(segment, behind);
        if (behind < end) segment_end = s.offsets[segment + 1];
      }
    });
  }

  __device__ A* partial(int64_t slot, int part) const { return partials + (slot * State<A>::kParts + part) * width + column(); }

  __device__ void reduce_piece(int64_t begin, int64_t end, int64_t slot) const {
    Accumulator a;
    walk(begin, end, [&](const Load& x, int64_t) { a.add(x); });
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

  // A piece holds members of at most two hot segments: its first (slot 2 * piece) and its last (slot 2 * piece + 1).
  __device__ void hot_piece(int64_t piece) const {
    const int64_t from = piece * kPiece, to = min(from + kPiece, s.members);
    const int64_t first = segment_of(from), last = segment_of(to - 1);
    if (hot(first)) reduce_piece(from, min(to, s.offsets[first + 1]), 2 * piece);
    if (last != first && hot(last)) reduce_piece(s.offsets[last], to, 2 * piece + 1);
  }

  // The hot segment that starts in a piece, or -1.
  __device__ int64_t starts_in(int64_t piece) const {
    const int64_t from = piece * kPiece, to = min(from + kPiece, s.members);
    if (from >= s.members) return -1;
    const int64_t last = segment_of(to - 1);
    return hot(last) && s.offsets[last] >= from ? last : -1;
  }

  // One block adds up the partials of a hot segment: every group of threads a run of them, then the groups in order.
  __device__ void combine(int64_t piece, int64_t segment, Accumulator* shared) const {
    const int64_t count = (s.offsets[segment + 1] - 1) / kPiece - piece + 1;
    const int64_t first_slot = 2 * piece + (s.offsets[segment] > piece * kPiece ? 1 : 0);
    const int64_t share = (count + blockDim.y - 1) / blockDim.y;
    const int64_t begin = threadIdx.y * share, end = min(begin + share, count);
    const bool inside = column() < width;
    Accumulator a;
    if (inside) {
#pragma unroll 8
      for (int64_t i = begin; i < end; ++i) a.add(load_partial(i == 0 ? first_slot : 2 * (piece + i)));
    }
    shared[threadIdx.y * blockDim.x + threadIdx.x] = a;
    __syncthreads();
    if (threadIdx.y == 0 && inside) {
      for (int64_t g = 1; g < blockDim.y && g * share < count; ++g) a.add(shared[g * blockDim.x + threadIdx.x]);
      store(segment, a);
      next(segment, s.offsets[segment + 1]);
    }
    __syncthreads();
  }
};

template <class Kernel>
__global__ void __launch_bounds__(kFoldThreads) cool_kernel(const Kernel k, int64_t tiles) {
  const int64_t tile = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (tile < tiles && k.column() < k.width) k.cool(tile);
}

template <class Kernel>
__global__ void __launch_bounds__(kFoldThreads) hot_kernel(const Kernel k, int64_t pieces) {
  const int64_t piece = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (piece < pieces && k.column() < k.width) k.hot_piece(piece);
}

template <class Kernel>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(const Kernel k) {
  __shared__ int64_t starting[kPiecesPerBlock];
  extern __shared__ __align__(16) unsigned char bytes[];
  const int64_t first = int64_t(blockIdx.x) * kPiecesPerBlock;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  if (thread < kPiecesPerBlock) starting[thread] = k.starts_in(first + thread);
  __syncthreads();
  for (int i = 0; i < kPiecesPerBlock; ++i)
    if (starting[i] >= 0) k.combine(first + i, starting[i], reinterpret_cast<typename Kernel::Accumulator*>(bytes));
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
