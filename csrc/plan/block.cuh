// Distinct tokens of samples that fit into a thread block's shared memory: one block per sample.
// 1. Tokens go to shared memory. 2. A hash table of positions finds each token's first occurrence: slots are claimed in any
// order, but the smallest position wins, so the result does not depend on it. 3. First occurrences are numbered. 4. Positions
// are sorted by row, stable, in two passes over half the bits (ranks within a warp by ballots, Merrill's multisplit idea).
// 5. The rows of earlier samples are found by decoupled look-back (Merrill and Garland 2016), and everything is written once.
#pragma once

#include "common.cuh"

namespace plan {

template <int kThreads_, int kItems_, int kSlots_, int kResident_>
struct BlockShape {
  static constexpr int kBlock = kThreads_, kItems = kItems_, kSlots = kSlots_, kResident = kResident_;
  static constexpr int kLongest = kBlock * kItems, kWarps = kBlock / 32;
  static constexpr int bits(int n) { return n <= 1 ? 0 : 1 + bits(n / 2); }
  static constexpr int kDigitBits = (bits(kLongest) + 1) / 2, kDigits = 1 << kDigitBits;
  static constexpr int kCounters = kDigits * kWarps;
  static constexpr int kStride = kDigits + 2;  // between the counters of two warps: neither digits nor warps share a bank
  // tokens, then the table; the table's memory serves the sort afterwards: sorted (4 bytes each), counters or starts (2 each)
  static constexpr size_t kTableAt = sizeof(int64_t) * kLongest;
  static constexpr size_t kSortedBytes = sizeof(uint32_t) * kLongest;
  static constexpr size_t kBytes = kTableAt + sizeof(uint32_t) * kSlots;
  static_assert(kSlots * 4 >= kSortedBytes + 2 * kLongest && kSlots * 4 >= kSortedBytes + 2 * kStride * kWarps);
  static_assert(kLongest <= 1 << 15 && kCounters % kBlock == 0);
};

constexpr uint32_t kEmpty = 0xffffffffu;

// A sample's rows and those before it: what each block publishes, and how the next ones find their first row.
constexpr uint64_t kOwn = uint64_t(1) << 62, kThrough = uint64_t(2) << 62, kValue = kOwn - 1;

__device__ __forceinline__ void publish(uint64_t* state, uint64_t flag, uint64_t value) {
  __threadfence();
  *reinterpret_cast<volatile uint64_t*>(state) = flag | value;
}

// By one warp: the rows of all samples before `sample`.
__device__ __forceinline__ int64_t rows_before(const uint64_t* states, int64_t sample) {
  int64_t total = 0;
  for (int64_t last = sample - 1; last >= 0; last -= 32) {
    const int64_t b = last - lane();
    uint64_t state = kThrough;  // before the first sample: 0 rows
    if (b >= 0)
      while (((state = *reinterpret_cast<const volatile uint64_t*>(states + b)) & ~kValue) == 0) __nanosleep(20);
    const unsigned through = __ballot_sync(kFull, (state & kThrough) != 0);
    const int stop = through ? __ffs(through) - 1 : 31;
    int64_t value = lane() <= stop ? int64_t(state & kValue) : 0;
#pragma unroll
    for (int d = 16; d > 0; d /= 2) value += __shfl_xor_sync(kFull, value, d);
    total += value;
    if (through) break;
  }
  return total;
}

// Every lane's item among the lanes with the same digit: how many come before it in this warp, iteration after iteration.
template <class Shape>
__device__ __forceinline__ void rank_items(const uint32_t (&key)[Shape::kItems], int shift, int iterations, int count,
                                           uint16_t* counters, uint16_t (&rank)[Shape::kItems]) {
  const int warp = threadIdx.x / 32;
  for (int i = threadIdx.x; i < Shape::kStride * Shape::kWarps; i += Shape::kBlock) counters[i] = 0;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < Shape::kItems; ++j) {
    if (j < iterations) {
      const bool valid = (warp * Shape::kItems + j) * 32 + lane() < count;
      const uint32_t digit = key[j] >> shift & (Shape::kDigits - 1);
      unsigned peers = __ballot_sync(kFull, valid);
#pragma unroll
      for (int bit = 0; bit < Shape::kDigitBits; ++bit) {
        const bool set = digit >> bit & 1;
        const unsigned with = __ballot_sync(kFull, set);
        peers &= set ? with : ~with;
      }
      uint16_t* counter = counters + warp * Shape::kStride + digit;
      const uint16_t base = valid ? *counter : 0;
      rank[j] = base + __popc(peers & lanes_below());
      __syncwarp();
      if (valid && (peers & lanes_below()) == 0) *counter = base + __popc(peers);
      __syncwarp();
    }
  }
}

