// Backward, second pass of combine.cuh in bfloat16, on tensor cores.
#pragma once

#include "combine.cuh"

namespace target_attention {

// A warp walks kRuns runs of places side by side, a place of each in a step: a product's eight columns are those runs, two for the high and
// the low part of a member's coefficients, its 16 rows are columns of the gradient, its depth the rows of q and of dout in turns. What a step
// needs of its members is asked for kStages - 1 rounds of kSteps ahead, into shared memory: a walk waits for nothing else.
template <int kRows_, int kWalkers_, int kStages_, int kSlice_>
struct Walk {
  using T = __nv_bfloat16;
  static constexpr int kRows = kRows_, kWalkers = kWalkers_, kStages = kStages_, kSlice = kSlice_;
  static constexpr int kThreads = 32 * kWalkers, kRuns = 4, kSteps = 32 / kRuns;
  static constexpr int kDepth = 2 * kRows, kHalves = kDepth / 8;
  static constexpr int kColumns = kSlice / int(sizeof(T));
  static constexpr int kChunks = kColumns / 8;  // place g of chunk i is column kChunks * g + i of the slice
  static constexpr int kProducts = (kChunks + 1) / 2;
  static constexpr int kSampleBytes = kDepth * kSlice;

  struct alignas(16) Stage {
    uint32_t records[kSteps][kRuns][2 * kRows];
    int rows[kSteps][kRuns];                 // of the gradient; -1: no member
    uint16_t samples[kSteps][2][kRuns / 2];  // of runs 0 and 2, then of 1 and 3
  };
  static size_t shared_bytes(const Problem& p) { return size_t(p.samples) * kSampleBytes + sizeof(Stage) * kWalkers * kStages; }
};

// Numbers that are not finite to 0: where a query row holds one, the coefficients of all keys that it sees are not finite either, and
// products of other samples' members meet it with coefficients of 0.
__device__ __forceinline__ uint32_t finite(uint32_t x) {
  if ((x & 0x7f80u) == 0x7f80u) x &= 0xffff0000u;
  return (x & 0x7f800000u) == 0x7f800000u ? x & 0xffffu : x;
}
__device__ __forceinline__ uint4 finite_piece(const __nv_bfloat16* from, bool present) {
  uint4 x = make_uint4(0, 0, 0, 0);
  if (present) x = *reinterpret_cast<const uint4*>(from);
  return make_uint4(finite(x.x), finite(x.y), finite(x.z), finite(x.w));
}

// Slices lie as (samples, chunks, depth, 8); a lane reads two depths of a column at once, turned.
template <class Walk>
struct Factors {
  using T = typename Walk::T;
  using Stage = typename Walk::Stage;
  static constexpr int kHalves = Walk::kHalves, kChunks = Walk::kChunks;
  static constexpr int kPairs = Walk::kRuns * kHalves / 2;  // products to a pair of chunks: two runs share one where eight deep

  struct Members {
    uint32_t samples[kPairs], coefficients[kHalves];

    __device__ void ask(const Stage& stage, int step) {
      const int lane = threadIdx.x % 32;
#pragma unroll
      for (int m = 0; m < kPairs; ++m) samples[m] = kHalves == 1 ? stage.samples[step][lane / 16][m] : stage.samples[step][m % 2][m / 2];
#pragma unroll
      for (int h = 0; h < kHalves; ++h) coefficients[h] = stage.records[step][lane / 8][2 * (lane % 4 + 4 * h) + lane / 4 % 2];
    }
  };

  Fragment rows[kPairs][Walk::kProducts];
  uint32_t coefficients[kHalves];

