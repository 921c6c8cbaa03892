// Merging partial attention results by log-sum-exp, and its gradient. The same in torch: ta_plugin/ops/merging.py.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;

at::ScalarType wide_type(const Tensor& outs, const Tensor& lses) {
  return at::promote_types(at::promote_types(outs.scalar_type(), lses.scalar_type()), at::kFloat);
}

void check(const Tensor& outs, const Tensor& lses) {
  TORCH_CHECK_VALUE(outs.dim() == 4 && outs.is_floating_point(), "outs is ", outs.sizes(), " ", outs.dtype(),
                    "; pass floating (N, Q, H, D)");
  TORCH_CHECK_VALUE(lses.sizes() == outs.sizes().slice(0, 3), "lses is ", lses.sizes(), "; pass ",
                    outs.sizes().slice(0, 3));
}

template <typename T>
T share_of(T lse, T merged) {  // 0 where the partial is absent
  return lse == -std::numeric_limits<T>::infinity() ? T(0) : std::exp(lse - merged);
}

template <typename T>
T merged_lse(const T* lses, int64_t count, int64_t stride) {
  constexpr T kAbsent = -std::numeric_limits<T>::infinity();
  T peak = kAbsent, total = 0;
  for (int64_t n = 0; n < count; ++n) peak = lses[n * stride] > peak ? lses[n * stride] : peak;
  for (int64_t n = 0; n < count; ++n)
    if (lses[n * stride] != kAbsent) total += std::exp(lses[n * stride] - peak);
  return total == 0 ? kAbsent : peak + std::log(total);
}

// Works in the wide type: conversions are left to torch. One thread per (query, head), partials in order.
std::tuple<Tensor, Tensor> merge(const Tensor& outs, const Tensor& lses, std::optional<at::ScalarType> dtype) {
  check(outs, lses);
  const at::ScalarType wide = wide_type(outs, lses);
  const Tensor x = outs.to(wide).contiguous(), weight = lses.to(wide).contiguous();
  const int64_t count = x.size(0), queries = x.size(1) * x.size(2), dim = x.size(3);
  Tensor out = at::zeros(x.sizes().slice(1), x.options()), lse = at::empty(weight.sizes().slice(1), weight.options());
  AT_DISPATCH_FLOATING_TYPES(wide, "merge", [&] {
    const scalar_t *from = x.const_data_ptr<scalar_t>(), *l = weight.const_data_ptr<scalar_t>();
    scalar_t *to = out.mutable_data_ptr<scalar_t>(), *merged = lse.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, queries, 64, [&](int64_t first, int64_t last) {
      for (int64_t q = first; q < last; ++q) {
        merged[q] = merged_lse(l + q, count, queries);
        for (int64_t n = 0; n < count; ++n) {
          const scalar_t share = share_of(l[n * queries + q], merged[q]);
          if (share == 0) continue;  // an absent partial may hold anything
          for (int64_t d = 0; d < dim; ++d) to[q * dim + d] += share * from[(n * queries + q) * dim + d];
        }
      }
    });
  });
  return {out.to(dtype.value_or(outs.scalar_type())), lse};
}

void merge_into(const Tensor& out, const Tensor& lse, const Tensor& other, const Tensor& other_lse) {
  const auto [merged, merged_lse] = merge(at::stack({out, other}), at::stack({lse, other_lse}), std::nullopt);
  out.copy_(merged);
  lse.copy_(merged_lse);
}

std::tuple<Tensor, Tensor> merge_backward(const Tensor& grad_out, const Tensor& grad_lse, const Tensor& outs,
                                          const Tensor& lses, const Tensor& lse) {
  check(outs, lses);
  TORCH_CHECK_VALUE(grad_out.sizes() == outs.sizes().slice(1) && grad_lse.sizes() == lses.sizes().slice(1) &&
                        lse.sizes() == lses.sizes().slice(1),
                    "grad_out is ", grad_out.sizes(), ", grad_lse ", grad_lse.sizes(), ", lse ", lse.sizes(),
                    "; pass what merge returned, and its gradients");
  const at::ScalarType wide = wide_type(outs, lses);
  const Tensor x = outs.to(wide).contiguous(), weight = lses.to(wide).contiguous(), whole = lse.to(wide).contiguous();
  const Tensor dout = grad_out.to(wide).contiguous(), dlse = grad_lse.to(wide).contiguous();
  const int64_t count = x.size(0), queries = x.size(1) * x.size(2), dim = x.size(3);
  Tensor douts = at::zeros(x.sizes(), x.options()), dlses = at::zeros(weight.sizes(), weight.options());
  AT_DISPATCH_FLOATING_TYPES(wide, "merge_backward", [&] {
    const scalar_t *from = x.const_data_ptr<scalar_t>(), *l = weight.const_data_ptr<scalar_t>(),
                   *merged = whole.const_data_ptr<scalar_t>(), *g = dout.const_data_ptr<scalar_t>(),
                   *gl = dlse.const_data_ptr<scalar_t>();
    scalar_t *to = douts.mutable_data_ptr<scalar_t>(), *to_lse = dlses.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, queries, 64, [&](int64_t first, int64_t last) {
      std::vector<scalar_t> dots(count), shares(count);
      for (int64_t q = first; q < last; ++q) {
        scalar_t mean = 0;
        for (int64_t n = 0; n < count; ++n) {
          dots[n] = 0;
          shares[n] = share_of(l[n * queries + q], merged[q]);
          if (shares[n] == 0) continue;
          const int64_t row = (n * queries + q) * dim;
          for (int64_t d = 0; d < dim; ++d) {
            dots[n] += g[q * dim + d] * from[row + d];
            to[row + d] = shares[n] * g[q * dim + d];
          }
          mean += shares[n] * dots[n];
        }
        for (int64_t n = 0; n < count; ++n)
          if (shares[n] != 0) to_lse[n * queries + q] = shares[n] * (dots[n] - mean + gl[q]);
      }
    });
  });
  return {douts.to(outs.scalar_type()), dlses.to(lses.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(ta_plugin, CPU, m) {
  m.impl("merge", merge);
  m.impl("merge_into", merge_into);
  m.impl("merge_backward", merge_backward);
}
