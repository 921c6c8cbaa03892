// Buckets of a fixed size, and what arrived in them brought together. The same in torch: ta_plugin/ops/buckets.py.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

namespace {

using at::Tensor;

const int32_t* check_bounds(const Tensor& bounds) {
  TORCH_CHECK_VALUE(bounds.scalar_type() == at::kInt && bounds.dim() == 1 && bounds.size(0) >= 1 && bounds.is_contiguous(),
                    "cu_seqlens is ", bounds.sizes(), " ", bounds.dtype(), "; pass contiguous int32 of samples + 1");
  const int32_t* bound = bounds.const_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(bound[0] == 0 && std::is_sorted(bound, bound + bounds.size(0)), "cu_seqlens does not rise from 0");
  return bound;
}

// Values to places: item i of `items` to place i.
template <typename From, typename To>
void put(const Tensor& values, const std::vector<int64_t>& items, To* to) {
  const From* from = values.const_data_ptr<From>();
  for (size_t i = 0; i < items.size(); ++i) {
    const From value = from[items[i]];
    to[i] = sizeof(To) < sizeof(From) && (value < 0 || value > From(std::numeric_limits<To>::max())) ? To(-1) : To(value);
  }
}

void bucket(const Tensor& owner_, const Tensor& bounds, at::TensorList values, at::TensorList buckets, const Tensor& sizes,
            const Tensor& most) {
  TORCH_CHECK_VALUE(owner_.scalar_type() == at::kLong && owner_.dim() == 1 && owner_.size(0) >= 1, "owner is ", owner_.sizes(), " ",
                    owner_.dtype(), "; pass int64 of one item or more");
  TORCH_CHECK_VALUE(!values.empty() && buckets.size() == values.size(), values.size(), " values and ", buckets.size(),
                    " buckets; pass 1 or more of both");
  const Tensor owner = owner_.contiguous();
  const int32_t* begin = check_bounds(bounds);
  const int64_t n = owner.size(0), samples = bounds.size(0) - 1, ranks = buckets[0].size(0), bound = buckets[0].size(1);
  TORCH_CHECK_VALUE(begin[samples] <= n, "cu_seqlens ends at ", begin[samples], " of ", n, " items");
  TORCH_CHECK_VALUE(ranks >= 1 && bound >= 1, "buckets is ", buckets[0].sizes(), "; pass 1 or more ranks and places");
  const int64_t* to = owner.const_data_ptr<int64_t>();
  std::vector<std::vector<int64_t>> items(ranks);  // in each bucket
  Tensor size = at::zeros({ranks, samples}, owner.options());
  int64_t *sent = size.mutable_data_ptr<int64_t>(), fullest = 0;
  for (int64_t b = 0; b < samples; ++b)
    for (int64_t i = begin[b]; i < begin[b + 1]; ++i)
      if (to[i] >= 0 && to[i] < ranks) items[to[i]].push_back(i), ++sent[to[i] * samples + b];
  for (auto& each : items) {
    fullest = std::max(fullest, int64_t(each.size()));
    int64_t place = each.size();
    each.resize(bound);
    for (; place < bound; ++place) each[place] = place % n;
  }
  most.fill_(fullest);
  sizes.copy_(fullest > bound ? size.zero_() : size);
  for (size_t v = 0; v < values.size(); ++v) {
    const bool narrowed = values[v].scalar_type() == at::kLong && buckets[v].scalar_type() == at::kInt;
    TORCH_CHECK_VALUE(values[v].dim() == 1 && values[v].size(0) == n && buckets[v].sizes() == buckets[0].sizes() &&
                          buckets[v].stride(1) == 1 && (narrowed || buckets[v].scalar_type() == values[v].scalar_type()),
                      "values is ", values[v].sizes(), " ", values[v].dtype(), ", buckets ", buckets[v].sizes(), " ", buckets[v].dtype(),
                      "; pass one of each item, and (ranks, bound) of the same dtype, or int32 for int64, whose rows are contiguous");
    const Tensor from = values[v].contiguous();
    for (int64_t r = 0; r < ranks; ++r) {
      if (narrowed) {
        put<int64_t>(from, items[r], buckets[v][r].mutable_data_ptr<int32_t>());
        continue;
      }
      AT_DISPATCH_ALL_TYPES(from.scalar_type(), "bucket",
                            [&] { put<scalar_t>(from, items[r], buckets[v][r].mutable_data_ptr<scalar_t>()); });
    }
  }
}

Tensor bounds(const Tensor& sizes) {
  TORCH_CHECK_VALUE(sizes.scalar_type() == at::kLong && (sizes.dim() == 1 || sizes.dim() == 2), "sizes is ", sizes.sizes(), " ",
                    sizes.dtype(), "; pass int64 of (n,) or (ranks, samples)");
  Tensor found = at::zeros({sizes.numel() + 1}, sizes.options().dtype(at::kInt));
  found.slice(0, 1).copy_(sizes.reshape(-1).cumsum(0));
  return found;
}

// Where the rows of each rank begin, and the end.
std::vector<int64_t> begins(const Tensor& bounds, int64_t ranks, int64_t bound) {
  const int32_t* begin = check_bounds(bounds);
  TORCH_CHECK_VALUE(ranks >= 1 && (bounds.size(0) - 1) % ranks == 0, "buckets of ", ranks, " ranks with ", bounds.size(0) - 1,
                    " samples; pass as many samples of each");
  const int64_t samples = (bounds.size(0) - 1) / ranks;
  std::vector<int64_t> rows(ranks + 1);
  for (int64_t r = 0; r <= ranks; ++r) rows[r] = begin[r * samples];
  for (int64_t r = 0; r < ranks; ++r)
    TORCH_CHECK_VALUE(rows[r + 1] - rows[r] <= bound, "bucket ", r, " holds ", rows[r + 1] - rows[r], " rows of ", bound);
  return rows;
}

Tensor compact(const Tensor& buckets_, const Tensor& bounds, bool widen) {
  TORCH_CHECK_VALUE(buckets_.dim() >= 2, "buckets is ", buckets_.sizes(), "; pass (ranks, bound, ...)");
  const Tensor buckets = buckets_.contiguous();
  const int64_t ranks = buckets.size(0), bound = buckets.size(1);
  const std::vector<int64_t> rows = begins(bounds, ranks, bound);
  Tensor together = at::zeros_like(buckets).flatten(0, 1);
  const int64_t bytes = bound == 0 ? 0 : int64_t(buckets[0].nbytes()) / bound;
  const char* from = static_cast<const char*>(buckets.const_data_ptr());
  char* to = static_cast<char*>(together.mutable_data_ptr());
  for (int64_t r = 0; r < ranks; ++r)
    if (rows[r + 1] > rows[r]) std::memcpy(to + rows[r] * bytes, from + r * bound * bytes, (rows[r + 1] - rows[r]) * bytes);
  if (!widen) return together;
  TORCH_CHECK_VALUE(buckets.scalar_type() == at::kInt && buckets.dim() == 2, "buckets is ", buckets.sizes(), " ", buckets.dtype(),
                    "; pass int32 of (ranks, bound) to widen");
  return together.to(at::kLong);
}

Tensor spread(const Tensor& together_, const Tensor& bounds, int64_t ranks) {
  TORCH_CHECK_VALUE(together_.dim() >= 1 && ranks >= 1 && together_.size(0) % ranks == 0, "together is ", together_.sizes(), " for ",
                    ranks, " ranks; pass (ranks * bound, ...)");
  const Tensor together = together_.contiguous();
  const int64_t bound = together.size(0) / ranks;
  const std::vector<int64_t> rows = begins(bounds, ranks, bound);
  auto shape = together.sizes().vec();
  shape[0] = bound;
  shape.insert(shape.begin(), ranks);
  Tensor buckets = at::zeros(shape, together.options());
  const int64_t bytes = bound == 0 ? 0 : int64_t(buckets[0].nbytes()) / bound;
  const char* from = static_cast<const char*>(together.const_data_ptr());
  char* to = static_cast<char*>(buckets.mutable_data_ptr());
  for (int64_t r = 0; r < ranks; ++r)
    if (rows[r + 1] > rows[r]) std::memcpy(to + r * bound * bytes, from + rows[r] * bytes, (rows[r + 1] - rows[r]) * bytes);
  return buckets;
}

}  // namespace

TORCH_LIBRARY_IMPL(ta_plugin, CPU, m) {
  m.impl("bucket", bucket);
  m.impl("bounds", bounds);
  m.impl("compact", compact);
  m.impl("spread", spread);
}