// Counters (digit, warp) to the number of items before them.
template <class Shape>
__device__ __forceinline__ void scan_counters(uint16_t* counters, int* shared) {
  constexpr int kEach = Shape::kCounters / Shape::kBlock;
  __syncthreads();
  const auto at = [&](int i) -> uint16_t& {  // by digit, then by warp
    const int n = threadIdx.x * kEach + i;
    return counters[n % Shape::kWarps * Shape::kStride + n / Shape::kWarps];
  };
  int mine[kEach], sum = 0, total;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    mine[i] = sum;
    sum += at(i);
  }
  const int before = block_exclusive(sum, shared, &total);
#pragma unroll
  for (int i = 0; i < kEach; ++i) at(i) = uint16_t(before + mine[i]);
  __syncthreads();
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kBlock, Shape::kResident) block_kernel(const Occurrences x, const Unique out, uint64_t* states) {
  extern __shared__ __align__(16) unsigned char memory[];
  int64_t* token = reinterpret_cast<int64_t*>(memory);
  uint32_t* table = reinterpret_cast<uint32_t*>(memory + Shape::kTableAt);
  uint32_t* sorted = table;
  uint16_t* counters = reinterpret_cast<uint16_t*>(memory + Shape::kTableAt + Shape::kSortedBytes);
  uint16_t* starts = counters;
  __shared__ int scan[33];
  __shared__ int64_t broadcast;

  for (int i = threadIdx.x; i < Shape::kSlots; i += Shape::kBlock) table[i] = kEmpty;
  const int64_t sample = blockIdx.x, slot_begin = sample * x.length;
  int count = int(max(min(x.extents[sample], x.length), int64_t(0)));
#pragma unroll
  for (int j = 0; j < Shape::kItems; ++j) {
    const int i = j * Shape::kBlock + threadIdx.x;
    if (i < count) token[i] = x.tokens[slot_begin + i];
  }
  wait_for_launch_before();
  const int64_t occurrence = out.cu_occurrences[sample];
  count = int(out.cu_occurrences[sample + 1] - occurrence);  // 0 where extents are malformed
  __syncthreads();

  // This warp's positions are [begin, begin + 32 * iterations).
  const int warp = threadIdx.x / 32, begin = warp * Shape::kItems * 32;
  const int iterations = min(Shape::kItems, max(0, (count - begin + 31) / 32));
  uint32_t item[Shape::kItems];  // first the table's slot of each position, then (row, position)
#pragma unroll
  for (int j = 0; j < Shape::kItems; ++j) {
    const uint32_t position = begin + j * 32 + lane();
    if (position < count) {
      const int64_t id = token[position];
      uint32_t slot = uint32_t(__umul64hi(mix(uint64_t(id)), uint64_t(Shape::kSlots)));
      while (true) {
        uint32_t found = *reinterpret_cast<volatile uint32_t*>(table + slot);
        if (found == kEmpty) found = atomicCAS(table + slot, kEmpty, position);
        if (found == kEmpty) break;
        if (token[found] == id) {
          if (position < found) atomicMin(table + slot, position);
          break;
        }
        slot = slot + 1 == Shape::kSlots ? 0 : slot + 1;
      }
      item[j] = slot;
    }
  }
  __syncthreads();

  unsigned firsts = 0;  // bit j: this thread's item j is its token's first occurrence
  int found = 0;
#pragma unroll
  for (int j = 0; j < Shape::kItems; ++j) {
    const uint32_t position = begin + j * 32 + lane();
    const bool first = position < count && table[item[j]] == position;
    firsts |= unsigned(first) << j;
    found += __popc(__ballot_sync(kFull, first));
  }
  int rows;
  int row = block_exclusive(lane() == 0 ? found : 0, scan, &rows);  // every read of the table is behind the barriers in here
  row = __shfl_sync(kFull, row, 0);
  if (threadIdx.x == 0) publish(states + sample, sample == 0 ? kThrough : kOwn, rows);
#pragma unroll
  for (int j = 0; j < Shape::kItems; ++j) {
    const bool first = firsts >> j & 1;
    const unsigned all = __ballot_sync(kFull, first);
    if (first) table[item[j]] = row + __popc(all & lanes_below());
    row += __popc(all);
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < Shape::kItems; ++j) {
    const uint32_t position = begin + j * 32 + lane();
    item[j] = position < count ? table[item[j]] << 16 | position : 0;
  }
  if (warp == 0) {
    const int64_t before = rows_before(states, sample);
    if (lane() == 0) {
      broadcast = before;
      if (sample > 0) publish(states + sample, kThrough, before + rows);
    }
  }
  __syncthreads();  // also: the table is read, its memory is free
  const int64_t first_row = broadcast;
  const auto inside = [&](int64_t r) { return r < out.capacity; };

#pragma unroll
  for (int j = 0; j < Shape::kItems; ++j) {
    const int position = begin + j * 32 + lane();
    if (position < count) {
      const int64_t r = first_row + (item[j] >> 16);
      out.inverse[occurrence + position] = r;
      out.slots[occurrence + position] = slot_begin + position;
      if ((firsts >> j & 1) && inside(r)) out.distinct[r] = token[position];
    }
  }
  if (threadIdx.x == 0) {
    out.cu_seqlens[sample] = int32_t(first_row);
    if (sample == x.samples - 1) {
      out.cu_seqlens[sample + 1] = int32_t(first_row + rows);
      out.sizes[kRows] = first_row + rows;
      if (first_row + rows <= out.capacity) out.offsets[first_row + rows] = occurrence + count;
    }
  }
  if (rows == count) {  // all distinct: a row is its position
    for (int i = threadIdx.x; i < count; i += Shape::kBlock) {
      out.order[occurrence + i] = occurrence + i;
      if (inside(first_row + i)) out.counts[first_row + i] = 1, out.offsets[first_row + i] = occurrence + i;
    }
    return;
  }
#pragma unroll
  for (int pass = 0; pass < 2; ++pass) {
    const int shift = 16 + pass * Shape::kDigitBits;
    uint16_t rank[Shape::kItems];
    rank_items<Shape>(item, shift, iterations, count, counters, rank);
    scan_counters<Shape>(counters, scan);
#pragma unroll
    for (int j = 0; j < Shape::kItems; ++j) {
      const int at = begin + j * 32 + lane();
      const uint32_t digit = item[j] >> shift & (Shape::kDigits - 1);
      if (at < count) sorted[counters[warp * Shape::kStride + digit] + rank[j]] = item[j];
    }
    __syncthreads();
    if (pass == 0) {
#pragma unroll
      for (int j = 0; j < Shape::kItems; ++j) {
        const int at = begin + j * 32 + lane();
        item[j] = at < count ? sorted[at] : 0;
      }
      __syncthreads();
    }
  }
  for (int i = threadIdx.x; i < count; i += Shape::kBlock) {
    const uint32_t here = sorted[i], r = here >> 16;
    out.order[occurrence + i] = occurrence + (here & 0xffff);
    if (i == 0 || sorted[i - 1] >> 16 != r) starts[r] = uint16_t(i);
  }
  __syncthreads();
  for (int r = threadIdx.x; r < rows && inside(first_row + r); r += Shape::kBlock) {
    out.offsets[first_row + r] = occurrence + starts[r];
    out.counts[first_row + r] = (r + 1 < rows ? starts[r + 1] : count) - starts[r];
  }
}

}  // namespace plan
