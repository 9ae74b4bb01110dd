// Programs of an inference engine under numbers that Python holds: built layer by layer, finished, then run.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <vector>

#include "arguments.h"
#include "engine/program.h"
#include "engine/registry.h"

namespace sparsekit {
namespace {

// A program, and what building it must not get wrong.
struct Building {
  Building(std::vector<Program::Size> tensors, std::vector<Program::Size> inputs, std::vector<Program::Size> outputs)
      : program(tensors, inputs, outputs), written(tensors.size()) {}

  Program program;
  std::vector<bool> written;    // per tensor
  std::vector<Tensor> weights;  // that the program will read
  bool finished = false;
};

Registry<Building>& programs() {
  static auto* const all = new Registry<Building>("program");
  return *all;
}

std::vector<Program::Size> sizes(const Ints& list, const char* name) {
  STD_TORCH_CHECK(list.size() % 3 == 0, name, " must be triples of channels, height and width");
  std::vector<Program::Size> sizes;
  for (size_t i = 0; i < list.size(); i += 3) {
    STD_TORCH_CHECK(list[i] > 0 && list[i + 1] > 0 && list[i + 2] > 0, name, " must be positive");
    sizes.push_back({list[i], list[i + 1], list[i + 2]});
  }
  return sizes;
}

int64_t add_program_op(Ints tensors, Ints inputs, Ints outputs) {
  return programs().add(
      std::make_shared<Building>(sizes(tensors, "tensors"), sizes(inputs, "inputs"), sizes(outputs, "outputs")));
}

void remove_program_op(int64_t number) { programs().remove(number); }

// The program, if it may still be added to.
std::shared_ptr<Building> open(int64_t number) {
  auto building = programs().at(number);
  STD_TORCH_CHECK(!building->finished, "program ", number, " is finished");
  return building;
}

Program::Size size_of(const Building& b, int64_t tensor) {
  const int64_t inputs = b.program.inputs().size(), tensors = b.written.size();
  STD_TORCH_CHECK(tensor >= -inputs && tensor < tensors, "there is no tensor ", tensor);
  return b.program.size(tensor);
}

void check_read(const Building& b, int64_t tensor) {
  size_of(b, tensor);
  STD_TORCH_CHECK(tensor < 0 || b.written[tensor], "tensor ", tensor, " is read before it is written");
}

// The last check of a layer: it counts as written from here on.
void check_write(Building& b, int64_t tensor) {
  STD_TORCH_CHECK(tensor >= 0, "an input cannot be written");
  STD_TORCH_CHECK(!b.written[tensor], "tensor ", tensor, " is written twice");
  b.written[tensor] = true;
}

void check_output(const Building& b, int64_t output, const Program::Size& size) {
  STD_TORCH_CHECK(output >= 0 && output < int64_t(b.program.outputs().size()), "there is no output ", output);
  STD_TORCH_CHECK(b.program.outputs()[output] == size, "output ", output, " does not have the size of what it gets");
}

void program_load_op(int64_t number, int64_t input, int64_t out) {
  const auto b = open(number);
  STD_TORCH_CHECK(input < 0, "input must be an input of the program");
  STD_TORCH_CHECK(size_of(*b, input) == size_of(*b, out), "out must have the size of input");
  check_write(*b, out);
  b->program.add_load(input, out);
}

void program_conv2d_op(int64_t number, int64_t input, int64_t out, int64_t residual, Tensor values, Tensor crow,
                       Tensor col, std::optional<Tensor> bias, double low, double high, Ints kernel, Ints stride,
                       Ints padding, Ints dilation, int64_t groups, bool dense, double channels, bool other_strips,
                       bool pairs) {
  const auto b = open(number);
  const Program::Size from = size_of(*b, input), to = size_of(*b, out);
  const Conv2dGeometry g = geometry({1, from.channels, from.h, from.w}, {1, to.channels, to.h, to.w}, kernel, stride,
                                    padding, dilation, groups);
  STD_TORCH_CHECK(!dense || groups == 1, "a dense layer must have one group, got ", groups);
  STD_TORCH_CHECK(channels > 0 && channels < 1e6, "channels must be a positive factor, got ", channels);
  const Csr weight = csr(crow, col, vector_data(values, "values", col.size(0)),
                         g.in_channels / groups * g.kernel_h * g.kernel_w, nullptr);
  STD_TORCH_CHECK(weight.rows == g.out_channels, "crow_indices must have out_channels + 1 elements");
  check_read(*b, input);
  if (residual != Program::kNone) {
    STD_TORCH_CHECK(residual >= 0, "residual must be a tensor of the program");
    check_read(*b, residual);
    STD_TORCH_CHECK(size_of(*b, residual) == to, "residual must have the size of out");
  }
  check_write(*b, out);
  b->weights.insert(b->weights.end(), {values, crow, col});
  b->program.add_conv2d(g, weight, dense, input, out, residual,
                        {bias ? vector_data(*bias, "bias", g.out_channels) : nullptr, nullptr, static_cast<float>(low),
                         static_cast<float>(high)},
                        {channels, other_strips, pairs});
}

void program_max_pool2d_op(int64_t number, int64_t input, int64_t out, Ints kernel, Ints stride, Ints padding,
                           Ints dilation) {
  const auto b = open(number);
  const Program::Size from = size_of(*b, input), to = size_of(*b, out);
  const Pool2dGeometry g = pool_geometry({1, from.channels, from.h, from.w}, {1, to.channels, to.h, to.w}, kernel,
                                         stride, padding, dilation);
  check_read(*b, input);
  check_write(*b, out);
  b->program.add_max_pool2d(g, input, out);
}

void program_avg_pool2d_op(int64_t number, int64_t input, int64_t out, Ints kernel, Ints stride, Ints padding,
                           bool count_padding) {
  const auto b = open(number);
  STD_TORCH_CHECK(input >= 0, "input must be a tensor of the program");
  const Program::Size from = size_of(*b, input), to = size_of(*b, out);
  const Pool2dGeometry g =
      pool_geometry({1, from.channels, from.h, from.w}, {1, to.channels, to.h, to.w}, kernel, stride, padding, {1, 1});
  check_read(*b, input);
  check_write(*b, out);
  b->program.add_avg_pool2d(g, count_padding, input, out);
}

void program_mean_op(int64_t number, int64_t input, int64_t out) {
  const auto b = open(number);
  STD_TORCH_CHECK(input >= 0, "input must be a tensor of the program");
  const Program::Size from = size_of(*b, input);
  check_read(*b, input);
  STD_TORCH_CHECK((size_of(*b, out) == Program::Size{from.channels, 1, 1}), "out must have one pixel a channel");
  check_write(*b, out);
  b->program.add_mean(input, out);
}

std::vector<float> copied(const std::optional<Tensor>& t, const char* name, int64_t size) {
  if (!t) return {};
  const float* const data = vector_data(*t, name, size);
  return {data, data + size};
}

void program_elementwise_op(int64_t number, int64_t input, int64_t out, int64_t gate, int64_t other,
                            std::optional<Tensor> scale, std::optional<Tensor> shift, double low, double high,
                            int64_t activation) {
  const auto b = open(number);
  const Program::Size size = size_of(*b, input);
  for (int64_t tensor : {input, gate, other}) {
    STD_TORCH_CHECK(tensor >= 0, "input, gate and other must be tensors of the program");
    if (tensor == Program::kNone) continue;
    check_read(*b, tensor);
    const Program::Size wanted = tensor == gate ? Program::Size{size.channels, 1, 1} : size;
    STD_TORCH_CHECK(size_of(*b, tensor) == wanted, "gate must have one pixel a channel, other the size of input");
  }
  STD_TORCH_CHECK(input != Program::kNone && size_of(*b, out) == size, "out must have the size of input");
  STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int64_t>(Activation::hardswish),
                  "there is no activation ", activation);
  Program::Elementwise e{copied(scale, "scale", size.channels),
                         copied(shift, "shift", size.channels),
                         gate,
                         other,
                         static_cast<float>(low),
                         static_cast<float>(high),
                         static_cast<Activation>(activation)};
  check_write(*b, out);
  b->program.add_elementwise(std::move(e), input, out);
}

void program_gather_op(int64_t number, Ints inputs, Ints channels, int64_t out) {
  const auto b = open(number);
  const Program::Size size = size_of(*b, out);
  int64_t count = 0;
  for (int64_t input : inputs) {
    STD_TORCH_CHECK(input >= 0, "inputs must be tensors of the program");
    const Program::Size from = size_of(*b, input);
    STD_TORCH_CHECK(from.h == size.h && from.w == size.w, "inputs must have the height and width of out");
    check_read(*b, input);
    count += from.channels;
  }
  STD_TORCH_CHECK(int64_t(channels.size()) == size.channels, "channels must be as many as out has");
  for (int64_t c : channels) STD_TORCH_CHECK(c >= 0 && c < count, "channels must lie in [0, ", count, "), got ", c);
  check_write(*b, out);
  b->program.add_gather(inputs, channels, out);
}

void program_store_op(int64_t number, int64_t input, int64_t output) {
  const auto b = open(number);
  STD_TORCH_CHECK(input >= 0, "input must be a tensor of the program");
  const Program::Size from = size_of(*b, input);
  check_read(*b, input);
  check_output(*b, output, from);
  b->program.add_store(input, output);
}

void finish_program_op(int64_t number, bool single) {
  const auto b = open(number);
  b->finished = true;
  b->program.finish(single);
  b->weights.clear();
}

std::shared_ptr<Building> finished(int64_t number) {
  const auto b = programs().at(number);
  STD_TORCH_CHECK(b->finished, "program ", number, " is not finished");
  return b;
}

// The values of a layer's weight; false if they are not there to be read.
bool program_values_op(Tensor values, int64_t number, int64_t layer, Tensor crow, Tensor col) {
  const auto b = finished(number);
  check_vector(values, "values", kFloat, col.size(0));
  const Csr weight = csr(crow, col, nullptr, INT32_MAX, nullptr);
  return b->program.values(layer, weight, static_cast<float*>(values.mutable_data_ptr()));
}

bool program_holds_op(int64_t number, int64_t layer, Tensor crow, Tensor col) {
  return finished(number)->program.holds(layer, csr(crow, col, nullptr, INT32_MAX, nullptr));
}

int64_t program_floats_op(int64_t number) { return programs().at(number)->program.floats(); }

std::vector<Images> checked(const std::vector<Tensor>& tensors, const std::vector<Program::Size>& sizes, int64_t batch,
                            const char* name) {
  STD_TORCH_CHECK(tensors.size() == sizes.size(), "the program has ", sizes.size(), " ", name, ", not ",
                  tensors.size());
  std::vector<Images> all;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const Tensor& t = tensors[i];
    all.push_back(images(t, name));
    STD_TORCH_CHECK(
        t.size(0) == batch && t.size(1) == sizes[i].channels && t.size(2) == sizes[i].h && t.size(3) == sizes[i].w,
        name, " ", i, " does not have the program's size");
    STD_TORCH_CHECK(all.back().col == 1 || all.back().channel == 1 || t.size(3) == 1, name, " ", i,
                    " must be NCHW or channels_last");
  }
  return all;
}

