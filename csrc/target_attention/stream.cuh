// How keys reach a warp: chunks of a sample's keys go to blocks, tiles of a chunk to the block's warps in turn, and each warp
// copies its own tiles, row by row, into its own stages of shared memory. Warps meet only before and after the keys.
#pragma once

#include <math_constants.h>

#include "api.h"
#include "ptx.cuh"

namespace target_attention {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// ---- chunks ----------------------------------------------------------------------------------

// The largest b in [0, count) with first(b) <= value; first must not fall, and first(0) <= value. A whole warp asks together,
// 32 places at a time: each round waits for memory once.
template <class First>
__device__ __forceinline__ int last_not_above(int count, int value, First first) {
  const int lane = threadIdx.x % 32;
  int low = 0;
  while (count > 1) {
    const int step = (count + 31) / 32, at = lane * step;
    const int below = __popc(__ballot_sync(~0u, at < count && first(low + at) <= value)) - 1;
    low += below * step;
    count = min(step, count - below * step);
  }
  return low;
}

// A sample's keys are cut into equal chunks of at most `length`. Its slots begin at cu_seqlens_k[b] / length + b, which leaves
// room for all of them without anybody counting: floor((x + n) / c) + 1 >= floor(x / c) + ceil(n / c).
struct Chunks {
  const int* cu_seqlens_k;
  int samples;
  int length;

  __device__ int first_slot(int sample) const { return cu_seqlens_k[sample] / length + sample; }
  __device__ int count(int sample) const {
    const int keys = cu_seqlens_k[sample + 1] - cu_seqlens_k[sample];
    return max(1, (keys + length - 1) / length);  // a sample without keys has one empty chunk
  }
  static int slots(const Problem& p, int length) { return p.keys / length + p.samples; }
};

struct Chunk {
  int sample;
  int count;  // chunks of the sample
  int begin;  // keys
  int end;

  __device__ static bool find(const Chunks& chunks, int slot, int tile, Chunk* chunk) {
    const int sample = last_not_above(chunks.samples, slot, [&](int b) { return chunks.first_slot(b); });
    const int index = slot - chunks.first_slot(sample), count = chunks.count(sample);
    if (index >= count) return false;
    const int begin = chunks.cu_seqlens_k[sample], keys = chunks.cu_seqlens_k[sample + 1] - begin;
    const int share = ((keys + count - 1) / count + tile - 1) / tile * tile;
    *chunk = {sample, count, begin + min(keys, index * share), begin + min(keys, (index + 1) * share)};
    return true;
  }
};

// ---- weights ---------------------------------------------------------------------------------

enum class Weights { kNone, kPerKey, kPerPair };  // the last: per head, or per query through q_chunk

__device__ __forceinline__ Weights weights_of(const Problem& p) {
  if (p.weight == nullptr) return Weights::kNone;
  return p.q_chunk == nullptr && p.weight_stride_head == 0 ? Weights::kPerKey : Weights::kPerPair;
}

// Softmax whose weights the tile brings, the common case: compiled apart, so that the others' branches cost it nothing.
inline bool is_plain(const Problem& p) {
  return p.normaliser == Normaliser::kSoftmax && (p.weight == nullptr || (p.q_chunk == nullptr && p.weight_stride_head == 0));
}

// ---- queries ---------------------------------------------------------------------------------

// The rows that meet the keys of one (sample, kv head): all targets of the sample times the query heads of the group.
struct QueryRows {
  int query;  // first of the sample
  int head;   // first of the group
  int share;  // query heads per kv head
  int count;

  __device__ QueryRows(const Problem& p, int sample, int head_kv)
      : query(p.cu_seqlens_q[sample]), share(p.heads / p.heads_kv) {
    head = head_kv * share;
    count = (p.cu_seqlens_q[sample + 1] - query) * share;
  }
  __device__ int target(int row) const { return row / share; }
  __device__ int head_of(int row) const { return head + row % share; }
  // index of (query, head) in (queries, heads)
  __device__ int64_t index(const Problem& p, int row) const {
    return int64_t(query + target(row)) * p.heads + head_of(row);
  }
  // what is added to key * weight_stride_key to find the weight of a pair
  __device__ int64_t weight_offset(const Problem& p, int row) const {
    const int64_t chunk = p.q_chunk == nullptr ? 0 : p.q_chunk[query + target(row)];
    return chunk * p.weight_stride_row + head_of(row) * p.weight_stride_head;
  }
};

// Rows first .. first + kRows of (queries, heads, head_dim) into shared memory, zeros past the end and in the padding.
template <typename T, int kRows, int kDim, int kStride>
__device__ void load_queries(T* shared, const void* source, const Problem& p, const QueryRows& rows, int first) {
  constexpr int kPiece = 16 / sizeof(T), kPieces = kDim / kPiece;
  for (int i = threadIdx.x; i < kRows * kPieces; i += kThreads) {
    const int row = first + i / kPieces, column = i % kPieces * kPiece;
    uint4 piece = make_uint4(0, 0, 0, 0);
    if (row < rows.count && column < p.head_dim)
      piece = *reinterpret_cast<const uint4*>(static_cast<const T*>(source) + rows.index(p, row) * p.head_dim + column);
    *reinterpret_cast<uint4*>(shared + i / kPieces * kStride + column) = piece;
  }
}

// ---- tiles of keys ---------------------------------------------------------------------------

// kOneTable: values are the keys. kMembers: a key brings the row of the gradient that it adds to, and the bounds of that row's members.
template <typename T_, int kDim_, int kTile_, int kStages_, bool kOneTable_, bool kMembers_ = false>
struct TileShape {
  using T = T_;
  static constexpr int kDim = kDim_, kTile = kTile_, kStages = kStages_;
  static constexpr bool kOneTable = kOneTable_, kMembers = kMembers_;
  static constexpr int kPiece = 16 / sizeof(T);
  static constexpr int kStride = kDim + kPiece;  // rows start 4 banks apart: matrix loads meet no conflict

