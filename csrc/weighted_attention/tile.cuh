// Tiles in shared memory and fragments in registers: products, masks and stores that both passes share.
#pragma once

#include "wgmma.cuh"

namespace weighted_attention {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kWarpgroup = 128;

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }
__device__ __forceinline__ float plus_infinity() { return __int_as_float(0x7f800000); }

// The first row of a tile of so many rows that is planned to begin at `row`, of `length` in all. The last tile ends
// where the rows end, so that it holds nobody else's (if they fill one tile); rows that it shares with the tile before
// count there.
__device__ __forceinline__ int first_row(int row, int rows, int length) { return max(0, min(row, length - rows)); }

// Columns of the fragment that lane holds first in every group of 8; its rows are fragment_row and 8 below.
__device__ __forceinline__ int fragment_column() { return 2 * (threadIdx.x % 4); }
__device__ __forceinline__ int fragment_row() { return 16 * (threadIdx.x % kWarpgroup / 32) + threadIdx.x % 32 / 4; }

// d (64 x N) = A (64 rows, kDepth columns) * B (N rows, kDepth columns)^T, both contracted along their columns.
// kRowsA, kRowsB: rows of the whole tiles, which set where their next panel of 64 columns begins.
template <typename T, int N, int kDepth, int kRowsA, int kRowsB>
__device__ __forceinline__ void multiply_rows(float (&d)[N / 2], uint32_t a, uint32_t b, bool accumulate) {
  const uint32_t rows_a = descriptor_rows(a), rows_b = descriptor_rows(b);
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    const int panel = k / 4, within = k % 4 * 32;
    Wgmma<T, N>::template shared<0, 0>(d, descriptor(rows_a, panel * kRowsA * kPanelBytes + within),
                                       descriptor(rows_b, panel * kRowsB * kPanelBytes + within),
                                       accumulate || k > 0);
  }
}

// multiply_rows with the first kHeld steps of A in registers, as load_fragment reads them: a product of 64 rows of
// shared memory with 64 others reads it for as many cycles as it multiplies, with A in registers for half as many.
template <typename T, int N, int kDepth, int kRowsA, int kRowsB, int kHeld>
__device__ __forceinline__ void multiply_rows_held(float (&d)[N / 2], const uint32_t (&held)[kHeld][4], uint32_t a,
                                                   uint32_t b) {
  const uint32_t rows_a = descriptor_rows(a), rows_b = descriptor_rows(b);
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    const int panel = k / 4, within = k % 4 * 32;
    const uint64_t step_b = descriptor(rows_b, panel * kRowsB * kPanelBytes + within);
    if (k < kHeld) {
      Wgmma<T, N>::template registers<0>(d, held[k][0], held[k][1], held[k][2], held[k][3], step_b, k > 0);
    } else {
      Wgmma<T, N>::template shared<0, 0>(d, descriptor(rows_a, panel * kRowsA * kPanelBytes + within), step_b, k > 0);
    }
  }
}

// d (64 x N) += A (64 x kDepth, packed fragments) * B (kDepth rows, N columns).
template <typename T, int N, int kDepth, int kRowsB>
__device__ __forceinline__ void multiply_fragments(float (&d)[N / 2], const uint32_t (&a)[kDepth / 4], uint32_t b,
                                                   bool accumulate) {
  const uint32_t columns_b = descriptor_columns(b, kRowsB * kPanelBytes);
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    Wgmma<T, N>::template registers<1>(d, a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3],
                                       descriptor(columns_b, k * 16 * kPanelBytes), accumulate || k > 0);
  }
}

// Address of 16 bytes, in the swizzled order, of a tile of kRows.
template <int kRows>
__device__ __forceinline__ uint32_t chunk_address(uint32_t tile, int row, int chunk) {
  return tile + (chunk / 8 * kRows + row) * kPanelBytes + (chunk % 8 ^ row % 8) * 16;
}

// This warp's 16 of a warpgroup's 64 rows (from `tile` on), columns 16 k .. 16 k + 15, as an A fragment.
template <int kRows>
__device__ __forceinline__ void load_fragment(uint32_t (&a)[4], uint32_t tile, int k, int thread) {
  const int row = thread % kWarpgroup / 32 * 16 + thread % 16;
  load_matrix(chunk_address<kRows>(tile, row, 2 * k + thread / 16 % 2), a[0], a[1], a[2], a[3]);
}

// Writes a fragment (64 x N) times a factor per row over a warpgroup's 64 rows of a tile of kRows (from `tile` on): the
// inverse of load_fragment. Each warp writes its 16.
template <typename T, int N, int kRows>
__device__ __forceinline__ void store_fragment_shared(uint32_t tile, const float (&d)[N / 2], float upper,
                                                      float lower) {
  const int row = threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 16, half = threadIdx.x / 16 % 2;
#pragma unroll
  for (int k = 0; k < N / 16; ++k) {
    const float* x = &d[8 * k];
    store_matrix(chunk_address<kRows>(tile, row, 2 * k + half), pack<T>(x[0] * upper, x[1] * upper),
                 pack<T>(x[2] * lower, x[3] * lower), pack<T>(x[4] * upper, x[5] * upper),
                 pack<T>(x[6] * lower, x[7] * lower));
  }
}

// d (16 of 64 rows x N) += A * B^T as multiply_rows computes it, by one warp alone and slowly.
template <typename T, int N, int kDepth, int kRowsA, int kRowsB>
__device__ __forceinline__ void multiply_rows_alone(float (&d)[N / 2], uint32_t a, uint32_t b) {
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));  // addresses are computed here, not kept in registers by the loop around
  const int lane = thread % 32;
