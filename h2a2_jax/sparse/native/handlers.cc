// The functions that XLA calls: they check shapes, pack kernels, spread the work over XLA's threads.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "forms.h"
#include "xla/ffi/api/ffi.h"

namespace h2a2 {

#define H2A2_DECLARE(form)             \
  namespace form {                     \
  extern const PairForm kPairForm;     \
  extern const BlockForm kBlockForm;   \
  extern const PoolForm kPoolForm;     \
  }
H2A2_DECLARE(portable)
#ifdef H2A2_X86
H2A2_DECLARE(avx2)
H2A2_DECLARE(avx512)
#endif
#undef H2A2_DECLARE

namespace {

namespace ffi = xla::ffi;
using Numbers = ffi::AnyBuffer;
using Indices = ffi::Buffer<ffi::S32>;
using Floats = ffi::Result<ffi::Buffer<ffi::F32>>;

// ---------------------------------------------------------------- forms

struct Forms {
  const char* name;
  const PairForm* pairs;
  const BlockForm* blocks;
  const PoolForm* pools;
};

// Forms that this machine can run, the fastest first.
const std::vector<Forms>& usable_forms() {
  static const std::vector<Forms> usable = [] {
    std::vector<Forms> found;
#ifdef H2A2_X86
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
    if (has_avx512) found.push_back({"avx512", &avx512::kPairForm, &avx512::kBlockForm, &avx512::kPoolForm});
    if (has_avx2) found.push_back({"avx2", &avx2::kPairForm, &avx2::kBlockForm, &avx2::kPoolForm});
#endif
    found.push_back({"portable", &portable::kPairForm, &portable::kBlockForm, &portable::kPoolForm});
    return found;
  }();
  return usable;
}

std::atomic<const Forms*>& chosen_form() {
  static std::atomic<const Forms*> chosen{&usable_forms().front()};
  return chosen;
}

const Forms& forms() { return *chosen_form(); }

// ---------------------------------------------------------------- memory and threads

// Scratch that is kept from call to call: fresh memory costs a page fault for every 4 kB.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : size_(std::max<int64_t>(floats, 1)) {
    std::lock_guard<std::mutex> lock(mutex());
    auto& kept = buffers();
    auto best = kept.end();
    for (auto i = kept.begin(); i != kept.end(); ++i)
      if (i->second >= size_ && (best == kept.end() || i->second < best->second)) best = i;
    if (best == kept.end() && !kept.empty()) {  // the largest makes room for a larger one
      best = std::max_element(kept.begin(), kept.end(), [](auto& a, auto& b) { return a.second < b.second; });
      std::free(best->first);
      kept.erase(best);
      best = kept.end();
    }
    if (best != kept.end()) {
      data_ = best->first, size_ = best->second;
      kept.erase(best);
      return;
    }
    data_ = static_cast<float*>(std::aligned_alloc(64, (size_ * 4 + 63) / 64 * 64));
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() {
    std::lock_guard<std::mutex> lock(mutex());
    buffers().emplace_back(data_, size_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return data_; }

 private:
  static std::mutex& mutex() {
    static std::mutex one;
    return one;
  }
  static std::vector<std::pair<float*, int64_t>>& buffers() {
    static auto* kept = new std::vector<std::pair<float*, int64_t>>;  // outlives threads that end late
    return *kept;
  }
  float* data_;
  int64_t size_;
};

// Calls work(i) once for each i < count, on this thread and on those of the pool that are free. It waits for parts
// that have begun and never for a thread, which may itself be waiting here. Work that throws is reported at the end.
template <class Work>
void run_parallel(ffi::ThreadPool& pool, int64_t count, Work work) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<bool> failed{false};
  };
  const auto state = std::make_shared<State>();
  const auto loop = [state, work, count] {
    for (int64_t i; (i = state->next++) < count; state->done++) {
      try {
        work(i);
      } catch (const std::bad_alloc&) {
        state->failed = true;
      }
    }
  };
  const int64_t helpers = std::min<int64_t>(count, pool.num_threads()) - 1;
  for (int64_t i = 0; i < helpers; i++) pool.Schedule(std::remove_const_t<decltype(loop)>(loop));
  loop();
  for (int spin = 0; state->done < count; spin++)
    if (spin > 1000) std::this_thread::yield();
  if (state->failed) throw std::bad_alloc();
}

