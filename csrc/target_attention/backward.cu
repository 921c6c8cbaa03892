// Launches the backward pass.
#include "backward.cuh"
#include "launch.cuh"
#include "rows.cuh"

namespace target_attention {
namespace {

int width(const Problem& p) { return p.heads_kv * p.head_dim; }  // of a table row

template <class Worker>
cudaError_t launch(BackwardParameters parameters, cudaStream_t stream) {
  const auto kernel = backward_kernel<Worker>;
  constexpr size_t kBytes = sizeof(BackwardShared<Worker>);
  TA_RETURN_IF_ERROR(allow_shared(kernel, kBytes));
  const Problem& p = parameters.p;
  if (p.samples > 0) {
    const dim3 grid(Chunks::slots(p, parameters.chunks.length), p.heads_kv);
    kernel<<<grid, kThreads, kBytes, stream>>>(parameters);
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t sum_rows(const BackwardParameters& b, const float* members, void* to, cudaStream_t stream) {
  const Problem& p = b.p;
  const Sums sums{members, p.rows, b.g.order, b.g.offsets, to, b.pieces, p.keys, p.table, width(p), b.direct};
  const int blocks = sums.blocks(), more = (p.table + kZeroRows - 1) / kZeroRows;
  if (blocks + more > 0) sum_members_kernel<T><<<blocks + more, kSumPlaces, 0, stream>>>(sums, blocks);
  if (blocks > 1) join_pieces_kernel<T><<<(blocks + kSumWarps - 1) / kSumWarps, kSumPlaces, 0, stream>>>(sums, blocks);
  return cudaGetLastError();
}

template <typename T, int kDim, int kGroups, bool kOneTable>
cudaError_t launch_weights(const BackwardParameters& parameters, cudaStream_t stream) {
  return is_plain(parameters.p) && parameters.g.dweight == nullptr
             ? launch<MmaBackward<T, kDim, kGroups, kOneTable, true>>(parameters, stream)
             : launch<MmaBackward<T, kDim, kGroups, kOneTable, false>>(parameters, stream);
}

template <typename T, int kDim, bool kOneTable>
cudaError_t launch_rows(BackwardParameters parameters, cudaStream_t stream) {
  const int rows = parameters.row_slots <= 16 || kDim > 128 ? 16 : 32;  // at a time
  parameters.direct = parameters.row_slots <= rows;
  if constexpr (sizeof(T) == 4 && kDim > max_head_dim(Type::kFloat, kOneTable)) return cudaErrorInvalidValue;
  else if (rows == 16) TA_RETURN_IF_ERROR((launch_weights<T, kDim, 1, kOneTable>(parameters, stream)));
  else if constexpr (kDim <= 128) TA_RETURN_IF_ERROR((launch_weights<T, kDim, 2, kOneTable>(parameters, stream)));
  const Problem& p = parameters.p;
  if (p.queries > 0 && p.keys > parameters.chunks.length) {  // otherwise no sample has two chunks
    merge_dq_kernel<T><<<(p.queries * p.heads + kWarps - 1) / kWarps, kThreads, 0, stream>>>(parameters);
    TA_RETURN_IF_ERROR(cudaGetLastError());
  }
  TA_RETURN_IF_ERROR(sum_rows<T>(parameters, parameters.dk_members, parameters.g.dk_table, stream));
  if (!kOneTable) TA_RETURN_IF_ERROR(sum_rows<T>(parameters, parameters.dv_members, parameters.g.dv_table, stream));
  return cudaSuccess;
}

template <typename T>
cudaError_t launch_type(const BackwardParameters& parameters, cudaStream_t stream) {
  const Problem& p = parameters.p;
  const bool one = p.v_table == nullptr;
  switch (padded_dim(p)) {
    case 64: return one ? launch_rows<T, 64, true>(parameters, stream) : launch_rows<T, 64, false>(parameters, stream);
    case 128: return one ? launch_rows<T, 128, true>(parameters, stream) : launch_rows<T, 128, false>(parameters, stream);
    default: return one ? launch_rows<T, 256, true>(parameters, stream) : launch_rows<T, 256, false>(parameters, stream);
  }
}

size_t dq_bytes(const Problem& p) {
  return aligned(sizeof(float) * Chunks::slots(p, chunk_length(p)) * p.heads_kv * row_slots(p) * p.head_dim);
}

size_t members_bytes(const Problem& p) { return aligned(sizeof(float) * p.keys * width(p)); }

}  // namespace

size_t backward_workspace_bytes(const Problem& p) {
  return dq_bytes(p) + members_bytes(p) * (p.v_table == nullptr ? 1 : 2) + Sums::piece_bytes(p.keys, width(p));
}

cudaError_t backward(const Problem& p, const Gradients& g, void* workspace, cudaStream_t stream) {
  auto* bytes = static_cast<unsigned char*>(workspace);
  BackwardParameters parameters{p, g, {p.cu_seqlens_k, p.samples, chunk_length(p)}, row_slots(p)};
  parameters.partial_dq = reinterpret_cast<float*>(bytes);
  parameters.dk_members = reinterpret_cast<float*>(bytes += dq_bytes(p));
  if (p.v_table != nullptr) parameters.dv_members = reinterpret_cast<float*>(bytes += members_bytes(p));
  parameters.pieces = reinterpret_cast<float*>(bytes + members_bytes(p));
  return p.type == Type::kFloat ? launch_type<float>(parameters, stream) : launch_type<__nv_bfloat16>(parameters, stream);
}

}  // namespace target_attention
