// The ops of torch.ops.sparsekit_cuda: arguments checked, turned into walks, and run on the current stream. Signatures
// are those of sparsekit_cpu, but for the epilogue of conv2d and the tiling. Indices are trusted: they are on the
// place.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <optional>

#include "arguments.h"
#include "cuda/kernels.h"
#include "cuda/walks.h"

namespace sparsekit::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Type::kFloat;
    case ScalarType::Half:
      return Type::kHalf;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "the CUDA kernels take float32, float16 and bfloat16");
  }
}

// Looked up when first needed, so that a build with CUDA loads under a torch without it.
using GetStream = AOTITorchError (*)(int32_t device, void** stream);

GetStream find_get_stream() {
  void* const torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return torch_cuda ? reinterpret_cast<GetStream>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
}

// Place of `first`, which all tensors of an op share, made current for as long as this lives, and its current stream.
struct Place {
  explicit Place(const Tensor& first) : index(first.get_device_index()), guard(index), like(first) {
    static const GetStream get_stream = find_get_stream();
    STD_TORCH_CHECK(get_stream, "this torch was built without CUDA");
    STABLE_TORCH_ERROR_CODE_CHECK(get_stream(index, &stream));
  }

  // What the kernels ask about the device; it does not change.
  cuda::Device device() const {
    static std::mutex mutex;
    static std::map<int32_t, cuda::Device> known;
    const std::lock_guard lock(mutex);
    const auto found = known.find(index);
    return found != known.end() ? found->second : known.emplace(index, device_of(index)).first->second;
  }

  void* data(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == index, name, " must be on the device of the others");
    STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of the others");
    STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
    STD_TORCH_CHECK(t.numel() <= std::numeric_limits<int32_t>::max(), name, " has more than 2^31 - 1 elements");
    return t.data_ptr();
  }

  void* vector(const Tensor& t, const char* name, int64_t size) const {
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size, name, " must be [", size, "]");
    return data(t, name);
  }

  const int32_t* indices(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(
        t.is_cuda() && t.get_device_index() == index && t.scalar_type() == kInt && t.dim() == 1 && t.is_contiguous(),
        name, " must be a contiguous int32 vector on the device of the others");
    return static_cast<const int32_t*>(t.data_ptr());
  }

  int32_t index;
  torch::stable::accelerator::DeviceGuard guard;
  const Tensor& like;
  void* stream = nullptr;
};

void check(int error) { STD_TORCH_CHECK(error == 0, "CUDA: ", error_string(error)); }

Weight weight_of(const Place& place, const Tensor& crow, const Tensor& col, const Tensor* permutation,
                 const Tensor* values, int64_t rows) {
  STD_TORCH_CHECK(crow.dim() == 1 && crow.size(0) == rows + 1, "crow_indices must have ", rows + 1, " elements");
  return {place.indices(crow, "crow_indices"),
          place.indices(col, "col_indices"),
          permutation ? place.indices(*permutation, "t_permutation") : nullptr,
          values ? place.vector(*values, "values", col.size(0)) : nullptr,
          static_cast<int32_t>(rows),
          static_cast<int32_t>(col.size(0))};
}

Tiling tiling_of(int64_t slots, int64_t rows) {
  const bool known_slots = slots == 0 || slots == 2 || slots == 4 || slots == 7 || slots == 8;
  const bool known_rows = rows == 0 || rows == 1 || rows == 2 || rows == 4 || rows == 8 || rows == 16;
  STD_TORCH_CHECK(known_slots && known_rows && slots * rows <= 32,
                  "slots must be 2, 4, 7 or 8 and rows 1, 2, 4, 8 or 16, with a product of at most 32, or 0 for the "
                  "kernel's own choice; got ",
                  slots, " and ", rows);
  return {static_cast<int>(slots), static_cast<int>(rows)};
}

void check_taps(const Conv2dGeometry& g) {
  STD_TORCH_CHECK(g.kernel_h * g.kernel_w <= kMaxTaps, "the CUDA kernels take kernels of up to ", kMaxTaps,
                  " taps, got ", g.kernel_h, " x ", g.kernel_w);
}

void conv2d_op(Tensor out, Tensor input, Tensor values, Tensor crow, Tensor col, std::optional<Tensor> bias,
               std::optional<Tensor> residual, bool relu, Ints kernel, Ints stride, Ints padding, Ints dilation,
               int64_t groups, int64_t slots, int64_t rows) {
  const Conv2dGeometry g = geometry(input, out, kernel, stride, padding, dilation, groups);
  const Place place(input);
  const Weight weight = weight_of(place, crow, col, nullptr, &values, g.out_channels);
  const void* b = bias ? place.vector(*bias, "bias", g.out_channels) : nullptr;
  if (residual) STD_TORCH_CHECK(image_size(*residual, "residual") == image_size(out, "out"), "residual must fit out");
  const void* r = residual ? place.data(*residual, "residual") : nullptr;
  const void* x = place.data(input, "input");
  void* y = place.data(out, "out");
  check_taps(g);
  if (empty(out)) return;
  const Walk w = forward(g);
  check(gather(type_of(out), w, weight, x, b, r, relu, y, tiling_of(slots, rows), place.device(), place.stream));
}

