// Layers of an inference engine: a weight that never changes, kept packed, under a number that Python holds.
//
// A layer may be run by several threads at once, and outlives its number while somebody still runs it.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>

#include "arguments.h"
#include "cpu/conv2d.h"
#include "engine/registry.h"

namespace sparsekit {
namespace {

struct Layer {
  Layer(Tensor values, Tensor crow, Tensor col, int64_t columns)
      : values(values),
        crow(crow),
        col(col),
        columns(columns),
        weight(csr(crow, col, vector_data(values, "values", col.size(0)), columns, nullptr)),
        conv(weight) {}

  Tensor values, crow, col;  // own the memory of weight
  int64_t columns;
  Csr weight;
  FixedConv2d conv;
};

Registry<Layer>& layers() {
  static auto* const all = new Registry<Layer>("layer");
  return *all;
}

int64_t add_layer_op(Tensor values, Tensor crow, Tensor col, int64_t columns) {
  return layers().add(std::make_shared<Layer>(values, crow, col, columns));
}

void remove_layer_op(int64_t number) { layers().remove(number); }

void run(const Conv2dGeometry& g, int64_t number, const Tensor& out, const Images& x, const Images& y,
         const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, const Images& residual_images,
         double low, double high) {
  const auto layer = layers().at(number);
  STD_TORCH_CHECK(layer->weight.rows == g.out_channels, "the layer has ", layer->weight.rows, " output channels, not ",
                  g.out_channels);
  STD_TORCH_CHECK(layer->columns == g.in_channels / g.groups * g.kernel_h * g.kernel_w,
                  "input does not have the layer's channels");
  if (residual)
    STD_TORCH_CHECK(residual_images.image == y.image && residual_images.channel == y.channel &&
                        residual_images.row == y.row && residual_images.col == y.col &&
                        residual->numel() == out.numel(),
                    "residual must have the size and strides of out");
  if (empty(out)) return;
  layer->conv.run(g, x, y,
                  {bias ? vector_data(*bias, "bias", g.out_channels) : nullptr,
                   residual ? residual_images.data : nullptr, static_cast<float>(low), static_cast<float>(high)});
}

void run_conv2d_op(Tensor out, Tensor input, int64_t layer, std::optional<Tensor> bias, std::optional<Tensor> residual,
                   double low, double high, Ints kernel, Ints stride, Ints padding, Ints dilation, int64_t groups) {
  const Conv2dGeometry g = geometry(input, out, kernel, stride, padding, dilation, groups);
  run(g, layer, out, images(input, "input"), images(out, "out"), bias, residual,
      residual ? images(*residual, "residual") : Images{}, low, high);
}

void run_linear_op(Tensor out, Tensor input, int64_t layer, std::optional<Tensor> bias, std::optional<Tensor> residual,
                   double low, double high) {
  const Conv2dGeometry g = linear_geometry(input, out);
  run(g, layer, out, matrix(input, "input"), matrix(out, "out"), bias, residual,
      residual ? matrix(*residual, "residual") : Images{}, low, high);
}

}  // namespace
}  // namespace sparsekit

STABLE_TORCH_LIBRARY_FRAGMENT(sparsekit_cpu, m) {
  m.def("add_layer(Tensor values, Tensor crow_indices, Tensor col_indices, int columns) -> int");
  m.def("remove_layer(int layer) -> ()");
  m.def(
      "run_conv2d(Tensor(a!) out, Tensor input, int layer, Tensor? bias, Tensor? residual, float low, float high, "
      "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups) -> ()");
  m.def(
      "run_linear(Tensor(a!) out, Tensor input, int layer, Tensor? bias, Tensor? residual, float low, float high) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sparsekit_cpu, CompositeExplicitAutograd, m) {
  m.impl("remove_layer", TORCH_BOX(&sparsekit::remove_layer_op));
}

STABLE_TORCH_LIBRARY_IMPL(sparsekit_cpu, CPU, m) {
  m.impl("add_layer", TORCH_BOX(&sparsekit::add_layer_op));
  m.impl("run_conv2d", TORCH_BOX(&sparsekit::run_conv2d_op));
  m.impl("run_linear", TORCH_BOX(&sparsekit::run_linear_op));
}
