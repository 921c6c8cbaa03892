// Vectors of elements in one access, and how threads share a row: `lanes` threads side by side, each with one vector at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "../host.h"
#include "api.h"

namespace rows {

template <typename T, int kSize>
struct alignas(std::min(sizeof(T) * kSize, size_t(16))) Vector {
  T at[kSize];
};

template <typename T>
struct Wider {
  using type = float;
};
template <>
struct Wider<double> {
  using type = double;
};
template <typename T>
using Wide = typename Wider<T>::type;

template <typename To, typename From>
__device__ __forceinline__ To convert(From x) {
  return static_cast<To>(x);
}
template <>
__device__ __forceinline__ float convert<float, __half>(__half x) { return __half2float(x); }
template <>
__device__ __forceinline__ float convert<float, __nv_bfloat16>(__nv_bfloat16 x) { return __bfloat162float(x); }
template <>
__device__ __forceinline__ double convert<double, __half>(__half x) { return __half2float(x); }
template <>
__device__ __forceinline__ double convert<double, __nv_bfloat16>(__nv_bfloat16 x) { return __bfloat162float(x); }
template <>
__device__ __forceinline__ __half convert<__half, float>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 convert<__nv_bfloat16, float>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ __half convert<__half, double>(double x) { return __double2half(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 convert<__nv_bfloat16, double>(double x) { return __double2bfloat16(x); }

template <typename T>
__device__ __forceinline__ T negative_infinity() {
  return static_cast<T>(-INFINITY);
}

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

inline bool divides(int64_t bytes, std::initializer_list<int64_t> numbers) {
  return std::all_of(numbers.begin(), numbers.end(), [bytes](int64_t n) { return n % bytes == 0; });
}

inline int64_t address(const void* pointer) { return int64_t(reinterpret_cast<uintptr_t>(pointer)); }

// The smallest power of two of threads, at most 32, that covers a row of `vectors`.
inline int lanes_for(int64_t vectors) {
  int lanes = 1;
  while (lanes < 32 && lanes < vectors) lanes *= 2;
  return lanes;
}

// Elements in an access of 16 bytes.
constexpr int widest(size_t element_bytes) { return int(16 / element_bytes); }

// Of one index a block, up to where vectors may begin.
inline int64_t aligned_bytes(int64_t blocks) { return (blocks * 8 + 15) / 16 * 16; }

// run(an element of the type).
template <typename Run>
cudaError_t with_element(Type type, Run run) {
  switch (type) {
    case Type::kFloat:
      return run(float{});
    case Type::kDouble:
      return run(double{});
    case Type::kHalf:
      return run(__half{});
    case Type::kBFloat16:
      return run(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace rows
