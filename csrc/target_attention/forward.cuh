// Forward: a block takes one chunk of a sample's keys and up to kRows query rows; each warp keeps its own softmax state over the
// tiles it reads, and the states merge in warp order, then in chunk order.
#pragma once

#include "mma.cuh"
#include "scalar.cuh"

namespace target_attention {

struct ForwardParameters {
  Problem p;
  Chunks chunks;
  int row_slots;      // query rows a chunk has room for: targets * heads / heads_kv
  void* out;
  float* lse;
  float* partial_out;   // (slots, heads_kv, row_slots, head_dim): not normalised, relative to the peak
  float2* partial_lse;  // (slots, heads_kv, row_slots): peak to base 2, and sum

  __device__ int64_t partial(int slot, int head_kv, int row) const {
    return (int64_t(slot) * p.heads_kv + head_kv) * row_slots + row;
  }
};

__device__ __forceinline__ float activate(float x, Normaliser normaliser) {
  return normaliser == Normaliser::kSilu ? x / (1.f + __expf(-x)) : x;
}

// exp2(from - to) where both may be -inf: what a sum relative to `from` is worth relative to `to`. A NaN stays one.
__device__ __forceinline__ float rescale(float from, float to) {
  return to == -CUDART_INF_F && from == from ? 0.f : exp2f(from - to);
}

// State of a warp on tensor cores: kGroups x 16 query rows.
template <typename T, int kDim, int kGroups, bool kOneTable>
class MmaForward {
 public:
  using Shape = TileShape<T, kDim, kDim*(kOneTable ? 1 : 2) <= 128 ? 32 : 16, kDim * kGroups <= 128 ? 3 : 2, kOneTable>;
  static constexpr int kRows = 16 * kGroups, kBlocks = 2;

  __device__ MmaForward(const Problem& p, const QueryRows& rows, int first, const T* q)
      : p_(p), q_(q), weights_(p, rows, first) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int half = 0; half < 2; ++half) peak_[g][half] = -CUDART_INF_F, total_[g][half] = 0.f;
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) out_[g][d][i] = 0.f;
    }
  }

  __device__ void consume(typename Shape::Stage& stage, int key, int keys_left) {
    float s[kGroups][Shape::kTile / 8][4];
    score<Shape, kGroups>(s, q_, stage.k());
    if (p_.normaliser == Normaliser::kSoftmax)
      softmax(s, stage, key, keys_left);
    else
      pointwise(s, stage, key, keys_left);
    accumulate<Shape, kGroups>(out_, s, stage.v());
  }

  // Sums and peaks of rows to shared memory: out (kRows, kDim), peak and total (kRows,).
  __device__ void store(float* out, float* peak, float* total) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = quad_sum(total_[g][half]);
        const int row = g * 16 + row_of(2 * half);
        if (lane % 4 == 0) peak[row] = peak_[g][half], total[row] = sum;
      }
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<float2*>(out + (g * 16 + row_of(2 * half)) * kDim + column_of(d, 0)) =
              make_float2(out_[g][d][2 * half], out_[g][d][2 * half + 1]);
    }
  }

 private:
  __device__ void softmax(float (&s)[kGroups][Shape::kTile / 8][4], typename Shape::Stage& stage, int key,
                          int keys_left) {
    const float scale = p_.scale * kLog2e;
    uint32_t absent = ~0u;
    float peak[kGroups][2];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      peak[g][0] = peak_[g][0], peak[g][1] = peak_[g][1];
#pragma unroll
      for (int n = 0; n < Shape::kTile / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float w = weights_(stage, key, keys_left, g, n, i);
          if (w != -CUDART_INF_F) absent &= ~(1u << (n * 2 + i % 2));
          s[g][n][i] = w == -CUDART_INF_F ? w : s[g][n][i] * scale + w * kLog2e;
          peak[g][i / 2] = fmaxf(peak[g][i / 2], s[g][n][i]);
        }
    }
    if (weights_.per_pair()) weights_.clear_absent(stage, absent);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float now = quad_max(peak[g][half]);
        const float shrink = rescale(peak_[g][half], now);
        if (now != peak_[g][half]) {
          total_[g][half] *= shrink;
#pragma unroll
          for (int d = 0; d < kDim / 8; ++d) out_[g][d][2 * half] *= shrink, out_[g][d][2 * half + 1] *= shrink;
        }
        peak_[g][half] = now;
      }
