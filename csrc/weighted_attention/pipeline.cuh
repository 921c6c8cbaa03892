// Rings of shared-memory stages between the warps that fill them and the warpgroups that use them.
#pragma once

#include "tile.cuh"

namespace weighted_attention {

// Where a warp is in a ring: every role walks all stages in the same order and keeps its own cursor.
template <int kStages>
struct Cursor {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

// The barriers of one ring of key (or value) tiles. `landed`: the copy engine has written the tile; `ready`: the weight
// warp, which stands between, has zeroed its absent rows or found none; `free`: all consumer warps are done with it.
template <int kStages>
struct Ring {
  Barrier landed[kStages], ready[kStages], free[kStages];

  __device__ void init(int consumer_warps) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&landed[i], 1);
      barrier_init(&ready[i], 1);
      barrier_init(&free[i], consumer_warps);
    }
  }
  __device__ __forceinline__ void wait_free(Cursor<kStages> at) { barrier_wait(&free[at.stage], at.phase ^ 1); }
  __device__ __forceinline__ void wait_landed(Cursor<kStages> at) { barrier_wait(&landed[at.stage], at.phase); }
  __device__ __forceinline__ void wait_ready(Cursor<kStages> at) { barrier_wait(&ready[at.stage], at.phase); }
  __device__ __forceinline__ void release(Cursor<kStages> at) { warp_arrive(&free[at.stage]); }
};

// Loads kRows tokens of one head, panel by panel.
template <typename T, int kRows, int kHeadDim>
__device__ __forceinline__ void load_tile(T* tile, const CUtensorMap* map, Barrier* barrier, int head, int token) {
#pragma unroll
  for (int panel = 0; panel < kHeadDim / kPanel; ++panel) {
    tma_load(tile + panel * kRows * kPanel, map, barrier, panel * kPanel, head, token);
  }
}

// One tile's log weights in the lanes of the weight warp: what the scores' accumulators start from, w / scale.
template <int kKeys>
struct KeyWeights {
  static constexpr int kPerLane = (kKeys + 31) / 32;
  float bias[kPerLane];
  int present;  // keys of the tile that belong to the sample

  __device__ __forceinline__ void load(const float* log_weight, int64_t stride, int keys, float inverse_scale) {
    present = min(keys, kKeys);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int row = threadIdx.x % 32 + 32 * i;
      bias[i] = row < present ? log_weight[row * stride] * inverse_scale : minus_infinity();
    }
  }
};

// The weight warp's part for one tile: hands out its biases, and zeroes the rows of absent keys (0 * NaN is NaN).
template <typename T, int kKeys, int kHeadDim, int kStages>
__device__ __forceinline__ void prepare_keys(const KeyWeights<kKeys>& weights, float* bias, Ring<kStages>& ring_k,
                                             Ring<kStages>& ring_v, const T* tile_k, const T* tile_v,
                                             Cursor<kStages> at) {
  constexpr int kPerLane = KeyWeights<kKeys>::kPerLane;
  const int lane = threadIdx.x % 32;
  bool absent = false;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) absent |= lane + 32 * i < kKeys && weights.bias[i] == minus_infinity();
  const bool any_absent = __any_sync(0xffffffffu, absent);

  const auto zero_absent = [&](const T* tile) {
    const uint32_t address = shared_address(tile);
    zero_rows<kKeys, kHeadDim>(address, weights.present, kKeys, lane, 32);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      uint32_t rest =
          __ballot_sync(0xffffffffu, lane + 32 * i < weights.present && weights.bias[i] == minus_infinity());
      for (; rest != 0; rest &= rest - 1) {
        const int row = 32 * i + __ffs(rest) - 1;
        zero_rows<kKeys, kHeadDim>(address, row, row + 1, lane, 32);
      }
    }
    fence_proxy_async();
  };

  ring_k.wait_landed(at);  // so the biases of the tile before in this stage have been read, too
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (lane + 32 * i < kKeys) bias[lane + 32 * i] = weights.bias[i];
  }
  if (any_absent) zero_absent(tile_k);
  warp_arrive(&ring_k.ready[at.stage]);
  ring_v.wait_landed(at);
  if (any_absent) zero_absent(tile_v);
  warp_arrive(&ring_v.ready[at.stage]);
}

// The weight warp's walk over the keys of one sample; the weights of a tile are fetched while those before wait.
template <typename T, int kKeys, int kHeadDim, int kStages>
__device__ __forceinline__ void prepare_sample(const float* log_weight, int64_t stride, int keys, float inverse_scale,
                                               float (&bias)[kStages][kKeys], Ring<kStages>& ring_k,
                                               Ring<kStages>& ring_v, const T (&k)[kStages][kKeys * kHeadDim],
                                               const T (&v)[kStages][kKeys * kHeadDim], Cursor<kStages>& at) {
  KeyWeights<kKeys> weights, next;
  next.load(log_weight, stride, keys, inverse_scale);
  for (int key = 0; key < keys; key += kKeys) {
    weights = next;
    if (key + kKeys < keys) {
      next.load(log_weight + (key + kKeys) * stride, stride, keys - key - kKeys, inverse_scale);
    }
    prepare_keys<T, kKeys, kHeadDim>(weights, bias[at.stage], ring_k, ring_v, k[at.stage], v[at.stage], at);
    at.advance();
  }
}

// Starts a score fragment (64 queries x N keys) at the keys' biases: the products that follow add to it, so that the
// weights cost no arithmetic in the softmax.
template <int N>
__device__ __forceinline__ void load_bias(float (&scores)[N / 2], const float* bias) {
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const float2 b = *reinterpret_cast<const float2*>(bias + j * 8 + fragment_column());
    scores[4 * j] = scores[4 * j + 2] = b.x;
    scores[4 * j + 1] = scores[4 * j + 3] = b.y;
  }
}

}  // namespace weighted_attention
