// Distinct tokens of samples of any length, packed or padded, over the whole device. Sorting (sample, id) would need the ids'
// width; instead a hash table in device memory finds every token's first occurrence, first occurrences are numbered by a
// prefix sum, and what is sorted are row numbers: 32 bits and no more of them than the occurrences need.
#include <thrust/iterator/transform_iterator.h>

#include <cub/device/device_scan.cuh>

#include "launch.h"
#include "sort.cuh"

namespace plan {
namespace {

constexpr uint32_t kEmpty = 0xffffffffu;
constexpr int64_t kEarly = int64_t(1) << 14;  // occurrences inserted before all others

struct CountBits {
  __device__ uint32_t operator()(uint32_t word) const { return __popc(word); }
};

struct Table {
  uint32_t* first;  // (capacity) an occurrence of the token that owns the slot: in the end its first
  int64_t capacity;
  uint32_t* slot;  // (slots) of each occurrence
  uint32_t* claims;  // (slots / 32) bits: which occurrences took their slot for their token
  uint32_t* firsts;  // (slots / 32) bits: which occurrences are first
  uint32_t* before;  // (slots / 32) first occurrences up to the end of each word
  uint32_t *keys, *keys_sorted, *values, *values_sorted;
  void* temporary;
  size_t temporary_bytes, bytes;
  int bits;

  static int64_t words(const Occurrences& x) { return ceil_div(x.slots, 32); }

  // First occurrences up to and with this one.
  __device__ uint32_t rank(int64_t occurrence) const {
    const int64_t word = occurrence / 32;
    return (word > 0 ? before[word - 1] : 0) + __popc(firsts[word] & (0xffffffffu >> (31 - occurrence % 32)));
  }

  // How many bits are set in the words up to and with each one.
  static cudaError_t scan(void* temporary, size_t& bytes, const uint32_t* bits, uint32_t* sums, int64_t words,
                          cudaStream_t stream) {
    const auto counts = thrust::make_transform_iterator(bits, CountBits());
    return cub::DeviceScan::InclusiveSum(temporary, bytes, counts, sums, int(words), stream);
  }

