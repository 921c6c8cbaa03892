// What the CPU and the CUDA kernel both check: the arguments of ta_plugin/ops/target.py's schema.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <optional>

namespace target_attention {

using at::Tensor;

// Contiguous tensors and sizes of one call; table is the gradient's rows, and of use with order and offsets only. Names and shapes:
// ta_plugin/ops/target.py.
struct Arguments {
  Tensor q, k_table, v_table, rows, index, order, offsets, cu_seqlens_q, cu_seqlens_k, weight, q_chunk;
  int64_t samples, queries, targets, keys, table, heads, heads_kv, head_dim;
  int64_t weight_stride_row = 0, weight_stride_key = 0, weight_stride_head = 0;
  bool softmax, silu;

  bool one_table() const { return !v_table.defined(); }
  int64_t share() const { return heads / heads_kv; }

  Arguments(const Tensor& q_, const Tensor& k_table_, const std::optional<Tensor>& v_table_, const Tensor& rows_,
            const std::optional<Tensor>& index_, const std::optional<Tensor>& order_,
            const std::optional<Tensor>& offsets_, const Tensor& cu_seqlens_q_, const Tensor& cu_seqlens_k_,
            const std::optional<Tensor>& weight_, const std::optional<Tensor>& q_chunk_, int64_t max_seqlen_q,
            c10::string_view normaliser) {
    TORCH_CHECK_VALUE(q_.dim() == 3 && q_.is_floating_point(), "q is ", q_.sizes(), " ", q_.dtype(),
                      "; pass floating (Q, H, D)");
    TORCH_CHECK_VALUE(k_table_.dim() == 3 && k_table_.size(2) == q_.size(2) && k_table_.scalar_type() == q_.scalar_type(),
                      "k_table is ", k_table_.sizes(), " ", k_table_.dtype(), "; pass (G, Hk, D) with q's D and dtype");
    q = q_.contiguous(), k_table = k_table_.contiguous();
    if (v_table_.has_value()) {
      TORCH_CHECK_VALUE(v_table_->sizes() == k_table.sizes() && v_table_->scalar_type() == q.scalar_type(),
                        "v_table is ", v_table_->sizes(), " ", v_table_->dtype(), "; pass k_table's shape and dtype");
      v_table = v_table_->contiguous();
    }
    queries = q.size(0), heads = q.size(1), head_dim = q.size(2), heads_kv = k_table.size(1);
    TORCH_CHECK_VALUE(heads_kv > 0 && heads % heads_kv == 0, "q has ", heads, " heads and k_table ", heads_kv,
                      "; the second must divide the first");
    rows = vector(rows_, "rows", at::kLong, rows_.numel());
    keys = rows.numel();
    index = index_.has_value() ? vector(*index_, "index", at::kLong, keys) : rows;
    table = k_table.size(0);
    if (order_.has_value() && offsets_.has_value()) {
      order = vector(*order_, "order", at::kLong, keys);
      if (index_.has_value()) table = std::max<int64_t>(offsets_->numel(), 1) - 1;
      offsets = vector(*offsets_, "offsets", at::kLong, table + 1);
    }
    cu_seqlens_q = vector(cu_seqlens_q_, "cu_seqlens_q", at::kInt, cu_seqlens_q_.numel());
    cu_seqlens_k = vector(cu_seqlens_k_, "cu_seqlens_k", at::kInt, cu_seqlens_q.numel());
    TORCH_CHECK_VALUE(cu_seqlens_q.numel() > 0, "cu_seqlens_q is empty; pass (B + 1,) bounds");
    samples = cu_seqlens_q.numel() - 1, targets = max_seqlen_q;
    constexpr int64_t kMost = std::numeric_limits<int>::max() / 2;
    TORCH_CHECK_VALUE(keys < kMost && queries * heads < kMost && k_table.size(0) < kMost && table < kMost, "rows hold ", keys, " keys for ", queries,
                      " queries; split the batch below 2**30");
    TORCH_CHECK_VALUE(targets >= 0 && targets <= queries, "max_seqlen_q is ", targets, " of ", queries, " queries");
    if (q_chunk_.has_value()) q_chunk = vector(*q_chunk_, "q_chunk", at::kLong, queries);
    if (weight_.has_value()) check_weight(*weight_);
    softmax = normaliser == "softmax", silu = normaliser == "silu";
    TORCH_CHECK_VALUE(softmax || silu || normaliser == "none", "normaliser is ", normaliser,
                      "; pass softmax, none or silu");
  }

 private:
  Tensor vector(const Tensor& x, const char* name, at::ScalarType type, int64_t size) const {
    TORCH_CHECK_VALUE(x.dim() == 1 && x.scalar_type() == type && x.numel() == size && x.device() == q.device(), name,
                      " is ", x.sizes(), " ", x.dtype(), " on ", x.device(), "; pass ", type, " (", size, ",) on ",
                      q.device());
    return x.contiguous();
  }

  void check_weight(const Tensor& x) {
    const auto wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const int64_t first = q_chunk.defined() ? 1 : 0;
    TORCH_CHECK_VALUE(x.scalar_type() == wide && x.device() == q.device() && (x.dim() == first + 1 || x.dim() == first + 2) &&
                          x.size(first) == keys && (x.dim() == first + 1 || x.size(first + 1) == heads),
                      "weight is ", x.sizes(), " ", x.dtype(), "; pass ", wide, " (K,) or (K, H), with q_chunk (C, K) or "
                      "(C, K, H), K = ", keys, ", H = ", heads);
    weight = x;
    if (first) weight_stride_row = x.stride(0);
    weight_stride_key = x.stride(first);
    weight_stride_head = x.dim() == first + 2 ? x.stride(first + 1) : 0;
  }
};

}  // namespace target_attention
