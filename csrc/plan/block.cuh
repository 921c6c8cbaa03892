// Distinct tokens of samples that fit into a thread block's shared memory: one block per sample, two to a multiprocessor.
// 1. A hash table of (tag of the token, position) finds each token's first occurrence: slots are claimed in any order, but the
// smallest position wins, so the result does not depend on it. Tokens stay in global memory; that equal tags were equal
// tokens is looked at afterwards, and where it was not so the table is filled again by whole tokens. 2. First occurrences are
// numbered, and the rows of earlier samples found by look-back. 3. Positions are sorted by row, stable, in two passes over half
// the bits (ranks within a warp by ballots, Merrill's multisplit idea), and everything is written once.
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
  // by position its slot, then its row; the table, whose memory serves the sort: positions by lower digit, by row, counters
  static constexpr size_t kTableBytes = sizeof(uint32_t) * kSlots;
  static constexpr size_t kSortBytes = sizeof(uint16_t) * (2 * kLongest + kStride * kWarps);
  static constexpr size_t kBytes = sizeof(uint16_t) * kLongest + (kTableBytes > kSortBytes ? kTableBytes : kSortBytes);
  static constexpr uint32_t kPosition = kLongest - 1;  // bits of a slot; the others are the tag
  static_assert((kLongest & (kLongest - 1)) == 0 && kSlots <= 1 << 16 && kCounters % kBlock == 0 && kItems % 4 == 0);
};

// Numbers of 16 bits, two to a register.
template <int kSize>
struct Pairs {
  uint32_t at[kSize / 2];
  __device__ __forceinline__ void set(int j, uint32_t x) {
    at[j / 2] = j % 2 == 0 ? (at[j / 2] & 0xffff0000u) | x : (at[j / 2] & 0xffffu) | x << 16;
  }
  __device__ __forceinline__ uint32_t operator[](int j) const { return j % 2 == 0 ? at[j / 2] & 0xffffu : at[j / 2] >> 16; }
};

