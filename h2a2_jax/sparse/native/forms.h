// The kernels of one form (an instruction set) as a table of functions, and their arguments.
#pragma once

#include <cstdint>

namespace h2a2 {

// Rows of features: float32, or bfloat16 where `half`.
struct Rows {
  const void* data;
  bool half;
  int64_t count, channels;
};

// Products y[o] += x[table[k][o]] @ W[kernel[scan][k]] of a range of output rows.
struct PairProducts {
  Rows x;
  const float* packed;    // kernels, each as panels [channels_out / panel][channels_in][panel]
  const int32_t* table;   // [volume, rows]; an entry past the last row of x is no neighbour
  const int32_t* kernel;  // [volume], of the scan of the range
  bool mirrored;          // offset k reads row volume - 1 - k of the table
  int64_t volume, rows, channels_out;
  float* y;               // [rows, channels_out]
};

// Gradient of one kernel: sum over pairs of the outer products of x[table[k][o]] and g[o].
struct OuterProducts {
  Rows x, g;
  const int32_t* neighbors;  // [rows], one row of the table
  int64_t begin, end;        // range of output rows
  int64_t channel, channels; // range of channels of x
  float* sum;                // [channels, padded channels_out], to which is added
};

// Winograd products of blocks of one scan.
struct BlockProducts {
  Rows x;
  const float* packed;   // transformed kernels [216] of panels
  const int32_t* rows;   // [216, stride], row of each place of each block; past the last row of x where there is none
  int64_t stride, blocks, channels_out;
  float* y;
};

struct BlockOuterProducts {
  const float *inputs, *outputs;  // transformed [216, blocks, padded channels]
  int64_t blocks, channels_in, channels_out;
  float* sum;                     // [216, channels_in, padded channels_out]
};

struct PoolRows {
  const float* x;        // [count, channels]
  const int32_t* table;  // [volume, rows]
  int64_t count, volume, rows, channels;
  float* best;           // [rows, channels]
  int8_t* chosen;        // offset of each maximum, -1 for none
};

struct PoolGradient {
  const float* g;          // [count, channels]
  const int8_t* chosen;    // the same shape
  const int32_t* reached;  // [volume, rows], output row that an input row reaches
  int64_t count, volume, rows, channels;
  float* dx;               // [rows, channels]
};

// Products by pairs.
struct PairForm {
  int64_t panel;                        // columns of a panel of a packed kernel
  int64_t (*padded)(int64_t channels);  // floats of a row of scratch
  void (*pack)(const void* kernel, bool half, bool transposed, int64_t in, int64_t out, float* packed);
  int64_t (*pair_scratch)(const PairProducts&, int64_t rows);  // in floats, as all scratch
  void (*multiply_pairs)(const PairProducts&, int64_t begin, int64_t end, float* scratch);
  int64_t (*outer_scratch)(const OuterProducts&);
  void (*multiply_outer)(const OuterProducts&, float* scratch);
};

// Winograd's products. Kernels are transformed element by element, of a range of `size` floats.
struct BlockForm {
  void (*transform_kernels)(const float* packed, int64_t begin, int64_t end, int64_t size, float* transformed);
  void (*transpose_kernels)(const float* sum, int64_t begin, int64_t end, int64_t size, float* kernels);
  int64_t (*block_scratch)(const BlockProducts&);
  void (*multiply_blocks)(const BlockProducts&, float* scratch);
  void (*transform_blocks)(const Rows& x, bool outputs, const int32_t* rows, int64_t stride, int64_t begin,
                           int64_t end, int64_t first, int64_t blocks, float* transformed);
  void (*multiply_block_outer)(const BlockOuterProducts&, int64_t place);
};

struct PoolForm {
  void (*pool)(const PoolRows&, int64_t begin, int64_t end);
  void (*give)(const PoolGradient&, int64_t begin, int64_t end);
};

}  // namespace h2a2
