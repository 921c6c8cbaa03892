// Launches segmented reductions and their transpose.
#include "segments.cuh"

namespace rows {
namespace {

template <typename T, int kVector, template <typename> class State>
cudaError_t launch(const T* values, const Segments& s, int64_t width, T* out, void* workspace, cudaStream_t stream) {
  using Kernel = FoldKernel<T, kVector, State>;
  const bool many_empty = s.segments > 2 * s.members;  // then nobody walks along runs of them
  const int lanes = lanes_for(width / kVector);
  // enough threads to fill a GPU, then tiles as long as they may be; no result depends on their length
  const int64_t tile = std::clamp<int64_t>(s.members * lanes / (1 << 18), kShortestTile, kLongestTile);
  const Kernel k{values, s, width, out, static_cast<Wide<T>*>(workspace), tile, many_empty};
  const unsigned columns = unsigned(ceil_div(width / kVector, lanes));
  const dim3 threads(lanes, kFoldThreads / lanes);
  const auto grid = [&](int64_t groups, int64_t per_block) { return dim3(unsigned(ceil_div(groups, per_block)), columns); };
  if (many_empty) empty_kernel<<<grid(s.segments, threads.y), threads, 0, stream>>>(k);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  if (s.members == 0) return cudaSuccess;
  const int64_t tiles = ceil_div(s.members, tile), pieces = ceil_div(s.members, kPiece);
  cool_kernel<<<grid(tiles, threads.y), threads, 0, stream>>>(k, tiles);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  if (s.members <= kPiece) return cudaSuccess;
  constexpr size_t kShared = sizeof(typename Kernel::Accumulator);
  hot_kernel<<<grid(pieces, threads.y), threads, kFoldThreads * kShared, stream>>>(k);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  combine_kernel<<<grid(pieces, kPiecesPerBlock), dim3(lanes, kCombineThreads / lanes), kCombineThreads * kShared,
                   stream>>>(k, int(threads.y));
  return cudaGetLastError();
}

template <typename T, template <typename> class State>
cudaError_t launch_width(const void* values, const Segments& s, int64_t width, void* out, void* workspace,
                         cudaStream_t stream) {
  const T* from = static_cast<const T*>(values);
  T* to = static_cast<T*>(out);
  constexpr int kMost = sizeof(T) == 8 ? 2 : 4;
  if (width % kMost == 0 && divides(kMost * sizeof(T), {address(from), address(to)}))
    return launch<T, kMost, State>(from, s, width, to, workspace, stream);
  return launch<T, 1, State>(from, s, width, to, workspace, stream);
}

template <typename T>
cudaError_t launch_type(Fold how, const void* values, const Segments& s, int64_t width, void* out, void* workspace,
                        cudaStream_t stream) {
  return how == Fold::kSum ? launch_width<T, SumState>(values, s, width, out, workspace, stream)
                           : launch_width<T, LogSumExpState>(values, s, width, out, workspace, stream);
}

template <typename Unit>
cudaError_t launch_expand(const void* rows, const int64_t* index, int64_t members, int64_t row_bytes, void* out,
                          cudaStream_t stream) {
  const int64_t units = row_bytes / int64_t(sizeof(Unit));
  const int lanes = lanes_for(units);
  const dim3 threads(lanes, kFoldThreads / lanes);
  expand_kernel<Unit><<<unsigned(ceil_div(members, int64_t(threads.y) * kCopies)), threads, 0, stream>>>(
      static_cast<const Unit*>(rows), index, members, units, static_cast<Unit*>(out));
  return cudaGetLastError();
}

}  // namespace

size_t fold_workspace_bytes(Fold how, Type type, const Segments& s, int64_t width) {
  if (s.members <= kPiece) return 0;
  const size_t parts = how == Fold::kSum ? SumState<float>::kParts : LogSumExpState<float>::kParts;
  return 2 * size_t(ceil_div(s.members, kPiece)) * parts * size_t(width) * (type == Type::kDouble ? 8 : 4);
}

cudaError_t fold(Fold how, Type type, const void* values, const Segments& s, int64_t width, void* out, void* workspace,
                 cudaStream_t stream) {
  if (s.segments == 0 || width == 0) return cudaSuccess;
  switch (type) {
    case Type::kFloat:
      return launch_type<float>(how, values, s, width, out, workspace, stream);
    case Type::kDouble:
      return launch_type<double>(how, values, s, width, out, workspace, stream);
    case Type::kHalf:
      return launch_type<__half>(how, values, s, width, out, workspace, stream);
    case Type::kBFloat16:
      return launch_type<__nv_bfloat16>(how, values, s, width, out, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t expand(const void* rows, const int64_t* index, int64_t members, int64_t row_bytes, void* out,
                   cudaStream_t stream) {
  if (members == 0 || row_bytes == 0) return cudaSuccess;
  const auto fits = [&](int64_t bytes) { return divides(bytes, {row_bytes, address(rows), address(out)}); };
  if (fits(16)) return launch_expand<uint4>(rows, index, members, row_bytes, out, stream);
  if (fits(8)) return launch_expand<uint2>(rows, index, members, row_bytes, out, stream);
  if (fits(4)) return launch_expand<uint32_t>(rows, index, members, row_bytes, out, stream);
  if (fits(2)) return launch_expand<uint16_t>(rows, index, members, row_bytes, out, stream);
  return launch_expand<uint8_t>(rows, index, members, row_bytes, out, stream);
}

}  // namespace rows
