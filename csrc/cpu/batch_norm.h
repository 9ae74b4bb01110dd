// BatchNorm of NCHW images in training, with what often follows it: the sum with a residual, and ReLU.
#pragma once

#include "ops.h"

namespace sparsekit {

struct BatchNorm {
  int64_t batch, channels, pixels;  // pixels of a plane
  const float* weight;              // [channels], as bias; null: ones and zeros
  const float* bias;
  float* mean;  // [channels], as var, the biased variance: results of forward, inputs of the gradient
  float* var;
  double eps;
  bool relu;
};

// A tensor's bits, one for every float: a plane's begin at a byte of their own, and are filled up with zeros to whole
// registers.
inline int64_t bit_bytes(int64_t pixels) { return (pixels + 15) / 16 * 2; }  // of a plane

// y = relu((x - mean) / sqrt(var + eps) * weight + bias + residual); residual may be null, and positive, the bits that
// tell where y is more than 0.
void batch_norm(const BatchNorm& norm, const float* x, const float* residual, float* y, uint8_t* positive);

// The same, where `other` is a residual, or, if there is a branch, what that normalizes before it is added.
void batch_norm_sum(const BatchNorm& norm, const float* x, const BatchNorm* branch, const float* other, float* y,
                    uint8_t* positive);

// Statistics of all batches so far: mean and unbiased variance, [channels], and how many batches.
struct Running {
  float *mean, *var;
  int64_t* batches;
};

// One batch more, with norm's mean and var. momentum: how far the statistics move to them; negative: to the average.
void update(const Running& running, const BatchNorm& norm, double momentum);

// A BatchNorm, its input, and where its gradients go.
struct NormGrads {
  BatchNorm norm;
  const float* x;
  float *dx, *d_weight, *d_bias;
};

// Given the gradient dy of y: those of x, weight and bias, of a branch too, and, if d_residual is not null, of the
// residual. `positive` is needed where there was a residual or a branch before ReLU, else it may be null.
void batch_norm_grad(const NormGrads& of, const NormGrads* branch, const float* dy, const uint8_t* positive,
                     float* d_residual);

// batch_norm without a residual, then max_pool2d_taps; what is pooled is never in memory as a whole.
void batch_norm_max_pool2d(const BatchNorm& norm, const Pool2dGeometry& g, const float* x, float* y, uint8_t* taps);

// Given the gradient dy of y: those of x, weight and bias.
void batch_norm_max_pool2d_grad(const BatchNorm& norm, const Pool2dGeometry& g, const float* dy, const uint8_t* taps,
                                const float* x, float* dx, float* d_weight, float* d_bias);

}  // namespace sparsekit