// ---------------------------------------------------------------- arguments

bool is_number(const Numbers& a) { return a.element_type() == ffi::F32 || a.element_type() == ffi::BF16; }

Rows rows_of(const Numbers& a) {
  return {a.untyped_data(), a.element_type() == ffi::BF16, a.dimensions()[0], a.dimensions()[1]};
}

ffi::Error refuse(const char* sentence) { return ffi::Error::InvalidArgument(sentence); }

// Rows of one scan that lie together; of no scan where they are padding. Where all scans share their kernels, all rows
// are one run.
struct Run {
  int64_t begin, end, scan;
};

std::vector<Run> runs_of(const Indices& scan, int64_t scans) {
  const int32_t* of = scan.typed_data();
  const int64_t n = scan.dimensions()[0];
  if (scans == 1) return {{0, n, 0}};
  std::vector<Run> runs;
  for (int64_t begin = 0, end; begin < n; begin = end) {
    const int64_t b = of[begin];
    for (end = begin + 1; end < n && of[end] == b;) end++;
    runs.push_back({begin, end, b >= 0 && b < scans ? b : -1});
  }
  return runs;
}

// Rows that reach each row in the other direction: of a table [volume, n], a table [volume, rows].
std::vector<int32_t> inverse_of(ffi::ThreadPool& pool, const int32_t* table, int64_t volume, int64_t n, int64_t rows) {
  std::vector<int32_t> inverse(volume * rows);
  run_parallel(pool, volume, [table, n, rows, to = inverse.data()](int64_t k) {
    std::fill(to + k * rows, to + (k + 1) * rows, static_cast<int32_t>(n));
    for (int64_t o = 0; o < n; o++) {
      const int64_t i = table[k * n + o];
      if (static_cast<uint64_t>(i) < static_cast<uint64_t>(rows)) to[k * rows + i] = static_cast<int32_t>(o);
    }
  });
  return inverse;
}

// ---------------------------------------------------------------- products

// Floats of a packed kernel.
int64_t packed_size(int64_t in, int64_t out) {
  const int64_t panel = forms().pairs->panel;
  return (out + panel - 1) / panel * panel * in;
}

// Kernels of the stack that scans use, packed once.
struct Packed {
  std::vector<int32_t> place;  // [scans * volume], of the packed kernel of a scan and an offset
  std::vector<int32_t> used;

  Packed(const Indices& kernel, int64_t kernels) {
    std::vector<int32_t> first(kernels, -1);
    place.reserve(kernel.element_count());
    for (size_t i = 0; i < kernel.element_count(); i++) {
      const int32_t k = kernel.typed_data()[i];
      if (first[k] < 0) first[k] = static_cast<int32_t>(used.size()), used.push_back(k);
      place.push_back(first[k]);
    }
  }
};

void pack_kernels(ffi::ThreadPool& pool, const Numbers& w, const std::vector<int32_t>& used, bool transposed,
                  int64_t in, int64_t out, int64_t size, float* packed) {
  const bool half = w.element_type() == ffi::BF16;
  const auto* data = static_cast<const char*>(w.untyped_data());
  const int64_t bytes = in * out * (half ? 2 : 4);
  run_parallel(pool, static_cast<int64_t>(used.size()), [=, of = used.data()](int64_t i) {
    forms().pairs->pack(data + of[i] * bytes, half, transposed, in, out, packed + i * size);
  });
}

