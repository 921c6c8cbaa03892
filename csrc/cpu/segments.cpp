// Segment sums, log-sum-exp and their transpose, each output element by one thread in member order: bitwise repeatable.
// Schemas, gradients and the same in torch: ta_plugin/ops/segments.py.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "../module.h"

namespace {

using at::Tensor;

struct Segments {  // of `members` members
  Tensor order, offsets;
  const int64_t* member;
  const int64_t* bound;
  int64_t count, members;

  Segments(const Tensor& order_, const Tensor& offsets_, int64_t members) : members(members) {
    TORCH_CHECK_VALUE(order_.dim() == 1 && order_.scalar_type() == at::kLong && order_.size(0) == members, "order is ",
                      order_.sizes(), " ", order_.dtype(), "; pass int64 (", members, ",)");
    TORCH_CHECK_VALUE(offsets_.dim() == 1 && offsets_.scalar_type() == at::kLong && offsets_.size(0) >= 1,
                      "offsets is ", offsets_.sizes(), " ", offsets_.dtype(), "; pass int64 (U + 1,)");
    order = order_.contiguous(), offsets = offsets_.contiguous();
    member = order.const_data_ptr<int64_t>(), bound = offsets.const_data_ptr<int64_t>();
    count = offsets.size(0) - 1;
    for (int64_t i = 0; i < members; ++i)
      TORCH_CHECK_INDEX(member[i] >= 0 && member[i] < members, "order[", i, "] is ", member[i], " of ", members,
                        " members");
    for (int64_t s = 0; s <= count; ++s)
      TORCH_CHECK_INDEX(bound[s] >= (s ? bound[s - 1] : 0) && bound[s] <= members, "offsets[", s, "] is ", bound[s],
                        "; they must rise from 0 to ", members);
  }
};

Tensor rows_of(const Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.is_floating_point(), name, " is ", x.sizes(), " ", x.dtype(),
                    "; pass floating (rows, ...)");
  return x.contiguous();
}

Tensor like_rows(const Tensor& x, int64_t rows) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape[0] = rows;
  return at::empty(shape, x.options());
}

int64_t width_of(const Tensor& x) { return c10::multiply_integers(x.sizes().slice(1)); }

int64_t grain(int64_t width) { return std::max<int64_t>(1, at::internal::GRAIN_SIZE / std::max<int64_t>(1, width)); }

template <class Reduce>  // reduce(total, element) over a segment, then finish(total)
Tensor reduce(const Tensor& values, const Tensor& order, const Tensor& offsets) {
  const Tensor in = rows_of(values, "values");
  const Segments segments(order, offsets, in.size(0));
  const int64_t width = width_of(in);
  Tensor out = like_rows(in, segments.count);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, in.scalar_type(), "segments", [&] {
    using acc_t = at::opmath_type<scalar_t>;  // float for the half types
    using State = typename Reduce::template State<acc_t>;
    const scalar_t* from = in.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, segments.count, grain(width), [&](int64_t first, int64_t last) {
      std::vector<State> state(width);
      for (int64_t s = first; s < last; ++s) {
        std::fill(state.begin(), state.end(), State());
        for (int64_t i = segments.bound[s]; i < segments.bound[s + 1]; ++i) {
          const scalar_t* row = from + segments.member[i] * width;
          for (int64_t f = 0; f < width; ++f) state[f].add(static_cast<acc_t>(row[f]));
        }
        for (int64_t f = 0; f < width; ++f) to[s * width + f] = static_cast<scalar_t>(state[f].result());
      }
    });
  });
  return out;
}

struct Sum {
  template <class T>
  struct State {
    T total = 0;
    void add(T x) { total += x; }
    T result() const { return total; }
  };
};

struct LogSumExp {
  template <class T>
  struct State {
    T peak = -std::numeric_limits<T>::infinity(), total = 0;
    void add(T x) {
      if (x > peak) {
        total = total * std::exp(peak - x) + 1;
        peak = x;
      } else if (!(x == -std::numeric_limits<T>::infinity())) {  // NaN comes here and stays
        total += std::exp(x - peak);
      }
    }
    T result() const { return total == 0 ? -std::numeric_limits<T>::infinity() : peak + std::log(total); }
  };
};

Tensor segment_sum(const Tensor& values, const Tensor&, const Tensor& order, const Tensor& offsets) {
  return reduce<Sum>(values, order, offsets);
}

Tensor segment_logsumexp(const Tensor& values, const Tensor&, const Tensor& order, const Tensor& offsets) {
  return reduce<LogSumExp>(values, order, offsets);
}

Tensor expand(const Tensor& rows, const Tensor& index, const std::optional<Tensor>&, const std::optional<Tensor>&) {
  TORCH_CHECK_VALUE(index.dim() == 1 && index.scalar_type() == at::kLong, "index is ", index.sizes(), " ",
                    index.dtype(), "; pass int64 (M,)");
  return rows_of(rows, "rows").index_select(0, index);
}

}  // namespace

TORCH_LIBRARY_IMPL(ta_plugin, CPU, m) {
  m.impl("segment_sum", segment_sum);
  m.impl("segment_logsumexp", segment_logsumexp);
  m.impl("expand", expand);
}
