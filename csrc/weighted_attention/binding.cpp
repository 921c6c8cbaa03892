// Python binding of weighted attention: checks, allocations, and the current stream; see api.h.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/extension.h>

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "api.h"

namespace {

namespace wa = weighted_attention;
using torch::Tensor;

wa::Rows rows(const Tensor& x, const char* name, const Tensor& like) {
  TORCH_CHECK_VALUE(x.dim() == 3, name, " must be (tokens, heads, head_dim), got ", x.dim(), " dimensions");
  TORCH_CHECK_VALUE(x.scalar_type() == like.scalar_type() && x.device() == like.device(), name,
              " must have the dtype and device of q");
  TORCH_CHECK_VALUE(x.size(2) == like.size(2), name, " must have q's head_dim");
  TORCH_CHECK_VALUE(x.numel() == 0 || (x.stride(2) == 1 && x.stride(0) % 8 == 0 && x.stride(1) % 8 == 0 &&
                                 reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0),
              name, " needs a contiguous last dimension and rows aligned to 16 bytes");
  return {x.data_ptr(), x.stride(0), x.stride(1)};
}

const int* int_vector(const Tensor& x, const char* name, int64_t least, const Tensor& like) {
  TORCH_CHECK_VALUE(x.dim() == 1 && x.size(0) >= least && x.scalar_type() == torch::kInt32 && x.is_contiguous() &&
                        x.device() == like.device(),
                    name, " must be one contiguous int32 dimension on q's device with at least ", least, " entries");
  return x.data_ptr<int>();
}

const float* per_row(const Tensor& x, const char* name, const Tensor& q) {
  TORCH_CHECK_VALUE(x.scalar_type() == torch::kFloat32 && x.is_contiguous() && x.device() == q.device() &&
                  x.dim() == 2 && x.size(0) == q.size(0) && x.size(1) == q.size(1),
              name, " must be contiguous fp32 (queries, heads)");
  return x.data_ptr<float>();
}

// Everything forward and backward share; the names are the Python arguments.
struct Inputs {
  const Tensor &q, &k, &v;
  const std::optional<Tensor>& log_weight;
  const Tensor &cu_seqlens_q, &cu_seqlens_k;
  double scale;
  bool causal;
  const std::optional<Tensor>&cu_chunks, &k_visible;

