// What the kernels on packed rows take: raw device pointers and a stream, nothing of torch. Every call is asynchronous.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace rows {

enum class Type { kFloat, kDouble, kHalf, kBFloat16 };

inline size_t size_of(Type type) { return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2; }

// `members` mapped onto `segments`: index (M), order (M) by segment, ascending within one, offsets (U + 1) in order. Members
// from offsets[U] on belong to none; `index` and `order` may hold anything for them.
struct Segments {
  const int64_t* index;
  const int64_t* order;
  const int64_t* offsets;
  int64_t members, segments;
};

// values (M, width) -> out (U, width). Sums in float, or double for double: sorted members are cut every 4 to 32, as their number
// and the width have it; a segment's parts are summed in ascending order each, then added up. An empty segment gives 0.
size_t sum_workspace_bytes(Type type, const Segments& segments, int64_t width);
cudaError_t sum(Type type, const void* values, const Segments& segments, int64_t width, void* out, void* workspace,
                cudaStream_t stream);

// The same of log-sum-exp, cut elsewhere. An empty segment, or one all -inf, gives -inf.
size_t logsumexp_workspace_bytes(Type type, const Segments& segments, int64_t width);
cudaError_t logsumexp(Type type, const void* values, const Segments& segments, int64_t width, void* out, void* workspace,
                      cudaStream_t stream);

// rows (U, row_bytes) -> out (M, row_bytes), row index[m] for member m.
cudaError_t expand(const void* rows, const int64_t* index, int64_t members, int64_t row_bytes, void* out,
                   cudaStream_t stream);

// N partial results of `queries` (query, head) pairs. Log-sum-exps are double for double, otherwise float.
struct Partials {
  const void* outs;  // (N, queries, dim) of type
  const void* lses;  // (N, queries)
  Type type;
  int64_t count, queries, dim;
};

// -> out (queries, dim), lse (queries). Partials with lse -inf may hold anything. out_type is the partials', or a half type for float.
cudaError_t merge(const Partials& partials, Type out_type, void* out, void* lse, cudaStream_t stream);

// out (queries, dim) and lse (queries) become the merge of themselves and one more partial of the same type.
cudaError_t merge_into(const Partials& other, void* out, void* lse, cudaStream_t stream);

// From grad_out (queries, dim) of out_type, grad_lse and the merged lse (queries) -> grad_outs like outs, grad_lses like lses.
cudaError_t merge_backward(const Partials& partials, Type out_type, const void* grad_out, const void* grad_lse,
                           const void* lse, void* grad_outs, void* grad_lses, cudaStream_t stream);

}  // namespace rows
