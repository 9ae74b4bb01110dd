// Convolutions as walks. No torch, so that the tests can use it without.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/kernels.h"
#include "ops.h"

namespace sparsekit::cuda {

inline Walk forward(const Conv2dGeometry& g) {
  Walk w{};
  w.batch = static_cast<int32_t>(g.batch);
  w.rows = static_cast<int32_t>(g.out_h), w.cols = static_cast<int32_t>(g.out_w);
  w.target_plane = g.out_h * g.out_w, w.target_image = g.out_channels * w.target_plane;
  w.target_row = w.cols, w.target_col = 1;
  w.source_image = g.in_channels * g.in_h * g.in_w;
  w.source_h = static_cast<int32_t>(g.in_h), w.source_w = static_cast<int32_t>(g.in_w);
  w.step_y = static_cast<int32_t>(g.stride_h), w.step_x = static_cast<int32_t>(g.stride_w);
  w.group_rows = static_cast<int32_t>(g.out_channels / g.groups);
  w.group_channels = static_cast<int32_t>(g.in_channels / g.groups);
  w.taps = static_cast<int32_t>(g.kernel_h * g.kernel_w);
  for (int t = 0; t < w.taps; ++t) {
    w.used |= 1u << t;
    w.dy[t] = static_cast<int32_t>(t / g.kernel_w * g.dilation_h - g.pad_top);
    w.dx[t] = static_cast<int32_t>(t % g.kernel_w * g.dilation_w - g.pad_left);
  }
  return w;
}

// The input pixels (y, x), (y, x + stride), … (y + stride, x) …: output pixel (y + pad - tap * dilation) / stride,
// where that divides.
inline Walk backward(const Conv2dGeometry& g, int64_t y, int64_t x) {
  Walk w{};
  w.batch = static_cast<int32_t>(g.batch);
  w.rows = static_cast<int32_t>((g.in_h - y + g.stride_h - 1) / g.stride_h);
  w.cols = static_cast<int32_t>((g.in_w - x + g.stride_w - 1) / g.stride_w);
  w.target_plane = g.in_h * g.in_w, w.target_image = g.in_channels * w.target_plane;
  w.target_offset = static_cast<int32_t>(y * g.in_w + x);
  w.target_row = static_cast<int32_t>(g.stride_h * g.in_w), w.target_col = static_cast<int32_t>(g.stride_w);
  w.source_image = g.out_channels * g.out_h * g.out_w;
  w.source_h = static_cast<int32_t>(g.out_h), w.source_w = static_cast<int32_t>(g.out_w);
  w.step_y = w.step_x = 1;
  w.group_rows = static_cast<int32_t>(g.in_channels / g.groups);
  w.group_channels = static_cast<int32_t>(g.out_channels / g.groups);
  w.taps = static_cast<int32_t>(g.kernel_h * g.kernel_w);
  for (int t = 0; t < w.taps; ++t) {
    const int64_t dy = y + g.pad_top - t / g.kernel_w * g.dilation_h;
    const int64_t dx = x + g.pad_left - t % g.kernel_w * g.dilation_w;
    if (dy % g.stride_h || dx % g.stride_w) continue;
    w.used |= 1u << t;
    w.dy[t] = static_cast<int32_t>(dy / g.stride_h), w.dx[t] = static_cast<int32_t>(dx / g.stride_w);
  }
  return w;
}

// All classes of the gradient of the input: together they write every input pixel once.
inline std::vector<Walk> backward(const Conv2dGeometry& g) {
  std::vector<Walk> classes;
  for (int64_t y = 0; y < std::min(g.stride_h, g.in_h); ++y)
    for (int64_t x = 0; x < std::min(g.stride_w, g.in_w); ++x) classes.push_back(backward(g, y, x));
  return classes;
}

}  // namespace sparsekit::cuda