#pragma unroll
      for (int n = 0; n < Shape::kTile / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[g][n][i] = rescale(s[g][n][i], peak_[g][i / 2]);
          total_[g][i / 2] += s[g][n][i];
        }
    }
  }

  __device__ void pointwise(float (&s)[kGroups][Shape::kTile / 8][4], const typename Shape::Stage& stage, int key,
                            int keys_left) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll
      for (int n = 0; n < Shape::kTile / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          s[g][n][i] = weights_(stage, key, keys_left, g, n, i) * activate(s[g][n][i] * p_.scale, p_.normaliser);
  }

  const Problem& p_;
  const T* q_;
  PairWeights<Shape, kGroups> weights_;
  float out_[kGroups][kDim / 8][4], peak_[kGroups][2], total_[kGroups][2];
};

// State of a warp on scalar units, for float32: a key to two lanes when scoring, a slice of the columns to each when adding.
template <int kDim, int kRows_, bool kOneTable>
class ScalarForward {
 public:
  using Shape = TileShape<float, kDim, 16, kDim <= 128 && kOneTable ? 3 : 2, kOneTable>;
  static constexpr int kRows = kRows_, kBlocks = kDim <= 128 ? 2 : 1;

  __device__ ScalarForward(const Problem& p, const QueryRows& rows, int first, const float* q)
      : p_(p), rows_(rows), first_(first), q_(q), per_pair_(weights_of(p) == Weights::kPerPair) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      peak_[r] = -CUDART_INF_F, total_[r] = 0.f;
#pragma unroll
      for (int c = 0; c < kDim / 32; ++c) out_[r][c] = 0.f;
    }
  }

  __device__ void consume(typename Shape::Stage& stage, int key, int keys_left) {
    const int lane = threadIdx.x % 32, column = lane % 16;
    float s[kRows];
    dots<Shape, kRows>(s, q_, stage.k());
    bool seen = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float w = stage.weight[column];
      if (per_pair_ && column < keys_left && first_ + r < rows_.count)
        w = p_.weight[rows_.weight_offset(p_, first_ + r) + (key + column) * p_.weight_stride_key];
      else if (per_pair_ && p_.normaliser == Normaliser::kSoftmax)
        w = -CUDART_INF_F;
      seen |= w != -CUDART_INF_F;
      if (p_.normaliser == Normaliser::kSoftmax) {
        s[r] = w == -CUDART_INF_F ? w : s[r] * (p_.scale * kLog2e) + w * kLog2e;
        float now = fmaxf(peak_[r], s[r]);
#pragma unroll
        for (int step = 1; step < 16; step *= 2) now = fmaxf(now, __shfl_xor_sync(~0u, now, step));
        const float shrink = rescale(peak_[r], now);
        total_[r] *= shrink;
#pragma unroll
        for (int c = 0; c < kDim / 32; ++c) out_[r][c] *= shrink;
        peak_[r] = now;
        s[r] = rescale(s[r], now);
        total_[r] += s[r];
      } else {
        s[r] = w * activate(s[r] * p_.scale, p_.normaliser);
      }
    }
    const uint32_t visible = __ballot_sync(~0u, seen) & 0xffff;
#pragma unroll 4
    for (int k = 0; k < 16; ++k) {
      if ((visible >> k & 1) == 0) continue;  // no row sees this key, which may hold NaN
      float v[kDim / 32];
#pragma unroll
      for (int c = 0; c < kDim / 32; ++c) v[c] = stage.v()[k * Shape::kStride + c * 32 + lane];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float p = __shfl_sync(~0u, s[r], k);
#pragma unroll
        for (int c = 0; c < kDim / 32; ++c) out_[r][c] += p * v[c];
      }
    }
  }

  __device__ void store(float* out, float* peak, float* total) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float sum = total_[r];
#pragma unroll
      for (int step = 1; step < 16; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
      if (lane == 0) peak[r] = peak_[r], total[r] = sum;
#pragma unroll
      for (int c = 0; c < kDim / 32; ++c) out[r * kDim + c * 32 + lane] = out_[r][c];
    }
  }

 private:
  const Problem& p_;
  const QueryRows& rows_;
  int first_;
  const float* q_;
  bool per_pair_;
  float out_[kRows][kDim / 32], peak_[kRows], total_[kRows];
};

template <class Worker>
struct ForwardShared {
  using Shape = typename Worker::Shape;
  alignas(16) typename Shape::T q[Worker::kRows * Shape::kStride];
  float peak[kWarps][Worker::kRows], total[kWarps][Worker::kRows];
  union {
    typename Shape::Stage stages[kWarps][Shape::kStages];
    float out[kWarps][Worker::kRows * Shape::kDim];  // once every warp has read its keys
  };
};

