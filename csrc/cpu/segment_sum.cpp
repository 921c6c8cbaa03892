// Sums over the members of a segment, each output element by one thread in member order: bitwise repeatable.

#include <torch/extension.h>

#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

namespace {

// values (M, F), order (M,) int64: members by segment, offsets (U + 1,) int64: where each segment starts -> (U, F)
at::Tensor segment_sum(const at::Tensor& values, const at::Tensor& order, const at::Tensor& offsets) {
  TORCH_CHECK_VALUE(values.dim() == 2 && values.is_floating_point(), "values is ", values.sizes(), " ", values.dtype(),
                    "; pass floating (M, F)");
  TORCH_CHECK_VALUE(order.dim() == 1 && order.scalar_type() == at::kLong && order.size(0) == values.size(0),
                    "order is ", order.sizes(), " ", order.dtype(), "; pass int64 (", values.size(0), ",)");
  TORCH_CHECK_VALUE(offsets.dim() == 1 && offsets.scalar_type() == at::kLong && offsets.size(0) >= 1, "offsets is ",
                    offsets.sizes(), " ", offsets.dtype(), "; pass int64 (U + 1,)");
  const at::Tensor rows = values.contiguous();
  const at::Tensor members = order.contiguous();
  const at::Tensor bounds = offsets.contiguous();
  const int64_t segments = bounds.size(0) - 1, width = rows.size(1), count = rows.size(0);
  at::Tensor sums = at::empty({segments, width}, rows.options());
  const int64_t* member = members.const_data_ptr<int64_t>();
  const int64_t* bound = bounds.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i)
    TORCH_CHECK_INDEX(member[i] >= 0 && member[i] < count, "order[", i, "] is ", member[i], " of ", count, " members");
  for (int64_t s = 0; s <= segments; ++s)
    TORCH_CHECK_INDEX(bound[s] >= (s ? bound[s - 1] : 0) && bound[s] <= count, "offsets[", s, "] is ", bound[s],
                      "; they must rise from 0 to ", count);

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rows.scalar_type(), "segment_sum", [&] {
    using acc_t = at::opmath_type<scalar_t>;  // float for the half types
    const scalar_t* in = rows.const_data_ptr<scalar_t>();
    scalar_t* out = sums.mutable_data_ptr<scalar_t>();
    const int64_t grain = std::max<int64_t>(1, at::internal::GRAIN_SIZE / std::max<int64_t>(1, width));
    at::parallel_for(0, segments, grain, [&](int64_t first, int64_t last) {
      std::vector<acc_t> total(width);
      for (int64_t s = first; s < last; ++s) {
        std::fill(total.begin(), total.end(), acc_t(0));
        for (int64_t i = bound[s]; i < bound[s + 1]; ++i) {
          const scalar_t* row = in + member[i] * width;
          for (int64_t f = 0; f < width; ++f) total[f] += static_cast<acc_t>(row[f]);
        }
        for (int64_t f = 0; f < width; ++f) out[s * width + f] = static_cast<scalar_t>(total[f]);
      }
    });
  });
  return sums;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ta_plugin, m) {
  m.def("segment_sum(Tensor values, Tensor order, Tensor offsets) -> Tensor");
}

TORCH_LIBRARY_IMPL(ta_plugin, CPU, m) { m.impl("segment_sum", segment_sum); }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {}  // importing it registers the operators above
