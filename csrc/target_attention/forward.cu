// Launches the forward pass.
#include "forward.cuh"
#include "forward_wide.cuh"
#include "launch.cuh"

namespace target_attention {
namespace {

template <class Kernel>
cudaError_t launch(Kernel kernel, size_t shared_bytes, int rows, const ForwardParameters& parameters, cudaStream_t stream) {
  TA_RETURN_IF_ERROR(allow_shared(kernel, shared_bytes));
  const Problem& p = parameters.p;
  const dim3 grid(Chunks::slots(p, parameters.chunks.length), p.heads_kv, ceil_div(parameters.row_slots, rows));
  kernel<<<grid, kThreads, shared_bytes, stream>>>(parameters);
  return cudaGetLastError();
}

template <class Worker>
cudaError_t launch_warps(const ForwardParameters& parameters, cudaStream_t stream) {
  return launch(forward_kernel<Worker>, sizeof(ForwardShared<Worker>), Worker::kRows, parameters, stream);
}

template <class Worker>
cudaError_t launch_wide(const ForwardParameters& parameters, cudaStream_t stream) {
  return launch(wide_forward_kernel<Worker>, sizeof(typename Worker::Shared), Worker::kRows, parameters, stream);
}

template <typename T, int kDim, int kGroups, bool kOneTable>
cudaError_t launch_weights(const ForwardParameters& parameters, cudaStream_t stream) {
  return is_plain(parameters.p) ? launch_warps<MmaForward<T, kDim, kGroups, kOneTable, true>>(parameters, stream)
                                : launch_warps<MmaForward<T, kDim, kGroups, kOneTable, false>>(parameters, stream);
}

template <typename T, int kDim, bool kOneTable>
cudaError_t launch_rows(const ForwardParameters& parameters, cudaStream_t stream) {
  if constexpr (sizeof(T) == 4 && kDim > max_head_dim(Type::kFloat, kOneTable)) {
    return cudaErrorInvalidValue;
  } else if constexpr (kDim <= 128) {
    if constexpr (sizeof(T) == 4 && kDim == 128 && kOneTable)
      if (is_plain(parameters.p) && is_hopper())
        return parameters.row_slots <= 16 ? launch_wide<WideForward<16>>(parameters, stream)
                                          : launch_wide<WideForward<32>>(parameters, stream);
    return parameters.row_slots <= 16 ? launch_weights<T, kDim, 1, kOneTable>(parameters, stream)
                                      : launch_weights<T, kDim, 2, kOneTable>(parameters, stream);
  } else {
    return launch_weights<T, kDim, 1, kOneTable>(parameters, stream);
  }
}

template <typename T, int kDim>
cudaError_t launch_tables(const ForwardParameters& parameters, cudaStream_t stream) {
  return parameters.p.v_table == nullptr ? launch_rows<T, kDim, true>(parameters, stream)
                                         : launch_rows<T, kDim, false>(parameters, stream);
}

template <typename T>
cudaError_t launch_type(const ForwardParameters& parameters, cudaStream_t stream) {
  const Problem& p = parameters.p;
  switch (padded_dim(p)) {
    case 64: TA_RETURN_IF_ERROR((launch_tables<T, 64>(parameters, stream))); break;
    case 128: TA_RETURN_IF_ERROR((launch_tables<T, 128>(parameters, stream))); break;
    default: TA_RETURN_IF_ERROR((launch_tables<T, 256>(parameters, stream)));
  }
  if (p.keys <= parameters.chunks.length) return cudaSuccess;  // no sample has two chunks
  return launch_early(merge_kernel<T>, ceil_div(p.queries * p.heads, kWarps), kThreads, 0, stream, parameters);
}

size_t partial_rows(const Problem& p) {
  return size_t(Chunks::slots(p, chunk_length(p))) * p.heads_kv * row_slots(p);
}

}  // namespace

size_t forward_workspace_bytes(const Problem& p) {
  return aligned(partial_rows(p) * p.head_dim * sizeof(float)) + aligned(partial_rows(p) * sizeof(float2));
}

cudaError_t forward(const Problem& p, void* out, float* lse, void* workspace, cudaStream_t stream) {
  if (p.queries == 0) return cudaSuccess;
  auto* bytes = static_cast<unsigned char*>(workspace);
  ForwardParameters parameters{p, {p.cu_seqlens_k, p.samples, chunk_length(p)}, row_slots(p), out, lse};
  parameters.partial_out = reinterpret_cast<float*>(bytes);
  parameters.partial_lse = reinterpret_cast<float2*>(bytes + aligned(partial_rows(p) * p.head_dim * sizeof(float)));
  switch (p.type) {
    case Type::kBFloat16: return launch_type<__nv_bfloat16>(parameters, stream);
    default: return launch_type<float>(parameters, stream);
  }
}

}  // namespace target_attention
