// Backward pass. A block keeps 128 keys of one key head and walks the queries of its sample, of every query head that
// shares the key head, in a fixed order: dk and dv are sums in registers and never need atomics (a block of the last
// round may have a share of that walk, backward_shares.cuh). Scores are computed transposed, S^T = K Q^T: each
// warpgroup owns 64 keys, P^T and dS^T leave the softmax as the register operands of dV += P^T dO and dK += dS^T Q, and
// the weight of a key is one number per fragment row.
//
// dS also goes through shared memory into dQ = dS K, which is added to fp32 sums in device memory: in any order, or,
// with kRepeatable, in a fixed one (backward_turns.cuh).
#pragma once

#include "backward_dq.cuh"

namespace weighted_attention {

// The walk: the chunks that see a key of the tile, in each the query heads that share the key head, in each the tiles
// of queries (under a causal mask from the diagonal on), of these the block's share.
template <class Shape>
__device__ __forceinline__ void backward_produce(typename Shape::Shared& shared, const BackwardParameters& p,
                                                 const Tile& tile, const CUtensorMap* map_q,
                                                 const CUtensorMap* map_dout, const CUtensorMap* map_k,
                                                 const CUtensorMap* map_v) {
  using T = typename Shape::T;
  constexpr int kHeadDim = Shape::kHeadDim, kQueries = Shape::kQueries;
  constexpr int kTileBytes = tile_bytes<T, kQueries, kHeadDim>() + kQueries * int(sizeof(float));
  const Share share = Shape::kShares ? shared.share : Share{0, 1, -1};
  barrier_expect(&shared.kv_landed, 2 * tile_bytes<T, Shape::kKeys, kHeadDim>());
  const int first_key = tile.begin + first_row(tile.row, Shape::kKeys, tile.length);
  load_tile<T, Shape::kKeys, kHeadDim>(shared.k, map_k, &shared.kv_landed, tile.head, first_key);
  load_tile<T, Shape::kKeys, kHeadDim>(shared.v, map_v, &shared.kv_landed, tile.head, first_key);

  const int group = p.heads / p.heads_kv;
  const int first_head = tile.head * group;
  Cursor<Shape::kStages> at;
  Cursor<Handover<QueryRun>::kStages> next;
  for (int chunk = tile.other_begin; chunk < tile.other_begin + tile.other_length; ++chunk) {
    if (p.sequences.visible(chunk, tile.length) <= tile.row) continue;
    const int query = p.sequences.cu_seqlens_q[chunk];
    const int queries = p.sequences.cu_seqlens_q[chunk + 1] - query;
    const int diagonal = Shape::kCausal ? tile.row : 0;
    const int steps = (queries - diagonal + kQueries - 1) / kQueries;
    const auto cut = [&](int64_t part) { return diagonal + int(steps * part / share.parts) * kQueries; };
    const int begin_row = cut(share.part), end_row = min(queries, cut(share.part + 1));
    if (begin_row >= end_row) continue;
    for (int head = first_head; head < first_head + group; ++head) {
      const int64_t place = p.rows.row(chunk, head);
      shared.runs.put(next, {begin_row, end_row, int(place / kQueries), chunk, head,
                             p.weight_stride_head != 0 || head == first_head});
      // More do not fit into the producer's registers; with one the compiler finds the consumers' loop fewer uniform
      // ones, though not with kRepeatable.
#pragma unroll (Shape::kRepeatable ? 1 : 2)
      for (int row = begin_row; row < end_row; row += kQueries) {
        const int token = query + first_row(row, kQueries, queries);
        barrier_wait(&shared.q_free[at.stage], at.phase ^ 1);
        barrier_expect(&shared.q_landed[at.stage], kTileBytes);
        load_tile<T, kQueries, kHeadDim>(shared.q[at.stage], map_q, &shared.q_landed[at.stage], head, token);
        bulk_load(shared.lse[at.stage], p.rows.lse + place + row, kQueries * sizeof(float),
                  &shared.q_landed[at.stage]);
        barrier_wait(&shared.dout_free[at.stage], at.phase ^ 1);
        barrier_expect(&shared.dout_landed[at.stage], kTileBytes);
        load_tile<T, kQueries, kHeadDim>(shared.dout[at.stage], map_dout, &shared.dout_landed[at.stage], head, token);
        bulk_load(shared.delta[at.stage], p.rows.delta + place + row, kQueries * sizeof(float),
                  &shared.dout_landed[at.stage]);
        at.advance();
      }
    }
  }
  shared.runs.put(next, {0, 0, -1, 0, 0, false});
}

// Whether this thread and its neighbour find a key absent for all that could see it: each looks at half of the chunks.
__device__ __forceinline__ bool absent_everywhere(const BackwardParameters& p, const Tile& tile, int key) {
  const int group = p.heads / p.heads_kv;
  const int heads = p.weight_stride_head != 0 ? group : 1;
  bool absent = true;
  for (int i = threadIdx.x % 2; i < tile.other_length && key < tile.length; i += 2) {
    const int chunk = tile.other_begin + i;
    if (key >= p.sequences.visible(chunk, tile.length)) continue;
    for (int head = tile.head * group; head < tile.head * group + heads; ++head) {
      absent &= p.log_weight != nullptr &&
                p.log_weight[p.weight_place(chunk, tile.begin + key, head)] == minus_infinity();
    }
  }
  return __shfl_xor_sync(0xffffffffu, absent, 1) && absent;
}

template <class Shape>
__device__ __forceinline__ void backward_consume(typename Shape::Shared& shared, const BackwardParameters& p,
                                                 const Tile& tile, int consumer) {
  using T = typename Shape::T;
  constexpr int kHeadDim = Shape::kHeadDim, kKeys = Shape::kKeys, kQueries = Shape::kQueries;
  const float factor = p.scale * kLog2e;
  const int thread = threadIdx.x % kWarpgroup;
  const auto first_key = [&] { return first_row(tile.row, kKeys, tile.length); };
  // Of the lane, within the sample; its second row is 8 below. Keys before tile.row count in another tile.
  const auto lane_key = [&] { return first_key() + consumer * 64 + fragment_row(); };

  // Zeros over keys that nobody sees (two threads a row).
  {
    const int row = (threadIdx.x - kWarpgroup) / 2;
    const bool absent = absent_everywhere(p, tile, first_key() + row);
    shared.absent[row] = absent;
    barrier_wait(&shared.kv_landed, 0);
    if (absent) {
      zero_rows<kKeys, kHeadDim>(shared_address(shared.k), row, row + 1, thread % 2, 2);
      zero_rows<kKeys, kHeadDim>(shared_address(shared.v), row, row + 1, thread % 2, 2);
    }
    fence_proxy_async();
    named_sync(kConsumersBarrier, kConsumerThreads);
  }

  if constexpr (Shape::kHelps) {
    const int own_key = first_key() + consumer * 64;
    const bool whole = !Shape::kShares || shared.share.slot < 0;  // parts write their sums
    if (same_in_warp(whole && (own_key + 64 <= tile.row || own_key >= tile.length))) {
      return backward_help<Shape>(shared, p, consumer);
    }
  }

  uint32_t held_v[Shape::kHeldV][4];
#pragma unroll
  for (int i = 0; i < Shape::kHeldV; ++i) {
    load_fragment<kKeys>(held_v[i], shared_address(shared.v) + consumer * 64 * kPanelBytes, i, thread);
  }

  float dk[kHeadDim / 2], dv[kHeadDim / 2];
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) dk[i] = dv[i] = 0.f;
  float weight[2], weight_gradient[2] = {0.f, 0.f};
  Cursor<Shape::kStages> at;

