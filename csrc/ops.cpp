// The torch side of the CPU kernels, on PyTorch's stable ABI. Outputs are given by the caller; contracts: _ops.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "arguments.h"
#include "cpu/batch_norm.h"
#include "cpu/conv2d.h"
#include "cpu/pattern.h"
#include "cpu/pool2d.h"

namespace sparsekit {
namespace {

void run_forward(const Conv2dGeometry& g, const Tensor& out, const Images& x, const Images& y, const Tensor& values,
                 const Tensor& crow, const Tensor& col, const std::optional<Tensor>& bias) {
  const Csr weight = csr(crow, col, vector_data(values, "values", col.size(0)),
                         g.in_channels / g.groups * g.kernel_h * g.kernel_w, nullptr);
  STD_TORCH_CHECK(weight.rows == g.out_channels, "crow_indices must have out_channels + 1 elements");
  const float* b = bias ? vector_data(*bias, "bias", g.out_channels) : nullptr;
  if (!empty(out)) conv2d(g, weight, b, x, y);
}

Csr weight_of(const Conv2dGeometry& g, const Tensor& crow, const Tensor& col) {
  const Csr weight = csr(crow, col, nullptr, g.in_channels / g.groups * g.kernel_h * g.kernel_w, nullptr);
  STD_TORCH_CHECK(weight.rows == g.out_channels, "crow_indices must have out_channels + 1 elements");
  return weight;
}

Csr transposed_weight_of(const Conv2dGeometry& g, const Tensor& values, const Tensor& t_crow, const Tensor& t_col,
                         const Tensor& t_permutation) {
  const Csr weight_t = csr(t_crow, t_col, vector_data(values, "values", t_col.size(0)),
                           g.out_channels / g.groups * g.kernel_h * g.kernel_w, &t_permutation);
  STD_TORCH_CHECK(weight_t.rows == g.in_channels, "t_crow_indices must have in_channels + 1 elements");
  return weight_t;
}

void run_input_grad(const Conv2dGeometry& g, const Tensor& out, const Images& dy, const Images& dx,
                    const Tensor& values, const Tensor& t_crow, const Tensor& t_col, const Tensor& t_permutation) {
  const Csr weight_t = transposed_weight_of(g, values, t_crow, t_col, t_permutation);
  if (!empty(out)) conv2d_input_grad(g, weight_t, dy, dx);
}

void run_values_grad(const Conv2dGeometry& g, Tensor& out, const Images& dy, const Images& x, const Tensor& crow,
                     const Tensor& col) {
  const Csr weight = weight_of(g, crow, col);
  vector_data(out, "out", weight.nnz);
  if (g.batch * g.out_h * g.out_w == 0)
    torch::stable::zero_(out);
  else if (!empty(out))
    conv2d_values_grad(g, weight, dy, x, static_cast<float*>(out.data_ptr()));
}

void conv2d_op(Tensor out, Tensor input, Tensor values, Tensor crow, Tensor col, std::optional<Tensor> bias,
               Ints kernel, Ints stride, Ints padding, Ints dilation, int64_t groups) {
  const Conv2dGeometry g = geometry(input, out, kernel, stride, padding, dilation, groups);
  run_forward(g, out, images(input, "input"), images(out, "out"), values, crow, col, bias);
}

void conv2d_input_grad_op(Tensor out, Tensor grad_output, Tensor values, Tensor t_crow, Tensor t_col,
                          Tensor t_permutation, Ints kernel, Ints stride, Ints padding, Ints dilation, int64_t groups) {
  const Conv2dGeometry g = geometry(out, grad_output, kernel, stride, padding, dilation, groups);
  run_input_grad(g, out, images(grad_output, "grad_output"), images(out, "out"), values, t_crow, t_col, t_permutation);
}

void conv2d_values_grad_op(Tensor out, Tensor grad_output, Tensor input, Tensor crow, Tensor col, Ints kernel,
                           Ints stride, Ints padding, Ints dilation, int64_t groups) {
  const Conv2dGeometry g = geometry(input, grad_output, kernel, stride, padding, dilation, groups);
  run_values_grad(g, out, images(grad_output, "grad_output"), images(input, "input"), crow, col);
}

void conv2d_grads_op(Tensor grad_input, Tensor grad_values, Tensor grad_output, Tensor input, Tensor values,
                     Tensor crow, Tensor col, Tensor t_crow, Tensor t_col, Tensor t_permutation,
                     std::optional<Tensor> other, Ints kernel, Ints stride, Ints padding, Ints dilation,
                     int64_t groups) {
  const Conv2dGeometry g = geometry(input, grad_output, kernel, stride, padding, dilation, groups);
  const Csr weight = weight_of(g, crow, col);
  const Csr weight_t = transposed_weight_of(g, values, t_crow, t_col, t_permutation);
  float* const grad = const_cast<float*>(vector_data(grad_values, "grad_values", weight.nnz));
  const Images x = images(input, "input"), dx = images(grad_input, "grad_input");
  const Images dy = images(grad_output, "grad_output");
  for (const Tensor* t : {&grad_input, other ? &*other : nullptr})
    STD_TORCH_CHECK(!t || image_size(*t, "grad_input") == image_size(input, "input"),
                    "grad_input and other must have the size of input");
  const Images added = other ? images(*other, "other") : dx;
  STD_TORCH_CHECK(added.image == dx.image && added.channel == dx.channel && added.row == dx.row && added.col == dx.col,
                  "other must have the strides of grad_input");
  if (empty(grad_input) || empty(grad_output))
    torch::stable::zero_(grad_values);
  else
    conv2d_grads(g, weight, weight_t, other ? added.data : nullptr, dy, x, dx, grad);
}

void linear_op(Tensor out, Tensor input, Tensor values, Tensor crow, Tensor col, std::optional<Tensor> bias) {
  const Conv2dGeometry g = linear_geometry(input, out);
  run_forward(g, out, matrix(input, "input"), matrix(out, "out"), values, crow, col, bias);
}

void linear_input_grad_op(Tensor out, Tensor grad_output, Tensor values, Tensor t_crow, Tensor t_col,
                          Tensor t_permutation) {
  const Conv2dGeometry g = linear_geometry(out, grad_output);
  run_input_grad(g, out, matrix(grad_output, "grad_output"), matrix(out, "out"), values, t_crow, t_col, t_permutation);
}

void linear_values_grad_op(Tensor out, Tensor grad_output, Tensor input, Tensor crow, Tensor col) {
  const Conv2dGeometry g = linear_geometry(input, grad_output);
  run_values_grad(g, out, matrix(grad_output, "grad_output"), matrix(input, "input"), crow, col);
}

void bias_grad_op(Tensor out, Tensor grad_output) {
  Conv2dGeometry g{};
  if (grad_output.dim() == 2) {
    g.batch = g.out_h = 1;
    g.out_w = grad_output.size(0);
  } else {
    STD_TORCH_CHECK(grad_output.dim() == 4, "grad_output must have 2 or 4 dimensions");
    g.batch = grad_output.size(0), g.out_h = grad_output.size(2), g.out_w = grad_output.size(3);
  }
  g.out_channels = grad_output.size(1);
  vector_data(out, "out", g.out_channels);
  if (empty(grad_output)) {
    torch::stable::zero_(out);
    return;
  }
  bias_grad(g, grad_output.dim() == 2 ? matrix(grad_output, "grad_output") : images(grad_output, "grad_output"),
            static_cast<float*>(out.data_ptr()));
}

void max_pool2d_op(Tensor out, Tensor input, Ints kernel, Ints stride, Ints padding, Ints dilation) {
  const Images x = images(input, "input"), y = images(out, "out");
  const Pool2dGeometry g =
      pool_geometry(image_size(input, "input"), image_size(out, "out"), kernel, stride, padding, dilation);
  STD_TORCH_CHECK(y.col == 1 ? x.channel == 1 || x.col == 1 : x.channel == 1 && y.channel == 1,
                  "NCHW cannot be pooled into channels_last");
  if (!empty(out)) max_pool2d(g, x, y);
}

float* planes(const Tensor& t, const char* name, const ImageSize& size) {
  check_dense(t, name);
  STD_TORCH_CHECK(t.is_contiguous() && image_size(t, name) == size, name,
                  " must be contiguous, and of a size that fits");
  return static_cast<float*>(t.data_ptr());
}

uint8_t* bytes(const Tensor& t, const char* name, int64_t count) {
  STD_TORCH_CHECK(
      t.is_cpu() && t.scalar_type() == torch::headeronly::ScalarType::Byte && t.is_contiguous() && t.numel() == count,
      name, " must be uint8, contiguous, and of a size that fits");
  return static_cast<uint8_t*>(t.data_ptr());
}

void max_pool2d_taps_op(Tensor out, Tensor taps, Tensor input, Ints kernel, Ints stride, Ints padding, Ints dilation) {
  const ImageSize size = image_size(input, "input"), out_size = image_size(out, "out");
  const Pool2dGeometry g = pool_geometry(size, out_size, kernel, stride, padding, dilation);
  STD_TORCH_CHECK(g.kernel_h * g.kernel_w <= kMostTaps, "kernel_size must have at most ", kMostTaps, " taps");
  max_pool2d_taps(g, planes(input, "input", size), planes(out, "out", out_size), bytes(taps, "taps", out.numel()));
}

void max_pool2d_grad_op(Tensor grad_input, Tensor grad_output, Tensor taps, Ints kernel, Ints stride, Ints padding,
                        Ints dilation) {
  const ImageSize size = image_size(grad_input, "grad_input"), out_size = image_size(grad_output, "grad_output");
  const Pool2dGeometry g = pool_geometry(size, out_size, kernel, stride, padding, dilation);
  max_pool2d_grad(g, planes(grad_output, "grad_output", out_size), bytes(taps, "taps", grad_output.numel()),
                  planes(grad_input, "grad_input", size));
}

float* channel_data(const Tensor& t, const char* name, int64_t channels) {
  return const_cast<float*>(vector_data(t, name, channels));
}

BatchNorm norm_of(const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                  const Tensor& mean, const Tensor& var, bool relu, double eps) {
  const auto [batch, channels, h, w] = image_size(input, "input");
  return {batch,
          channels,
          h * w,
          weight ? vector_data(*weight, "weight", channels) : nullptr,
          bias ? vector_data(*bias, "bias", channels) : nullptr,
          channel_data(mean, "mean", channels),
          channel_data(var, "var", channels),
          eps,
          relu};
}

uint8_t* bits(const std::optional<Tensor>& t, const char* name, const BatchNorm& norm) {
  return t ? bytes(*t, name, norm.batch * norm.channels * bit_bytes(norm)) : nullptr;
}

void batch_norm_op(Tensor out, Tensor mean, Tensor var, std::optional<Tensor> positive, Tensor input,
                   std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> residual, bool relu,
                   double eps) {
  const BatchNorm norm = norm_of(input, weight, bias, mean, var, relu, eps);
  const ImageSize size = image_size(input, "input");
  batch_norm(norm, planes(input, "input", size), residual ? planes(*residual, "residual", size) : nullptr,
             planes(out, "out", size), bits(positive, "positive", norm));
}

void batch_norm_grad_op(Tensor grad_input, Tensor grad_weight, Tensor grad_bias, std::optional<Tensor> grad_residual,
                        Tensor grad_output, Tensor input, std::optional<Tensor> positive, std::optional<Tensor> weight,
                        std::optional<Tensor> bias, Tensor mean, Tensor var, bool relu, double eps) {
  const BatchNorm norm = norm_of(input, weight, bias, mean, var, relu, eps);
  const ImageSize size = image_size(input, "input");
  batch_norm_grad(norm, planes(grad_output, "grad_output", size), planes(input, "input", size),
                  bits(positive, "positive", norm), planes(grad_input, "grad_input", size),
                  channel_data(grad_weight, "grad_weight", norm.channels),
                  channel_data(grad_bias, "grad_bias", norm.channels),
                  grad_residual ? planes(*grad_residual, "grad_residual", size) : nullptr);
}

// Both layers in one call: what lies between two calls, Python and the dispatcher, finds its code and data gone from
// the caches, and costs as much as a small layer.
void conv2d_batch_norm_op(Tensor out, Tensor product, Tensor mean, Tensor var, std::optional<Tensor> positive,
                          std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
                          std::optional<Tensor> batches, Tensor input, Tensor values, Tensor crow, Tensor col,
                          std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
                          bool relu, double eps, double momentum, Ints kernel, Ints stride, Ints padding, Ints dilation,
                          int64_t groups) {
  conv2d_op(product, input, values, crow, col, std::nullopt, kernel, stride, padding, dilation, groups);
  batch_norm_op(out, mean, var, positive, product, weight, bias, residual, relu, eps);
  if (!running_mean && !running_var && !batches) return;
  STD_TORCH_CHECK(running_mean && running_var && batches, "running_mean, running_var and batches go together");
  STD_TORCH_CHECK(
      batches->is_cpu() && batches->scalar_type() == torch::headeronly::ScalarType::Long && batches->numel() == 1,
      "batches must be one int64 on the CPU");
  const BatchNorm norm = norm_of(product, weight, bias, mean, var, relu, eps);
  update({channel_data(*running_mean, "running_mean", norm.channels),
          channel_data(*running_var, "running_var", norm.channels), static_cast<int64_t*>(batches->data_ptr())},
         norm, momentum);
}

void conv2d_batch_norm_grads_op(Tensor grad_input, Tensor grad_values, Tensor grad_weight, Tensor grad_bias,
                                std::optional<Tensor> grad_residual, Tensor grad_product, Tensor grad_output,
                                Tensor product, std::optional<Tensor> positive, std::optional<Tensor> weight,
                                std::optional<Tensor> bias, Tensor mean, Tensor var, Tensor input, Tensor values,
                                Tensor crow, Tensor col, Tensor t_crow, Tensor t_col, Tensor t_permutation,
                                std::optional<Tensor> other, bool relu, double eps, Ints kernel, Ints stride,
                                Ints padding, Ints dilation, int64_t groups) {
  batch_norm_grad_op(grad_product, grad_weight, grad_bias, grad_residual, grad_output, product, positive, weight, bias,
                     mean, var, relu, eps);
  conv2d_grads_op(grad_input, grad_values, grad_product, input, values, crow, col, t_crow, t_col, t_permutation, other,
                  kernel, stride, padding, dilation, groups);
}

// Calls f(position in the dense weight, position in values) for every non-zero.
template <class F>
void each_nonzero(const Tensor& weight, const Tensor& crow, const Tensor& col, const F& f) {
  STD_TORCH_CHECK(weight.dim() == 2 || weight.dim() == 4, "weight must have 2 or 4 dimensions");
  const int64_t taps_w = weight.dim() == 4 ? weight.size(3) : 1;
  const int64_t taps = weight.dim() == 4 ? weight.size(2) * taps_w : 1;
  const int64_t columns = weight.size(1) * taps;
  const Csr c = csr(crow, col, nullptr, columns, nullptr);
  STD_TORCH_CHECK(c.rows == weight.size(0), "crow_indices must have ", weight.size(0) + 1, " elements");
  std::vector<int64_t> offset_of(columns);
  for (int64_t i = 0; i < columns; ++i) {
    offset_of[i] = i / taps * weight.stride(1);
    if (weight.dim() == 4) offset_of[i] += i % taps / taps_w * weight.stride(2) + i % taps_w * weight.stride(3);
  }
  const int64_t stride = weight.stride(0);
  if (c.rows > 0)
    torch::stable::parallel_for(0, c.rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        for (int64_t j = c.crow[r]; j < c.crow[r + 1]; ++j) f(r * stride + offset_of[c.col[j]], j);
    });
}

void compress_op(Tensor out, Tensor weight, Tensor crow, Tensor col) {
  check_dense(weight, "weight");
  vector_data(out, "out", col.size(0));
  const float* from = static_cast<const float*>(weight.data_ptr());
  float* to = static_cast<float*>(out.data_ptr());
  each_nonzero(weight, crow, col, [&](int64_t dense, int64_t j) { to[j] = from[dense]; });
}

void decompress_op(Tensor out, Tensor values, Tensor crow, Tensor col) {
  check_dense(out, "out");
  const float* from = vector_data(values, "values", col.size(0));
  torch::stable::zero_(out);
  float* to = static_cast<float*>(out.data_ptr());
  each_nonzero(out, crow, col, [&](int64_t dense, int64_t j) { to[dense] = from[j]; });
}

MaskSize mask_size(const Tensor& mask, const Tensor& crow, int64_t groups) {
  STD_TORCH_CHECK(mask.scalar_type() == torch::headeronly::ScalarType::Bool && mask.is_contiguous(),
                  "mask must be bool and contiguous");
  STD_TORCH_CHECK(mask.dim() == 2 || mask.dim() == 4, "mask must have 2 or 4 dimensions, has ", mask.dim());
  STD_TORCH_CHECK(groups > 0 && mask.size(0) % groups == 0, "groups = ", groups, " must divide ", mask.size(0),
                  " rows");
  check_vector(crow, "crow_indices", kInt, mask.size(0) + 1);
  const int64_t taps = mask.dim() == 4 ? mask.size(2) * mask.size(3) : 1;
  return {mask.size(0), mask.size(1) * groups, taps, groups};
}

template <class T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

void count_rows_op(Tensor crow, Tensor mask, int64_t groups) {
  count_rows(mask_size(mask, crow, groups), data_of<uint8_t>(mask), data_of<int32_t>(crow));
}

void fill_pattern_op(Tensor col, Tensor t_crow, Tensor t_col, Tensor t_permutation, Tensor crow, Tensor mask,
                     int64_t groups) {
  const MaskSize size = mask_size(mask, crow, groups);
  const int64_t nnz = data_of<int32_t>(crow)[size.rows];
  check_vector(t_crow, "t_crow_indices", kInt, size.channels + 1);
  for (const Tensor& t : {col, t_col, t_permutation}) check_vector(t, "indices", kInt, nnz);
  fill_pattern(size, data_of<uint8_t>(mask), data_of<int32_t>(crow), data_of<int32_t>(col), data_of<int32_t>(t_crow),
               data_of<int32_t>(t_col), data_of<int32_t>(t_permutation));
}

std::string best_isa_op() { return best_isa(); }

void set_isa_op(std::string isa) {
  STD_TORCH_CHECK(set_isa(isa.c_str()), "this CPU or this build has no kernels for isa = ", isa);
}

}  // namespace
}  // namespace sparsekit

