// Launches the way of one block per sample.
#include "launch.h"
#include "block.cuh"

namespace plan {
namespace {

using Short = BlockShape<128, 8, 8>;
using Middle = BlockShape<1024, 4, 2>;
using Long = BlockShape<1024, 16, 2>;  // 112 KB: half of what a Hopper multiprocessor has

template <class Shape, bool kGrouped>
cudaError_t launch_kind(const Occurrences& x, const Unique& out, uint64_t* states, cudaStream_t stream) {
  const auto kernel = block_kernel<Shape, kGrouped>;
  TA_RETURN_IF_ERROR(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(Shape::kBytes)));
  return launch_early(kernel, dim3(unsigned(x.samples)), dim3(Shape::kBlock), Shape::kBytes, stream, x, out, states);
}

template <class Shape>
cudaError_t launch(const Occurrences& x, const Unique& out, uint64_t* states, cudaStream_t stream) {
  return out.grouped() ? launch_kind<Shape, true>(x, out, states, stream) : launch_kind<Shape, false>(x, out, states, stream);
}

}  // namespace

cudaError_t fits_block(const Occurrences& x, bool* fits) {
  int device, bytes;
  TA_RETURN_IF_ERROR(cudaGetDevice(&device));
  TA_RETURN_IF_ERROR(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const size_t static_bytes = 1024;
  *fits = x.padded && x.samples < (int64_t(1) << 31) &&
          (x.length <= Middle::kLongest ||
           (x.length <= Long::kLongest && Long::kBytes + static_bytes <= size_t(bytes)));
  return cudaSuccess;
}

size_t block_workspace_bytes(const Occurrences& x) { return sizeof(uint64_t) * x.samples; }

cudaError_t block_unique(const Occurrences& x, const Unique& out, void* workspace, cudaStream_t stream) {
  uint64_t* states = static_cast<uint64_t*>(workspace);
  extents_kernel<<<1, kExtentThreads, 0, stream>>>(x, out, states, x.samples);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  if (x.samples > 0) {
    if (x.length <= Short::kLongest)
      TA_RETURN_IF_ERROR(launch<Short>(x, out, states, stream));
    else if (x.length <= Middle::kLongest)
      TA_RETURN_IF_ERROR(launch<Middle>(x, out, states, stream));
    else
      TA_RETURN_IF_ERROR(launch<Long>(x, out, states, stream));
  }
  return fill_tails(x, out, stream);
}

}  // namespace plan
