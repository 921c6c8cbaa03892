// dq on its own, repeatable to the bit: a block keeps one tile of queries with their dout and walks the keys that its
// chunk sees, as the forward pass does: S = Q K^T, dP = dO V^T, dQ += dS K, summed in registers in a fixed order.
#pragma once

#include "backward_rows.cuh"
#include "pipeline.cuh"

namespace weighted_attention {

struct BackwardDqParameters {
  Plan plan;  // tiles of kQueries queries: the same as rows.plan
  RowWorkspace rows;
  const float* log_weight;
  int64_t weight_stride_chunk, weight_stride_key, weight_stride_head;
  void* dq;
  int heads, group;
  float scale;
  bool causal;
};

template <typename T_, int kHeadDim_>
struct BackwardDqShape {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kQueries = kRowTile;
  static constexpr int kKeys = 128;
  static constexpr int kStages = 2;
  static constexpr int kThreads = 3 * kWarpgroup;

  struct Shared {
    alignas(1024) T q[kQueries * padded_columns(kHeadDim)];
    alignas(1024) T dout[kQueries * padded_columns(kHeadDim)];
    alignas(1024) T k[kStages][kKeys * padded_columns(kHeadDim)];
    alignas(1024) T v[kStages][kKeys * padded_columns(kHeadDim)];
    alignas(16) float bias[kStages][kKeys];
    Ring<kStages> ring_k, ring_v;
    Barrier q_landed;
  };
};

template <class Shape>
__device__ __forceinline__ void backward_dq_consume(typename Shape::Shared& shared, const BackwardDqParameters& p,
                                                    const Tile& tile, int key_tiles, int consumer) {
  using T = typename Shape::T;
  constexpr int kHeadDim = Shape::kHeadDim, kKeys = Shape::kKeys, kQueries = Shape::kQueries;
  const float factor = p.scale * kLog2e;
  const int row = tile.row + consumer * 64 + fragment_row();  // within the chunk; the second row is 8 below
  const int64_t place = p.rows.row(tile.owner, tile.head) + row;
  const float lse[2] = {p.rows.lse[place], p.rows.lse[place + 8]};
  const float delta[2] = {p.rows.delta[place], p.rows.delta[place + 8]};

  float dq[kHeadDim / 2];
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) dq[i] = 0.f;
  Cursor<Shape::kStages> at;
  if (key_tiles > 0) barrier_wait(&shared.q_landed, 0);
  for (int n = 0; n < key_tiles; ++n) {
    float scores[kKeys / 2], dp[kKeys / 2];
    uint32_t packed_ds[kKeys / 4];
    const uint32_t base = recomputed(shared_address(&shared));
    const uint32_t q = base + offsetof(typename Shape::Shared, q) + consumer * 64 * kPanelBytes;
    const uint32_t dout = base + offsetof(typename Shape::Shared, dout) + consumer * 64 * kPanelBytes;
    const uint32_t k = base + offsetof(typename Shape::Shared, k) + at.stage * sizeof(shared.k[0]);
    const uint32_t v = base + offsetof(typename Shape::Shared, v) + at.stage * sizeof(shared.v[0]);
    shared.ring_k.wait_ready(at);
    load_bias<kKeys>(scores, shared.bias[at.stage]);
    pin(scores);
    wgmma_fence();
    multiply_rows<T, kKeys, kHeadDim, kQueries, kKeys>(scores, q, k, true);
    wgmma_commit();
    shared.ring_v.wait_ready(at);
    pin(dp);
    wgmma_fence();
    multiply_rows<T, kKeys, kHeadDim, kQueries, kKeys>(dp, dout, v, false);
    wgmma_commit();
    wgmma_wait<1>();
    pin(scores);
    if (p.causal && same_in_warp((n + 1) * kKeys > tile.row + consumer * 64 + 1)) {
      mask_after<kKeys>(scores, row - n * kKeys, row - n * kKeys + 8);
    }
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) scores[i] = exp2_approx(fmaf(scores[i], factor, -lse[i / 2 % 2]));
    wgmma_wait<0>();
    pin(dp);
    shared.ring_v.release(at);
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) dp[i] = scores[i] * (dp[i] - delta[i / 2 % 2]);
    pack_fragments<T, kKeys>(packed_ds, dp);
    pin(dq), pin(packed_ds);
    wgmma_fence();
    multiply_fragments<T, kHeadDim, kKeys, kKeys>(dq, packed_ds, k, true);
    wgmma_commit();
    wgmma_wait<0>();
    pin(dq), pin(packed_ds);
    shared.ring_k.release(at);
    at.advance();
  }

  T* address[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t token = tile.begin + row + 8 * i;
    address[i] =
        row + 8 * i < tile.length ? static_cast<T*>(p.dq) + (token * p.heads + tile.head) * kHeadDim : nullptr;
  }
  store_fragment<T, kHeadDim>(dq, p.scale, p.scale, address[0], address[1]);
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    backward_dq_kernel(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_dout,
                       const __grid_constant__ CUtensorMap map_k, const __grid_constant__ CUtensorMap map_v,
                       const __grid_constant__ BackwardDqParameters p) {
  using T = typename Shape::T;
  constexpr int kHeadDim = Shape::kHeadDim, kKeys = Shape::kKeys, kQueries = Shape::kQueries;
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<typename Shape::Shared*>(memory);
  if (blockIdx.x >= *p.plan.total * p.heads) return;
  if (threadIdx.x == 0) {
    shared.ring_k.init(2 * kWarpgroup / 32);
    shared.ring_v.init(2 * kWarpgroup / 32);
    barrier_init(&shared.q_landed, 1);
    barrier_init_fence();
  }
  __syncthreads();

  const Tile tile = find_tile(p.plan, blockIdx.x, p.heads, kQueries, p.causal);
  const int first_key = tile.other_begin, keys = tile.other_length;
  const int seen = p.causal ? min(keys, tile.row + kQueries) : keys;
  const int key_tiles = (seen + kKeys - 1) / kKeys;
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0);
  if (warpgroup == 0) {
    registers_release<40>();
    Cursor<Shape::kStages> at;
    if (threadIdx.x == 0) {
      const int head_kv = tile.head / p.group;
      const int token = tile.begin + tile.row;
      for (int n = 0; n < key_tiles; ++n) {
        const int key = first_key + n * kKeys;
        if (n == 0) {
          barrier_expect(&shared.q_landed, 2 * tile_bytes<T, kQueries, kHeadDim>());
          load_tile<T, kQueries, kHeadDim>(shared.q, &map_q, &shared.q_landed, tile.head, token);
          load_tile<T, kQueries, kHeadDim>(shared.dout, &map_dout, &shared.q_landed, tile.head, token);
        }
        shared.ring_k.wait_free(at);
        barrier_expect(&shared.ring_k.landed[at.stage], tile_bytes<T, kKeys, kHeadDim>());
        load_tile<T, kKeys, kHeadDim>(shared.k[at.stage], &map_k, &shared.ring_k.landed[at.stage], head_kv, key);
        shared.ring_v.wait_free(at);
        barrier_expect(&shared.ring_v.landed[at.stage], tile_bytes<T, kKeys, kHeadDim>());
        load_tile<T, kKeys, kHeadDim>(shared.v[at.stage], &map_v, &shared.ring_v.landed[at.stage], head_kv, key);
        at.advance();
      }
    } else if (threadIdx.x / 32 == 1) {
      const float* weights = p.log_weight == nullptr
                                 ? nullptr
                                 : p.log_weight + tile.owner * p.weight_stride_chunk +
                                       first_key * p.weight_stride_key + tile.head * p.weight_stride_head;
      prepare_sample<T, kKeys, kHeadDim>(weights, p.weight_stride_key, key_tiles, keys, 1.f / p.scale, shared.bias,
                                         shared.ring_k, shared.ring_v, shared.k, shared.v, at);
    }
  } else {
    registers_acquire<232>();
    backward_dq_consume<Shape>(shared, p, tile, key_tiles, warpgroup - 1);
  }
}

}  // namespace weighted_attention
