// Tensors and lists that arrive from torch, checked and turned into what the kernels take.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "checks.h"
#include "ops.h"

namespace sparsekit {

using Ints = std::vector<int64_t>;
constexpr auto kInt = torch::headeronly::ScalarType::Int;
constexpr auto kFloat = torch::headeronly::ScalarType::Float;

inline Images images(const Tensor& t, const char* name) {
  check_dense(t, name);
  STD_TORCH_CHECK(t.dim() == 4, name, " must have 4 dimensions, has ", t.dim());
  return {static_cast<float*>(t.data_ptr()), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// [pixels, channels] seen as one image of one row.
inline Images matrix(const Tensor& t, const char* name) {
  check_dense(t, name);
  STD_TORCH_CHECK(t.dim() == 2 && t.is_contiguous(), name, " must be 2-D and contiguous");
  return {static_cast<float*>(t.data_ptr()), t.size(0) * t.size(1), 1, t.size(0) * t.size(1), t.size(1)};
}

// Whether all of [0, count) are at least 0 and less than end. Without a branch, for the vector units.
inline bool all_within(const int32_t* indices, int64_t count, int64_t end) {
  if (end <= 0) return count == 0;
  const int32_t last = static_cast<int32_t>(std::min<int64_t>(end - 1, INT32_MAX));
  int32_t signs = 0;
  for (int64_t i = 0; i < count; ++i) signs |= indices[i] | (last - indices[i]);
  return signs >= 0;
}

// Indices are read as they come: a full check costs as much as a small layer, but a bad one must not crash.
inline Csr csr(const Tensor& crow, const Tensor& col, const float* values, int64_t columns, const Tensor* permutation) {
  check_vector(crow, "crow_indices", kInt, -1);
  check_vector(col, "col_indices", kInt, -1);
  const Csr weight{static_cast<const int32_t*>(crow.data_ptr()),
                   static_cast<const int32_t*>(col.data_ptr()),
                   values,
                   permutation ? static_cast<const int32_t*>(permutation->data_ptr()) : nullptr,
                   crow.size(0) - 1,
                   col.size(0)};
  STD_TORCH_CHECK(weight.rows >= 0 && weight.crow[0] == 0 && weight.crow[weight.rows] == weight.nnz,
                  "crow_indices must run from 0 to nnz = ", weight.nnz);
  bool ordered = true;
  for (int64_t r = 0; r < weight.rows; ++r) ordered &= weight.crow[r] <= weight.crow[r + 1];
  STD_TORCH_CHECK(ordered, "crow_indices must not decrease");
  STD_TORCH_CHECK(all_within(weight.col, weight.nnz, columns), "col_indices must lie in [0, ", columns, ")");
  if (weight.permutation) {
    check_vector(*permutation, "t_permutation", kInt, weight.nnz);
    STD_TORCH_CHECK(all_within(weight.permutation, weight.nnz, weight.nnz), "t_permutation must lie in [0, nnz)");
  }
  return weight;
}

inline const float* vector_data(const Tensor& t, const char* name, int64_t size) {
  check_vector(t, name, kFloat, size);
  return static_cast<const float*>(t.data_ptr());
}

// Of a batch of images: [batch, channels, h, w].
using ImageSize = std::array<int64_t, 4>;

inline ImageSize image_size(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, name, " must have 4 dimensions, has ", t.dim());
  return {t.size(0), t.size(1), t.size(2), t.size(3)};
}

inline Conv2dGeometry geometry(const ImageSize& x, const ImageSize& y, const Ints& kernel, const Ints& stride,
                               const Ints& padding, const Ints& dilation, int64_t groups) {
  STD_TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 4 && dilation.size() == 2,
                  "kernel_size, stride and dilation must have 2 elements, padding 4");
  for (int i = 0; i < 2; ++i)
    STD_TORCH_CHECK(kernel[i] > 0 && stride[i] > 0 && dilation[i] > 0,
                    "kernel_size, stride and dilation must be positive");
  for (int64_t p : padding) STD_TORCH_CHECK(p >= 0, "padding must not be negative, got ", p);
  const Conv2dGeometry g{x[0],      x[1],      x[2],      x[3],       y[1],       y[2],        y[3],        kernel[0],
                         kernel[1], stride[0], stride[1], padding[0], padding[2], dilation[0], dilation[1], groups};
  STD_TORCH_CHECK(groups > 0 && g.in_channels % groups == 0 && g.out_channels % groups == 0, "groups = ", groups,
                  " must divide ", g.in_channels, " and ", g.out_channels, " channels");
  const int64_t h = (g.in_h + padding[0] + padding[1] - dilation[0] * (kernel[0] - 1) - 1) / stride[0] + 1;
  const int64_t w = (g.in_w + padding[2] + padding[3] - dilation[1] * (kernel[1] - 1) - 1) / stride[1] + 1;
  STD_TORCH_CHECK(y[0] == g.batch && h == g.out_h && w == g.out_w && h > 0 && w > 0,
                  "input and output do not fit the geometry");
  return g;
}

inline Conv2dGeometry geometry(const Tensor& x, const Tensor& y, const Ints& kernel, const Ints& stride,
                               const Ints& padding, const Ints& dilation, int64_t groups) {
  return geometry(image_size(x, "input"), image_size(y, "output"), kernel, stride, padding, dilation, groups);
}

inline Pool2dGeometry pool_geometry(const ImageSize& x, const ImageSize& y, const Ints& kernel, const Ints& stride,
                                    const Ints& padding, const Ints& dilation) {
  STD_TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "kernel_size, stride, padding and dilation must have 2 elements");
  for (int i = 0; i < 2; ++i)
    STD_TORCH_CHECK(kernel[i] > 0 && stride[i] > 0 && dilation[i] > 0 && padding[i] >= 0,
                    "kernel_size, stride and dilation must be positive, padding not negative");
  STD_TORCH_CHECK(2 * padding[0] <= kernel[0] && 2 * padding[1] <= kernel[1],
                  "padding must be at most half of kernel_size");
  STD_TORCH_CHECK(y[0] == x[0] && y[1] == x[1], "out must have the images and channels of input");
  for (int i = 0; i < 2; ++i) {
    // Rounding the number of windows up may add one, if it begins within the image or the padding before it.
    const int64_t room = x[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1;
    const int64_t windows = room / stride[i] + 1, last = (y[2 + i] - 1) * stride[i];
    const bool one_more = room % stride[i] && y[2 + i] == windows + 1 && last < x[2 + i] + padding[i];
    STD_TORCH_CHECK(room >= 0 && (y[2 + i] == windows || one_more), "input and output do not fit the geometry");
  }
  return {x[0],      x[1],      x[2],      x[3],       y[2],       y[3],        kernel[0],
          kernel[1], stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]};
}

inline Conv2dGeometry linear_geometry(const Tensor& x, const Tensor& y) {
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(0) == y.size(0), "input and output must be [batch, features]");
  return {1, x.size(1), 1, x.size(0), y.size(1), 1, x.size(0), 1, 1, 1, 1, 0, 0, 1, 1, 1};
}

inline bool empty(const Tensor& t) { return t.numel() == 0; }

}  // namespace sparsekit
