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

// What a sort of `n` keys of `bits` bits needs of a workspace.
struct Pairs {
  uint32_t *keys, *keys_sorted, *values, *values_sorted;
  void* temporary;
  size_t temporary_bytes;
  int64_t n;
  int bits;

  // `room`: what the temporary holds at least, for others that use it before.
  static cudaError_t carve(Carver& carver, int64_t n, int bits, Pairs* pairs, size_t room = 0) {
    pairs->n = n, pairs->bits = bits;
    for (uint32_t** array : {&pairs->keys, &pairs->keys_sorted, &pairs->values, &pairs->values_sorted})
      *array = carver.take<uint32_t>(n);
    TA_RETURN_IF_ERROR(sort_bytes(n, bits, &pairs->temporary_bytes));
    if (room > pairs->temporary_bytes) pairs->temporary_bytes = room;
    pairs->temporary = carver.take<char>(int64_t(pairs->temporary_bytes));
    return cudaSuccess;
  }

  cudaError_t sort(cudaStream_t stream) const {
    size_t bytes = temporary_bytes;
    return cub::DeviceRadixSort::SortPairs(temporary, bytes, keys, keys_sorted, values, values_sorted, int(n), 0, bits, stream);
  }
};

}  // namespace plan