void convolve_pairs(ffi::ThreadPool& pool, const Rows& x, const Numbers& w, const int32_t* table, bool mirrored,
                    const Indices& scan, const Indices& kernel, bool transposed, int64_t rows, int64_t out, float* y) {
  const int64_t scans = kernel.dimensions()[0], volume = kernel.dimensions()[1];
  const Packed packed(kernel, w.dimensions()[0] * volume);
  const int64_t size = packed_size(x.channels, out);
  const Scratch kernels(size * static_cast<int64_t>(packed.used.size()));
  pack_kernels(pool, w, packed.used, transposed, x.channels, out, size, kernels.data());

  // Work of some hundred rows: outputs stay in a cache; enough pieces that threads end together.
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t most = std::clamp<int64_t>(rows / (8 * threads), 24, 256);
  std::vector<Run> work;
  for (const Run& run : runs_of(scan, scans)) {
    const int64_t parts = (run.end - run.begin + most - 1) / most, n = run.end - run.begin;
    for (int64_t p = 0; p < parts; p++)
      work.push_back({run.begin + n * p / parts, run.begin + n * (p + 1) / parts, run.scan});
  }
  PairProducts job{x, kernels.data(), table, nullptr, mirrored, volume, rows, out, y};
  run_parallel(pool, static_cast<int64_t>(work.size()), [=, list = work.data(), place = packed.place.data()](int64_t i) {
    const Run& part = list[i];
    if (part.scan < 0) {
      std::memset(y + part.begin * out, 0, (part.end - part.begin) * out * 4);
      return;
    }
    PairProducts own = job;
    own.kernel = place + part.scan * volume;
    const Scratch scratch(forms().pairs->pair_scratch(own, part.end - part.begin));
    forms().pairs->multiply_pairs(own, part.begin, part.end, scratch.data());
  });
}

// Chunks of blocks of one scan, in the order of scans.
std::vector<std::vector<int64_t>> chunks_by_scan(const Indices& scan, int64_t count, int64_t scans, bool apart) {
  std::vector<std::vector<int64_t>> chunks(apart ? scans : 1);
  for (int64_t t = 0; t < count; t++) chunks[apart ? scan.typed_data()[t] : 0].push_back(t);
  return chunks;
}

void transform_packed(ffi::ThreadPool& pool, const float* packed, int64_t size, float* transformed) {
  const int64_t step = (size / 64 + 64) / 64 * 64;
  run_parallel(pool, (size + step - 1) / step, [=](int64_t i) {
    forms().blocks->transform_kernels(packed, i * step, std::min(size, (i + 1) * step), size, transformed);
  });
}

// Places in which a mirrored kernel is read backwards.
std::vector<int32_t> kernels_of_scan(const Indices& kernel, int64_t b, bool mirrored) {
  const int64_t volume = kernel.dimensions()[1];
  const int32_t* of = kernel.typed_data() + b * volume;
  std::vector<int32_t> list(of, of + volume);
  if (mirrored) std::reverse(list.begin(), list.end());
  return list;
}

constexpr int64_t kPlaces = 216;
constexpr int64_t kBlocks = 16;        // blocks that are transformed and multiplied together
constexpr int64_t kOuterBlocks = 128;  // the same for gradients, whose sums are read and written once for all of them

void convolve_blocks(ffi::ThreadPool& pool, const Rows& x, const Numbers& w, bool mirrored, const Indices& kernel,
                     bool transposed, const Indices& rows, const Indices& scan, int64_t count, int64_t out, float* y) {
  const int64_t scans = kernel.dimensions()[0], n = rows.dimensions()[4], in = x.channels;
  const bool apart = scans > 1 && w.dimensions()[0] > 1;
  std::memset(y, 0, x.count * out * 4);
  const auto chunks = chunks_by_scan(scan, count, scans, apart);
  const int64_t size = packed_size(in, out);
  for (size_t b = 0; b < chunks.size(); b++) {
    if (chunks[b].empty()) continue;
    const Scratch transformed(kPlaces * size);
    {
      const Scratch packed(27 * size);
      pack_kernels(pool, w, kernels_of_scan(kernel, b, mirrored), transposed, in, out, size, packed.data());
      transform_packed(pool, packed.data(), size, transformed.data());
    }
    const int64_t parts = (n + kBlocks - 1) / kBlocks;
    const BlockProducts job{x, transformed.data(), rows.typed_data(), n, 0, out, y};
    run_parallel(pool, static_cast<int64_t>(chunks[b].size()) * parts, [=, list = chunks[b].data()](int64_t i) {
      const int64_t first = n * (i % parts) / parts, last = n * (i % parts + 1) / parts;
      BlockProducts own = job;
      own.rows += list[i / parts] * kPlaces * n + first;
      own.blocks = last - first;
      const Scratch scratch(forms().blocks->block_scratch(own));
      forms().blocks->multiply_blocks(own, scratch.data());
    });
  }
}

