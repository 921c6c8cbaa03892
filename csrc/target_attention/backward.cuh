// Backward, first pass: as forward, a block takes a chunk of a sample's keys. It recomputes the scores, adds up dq, and writes what the second
// pass needs of each key: what its row receives from the queries of this sample, straight into the gradient of a table row that has no other
// member, otherwise as float32 to be added up, member by member (rows.cuh). Where a sample has few query rows it is coefficients
// (coefficients.cuh). No sum depends on timing.
#pragma once

#include "mma.cuh"
#include "rows.cuh"

namespace target_attention {

struct BackwardParameters {
  Problem p;
  Gradients g;
  Chunks chunks;
  int row_slots;
  float* partial_dq;  // (slots, heads_kv, row_slots, head_dim)
  float* dk_members;  // (keys, heads_kv, head_dim), slots of lone members unused
  float* dv_members;  // null with one table
  bool direct;        // every query row of a sample fits one pass, so that lone members need no sum
  float* pieces;      // of Sums
  Records records;    // of Combine

  __device__ int64_t partial(int slot, int head_kv, int row) const {
    return (int64_t(slot) * p.heads_kv + head_kv) * row_slots + row;
  }
};

// What one pair gives: its coefficient in the values' gradient, d(score), and d(weight).
struct PairGradient {
  float p, ds, dw;
};

// score: q.k before scaling; dp: dout.v; lse to base 2; delta: dout.out - dlse
template <bool kSoftmax>
__device__ __forceinline__ PairGradient pair_gradient(const Problem& problem, float score, float dp, float w, float lse,
                                                      float delta) {
  if (kSoftmax || problem.normaliser == Normaliser::kSoftmax) {
    const float p = power_of_two(score * (problem.scale * kLog2e) + (w * kLog2e - lse));
    const float ds = p * (dp - delta);
    return w == -CUDART_INF_F ? PairGradient{0.f, 0.f, 0.f} : PairGradient{p, ds, ds};
  }
  const float x = score * problem.scale;
  float a = x, slope = 1.f;
  if (problem.normaliser == Normaliser::kSilu) {
    const float gate = 1.f / (1.f + __expf(-x));
    a = x * gate;
    slope = gate * (1.f + x * (1.f - gate));
  }
  return {w * a, w * slope * dp, a * dp};
}

// Where a key's part of a table gradient goes, one head of it: looked up once a tile, written column by column.
template <class Shape>
struct RowWriter {
  using T = typename Shape::T;
  struct Place {
    char* to;
    bool direct;   // into the table's gradient
    bool present;  // not past the end
  };
  const BackwardParameters& b;
  int head_kv;
  bool add;  // to what an earlier group of query rows left

  // slot: of the key in the stage; table: 0 for keys, 1 for values
  __device__ Place place(const typename Shape::Stage& stage, int key, int slot, int table) const {
    const int row = stage.row[slot];
    const bool direct = b.direct && stage.members[slot][1] - stage.members[slot][0] == 1;
    const int64_t at = (int64_t(direct ? row : key + slot) * b.p.heads_kv + head_kv) * b.p.head_dim;
    char* const whole = static_cast<char*>(table == 0 ? b.g.dk_table : b.g.dv_table);
    char* const parts = reinterpret_cast<char*>(table == 0 ? b.dk_members : b.dv_members);
    return {(direct ? whole : parts) + at * int64_t(direct ? sizeof(T) : sizeof(float)), direct, row >= 0};
  }

  template <int kCount>
  __device__ void write(const Place& place, int column, const float (&x)[kCount]) const {
    if (!place.present || column >= b.p.head_dim) return;
    if (place.direct) {
      T* to = reinterpret_cast<T*>(place.to) + column;
      if constexpr (kCount == 2)
        *reinterpret_cast<uint32_t*>(to) = Half<T>::pack(x[0], x[1]);
      else
        store_four(to, make_float4(x[0], x[1], x[2], x[3]));
      return;
    }
    float* to = reinterpret_cast<float*>(place.to) + column;
    if constexpr (kCount == 2) {
      float2 sum = make_float2(x[0], x[1]);
      if (add) {
        const float2 before = *reinterpret_cast<const float2*>(to);
        sum = make_float2(before.x + sum.x, before.y + sum.y);
      }
      *reinterpret_cast<float2*>(to) = sum;
    } else {
      float4 sum = make_float4(x[0], x[1], x[2], x[3]);
      if (add) add_four(sum, *reinterpret_cast<const float4*>(to));
      store_four(to, sum);
    }
  }
};

template <class Shape, int kRows>
struct QueryTile {
  alignas(16) typename Shape::T rows[2 * kRows * Shape::kStride];  // of q, then of dout
  float lse[kRows], delta[kRows];  // as pair_gradient wants them

