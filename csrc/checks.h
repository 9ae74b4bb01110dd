// Argument checks that memory safety needs; the public Python functions give the friendly messages.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "ops.h"

namespace sparsekit {

using torch::stable::Tensor;

inline void check_dense(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == torch::headeronly::ScalarType::Float, name, " must be float32");
}

inline void check_vector(const Tensor& t, const char* name, torch::headeronly::ScalarType type, int64_t size) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == type && t.dim() == 1, name, " has the wrong device, dtype or dim");
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(size < 0 || t.size(0) == size, name, " must have ", size, " elements, has ", t.size(0));
}

}  // namespace sparsekit
