// Owners of ids, and the stable partition by owner with the rankwise sizes.
#include "sort.cuh"

namespace plan {
namespace {

// Division by a number that is known before the launch: two products where the hardware has no division.
struct Divisor {
  uint64_t by, reciprocal;

  explicit Divisor(int64_t by_) : by(uint64_t(by_)), reciprocal(~uint64_t(0) / by) {}
  __device__ int64_t quotient(uint64_t x) const {
    const uint64_t q = __umul64hi(x, reciprocal);  // or one less than it should be
    return int64_t(x - q * by >= by ? q + 1 : q);
  }
  __device__ int64_t remainder(uint64_t x) const { return int64_t(x - quotient(x) * by); }
};

// The shard that holds an id's row; none holds an id outside the vocabulary.
struct Owner {
  Divisor rows_per_rank;
  __device__ int64_t operator()(int64_t row) const { return row < 0 ? -1 : rows_per_rank.quotient(row); }
};

// An id's row in the shard of rows first to first + held; `other` where that shard does not hold it.
struct LocalRow {
  int64_t first, held, other;
  __device__ int64_t operator()(int64_t row) const {
    return row >= first && row - first < held ? row - first : other;
  }
};

// What `place` makes of each id's row in the whole table; -1 is that of ids outside the vocabulary.
template <typename Place>
__global__ void __launch_bounds__(kThreads) permuted_kernel(const int64_t* ids, int64_t n, Divisor vocab, int64_t multiplier,
                                                            Place place, int64_t* out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  const int64_t id = ids[i];
  out[i] = place(uint64_t(id) < vocab.by ? vocab.remainder(id * multiplier) : -1);
}

template <typename Place>
cudaError_t permuted(const int64_t* ids, int64_t n, int64_t vocab, int64_t multiplier, Place place, int64_t* out,
                     cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  permuted_kernel<<<unsigned(ceil_div(n, kThreads)), kThreads, 0, stream>>>(ids, n, Divisor(vocab), multiplier, place, out);
  return cudaGetLastError();
}

__global__ void __launch_bounds__(kThreads) hashed_kernel(const int64_t* ids, int64_t n, int64_t ranks, int64_t* out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  uint64_t x = uint64_t(ids[i]);  // splitmix64's finaliser (Steele, Lea, Flood 2014)
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  out[i] = int64_t((x ^ x >> 31) >> 1) % ranks;
}

__device__ bool is_rank(int64_t owner, int64_t ranks) { return owner >= 0 && owner < ranks; }

// Items without an owner are sorted behind all others.
__global__ void __launch_bounds__(kThreads)
    keys_kernel(const int64_t* owner, int64_t n, int64_t ranks, uint32_t* keys, uint32_t* values) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) keys[i] = uint32_t(is_rank(owner[i], ranks) ? owner[i] : ranks), values[i] = uint32_t(i);
}

__global__ void __launch_bounds__(kThreads) widen_kernel(const uint32_t* values, int64_t n, int64_t* order) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) order[i] = values[i];
}

// Counts are whole numbers, so the order of additions does not matter. Blocks (sample, part): counted in shared memory first.
// A sample with an item that nobody owns gets the sign bit in all its sizes, which no addition takes away.
__global__ void __launch_bounds__(kThreads)
    sizes_kernel(const int64_t* owner, const int64_t* bounds, int64_t samples, int64_t ranks, int64_t* sizes) {
  extern __shared__ unsigned int counts[];
  for (int64_t sample = blockIdx.x; sample < samples; sample += gridDim.x) {
    const int64_t begin = bounds[sample], share = (bounds[sample + 1] - begin + gridDim.y - 1) / gridDim.y;
    const int64_t from = begin + share * blockIdx.y, to = min(from + share, bounds[sample + 1]);
    if (from >= to) continue;
    for (int r = threadIdx.x; r < ranks; r += kThreads) counts[r] = 0;
    __syncthreads();
    for (int64_t i = from + threadIdx.x; i < to; i += kThreads) {
      if (is_rank(owner[i], ranks)) {
        atomicAdd(counts + owner[i], 1u);
        continue;
      }
      for (int64_t r = 0; r < ranks; ++r)
        atomicOr(reinterpret_cast<unsigned long long*>(sizes + r * samples + sample), 1ull << 63);
    }
    __syncthreads();
    for (int r = threadIdx.x; r < ranks; r += kThreads)
      if (counts[r] > 0)
        atomicAdd(reinterpret_cast<unsigned long long*>(sizes + r * samples + sample), (unsigned long long)counts[r]);
    __syncthreads();
  }
}

cudaError_t carve(int64_t n, int64_t ranks, void* workspace, Pairs* pairs, size_t* bytes) {
  Carver carver{static_cast<char*>(workspace)};
  TA_RETURN_IF_ERROR(Pairs::carve(carver, n, bit_length(uint64_t(ranks)), pairs));
  *bytes = carver.used;
  return cudaSuccess;
}

}  // namespace

cudaError_t owners(const int64_t* ids, int64_t n, int64_t ranks, int64_t vocab, int64_t multiplier, int64_t* out,
                   cudaStream_t stream) {
  if (vocab > 0) return permuted(ids, n, vocab, multiplier, Owner{Divisor(ceil_div(vocab, ranks))}, out, stream);
  if (n == 0) return cudaSuccess;
  hashed_kernel<<<unsigned(ceil_div(n, kThreads)), kThreads, 0, stream>>>(ids, n, ranks, out);
  return cudaGetLastError();
}

cudaError_t local_rows(const int64_t* ids, int64_t n, int64_t first, int64_t held, int64_t vocab, int64_t multiplier,
                       int64_t other, int64_t* out, cudaStream_t stream) {
  return permuted(ids, n, vocab, multiplier, LocalRow{first, held, other}, out, stream);
}

cudaError_t partition_workspace_bytes(int64_t n, int64_t ranks, size_t* bytes) {
  Pairs pairs;
  return carve(n, ranks, nullptr, &pairs, bytes);
}

cudaError_t partition(const int64_t* owner, const int64_t* bounds, int64_t n, int64_t samples, int64_t ranks,
                      int64_t* order, int64_t* rankwise_sizes, void* workspace, cudaStream_t stream) {
  TA_RETURN_IF_ERROR(cudaMemsetAsync(rankwise_sizes, 0, sizeof(int64_t) * ranks * samples, stream));
  if (n == 0 || samples == 0) return cudaSuccess;
  const int64_t wide = samples < 65535 ? samples : 65535, parts = wide >= 1024 ? 1 : 1024 / wide;
  sizes_kernel<<<dim3(unsigned(wide), unsigned(parts)), kThreads, sizeof(unsigned) * ranks, stream>>>(
      owner, bounds, samples, ranks, rankwise_sizes);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  Pairs pairs;
  size_t bytes;
  TA_RETURN_IF_ERROR(carve(n, ranks, workspace, &pairs, &bytes));
  const unsigned blocks = unsigned(ceil_div(n, kThreads));
  keys_kernel<<<blocks, kThreads, 0, stream>>>(owner, n, ranks, pairs.keys, pairs.values);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  TA_RETURN_IF_ERROR(pairs.sort(stream));
  widen_kernel<<<blocks, kThreads, 0, stream>>>(pairs.values_sorted, n, order);
  return cudaGetLastError();
}

}  // namespace plan
