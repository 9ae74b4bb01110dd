// Max pooling on the CPU, for the inference engine.
#pragma once

#include "ops.h"

namespace sparsekit {

// The largest pixel of every window; the layouts are those of Kernels::max_pool_row.
void max_pool2d(const Pool2dGeometry& g, const Images& in, const Images& out);

}  // namespace sparsekit