  __device__ const typename Shape::T* q() const { return rows; }
  __device__ const typename Shape::T* dout() const { return rows + kRows * Shape::kStride; }

  __device__ void load(const BackwardParameters& b, const QueryRows& of, int first) {
    using T = typename Shape::T;
    load_queries<T, kRows, Shape::kDim, Shape::kStride>(rows, b.p.q, b.p, of, first);
    load_queries<T, kRows, Shape::kDim, Shape::kStride>(rows + kRows * Shape::kStride, b.g.dout, b.p, of, first);
    if (b.p.normaliser != Normaliser::kSoftmax) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int r = warp; r < kRows; r += kWarps) {
      float sum = 0.f, log_sum = CUDART_INF_F;  // +inf: every probability of a row that is not there is 0
      if (first + r < of.count) {
        const int64_t at = of.index(b.p, first + r);
        const T* o = static_cast<const T*>(b.g.out) + at * b.p.head_dim;
        const T* d = static_cast<const T*>(b.g.dout) + at * b.p.head_dim;
        for (int c = lane; c < b.p.head_dim; c += 32) sum += widen(o[c]) * widen(d[c]);
        if (b.g.lse[at] != -CUDART_INF_F) log_sum = b.g.lse[at] * kLog2e;
        if (b.g.dlse != nullptr && lane == 0) sum -= b.g.dlse[at];
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
      if (lane == 0) lse[r] = log_sum, delta[r] = sum;
    }
  }
};

// kPlain: is_plain, and no gradient of weights.
template <typename T, int kDim, int kGroups, bool kOneTable, bool kPlain>
class MmaBackward {
  static constexpr bool kWide = sizeof(T) == 4;

 public:
  using Shape = TileShape<T, kDim, !kWide && kDim * kGroups*(kOneTable ? 1 : 2) <= 128 ? 32 : 16, 2, kOneTable, true>;
  static constexpr int kRows = 16 * kGroups, kBlocks = 2;
  static constexpr int kTile = Shape::kTile, kStride = Shape::kStride, kCoefficients = kTile + (kWide ? 4 : 8);
  struct Scratch {
    alignas(16) T p[kRows * kCoefficients], ds[kRows * kCoefficients];  // (query rows, keys)
  };

  __device__ MmaBackward(const BackwardParameters& b, const QueryRows& rows, int first,
                         const QueryTile<Shape, kRows>& tile, Scratch& scratch, int, int head_kv)
      : b_(b), rows_(rows), first_(first), tile_(tile), scratch_(scratch), weights_(b.p, rows, first),
        writer_{b, head_kv, first > 0} {
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) dq_[g][d][i] = 0.f;
  }

