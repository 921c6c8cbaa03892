// Forward of float32 on Hopper, for weights that the tile brings: the four warps of a block take a tile of 64 keys together,
// transposed. Scores are keys x rows, each warp's own 16 keys against 16 or 32 query rows; sums are columns x rows, each warp's 32
// columns of all 64 keys against the weights, which meet in shared memory. So a key is split into TF32 parts (tf32.cuh) once for all
// rows, and what the rows bring, queries and weights, lies in shared memory as parts already.
#pragma once

#include "../weighted_attention/wgmma.cuh"
#include "forward.cuh"

namespace target_attention {

using weighted_attention::descriptor;
using weighted_attention::descriptor_rows;
using weighted_attention::fence_proxy_async;
using weighted_attention::pin;
using weighted_attention::wgmma_commit;
using weighted_attention::wgmma_fence;
using weighted_attention::wgmma_wait;

// d (64 x N, twice its accumulators) = or += keys (64 x 8, the parts of a lane) b (8 x N, shared memory).
#define WIDE_D8 "{%0, %1, %2, %3, %4, %5, %6, %7}, "
#define WIDE_OUT8 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define WIDE_D16 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
#define WIDE_OUT16 \
  WIDE_OUT8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define WIDE_D32 WGMMA_D32
#define WIDE_OUT32 WGMMA_OUT32
#define WIDE_MULTIPLY(N, R, P0, P1, P2, P3, P4, P5)                                                                     \
  __device__ __forceinline__ void multiply_wide(float (&d)[R], const uint32_t* keys, uint64_t b, bool add) {            \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " P5 ", 0;\n"                                                           \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k8.f32.tf32.tf32 " WIDE_D##R "{" P0 ", " P1 ", " P2 ", " P3    \
                 "}, " P4 ", p, 1, 1;}\n"                                                                               \
                 : WIDE_OUT##R                                                                                          \
                 : "r"(keys[0]), "r"(keys[1]), "r"(keys[2]), "r"(keys[3]), "l"(b), "r"(int(add)));                      \
  }
WIDE_MULTIPLY(16, 8, "%8", "%9", "%10", "%11", "%12", "%13")
WIDE_MULTIPLY(32, 16, "%16", "%17", "%18", "%19", "%20", "%21")
WIDE_MULTIPLY(64, 32, "%32", "%33", "%34", "%35", "%36", "%37")

// How a chunk's keys reach a block: each warp copies 16 rows of every tile of 64, a tile ahead, and its lanes keep their weights.
class WideKeys {
 public:
  static constexpr int kDim = 128, kStages = 2, kTile = 16 * kWarps, kPanelFloats = kTile * 32;
  using Stage = float[kDim / 32][kPanelFloats];  // 32 columns of all keys, swizzled over 128 bytes

  __device__ WideKeys(const Problem& p, const Chunk& chunk, int head_kv, Stage* stages)
      : p_(p), stages_(stages), end_(chunk.end), per_key_(weights_of(p) == Weights::kPerKey) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    key_ = chunk.begin + warp * 16 + lane;
    tiles_ = (chunk.end - chunk.begin + kTile - 1) / kTile;
    inside_ = lane * 4 < p.head_dim;  // zeros beyond: a product takes whole columns
    from_ = static_cast<const float*>(p.k_table) + int64_t(head_kv) * p.head_dim + (inside_ ? lane * 4 : 0);
    peek();
    begin_copy();
#pragma unroll
    for (int i = 0; i < 16; ++i) copy(i);
    end_copy();
  }

  __device__ int tiles() const { return tiles_; }

  // Waits for the next tile, until all warps have it and are done with the one before.
  __device__ void wait() {
    copy_wait<0>();
    __syncthreads();
    weight_ = copied_;
  }

  // Of the tile waited for: the weight of a key of the warp's 16.
  __device__ float weight(int key) const { return __shfl_sync(~0u, weight_, key); }

  // The tile after the one waited for, row by row of the warp's 16; zeros behind the last.
  __device__ void begin_copy() {
    read_ = next_ == -CUDART_INF_F ? -1 : row_;  // an absent row may hold NaN and is not read
    to_ = stages_[copies_++ % kStages][threadIdx.x % 32 / 8] + threadIdx.x / 32 * 16 * 32;
    shuffled_ = __shfl_sync(~0u, read_, 0);
  }
  __device__ void copy(int i) {
    const int row = shuffled_, lane = threadIdx.x % 32;
    if (i < 15) shuffled_ = __shfl_sync(~0u, read_, i + 1);
    copy_async(to_ + i * 32 + (lane % 8 ^ i % 8) * 4, from_ + int64_t(max(row, 0)) * (p_.heads_kv * p_.head_dim), inside_ && row >= 0);
  }
  __device__ void end_copy() {
    copy_commit();
    copied_ = next_;
    key_ += kTile;
    peek();
  }

 private:
  // Row and weight of the next tile to be copied, one key a lane, not looked at until then, so that nobody waits for them.
  __device__ void peek() {
    row_ = -1;
    next_ = -CUDART_INF_F;
    if (threadIdx.x % 32 < 16 && key_ < end_) {
      row_ = static_cast<int>(p_.rows[key_]);
      next_ = per_key_ ? p_.weight[key_ * p_.weight_stride_key] : 0.f;
    }
  }

  const Problem& p_;
  Stage* stages_;
  const float* from_;
  float* to_;
  int end_, tiles_, key_, copies_ = 0, row_, read_, shuffled_;
  float next_, copied_, weight_;
  bool per_key_, inside_;
};

