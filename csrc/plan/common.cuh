// What both ways to find distinct tokens share: block scans, extents, and the tails of the outputs.
#pragma once

#include "api.h"
#include "../early.cuh"

namespace plan {

constexpr unsigned kFull = 0xffffffffu;
constexpr int kThreads = 256;

__device__ __forceinline__ int lane() { return threadIdx.x & 31; }
__device__ __forceinline__ unsigned lanes_below() { return (1u << lane()) - 1; }

template <typename T>
__device__ __forceinline__ T warp_inclusive(T x) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const T other = __shfl_up_sync(kFull, x, d);
    if (lane() >= d) x += other;
  }
  return x;
}

// Exclusive sum over the block's threads (a multiple of 32); `total` is the sum of all. `shared` has 33 entries.
template <typename T>
__device__ __forceinline__ T block_exclusive(T x, T* shared, T* total) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const T inclusive = warp_inclusive(x);
  __syncthreads();  // an earlier scan's totals are read
  if (lane() == 31) shared[warp] = inclusive;
  __syncthreads();
  if (warp == 0) {
    const T mine = lane() < warps ? shared[lane()] : T(0);
    const T sum = warp_inclusive(mine);
    shared[lane()] = sum - mine;
    if (lane() == 31) shared[32] = sum;
  }
  __syncthreads();
  *total = shared[32];
  return shared[warp] + inclusive - x;
}

__device__ __forceinline__ uint64_t mix(uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdull;  // MurmurHash3's finaliser (Appleby), its first half
  x ^= x >> 33;
  return x * 0xc4ceb9fe1a85ec53ull;
}

// One block: bounds of the samples among the occurrences, and the sizes that need no tokens. Malformed extents give no
// occurrences at all, so that nothing is read or written out of place.
constexpr int kExtentThreads = 1024;
static __global__ void __launch_bounds__(kExtentThreads) extents_kernel(const Occurrences x, const Unique out, uint64_t* clear,
                                                                 int64_t clears) {
  __shared__ int64_t shared[33];
  __shared__ int64_t lowest[32], highest[32];
  let_next_launch();
  for (int64_t i = threadIdx.x; i < clears; i += blockDim.x) clear[i] = 0;
  int64_t low = INT64_MAX, high = INT64_MIN, before = 0;
  for (int64_t first = 0; first < x.samples; first += blockDim.x) {
    const int64_t b = first + threadIdx.x;
    int64_t length = 0;
    if (b < x.samples) {
      length = x.padded ? x.extents[b] : x.extents[b + 1] - x.extents[b];
      low = min(low, length), high = max(high, length);
    }
    int64_t total;
    const int64_t begin = before + block_exclusive(length, shared, &total);
    if (b < x.samples) out.cu_occurrences[b] = begin;
    before += total;
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) {
    low = min(low, __shfl_xor_sync(kFull, low, d));
    high = max(high, __shfl_xor_sync(kFull, high, d));
  }
  if (lane() == 0) lowest[threadIdx.x / 32] = low, highest[threadIdx.x / 32] = high;
  __syncthreads();
  for (int w = 0; w < kExtentThreads / 32; ++w) low = min(low, lowest[w]), high = max(high, highest[w]);
  const int64_t end = x.padded ? x.slots : x.extents[x.samples];
  const bool ends = x.padded || (x.extents[0] == 0 && (out.fill ? end <= x.slots : end == x.slots));
  const bool fine = ends && (x.samples == 0 || (low >= 0 && (!x.padded || high <= x.length)));
  if (!fine)
    for (int64_t b = threadIdx.x; b < x.samples; b += blockDim.x) out.cu_occurrences[b] = 0;
  if (threadIdx.x > 0) return;
  out.cu_occurrences[x.samples] = fine ? before : 0;
  out.sizes[kOccurrences] = fine ? before : 0;
  out.sizes[kRows] = 0;
  out.sizes[kLowest] = x.samples == 0 ? 0 : low;
  out.sizes[kHighest] = x.samples == 0 ? 0 : high;
  out.sizes[kWellFormed] = fine;
  if (x.samples > 0) return;
  out.cu_seqlens[0] = 0;
  if (out.grouped()) out.offsets[0] = 0;
}

// What lies past M and U, and the outputs of a batch whose rows do not fit; see Unique.
static __global__ void __launch_bounds__(kThreads) tails_kernel(const Occurrences x, const Unique out) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t members = out.sizes[kOccurrences], rows = out.sizes[kRows];
  const bool fits = rows <= out.capacity;
  if ((i >= members || !fits) && i < x.slots) out.inverse[i] = 0;
  if (i >= members && i < x.slots) {
    if (out.grouped()) out.order[i] = 0;
    if (out.slots) out.slots[i] = 0;
  }
  if (i >= rows && i < out.capacity) out.distinct[i] = rows > 0 ? out.distinct[0] : 0;
  if ((i >= rows || !fits) && i < out.capacity) out.counts[i] = 0;
  if (out.grouped() && (i >= rows || !fits) && i <= out.capacity) out.offsets[i] = fits ? members : 0;
  if (!fits && i <= x.samples) out.cu_seqlens[i] = 0;
}

inline cudaError_t fill_tails(const Occurrences& x, const Unique& out, cudaStream_t stream) {
  const int64_t n = (x.slots > out.capacity ? x.slots : out.capacity) + 1 + x.samples;
  if (out.fill) tails_kernel<<<unsigned(ceil_div(n, kThreads)), kThreads, 0, stream>>>(x, out);
  return cudaGetLastError();
}

}  // namespace plan
