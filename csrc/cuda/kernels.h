// Sparse convolution on NVIDIA GPUs: what csrc/cuda/ops.cpp calls. No torch and no CUDA headers, so that the tests can
// compile kernels.cu for the CPU as well.
#pragma once

#include <cstdint>

namespace sparsekit::cuda {

constexpr int kMaxTaps = 32;  // a bit each in a register

enum class Type { kFloat, kHalf, kBFloat16 };

// A convolution, forward or transposed, as a gather of source pixels: tap t of target pixel (j, i) of a class is source
// pixel (j * step_y + dy[t], i * step_x + dx[t]), or zero if that is outside. A forward convolution has one class, the
// gradient of the input one for every residue of the stride, with the taps that meet it. Sizes in elements.
struct Walk {
  int32_t batch, rows, cols;  // images; target pixels of the class
  int64_t target_image, target_plane;
  int32_t target_offset, target_row, target_col;
  int64_t source_image;
  int32_t source_h, source_w, step_y, step_x;
  int32_t group_rows, group_channels;  // target and source channels of a group
  int32_t taps;
  uint32_t used;  // bit t: tap t belongs to the class
  int32_t dy[kMaxTaps], dx[kMaxTaps];
};

// As sparsekit::Csr, on the device; values are of the activations' type.
struct Weight {
  const int32_t *crow, *col, *permutation;
  const void* values;
  int32_t rows, nnz;
};

// How a kernel is cut: slots of a lane, a tile has 32 times as many, and rows of a warp; 0, 0 leaves it to the kernel.
// Only the rounding of values_grad's sums depends on it.
struct Tiling {
  int slots, rows;
};

// What the kernels need to know of a device.
struct Device {
  int multiprocessors, shared_bytes;  // shared memory of a multiprocessor
};

// Errors beside cudaError_t, which are positive.
constexpr int kTooWide = -1;  // the source of a single tile and channel does not fit shared memory

// target = weight (*) source + bias + residual, then ReLU if asked for; bias and residual may be null. Source and
// target must have fewer than 2^31 elements. Returns 0 or an error.
int gather(Type type, const Walk& walk, const Weight& weight, const void* source, const void* bias,
           const void* residual, bool relu, void* target, const Tiling& tiling, const Device& device, void* stream);

// How many rows the workspace of values_grad has.
int values_grad_splits(const Walk& walk, const Weight& weight, const Tiling& tiling, const Device& device);

// grad[j] = the sum over target pixels of grad_target times what non-zero j read of source; workspace is
// [splits, nnz] float32.
int values_grad(Type type, const Walk& walk, const Weight& weight, const void* grad_target, const void* source,
                float* workspace, int splits, void* grad, const Tiling& tiling, const Device& device, void* stream);

// Position of a weight's column in memory: col = (channel * kernel_h + ky) * kernel_w + kx, strides in elements.
struct DenseWeight {
  int64_t row, channel, ky, kx;
  int32_t kernel_h, kernel_w;
};

// values = the kept entries of dense, or the other way round; dense is zero already.
int compress(Type type, const Weight& weight, const DenseWeight& at, const void* dense, void* values, void* stream);
int decompress(Type type, const Weight& weight, const DenseWeight& at, const void* values, void* dense, void* stream);

Device device_of(int index);
const char* error_string(int error);

}  // namespace sparsekit::cuda
