// Merging partial attention results by log-sum-exp, and its gradient: every partial is read once.
#include "vector.cuh"

namespace rows {
namespace {

constexpr int kMergeThreads = 256;
constexpr int kMergeAhead = 8;     // partials in flight per thread
constexpr int kBackwardAhead = 1;  // the same where as much is written: there warps keep memory busy, and registers count

template <typename A>
__device__ A merged_lse(const A* lses, int64_t count, int64_t stride) {
  A peak = negative_infinity<A>();
  for (int64_t n = 0; n < count; ++n) peak = lses[n * stride] > peak ? lses[n * stride] : peak;
  A total = 0;
  for (int64_t n = 0; n < count; ++n)
    if (lses[n * stride] != negative_infinity<A>()) total += exponential(lses[n * stride] - peak);  // keeps NaN
  return total == A(0) ? negative_infinity<A>() : peak + logarithm(total);
}

// A partial's share of the result; 0 where it is absent.
template <typename A>
__device__ __forceinline__ A share_of(A lse, A merged) {
  return lse == negative_infinity<A>() ? A(0) : exponential(lse - merged);
}

// The threads of a query take partials in turns: each holds the log-sum-exp of one out of blockDim.x.
template <typename A>
__device__ __forceinline__ A lse_of_mine(const A* lses, int64_t first, int64_t count, int64_t stride) {
  const int64_t n = first + threadIdx.x;
  return n < count ? lses[n * stride] : negative_infinity<A>();
}

// merged_lse by all threads of a query.
template <typename A>
__device__ A merged_lse_across(const A* lses, int64_t count, int64_t stride) {
  A peak = negative_infinity<A>(), total = 0;
#pragma unroll 1
  for (int64_t first = 0; first < count; first += blockDim.x) {
    const A mine = lse_of_mine(lses, first, count, stride);
    peak = mine > peak ? mine : peak;
  }
  for (int d = blockDim.x / 2; d > 0; d /= 2) {
    const A other = __shfl_xor_sync(0xffffffffu, peak, d);
    peak = other > peak ? other : peak;
  }
#pragma unroll 1
  for (int64_t first = 0; first < count; first += blockDim.x) {
    const A mine = lse_of_mine(lses, first, count, stride);
    if (mine != negative_infinity<A>()) total += exponential(mine - peak);  // keeps NaN
  }
  for (int d = blockDim.x / 2; d > 0; d /= 2) total += __shfl_xor_sync(0xffffffffu, total, d);
  return total == A(0) ? negative_infinity<A>() : peak + logarithm(total);
}

// Shares of kCount partials from the `from`-th of those that the query's threads hold; 0 past the last.
template <int kCount, typename A>
__device__ __forceinline__ void shares_from(A mine, int from, A (&share)[kCount]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const A x = __shfl_sync(0xffffffffu, mine, from + j, blockDim.x);
    share[j] = from + j < blockDim.x ? x : A(0);
  }
}

// A vector of each of kCount partials from the n-th, all under way at once. Where one has no share, the row before is read again,
// at first partial 0's: no load depends on a condition.
template <int kCount, typename T, typename A, int kVector>
__device__ __forceinline__ void load_rows(Vector<T, kVector> (&x)[kCount], const A (&share)[kCount], const T* from,
                                          int64_t n, int64_t stride, int64_t& row) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    row = share[j] != A(0) ? n + j : row;
    x[j] = *reinterpret_cast<const Vector<T, kVector>*>(from + row * stride);
  }
  asm volatile("" ::: "memory");  // or each load moves to where it is used
}

template <typename T, typename O, typename A, int kVector>
__global__ void __launch_bounds__(kMergeThreads, 4)
    merge_kernel(const T* outs, const A* lses, int64_t count, int64_t queries, int64_t dim, O* out, A* lse) {
  int64_t query = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool inside = query < queries;  // every thread of a warp takes part in its shuffles
  if (!inside) query = queries - 1;
  const A merged = merged_lse_across(lses + query, count, queries);
  if (inside && threadIdx.x == 0) lse[query] = merged;
  for (int64_t start = 0; start < dim; start += blockDim.x * kVector) {
    const int64_t d = start + threadIdx.x * kVector;
    const T* from_column = outs + query * dim + (d < dim ? d : 0);
    A total[kVector] = {};
    int64_t row = 0;
#pragma unroll 1
    for (int64_t first = 0; first < count; first += blockDim.x) {
      const A mine = share_of(lse_of_mine(lses + query, first, count, queries), merged);
#pragma unroll 1
      for (int from = 0; from < blockDim.x && first + from < count; from += kMergeAhead) {
        A share[kMergeAhead];
        Vector<T, kVector> x[kMergeAhead];
        shares_from(mine, from, share);
        load_rows(x, share, from_column, first + from, queries * dim, row);
#pragma unroll
        for (int j = 0; j < kMergeAhead; ++j)
          if (share[j] != A(0))  // an absent partial may hold anything
#pragma unroll
            for (int i = 0; i < kVector; ++i) total[i] += share[j] * convert<A>(x[j].at[i]);
      }
    }
    Vector<O, kVector> result;
#pragma unroll
    for (int i = 0; i < kVector; ++i) result.at[i] = convert<O>(total[i]);
    if (inside && d < dim) *reinterpret_cast<Vector<O, kVector>*>(out + query * dim + d) = result;
  }
}

