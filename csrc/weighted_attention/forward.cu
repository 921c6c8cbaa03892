// Launches the forward pass.
#include <algorithm>

#include "forward.cuh"
#include "launch.cuh"

namespace weighted_attention {
namespace {

template <typename T, int kHeadDim, bool kCausal>
struct Choice {
  using Shape = ForwardShape<T, kHeadDim, 2, 128, 2, 3, kCausal>;
};
template <typename T, bool kCausal>
struct Choice<T, 64, kCausal> {
  using Shape = ForwardShape<T, 64, 3, 128, 4, 4, kCausal>;
};

// Query heads in groups, as equal as can be, whose keys and values fit L2 together.
int heads_together(const Problem& p) {
  constexpr int64_t kBytes = 32 << 20;
  const int64_t bytes = int64_t(p.keys) * p.head_dim * 4;  // keys and values of a head
  const int most = int(std::max<int64_t>(1, std::min<int64_t>(p.heads_kv, kBytes / std::max<int64_t>(1, bytes))));
  const int groups = (p.heads_kv + most - 1) / most;
  return (p.heads_kv + groups - 1) / groups * (p.heads / p.heads_kv);
}

template <class Shape>
cudaError_t launch(const Problem& p, void* out, float* lse, void* workspace, cudaStream_t stream) {
  CUtensorMap map_q, map_k, map_v, map_out;
  TA_RETURN_IF_ERROR(make_map(&map_q, p.type, p.q, p.queries, p.heads, p.head_dim, 64));
  TA_RETURN_IF_ERROR(make_map(&map_k, p.type, p.k, p.keys, p.heads_kv, p.head_dim, Shape::kKeys));
  TA_RETURN_IF_ERROR(make_map(&map_v, p.type, p.v, p.keys, p.heads_kv, p.head_dim, Shape::kKeys));
  const Rows rows{out, int64_t(p.heads) * p.head_dim, p.head_dim};
  TA_RETURN_IF_ERROR(make_map(&map_out, p.type, rows, p.queries, p.heads, p.head_dim, 16));  // a warp's rows
  int blocks;
  TA_RETURN_IF_ERROR(multiprocessors(&blocks));

  const Plan plan = Plan::at(workspace, p.chunks);
  plan_kernel<<<1, kPlanThreads, 0, stream>>>(sequences_of(p), Shape::kQueries, plan, 1, plan, Shape::kCausal);
  TA_RETURN_IF_ERROR(cudaGetLastError());

  const ForwardParameters parameters{
      plan, p.log_weight, p.weight_stride_chunk, p.weight_stride_key,  p.weight_stride_head,
      out,  lse,          p.heads,               p.heads / p.heads_kv, heads_together(p),
      p.scale};
  const auto kernel = forward_kernel<Shape>;
  const int bytes = sizeof(typename Shape::Shared);
  TA_RETURN_IF_ERROR(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<blocks, Shape::kThreads, bytes, stream>>>(map_q, map_k, map_v, map_out, parameters);
  return cudaGetLastError();
}

template <typename T, bool kCausal>
cudaError_t launch_dim(const Problem& p, void* out, float* lse, void* workspace, cudaStream_t stream) {
  if (p.head_dim == 64) return launch<typename Choice<T, 64, kCausal>::Shape>(p, out, lse, workspace, stream);
  if (p.head_dim == 96) return launch<typename Choice<T, 96, kCausal>::Shape>(p, out, lse, workspace, stream);
  if (p.head_dim == 128) return launch<typename Choice<T, 128, kCausal>::Shape>(p, out, lse, workspace, stream);
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t launch_type(const Problem& p, void* out, float* lse, void* workspace, cudaStream_t stream) {
  return p.causal ? launch_dim<T, true>(p, out, lse, workspace, stream)
                  : launch_dim<T, false>(p, out, lse, workspace, stream);
}

}  // namespace

size_t forward_workspace_bytes(const Problem& p) { return Plan::bytes(p.queries, p.chunks, 64); }

cudaError_t forward(const Problem& p, void* out, float* lse, void* workspace, cudaStream_t stream) {
  if (p.queries == 0) return cudaSuccess;
  return p.type == Type::kHalf ? launch_type<__half>(p, out, lse, workspace, stream)
                               : launch_type<__nv_bfloat16>(p, out, lse, workspace, stream);
}

}  // namespace weighted_attention
