// Maximum over the windows of a map, with the first offset that holds each maximum, and its gradient.
#include "forms.h"
#include "simd.h"

namespace h2a2 {
namespace H2A2_FORM {

typedef int32_t Integers __attribute__((vector_size(kLanes * 4)));

static inline Vector load_part(const float* p, int64_t n) {
  if (n >= kLanes) return load(p);
  float part[kLanes] = {0};
  std::memcpy(part, p, n * 4);
  return load(part);
}

static void pool(const PoolRows& job, int64_t begin, int64_t end) {
  const int64_t channels = job.channels;
  for (int64_t o = begin; o < end; o++)
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int64_t n = channels - c < kLanes ? channels - c : kLanes;
      Vector best = Vector{} - __builtin_inff();
      Integers chosen = Integers{} - 1;
      bool is_empty = true;
      for (int64_t k = 0; k < job.volume; k++) {
        const int64_t i = job.table[k * job.rows + o];
        if (static_cast<uint64_t>(i) >= static_cast<uint64_t>(job.count)) continue;
        is_empty = false;
        const Vector window = load_part(job.x + i * channels + c, n);
        const Integers better = ~(window <= best) & (best == best);  // NaN is the largest, and the first is kept
        best = better ? window : best;
        chosen = better ? Integers{} + static_cast<int32_t>(k) : chosen;
      }
      if (is_empty) best = Vector{};
      std::memcpy(job.best + o * channels + c, &best, n * 4);
      for (int64_t i = 0; i < n; i++) job.chosen[o * channels + c + i] = static_cast<int8_t>(chosen[i]);
    }
}

static void give(const PoolGradient& job, int64_t begin, int64_t end) {
  const int64_t channels = job.channels;
  std::memset(job.dx + begin * channels, 0, (end - begin) * channels * 4);
  for (int64_t i = begin; i < end; i++)
    for (int64_t k = 0; k < job.volume; k++) {
      const int64_t o = job.reached[k * job.rows + i];
      if (static_cast<uint64_t>(o) >= static_cast<uint64_t>(job.count)) continue;
      const float* g = job.g + o * channels;
      const int8_t* chosen = job.chosen + o * channels;
      float* dx = job.dx + i * channels;
      for (int64_t c = 0; c < channels; c++) dx[c] += chosen[c] == k ? g[c] : 0.0f;
    }
}

extern const PoolForm kPoolForm;
const PoolForm kPoolForm = {pool, give};

}  // namespace H2A2_FORM
}  // namespace h2a2