  __device__ void consume(typename Shape::Stage& stage, int key, int keys_left) {
    float p[kGroups][kTile / 8][4], ds[kGroups][kTile / 8][4];
    score<Shape, kGroups>(p, tile_.q(), stage.k());
    score<Shape, kGroups>(ds, tile_.dout(), stage.v());
    uint32_t absent = ~0u;
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = g * 16 + row_of(i), column = column_of(n, i);
          const float w = kPlain ? weights_.of_key(stage, n, i) : weights_(stage, key, keys_left, g, n, i);
          if (!kPlain && w != -CUDART_INF_F) absent &= ~(1u << (n * 2 + i % 2));
          const PairGradient pair =
              pair_gradient<kPlain>(b_.p, p[g][n][i], ds[g][n][i], w, tile_.lse[row], tile_.delta[row]);
          if (!kPlain && b_.g.dweight != nullptr && weights_.exists(g, i / 2) && column < keys_left)
            b_.g.dweight[(int64_t(key + column) * b_.p.targets + rows_.target(first_ + row)) * b_.p.heads +
                         rows_.head_of(first_ + row)] = pair.dw;
          p[g][n][i] = pair.p;
          ds[g][n][i] = pair.ds * b_.p.scale;
        }
    if (!kPlain && b_.p.normaliser == Normaliser::kSoftmax && weights_.per_pair()) weights_.clear_absent(stage, absent);
    accumulate<Shape, kGroups>(dq_, ds, stage.k());
    hand_over(p, scratch_.p);
    hand_over(ds, scratch_.ds);
    __syncwarp();
    write_rows(stage, key);
  }

  __device__ void store(float* dq) { store_sums<T, kDim, kGroups>(dq, dq_); }

 private:
  using Place = typename RowWriter<Shape>::Place;
  static constexpr int kTables = kOneTable ? 1 : 2;

  // Accumulators to shared memory, for the products whose rows are keys.
  __device__ void hand_over(const float (&c)[kGroups][kTile / 8][4], T* to) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          T* const pair = to + (g * 16 + row_of(2 * half)) * kCoefficients + column_of(n, 0);
          if constexpr (kWide)
            *reinterpret_cast<float2*>(pair) = make_float2(c[g][n][2 * half], c[g][n][2 * half + 1]);
          else
            *reinterpret_cast<uint32_t*>(pair) = Half<T>::pack(c[g][n][2 * half], c[g][n][2 * half + 1]);
        }
  }

  // dk = ds^T q and dv = p^T dout of the tile's keys, added when they share a table.
  __device__ void write_rows(const typename Shape::Stage& stage, int key) {
    if constexpr (kWide)
      write_wide_rows(stage, key);
    else
      write_half_rows(stage, key);
  }

  // Places t and t + 4 of a product's inner eight are query rows 2 t and 2 t + 1, columns those of column_of_sum: see tf32.cuh.
  __device__ void write_wide_rows(const typename Shape::Stage& stage, int key) {
    const int lane = threadIdx.x % 32;
    Place places[kTables][2];
#pragma unroll
    for (int t = 0; t < kTables; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half) places[t][half] = writer_.place(stage, key, row_of(2 * half), t);
#pragma unroll 1
    for (int d = 0; d < kDim; d += 32) {
      float dk[4][4] = {}, dv[4][4] = {};
      auto& values = kOneTable ? dk : dv;
#pragma unroll
      for (int r = 0; r < kRows; r += 8) {
        const int row = r + lane % 4 * 2, from = row * kStride + d + lane / 4 * 4;
        add_product(dk, scratch_.ds + row * kCoefficients, tile_.q() + from);
        add_product(values, scratch_.p + row * kCoefficients, tile_.dout() + from);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = d + column_of_sum<T>(0, i);
        writer_.write(places[0][i / 2], column, {dk[0][i], dk[1][i], dk[2][i], dk[3][i]});
        if (!kOneTable) writer_.write(places[kTables - 1][i / 2], column, {dv[0][i], dv[1][i], dv[2][i], dv[3][i]});
      }
    }
  }

  // c (16 keys x 32 columns) += coefficients^T rows, over eight query rows of which a lane holds two.
  static __device__ __forceinline__ void add_product(float (&c)[4][4], const float* coefficients, const float* rows) {
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Parts parts = parts_of(__float_as_uint(coefficients[i / 2 * kCoefficients + row_of(i % 2 * 2)]));
      high[i] = parts.high, low[i] = parts.low;
    }
    const uint4 even = *reinterpret_cast<const uint4*>(rows), odd = *reinterpret_cast<const uint4*>(rows + kStride);
    const Parts b0[4] = {parts_of(even.x), parts_of(even.y), parts_of(even.z), parts_of(even.w)};
    const Parts b1[4] = {parts_of(odd.x), parts_of(odd.y), parts_of(odd.z), parts_of(odd.w)};
#pragma unroll
    for (int j = 0; j < 4; ++j) multiply_parts(c[j], c[j], high, low, b0[j], b1[j]);
  }

  __device__ void write_half_rows(const typename Shape::Stage& stage, int key) {
    constexpr int kTiles = kTile / 16;
    const int lane = threadIdx.x % 32;
    Place places[kTables][kTiles][2];
#pragma unroll
    for (int t = 0; t < kTables; ++t)
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          places[t][m][half] = writer_.place(stage, key, m * 16 + row_of(2 * half), t);
    Fragment p[kTiles][kGroups], ds[kTiles][kGroups];
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const int at = (g * 16 + lane % 8 + lane / 16 * 8) * kCoefficients + m * 16 + lane / 8 % 2 * 8;
        p[m][g] = load_transposed(scratch_.p + at);
        ds[m][g] = load_transposed(scratch_.ds + at);
      }
    const int from = lane % 16 * kStride + lane / 16 * 8;
