// Distinct tokens of samples of any length, packed or padded, over the whole device. Sorting (sample, id) would need the ids'
// width; instead a hash table in device memory finds every token's first occurrence, first occurrences are numbered by a
// prefix sum, and where occurrences are to be grouped by row, what is sorted are row numbers: 32 bits and no more of them than the
// occurrences need.
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
  Pairs pairs;  // rows and occurrences, where they are to be grouped: one key more than there can be rows is of none, sorted last
  void* temporary;
  size_t temporary_bytes, bytes;

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

  static cudaError_t carve(const Occurrences& x, bool grouped, void* workspace, Table* table) {
    Carver carver{static_cast<char*>(workspace)};
    table->capacity = x.slots + x.slots / 2 + 32;
    table->first = carver.take<uint32_t>(table->capacity);
    table->slot = carver.take<uint32_t>(x.slots);
    table->claims = carver.take<uint32_t>(words(x));
    table->firsts = carver.take<uint32_t>(words(x));
    table->before = carver.take<uint32_t>(words(x));
    uint32_t* none = nullptr;
    table->temporary_bytes = 0;
    TA_RETURN_IF_ERROR(table->scan(nullptr, table->temporary_bytes, none, none, words(x), nullptr));
    table->temporary = carver.take<char>(int64_t(table->temporary_bytes));
    if (grouped) TA_RETURN_IF_ERROR(Pairs::carve(carver, x.slots, bit_length(uint64_t(x.slots)), &table->pairs));
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
  if (!out.grouped() && occurrence < x.slots && occurrence < out.capacity) out.counts[occurrence] = 0;  // there are no more rows
}

// Whoever took a slot marks the first occurrence that ended up there.
__global__ void __launch_bounds__(kThreads) first_kernel(const Occurrences x, const Table table) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= x.slots || (table.claims[i / 32] >> lane() & 1) == 0) return;
  const uint32_t first = table.first[table.slot[i]];
  atomicOr(table.firsts + first / 32, 1u << first % 32);
}

// Counts of rows, by a block that meets hot ones often: in shared memory where a row finds its place free, and added to the batch's then.
struct BlockCounts {
  static constexpr int kPlaces = 512;
  uint32_t rows[kPlaces], counts[kPlaces];

  __device__ void clear() {
    for (int i = threadIdx.x; i < kPlaces; i += kThreads) rows[i] = kEmpty, counts[i] = 0;
  }
  __device__ static void add(const Unique& out, uint32_t row, uint32_t count) {
    if (row < out.capacity) atomicAdd(reinterpret_cast<unsigned long long*>(out.counts) + row, (unsigned long long)count);
  }
  __device__ void one(const Unique& out, uint32_t row) {
    const int place = row % kPlaces;
    uint32_t owner = *const_cast<volatile uint32_t*>(rows + place);
    if (owner == kEmpty) owner = atomicCAS(rows + place, kEmpty, row);
    if (owner == kEmpty || owner == row)
      atomicAdd(counts + place, 1u);
    else
      add(out, row, 1);
  }
  __device__ void leave(const Unique& out) const {
    for (int i = threadIdx.x; i < kPlaces; i += kThreads)
      if (counts[i] > 0) add(out, rows[i], counts[i]);
  }
};

constexpr int kNumbered = 4;  // occurrences a thread

__global__ void __launch_bounds__(kThreads) number_kernel(const Occurrences x, const Unique out, const Table table) {
  __shared__ BlockCounts block;
  const bool grouped = out.grouped();
  if (!grouped) {
    block.clear();
    __syncthreads();
  }
  const int64_t begin = int64_t(blockIdx.x) * kThreads * kNumbered + threadIdx.x;
  const int64_t members = out.sizes[kOccurrences];
  if (begin == 0 && members > 0) out.sizes[kRows] = table.rank(members - 1);
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i <= x.samples; i += int64_t(gridDim.x) * kThreads) {
    const int64_t bound = out.cu_occurrences[i];
    out.cu_seqlens[i] = bound > 0 ? int32_t(table.rank(bound - 1)) : 0;
  }
  uint32_t first[kNumbered], row[kNumbered];
#pragma unroll
  for (int j = 0; j < kNumbered; ++j) {
    const int64_t i = begin + j * kThreads;
    first[j] = i < members ? table.slot[i] : 0;
  }
#pragma unroll
  for (int j = 0; j < kNumbered; ++j) first[j] = begin + j * kThreads < members ? table.first[first[j]] : 0;
#pragma unroll
  for (int j = 0; j < kNumbered; ++j) row[j] = begin + j * kThreads < members ? table.rank(first[j]) - 1 : 0;
#pragma unroll
  for (int j = 0; j < kNumbered; ++j) {
    const int64_t i = begin + j * kThreads;
    if (i >= x.slots) break;
    if (grouped) {
      table.pairs.values[i] = uint32_t(i);
      table.pairs.keys[i] = i < members ? row[j] : (uint64_t(1) << table.pairs.bits) - 1;
    }
    if (i >= members) continue;
    out.inverse[i] = row[j];
    if (!grouped) block.one(out, row[j]);
    if (first[j] != i || row[j] >= out.capacity) continue;
    const int64_t sample = x.padded ? sample_of(out.cu_occurrences, x.samples, i) : 0;
    out.distinct[row[j]] = x.tokens[x.padded ? i + sample * x.length - out.cu_occurrences[sample] : i];
  }
  if (grouped) return;
  __syncthreads();
  block.leave(out);
}

__global__ void __launch_bounds__(kThreads) order_kernel(const Occurrences x, const Unique out, const Table table) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t members = out.sizes[kOccurrences], rows = out.sizes[kRows];
  if (i == 0 && rows <= out.capacity) out.offsets[rows] = members;
  if (i >= members) return;
  out.order[i] = table.pairs.values_sorted[i];
  const uint32_t row = table.pairs.keys_sorted[i];
  if ((i == 0 || table.pairs.keys_sorted[i - 1] != row) && row <= out.capacity) out.offsets[row] = i;
}

__global__ void __launch_bounds__(kThreads) count_kernel(const Unique out) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x, rows = out.sizes[kRows];
  if (row >= rows || row >= out.capacity) return;
  out.counts[row] = out.offsets[row + 1] - out.offsets[row];
}

}  // namespace

cudaError_t table_workspace_bytes(const Occurrences& x, bool grouped, size_t* bytes) {
  Table table;
  TA_RETURN_IF_ERROR(Table::carve(x, grouped, nullptr, &table));
  *bytes = table.bytes;
  return cudaSuccess;
}

cudaError_t table_unique(const Occurrences& x, const Unique& out, void* workspace, cudaStream_t stream) {
  extents_kernel<<<1, kExtentThreads, 0, stream>>>(x, out, nullptr, 0);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  const unsigned over_slots = unsigned(ceil_div((x.slots > x.samples ? x.slots : x.samples) + 1, kThreads));
  Table table;
  TA_RETURN_IF_ERROR(Table::carve(x, out.grouped(), workspace, &table));
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
  number_kernel<<<unsigned(ceil_div(x.slots + 1, kThreads * kNumbered)), kThreads, 0, stream>>>(x, out, table);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  if (!out.grouped()) return fill_tails(x, out, stream);
  if (x.slots > 0) TA_RETURN_IF_ERROR(table.pairs.sort(stream));
  order_kernel<<<over_slots, kThreads, 0, stream>>>(x, out, table);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  count_kernel<<<unsigned(ceil_div(out.capacity + 1, kThreads)), kThreads, 0, stream>>>(out);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  return fill_tails(x, out, stream);
}

}  // namespace plan
