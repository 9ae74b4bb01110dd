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

#include "cpu/batch_norm.h"
#include "cpu/depthwise.h"
#include "cpu/packed_weight.h"
#include "cpu/parallel.h"
#include "cpu/walk.h"

namespace sparsekit {
namespace {

// Chosen by measurement (benchmarks/layers.py) for 32 KB of first-level and 1 MB of second-level cache; 48 KB and 2 MB
// would gain nothing by other sizes.
constexpr int64_t kTileLanes = 256;           // at most, in a tile
constexpr int64_t kDirectLanes = 512;         // the same, where the source is not packed
constexpr int64_t kTileFloats = 128 * 1024;   // of packed source that stay in the second-level cache
constexpr int64_t kTileSides = 192 * 1024;    // the same, of source and target together, where neither is packed
constexpr int64_t kTogetherRows = 256;        // of results that are put together, at most
constexpr int64_t kChunks = 8;                // of tiles, at most, with partial sums of a gradient
constexpr int64_t kManyWeights = 128 * 1024;  // of which kChunks sums would take too much memory: half as many

int64_t direct_lanes(const Walk& walk) {
  const int64_t fits = kTileSides / std::max<int64_t>(1, walk.source_channels + walk.rows);
  return std::clamp(fits / kStripLanes * kStripLanes, kStripLanes, kDirectLanes);
}

// Whether sums may start from a residual, and whether from one that counts by bits; the walk is cut into tiles.
bool can_start(const Walk& walk) { return walk.parts.size() == 1 && !walk.parts[0].empty; }

bool can_start_by_bits(const Walk& walk) {
  const Images& to = walk.target;
  const bool whole_plane = walk.tile_h == 1 && walk.tile_w == walk.target_w && to.channel == walk.target_w;
  const bool whole_bytes = walk.tile_w % kAlign == 0 && to.channel % kAlign == 0 && to.row % kAlign == 0 &&
                           (walk.tile_h == 1 || walk.pitch % kAlign == 0);
  return can_start(walk) && writes_in_place(walk) && to.image % to.channel == 0 && (whole_plane || whole_bytes);
}

// Whether results are too large for the caches, and their rows follow each other without a gap, but not in whole lines:
// a line that is written past the caches in two parts costs more than many whole ones.
bool puts_together(const Walk& walk) {
  const Images& to = walk.target;
  return writes_in_place(walk) && walk.tile_h == 1 && walk.tile_w == walk.target_w && to.channel == walk.target_w &&
         to.channel % kAlign != 0 && walk.large();
}

// As PreparedWalk cuts it.
void cut(Walk& walk) {
  const int64_t channels = std::max<int64_t>(1, walk.source_channels);
  const int64_t fits = kTileFloats / channels / kStripLanes * kStripLanes;
  merge_rows(walk);
  choose_tile(walk, walk.direct ? direct_lanes(walk) : std::clamp(fits, kStripLanes, kTileLanes), 16,
              kernels().shifts_sums);
}

}  // namespace

// A walk that is cut into tiles, with the weight packed for them: all that does not depend on where the images are.
class PreparedWalk {
 public:
  PreparedWalk(Walk walk, const Csr& csr) : walk_(std::move(walk)) {
    cut(walk_);
    // Few tiles: cut the rows too, so that every thread has work; the price is that every thread packs the tile.
    const int64_t wanted = 2 * torch::stable::get_num_threads();
    splits_ =
        std::clamp<int64_t>(wanted / std::max<int64_t>(1, walk_.tiles() * walk_.groups), 1, ceil_div(walk_.rows, 16));
    if (puts_together(walk_)) splits_ = std::max(splits_, ceil_div(walk_.rows, kTogetherRows));
    // Only with one block is a large target written past the caches.
    block_ = block_channels(walk_, csr, kStripLanes, walk_.pointwise() && !walk_.large() ? 16 : 32);
    blocks_ = ceil_div(std::max<int64_t>(1, walk_.source_channels), block_);
    results_ = walk_.result_stride();
    for (const Part& part : walk_.parts) {
      results_at_.push_back(part.empty ? 0 : results_);
      if (part.empty) continue;
      weights_.emplace_back(walk_, part, csr, block_, splits_, true, false, walk_.shifting);
      results_ += ceil_div(walk_.rows, splits_) * walk_.result_stride();
    }
  }

  void run(float* source, float* target, const Epilogue& epilogue) const {
    Queue(tasks()).run([&](Queue::Worker& worker) {
      Runner runner(*this, source, target, epilogue);
      for (; !worker.done(); worker.advance()) runner.run(worker.task(), worker.next());
    });
  }

  // Whether the epilogue may have a residual.
  bool takes_residual() const { return can_start(walk_); }
  // And bits that say where it counts.
  bool takes_counts() const { return can_start_by_bits(walk_); }

