// Plane by plane: a thread copies a plane between margins of zeros, so that every tap is one offset, and lets the
// microkernels run over all of its pixels as if the stride were 1. Of a strided convolution only the pixels wanted are
// copied out, or those there are copied in with zeros between them: up to four times the work, for what waits for
// memory anyway. A plane, for the weight's gradient a channel, belongs to one thread: results do not depend on their
// number. Bound by memory where planes are large, by loads of taps where they are small.

#include "cpu/depthwise.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/conv2d.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace sparsekit {
namespace {

constexpr int64_t kSlack = 64;  // floats that the microkernels may read behind a plane

// What a plane looks like between its margins.
struct Frame {
  Frame(const Conv2dGeometry& g, int64_t rows, int64_t cols)
      : pitch(cols + (g.kernel_w - 1) * g.dilation_w),
        lanes((rows - 1) * pitch + cols),
        floats((rows + (g.kernel_h - 1) * g.dilation_h) * pitch + kSlack) {}

  // A thread's own, zero where nobody writes.
  float* zeros(Scratch& scratch) const {
    float* const memory = scratch.get(floats);
    std::memset(memory, 0, floats * sizeof(float));
    return memory;
  }

  int64_t pitch, lanes, floats;
};

// Pixels of the output if its strides were 1.
int64_t full_h(const Conv2dGeometry& g) { return (g.out_h - 1) * g.stride_h + 1; }
int64_t full_w(const Conv2dGeometry& g) { return (g.out_w - 1) * g.stride_w + 1; }

// The taps of every channel as the microkernels want them, offsets into a frame; their number is a multiple of
// `multiple`.
class Taps {
 public:
  Taps(const Conv2dGeometry& g, const Csr& weight, const Frame& frame, bool flipped, int64_t multiple)
      : begin_(weight.rows + 1) {
    for (int64_t c = 0; c < weight.rows; ++c)
      begin_[c + 1] = begin_[c] + round_up(weight.crow[c + 1] - weight.crow[c], multiple);
    offsets_.resize(begin_.back());
    values_.resize(begin_.back());
    for (int64_t c = 0; c < weight.rows; ++c)
      for (int64_t j = weight.crow[c], i = begin_[c]; j < weight.crow[c + 1]; ++j, ++i) {
        int64_t y = weight.col[j] / g.kernel_w, x = weight.col[j] % g.kernel_w;
        if (flipped) y = g.kernel_h - 1 - y, x = g.kernel_w - 1 - x;
        offsets_[i] = y * g.dilation_h * frame.pitch + x * g.dilation_w;
        if (weight.values) values_[i] = weight.values[weight.permutation ? weight.permutation[j] : j];
      }
  }

  // The one row of a channel; sums of its gradient go to place(channel) on.
  Rows row(int64_t channel) const { return {&begin_[channel], kOrder, offsets_.data(), values_.data(), 1}; }
  int64_t place(int64_t channel) const { return begin_[channel]; }
  int64_t size() const { return begin_.back(); }

 private:
  static constexpr int32_t kOrder[1 + Rows::kAhead] = {};

  std::vector<int32_t> begin_;
  std::vector<uint32_t> offsets_;
  std::vector<float> values_;
};

float* plane_of(const Images& images, int64_t image, int64_t channel) {
  return images.data + image * images.image + channel * images.channel;
}

// Copies planes of x into frames: the corner of the padding is that of the frame.
void copy_x(const Conv2dGeometry& g, const Images& x, const float* plane, const Frame& frame, float* to) {
  const int64_t rows = std::min(g.in_h, full_h(g) + (g.kernel_h - 1) * g.dilation_h - g.pad_top);
  const int64_t cols = std::min(g.in_w, frame.pitch - g.pad_left);
  kernels().gather(to + g.pad_top * frame.pitch + g.pad_left, frame.pitch, plane, x.row, 1, rows, cols, 0);
}

// The output planes of a walk: every one of taps over the frame of a source plane, then the pixels at every step.
template <class F>
void each_output(const Conv2dGeometry& g, const Taps& taps, const Frame& frame, const float* bias, const Images& y,
                 int64_t rows, int64_t cols, int64_t step_h, int64_t step_w, const F& fill) {
  use_huge_pages(y.data, g.batch * g.groups * rows * cols);
  Queue(g.batch * g.groups).run([&](Queue::Worker& worker) {
    Scratch scratch;
    float* const source = frame.zeros(scratch);
    float* const result = scratch.get(frame.floats);
    constexpr float kInfinity = __builtin_inff();
    for (; !worker.done(); worker.advance()) {
      const int64_t image = worker.task() / g.groups, channel = worker.task() % g.groups;
      fill(image, channel, source);
      Results out{result, 0};
      out.bias = bias ? bias + channel : nullptr;
      out.low = -kInfinity, out.high = kInfinity;
      kernels().spmm(Tile{source}, taps.row(channel), out, frame.lanes);
      kernels().gather(plane_of(y, image, channel), y.row, result, step_h * frame.pitch, step_w, rows, cols, 0);
    }
  });
}

}  // namespace

