// Both directions go over a channel of all images twice: for its sums, then for the results. Channels are taken in
// blocks that are still in a cache the second time, so that memory is read and written once. A channel belongs to one
// thread, hence results do not depend on the number of threads.

#include "cpu/batch_norm.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/pool2d.h"

namespace sparsekit {
namespace {

constexpr int64_t kRunFloats = 4096;         // of a tensor that are read at a stretch, at least, if a block allows it
constexpr int64_t kBlockFloats = 64 * 1024;  // of a tensor in a block of channels, at most, unless one has more

// f(first, count, soon) for blocks of channels; soon: floats from a block to the one that its thread has next, which is
// prefetched while results are written: else memory would rest half of the time.
template <class F>
void each_block(const BatchNorm& norm, const F& f) {
  const int64_t channel = std::max<int64_t>(1, norm.batch * norm.pixels);
  const int64_t wanted = ceil_div(kRunFloats, std::max<int64_t>(1, norm.pixels));
  const int64_t block = std::clamp<int64_t>(kBlockFloats / channel, 1, std::min(wanted, norm.channels));
  Queue(ceil_div(norm.channels, block)).run([&](Queue::Worker& worker) {
    for (; !worker.done(); worker.advance()) {
      const int64_t first = worker.task() * block;
      const int64_t blocks = worker.next() < 0 ? 0 : worker.next() - worker.task();
      f(first, std::min(block, norm.channels - first), blocks * block * norm.pixels);
    }
    kernels().finish_streams();
  });
}

// f(channel of the block, offset of its plane) for every image.
template <class F>
void each_plane(const BatchNorm& norm, int64_t first, int64_t count, const F& f) {
  for (int64_t n = 0; n < norm.batch; ++n)
    for (int64_t c = 0; c < count; ++c) f(c, (n * norm.channels + first + c) * norm.pixels);
}

constexpr double kNear = 16;  // times the variance: square of the distance to the mean that costs no digits

// Whether results are too large for the caches, and their planes large enough to be written past them.
bool streams(const BatchNorm& norm) {
  constexpr int64_t kPlane = 128;
  return norm.batch * norm.channels * norm.pixels >= kStreamFloats && norm.pixels >= kPlane;
}

// What is written of a block of channels, past the caches if `stream`. Planes that are not whole lines are put together
// first: a line that is written past the caches in two parts costs more than many whole ones.
class BlockWriter {
 public:
  BlockWriter(const BatchNorm& norm, float* to, int64_t count, bool stream)
      : to_(to), floats_(count * norm.pixels), pixels_(norm.pixels), stream_(stream) {
    together_ = to && stream && norm.pixels % kAlign != 0;
    if (together_) buffer_ = scratch_.get(floats_);
  }

  // Where channel c of the block goes, whose plane begins `at` floats into the tensor; and how.
  float* plane(int64_t c, int64_t at) const { return !to_ ? nullptr : together_ ? buffer_ + c * pixels_ : to_ + at; }
  bool streams() const { return stream_ && !together_; }

  // After the last channel of an image; the first one's plane begins `at` floats into the tensor.
  void finish(int64_t at) const {
    if (together_) kernels().stream(to_ + at, buffer_, floats_);
  }

 private:
  Scratch scratch_;
  float *to_, *buffer_ = nullptr;
  int64_t floats_, pixels_;
  bool stream_, together_;
};

// The bits of what begins `at` floats into a tensor, at a plane's first float or some registers after it.
template <class Bits>
Bits* bits_of(const BatchNorm& norm, Bits* positive, int64_t at) {
  if (!positive) return nullptr;
  const int64_t pixels = std::max<int64_t>(1, norm.pixels);
  return positive + at / pixels * bit_bytes(norm.pixels) + at % pixels / 8;
}

using Sums = std::array<double, 2>;

// Floats add up for a stretch, stretches in double, all of them lane by lane.
struct LongSums {
  SpreadSums stretch;
  double a[16] = {}, b[16] = {};

