// Backward, second pass: the parts of a table row's gradient, one for each of its members, added up in member order. Threads go by
// place in `order`, not by table row, so that rows with many members and rows with few cost the same.
#pragma once

#include "stream.cuh"

namespace target_attention {

constexpr int kSumWarps = 8;
constexpr int kSumPlaces = 32 * kSumWarps;  // of `order`, to a block
constexpr int kZeroRows = kSumPlaces;       // table rows among which a block looks for those without members
constexpr int kAhead = 4;                   // members under way at a time

// What the first pass leaves of a key where coefficients are enough: for every query row d(score), scaled, and p, in whole sectors of
// memory, of bfloat16 as pairs of their high parts and of their low parts; and once for all heads its sample. Nothing of the gradient's rows,
// which may be found meanwhile.
constexpr int kMostRecordedRows = 8;
__host__ __device__ constexpr int record_pairs(int rows) { return rows <= 4 ? 4 : 8; }
struct Records {
  float2* pairs;  // (keys, heads_kv, record_pairs)
  int* samples;   // (keys,)
  int4* members;  // bfloat16: (keys,): of each place of `order` the key, its row of the gradient, and its sample

  static size_t pair_bytes(const Problem& p, int rows) { return sizeof(float2) * p.keys * p.heads_kv * record_pairs(rows); }
  static size_t sample_bytes(const Problem& p) { return sizeof(int) * p.keys; }
  static size_t member_bytes(const Problem& p) { return p.type == Type::kBFloat16 ? sizeof(int4) * p.keys : 0; }
};

struct Sums {
  const float* members;    // (keys, width)
  const int64_t* index;    // index, order and offsets as in Gradients
  const int64_t* order;
  const int64_t* offsets;
  void* to;                // (table, width) of T
  float* pieces;           // (blocks, 2, width): of the rows that began before a block, and of those that go on after it
  int keys, table;         // keys: places there are; those behind the last row's members are nobody's
  int width;               // a multiple of 4
  bool skip_lone;          // rows with one member are written already
  int walkers = 0;         // warps of the walk, which go by spans of their own

  // Places that come to one slot of `pieces`.
  __device__ int span(int places) const {
    return walkers == 0 ? kSumPlaces : max(kSumPlaces, (places + 32 * walkers - 1) / (32 * walkers) * 32);
  }
  int blocks() const { return (keys + kSumPlaces - 1) / kSumPlaces; }
  static size_t piece_bytes(int64_t keys, int width) {
    return sizeof(float) * 2 * ((keys + kSumPlaces - 1) / kSumPlaces) * width;
  }
  __device__ float* piece(int block, int after) const { return pieces + (int64_t(block) * 2 + after) * width; }
};

// Which row a place of `order` belongs to, and the places of all its members.
struct Segment {
  int row = 0, begin = 0, end = 0;