#pragma unroll 1
  for (int k = 0; k < kDepth / 16; ++k) {
    uint32_t fragment[4];
    load_fragment<kRowsA>(fragment, a, k, thread);
#pragma unroll
    for (int j = 0; j < N / 16; ++j) {
      uint32_t c[4];
      const int row = 16 * j + lane / 16 * 8 + lane % 8;
      load_matrix(chunk_address<kRowsB>(b, row, 2 * k + lane / 8 % 2), c[0], c[1], c[2], c[3]);
      warp_multiply<T>(&d[8 * j], fragment, c[0], c[1]);
      warp_multiply<T>(&d[8 * j + 4], fragment, c[2], c[3]);
    }
  }
}

// Tiles are stored in whole panels: columns of head_dim, rounded up. What lies beyond head_dim is 0 (the copy engine
// fills it) and no product reads it, except where two warpgroups share one by panels.
__host__ __device__ constexpr int padded_columns(int head_dim) { return (head_dim + kPanel - 1) / kPanel * kPanel; }

// Hides the keys after `last` in a score fragment (64 queries x N keys) whose first column is key 0: a causal mask,
// with one `last` for each of the lane's rows.
template <int N>
__device__ __forceinline__ void mask_after(float (&scores)[N / 2], int last_upper, int last_lower) {
  const int upper = last_upper - fragment_column(), lower = last_lower - fragment_column();
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (8 * j + i > upper) scores[4 * j + i] = minus_infinity();
      if (8 * j + i > lower) scores[4 * j + 2 + i] = minus_infinity();
    }
  }
}

// The same for a transposed fragment (64 keys x N queries): hides the queries before `first`.
template <int N>
__device__ __forceinline__ void mask_before(float (&scores)[N / 2], int first_upper, int first_lower) {
  const int upper = first_upper - fragment_column(), lower = first_lower - fragment_column();
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (8 * j + i < upper) scores[4 * j + i] = minus_infinity();
      if (8 * j + i < lower) scores[4 * j + 2 + i] = minus_infinity();
    }
  }
}

// A condition that is the same in every lane, said so to the compiler: otherwise it prepares for lanes that part ways.
__device__ __forceinline__ bool same_in_warp(bool condition) { return __any_sync(0xffffffffu, condition); }

// The same value, in every lane; hidden from the optimiser, so that what is computed from it is computed where it is
// used and not kept in registers around a loop. Being uniform, it goes to the uniform registers that descriptors need.
__device__ __forceinline__ uint32_t recomputed(uint32_t value) {
  asm volatile("" : "+r"(value));
  return __shfl_sync(0xffffffffu, value, 0);
}

// Packs a score fragment (64 x N) into the A fragments of a product over its N columns.
template <typename T, int N>
__device__ __forceinline__ void pack_fragments(uint32_t (&packed)[N / 4], const float (&d)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i) packed[i] = pack<T>(d[2 * i], d[2 * i + 1]);
}

__device__ __forceinline__ void zero_16(uint32_t address) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}

// Writes zeros over rows [begin, end) of a tile of kRows x kColumns: over whole panels, in each of which they are one
// run of bytes.
template <int kRows, int kColumns>
__device__ __forceinline__ void zero_rows(uint32_t tile, int begin, int end, int thread, int threads) {
  const uint32_t last = tile + end * kPanelBytes;
#pragma unroll 4
  for (uint32_t at = tile + begin * kPanelBytes + thread * 16; at < last; at += threads * 16) {
#pragma unroll
    for (int panel = 0; panel < padded_columns(kColumns) / kPanel; ++panel) zero_16(at + panel * kRows * kPanelBytes);
  }
}

// Four lanes hold r[g] = their 2 columns of column group g; afterwards lane j holds group j whole (8 columns).
__device__ __forceinline__ void transpose_quad(uint32_t (&r)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
  const uint32_t x = __shfl_xor_sync(0xffffffffu, odd ? r[0] : r[1], 1);
  const uint32_t y = __shfl_xor_sync(0xffffffffu, odd ? r[2] : r[3], 1);
  const uint32_t a0 = odd ? x : r[0], a1 = odd ? r[1] : x;
  const uint32_t b0 = odd ? y : r[2], b1 = odd ? r[3] : y;
  const uint32_t c0 = __shfl_xor_sync(0xffffffffu, upper ? a0 : b0, 2);
  const uint32_t c1 = __shfl_xor_sync(0xffffffffu, upper ? a1 : b1, 2);
  r[0] = upper ? c0 : a0, r[1] = upper ? c1 : a1;
  r[2] = upper ? b0 : c0, r[3] = upper ? b1 : c1;
}

// Stores a fragment (64 x N) times a factor per row: `upper` and `lower` point to column 0 of the lane's two rows, or
// are null where nothing is to be stored; columns from `columns` on are left out.
template <typename T, int N>
__device__ __forceinline__ void store_fragment(const float (&d)[N / 2], float scale_upper, float scale_lower, T* upper,
                                               T* lower, int columns = N) {
#pragma unroll
  for (int group = 0; group < N / 32; ++group) {
    if (group * 32 >= columns) break;
    uint32_t r[4], s[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* value = &d[(group * 4 + j) * 4];
      r[j] = pack<T>(value[0] * scale_upper, value[1] * scale_upper);
      s[j] = pack<T>(value[2] * scale_lower, value[3] * scale_lower);
    }
    transpose_quad(r);
    transpose_quad(s);
    const int column = group * 32 + threadIdx.x % 4 * 8;
    if (upper != nullptr) *reinterpret_cast<uint4*>(upper + column) = make_uint4(r[0], r[1], r[2], r[3]);
    if (lower != nullptr) *reinterpret_cast<uint4*>(lower + column) = make_uint4(s[0], s[1], s[2], s[3]);
  }
}

}  // namespace weighted_attention
