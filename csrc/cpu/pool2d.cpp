#include "cpu/pool2d.h"

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "cpu/kernels.h"

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

}  // namespace sparsekit
