// Binding of the kernels on packed rows: checks, allocations, and the current stream; see api.h.
// Schemas, gradients and the same in torch: ta_plugin/ops/segments.py and merging.py.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../module.h"
#include "api.h"

namespace {

using at::Tensor;

rows::Type type_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return rows::Type::kFloat;
    case at::kDouble:
      return rows::Type::kDouble;
    case at::kHalf:
      return rows::Type::kHalf;
    case at::kBFloat16:
      return rows::Type::kBFloat16;
    default:
      TORCH_CHECK_VALUE(false, "dtype is ", type, "; pass float64, float32, float16 or bfloat16");
  }
}

Tensor rows_of(const Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.is_floating_point(), name, " is ", x.sizes(), " ", x.dtype(),
                    "; pass floating (rows, ...)");
  return x.contiguous();
}

const int64_t* indices(const Tensor& x, const char* name, const Tensor& like, int64_t count) {
  TORCH_CHECK_VALUE(x.dim() == 1 && x.scalar_type() == at::kLong && x.is_contiguous() && x.device() == like.device() &&
                        (count < 0 ? x.size(0) >= 1 : x.size(0) == count),
                    name, " is ", x.sizes(), " ", x.dtype(), " on ", x.device(), "; pass contiguous int64 (",
                    count < 0 ? "U + 1" : std::to_string(count), ",) on ", like.device());
  return x.const_data_ptr<int64_t>();
}

Tensor like_rows(const Tensor& x, int64_t count) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape[0] = count;
  return at::empty(shape, x.options());
}

int64_t width_of(const Tensor& x) { return c10::multiply_integers(x.sizes().slice(1)); }

