// Target attention on the CPU: a thread takes samples, then table rows; every sum in one order.
// Schema, gradient and the same in torch: ta_plugin/ops/target.py.

#include "../target_attention/arguments.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

namespace {

using target_attention::Arguments;
using at::Tensor;

// Everything a sample's loops read. acc_t: float, or double for double.
template <class T>
struct Call {
  using acc_t = at::opmath_type<T>;
  const Arguments& a;
  const acc_t scale;
  const T *q, *k, *v;
  const int64_t* rows;
  const int *cu_q, *cu_k;
  const acc_t* weight;
  const int64_t* q_chunk;

  Call(const Arguments& a, double scale)
      : a(a), scale(acc_t(scale)), q(a.q.const_data_ptr<T>()), k(a.k_table.const_data_ptr<T>()),
        v(a.one_table() ? k : a.v_table.const_data_ptr<T>()), rows(a.rows.const_data_ptr<int64_t>()),
        cu_q(a.cu_seqlens_q.const_data_ptr<int>()), cu_k(a.cu_seqlens_k.const_data_ptr<int>()),
        weight(a.weight.defined() ? a.weight.const_data_ptr<acc_t>() : nullptr),
        q_chunk(a.q_chunk.defined() ? a.q_chunk.const_data_ptr<int64_t>() : nullptr) {
    for (int64_t i = 0; i < a.keys; ++i)
      TORCH_CHECK_INDEX(rows[i] >= 0 && rows[i] < a.k_table.size(0), "rows[", i, "] is ", rows[i], " of ",
                        a.k_table.size(0), " table rows");
    for (int64_t b = 0; b < a.samples; ++b)
      TORCH_CHECK_INDEX(cu_q[b + 1] >= cu_q[b] && cu_q[b + 1] <= a.queries && cu_k[b + 1] >= cu_k[b] &&
                            cu_k[b + 1] <= a.keys && cu_q[b + 1] - cu_q[b] <= a.targets,
                        "cu_seqlens_q and cu_seqlens_k bound sample ", b, " by ", cu_q[b], ":", cu_q[b + 1], " and ",
                        cu_k[b], ":", cu_k[b + 1], "; they must rise to ", a.queries, " and ", a.keys, ", at most ",
                        a.targets, " queries a sample");
  }

  int64_t table_row(int64_t key, int64_t head) const { return (rows[key] * a.heads_kv + head / a.share()) * a.head_dim; }
  acc_t weight_of(int64_t query, int64_t key, int64_t head) const {
    if (weight == nullptr) return a.softmax ? 0 : 1;
    const int64_t row = q_chunk == nullptr ? 0 : q_chunk[query];
    return weight[row * a.weight_stride_row + key * a.weight_stride_key + head * a.weight_stride_head];
  }
  acc_t dot(const T* x, const T* y) const {
    acc_t sum = 0;
    for (int64_t d = 0; d < a.head_dim; ++d) sum += acc_t(x[d]) * acc_t(y[d]);
    return sum;
  }
  acc_t activate(acc_t x) const { return a.silu ? x / (1 + std::exp(-x)) : x; }
  acc_t slope(acc_t x) const {
    if (!a.silu) return 1;
    const acc_t gate = 1 / (1 + std::exp(-x));
    return gate * (1 + x * (1 - gate));
  }
  bool absent(acc_t w) const { return a.softmax && w == -std::numeric_limits<acc_t>::infinity(); }
};

template <class T>
void forward_sample(const Call<T>& call, int64_t b, T* out, at::opmath_type<T>* lse) {
  using acc_t = at::opmath_type<T>;
  constexpr acc_t kInfinity = std::numeric_limits<acc_t>::infinity();
  const Arguments& a = call.a;
  const int64_t first = call.cu_k[b], keys = call.cu_k[b + 1] - first, width = a.head_dim;
  std::vector<acc_t> p(keys), sum(width);
  for (int64_t i = call.cu_q[b]; i < call.cu_q[b + 1]; ++i)
    for (int64_t h = 0; h < a.heads; ++h) {
      acc_t peak = -kInfinity, total = 0;
      for (int64_t u = 0; u < keys; ++u) {
        const acc_t w = call.weight_of(i, first + u, h);
        if (call.absent(w)) {
          p[u] = -kInfinity;
          continue;
        }
        const acc_t s = call.scale * call.dot(call.q + (i * a.heads + h) * width, call.k + call.table_row(first + u, h));
        p[u] = a.softmax ? s + w : w * call.activate(s);
        if (p[u] > peak) peak = p[u];
      }
      std::fill(sum.begin(), sum.end(), acc_t(0));
      for (int64_t u = 0; u < keys; ++u) {
        if (a.softmax && p[u] == -kInfinity) continue;
        const acc_t share = a.softmax ? std::exp(p[u] - (peak == -kInfinity ? 0 : peak)) : p[u];
        total += share;
        const T* value = call.v + call.table_row(first + u, h);
        for (int64_t d = 0; d < width; ++d) sum[d] += share * acc_t(value[d]);
      }
      const acc_t divisor = a.softmax && total != 0 ? total : 1;
      for (int64_t d = 0; d < width; ++d) out[(i * a.heads + h) * width + d] = T(sum[d] / divisor);
      if (a.softmax) lse[i * a.heads + h] = total == 0 ? -kInfinity : peak + std::log(total);
    }
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k_table, const std::optional<Tensor>& v_table,
                                   const Tensor& rows, const std::optional<Tensor>& index,
                                   const std::optional<Tensor>& order, const std::optional<Tensor>& offsets,
                                   const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                   const std::optional<Tensor>& weight, const std::optional<Tensor>& q_chunk,
                                   int64_t max_seqlen_q, double scale, c10::string_view normaliser) {
  const Arguments a(q, k_table, v_table, rows, index, order, offsets, cu_seqlens_q, cu_seqlens_k, weight, q_chunk, max_seqlen_q,
                    normaliser);
  const auto wide = a.q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  Tensor out = at::zeros_like(a.q), lse = at::empty({a.softmax ? a.queries : 0, a.heads}, a.q.options().dtype(wide));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, a.q.scalar_type(), "target_attention", [&] {
    const Call<scalar_t> call(a, scale);
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    auto* lse_to = lse.mutable_data_ptr<at::opmath_type<scalar_t>>();
    at::parallel_for(0, a.samples, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) forward_sample(call, b, to, lse_to);
    });
  });
  return {out, lse};
}

