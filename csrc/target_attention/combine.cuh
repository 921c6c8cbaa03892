// Backward, second pass where a sample has few query rows. The gradient of a table row is
//   sum over its members u and the query rows r of u's sample:  ds[u, r] q[r] + p[u, r] dout[r],
// members in order. A block keeps 64 bytes of every row of q and dout, of all samples, in shared memory: what moves are the
// coefficients ds and p, 8 bytes a pair, and the gradient, once. Threads go by place in `order`, not by table row.
#pragma once

#include "rows.cuh"

namespace target_attention {

constexpr int kSliceBytes = 64;                // of a row: what a block's shared memory holds
constexpr int kPieceLanes = kSliceBytes / 16;  // lanes of a group, 16 bytes each
constexpr int kMembers = 32 / kPieceLanes;     // groups of a warp: each adds up members of its own
constexpr int kRun = kSumPlaces / kMembers;    // places of a group, one after the other; a warp has as many as a block of Sums
constexpr int kMostCombinedRows = 8;           // query rows of a sample; beyond, moving rows costs less than reading so many

struct Combine {
  Problem p;
  Gradients g;
  Sums sums;
  const float2* coefficients;  // (keys, heads_kv, row_slots): ds, scaled, and p
  int row_slots;

  static int slices(const Problem& p, int element) { return (p.head_dim * element + kSliceBytes - 1) / kSliceBytes; }
  static size_t shared_bytes(const Problem& p, int row_slots) {
    return size_t(p.samples) * row_slots * 2 * kSliceBytes + sizeof(int) * p.samples;
  }
};

// sum += 16 bytes of a row times its coefficient
__device__ __forceinline__ void add_piece(float (&sum)[8], uint4 piece, float by) {
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum[2 * i] += __uint_as_float(words[i] << 16) * by;
    sum[2 * i + 1] += __uint_as_float(words[i] & 0xffff0000u) * by;
  }
}
__device__ __forceinline__ void add_piece(float (&sum)[4], uint4 piece, float by) {
  sum[0] += __uint_as_float(piece.x) * by, sum[1] += __uint_as_float(piece.y) * by;
  sum[2] += __uint_as_float(piece.z) * by, sum[3] += __uint_as_float(piece.w) * by;
}

template <typename T, int kCount>
__device__ __forceinline__ void store_piece(T* to, const float (&sum)[kCount]) {
  if constexpr (sizeof(T) == 2)
    *reinterpret_cast<uint4*>(to) = make_uint4(Half<T>::pack(sum[0], sum[1]), Half<T>::pack(sum[2], sum[3]),
                                               Half<T>::pack(sum[4], sum[5]), Half<T>::pack(sum[6], sum[7]));
  else
#pragma unroll
    for (int i = 0; i < kCount; i += 4) store_four(to + i, make_float4(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]));
}

// A place of `order`: its key, the key's sample, and the segment it belongs to.
struct Place {
  int member, sample, row, begin, end;

  __device__ Place from_lane(int lane) const {
    return {__shfl_sync(~0u, member, lane, kPieceLanes), __shfl_sync(~0u, sample, lane, kPieceLanes),
            __shfl_sync(~0u, row, lane, kPieceLanes), __shfl_sync(~0u, begin, lane, kPieceLanes),
            __shfl_sync(~0u, end, lane, kPieceLanes)};
  }
};

