// What both launchers share.
#pragma once

#include "../host.h"
#include "stream.cuh"

namespace target_attention {

inline size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 132;
  return count;
}

inline bool is_hopper() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
}

// Bytes of shared memory that a block may ask for.
inline size_t shared_limit() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
    return 48 << 10;
  return size_t(bytes);
}

// Keys per chunk: some four blocks for every multiprocessor, none so short that its prologue shows.
inline int chunk_length(const Problem& p) {
  const int64_t wanted = int64_t(p.keys) * p.heads_kv / (4 * multiprocessors()) + 1;
  const int64_t length = wanted < 256 ? 256 : wanted > 8192 ? 8192 : wanted;
  return int(length + 127) / 128 * 128;
}

inline int row_slots(const Problem& p) { return p.targets * (p.heads / p.heads_kv); }

inline int padded_dim(const Problem& p) { return p.head_dim <= 64 ? 64 : p.head_dim <= 128 ? 128 : 256; }

template <class Kernel>
cudaError_t allow_shared(Kernel kernel, size_t bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
}

}  // namespace target_attention
