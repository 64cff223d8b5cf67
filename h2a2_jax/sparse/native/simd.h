// Vectors of the instruction set that a source is compiled for, and small matrix products held in registers.
//
// Every source that includes this file is compiled once for each form (see setup.py), with H2A2_FORM naming its
// namespace. Such sources use no templates of the standard library: the linker would be free to give one form's code
// to another form. A function of this file therefore lives in the namespace of its form.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace h2a2 {
namespace H2A2_FORM {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 2, kRows = 12;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kVectors = 2, kRows = 6;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kVectors = 4, kRows = 6;  // never run: no such machine was at hand
#else
constexpr int kLanes = 4, kVectors = 2, kRows = 5;
#endif
constexpr int kPanel = kLanes * kVectors;  // columns of a panel of packed kernels

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef float Unaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

static inline Vector load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
static inline void store(float* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }

static inline float widen(uint16_t bits) {  // bfloat16
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// c[r][0..kPanel) = sum_i a[r][i] * b[i][0..kPanel), r < R; added to what is there where `add`
template <int R, bool add>
static void multiply_tile(const float* const* a, const float* b, float* const* c, int64_t n) {
  Vector s[R][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) s[r][v] = add ? load(c[r] + v * kLanes) : Vector{};
  int64_t i = 0;
  for (; i + 2 <= n; i += 2, b += 2 * kPanel) {
    Vector b0[kVectors], b1[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) b0[v] = load(b + v * kLanes), b1[v] = load(b + kPanel + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const float* p = a[r] + i;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) s[r][v] += p[0] * b0[v];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) s[r][v] += p[1] * b1[v];
    }
  }
  for (; i < n; i++, b += kPanel)
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) s[r][v] += a[r][i] * load(b + v * kLanes);
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) store(c[r] + v * kLanes, s[r][v]);
}

// c[r][0..kPanel) += sum_i a[i][r] * b[i][0..kPanel), r < R; strides of rows in floats
template <int R>
static void multiply_outer(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                           int64_t c_stride, int64_t n) {
  Vector s[R][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) s[r][v] = load(c + r * c_stride + v * kLanes);
  for (int64_t i = 0; i < n; i++, a += a_stride, b += b_stride) {
    Vector row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) row[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) s[r][v] += a[r] * row[v];
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) store(c + r * c_stride + v * kLanes, s[r][v]);
}

using TileFunction = void (*)(const float* const*, const float*, float* const*, int64_t);
using OuterFunction = void (*)(const float*, int64_t, const float*, int64_t, float*, int64_t, int64_t);

// The functions of 1 to kRows rows, at index rows - 1; entries past kRows are never called.
#define H2A2_BY_ROWS(name)                                                                       \
  {name(1), name(2), name(3), name(4), name(5), name((kRows < 6 ? 1 : 6)), name((kRows < 7 ? 1 : 7)),    \
   name((kRows < 8 ? 1 : 8)), name((kRows < 9 ? 1 : 9)), name((kRows < 10 ? 1 : 10)),                     \
   name((kRows < 11 ? 1 : 11)), name((kRows < 12 ? 1 : 12))}
#define H2A2_SET(r) multiply_tile<r, false>
#define H2A2_ADD(r) multiply_tile<r, true>
#define H2A2_OUTER(r) multiply_outer<r>
static constexpr TileFunction kSetTiles[12] = H2A2_BY_ROWS(H2A2_SET), kAddTiles[12] = H2A2_BY_ROWS(H2A2_ADD);
static constexpr OuterFunction kOuters[12] = H2A2_BY_ROWS(H2A2_OUTER);
#undef H2A2_SET
#undef H2A2_ADD
#undef H2A2_OUTER
#undef H2A2_BY_ROWS

// Splits n rows in groups of at most kRows rows that differ by one row at most.
struct Groups {
  int64_t count, size, longer;
  explicit Groups(int64_t n) : count((n + kRows - 1) / kRows), size(count ? n / count : 0), longer(n - size * count) {}
  int64_t begin(int64_t g) const { return g * size + (g < longer ? g : longer); }
  int rows(int64_t g) const { return static_cast<int>(size + (g < longer ? 1 : 0)); }
};

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Floats from one row of scratch to the next: whole panels, and an odd number of cache lines, so that a column of rows
// spreads over all sets of a cache.
static inline int64_t padded(int64_t channels) { return ((round_up(channels, kPanel) + 15) / 16 | 1) * 16; }

// A row of features, or a part of one, as float32.
static inline void copy_row(const void* data, bool half, int64_t first, int64_t n, float* to) {
  if (!half) {
    std::memcpy(to, static_cast<const float*>(data) + first, n * 4);
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(data) + first;
  for (int64_t i = 0; i < n; i++) to[i] = widen(from[i]);
}

}  // namespace H2A2_FORM
}  // namespace h2a2
