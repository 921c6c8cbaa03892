// Backward, second pass where a sample has few query rows, in float32 (bfloat16: walk.cuh). The gradient of a table row is
//   sum over its members u and the query rows r of u's sample:  ds[u, r] q[r] + p[u, r] dout[r],
// members in order. A block keeps a slice of every row of q and dout, of all samples, in shared memory: what moves are the
// coefficients ds and p, 8 bytes a pair and slice, and the gradient, once. Threads go by place in `order`, not by table row.
#pragma once

#include "rows.cuh"

namespace target_attention {

constexpr int kWidestSlice = 64, kNarrowestSlice = 16;  // bytes of a row

struct Combine {
  Problem p;
  Gradients g;
  Sums sums;
  Records records;
  int row_slots;

  __host__ __device__ static int slices(const Problem& p, int slice, int element) {
    return (p.head_dim * element + slice - 1) / slice;
  }
  static size_t shared_bytes(const Problem& p, int slice, int row_slots) { return size_t(p.samples) * row_slots * 2 * slice; }
};

// d(score) and p of up to kRows query rows; the other way round where `turned`.
template <int kRows>
struct Coefficients {
  float4 two[kRows / 2];

  // swapped: neighbouring rows in each other's place
  __device__ void load(const float2* record, bool swapped) {
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) {
      const float4 x = reinterpret_cast<const float4*>(record)[i];
      two[i] = swapped ? make_float4(x.z, x.w, x.x, x.y) : x;
    }
  }
  __device__ float2 of(int row, bool turned) const {
    const float ds = row % 2 == 0 ? two[row / 2].x : two[row / 2].z, p = row % 2 == 0 ? two[row / 2].y : two[row / 2].w;
    return turned ? make_float2(p, ds) : make_float2(ds, p);
  }
};

// sum += piece of a row times its coefficient
__device__ __forceinline__ void add_piece(float4& sum, float4 piece, float by) {
  sum.x += piece.x * by, sum.y += piece.y * by, sum.z += piece.z * by, sum.w += piece.w * by;
}

__device__ __forceinline__ float4 piece_of_lane(float4 x, int lane) {
  return make_float4(__shfl_sync(~0u, x.x, lane), __shfl_sync(~0u, x.y, lane), __shfl_sync(~0u, x.z, lane), __shfl_sync(~0u, x.w, lane));
}

