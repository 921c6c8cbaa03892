// Binding of the buckets: checks, allocations, and the current stream; see buckets.h. Schemas and the same in torch:
// ta_plugin/ops/buckets.py.
#include "buckets.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

namespace {

using at::Tensor;

void check_bounds(const Tensor& bounds, const Tensor& like) {
  TORCH_CHECK_VALUE(bounds.scalar_type() == at::kInt && bounds.dim() == 1 && bounds.size(0) >= 1 && bounds.is_contiguous() &&
                        bounds.device() == like.device(),
                    "cu_seqlens is ", bounds.sizes(), " ", bounds.dtype(), " on ", bounds.device(),
                    "; pass contiguous int32 of samples + 1 on ", like.device());
}

std::tuple<Tensor, Tensor, Tensor> bucket(const Tensor& owner_, const Tensor& bounds, int64_t ranks, int64_t bound) {
  TORCH_CHECK_VALUE(owner_.scalar_type() == at::kLong && owner_.dim() == 1 && owner_.size(0) >= 1, "owner is ", owner_.sizes(), " ",
                    owner_.dtype(), "; pass int64 of one item or more");
  TORCH_CHECK_VALUE(ranks >= 1 && ranks <= plan::kMostBuckets && bound >= 1 && ranks * bound < (int64_t(1) << 31), "ranks is ", ranks,
                    " and bound ", bound, "; pass 1 to ", plan::kMostBuckets, " ranks and 1 or more places, below 2**31 in all");
  const Tensor owner = owner_.contiguous();
  check_bounds(bounds, owner);
  const c10::cuda::CUDAGuard guard(owner.device());
  const int64_t samples = bounds.size(0) - 1;
  Tensor take = at::empty({ranks, bound}, owner.options()), sizes = at::empty({ranks, samples}, owner.options()),
         most = at::empty({1}, owner.options());
  const plan::Items x{owner.const_data_ptr<int64_t>(), bounds.const_data_ptr<int32_t>(), owner.size(0), samples, ranks, bound};
  size_t needed;
  C10_CUDA_CHECK(plan::bucket_workspace_bytes(x, &needed));
  Tensor workspace = at::empty({int64_t(needed)}, owner.options().dtype(at::kByte));
  C10_CUDA_CHECK(plan::bucket(x, take.mutable_data_ptr<int64_t>(), sizes.mutable_data_ptr<int64_t>(),
                              most.mutable_data_ptr<int64_t>(), workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return {take, sizes, most};
}

// Buckets (ranks, bound, ...), each contiguous in itself, and their rows together (ranks * bound, ...).
plan::Received received(const Tensor& buckets, const Tensor& bounds) {
  check_bounds(bounds, buckets);
  TORCH_CHECK_VALUE(buckets.size(0) >= 1 && (bounds.size(0) - 1) % buckets.size(0) == 0, "buckets of ", buckets.size(0),
                    " ranks with ", bounds.size(0) - 1, " samples; pass as many samples of each");
  const int64_t element = buckets.element_size(), row = buckets[0].numel() / std::max<int64_t>(buckets.size(1), 1) * element;
  return {bounds.const_data_ptr<int32_t>(), (bounds.size(0) - 1) / buckets.size(0), buckets.size(0), buckets.size(1), row,
          buckets.stride(0) * element};
}

Tensor compact(const Tensor& buckets_, const Tensor& bounds) {
  TORCH_CHECK_VALUE(buckets_.dim() >= 2, "buckets is ", buckets_.sizes(), "; pass (ranks, bound, ...)");
  const bool whole = buckets_.size(0) > 0 && buckets_[0].is_contiguous();
  const Tensor buckets = whole ? buckets_ : buckets_.contiguous();
  const c10::cuda::CUDAGuard guard(buckets.device());
  auto shape = buckets.sizes().vec();
  shape[1] *= shape[0];
  shape.erase(shape.begin());
  Tensor together = at::empty(shape, buckets.options());
  C10_CUDA_CHECK(plan::compact(received(buckets, bounds), buckets.const_data_ptr(), together.mutable_data_ptr(),
                               c10::cuda::getCurrentCUDAStream()));
  return together;
}

Tensor spread(const Tensor& together_, const Tensor& bounds, int64_t ranks) {
  TORCH_CHECK_VALUE(together_.dim() >= 1 && ranks >= 1 && together_.size(0) % ranks == 0, "together is ", together_.sizes(), " for ",
                    ranks, " ranks; pass (ranks * bound, ...)");
  const Tensor together = together_.contiguous();
  const c10::cuda::CUDAGuard guard(together.device());
  auto shape = together.sizes().vec();
  shape[0] /= ranks;
  shape.insert(shape.begin(), ranks);
  Tensor buckets = at::empty(shape, together.options());
  C10_CUDA_CHECK(plan::spread(received(buckets, bounds), together.const_data_ptr(), buckets.mutable_data_ptr(),
                              c10::cuda::getCurrentCUDAStream()));
  return buckets;
}

}  // namespace

TORCH_LIBRARY_IMPL(ta_plugin, CUDA, m) {
  m.impl("bucket", bucket);
  m.impl("compact", compact);
  m.impl("spread", spread);
}
