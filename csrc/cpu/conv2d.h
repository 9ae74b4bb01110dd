// Sparse convolution on the CPU. A linear layer is a 1 x 1 convolution whose pixels are the batch.
#pragma once

#include "cpu/kernels.h"
#include "ops.h"

namespace sparsekit {

// "generic", "avx2" or "avx512": whether this CPU can run it, the best one, and the choice of one.
bool cpu_supports(const char* isa);
const char* best_isa();
bool set_isa(const char* isa);

// y = conv(x, weight) + bias; bias may be null.
void conv2d(const Conv2dGeometry& g, const Csr& weight, const float* bias, const Images& x, const Images& y);

// dx = the gradient of conv; weight_t is the weight of the transposed convolution.
void conv2d_input_grad(const Conv2dGeometry& g, const Csr& weight_t, const Images& dy, const Images& dx);

// grad[j] = the gradient of non-zero j of weight, whose values are not read.
void conv2d_values_grad(const Conv2dGeometry& g, const Csr& weight, const Images& dy, const Images& x, float* grad);

// grad[channel] = sum of dy over images and pixels.
void bias_grad(const Conv2dGeometry& g, const Images& dy, float* grad);

}  // namespace sparsekit
