// Distinct tokens of samples of any length, packed or padded, over the whole device. Sorting (sample, id) would need the ids'
// width; instead a hash table in device memory finds every token's first occurrence, first occurrences are numbered by a
// prefix sum, and what is sorted are row numbers: 32 bits and no more of them than the occurrences need.
#include <algorithm>

#include "launch.h"
#include "sort.cuh"

namespace plan {
namespace {

constexpr uint32_t kRow = 0x80000000u;  // in a slot: what follows is the token's row, no occurrence any more
constexpr int kItems = 4;                // occurrences per thread
constexpr int kPerBlock = kItems * kThreads;

struct Table {
  uint32_t* first;  // (capacity) an occurrence of the token that owns the slot, its first in the end; then its row
  int64_t capacity;
  uint32_t* slot;  // (slots) of each occurrence
  uint32_t* firsts;  // (slots / 32) bits: which occurrences are first
  uint32_t* before;  // (slots / 32) first occurrences before each word
  uint64_t* states;  // (slots / kPerBlock) for the look-back
  uint32_t *keys, *keys_sorted, *values, *values_sorted;
  void* temporary;
  size_t temporary_bytes, bytes;
  int bits;

  static int64_t words(const Occurrences& x) { return ceil_div(x.slots, 32); }

  // First occurrences up to and with this one.
  __device__ uint32_t rank(int64_t occurrence) const {
    const int64_t word = occurrence / 32;
    return before[word] + __popc(firsts[word] & (0xffffffffu >> (31 - occurrence % 32)));
  }

  static cudaError_t carve(const Occurrences& x, void* workspace, Table* table) {
    Carver carver{static_cast<char*>(workspace)};
    table->capacity = (x.slots + x.slots / 2 + 32) / 4 * 4;
    table->first = carver.take<uint32_t>(table->capacity);
    table->slot = carver.take<uint32_t>(x.slots);
    table->firsts = carver.take<uint32_t>(words(x));
    table->before = carver.take<uint32_t>(words(x));
    table->states = carver.take<uint64_t>(ceil_div(x.slots, kPerBlock));
    table->keys = carver.take<uint32_t>(x.slots);
    table->keys_sorted = carver.take<uint32_t>(x.slots);
    table->values = carver.take<uint32_t>(x.slots);
    table->values_sorted = carver.take<uint32_t>(x.slots);
    table->bits = bit_length(uint64_t(x.slots));  // one key more than there can be rows: no occurrence, sorted last
    TA_RETURN_IF_ERROR(sort_bytes(x.slots, table->bits, &table->temporary_bytes));
    table->temporary = carver.take<char>(int64_t(table->temporary_bytes));
    table->bytes = carver.used;
    return cudaSuccess;
  }
};

__device__ __forceinline__ int64_t sample_of(const int64_t* bounds, int64_t samples, int64_t occurrence) {
  int64_t low = 0, high = samples;  // bounds[low] <= occurrence < bounds[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (bounds[middle] <= occurrence)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// An occurrence, its sample's bounds, and where its token lies: slot = occurrence + shift.
struct Occurrence {
  int64_t id, sample, begin, end, shift;
  bool valid;
  __device__ Occurrence(const Occurrences& x, const Unique& out, int64_t occurrence, int64_t members)
      : id(0), sample(0), begin(0), end(0), shift(0), valid(occurrence < members) {
    if (!valid) return;
    sample = sample_of(out.cu_occurrences, x.samples, occurrence);
    begin = out.cu_occurrences[sample], end = out.cu_occurrences[sample + 1];
    shift = x.padded ? sample * x.length - begin : 0;
    id = x.tokens[occurrence + shift];
  }
};

__global__ void __launch_bounds__(kThreads) insert_kernel(const Occurrences x, const Unique out, const Table table) {
  wait_for_launch_before();
  let_next_launch();
  const int64_t occurrence = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const Occurrence o(x, out, occurrence, out.sizes[kOccurrences]);
  if (o.valid && x.padded) out.slots[occurrence] = occurrence + o.shift;
  // Lanes with lane 0's token leave it to lane 0, whose occurrence is the smallest: a hot token would queue up otherwise.
  const bool shared = o.valid && o.id == __shfl_sync(kFull, o.id, 0) && o.sample == __shfl_sync(kFull, o.sample, 0);
  uint32_t slot = 0;
  if (o.valid && (!shared || lane() == 0)) {
    const uint64_t hash = mix(uint64_t(o.id) + uint64_t(o.sample) * 0x9e3779b97f4a7c15ull);
    slot = uint32_t(__umul64hi(hash, uint64_t(table.capacity)));
    const uint32_t mine = uint32_t(occurrence);
    while (true) {
      uint32_t found = table.first[slot];  // from the first-level cache, perhaps an older occurrence of the same token
      if (found == kEmpty) found = atomicCAS(table.first + slot, kEmpty, mine);
      if (found == kEmpty) break;
      if (found >= o.begin && found < o.end && x.tokens[found + o.shift] == o.id) {
        if (mine < found) atomicMin(table.first + slot, mine);
        break;
      }
      slot = slot + 1 == table.capacity ? 0 : slot + 1;
    }
  }
  const uint32_t leader = __shfl_sync(kFull, slot, 0);
  if (o.valid) table.slot[occurrence] = shared ? leader : slot;
}

// Numbers first occurrences: a warp's are 32 * kItems in a row. Slots get their token's row.
__global__ void __launch_bounds__(kThreads) first_kernel(const Occurrences x, const Unique out, const Table table) {
  __shared__ int scan[33];
  __shared__ int64_t broadcast;
  wait_for_launch_before();
  let_next_launch();
  const int64_t members = out.sizes[kOccurrences];
  const int64_t begin = int64_t(blockIdx.x) * kPerBlock + threadIdx.x / 32 * (32 * kItems);
  uint32_t slot[kItems];
  unsigned word[kItems];
  int found = 0;
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const int64_t i = begin + j * 32 + lane();
    slot[j] = i < members ? table.slot[i] : 0;
  }
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const int64_t i = begin + j * 32 + lane();
    const bool first = i < members && *reinterpret_cast<volatile uint32_t*>(table.first + slot[j]) == uint32_t(i);
    word[j] = __ballot_sync(kFull, first);
    found += __popc(word[j]);
  }
  int rows;
  const int within = block_exclusive(lane() == 0 ? found : 0, scan, &rows);
  if (threadIdx.x == 0) publish(table.states + blockIdx.x, blockIdx.x == 0 ? kThrough : kOwn, rows);
  if (threadIdx.x < 32) {
    const int64_t before = rows_before(table.states, blockIdx.x);
    if (lane() == 0) {
      broadcast = before;
      if (blockIdx.x > 0) publish(table.states + blockIdx.x, kThrough, before + rows);
      if (blockIdx.x == gridDim.x - 1) out.sizes[kRows] = before + rows;
    }
  }
  __syncthreads();
  uint32_t row = uint32_t(broadcast) + __shfl_sync(kFull, within, 0);
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const int64_t i = begin + j * 32 + lane();
    if (lane() == 0 && i < x.slots) table.firsts[i / 32] = word[j], table.before[i / 32] = row;
    if (word[j] >> lane() & 1) {
      const uint32_t mine = row + __popc(word[j] & lanes_below());
      *reinterpret_cast<volatile uint32_t*>(table.first + slot[j]) = kRow | mine;
      if (mine < out.capacity) out.distinct[mine] = x.tokens[x.padded ? out.slots[i] : i];
    }
    row += __popc(word[j]);
  }
}

