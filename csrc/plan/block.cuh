// Distinct tokens of samples that fit into a thread block's shared memory: one block per sample, two to a multiprocessor.
// 1. A hash table of positions, two to a word, finds one occurrence of each token; tokens are compared by 32-bit fingerprints, which
// are the tokens themselves where they fit. 2. The smallest position of each wins, so the race for slots leaves no trace, and
// first occurrences are numbered. 3. Occurrences are counted by row and, where they are to be grouped, put where their row begins, in any
// order. 4. Rows of up to 32 occurrences are put in order by counting, longer ones by a bitmap of positions. The rows of earlier samples
// are found by decoupled look-back (Merrill and Garland 2016).
#pragma once

#include "common.cuh"

namespace plan {

template <int kThreads_, int kItems_, int kResident_>
struct BlockShape {
  static constexpr int kBlock = kThreads_, kItems = kItems_, kResident = kResident_;
  static constexpr int kLongest = kBlock * kItems, kWarps = kBlock / 32;
  static constexpr int kWords = kLongest / 32;       // of a bit per position
  static constexpr int kBuckets = kLongest / 4 * 3;  // of two slots
  static constexpr int kBitmaps = kWarps < 16 ? kWarps : 16;
  static constexpr size_t kBytes = sizeof(uint32_t) * (kLongest + kBuckets);
  static_assert(kLongest <= 1 << 14 && kItems % 4 == 0 && kItems <= 32 && kLongest >= 1024);
};

// A block's shared memory; what stands in one line uses the same bytes, one after the other.
template <class Shape>
struct BlockMemory {
  unsigned char* bytes;
  template <typename T>
  __device__ T* at(int offset) const {
    return reinterpret_cast<T*>(bytes + offset);
  }
  static constexpr int kL = Shape::kLongest;
  __device__ uint32_t* link() const { return at<uint32_t>(0); }    // (L) fingerprint, then another occurrence or the first
  __device__ uint32_t* starts() const { return at<uint32_t>(0); }  // (L / 2) two rows each
  __device__ uint32_t* bitmaps() const { return at<uint32_t>(0); }  // (kBitmaps, L / 32)
  __device__ uint16_t* placed() const { return at<uint16_t>(2 * kL); }  // (L) positions by row
  __device__ uint32_t* table() const { return at<uint32_t>(4 * kL); }   // (kBuckets)
  __device__ uint16_t* row_of() const { return at<uint16_t>(4 * kL); }  // (L)
  __device__ uint32_t* counts() const { return at<uint32_t>(4 * kL); }  // (L / 2) two rows each
  __device__ uint2* firsts() const { return at<uint2>(6 * kL); }        // (L / 32) bits of first occurrences; how many before
  __device__ uint32_t* heads() const { return at<uint32_t>(6 * kL + kL / 4); }  // (L / 32 + 1) bits: where rows start
  __device__ uint32_t* long_rows() const { return at<uint32_t>(6 * kL + kL / 2); }  // (L / 32) start, and length << 16
};

constexpr uint32_t kFree = 0xffff, kEmpty = 0xffffffffu;  // a slot, both of a bucket

// Equal tokens have equal fingerprints, and below 2^32 only they.
__device__ __forceinline__ uint32_t fingerprint(int64_t id) {
  return uint32_t(id) ^ uint32_t(uint64_t(id) >> 32) * 0x9e3779b1u;
}

__device__ __forceinline__ uint32_t scramble(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85ebca6bu;  // MurmurHash3's finaliser for 32 bits (Appleby), without its last step
  x ^= x >> 13;
  return x * 0xc2b2ae35u;
}

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

// Counters of 16 bits, two to a word.
__device__ __forceinline__ uint32_t counter(const uint32_t* counters, int i) { return counters[i / 2] >> i % 2 * 16 & 0xffff; }

// The lanes of a whole warp, of which the first are valid, that have lane 0's counter. They leave it to lane 0: a hot token would queue
// up otherwise.
__device__ __forceinline__ unsigned with_leader(uint32_t i, bool valid) {
  const uint32_t leader = __shfl_sync(kFull, i, 0);  // by every lane, valid or not: it stands in front of the condition
  return __ballot_sync(kFull, valid && i == leader);
}

// Adds one to each lane's counter, and returns what it was; to lanes that leave it to lane 0, 0.
__device__ __forceinline__ uint32_t add_up(uint32_t* counters, uint32_t i, bool valid, unsigned leading) {
  if (!valid || (lane() != 0 && (leading >> lane() & 1))) return 0;
  const uint32_t add = lane() == 0 ? __popc(leading) : 1;
  return atomicAdd(counters + i / 2, add << i % 2 * 16) >> i % 2 * 16 & 0xffff;
}

// The same by a whole warp, with what each lane's counter was, in any order.
__device__ __forceinline__ uint32_t count_up(uint32_t* counters, uint32_t i, bool valid) {
  const unsigned leading = with_leader(i, valid);
  const uint32_t was = add_up(counters, i, valid, leading), base = __shfl_sync(kFull, was, 0);
  return leading >> lane() & 1 ? base + __popc(leading & lanes_below()) : was;
}

// By a warp: positions of a row, in any order, to ascending order. Bit i % 32 of word i / 32 is position i; a lane holds W words side by
// side, which lie 32 words apart.
template <class Shape>
__device__ __forceinline__ void sort_long(uint16_t* row, int length, uint32_t* bitmap) {
  constexpr int kEach = Shape::kWords / 32;
  for (int w = 0; w < kEach; ++w) bitmap[w * 32 + lane()] = 0;
  __syncwarp();
#pragma unroll 2
  for (int i = lane(); i < length; i += 32) {
    const int position = row[i];
    atomicOr(bitmap + position / 32 % kEach * 32 + position / (32 * kEach), 1u << position % 32);
  }
  __syncwarp();
  int mine = 0;
  for (int w = 0; w < kEach; ++w) mine += __popc(bitmap[w * 32 + lane()]);
  int at = warp_inclusive(mine) - mine;
#pragma unroll 1
  for (int w = 0; w < kEach; ++w)
    for (unsigned bits = bitmap[w * 32 + lane()]; bits != 0; bits &= bits - 1)
      row[at++] = uint16_t((lane() * kEach + w) * 32 + __ffs(bits) - 1);
  __syncwarp();
}

template <class Shape, bool kGrouped>
__global__ void __launch_bounds__(Shape::kBlock, Shape::kResident)
    block_kernel(const Occurrences x, const Unique out, uint64_t* states) {
  extern __shared__ __align__(16) unsigned char memory[];
  const BlockMemory<Shape> shared{memory};
  __shared__ int scan[33];
  __shared__ int long_rows;
  __shared__ int broadcast;
  constexpr int kItems = Shape::kItems, kBlock = Shape::kBlock;
  const int thread = threadIdx.x, warp = thread / 32;
  const int sample = blockIdx.x, slot_begin = sample * int(x.length);  // slots and all they are counted by stay below 2^31
  const int64_t* tokens = x.tokens + slot_begin;
  int count = int(max(min(x.extents[sample], x.length), int64_t(0)));

  // 1. Fingerprints and the table.
  uint32_t* link = shared.link();
  uint32_t* table = shared.table();
  for (int i = thread; i < Shape::kBuckets; i += kBlock) table[i] = kEmpty;
  if (thread == 0) long_rows = 0;
  bool wide = false;
#pragma unroll(kItems < 8 ? kItems : 8)
  for (int j = 0; j < kItems; ++j) {
    const int i = j * kBlock + thread;
    if (i < count) {
      const int64_t id = tokens[i];
      wide |= uint64_t(id) >> 32 != 0;
      link[i] = fingerprint(id);
    }
  }
  wide = __syncthreads_or(wide);
  wait_for_launch_before();
  const int occurrence = int(out.cu_occurrences[sample]);
  count = int(out.cu_occurrences[sample + 1]) - occurrence;  // 0 where extents are malformed

  unsigned claims = 0;  // bit j: this thread's position j stands in the table for its token
#pragma unroll 1
  for (int j = 0; j < kItems; ++j) {
    const int i = j * kBlock + thread;
    if (i >= count) break;
    out.slots[occurrence + i] = slot_begin + i;
    const uint32_t mine = link[i];
    const auto same = [&](uint32_t other) { return link[other] == mine && (!wide || tokens[other] == tokens[i]); };
    uint32_t bucket = __umulhi(scramble(mine), uint32_t(Shape::kBuckets));
    uint32_t seen = *reinterpret_cast<volatile uint32_t*>(table + bucket);
    while (true) {
      const uint32_t low = seen & 0xffff, high = seen >> 16;
      if (low != kFree && same(low)) {
        link[i] = low;
        break;
      }
      if (high != kFree && same(high)) {
        link[i] = high;
        break;
      }
      if (high != kFree) {
        bucket = bucket + 1 == Shape::kBuckets ? 0 : bucket + 1;
        seen = *reinterpret_cast<volatile uint32_t*>(table + bucket);
        continue;
      }
      const uint32_t old = atomicCAS(table + bucket, seen, low == kFree ? kFree << 16 | i : low | i << 16);
      if (old == seen) {
        claims |= 1u << j;
        break;
      }
      seen = old;
    }
  }
  __syncthreads();

  // 2. First occurrences.
  for (unsigned left = claims; left != 0; left &= left - 1) {
    const int i = (__ffs(left) - 1) * kBlock + thread;
    link[i] = i;
  }
  if constexpr (!kGrouped)  // the table is done with
    for (int i = thread; i < Shape::kLongest / 2; i += kBlock) shared.counts()[i] = 0;
  __syncthreads();
#pragma unroll 4
  for (int j = 0; j < kItems; ++j) {
    const int i = j * kBlock + thread;
    if (i < count && (claims >> j & 1) == 0 && i < link[i]) atomicMin(link + link[i], uint32_t(i));
  }
  __syncthreads();
  const auto first_of = [&](int i, int j) { return claims >> j & 1 ? link[i] : link[link[i]]; };
  uint2* firsts = shared.firsts();
#pragma unroll 4
  for (int j = 0; j < kItems; ++j) {
    const int i = j * kBlock + thread;
    const unsigned word = __ballot_sync(kFull, i < count && first_of(i, j) == i);
    if (lane() == 0) firsts[i / 32].x = word;
  }
  __syncthreads();
  int rows;
  const int before = block_exclusive(thread < Shape::kWords ? __popc(firsts[thread].x) : 0, scan, &rows);
  if (thread < Shape::kWords) firsts[thread].y = before;
  if (thread == 0) publish(states + sample, sample == 0 ? kThrough : kOwn, rows);
  __syncthreads();
  const auto row_at = [&](int i, int j) {
    const int first = first_of(i, j);
    const uint2 word = firsts[first / 32];
    return word.y + __popc(word.x & ((1u << first % 32) - 1));
  };
  uint16_t* row_of = shared.row_of();
  uint32_t held[kItems / 2];  // rows of this thread's positions, two to a word, where they are written at once
#pragma unroll(kGrouped ? 4 : kItems)
  for (int j = 0; j < kItems; ++j) {
    const int i = j * kBlock + thread;
    if constexpr (kGrouped) {
      if (i < count) row_of[i] = uint16_t(row_at(i, j));
    } else {
      const uint32_t row = i < count ? row_at(i, j) : 0;
      held[j / 2] = j % 2 == 0 ? row : held[j / 2] | row << 16;
      add_up(shared.counts(), row, i < count, with_leader(row, i < count));
    }
  }
  if (warp == 0) {
    const int64_t rows_through = rows_before(states, sample);
    if (lane() == 0) {
      broadcast = int(rows_through);
      if (sample > 0) publish(states + sample, kThrough, rows_through + rows);
    }
  }
  __syncthreads();
  const int first_row = broadcast;
  const auto inside = [&](int r) { return r < out.capacity; };
  const auto write_row = [&](int i, int row) {
    out.inverse[occurrence + i] = first_row + row;
    if ((firsts[i / 32].x >> lane() & 1) && inside(first_row + row)) out.distinct[first_row + row] = tokens[i];
  };
  if (thread == 0) {
    out.cu_seqlens[sample] = first_row;
    if (sample == x.samples - 1) {
      out.cu_seqlens[sample + 1] = first_row + rows;
      out.sizes[kRows] = first_row + rows;
      if (kGrouped && first_row + rows <= out.capacity) out.offsets[first_row + rows] = occurrence + count;
    }
  }
  if constexpr (!kGrouped) {
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int i = j * kBlock + thread;
      if (i < count) write_row(i, held[j / 2] >> j % 2 * 16 & 0xffff);
    }
    for (int r = thread; r < rows; r += kBlock)
      if (inside(first_row + r)) out.counts[first_row + r] = counter(shared.counts(), r);
    return;
  }
  if (rows == count || rows == 1) {  // all distinct, or all the same: already in order
    for (int i = thread; i < count; i += kBlock) {
      out.order[occurrence + i] = occurrence + i;
      write_row(i, rows == count ? i : 0);
      if (i < rows && inside(first_row + i)) {
        out.offsets[first_row + i] = occurrence + i;
        out.counts[first_row + i] = count / rows;
      }
    }
    return;
  }

