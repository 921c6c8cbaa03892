// Launches segmented log-sum-exp.

#include "logsumexp.cuh"

namespace rows {
namespace {

int lane_bits_of(int64_t width, int vector) {
  const int lanes = std::min({lanes_for(width / vector), kMostLanes, 32 / vector});
  return lanes == 8 ? 3 : lanes / 2;
}

int64_t blocks_of(const Segments& s, int lane_bits) {
  return ceil_div(s.members + s.segments, int64_t(kRunWarps * (kRunVectors >> lane_bits)));
}

template <typename T, int kVector>
cudaError_t launch(const T* values, const Segments& s, int64_t width, T* out, void* workspace, cudaStream_t stream) {
  using Kernel = LogSumExpKernel<T, kVector>;
  const int lane_bits = lane_bits_of(width, kVector);
  const int64_t blocks = blocks_of(s, lane_bits);
  int64_t* leaving = blocks > 1 ? static_cast<int64_t*>(workspace) : nullptr;
  auto* partials = reinterpret_cast<Wide<T>*>(static_cast<char*>(workspace) + aligned_bytes(blocks));
  const Kernel k{values, s, width, out, leaving, partials, blocks, lane_bits};
  const unsigned across = unsigned(ceil_div(width, int64_t(k.columns())));
  logsumexp_kernel<<<dim3(unsigned(blocks), across), kRunThreads, 0, stream>>>(k);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  if (blocks == 1) return cudaSuccess;
  return launch_early(add_exponentials_kernel<Kernel>, dim3(unsigned(ceil_div(blocks, int64_t(kPartWarps))), across),
                      dim3(kPartThreads), 0, stream, k);
}

template <typename T>
cudaError_t launch_type(const void* values, const Segments& s, int64_t width, void* out, void* workspace,
                        cudaStream_t stream) {
  const T* from = static_cast<const T*>(values);
  T* to = static_cast<T*>(out);
  constexpr int kMost = widest(sizeof(T));
  if (width % kMost == 0 && address(from) % 16 == 0) return launch<T, kMost>(from, s, width, to, workspace, stream);
  return launch<T, 1>(from, s, width, to, workspace, stream);
}

}  // namespace

size_t logsumexp_workspace_bytes(Type type, const Segments& s, int64_t width) {
  size_t most = 0;
  for (const int vector : {1, widest(size_of(type))}) {  // which of them depends on addresses
    if (width % vector != 0) continue;
    const int64_t blocks = blocks_of(s, lane_bits_of(width, vector));
    if (blocks > 1) most = std::max<size_t>(most, aligned_bytes(blocks) + 4 * blocks * width * (type == Type::kDouble ? 8 : 4));
  }
  return most;
}

cudaError_t logsumexp(Type type, const void* values, const Segments& s, int64_t width, void* out, void* workspace,
                      cudaStream_t stream) {
  if (s.segments == 0 || width == 0) return cudaSuccess;
  return with_element(type, [&](auto element) {
    return launch_type<decltype(element)>(values, s, width, out, workspace, stream);
  });
}

}  // namespace rows
