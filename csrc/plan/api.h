// The plan of a batch: distinct tokens per sample, owners, and the stable partition by owner. Raw device pointers and a stream,
// nothing of torch. Every call is asynchronous, allocates nothing and can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace plan {

// tokens: padded (samples, length) with lengths (samples) in `extents`, or packed (slots) with bounds (samples + 1), which end at
// the number of slots, or before it where a number of rows is given.
struct Occurrences {
  const int64_t* tokens;
  const int64_t* extents;
  int64_t samples, length, slots;
  bool padded;
};

enum Size { kOccurrences, kRows, kLowest, kHighest, kWellFormed, kSizes };

// Rows are the distinct tokens of each sample by first occurrence; M occurrences and U rows are known on the device only.
// Row outputs have room for `capacity`; where U is larger, rows past it are not written. With `fill`, what lies past M and U is filled: distinct
// with the first token, offsets with M, all else with 0; and where U is larger, cu_seqlens, counts, inverse and offsets are 0.
// Without order and offsets (both null) occurrences are not grouped by row: `group` does so when it is wanted.
struct Unique {
  int64_t* distinct;        // (capacity)
  int32_t* cu_seqlens;      // (samples + 1)
  int64_t* counts;          // (capacity)
  int64_t* cu_occurrences;  // (samples + 1)
  int64_t* inverse;         // (slots) row of each occurrence
  int64_t* order;           // (slots) occurrences by row, ascending within one; or null
  int64_t* offsets;         // (capacity + 1); or null
  int64_t* slots;           // (slots) of the occurrences in the padded grid; null for packed input
  int64_t* sizes;           // (kSizes) M, U, the lowest and highest length, and whether the extents make sense (else M = U = 0)
  int64_t capacity;
  bool fill;

  __host__ __device__ bool grouped() const { return offsets != nullptr; }
};

// Whether samples fit into a thread block's shared memory (padded, up to 16384 long) on the current device.
cudaError_t fits_block(const Occurrences& x, bool* fits);
cudaError_t unique_workspace_bytes(const Occurrences& x, bool grouped, bool in_block, size_t* bytes);
cudaError_t unique(const Occurrences& x, const Unique& out, bool in_block, void* workspace, cudaStream_t stream);

// Members by segment: index (members) of each, counts (segments) -> order (members), ascending within a segment, and offsets (segments + 1).
// Members behind the sum of the counts belong to none, and `order` is 0 there.
cudaError_t group_workspace_bytes(int64_t members, int64_t segments, size_t* bytes);
cudaError_t group(const int64_t* index, const int64_t* counts, int64_t members, int64_t segments, int64_t* order,
                  int64_t* offsets, void* workspace, cudaStream_t stream);

// Owners of ids (n): (id * multiplier mod vocab) / ceil(vocab / ranks), -1 outside [0, vocab); or a hash mod ranks where vocab is 0.
cudaError_t owners(const int64_t* ids, int64_t n, int64_t ranks, int64_t vocab, int64_t multiplier, int64_t* out,
                   cudaStream_t stream);

// Rows of ids (n) in the shard of rows first to first + held: id * multiplier mod vocab - first; `other` for what it does not hold.
cudaError_t local_rows(const int64_t* ids, int64_t n, int64_t first, int64_t held, int64_t vocab, int64_t multiplier,
                       int64_t other, int64_t* out, cudaStream_t stream);

// Items by owner, stable: order (n), those without an owner in [0, ranks) last; rankwise_sizes (ranks, samples): items of each
// sample (bounds of samples + 1) and owner, all negative for a sample that holds one without.
cudaError_t partition_workspace_bytes(int64_t n, int64_t ranks, size_t* bytes);
cudaError_t partition(const int64_t* owner, const int64_t* bounds, int64_t n, int64_t samples, int64_t ranks,
                      int64_t* order, int64_t* rankwise_sizes, void* workspace, cudaStream_t stream);

}  // namespace plan
