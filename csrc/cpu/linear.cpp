#include "cpu/linear.h"

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace sparsekit {
namespace {

constexpr int64_t kRows = 24;  // of the weight, that are in hand at once
// Terms of a sum that are added to the others as one, which is more exact, and faster where lanes are images.
constexpr int64_t kTerms = 256, kDotTerms = 1024;

// Lanes are terms of sums.
void few_images(int64_t images, int64_t in_features, int64_t out_features, const float* x, const float* weight,
                const float* bias, float* y) {
  parallel(ceil_div(out_features, kRows), [&](int64_t first, int64_t last) {
    const int64_t begin = first * kRows, end = std::min(last * kRows, out_features);
    for (int64_t i = 0; i < images; ++i)
      for (int64_t r = begin; r < end; ++r) y[i * out_features + r] = bias ? bias[r] : 0.0f;
    for (int64_t k = 0; k < in_features; k += kDotTerms)
      kernels().dots(weight + begin * in_features + k, in_features, end - begin, x + k, in_features, images,
                     std::min(kDotTerms, in_features - k), y + begin, out_features);
  });
}

}  // namespace

// Lanes are images.
void dense_linear(int64_t images, int64_t in_features, int64_t out_features, const float* x, const float* weight,
                  const float* bias, float* y) {
  if (images <= kDotImages) return few_images(images, in_features, out_features, x, weight, bias, y);
  const int64_t lanes = round_up(images, kAlign);
  Scratch shared;
  float* const turned = shared.get(in_features * lanes);  // [in_features][lanes]
  parallel(ceil_div(in_features, kTerms), [&](int64_t first, int64_t last) {
    const int64_t begin = first * kTerms, end = std::min(last * kTerms, in_features);
    kernels().transpose(turned + begin * lanes, lanes, x + begin, in_features, images, end - begin);
    if (images < lanes) kernels().clear(turned + begin * lanes + images, lanes, end - begin, lanes - images);
  });
  parallel(ceil_div(out_features, kRows), [&](int64_t first, int64_t last) {
    Scratch scratch;
    float* const sums = scratch.get(kRows * lanes);
    for (int64_t row = first * kRows, end = std::min(last * kRows, out_features); row < end; row += kRows) {
      const int64_t rows = std::min(kRows, end - row);
      for (int64_t r = 0; r < rows; ++r) std::fill_n(sums + r * lanes, lanes, bias ? bias[row + r] : 0.0f);
      for (int64_t k = 0; k < in_features; k += kTerms)
        kernels().add_products(weight + row * in_features + k, in_features, rows, turned + k * lanes, lanes,
                               std::min(kTerms, in_features - k), sums, lanes, lanes);
      kernels().transpose(y + row, out_features, sums, lanes, rows, images);
    }
  });
}

}  // namespace sparsekit