void run_program_op(std::vector<Tensor> outputs, std::vector<Tensor> inputs, int64_t number, bool share,
                    std::optional<Tensor> seconds) {
  const auto b = finished(number);
  STD_TORCH_CHECK(!inputs.empty() && inputs[0].dim() == 4, "inputs must have 4 dimensions");
  const int64_t batch = inputs[0].size(0);
  const auto from = checked(inputs, b->program.inputs(), batch, "inputs");
  const auto to = checked(outputs, b->program.outputs(), batch, "outputs");
  double* to_seconds = nullptr;
  if (seconds) {
    STD_TORCH_CHECK(seconds->scalar_type() == torch::headeronly::ScalarType::Double && seconds->dim() == 1 &&
                        seconds->is_contiguous() && seconds->size(0) == b->program.layers(),
                    "seconds must be float64 [", b->program.layers(), "]");
    to_seconds = static_cast<double*>(seconds->mutable_data_ptr());
  }
  b->program.run(from, to, batch, share, to_seconds);
}

}  // namespace
}  // namespace sparsekit

STABLE_TORCH_LIBRARY_FRAGMENT(sparsekit_cpu, m) {
  m.def("add_program(int[] tensors, int[] inputs, int[] outputs) -> int");
  m.def("remove_program(int program) -> ()");
  m.def("program_load(int program, int input, int out) -> ()");
  m.def(
      "program_conv2d(int program, int input, int out, int residual, Tensor values, Tensor crow_indices, Tensor "
      "col_indices, Tensor? bias, float low, float high, int[] kernel_size, int[] stride, int[] padding, int[] "
      "dilation, int groups, bool dense, float channels, bool other_strips, bool pairs) -> ()");
  m.def(
      "program_max_pool2d(int program, int input, int out, int[] kernel_size, int[] stride, int[] padding, int[] "
      "dilation) -> ()");
  m.def(
      "program_avg_pool2d(int program, int input, int out, int[] kernel_size, int[] stride, int[] padding, bool "
      "count_padding) -> ()");
  m.def("program_mean(int program, int input, int out) -> ()");
  m.def(
      "program_elementwise(int program, int input, int out, int gate, int other, Tensor? scale, Tensor? shift, float "
      "low, float high, int activation) -> ()");
  m.def("program_gather(int program, int[] inputs, int[] channels, int out) -> ()");
  m.def("program_store(int program, int input, int output) -> ()");
  m.def("finish_program(int program, bool single) -> ()");
  m.def("program_floats(int program) -> int");
  m.def("program_values(Tensor(a!) values, int program, int layer, Tensor crow_indices, Tensor col_indices) -> bool");
  m.def("program_holds(int program, int layer, Tensor crow_indices, Tensor col_indices) -> bool");
  m.def("run_program(Tensor(a!)[] outputs, Tensor[] inputs, int program, bool share, Tensor(b!)? seconds) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sparsekit_cpu, CompositeExplicitAutograd, m) {
  m.impl("add_program", TORCH_BOX(&sparsekit::add_program_op));
  m.impl("remove_program", TORCH_BOX(&sparsekit::remove_program_op));
  m.impl("program_load", TORCH_BOX(&sparsekit::program_load_op));
  m.impl("program_max_pool2d", TORCH_BOX(&sparsekit::program_max_pool2d_op));
  m.impl("program_avg_pool2d", TORCH_BOX(&sparsekit::program_avg_pool2d_op));
  m.impl("program_mean", TORCH_BOX(&sparsekit::program_mean_op));
  m.impl("program_elementwise", TORCH_BOX(&sparsekit::program_elementwise_op));
  m.impl("program_gather", TORCH_BOX(&sparsekit::program_gather_op));
  m.impl("program_store", TORCH_BOX(&sparsekit::program_store_op));
  m.impl("program_floats", TORCH_BOX(&sparsekit::program_floats_op));
  m.impl("finish_program", TORCH_BOX(&sparsekit::finish_program_op));
}

STABLE_TORCH_LIBRARY_IMPL(sparsekit_cpu, CPU, m) {
  m.impl("program_conv2d", TORCH_BOX(&sparsekit::program_conv2d_op));
  m.impl("program_values", TORCH_BOX(&sparsekit::program_values_op));
  m.impl("program_holds", TORCH_BOX(&sparsekit::program_holds_op));
  m.impl("run_program", TORCH_BOX(&sparsekit::run_program_op));
}