void conv2d_input_grad_op(Tensor out, Tensor grad_output, Tensor values, Tensor t_crow, Tensor t_col,
                          Tensor t_permutation, Ints kernel, Ints stride, Ints padding, Ints dilation, int64_t groups,
                          int64_t slots, int64_t rows) {
  const Conv2dGeometry g = geometry(out, grad_output, kernel, stride, padding, dilation, groups);
  const Place place(grad_output);
  const Weight weight = weight_of(place, t_crow, t_col, &t_permutation, &values, g.in_channels);
  STD_TORCH_CHECK(t_permutation.size(0) == t_col.size(0), "t_permutation must be [nnz]");
  const void* dy = place.data(grad_output, "grad_output");
  void* dx = place.data(out, "out");
  check_taps(g);
  if (empty(out)) return;
  for (const Walk& w : backward(g))
    check(gather(type_of(out), w, weight, dy, nullptr, nullptr, false, dx, tiling_of(slots, rows), place.device(),
                 place.stream));
}

void conv2d_values_grad_op(Tensor out, Tensor grad_output, Tensor input, Tensor crow, Tensor col, Ints kernel,
                           Ints stride, Ints padding, Ints dilation, int64_t groups, int64_t slots, int64_t rows) {
  const Conv2dGeometry g = geometry(input, grad_output, kernel, stride, padding, dilation, groups);
  const Place place(input);
  const Weight weight = weight_of(place, crow, col, nullptr, nullptr, g.out_channels);
  const void* dy = place.data(grad_output, "grad_output");
  const void* x = place.data(input, "input");
  void* grad = place.vector(out, "out", weight.nnz);
  check_taps(g);
  if (empty(out)) return;
  if (empty(grad_output)) {
    torch::stable::zero_(out);
    return;
  }
  const Walk w = forward(g);
  const Tiling tiling = tiling_of(slots, rows);
  const int splits = values_grad_splits(w, weight, tiling, place.device());
  const Tensor workspace = torch::stable::new_empty(out, {splits * col.size(0)}, kFloat);
  check(values_grad(type_of(out), w, weight, dy, x, static_cast<float*>(workspace.data_ptr()), splits, grad, tiling,
                    place.device(), place.stream));
}

DenseWeight dense_weight(const Place& place, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == place.index, "weight must be on the device of the others");
  STD_TORCH_CHECK(t.scalar_type() == place.like.scalar_type(), "weight must have the dtype of the others");
  STD_TORCH_CHECK(t.dim() == 2 || t.dim() == 4, "weight must have 2 or 4 dimensions");
  if (t.dim() == 2) return {t.stride(0), t.stride(1), 0, 0, 1, 1};
  return {t.stride(0),
          t.stride(1),
          t.stride(2),
          t.stride(3),
          static_cast<int32_t>(t.size(2)),
          static_cast<int32_t>(t.size(3))};
}

void compress_op(Tensor out, Tensor weight, Tensor crow, Tensor col) {
  const Place place(weight);
  const DenseWeight at = dense_weight(place, weight);
  const Weight pattern = weight_of(place, crow, col, nullptr, nullptr, weight.size(0));
  void* values = place.vector(out, "out", pattern.nnz);
  if (!empty(out)) check(compress(type_of(out), pattern, at, weight.data_ptr(), values, place.stream));
}

void decompress_op(Tensor out, Tensor values, Tensor crow, Tensor col) {
  const Place place(values);
  const DenseWeight at = dense_weight(place, out);
  const Weight pattern = weight_of(place, crow, col, nullptr, nullptr, out.size(0));
  const void* from = place.vector(values, "values", pattern.nnz);
  torch::stable::zero_(out);
  if (!empty(values)) check(decompress(type_of(out), pattern, at, from, out.data_ptr(), place.stream));
}

}  // namespace
}  // namespace sparsekit::cuda

#define GEOMETRY "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, int slots, int rows"

STABLE_TORCH_LIBRARY(sparsekit_cuda, m) {
  m.def("compress(Tensor(a!) out, Tensor weight, Tensor crow_indices, Tensor col_indices) -> ()");
  m.def("decompress(Tensor(a!) out, Tensor values, Tensor crow_indices, Tensor col_indices) -> ()");
  m.def(
      "conv2d(Tensor(a!) out, Tensor input, Tensor values, Tensor crow_indices, Tensor col_indices, Tensor? bias, "
      "Tensor? residual, bool relu, " GEOMETRY ") -> ()");
  m.def(
      "conv2d_input_grad(Tensor(a!) out, Tensor grad_output, Tensor values, Tensor t_crow_indices, "
      "Tensor t_col_indices, Tensor t_permutation, " GEOMETRY ") -> ()");
  m.def(
      "conv2d_values_grad(Tensor(a!) out, Tensor grad_output, Tensor input, Tensor crow_indices, "
      "Tensor col_indices, " GEOMETRY ") -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sparsekit_cuda, CUDA, m) {
  m.impl("compress", TORCH_BOX(&sparsekit::cuda::compress_op));
  m.impl("decompress", TORCH_BOX(&sparsekit::cuda::decompress_op));
  m.impl("conv2d", TORCH_BOX(&sparsekit::cuda::conv2d_op));
  m.impl("conv2d_input_grad", TORCH_BOX(&sparsekit::cuda::conv2d_input_grad_op));
  m.impl("conv2d_values_grad", TORCH_BOX(&sparsekit::cuda::conv2d_values_grad_op));
}