// What every pair gives: its coefficient in the values' gradient, and in those of keys and queries. A sample's pairs begin at
// key * targets * heads, as those of dweight.
template <class acc_t>
struct Pairs {
  acc_t *p, *ds, *dw;  // (keys, targets, heads)
};

template <class T>
void backward_sample(const Call<T>& call, int64_t b, const T* dout, const at::opmath_type<T>* dlse, const T* out,
                     const at::opmath_type<T>* lse, T* dq, const Pairs<at::opmath_type<T>>& pairs) {
  using acc_t = at::opmath_type<T>;
  const Arguments& a = call.a;
  const int64_t width = a.head_dim;
  std::vector<acc_t> sum(width);
  for (int64_t i = call.cu_q[b]; i < call.cu_q[b + 1]; ++i)
    for (int64_t h = 0; h < a.heads; ++h) {
      const int64_t at = i * a.heads + h;
      acc_t delta = 0;
      if (a.softmax) {
        for (int64_t d = 0; d < width; ++d) delta += acc_t(dout[at * width + d]) * acc_t(out[at * width + d]);
        if (dlse != nullptr) delta -= dlse[at];
      }
      std::fill(sum.begin(), sum.end(), acc_t(0));
      for (int64_t key = call.cu_k[b]; key < call.cu_k[b + 1]; ++key) {
        const acc_t w = call.weight_of(i, key, h);
        if (call.absent(w)) continue;
        const T* row = call.k + call.table_row(key, h);
        const acc_t x = call.scale * call.dot(call.q + at * width, row);
        const acc_t dp = call.dot(dout + at * width, call.v + call.table_row(key, h));
        const acc_t p = a.softmax ? std::exp(x + w - lse[at]) : w * call.activate(x);
        const acc_t ds = a.softmax ? p * (dp - delta) : w * call.slope(x) * dp;
        const int64_t pair = (key * a.targets + i - call.cu_q[b]) * a.heads + h;
        pairs.p[pair] = p, pairs.ds[pair] = ds * call.scale;
        if (pairs.dw != nullptr) pairs.dw[pair] = a.softmax ? ds : call.activate(x) * dp;
        for (int64_t d = 0; d < width; ++d) sum[d] += ds * call.scale * acc_t(row[d]);
      }
      for (int64_t d = 0; d < width; ++d) dq[at * width + d] = T(sum[d]);
    }
}

