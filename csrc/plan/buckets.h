// Buckets of a fixed size from every rank to every owner, and what arrived in them brought together. As api.h: asynchronous, nothing
// of torch, can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace plan {

constexpr int64_t kMostBuckets = 1024;

constexpr int kMostValues = 4;

// What every item brings to its place: values (n), 4 or 8 bytes each, and the buckets (ranks, bound) that take them, `stride` bytes from
// one to the next. Values of 8 bytes may become 4, -1 where they are negative or 2**31 or more.
struct Values {
  const void* from[kMostValues];
  void* to[kMostValues];
  int64_t stride[kMostValues];
  int bytes[kMostValues], sent_bytes[kMostValues], number;
};

// Items (n) with their owners and bounds of samples (samples + 1), behind which items go nowhere, as do those without an owner.
struct Items {
  const int64_t* owner;
  const int32_t* bounds;
  int64_t n, samples, ranks, bound;
  Values values;
};

cudaError_t bucket_workspace_bytes(const Items& x, size_t* bytes);

// The values of each bucket's items in its places, in order, and of other items in the places left; sizes (ranks, samples), `stride` from
// one rank to the next, all 0 where a bucket does not hold its items; most (1): what the fullest should hold.
cudaError_t bucket(const Items& x, int64_t* sizes, int64_t stride, int64_t* most, void* workspace, cudaStream_t stream);

// bounds (ranks * samples + 1): where each of the parts begins, and the end, from their sizes (ranks, samples), `stride` from one rank to
// the next.
cudaError_t bounds(const int64_t* sizes, int64_t ranks, int64_t samples, int64_t stride, int32_t* bounds, cudaStream_t stream);

// Rows of `row` bytes: in buckets (ranks, bound), `stride` bytes from one to the next, or together (ranks * bound), those of bucket r at
// bounds[r * samples] up to bounds[(r + 1) * samples]. Either way 0 where there is no row.
struct Received {
  const int32_t* bounds;
  int64_t samples, ranks, bound, row, stride;
};

cudaError_t compact(const Received& x, const void* buckets, void* together, cudaStream_t stream);
// The same of rows of one int32, which become int64.
cudaError_t compact_widened(const Received& x, const int32_t* buckets, int64_t* together, cudaStream_t stream);
cudaError_t spread(const Received& x, const void* together, void* buckets, cudaStream_t stream);

}  // namespace plan
