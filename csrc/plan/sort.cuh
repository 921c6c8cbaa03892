// A stable sort of 32-bit keys with the numbers of their items, by CUB's radix sort; and room for it in a workspace.
#pragma once

#include <cub/device/device_radix_sort.cuh>

#include "common.cuh"

namespace plan {

inline int bit_length(uint64_t x) {
  int bits = 0;
  for (; x > 0; x >>= 1) ++bits;
  return bits;
}

inline cudaError_t sort_bytes(int64_t n, int bits, size_t* bytes) {
  uint32_t* none = nullptr;
  *bytes = 0;
  return cub::DeviceRadixSort::SortPairs(nullptr, *bytes, none, none, none, none, int(n), 0, bits);
}

inline cudaError_t sort_pairs(void* temporary, size_t bytes, const uint32_t* keys, uint32_t* keys_out,
                              const uint32_t* values, uint32_t* values_out, int64_t n, int bits, cudaStream_t stream) {
  return cub::DeviceRadixSort::SortPairs(temporary, bytes, keys, keys_out, values, values_out, int(n), 0, bits, stream);
}

// Cuts a workspace into arrays aligned to 256 bytes. With a null workspace it only counts.
struct Carver {
  char* base;
  size_t used = 0;
  template <typename T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(base + used);
    used += (size_t(count) * sizeof(T) + 255) / 256 * 256;
    return array;
  }
};

}  // namespace plan