template <auto kWorkspaceBytes, auto kFold>
Tensor fold(const Tensor& values_, const Tensor& index, const Tensor& order, const Tensor& offsets) {
  const Tensor values = rows_of(values_, "values");
  const c10::cuda::CUDAGuard guard(values.device());
  const int64_t members = values.size(0), width = width_of(values);
  TORCH_CHECK_VALUE(members < (int64_t(1) << 31) - 256 && offsets.size(0) < (int64_t(1) << 31), "values has ", members,
                    " rows for ", offsets.size(0) - 1, " segments; pass fewer than 2**31 - 256");
  const rows::Segments segments{indices(index, "index", values, members), indices(order, "order", values, members),
                                indices(offsets, "offsets", values, -1), members, offsets.size(0) - 1};
  const rows::Type type = type_of(values.scalar_type());
  Tensor out = like_rows(values, segments.segments);
  const int64_t bytes = kWorkspaceBytes(type, segments, width);
  Tensor workspace = at::empty({bytes}, values.options().dtype(at::kByte));
  C10_CUDA_CHECK(kFold(type, values.const_data_ptr(), segments, width, out.mutable_data_ptr(),
                       workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return out;
}

Tensor expand(const Tensor& rows_, const Tensor& index, const std::optional<Tensor>&, const std::optional<Tensor>&) {
  const Tensor from = rows_of(rows_, "rows");
  const c10::cuda::CUDAGuard guard(from.device());
  const int64_t members = index.numel();
  const int64_t* row = indices(index, "index", from, members);
  Tensor out = like_rows(from, members);
  C10_CUDA_CHECK(rows::expand(from.const_data_ptr(), row, members, width_of(from) * from.element_size(),
                              out.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return out;
}

// Partials as the kernels take them: double throughout where anything is, lses otherwise float.
struct Partials {
  Tensor outs, lses;

  Partials(const Tensor& outs_, const Tensor& lses_) {
    TORCH_CHECK_VALUE(outs_.dim() == 4 && outs_.is_floating_point(), "outs is ", outs_.sizes(), " ", outs_.dtype(),
                      "; pass floating (N, Q, H, D)");
    TORCH_CHECK_VALUE(lses_.sizes() == outs_.sizes().slice(0, 3) && lses_.device() == outs_.device(), "lses is ",
                      lses_.sizes(), " on ", lses_.device(), "; pass ", outs_.sizes().slice(0, 3), " on ",
                      outs_.device());
    const bool wide = outs_.scalar_type() == at::kDouble || lses_.scalar_type() == at::kDouble;
    outs = (wide ? outs_.to(at::kDouble) : outs_).contiguous();
    lses = lses_.to(wide ? at::kDouble : at::kFloat).contiguous();
  }
  rows::Partials raw() const {
    return {outs.const_data_ptr(), lses.const_data_ptr(),           type_of(outs.scalar_type()),
            outs.size(0),          outs.size(1) * outs.size(2), outs.size(3)};
  }
  // The type of the result that the kernel writes when `wanted` is asked for.
  at::ScalarType result(at::ScalarType wanted) const {
    const bool fused = outs.scalar_type() == at::kFloat && (wanted == at::kHalf || wanted == at::kBFloat16);
    return fused ? wanted : outs.scalar_type();
  }
};

std::tuple<Tensor, Tensor> merge(const Tensor& outs, const Tensor& lses, std::optional<at::ScalarType> dtype) {
  const c10::cuda::CUDAGuard guard(outs.device());
  const Partials partials(outs, lses);
  const at::ScalarType wanted = dtype.value_or(outs.scalar_type());
  Tensor out = at::empty(outs.sizes().slice(1), outs.options().dtype(partials.result(wanted)));
  Tensor lse = at::empty(lses.sizes().slice(1), partials.lses.options());
  C10_CUDA_CHECK(rows::merge(partials.raw(), type_of(out.scalar_type()), out.mutable_data_ptr(),
                             lse.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return {out.to(wanted), lse};
}

void merge_into(const Tensor& out, const Tensor& lse, const Tensor& other, const Tensor& other_lse) {
  TORCH_CHECK_VALUE(out.dim() == 3 && other.sizes() == out.sizes() && other.scalar_type() == out.scalar_type() &&
                        other.device() == out.device(),
                    "out is ", out.sizes(), " ", out.dtype(), " and other ", other.sizes(), " ", other.dtype(),
                    "; pass floating (Q, H, D) twice, alike");
  const at::ScalarType wide = out.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  for (const Tensor& x : {lse, other_lse})
    TORCH_CHECK_VALUE(x.sizes() == out.sizes().slice(0, 2) && x.scalar_type() == wide && x.device() == out.device(),
                      "lse is ", x.sizes(), " ", x.dtype(), "; pass ", wide, " ", out.sizes().slice(0, 2));
  TORCH_CHECK_VALUE(out.is_contiguous() && lse.is_contiguous(), "out and lse are written in place; pass contiguous ones");
  const c10::cuda::CUDAGuard guard(out.device());
  const Tensor from = other.contiguous(), from_lse = other_lse.contiguous();
  const rows::Partials partial{from.const_data_ptr(), from_lse.const_data_ptr(),   type_of(out.scalar_type()),
                               1,                     out.size(0) * out.size(1), out.size(2)};
  C10_CUDA_CHECK(
      rows::merge_into(partial, out.mutable_data_ptr(), lse.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
}

std::tuple<Tensor, Tensor> merge_backward(const Tensor& grad_out_, const Tensor& grad_lse_, const Tensor& outs,
                                          const Tensor& lses, const Tensor& lse_) {
  const c10::cuda::CUDAGuard guard(outs.device());
  const Partials partials(outs, lses);
  const at::ScalarType wide = partials.lses.scalar_type();
  const Tensor grad_out = grad_out_.to(partials.result(grad_out_.scalar_type())).contiguous();
  const Tensor grad_lse = grad_lse_.to(wide).contiguous(), lse = lse_.to(wide).contiguous();
  TORCH_CHECK_VALUE(grad_out.sizes() == outs.sizes().slice(1) && grad_lse.sizes() == lses.sizes().slice(1) &&
                        lse.sizes() == lses.sizes().slice(1),
                    "grad_out is ", grad_out.sizes(), ", grad_lse ", grad_lse.sizes(), ", lse ", lse.sizes(),
                    "; pass what merge returned, and its gradients");
  Tensor grad_outs = at::empty(outs.sizes(), partials.outs.options());
  Tensor grad_lses = at::empty(lses.sizes(), partials.lses.options());
  C10_CUDA_CHECK(rows::merge_backward(partials.raw(), type_of(grad_out.scalar_type()), grad_out.const_data_ptr(),
                                      grad_lse.const_data_ptr(), lse.const_data_ptr(), grad_outs.mutable_data_ptr(),
                                      grad_lses.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return {grad_outs.to(outs.scalar_type()), grad_lses.to(lses.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(ta_plugin, CUDA, m) {
  m.impl("segment_sum", fold<rows::sum_workspace_bytes, rows::sum>);
  m.impl("segment_logsumexp", fold<rows::logsumexp_workspace_bytes, rows::logsumexp>);
  m.impl("expand", expand);
  m.impl("merge", merge);
  m.impl("merge_into", merge_into);
  m.impl("merge_backward", merge_backward);
}