bool is_depthwise(const Conv2dGeometry& g, const Images& x, const Images& y) {
  const int64_t reach_h = (g.kernel_h - 1) * g.dilation_h, reach_w = (g.kernel_w - 1) * g.dilation_w;
  return g.groups > 1 && g.in_channels == g.groups && g.out_channels == g.groups && x.col == 1 && y.col == 1 &&
         g.stride_h * g.stride_w <= 4 && g.pad_top <= reach_h && g.pad_left <= reach_w &&
         full_h(g) <= g.in_h + g.pad_top && full_w(g) <= g.in_w + g.pad_left &&
         (g.in_h + reach_h) * (g.in_w + reach_w) < (int64_t{1} << 24);
}

void depthwise(const Conv2dGeometry& g, const Csr& weight, const float* bias, const Images& x, const Images& y) {
  const Frame frame(g, full_h(g), full_w(g));
  const Taps taps(g, weight, frame, false, 1);
  each_output(
      g, taps, frame, bias, y, g.out_h, g.out_w, g.stride_h, g.stride_w,
      [&](int64_t image, int64_t channel, float* source) { copy_x(g, x, plane_of(x, image, channel), frame, source); });
}

void depthwise_input_grad(const Conv2dGeometry& g, const Csr& weight_t, const Images& dy, const Images& dx) {
  const Frame frame(g, g.in_h, g.in_w);
  const Taps taps(g, weight_t, frame, true, 1);
  const int64_t top = (g.kernel_h - 1) * g.dilation_h - g.pad_top, left = (g.kernel_w - 1) * g.dilation_w - g.pad_left;
  each_output(g, taps, frame, nullptr, dx, g.in_h, g.in_w, 1, 1, [&](int64_t image, int64_t channel, float* source) {
    kernels().scatter(source + top * frame.pitch + left, g.stride_h * frame.pitch, g.stride_w,
                      plane_of(dy, image, channel), dy.row, g.out_h, g.out_w);
  });
}

void depthwise_values_grad(const Conv2dGeometry& g, const Csr& weight, const Images& dy, const Images& x, float* grad) {
  const Frame frame(g, full_h(g), full_w(g));
  const Taps taps(g, weight, frame, false, 4);
  Queue(g.groups).run([&](Queue::Worker& worker) {
    Scratch scratch;
    float* const source = frame.zeros(scratch);
    float* const lanes = frame.zeros(scratch);
    std::vector<float> sums(taps.size());
    std::vector<double> totals;
    for (; !worker.done(); worker.advance()) {
      const int64_t channel = worker.task(), first = weight.crow[channel];
      const int64_t count = weight.crow[channel + 1] - first, place = taps.place(channel);
      totals.assign(count, 0);
      for (int64_t image = 0; image < g.batch; ++image) {
        copy_x(g, x, plane_of(x, image, channel), frame, source);
        kernels().scatter(lanes, g.stride_h * frame.pitch, g.stride_w, plane_of(dy, image, channel), dy.row, g.out_h,
                          g.out_w);
        std::fill_n(sums.data() + place, round_up(count, 4), 0.0f);
        kernels().sddmm(Tile{source}, taps.row(channel), lanes, 0, frame.lanes, sums.data());
        for (int64_t j = 0; j < count; ++j) totals[j] += sums[place + j];
      }
      for (int64_t j = 0; j < count; ++j) grad[first + j] = static_cast<float>(totals[j]);
    }
  });
}

}  // namespace sparsekit
