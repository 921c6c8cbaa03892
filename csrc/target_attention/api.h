// Target attention: few queries per sample onto rows gathered by index, free of torch: raw pointers, a stream, and
// workspaces that the caller allocates.
//
//   softmax:  out[i] = sum_u exp(scale * q[i].k[u] + w[i, u]) v[u] / sum_u exp(...),   lse[i] the log of that denominator
//   without:  out[i] = sum_u w[i, u] a(scale * q[i].k[u]) v[u],                        a the identity or SiLU
//
// over the keys u of the sample of query i, k[u] = k_table[rows[u]], v[u] = v_table[rows[u]]. Under softmax w = -inf means
// absent; no present key: out 0, lse -inf, gradients 0. Every sum runs in a fixed order: results repeat to the bit.
#pragma once

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

namespace target_attention {

enum class Type { kBFloat16, kFloat };
enum class Normaliser { kSoftmax, kIdentity, kSilu };

// The widest row that shared memory holds in enough stages.
constexpr int max_head_dim(Type type, bool one_table) { return type == Type::kFloat && !one_table ? 128 : 256; }

struct Problem {
  Type type;
  Normaliser normaliser;
  float scale;
  int samples;
  int queries;   // rows of q
  int targets;   // no sample has more queries
  int keys;      // entries of rows
  int heads;     // of q
  int heads_kv;  // of the tables; divides heads
  int head_dim;  // a multiple of 16 bytes, at most max_head_dim elements
  const void* q;        // (queries, heads, head_dim), contiguous and aligned to 16 bytes like the tables
  const void* k_table;  // (table, heads_kv, head_dim)
  const void* v_table;  // likewise, or null: the values are the keys, and each row is read once
  const int64_t* rows;  // (keys,)
  const int* cu_seqlens_q;  // (samples + 1,)
  const int* cu_seqlens_k;
  const float* weight;         // null: log weights 0, multipliers 1
  int64_t weight_stride_row;   // of the row that q_chunk names
  int64_t weight_stride_key;
  int64_t weight_stride_head;  // 0: shared by all heads
  const int64_t* q_chunk;      // (queries,), or null: one row of weights
};

struct Gradients {
  const void* out;         // as the forward wrote it
  const float* lse;        // (queries, heads); softmax only
  const void* dout;        // contiguous
  const float* dlse;       // (queries, heads), or null
  int table;               // rows of the tables' gradients
  const int64_t* index;    // (keys,): the row of the gradient that a key adds to; `rows` where the whole table has one
  const int64_t* order;    // (keys,): keys sorted by that row, ascending within one
  const int64_t* offsets;  // (table + 1,): where each such row starts in `order`
  void* dq;
  void* dk_table;          // (table, heads_kv, head_dim)
  void* dv_table;          // null with a null v_table: dk_table then holds both
  float* dweight;          // null, or (keys, targets, heads): d(weight) of each pair; slots past a sample's targets stay
  cudaStream_t sums;       // null, or where index, order and offsets are found: what needs them follows there, and the workspace with it
};

// lse: (queries, heads); untouched without softmax.
size_t forward_workspace_bytes(const Problem& problem);
cudaError_t forward(const Problem& problem, void* out, float* lse, void* workspace, cudaStream_t stream);

// Whether the current device has the shared memory that rows of this width take.
bool backward_fits(const Problem& problem);
size_t backward_workspace_bytes(const Problem& problem);
cudaError_t backward(const Problem& problem, const Gradients& gradients, void* workspace, cudaStream_t stream);

}  // namespace target_attention