  __device__ Segment() {}
  __device__ Segment(const Sums& s, int member) {
    row = int(s.index[member]);
    begin = int(s.offsets[row]), end = int(s.offsets[row + 1]);
  }
};

template <typename T>
__device__ void zero_empty_rows(const Sums& s, int block) {
  const int lane = threadIdx.x % 32, row = block * kZeroRows + threadIdx.x;
  uint32_t empty = __ballot_sync(~0u, row < s.table && s.offsets[row] == s.offsets[row + 1]);
  for (; empty != 0; empty &= empty - 1)
    for (int c = 4 * lane; c < s.width; c += 128)
      store_four(static_cast<T*>(s.to) + int64_t(row - lane + __ffs(empty) - 1) * s.width + c, make_float4(0.f, 0.f, 0.f, 0.f));
}

// A warp adds up 32 places. Rows that lie wholly in them are finished; the first and the last piece meet their neighbours' in shared
// memory, those that leave the block in `pieces`.
template <typename T>
__global__ void __launch_bounds__(kSumPlaces, 4) sum_members_kernel(const Sums s) {
  __shared__ float4 shared[kSumWarps][2][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int block_first = blockIdx.x * kSumPlaces, block_end = min(int(s.offsets[s.table]), block_first + kSumPlaces);
  const int first = block_first + warp * 32, end = min(block_end, first + 32), place = first + lane;
  T* const to = static_cast<T*>(s.to);
  int member = 0;
  Segment segment;
  if (place < end) {
    member = int(s.order[place]);
    segment = Segment(s, member);
  }
  const bool lone = s.skip_lone && segment.end - segment.begin == 1;
  const uint32_t wanted = __ballot_sync(~0u, place < end && !lone);
  const uint32_t last = __ballot_sync(~0u, place + 1 == segment.end || place + 1 == end);
  const uint32_t before = __ballot_sync(~0u, segment.begin < first), after = __ballot_sync(~0u, segment.end > end);
  const int here = max(0, end - first);
  // Of the row at the warp's last place: does its sum start here and go on in the next warp?
  const int at_end = __shfl_sync(~0u, segment.end, max(0, here - 1)), row_at_end = __shfl_sync(~0u, segment.row, max(0, here - 1));
  const bool opens = here > 0 && at_end > end && __shfl_sync(~0u, segment.begin, max(0, here - 1)) >= first;

  const uint32_t cut = before | after;

  for (int c = 4 * lane; c - 4 * lane < s.width; c += 128) {
    const bool inside = c < s.width;
    const float* const from = s.members + (inside ? c : 0);
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (uint32_t left = wanted; left != 0;) {
      float4 x[kAhead];
      uint32_t next = left;
#pragma unroll
      for (int a = 0; a < kAhead; ++a, next &= next - 1) {
        const int m = __shfl_sync(~0u, member, __ffs(next) - 1);
        if (next != 0) x[a] = *reinterpret_cast<const float4*>(from + int64_t(m) * s.width);
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a, left &= left - 1) {
        if (left == 0) break;
        const int at = __ffs(left) - 1;
        add_four(sum, x[a]);
        if ((last >> at & 1) == 0) continue;
        const int row = __shfl_sync(~0u, segment.row, at);
        if (cut >> at & 1)
          shared[warp][before >> at & 1 ? 0 : 1][lane] = sum;
        else if (inside)
          store_four(to + int64_t(row) * s.width + c, sum);
        sum = make_float4(0.f, 0.f, 0.f, 0.f);
      }
    }
    __syncthreads();
    // warp 0 also closes the row that began before the block
    const int closes = warp == 0 && (before & 1) && here > 0 ? __shfl_sync(~0u, segment.end, 0) : 0;
    if (closes > 0 && inside) {
      float4 total = shared[0][0][lane];
      for (int w = 1; w < kSumWarps && block_first + w * 32 < min(closes, block_end); ++w) add_four(total, shared[w][0][lane]);
      store_four(s.piece(blockIdx.x, 0) + c, total);
    }
    if (opens && inside) {
      float4 total = shared[warp][1][lane];
      for (int w = warp + 1; w < kSumWarps && block_first + w * 32 < min(at_end, block_end); ++w)
        add_four(total, shared[w][0][lane]);
      if (at_end > block_end)
        store_four(s.piece(blockIdx.x, 1) + c, total);
      else
        store_four(to + int64_t(row_at_end) * s.width + c, total);
    }
    __syncthreads();
  }
}

// Rows whose members several blocks added up: a warp for each block, and the row that starts in it and leaves it. The blocks after
// `joining` zero the rows without members.
template <typename T>
__global__ void __launch_bounds__(kSumPlaces) join_pieces_kernel(const Sums s, int joining) {
  if (int(blockIdx.x) >= joining) return zero_empty_rows<T>(s, blockIdx.x - joining);
  const int places = int(s.offsets[s.table]), span = s.span(places), blocks = (places + span - 1) / span;
  const int block = blockIdx.x * kSumWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (block + 1 >= blocks) return;
  const Segment segment(s, int(s.order[(block + 1) * span - 1]));
  if (segment.begin < block * span || segment.end <= (block + 1) * span) return;
  for (int c = 4 * lane; c < s.width; c += 128) {
    float4 sum = *reinterpret_cast<const float4*>(s.piece(block, 1) + c);
#pragma unroll 4
    for (int b = block + 1; b * span < segment.end; ++b) add_four(sum, *reinterpret_cast<const float4*>(s.piece(b, 0) + c));
    store_four(static_cast<T*>(s.to) + int64_t(segment.row) * s.width + c, sum);
  }
}

}  // namespace target_attention