// kRows: at least row_slots. kSlice: bytes of a row that a block holds, the narrower the more samples there are. grid (any, heads_kv * slices)
template <int kRows, int kBlock, int kSlice>
__global__ void __launch_bounds__(kBlock, 1) combine_kernel(const Combine c) {
  constexpr int kColumns = 4;                  // of a lane: 16 bytes
  constexpr int kPieceLanes = kSlice / 16;     // lanes of a group
  constexpr int kMembers = 32 / kPieceLanes;   // groups of a warp: each adds up members of its own
  constexpr int kRun = kSumPlaces / kMembers;  // places of a group, one after the other; a warp has as many as a block of Sums
  extern __shared__ float4 pieces[];  // (samples, row_slots, q and dout, kPieceLanes)
  const Problem& p = c.p;
  const int slices = Combine::slices(p, kSlice, sizeof(float));
  const int head_kv = blockIdx.y / slices, first_column = blockIdx.y % slices * (kPieceLanes * kColumns);
  for (int i = threadIdx.x; i < p.samples * c.row_slots * 2 * kPieceLanes; i += kBlock) {
    const int row = i / (2 * kPieceLanes) % c.row_slots, column = first_column + i % kPieceLanes * kColumns;
    const QueryRows rows(p, i / (2 * kPieceLanes) / c.row_slots, head_kv);
    const auto* const from = static_cast<const float*>(i / kPieceLanes % 2 == 0 ? p.q : c.g.dout);
    float4 piece{};
    if (row < rows.count && column < p.head_dim)
      piece = *reinterpret_cast<const float4*>(from + rows.index(p, row) * p.head_dim + column);
    pieces[i] = piece;
  }
  __syncthreads();

  const int lane = threadIdx.x % 32, part = lane % kPieceLanes, group = lane / kPieceLanes;
  // Neighbouring groups read q and dout in opposite order, and of narrow slices also rows: else they would want the same banks.
  const bool turned = group % 2, swapped = kSlice < kWidestSlice && group / 2 % 2;
  const int column = first_column + part * kColumns, at_column = head_kv * p.head_dim + column;
  const bool inside = column < p.head_dim;
  const int places = int(c.g.offsets[c.g.table]);
  float* const to = static_cast<float*>(c.sums.to) + at_column;
  const auto key_at = [&](int place) { return place >= 0 && place < places ? int(c.g.order[place]) : -1; };
  const auto record = [&](int key) {
    return c.records.pairs + (int64_t(key) * p.heads_kv + head_kv) * record_pairs(c.row_slots);
  };
  // The gradient's row and the sample of a key; row -1 where there is none.
  const auto names_of = [&](int key) { return key < 0 ? make_int2(-1, 0) : make_int2(int(c.g.index[key]), c.records.samples[key]); };

  const int warps = gridDim.x * (kBlock / 32);
  for (int tile = threadIdx.x / 32 * gridDim.x + blockIdx.x; tile * kSumPlaces < places; tile += warps) {
    const int first = tile * kSumPlaces + group * kRun;
    float4 sum{}, before{};  // before: of a row that began before the run
    bool began_before = false, spans = false, opens = false;
    int row_before = names_of(key_at(first - 1)).x;
    int key = key_at(first + part), key_next = key_at(first + kPieceLanes + part);
    int2 names = names_of(key), names_next{};
    Coefficients<kRows> by, by_next;
    by.load(record(max(__shfl_sync(~0u, key, 0, kPieceLanes), 0)), swapped);
    int row = __shfl_sync(~0u, names.x, 0, kPieceLanes);
    bool begun = row == row_before;
#pragma unroll 1
    for (int at = first; at < first + kRun; at += kPieceLanes) {
      int key_later = -1;
#pragma unroll
      for (int s = 0; s < kPieceLanes; ++s) {
        // Keys are looked up two rounds ahead, their names one, their coefficients a step: nothing waits for the one before.
        if (s == 0) names_next = names_of(key_next), key_later = key_at(at + 2 * kPieceLanes + part);
        const bool last = s + 1 == kPieceLanes;
        by_next.load(record(max(__shfl_sync(~0u, last ? key_next : key, (s + 1) % kPieceLanes, kPieceLanes), 0)), swapped);
        const int sample = __shfl_sync(~0u, names.y, s, kPieceLanes);
        const int row_next = __shfl_sync(~0u, last ? names_next.x : names.x, (s + 1) % kPieceLanes, kPieceLanes);
        if (row >= 0) {
          const float4* const from = pieces + sample * c.row_slots * 2 * kPieceLanes + part;
#pragma unroll
          for (int i = 0; i < kRows; ++i)
            if (const int r = i ^ int(swapped); r < c.row_slots) {
              const float2 coefficients = by.of(i, turned);
              add_piece(sum, from[(2 * r + turned) * kPieceLanes], coefficients.x);
              add_piece(sum, from[(2 * r + !turned) * kPieceLanes], coefficients.y);
            }
          const bool ends = row != row_next, cut = at + s + 1 == first + kRun && !ends;
          if (ends || cut) {
            opens = cut && !begun;
            if (begun) {
              began_before = true, spans = cut, row_before = row, before = sum;
            } else if (ends && inside) {
              store_four(to + int64_t(row) * c.sums.width, sum);
            }
            begun = false;
            if (!opens) sum = float4{};
          }
        }
        by = by_next, row = row_next;
      }
      key = key_next, key_next = key_later, names = names_next;
    }

    // Rows that lie in several runs, added up run by run; those that leave the warp's places go to `pieces` of Sums.
    const uint32_t with_before = __ballot_sync(~0u, began_before), with_open = __ballot_sync(~0u, opens);
    if ((with_before | with_open) == 0) continue;
    const uint32_t with_span = __ballot_sync(~0u, spans);
    bool under_way = false, began_here = false;
    float4 total{};
    for (int g = 0; g < kMembers; ++g) {
      const int from = g * kPieceLanes + part;
      const uint32_t bit = 1u << (g * kPieceLanes);
      if (with_before & bit) {
        add_piece(total, piece_of_lane(before, from), 1.f);
        const int row = __shfl_sync(~0u, row_before, from);
        under_way = with_span & bit;
        if (!under_way) {
          if (group == 0 && inside) {
            if (began_here)
              store_four(to + int64_t(row) * c.sums.width, total);
            else
              store_four(c.sums.piece(tile, 0) + at_column, total);
          }
          total = float4{};
        }
      }
      if (with_open & bit) {
        total = piece_of_lane(sum, from);
        under_way = began_here = true;
      }
    }
    if (under_way && group == 0 && inside) store_four(c.sums.piece(tile, began_here ? 1 : 0) + at_column, total);
  }
}

}  // namespace target_attention