  __device__ static void load(unsigned char* to, const Combine& c, int head_kv, int first_column) {
    const Problem& p = c.p;
    for (int i = threadIdx.x; i < p.samples * Walk::kDepth; i += Walk::kThreads) {
      const int sample = i / Walk::kDepth, depth = i % Walk::kDepth, row = depth / 2;
      const QueryRows rows(p, sample, head_kv);
      const T* const from =
          static_cast<const T*>(depth % 2 == 0 ? p.q : c.g.dout) + rows.index(p, row) * p.head_dim + first_column;
      uint32_t words[4 * kChunks];
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        const uint4 piece = finite_piece(from + 8 * j, row < rows.count && first_column + 8 * j < p.head_dim);
        words[4 * j] = piece.x, words[4 * j + 1] = piece.y, words[4 * j + 2] = piece.z, words[4 * j + 3] = piece.w;
      }
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        uint32_t mine[4];
#pragma unroll
        for (int g = 0; g < 4; ++g) {
          const int even = kChunks * 2 * g + j, odd = even + kChunks;
          mine[g] = __byte_perm(words[even / 2], words[odd / 2], (even % 2 ? 0x32 : 0x10) | (odd % 2 ? 0x7600 : 0x5400));
        }
        *reinterpret_cast<uint4*>(to + sample * Walk::kSampleBytes + (j * Walk::kDepth + depth) * 16) =
            make_uint4(mine[0], mine[1], mine[2], mine[3]);
      }
    }
  }

  // Of a product's 16 rows the second eight are those of the next chunk, of its depth the second eight another run's or the later half.
  __device__ static uint32_t at_lane(const unsigned char* slices) {
    const int lane = threadIdx.x % 32;
    return shared_address(slices) + lane % 8 * 16 + (kHalves == 2 ? lane / 16 * 128 : 0) +
           (kChunks > 1 ? lane / 8 % 2 * Walk::kDepth * 16 : 0);
  }
  __device__ void read(const Members& members, uint32_t slices) {
#pragma unroll
    for (int m = 0; m < kPairs; ++m)
#pragma unroll
      for (int n = 0; n < Walk::kProducts; ++n)
        rows[m][n] = load_turned(slices + members.samples[m] * Walk::kSampleBytes + n * 2 * Walk::kDepth * 16);
#pragma unroll
    for (int h = 0; h < kHalves; ++h) coefficients[h] = members.coefficients[h];
  }
  __device__ void add(float (&sum)[kChunks]) const {
    const int of = threadIdx.x % 32 / 8;
    float both[Walk::kProducts][4] = {};
#pragma unroll
    for (int m = 0; m < kPairs; ++m) {
      const uint32_t b0 = of == (kHalves == 1 ? 2 * m : m) ? coefficients[0] : 0u;
      const uint32_t b1 = of == (kHalves == 1 ? 2 * m + 1 : m) ? coefficients[kHalves - 1] : 0u;
#pragma unroll
      for (int n = 0; n < Walk::kProducts; ++n) Half<T>::multiply(both[n], rows[m][n].x, b0, b1);
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) sum[i] += both[i / 2][i % 2 * 2] + both[i / 2][i % 2 * 2 + 1];
  }
};

template <int kCount>
__device__ __forceinline__ void store_columns(__nv_bfloat16* to, const float (&x)[kCount]) {
  if constexpr (kCount == 4) store_four(to, make_float4(x[0], x[1], x[2], x[3]));
  else if constexpr (kCount == 2) *reinterpret_cast<uint32_t*>(to) = Half<__nv_bfloat16>::pack(x[0], x[1]);
  else *to = narrow<__nv_bfloat16>(x[0]);
}
template <int kCount>
__device__ __forceinline__ void store_columns(float* to, const float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = x[i];
}

// Four bits to four bytes.
__device__ __forceinline__ uint32_t spread(uint32_t x) { return (x & 1) | (x & 2) << 7 | (x & 4) << 14 | (x & 8) << 21; }

// What every slice's walk reads of each place, gathered once.
__global__ void __launch_bounds__(kSumPlaces) line_up_kernel(const Combine c) {
  const int place = blockIdx.x * kSumPlaces + threadIdx.x;
  if (place >= int(c.g.offsets[c.g.table])) return;
  const int key = int(c.g.order[place]);
  c.records.members[place] = make_int4(key, int(c.g.index[key]), c.records.samples[key], 0);
}