  bool per_head() const { return log_weight.has_value() && log_weight->dim() == (cu_chunks.has_value() ? 3 : 2); }
};

wa::Problem make_problem(const Inputs& in) {
  const Tensor &q = in.q, &k = in.k;
  TORCH_CHECK_VALUE(q.is_cuda(), "q must be on a CUDA device");
  TORCH_CHECK_VALUE(q.scalar_type() == torch::kBFloat16 || q.scalar_type() == torch::kHalf,
                    "q must be bfloat16 or float16");
  wa::Problem p{};
  p.type = q.scalar_type() == torch::kHalf ? wa::Type::kHalf : wa::Type::kBFloat16;
  p.q = rows(q, "q", q);
  p.k = rows(k, "k", q);
  p.v = rows(in.v, "v", q);
  constexpr int64_t kMost = std::numeric_limits<int>::max() / 2;
  TORCH_CHECK_VALUE(q.size(0) < kMost && k.size(0) < kMost, "too many tokens for 32-bit offsets");
  TORCH_CHECK_VALUE(q.size(2) == 64 || q.size(2) == 96 || q.size(2) == 128,
                    "head_dim must be 64, 96 or 128 (pad others with zeros), got ", q.size(2));
  TORCH_CHECK_VALUE(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "heads of k must divide heads of q");
  TORCH_CHECK_VALUE(k.sizes() == in.v.sizes(), "k and v must have the same shape");
  TORCH_CHECK_VALUE(in.scale > 0, "scale must be positive");
  p.head_dim = q.size(2);
  p.queries = q.size(0);
  p.keys = k.size(0);
  p.heads = q.size(1);
  p.heads_kv = k.size(1);
  p.scale = in.scale;
  p.causal = in.causal;
  p.cu_seqlens_q = int_vector(in.cu_seqlens_q, "cu_seqlens_q", 1, q);
  p.cu_seqlens_k = int_vector(in.cu_seqlens_k, "cu_seqlens_k", 1, q);
  p.chunks = in.cu_seqlens_q.size(0) - 1;
  p.samples = in.cu_seqlens_k.size(0) - 1;
  if (in.cu_chunks.has_value()) {
    TORCH_CHECK_VALUE(!in.causal, "causal and cu_chunks exclude each other: let a chunk attend to itself in its own call");
    p.cu_chunks = int_vector(*in.cu_chunks, "cu_chunks", 1, q);
    TORCH_CHECK_VALUE(in.cu_chunks->size(0) == p.samples + 1, "cu_chunks must have an entry per sample and one more, ",
                      p.samples + 1, ", got ", in.cu_chunks->size(0));
  } else {
    TORCH_CHECK_VALUE(p.chunks == p.samples, "cu_seqlens_q and cu_seqlens_k differ in samples, without cu_chunks");
  }
  if (in.k_visible.has_value()) {
    TORCH_CHECK_VALUE(in.cu_chunks.has_value(), "k_visible needs cu_chunks");
    p.k_visible = int_vector(*in.k_visible, "k_visible", p.chunks, q);
    TORCH_CHECK_VALUE(in.k_visible->size(0) == p.chunks, "k_visible must have an entry per chunk, ", p.chunks);
  }
  if (!in.log_weight.has_value()) return p;

  const Tensor& w = *in.log_weight;
  const int chunked = in.cu_chunks.has_value() ? 1 : 0;  // dimensions before the keys
  TORCH_CHECK_VALUE(w.scalar_type() == torch::kFloat32 && w.device() == q.device(),
                    "log_weight must be float32 on q's device");
  TORCH_CHECK_VALUE((w.dim() == 1 + chunked || (w.dim() == 2 + chunked && w.size(1 + chunked) == q.size(1))) &&
                        w.size(chunked) == k.size(0) && (chunked == 0 || w.size(0) == p.chunks),
                    "log_weight must be (keys,) or (keys, heads), after (chunks,) with cu_chunks, got ", w.sizes());
  p.log_weight = w.data_ptr<float>();
  p.weight_stride_chunk = chunked ? w.stride(0) : 0;
  p.weight_stride_key = w.stride(chunked);
  p.weight_stride_head = in.per_head() ? w.stride(1 + chunked) : 0;
  TORCH_CHECK_VALUE(!in.per_head() || q.size(1) == 1 || p.weight_stride_head != 0 || w.numel() == 0,
                    "log_weight must not be expanded over heads: leave that dimension out");
  return p;
}

Tensor bytes(size_t count, const Tensor& like) {
  return torch::empty({int64_t(count)}, like.options().dtype(torch::kUInt8));
}

// Where a result is written: the caller's tensor, checked, or a new one.
Tensor result(const std::optional<Tensor>& given, const char* name, at::IntArrayRef sizes, const at::TensorOptions& options) {
  if (!given.has_value()) return torch::empty(sizes, options);
  TORCH_CHECK_VALUE(given->sizes() == sizes && given->is_contiguous() && given->device() == options.device() &&
                        given->scalar_type() == c10::typeMetaToScalarType(options.dtype()) &&
                        reinterpret_cast<uintptr_t>(given->data_ptr()) % 16 == 0,
                    name, " must be a contiguous ", options.dtype(), " of ", sizes, " that starts at 16 bytes");
  return *given;
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const std::optional<Tensor>& log_weight, const Tensor& cu_seqlens_q,
                                   const Tensor& cu_seqlens_k, double scale, bool causal,
                                   const std::optional<Tensor>& cu_chunks, const std::optional<Tensor>& k_visible,
                                   const std::optional<Tensor>& out_, const std::optional<Tensor>& lse_) {
  const wa::Problem p =
      make_problem({q, k, v, log_weight, cu_seqlens_q, cu_seqlens_k, scale, causal, cu_chunks, k_visible});
  const c10::cuda::CUDAGuard guard(q.device());
  Tensor out = result(out_, "out", q.sizes(), q.options());
  Tensor lse = result(lse_, "lse", {q.size(0), q.size(1)}, q.options().dtype(torch::kFloat32));
  Tensor workspace = bytes(wa::forward_workspace_bytes(p), q);
  C10_CUDA_CHECK(wa::forward(p, out.data_ptr(), lse.data_ptr<float>(), workspace.data_ptr(),
                             c10::cuda::getCurrentCUDAStream()));
  return {out, lse};
}

// dq, dk, dv and, when asked, dlog_weight in log_weight's shape (otherwise an undefined tensor, None in Python).
std::vector<Tensor> backward(const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k,
                             const Tensor& v, const std::optional<Tensor>& log_weight, const Tensor& out,
                             const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, double scale,
                             bool need_dlog_weight, bool deterministic, bool causal,
                             const std::optional<Tensor>& cu_chunks, const std::optional<Tensor>& k_visible,
                             const std::optional<Tensor>& dq_) {
  const Inputs inputs{q, k, v, log_weight, cu_seqlens_q, cu_seqlens_k, scale, causal, cu_chunks, k_visible};
  const wa::Problem p = make_problem(inputs);
  const c10::cuda::CUDAGuard guard(q.device());
  TORCH_CHECK_VALUE(dout.sizes() == q.sizes() && out.sizes() == q.sizes(), "out and dout must have q's shape");
  TORCH_CHECK_VALUE(out.is_contiguous() && out.scalar_type() == q.scalar_type() && out.device() == q.device(),
                    "out must be as forward returned it");
  TORCH_CHECK_VALUE(!need_dlog_weight || log_weight.has_value(), "need_dlog_weight is set without log_weight");
  Tensor dq = result(dq_, "dq", q.sizes(), q.options()), dk = torch::empty(k.sizes(), k.options()),
         dv = torch::empty(v.sizes(), v.options()), dlog_weight;
  if (need_dlog_weight) {
    std::vector<int64_t> shape = log_weight->sizes().vec();
    if (!inputs.per_head()) shape.push_back(k.size(1));
    dlog_weight = torch::zeros(shape, log_weight->options());
  }

  wa::Gradients g;
  g.dout = rows(dout, "dout", q);
  g.out = out.data_ptr();
  g.lse = per_row(lse, "lse", q);
  g.dlse = dlse.has_value() && dlse->defined() ? per_row(*dlse, "dlse", q) : nullptr;
  g.dq = dq.data_ptr();
  g.dk = dk.data_ptr();
  g.dv = dv.data_ptr();
  g.dlog_weight = need_dlog_weight ? dlog_weight.data_ptr<float>() : nullptr;
  g.deterministic = deterministic;
  Tensor workspace = bytes(wa::backward_workspace_bytes(p, deterministic), q);
  C10_CUDA_CHECK(wa::backward(p, g, workspace.data_ptr(), c10::cuda::getCurrentCUDAStream()));
  if (need_dlog_weight && !inputs.per_head()) dlog_weight = dlog_weight.sum(-1);
  return {dq, dk, dv, dlog_weight};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("forward", &forward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("log_weight"), py::arg("cu_seqlens_q"),
        py::arg("cu_seqlens_k"), py::arg("scale"), py::arg("causal") = false, py::arg("cu_chunks") = py::none(),
        py::arg("k_visible") = py::none(), py::arg("out") = py::none(), py::arg("lse") = py::none());
  m.def("backward", &backward, py::arg("dout"), py::arg("dlse"), py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("log_weight"), py::arg("out"), py::arg("lse"), py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"),
        py::arg("scale"), py::arg("need_dlog_weight") = false, py::arg("deterministic") = false,
        py::arg("causal") = false, py::arg("cu_chunks") = py::none(), py::arg("k_visible") = py::none(),
        py::arg("dq") = py::none());
}