  static cudaError_t carve(const Occurrences& x, void* workspace, Table* table) {
    Carver carver{static_cast<char*>(workspace)};
    table->capacity = x.slots + x.slots / 2 + 32;
    table->first = carver.take<uint32_t>(table->capacity);
    table->slot = carver.take<uint32_t>(x.slots);
    table->claims = carver.take<uint32_t>(words(x));
    table->firsts = carver.take<uint32_t>(words(x));
    table->before = carver.take<uint32_t>(words(x));
    table->keys = carver.take<uint32_t>(x.slots);
    table->keys_sorted = carver.take<uint32_t>(x.slots);
    table->values = carver.take<uint32_t>(x.slots);
    table->values_sorted = carver.take<uint32_t>(x.slots);
    table->bits = bit_length(uint64_t(x.slots));  // one key more than there can be rows: no occurrence, sorted last
    size_t sorting, scanning = 0;
    TA_RETURN_IF_ERROR(sort_bytes(x.slots, table->bits, &sorting));
    uint32_t* none = nullptr;
    TA_RETURN_IF_ERROR(table->scan(nullptr, scanning, none, none, words(x), nullptr));
    table->temporary_bytes = sorting > scanning ? sorting : scanning;
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

// Occurrences from `from` on: a thread each.
__global__ void __launch_bounds__(kThreads)
    insert_kernel(const Occurrences x, const Unique out, const Table table, int64_t from) {
  const int64_t occurrence = from + int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool valid = occurrence < out.sizes[kOccurrences];
  int64_t sample = 0, begin = 0, end = 0, shift = 0, id = 0;  // the sample's occurrences and their slots: slot = it + shift
  if (valid) {
    sample = sample_of(out.cu_occurrences, x.samples, occurrence);
    begin = out.cu_occurrences[sample], end = out.cu_occurrences[sample + 1];
    shift = x.padded ? sample * x.length - begin : 0;
    id = x.tokens[occurrence + shift];
    if (x.padded) out.slots[occurrence] = occurrence + shift;
  }
  // Lanes with lane 0's token leave it to lane 0, whose occurrence is the smallest: a hot token would queue up otherwise.
  const int64_t leading_id = __shfl_sync(kFull, id, 0), leading_sample = __shfl_sync(kFull, sample, 0);
  const bool shared = valid && id == leading_id && sample == leading_sample;
  uint32_t slot = 0;
  bool claimed = false;
  if (valid && (!shared || lane() == 0)) {
    slot = uint32_t(__umul64hi(mix(uint64_t(id) + uint64_t(sample) * 0x9e3779b97f4a7c15ull), uint64_t(table.capacity)));
    const uint32_t mine = uint32_t(occurrence);
    while (true) {
      uint32_t found = table.first[slot];  // perhaps an older one of the same token, from the first-level cache
      if (found == kEmpty) found = atomicCAS(table.first + slot, kEmpty, mine);
      if (found == kEmpty) {
        claimed = true;
        break;
      }
      if (found >= begin && found < end && x.tokens[found + shift] == id) {
        if (mine < found) atomicMin(table.first + slot, mine);
        break;
      }
      slot = slot + 1 == table.capacity ? 0 : slot + 1;
    }
  }
  const uint32_t leader = __shfl_sync(kFull, slot, 0);
  if (valid) table.slot[occurrence] = shared ? leader : slot;
  const unsigned claims = __ballot_sync(kFull, claimed);
  if (lane() == 0 && occurrence < x.slots) table.claims[occurrence / 32] = claims, table.firsts[occurrence / 32] = 0;
}

// Whoever took a slot marks the first occurrence that ended up there.
__global__ void __launch_bounds__(kThreads) first_kernel(const Occurrences x, const Table table) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= x.slots || (table.claims[i / 32] >> lane() & 1) == 0) return;
  const uint32_t first = table.first[table.slot[i]];
  atomicOr(table.firsts + first / 32, 1u << first % 32);
}

__global__ void __launch_bounds__(kThreads) number_kernel(const Occurrences x, const Unique out, const Table table) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t members = out.sizes[kOccurrences];
  if (i == 0 && members > 0) out.sizes[kRows] = table.rank(members - 1);
  if (i <= x.samples) {
    const int64_t bound = out.cu_occurrences[i];
    out.cu_seqlens[i] = bound > 0 ? int32_t(table.rank(bound - 1)) : 0;
  }
  if (i >= x.slots) return;
  table.values[i] = uint32_t(i);
  if (i >= members) {
    table.keys[i] = (uint64_t(1) << table.bits) - 1;
    return;
  }
  const uint32_t first = table.first[table.slot[i]], row = table.rank(first) - 1;
  out.inverse[i] = row;
  table.keys[i] = row;
  if (first != i || row >= out.capacity) return;
  const int64_t sample = x.padded ? sample_of(out.cu_occurrences, x.samples, i) : 0;
  out.distinct[row] = x.tokens[x.padded ? i + sample * x.length - out.cu_occurrences[sample] : i];
}

__global__ void __launch_bounds__(kThreads) order_kernel(const Occurrences x, const Unique out, const Table table) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t members = out.sizes[kOccurrences], rows = out.sizes[kRows];
  if (i == 0 && rows <= out.capacity) out.offsets[rows] = members;
  if (i >= members) return;
  out.order[i] = table.values_sorted[i];
  const uint32_t row = table.keys_sorted[i];
  if ((i == 0 || table.keys_sorted[i - 1] != row) && row <= out.capacity) out.offsets[row] = i;
}

__global__ void __launch_bounds__(kThreads) count_kernel(const Unique out) {
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
  extents_kernel<<<1, kExtentThreads, 0, stream>>>(x, out, nullptr, 0);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  const unsigned over_slots = unsigned(ceil_div((x.slots > x.samples ? x.slots : x.samples) + 1, kThreads));
  Table table;
  TA_RETURN_IF_ERROR(Table::carve(x, workspace, &table));
  TA_RETURN_IF_ERROR(cudaMemsetAsync(table.first, 0xff, sizeof(uint32_t) * table.capacity, stream));
  // Tokens that come often are in the table before most occurrences look: else all of them would try to enter theirs at once.
  for (const int64_t from : {int64_t(0), kEarly}) {
    const int64_t count = (from == 0 ? (x.slots < kEarly ? x.slots : kEarly) : x.slots - kEarly);
    if (count > 0) insert_kernel<<<unsigned(ceil_div(count, kThreads)), kThreads, 0, stream>>>(x, out, table, from);
    TA_RETURN_IF_ERROR(cudaGetLastError());
  }
  first_kernel<<<over_slots, kThreads, 0, stream>>>(x, table);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  size_t bytes = table.temporary_bytes;
  if (x.slots > 0)
    TA_RETURN_IF_ERROR(Table::scan(table.temporary, bytes, table.firsts, table.before, Table::words(x), stream));
  number_kernel<<<over_slots, kThreads, 0, stream>>>(x, out, table);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  if (x.slots > 0)
    TA_RETURN_IF_ERROR(sort_pairs(table.temporary, table.temporary_bytes, table.keys, table.keys_sorted, table.values,
                                  table.values_sorted, x.slots, table.bits, stream));
  order_kernel<<<over_slots, kThreads, 0, stream>>>(x, out, table);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  count_kernel<<<unsigned(ceil_div(out.capacity + 1, kThreads)), kThreads, 0, stream>>>(out);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  return fill_tails(x, out, stream);
}

}  // namespace plan