#define GEOMETRY "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups"

STABLE_TORCH_LIBRARY(sparsekit_cpu, m) {
  m.def("best_isa() -> str");
  m.def("set_isa(str isa) -> ()");
  m.def("count_rows(Tensor(a!) crow_indices, Tensor mask, int groups) -> ()");
  m.def(
      "fill_pattern(Tensor(a!) col_indices, Tensor(b!) t_crow_indices, Tensor(c!) t_col_indices, "
      "Tensor(d!) t_permutation, Tensor crow_indices, Tensor mask, int groups) -> ()");
  m.def("compress(Tensor(a!) out, Tensor weight, Tensor crow_indices, Tensor col_indices) -> ()");
  m.def("decompress(Tensor(a!) out, Tensor values, Tensor crow_indices, Tensor col_indices) -> ()");
  m.def(
      "conv2d(Tensor(a!) out, Tensor input, Tensor values, Tensor crow_indices, Tensor col_indices, Tensor? "
      "bias, " GEOMETRY ") -> ()");
  m.def(
      "conv2d_input_grad(Tensor(a!) out, Tensor grad_output, Tensor values, Tensor t_crow_indices, "
      "Tensor t_col_indices, Tensor t_permutation, " GEOMETRY ") -> ()");
  m.def(
      "conv2d_values_grad(Tensor(a!) out, Tensor grad_output, Tensor input, Tensor crow_indices, "
      "Tensor col_indices, " GEOMETRY ") -> ()");
  m.def(
      "conv2d_grads(Tensor(a!) grad_input, Tensor(b!) grad_values, Tensor grad_output, Tensor input, Tensor values, "
      "Tensor crow_indices, Tensor col_indices, Tensor t_crow_indices, Tensor t_col_indices, Tensor t_permutation, "
      "Tensor? other, " GEOMETRY ") -> ()");
  m.def(
      "linear(Tensor(a!) out, Tensor input, Tensor values, Tensor crow_indices, Tensor col_indices, Tensor? bias) "
      "-> ()");
  m.def(
      "linear_input_grad(Tensor(a!) out, Tensor grad_output, Tensor values, Tensor t_crow_indices, "
      "Tensor t_col_indices, Tensor t_permutation) -> ()");
  m.def(
      "linear_values_grad(Tensor(a!) out, Tensor grad_output, Tensor input, Tensor crow_indices, "
      "Tensor col_indices) -> ()");
  m.def("bias_grad(Tensor(a!) out, Tensor grad_output) -> ()");
  m.def(
      "max_pool2d(Tensor(a!) out, Tensor input, int[] kernel_size, int[] stride, int[] padding, int[] dilation) -> ()");
  m.def(
      "max_pool2d_taps(Tensor(a!) out, Tensor(b!) taps, Tensor input, int[] kernel_size, int[] stride, int[] padding, "
      "int[] dilation) -> ()");
  m.def(
      "max_pool2d_grad(Tensor(a!) grad_input, Tensor grad_output, Tensor taps, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation) -> ()");
  m.def(
      "batch_norm(Tensor(a!) out, Tensor(b!) mean, Tensor(c!) var, Tensor(d!)? positive, Tensor input, Tensor? weight, "
      "Tensor? bias, Tensor? residual, bool relu, float eps) -> ()");
  m.def(
      "batch_norm_grad(Tensor(a!) grad_input, Tensor(b!) grad_weight, Tensor(c!) grad_bias, Tensor(d!)? grad_residual, "
      "Tensor grad_output, Tensor input, Tensor? positive, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
      "bool relu, float eps) -> ()");
  m.def(
      "conv2d_batch_norm(Tensor(a!) out, Tensor(b!) product, Tensor(c!) mean, Tensor(d!) var, Tensor(e!)? positive, "
      "Tensor(f!)? running_mean, Tensor(g!)? running_var, Tensor(h!)? batches, Tensor input, Tensor values, Tensor "
      "crow_indices, "
      "Tensor col_indices, Tensor? weight, Tensor? bias, Tensor? residual, bool relu, float eps, float "
      "momentum, " GEOMETRY ") -> ()");
  m.def(
      "conv2d_batch_norm_grads(Tensor(a!) grad_input, Tensor(b!) grad_values, Tensor(c!) grad_weight, "
      "Tensor(d!) grad_bias, Tensor(e!)? grad_residual, Tensor(f!) grad_product, Tensor grad_output, Tensor product, "
      "Tensor? positive, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, Tensor input, Tensor values, "
      "Tensor crow_indices, Tensor col_indices, Tensor t_crow_indices, Tensor t_col_indices, Tensor t_permutation, "
      "Tensor? other, bool relu, float eps, " GEOMETRY ") -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sparsekit_cpu, CompositeExplicitAutograd, m) {
  m.impl("best_isa", TORCH_BOX(&sparsekit::best_isa_op));
  m.impl("set_isa", TORCH_BOX(&sparsekit::set_isa_op));
}

STABLE_TORCH_LIBRARY_IMPL(sparsekit_cpu, CPU, m) {
  m.impl("count_rows", TORCH_BOX(&sparsekit::count_rows_op));
  m.impl("fill_pattern", TORCH_BOX(&sparsekit::fill_pattern_op));
  m.impl("compress", TORCH_BOX(&sparsekit::compress_op));
  m.impl("decompress", TORCH_BOX(&sparsekit::decompress_op));
  m.impl("conv2d", TORCH_BOX(&sparsekit::conv2d_op));
  m.impl("conv2d_input_grad", TORCH_BOX(&sparsekit::conv2d_input_grad_op));
  m.impl("conv2d_values_grad", TORCH_BOX(&sparsekit::conv2d_values_grad_op));
  m.impl("conv2d_grads", TORCH_BOX(&sparsekit::conv2d_grads_op));
  m.impl("linear", TORCH_BOX(&sparsekit::linear_op));
  m.impl("linear_input_grad", TORCH_BOX(&sparsekit::linear_input_grad_op));
  m.impl("linear_values_grad", TORCH_BOX(&sparsekit::linear_values_grad_op));
  m.impl("bias_grad", TORCH_BOX(&sparsekit::bias_grad_op));
  m.impl("max_pool2d", TORCH_BOX(&sparsekit::max_pool2d_op));
  m.impl("max_pool2d_taps", TORCH_BOX(&sparsekit::max_pool2d_taps_op));
  m.impl("max_pool2d_grad", TORCH_BOX(&sparsekit::max_pool2d_grad_op));
  m.impl("batch_norm", TORCH_BOX(&sparsekit::batch_norm_op));
  m.impl("batch_norm_grad", TORCH_BOX(&sparsekit::batch_norm_grad_op));
  m.impl("conv2d_batch_norm", TORCH_BOX(&sparsekit::conv2d_batch_norm_op));
  m.impl("conv2d_batch_norm_grads", TORCH_BOX(&sparsekit::conv2d_batch_norm_grads_op));
}
