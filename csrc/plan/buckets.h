// Buckets of a fixed size from every rank to every owner, and what arrived in them brought together. As api.h: asynchronous, nothing
// of torch, can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace plan {

constexpr int64_t kMostBuckets = 1024;

// Items (n) with their owners and bounds of samples (samples + 1), behind which items go nowhere, as do those without an owner.
struct Items {
  const int64_t* owner;
  const int32_t* bounds;
  int64_t n, samples, ranks, bound;
};

cudaError_t bucket_workspace_bytes(const Items& x, size_t* bytes);

// take (ranks, bound): the item in each place, in order, and other items in the places left; sizes (ranks, samples), all 0 where a bucket
// does not hold its items; most (1): what the fullest should hold.
cudaError_t bucket(const Items& x, int64_t* take, int64_t* sizes, int64_t* most, void* workspace, cudaStream_t stream);

// Rows of `row` bytes: in buckets (ranks, bound), `stride` bytes from one to the next, or together (ranks * bound), those of bucket r at
// bounds[r * samples] up to bounds[(r + 1) * samples]. Either way 0 where there is no row.
struct Received {
  const int32_t* bounds;
  int64_t samples, ranks, bound, row, stride;
};

cudaError_t compact(const Received& x, const void* buckets, void* together, cudaStream_t stream);
cudaError_t spread(const Received& x, const void* together, void* buckets, cudaStream_t stream);

}  // namespace plan
