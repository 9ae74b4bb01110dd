// Convolution of every channel by itself.
#pragma once

#include "ops.h"

namespace sparsekit {

// Whether the three functions below can do it: one channel a group, planes whose rows are contiguous, strides that
// waste little, and no output that sees padding alone.
bool is_depthwise(const Conv2dGeometry& g, const Images& x, const Images& y);

// As conv2d, conv2d_input_grad and conv2d_values_grad.
void depthwise(const Conv2dGeometry& g, const Csr& weight, const float* bias, const Images& x, const Images& y);
void depthwise_input_grad(const Conv2dGeometry& g, const Csr& weight_t, const Images& dy, const Images& dx);
void depthwise_values_grad(const Conv2dGeometry& g, const Csr& weight, const Images& dy, const Images& x, float* grad);

}  // namespace sparsekit