  // Tasks are independent of each other; neighbours are near in memory.
  int64_t tasks() const { return walk_.tiles() * walk_.groups * splits_; }

  // A thread that runs tasks.
  class Runner {
   public:
    Runner(const PreparedWalk& prepared, float* source, float* target, const Epilogue& epilogue)
        : prepared_(prepared), walk_(prepared.walk_), epilogue_(epilogue) {
      walk_.source.data = source;
      walk_.target.data = target;
      residual_ = walk_;  // the same pixels of another tensor
      residual_.target.data = const_cast<float*>(epilogue.residual);
      starts_in_place_ = writes_in_place(walk_);
      together_ = puts_together(walk_) && !epilogue.adds;
      in_place_ = starts_in_place_ && !together_ && !epilogue.adds;
      // A large target would evict everything on its way to memory, and each line would be read before it is written.
      streamed_ = walk_.large() && in_place_ && prepared_.blocks_ == 1;
      // Where a tile serves several splits of the rows, all of its blocks stay packed until they are done.
      block_floats_ = prepared_.block_ * walk_.channel_stride;
      const int64_t packed_blocks = prepared_.splits_ > 1 ? prepared_.blocks_ : 1;
      const int64_t source_floats = walk_.direct ? 0 : packed_blocks * block_floats_;
      packed_ = scratch_.get(source_floats);
      std::fill_n(packed_, source_floats, 0.0f);
      if (in_place_) return;
      const int64_t stride = walk_.result_stride();
      result_ = scratch_.get(prepared_.results_);
      std::fill_n(result_, stride, 0.0f);
      for (int64_t at : prepared_.results_at_) lanes_.push_back({result_ + at, at ? stride : 0});
    }

    // next: the task that will follow, whose source is prefetched; negative if there is none.
    void run(int64_t task, int64_t next) {
      const int64_t splits = prepared_.splits_, blocks = prepared_.blocks_, block = prepared_.block_;
      const int64_t rows = walk_.rows, stride = together_ ? walk_.target_w : walk_.result_stride();
      const int64_t split = task % splits, group = group_of(task);
      const TileAt tile = tile_of(task);
      const int64_t first = rows * split / splits, count = rows * (split + 1) / splits - first;
      const int64_t channel = group * rows + first;
      if (epilogue_.residual && !starts_in_place_)
        pack_target(residual_, tile, channel, count, result_ + stride, stride);
      for (int64_t b = 0; b < blocks; ++b) {
        float* const at = packed_ + (splits > 1 && !walk_.direct ? b * block_floats_ : 0);
        const bool again = splits > 1 && !walk_.direct && packed_tile_ == task / splits;
        Tile source{again ? at : block_at(walk_, tile, channels_of(walk_, group, b, block), at)};
        if (b + 1 < blocks) {
          source.soon = source_of(walk_, tile, channels_of(walk_, group, b + 1, block));
        } else if (next >= 0) {
          source.soon = source_of(walk_, tile_of(next), channels_of(walk_, group_of(next), 0, block));
        }
        size_t w = 0;
        for (size_t p = 0; p < walk_.parts.size(); ++p) {
          if (walk_.parts[p].empty) continue;
          Results out{in_place_ ? target_at(walk_, tile, channel) : result_ + prepared_.results_at_[p],
                      in_place_ ? walk_.target.channel : stride};
          if (b == 0 && epilogue_.bias) out.bias = epilogue_.bias + channel;
          if (b > 0 || epilogue_.residual) {
            const bool elsewhere = b == 0 && starts_in_place_;
            out.start = elsewhere ? target_at(residual_, tile, channel) : out.data;
            out.start_stride = elsewhere ? walk_.target.channel : out.stride;
            if (b == 0 && epilogue_.counts) {
              const int64_t plane = walk_.target.channel, at = out.start - epilogue_.residual;
              out.counts_stride = bit_bytes(plane);
              out.counts = epilogue_.counts + at / plane * out.counts_stride + at % plane / 8;
            }
          }
          out.stream = streamed_ && aligned(out.data, out.stride);
          const bool finish = b + 1 == blocks;
          out.low = finish ? epilogue_.low : -kInfinity;
          out.high = finish ? epilogue_.high : kInfinity;
          int64_t lanes = tile.lanes(walk_);
          if (walk_.shifting && !in_place_) {
            lanes = tile.h * walk_.pitch;
            source.run = source.jump = out.jump = walk_.pitch;
          }
          kernels().spmm(source, prepared_.weights_[w++].rows(group, b, split), out, lanes);
          source.soon = {};
        }
      }
      packed_tile_ = task / splits;
      if (epilogue_.adds) {
        add_target(walk_, tile, channel, count, lanes_);
      } else if (together_) {
        kernels().stream(target_at(walk_, tile, channel), result_ + prepared_.results_at_[0], count * stride);
        kernels().finish_streams();
      } else if (!in_place_) {
        write_target(walk_, tile, channel, count, lanes_);
      }
    }

