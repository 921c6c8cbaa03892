// Forward pass. A block keeps one tile of queries and walks the keys of its sample: one warp fetches tiles to work on,
// one drives the copy engine, one prepares the weights, and each consumer warpgroup computes 64 queries. Two overlaps
// hide the softmax: the products of one warpgroup run under the softmax of another (nothing makes them take turns: they
// fall into it), and within a warpgroup P V of a key tile runs under the softmax of the next.
#pragma once

#include <type_traits>

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
  int together;      // causal: heads whose tiles share a list, longest first
  float scale;
};

// One tile of queries of one head, with the keys that its chunk sees.
struct alignas(16) ForwardWork {
  int query, queries;  // first token; tokens from there to the end of the chunk
  int row;             // of the first token within the chunk
  int chunk, head;
  int key, keys;       // first token of the sample's keys; how many the chunk sees
  int key_tiles;       // how many tiles of them to walk; -1: there is no more work
};

template <typename T_, int kHeadDim_, int kConsumers_, int kKeys_, int kStages_, int kValueStages_, bool kCausal_>
struct ForwardShape {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kConsumers = kConsumers_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kQueries = 64 * kConsumers;
  static constexpr int kStages = kStages_;
  static constexpr int kValueStages = kValueStages_;
  static constexpr int kQueryStages = 2;
  static constexpr bool kCausal = kCausal_;
  // Tiles of keys are walked from the last one on, which may hold few keys: nothing hides the first tile's products and
  // exponentials. Not causally, where the last tile is the diagonal one, nor in fp16, where a base from few keys seldom
  // lasts.
  static constexpr bool kReverse = !kCausal && !std::is_same<T, __half>::value;
  static_assert(kKeys % 64 == 0);  // so the diagonal of 64 queries crosses one tile of keys
  // A sum of weights 2^x up to here is safe in T and, after summing and multiplying, in fp32.
  static constexpr float kLimit = std::is_same<T, __half>::value ? 0x1p15f : 0x1p60f;
  static constexpr int kThreads = kWarpgroup * (kConsumers + 1);
  static constexpr int kProducerRegisters = kConsumers == 2 ? 56 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 224 : 160;

  struct Shared {
    alignas(1024) T q[kQueryStages][kQueries * padded_columns(kHeadDim)];
    alignas(1024) T k[kStages][kKeys * padded_columns(kHeadDim)];
    alignas(1024) T v[kValueStages][kKeys * padded_columns(kHeadDim)];
    alignas(16) float bias[kStages][kKeys];
    Ring<kStages> ring_k;
    Ring<kValueStages> ring_v;
    Barrier q_landed[kQueryStages][kConsumers], q_free[kQueryStages][kConsumers];
    Handover<ForwardWork> schedule;
  };
};

// Running base and sum of the two rows that a lane shares with its quad. Scores turn into weights
// 2^(factor * (score - base)). The base need not be the maximum, it must only keep them within the floating-point
// range: it is the maximum of the first tile of keys, and moves only where a later tile would leave that range.
struct Softmax {
  float maximum[2] = {minus_infinity(), minus_infinity()};  // of the tiles that were searched
  float sum[2] = {0.f, 0.f};                                // this lane's columns only
  bool settled = false;                                     // every row of the warp has met a key

  // A row whose maximum is -inf has no key yet: any finite base will do.
  __device__ __forceinline__ float base(int row) const {
    return maximum[row] == minus_infinity() ? 0.f : maximum[row];
  }

  // Turns scores into weights; `total`: their sums.
  template <int N>
  __device__ __forceinline__ void exponentials(float (&scores)[N / 2], float factor, float (&total)[2]) const {
    const float shift[2] = {-base(0) * factor, -base(1) * factor};
    total[0] = total[1] = 0.f;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      scores[4 * j] = exp2_approx(fmaf(scores[4 * j], factor, shift[0]));
      scores[4 * j + 1] = exp2_approx(fmaf(scores[4 * j + 1], factor, shift[0]));
      scores[4 * j + 2] = exp2_approx(fmaf(scores[4 * j + 2], factor, shift[1]));
      scores[4 * j + 3] = exp2_approx(fmaf(scores[4 * j + 3], factor, shift[1]));
      total[0] += scores[4 * j], total[1] += scores[4 * j + 2];
      total[0] += scores[4 * j + 1], total[1] += scores[4 * j + 3];
    }
  }

  // A tile whose maximum is searched for and becomes the base where it is larger. Returns whether earlier results are
  // to be multiplied by `rescale`.
  template <int N>
  __device__ __forceinline__ bool careful(float (&scores)[N / 2], float factor, float (&rescale)[2]) {
    float top[2] = {scores[0], scores[2]};
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      top[0] = fmaxf(top[0], fmaxf(scores[4 * j], scores[4 * j + 1]));
      top[1] = fmaxf(top[1], fmaxf(scores[4 * j + 2], scores[4 * j + 3]));
    }
    top[0] = quad_max(top[0]), top[1] = quad_max(top[1]);
    const bool moved = __any_sync(0xffffffffu, top[0] > maximum[0] || top[1] > maximum[1]);
    if (moved) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float before = maximum[row];
        maximum[row] = fmaxf(before, top[row]);
        rescale[row] = exp2_approx((before - base(row)) * factor);
        sum[row] *= rescale[row];
      }
    }
    settled = __all_sync(0xffffffffu, maximum[0] > minus_infinity() && maximum[1] > minus_infinity());
    float total[2];
    exponentials<N>(scores, factor, total);
    sum[0] += total[0], sum[1] += total[1];
    return moved;
  }

  // A tile without that search. False: a weight exceeds what is safe (its tile's sum exceeds `limit`), and the scores,
  // which are lost, have to be computed again for `careful`; nothing has been added.
  template <int N>
  __device__ __forceinline__ bool hopeful(float (&scores)[N / 2], float factor, float limit) {
    float total[2];
    exponentials<N>(scores, factor, total);
    if (__any_sync(0xffffffffu, total[0] > limit || total[1] > limit)) return false;
    sum[0] += total[0], sum[1] += total[1];
    return true;
  }
};

