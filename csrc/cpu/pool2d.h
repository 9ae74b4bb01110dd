// Max pooling on the CPU.
#pragma once

#include "cpu/kernels.h"
#include "ops.h"

namespace sparsekit {

// Floats that Kernels::max_pool_row and avg_pool_row want as scratch.
inline int64_t pool_scratch(const Pool2dGeometry& g) {
  return kPoolChannels * (g.in_w + g.pad_left + g.out_w * g.stride_w + g.kernel_w * g.dilation_w + 64);
}

// How Kernels::max_pool_plane and its gradient split a plane.
PoolSplit pool_split(const Pool2dGeometry& g);

// The largest pixel of every window; the layouts are those of Kernels::max_pool_row.
void max_pool2d(const Pool2dGeometry& g, const Images& in, const Images& out);

// NCHW. taps: which pixel of every window is the largest, as its place in the kernel, row by row; of several the first,
// of NaNs the last. A window between whose taps the image lies has kMostTaps.
void max_pool2d_taps(const Pool2dGeometry& g, const float* x, float* y, uint8_t* taps);

// dx is the sum of dy over the windows of which a pixel of x is the largest.
void max_pool2d_grad(const Pool2dGeometry& g, const float* dy, const uint8_t* taps, float* dx);

}  // namespace sparsekit
