// Forward pass. A block keeps one tile of queries and walks the keys of its sample: one warp fetches tiles to work on,
// one drives the copy engine, one prepares the weights, and each consumer warpgroup computes 64 queries. Two overlaps
// hide the softmax: the products of one warpgroup run under the softmax of another (nothing makes them take turns: they
// fall into it), and within a warpgroup P V of a key tile runs under the softmax of the next.
#pragma once

#include <limits.h>

#include "pipeline.cuh"
#include "plan.cuh"

namespace weighted_attention {

// Scores are in units of 1 / scale until the exponential, where one multiply-add brings them to base 2.
struct ForwardParameters {
  Plan plan;
  const float* log_weight;
  int64_t weight_stride_chunk, weight_stride_key, weight_stride_head;
  void* out;
  float* lse;
  int heads, group;  // group: query heads per key head
  float scale;
  bool causal;
};

// One tile of queries of one head, with the keys that its chunk sees.
struct alignas(16) ForwardWork {
  int query, queries;  // first token; tokens from there to the end of the chunk
  int row;             // of the first token within the chunk
  int chunk, head;
  int key, keys;       // first token of the sample's keys; how many the chunk sees
  int key_tiles;       // how many tiles of them to walk; -1: there is no more work
};

// Tiles on their way from the warp that fetches them to all others, so that none waits for device memory between tiles.
struct Schedule {
  static constexpr int kStages = 2;
  ForwardWork work[kStages];
  Barrier ready[kStages], free[kStages];

  __device__ void init(int readers) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&ready[i], 1);
      barrier_init(&free[i], readers);
    }
  }
  __device__ __forceinline__ void put(Cursor<kStages> at, const ForwardWork& next) {
    barrier_wait(&free[at.stage], at.phase ^ 1);
    work[at.stage] = next;
    barrier_arrive(&ready[at.stage]);
  }
  // kWholeWarp: called by all lanes of a warp, or by one thread that reads for itself.
  template <bool kWholeWarp>
  __device__ __forceinline__ ForwardWork get(Cursor<kStages>& at) {
    barrier_wait(&ready[at.stage], at.phase);
    const ForwardWork next = work[at.stage];
    if constexpr (kWholeWarp) {
      warp_arrive(&free[at.stage]);
    } else {
      barrier_arrive(&free[at.stage]);
    }
    at.advance();
    return next;
  }
};

template <typename T_, int kHeadDim_, int kConsumers_, int kKeys_>
struct ForwardShape {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kConsumers = kConsumers_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kQueries = 64 * kConsumers;
  static constexpr int kStages = 2;
  static constexpr int kThreads = kWarpgroup * (kConsumers + 1);
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;

  struct Shared {
    alignas(1024) T q[kQueries * padded_columns(kHeadDim)];
    alignas(1024) T k[kStages][kKeys * padded_columns(kHeadDim)];
    alignas(1024) T v[kStages][kKeys * padded_columns(kHeadDim)];
    alignas(16) float bias[kStages][kKeys];
    Ring<kStages> ring_k, ring_v;
    Barrier q_landed, q_free;
    Schedule schedule;
  };
};

// Running maximum and sum of the two rows that a lane shares with its quad.
struct Softmax {
  float maximum[2] = {minus_infinity(), minus_infinity()};
  float sum[2] = {0.f, 0.f};  // this lane's columns only

  // A row whose maximum is -inf has no key yet: any finite base will do.
  __device__ __forceinline__ float base(int row) const {
    return maximum[row] == minus_infinity() ? 0.f : maximum[row];
  }

  // Turns scores into weights 2^(factor * (score - base)). The base follows the maximum only when that has grown by
  // more than 2^8 in some row of the warp: until then the larger weights are as exact, and nothing is rescaled.
  // Returns whether earlier results are to be multiplied by `rescale`.
  template <int N>
  __device__ __forceinline__ bool step(float (&scores)[N / 2], float factor, float (&rescale)[2]) {
    float top[2] = {scores[0], scores[2]};
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      top[0] = fmaxf(top[0], fmaxf(scores[4 * j], scores[4 * j + 1]));
      top[1] = fmaxf(top[1], fmaxf(scores[4 * j + 2], scores[4 * j + 3]));
    }
    top[0] = quad_max(top[0]), top[1] = quad_max(top[1]);
    const bool grown = (top[0] - maximum[0]) * factor > 8.f || (top[1] - maximum[1]) * factor > 8.f;
    const bool moved = __any_sync(0xffffffffu, grown);
    if (moved) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float before = maximum[row];
        maximum[row] = fmaxf(before, top[row]);
        rescale[row] = exp2_approx((before - base(row)) * factor);
        sum[row] *= rescale[row];
      }
    }
    const float shift[2] = {-base(0) * factor, -base(1) * factor};
    float partial[2] = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      scores[4 * j] = exp2_approx(fmaf(scores[4 * j], factor, shift[0]));
      scores[4 * j + 1] = exp2_approx(fmaf(scores[4 * j + 1], factor, shift[0]));
      scores[4 * j + 2] = exp2_approx(fmaf(scores[4 * j + 2], factor, shift[1]));
      scores[4 * j + 3] = exp2_approx(fmaf(scores[4 * j + 3], factor, shift[1]));
      sum[0] += scores[4 * j], partial[0] += scores[4 * j + 1];
      sum[1] += scores[4 * j + 2], partial[1] += scores[4 * j + 3];
    }
    sum[0] += partial[0], sum[1] += partial[1];
    return moved;
  }
};