  void fold() {
    for (int k = 0; k < 16; ++k) a[k] += stretch.a[k], b[k] += stretch.b[k];
    stretch = {};
  }
  Sums total() const { return {std::accumulate(a, a + 16, 0.0), std::accumulate(b, b + 16, 0.0)}; }
};

// Two sums for every channel of a block: f(channel of the block, offset, floats, sums) adds what begins there.
template <class F>
std::vector<Sums> add_up(const BatchNorm& norm, int64_t first, int64_t count, const F& f) {
  constexpr int64_t kStretch = 4096;
  std::vector<LongSums> sums(count);
  auto fold = [&] {
    for (LongSums& s : sums) s.fold();
  };
  int64_t added = 0;
  for (int64_t n = 0; n < norm.batch; ++n)
    for (int64_t begin = 0; begin < norm.pixels; begin += kStretch) {
      const int64_t floats = std::min(kStretch, norm.pixels - begin);
      if (added + floats > kStretch) fold(), added = 0;
      added += floats;
      for (int64_t c = 0; c < count; ++c)
        f(c, (n * norm.channels + first + c) * norm.pixels + begin, floats, sums[c].stretch);
    }
  fold();
  std::vector<Sums> totals(count);
  for (int64_t c = 0; c < count; ++c) totals[c] = sums[c].total();
  return totals;
}

// Of every channel of a block: y = x * scale + shift.
struct Factors {
  std::vector<float> scale, shift;
};

// Sets mean and var of a block of channels.
Factors normalizing(const BatchNorm& norm, const float* x, int64_t first, int64_t count) {
  const Kernels& k = kernels();
  const double pixels = norm.batch * norm.pixels;
  float* const mean = norm.mean + first;
  float* const var = norm.var + first;
  // Sums of what is left of the first image's mean: that is near enough to all images', or they are summed again.
  for (int64_t c = 0; c < count; ++c) {
    LongSums sums;
    k.moments(x + (first + c) * norm.pixels, norm.pixels, 0, sums.stretch);
    sums.fold();
    mean[c] = static_cast<float>(sums.total()[0] / norm.pixels);
  }
  for (int pass = 0, near = 0; pass < 2 && !near; ++pass) {
    const auto sums = add_up(norm, first, count, [&](int64_t c, int64_t at, int64_t floats, SpreadSums& spread) {
      k.moments(x + at, floats, mean[c], spread);
    });
    near = 1;
    for (int64_t c = 0; c < count; ++c) {
      const double off = sums[c][0] / pixels, found = sums[c][1] / pixels - off * off;
      const double variance = found < 0 ? 0 : found;  // NaN stays
      near &= !(off * off > kNear * variance);
      mean[c] = static_cast<float>(mean[c] + off);
      var[c] = static_cast<float>(variance);
    }
  }
  Factors factors{std::vector<float>(count), std::vector<float>(count)};
  for (int64_t c = 0; c < count; ++c) {
    const float scale = (norm.weight ? norm.weight[first + c] : 1) / std::sqrt(var[c] + norm.eps);
    factors.scale[c] = scale;
    factors.shift[c] = (norm.bias ? norm.bias[first + c] : 0) - mean[c] * scale;
  }
  return factors;
}

// The gradients of weight and bias of a block of channels, and what those of x are made of. add(grad, channel of the
// block, offset, floats, sums) adds what begins there.
template <class F>
std::vector<NormGrad> gradients(const BatchNorm& norm, int64_t first, int64_t count, float* d_weight, float* d_bias,
                                const F& add) {
  const double pixels = norm.batch * norm.pixels;
  std::vector<NormGrad> grads(count);
  for (int64_t c = 0; c < count; ++c) {
    const float mean = norm.mean[first + c], weight = norm.weight ? norm.weight[first + c] : 1;
    const float scale = weight / std::sqrt(norm.var[first + c] + norm.eps);
    grads[c] = {mean, scale, (norm.bias ? norm.bias[first + c] : 0) - mean * scale, norm.relu};
  }
  const auto sums = add_up(norm, first, count, [&](int64_t c, int64_t at, int64_t floats, SpreadSums& spread) {
    add(grads[c], c, at, floats, spread);
  });
  for (int64_t c = 0; c < count; ++c) {
    const double inverse = 1 / std::sqrt(norm.var[first + c] + norm.eps), a = grads[c].scale;
    d_bias[first + c] = static_cast<float>(sums[c][0]);
    d_weight[first + c] = static_cast<float>(sums[c][1] * inverse);
    grads[c].of_x = static_cast<float>(-a * inverse * inverse * sums[c][1] / pixels);
    grads[c].constant = static_cast<float>(-a * sums[c][0] / pixels);
  }
  return grads;
}

}  // namespace

void batch_norm(const BatchNorm& norm, const float* x, const float* residual, float* y, uint8_t* positive) {
  batch_norm_sum(norm, x, nullptr, residual, y, positive);
}

void batch_norm_sum(const BatchNorm& norm, const float* x, const BatchNorm* branch, const float* other, float* y,
                    uint8_t* positive) {
  use_huge_pages(y, norm.batch * norm.channels * norm.pixels);
  const bool stream = streams(norm);
  each_block(norm, [&](int64_t first, int64_t count, int64_t soon) {
    Factors factors = normalizing(norm, x, first, count);
    std::vector<float> other_scale(count, 1.0f);
    if (branch) {
      Factors found = normalizing(*branch, other, first, count);
      for (int64_t c = 0; c < count; ++c) factors.shift[c] += found.shift[c];
      other_scale = std::move(found.scale);
    }
    const BlockWriter to(norm, y, count, stream);
    each_plane(norm, first, count, [&](int64_t c, int64_t at) {
      kernels().normalize(to.plane(c, at), x + at, other ? other + at : nullptr, norm.pixels, factors.scale[c],
                          factors.shift[c], other_scale[c], norm.relu, to.streams(), bits_of(norm, positive, at), soon);
      if (c + 1 == count) to.finish(at - c * norm.pixels);
    });
  });
}

void update(const Running& running, const BatchNorm& norm, double momentum) {
  const double pixels = norm.batch * norm.pixels;
  const float unbiased = pixels / (pixels - 1);
  ++*running.batches;
  const float part = momentum < 0 ? 1 / static_cast<double>(*running.batches) : momentum;
  for (int64_t c = 0; c < norm.channels; ++c) {
    running.mean[c] += part * (norm.mean[c] - running.mean[c]);
    running.var[c] += part * (norm.var[c] * unbiased - running.var[c]);
  }
}

void batch_norm_grad(const NormGrads& of, const NormGrads* branch, const float* dy, const uint8_t* positive,
                     float* d_residual) {
  const Kernels& k = kernels();
  const int64_t floats = of.norm.batch * of.norm.channels * of.norm.pixels;
  const bool stream = streams(of.norm);
  for (float* written : {of.dx, branch ? branch->dx : nullptr, d_residual})
    if (written) use_huge_pages(written, floats);
  each_block(of.norm, [&](int64_t first, int64_t count, int64_t soon) {
    auto grads_of = [&](const NormGrads& of, float* d_residual) {
      const BatchNorm& norm = of.norm;
      const auto grads = gradients(norm, first, count, of.d_weight, of.d_bias,
                                   [&](const NormGrad& grad, int64_t, int64_t at, int64_t floats, SpreadSums& sums) {
                                     k.norm_sums(grad, dy + at, of.x + at, bits_of(norm, positive, at), floats, sums);
                                   });
      const BlockWriter to(norm, of.dx, count, stream), residual(norm, d_residual, count, stream);
      each_plane(norm, first, count, [&](int64_t c, int64_t at) {
        k.norm_input_grad(grads[c], dy + at, of.x + at, bits_of(norm, positive, at), norm.pixels, to.plane(c, at),
                          residual.plane(c, at), to.streams(), soon);
        if (c + 1 < count) return;
        to.finish(at - c * norm.pixels);
        residual.finish(at - c * norm.pixels);
      });
    };
    grads_of(of, d_residual);
    if (branch) grads_of(*branch, nullptr);  // dy comes from a cache
  });
}

void batch_norm_max_pool2d(const BatchNorm& norm, const Pool2dGeometry& g, const float* x, float* y, uint8_t* taps) {
  const Kernels& k = kernels();
  const PoolSplit split = pool_split(g);
  const int64_t pooled = g.out_h * g.out_w;
  each_block(norm, [&](int64_t first, int64_t count, int64_t soon) {
    const Factors factors = normalizing(norm, x, first, count);
    Scratch memory;
    float* const plane = memory.get(norm.pixels);
    float* const scratch = memory.get(split.floats);
    each_plane(norm, first, count, [&](int64_t c, int64_t at) {
      k.normalize(plane, x + at, nullptr, norm.pixels, factors.scale[c], factors.shift[c], 1, norm.relu, false, nullptr,
                  soon);
      const int64_t to = at / norm.pixels * pooled;
      k.max_pool_plane(g, split, plane, y + to, taps + to, scratch);
    });
  });
}

void batch_norm_max_pool2d_grad(const BatchNorm& norm, const Pool2dGeometry& g, const float* dy, const uint8_t* taps,
                                const float* x, float* dx, float* d_weight, float* d_bias) {
  use_huge_pages(dx, norm.batch * norm.channels * norm.pixels);
  const Kernels& k = kernels();
  const PoolSplit split = pool_split(g);
  const int64_t pooled = g.out_h * g.out_w;
  const bool stream = streams(norm) && norm.pixels % kAlign == 0;
  each_block(norm, [&](int64_t first, int64_t count, int64_t soon) {
    Scratch memory;
    float* const planes = memory.get(norm.batch * count * norm.pixels);  // the gradient of what is pooled
    float* const scratch = memory.get(split.floats);
    auto before_pooling = [&](int64_t at) {
      const int64_t image = at / (norm.channels * norm.pixels);
      return planes + at - (image * (norm.channels - count) + first) * norm.pixels;
    };
    const auto grads =
        gradients(norm, first, count, d_weight, d_bias,
                  [&](const NormGrad& grad, int64_t, int64_t at, int64_t floats, SpreadSums& sums) {
                    const int64_t from = at / norm.pixels * pooled;
                    if (at % norm.pixels == 0)
                      k.max_pool_grad_plane(g, split, dy + from, taps + from, before_pooling(at), scratch, false);
                    k.norm_sums(grad, before_pooling(at), x + at, nullptr, floats, sums);
                  });
    each_plane(norm, first, count, [&](int64_t c, int64_t at) {
      k.norm_input_grad(grads[c], before_pooling(at), x + at, nullptr, norm.pixels, dx + at, nullptr, stream, soon);
    });
  });
}

}  // namespace sparsekit