// grid (any, heads_kv * slices)
template <class Walk>
__global__ void __launch_bounds__(Walk::kThreads, 1) walk_kernel(const Combine c) {
  using T = typename Walk::T;
  using Factors = target_attention::Factors<Walk>;
  using Stage = typename Walk::Stage;
  constexpr int kRuns = Walk::kRuns, kSteps = Walk::kSteps, kStages = Walk::kStages, kChunks = Walk::kChunks;
  extern __shared__ __align__(16) unsigned char bytes[];
  const Problem& p = c.p;
  const int slices = (p.head_dim * int(sizeof(T)) + Walk::kSlice - 1) / Walk::kSlice;
  const int head_kv = blockIdx.y / slices, first_column = blockIdx.y % slices * (Walk::kSlice / int(sizeof(T)));
  Factors::load(bytes, c, head_kv, first_column);
  __syncthreads();

  const int places = int(c.g.offsets[c.g.table]), span = c.sums.span(places);
  const int walker = threadIdx.x / 32 * gridDim.x + blockIdx.x, lane = threadIdx.x % 32;
  const int first = walker * span, steps = span / kRuns, rounds = steps / kSteps;
  if (first >= places) return;
  Stage* const stages =
      reinterpret_cast<Stage*>(bytes + size_t(p.samples) * Walk::kSampleBytes) + threadIdx.x / 32 * kStages;

  // A lane fills step lane % kSteps of run lane / kSteps.
  const int own = first + lane / kSteps * steps + lane % kSteps;
  const auto member_at = [&](int round) {
    const int place = own + round * kSteps;
    return round <= rounds && place < places ? c.records.members[place] : make_int4(-1, -1, 0, 0);
  };
  const auto fill = [&](int round, int slot, const int4& member) {
    if (round <= rounds) {  // of the round behind the last only rows are read
      Stage& stage = stages[slot];
      constexpr int kParts = sizeof(stage.records[0][0]) / 16;
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        const int at = i * (32 / kParts) + lane / kParts, key = __shfl_sync(~0u, member.x, at);
        const float2* const record = c.records.pairs + (int64_t(max(key, 0)) * p.heads_kv + head_kv) * Walk::kRows;
        copy_async(reinterpret_cast<uint4*>(stage.records[at % kSteps][at / kSteps]) + lane % kParts,
                   reinterpret_cast<const uint4*>(record) + lane % kParts, key >= 0);
      }
      const int step = lane % kSteps, run = lane / kSteps;
      stage.rows[step][run] = member.y;
      stage.samples[step][run % 2][run / 2] = uint16_t(member.z);
    }
    copy_commit();
  };

  // Of sums a lane holds run lane % 4, and of each chunk column lane / 4.
  const int run = lane % kRuns, column = first_column + lane / 4 * kChunks;
  unsigned char* const to = reinterpret_cast<unsigned char*>(static_cast<T*>(c.sums.to) + head_kv * p.head_dim + column);
  const uint32_t row_bytes = uint32_t(c.sums.width) * sizeof(T);
  const bool inside = column < p.head_dim;
  float sum[kChunks] = {}, before[kChunks] = {};  // before: of a row that began before the run

  int4 ahead[kStages];
#pragma unroll
  for (int r = 0; r < kStages; ++r) ahead[r] = member_at(r);