  float* sums = nullptr;  // where the step before adds its part of dq
  const auto write_weight_gradient = [&](int64_t place) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = quad_sum(weight_gradient[i]);
      if (threadIdx.x % 4 == 0 && weight[i] != minus_infinity()) {
        const int heads = p.weight_stride_head != 0 ? p.heads : p.heads_kv;
        float* const result = p.dlog_weight + place + int64_t(8 * i) * heads;
        if constexpr (Shape::kShares) {
          atomicAdd(result, sum);
        } else {
          *result = sum;
        }
      }
      weight_gradient[i] = 0.f;
    }
  };
  int64_t gradient_place = 0;  // of this lane's upper row

  int turn = 0;  // counts steps
  Cursor<Handover<QueryRun>::kStages> next;

  for (;;) {
    const QueryRun run = shared.runs.template get<true>(next);
    if (run.workspace < 0) break;
    if (run.new_weights) {
      if constexpr (Shape::kWeightGradient) {
        if (turn > 0) write_weight_gradient(gradient_place);
        const bool per_head = p.weight_stride_head != 0;
        const int64_t chunk_begin = p.sequences.cu_chunks != nullptr ? int64_t(run.chunk) * p.keys : 0;
        const int64_t row = chunk_begin + tile.begin + lane_key();
        gradient_place = per_head ? row * p.heads + run.head : row * p.heads_kv + tile.head;
      }
      const int key = lane_key();
      const int visible = p.sequences.visible(run.chunk, tile.length);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        weight[i] = minus_infinity();
        if (key + 8 * i >= tile.row && key + 8 * i < visible) {
          const int64_t place = p.weight_place(run.chunk, tile.begin + key + 8 * i, run.head);
          weight[i] = p.log_weight == nullptr ? 0.f : p.log_weight[place] * kLog2e;
        }
      }
    }

    zero_foreign_queries<Shape>(shared, run, at);
    for (int row = run.row; row < run.queries; row += kQueries) {
      // Descriptors are rebuilt in every step: hoisted out of the loop they would fill the registers.
      const uint32_t base = recomputed(shared_address(&shared));
      const uint32_t k = base + offsetof(typename Shape::Shared, k) + consumer * 64 * kPanelBytes;
      const uint32_t v = base + offsetof(typename Shape::Shared, v) + consumer * 64 * kPanelBytes;
      float scores[kQueries / 2], dp[kQueries / 2];
      uint32_t packed[kQueries / 4], packed_ds[kQueries / 4];
      const uint32_t q = base + offsetof(typename Shape::Shared, q) + at.stage * sizeof(shared.q[0]);
      const uint32_t dout = base + offsetof(typename Shape::Shared, dout) + at.stage * sizeof(shared.dout[0]);

      // S^T = K Q^T, and dP^T = V dO^T under its exponentials.
      barrier_wait(&shared.q_landed[at.stage], at.phase);
      pin(scores);
      wgmma_fence();
      multiply_rows<T, kQueries, kHeadDim, kKeys, kQueries>(scores, k, q, false);
      wgmma_commit();
      barrier_wait(&shared.dout_landed[at.stage], at.phase);
      pin(dp);
      wgmma_fence();
      multiply_rows_held<T, kQueries, kHeadDim, kKeys, kQueries>(dp, held_v, v, dout);
      wgmma_commit();
      wgmma_wait<1>();
      pin(scores);
      if constexpr (Shape::kCausal) {
        if (same_in_warp(row < tile.row + consumer * 64 + 63)) {
          const int first = lane_key() - first_row(row, kQueries, run.queries);
          mask_before<kQueries>(scores, first, first + 8);
        }
      }
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
      if (turn > 0) add_dq<Shape>(shared, sums, turn - 1, base, consumer);
      sums = place_of_sums<Shape>(p, run, row, consumer);
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
    }
  }
  if (turn > 0) add_dq<Shape>(shared, sums, turn - 1, recomputed(shared_address(&shared)), consumer);
  if constexpr (Shape::kWeightGradient) {
    if (turn > 0) write_weight_gradient(gradient_place);
  }

  const int key = lane_key();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    // The rows of a key that nobody sees are 0 whatever NaN its sample's queries hold.
    if (shared.absent[consumer * 64 + fragment_row() + 8 * i]) {
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        dk[4 * j + 2 * i] = dk[4 * j + 2 * i + 1] = dv[4 * j + 2 * i] = dv[4 * j + 2 * i + 1] = 0.f;
      }
    }
  }
  if constexpr (Shape::kShares) {
    if (shared.share.slot >= 0) {
      visit_sums<kHeadDim>(p.parts.sums, shared.share.slot, consumer, dk, dv,
                           [](float4& sum, const float* x) { sum = make_float4(x[0], x[1], x[2], x[3]); });
      return;
    }
  }
  store_keys<T, kHeadDim>(dk, dv, tile, key, p.heads_kv, p.scale, p.dk, p.dv);
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    backward_kernel(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_dout,
                    const __grid_constant__ CUtensorMap map_k, const __grid_constant__ CUtensorMap map_v,
                    const __grid_constant__ BackwardParameters p) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<typename Shape::Shared*>(memory);
  Tile tile;
  Share share{0, 1, -1};
  if constexpr (!Shape::kRepeatable) {
    // Beyond the list the entry holds rubbish; read at once with the list's length, it costs no second wait.
    const int place = Shape::kShares ? min(blockIdx.x, gridDim.x - p.parts.most - 1) : blockIdx.x;
    tile = find_tile(p.plan, place, p.heads_kv, Shape::kKeys);
    const int tiles = *p.plan.total * p.heads_kv;
    if constexpr (Shape::kShares) {
      if (int(blockIdx.x) >= whole_rounds(tiles, p.parts)) {
        const Cut cut = find_cut(p.plan, p.heads_kv, p.heads / p.heads_kv, p.parts);
        const int number = blockIdx.x - cut.whole;
        if (number >= cut.rest * cut.parts) return;
        share = find_share(cut, number);
        tile = find_tile(p.plan, cut.whole + number / cut.parts, p.heads_kv, Shape::kKeys);
      }
    } else {
      if (blockIdx.x >= tiles) return;
    }
  }
  if (threadIdx.x == 0) {
    const int place = Shape::kRepeatable ? atomicAdd(p.plan.next, 1) : 0;  // looked up when the barriers are set up
    constexpr int kConsumerWarps = kConsumerThreads / 32;
    barrier_init(&shared.kv_landed, 1);
    shared.runs.init(kConsumerWarps + (Shape::kRepeatable ? 2 : 0));
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
    shared.turns.init(kConsumerWarps);
    barrier_init_fence();
    if constexpr (Shape::kShares) shared.tile = tile, shared.share = share;
    if constexpr (Shape::kRepeatable) {
      shared.tile = find_tile_abreast(p.plan, place, p.heads_kv, Shape::kKeys, p.rows_together, Shape::kCausal);
      if (place >= *p.plan.total * p.heads_kv) shared.tile.owner = -1;
    }
  }
  __syncthreads();
  if (Shape::kRepeatable && shared.tile.owner < 0) return;

  // A tile found in two ways is read where it is used: kept, it would fill the registers.
  const Tile& own = Shape::kShares || Shape::kRepeatable ? shared.tile : tile;
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0);
  if (warpgroup == 0) {
    registers_release<24>();
    if (threadIdx.x == 0) backward_produce<Shape>(shared, p, own, &map_q, &map_dout, &map_k, &map_v);
    if constexpr (Shape::kRepeatable) {
      if (threadIdx.x == 32) await_turns<Shape>(shared, p.rows.turns, own);
      if (threadIdx.x == 64) hand_on_turns<Shape>(shared, p.rows.turns);
    }
  } else {
    registers_acquire<240>();
    backward_consume<Shape>(shared, p, own, warpgroup - 1);
  }
}

}  // namespace weighted_attention
