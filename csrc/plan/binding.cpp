// Binding of the plan: checks, allocations, and the current stream; see api.h. Schemas and the same in torch:
// ta_plugin/ops/planning.py.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../module.h"
#include "api.h"

namespace {

using at::Tensor;

Tensor int64s(const Tensor& x, const char* name, int64_t dims, const Tensor& like) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kLong && x.dim() == dims && x.device() == like.device(), name, " is ",
                    x.sizes(), " ", x.dtype(), " on ", x.device(), "; pass int64 of ", dims, " dimensions on ",
                    like.device());
  TORCH_CHECK_VALUE(x.numel() < (int64_t(1) << 31) - 1, name, " has ", x.numel(), " entries; split it below 2**31 - 1");
  return x.contiguous();
}

Tensor bytes(size_t count, const Tensor& like) {
  return at::empty({int64_t(count)}, like.options().dtype(at::kByte));
}

using Nine = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Nine unique(const Tensor& tokens_, const Tensor& extents_, int64_t rows, bool grouped) {
  const bool padded = tokens_.dim() == 2;
  const Tensor tokens = int64s(tokens_, "tokens", padded ? 2 : 1, tokens_), extents = int64s(extents_, "extents", 1, tokens_);
  const int64_t samples = padded ? tokens.size(0) : extents.size(0) - 1, slots = tokens.numel();
  TORCH_CHECK_VALUE(samples >= 0 && (!padded || extents.size(0) == samples), "extents has ", extents.size(0),
                    " entries; pass a length per sample of padded tokens, or one bound more than samples for packed ones");
  const c10::cuda::CUDAGuard guard(tokens.device());
  const int64_t capacity = rows < 0 ? slots : rows;
  const auto empty = [&](int64_t n) { return at::empty({n}, tokens.options()); };
  Tensor distinct = empty(capacity), counts = empty(capacity), offsets = empty(grouped ? capacity + 1 : 0), inverse = empty(slots),
         order = empty(grouped ? slots : 0), bounds = empty(samples + 1), grid = empty(padded ? slots : 0), sizes = empty(plan::kSizes);
  Tensor cu_seqlens = at::empty({samples + 1}, tokens.options().dtype(at::kInt));
  const plan::Occurrences x{tokens.const_data_ptr<int64_t>(), extents.const_data_ptr<int64_t>(), samples,
                            padded ? tokens.size(1) : 0, slots, padded};
  const auto at = [](const Tensor& t) { return t.mutable_data_ptr<int64_t>(); };
  const plan::Unique out{at(distinct), cu_seqlens.mutable_data_ptr<int32_t>(), at(counts), at(bounds), at(inverse),
                         grouped ? at(order) : nullptr, grouped ? at(offsets) : nullptr, padded ? at(grid) : nullptr,
                         at(sizes), capacity, rows >= 0};
  bool in_block;
  size_t needed;
  C10_CUDA_CHECK(plan::fits_block(x, &in_block));
  C10_CUDA_CHECK(plan::unique_workspace_bytes(x, grouped, in_block, &needed));
  Tensor workspace = bytes(needed, tokens);
  C10_CUDA_CHECK(plan::unique(x, out, in_block, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return {distinct, cu_seqlens, counts, bounds, inverse, order, offsets, grid, sizes};
}

std::tuple<Tensor, Tensor> group(const Tensor& index_, const Tensor& counts_) {
  const Tensor index = int64s(index_, "index", 1, index_), counts = int64s(counts_, "counts", 1, index_);
  const int64_t members = index.numel(), segments = counts.numel();
  const c10::cuda::CUDAGuard guard(index.device());
  Tensor order = at::empty_like(index), offsets = at::empty({segments + 1}, index.options());
  size_t needed;
  C10_CUDA_CHECK(plan::group_workspace_bytes(members, segments, &needed));
  Tensor workspace = bytes(needed, index);
  C10_CUDA_CHECK(plan::group(index.const_data_ptr<int64_t>(), counts.const_data_ptr<int64_t>(), members, segments,
                             order.mutable_data_ptr<int64_t>(), offsets.mutable_data_ptr<int64_t>(),
                             workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return {order, offsets};
}

Tensor owners(const Tensor& ids_, int64_t ranks, int64_t vocab, int64_t multiplier) {
  TORCH_CHECK_VALUE(ranks >= 1 && vocab >= 0, "ranks is ", ranks, " and vocab ", vocab, "; pass ranks >= 1, vocab >= 0");
  const Tensor ids = int64s(ids_, "ids", ids_.dim(), ids_);
  const c10::cuda::CUDAGuard guard(ids.device());
  Tensor out = at::empty_like(ids);
  C10_CUDA_CHECK(plan::owners(ids.const_data_ptr<int64_t>(), ids.numel(), ranks, vocab, multiplier,
                              out.mutable_data_ptr<int64_t>(), c10::cuda::getCurrentCUDAStream()));
  return out;
}

Tensor local_rows(const Tensor& ids_, int64_t first, int64_t held, int64_t vocab, int64_t multiplier, int64_t other) {
  TORCH_CHECK_VALUE(vocab >= 1, "vocab is ", vocab, "; pass 1 or more");
  const Tensor ids = int64s(ids_, "ids", ids_.dim(), ids_);
  const c10::cuda::CUDAGuard guard(ids.device());
  Tensor out = at::empty_like(ids);
  C10_CUDA_CHECK(plan::local_rows(ids.const_data_ptr<int64_t>(), ids.numel(), first, held, vocab, multiplier, other,
                                  out.mutable_data_ptr<int64_t>(), c10::cuda::getCurrentCUDAStream()));
  return out;
}

std::tuple<Tensor, Tensor> partition(const Tensor& owner_, const Tensor& bounds_, int64_t ranks) {
  const Tensor owner = int64s(owner_, "owner", 1, owner_), bounds = int64s(bounds_, "bounds", 1, owner_);
  TORCH_CHECK_VALUE(ranks >= 1 && ranks <= 12288 && bounds.size(0) >= 1, "ranks is ", ranks, " and bounds has ",
                    bounds.size(0), " entries; pass 1 to 12288 ranks and samples + 1 bounds");
  const int64_t n = owner.numel(), samples = bounds.size(0) - 1;
  const c10::cuda::CUDAGuard guard(owner.device());
  Tensor order = at::empty_like(owner), sizes = at::empty({ranks, samples}, owner.options());
  size_t needed;
  C10_CUDA_CHECK(plan::partition_workspace_bytes(n, ranks, &needed));
  Tensor workspace = bytes(needed, owner);
  C10_CUDA_CHECK(plan::partition(owner.const_data_ptr<int64_t>(), bounds.const_data_ptr<int64_t>(), n, samples, ranks,
                                 order.mutable_data_ptr<int64_t>(), sizes.mutable_data_ptr<int64_t>(),
                                 workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return {order, sizes};
}

}  // namespace

TORCH_LIBRARY_IMPL(ta_plugin, CUDA, m) {
  m.impl("unique", unique);
  m.impl("group", group);
  m.impl("owners", owners);
  m.impl("local_rows", local_rows);
  m.impl("partition", partition);
}
