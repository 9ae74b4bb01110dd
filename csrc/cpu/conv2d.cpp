// Sparse convolution on the CPU: forward, input gradient and masked weight gradient, as one kind of walk.
//
// A walk is cut into tiles of output pixels; a thread copies the source pixels of a tile into a packed block of
// channels (zero padding included, a strided source split by residue), so that every kept weight becomes one offset
// into the block, and hands it to the microkernels; a pointwise walk over aligned rows reads the source itself. Every
// output is reduced by one thread in an order that depends on the shapes alone, so results do not depend on the number
// of threads. Bound by memory below about 10 % of kept weights, by loads per FMA above.

#include "cpu/conv2d.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/depthwise.h"
#include "cpu/packed_weight.h"
#include "cpu/parallel.h"
#include "cpu/walk.h"

namespace sparsekit {
namespace {

// Chosen by measurement (benchmarks/layers.py) for 32 KB of first-level and 1 MB of second-level cache; 48 KB and 2 MB
// would gain nothing by other sizes.
constexpr int64_t kTileLanes = 256;          // at most, in a tile
constexpr int64_t kDirectLanes = 512;        // the same, where the source is not packed
constexpr int64_t kTileFloats = 128 * 1024;  // of packed source that stay in the second-level cache
constexpr int64_t kStreamFloats = 3 << 20;   // of a target that is too large for the caches

thread_local Scratch tile_scratch, result_scratch;

}  // namespace

// A walk that is cut into tiles, with the weight packed for them: all that does not depend on where the images are.
class PreparedWalk {
 public:
  PreparedWalk(Walk walk, const Csr& csr) : walk_(std::move(walk)) {
    const int64_t channels = std::max<int64_t>(1, walk_.source_channels);
    const int64_t fits = kTileFloats / channels / kStripLanes * kStripLanes;
    merge_rows(walk_);
    choose_tile(walk_, walk_.direct ? kDirectLanes : std::clamp(fits, kStripLanes, kTileLanes), 16, true);
    // Few tiles: cut the rows too, so that every thread has work; the price is that every thread packs the tile.
    const int64_t wanted = 2 * torch::stable::get_num_threads();
    splits_ =
        std::clamp<int64_t>(wanted / std::max<int64_t>(1, walk_.tiles() * walk_.groups), 1, ceil_div(walk_.rows, 16));
    block_ = block_channels(walk_, csr, kStripLanes, 32);
    blocks_ = ceil_div(channels, block_);
    results_ = walk_.result_stride();
    for (const Part& part : walk_.parts) {
      results_at_.push_back(part.empty ? 0 : results_);
      if (part.empty) continue;
      weights_.emplace_back(walk_, part, csr, block_, splits_, true, false, walk_.shifting);
      results_ += ceil_div(walk_.rows, splits_) * walk_.result_stride();
    }
  }

