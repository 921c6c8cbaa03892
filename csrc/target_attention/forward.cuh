// Forward: a block takes one chunk of a sample's keys and up to kRows query rows; each warp keeps its own softmax state over the
// tiles it reads, and the states merge in warp order, then in chunk order.
#pragma once

#include "../early.cuh"
#include "mma.cuh"

namespace target_attention {

struct ForwardParameters {
  Problem p;
  Chunks chunks;
  int row_slots;      // query rows a chunk has room for: targets * heads / heads_kv
  void* out;
  float* lse;
  float* partial_out;   // (slots, heads_kv, row_slots, head_dim): not normalised, relative to the base
  float2* partial_lse;  // (slots, heads_kv, row_slots): base (of two) and total

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

// A row's sums are relative to 2^base. Any base will do that keeps them in range, so it moves only when a score passes it by more
// than this, and no lane asks another until then.
constexpr float kSlack = 8.f;

// State of a warp: kGroups x 16 query rows. kPlain: see is_plain.
template <typename T, int kDim, int kGroups, bool kOneTable, bool kPlain>
class MmaForward {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kBytes = kDim * int(sizeof(T)) * (kOneTable ? 1 : 2);  // of a key

 public:
  using Shape = TileShape<T, kDim, !kWide && kBytes <= 256 ? 32 : 16, kDim * kGroups <= 128 && kBytes <= 512 ? 3 : 2, kOneTable>;
  static constexpr int kRows = 16 * kGroups, kBlocks = kBytes <= 512 ? 2 : 1;

  __device__ MmaForward(const Problem& p, const QueryRows& rows, int first, const T* q)
      : p_(p), q_(q), weights_(p, rows, first) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int half = 0; half < 2; ++half) base_[g][half] = -CUDART_INF_F, total_[g][half] = 0.f;
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) out_[g][d][i] = 0.f;
    }
  }

  __device__ void consume(typename Shape::Stage& stage, int key, int keys_left) {
    float s[kGroups][kKeys][4];
    score<Shape, kGroups>(s, q_, stage.k());
    if (kPlain)
      softmax<false>(s, stage, key, keys_left);
    else if (p_.normaliser != Normaliser::kSoftmax)
      pointwise(s, stage, key, keys_left);
    else if (weights_.per_pair())
      softmax<true>(s, stage, key, keys_left);
    else
      softmax<false>(s, stage, key, keys_left);
    accumulate<Shape, kGroups>(out_, s, stage.v());
  }

  // To shared memory: out as store_sums leaves it, base and total (kRows,).
  __device__ void store(float* out, float* base, float* total) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = quad_sum(total_[g][half]);
        const int row = g * 16 + row_of(2 * half);
        if (lane % 4 == 0) base[row] = base_[g][half], total[row] = sum;
      }
    store_sums<T, kDim, kGroups>(out, out_);
  }

 private:
  static constexpr int kKeys = Shape::kTile / 8;

  template <bool kPerPair>
  __device__ void softmax(float (&s)[kGroups][kKeys][4], typename Shape::Stage& stage, int key, int keys_left) {
    const float scale = p_.scale * kLog2e;
    uint32_t absent = ~0u;
    float most[kGroups][2];
    bool passed = false;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      most[g][0] = most[g][1] = -CUDART_INF_F;
#pragma unroll
      for (int n = 0; n < kKeys; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float w = kPerPair ? weights_.of_pair(stage, key, keys_left, g, n, i) : weights_.of_key(stage, n, i);
          if (kPerPair && w != -CUDART_INF_F) absent &= ~(1u << (n * 2 + i % 2));
          s[g][n][i] = w == -CUDART_INF_F ? w : s[g][n][i] * scale + w * kLog2e;
          most[g][i / 2] = fmaxf(most[g][i / 2], s[g][n][i]);
        }
#pragma unroll
      for (int half = 0; half < 2; ++half) passed |= most[g][half] > base_[g][half] + kSlack;
    }
    if (kPerPair) weights_.clear_absent(stage, absent);
    if (__any_sync(~0u, passed)) move(most);
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float base = base_[g][half] == -CUDART_INF_F ? 0.f : base_[g][half];  // no key yet: every score is -inf or NaN
#pragma unroll
        for (int n = 0; n < kKeys; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            s[g][n][i] = power_of_two(s[g][n][i] - base);
            total_[g][half] += s[g][n][i];
          }
      }
  }

  // Rows with a score beyond the slack: the base becomes the largest score.
  __device__ void move(const float (&most)[kGroups][2]) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float now = quad_max(most[g][half]);
        const bool moves = now > base_[g][half] + kSlack;
        const float shrink = moves ? power_of_two(base_[g][half] - now) : 1.f;
        base_[g][half] = moves ? now : base_[g][half];
        total_[g][half] *= shrink;
