// Backward pass. A block keeps 128 keys of one key head and walks the queries of its sample, of every query head that
// shares the key head, in a fixed order: dk and dv are sums in registers and never need atomics. Scores are computed
// transposed, S^T = K Q^T: each warpgroup owns 64 keys, P^T and dS^T leave the softmax as the register operands of
// dV += P^T dO and dK += dS^T Q, and the weight of a key is one number per fragment row.
//
// With kAccumulateDq, dS also goes through shared memory into dQ = dS K, which is added to fp32 sums in device memory:
// five products in all, but the order of those additions varies. Without it, backward_dq.cuh computes dq on its own,
// repeatably, for seven.
#pragma once

#include "backward_rows.cuh"
#include "pipeline.cuh"

namespace weighted_attention {

struct BackwardParameters {
  Plan plan;  // tiles of kKeys keys
  RowWorkspace rows;
  const float* log_weight;
  int64_t weight_stride_key, weight_stride_head;
  void* dk;
  void* dv;
  float* dlog_weight;
  int heads, heads_kv;
  float scale;
};

template <typename T_, int kHeadDim_, bool kAccumulateDq_, bool kWeightGradient_>
struct BackwardShape {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kAccumulateDq = kAccumulateDq_;
  static constexpr bool kWeightGradient = kWeightGradient_;
  static constexpr int kKeys = 128;
  static constexpr int kQueries = kHeadDim == 64 ? 128 : 64;
  static constexpr int kStages = 2;
  static constexpr int kThreads = 3 * kWarpgroup;