ffi::Error convolve(ffi::ThreadPool pool, Numbers x, Numbers w, Indices table, Indices scan, Indices kernel,
                    Indices block_rows, Indices block_scan, Indices block_count, bool transposed, bool mirrored,
                    bool inverse, Floats y) {
  if (!is_number(x) || x.element_type() != w.element_type())
    return refuse("features and kernels of the native convolution must both be float32 or both bfloat16");
  const int64_t rows = y->dimensions()[0], out = y->dimensions()[1], volume = kernel.dimensions()[1];
  if (rows == 0 || out == 0) return ffi::Error::Success();
  if (x.dimensions()[0] == 0 || x.dimensions()[1] == 0) {
    std::memset(y->typed_data(), 0, rows * out * 4);
    return ffi::Error::Success();
  }
  try {
    const int64_t count = block_rows.dimensions()[0] ? block_count.typed_data()[0] : 0;
    if (count > 0) {
      convolve_blocks(pool, rows_of(x), w, mirrored, kernel, transposed, block_rows, block_scan, count, out,
                      y->typed_data());
      return ffi::Error::Success();
    }
    std::vector<int32_t> reached;
    const int32_t* from = table.typed_data();
    if (inverse) {
      reached = inverse_of(pool, from, volume, table.dimensions()[1], rows);
      from = reached.data();
    }
    convolve_pairs(pool, rows_of(x), w, from, mirrored, scan, kernel, transposed, rows, out, y->typed_data());
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for a native convolution");
  }
  return ffi::Error::Success();
}

// ---------------------------------------------------------------- gradients

// Adds the gradient of the kernel that a scan uses at an offset, for rows of it, to that of the stack; returns its
// product with the difference of the two kernels that gamma chooses from.
double add_gradient(const float* sum, int64_t stride, int64_t first, int64_t channels, int64_t out, float* gradient,
                    const Numbers* w, int64_t k, int64_t volume, int64_t in) {
  for (int64_t c = 0; c < channels; c++)
    for (int64_t d = 0; d < out; d++) gradient[(first + c) * out + d] += sum[c * stride + d];
  if (!w) return 0;
  double total = 0;
  const int64_t at = (k * in + first) * out, other = at + volume * in * out;
  for (int64_t c = 0; c < channels; c++) {
    double row = 0;
    if (w->element_type() == ffi::F32) {
      const float *a = static_cast<const float*>(w->untyped_data()) + at + c * out, *b = a + (other - at);
      for (int64_t d = 0; d < out; d++) row += sum[c * stride + d] * (a[d] - b[d]);
    } else {
      const uint16_t *a = static_cast<const uint16_t*>(w->untyped_data()) + at + c * out, *b = a + (other - at);
      for (int64_t d = 0; d < out; d++) {
        const uint32_t wide[2] = {static_cast<uint32_t>(a[d]) << 16, static_cast<uint32_t>(b[d]) << 16};
        float pair[2];
        std::memcpy(pair, wide, 8);
        row += sum[c * stride + d] * (pair[0] - pair[1]);
      }
    }
    total += row;
  }
  return total;
}

