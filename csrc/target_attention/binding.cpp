// Target attention on CUDA under torch.ops: allocations and the current stream; see api.h.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "../module.h"
#include "api.h"
#include "arguments.h"

namespace target_attention {
namespace {

Problem problem_of(const Arguments& a, double scale) {
  TORCH_CHECK_VALUE(a.q.scalar_type() == at::kBFloat16 || a.q.scalar_type() == at::kFloat, "q is ", a.q.dtype(),
                    "; on CUDA pass bfloat16 or float32");
  Problem p;
  p.type = a.q.scalar_type() == at::kFloat ? Type::kFloat : Type::kBFloat16;
  const int64_t widest = max_head_dim(p.type, a.one_table());
  TORCH_CHECK_VALUE(a.head_dim * a.q.element_size() % 16 == 0 && a.head_dim > 0 && a.head_dim <= widest, "head_dim is ",
                    a.head_dim, "; on CUDA pass rows of whole 16 bytes, at most ", widest, " elements");
  p.normaliser = a.softmax ? Normaliser::kSoftmax : a.silu ? Normaliser::kSilu : Normaliser::kIdentity;
  p.scale = float(scale);
  p.samples = int(a.samples), p.queries = int(a.queries), p.targets = int(a.targets), p.keys = int(a.keys);
  p.heads = int(a.heads), p.heads_kv = int(a.heads_kv), p.head_dim = int(a.head_dim);
  p.q = a.q.const_data_ptr(), p.k_table = a.k_table.const_data_ptr();
  p.v_table = a.one_table() ? nullptr : a.v_table.const_data_ptr();
  for (const void* rows : {p.q, p.k_table, p.v_table})
    TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(rows) % 16 == 0, "rows do not start at a multiple of 16 bytes; clone them");
  p.rows = a.rows.const_data_ptr<int64_t>();
  p.cu_seqlens_q = a.cu_seqlens_q.const_data_ptr<int>(), p.cu_seqlens_k = a.cu_seqlens_k.const_data_ptr<int>();
  p.weight = a.weight.defined() ? a.weight.const_data_ptr<float>() : nullptr;
  p.weight_stride_row = a.weight_stride_row, p.weight_stride_key = a.weight_stride_key;
  p.weight_stride_head = a.weight_stride_head;
  p.q_chunk = a.q_chunk.defined() ? a.q_chunk.const_data_ptr<int64_t>() : nullptr;
  return p;
}

Tensor workspace(size_t bytes, const Tensor& like) {
  return at::empty({int64_t(bytes)}, like.options().dtype(at::kByte));
}

std::tuple<Tensor, Tensor> forward_cuda(const Tensor& q, const Tensor& k_table, const std::optional<Tensor>& v_table,
                                        const Tensor& rows, const std::optional<Tensor>& index, const std::optional<Tensor>& order,
                                        const std::optional<Tensor>& offsets,
                                        const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                        const std::optional<Tensor>& weight, const std::optional<Tensor>& q_chunk,
                                        int64_t max_seqlen_q, double scale, c10::string_view normaliser) {
  const Arguments a(q, k_table, v_table, rows, index, order, offsets, cu_seqlens_q, cu_seqlens_k, weight, q_chunk, max_seqlen_q,
                    normaliser);
  const c10::cuda::CUDAGuard guard(q.device());
  const Problem p = problem_of(a, scale);
  Tensor out = at::empty_like(a.q);
  Tensor lse = at::empty({a.softmax ? a.queries : 0, a.heads}, a.q.options().dtype(at::kFloat));
  const Tensor scratch = workspace(forward_workspace_bytes(p), q);
  C10_CUDA_CHECK(forward(p, out.mutable_data_ptr(), lse.mutable_data_ptr<float>(), scratch.mutable_data_ptr(),
                         c10::cuda::getCurrentCUDAStream()));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward_cuda(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k_table,
    const std::optional<Tensor>& v_table, const Tensor& rows, const std::optional<Tensor>& index,
    const std::optional<Tensor>& order, const std::optional<Tensor>& offsets,
    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& q_chunk, int64_t max_seqlen_q, double scale, c10::string_view normaliser,
    const Tensor& out, const Tensor& lse, bool need_dweight, int64_t sums) {
  const Arguments a(q, k_table, v_table, rows, index, order, offsets, cu_seqlens_q, cu_seqlens_k, weight, q_chunk, max_seqlen_q,
                    normaliser);
  const c10::cuda::CUDAGuard guard(q.device());
  const Problem p = problem_of(a, scale);
  TORCH_CHECK_VALUE(a.order.defined(), "order and offsets are None; backward takes both");
  TORCH_CHECK_VALUE(dout.sizes() == a.q.sizes() && out.sizes() == a.q.sizes() && out.is_contiguous(), "dout is ",
                    dout.sizes(), "; pass ", a.q.sizes());
  TORCH_CHECK_VALUE(backward_fits(p), "head_dim is ", a.head_dim, " of ", a.q.dtype(), ", whose backward takes more shared memory "
                    "than a block has on this device; pass at most 128, or bfloat16, or backend='expanded'");
  Tensor dq = at::empty_like(a.q), dk = at::empty({a.table, a.heads_kv, a.head_dim}, a.q.options());
  Tensor dv = a.one_table() ? at::empty({0}, a.q.options()) : at::empty_like(dk);
  Tensor dweight = need_dweight ? at::zeros({a.keys, a.targets, a.heads}, lse.options()) : at::empty({0}, lse.options());
  const Tensor dout_rows = dout.contiguous();
  const Tensor dlse_rows = a.softmax && dlse.has_value() ? dlse->contiguous() : Tensor();
  Gradients g;
  g.out = out.const_data_ptr(), g.lse = lse.const_data_ptr<float>(), g.dout = dout_rows.const_data_ptr();
  g.dlse = dlse_rows.defined() ? dlse_rows.const_data_ptr<float>() : nullptr;
  g.table = int(a.table), g.index = a.index.const_data_ptr<int64_t>();
  g.order = a.order.const_data_ptr<int64_t>(), g.offsets = a.offsets.const_data_ptr<int64_t>();
  g.dq = dq.mutable_data_ptr(), g.dk_table = dk.mutable_data_ptr();
  g.dv_table = a.one_table() ? nullptr : dv.mutable_data_ptr();
  g.dweight = need_dweight ? dweight.mutable_data_ptr<float>() : nullptr;
  g.sums = reinterpret_cast<cudaStream_t>(sums);
  Tensor scratch = workspace(backward_workspace_bytes(p), q);
  C10_CUDA_CHECK(backward(p, g, scratch.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return {dq, dk, dv, dweight, sums == 0 ? at::empty({0}, scratch.options()) : scratch};
}

}  // namespace
}  // namespace target_attention

TORCH_LIBRARY_IMPL(ta_plugin, CUDA, m) {
  m.impl("target_attention", target_attention::forward_cuda);
  m.impl("target_attention_backward", target_attention::backward_cuda);
}