// The share of what is added is w, so that out = (1 - w) out + w other; where one is absent, the other stands as it is.
template <typename T, typename A, int kVector>
__global__ void __launch_bounds__(kMergeThreads)
    merge_into_kernel(const T* other, const A* other_lse, int64_t queries, int64_t dim, T* out, A* lse) {
  const int64_t query = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  A merged{}, kept{}, added{};
  if (query < queries) {
    const A both[2] = {lse[query], other_lse[query]};
    merged = merged_lse(both, 2, 1);
    kept = share_of(both[0], merged);
    added = share_of(both[1], merged);
  }
  __syncthreads();  // the threads of a query have all read its lse
  if (query >= queries || added == A(0)) return;
  if (threadIdx.x == 0) lse[query] = merged;
  for (int64_t d = threadIdx.x * kVector; d < dim; d += blockDim.x * kVector) {
    const auto x = *reinterpret_cast<const Vector<T, kVector>*>(other + query * dim + d);
    auto* at = reinterpret_cast<Vector<T, kVector>*>(out + query * dim + d);
    Vector<T, kVector> result = *at;
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      result.at[i] =
          convert<T>((kept == A(0) ? A(0) : kept * convert<A>(result.at[i])) + added * convert<A>(x.at[i]));
    *at = result;
  }
}

// d outs_n = share_n dout;  d lse_n = share_n (dout . outs_n - sum_m share_m dout . outs_m + dlse)
template <typename T, typename O, typename A, int kVector>
__global__ void __launch_bounds__(kMergeThreads)
    merge_backward_kernel(const T* outs, const A* lses, int64_t count, int64_t queries, int64_t dim, const O* grad_out,
                          const A* grad_lse, const A* lse, T* grad_outs, A* grad_lses) {
  int64_t query = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool inside = query < queries;  // every thread of a warp takes part in its shuffles
  if (!inside) query = queries - 1;
  const A merged = lse[query];
  A mean = 0;
  for (int64_t first = 0; first < count; first += blockDim.x) {
    const A mine = share_of(lse_of_mine(lses + query, first, count, queries), merged);
    A my_dot = 0;
    for (int from = 0; from < blockDim.x && first + from < count; from += kBackwardAhead) {
      A share[kBackwardAhead], dot[kBackwardAhead] = {};
      shares_from(mine, from, share);
      for (int64_t d = threadIdx.x * kVector; d < dim; d += blockDim.x * kVector) {
        const auto at = [&](int j) { return ((first + from + j) * queries + query) * dim + d; };
        const auto g = *reinterpret_cast<const Vector<O, kVector>*>(grad_out + query * dim + d);
        Vector<T, kVector> x[kBackwardAhead] = {}, result;
#pragma unroll
        for (int j = 0; j < kBackwardAhead; ++j)
          if (share[j] != A(0)) x[j] = *reinterpret_cast<const Vector<T, kVector>*>(outs + at(j));
#pragma unroll
        for (int j = 0; j < kBackwardAhead; ++j) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            dot[j] += convert<A>(g.at[i]) * convert<A>(x[j].at[i]);
            result.at[i] = convert<T>(share[j] == A(0) ? A(0) : share[j] * convert<A>(g.at[i]));
          }
          if (inside && from + j < blockDim.x && first + from + j < count)
            *reinterpret_cast<Vector<T, kVector>*>(grad_outs + at(j)) = result;
        }
      }
#pragma unroll
      for (int j = 0; j < kBackwardAhead; ++j) {
        for (int other = blockDim.x / 2; other > 0; other /= 2) dot[j] += __shfl_xor_sync(0xffffffffu, dot[j], other);
        if (share[j] != A(0)) mean += share[j] * dot[j];
        if (threadIdx.x == from + j) my_dot = dot[j];
      }
    }
    const int64_t n = first + threadIdx.x;
    if (inside && n < count) grad_lses[n * queries + query] = my_dot;
  }
  if (!inside) return;
  for (int64_t n = threadIdx.x; n < count; n += blockDim.x) {  // its own dots
    const int64_t at = n * queries + query;
    const A share = share_of(lses[at], merged);
    grad_lses[at] = share == A(0) ? A(0) : share * (grad_lses[at] - mean + grad_lse[query]);
  }
}

