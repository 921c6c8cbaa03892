// Segmented log-sum-exp. Segments and members lie on one path: segment s at place offsets[s] + s, its members behind it. Every
// warp takes a run of as many places, whatever lies there: it gathers its members' rows into shared memory and reduces
// its segments there, short ones by a thread for each column, others by all lanes. Parts of segments that leave a run are
// added up by its block, and by a second launch where they leave the block. What is added to what depends on the offsets
// and the width alone.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "../early.cuh"
#include "vector.cuh"

namespace rows {

constexpr int kRunThreads = 256;
constexpr int kRunWarps = kRunThreads / 32;
constexpr int kRunVectors = 256;  // vectors of a run at most, all in flight at a time
constexpr int kMostLanes = 8;     // vectors of a member that a warp takes; they hold at most 32 columns
constexpr int kSerial = 8;        // members that one thread reduces
constexpr int kPartThreads = 1024;
constexpr int kPartWarps = kPartThreads / 32;
constexpr int kPartsAlone = 64;  // parts that one warp adds up

// total * exp(base) with base = peak where that is finite, else 0; nothing is (-inf, 0). NaN shows in total alone.
template <typename A>
struct Exponentials {
  A peak = negative_infinity<A>(), total = 0;
  __device__ __forceinline__ A base() const { return isinf(peak) ? A(0) : peak; }
  __device__ __forceinline__ A total_at(A base_wanted) const {
    return total == A(0) ? A(0) : total * exponential(base() - base_wanted);
  }
  __device__ __forceinline__ A result() const { return base() + logarithm(total); }
  __device__ void add(const Exponentials& x) {
    Exponentials all;
    all.peak = x.peak > peak ? x.peak : peak;
    all.total = total_at(all.base()) + x.total_at(all.base());
    *this = all;
  }
};

// Of a member relative to its segment's peak, at most 0: what the fast instruction loses is lost to the sum's rounding, below
// 2^-126 it gives 0.
__device__ __forceinline__ float exponential_below(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}
__device__ __forceinline__ double exponential_below(double x) { return exp(x); }

// Across lanes that hold the same column: `columns` lanes side by side hold different ones.
template <typename A>
__device__ __forceinline__ A most_of(A x, int columns) {
  for (int d = columns; d < 32; d *= 2) {
    const A other = __shfl_xor_sync(0xffffffffu, x, d);
    x = other > x ? other : x;
  }
  return x;
}
template <typename A>
__device__ __forceinline__ A sum_of(A x, int columns) {
  for (int d = columns; d < 32; d *= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
  return x;
}

template <typename T, int kVector>
struct LogSumExpKernel {
  using A = Wide<T>;
  using Load = Vector<T, kVector>;
  using Pair = Exponentials<A>;
  struct Shared {
    Load rows[kRunWarps][kRunVectors];
    uint16_t begins[kRunWarps][kRunVectors + 2];
    int64_t enters[kRunWarps], leaves[kRunWarps];  // segments, -1: none
    // What a run holds of the segment that enters or leaves it, once its rows are read.
    __device__ Pair* parts(int run, bool leaving) {
      static_assert(sizeof(rows[0]) >= 2 * sizeof(Pair) * (kVector > 1 ? 32 : kMostLanes));
      return reinterpret_cast<Pair*>(rows[run]) + (leaving ? (kVector > 1 ? 32 : kMostLanes) : 0);
    }
  };

  const T* values;
  Segments s;
  int64_t width;  // a multiple of kVector
  T* out;
  int64_t* leaving;  // (blocks) the segment that begins in a block and leaves it, or -1
  A* partials;       // (blocks, 2, 2, width): of the segment that enters a block and of the one that leaves it, peaks and totals
  int64_t blocks;
  int lane_bits;  // 1 << lane_bits vectors of a member side by side

  __host__ __device__ int places() const { return kRunVectors >> lane_bits; }
  __host__ __device__ int places_of_block() const { return kRunWarps * places(); }
  __host__ __device__ int columns() const { return kVector << lane_bits; }
  __device__ int column_bits() const { return 31 - __clz(kVector) + lane_bits; }
  __device__ int64_t first_column() const { return int64_t(blockIdx.y) * columns(); }
  __device__ int64_t place_of(int64_t segment) const { return s.offsets[segment] + segment; }

  // By a warp: the first segment at or behind a place, `segments` if there is none.
  __device__ int64_t first_from(int64_t place) const {
    int64_t low = 0, high = s.segments;
    while (low < high) {  // every lane looks at one of 32 bounds between 33 parts
      const int64_t part = (high - low + 33) / 33, probe = low + (threadIdx.x % 32 + 1) * part - 1;
      const int before = __popc(__ballot_sync(0xffffffffu, probe < high && place_of(probe) < place));
      low += before * part;
      high = min(high, low + part - 1);
    }
    return low;
  }

  __device__ void store_part(int64_t part, int64_t column, const Pair& x) const {
    partials[2 * part * width + column] = x.peak;
    partials[(2 * part + 1) * width + column] = x.total;
  }
  __device__ Pair load_part(int64_t part, int64_t column) const {
    return {partials[2 * part * width + column], partials[(2 * part + 1) * width + column]};
  }

  // Members [from, to) of a run in one column, every `step`-th.
  __device__ static Pair reduce(const T* x, int from, int to, int step, int columns, bool across) {
    Pair all;
#pragma unroll 1
    for (int m = from; m < to; m += step) {
      const A value = convert<A>(x[m * columns]);
      all.peak = value > all.peak ? value : all.peak;
    }
    if (across) all.peak = most_of(all.peak, columns);
    const A base = all.base();
#pragma unroll 1
    for (int m = from; m < to; m += step) all.total += exponential_below(convert<A>(x[m * columns]) - base);
    if (across) all.total = sum_of(all.total, columns);
    return all;
  }

  // Rows of sorted members [first, first + count). No load depends on a condition, so that all of them are under way at once:
  // past the end the last row is read again.
  __device__ void gather(Load* rows, int64_t first, int count) const {
    constexpr int kEach = kRunVectors / 32;
    if (count == 0) return;
    const int lane = threadIdx.x % 32;
    const int64_t column = first_column() + (lane & ((1 << lane_bits) - 1)) * kVector;
    const T* from = values + (column < width ? column : 0);
    int64_t member[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) member[j] = s.order[first + min((j * 32 + lane) >> lane_bits, count - 1)];
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const Load* row = reinterpret_cast<const Load*>(from + member[j] * width);
      if constexpr (sizeof(Load) >= 4)
        __pipeline_memcpy_async(rows + j * 32 + lane, row, sizeof(Load));
      else
        rows[j * 32 + lane] = *row;
    }
    __pipeline_commit();
    __pipeline_wait_prior(0);
  }

  __device__ void run(Shared& shared) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t place = (int64_t(blockIdx.x) * kRunWarps + warp) * places();
    if (lane == 0) shared.enters[warp] = shared.leaves[warp] = -1;
    const int64_t end = place_of(s.segments);  // offsets[segments] members belong to a segment
    if (place >= end) return;
    const int64_t place_end = min(place + places(), end), first = first_from(place), first_member = place - first;

    uint16_t* begins = shared.begins[warp];  // of the segment that enters, the run's own, and the next
    int own = 0;
    if (lane == 0) begins[0] = 0;
    for (int i = lane; i - lane <= places(); i += 32) {
      const int64_t segment = min(first + i, s.segments), begin = s.offsets[segment];
      if (i <= places()) begins[i + 1] = uint16_t(min(begin - first_member, int64_t(places() + 1)));
      own += __popc(__ballot_sync(0xffffffffu, first + i < s.segments && begin + segment < place_end));
    }
    const int count = int(place_end - place) - own;
    gather(shared.rows[warp], first_member, count);
    __syncwarp();

    const int of = columns(), at_once = 32 >> column_bits(), column = lane & (of - 1), place_in_group = lane >> column_bits();
    const T* mine = reinterpret_cast<const T*>(shared.rows[warp]) + column;
    const bool enters = begins[1] > 0, leaves = own > 0 && begins[own + 1] > count;
    const bool inside = first_column() + column < width;
    T* result = out + (first - 1 + place_in_group) * width + first_column() + column;
    Pair entering, last;
    for (int group = 0; group <= own; group += at_once, result += at_once * width) {
      const int i = group + place_in_group;
      const bool there = i <= own;
      const int from = there ? min(int(begins[i]), count) : 0, to = there ? min(int(begins[i + 1]), count) : 0;
      const bool whole = there && inside && i > 0 && (i < own || !leaves);
      Pair x;
      if (!__any_sync(0xffffffffu, to - from > 1)) {
        A value = negative_infinity<A>();
        if (to > from) {
          value = convert<A>(mine[from * of]);
          x.peak = value > x.peak ? value : x.peak;
          x.total = exponential_below(value - x.base());
        }
        if (whole) *result = convert<T>(value);
      } else {
        const bool is_long = to - from > kSerial;
        if (!is_long) x = reduce(mine, from, to, 1, of, false);
        for (unsigned left = __ballot_sync(0xffffffffu, is_long && column == 0); left != 0; left &= left - 1) {
          const int owner = __ffs(left) - 1;
          const int begin = __shfl_sync(0xffffffffu, from, owner) + place_in_group;
          const int stop = __shfl_sync(0xffffffffu, to, owner);
          const Pair all = reduce(mine, begin, stop, at_once, of, true);
          if (place_in_group == owner >> column_bits()) x = all;
        }
        if (whole) *result = convert<T>(x.result());
      }
      if (group == 0) entering = x;
      last = x;
    }
    __syncwarp();  // the rows are read
    if (place_in_group == 0) shared.parts(warp, false)[column] = entering;
    if (place_in_group == (own & (at_once - 1))) shared.parts(warp, true)[column] = last;
    if (lane == 0) shared.enters[warp] = enters ? first - 1 : -1, shared.leaves[warp] = leaves ? first - 1 + own : -1;
  }