// The gradient of one table row: over its members, their sample's queries and the heads of each group.
template <class T>
void backward_row(const Call<T>& call, int64_t row, const int64_t* sample, const T* dout,
                  const Pairs<at::opmath_type<T>>& pairs, T* dk, T* dv) {
  using acc_t = at::opmath_type<T>;
  const Arguments& a = call.a;
  const int64_t *order = a.order.const_data_ptr<int64_t>(), *offsets = a.offsets.const_data_ptr<int64_t>();
  const int64_t width = a.head_dim;
  std::vector<acc_t> through_scores(a.heads_kv * width), through_values(a.heads_kv * width);
  for (int64_t member = offsets[row]; member < offsets[row + 1]; ++member) {
    const int64_t key = order[member], b = sample[key];
    for (int64_t i = call.cu_q[b]; i < call.cu_q[b + 1]; ++i)
      for (int64_t h = 0; h < a.heads; ++h) {
        const int64_t at = (i * a.heads + h) * width, pair = (key * a.targets + i - call.cu_q[b]) * a.heads + h;
        const int64_t to = h / a.share() * width;
        const acc_t p = pairs.p[pair], ds = pairs.ds[pair];
        if (p == 0 && ds == 0) continue;  // absent
        for (int64_t d = 0; d < width; ++d) {
          through_scores[to + d] += ds * acc_t(call.q[at + d]);
          through_values[to + d] += p * acc_t(dout[at + d]);
        }
      }
  }
  for (int64_t d = 0; d < a.heads_kv * width; ++d) {
    const int64_t at = row * a.heads_kv * width + d;
    dk[at] = T(through_scores[d] + (a.one_table() ? through_values[d] : acc_t(0)));
    if (!a.one_table()) dv[at] = T(through_values[d]);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dout_, const std::optional<Tensor>& dlse_, const Tensor& q, const Tensor& k_table,
    const std::optional<Tensor>& v_table, const Tensor& rows, const std::optional<Tensor>& index,
    const std::optional<Tensor>& order, const std::optional<Tensor>& offsets,
    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& q_chunk, int64_t max_seqlen_q, double scale, c10::string_view normaliser,
    const Tensor& out_, const Tensor& lse_, bool need_dweight, int64_t /*sums*/) {
  const Arguments a(q, k_table, v_table, rows, index, order, offsets, cu_seqlens_q, cu_seqlens_k, weight, q_chunk, max_seqlen_q,
                    normaliser);
  TORCH_CHECK_VALUE(a.order.defined(), "order and offsets are None; backward takes both");
  TORCH_CHECK_VALUE(dout_.sizes() == a.q.sizes() && out_.sizes() == a.q.sizes(), "dout is ", dout_.sizes(), "; pass ",
                    a.q.sizes());
  const Tensor dout = dout_.contiguous(), out = out_.contiguous(), lse = lse_.contiguous();
  const Tensor dlse = a.softmax && dlse_.has_value() ? dlse_->contiguous() : Tensor();
  const auto wide = lse.options();
  Tensor dq = at::zeros_like(a.q), dk = at::empty({a.table, a.heads_kv, a.head_dim}, a.q.options());
  Tensor dv = a.one_table() ? at::empty({0}, a.q.options()) : at::empty_like(dk);
  const std::vector<int64_t> shape{a.keys, a.targets, a.heads};
  Tensor p = at::zeros(shape, wide), ds = at::zeros(shape, wide);
  Tensor dw = need_dweight ? at::zeros(shape, wide) : at::empty({0}, wide);
  std::vector<int64_t> sample(a.keys);  // of each key; keys behind all samples are members of no row
  for (int64_t b = 0; b < a.samples; ++b) {
    const int* bounds = a.cu_seqlens_k.const_data_ptr<int>() + b;
    std::fill(sample.begin() + bounds[0], sample.begin() + bounds[1], b);
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, a.q.scalar_type(), "target_attention_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const Call<scalar_t> call(a, scale);
    const Pairs<acc_t> pairs{p.mutable_data_ptr<acc_t>(), ds.mutable_data_ptr<acc_t>(),
                             need_dweight ? dw.mutable_data_ptr<acc_t>() : nullptr};
    const scalar_t* dout_at = dout.const_data_ptr<scalar_t>();
    const acc_t* dlse_at = dlse.defined() ? dlse.const_data_ptr<acc_t>() : nullptr;
    at::parallel_for(0, a.samples, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        backward_sample(call, b, dout_at, dlse_at, out.const_data_ptr<scalar_t>(), lse.const_data_ptr<acc_t>(),
                        dq.mutable_data_ptr<scalar_t>(), pairs);
    });
    at::parallel_for(0, a.table, 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        backward_row(call, row, sample.data(), dout_at, pairs, dk.mutable_data_ptr<scalar_t>(),
                     dv.mutable_data_ptr<scalar_t>());
    });
  });
  return {dq, dk, dv, dw, at::empty({0}, a.q.options().dtype(at::kByte))};
}

}  // namespace

TORCH_LIBRARY_IMPL(ta_plugin, CPU, m) {
  m.impl("target_attention", forward);
  m.impl("target_attention_backward", backward);
}