// Every lane's item among the lanes with the same digit: how many come before it in this warp, iteration after iteration.
template <class Shape, class Digit>
__device__ __forceinline__ void rank_items(Digit digit_of, int begin, int count, uint16_t* counters,
                                           Pairs<Shape::kItems>& rank) {
  for (int i = threadIdx.x; i < Shape::kStride * Shape::kWarps; i += Shape::kBlock) counters[i] = 0;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < Shape::kItems; ++j) {
    if (begin + j * 32 < count) {
      const bool valid = begin + j * 32 + lane() < count;
      const uint32_t digit = valid ? digit_of(j) : 0;
      unsigned peers = __ballot_sync(kFull, valid);
#pragma unroll
      for (int bit = 0; bit < Shape::kDigitBits; ++bit) {
        const bool set = digit >> bit & 1;
        const unsigned with = __ballot_sync(kFull, set);
        peers &= set ? with : ~with;
      }
      uint16_t* counter = counters + threadIdx.x / 32 * Shape::kStride + digit;
      const uint32_t base = valid ? *counter : 0;
      rank.set(j, base + __popc(peers & lanes_below()));
      __syncwarp();
      if (valid && (peers & lanes_below()) == 0) *counter = uint16_t(base + __popc(peers));
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
__global__ void __launch_bounds__(Shape::kBlock, Shape::kResident)
    block_kernel(const Occurrences x, const Unique out, uint64_t* states) {
  extern __shared__ __align__(16) unsigned char memory[];
  uint16_t* row_of = reinterpret_cast<uint16_t*>(memory);
  uint16_t* slot_of = row_of;
  uint32_t* table = reinterpret_cast<uint32_t*>(row_of + Shape::kLongest);
  uint16_t* halfway = reinterpret_cast<uint16_t*>(table);
  uint16_t* sorted = halfway + Shape::kLongest;
  uint16_t* counters = sorted + Shape::kLongest;
  uint16_t* starts = halfway;
  __shared__ int scan[33];
  __shared__ int64_t broadcast;

  const int64_t sample = blockIdx.x, slot_begin = sample * x.length;
  const int64_t* tokens = x.tokens + slot_begin;
  int count = int(max(min(x.extents[sample], x.length), int64_t(0)));
  const int warp = threadIdx.x / 32, begin = warp * Shape::kItems * 32;  // this warp's positions: 32 * kItems from here
  unsigned firsts;  // bit j: this thread's item j is its token's first occurrence
  for (bool exact = false;; exact = true) {
    for (int i = threadIdx.x; i < Shape::kSlots; i += Shape::kBlock) table[i] = kEmpty;
    __syncthreads();
#pragma unroll 1
    for (int four = 0; four < Shape::kItems; four += 4) {
      int64_t id[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int position = begin + (four + j) * 32 + lane();
        id[j] = position < count ? tokens[position] : 0;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t position = begin + (four + j) * 32 + lane();
        if (position < count) {
          const uint64_t hash = mix(uint64_t(id[j]));
          uint32_t mine = uint32_t(hash) & ~Shape::kPosition;
          mine = (mine == ~Shape::kPosition ? 0 : mine) | position;  // never kEmpty
          uint32_t slot = __umulhi(uint32_t(hash >> 32), uint32_t(Shape::kSlots));
          while (true) {
            uint32_t found = *reinterpret_cast<volatile uint32_t*>(table + slot);
            if (found == kEmpty) found = atomicCAS(table + slot, kEmpty, mine);
            if (found == kEmpty) break;
            if ((found ^ mine) <= Shape::kPosition && (!exact || tokens[found & Shape::kPosition] == id[j])) {
              if (mine < found) atomicMin(table + slot, mine);
              break;
            }
            slot = slot + 1 == Shape::kSlots ? 0 : slot + 1;
          }
          slot_of[position] = uint16_t(slot);
        }
      }
    }
    __syncthreads();
    firsts = 0;
    bool wrong = false;
#pragma unroll 4
    for (int j = 0; j < Shape::kItems; ++j) {
      const uint32_t position = begin + j * 32 + lane();
      if (position < count) {
        const uint32_t first = table[slot_of[position]] & Shape::kPosition;
        firsts |= unsigned(first == position) << j;
        wrong |= first != position && tokens[first] != tokens[position];
      }
    }
    if (!__syncthreads_or(wrong)) break;
  }

  wait_for_launch_before();
  const int64_t occurrence = out.cu_occurrences[sample];
  if (out.cu_occurrences[sample + 1] - occurrence != count) count = 0, firsts = 0;  // malformed extents
  int found = 0;
#pragma unroll 4
  for (int j = 0; j < Shape::kItems; ++j) found += __popc(__ballot_sync(kFull, firsts >> j & 1));
  int rows;
  int row = block_exclusive(lane() == 0 ? found : 0, scan, &rows);
  row = __shfl_sync(kFull, row, 0);
  if (threadIdx.x == 0) publish(states + sample, sample == 0 ? kThrough : kOwn, rows);
#pragma unroll 4
  for (int j = 0; j < Shape::kItems; ++j) {
    const bool first = firsts >> j & 1;
    const unsigned all = __ballot_sync(kFull, first);
    if (first) table[slot_of[begin + j * 32 + lane()]] = row + __popc(all & lanes_below());
    row += __popc(all);
  }
  __syncthreads();
#pragma unroll 4
  for (int j = 0; j < Shape::kItems; ++j) {
    const int position = begin + j * 32 + lane();
    if (position < count) row_of[position] = uint16_t(table[slot_of[position]]);
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

#pragma unroll 4
  for (int j = 0; j < Shape::kItems; ++j) {
    const int position = begin + j * 32 + lane();
    if (position < count) {
      const int64_t r = first_row + row_of[position];
      out.inverse[occurrence + position] = r;
      out.slots[occurrence + position] = slot_begin + position;
      if ((firsts >> j & 1) && inside(r)) out.distinct[r] = tokens[position];
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
  // Sorted by the lower digit, then by the upper one.
  const auto pass = [&](auto position_of, auto row_at, int shift, uint16_t* into) {
    const auto digit_of = [&](int j) { return row_at(j) >> shift & (Shape::kDigits - 1); };
    Pairs<Shape::kItems> rank;
    rank_items<Shape>(digit_of, begin, count, counters, rank);
    scan_counters<Shape>(counters, scan);
#pragma unroll
    for (int j = 0; j < Shape::kItems; ++j)
      if (begin + j * 32 + lane() < count)
        into[counters[warp * Shape::kStride + digit_of(j)] + rank[j]] = uint16_t(position_of(j));
    __syncthreads();
  };
  const auto at = [&](int j) { return begin + j * 32 + lane(); };
  pass(at, [&](int j) { return uint32_t(row_of[at(j)]); }, 0, halfway);
  pass([&](int j) { return halfway[at(j)]; }, [&](int j) { return uint32_t(row_of[halfway[at(j)]]); }, Shape::kDigitBits,
       sorted);
  for (int i = threadIdx.x; i < count; i += Shape::kBlock) {
    const uint32_t position = sorted[i], r = row_of[position];
    out.order[occurrence + i] = occurrence + position;
    if (i == 0 || row_of[sorted[i - 1]] != r) starts[r] = uint16_t(i);
  }
  __syncthreads();
  for (int r = threadIdx.x; r < rows && inside(first_row + r); r += Shape::kBlock) {
    out.offsets[first_row + r] = occurrence + starts[r];
    out.counts[first_row + r] = (r + 1 < rows ? starts[r + 1] : count) - starts[r];
  }
}

}  // namespace plan