template <int kRows_>
struct WideForward {
  static constexpr int kDim = WideKeys::kDim, kRows = kRows_, kTile = WideKeys::kTile;
  static constexpr int kSums = kRows / 2, kOfLane = kRows / 4;  // accumulators of a product, and query rows they belong to
  // A panel holds 32 columns (of queries: dimensions; of weights: keys) of all rows, swizzled over 128 bytes as products read it; a
  // row's leading parts stand in row r, its remainders in row r + kRows.
  static constexpr int kPanelFloats = 2 * kRows * 32;

  // To be aligned to 1024 bytes, as panels are; two blocks to a multiprocessor leave it 115,712 bytes.
  struct Shared {
    float q[kDim / 32][kPanelFloats];
    union {
      float p[kTile / 32][kPanelFloats];
      float over_warps[kWarps][kRows];
    };
    WideKeys::Stage stages[WideKeys::kStages];
  };

  // The products that count: leading parts of keys with both parts of what the rows bring, and the keys' remainders with its leading
  // parts, apart, because products of one shape alone may share sums without a fence.
  struct Products {
    float both[2 * kSums], rest[kSums];

    __device__ float operator[](int i) const { return both[i] + (both[kSums + i] + rest[i]); }
    __device__ void pin() {
      weighted_attention::pin(both);
      weighted_attention::pin(rest);
    }
  };

  // Of a step of 8 keys and the columns that a warp adds up, in the order in which products read them: [b].
  struct Parted {
    uint32_t high[2][4], low[2][4];
  };

  Shared& shared;
  const float scale;  // to base two
  // out[b][4 j + 2 half + i]: column 32 warp + 4 (lane / 4) + 2 b + half of row_at(2 j + i)
  float out[2][kSums] = {}, base[kOfLane], total[kOfLane] = {};

  __device__ WideForward(Shared& s, const Problem& p) : shared(s), scale(p.scale * kLog2e) {
#pragma unroll
    for (int n = 0; n < kOfLane; ++n) base[n] = -CUDART_INF_F;
  }

  // A lane's accumulators d[4 j + 2 half + i] belong to kOfLane query rows: the one that n = 2 j + i counts.
  static __device__ int row_at(int n) { return n / 2 * 8 + int(threadIdx.x) % 4 * 2 + n % 2; }

  // Rows first .. first + kRows of the queries, zeros past the end and in the padding.
  __device__ void load(const Problem& p, const QueryRows& rows, int first) {
    for (int i = threadIdx.x; i < kRows * kDim / 4; i += kThreads) {
      const int r = i / (kDim / 4), column = i % (kDim / 4) * 4;
      float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
      if (first + r < rows.count && column < p.head_dim)
        x = *reinterpret_cast<const float4*>(static_cast<const float*>(p.q) + rows.index(p, first + r) * p.head_dim + column);
      float* const to = &shared.q[column / 32][r * 32 + (column % 32 / 4 ^ r % 8) * 4];
      store_parts<4>(to, &x.x);
    }
    fence_proxy_async();
  }

  // x and what leading parts leave of it.
  template <int kCount>
  static __device__ void store_parts(float* to, const float* x) {
    uint32_t high[kCount], low[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Parts parts = parts_of(__float_as_uint(x[i]));
      high[i] = parts.high, low[i] = parts.low;
    }
    float* const rest = to + kRows * 32;
    if constexpr (kCount == 4) {
      *reinterpret_cast<uint4*>(to) = make_uint4(high[0], high[1], high[2], high[3]);
      *reinterpret_cast<uint4*>(rest) = make_uint4(low[0], low[1], low[2], low[3]);
    } else {
      *reinterpret_cast<uint32_t*>(to) = high[0];
      *reinterpret_cast<uint32_t*>(rest) = low[0];
    }
  }

