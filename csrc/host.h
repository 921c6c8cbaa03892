// What every launch needs on the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define TA_RETURN_IF_ERROR(expression)                     \
  do {                                                     \
    const cudaError_t error = (expression);                \
    if (error != cudaSuccess) return error;                \
  } while (0)

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