  // By a warp: adds up the parts of a segment that leaves the warp's run, or, with `entering`, of the one that enters the block.
  __device__ void join(Shared& shared, bool entering) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t segment = entering ? shared.enters[0] : shared.leaves[warp], column = first_column() + lane;
    if (segment < 0) return;
    const int64_t next_block = int64_t(blockIdx.x + 1) * places_of_block();
    const bool leaves = s.offsets[segment + 1] + segment >= next_block;
    if (!entering && leaves && blockIdx.y == 0 && lane == 0) leaving[blockIdx.x] = segment;
    if (lane >= columns() || column >= width) return;
    Pair all = shared.parts(warp, !entering)[lane];
    for (int w = warp + 1; w < kRunWarps && shared.enters[w] == segment; ++w) all.add(shared.parts(w, false)[lane]);
    if (entering || leaves)
      store_part(2 * int64_t(blockIdx.x) + (entering ? 0 : 1), column, all);
    else
      out[segment * width + column] = convert<T>(all.result());
  }

  // By a warp: parts [from, to) of a segment that begins in a block.
  __device__ Pair add_up(int64_t block, int64_t from, int64_t to) const {
    const int of = columns(), lane = threadIdx.x % 32, at_once = 32 >> column_bits();
    const int64_t column = min(first_column() + (lane & (of - 1)), width - 1);
    const auto part = [&](int64_t i) { return load_part(i == 0 ? 2 * block + 1 : 2 * (block + i), column); };
    Pair all;
#pragma unroll 8
    for (int64_t i = from + (lane >> column_bits()); i < to; i += at_once) {
      const A peak = part(i).peak;
      all.peak = peak > all.peak ? peak : all.peak;
    }
    all.peak = most_of(all.peak, of);
#pragma unroll 8
    for (int64_t i = from + (lane >> column_bits()); i < to; i += at_once) all.total += part(i).total_at(all.base());
    all.total = sum_of(all.total, of);
    return all;
  }

  // By a block of as many warps as a warp has columns at most: a warp adds up a segment's parts, or all where there are many.
  __device__ void combine() const {
    __shared__ int64_t counts[kPartWarps];
    __shared__ Pair shared[kPartWarps][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t first = int64_t(blockIdx.x) * kPartWarps, block = first + warp;
    const int64_t segment = block < blocks ? leaving[block] : -1, column = first_column() + lane;
    const int64_t parts = segment < 0 ? 0 : (s.offsets[segment + 1] + segment) / places_of_block() - block + 1;
    if (lane == 0) counts[warp] = parts;
    if (parts > 0 && parts <= kPartsAlone) {
      const Pair x = add_up(block, 0, parts);
      if (lane < columns() && column < width) out[segment * width + column] = convert<T>(x.result());
    }
    if (!__syncthreads_or(parts > kPartsAlone)) return;
    for (int w = 0; w < kPartWarps; ++w) {
      const int64_t many = counts[w];
      if (many <= kPartsAlone) continue;
      const int64_t share = ceil_div(many, int64_t(kPartWarps)), from = min(warp * share, many);
      const Pair mine = add_up(first + w, from, min(from + share, many));
      if (lane < columns()) shared[warp][lane] = mine;
      __syncthreads();
      if (warp < columns() && first_column() + warp < width) {
        const Pair x = shared[lane][warp];
        Pair all;
        all.peak = most_of(x.peak, 1);
        all.total = sum_of(x.total_at(all.base()), 1);
        if (lane == 0) out[leaving[first + w] * width + first_column() + warp] = convert<T>(all.result());
      }
      __syncthreads();
    }
  }
};

template <class Kernel>
__global__ void __launch_bounds__(kRunThreads) logsumexp_kernel(const Kernel k) {
  let_next_launch();
  __shared__ typename Kernel::Shared shared;
  if (k.leaving && blockIdx.y == 0 && threadIdx.x == 0) k.leaving[blockIdx.x] = -1;
  k.run(shared);
  __syncthreads();
  k.join(shared, false);
  if (threadIdx.x < 32) k.join(shared, true);
}

template <class Kernel>
__global__ void __launch_bounds__(kPartThreads) add_exponentials_kernel(const Kernel k) {
  wait_for_launch_before();
  k.combine();
}

}  // namespace rows
