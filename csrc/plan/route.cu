// Owners of ids, and the stable partition by owner with the rankwise sizes.
#include "sort.cuh"

namespace plan {
namespace {

// Division by a number that is known before the launch: two products where the hardware has no division.
struct Divisor {
  uint64_t by, reciprocal;

  explicit Divisor(int64_t by_) : by(uint64_t(by_)), reciprocal(~uint64_t(0) / by) {}
  __device__ uint64_t quotient(uint64_t x) const {
    const uint64_t q = __umul64hi(x, reciprocal);  // or one less than it should be
    return x - q * by >= by ? q + 1 : q;
  }
  __device__ uint64_t remainder(uint64_t x) const { return x - quotient(x) * by; }
};

struct Permuted {
  Divisor vocab, rows_per_rank;
  int64_t multiplier;

  // Row of the whole table; of ids that it does not have, any.
  __device__ uint64_t row(int64_t id) const {
    const int64_t x = id * multiplier;
    const uint64_t rest = vocab.remainder(x < 0 ? -uint64_t(x) : uint64_t(x));
    return x < 0 && rest > 0 ? vocab.by - rest : rest;
  }
};

template <bool kLocal>
__global__ void __launch_bounds__(kThreads) permuted_kernel(const int64_t* ids, int64_t n, const Permuted rows, int64_t* out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  const uint64_t row = rows.row(ids[i]);
  out[i] = int64_t(kLocal ? rows.rows_per_rank.remainder(row) : rows.rows_per_rank.quotient(row));
}

__global__ void __launch_bounds__(kThreads) hashed_kernel(const int64_t* ids, int64_t n, int64_t ranks, int64_t* out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  uint64_t x = uint64_t(ids[i]);  // splitmix64's finaliser (Steele, Lea, Flood 2014)
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  out[i] = int64_t((x ^ x >> 31) >> 1) % ranks;
}

__global__ void __launch_bounds__(kThreads) keys_kernel(const int64_t* owner, int64_t n, uint32_t* keys, uint32_t* values) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) keys[i] = uint32_t(owner[i]), values[i] = uint32_t(i);
}

__global__ void __launch_bounds__(kThreads) widen_kernel(const uint32_t* values, int64_t n, int64_t* order) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) order[i] = values[i];
}

// Counts are whole numbers, so the order of additions does not matter. Blocks (sample, part): counted in shared memory first.
__global__ void __launch_bounds__(kThreads)
    sizes_kernel(const int64_t* owner, const int64_t* bounds, int64_t samples, int64_t ranks, int64_t* sizes) {
  extern __shared__ unsigned int counts[];
  for (int64_t sample = blockIdx.x; sample < samples; sample += gridDim.x) {
    const int64_t begin = bounds[sample], share = (bounds[sample + 1] - begin + gridDim.y - 1) / gridDim.y;
    const int64_t from = begin + share * blockIdx.y, to = min(from + share, bounds[sample + 1]);
    if (from >= to) continue;
    for (int r = threadIdx.x; r < ranks; r += kThreads) counts[r] = 0;
    __syncthreads();
    for (int64_t i = from + threadIdx.x; i < to; i += kThreads) atomicAdd(counts + owner[i], 1u);
    __syncthreads();
    for (int r = threadIdx.x; r < ranks; r += kThreads)
      if (counts[r] > 0)
        atomicAdd(reinterpret_cast<unsigned long long*>(sizes + r * samples + sample), (unsigned long long)counts[r]);
    __syncthreads();
  }
}

struct Arrays {
  uint32_t *keys, *keys_sorted, *values, *values_sorted;
  void* temporary;
  size_t temporary_bytes, bytes;
  int bits;

  static cudaError_t carve(int64_t n, int64_t ranks, void* workspace, Arrays* arrays) {
    Carver carver{static_cast<char*>(workspace)};
    arrays->keys = carver.take<uint32_t>(n);
    arrays->keys_sorted = carver.take<uint32_t>(n);
    arrays->values = carver.take<uint32_t>(n);
    arrays->values_sorted = carver.take<uint32_t>(n);
    arrays->bits = bit_length(uint64_t(ranks - 1));
    if (arrays->bits == 0) arrays->bits = 1;
    TA_RETURN_IF_ERROR(sort_bytes(n, arrays->bits, &arrays->temporary_bytes));
    arrays->temporary = carver.take<char>(int64_t(arrays->temporary_bytes));
    arrays->bytes = carver.used;
    return cudaSuccess;
  }
};

}  // namespace

cudaError_t owners(const int64_t* ids, int64_t n, int64_t ranks, int64_t vocab, int64_t multiplier, int64_t* out,
                   cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const unsigned blocks = unsigned(ceil_div(n, kThreads));
  if (vocab > 0)
    permuted_kernel<false><<<blocks, kThreads, 0, stream>>>(ids, n, {Divisor(vocab), Divisor(ceil_div(vocab, ranks)), multiplier}, out);
  else
    hashed_kernel<<<blocks, kThreads, 0, stream>>>(ids, n, ranks, out);
  return cudaGetLastError();
}

cudaError_t local_rows(const int64_t* ids, int64_t n, int64_t ranks, int64_t vocab, int64_t multiplier, int64_t* out,
                       cudaStream_t stream) {
  if (n > 0)
    permuted_kernel<true><<<unsigned(ceil_div(n, kThreads)), kThreads, 0, stream>>>(
        ids, n, {Divisor(vocab), Divisor(ceil_div(vocab, ranks)), multiplier}, out);
  return cudaGetLastError();
}

cudaError_t partition_workspace_bytes(int64_t n, int64_t ranks, size_t* bytes) {
  Arrays arrays;
  TA_RETURN_IF_ERROR(Arrays::carve(n, ranks, nullptr, &arrays));
  *bytes = arrays.bytes;
  return cudaSuccess;
}

cudaError_t partition(const int64_t* owner, const int64_t* bounds, int64_t n, int64_t samples, int64_t ranks,
                      int64_t* order, int64_t* rankwise_sizes, void* workspace, cudaStream_t stream) {
  TA_RETURN_IF_ERROR(cudaMemsetAsync(rankwise_sizes, 0, sizeof(int64_t) * ranks * samples, stream));
  if (n == 0 || samples == 0) return cudaSuccess;
  const int64_t wide = samples < 65535 ? samples : 65535, parts = wide >= 1024 ? 1 : 1024 / wide;
  sizes_kernel<<<dim3(unsigned(wide), unsigned(parts)), kThreads, sizeof(unsigned) * ranks, stream>>>(
      owner, bounds, samples, ranks, rankwise_sizes);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  Arrays arrays;
  TA_RETURN_IF_ERROR(Arrays::carve(n, ranks, workspace, &arrays));
  const unsigned blocks = unsigned(ceil_div(n, kThreads));
  keys_kernel<<<blocks, kThreads, 0, stream>>>(owner, n, arrays.keys, arrays.values);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  TA_RETURN_IF_ERROR(sort_pairs(arrays.temporary, arrays.temporary_bytes, arrays.keys, arrays.keys_sorted, arrays.values,
                                arrays.values_sorted, n, arrays.bits, stream));
  widen_kernel<<<blocks, kThreads, 0, stream>>>(arrays.values_sorted, n, order);
  return cudaGetLastError();
}

}  // namespace plan