__global__ void __launch_bounds__(kThreads) number_kernel(const Occurrences x, const Unique out, const Table table) {
  wait_for_launch_before();
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i <= x.samples) {
    const int64_t bound = out.cu_occurrences[i];
    out.cu_seqlens[i] = bound > 0 ? int32_t(table.rank(bound - 1)) : 0;
  }
  if (i >= x.slots) return;
  table.values[i] = uint32_t(i);
  if (i >= out.sizes[kOccurrences]) {
    table.keys[i] = (uint64_t(1) << table.bits) - 1;
    return;
  }
  const uint32_t row = table.first[table.slot[i]] & ~kRow;
  out.inverse[i] = row;
  table.keys[i] = row;
}

__global__ void __launch_bounds__(kThreads) order_kernel(const Occurrences x, const Unique out, const Table table) {
  let_next_launch();
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t members = out.sizes[kOccurrences], rows = out.sizes[kRows];
  if (i == 0 && rows <= out.capacity) out.offsets[rows] = members;
  if (i >= members) return;
  out.order[i] = table.values_sorted[i];
  const uint32_t row = table.keys_sorted[i];
  if ((i == 0 || table.keys_sorted[i - 1] != row) && row <= out.capacity) out.offsets[row] = i;
}

__global__ void __launch_bounds__(kThreads) count_kernel(const Unique out) {
  wait_for_launch_before();
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x, rows = out.sizes[kRows];
  if (row >= rows || row >= out.capacity) return;
  out.counts[row] = out.offsets[row + 1] - out.offsets[row];
}

}  // namespace

cudaError_t table_workspace_bytes(const Occurrences& x, size_t* bytes) {
  Table table;
  TA_RETURN_IF_ERROR(Table::carve(x, nullptr, &table));
  *bytes = table.bytes;
  return cudaSuccess;
}

cudaError_t table_unique(const Occurrences& x, const Unique& out, void* workspace, cudaStream_t stream) {
  Table table;
  TA_RETURN_IF_ERROR(Table::carve(x, workspace, &table));
  const int64_t vectors = table.capacity / 4, blocks = ceil_div(x.slots, kPerBlock);
  const unsigned clearing = unsigned(std::min<int64_t>(ceil_div(vectors, kExtentThreads), 1024));
  extents_kernel<<<1 + clearing, kExtentThreads, 0, stream>>>(x, out, table.states, blocks,
                                                              reinterpret_cast<uint4*>(table.first), vectors);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  const unsigned over_slots = unsigned(ceil_div((x.slots > x.samples ? x.slots : x.samples) + 1, kThreads));
  if (blocks > 0) {
    TA_RETURN_IF_ERROR(launch_early(insert_kernel, over_slots, kThreads, 0, stream, x, out, table));
    TA_RETURN_IF_ERROR(launch_early(first_kernel, unsigned(blocks), kThreads, 0, stream, x, out, table));
  }
  TA_RETURN_IF_ERROR(launch_early(number_kernel, over_slots, kThreads, 0, stream, x, out, table));
  if (x.slots > 0)
    TA_RETURN_IF_ERROR(sort_pairs(table.temporary, table.temporary_bytes, table.keys, table.keys_sorted, table.values,
                                  table.values_sorted, x.slots, table.bits, stream));
  order_kernel<<<over_slots, kThreads, 0, stream>>>(x, out, table);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  TA_RETURN_IF_ERROR(launch_early(count_kernel, unsigned(ceil_div(out.capacity + 1, kThreads)), kThreads, 0, stream, out));
  return fill_tails(x, out, stream);
}

}  // namespace plan
