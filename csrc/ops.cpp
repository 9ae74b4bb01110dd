// The torch side of the CPU kernels, on PyTorch's stable ABI. Outputs are given by the caller; contracts: _ops.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "arguments.h"
#include "cpu/batch_norm.h"
#include "cpu/conv2d.h"
#include "cpu/linear.h"
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

// bits: where other, which is NCHW then, counts; null: everywhere.
void run_grads(const Conv2dGeometry& g, const Tensor& grad_input, Tensor grad_values, const Tensor& grad_output,
               const Tensor& input, const Tensor& values, const Tensor& crow, const Tensor& col, const Tensor& t_crow,
               const Tensor& t_col, const Tensor& t_permutation, const std::optional<Tensor>& other,
               const uint8_t* bits) {
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
    conv2d_grads(g, weight, weight_t, {other ? added.data : nullptr, bits}, dy, x, dx, grad);
}

void conv2d_grads_op(Tensor grad_input, Tensor grad_values, Tensor grad_output, Tensor input, Tensor values,
                     Tensor crow, Tensor col, Tensor t_crow, Tensor t_col, Tensor t_permutation,
                     std::optional<Tensor> other, Ints kernel, Ints stride, Ints padding, Ints dilation,
                     int64_t groups) {
  run_grads(geometry(input, grad_output, kernel, stride, padding, dilation, groups), grad_input, grad_values,
            grad_output, input, values, crow, col, t_crow, t_col, t_permutation, other, nullptr);
}

void linear_op(Tensor out, Tensor input, Tensor values, Tensor crow, Tensor col, std::optional<Tensor> bias) {
  const Conv2dGeometry g = linear_geometry(input, out);
  run_forward(g, out, matrix(input, "input"), matrix(out, "out"), values, crow, col, bias);
}

void dense_linear_op(Tensor out, Tensor input, Tensor weight, std::optional<Tensor> bias) {
  const Conv2dGeometry g = linear_geometry(input, out);
  const Images w = matrix(weight, "weight");
  STD_TORCH_CHECK(weight.size(0) == g.out_channels && weight.size(1) == g.in_channels, "weight must be [",
                  g.out_channels, ", ", g.in_channels, "], got [", weight.size(0), ", ", weight.size(1), "]");
  const float* const b = bias ? vector_data(*bias, "bias", g.out_channels) : nullptr;
  if (!empty(out))
    dense_linear(g.in_w, g.in_channels, g.out_channels, matrix(input, "input").data, w.data, b,
                 matrix(out, "out").data);
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
  return t ? bytes(*t, name, norm.batch * norm.channels * bit_bytes(norm.pixels)) : nullptr;
}

void batch_norm_op(Tensor out, Tensor mean, Tensor var, std::optional<Tensor> positive, Tensor input,
                   std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> residual, bool relu,
                   double eps) {
  const BatchNorm norm = norm_of(input, weight, bias, mean, var, relu, eps);
  const ImageSize size = image_size(input, "input");
  batch_norm(norm, planes(input, "input", size), residual ? planes(*residual, "residual", size) : nullptr,
             planes(out, "out", size), bits(positive, "positive", norm));
}

NormGrads norm_grads(const Tensor& grad_input, const Tensor& grad_weight, const Tensor& grad_bias, const Tensor& input,
                     const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const Tensor& mean,
                     const Tensor& var, bool relu, double eps) {
  const BatchNorm norm = norm_of(input, weight, bias, mean, var, relu, eps);
  const ImageSize size = image_size(input, "input");
  return {norm, planes(input, "input", size), planes(grad_input, "grad_input", size),
          channel_data(grad_weight, "grad_weight", norm.channels), channel_data(grad_bias, "grad_bias", norm.channels)};
}

void batch_norm_grad_op(Tensor grad_input, Tensor grad_weight, Tensor grad_bias, std::optional<Tensor> grad_residual,
                        Tensor grad_output, Tensor input, std::optional<Tensor> positive, std::optional<Tensor> weight,
                        std::optional<Tensor> bias, Tensor mean, Tensor var, bool relu, double eps) {
  const ImageSize size = image_size(input, "input");
  const NormGrads grads = norm_grads(grad_input, grad_weight, grad_bias, input, weight, bias, mean, var, relu, eps);
  batch_norm_grad(grads, nullptr, planes(grad_output, "grad_output", size), bits(positive, "positive", grads.norm),
                  grad_residual ? planes(*grad_residual, "grad_residual", size) : nullptr);
}

