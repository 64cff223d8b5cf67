// Convolution by pairs: for a range of output rows and each offset, the rows that have a neighbour there are listed,
// and their neighbours are multiplied by the offset's kernel and added in place. Nothing but the result is stored.
#include "forms.h"
#include "simd.h"

namespace h2a2 {
namespace H2A2_FORM {

constexpr int64_t kPairs = 96;  // pairs of an outer product that are copied together: both factors fit a cache

static void pack(const void* kernel, bool half, bool transposed, int64_t in, int64_t out, float* packed) {
  const float* floats = static_cast<const float*>(kernel);
  const uint16_t* halves = static_cast<const uint16_t*>(kernel);
  for (int64_t d = 0; d < out; d += kPanel) {
    const int64_t columns = out - d < kPanel ? out - d : kPanel;
    for (int64_t c = 0; c < in; c++, packed += kPanel) {
      const int64_t from = transposed ? d * in + c : c * out + d, step = transposed ? in : 1;
      if (!half && !transposed && columns == kPanel) {
        std::memcpy(packed, floats + from, kPanel * 4);
        continue;
      }
      for (int64_t i = 0; i < columns; i++)
        packed[i] = half ? widen(halves[from + i * step]) : floats[from + i * step];
      for (int64_t i = columns; i < kPanel; i++) packed[i] = 0;
    }
  }
}

static int64_t pair_scratch(const PairProducts& job, int64_t rows) {
  const int64_t pointers = 2 * rows * sizeof(void*) / 4;
  return pointers + kRows * kPanel + (job.x.half ? rows * job.x.channels : 0);
}

static void multiply_pairs(const PairProducts& job, int64_t begin, int64_t end, float* scratch) {
  const int64_t rows = end - begin, in = job.x.channels, out = job.channels_out;
  const int64_t kernel_size = round_up(out, kPanel) * in;
  float** c = static_cast<float**>(static_cast<void*>(scratch));  // rows of y and of x of each pair
  const float** a = static_cast<const float**>(static_cast<void*>(c + rows));
  float* tail = reinterpret_cast<float*>(c + 2 * rows);
  float* wide = tail + kRows * kPanel;
  std::memset(job.y + begin * out, 0, rows * out * 4);
  for (int64_t k = 0; k < job.volume; k++) {
    const int32_t* neighbors = job.table + (job.mirrored ? job.volume - 1 - k : k) * job.rows;
    const float* x = static_cast<const float*>(job.x.data);
    int64_t pairs = 0;
    for (int64_t o = begin; o < end; o++) {
      const int64_t i = neighbors[o];
      const bool is_pair = static_cast<uint64_t>(i) < static_cast<uint64_t>(job.x.count);
      if (job.x.half) {
        if (!is_pair) continue;
        copy_row(job.x.data, true, i * in, in, wide + pairs * in);
        a[pairs] = wide + pairs * in;
      } else {
        a[pairs] = x + (is_pair ? i : 0) * in;
      }
      c[pairs] = job.y + o * out;
      pairs += is_pair;
    }
    const float* kernel = job.packed + job.kernel[k] * kernel_size;
    const Groups groups(pairs);
    for (int64_t d = 0; d < out; d += kPanel, kernel += kPanel * in) {
      if (d + kPanel <= out) {
        for (int64_t g = 0, p = 0; g < groups.count; p += groups.rows(g++)) {
          kAddTiles[groups.rows(g) - 1](a + p, kernel, c + p, in);
          for (int r = 0; r < groups.rows(g); r++) c[p + r] += kPanel;
        }
      } else {
        for (int64_t g = 0, p = 0; g < groups.count; p += groups.rows(g++)) {
          float* t[kRows];
          for (int r = 0; r < groups.rows(g); r++) t[r] = tail + r * kPanel;
          kSetTiles[groups.rows(g) - 1](a + p, kernel, t, in);
          for (int r = 0; r < groups.rows(g); r++)
            for (int64_t i = 0; i < out - d; i++) c[p + r][i] += t[r][i];
        }
      }
    }
  }
}

static int64_t outer_scratch(const OuterProducts& job) {
  return kPairs * (padded(job.channels) + padded(job.g.channels));
}

static void multiply_outer(const OuterProducts& job, float* scratch) {
  const int64_t x_stride = padded(job.channels), g_stride = padded(job.g.channels), out = job.g.channels;
  float *x = scratch, *g = scratch + kPairs * x_stride;
  std::memset(g, 0, kPairs * g_stride * 4);
  const Groups groups(job.channels);
  for (int64_t o = job.begin; o < job.end;) {
    int64_t pairs = 0;
    for (; o < job.end && pairs < kPairs; o++) {
      const int64_t i = job.neighbors[o];
      if (static_cast<uint64_t>(i) >= static_cast<uint64_t>(job.x.count)) continue;
      copy_row(job.x.data, job.x.half, i * job.x.channels + job.channel, job.channels, x + pairs * x_stride);
      copy_row(job.g.data, job.g.half, o * out, out, g + pairs * g_stride);
      pairs++;
    }
    for (int64_t d = 0; d < out; d += kPanel)
      for (int64_t q = 0; q < groups.count; q++) {
        const int64_t c = groups.begin(q);
        kOuters[groups.rows(q) - 1](x + c, x_stride, g + d, g_stride, job.sum + c * g_stride + d, g_stride, pairs);
      }
  }
}

extern const PairForm kPairForm;
const PairForm kPairForm = {kPanel, padded, pack, pair_scratch, multiply_pairs, outer_scratch, multiply_outer};

}  // namespace H2A2_FORM
}  // namespace h2a2
