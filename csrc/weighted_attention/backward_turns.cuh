// Additions to dq in a fixed order, so that backward repeats to the bit.
//
// The tiles of keys of a head add to a tile of queries one after the other, the first keys first. How many have done so is
// counted in device memory, for each of the two warpgroups by itself, as they add to different sums. Blocks take tiles as
// they begin, those of a head in that order (find_tile_abreast): whoever is waited for has begun, so nobody waits forever.
// All walk the queries from the last to the first, where under a causal mask the walks of all of a head's tiles overlap.
//
// One thread for each warpgroup waits for its turns and hands them on, so that no warpgroup polls or fences.
#pragma once

#include "backward_rows.cuh"
#include "pipeline.cuh"

namespace weighted_attention {

struct Turn {
  Barrier come, added;

  __device__ void init(int consumer_warps) {
    barrier_init(&come, 1);
    barrier_init(&added, consumer_warps);
  }
};

// The walk of the thread that keeps the turns of warpgroup `consumer`, for the tile of keys number `turn`. It goes with
// the walk of the warpgroup (backward_consume), whose rows end at `end_row`.
template <class Shape>
__device__ __forceinline__ void keep_turns(typename Shape::Shared& shared, int* turns, int turn, int end_row,
                                           int consumer) {
  Turn& own = shared.turns[consumer];
  Cursor<decltype(shared.runs)::kStages> next;
  uint32_t phase = 0;
  for (;;) {
    const auto run = shared.runs.template get<false>(next);
    if (run.workspace < 0) return;
    int* counter = turns + turn_place(run.workspace * Shape::kQueries + run.row) + consumer;
    for (int row = run.row; row >= end_row; row -= Shape::kQueries) {
      while (read_counter(counter) < turn) {
      }
      barrier_arrive(&own.come);
      barrier_wait(&own.added, phase);
      count_up(counter);
      counter -= turn_place(Shape::kQueries);
      phase ^= 1;
    }
  }
}

}  // namespace weighted_attention