void batch_norm_max_pool2d_op(Tensor out, Tensor mean, Tensor var, Tensor taps, Tensor input,
                              std::optional<Tensor> weight, std::optional<Tensor> bias, bool relu, double eps,
                              Ints kernel, Ints stride, Ints padding, Ints dilation) {
  const ImageSize size = image_size(input, "input"), out_size = image_size(out, "out");
  const Pool2dGeometry g = pool_geometry(size, out_size, kernel, stride, padding, dilation);
  STD_TORCH_CHECK(g.kernel_h * g.kernel_w <= kMostTaps, "kernel_size must have at most ", kMostTaps, " taps");
  batch_norm_max_pool2d(norm_of(input, weight, bias, mean, var, relu, eps), g, planes(input, "input", size),
                        planes(out, "out", out_size), bytes(taps, "taps", out.numel()));
}

void batch_norm_max_pool2d_grad_op(Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_output,
                                   Tensor taps, Tensor input, std::optional<Tensor> weight, std::optional<Tensor> bias,
                                   Tensor mean, Tensor var, bool relu, double eps, Ints kernel, Ints stride,
                                   Ints padding, Ints dilation) {
  const ImageSize size = image_size(input, "input"), out_size = image_size(grad_output, "grad_output");
  const BatchNorm norm = norm_of(input, weight, bias, mean, var, relu, eps);
  batch_norm_max_pool2d_grad(norm, pool_geometry(size, out_size, kernel, stride, padding, dilation),
                             planes(grad_output, "grad_output", out_size), bytes(taps, "taps", grad_output.numel()),
                             planes(input, "input", size), planes(grad_input, "grad_input", size),
                             channel_data(grad_weight, "grad_weight", norm.channels),
                             channel_data(grad_bias, "grad_bias", norm.channels));
}

using Tensors = std::vector<Tensor>;
using Floats = std::vector<double>;

// Convolutions, each with the BatchNorm behind it, that read what comes from outside and each other's results. One call
// for all of them: what lies between two calls, Python and the dispatcher, finds its code and data gone from the
// caches, and costs as much as a small layer.
struct Network {
  // Sources are what comes from outside, then the results of the layers; a residual of -1 is none.
  const Ints &inputs, &residuals, &relus;
  const Ints& geometries;  // of a layer kernel_size, stride, padding, dilation, groups

  static constexpr size_t kGeometry = 11;

  int64_t size() const { return inputs.size(); }

  // counts: of lists with one entry a layer; maybe: of those that may also have none.
  void check(int64_t outside, std::initializer_list<size_t> counts, std::initializer_list<size_t> maybe) const {
    const size_t layers = inputs.size();
    bool fits =
        layers > 0 && residuals.size() == layers && relus.size() == layers && geometries.size() == layers * kGeometry;
    for (size_t count : counts) fits &= count == layers;
    for (size_t count : maybe) fits &= count == layers || count == 0;
    STD_TORCH_CHECK(fits, "there must be one of everything for each of ", layers, " layers");
    for (int64_t i = 0; i < size(); ++i)
      STD_TORCH_CHECK(inputs[i] >= 0 && inputs[i] < outside + i && residuals[i] >= -1 && residuals[i] < outside + i,
                      "layer ", i, " must read what was there before it");
  }

  Conv2dGeometry geometry(int64_t layer, const Tensor& x, const Tensor& y) const {
    const int64_t* g = geometries.data() + layer * kGeometry;
    return sparsekit::geometry(x, y, {g[0], g[1]}, {g[2], g[3]}, {g[4], g[5], g[6], g[7]}, {g[8], g[9]}, g[10]);
  }

  bool has_bits(int64_t layer) const { return relus[layer] && residuals[layer] >= 0; }