  struct Shared {
    alignas(1024) T k[kKeys * kHeadDim];
    alignas(1024) T v[kKeys * kHeadDim];
    alignas(1024) T q[kStages][kQueries * kHeadDim];
    alignas(1024) T dout[kStages][kQueries * kHeadDim];
    // Key by key, in panels of 64 queries.
    alignas(1024) T ds[kAccumulateDq ? 2 : 1][kAccumulateDq ? kKeys * kQueries : 1];
    alignas(16) float lse[kStages][kQueries];
    alignas(16) float delta[kStages][kQueries];
    Barrier kv_landed, kv_free;
    Barrier q_landed[kStages], q_free[kStages], dout_landed[kStages], dout_free[kStages];
    Barrier ds_written[2], ds_free[2];  // by all consumer warps
  };
};

// Work of one block. Keys stay for all query heads, unless weights differ by head: then a key absent for one head may
// be present for the next, and keys are loaded (and their absent rows zeroed) anew for each: one segment per load.
struct BackwardWork {
  Tile tile;  // of keys; the other side is queries
  int query_tiles, segments, heads_per_segment;
};

template <class Shape>
__device__ __forceinline__ BackwardWork backward_work(const BackwardParameters& p) {
  BackwardWork work;
  work.tile = find_tile(p.plan, blockIdx.x, p.heads_kv, Shape::kKeys);
  work.query_tiles = (work.tile.other_length + Shape::kQueries - 1) / Shape::kQueries;
  const int group = p.heads / p.heads_kv;
  work.segments = p.weight_stride_head != 0 ? group : 1;
  work.heads_per_segment = group / work.segments;
  return work;
}

template <class Shape>
__device__ __forceinline__ void backward_produce(typename Shape::Shared& shared, const BackwardParameters& p,
                                                 const BackwardWork& work, const CUtensorMap* map_q,
                                                 const CUtensorMap* map_dout, const CUtensorMap* map_k,
                                                 const CUtensorMap* map_v) {
  using T = typename Shape::T;
  constexpr int kHeadDim = Shape::kHeadDim, kQueries = Shape::kQueries;
  constexpr int kRowBytes = kHeadDim * sizeof(T);
  const int first_key = work.tile.begin + work.tile.row;
  int head = work.tile.head * (p.heads / p.heads_kv);
  Cursor<Shape::kStages> at;
  for (int segment = 0; segment < work.segments; ++segment) {
    barrier_wait(&shared.kv_free, (segment & 1) ^ 1);
    barrier_expect(&shared.kv_landed, 2 * Shape::kKeys * kRowBytes);
    load_tile<T, Shape::kKeys, kHeadDim>(shared.k, map_k, &shared.kv_landed, work.tile.head, first_key);
    load_tile<T, Shape::kKeys, kHeadDim>(shared.v, map_v, &shared.kv_landed, work.tile.head, first_key);
    for (int end = head + work.heads_per_segment; head < end; ++head) {
      const int64_t place = p.rows.row(work.tile.sample, head);
      for (int m = 0; m < work.query_tiles; ++m) {
        const int row = m * kQueries;
        barrier_wait(&shared.q_free[at.stage], at.phase ^ 1);
        barrier_expect(&shared.q_landed[at.stage], kQueries * (kRowBytes + sizeof(float)));
        load_tile<T, kQueries, kHeadDim>(shared.q[at.stage], map_q, &shared.q_landed[at.stage], head,
                                         work.tile.other_begin + row);
        bulk_load(shared.lse[at.stage], p.rows.lse + place + row, kQueries * sizeof(float),
                  &shared.q_landed[at.stage]);
        barrier_wait(&shared.dout_free[at.stage], at.phase ^ 1);
        barrier_expect(&shared.dout_landed[at.stage], kQueries * (kRowBytes + sizeof(float)));
        load_tile<T, kQueries, kHeadDim>(shared.dout[at.stage], map_dout, &shared.dout_landed[at.stage], head,
                                         work.tile.other_begin + row);
        bulk_load(shared.delta[at.stage], p.rows.delta + place + row, kQueries * sizeof(float),
                  &shared.dout_landed[at.stage]);
        at.advance();
      }
    }
  }
}

constexpr int kConsumersBarrier = 1;
constexpr int kConsumerThreads = 2 * kWarpgroup;

// Waits for a tile of queries or of their gradients. In a sample's last tile the rows of the next sample are zeroed:
// their weights are 0, and 0 * NaN is NaN.
template <class Shape>
__device__ __forceinline__ void acquire_queries(Barrier* landed, uint32_t phase, uint32_t address, int present) {
  barrier_wait(landed, phase);
  if (present < Shape::kQueries) {
    zero_rows<Shape::kQueries, Shape::kHeadDim>(address, present, Shape::kQueries, threadIdx.x - kWarpgroup,
                                                kConsumerThreads);
    fence_proxy_async();
    named_sync(kConsumersBarrier, kConsumerThreads);
  }
}

// d (64 queries x 64 columns) = dS (from `ds`: its keys are rows) * K.
template <typename T, int kKeys>
__device__ __forceinline__ void multiply_ds_k(float (&d)[32], uint32_t ds, uint32_t k) {
  const uint32_t columns_ds = descriptor_columns(ds, kKeys * kPanelBytes);
  const uint32_t columns_k = descriptor_columns(k, kKeys * kPanelBytes);
#pragma unroll
  for (int i = 0; i < kKeys / 16; ++i) {
    Wgmma<T, 64>::template shared<1, 1>(d, descriptor(columns_ds, i * 16 * kPanelBytes),
                                        descriptor(columns_k, i * 16 * kPanelBytes), i > 0);
  }
}

template <class Shape>
__device__ __forceinline__ void backward_consume(typename Shape::Shared& shared, const BackwardParameters& p,
                                                 const BackwardWork& work, int consumer) {
  using T = typename Shape::T;
  constexpr int kHeadDim = Shape::kHeadDim, kKeys = Shape::kKeys, kQueries = Shape::kQueries;
  const Tile& tile = work.tile;
  const int group = p.heads / p.heads_kv;
  const float factor = p.scale * kLog2e;
  const int thread = threadIdx.x % kWarpgroup;
  const int key = tile.row + consumer * 64 + fragment_row();  // within the sample; the second row is 8 below
  const int first_key = tile.begin;

  float dk[kHeadDim / 2], dv[kHeadDim / 2];
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) dk[i] = dv[i] = 0.f;
  float weight[2] = {minus_infinity(), minus_infinity()}, weight_gradient[2] = {0.f, 0.f};
  Cursor<Shape::kStages> at;
  int turn = 0;  // counts steps over all segments
  int head = tile.head * group;

  for (int segment = 0; segment < work.segments; ++segment) {
    // Weights of this lane's rows, and zeros over absent keys (two threads a row).
    const float* weights = p.log_weight + first_key * p.weight_stride_key + head * p.weight_stride_head;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (key + 8 * i < tile.length) weight[i] = weights[(key + 8 * i) * p.weight_stride_key] * kLog2e;
    }
    const int row = (threadIdx.x - kWarpgroup) / 2;
    const bool absent = tile.row + row >= tile.length ||
                        weights[(tile.row + row) * p.weight_stride_key] == minus_infinity();
    barrier_wait(&shared.kv_landed, segment & 1);
    if (absent) {
      zero_rows<kKeys, kHeadDim>(shared_address(shared.k), row, row + 1, thread % 2, 2);
      zero_rows<kKeys, kHeadDim>(shared_address(shared.v), row, row + 1, thread % 2, 2);
    }
    fence_proxy_async();
    named_sync(kConsumersBarrier, kConsumerThreads);

