// Launches segmented sums and their transpose.

#include "segments.cuh"

namespace rows {
namespace {

// Enough threads to fill a GPU, then tiles as long as they may be: 4 to 32 members, at most 4096 of them per block.
Deal deal_out(const Segments& s, int64_t width, int vector) {
  Deal deal{lanes_for(width / vector), 2, 0};
  const int64_t wanted = s.members * deal.lanes >> 18;
  while (deal.tile_bits < kMostTileBits && (2 << deal.tile_bits) <= wanted && 2 * deal.per_block() <= 4096) ++deal.tile_bits;
  deal.blocks = ceil_div(s.members, deal.per_block());
  return deal;
}

template <typename T, int kVector>
cudaError_t launch(const T* values, const Segments& s, int64_t width, T* out, void* workspace, cudaStream_t stream) {
  using Kernel = SumKernel<T, kVector>;
  const bool many_empty = s.segments > 2 * s.members;  // then nobody walks along runs of them
  const Deal deal = deal_out(s, width, kVector);
  int64_t* leaving = deal.blocks > 1 ? static_cast<int64_t*>(workspace) : nullptr;
  auto* partials = reinterpret_cast<Wide<T>*>(static_cast<char*>(workspace) + aligned_bytes(deal.blocks));
  const Kernel k{values, s, width, out, leaving, partials, deal, many_empty};
  const unsigned columns = unsigned(ceil_div(width / kVector, deal.lanes));
  const dim3 threads(deal.lanes, deal.groups());
  if (many_empty) empty_kernel<<<dim3(unsigned(ceil_div(s.segments, threads.y)), columns), threads, 0, stream>>>(k);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  if (s.members == 0) return cudaSuccess;
  const size_t shared = k.shared_bytes();
  TA_RETURN_IF_ERROR(
      cudaFuncSetAttribute(sum_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  sum_kernel<<<dim3(unsigned(deal.blocks), columns), threads, shared, stream>>>(k);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  if (deal.blocks == 1) return cudaSuccess;
  const dim3 adders(deal.lanes, kCombineThreads / deal.lanes);
  return launch_early(combine_kernel<Kernel>, dim3(unsigned(ceil_div(deal.blocks, int64_t(adders.y))), columns), adders,
                      kCombineThreads * sizeof(typename Kernel::Accumulator), stream, k);
}

// With the widest vectors that the width and the addresses allow.
template <typename T, int kVector = widest(sizeof(T))>
cudaError_t launch_type(const void* values, const Segments& s, int64_t width, void* out, void* workspace,
                        cudaStream_t stream) {
  if constexpr (kVector > 1)
    if (width % kVector != 0 || !divides(kVector * sizeof(T), {address(values), address(out)}))
      return launch_type<T, kVector == 8 ? 4 : 1>(values, s, width, out, workspace, stream);
  return launch<T, kVector>(static_cast<const T*>(values), s, width, static_cast<T*>(out), workspace, stream);
}

template <typename Unit>
cudaError_t launch_expand(const void* rows, const int64_t* index, int64_t members, int64_t row_bytes, void* out,
                          cudaStream_t stream) {
  const int64_t units = row_bytes / int64_t(sizeof(Unit));
  const int lanes = lanes_for(units);
  const dim3 threads(lanes, kCopyThreads / lanes);
  expand_kernel<Unit><<<unsigned(ceil_div(members, int64_t(threads.y) * kCopies)), threads, 0, stream>>>(
      static_cast<const Unit*>(rows), index, members, units, static_cast<Unit*>(out));
  return cudaGetLastError();
}

}  // namespace

size_t sum_workspace_bytes(Type type, const Segments& s, int64_t width) {
  size_t most = 0;
  for (const int vector : {1, 2, 4, 8}) {  // which of them depends on addresses
    if (width % vector != 0) continue;
    const int64_t blocks = deal_out(s, width, vector).blocks;
    if (blocks > 1) most = std::max<size_t>(most, aligned_bytes(blocks) + 2 * blocks * width * (type == Type::kDouble ? 8 : 4));
  }
  return most;
}

cudaError_t sum(Type type, const void* values, const Segments& s, int64_t width, void* out, void* workspace,
                cudaStream_t stream) {
  if (s.segments == 0 || width == 0) return cudaSuccess;
  return with_element(type, [&](auto element) {
    return launch_type<decltype(element)>(values, s, width, out, workspace, stream);
  });
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
