// Binding of the buckets: checks, allocations, and the current stream; see buckets.h. Schemas and the same in torch:
// ta_plugin/ops/buckets.py.
#include "buckets.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

namespace {

using at::Tensor;

void check_bounds(const Tensor& bounds, const Tensor& like) {
  TORCH_CHECK_VALUE(bounds.scalar_type() == at::kInt && bounds.dim() == 1 && bounds.size(0) >= 1 && bounds.is_contiguous() &&
                        bounds.device() == like.device(),
                    "cu_seqlens is ", bounds.sizes(), " ", bounds.dtype(), " on ", bounds.device(),
                    "; pass contiguous int32 of samples + 1 on ", like.device());
}

void check_takes(const Tensor& values, const Tensor& buckets, int64_t n) {
  const int64_t bytes = values.element_size();
  TORCH_CHECK_VALUE(values.dim() == 1 && values.size(0) == n && values.is_contiguous() && (bytes == 4 || bytes == 8), "values is ",
                    values.sizes(), " ", values.dtype(), "; pass contiguous ones of 4 or 8 bytes for ", n, " items");
  const bool narrowed = values.scalar_type() == at::kLong && buckets.scalar_type() == at::kInt;
  TORCH_CHECK_VALUE(buckets.dim() == 2 && buckets.stride(1) == 1 && buckets.device() == values.device() &&
                        (narrowed || buckets.scalar_type() == values.scalar_type()),
                    "buckets is ", buckets.sizes(), " ", buckets.dtype(), " for ", values.dtype(),
                    "; pass (ranks, bound) of the same dtype, or int32 for int64, whose rows are contiguous");
}

void bucket(const Tensor& owner_, const Tensor& bounds, at::TensorList values, at::TensorList buckets, const Tensor& sizes,
            const Tensor& most) {
  TORCH_CHECK_VALUE(owner_.scalar_type() == at::kLong && owner_.dim() == 1 && owner_.size(0) >= 1, "owner is ", owner_.sizes(), " ",
                    owner_.dtype(), "; pass int64 of one item or more");
  TORCH_CHECK_VALUE(!values.empty() && values.size() <= plan::kMostValues && buckets.size() == values.size(), values.size(),
                    " values and ", buckets.size(), " buckets; pass 1 to ", plan::kMostValues, " of both");
  const Tensor owner = owner_.contiguous();
  check_bounds(bounds, owner);
  const int64_t n = owner.size(0), samples = bounds.size(0) - 1;
  for (size_t v = 0; v < values.size(); ++v) check_takes(values[v], buckets[v], n);
  const int64_t ranks = buckets[0].size(0), bound = buckets[0].size(1);
  TORCH_CHECK_VALUE(ranks >= 1 && ranks <= plan::kMostBuckets && bound >= 1 && ranks * bound < (int64_t(1) << 31), "buckets is ",
                    buckets[0].sizes(), "; pass 1 to ", plan::kMostBuckets, " ranks and 1 or more places, below 2**31 in all");
  for (const Tensor& x : buckets) TORCH_CHECK_VALUE(x.sizes() == buckets[0].sizes(), "buckets differ in shape; pass them alike");
  TORCH_CHECK_VALUE(sizes.scalar_type() == at::kLong && sizes.dim() == 2 && sizes.size(0) == ranks && sizes.size(1) == samples &&
                        (samples <= 1 || sizes.stride(1) == 1) && most.scalar_type() == at::kLong && most.numel() == 1,
                    "sizes is ", sizes.sizes(), " ", sizes.dtype(), ", most ", most.sizes(), " ", most.dtype(), "; pass int64 of (", ranks,
                    ", ", samples, ") and (1,)");
  const c10::cuda::CUDAGuard guard(owner.device());
  plan::Items x{owner.const_data_ptr<int64_t>(), bounds.const_data_ptr<int32_t>(), n, samples, ranks, bound, {}};
  x.values.number = int(values.size());
  for (size_t v = 0; v < values.size(); ++v) {
    x.values.from[v] = values[v].const_data_ptr(), x.values.to[v] = buckets[v].mutable_data_ptr();
    x.values.bytes[v] = int(values[v].element_size()), x.values.sent_bytes[v] = int(buckets[v].element_size());
    x.values.stride[v] = buckets[v].stride(0) * buckets[v].element_size();
  }
  size_t needed;
  C10_CUDA_CHECK(plan::bucket_workspace_bytes(x, &needed));
  Tensor workspace = at::empty({int64_t(needed)}, owner.options().dtype(at::kByte));
  C10_CUDA_CHECK(plan::bucket(x, sizes.mutable_data_ptr<int64_t>(), sizes.stride(0), most.mutable_data_ptr<int64_t>(),
                              workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
}

Tensor bounds(const Tensor& sizes_) {
  TORCH_CHECK_VALUE(sizes_.scalar_type() == at::kLong && (sizes_.dim() == 1 || sizes_.dim() == 2) &&
                        sizes_.numel() < (int64_t(1) << 31),
                    "sizes is ", sizes_.sizes(), " ", sizes_.dtype(), "; pass int64 of (n,) or (ranks, samples)");
  const Tensor whole = sizes_.dim() == 1 ? sizes_.unsqueeze(0) : sizes_;
  const Tensor sizes = whole.size(1) <= 1 || whole.stride(1) == 1 ? whole : whole.contiguous();
  const c10::cuda::CUDAGuard guard(sizes.device());
  Tensor found = at::empty({sizes.numel() + 1}, sizes.options().dtype(at::kInt));
  C10_CUDA_CHECK(plan::bounds(sizes.const_data_ptr<int64_t>(), sizes.size(0), sizes.size(1), sizes.stride(0),
                              found.mutable_data_ptr<int32_t>(), c10::cuda::getCurrentCUDAStream()));
  return found;
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

Tensor compact(const Tensor& buckets_, const Tensor& bounds, bool widen) {
  TORCH_CHECK_VALUE(buckets_.dim() >= 2, "buckets is ", buckets_.sizes(), "; pass (ranks, bound, ...)");
  const bool whole = buckets_.size(0) > 0 && buckets_[0].is_contiguous();
  const Tensor buckets = whole ? buckets_ : buckets_.contiguous();
  const c10::cuda::CUDAGuard guard(buckets.device());
  auto shape = buckets.sizes().vec();
  shape[1] *= shape[0];
  shape.erase(shape.begin());
  if (widen) {
    TORCH_CHECK_VALUE(buckets.scalar_type() == at::kInt && buckets.dim() == 2, "buckets is ", buckets.sizes(), " ", buckets.dtype(),
                      "; pass int32 of (ranks, bound) to widen");
    Tensor together = at::empty(shape, buckets.options().dtype(at::kLong));
    C10_CUDA_CHECK(plan::compact_widened(received(buckets, bounds), buckets.const_data_ptr<int32_t>(),
                                         together.mutable_data_ptr<int64_t>(), c10::cuda::getCurrentCUDAStream()));
    return together;
  }
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
  m.impl("bounds", bounds);
  m.impl("compact", compact);
  m.impl("spread", spread);
}