  // Whether a layer's result is but a residual, before any ReLU: it is normalized where it is added.
  bool is_branch(int64_t layer, int64_t outside) const {
    bool reads = false;
    for (int64_t source : inputs) reads |= source == outside + layer;
    return !reads && !relus[layer] && residuals[layer] < 0 &&
           std::count(residuals.begin(), residuals.end(), outside + layer) == 1;
  }

  // The layer whose branch is the residual of another; -1 if it is none.
  int64_t branch_of(int64_t layer, int64_t outside) const {
    const int64_t from = residuals[layer] - outside;
    return from >= 0 && is_branch(from, outside) ? from : -1;
  }
};

std::optional<Tensor> one_of(const Tensors& tensors, int64_t i) {
  return tensors.empty() ? std::nullopt : std::optional(tensors[i]);
}

void conv2d_batch_norms_op(Tensors outs, Tensors products, Tensors means, Tensors vars, Tensors positives,
                           Tensors running_means, Tensors running_vars, Tensors batches, Tensors outside,
                           Tensors values, Tensors crows, Tensors cols, Tensors weights, Tensors biases, Ints inputs,
                           Ints residuals, Ints relus, Floats eps, Floats momentums, Ints geometries) {
  const Network network{inputs, residuals, relus, geometries};
  network.check(outside.size(),
                {outs.size(), products.size(), means.size(), vars.size(), values.size(), crows.size(), cols.size(),
                 eps.size(), momentums.size()},
                {weights.size(), biases.size(), running_means.size(), running_vars.size(), batches.size()});
  auto norm_at = [&](int64_t i) {
    return norm_of(products[i], one_of(weights, i), one_of(biases, i), means[i], vars[i], relus[i], eps[i]);
  };
  auto run_update = [&](int64_t i) {
    if (running_means.empty() || running_vars.empty() || batches.empty()) return;
    const Tensor& counted = batches[i];
    STD_TORCH_CHECK(
        counted.is_cpu() && counted.scalar_type() == torch::headeronly::ScalarType::Long && counted.numel() == 1,
        "batches must be one int64 on the CPU");
    const BatchNorm norm = norm_at(i);
    update({channel_data(running_means[i], "running_means", norm.channels),
            channel_data(running_vars[i], "running_vars", norm.channels), static_cast<int64_t*>(counted.data_ptr())},
           norm, momentums[i]);
  };
  Tensors sources = outside;
  size_t bits_used = 0;
  for (int64_t i = 0; i < network.size(); ++i) {
    const Tensor &input = sources[inputs[i]], &product = products[i];
    std::optional<Tensor> residual, positive;
    if (residuals[i] >= 0) residual = sources[residuals[i]];
    if (network.has_bits(i)) {
      STD_TORCH_CHECK(bits_used < positives.size(), "a ReLU of a sum with a residual needs positives");
      positive = positives[bits_used++];
    }
    run_forward(network.geometry(i, input, product), product, images(input, "input"), images(product, "product"),
                values[i], crows[i], cols[i], std::nullopt);
    sources.push_back(outs[i]);
    if (network.is_branch(i, outside.size())) continue;
    const ImageSize size = image_size(product, "product");
    const BatchNorm norm = norm_at(i);
    const int64_t from = network.branch_of(i, outside.size());
    if (from >= 0) {
      const BatchNorm branch = norm_at(from);
      batch_norm_sum(norm, planes(product, "product", size), &branch, planes(products[from], "product", size),
                     planes(outs[i], "out", size), bits(positive, "positive", norm));
      run_update(from);
    } else {
      batch_norm(norm, planes(product, "product", size), residual ? planes(*residual, "residual", size) : nullptr,
                 planes(outs[i], "out", size), bits(positive, "positive", norm));
    }
    run_update(i);
  }
}