  // s (this warp's 16 keys x rows). A step's parts are made beside the products of the one before it, and a row of the next tile is
  // asked for.
  __device__ void score(float (&s)[kSums], Parted& first, const WideKeys::Stage& keys, WideKeys& stream) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t queries = descriptor_rows(shared_address(shared.q));
    Products products;
    Fragment x[kDim / 8];
    const auto load = [&](int k) {
      x[k] = load_matrices(keys[k / 4] + (warp * 16 + lane % 16) * 32 + (k % 4 * 2 + lane / 16 ^ lane % 8) * 4);
    };
    load(0);
    load(1);
#pragma unroll
    for (int k = 0; k < kDim / 8; ++k) {
      uint32_t high[4], low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Parts parts = parts_of(x[k].x[i]);
        high[i] = parts.high, low[i] = parts.low;
      }
      pin(high);
      pin(low);
      if (k + 2 < kDim / 8) load(k + 2);
      wgmma_fence();
      const uint64_t at = descriptor(queries, k / 4 * kPanelFloats * 4 + k % 4 * 32);
      multiply_wide(products.both, high, at, k > 0);
      multiply_wide(products.rest, low, at, k > 0);
      wgmma_commit();
      if (k == 0) stream.begin_copy();
      stream.copy(k);
      wgmma_wait<1>();
    }
    stream.end_copy();
    split(first, keys, 0);
    wgmma_wait<0>();
    products.pin();
#pragma unroll
    for (int i = 0; i < kSums; ++i) s[i] = products[i];
  }

  // Scores to weights, in shared memory.
  __device__ void softmax(float (&p)[kSums], const float (&s)[kSums], const WideKeys& keys) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float w[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) w[half] = keys.weight(lane / 4 + half * 8) * kLog2e;
    const bool passed = weigh(p, s, w);
    store_weights(p, warp, lane);
    if (__syncthreads_or(passed)) {
      move(s, w);
      weigh(p, s, w);
      store_weights(p, warp, lane);
      __syncthreads();
    }
  }

  __device__ bool weigh(float (&p)[kSums], const float (&s)[kSums], const float (&w)[2]) const {
    bool passed = false;
#pragma unroll
    for (int n = 0; n < kOfLane; ++n) {
      const float low = base[n] == -CUDART_INF_F ? 0.f : base[n];  // no key yet: every score is -inf or NaN, or the base moves
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = n / 2 * 4 + half * 2 + n % 2;
        const float x = w[half] == -CUDART_INF_F ? w[half] : s[i] * scale + w[half];
        passed |= x > base[n] + kSlack;
        p[i] = power_of_two(x - low);
      }
    }
    return passed;
  }

  // Key 2 t + odd of eight stands at place t + 4 odd of its step: the rows that a quarter of a warp reads at once in `split` then lie in
  // different banks.
  __device__ void store_weights(const float (&p)[kSums], int warp, int lane) {
    const int key = lane / 4, chunk = warp % 2 * 4 + key % 2;
#pragma unroll
    for (int n = 0; n < kOfLane; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_parts<1>(&shared.p[warp / 2][row_at(n) * 32 + (chunk + half * 2 ^ row_at(n) % 8) * 4 + key / 2],
                       &p[n / 2 * 4 + half * 2 + n % 2]);
    fence_proxy_async();
  }

  // Some score of the tile is beyond the slack: where one of a row's is, its base becomes the largest.
  __device__ void move(const float (&s)[kSums], const float (&w)[2]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kOfLane; ++n) {
      float most = -CUDART_INF_F;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (w[half] != -CUDART_INF_F) most = fmaxf(most, s[n / 2 * 4 + half * 2 + n % 2] * scale + w[half]);
#pragma unroll
      for (int step = 4; step < 32; step *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
      if (lane < 4) shared.over_warps[warp][row_at(n)] = most;
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kOfLane; ++n) {
      float now = -CUDART_INF_F;
      for (int v = 0; v < kWarps; ++v) now = fmaxf(now, shared.over_warps[v][row_at(n)]);
      const bool moves = now > base[n] + kSlack;
      const float shrink = moves ? power_of_two(base[n] - now) : 1.f;
      base[n] = moves ? now : base[n];
      total[n] *= shrink;
#pragma unroll
      for (int b = 0; b < 2; ++b)
#pragma unroll
        for (int half = 0; half < 2; ++half) out[b][n / 2 * 4 + half * 2 + n % 2] *= shrink;
    }
    __syncthreads();
  }

  __device__ void split(Parted& parted, const WideKeys::Stage& keys, int step) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int key = lane % 4 * 2 + odd;
      const uint4 x = *reinterpret_cast<const uint4*>(keys[warp] + (step * 8 + key) * 32 + (lane / 4 ^ key) * 4);
      const uint32_t of_columns[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Parts parts = parts_of(of_columns[i]);
        parted.high[i / 2][2 * odd + i % 2] = parts.high, parted.low[i / 2][2 * odd + i % 2] = parts.low;
      }
    }