  // 3. Where rows start, and their positions in any order.
  uint32_t* starts = shared.starts();
  uint32_t* heads = shared.heads();
  for (int i = thread; i < Shape::kLongest / 2; i += kBlock) starts[i] = 0;
  for (int i = thread; i <= Shape::kWords; i += kBlock) heads[i] = 0;
  __syncthreads();
#pragma unroll 2
  for (int j = 0; j < kItems && j * kBlock + warp * 32 < count; ++j) {
    const int i = j * kBlock + thread;
    count_up(starts, i < count ? row_of[i] : 0, i < count);
  }
  __syncthreads();
  {
    struct alignas(kItems >= 8 ? 16 : 8) Counters {
      uint32_t at[kItems / 2];
    };
    Counters mine = reinterpret_cast<Counters*>(starts)[thread];
    int sum = 0, total;
#pragma unroll
    for (int w = 0; w < kItems / 2; ++w) sum += (mine.at[w] & 0xffff) + (mine.at[w] >> 16);
    sum = block_exclusive(sum, scan, &total);
#pragma unroll
    for (int w = 0; w < kItems / 2; ++w) {
      const uint32_t low = mine.at[w] & 0xffff, high = mine.at[w] >> 16;
      mine.at[w] = (sum + low) << 16 | sum;
      sum += low + high;
    }
    reinterpret_cast<Counters*>(starts)[thread] = mine;
  }
  __syncthreads();
  for (int r = thread; r < rows; r += kBlock) {
    const int start = counter(starts, r), length = (r + 1 < rows ? counter(starts, r + 1) : count) - start;
    if (inside(first_row + r)) out.offsets[first_row + r] = occurrence + start, out.counts[first_row + r] = length;
    atomicOr(heads + start / 32, 1u << start % 32);
    if (length > 32) shared.long_rows()[atomicAdd(&long_rows, 1)] = start | length << 16;
  }
  if (thread == 0) atomicOr(heads + count / 32, 1u << count % 32);
  __syncthreads();
  uint16_t* placed = shared.placed();
#pragma unroll 2
  for (int j = 0; j < kItems && j * kBlock + warp * 32 < count; ++j) {
    const int i = j * kBlock + thread;
    const bool valid = i < count;
    const int row = valid ? row_of[i] : 0;
    const uint32_t at = count_up(starts, row, valid);
    if (valid) placed[at] = uint16_t(i), write_row(i, row);
  }
  __syncthreads();

