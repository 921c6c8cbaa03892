// Launches the backward pass.
#include <algorithm>

#include "backward.cuh"
#include "coefficients.cuh"
#include "combine.cuh"
#include "launch.cuh"
#include "rows.cuh"
#include "walk.cuh"

namespace target_attention {
namespace {

int width(const Problem& p) { return p.heads_kv * p.head_dim; }  // of a table row

// What is launched on `stream` from here on waits for what was on `other`.
cudaError_t follow(cudaStream_t stream, cudaStream_t other) {
  if (stream == other) return cudaSuccess;
  cudaEvent_t reached;
  TA_RETURN_IF_ERROR(cudaEventCreateWithFlags(&reached, cudaEventDisableTiming));
  TA_RETURN_IF_ERROR(cudaEventRecord(reached, other));
  TA_RETURN_IF_ERROR(cudaStreamWaitEvent(stream, reached));
  return cudaEventDestroy(reached);
}

template <class Worker>
cudaError_t launch(BackwardParameters parameters, cudaStream_t stream) {
  const auto kernel = backward_kernel<Worker>;
  constexpr size_t kBytes = sizeof(BackwardShared<Worker>);
  TA_RETURN_IF_ERROR(allow_shared(kernel, kBytes));
  const Problem& p = parameters.p;
  if (p.samples > 0) {
    const dim3 grid(Chunks::slots(p, parameters.chunks.length), p.heads_kv);
    kernel<<<grid, kThreads, kBytes, stream>>>(parameters);
  }
  return cudaGetLastError();
}

Sums sums_of(const BackwardParameters& b, const float* members, void* to) {
  return {members, b.g.index, b.g.order, b.g.offsets, to, b.pieces, b.p.keys, b.g.table, width(b.p), b.direct};
}

template <typename T>
cudaError_t join_pieces(const Sums& sums, cudaStream_t stream) {
  const int blocks = sums.blocks(), joining = blocks > 1 ? (blocks + kSumWarps - 1) / kSumWarps : 0;
  const int zeroing = (sums.table + kZeroRows - 1) / kZeroRows;
  if (joining + zeroing > 0) join_pieces_kernel<T><<<joining + zeroing, kSumPlaces, 0, stream>>>(sums, joining);
  return cudaGetLastError();
}

template <typename T>
cudaError_t sum_rows(const BackwardParameters& b, const float* members, void* to, cudaStream_t stream) {
  const Sums sums = sums_of(b, members, to);
  if (sums.blocks() > 0) sum_members_kernel<T><<<sums.blocks(), kSumPlaces, 0, stream>>>(sums);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  return join_pieces<T>(sums, stream);
}

template <int kRows, int kSlice>
using WalkOf = Walk<kRows, kRows == 4 ? 24 : 12, 3, kSlice>;

// Shared memory of the second pass with slices of `slice` bytes.
template <int kRows>
size_t walk_bytes(const Problem& p, int slice) {
  return WalkOf<kRows, kWidestSlice>::shared_bytes(p) - size_t(p.samples) * 2 * kRows * (kWidestSlice - slice);
}
size_t combine_bytes(const Problem& p, int slice) {
  const int rows = row_slots(p);
  if (p.type == Type::kFloat) return Combine::shared_bytes(p, slice, rows);
  return rows <= 4 ? walk_bytes<4>(p, slice) : walk_bytes<8>(p, slice);
}

// The widest slice of the query rows of all samples that shared memory holds; 0 where it holds none.
int slice_of(const Problem& p) {
  int slice = kWidestSlice;
  while (slice >= kNarrowestSlice && combine_bytes(p, slice) > shared_limit()) slice /= 2;
  return slice >= kNarrowestSlice ? slice : 0;
}

// Whether the second pass reads records: few query rows, of all samples together no more than shared memory holds.
bool combines(const Problem& p) {
  const int rows = row_slots(p);
  return p.v_table == nullptr && rows > 0 && rows <= kMostRecordedRows && slice_of(p) > 0;
}

template <int kRows, int kBlock, int kSlice>
cudaError_t launch_combine(const Combine& c, cudaStream_t stream) {
  if constexpr (kSlice > kNarrowestSlice)
    if (slice_of(c.p) < kSlice) return launch_combine<kRows, kBlock, kSlice / 2>(c, stream);
  const auto kernel = combine_kernel<kRows, kBlock, kSlice>;
  const size_t bytes = Combine::shared_bytes(c.p, kSlice, c.row_slots);
  TA_RETURN_IF_ERROR(allow_shared(kernel, bytes));
  int resident = 1;
  TA_RETURN_IF_ERROR(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kBlock, bytes));
  const int slices = c.p.heads_kv * Combine::slices(c.p, kSlice, sizeof(float)), warps = kBlock / 32;
  const int blocks = std::min((c.sums.blocks() + warps - 1) / warps, std::max(1, multiprocessors() * resident / slices));
  if (blocks > 0) kernel<<<dim3(blocks, slices), kBlock, bytes, stream>>>(c);
  TA_RETURN_IF_ERROR(cudaGetLastError());
  return join_pieces<float>(c.sums, stream);
}

template <int kRows, int kSlice>
cudaError_t launch_walk(Combine c, cudaStream_t stream) {
  if constexpr (kSlice > kNarrowestSlice)
    if (slice_of(c.p) < kSlice) return launch_walk<kRows, kSlice / 2>(c, stream);
  using W = WalkOf<kRows, kSlice>;
  const auto kernel = walk_kernel<W>;
  TA_RETURN_IF_ERROR(allow_shared(kernel, W::shared_bytes(c.p)));
  const int slices = c.p.heads_kv * Combine::slices(c.p, kSlice, sizeof(typename W::T));
  const int blocks = std::min((c.sums.blocks() + W::kWalkers - 1) / W::kWalkers, std::max(1, multiprocessors() / slices));
  c.sums.walkers = std::max(1, blocks * W::kWalkers);
  if (blocks > 0) {
    line_up_kernel<<<c.sums.blocks(), kSumPlaces, 0, stream>>>(c);
    kernel<<<dim3(blocks, slices), W::kThreads, W::shared_bytes(c.p), stream>>>(c);
  }
  TA_RETURN_IF_ERROR(cudaGetLastError());
  return join_pieces<__nv_bfloat16>(c.sums, stream);
}

template <typename T, int kDim, int kGroups, bool kOneTable>
cudaError_t launch_weights(const BackwardParameters& parameters, cudaStream_t stream) {
  return is_plain(parameters.p) && parameters.g.dweight == nullptr
             ? launch<MmaBackward<T, kDim, kGroups, kOneTable, true>>(parameters, stream)
             : launch<MmaBackward<T, kDim, kGroups, kOneTable, false>>(parameters, stream);
}

template <typename T, int kDim, bool kOneTable>
cudaError_t launch_combined(const BackwardParameters& parameters, cudaStream_t stream) {
  // A Hopper multiprocessor's 228 KB take two blocks, each with 1 KB of its own: with one the pass takes half as long again.
  static_assert(kDim > 128 || sizeof(BackwardShared<CoefficientWorker<T, kDim, true>>) <= (228 << 10) / 2 - (1 << 10));
  if constexpr (!kOneTable) return cudaErrorInvalidValue;
  else
    return is_plain(parameters.p) && parameters.g.dweight == nullptr
               ? launch<CoefficientWorker<T, kDim, true>>(parameters, stream)
               : launch<CoefficientWorker<T, kDim, false>>(parameters, stream);
}

// Of a block with kGroups * 16 query rows at a time.
template <typename T, int kDim, int kGroups, bool kOneTable>
constexpr size_t kSharedBytes = sizeof(BackwardShared<MmaBackward<T, kDim, kGroups, kOneTable, false>>);

template <typename T, int kDim, bool kOneTable>
cudaError_t launch_rows(BackwardParameters parameters, cudaStream_t stream) {
  int rows = 16;  // at a time
  if constexpr (kDim <= 128)
    if (parameters.row_slots > 16 && kSharedBytes<T, kDim, 2, kOneTable> <= shared_limit()) rows = 32;
  parameters.direct = parameters.row_slots <= rows;
  const bool records = parameters.records.pairs != nullptr;
  const cudaStream_t sums = parameters.g.sums == nullptr ? stream : parameters.g.sums;
  if (!records) TA_RETURN_IF_ERROR(follow(stream, sums));
  if constexpr (sizeof(T) == 4 && kDim > max_head_dim(Type::kFloat, kOneTable)) return cudaErrorInvalidValue;
  else if (records) TA_RETURN_IF_ERROR((launch_combined<T, kDim, kOneTable>(parameters, stream)));
  else if (rows == 16) TA_RETURN_IF_ERROR((launch_weights<T, kDim, 1, kOneTable>(parameters, stream)));
  else if constexpr (kDim <= 128) TA_RETURN_IF_ERROR((launch_weights<T, kDim, 2, kOneTable>(parameters, stream)));
  const Problem& p = parameters.p;
  if (p.queries > 0 && p.keys > parameters.chunks.length) {  // otherwise no sample has two chunks
    merge_dq_kernel<T><<<(p.queries * p.heads + kWarps - 1) / kWarps, kThreads, 0, stream>>>(parameters);
    TA_RETURN_IF_ERROR(cudaGetLastError());
  }
  if (records) {
    TA_RETURN_IF_ERROR(follow(sums, stream));
    const Combine c{p, parameters.g, sums_of(parameters, nullptr, parameters.g.dk_table), parameters.records,
                    parameters.row_slots};
    if constexpr (sizeof(T) == 2)
      return parameters.row_slots <= 4 ? launch_walk<4, kWidestSlice>(c, sums) : launch_walk<8, kWidestSlice>(c, sums);
    else
      return parameters.row_slots <= 4 ? launch_combine<4, 768, kWidestSlice>(c, sums)
                                       : launch_combine<8, 512, kWidestSlice>(c, sums);
  }
  TA_RETURN_IF_ERROR(sum_rows<T>(parameters, parameters.dk_members, parameters.g.dk_table, stream));
  if (!kOneTable) TA_RETURN_IF_ERROR(sum_rows<T>(parameters, parameters.dv_members, parameters.g.dv_table, stream));
  return cudaSuccess;
}

template <typename T>
cudaError_t launch_type(const BackwardParameters& parameters, cudaStream_t stream) {
  const Problem& p = parameters.p;
  const bool one = p.v_table == nullptr;
  switch (padded_dim(p)) {
    case 64: return one ? launch_rows<T, 64, true>(parameters, stream) : launch_rows<T, 64, false>(parameters, stream);
    case 128: return one ? launch_rows<T, 128, true>(parameters, stream) : launch_rows<T, 128, false>(parameters, stream);
    default: return one ? launch_rows<T, 256, true>(parameters, stream) : launch_rows<T, 256, false>(parameters, stream);
  }
}

size_t dq_bytes(const Problem& p) {
  return aligned(sizeof(float) * Chunks::slots(p, chunk_length(p)) * p.heads_kv * row_slots(p) * p.head_dim);
}

// What the first pass leaves of the keys.
size_t members_bytes(const Problem& p) {
  if (combines(p)) return aligned(Records::pair_bytes(p, row_slots(p))) + aligned(Records::sample_bytes(p)) + aligned(Records::member_bytes(p));
  return aligned(sizeof(float) * p.keys * width(p)) * (p.v_table == nullptr ? 1 : 2);
}

// Of the smallest block that takes rows of this width; those of up to 64 columns fit wherever the kernels run.
size_t least_shared_bytes(const Problem& p) {
  const bool wide = p.type == Type::kFloat, one = p.v_table == nullptr;
  if (p.head_dim > 128) {
    if (wide) return kSharedBytes<float, 256, 1, true>;
    return one ? kSharedBytes<__nv_bfloat16, 256, 1, true> : kSharedBytes<__nv_bfloat16, 256, 1, false>;
  }
  if (wide) return one ? kSharedBytes<float, 128, 1, true> : kSharedBytes<float, 128, 1, false>;
  return one ? kSharedBytes<__nv_bfloat16, 128, 1, true> : kSharedBytes<__nv_bfloat16, 128, 1, false>;
}

}  // namespace

