#include "cpu/pool2d.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace sparsekit {

void max_pool2d(const Pool2dGeometry& g, const Images& in, const Images& out) {
  torch::stable::parallel_for(0, g.batch * g.out_h, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(pool_scratch(g));
    for (int64_t task = begin; task < end; ++task) {
      Images from = in, to = out;
      from.data += task / g.out_h * in.image;
      to.data += task / g.out_h * out.image;
      kernels().max_pool_row(g, from, to, task % g.out_h, scratch.data());
    }
  });
}

void max_pool2d_grad(const Pool2dGeometry& g, const float* dy, const float* x, float* dx) {
  use_huge_pages(dx, g.batch * g.channels * g.in_h * g.in_w);
  // Of `windows` along a side, those [first, last) whose tap lies in the image: the one `offset` from their start.
  struct Windows {
    int64_t first, last;
  };
  auto inside = [](int64_t windows, int64_t offset, int64_t stride, int64_t size) -> Windows {
    const int64_t first = offset < 0 ? ceil_div(-offset, stride) : 0;
    return {first, std::max(first, std::min(windows, ceil_div(size - offset, stride)))};
  };
  parallel(g.batch * g.channels, [&](int64_t begin, int64_t end) {
    std::vector<float> largest(g.out_w), picked(g.out_w);
    std::vector<float> tap(g.out_w);  // whose pixel is the largest; a float, for one kind of lane throughout
    std::vector<int64_t> pixel(g.kernel_h * g.kernel_w);  // of a tap, in the first window of the row
    for (int64_t plane = begin; plane < end; ++plane) {
      const float* const from = x + plane * g.in_h * g.in_w;
      float* const to = dx + plane * g.in_h * g.in_w;
      const float* grad = dy + plane * g.out_h * g.out_w;
      std::fill_n(to, g.in_h * g.in_w, 0.0f);
      for (int64_t row = 0; row < g.out_h; ++row, grad += g.out_w) {
        std::fill(tap.begin(), tap.end(), -1.0f);
        for (int64_t ky = 0; ky < g.kernel_h; ++ky) {
          const int64_t y = row * g.stride_h - g.pad_top + ky * g.dilation_h;
          if (y < 0 || y >= g.in_h) continue;
          for (int64_t kx = 0; kx < g.kernel_w; ++kx) {
            const int64_t offset = kx * g.dilation_w - g.pad_left;
            const auto [first, last] = inside(g.out_w, offset, g.stride_w, g.in_w);
            const float number = ky * g.kernel_w + kx;
            pixel[ky * g.kernel_w + kx] = y * g.in_w + offset;
            kernels().gather(picked.data(), 0, from + y * g.in_w + first * g.stride_w + offset, 0, g.stride_w, 1,
                             last - first);
            for (int64_t i = first; i < last; ++i) {
              const float v = picked[i - first];
              const bool take = (tap[i] < 0) | (v > largest[i]) | (v != v);
              largest[i] = take ? v : largest[i];
              tap[i] = take ? number : tap[i];
            }
          }
        }
        for (int64_t i = 0; i < g.out_w; ++i)
          if (tap[i] >= 0) to[pixel[static_cast<int64_t>(tap[i])] + i * g.stride_w] += grad[i];
      }
    }
  });
}

}  // namespace sparsekit
