// Runs the CUDA kernels on the CPU: reads calls from standard input, writes what they computed to standard output.
// A call is the 28 integers of Call, then eight buffers, each its size in bytes (-1: absent), then its bytes.
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/walks.h"

namespace {

using namespace sparsekit;
using namespace sparsekit::cuda;

enum Op { kConv2d, kInputGrad, kValuesGrad, kCompress, kDecompress };
constexpr int kSource = 4, kOut = 7;  // among the buffers

struct Call {
  // `shift`: by how many bytes the source is away from an aligned address.
  int64_t op, type, slots, rows, multiprocessors, shared_bytes, relu, shift;
  Conv2dGeometry geometry;
  int64_t row, channel, ky, kx;  // strides of the dense weight
};

// Exactly as large as what it holds, so that AddressSanitizer sees every step beyond.
struct Buffer {
  std::unique_ptr<char[]> data;
  int64_t size = -1, shift = 0;

  template <class T = void>
  T* get() const {
    return size < 0 ? nullptr : reinterpret_cast<T*>(data.get() + shift);
  }
};

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "emulated: %s\n", what);
  std::exit(1);
}

bool read(void* to, size_t size) { return std::fread(to, 1, size, stdin) == size; }

Buffer read_buffer(int64_t shift) {
  Buffer b;
  require(read(&b.size, sizeof b.size), "the input ends early");
  b.shift = shift;
  if (b.size < 0) return b;
  b.data = std::make_unique<char[]>(b.size + shift);
  require(read(b.get(), b.size), "the input ends early");
  return b;
}

int run(const Call& c, const std::array<Buffer, 8>& buffers) {
  const auto& [crow, col, permutation, values, source, other, residual, out] = buffers;
  const auto type = static_cast<Type>(c.type);
  const Tiling tiling{static_cast<int>(c.slots), static_cast<int>(c.rows)};
  const Device device{static_cast<int>(c.multiprocessors), static_cast<int>(c.shared_bytes)};
  const Weight weight{crow.get<int32_t>(),
                      col.get<int32_t>(),
                      permutation.get<int32_t>(),
                      values.get(),
                      static_cast<int32_t>(crow.size / 4 - 1),
                      static_cast<int32_t>(col.size / 4)};
  const DenseWeight at{c.row,
                       c.channel,
                       c.ky,
                       c.kx,
                       static_cast<int32_t>(c.geometry.kernel_h),
                       static_cast<int32_t>(c.geometry.kernel_w)};
  int error = 0;
  switch (c.op) {
    case kConv2d:
      return gather(type, forward(c.geometry), weight, source.get(), other.get(), residual.get(), c.relu, out.get(),
                    tiling, device, nullptr);
    case kInputGrad:
      for (const Walk& w : backward(c.geometry))
        error |= gather(type, w, weight, source.get(), nullptr, nullptr, false, out.get(), tiling, device, nullptr);
      return error;
    case kValuesGrad: {
      const Walk w = forward(c.geometry);
      const int splits = values_grad_splits(w, weight, tiling, device);
      std::vector<float> workspace(static_cast<size_t>(splits) * weight.nnz, NAN);
      return values_grad(type, w, weight, other.get(), source.get(), workspace.data(), splits, out.get(), tiling,
                         device, nullptr);
    }
    case kCompress:
      return compress(type, weight, at, source.get(), out.get(), nullptr);
    default:
      return decompress(type, weight, at, values.get(), out.get(), nullptr);
  }
}

}  // namespace

int main() {
  Call c;
  while (read(&c, sizeof c)) {
    std::array<Buffer, 8> buffers;
    for (int i = 0; i < 8; ++i) buffers[i] = read_buffer(i == kSource ? c.shift : 0);
    const int error = run(c, buffers);
    require(error == 0, error_string(error));
    std::fwrite(buffers[kOut].get(), 1, buffers[kOut].size, stdout);
  }
}
