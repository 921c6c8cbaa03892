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

// What is to be done, on its way from the thread that finds out to the warps that do it, so that none waits for device
// memory between two pieces of work.
template <class Work>
struct Handover {
  static constexpr int kStages = 2;
  Work work[kStages];
  Barrier ready[kStages], free[kStages];

  __device__ void init(int readers) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&ready[i], 1);
      barrier_init(&free[i], readers);
    }
  }
  __device__ __forceinline__ void put(Cursor<kStages>& at, const Work& next) {
    barrier_wait(&free[at.stage], at.phase ^ 1);
    work[at.stage] = next;
    barrier_arrive(&ready[at.stage]);
    at.advance();
  }
  // For a warp that looks at its work until `done`, and keeps nothing of it in registers.
  __device__ __forceinline__ const Work& look(Cursor<kStages> at) {
    barrier_wait(&ready[at.stage], at.phase);
    return work[at.stage];
  }
  __device__ __forceinline__ void done(Cursor<kStages>& at) {
    warp_arrive(&free[at.stage]);
    at.advance();
  }
  // kWholeWarp: called by all lanes of a warp, or by one thread that reads for itself.
  template <bool kWholeWarp>
  __device__ __forceinline__ Work get(Cursor<kStages>& at) {
    const Work next = look(at);
    if constexpr (kWholeWarp) {
      done(at);
    } else {
      barrier_arrive(&free[at.stage]);
      at.advance();
    }
    return next;
  }
};

// Loads kRows tokens of one head, panel by panel; kTileRows: of the whole tile, of which these are a part.
template <typename T, int kRows, int kHeadDim, int kTileRows = kRows>
__device__ __forceinline__ void load_tile(T* tile, const CUtensorMap* map, Barrier* barrier, int head, int token) {
#pragma unroll
  for (int panel = 0; panel < padded_columns(kHeadDim) / kPanel; ++panel) {
    tma_load(tile + panel * kTileRows * kPanel, map, barrier, panel * kPanel, head, token);
  }
}

// What load_tile announces to the barrier.
template <typename T, int kRows, int kHeadDim>
__host__ __device__ constexpr int tile_bytes() {
  return kRows * padded_columns(kHeadDim) * int(sizeof(T));
}

// Writes zeros over the rows of keys that count for nothing: 0 * NaN is NaN. Called by a whole warp, of which a row
// takes so many lanes as it has pieces of 16 bytes.
template <typename T, int kKeys, int kHeadDim>
__device__ __forceinline__ void zero_absent(const float* bias, const T* tile) {
  constexpr int kPieces = padded_columns(kHeadDim) / 8, kRowsAtOnce = 32 / kPieces;
  int lane = threadIdx.x % 32;
  asm volatile("" : "+r"(lane));  // addresses are computed here, not kept in registers by the loop around
  const int row = lane / kPieces, piece = lane % kPieces;
  const uint32_t address = shared_address(tile) + (piece / 8 * kKeys + row) * kPanelBytes + piece % 8 * 16;
#pragma unroll 1
  for (int block = 0; block < kKeys; block += 32) {
    const uint32_t absent = __ballot_sync(0xffffffffu, bias[block + lane] == minus_infinity()) >> row;
    if (absent == 0) continue;
#pragma unroll
    for (int i = 0; i < 32; i += kRowsAtOnce) {
      if (absent >> i & 1) zero_16(address + (block + i) * kPanelBytes);
    }
  }
  fence_proxy_async();
}

// The weight warp's walk over the first `tiles` tiles of a sample's keys, of which `keys` are seen: it hands out their
// biases and zeroes the rows of absent keys. The weights of a tile are fetched while those before wait. kReverse: from
// the last tile on.
template <typename T, int kKeys, int kHeadDim, bool kReverse, int kStages, int kValueStages>
__device__ __forceinline__ void prepare_sample(const float* log_weight, int64_t stride, int tiles, int keys,
                                               float inverse_scale, float (&bias)[kStages][kKeys],
                                               Ring<kStages>& ring_k, Ring<kValueStages>& ring_v,
                                               const T (&k)[kStages][kKeys * padded_columns(kHeadDim)],
                                               const T (&v)[kValueStages][kKeys * padded_columns(kHeadDim)],
                                               Cursor<kStages>& at, Cursor<kValueStages>& at_v) {
  constexpr int kPerLane = kKeys / 32;
  static_assert(kKeys % 32 == 0);
  float next[kPerLane];
  const auto fetch = [&](int begin) {
    const int key = begin + threadIdx.x % 32;
    const float* weight = log_weight + key * stride;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      next[i] = minus_infinity();
      if (key + 32 * i < keys) next[i] = log_weight == nullptr ? 0.f : *weight;
      weight += 32 * stride;
    }
  };
  const auto tile = [&](int n) { return (kReverse ? tiles - 1 - n : n) * kKeys; };
  fetch(first_row(tile(0), kKeys, keys));
  for (int n = 0; n < tiles; ++n) {
    ring_k.wait_landed(at);  // so the biases of the tile before in this stage have been read, too
    const int counted = tile(n) - first_row(tile(n), kKeys, keys);
    bool absent = false;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int row = threadIdx.x % 32 + 32 * i;
      // What the scores' accumulators start from.
      bias[at.stage][row] = row < counted ? minus_infinity() : next[i] * inverse_scale;
      absent |= next[i] == minus_infinity();
    }
    fetch(first_row(tile(n + 1), kKeys, keys));
    const bool any_absent = __any_sync(0xffffffffu, absent);
    if (any_absent) zero_absent<T, kKeys, kHeadDim>(bias[at.stage], k[at.stage]);
    warp_arrive(&ring_k.ready[at.stage]);
    ring_v.wait_landed(at_v);
    if (any_absent) zero_absent<T, kKeys, kHeadDim>(bias[at.stage], v[at_v.stage]);
    warp_arrive(&ring_v.ready[at_v.stage]);
    at.advance(), at_v.advance();
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