struct Gradients {
  float *kernels, *gamma;  // [kernels, volume, in, out], [scans, volume]
  const Numbers* w;        // the kernels that gamma chooses from, or none
  const int32_t* kernel;   // [scans, volume]
  int64_t volume, in, out;
};

void gradient_of_pairs(ffi::ThreadPool& pool, const Rows& x, const Rows& g, const Indices& table, const Indices& scan,
                       int64_t scans, int64_t stack, const Gradients& to) {
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t most = std::max<int64_t>(1, x.channels / 16);
  const int64_t parts = std::clamp<int64_t>((4 * threads + to.volume - 1) / to.volume, 1, most);
  const auto runs = runs_of(scan, scans);
  std::vector<double> gained(parts * scans * to.volume, 0.0);
  const int64_t rows = table.dimensions()[1];
  const int32_t* neighbors = table.typed_data();
  run_parallel(pool, to.volume * parts, [=, &runs, part_gained = gained.data()](int64_t i) {
    const int64_t k = i / parts, part = i % parts;
    const int64_t first = x.channels * part / parts, last = x.channels * (part + 1) / parts;
    for (int64_t s = 0; s < stack; s++)
      std::memset(to.kernels + ((s * to.volume + k) * to.in + first) * to.out, 0, (last - first) * to.out * 4);
    const int64_t stride = forms().pairs->padded(to.out), size = (last - first) * stride;
    const Scratch sum(size);
    for (const Run& run : runs) {
      if (run.scan < 0) continue;
      OuterProducts job{x, g, neighbors + k * rows, run.begin, run.end, first, last - first, sum.data()};
      const Scratch scratch(forms().pairs->outer_scratch(job));
      std::memset(sum.data(), 0, size * 4);
      forms().pairs->multiply_outer(job, scratch.data());
      float* gradient = to.kernels + to.kernel[run.scan * to.volume + k] * to.in * to.out;
      part_gained[(part * scans + run.scan) * to.volume + k] +=
          add_gradient(sum.data(), stride, first, last - first, to.out, gradient, to.w, k, to.volume, to.in);
    }
  });
  for (int64_t i = 0; i < scans * to.volume; i++) {
    double total = 0;
    for (int64_t p = 0; p < parts; p++) total += gained[p * scans * to.volume + i];
    to.gamma[i] = static_cast<float>(total);
  }
}

void gradient_of_blocks(ffi::ThreadPool& pool, const Rows& x, const Rows& g, const Indices& rows, const Indices& scan,
                        int64_t count, int64_t scans, int64_t stack, const Gradients& to) {
  const int64_t n = rows.dimensions()[4], in_width = forms().pairs->padded(to.in), width = forms().pairs->padded(to.out);
  const int64_t size = to.in * width, together = std::max<int64_t>(1, kOuterBlocks / n);
  const bool apart = scans > 1 && (stack > 1 || to.w);
  std::memset(to.kernels, 0, stack * to.volume * to.in * to.out * 4);
  std::memset(to.gamma, 0, scans * to.volume * 4);
  const auto chunks = chunks_by_scan(scan, count, scans, apart);
  const Scratch inputs(kPlaces * together * n * in_width), outputs(kPlaces * together * n * width);
  const Scratch sum(kPlaces * size);
  for (size_t b = 0; b < chunks.size(); b++) {
    if (chunks[b].empty()) continue;
    const auto& list = chunks[b];
    for (int64_t begin = 0; begin < static_cast<int64_t>(list.size()); begin += together) {
      const int64_t taken = std::min<int64_t>(together, list.size() - begin), blocks = taken * n;
      const int64_t pieces = 4;  // of a chunk, so that all threads have work
      run_parallel(pool, taken * pieces * 2, [=, of = list.data(), all = rows.typed_data(), v = inputs.data(), u = outputs.data()](int64_t i) {
        const int64_t chunk = i / 2 / pieces, piece = i / 2 % pieces;
        const int32_t* places = all + of[begin + chunk] * kPlaces * n;
        const int64_t lo = n * piece / pieces, hi = n * (piece + 1) / pieces;
        forms().blocks->transform_blocks(i % 2 ? g : x, i % 2, places, n, lo, hi, chunk * n + lo, blocks, i % 2 ? u : v);
      });
      run_parallel(pool, kPlaces, [=, v = inputs.data(), u = outputs.data(), total = sum.data()](int64_t t) {
        if (begin == 0) std::memset(total + t * size, 0, size * 4);
        forms().blocks->multiply_block_outer({v, u, blocks, to.in, to.out, total}, t);
      });
    }
    const Scratch kernels(to.volume * size);
    const int64_t step = (size / 64 + 64) / 64 * 64;
    run_parallel(pool, (size + step - 1) / step, [=, total = sum.data(), result = kernels.data()](int64_t i) {
      forms().blocks->transpose_kernels(total, i * step, std::min(size, (i + 1) * step), size, result);
    });
    run_parallel(pool, to.volume, [=, result = kernels.data()](int64_t k) {
      float* gradient = to.kernels + to.kernel[b * to.volume + k] * to.in * to.out;
      to.gamma[b * to.volume + k] = static_cast<float>(
          add_gradient(result + k * size, width, 0, to.in, to.out, gradient, to.w, k, to.volume, to.in));
    });
  }
}