// kRows: at least row_slots. grid (any, heads_kv * slices)
template <typename T, int kRows, int kBlock>
__global__ void __launch_bounds__(kBlock) combine_kernel(const Combine c) {
  extern __shared__ __align__(16) unsigned char bytes[];
  constexpr int kColumns = 16 / int(sizeof(T));  // of a lane
  const Problem& p = c.p;
  const int pairs = p.samples * c.row_slots;
  uint4* const pieces = reinterpret_cast<uint4*>(bytes);  // (samples, row_slots, q and dout, kPieceLanes)
  int* const begins = reinterpret_cast<int*>(pieces + pairs * 2 * kPieceLanes);
  const int slices = (p.head_dim * int(sizeof(T)) + kSliceBytes - 1) / kSliceBytes;
  const int head_kv = blockIdx.y / slices, first_column = blockIdx.y % slices * (kSliceBytes / int(sizeof(T)));
  for (int i = threadIdx.x; i < pairs * 2 * kPieceLanes; i += kBlock) {
    const int row = i / (2 * kPieceLanes) % c.row_slots, column = first_column + i % kPieceLanes * kColumns;
    const QueryRows rows(p, i / (2 * kPieceLanes) / c.row_slots, head_kv);
    const T* const from = static_cast<const T*>(i / kPieceLanes % 2 == 0 ? p.q : c.g.dout);
    uint4 piece = make_uint4(0, 0, 0, 0);
    if (row < rows.count && column < p.head_dim)
      piece = *reinterpret_cast<const uint4*>(from + rows.index(p, row) * p.head_dim + column);
    pieces[i] = piece;
  }
  for (int b = threadIdx.x; b < p.samples; b += kBlock) begins[b] = p.cu_seqlens_k[b];
  __syncthreads();

  const int lane = threadIdx.x % 32, part = lane % kPieceLanes, group = lane / kPieceLanes;
  // Neighbouring groups read q and dout in opposite order: else both would want the same half of the banks.
  const int turned = group % 2;
  const int column = first_column + part * kColumns;
  const bool inside = column < p.head_dim;
  const int at_column = head_kv * p.head_dim + column;
  const int places = int(c.g.offsets[c.g.table]);
  T* const to = static_cast<T*>(c.sums.to) + at_column;

  int top = 1;
  while (top * 2 < p.samples) top *= 2;
  const auto sample_of = [&](int member) {
    int sample = 0;
    for (int step = top; step > 0; step /= 2)
      if (sample + step < p.samples && begins[sample + step] <= member) sample += step;
    return sample;
  };
  const auto load = [&](float2 (&to)[kRows], int member) {
    const float2* const from = c.coefficients + (int64_t(member) * p.heads_kv + head_kv) * c.row_slots;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r < c.row_slots) to[r] = from[r];
  };

  const int warps = gridDim.x * (kBlock / 32);
  for (int tile = threadIdx.x / 32 * gridDim.x + blockIdx.x; tile * kSumPlaces < places; tile += warps) {
    const int first = tile * kSumPlaces + group * kRun, end = min(first + kRun, places);
    const auto member_at = [&](int place) { return place < end ? int(c.g.order[place]) : 0; };
    float sum[kColumns] = {}, before[kColumns] = {};  // before: of the row that began before the run
    bool began_before = false, spans = false, opens = false;
    int row_before = 0;
    Place now{}, next{};
    now.member = member_at(first + part);
    int later = member_at(first + kPieceLanes + part);
    now.row = int(c.g.index[now.member]);
    now.begin = int(c.g.offsets[now.row]), now.end = int(c.g.offsets[now.row + 1]);
    now.sample = sample_of(now.member);
    float2 by[kRows], by_next[kRows];
    load(by, __shfl_sync(~0u, now.member, 0, kPieceLanes));
#pragma unroll 1
    for (int at = first; at < first + kRun; at += kPieceLanes, now = next) {
#pragma unroll
      for (int s = 0; s < kPieceLanes; ++s) {
        // The next places are looked up a step at a time, so that none waits for the one before.
        if (s == 0) next.member = later, next.row = int(c.g.index[later]);
        if (s == 1) next.begin = int(c.g.offsets[next.row]), next.end = int(c.g.offsets[next.row + 1]);
        if (s == 2) next.sample = sample_of(next.member), later = member_at(at + 2 * kPieceLanes + part);
        load(by_next, __shfl_sync(~0u, s + 1 < kPieceLanes ? now.member : next.member, (s + 1) % kPieceLanes, kPieceLanes));
        const Place here = now.from_lane(s);
        if (at + s < end) {
          const uint4* const from = pieces + here.sample * c.row_slots * 2 * kPieceLanes + part;
#pragma unroll
          for (int r = 0; r < kRows; ++r)
            if (r < c.row_slots) {
              const uint4 x = from[(2 * r + turned) * kPieceLanes], y = from[(2 * r + 1 - turned) * kPieceLanes];
              add_piece(sum, x, turned ? by[r].y : by[r].x);
              add_piece(sum, y, turned ? by[r].x : by[r].y);
            }
          const bool ends = at + s + 1 == here.end, cut = at + s + 1 == end && !ends;
          if (ends || cut) {
            opens = cut && here.begin >= first;
            if (here.begin < first) {
              began_before = true, spans = cut, row_before = here.row;
#pragma unroll
              for (int i = 0; i < kColumns; ++i) before[i] = sum[i];
            } else if (ends && inside) {
              store_piece(to + int64_t(here.row) * c.sums.width, sum);
            }
            if (!opens)
#pragma unroll
              for (int i = 0; i < kColumns; ++i) sum[i] = 0.f;
          }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) by[r] = by_next[r];
      }
    }

    // Rows that lie in several runs, added up run by run; those that leave the warp's places go to `pieces` of Sums.
    const uint32_t with_before = __ballot_sync(~0u, began_before), with_open = __ballot_sync(~0u, opens);
    if ((with_before | with_open) == 0) continue;
    const uint32_t with_span = __ballot_sync(~0u, spans);
    bool under_way = false, began_here = false;
    float total[kColumns] = {};
    for (int g = 0; g < kMembers; ++g) {
      const int from = g * kPieceLanes + part;
      const uint32_t bit = 1u << (g * kPieceLanes);
      if (with_before & bit) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) total[i] += __shfl_sync(~0u, before[i], from);
        const int row = __shfl_sync(~0u, row_before, from);
        under_way = with_span & bit;
        if (!under_way) {
          if (group == 0 && inside) {
            if (began_here)
              store_piece(to + int64_t(row) * c.sums.width, total);
            else
              store_piece(c.sums.piece(tile, 0) + at_column, total);
          }
#pragma unroll
          for (int i = 0; i < kColumns; ++i) total[i] = 0.f;
        }
      }
      if (with_open & bit) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) total[i] = __shfl_sync(~0u, sum[i], from);
        under_way = began_here = true;
      }
    }
    if (under_way && group == 0 && inside) store_piece(c.sums.piece(tile, began_here ? 1 : 0) + at_column, total);
  }
}

}  // namespace target_attention
