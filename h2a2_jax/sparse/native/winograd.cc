// Winograd's F(4, 3)^3 on blocks of sites (Lavin and Gray 2016), points 0, +-2/3, +-4/3 and infinity.
#include "forms.h"
#include "simd.h"

namespace h2a2 {
namespace H2A2_FORM {

constexpr int64_t kTile = 6, kBlock = 4, kPlaces = kTile * kTile * kTile;

// One-dimensional transforms of vectors `step` apart.
struct Inputs {  // B': 6 -> 6
  static constexpr int64_t from = 6, to = 6;
  static inline void apply(const Vector* x, int64_t i, Vector* y, int64_t o) {
    const Vector even1 = x[4 * i] - 1.77777778f * x[2 * i], odd1 = 0.666666667f * x[3 * i] - 1.18518519f * x[i];
    const Vector even2 = x[4 * i] - 0.444444444f * x[2 * i], odd2 = 1.33333333f * x[3 * i] - 0.592592593f * x[i];
    y[0] = 0.790123457f * x[0] - 2.22222222f * x[2 * i] + x[4 * i];
    y[o] = even1 + odd1;
    y[2 * o] = even1 - odd1;
    y[3 * o] = even2 + odd2;
    y[4 * o] = even2 - odd2;
    y[5 * o] = 0.790123457f * x[i] - 2.22222222f * x[3 * i] + x[5 * i];
  }
};
struct Outputs {  // A': 6 -> 4
  static constexpr int64_t from = 6, to = 4;
  static inline void apply(const Vector* x, int64_t i, Vector* y, int64_t o) {
    const Vector sum1 = x[i] + x[2 * i], difference1 = x[i] - x[2 * i];
    const Vector sum2 = x[3 * i] + x[4 * i], difference2 = x[3 * i] - x[4 * i];
    y[0] = x[0] + sum1 + sum2;
    y[o] = 0.666666667f * difference1 + 1.33333333f * difference2;
    y[2 * o] = 0.444444444f * sum1 + 1.77777778f * sum2;
    y[3 * o] = 0.296296296f * difference1 + 2.37037037f * difference2 + x[5 * i];
  }
};
struct OutputsTransposed {  // A: 4 -> 6
  static constexpr int64_t from = 4, to = 6;
  static inline void apply(const Vector* x, int64_t i, Vector* y, int64_t o) {
    const Vector even1 = x[0] + 0.444444444f * x[2 * i], odd1 = 0.666666667f * x[i] + 0.296296296f * x[3 * i];
    const Vector even2 = x[0] + 1.77777778f * x[2 * i], odd2 = 1.33333333f * x[i] + 2.37037037f * x[3 * i];
    const Vector first = x[0], last = x[3 * i];
    y[0] = first;
    y[o] = even1 + odd1;
    y[2 * o] = even1 - odd1;
    y[3 * o] = even2 + odd2;
    y[4 * o] = even2 - odd2;
    y[5 * o] = last;
  }
};
struct Kernels {  // G: 3 -> 6
  static constexpr int64_t from = 3, to = 6;
  static inline void apply(const Vector* x, int64_t i, Vector* y, int64_t o) {
    const Vector even1 = -0.84375f * x[0] - 0.375f * x[2 * i], odd1 = 0.5625f * x[i];
    const Vector even2 = 0.2109375f * x[0] + 0.375f * x[2 * i], odd2 = 0.28125f * x[i];
    const Vector first = 1.265625f * x[0], last = x[2 * i];
    y[0] = first;
    y[o] = even1 - odd1;
    y[2 * o] = even1 + odd1;
    y[3 * o] = even2 + odd2;
    y[4 * o] = even2 - odd2;
    y[5 * o] = last;
  }
};
struct KernelsTransposed {  // G': 6 -> 3
  static constexpr int64_t from = 6, to = 3;
  static inline void apply(const Vector* x, int64_t i, Vector* y, int64_t o) {
    const Vector sum1 = x[i] + x[2 * i], sum2 = x[3 * i] + x[4 * i];
    y[0] = 1.265625f * x[0] - 0.84375f * sum1 + 0.2109375f * sum2;
    y[o] = -0.5625f * (x[i] - x[2 * i]) + 0.28125f * (x[3 * i] - x[4 * i]);
    y[2 * o] = -0.375f * sum1 + 0.375f * sum2 + x[5 * i];
  }
};

// A transform along z, y and x of a cube [from][from][from] in `a`; the result is in `b`, `a` is overwritten.
template <class T>
static inline void transform_cube(Vector* a, Vector* b) {
  constexpr int64_t n = T::from, m = T::to;
  for (int64_t i = 0; i < n * n; i++) T::apply(a + i * n, 1, b + i * m, 1);  // [n][n][m]
  for (int64_t z = 0; z < n; z++)
    for (int64_t x = 0; x < m; x++) T::apply(b + z * n * m + x, m, a + z * m * m + x, m);  // [n][m][m]
  for (int64_t i = 0; i < m * m; i++) T::apply(a + i, m * m, b + i, m * m);                // [m][m][m]
}

static inline Vector load_channels(const Rows& x, int64_t row, int64_t c) {
  const int64_t n = x.channels - c;
  if (!x.half && n >= kLanes) return load(static_cast<const float*>(x.data) + row * x.channels + c);
  float part[kLanes] = {0};
  copy_row(x.data, x.half, row * x.channels + c, n < kLanes ? n : kLanes, part);
  return load(part);
}

static inline int64_t inner_place(int64_t i) {  // place in [6][6][6] of an output in [4][4][4]
  return ((i / (kBlock * kBlock) + 1) * kTile + i / kBlock % kBlock + 1) * kTile + i % kBlock + 1;
}

template <class T, bool inner>
static void transform_rows(const Rows& x, const int32_t* rows, int64_t stride, int64_t begin, int64_t end,
                           int64_t first, int64_t blocks, float* transformed) {
  const int64_t width = padded(x.channels);
  Vector a[kPlaces], b[kPlaces];
  for (int64_t j = begin; j < end; j++) {
    float* out = transformed + (first + j - begin) * width;
    for (int64_t c = 0; c < x.channels; c += kLanes) {
      for (int64_t i = 0; i < T::from * T::from * T::from; i++) {
        const int64_t row = rows[(inner ? inner_place(i) : i) * stride + j];
        a[i] = static_cast<uint64_t>(row) < static_cast<uint64_t>(x.count) ? load_channels(x, row, c) : Vector{};
      }
      transform_cube<T>(a, b);
      for (int64_t t = 0; t < kPlaces; t++) store(out + t * blocks * width + c, b[t]);
    }
  }
}

static void transform_blocks(const Rows& x, bool outputs, const int32_t* rows, int64_t stride, int64_t begin,
                             int64_t end, int64_t first, int64_t blocks, float* transformed) {
  if (outputs)
    transform_rows<OutputsTransposed, true>(x, rows, stride, begin, end, first, blocks, transformed);
  else
    transform_rows<Inputs, false>(x, rows, stride, begin, end, first, blocks, transformed);
}

static void transform_kernels(const float* packed, int64_t begin, int64_t end, int64_t size, float* transformed) {
  Vector a[kPlaces], b[kPlaces];
  for (int64_t i = begin; i < end; i += kLanes) {
    for (int64_t v = 0; v < 27; v++) a[v] = load(packed + v * size + i);
    transform_cube<Kernels>(a, b);
    for (int64_t t = 0; t < kPlaces; t++) store(transformed + t * size + i, b[t]);
  }
}

static void transpose_kernels(const float* sum, int64_t begin, int64_t end, int64_t size, float* kernels) {
  Vector a[kPlaces], b[kPlaces];
  for (int64_t i = begin; i < end; i += kLanes) {
    for (int64_t t = 0; t < kPlaces; t++) a[t] = load(sum + t * size + i);
    transform_cube<KernelsTransposed>(a, b);
    for (int64_t v = 0; v < 27; v++) store(kernels + v * size + i, b[v]);
  }
}

static int64_t block_scratch(const BlockProducts& job) {
  return kPlaces * job.blocks * (padded(job.x.channels) + padded(job.channels_out));
}

static void multiply_blocks(const BlockProducts& job, float* scratch) {
  const int64_t in = job.x.channels, out = job.channels_out, n = job.blocks;
  const int64_t in_width = padded(in), out_width = padded(out), kernel_size = round_up(out, kPanel) * in;
  float *inputs = scratch, *products = scratch + kPlaces * n * in_width;
  transform_blocks(job.x, false, job.rows, job.stride, 0, n, 0, n, inputs);
  const Groups groups(n);
  for (int64_t t = 0; t < kPlaces; t++)
    for (int64_t d = 0; d < out; d += kPanel)
      for (int64_t g = 0; g < groups.count; g++) {
        const float* a[kRows];
        float* c[kRows];
        for (int r = 0; r < groups.rows(g); r++) {
          const int64_t row = t * n + groups.begin(g) + r;
          a[r] = inputs + row * in_width;
          c[r] = products + row * out_width + d;
        }
        kSetTiles[groups.rows(g) - 1](a, job.packed + t * kernel_size + d * in, c, in);
      }
  Vector a[kPlaces], b[kPlaces];
  for (int64_t j = 0; j < n; j++)
    for (int64_t d = 0; d < out; d += kLanes) {
      for (int64_t t = 0; t < kPlaces; t++) a[t] = load(products + (t * n + j) * out_width + d);
      transform_cube<Outputs>(a, b);
      for (int64_t i = 0; i < kBlock * kBlock * kBlock; i++) {
        const int64_t row = job.rows[inner_place(i) * job.stride + j];
        if (static_cast<uint64_t>(row) >= static_cast<uint64_t>(job.x.count)) continue;
        float* y = job.y + row * out + d;
        if (out - d >= kLanes)
          store(y, b[i]);
        else
          std::memcpy(y, &b[i], (out - d) * 4);
      }
    }
}

static void multiply_block_outer(const BlockOuterProducts& job, int64_t place) {
  const int64_t in_width = padded(job.channels_in), out_width = padded(job.channels_out);
  const float* x = job.inputs + place * job.blocks * in_width;
  const float* g = job.outputs + place * job.blocks * out_width;
  float* sum = job.sum + place * job.channels_in * out_width;
  const Groups groups(job.channels_in);
  for (int64_t d = 0; d < job.channels_out; d += kPanel)
    for (int64_t q = 0; q < groups.count; q++) {
      const int64_t c = groups.begin(q);
      kOuters[groups.rows(q) - 1](x + c, in_width, g + d, out_width, sum + c * out_width + d, out_width, job.blocks);
    }
}

extern const BlockForm kBlockForm;
const BlockForm kBlockForm = {transform_kernels, transpose_kernels, block_scratch,
                              multiply_blocks,   transform_blocks,  multiply_block_outer};

}  // namespace H2A2_FORM
}  // namespace h2a2