    // dQ = dS K needs both warpgroups' dS: each computes 64 queries, or 64 columns, over all 128 keys. It is done one
    // step late, so that neither warpgroup waits for the other and the products of one run under the exponentials of
    // the other.
    float* sums = nullptr;  // where the step before adds its part of dq
    const auto add_dq = [&](int of_turn, uint32_t base) {
      float dq[32];
      const uint32_t ds = base + offsetof(typename Shape::Shared, ds) + (of_turn & 1) * sizeof(shared.ds[0]);
      const uint32_t all_k = base + offsetof(typename Shape::Shared, k);
      const int part = consumer * kKeys * kPanelBytes;
      barrier_wait(&shared.ds_written[of_turn & 1], of_turn >> 1 & 1);
      pin(dq);
      wgmma_fence();
      multiply_ds_k<T, kKeys>(dq, kQueries == 128 ? ds + part : ds, kQueries == 128 ? all_k : all_k + part);
      wgmma_commit();
      wgmma_wait<0>();
      pin(dq);
      warp_arrive(&shared.ds_free[of_turn & 1]);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        add_to_global(sums + i * 4 * kWarpgroup, dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
      }
    };

    const int steps = work.heads_per_segment * work.query_tiles;
    int m = 0;  // tile of queries within the head
    for (int step = 0; step < steps; ++step) {
      // Descriptors are rebuilt in every step: hoisted out of the loop they would fill the registers.
      const uint32_t base = recomputed(shared_address(&shared));
      const uint32_t k = base + offsetof(typename Shape::Shared, k) + consumer * 64 * kPanelBytes;
      const uint32_t v = base + offsetof(typename Shape::Shared, v) + consumer * 64 * kPanelBytes;
      float scores[kQueries / 2], dp[kQueries / 2];
      uint32_t packed[kQueries / 4], packed_ds[kQueries / 4];
      const uint32_t q = base + offsetof(typename Shape::Shared, q) + at.stage * sizeof(shared.q[0]);
      const uint32_t dout = base + offsetof(typename Shape::Shared, dout) + at.stage * sizeof(shared.dout[0]);
      const int present = tile.other_length - m * kQueries;

      // S^T = K Q^T, and dP^T = V dO^T under its exponentials.
      acquire_queries<Shape>(&shared.q_landed[at.stage], at.phase, q, present);
      pin(scores);
      wgmma_fence();
      multiply_rows<T, kQueries, kHeadDim, kKeys, kQueries>(scores, k, q, false);
      wgmma_commit();
      acquire_queries<Shape>(&shared.dout_landed[at.stage], at.phase, dout, present);
      pin(dp);
      wgmma_fence();
      multiply_rows<T, kQueries, kHeadDim, kKeys, kQueries>(dp, v, dout, false);
      wgmma_commit();
      wgmma_wait<1>();
      pin(scores);
#pragma unroll
      for (int j = 0; j < kQueries / 8; ++j) {
        const float2 lse = *reinterpret_cast<const float2*>(&shared.lse[at.stage][j * 8 + fragment_column()]);
        scores[4 * j] = exp2_approx(fmaf(scores[4 * j], factor, weight[0] - lse.x));
        scores[4 * j + 1] = exp2_approx(fmaf(scores[4 * j + 1], factor, weight[0] - lse.y));
        scores[4 * j + 2] = exp2_approx(fmaf(scores[4 * j + 2], factor, weight[1] - lse.x));
        scores[4 * j + 3] = exp2_approx(fmaf(scores[4 * j + 3], factor, weight[1] - lse.y));
      }
      wgmma_wait<0>();
      pin(dp);
#pragma unroll
      for (int j = 0; j < kQueries / 8; ++j) {
        const float2 delta = *reinterpret_cast<const float2*>(&shared.delta[at.stage][j * 8 + fragment_column()]);
        dp[4 * j] = scores[4 * j] * (dp[4 * j] - delta.x);
        dp[4 * j + 1] = scores[4 * j + 1] * (dp[4 * j + 1] - delta.y);
        dp[4 * j + 2] = scores[4 * j + 2] * (dp[4 * j + 2] - delta.x);
        dp[4 * j + 3] = scores[4 * j + 3] * (dp[4 * j + 3] - delta.y);
        if constexpr (Shape::kWeightGradient) {
          weight_gradient[0] += dp[4 * j] + dp[4 * j + 1];
          weight_gradient[1] += dp[4 * j + 2] + dp[4 * j + 3];
        }
      }
      pack_fragments<T, kQueries>(packed, scores);
      pack_fragments<T, kQueries>(packed_ds, dp);

      // dV += P^T dO runs while dS goes to shared memory.
      pin(dv), pin(packed);
      wgmma_fence();
      multiply_fragments<T, kHeadDim, kQueries, kQueries>(dv, packed, dout, true);
      wgmma_commit();
      if constexpr (Shape::kAccumulateDq) {
        const int lane = threadIdx.x % 32;
        const int ds_key = consumer * 64 + thread / 32 * 16 + lane / 8 % 2 * 8 + lane % 8;
        const uint32_t ds = shared_address(shared.ds[turn & 1]);
        barrier_wait(&shared.ds_free[turn & 1], (turn >> 1 & 1) ^ 1);
#pragma unroll
        for (int i = 0; i < kQueries / 16; ++i) {
          const int chunk = 2 * i + lane / 16;  // of 8 queries
          store_matrix(ds + (chunk / 8 * kKeys + ds_key) * kPanelBytes + (chunk % 8 ^ ds_key % 8) * 16,
                       packed_ds[4 * i], packed_ds[4 * i + 1], packed_ds[4 * i + 2], packed_ds[4 * i + 3]);
        }
        fence_proxy_async();
        warp_arrive(&shared.ds_written[turn & 1]);
      }
      if constexpr (Shape::kAccumulateDq) {
        if (step > 0) add_dq(turn - 1, base);
        sums = p.rows.dq + (p.rows.row(tile.sample, head) + m * kQueries) * kHeadDim +
               (consumer * 8 * kWarpgroup + thread) * 4;
      }
      pin(dk), pin(packed_ds);
      wgmma_fence();
      multiply_fragments<T, kHeadDim, kQueries, kQueries>(dk, packed_ds, q, true);
      wgmma_commit();

      wgmma_wait<0>();
      pin(dv), pin(packed), pin(dk), pin(packed_ds);
      warp_arrive(&shared.q_free[at.stage]);
      warp_arrive(&shared.dout_free[at.stage]);
      ++turn;
      at.advance();
      if (++m == work.query_tiles) m = 0, ++head;
    }
    if constexpr (Shape::kAccumulateDq) {
      if (steps > 0) {
        add_dq(turn - 1, recomputed(shared_address(&shared)));
      }
    }
    if (work.query_tiles == 0) head += work.heads_per_segment;
    warp_arrive(&shared.kv_free);