template <typename T, typename O, typename A, int kVector>
struct Launch {
  const Partials& p;
  cudaStream_t stream;
  dim3 threads() const {
    const int lanes = lanes_for(p.dim / kVector);
    return dim3(lanes, kMergeThreads / lanes);
  }
  unsigned blocks() const { return unsigned(ceil_div(p.queries, threads().y)); }
  const T* outs() const { return static_cast<const T*>(p.outs); }
  const A* lses() const { return static_cast<const A*>(p.lses); }

  cudaError_t forward(void* out, void* lse) const {
    merge_kernel<T, O, A, kVector><<<blocks(), threads(), 0, stream>>>(outs(), lses(), p.count, p.queries, p.dim,
                                                                       static_cast<O*>(out), static_cast<A*>(lse));
    return cudaGetLastError();
  }
  cudaError_t into(void* out, void* lse) const {
    merge_into_kernel<T, A, kVector><<<blocks(), threads(), 0, stream>>>(outs(), lses(), p.queries, p.dim,
                                                                         static_cast<T*>(out), static_cast<A*>(lse));
    return cudaGetLastError();
  }
  cudaError_t backward(const void* grad_out, const void* grad_lse, const void* lse, void* grad_outs,
                       void* grad_lses) const {
    merge_backward_kernel<T, O, A, kVector><<<blocks(), threads(), 0, stream>>>(
        outs(), lses(), p.count, p.queries, p.dim, static_cast<const O*>(grad_out), static_cast<const A*>(grad_lse),
        static_cast<const A*>(lse), static_cast<T*>(grad_outs), static_cast<A*>(grad_lses));
    return cudaGetLastError();
  }
};

// Calls run(Launch) for the types of the partials and of the result, with the widest vectors their addresses allow.
template <typename T, typename O, typename A, int kVector = 16 / int(sizeof(T)), class Run>
cudaError_t with_vectors(const Partials& p, std::initializer_list<int64_t> addresses, cudaStream_t stream, Run run) {
  constexpr int64_t kBytes = kVector * int64_t(std::max(sizeof(T), sizeof(O)));
  if constexpr (kVector > 1)
    if (p.dim % kVector != 0 || !divides(kBytes, addresses))
      return with_vectors<T, O, A, kVector == 8 ? 4 : 1>(p, addresses, stream, run);
  return run(Launch<T, O, A, kVector>{p, stream});
}

template <class Run>
cudaError_t with_types(const Partials& p, Type result, std::initializer_list<int64_t> addresses, cudaStream_t stream,
                       Run run) {
  if (p.queries == 0) return cudaSuccess;
  if (p.type == Type::kDouble && result == Type::kDouble)
    return with_vectors<double, double, double>(p, addresses, stream, run);
  if (p.type == Type::kHalf && result == Type::kHalf)
    return with_vectors<__half, __half, float>(p, addresses, stream, run);
  if (p.type == Type::kBFloat16 && result == Type::kBFloat16)
    return with_vectors<__nv_bfloat16, __nv_bfloat16, float>(p, addresses, stream, run);
  if (p.type != Type::kFloat) return cudaErrorInvalidValue;
  if (result == Type::kFloat) return with_vectors<float, float, float>(p, addresses, stream, run);
  if (result == Type::kHalf) return with_vectors<float, __half, float>(p, addresses, stream, run);
  if (result == Type::kBFloat16) return with_vectors<float, __nv_bfloat16, float>(p, addresses, stream, run);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t merge(const Partials& p, Type out_type, void* out, void* lse, cudaStream_t stream) {
  return with_types(p, out_type, {address(p.outs), address(out)}, stream,
                    [=](const auto& launch) { return launch.forward(out, lse); });
}

cudaError_t merge_into(const Partials& p, void* out, void* lse, cudaStream_t stream) {
  if (p.count != 1) return cudaErrorInvalidValue;
  return with_types(p, p.type, {address(p.outs), address(out)}, stream,
                    [=](const auto& launch) { return launch.into(out, lse); });
}

cudaError_t merge_backward(const Partials& p, Type grad_type, const void* grad_out, const void* grad_lse,
                           const void* lse, void* grad_outs, void* grad_lses, cudaStream_t stream) {
  return with_types(p, grad_type, {address(p.outs), address(grad_out), address(grad_outs)}, stream,
                    [=](const auto& launch) { return launch.backward(grad_out, grad_lse, lse, grad_outs, grad_lses); });
}

}  // namespace rows