// Blocks take tiles one by one as they get free: the list begins with the most expensive ones.
template <class Shape>
__device__ __forceinline__ void forward_schedule(typename Shape::Shared& shared, const ForwardParameters& p) {
  Cursor<Schedule::kStages> at;
  const int tiles = *p.plan.total * p.heads;
  for (int linear = blockIdx.x; linear < tiles; linear = gridDim.x + atomicAdd(p.plan.next, 1)) {
    const Tile tile = find_tile(p.plan, linear, p.heads, Shape::kQueries, p.causal);
    const int seen = p.causal ? min(tile.other_length, tile.row + Shape::kQueries) : tile.other_length;
    shared.schedule.put(at, {tile.begin + tile.row, tile.length - tile.row, tile.row, tile.owner, tile.head,
                             tile.other_begin, tile.other_length, (seen + Shape::kKeys - 1) / Shape::kKeys});
    at.advance();
  }
  shared.schedule.put(at, {0, 0, 0, 0, 0, 0, 0, -1});
}

template <class Shape>
__device__ __forceinline__ void forward_produce(typename Shape::Shared& shared, const ForwardParameters& p,
                                                const CUtensorMap* map_q, const CUtensorMap* map_k,
                                                const CUtensorMap* map_v) {
  using T = typename Shape::T;
  constexpr int kTileBytes = tile_bytes<T, Shape::kKeys, Shape::kHeadDim>();
  Cursor<Shape::kStages> at;
  Cursor<Schedule::kStages> next;
  uint32_t q_phase = 0;
  for (;;) {
    const ForwardWork work = shared.schedule.template get<false>(next);
    if (work.key_tiles < 0) return;
    const int head_kv = work.head / p.group;
    for (int n = 0; n < work.key_tiles; ++n) {
      const int key = work.key + n * Shape::kKeys;
      shared.ring_k.wait_free(at);
      barrier_expect(&shared.ring_k.landed[at.stage], kTileBytes);
      load_tile<T, Shape::kKeys, Shape::kHeadDim>(shared.k[at.stage], map_k, &shared.ring_k.landed[at.stage], head_kv,
                                                  key);
      if (n == 0) {
        barrier_wait(&shared.q_free, q_phase ^ 1);
        barrier_expect(&shared.q_landed, tile_bytes<T, Shape::kQueries, Shape::kHeadDim>());
        load_tile<T, Shape::kQueries, Shape::kHeadDim>(shared.q, map_q, &shared.q_landed, work.head, work.query);
        q_phase ^= 1;
      }
      shared.ring_v.wait_free(at);
      barrier_expect(&shared.ring_v.landed[at.stage], kTileBytes);
      load_tile<T, Shape::kKeys, Shape::kHeadDim>(shared.v[at.stage], map_v, &shared.ring_v.landed[at.stage], head_kv,
                                                  key);
      at.advance();
    }
  }
}

template <class Shape>
__device__ __forceinline__ void forward_weigh(typename Shape::Shared& shared, const ForwardParameters& p) {
  Cursor<Shape::kStages> at;
  Cursor<Schedule::kStages> next;
  for (;;) {
    const ForwardWork work = shared.schedule.template get<true>(next);
    if (work.key_tiles < 0) return;
    const float* weights = p.log_weight == nullptr
                               ? nullptr
                               : p.log_weight + work.chunk * p.weight_stride_chunk + work.key * p.weight_stride_key +
                                     work.head * p.weight_stride_head;
    prepare_sample<typename Shape::T, Shape::kKeys, Shape::kHeadDim>(
        weights, p.weight_stride_key, work.key_tiles, work.keys, 1.f / p.scale, shared.bias, shared.ring_k,
        shared.ring_v, shared.k, shared.v, at);
  }
}

