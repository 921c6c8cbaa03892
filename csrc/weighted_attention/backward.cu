// Launches the backward pass: plan, rows, keys with the sums of shared tiles, and the conversion of dq's sums.
#include <algorithm>

#include "backward.cuh"
#include "launch.cuh"

namespace weighted_attention {
namespace {

constexpr int kKeyTile = 128;

// Hands out 256-byte aligned parts of the workspace; with no memory it only counts.
struct Carver {
  char* memory;
  size_t used = 0;

  void* take(size_t bytes) {
    void* part = memory == nullptr ? nullptr : memory + used;
    used += (bytes + 255) / 256 * 256;
    return part;
  }
};

struct Workspace {
  Plan keys;
  RowWorkspace rows;
  Parts parts;
};

Workspace carve(Carver& carver, const Problem& p, bool deterministic, int multiprocessors) {
  Workspace w;
  w.keys = Plan::at(carver.take(Plan::bytes(p.keys, p.samples, kKeyTile)), p.samples);
  w.rows.plan = Plan::at(carver.take(Plan::bytes(p.queries, p.chunks, kRowTile)), p.chunks);
  w.rows.max_tiles = Plan::max_tiles(p.queries, p.chunks, kRowTile);
  const size_t rows = size_t(w.rows.max_tiles) * kRowTile * p.heads;
  w.rows.lse = static_cast<float*>(carver.take(rows * sizeof(float)));
  w.rows.delta = static_cast<float*>(carver.take(rows * sizeof(float)));
  w.rows.dq = static_cast<float*>(carver.take(rows * padded_columns(p.head_dim) * sizeof(float)));
  w.rows.turns = static_cast<int*>(carver.take(rows / queries_of_step(p.head_dim) * sizeof(int)));
  // At most as many parts as rounds have blocks, and as tiles have pieces of queries.
  const int64_t pieces = int64_t(p.queries) * (p.heads / p.heads_kv) / kLeastPartQueries;
  const int64_t tiles = int64_t(Plan::max_tiles(p.keys, p.samples, kKeyTile)) * p.heads_kv;
  w.parts.multiprocessors = multiprocessors;
  w.parts.most = 0;
  if (!deterministic && !p.causal && shares_rounds(p.head_dim) && pieces >= 2) {
    w.parts.most = int(std::min(int64_t(kMostRounds) * multiprocessors, tiles * pieces));
  }
  w.parts.sums =
      static_cast<float4*>(carver.take(size_t(w.parts.most) * 2 * kKeyTile * p.head_dim * sizeof(float)));
  return w;
}

// Rows of queries, of all heads together, whose q, dout and sums of dq fit L2.
int rows_together(const Problem& p) {
  constexpr int kBytes = 32 << 20;
  return kBytes / (padded_columns(p.head_dim) * 8) / (p.heads / p.heads_kv);
}

template <class Shape, class Parameters, class... Maps>
cudaError_t launch_shape(void (*kernel)(Maps...), int blocks, cudaStream_t stream, const CUtensorMap& q,
                         const CUtensorMap& dout, const CUtensorMap& k, const CUtensorMap& v,
                         const Parameters& parameters) {
  const int bytes = sizeof(typename Shape::Shared);
  TA_RETURN_IF_ERROR(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  if (blocks > 0) kernel<<<blocks, Shape::kThreads, bytes, stream>>>(q, dout, k, v, parameters);
  return cudaGetLastError();
}

template <class Shape>
cudaError_t launch_keys(const Problem& p, const Gradients& g, const Workspace& w, const CUtensorMap& k,
                        const CUtensorMap& v, cudaStream_t stream) {
  CUtensorMap q, dout;
  TA_RETURN_IF_ERROR(make_map(&q, p.type, p.q, p.queries, p.heads, p.head_dim, Shape::kQueries));
  TA_RETURN_IF_ERROR(make_map(&dout, p.type, g.dout, p.queries, p.heads, p.head_dim, Shape::kQueries));
  const BackwardParameters parameters{sequences_of(p),       w.keys,
                                      w.rows,                w.parts,
                                      p.log_weight,          p.weight_stride_chunk,
                                      p.weight_stride_key,   p.weight_stride_head,
                                      g.dk,                  g.dv,
                                      g.dlog_weight,         p.keys,
                                      p.heads,               p.heads_kv,
                                      rows_together(p),      p.scale};
  const int tiles = Plan::max_tiles(p.keys, p.samples, kKeyTile) * p.heads_kv;
  const int blocks = tiles + w.parts.most;
  TA_RETURN_IF_ERROR(launch_shape<Shape>(backward_kernel<Shape>, blocks, stream, q, dout, k, v, parameters));
  if constexpr (Shape::kShares) {
    if (w.parts.most == 0) return cudaSuccess;
    const SumPartsParameters sums{w.keys, w.parts, g.dk, g.dv, p.heads_kv, p.heads / p.heads_kv, p.scale};
    sum_parts_kernel<typename Shape::T, Shape::kHeadDim, kKeyTile>
        <<<std::min(tiles, w.parts.multiprocessors), 2 * kWarpgroup, 0, stream>>>(sums);
  }
  return cudaGetLastError();
}

template <typename T, int kHeadDim, bool kRepeatable, bool kCausal>
cudaError_t launch_keys_for(const Problem& p, const Gradients& g, const Workspace& w, const CUtensorMap& k,
                            const CUtensorMap& v, cudaStream_t stream) {
  return g.dlog_weight != nullptr
             ? launch_keys<BackwardShape<T, kHeadDim, kRepeatable, true, kCausal>>(p, g, w, k, v, stream)
             : launch_keys<BackwardShape<T, kHeadDim, kRepeatable, false, kCausal>>(p, g, w, k, v, stream);
}

template <typename T, int kHeadDim>
cudaError_t launch(const Problem& p, const Gradients& g, void* memory, cudaStream_t stream) {
  Carver carver{static_cast<char*>(memory)};
  int count;
  TA_RETURN_IF_ERROR(multiprocessors(&count));
  const Workspace w = carve(carver, p, g.deterministic, count);
  plan_kernel<<<2, kPlanThreads, 0, stream>>>(sequences_of(p), kRowTile, w.rows.plan, kKeyTile, w.keys);
  TA_RETURN_IF_ERROR(cudaGetLastError());

  if (p.queries > 0) {
    const PrepareParameters prepare{w.rows, g.out,  g.dout.data, g.dout.stride_token, g.dout.stride_head,
                                    g.lse,  g.dlse, p.heads};
    prepare_rows_kernel<T, kHeadDim>
        <<<dim3(w.rows.max_tiles, p.heads), kPrepareThreads, 0, stream>>>(prepare);
    TA_RETURN_IF_ERROR(cudaGetLastError());
  }

  CUtensorMap k, v;
  TA_RETURN_IF_ERROR(make_map(&k, p.type, p.k, p.keys, p.heads_kv, p.head_dim, kKeyTile));
  TA_RETURN_IF_ERROR(make_map(&v, p.type, p.v, p.keys, p.heads_kv, p.head_dim, kKeyTile));
  if (p.keys > 0) {
    const auto keys = p.causal ? (g.deterministic ? launch_keys_for<T, kHeadDim, true, true>
                                                  : launch_keys_for<T, kHeadDim, false, true>)
                               : (g.deterministic ? launch_keys_for<T, kHeadDim, true, false>
                                                  : launch_keys_for<T, kHeadDim, false, false>);
    TA_RETURN_IF_ERROR(keys(p, g, w, k, v, stream));
  }
  if (p.queries == 0) return cudaSuccess;

  constexpr int kQueries = queries_of_step(kHeadDim);
  const FinishParameters finish{w.rows, g.dq, p.heads, p.scale};
  finish_dq_kernel<T, kHeadDim, kQueries>
      <<<dim3(w.rows.max_tiles * (kRowTile / kQueries), p.heads), 2 * kWarpgroup, 0, stream>>>(finish);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_type(const Problem& p, const Gradients& g, void* workspace, cudaStream_t stream) {
  if (p.head_dim == 64) return launch<T, 64>(p, g, workspace, stream);
  if (p.head_dim == 96) return launch<T, 96>(p, g, workspace, stream);
  if (p.head_dim == 128) return launch<T, 128>(p, g, workspace, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

size_t backward_workspace_bytes(const Problem& p, bool deterministic) {
  Carver counter{nullptr};
  int count = 0;
  multiprocessors(&count);  // where this fails, the launch does
  carve(counter, p, deterministic, count);
  return counter.used;
}

cudaError_t backward(const Problem& p, const Gradients& g, void* workspace, cudaStream_t stream) {
  if (p.samples == 0) return cudaSuccess;
  return p.type == Type::kHalf ? launch_type<__half>(p, g, workspace, stream)
                               : launch_type<__nv_bfloat16>(p, g, workspace, stream);
}

}  // namespace weighted_attention