   private:
    TileAt tile_of(int64_t task) const { return tile_at(walk_, task / prepared_.splits_ / walk_.groups); }
    int64_t group_of(int64_t task) const { return task / prepared_.splits_ % walk_.groups; }

    const PreparedWalk& prepared_;
    Walk walk_, residual_;
    const Epilogue epilogue_;
    bool starts_in_place_, together_, in_place_, streamed_;
    int64_t block_floats_, packed_tile_ = -1;
    Scratch scratch_;
    float *packed_, *result_ = nullptr;
    std::vector<Lanes> lanes_;
  };

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

// The weight gradient: partial sums over a fixed number of chunks of tiles, whatever the number of threads, that are
// then added in order.
class ValuesGrad {
 public:
  ValuesGrad(const Conv2dGeometry& g, const Csr& weight, const Images& dy, const Images& x)
      : walk_(tiled(g, dy, x)),
        block_(block_channels(walk_, weight, 2 * kStripLanes, 16)),
        chunks_(std::min(walk_.tiles(), weight.nnz < kManyWeights ? kChunks : kChunks / 2)),
        splits_(std::clamp<int64_t>(ceil_div(torch::stable::get_num_threads(), chunks_ * walk_.groups), 1,
                                    ceil_div(walk_.rows, 16))),
        weight_(weight),
        packed_(walk_, walk_.parts[0], weight, block_, splits_, false),
        partial_(new float[chunks_ * packed_.size()]) {
    parallel(chunks_, [&](int64_t begin, int64_t end) {
      std::fill_n(partial_.get() + begin * packed_.size(), (end - begin) * packed_.size(), 0.0f);
    });
  }

  int64_t tiles() const { return walk_.tiles(); }
  int64_t tasks() const { return chunks_ * walk_.groups * splits_; }
  bool chunks_are_tasks() const { return walk_.groups * splits_ == 1; }

  void run() const {
    Queue(tasks()).run([&](Queue::Worker& worker) {
      Runner runner(*this);
      for (; !worker.done(); worker.advance()) runner.run(worker.task(), [](int64_t) {});
    });
  }

  // A thread that runs tasks.
  class Runner {
   public:
    explicit Runner(const ValuesGrad& values)
        : values_(values), walk_(values.walk_), splits_(values.splits_), stride_(walk_.result_stride()) {
      const int64_t source_floats = walk_.direct ? 0 : values.block_ * walk_.channel_stride;
      packed_ = scratch_.get(source_floats);
      std::fill_n(packed_, source_floats, 0.0f);
      if (writes_in_place(walk_)) return;
      const int64_t copied = ceil_div(walk_.rows, splits_) * stride_;
      copy_ = scratch_.get(copied);
      std::fill_n(copy_, copied, 0.0f);
    }

    // before(tile) is called before every tile of the task.
    template <class F>
    void run(int64_t task, const F& before) {
      const PackedWeight& packed = values_.packed_;
      const int64_t chunks = values_.chunks_, block = values_.block_, tiles = walk_.tiles();
      const int64_t split = task % splits_, group = task / splits_ % walk_.groups;
      const int64_t chunk = task / splits_ / walk_.groups;
      const int64_t first = packed.first_row(split), count = packed.first_row(split + 1) - first;
      const int64_t channel = group * walk_.rows + first, end = tiles * (chunk + 1) / chunks;
      for (int64_t index = tiles * chunk / chunks; index < end; ++index) {
        before(index);
        const TileAt tile = tile_at(walk_, index);
        const float* lanes = target_at(walk_, tile, channel);
        int64_t lanes_stride = walk_.target.channel;
        if (copy_) {
          pack_target(walk_, tile, channel, count, copy_, stride_);
          lanes = copy_;
          lanes_stride = stride_;
        }
        for (int64_t b = 0; b < packed.blocks(); ++b) {
          Tile source{block_at(walk_, tile, channels_of(walk_, group, b, block), packed_)};
          if (b + 1 < packed.blocks()) {
            source.soon = source_of(walk_, tile, channels_of(walk_, group, b + 1, block));
          } else if (index + 1 < end) {
            source.soon = source_of(walk_, tile_at(walk_, index + 1), channels_of(walk_, group, 0, block));
          }
          kernels().sddmm(source, packed.rows(group, b, split), lanes, lanes_stride, tile.lanes(walk_),
                          values_.partial_.get() + chunk * packed.size());
        }
      }
    }

