// Members grouped by segment: a stable sort of their segments' numbers, where each segment begins by a prefix sum of the counts.
#include <cub/device/device_scan.cuh>

#include "sort.cuh"

namespace plan {
namespace {

cudaError_t scan(void* temporary, size_t& bytes, const int64_t* counts, int64_t segments, int64_t* ends, cudaStream_t stream) {
  return cub::DeviceScan::InclusiveSum(temporary, bytes, counts, ends, int(segments), stream);
}

cudaError_t carve(int64_t members, int64_t segments, void* workspace, Pairs* pairs, size_t* bytes) {
  Carver carver{static_cast<char*>(workspace)};
  size_t scanning = 0;
  TA_RETURN_IF_ERROR(scan(nullptr, scanning, nullptr, segments, nullptr, nullptr));
  // one key more than there are segments: of no segment, sorted last
  TA_RETURN_IF_ERROR(Pairs::carve(carver, members, bit_length(uint64_t(segments) | 1), pairs, scanning));
  *bytes = carver.used;
  return cudaSuccess;
}

__global__ void __launch_bounds__(kThreads)
    keys_kernel(const int64_t* index, const int64_t* offsets, int64_t segments, const Pairs pairs) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= pairs.n) return;
  const int64_t segment = i < offsets[segments] ? index[i] : segments;
  pairs.keys[i] = uint32_t(segment), pairs.values[i] = uint32_t(i);
}

__global__ void __launch_bounds__(kThreads)
    order_kernel(const Pairs pairs, const int64_t* offsets, int64_t segments, int64_t* order) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < pairs.n) order[i] = i < offsets[segments] ? pairs.values_sorted[i] : 0;
}

}  // namespace

cudaError_t group_workspace_bytes(int64_t members, int64_t segments, size_t* bytes) {
  Pairs pairs;
  return carve(members, segments, nullptr, &pairs, bytes);
}

cudaError_t group(const int64_t* index, const int64_t* counts, int64_t members, int64_t segments, int64_t* order,
                  int64_t* offsets, void* workspace, cudaStream_t stream) {
  Pairs pairs;
  size_t bytes;
  TA_RETURN_IF_ERROR(carve(members, segments, workspace, &pairs, &bytes));
  TA_RETURN_IF_ERROR(cudaMemsetAsync(offsets, 0, sizeof(int64_t), stream));
  if (segments > 0)
    TA_RETURN_IF_ERROR(scan(pairs.temporary, pairs.temporary_bytes, counts, segments, offsets + 1, stream));
  if (members == 0) return cudaSuccess;
  const unsigned blocks = unsigned(ceil_div(members, kThreads));
  keys_kernel<<<blocks, kThreads, 0, stream>>>(index, offsets, segments, pairs);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  if (segments > 0) TA_RETURN_IF_ERROR(pairs.sort(stream));
  order_kernel<<<blocks, kThreads, 0, stream>>>(pairs, offsets, segments, order);
  return cudaGetLastError();
}

}  // namespace plan
