// CUB's radix sort of 64-bit keys with 32-bit values behind a C function: the yardstick for the plan (examples/benchmarks/ops.py).
#include <cub/device/device_radix_sort.cuh>

extern "C" int cub_sort_pairs(void* temporary, size_t* bytes, const unsigned long long* keys, unsigned long long* keys_out,
                              const unsigned int* values, unsigned int* values_out, int n, int end_bit, void* stream) {
  return cub::DeviceRadixSort::SortPairs(temporary, *bytes, keys, keys_out, values, values_out, n, 0, end_bit,
                                         static_cast<cudaStream_t>(stream));
}