bool backward_fits(const Problem& p) { return least_shared_bytes(p) <= shared_limit(); }

size_t backward_workspace_bytes(const Problem& p) {
  return dq_bytes(p) + members_bytes(p) + Sums::piece_bytes(p.keys, width(p));
}

cudaError_t backward(const Problem& p, const Gradients& g, void* workspace, cudaStream_t stream) {
  auto* bytes = static_cast<unsigned char*>(workspace);
  BackwardParameters parameters{p, g, {p.cu_seqlens_k, p.samples, chunk_length(p)}, row_slots(p)};
  parameters.partial_dq = reinterpret_cast<float*>(bytes);
  bytes += dq_bytes(p);
  parameters.pieces = reinterpret_cast<float*>(bytes + members_bytes(p));
  if (combines(p)) {
    parameters.records.pairs = reinterpret_cast<float2*>(bytes);
    bytes += aligned(Records::pair_bytes(p, row_slots(p)));
    parameters.records.samples = reinterpret_cast<int*>(bytes);
    parameters.records.members = reinterpret_cast<int4*>(bytes + aligned(Records::sample_bytes(p)));
  } else {
    parameters.dk_members = reinterpret_cast<float*>(bytes);
    if (p.v_table != nullptr) parameters.dv_members = reinterpret_cast<float*>(bytes + members_bytes(p) / 2);
  }
  return p.type == Type::kFloat ? launch_type<float>(parameters, stream) : launch_type<__nv_bfloat16>(parameters, stream);
}

}  // namespace target_attention
