// The two ways to find distinct tokens, each in a source of its own.
#pragma once

#include "api.h"

namespace plan {

size_t block_workspace_bytes(const Occurrences& x);
cudaError_t block_unique(const Occurrences& x, const Unique& out, void* workspace, cudaStream_t stream);

cudaError_t table_workspace_bytes(const Occurrences& x, bool grouped, size_t* bytes);
cudaError_t table_unique(const Occurrences& x, const Unique& out, void* workspace, cudaStream_t stream);

}  // namespace plan
