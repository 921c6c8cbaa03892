// Distinct tokens of samples of any length, packed or padded, over the whole device. Sorting (sample, id) would need the ids'
// width; instead a hash table in device memory finds every token's first occurrence, first occurrences are numbered by a
// prefix sum, and where occurrences are to be grouped by row, what is sorted are row numbers: 32 bits and no more of them than the
// occurrences need.
#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/permutation_iterator.h>
#include <thrust/iterator/transform_iterator.h>

#include <cub/device/device_scan.cuh>

#include "launch.h"
#include "sort.cuh"

namespace plan {
namespace {

constexpr uint32_t kEmpty = 0xffffffffu;
constexpr int64_t kEarly = int64_t(1) << 14;  // occurrences inserted before all others
constexpr int kEach = 4;                      // occurrences a thread looks up at once

// Of 32 occurrences: which are the first of their token, as bits, and how many are among these and all before them.
struct alignas(8) Marks {
  uint32_t firsts, through;
};

struct CountFirsts {
  __device__ uint32_t operator()(const Marks& marks) const { return __popc(marks.firsts); }
};

struct Twice {
  __host__ __device__ int operator()(int i) const { return 2 * i; }
};

struct Table {
  uint32_t* first;  // (capacity) an occurrence of the token that owns the slot: in the end its first
  int64_t capacity;
  uint32_t* slot;    // (slots) of each occurrence
  uint32_t* claims;  // (slots / 32) bits: which occurrences took their slot for their token
  Marks* marks;      // (slots / 32)
  Pairs pairs;       // rows and occurrences, where they are to be grouped: one key more than there can be rows is of none, sorted last
  void* temporary;
  size_t temporary_bytes, bytes;

  static int64_t words(const Occurrences& x) { return ceil_div(x.slots, 32); }

  // First occurrences up to and with this one.
  __device__ uint32_t rank(int64_t occurrence) const {
    const Marks at = marks[occurrence / 32];
    return at.through - __popc(at.firsts >> occurrence % 32 >> 1);
  }

  // `through` of all marks.
  static cudaError_t scan(void* temporary, size_t& bytes, Marks* marks, int64_t words, cudaStream_t stream) {
    const auto counts = thrust::make_transform_iterator(marks, CountFirsts());
    const auto places = thrust::make_transform_iterator(thrust::make_counting_iterator(0), Twice());
    const auto through = thrust::make_permutation_iterator(reinterpret_cast<uint32_t*>(marks) + 1, places);
    return cub::DeviceScan::InclusiveSum(temporary, bytes, counts, through, int(words), stream);
  }

  static cudaError_t carve(const Occurrences& x, bool grouped, void* workspace, Table* table) {
    Carver carver{static_cast<char*>(workspace)};
    table->capacity = x.slots + x.slots / 2 + 32;
    table->first = carver.take<uint32_t>(table->capacity);
    table->slot = carver.take<uint32_t>(x.slots);
    table->claims = carver.take<uint32_t>(words(x));
    table->marks = carver.take<Marks>(words(x));
    table->temporary_bytes = 0;
    TA_RETURN_IF_ERROR(scan(nullptr, table->temporary_bytes, nullptr, words(x), nullptr));
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
  if (lane() == 0 && occurrence < x.slots) table.claims[occurrence / 32] = claims, table.marks[occurrence / 32].firsts = 0;
  if (!out.grouped() && occurrence < x.slots && occurrence < out.capacity) out.counts[occurrence] = 1;  // the first, of as many rows
}

// Whoever took a slot marks the first occurrence that ended up there.
__global__ void __launch_bounds__(kThreads) first_kernel(const Occurrences x, const Table table) {
  const int64_t begin = int64_t(blockIdx.x) * kThreads * kEach + threadIdx.x;
  bool claimed[kEach];
  uint32_t at[kEach];  // slot, then first occurrence
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int64_t i = begin + j * kThreads;
    claimed[j] = i < x.slots && (table.claims[i / 32] >> lane() & 1) != 0;
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) at[j] = claimed[j] ? table.slot[begin + j * kThreads] : 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) at[j] = claimed[j] ? table.first[at[j]] : 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j)
    if (claimed[j]) atomicOr(&table.marks[at[j] / 32].firsts, 1u << at[j] % 32);
}

// Few and large blocks, so that each meets hot rows often: their counts lie side by side, and additions to one line wait for each other.
constexpr int kNumberThreads = 1024, kNumberBlocks = 2, kNumberTile = kNumberThreads * kEach;

// Repeats of rows: in shared memory where a row finds its place free, and added to the batch's counts in the end. A count has 31 bits: its
// lower half is what is added to.
struct BlockCounts {
  static constexpr int kPlaces = 4096;
  uint32_t rows[kPlaces], counts[kPlaces];

