// What a block of the backward pass is given, and what it keeps in shared memory.
#pragma once

#include "backward_rows.cuh"
#include "backward_shares.cuh"
#include "backward_turns.cuh"
#include "pipeline.cuh"

namespace weighted_attention {

struct BackwardParameters {
  Sequences sequences;
  Plan plan;  // tiles of kKeys keys
  RowWorkspace rows;
  Parts parts;
  const float* log_weight;
  int64_t weight_stride_chunk, weight_stride_key, weight_stride_head;
  void* dk;
  void* dv;
  float* dlog_weight;
  int keys, heads, heads_kv;
  int rows_together;  // find_tile_abreast
  float scale;

  __device__ __forceinline__ int64_t weight_place(int chunk, int key, int head) const {
    return chunk * weight_stride_chunk + key * weight_stride_key + head * weight_stride_head;
  }
};

// A run of a block's walk over queries: one head of one chunk.
struct alignas(16) QueryRun {
  int row, queries;  // first row to visit, and number of rows, of the chunk
  int workspace;     // tile of kQueries rows in the workspaces where the chunk begins; -1: the walk is over
  int chunk, head;
  bool new_weights;  // the keys' weights differ from those of the run before
};

template <typename T_, int kHeadDim_, bool kRepeatable_, bool kWeightGradient_, bool kCausal_>
struct BackwardShape {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kRepeatable = kRepeatable_;
  static constexpr bool kWeightGradient = kWeightGradient_;
  static constexpr bool kCausal = kCausal_;
  static constexpr int kKeys = 128;
  static constexpr int kQueries = queries_of_step(kHeadDim);
  // Steps of 16 columns of V that stay in registers.
  static constexpr int kHeldV = kRepeatable && kHeadDim == 64 ? 1 : 2;
  // Whether the last round of tiles is shared out: what is summed up then depends on the number of multiprocessors, and
  // the tiles of a causal last round are its cheapest.
  static constexpr bool kShares = !kRepeatable && !kCausal && shares_rounds(kHeadDim);
  // Whether a warpgroup none of whose keys count in a tile leaves their products out; with weights' gradients and wide
  // heads the compiler makes the other walk 7 % slower for it.
  static constexpr bool kHelps = !kWeightGradient || kHeadDim == 64;
  static constexpr int kStages = 2;
  static constexpr int kThreads = 3 * kWarpgroup;

  struct Shared {
    alignas(1024) T k[kKeys * padded_columns(kHeadDim)];
    alignas(1024) T v[kKeys * padded_columns(kHeadDim)];
    alignas(1024) T q[kStages][kQueries * padded_columns(kHeadDim)];
    alignas(1024) T dout[kStages][kQueries * padded_columns(kHeadDim)];
    // Key by key, in panels of 64 queries.
    alignas(1024) T ds[2][kKeys * kQueries];
    alignas(16) float lse[kStages][kQueries];
    alignas(16) float delta[kStages][kQueries];
    Handover<QueryRun> runs;
    Tile tile;
    Share share;
    Turns turns;
    bool absent[kKeys];
    Barrier kv_landed;
    Barrier q_landed[kStages], q_free[kStages], dout_landed[kStages], dout_free[kStages];
    Barrier ds_written[2], ds_free[2];  // by all consumer warps
  };
};

// Named barrier of both warpgroups.
constexpr int kConsumersBarrier = 1;
constexpr int kConsumerThreads = 2 * kWarpgroup;

}  // namespace weighted_attention
