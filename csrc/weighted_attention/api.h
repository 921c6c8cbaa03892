// Weighted attention on sm_90a, free of torch: raw pointers, a stream, and workspaces that the caller allocates.
//
//   out[i]  = sum_u exp(scale * q[i].k[u] + w[u]) v[u] / sum_u exp(scale * q[i].k[u] + w[u])
//   lse[i]  = log of that denominator (natural, weights included)
//
// over the keys u of the sample of query i. w = -inf: the key is absent. No present key: out 0, lse -inf, gradients 0.
//
// causal: query i of a sample sees its keys 0 .. i. Chunks: the queries of a sample come in runs, each with weights of
// its own and a prefix of the sample's keys; what a chunk leaves out costs nothing, tile by tile.
#pragma once

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

namespace weighted_attention {

enum class Type { kBFloat16, kHalf };

// A (tokens, heads, head_dim) tensor: head_dim contiguous, strides in elements and multiples of 8, 16-byte aligned.
struct Rows {
  const void* data;
  int64_t stride_token;
  int64_t stride_head;
};

struct Problem {
  Type type;
  int head_dim;   // 64, 96 or 128
  int queries;    // tokens of q
  int keys;       // tokens of k and v
  int heads;      // of q
  int heads_kv;   // of k and v; divides heads
  int samples;
  int chunks;     // runs of queries that share weights: samples, unless cu_chunks says more
  float scale;    // > 0
  bool causal;    // without cu_chunks only
  Rows q, k, v;
  const float* log_weight;     // (keys,) or (keys, heads), with cu_chunks one such row per chunk; null: all 0
  int64_t weight_stride_chunk; // 0 without cu_chunks
  int64_t weight_stride_key;
  int64_t weight_stride_head;  // 0: shared by all heads
  const int* cu_seqlens_q;     // (chunks + 1,), on the device, as are the next three
  const int* cu_seqlens_k;     // (samples + 1,)
  const int* cu_chunks;        // (samples + 1,): the chunks of each sample; null: sample c is chunk c
  const int* k_visible;        // (chunks,): how many of its sample's keys a chunk sees, from the first; null: all
};

struct Gradients {
  Rows dout;
  const void* out;           // (queries, heads, head_dim), as the forward wrote it
  const float* lse;          // (queries, heads), likewise
  const float* dlse;         // (queries, heads), or null
  void* dq;                  // contiguous, in the inputs' type
  void* dk;
  void* dv;
  float* dlog_weight;        // null, or zeros for (keys, heads) with weights per head and (keys, heads_kv) with shared
                             // ones, to be summed over heads by the caller; with cu_chunks one such row per chunk
  bool deterministic;
};

size_t forward_workspace_bytes(const Problem& problem);
cudaError_t forward(const Problem& problem, void* out, float* lse, void* workspace, cudaStream_t stream);

size_t backward_workspace_bytes(const Problem& problem, bool deterministic);
cudaError_t backward(const Problem& problem, const Gradients& gradients, void* workspace, cudaStream_t stream);

}  // namespace weighted_attention