// grad_outside: the gradients of what comes from outside, all of which some layer must read. read: every layer's input.
// other: what is added to the gradient of the first from outside.
void conv2d_batch_norms_grads_op(Tensors grad_outside, Tensors grad_values, Tensors grad_weights, Tensors grad_biases,
                                 std::optional<Tensor> other, Tensor grad_output, Tensors read, Tensors products,
                                 Tensors means, Tensors vars, Tensors positives, Tensors values, Tensors crows,
                                 Tensors cols, Tensors t_crows, Tensors t_cols, Tensors t_permutations, Tensors weights,
                                 Tensors biases, Ints inputs, Ints residuals, Ints relus, Floats eps, Ints geometries) {
  const Network network{inputs, residuals, relus, geometries};
  const int64_t outside = grad_outside.size();
  network.check(outside,
                {grad_values.size(), grad_weights.size(), grad_biases.size(), read.size(), products.size(),
                 means.size(), vars.size(), values.size(), crows.size(), cols.size(), t_crows.size(), t_cols.size(),
                 t_permutations.size(), eps.size()},
                {weights.size(), biases.size()});
  // The sum of a source's gradients; with bits, only where they are 1; or already that of a branch's product.
  struct Sum {
    std::optional<Tensor> grad, bits;
    bool ours = false;  // may be added to
    std::optional<Tensor> of_product;
  };
  std::vector<Sum> sums(outside + network.size());
  if (other) sums[0].grad = other;
  sums.back().grad = grad_output;
  // The layer after which, of those before `layer`, the sum of a source's gradients is complete; -1: it is already.
  auto next_of = [&](int64_t source, int64_t layer) {
    while (--layer >= 0 && inputs[layer] != source && residuals[layer] != source) {
    }
    return layer;
  };
  auto target = [&](int64_t source, const Tensor& like) {
    return source < outside ? grad_outside[source] : torch::stable::empty_like(like);
  };
  // Whether what comes next of a residual's source can do without what BatchNorm's gradient would write of it.
  auto takes_bits = [&](int64_t source, int64_t layer) {
    const int64_t next = next_of(source, layer);
    if (source >= outside || next < 0 || inputs[next] != source) return false;
    return adds_by_bits(network.geometry(next, read[next], products[next]), images(products[next], "product"),
                        images(read[next], "read"));
  };
  auto grads_at = [&](int64_t i, const Tensor& of_product) {
    return norm_grads(of_product, grad_weights[i], grad_biases[i], products[i], one_of(weights, i), one_of(biases, i),
                      means[i], vars[i], relus[i], eps[i]);
  };
  size_t bits_left = positives.size();
  for (int64_t i = network.size() - 1; i >= 0; --i) {
    const Sum sum = sums[outside + i];
    sums[outside + i] = {};
    STD_TORCH_CHECK(sum.grad || sum.of_product, "layer ", i, " has no gradient");
    std::optional<Tensor> positive, of_residual;
    if (network.has_bits(i)) {
      STD_TORCH_CHECK(bits_left > 0, "a ReLU of a sum with a residual needs positives");
      positive = positives[--bits_left];
    }
    const int64_t from = network.branch_of(i, outside);
    if (from < 0 && residuals[i] >= 0) {
      Sum& residual = sums[residuals[i]];
      STD_TORCH_CHECK(!residual.grad, "no layer after layer ", i, " may read its residual");
      if (positive && takes_bits(residuals[i], i))
        residual = {sum.grad, positive, false, std::nullopt};
      else
        residual.ours = true, residual.grad = of_residual = target(residuals[i], products[i]);
    }
    Tensor of_product = sum.of_product ? *sum.of_product : torch::stable::empty_like(products[i]);
    if (!sum.of_product) {
      const ImageSize size = image_size(products[i], "product");
      const NormGrads grads = grads_at(i, of_product);
      std::optional<NormGrads> branch;
      if (from >= 0) {
        STD_TORCH_CHECK(image_size(products[from], "product") == size,
                        "a branch must have the size of what it is added to");
        sums[outside + from].of_product = torch::stable::empty_like(products[from]);
        branch = grads_at(from, *sums[outside + from].of_product);
      }
      batch_norm_grad(grads, branch ? &*branch : nullptr, planes(*sum.grad, "grad_output", size),
                      bits(positive, "positive", grads.norm),
                      of_residual ? planes(*of_residual, "grad_residual", size) : nullptr);
    }
    Sum& input = sums[inputs[i]];
    const bool adds = input.grad && !input.bits && input.ours;
    const Tensor grad = adds ? *input.grad : target(inputs[i], read[i]);
    const ImageSize size = image_size(read[i], "read");
    const int64_t byte_count = size[0] * size[1] * bit_bytes(size[2] * size[3]);
    run_grads(network.geometry(i, read[i], of_product), grad, grad_values[i], of_product, read[i], values[i], crows[i],
              cols[i], t_crows[i], t_cols[i], t_permutations[i], input.grad,
              input.bits ? bytes(*input.bits, "positive", byte_count) : nullptr);
    input = {grad, std::nullopt, true, std::nullopt};
  }
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
  m.def("dense_linear(Tensor(a!) out, Tensor input, Tensor weight, Tensor? bias) -> ()");
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
      "batch_norm_max_pool2d(Tensor(a!) out, Tensor(b!) mean, Tensor(c!) var, Tensor(d!) taps, Tensor input, "
      "Tensor? weight, Tensor? bias, bool relu, float eps, int[] kernel_size, int[] stride, int[] padding, "
      "int[] dilation) -> ()");
  m.def(
      "batch_norm_max_pool2d_grad(Tensor(a!) grad_input, Tensor(b!) grad_weight, Tensor(c!) grad_bias, "
      "Tensor grad_output, Tensor taps, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
      "bool relu, float eps, int[] kernel_size, int[] stride, int[] padding, int[] dilation) -> ()");
  m.def(
      "conv2d_batch_norms(Tensor(a!)[] outs, Tensor(b!)[] products, Tensor(c!)[] means, Tensor(d!)[] vars, "
      "Tensor(e!)[] positives, Tensor(f!)[] running_means, Tensor(g!)[] running_vars, Tensor(h!)[] batches, "
      "Tensor[] outside, Tensor[] values, Tensor[] crow_indices, Tensor[] col_indices, Tensor[] weights, "
      "Tensor[] biases, int[] inputs, int[] residuals, int[] relus, float[] eps, float[] momentums, int[] geometries) "
      "-> ()");
  m.def(
      "conv2d_batch_norms_grads(Tensor(a!)[] grad_outside, Tensor(b!)[] grad_values, Tensor(c!)[] grad_weights, "
      "Tensor(d!)[] grad_biases, Tensor? other, Tensor grad_output, Tensor[] read, Tensor[] products, Tensor[] means, "
      "Tensor[] vars, Tensor[] positives, Tensor[] values, Tensor[] crow_indices, Tensor[] col_indices, "
      "Tensor[] t_crow_indices, Tensor[] t_col_indices, Tensor[] t_permutation, Tensor[] weights, Tensor[] biases, "
      "int[] inputs, int[] residuals, int[] relus, float[] eps, int[] geometries) -> ()");
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
  m.impl("dense_linear", TORCH_BOX(&sparsekit::dense_linear_op));
  m.impl("linear_input_grad", TORCH_BOX(&sparsekit::linear_input_grad_op));
  m.impl("linear_values_grad", TORCH_BOX(&sparsekit::linear_values_grad_op));
  m.impl("bias_grad", TORCH_BOX(&sparsekit::bias_grad_op));
  m.impl("max_pool2d", TORCH_BOX(&sparsekit::max_pool2d_op));
  m.impl("max_pool2d_taps", TORCH_BOX(&sparsekit::max_pool2d_taps_op));
  m.impl("max_pool2d_grad", TORCH_BOX(&sparsekit::max_pool2d_grad_op));
  m.impl("batch_norm", TORCH_BOX(&sparsekit::batch_norm_op));
  m.impl("batch_norm_grad", TORCH_BOX(&sparsekit::batch_norm_grad_op));
  m.impl("batch_norm_max_pool2d", TORCH_BOX(&sparsekit::batch_norm_max_pool2d_op));
  m.impl("batch_norm_max_pool2d_grad", TORCH_BOX(&sparsekit::batch_norm_max_pool2d_grad_op));
  m.impl("conv2d_batch_norms", TORCH_BOX(&sparsekit::conv2d_batch_norms_op));
  m.impl("conv2d_batch_norms_grads", TORCH_BOX(&sparsekit::conv2d_batch_norms_grads_op));
}