// Blocks take tiles one by one as they get free: the list begins with the most expensive ones.
template <class Shape>
__device__ __forceinline__ void forward_schedule(typename Shape::Shared& shared, const ForwardParameters& p) {
  Cursor<Handover<ForwardWork>::kStages> at;
  const int tiles = *p.plan.total * p.heads;
  for (int linear = blockIdx.x; linear < tiles; linear = gridDim.x + atomicAdd(p.plan.next, 1)) {
    const Tile tile = Shape::kCausal ? find_single_tile(p.plan, linear, p.heads, p.together, Shape::kQueries)
                                     : find_tile(p.plan, linear, p.heads, Shape::kQueries);
    const int seen = Shape::kCausal ? min(tile.other_length, tile.row + Shape::kQueries) : tile.other_length;
    shared.schedule.put(at, {tile.begin + tile.row, tile.length - tile.row, tile.row, tile.owner, tile.head,
                             tile.other_begin, tile.other_length, (seen + Shape::kKeys - 1) / Shape::kKeys});
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
  Cursor<Shape::kValueStages> at_v;
  Cursor<Shape::kQueryStages> at_q;
  Cursor<Handover<ForwardWork>::kStages> next;
  for (;;) {
    const ForwardWork work = shared.schedule.template get<false>(next);
    if (work.key_tiles < 0) return;
    const int head_kv = work.head / p.group;
    for (int n = 0; n < work.key_tiles; ++n) {
      const int tile = Shape::kReverse ? work.key_tiles - 1 - n : n;
      const int key = work.key + first_row(tile * Shape::kKeys, Shape::kKeys, work.keys);
      shared.ring_k.wait_free(at);
      barrier_expect(&shared.ring_k.landed[at.stage], kTileBytes);
      load_tile<T, Shape::kKeys, Shape::kHeadDim>(shared.k[at.stage], map_k, &shared.ring_k.landed[at.stage], head_kv,
                                                  key);
      if (n == 0) {
        for (int i = 0; i < Shape::kConsumers; ++i) {
          Barrier* landed = &shared.q_landed[at_q.stage][i];
          barrier_wait(&shared.q_free[at_q.stage][i], at_q.phase ^ 1);
          barrier_expect(landed, tile_bytes<T, 64, Shape::kHeadDim>());
          load_tile<T, 64, Shape::kHeadDim, Shape::kQueries>(shared.q[at_q.stage] + i * 64 * kPanel, map_q, landed,
                                                             work.head, work.query + i * 64);
        }
        at_q.advance();
      }
      shared.ring_v.wait_free(at_v);
      barrier_expect(&shared.ring_v.landed[at_v.stage], kTileBytes);
      load_tile<T, Shape::kKeys, Shape::kHeadDim>(shared.v[at_v.stage], map_v, &shared.ring_v.landed[at_v.stage],
                                                  head_kv, key);
      at.advance(), at_v.advance();
    }
  }
}

template <class Shape>
__device__ __forceinline__ void forward_weigh(typename Shape::Shared& shared, const ForwardParameters& p) {
  Cursor<Shape::kStages> at;
  Cursor<Shape::kValueStages> at_v;
  Cursor<Handover<ForwardWork>::kStages> next;
  for (;;) {
    const ForwardWork work = shared.schedule.template get<true>(next);
    if (work.key_tiles < 0) return;
    const float* weights = p.log_weight == nullptr
                               ? nullptr
                               : p.log_weight + work.chunk * p.weight_stride_chunk + work.key * p.weight_stride_key +
                                     work.head * p.weight_stride_head;
    prepare_sample<typename Shape::T, Shape::kKeys, Shape::kHeadDim, Shape::kReverse>(
        weights, p.weight_stride_key, work.key_tiles, work.keys, 1.f / p.scale, shared.bias, shared.ring_k,
        shared.ring_v, shared.k, shared.v, at, at_v);
  }
}

template <class Shape>
__device__ __forceinline__ void forward_consume(typename Shape::Shared& shared, const ForwardParameters& p,
                                                const CUtensorMap* map_out, int consumer) {
  using T = typename Shape::T;
  constexpr int kHeadDim = Shape::kHeadDim, kKeys = Shape::kKeys, kQueries = Shape::kQueries;
  Cursor<Shape::kStages> at;
  Cursor<Shape::kValueStages> at_v;
  Cursor<Handover<ForwardWork>::kStages> next;
  Cursor<Shape::kQueryStages> at_q;
  // Results leave from where their queries were, a place that is given back when the copy engine has read them: in the
  // next tile.
  Barrier* lent = nullptr;
  const auto give_back = [&] {
    if (lent != nullptr && threadIdx.x % 32 == 0) bulk_wait_read(), barrier_arrive(lent);
    lent = nullptr;
  };
  const float factor = p.scale * kLog2e;
  float scores[kKeys / 2], out[kHeadDim / 2];
  uint32_t weights[kKeys / 4];

  for (;;) {
    const ForwardWork& work = shared.schedule.look(next);
    const int key_tiles = work.key_tiles;
    if (key_tiles < 0) break;
    const uint32_t q = shared_address(shared.q[at_q.stage]) + consumer * 64 * kPanelBytes;
    const auto multiply_keys = [&](int stage) {
      multiply_rows<T, kKeys, kHeadDim, kQueries, kKeys>(scores, q, shared_address(shared.k[stage]), true);
    };
    // What this warpgroup's queries see: nothing where none exists, and causally the tiles up to the diagonal, which
    // alone needs a mask.
    int walk = consumer * 64 < work.queries ? key_tiles : 0;
    if constexpr (Shape::kCausal) walk = min(walk, (work.row + consumer * 64) / kKeys + 1);
    const auto mask = [&](int n) {
      if constexpr (Shape::kCausal) {
        const int last = work.row + consumer * 64 + fragment_row() - first_row(n * kKeys, kKeys, work.keys);
        if (same_in_warp(n + 1 == walk)) mask_after<kKeys>(scores, last, last + 8);
      }
    };
    Softmax softmax;
    float rescale[2];
    // Rows that do not exist hold another chunk's queries: above every score, their base never has to move, so that no
    // result depends on them.
    if (consumer * 64 + fragment_row() >= work.queries) softmax.maximum[0] = 3e38f;
    if (consumer * 64 + fragment_row() + 8 >= work.queries) softmax.maximum[1] = 3e38f;

    if (key_tiles > 0) barrier_wait(&shared.q_landed[at_q.stage][consumer], at_q.phase);
    if (walk == 0) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) out[i] = 0.f;
    } else {
      shared.ring_k.wait_ready(at);
      // Whether the lower half of the first tile counts elsewhere.
      if (Shape::kReverse && same_in_warp(work.keys >= kKeys && key_tiles * kKeys - work.keys >= kKeys / 2)) {
        float upper[kKeys / 4];
        uint32_t packed[kKeys / 8];
        load_bias<kKeys / 2>(upper, shared.bias[at.stage] + kKeys / 2);
        pin(upper);
        wgmma_fence();
        multiply_rows<T, kKeys / 2, kHeadDim, kQueries, kKeys>(
            upper, q, shared_address(shared.k[at.stage]) + kKeys / 2 * kPanelBytes, true);
        wgmma_commit();
        wgmma_wait<0>();
        pin(upper);
        shared.ring_k.release(at);
        give_back();
        softmax.careful<kKeys / 2>(upper, factor, rescale);
        pack_fragments<T, kKeys / 2>(packed, upper);
#pragma unroll
        for (int i = 0; i < kKeys / 8; ++i) weights[i] = 0, weights[kKeys / 8 + i] = packed[i];
      } else {
        load_bias<kKeys>(scores, shared.bias[at.stage]);
        pin(scores);
        wgmma_fence();
        multiply_keys(at.stage);
        wgmma_commit();
        wgmma_wait<0>();
        pin(scores);
        shared.ring_k.release(at);
        give_back();
        mask(0);
        softmax.careful<kKeys>(scores, factor, rescale);
        pack_fragments<T, kKeys>(weights, scores);
      }

      for (int n = 1; n < walk; ++n) {
        at.advance();
        shared.ring_k.wait_ready(at);
        load_bias<kKeys>(scores, shared.bias[at.stage]);
        shared.ring_v.wait_ready(at_v);
        pin(scores), pin(out), pin(weights);
        wgmma_fence();
        multiply_keys(at.stage);
        wgmma_commit();
        multiply_fragments<T, kHeadDim, kKeys, kKeys>(out, weights, shared_address(shared.v[at_v.stage]), n > 1);
        wgmma_commit();
        wgmma_wait<1>();
        pin(scores);
        mask(n);
        if (!softmax.settled || !softmax.hopeful<kKeys>(scores, factor, Shape::kLimit)) {
          if (softmax.settled) {
            load_bias<kKeys>(scores, shared.bias[at.stage]);
            multiply_rows_alone<T, kKeys, kHeadDim, kQueries, kKeys>(scores, q, shared_address(shared.k[at.stage]));
            mask(n);
          }
          const bool moved = softmax.careful<kKeys>(scores, factor, rescale);
          if (moved) {
            wgmma_wait<0>();
            pin(out);
#pragma unroll
            for (int i = 0; i < kHeadDim / 2; ++i) out[i] *= rescale[i / 2 % 2];
          }
        }
        shared.ring_k.release(at);
        wgmma_wait<0>();
        pin(out), pin(weights);
        shared.ring_v.release(at_v);
        at_v.advance();
        pack_fragments<T, kKeys>(weights, scores);
      }
      shared.ring_v.wait_ready(at_v);
      pin(out), pin(weights);
      wgmma_fence();
      multiply_fragments<T, kHeadDim, kKeys, kKeys>(out, weights, shared_address(shared.v[at_v.stage]), walk > 1);
      wgmma_commit();
      wgmma_wait<0>();
      pin(out);
      shared.ring_v.release(at_v);
      at.advance(), at_v.advance();
    }
    give_back();

    const float sum[2] = {quad_sum(softmax.sum[0]), quad_sum(softmax.sum[1])};
    const int place_row = consumer * 64 + fragment_row();
    const int warp_row = consumer * 64 + threadIdx.x % kWarpgroup / 32 * 16;
    const bool whole = key_tiles > 0 && warp_row + 16 <= work.queries;  // the copy engine can store the warp's rows
    const int head = work.head, token = work.query + warp_row;
    T* address[2];
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool exists = place_row + 8 * i < work.queries;
      const int64_t place = int64_t(work.query + place_row + 8 * i) * p.heads + work.head;
      inverse[i] = sum[i] == 0.f ? 0.f : reciprocal_approx(sum[i]);
      address[i] = exists ? static_cast<T*>(p.out) + place * kHeadDim : nullptr;
      if (exists && threadIdx.x % 4 == 0) {
        p.lse[place] =
            sum[i] == 0.f ? minus_infinity() : (softmax.base(i) * factor + __log2f(sum[i])) * kLn2;
      }
    }
    shared.schedule.done(next);
    named_sync(1 + consumer, kWarpgroup);  // all are done with their queries
    if (same_in_warp(whole)) {
      store_fragment_shared<T, kHeadDim, kQueries>(q, out, inverse[0], inverse[1]);
      fence_proxy_async();
      __syncwarp();
      if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int panel = 0; panel < padded_columns(kHeadDim) / kPanel; ++panel) {
          const T* rows = shared.q[at_q.stage] + (panel * kQueries + warp_row) * kPanel;
          tma_store(map_out, rows, panel * kPanel, head, token);
        }
        bulk_commit();
      }
    } else {
      store_fragment<T, kHeadDim>(out, inverse[0], inverse[1], address[0], address[1]);
    }
    if (key_tiles > 0) {
      lent = &shared.q_free[at_q.stage][consumer];
      at_q.advance();
    }
    // The rest of the walk is for the others. A stage is given back only once it is filled: before, the barrier still
    // counts who gave it back the time before.
    for (int n = walk; n < key_tiles; ++n) {
      shared.ring_k.wait_ready(at);
      shared.ring_k.release(at);
      shared.ring_v.wait_ready(at_v);
      shared.ring_v.release(at_v);
      at.advance(), at_v.advance();
    }
  }
  give_back();
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    forward_kernel(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
                   const __grid_constant__ CUtensorMap map_v, const __grid_constant__ CUtensorMap map_out,
                   const __grid_constant__ ForwardParameters p) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<typename Shape::Shared*>(memory);
  if (threadIdx.x == 0) {
    shared.ring_k.init(4 * Shape::kConsumers);
    shared.ring_v.init(4 * Shape::kConsumers);
    for (int i = 0; i < Shape::kQueryStages * Shape::kConsumers; ++i) {
      barrier_init(&shared.q_landed[0][i], 1);
      barrier_init(&shared.q_free[0][i], 4);
    }
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
    forward_consume<Shape>(shared, p, &map_out, warpgroup - 1);
  }
}

}  // namespace weighted_attention