#pragma unroll
        for (int d = 0; d < kDim / 8; ++d) out_[g][d][2 * half] *= shrink, out_[g][d][2 * half + 1] *= shrink;
      }
  }

  __device__ void pointwise(float (&s)[kGroups][kKeys][4], const typename Shape::Stage& stage, int key, int keys_left) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll
      for (int n = 0; n < kKeys; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          s[g][n][i] = weights_(stage, key, keys_left, g, n, i) * activate(s[g][n][i] * p_.scale, p_.normaliser);
  }

  const Problem& p_;
  const T* q_;
  PairWeights<Shape, kGroups> weights_;
  float out_[kGroups][kDim / 8][4], base_[kGroups][2], total_[kGroups][2];
};

template <class Worker>
struct ForwardShared {
  using Shape = typename Worker::Shape;
  alignas(16) typename Shape::T q[Worker::kRows * Shape::kStride];
  float base[kWarps][Worker::kRows], total[kWarps][Worker::kRows];
  float worth[kWarps][Worker::kRows];  // what a warp's sums count for in the block's
  union {
    typename Shape::Stage stages[kWarps][Shape::kStages];
    float out[kWarps][Worker::kRows * kSumStride<Shape::kDim>];  // once every warp has read its keys
  };
};

// Of a finished row: sums over the total under softmax, lse to base e. A NaN total stays one.
__device__ __forceinline__ float4 normalised(float4 out, float total) {
  if (total > 0.f) return make_float4(out.x / total, out.y / total, out.z / total, out.w / total);
  return make_float4(total, total, total, total);
}
__device__ __forceinline__ float lse_of(float base, float total) {
  return total == 0.f ? -CUDART_INF_F : (base + log2f(total)) * kLn2;
}

__device__ __forceinline__ void add_scaled(float4& sum, float4 x, float by) {
  sum.x += by * x.x, sum.y += by * x.y, sum.z += by * x.z, sum.w += by * x.w;
}