#pragma unroll
    for (int b = 0; b < 2; ++b) pin(parted.high[b]), pin(parted.low[b]);  // here, not where they are asked for
  }

  // Sums += weights of all 64 keys; the first 8 of them are split.
  __device__ void sum(const float (&p)[kSums], Parted& first, const WideKeys::Stage& keys) {
    const uint32_t weights = descriptor_rows(shared_address(shared.p));
    Products products[2];
    Parted parted[kTile / 8];
    parted[0] = first;
#pragma unroll
    for (int step = 0; step < kTile / 8; ++step) {
      const uint64_t at = descriptor(weights, step / 4 * kPanelFloats * 4 + step % 4 * 32);
      wgmma_fence();
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        multiply_wide(products[b].both, parted[step].high[b], at, step > 0);
        multiply_wide(products[b].rest, parted[step].low[b], at, step > 0);
      }
      wgmma_commit();
      if (step + 1 < kTile / 8) split(parted[step + 1], keys, step + 1);
      if (step == 0)
#pragma unroll
        for (int n = 0; n < kOfLane; ++n) total[n] += p[n / 2 * 4 + n % 2] + p[n / 2 * 4 + 2 + n % 2];
      wgmma_wait<1>();
    }
    wgmma_wait<0>();
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      products[b].pin();
#pragma unroll
      for (int i = 0; i < kSums; ++i) out[b][i] += products[b][i];
    }
  }

  // Totals of all keys of the chunk; every warp has passed its last product.
  __device__ void finish() {
#pragma unroll
    for (int n = 0; n < kOfLane; ++n) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) total[n] += __shfl_xor_sync(~0u, total[n], step);
      if (threadIdx.x % 32 < 4) shared.over_warps[threadIdx.x / 32][row_at(n)] = total[n];
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kOfLane; ++n) {
      total[n] = 0.f;
      for (int v = 0; v < kWarps; ++v) total[n] += shared.over_warps[v][row_at(n)];
    }
  }
};

// grid (slots, heads_kv, groups of kRows query rows)
template <class Worker>
__global__ void __launch_bounds__(kThreads, 2) wide_forward_kernel(const ForwardParameters parameters) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char wide_bytes[];
  auto& shared = *reinterpret_cast<typename Worker::Shared*>(wide_bytes);
  let_next_launch();
  const Problem& p = parameters.p;
  Chunk chunk;
  if (!Chunk::find(parameters.chunks, blockIdx.x, Worker::kTile, &chunk)) return;
  const int head_kv = blockIdx.y, first = blockIdx.z * Worker::kRows, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const QueryRows rows(p, chunk.sample, head_kv);
  if (first >= rows.count) return;

  WideKeys keys(p, chunk, head_kv, shared.stages);
  Worker worker(shared, p);
  worker.load(p, rows, first);
  for (int tile = 0; tile < keys.tiles(); ++tile) {
    const auto& stage = shared.stages[tile % WideKeys::kStages];
    keys.wait();
    float s[Worker::kSums], weights[Worker::kSums];
    typename Worker::Parted first_keys;
    worker.score(s, first_keys, stage, keys);
    worker.softmax(weights, s, keys);
    worker.sum(weights, first_keys, stage);
  }
  copy_wait<0>();
  __syncthreads();  // the weights in shared memory have been read
  worker.finish();

#pragma unroll
  for (int n = 0; n < Worker::kOfLane; ++n) {
    const int row = first + Worker::row_at(n), i = n / 2 * 4 + n % 2, column = warp * 32 + lane / 4 * 4;
    if (row >= rows.count) continue;
    float4 out = make_float4(worker.out[0][i], worker.out[0][i + 2], worker.out[1][i], worker.out[1][i + 2]);
    const bool whole = chunk.count == 1;
    if (column < p.head_dim) {
      if (whole)
        store_four(static_cast<float*>(parameters.out) + rows.index(p, row) * p.head_dim + column, normalised(out, worker.total[n]));
      else
        store_four(parameters.partial_out + parameters.partial(blockIdx.x, head_kv, row) * p.head_dim + column, out);
    }
    if (warp > 0 || lane >= 4) continue;
    if (whole)
      parameters.lse[rows.index(p, row)] = lse_of(worker.base[n], worker.total[n]);
    else
      parameters.partial_lse[parameters.partial(blockIdx.x, head_kv, row)] = make_float2(worker.base[n], worker.total[n]);
  }
#endif
}

}  // namespace target_attention
