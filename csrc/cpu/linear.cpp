#include "cpu/linear.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace sparsekit {
namespace {

constexpr int64_t kRows = 24;          // of the weight, that are in hand at once
constexpr int64_t kMostImages = 128;   // that are lanes
constexpr int64_t kPanel = 64;         // features that are lanes, at once
constexpr int64_t kPanelImages = 48;   // in hand at once
constexpr int64_t kFewestImages = 96;  // that a panel is made for
constexpr int64_t kTasks = 4;          // for a thread, about
// Terms of a sum that are added to the others as one, which is more exact, and faster but for dots.
constexpr int64_t kTerms = 256, kPanelTerms = 128, kDotTerms = 1024;

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

// Lanes are features of the output, some of whose weights are turned into a panel that serves many images.
void many_images(int64_t images, int64_t in_features, int64_t out_features, const float* x, const float* weight,
                 const float* bias, float* y) {
  const int64_t panels = ceil_div(out_features, kPanel), tasks = kTasks * torch::stable::get_num_threads();
  const int64_t parts = std::clamp<int64_t>(ceil_div(tasks, panels), 1, images / kFewestImages);
  parallel(panels * parts, [&](int64_t first, int64_t last) {
    Scratch scratch;
    float* const panel = scratch.get(in_features * kPanel);  // [in_features][kPanel]
    float* const sums = scratch.get(kPanelImages * kPanel);  // [kPanelImages][kPanel]
    for (int64_t task = first, last_panel = -1; task < last; ++task) {
      const int64_t p = task / parts, part = task % parts, feature = p * kPanel;
      const int64_t features = std::min(kPanel, out_features - feature), lanes = round_up(features, kAlign);
      if (std::exchange(last_panel, p) != p) {
        kernels().transpose(panel, kPanel, weight + feature * in_features, in_features, features, in_features);
        if (features < lanes) kernels().clear(panel + features, kPanel, in_features, lanes - features);
      }
      for (int64_t i = images * part / parts, end = images * (part + 1) / parts; i < end; i += kPanelImages) {
        const int64_t count = std::min(kPanelImages, end - i);
        std::fill_n(sums, count * kPanel, 0.0f);
        for (int64_t at = 0; at < count && bias; ++at) std::copy_n(bias + feature, features, sums + at * kPanel);
        for (int64_t k = 0; k < in_features; k += kPanelTerms)
          kernels().add_products(x + i * in_features + k, in_features, count, panel + k * kPanel, kPanel,
                                 std::min(kPanelTerms, in_features - k), sums, kPanel, lanes);
        float* const to = y + i * out_features + feature;
        for (int64_t at = 0; at < count; ++at) std::copy_n(sums + at * kPanel, features, to + at * out_features);
      }
    }
  });
}

// Lanes are images.
void some_images(int64_t images, int64_t in_features, int64_t out_features, const float* x, const float* weight,
                 const float* bias, float* y) {
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

}  // namespace

void dense_linear(int64_t images, int64_t in_features, int64_t out_features, const float* x, const float* weight,
                  const float* bias, float* y) {
  const auto linear = images <= kDotImages ? few_images : images <= kMostImages ? some_images : many_images;
  linear(images, in_features, out_features, x, weight, bias, y);
}

}  // namespace sparsekit