  __device__ void clear() {
    for (int i = threadIdx.x; i < kPlaces; i += kNumberThreads) rows[i] = kEmpty, counts[i] = 0;
  }
  __device__ static void add(const Unique& out, uint32_t row, uint32_t count) {
    if (row < out.capacity) atomicAdd(reinterpret_cast<uint32_t*>(out.counts + row), count);
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
    for (int i = threadIdx.x; i < kPlaces; i += kNumberThreads)
      if (counts[i] > 0) add(out, rows[i], counts[i]);
  }
};

// A block takes `tiles` tiles side by side.
__global__ void __launch_bounds__(kNumberThreads, kNumberBlocks)
    number_kernel(const Occurrences x, const Unique out, const Table table, int tiles) {
  __shared__ BlockCounts block;
  const bool grouped = out.grouped();
  if (!grouped) {
    block.clear();
    __syncthreads();
  }
  const int64_t members = out.sizes[kOccurrences], thread = int64_t(blockIdx.x) * kNumberThreads + threadIdx.x;
  if (thread == 0 && members > 0) out.sizes[kRows] = table.rank(members - 1);
  for (int64_t i = thread; i <= x.samples; i += int64_t(gridDim.x) * kNumberThreads) {
    const int64_t bound = out.cu_occurrences[i];
    out.cu_seqlens[i] = bound > 0 ? int32_t(table.rank(bound - 1)) : 0;
  }
  const auto one = [&](uint32_t i, uint32_t first, uint32_t row) {  // i below 2^31
    if (grouped) {
      table.pairs.values[i] = i;
      table.pairs.keys[i] = i < members ? row : (1u << table.pairs.bits) - 1;
    }
    if (i >= members) return;
    out.inverse[i] = row;
    if (first != i) {
      if (!grouped) block.one(out, row);
    } else if (row < out.capacity) {
      const int64_t sample = x.padded ? sample_of(out.cu_occurrences, x.samples, i) : 0;
      out.distinct[row] = x.tokens[x.padded ? i + sample * x.length - out.cu_occurrences[sample] : i];
    }
  };
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const int64_t begin = (int64_t(blockIdx.x) * tiles + tile) * kNumberTile + threadIdx.x;
    uint32_t first[kEach], row[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) first[j] = begin + j * kNumberThreads < members ? table.slot[begin + j * kNumberThreads] : 0;
#pragma unroll
    for (int j = 0; j < kEach; ++j) first[j] = begin + j * kNumberThreads < members ? table.first[first[j]] : 0;
#pragma unroll
    for (int j = 0; j < kEach; ++j) row[j] = begin + j * kNumberThreads < members ? table.rank(first[j]) - 1 : 0;
#pragma unroll
    for (int j = 0; j < kEach; ++j)
      if (begin + j * kNumberThreads < x.slots) one(uint32_t(begin + j * kNumberThreads), first[j], row[j]);
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
  const unsigned over_slots = unsigned(ceil_div(x.slots + 1, kThreads)), fewer = unsigned(ceil_div(x.slots + 1, kThreads * kEach));
  Table table;
  TA_RETURN_IF_ERROR(Table::carve(x, out.grouped(), workspace, &table));
  TA_RETURN_IF_ERROR(cudaMemsetAsync(table.first, 0xff, sizeof(uint32_t) * table.capacity, stream));
  // Tokens that come often are in the table before most occurrences look: else all of them would try to enter theirs at once.
  for (const int64_t from : {int64_t(0), kEarly}) {
    const int64_t count = (from == 0 ? (x.slots < kEarly ? x.slots : kEarly) : x.slots - kEarly);
    if (count > 0) insert_kernel<<<unsigned(ceil_div(count, kThreads)), kThreads, 0, stream>>>(x, out, table, from);
    TA_RETURN_IF_ERROR(cudaGetLastError());
  }
  first_kernel<<<fewer, kThreads, 0, stream>>>(x, table);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  size_t bytes = table.temporary_bytes;
  if (x.slots > 0)
    TA_RETURN_IF_ERROR(Table::scan(table.temporary, bytes, table.marks, Table::words(x), stream));
  int device, processors;
  TA_RETURN_IF_ERROR(cudaGetDevice(&device));
  TA_RETURN_IF_ERROR(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const int64_t tiles = ceil_div(x.slots + 1, kNumberTile), each = ceil_div(tiles, int64_t(processors) * kNumberBlocks);
  number_kernel<<<unsigned(ceil_div(tiles, each)), kNumberThreads, 0, stream>>>(x, out, table, int(each));
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
