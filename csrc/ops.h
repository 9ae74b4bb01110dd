// What every backend shares: the CSR view of a weight and the geometry of a convolution.
#pragma once

#include <cstdint>

namespace sparsekit {

// Row r owns the non-zeros [crow[r], crow[r + 1]); col = (channel in group * kernel_h + ky) * kernel_w + kx.
// The value of non-zero j is values[permutation ? permutation[j] : j].
struct Csr {
  const int32_t* crow;
  const int32_t* col;
  const float* values;
  const int32_t* permutation;
  int64_t rows;
  int64_t nnz;
};

// A batch of images in memory; strides in floats.
struct Images {
  float* data;
  int64_t image, channel, row, col;
};

struct Conv2dGeometry {
  int64_t batch, in_channels, in_h, in_w;
  int64_t out_channels, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, groups;
};

struct Pool2dGeometry {
  int64_t batch, channels, in_h, in_w, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
};

}  // namespace sparsekit
