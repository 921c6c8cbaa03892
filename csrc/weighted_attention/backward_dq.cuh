// dq: what both warpgroups add to it, and the walk of one that does nothing else.
#pragma once

#include "backward_shape.cuh"

namespace weighted_attention {

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

// dQ = dS K needs both warpgroups' dS: each computes 64 queries, or 64 columns, over all 128 keys. It is done one
// step late, so that neither warpgroup waits for the other and the products of one run under the exponentials of the
// other.
template <class Shape>
__device__ __forceinline__ void add_dq(typename Shape::Shared& shared, float* sums, int turn, uint32_t base,
                                       int consumer) {
  constexpr int kKeys = Shape::kKeys, kQueries = Shape::kQueries;
  float dq[32];
  const uint32_t ds = base + offsetof(typename Shape::Shared, ds) + (turn & 1) * sizeof(shared.ds[0]);
  const uint32_t all_k = base + offsetof(typename Shape::Shared, k);
  const int part = consumer * kKeys * kPanelBytes;
  barrier_wait(&shared.ds_written[turn & 1], turn >> 1 & 1);
  pin(dq);
  wgmma_fence();
  multiply_ds_k<typename Shape::T, kKeys>(dq, kQueries == 128 ? ds + part : ds, kQueries == 128 ? all_k : all_k + part);
  wgmma_commit();
  wgmma_wait<0>();
  pin(dq);
  warp_arrive(&shared.ds_free[turn & 1]);
  if constexpr (Shape::kRepeatable) barrier_wait(&shared.turns.come[turn & 1], turn >> 1 & 1);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    add_to_global(sums + i * 4 * kWarpgroup, dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
  }
  if constexpr (Shape::kRepeatable) warp_arrive(&shared.turns.added[turn & 1]);
}

// Where this lane adds its part of a step's dq.
template <class Shape>
__device__ __forceinline__ float* place_of_sums(const BackwardParameters& p, const QueryRun& run, int row,
                                                int consumer) {
  return p.rows.dq + (int64_t(run.workspace) * Shape::kQueries + row) * padded_columns(Shape::kHeadDim) +
         (consumer * 8 * kWarpgroup + threadIdx.x % kWarpgroup) * 4;
}

// Where a chunk's queries do not fill one step, the rows of the next chunk behind them, and of its gradients, become
// zeros: their weights are 0, and 0 * NaN is NaN. Called by both warpgroups as a run begins.
template <class Shape>
__device__ __forceinline__ void zero_foreign_queries(typename Shape::Shared& shared, const QueryRun& run,
                                                     const Cursor<Shape::kStages>& at) {
  if (run.queries >= Shape::kQueries) return;
  barrier_wait(&shared.q_landed[at.stage], at.phase);
  barrier_wait(&shared.dout_landed[at.stage], at.phase);
  for (const auto* tile : {shared.q[at.stage], shared.dout[at.stage]}) {
    zero_rows<Shape::kQueries, Shape::kHeadDim>(shared_address(tile), run.queries, Shape::kQueries,
                                                threadIdx.x - kWarpgroup, kConsumerThreads);
  }
  fence_proxy_async();
  named_sync(kConsumersBarrier, kConsumerThreads);
}

// The walk of a warpgroup none of whose keys count: its half of dS is 0, and it computes its part of dq from the
// other's.
template <class Shape>
__device__ __forceinline__ void backward_help(typename Shape::Shared& shared, const BackwardParameters& p,
                                              int consumer) {
  constexpr int kKeys = Shape::kKeys, kQueries = Shape::kQueries;
  for (int i = 0; i < 2 * kQueries / kPanel; ++i) {
    zero_rows<kKeys, kPanel>(shared_address(shared.ds) + i * kKeys * kPanelBytes, consumer * 64, consumer * 64 + 64,
                             threadIdx.x % kWarpgroup, kWarpgroup);
  }
  fence_proxy_async();
  Cursor<Handover<QueryRun>::kStages> next;
  Cursor<Shape::kStages> at;
  float* sums = nullptr;
  int turn = 0;
  for (;;) {
    const QueryRun run = shared.runs.template get<true>(next);
    if (run.workspace < 0) break;
    zero_foreign_queries<Shape>(shared, run, at);
#pragma unroll 1
    for (int row = run.row; row < run.queries; row += kQueries) {
      barrier_wait(&shared.q_landed[at.stage], at.phase);
      warp_arrive(&shared.q_free[at.stage]);
      barrier_wait(&shared.dout_landed[at.stage], at.phase);
      warp_arrive(&shared.dout_free[at.stage]);
      barrier_wait(&shared.ds_free[turn & 1], (turn >> 1 & 1) ^ 1);
      warp_arrive(&shared.ds_written[turn & 1]);
      if (turn > 0) add_dq<Shape>(shared, sums, turn - 1, shared_address(&shared), consumer);
      sums = place_of_sums<Shape>(p, run, row, consumer);
      ++turn;
      at.advance();
    }
  }
  if (turn > 0) add_dq<Shape>(shared, sums, turn - 1, shared_address(&shared), consumer);
}

}  // namespace weighted_attention
