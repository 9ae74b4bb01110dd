#include "cpu/pool2d.h"

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace sparsekit {

void max_pool2d(const Pool2dGeometry& g, const Images& in, const Images& out) {
  // NCHW goes plane by plane, as it lies in memory.
  const int64_t parts = in.col == 1 ? g.channels : 1;
  Pool2dGeometry part = g;
  part.channels = g.channels / parts;
  parallel(g.batch * parts, [&](int64_t begin, int64_t end) {
    Scratch memory;
    float* const scratch = memory.get(pool_scratch(g));
    for (int64_t task = begin; task < end; ++task) {
      Images from = in, to = out;
      from.data += task / parts * in.image + task % parts * in.channel;
      to.data += task / parts * out.image + task % parts * out.channel;
      for (int64_t y = 0; y < g.out_h; ++y) kernels().max_pool_row(part, from, to, y, scratch);
    }
  });
}

PoolSplit pool_split(const Pool2dGeometry& g) {
  constexpr int64_t kLanes = 16;  // at most, that are read and written at once
  // Taps reach so many columns of a part to the left and to the right of their window's place.
  const int64_t left = ceil_div(g.pad_left, g.stride_w), right = ceil_div((g.kernel_w - 1) * g.dilation_w, g.stride_w);
  const int64_t columns = std::max(round_up(ceil_div(g.in_w, g.stride_w), kLanes), round_up(g.out_w, kLanes));
  const int64_t margin = std::max(left, right), row = round_up(margin + columns + margin, kLanes);
  return {row, margin, g.in_h * g.stride_w * row + 3 * (row + margin)};
}

void max_pool2d_taps(const Pool2dGeometry& g, const float* x, float* y, uint8_t* taps) {
  const int64_t plane = g.in_h * g.in_w, out_plane = g.out_h * g.out_w, planes = g.batch * g.channels;
  use_huge_pages(y, planes * out_plane);
  parallel(planes, [&](int64_t begin, int64_t end) {
    const PoolSplit split = pool_split(g);
    Scratch memory;
    float* const scratch = memory.get(split.floats);
    for (int64_t i = begin; i < end; ++i)
      kernels().max_pool_plane(g, split, x + i * plane, y + i * out_plane, taps + i * out_plane, scratch);
  });
}

void max_pool2d_grad(const Pool2dGeometry& g, const float* dy, const uint8_t* taps, float* dx) {
  const int64_t plane = g.in_h * g.in_w, out_plane = g.out_h * g.out_w, planes = g.batch * g.channels;
  use_huge_pages(dx, planes * plane);
  const bool stream = g.stride_w == 2 && g.in_w % 16 == 0 && planes * plane >= kStreamFloats &&
                      reinterpret_cast<uintptr_t>(dx) % 64 == 0;
  parallel(planes, [&](int64_t begin, int64_t end) {
    const PoolSplit split = pool_split(g);
    Scratch memory;
    float* const scratch = memory.get(split.floats);
    for (int64_t i = begin; i < end; ++i)
      kernels().max_pool_grad_plane(g, split, dy + i * out_plane, taps + i * out_plane, dx + i * plane, scratch,
                                    stream);
  });
}

}  // namespace sparsekit