// grid (slots, heads_kv, groups of kRows query rows)
template <class Worker>
__global__ void __launch_bounds__(kThreads, Worker::kBlocks) forward_kernel(const ForwardParameters parameters) {
  using Shape = typename Worker::Shape;
  using T = typename Shape::T;
  extern __shared__ __align__(16) unsigned char bytes[];
  auto& shared = *reinterpret_cast<ForwardShared<Worker>*>(bytes);
  const Problem& p = parameters.p;
  Chunk chunk;
  if (!Chunk::find(parameters.chunks, blockIdx.x, Shape::kTile, &chunk)) return;
  const int head_kv = blockIdx.y, first = blockIdx.z * Worker::kRows, warp = threadIdx.x / 32;
  const QueryRows rows(p, chunk.sample, head_kv);
  if (first >= rows.count) return;

  load_queries<T, Worker::kRows, Shape::kDim, Shape::kStride>(shared.q, p.q, p, rows, first);
  {
    KeyStream<Shape> stream(p, chunk, head_kv, shared.stages[warp]);
    __syncthreads();
    Worker worker(p, rows, first, shared.q);
    for (int tile = 0; tile < stream.tiles(); ++tile)
      worker.consume(stream.next(tile), stream.key(tile), stream.keys_left(tile));
    copy_wait<0>();
    __syncthreads();
    worker.store(shared.out[warp], shared.peak[warp], shared.total[warp]);
  }
  __syncthreads();

  const bool softmax = p.normaliser == Normaliser::kSoftmax;
  for (int i = threadIdx.x; i < Worker::kRows * Shape::kDim; i += kThreads) {
    const int r = i / Shape::kDim, d = i % Shape::kDim, row = first + r;
    if (row >= rows.count || d >= p.head_dim) continue;
    float peak = -CUDART_INF_F, total = 0.f, out = 0.f;
    for (int w = 0; w < kWarps; ++w) peak = fmaxf(peak, shared.peak[w][r]);
    for (int w = 0; w < kWarps; ++w) {
      const float worth = softmax ? rescale(shared.peak[w][r], peak) : 1.f;
      total += worth * shared.total[w][r];
      out += worth * shared.out[w][i];
    }
    if (chunk.count > 1) {
      const int64_t at = parameters.partial(blockIdx.x, head_kv, row);
      parameters.partial_out[at * p.head_dim + d] = out;
      if (d == 0) parameters.partial_lse[at] = make_float2(peak, total);
      continue;
    }
    const int64_t at = rows.index(p, row);
    if (softmax) out = total > 0.f ? out / total : total;  // a NaN total stays one
    static_cast<T*>(parameters.out)[at * p.head_dim + d] = narrow<T>(out);
    if (softmax && d == 0) parameters.lse[at] = total == 0.f ? -CUDART_INF_F : (peak + log2f(total)) * kLn2;
  }
}

// Partial results of samples with several chunks, in chunk order. grid (queries * heads): a block of head_dim threads each.
template <typename T>
__global__ void merge_kernel(const ForwardParameters parameters) {
  const Problem& p = parameters.p;
  const int query = blockIdx.x / p.heads, head = blockIdx.x % p.heads, share = p.heads / p.heads_kv;
  const int sample = last_not_above(p.samples, query, [&](int b) { return p.cu_seqlens_q[b]; });
  const int count = parameters.chunks.count(sample), slot = parameters.chunks.first_slot(sample);
  if (count == 1) return;
  const int row = (query - p.cu_seqlens_q[sample]) * share + head % share, d = threadIdx.x;
  const bool softmax = p.normaliser == Normaliser::kSoftmax;
  float peak = -CUDART_INF_F, total = 0.f, out = 0.f;
  if (softmax)
    for (int c = 0; c < count; ++c) peak = fmaxf(peak, parameters.partial_lse[parameters.partial(slot + c, head / share, row)].x);
  for (int c = 0; c < count; ++c) {
    const int64_t at = parameters.partial(slot + c, head / share, row);
    float worth = 1.f;
    if (softmax) {
      const float2 part = parameters.partial_lse[at];
      worth = rescale(part.x, peak);
      total += worth * part.y;
    }
    out += worth * parameters.partial_out[at * p.head_dim + d];
  }
  if (softmax) out = total > 0.f ? out / total : total;
  static_cast<T*>(parameters.out)[int64_t(blockIdx.x) * p.head_dim + d] = narrow<T>(out);
  if (softmax && d == 0) parameters.lse[blockIdx.x] = total == 0.f ? -CUDART_INF_F : (peak + log2f(total)) * kLn2;
}

}  // namespace target_attention
