// Launches the way of one block per sample.
#include "launch.h"
#include "block.cuh"

namespace plan {
namespace {

using Short = BlockShape<128, 8, 2048, 8>;
using Middle = BlockShape<512, 8, 8192, 2>;
using Long = BlockShape<1024, 16, 24576, 1>;  // 224 KB: what a Hopper block can have

// A launch that may start before the one ahead of it in the stream has ended (Hopper and later); see wait_for_launch_before.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared, cudaStream_t stream,
                         const Arguments&... arguments) {
  int device, major;
  TA_RETURN_IF_ERROR(cudaGetDevice(&device));
  TA_RETURN_IF_ERROR(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks, config.blockDim = threads, config.dynamicSmemBytes = shared, config.stream = stream;
  config.attrs = &early, config.numAttrs = major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

template <class Shape>
cudaError_t launch(const Occurrences& x, const Unique& out, uint64_t* states, cudaStream_t stream) {
  const auto kernel = block_kernel<Shape>;
  TA_RETURN_IF_ERROR(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(Shape::kBytes)));
  return launch_early(kernel, unsigned(x.samples), Shape::kBlock, Shape::kBytes, stream, x, out, states);
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