template <class Shape>
__device__ __forceinline__ void forward_consume(typename Shape::Shared& shared, const ForwardParameters& p,
                                                int consumer) {
  using T = typename Shape::T;
  constexpr int kHeadDim = Shape::kHeadDim, kKeys = Shape::kKeys, kQueries = Shape::kQueries;
  Cursor<Shape::kStages> at;
  Cursor<Schedule::kStages> next;
  uint32_t q_phase = 0;
  const float factor = p.scale * kLog2e;
  const uint32_t q = shared_address(shared.q) + consumer * 64 * kPanelBytes;
  float scores[kKeys / 2], out[kHeadDim / 2];
  uint32_t weights[kKeys / 4];

  for (;;) {
    const ForwardWork work = shared.schedule.template get<true>(next);
    if (work.key_tiles < 0) break;
    // Under a causal mask a warpgroup needs fewer tiles than its block walks, and masks the last of them.
    const int row = work.row + consumer * 64;
    const int key_tiles = p.causal ? min(work.key_tiles, (row + 64 + kKeys - 1) / kKeys) : work.key_tiles;
    const int first_masked = p.causal ? (row + 1) / kKeys : INT_MAX;
    const auto mask = [&](int n) {
      const int last = row + fragment_row() - n * kKeys;
      if (n >= first_masked) mask_after<kKeys>(scores, last, last + 8);
    };
    Softmax softmax;
    float rescale[2];

    if (key_tiles == 0) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) out[i] = 0.f;
    } else {
      barrier_wait(&shared.q_landed, q_phase);
      q_phase ^= 1;
      shared.ring_k.wait_ready(at);
      load_bias<kKeys>(scores, shared.bias[at.stage]);
      pin(scores);
      wgmma_fence();
      multiply_rows<T, kKeys, kHeadDim, kQueries, kKeys>(scores, q, shared_address(shared.k[at.stage]), true);
      wgmma_commit();
      wgmma_wait<0>();
      pin(scores);
      shared.ring_k.release(at);
      mask(0);
      softmax.step<kKeys>(scores, factor, rescale);
      pack_fragments<T, kKeys>(weights, scores);

      for (int n = 1; n < key_tiles; ++n) {
        const Cursor<Shape::kStages> before = at;
        at.advance();
        shared.ring_k.wait_ready(at);
        load_bias<kKeys>(scores, shared.bias[at.stage]);
        shared.ring_v.wait_ready(before);
        pin(scores), pin(out), pin(weights);
        wgmma_fence();
        multiply_rows<T, kKeys, kHeadDim, kQueries, kKeys>(scores, q, shared_address(shared.k[at.stage]), true);
        wgmma_commit();
        multiply_fragments<T, kHeadDim, kKeys, kKeys>(out, weights, shared_address(shared.v[before.stage]), n > 1);
        wgmma_commit();
        wgmma_wait<1>();
        pin(scores);
        shared.ring_k.release(at);
        mask(n);
        const bool moved = softmax.step<kKeys>(scores, factor, rescale);
        wgmma_wait<0>();
        pin(out), pin(weights);
        shared.ring_v.release(before);
        if (moved) {
#pragma unroll
          for (int i = 0; i < kHeadDim / 2; ++i) out[i] *= rescale[i / 2 % 2];
        }
        pack_fragments<T, kKeys>(weights, scores);
      }
      warp_arrive(&shared.q_free);
      shared.ring_v.wait_ready(at);
      pin(out), pin(weights);
      wgmma_fence();
      multiply_fragments<T, kHeadDim, kKeys, kKeys>(out, weights, shared_address(shared.v[at.stage]), key_tiles > 1);
      wgmma_commit();
      wgmma_wait<0>();
      pin(out);
      shared.ring_v.release(at);
      at.advance();
      for (int n = key_tiles; n < work.key_tiles; ++n) {
        shared.ring_k.wait_ready(at);
        shared.ring_k.release(at);
        shared.ring_v.wait_ready(at);
        shared.ring_v.release(at);
        at.advance();
      }
    }

    const float sum[2] = {quad_sum(softmax.sum[0]), quad_sum(softmax.sum[1])};
    const int place_row = consumer * 64 + fragment_row();
    T* address[2];
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool exists = place_row + 8 * i < work.queries;
      const int64_t place = int64_t(work.query + place_row + 8 * i) * p.heads + work.head;
      inverse[i] = sum[i] == 0.f ? 0.f : 1.f / sum[i];
      address[i] = exists ? static_cast<T*>(p.out) + place * kHeadDim : nullptr;
      if (exists && threadIdx.x % 4 == 0) {
        p.lse[place] =
            sum[i] == 0.f ? minus_infinity() : (softmax.base(i) * factor + log2f(sum[i])) * kLn2;
      }
    }
    store_fragment<T, kHeadDim>(out, inverse[0], inverse[1], address[0], address[1]);
  }
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    forward_kernel(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
                   const __grid_constant__ CUtensorMap map_v, const __grid_constant__ ForwardParameters p) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<typename Shape::Shared*>(memory);
  if (threadIdx.x == 0) {
    shared.ring_k.init(4 * Shape::kConsumers);
    shared.ring_v.init(4 * Shape::kConsumers);
    barrier_init(&shared.q_landed, 1);
    barrier_init(&shared.q_free, 4 * Shape::kConsumers);
    shared.schedule.init(4 * Shape::kConsumers + 2);
    barrier_init_fence();
  }
  __syncthreads();

  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0);
  if (warpgroup == 0) {
    registers_release<Shape::kProducerRegisters>();
    if (threadIdx.x == 0) forward_produce<Shape>(shared, p, &map_q, &map_k, &map_v);
    if (threadIdx.x / 32 == 1) forward_weigh<Shape>(shared, p);
    if (threadIdx.x == 64) forward_schedule<Shape>(shared, p);
  } else {
    registers_acquire<Shape::kConsumerRegisters>();
    forward_consume<Shape>(shared, p, warpgroup - 1);
  }
}

}  // namespace weighted_attention