  void run(float* source, float* target, const Epilogue& epilogue) const {
    Walk walk = walk_;
    walk.source.data = source;
    walk.target.data = target;
    Walk residual = walk;  // the same pixels of another tensor
    residual.target.data = const_cast<float*>(epilogue.residual);
    const int64_t groups = walk.groups, rows = walk.rows, stride = walk.result_stride();
    const bool in_place = writes_in_place(walk);
    // A large target would evict everything on its way to memory, and each line would be read before it is written.
    const int64_t floats = walk.images * walk.groups * rows * walk.target_h * walk.target_w;
    const bool streamed = floats >= kStreamFloats && in_place && blocks_ == 1;
    auto tile_of = [&](int64_t task) { return tile_at(walk, task / splits_ / groups); };
    auto group_of = [&](int64_t task) { return task / splits_ % groups; };
    Queue(walk.tiles() * groups * splits_).run([&](Queue::Worker& worker) {
      // Where a tile serves several splits of the rows, all of its blocks stay packed until they are done.
      const int64_t block_floats = block_ * walk.channel_stride, packed_blocks = splits_ > 1 ? blocks_ : 1;
      const int64_t source_floats = walk.direct ? 0 : packed_blocks * block_floats;
      float* scratch = tile_scratch.get(source_floats);
      std::fill_n(scratch, source_floats, 0.0f);
      int64_t packed = -1;
      float* result = nullptr;
      std::vector<Lanes> lanes;
      if (!in_place) {
        result = result_scratch.get(results_);
        std::fill_n(result, stride, 0.0f);
        for (int64_t at : results_at_) lanes.push_back({result + at, at ? stride : 0});
      }
      for (; !worker.done(); worker.advance()) {
        const int64_t split = worker.task() % splits_, group = group_of(worker.task());
        const TileAt tile = tile_of(worker.task());
        const int64_t first = rows * split / splits_, count = rows * (split + 1) / splits_ - first;
        const int64_t channel = group * rows + first;
        if (epilogue.residual && !in_place) pack_target(residual, tile, channel, count, result + stride, stride);
        for (int64_t b = 0; b < blocks_; ++b) {
          float* const at = scratch + (splits_ > 1 && !walk.direct ? b * block_floats : 0);
          const bool again = splits_ > 1 && !walk.direct && packed == worker.task() / splits_;
          Tile source{again ? at : block_at(walk, tile, channels_of(walk, group, b, block_), at)};
          if (b + 1 < blocks_) {
            source.soon = source_of(walk, tile, channels_of(walk, group, b + 1, block_));
          } else if (!worker.last()) {
            source.soon =
                source_of(walk, tile_of(worker.next()), channels_of(walk, group_of(worker.next()), 0, block_));
          }
          size_t w = 0;
          for (size_t p = 0; p < walk.parts.size(); ++p) {
            if (walk.parts[p].empty) continue;
            Results out{in_place ? target_at(walk, tile, channel) : result + results_at_[p],
                        in_place ? walk.target.channel : stride};
            if (b == 0 && epilogue.bias) out.bias = epilogue.bias + channel;
            if (b > 0 || epilogue.residual) {
              out.start = b == 0 && in_place ? target_at(residual, tile, channel) : out.data;
              out.start_stride = out.stride;
            }
            out.stream = streamed && aligned(out.data, out.stride);
            const bool finish = b + 1 == blocks_;
            out.low = finish ? epilogue.low : -kInfinity;
            out.high = finish ? epilogue.high : kInfinity;
            int64_t lanes = tile.lanes(walk);
            if (walk.shifting && !in_place) {
              lanes = tile.h * walk.pitch;
              source.run = source.jump = out.jump = walk.pitch;
            }
            kernels().spmm(source, weights_[w++].rows(group, b, split), out, lanes);
            source.soon = {};
          }
        }
        packed = worker.task() / splits_;
        if (!in_place) write_target(walk, tile, channel, count, lanes);
      }
    });
  }