ffi::Error differentiate(ffi::ThreadPool pool, Numbers x, Numbers g, Numbers w, Indices table, Indices scan,
                         Indices kernel, Indices block_rows, Indices block_scan, Indices block_count, bool has_gamma,
                         Floats kernels, Floats gamma) {
  if (!is_number(x) || x.element_type() != g.element_type() || !is_number(w))
    return refuse("features and cotangents of the native convolution must both be float32 or both bfloat16");
  const int64_t scans = kernel.dimensions()[0], stack = kernels->dimensions()[0];
  const Gradients to{kernels->typed_data(), gamma->typed_data(), has_gamma ? &w : nullptr, kernel.typed_data(),
                     kernels->dimensions()[1], kernels->dimensions()[2], kernels->dimensions()[3]};
  if (x.element_count() == 0 || g.element_count() == 0) {
    std::memset(to.kernels, 0, kernels->size_bytes());
    std::memset(to.gamma, 0, gamma->size_bytes());
    return ffi::Error::Success();
  }
  try {
    const int64_t count = block_rows.dimensions()[0] ? block_count.typed_data()[0] : 0;
    if (count > 0)
      gradient_of_blocks(pool, rows_of(x), rows_of(g), block_rows, block_scan, count, scans, stack, to);
    else
      gradient_of_pairs(pool, rows_of(x), rows_of(g), table, scan, scans, stack, to);
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for the gradient of a native convolution");
  }
  return ffi::Error::Success();
}

// ---------------------------------------------------------------- pooling

// Calls work(begin, end) for pieces of n rows.
template <class Work>
void run_by_rows(ffi::ThreadPool& pool, int64_t n, Work work) {
  const int64_t parts = std::clamp<int64_t>(n / 64, 1, 8 * std::max<int64_t>(1, pool.num_threads()));
  run_parallel(pool, parts, [=](int64_t i) { work(n * i / parts, n * (i + 1) / parts); });
}

ffi::Error max_pool(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, Indices table, Floats best,
                    ffi::Result<ffi::Buffer<ffi::S8>> chosen) {
  const PoolRows job{x.typed_data(),        table.typed_data(),    x.dimensions()[0],  table.dimensions()[0],
                     table.dimensions()[1], best->dimensions()[1], best->typed_data(), chosen->typed_data()};
  run_by_rows(pool, job.rows, [=](int64_t begin, int64_t end) { forms().pools->pool(job, begin, end); });
  return ffi::Error::Success();
}

