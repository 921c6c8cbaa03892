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

// d (64 x 32 or 16) += a (64 x 8, the parts of a lane) b (8 x 32 or 16, shared memory).
__device__ __forceinline__ void multiply_wide(float (&d)[16], const uint32_t* a, uint64_t b, bool add) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k8.f32.tf32.tf32 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, p, 1, 1;}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]),
        "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
}

__device__ __forceinline__ void multiply_wide(float (&d)[8], const uint32_t* a, uint64_t b, bool add) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %13, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k8.f32.tf32.tf32 "
      "{%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, p, 1, 1;}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
}

template <int kRows_>
struct WideForward {
  static constexpr int kDim = 128, kRows = kRows_, kStages = 2, kTile = 16 * kWarps;
  static constexpr int kSums = kRows / 2, kOfLane = kRows / 4;  // accumulators of a product, and query rows they belong to
  // A panel holds 32 columns (of queries: dimensions; of weights: keys) of all rows, swizzled over 128 bytes as products read it; a
  // row's leading parts stand in row r, its remainders in row r + kRows.
  static constexpr int kPanelFloats = 2 * kRows * 32;
  using Shape = TileShape<float, kDim, 16, kStages, true, false, true>;
  using Stage = typename Shape::Stage;

  // To be aligned to 1024 bytes, as panels are; two blocks to a multiprocessor leave it 115,712 bytes.
  struct Shared {
    float q[kDim / 32][kPanelFloats];
    union {
      float p[kTile / 32][kPanelFloats];
      float over_warps[kWarps][kRows];
    };
    Stage stages[kWarps][kStages];
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
      *reinterpret_cast<uint2*>(to) = make_uint2(high[0], high[1]);
      *reinterpret_cast<uint2*>(rest) = make_uint2(low[0], low[1]);
    }
  }

  // The three products that count of one step of eight; panel: where the step's columns of the rows' parts begin.
  static __device__ void multiply(float (&lead)[kSums], float (&rest)[kSums], const uint32_t* high, const uint32_t* low, uint32_t panel,
                                  int step_bytes, bool add) {
    multiply_wide(lead, high, descriptor(panel, step_bytes), add);
    multiply_wide(rest, high, descriptor(panel, step_bytes + kRows * 128), add);
    multiply_wide(rest, low, descriptor(panel, step_bytes), true);
  }

  // s (this warp's 16 keys x rows)
  __device__ void score(float (&s)[kSums], const float* keys) {
    const int lane = threadIdx.x % 32;
    const float* const row = keys + lane % 16 * kDim;
    const int piece = Shape::at(lane % 16, lane / 16) / 4 % 8;
    const uint32_t queries = descriptor_rows(shared_address(shared.q));
    float rest[kSums];
    uint32_t high[2][4][4], low[2][4][4];
#pragma unroll
    for (int part = 0; part < kDim / 32; ++part) {
      auto& h = high[part % 2];
      auto& l = low[part % 2];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const Fragment x = load_matrices(row + part * 32 + (piece ^ 2 * k) * 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Parts parts = parts_of(x.x[i]);
          h[k][i] = parts.high, l[k][i] = parts.low;
        }
      }
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) multiply(s, rest, h[k], l[k], queries, part * kPanelFloats * 4 + k * 32, part + k > 0);
      wgmma_commit();
      wgmma_wait<1>();
    }
    wgmma_wait<0>();
    pin(s);
    pin(rest);
#pragma unroll
    for (int i = 0; i < kSums; ++i) s[i] += rest[i];
  }

  // Scores to weights, in shared memory: key lane / 4 and the one 8 below are neighbours there, see sum.
  __device__ void softmax(const float (&s)[kSums], const Stage& stage) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, key = lane / 4;
    float w[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) w[half] = stage.weight[key + half * 8] * kLog2e;
    float p[kSums];
    const bool passed = weigh(p, s, w);
    store_weights(p, warp, lane);
    if (__syncthreads_or(passed)) {
      move(s, w);
      weigh(p, s, w);
      store_weights(p, warp, lane);
      __syncthreads();
    }
#pragma unroll
    for (int n = 0; n < kOfLane; ++n) total[n] += p[n / 2 * 4 + n % 2] + p[n / 2 * 4 + 2 + n % 2];
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

  __device__ void store_weights(const float (&p)[kSums], int warp, int lane) {
    const int key = lane / 4, chunk = warp % 2 * 4 + key / 4 * 2 + key % 2;
#pragma unroll
    for (int n = 0; n < kOfLane; ++n) {
      const int i = n / 2 * 4 + n % 2, row = row_at(n);
      const float pair[2] = {p[i], p[i + 2]};
      store_parts<2>(&shared.p[warp / 2][row * 32 + (chunk ^ row % 8) * 4 + key / 2 % 2 * 2], pair);
    }
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

  // Sums += weights of all 64 keys. Inner places t and t + 4 of step (u, s) are keys 4 s + 2 (t / 2) + 8 (t % 2) of warp u's, and the
  // next: then a lane's weights are neighbours, and the rows that a quarter of a warp reads at once lie in different banks.
  __device__ void sum(int slot) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
    const uint32_t weights = descriptor_rows(shared_address(shared.p));
    float lead[2][kSums], rest[2][kSums];
    uint32_t high[2][2][2][4], low[2][2][2][4];
#pragma unroll
    for (int u = 0; u < kWarps; ++u) {
      const float* const keys = shared.stages[u][slot].k();
      auto& h = high[u % 2];
      auto& l = low[u % 2];
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const uint4 x = *reinterpret_cast<const uint4*>(
              keys + Shape::at(4 * s + 2 * (t / 2) + 8 * (t % 2) + odd, warp * 8 + lane / 4));
          const uint32_t of_columns[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const Parts parts = parts_of(of_columns[i]);
            h[s][i / 2][2 * odd + i % 2] = parts.high, l[s][i / 2][2 * odd + i % 2] = parts.low;
          }
        }
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int b = 0; b < 2; ++b)
          multiply(lead[b], rest[b], h[s][b], l[s][b], weights, u / 2 * kPanelFloats * 4 + u % 2 * 64 + s * 32, u + s > 0);
      wgmma_commit();
      wgmma_wait<1>();
    }
    wgmma_wait<0>();
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      pin(lead[b]);
      pin(rest[b]);
#pragma unroll
      for (int i = 0; i < kSums; ++i) out[b][i] += lead[b][i] + rest[b][i];
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
  const Problem& p = parameters.p;
  Chunk chunk;
  if (!Chunk::find(parameters.chunks, blockIdx.x, Worker::kTile, &chunk)) return;
  const int head_kv = blockIdx.y, first = blockIdx.z * Worker::kRows, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const QueryRows rows(p, chunk.sample, head_kv);
  if (first >= rows.count) return;

  KeyStream<typename Worker::Shape> stream(p, chunk, head_kv, shared.stages[warp]);
  Worker worker(shared, p);
  worker.load(p, rows, first);
  __syncthreads();
  for (int tile = 0; tile < stream.tiles(); ++tile) {
    const typename Worker::Stage& stage = stream.next(tile);
    float s[Worker::kSums];
    worker.score(s, stage.k());
    worker.softmax(s, stage);
    worker.sum(tile % Worker::kStages);
    __syncthreads();  // everybody has read this stage, and the weights in shared memory
  }
  copy_wait<0>();
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