// grid (slots, heads_kv, groups of kRows query rows)
template <class Worker>
__global__ void __launch_bounds__(kThreads, Worker::kBlocks) forward_kernel(const ForwardParameters parameters) {
  using Shape = typename Worker::Shape;
  using T = typename Shape::T;
  extern __shared__ __align__(16) unsigned char bytes[];
  auto& shared = *reinterpret_cast<ForwardShared<Worker>*>(bytes);
  let_next_launch();
  const Problem& p = parameters.p;
  Chunk chunk;
  if (!Chunk::find(parameters.chunks, blockIdx.x, Shape::kTile, &chunk)) return;
  const int head_kv = blockIdx.y, first = blockIdx.z * Worker::kRows, warp = threadIdx.x / 32;
  const QueryRows rows(p, chunk.sample, head_kv);
  if (first >= rows.count) return;

  {
    KeyStream<Shape> stream(p, chunk, head_kv, shared.stages[warp]);
    load_queries<T, Worker::kRows, Shape::kDim, Shape::kStride>(shared.q, p.q, p, rows, first);
    __syncthreads();
    Worker worker(p, rows, first, shared.q);
    for (int tile = 0; tile < stream.tiles(); ++tile)
      worker.consume(stream.next(tile), stream.key(tile), stream.keys_left(tile));
    copy_wait<0>();
    __syncthreads();
    worker.store(shared.out[warp], shared.base[warp], shared.total[warp]);
  }
  __syncthreads();

  const bool softmax = p.normaliser == Normaliser::kSoftmax;
  const int here = min(Worker::kRows, rows.count - first);
  if (const int r = threadIdx.x; r < here) {
    float base = -CUDART_INF_F, total = 0.f;
    for (int w = 0; w < kWarps; ++w) base = fmaxf(base, shared.base[w][r]);
    for (int w = 0; w < kWarps; ++w) {
      const float worth = softmax ? rescale(shared.base[w][r], base) : 1.f;
      shared.worth[w][r] = worth;
      total += worth * shared.total[w][r];
    }
    shared.total[0][r] = total;
    if (chunk.count > 1)
      parameters.partial_lse[parameters.partial(blockIdx.x, head_kv, first + r)] = make_float2(base, total);
    else if (softmax)
      parameters.lse[rows.index(p, first + r)] = lse_of(base, total);
  }
  __syncthreads();
  const int pieces = p.head_dim / 4;
  for (int i = threadIdx.x; i < here * pieces; i += kThreads) {
    const int r = i / pieces, d = i % pieces * 4;
    float4 out = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int w = 0; w < kWarps; ++w)
      add_scaled(out, *reinterpret_cast<const float4*>(&shared.out[w][r * kSumStride<Shape::kDim> + d]), shared.worth[w][r]);
    if (chunk.count > 1) {
      store_four(parameters.partial_out + parameters.partial(blockIdx.x, head_kv, first + r) * p.head_dim + d, out);
      continue;
    }
    if (softmax) out = normalised(out, shared.total[0][r]);
    store_four(static_cast<T*>(parameters.out) + rows.index(p, first + r) * p.head_dim + d, out);
  }
}

// Partial results of samples with several chunks, in chunk order: a warp for each (query, head). Starts beside the end of the kernel before.
template <typename T>
__global__ void __launch_bounds__(kThreads) merge_kernel(const ForwardParameters parameters) {
  const Problem& p = parameters.p;
  const int warp = blockIdx.x * kWarps + threadIdx.x / 32, at = min(warp, p.queries * p.heads - 1), lane = threadIdx.x % 32;
  const int query = at / p.heads, head = at % p.heads, share = p.heads / p.heads_kv;
  const int sample = last_not_above(p.samples, query, [&](int b) { return p.cu_seqlens_q[b]; });
  const int count = parameters.chunks.count(sample), slot = parameters.chunks.first_slot(sample);
  wait_for_launch_before();  // by every block, so that what follows this kernel follows that one too
  if (count == 1 || warp > at) return;
  const int row = (query - p.cu_seqlens_q[sample]) * share + head % share;
  const bool softmax = p.normaliser == Normaliser::kSoftmax;
  float base = -CUDART_INF_F;
  if (softmax)
    for (int c = 0; c < count; ++c) base = fmaxf(base, parameters.partial_lse[parameters.partial(slot + c, head / share, row)].x);
  for (int d = lane * 4; d - lane * 4 < p.head_dim; d += 128) {
    float4 out = make_float4(0.f, 0.f, 0.f, 0.f);
    float total = 0.f;
#pragma unroll 4
    for (int c = 0; c < count; ++c) {
      const int64_t part = parameters.partial(slot + c, head / share, row);
      const float2 sums = parameters.partial_lse[part];
      const float worth = softmax ? rescale(sums.x, base) : 1.f;
      total += worth * sums.y;
      if (d < p.head_dim)
        add_scaled(out, *reinterpret_cast<const float4*>(parameters.partial_out + part * p.head_dim + d), worth);
    }
    if (softmax) out = normalised(out, total);
    if (d < p.head_dim) store_four(static_cast<T*>(parameters.out) + int64_t(at) * p.head_dim + d, out);
    if (softmax && d == 0) parameters.lse[at] = lse_of(base, total);
  }
}

}  // namespace target_attention