#pragma unroll 2
    for (int d = 0; d < kDim; d += 16) {
      float dk[kTiles][2][4] = {}, dv[kTiles][2][4] = {};
      auto& values = kOneTable ? dk : dv;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const Fragment q = load_transposed(tile_.q() + from + g * 16 * kStride + d);
        const Fragment dout = load_transposed(tile_.dout() + from + g * 16 * kStride + d);
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            Half<T>::multiply(dk[m][n], ds[m][g].x, q.x[2 * n], q.x[2 * n + 1]);
            Half<T>::multiply(values[m][n], p[m][g].x, dout.x[2 * n], dout.x[2 * n + 1]);
          }
      }
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int column = d + column_of(n, 0);
            writer_.write(places[0][m][half], column, {dk[m][n][2 * half], dk[m][n][2 * half + 1]});
            if (!kOneTable)
              writer_.write(places[kTables - 1][m][half], column, {dv[m][n][2 * half], dv[m][n][2 * half + 1]});
          }
    }
  }

  const BackwardParameters& b_;
  const QueryRows& rows_;
  int first_;
  const QueryTile<Shape, kRows>& tile_;
  Scratch& scratch_;
  PairWeights<Shape, kGroups> weights_;
  RowWriter<Shape> writer_;
  float dq_[kGroups][kDim / 8][4];
};

template <class Worker>
struct BackwardShared {
  using Shape = typename Worker::Shape;
  QueryTile<Shape, Worker::kRows> tile;
  typename Worker::Scratch scratch[kWarps];
  union {
    typename Shape::Stage stages[kWarps][Shape::kStages];
    float dq[kWarps][Worker::kRows * kSumStride<Shape::kDim>];
  };
};

// grid (slots, heads_kv); the groups of query rows take turns inside, because they write the same keys' gradients.
template <class Worker>
__global__ void __launch_bounds__(kThreads, Worker::kBlocks) backward_kernel(const BackwardParameters b) {
  using Shape = typename Worker::Shape;
  extern __shared__ __align__(16) unsigned char bytes[];
  auto& shared = *reinterpret_cast<BackwardShared<Worker>*>(bytes);
  const Problem& p = b.p;
  Chunk chunk;
  if (!Chunk::find(b.chunks, blockIdx.x, Shape::kTile, &chunk)) return;
  const int head_kv = blockIdx.y, warp = threadIdx.x / 32;
  const QueryRows rows(p, chunk.sample, head_kv);

  int first = 0;
  do {  // once also without queries: the keys' gradients are then zeros
    shared.tile.load(b, rows, first);
    {
      KeyStream<Shape> stream(p, chunk, head_kv, shared.stages[warp], b.g.index, b.g.offsets);
      __syncthreads();
      Worker worker(b, rows, first, shared.tile, shared.scratch[warp], chunk.sample, head_kv);
      for (int tile = 0; tile < stream.tiles(); ++tile)
        worker.consume(stream.next(tile), stream.key(tile), stream.keys_left(tile));
      copy_wait<0>();
      __syncthreads();
      worker.store(shared.dq[warp]);
    }
    __syncthreads();
    const int pieces = p.head_dim / 4, here = min(Worker::kRows, rows.count - first);
    for (int i = threadIdx.x; i < here * pieces; i += kThreads) {
      const int r = i / pieces, d = i % pieces * 4;
      float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
      for (int w = 0; w < kWarps; ++w)
        add_four(sum, *reinterpret_cast<const float4*>(&shared.dq[w][r * kSumStride<Shape::kDim> + d]));
      if (chunk.count > 1)
        store_four(b.partial_dq + b.partial(blockIdx.x, head_kv, first + r) * p.head_dim + d, sum);
      else
        store_four(static_cast<typename Shape::T*>(b.g.dq) + rows.index(p, first + r) * p.head_dim + d, sum);
    }
    __syncthreads();
    first += Worker::kRows;
  } while (first < rows.count);
}

// dq of samples with several chunks: a warp for each (query, head).
template <typename T>
__global__ void __launch_bounds__(kThreads) merge_dq_kernel(const BackwardParameters b) {
  const Problem& p = b.p;
  const int at = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (at >= p.queries * p.heads) return;
  const int query = at / p.heads, head = at % p.heads, share = p.heads / p.heads_kv;
  const int sample = last_not_above(p.samples, query, [&](int s) { return p.cu_seqlens_q[s]; });
  const int count = b.chunks.count(sample), slot = b.chunks.first_slot(sample);
  if (count == 1) return;
  const int row = (query - p.cu_seqlens_q[sample]) * share + head % share;
  for (int d = lane * 4; d < p.head_dim; d += 128) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
    for (int c = 0; c < count; ++c) {
      const int64_t part = b.partial(slot + c, head / share, row);
      add_four(sum, *reinterpret_cast<const float4*>(b.partial_dq + part * p.head_dim + d));
    }
    store_four(static_cast<T*>(b.g.dq) + int64_t(at) * p.head_dim + d, sum);
  }
}

}  // namespace target_attention
