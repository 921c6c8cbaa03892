// Chooses how distinct tokens are found.
#include "launch.h"

namespace plan {

cudaError_t unique_workspace_bytes(const Occurrences& x, bool grouped, bool in_block, size_t* bytes) {
  if (!in_block) return table_workspace_bytes(x, grouped, bytes);
  *bytes = block_workspace_bytes(x);
  return cudaSuccess;
}

cudaError_t unique(const Occurrences& x, const Unique& out, bool in_block, void* workspace, cudaStream_t stream) {
  return in_block ? block_unique(x, out, workspace, stream) : table_unique(x, out, workspace, stream);
}

}  // namespace plan