   private:
    const ValuesGrad& values_;
    const Walk& walk_;
    const int64_t splits_, stride_;
    Scratch scratch_;
    float *packed_, *copy_ = nullptr;
  };

  // After all tasks.
  void finish(float* grad) const {
    const int64_t size = packed_.size();
    float* const sum = partial_.get();
    if (size > 0)
      torch::stable::parallel_for(0, size, 4096, [&](int64_t begin, int64_t end) {
        for (int64_t chunk = 1; chunk < chunks_; ++chunk)
          for (int64_t j = begin; j < end; ++j) sum[j] += partial_[chunk * size + j];
      });
    packed_.unpack(weight_, sum, grad);
  }

 private:
  static Walk tiled(const Conv2dGeometry& g, const Images& dy, const Images& x) {
    Walk walk = forward_walk(g, x, dy);
    merge_rows(walk);
    choose_tile(walk, walk.direct ? direct_lanes(walk) : kTileLanes, 48);
    return walk;
  }

  const Walk walk_;
  const int64_t block_, chunks_, splits_;
  const Csr weight_;
  const PackedWeight packed_;
  const std::unique_ptr<float[]> partial_;
};

void conv2d_values_grad(const Conv2dGeometry& g, const Csr& weight, const Images& dy, const Images& x, float* grad) {
  if (is_depthwise(g, x, dy)) return depthwise_values_grad(g, weight, dy, x, grad);
  const ValuesGrad values(g, weight, dy, x);
  values.run();
  values.finish(grad);
}

namespace {

// plane: floats of a channel of an image.
void add_to(const Images& to, const Addend& other, int64_t floats, int64_t plane) {
  constexpr int64_t kFloats = 1 << 16;
  if (other.bits) {
    parallel(floats / plane, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * plane; i < end * plane; ++i) {
        const int64_t pixel = i % plane;
        const int bits = other.bits[i / plane * bit_bytes(plane) + pixel / 8];
        if (bits >> pixel % 8 & 1) to.data[i] += other.data[i];
      }
    });
    return;
  }
  parallel(ceil_div(floats, kFloats), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kFloats; i < std::min(floats, end * kFloats); ++i) to.data[i] += other.data[i];
  });
}

}  // namespace

bool adds_by_bits(const Conv2dGeometry& g, const Images& dy, const Images& dx) {
  if (is_depthwise(g, dx, dy)) return false;
  Walk walk = input_grad_walk(g, dy, dx);
  cut(walk);
  return can_start_by_bits(walk);
}

void conv2d_grads(const Conv2dGeometry& g, const Csr& weight, const Csr& weight_t, const Addend& other,
                  const Images& dy, const Images& x, const Images& dx, float* grad) {
  const int64_t floats = g.batch * g.in_channels * g.in_h * g.in_w, plane = g.in_h * g.in_w;
  const bool adds = other.data == dx.data;
  if (is_depthwise(g, x, dy) || weight.nnz == 0) {
    Scratch scratch;
    Images product = dx;
    if (adds) product.data = scratch.get(floats);
    conv2d_input_grad(g, weight_t, dy, product);
    if (weight.nnz > 0) conv2d_values_grad(g, weight, dy, x, grad);
    if (adds) add_to(dx, {product.data}, floats, plane);
    if (other.data && !adds) add_to(dx, other, floats, plane);
    return;
  }
  use_huge_pages(dx.data, floats);
  const PreparedWalk input(input_grad_walk(g, dy, dx), weight_t);
  const bool starts = other.data && (other.bits ? input.takes_counts() : input.takes_residual());
  Epilogue epilogue;
  if (starts) epilogue.residual = other.data, epilogue.counts = other.bits;
  epilogue.adds = adds && !starts;
  const ValuesGrad values(g, weight, dy, x);
  if (values.chunks_are_tasks() && g.stride_h * g.stride_w == 1) {
    // dy is read from memory once: next to a tile of the one gradient comes that of the other. With strides dy is the
    // smallest of the three, and x and dx would only push each other out of the caches.
    const int64_t tiles = values.tiles(), tasks = input.tasks();
    Queue(values.tasks(), 1).run([&](Queue::Worker& worker) {
      PreparedWalk::Runner products(input, dy.data, dx.data, epilogue);
      ValuesGrad::Runner sums(values);
      for (; !worker.done(); worker.advance())
        sums.run(worker.task(), [&](int64_t tile) {
          const int64_t end = tasks * (tile + 1) / tiles;
          for (int64_t task = tasks * tile / tiles; task < end; ++task)
            products.run(task, task + 1 < tasks ? task + 1 : -1);
        });
    });
  } else {
    input.run(dy.data, dx.data, epilogue);
    values.run();
  }
  values.finish(grad);
  if (other.data && !starts && !adds) add_to(dx, other, floats, plane);
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