    if constexpr (Shape::kWeightGradient) {
      const bool per_head = p.weight_stride_head != 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float sum = quad_sum(weight_gradient[i]);
        if (threadIdx.x % 4 == 0 && key + 8 * i < tile.length) {
          const int64_t token = first_key + key + 8 * i;
          p.dlog_weight[per_head ? token * p.heads + head - 1 : token * p.heads_kv + tile.head] =
              weight[i] == minus_infinity() ? 0.f : sum;
        }
        weight_gradient[i] = 0.f;
      }
    }
  }

  T* address[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t place = (int64_t(first_key + key + 8 * i) * p.heads_kv + tile.head) * kHeadDim;
    const bool exists = key + 8 * i < tile.length;
    address[0][i] = exists ? static_cast<T*>(p.dk) + place : nullptr;
    address[1][i] = exists ? static_cast<T*>(p.dv) + place : nullptr;
    // An absent key's rows are 0 whatever NaN its sample's queries hold.
    if (work.segments == 1 && weight[i] == minus_infinity()) {
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        dk[4 * j + 2 * i] = dk[4 * j + 2 * i + 1] = dv[4 * j + 2 * i] = dv[4 * j + 2 * i + 1] = 0.f;
      }
    }
  }
  store_fragment<T, kHeadDim>(dk, p.scale, p.scale, address[0][0], address[0][1]);
  store_fragment<T, kHeadDim>(dv, 1.f, 1.f, address[1][0], address[1][1]);
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    backward_kernel(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_dout,
                    const __grid_constant__ CUtensorMap map_k, const __grid_constant__ CUtensorMap map_v,
                    const __grid_constant__ BackwardParameters p) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<typename Shape::Shared*>(memory);
  // Beyond the list the entry holds rubbish; read at once with the list's length, it costs no second wait.
  const BackwardWork work = backward_work<Shape>(p);
  if (blockIdx.x >= *p.plan.total * p.heads_kv) return;
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = kConsumerThreads / 32;
    barrier_init(&shared.kv_landed, 1);
    barrier_init(&shared.kv_free, kConsumerWarps);
    for (int i = 0; i < Shape::kStages; ++i) {
      barrier_init(&shared.q_landed[i], 1);
      barrier_init(&shared.q_free[i], kConsumerWarps);
      barrier_init(&shared.dout_landed[i], 1);
      barrier_init(&shared.dout_free[i], kConsumerWarps);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(&shared.ds_written[i], kConsumerWarps);
      barrier_init(&shared.ds_free[i], kConsumerWarps);
    }
    barrier_init_fence();
  }
  __syncthreads();

  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0);
  if (warpgroup == 0) {
    registers_release<24>();
    if (threadIdx.x == 0) backward_produce<Shape>(shared, p, work, &map_q, &map_dout, &map_k, &map_v);
  } else {
    registers_acquire<240>();
    backward_consume<Shape>(shared, p, work, warpgroup - 1);
  }
}

}  // namespace weighted_attention
