// Buckets of a fixed size, and what arrived in them brought together. The same in torch: ta_plugin/ops/buckets.py.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
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

std::tuple<Tensor, Tensor, Tensor> bucket(const Tensor& owner_, const Tensor& bounds, int64_t ranks, int64_t bound) {
  TORCH_CHECK_VALUE(owner_.scalar_type() == at::kLong && owner_.dim() == 1 && owner_.size(0) >= 1, "owner is ", owner_.sizes(), " ",
                    owner_.dtype(), "; pass int64 of one item or more");
  TORCH_CHECK_VALUE(ranks >= 1 && bound >= 1, "ranks is ", ranks, " and bound ", bound, "; pass 1 or more");
  const Tensor owner = owner_.contiguous();
  const int32_t* begin = check_bounds(bounds);
  const int64_t n = owner.size(0), samples = bounds.size(0) - 1;
  TORCH_CHECK_VALUE(begin[samples] <= n, "cu_seqlens ends at ", begin[samples], " of ", n, " items");
  Tensor take = at::empty({ranks, bound}, owner.options()), sizes = at::zeros({ranks, samples}, owner.options()),
         most = at::zeros({1}, owner.options());
  const int64_t* to = owner.const_data_ptr<int64_t>();
  int64_t *place = take.mutable_data_ptr<int64_t>(), *size = sizes.mutable_data_ptr<int64_t>();
  std::vector<int64_t> sent(ranks, 0);
  for (int64_t b = 0; b < samples; ++b)
    for (int64_t i = begin[b]; i < begin[b + 1]; ++i) {
      const int64_t r = to[i];
      if (r < 0 || r >= ranks) continue;
      if (sent[r] < bound) place[r * bound + sent[r]] = i;
      ++sent[r], ++size[r * samples + b];
    }
  const int64_t fullest = *std::max_element(sent.begin(), sent.end());
  most.mutable_data_ptr<int64_t>()[0] = fullest;
  if (fullest > bound) std::fill(size, size + ranks * samples, 0);
  for (int64_t r = 0; r < ranks; ++r)
    for (int64_t i = std::min(sent[r], bound); i < bound; ++i) place[r * bound + i] = i % n;
  return {take, sizes, most};
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

Tensor compact(const Tensor& buckets_, const Tensor& bounds) {
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
  return together;
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
  m.impl("compact", compact);
  m.impl("spread", spread);
}
