// Additions to dq in a fixed order, so that backward repeats to the bit.
//
// The tiles of keys of a head add to a tile of queries one after the other, the first keys first; under a causal mask
// the last first, since every tile begins at its diagonal, where it is then the first to add: nobody begins by waiting.
// How many have added is counted in device memory. Blocks take tiles as they begin, those of a head in that order
// (find_tile_abreast): whoever is waited for has begun, so nobody waits forever.
//
// One thread waits for turns and one hands them on, so that no warpgroup polls or fences.
#pragma once

#include "backward_rows.cuh"
#include "pipeline.cuh"

namespace weighted_attention {

struct Turns {
  Barrier come[2], added[2], handed[2];  // of steps, two at a time

  __device__ void init(int consumer_warps) {
    for (int i = 0; i < 2; ++i) {
      barrier_init(&come[i], 1);
      barrier_init(&added[i], consumer_warps);
      barrier_init(&handed[i], 1);
    }
  }
};

// Goes with the warpgroups' walk over queries; do_step gets the row and the place of the counter of each step.
template <class Shape, class Step>
__device__ __forceinline__ void walk_turns(typename Shape::Shared& shared, Step do_step) {
  Cursor<decltype(shared.runs)::kStages> next;
  Cursor<2> at;
  for (;;) {
    const auto run = shared.runs.template get<false>(next);
    if (run.workspace < 0) return;
    for (int row = run.row; row < run.queries; row += Shape::kQueries) {
      do_step(row, run.workspace + row / Shape::kQueries, at);
      at.advance();
    }
  }
}

template <class Shape>
__device__ __forceinline__ void await_turns(typename Shape::Shared& shared, const int* turns, const Tile& tile) {
  const int own = tile.row / Shape::kKeys, last = (tile.length - 1) / Shape::kKeys;
  walk_turns<Shape>(shared, [&](int row, int place, const Cursor<2>& at) {
    const int turn = Shape::kCausal ? min(last, row / Shape::kKeys) - own : own;
    barrier_wait(&shared.turns.handed[at.stage], at.phase ^ 1);
    while (read_counter(turns + place) < turn) {
    }
    barrier_arrive(&shared.turns.come[at.stage]);
  });
}

template <class Shape>
__device__ __forceinline__ void hand_on_turns(typename Shape::Shared& shared, int* turns) {
  walk_turns<Shape>(shared, [&](int, int place, const Cursor<2>& at) {
    barrier_wait(&shared.turns.added[at.stage], at.phase);
    count_up(turns + place);
    barrier_arrive(&shared.turns.handed[at.stage]);
  });
}

}  // namespace weighted_attention
