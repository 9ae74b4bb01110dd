// Sparse convolution on the CPU. A linear layer is a 1 x 1 convolution whose pixels are the batch.
#pragma once

#include <array>
#include <limits>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "ops.h"

namespace sparsekit {

// "generic", "avx2", "avx512", "zen4" or "amx": whether this CPU can run it, the best one, and the choice of one.
bool cpu_supports(const char* isa);
const char* best_isa();
bool set_isa(const char* isa);

// y = conv(x, weight) + bias; bias may be null.
void conv2d(const Conv2dGeometry& g, const Csr& weight, const float* bias, const Images& x, const Images& y);

// What a convolution does to its sums on their way out: y = clamp(conv + bias + residual, low, high).
struct Epilogue {
  const float* bias = nullptr;      // [out_channels], or null
  const float* residual = nullptr;  // the size and strides of y, or null
  float low = -std::numeric_limits<float>::infinity(), high = std::numeric_limits<float>::infinity();
  // A bit for every float of the residual, which is NCHW: where it is 0, nothing is added; null: all of it is.
  const uint8_t* counts = nullptr;
  bool adds = false;  // to what y holds already, without a residual
};

class PreparedWalk;

// A convolution whose weight never changes: it stays packed for the geometries met last. Calls may run in parallel.
class FixedConv2d {
 public:
  // `weight` must outlive the layer.
  explicit FixedConv2d(const Csr& weight) : weight_(weight) {}
  void run(const Conv2dGeometry& g, const Images& x, const Images& y, const Epilogue& epilogue);

 private:
  using Key = std::array<int64_t, 27>;
  std::shared_ptr<const PreparedWalk> prepared(const Conv2dGeometry& g, const Images& x, const Images& y);

  const Csr weight_;
  std::mutex mutex_;
  std::vector<std::pair<Key, std::shared_ptr<const PreparedWalk>>> latest_;  // latest first
};

// dx = the gradient of conv; weight_t is the weight of the transposed convolution.
void conv2d_input_grad(const Conv2dGeometry& g, const Csr& weight_t, const Images& dy, const Images& dx);

// grad[j] = the gradient of non-zero j of weight, whose values are not read.
void conv2d_values_grad(const Conv2dGeometry& g, const Csr& weight, const Images& dy, const Images& x, float* grad);

// What is added to a gradient: nothing, or something of its size and strides, which may be the gradient's own memory;
// or, with bits, that where they are 1. The bits of a plane begin with a byte, as those of batch_norm.
struct Addend {
  const float* data = nullptr;
  const uint8_t* bits = nullptr;
};

// Both, in one go over dy; dx = the gradient of conv + other.
void conv2d_grads(const Conv2dGeometry& g, const Csr& weight, const Csr& weight_t, const Addend& other,
                  const Images& dy, const Images& x, const Images& dx, float* grad);

// Whether conv2d_grads adds by bits for free.
bool adds_by_bits(const Conv2dGeometry& g, const Images& dy, const Images& dx);

// grad[channel] = sum of dy over images and pixels.
void bias_grad(const Conv2dGeometry& g, const Images& dy, float* grad);

}  // namespace sparsekit
