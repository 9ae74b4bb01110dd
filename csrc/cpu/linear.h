// Dense linear layers.
#pragma once

#include <cstdint>

namespace sparsekit {

// y[i][r] = bias[r] + sum over k of weight[r][k] * x[i][k]; all are contiguous. bias may be null. Bits do not
// depend on the number of threads. Of up to 128 images the weight is read once, as it lies in memory.
void dense_linear(int64_t images, int64_t in_features, int64_t out_features, const float* x, const float* weight,
                  const float* bias, float* y);

}  // namespace sparsekit