#pragma unroll
  for (int r = 0; r + 1 < kStages; ++r) fill(r, r, ahead[r]);
  int4 member = ahead[kStages - 1];
  int slot = 0;
  const int before_run = first + run * steps - 1;
  const int row_before = before_run >= 0 && before_run < places ? c.records.members[before_run].y : -1;
  copy_wait<kStages - 2>();
  __syncwarp();
  const bool begins_before = row_before >= 0 && stages[0].rows[0][run] == row_before;
  // Bits of runs are kSteps apart, as those of lanes that fill them.
  constexpr uint32_t kEach = 0x01010101u;
  const int shift = run * kSteps;
  const uint32_t began_before = spread(__ballot_sync(~0u, lane < kRuns && begins_before));
  uint32_t begun = began_before, ends = 0;

  const uint32_t slice = Factors::at_lane(bytes);
  typename Factors::Members members;
  Factors factors;
  members.ask(stages[0], 0);
  factors.read(members, slice);
  members.ask(stages[0], 1);
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    __syncwarp();  // everybody is done with the stage that is filled now
    fill(round + kStages - 1, slot == 0 ? kStages - 1 : slot - 1, member);
    member = member_at(round + kStages);
    copy_wait<kStages - 2>();
    __syncwarp();
    const Stage& stage = stages[slot];
    slot = slot + 1 == kStages ? 0 : slot + 1;
    const Stage& after = stages[slot];
    const int step = lane % kSteps;
    ends = __ballot_sync(~0u, stage.rows[step][lane / kSteps] != (step + 1 < kSteps ? stage.rows[step + 1] : after.rows[0])[lane / kSteps]);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      Factors next;
      next.read(members, slice);
      members.ask(s + 2 < kSteps ? stage : after, (s + 2) % kSteps);
      factors.add(sum);
      factors = next;
      const uint32_t ending = ends >> s & kEach;
      if (ending == 0) continue;
      const uint32_t late = ending & begun;
      if (late != 0) {
        begun &= ~late;
#pragma unroll
        for (int i = 0; i < kChunks; ++i) before[i] = late >> shift & 1 ? sum[i] : before[i];
      }
      if (((ending & ~late) >> shift & 1) != 0 && inside)
        store_columns(reinterpret_cast<T*>(to + uint64_t(uint32_t(stage.rows[s][run])) * row_bytes), sum);
      const bool mine = ending >> shift & 1;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) sum[i] = mine ? 0.f : sum[i];
    }
  }
  copy_wait<0>();

  // Rows that lie in several runs, added up run by run; those that leave the warp's places go to `pieces` of Sums.
  const bool cut = !(ends >> (shift + kSteps - 1) & 1) && stages[slot].rows[0][run] >= 0, spans = cut && (begun >> shift & 1);
#pragma unroll
  for (int i = 0; i < kChunks; ++i) before[i] = spans ? sum[i] : before[i];
  const uint32_t with_before = __ballot_sync(~0u, began_before >> shift & 1), with_open = __ballot_sync(~0u, cut && !spans);
  const uint32_t with_span = __ballot_sync(~0u, spans);
  bool under_way = false, began_here = false;
  float total[kChunks] = {};
  float* const piece = c.sums.piece(walker, 0) + head_kv * p.head_dim + column;
  float* const piece_after = c.sums.piece(walker, 1) + head_kv * p.head_dim + column;
#pragma unroll 1
  for (int g = 0; g < kRuns; ++g) {
    const int from = lane / kRuns * kRuns + g;
    if (with_before >> g & 1) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) total[i] += __shfl_sync(~0u, before[i], from);
      const int into = __shfl_sync(~0u, row_before, from);
      under_way = with_span >> g & 1;
      if (!under_way) {
        if (run == 0 && inside) {
          if (began_here) store_columns(reinterpret_cast<T*>(to + uint64_t(uint32_t(into)) * row_bytes), total);
          else store_columns(piece, total);
        }
#pragma unroll
        for (int i = 0; i < kChunks; ++i) total[i] = 0.f;
      }
    }
    if (with_open >> g & 1) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) total[i] = __shfl_sync(~0u, sum[i], from);
      under_way = began_here = true;
    }
  }
  if (under_way && run == 0 && inside) store_columns(began_here ? piece_after : piece, total);
}

}  // namespace target_attention