ffi::Error max_pool_gradient(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> g, ffi::Buffer<ffi::S8> chosen, Indices table,
                             Floats dx) {
  const int64_t volume = table.dimensions()[0], rows = dx->dimensions()[0];
  const auto reached = inverse_of(pool, table.typed_data(), volume, table.dimensions()[1], rows);
  const PoolGradient job{g.typed_data(), chosen.typed_data(), reached.data(),        g.dimensions()[0], volume,
                         rows,           g.dimensions()[1],   dx->typed_data()};
  run_by_rows(pool, rows, [=](int64_t begin, int64_t end) { forms().pools->give(job, begin, end); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace h2a2

// All else is hidden, so that no other library's symbols are taken for these.
#if defined(__GNUC__)
#define H2A2_EXPORT __attribute__((visibility("default")))
#else
#define H2A2_EXPORT
#endif
extern "C" {
H2A2_EXPORT XLA_FFI_Error* h2a2_convolve(XLA_FFI_CallFrame*);
H2A2_EXPORT XLA_FFI_Error* h2a2_differentiate(XLA_FFI_CallFrame*);
H2A2_EXPORT XLA_FFI_Error* h2a2_max_pool(XLA_FFI_CallFrame*);
H2A2_EXPORT XLA_FFI_Error* h2a2_max_pool_gradient(XLA_FFI_CallFrame*);
H2A2_EXPORT const char* h2a2_form();
H2A2_EXPORT int h2a2_choose_form(const char* name);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(h2a2_convolve, h2a2::convolve,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<h2a2::Numbers>()   // x [n, in]
                                  .Arg<h2a2::Numbers>()   // w [stack, volume, in, out]
                                  .Arg<h2a2::Indices>()   // table [volume, rows]
                                  .Arg<h2a2::Indices>()   // scan of each row of the result
                                  .Arg<h2a2::Indices>()   // kernel [scans, volume]
                                  .Arg<h2a2::Indices>()   // rows of blocks [chunks, 6, 6, 6, n]
                                  .Arg<h2a2::Indices>()   // scan of each chunk
                                  .Arg<h2a2::Indices>()   // number of chunks [1]; none: by pairs
                                  .Attr<bool>("transposed")
                                  .Attr<bool>("mirrored")
                                  .Attr<bool>("inverse")
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(h2a2_differentiate, h2a2::differentiate,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<h2a2::Numbers>()   // x [n, in]
                                  .Arg<h2a2::Numbers>()   // cotangent [rows, out]
                                  .Arg<h2a2::Numbers>()   // w [stack, volume, in, out]
                                  .Arg<h2a2::Indices>()   // table [volume, rows]
                                  .Arg<h2a2::Indices>()   // scan of each row of the cotangent
                                  .Arg<h2a2::Indices>()   // kernel [scans, volume]
                                  .Arg<h2a2::Indices>()
                                  .Arg<h2a2::Indices>()
                                  .Arg<h2a2::Indices>()   // as above
                                  .Attr<bool>("has_gamma")
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()    // of w
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());  // of gamma [scans, volume]

XLA_FFI_DEFINE_HANDLER_SYMBOL(h2a2_max_pool, h2a2::max_pool,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // x [n, channels]
                                  .Arg<h2a2::Indices>()                    // table [volume, rows]
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // maxima [rows, channels]
                                  .Ret<xla::ffi::Buffer<xla::ffi::S8>>()); // offset of each

XLA_FFI_DEFINE_HANDLER_SYMBOL(h2a2_max_pool_gradient, h2a2::max_pool_gradient,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // cotangent [rows, channels]
                                  .Arg<xla::ffi::Buffer<xla::ffi::S8>>()   // offsets [rows, channels]
                                  .Arg<h2a2::Indices>()                    // table [volume, rows]
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()); // [n, channels]

const char* h2a2_form() { return h2a2::forms().name; }

// Takes another form that this machine can run, for tests and benchmarks; returns 0 where it cannot.
int h2a2_choose_form(const char* name) {
  for (const auto& form : h2a2::usable_forms())
    if (std::strcmp(form.name, name) == 0) {
      h2a2::chosen_form() = &form;
      return 1;
    }
  return 0;
}