 private:
  Walk walk_;
  std::vector<PackedWeight> weights_;  // of the parts that have taps
  std::vector<int64_t> results_at_;    // of every part in a thread's scratch; parts without taps share a row of zeros
  int64_t splits_, block_, blocks_, results_;
};

void conv2d(const Conv2dGeometry& g, const Csr& weight, const float* bias, const Images& x, const Images& y) {
  if (is_depthwise(g, x, y)) return depthwise(g, weight, bias, x, y);
  use_huge_pages(y.data, g.batch * g.out_channels * g.out_h * g.out_w);
  PreparedWalk(forward_walk(g, x, y), weight).run(x.data, y.data, {bias});
}

void FixedConv2d::run(const Conv2dGeometry& g, const Images& x, const Images& y, const Epilogue& epilogue) {
  use_huge_pages(y.data, g.batch * g.out_channels * g.out_h * g.out_w);
  prepared(g, x, y)->run(x.data, y.data, epilogue);
}

std::shared_ptr<const PreparedWalk> FixedConv2d::prepared(const Conv2dGeometry& g, const Images& x, const Images& y) {
  constexpr size_t kKept = 8;
  const Key key{g.batch,
                g.in_channels,
                g.in_h,
                g.in_w,
                g.out_channels,
                g.out_h,
                g.out_w,
                g.kernel_h,
                g.kernel_w,
                g.stride_h,
                g.stride_w,
                g.pad_top,
                g.pad_left,
                g.dilation_h,
                g.dilation_w,
                g.groups,
                x.image,
                x.channel,
                x.row,
                x.col,
                y.image,
                y.channel,
                y.row,
                y.col,
                aligned(x.data, 0),
                aligned(y.data, 0),
                torch::stable::get_num_threads()};
  const std::lock_guard lock(mutex_);
  for (auto& entry : latest_) {
    if (entry.first != key) continue;
    if (&entry != &latest_.front()) std::swap(entry, latest_.front());
    return latest_.front().second;
  }
  if (latest_.size() == kKept) latest_.pop_back();
  latest_.insert(latest_.begin(), {key, std::make_shared<const PreparedWalk>(forward_walk(g, x, y), weight_)});
  return latest_.front().second;
}

void conv2d_input_grad(const Conv2dGeometry& g, const Csr& weight_t, const Images& dy, const Images& dx) {
  if (is_depthwise(g, dx, dy)) return depthwise_input_grad(g, weight_t, dy, dx);
  use_huge_pages(dx.data, g.batch * g.in_channels * g.in_h * g.in_w);
  PreparedWalk(input_grad_walk(g, dy, dx), weight_t).run(dy.data, dx.data, {});
}

void conv2d_values_grad(const Conv2dGeometry& g, const Csr& weight, const Images& dy, const Images& x, float* grad) {
  if (is_depthwise(g, x, dy)) return depthwise_values_grad(g, weight, dy, x, grad);
  Walk walk = forward_walk(g, x, dy);
  merge_rows(walk);
  choose_tile(walk, walk.direct ? kDirectLanes : kTileLanes, 48);
  const int64_t block = block_channels(walk, weight, 2 * kStripLanes, 16);
  const int64_t tiles = walk.tiles();
  // Partial sums over a fixed number of chunks of tiles, whatever the number of threads, then added in order.
  constexpr int64_t kChunks = 8;
  const int64_t chunks = std::min(tiles, kChunks), threads = torch::stable::get_num_threads();
  const int64_t splits = std::clamp<int64_t>(ceil_div(threads, chunks * walk.groups), 1, ceil_div(walk.rows, 16));
  const PackedWeight packed(walk, walk.parts[0], weight, block, splits, false);
  const int64_t size = packed.size();
  std::unique_ptr<float[]> partial(new float[(chunks + 1) * size]);
  parallel(chunks,
           [&](int64_t begin, int64_t end) { std::fill_n(partial.get() + begin * size, (end - begin) * size, 0.0f); });
  const int64_t stride = walk.result_stride();
  Queue(chunks * walk.groups * splits).run([&](Queue::Worker& worker) {
    const int64_t source_floats = walk.direct ? 0 : block * walk.channel_stride;
    float* scratch = tile_scratch.get(source_floats);
    std::fill_n(scratch, source_floats, 0.0f);
    float* copy = nullptr;
    if (!writes_in_place(walk)) {
      const int64_t copied = ceil_div(walk.rows, splits) * stride;
      copy = result_scratch.get(copied);
      std::fill_n(copy, copied, 0.0f);
    }
    for (; !worker.done(); worker.advance()) {
      const int64_t task = worker.task();
      const int64_t split = task % splits, group = task / splits % walk.groups, chunk = task / splits / walk.groups;
      const int64_t first = packed.first_row(split), count = packed.first_row(split + 1) - first;
      const int64_t channel = group * walk.rows + first, end = tiles * (chunk + 1) / chunks;
      for (int64_t index = tiles * chunk / chunks; index < end; ++index) {
        const TileAt tile = tile_at(walk, index);
        const float* lanes = target_at(walk, tile, channel);
        int64_t lanes_stride = walk.target.channel;
        if (copy) {
          pack_target(walk, tile, channel, count, copy, stride);
          lanes = copy;
          lanes_stride = stride;
        }
        for (int64_t b = 0; b < packed.blocks(); ++b) {
          Tile source{block_at(walk, tile, channels_of(walk, group, b, block), scratch)};
          if (b + 1 < packed.blocks()) {
            source.soon = source_of(walk, tile, channels_of(walk, group, b + 1, block));
          } else if (index + 1 < end) {
            source.soon = source_of(walk, tile_at(walk, index + 1), channels_of(walk, group, 0, block));
          }
          kernels().sddmm(source, packed.rows(group, b, split), lanes, lanes_stride, tile.lanes(walk),
                          partial.get() + chunk * size);
        }
      }
    }
  });
  float* sum = partial.get() + chunks * size;
  if (size > 0)
    torch::stable::parallel_for(0, size, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        float total = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial[chunk * size + j];
        sum[j] = total;
      }
    });
  packed.unpack(weight, sum, grad);
}

void bias_grad(const Conv2dGeometry& g, const Images& dy, float* grad) {
  // Sixteen running sums per channel: accurate enough for large images, and the same for any number of threads.
  constexpr int64_t kSums = 16;
  parallel(ceil_div(g.out_channels, kSums), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kSums, count = std::min(kSums, g.out_channels - first);
      double total[kSums] = {};
      for (int64_t n = 0; n < g.batch; ++n)
        for (int64_t y = 0; y < g.out_h; ++y) {
          const float* row = dy.data + n * dy.image + first * dy.channel + y * dy.row;
          if (dy.channel == 1) {
            for (int64_t x = 0; x < g.out_w; ++x)
              for (int64_t c = 0; c < count; ++c) total[c] += row[x * dy.col + c];
          } else {
            for (int64_t c = 0; c < count; ++c) {
              double sums[4] = {};
              for (int64_t x = 0; x < g.out_w; ++x) sums[x % 4] += row[c * dy.channel + x * dy.col];
              total[c] += (sums[0] + sums[1]) + (sums[2] + sums[3]);
            }
          }
        }
      for (int64_t c = 0; c < count; ++c) grad[first + c] = static_cast<float>(total[c]);
    }
  });
}

}  // namespace sparsekit