  // 4. In order.
  int64_t* order = out.order + occurrence;
  if (warp < Shape::kBitmaps)
    for (int n = warp; n < long_rows; n += Shape::kBitmaps) {
      const int start = shared.long_rows()[n] & 0xffff, length = shared.long_rows()[n] >> 16;
      sort_long<Shape>(placed + start, length, shared.bitmaps() + warp * Shape::kWords);
#pragma unroll 2
      for (int k = start + lane(); k < start + length; k += 32) order[k] = occurrence + placed[k];
    }
  for (int i = thread; i < count; i += kBlock) {
    const int word = i / 32;  // a row of up to 32 starts in this word or the one before, and ends in this or the next
    const uint32_t here = heads[word], through = (2u << lane()) - 1;
    const uint32_t low = here & through, high = here & ~through;
    const uint32_t lower = low != 0 ? low : word > 0 ? heads[word - 1] : 0, upper = high != 0 ? high : heads[word + 1];
    if (lower == 0 || upper == 0) continue;
    const int start = (low != 0 ? word : word - 1) * 32 + 31 - __clz(lower);
    const int end = (high != 0 ? word : word + 1) * 32 + __ffs(upper) - 1;
    if (end - start > 32) continue;
    const uint32_t position = placed[i];
    int place = start;
    for (int k = start; k < end; ++k) place += placed[k] < position;
    order[place] = occurrence + position;
  }
}

}  // namespace plan