  struct alignas(16) Stage {
    T rows[kOneTable ? 1 : 2][kTile * kStride];
    int64_t members[kMembers ? kTile : 1][2];
    int row[kMembers ? kTile : 1];
    float weight[kTile];  // softmax: log weight, -inf past the end; otherwise multiplier, 0 past the end

    __device__ const T* k() const { return rows[0]; }
    __device__ T* k() { return rows[0]; }
    __device__ const T* v() const { return rows[kOneTable ? 0 : 1]; }
    __device__ T* v() { return rows[kOneTable ? 0 : 1]; }
  };
};

template <class Shape>
class KeyStream {
  using T = typename Shape::T;
  using Stage = typename Shape::Stage;
  static constexpr int kPieces = Shape::kDim * int(sizeof(T)) / 16;
  static constexpr int kPerLane = kPieces > 32 ? kPieces / 32 : 1;  // pieces of a row that one lane copies

 public:
  // index, offsets: the gradient's row of each key, and where each row's members start, if keys bring them.
  __device__ KeyStream(const Problem& p, const Chunk& chunk, int head_kv, Stage* stages,
                       const int64_t* index = nullptr, const int64_t* offsets = nullptr)
      : p_(p), stages_(stages), index_(index), offsets_(offsets), end_(chunk.end), head_(head_kv), weights_(weights_of(p)) {
    first_ = chunk.begin + int(threadIdx.x) / 32 * Shape::kTile;
    constexpr int kStep = kWarps * Shape::kTile;
    tiles_ = first_ < end_ ? (end_ - first_ + kStep - 1) / kStep : 0;
    peek();
    for (int s = 0; s + 1 < Shape::kStages; ++s) issue();
  }

  __device__ int tiles() const { return tiles_; }
  __device__ int key(int tile) const { return first_ + tile * kWarps * Shape::kTile; }
  __device__ int keys_left(int tile) const { return min(Shape::kTile, end_ - key(tile)); }

  // Tile `tile`, which must be asked for in turn; the one before it may then be overwritten.
  __device__ Stage& next(int tile) {
    __syncwarp();  // everybody is done with the stage that is filled now
    issue();
    copy_wait<Shape::kStages - 1>();
    __syncwarp();
    return stages_[tile % Shape::kStages];
  }

 private:
  // Row and weight of the next tile to be copied, one key a lane: an order ahead, and not looked at until then, so that nobody waits
  // for them.
  __device__ void peek() {
    const int lane = threadIdx.x % 32, key = first_ + issued_ * kWarps * Shape::kTile + lane;
    const bool softmax = p_.normaliser == Normaliser::kSoftmax;
    row_ = into_ = -1;
    weight_ = softmax ? -CUDART_INF_F : 0.f;
    if (lane < Shape::kTile && key < end_) {
      row_ = static_cast<int>(p_.rows[key]);
      if (Shape::kMembers) into_ = static_cast<int>(index_[key]);
      weight_ = softmax ? 0.f : 1.f;
      if (weights_ == Weights::kPerKey) weight_ = p_.weight[key * p_.weight_stride_key];
    }
  }

  __device__ void issue() {
    if (issued_ < tiles_) {
      const int lane = threadIdx.x % 32;
      Stage& stage = stages_[issued_ % Shape::kStages];
      if (lane < Shape::kTile) stage.weight[lane] = weight_;
      if (Shape::kMembers && lane < Shape::kTile) {
        stage.row[lane] = into_;
        copy_async_8(&stage.members[lane][0], offsets_ + max(into_, 0));
        copy_async_8(&stage.members[lane][1], offsets_ + max(into_, 0) + 1);
      }
      const bool absent = p_.normaliser == Normaliser::kSoftmax && weight_ == -CUDART_INF_F;
      const int read = absent ? -1 : row_;  // an absent row may hold NaN and is not read
      const int row_bytes = p_.heads_kv * p_.head_dim * int(sizeof(T));
#pragma unroll
      for (int part = 0; part < kPerLane; ++part) {
        const int piece = part * 32 + lane % kPieces;
        const bool inside = piece * 16 < p_.head_dim * int(sizeof(T));  // zeros beyond: a product takes whole columns
        const int64_t column = head_ * p_.head_dim * int64_t(sizeof(T)) + (inside ? piece * 16 : 0);
        const char* const k_from = static_cast<const char*>(p_.k_table) + column;
        const char* const v_from = static_cast<const char*>(p_.v_table) + column;
        constexpr int kAtOnce = 32 * kPerLane / kPieces;  // keys
#pragma unroll
        for (int i = 0; i < Shape::kTile / kAtOnce; ++i) {
          const int row = __shfl_sync(~0u, read, i * kAtOnce + lane / kPieces);
          const int64_t from = int64_t(max(row, 0)) * row_bytes;
          const bool present = inside && row >= 0;
          const int to = (i * kAtOnce + lane / kPieces) * Shape::kStride + piece * Shape::kPiece;
          copy_async(stage.k() + to, k_from + from, present);
          if (!Shape::kOneTable) copy_async(stage.v() + to, v_from + from, present);
        }
      }
      ++issued_;
      peek();
    }
    copy_commit();  // also without a copy, so that groups count tiles
  }

  const Problem& p_;
  Stage* stages_;
  const int64_t *index_, *offsets_;
  int first_, end_, tiles_, head_;
  int issued_ = 0;
  int row_, into_;
  float weight_;
  Weights weights_;
};

}  // namespace target_attention
