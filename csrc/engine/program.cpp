#include "engine/program.h"

#if defined(__linux__)
#include <unistd.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstring>
#include <deque>
#include <thread>

#include "cpu/dense_weight.h"
#include "cpu/parallel.h"
#include "cpu/pool2d.h"
#include "cpu/walk.h"
#include "engine/paired_conv.h"
#include "engine/tiled_conv.h"

namespace sparsekit {
namespace {

// Chosen by measurement (benchmarks/peers.py).
constexpr int64_t kStripVectors = 4;           // lines of lanes that spmm holds
constexpr int64_t kFewestTasks = 4;            // of a layer, by splitting its rows, for threads that share an image
constexpr int64_t kRowNnz = 13;                // non-zeros of a row in a block of channels, at least
constexpr int64_t kPackedFloats = 128 * 1024;  // of a packed source that the second-level cache holds as a whole
constexpr int64_t kFarWeights = 24 * 1024;  // of a layer, that are not in the second-level cache from the image before
constexpr int64_t kNearFloats = 64 * 1024;  // of sums that stay in the second-level cache
constexpr int64_t kFarFloats = 256 * 1024;  // of a tensor that the second-level cache does not hold, at least
constexpr int64_t kTeam = 2;                // threads that share an image, at least if there are so many
constexpr int64_t kSideBySide = 2;          // images in one tensor
constexpr int64_t kLeastFlat = 48, kMostFlat = 128;  // lanes of a run of rows without zeros between them

// That a strip reads while they stay in the first-level cache, of which results and weights need a part.
int64_t first_level_floats() {
  constexpr int64_t kLeast = 32 << 10;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  static const int64_t bytes = std::max<int64_t>(kLeast, sysconf(_SC_LEVEL1_DCACHE_SIZE));
#else
  static const int64_t bytes = kLeast;
#endif
  return bytes / sizeof(float) * 7 / 8;
}

// Rows that are whole registers without gaps between them, for strips of a good length, of which a plane is a multiple;
// 0 if there are none.
int64_t flat_rows(int64_t h, int64_t w) {
  for (int64_t rows = ceil_div(kLeastFlat, w); rows * w <= kMostFlat && rows < h; ++rows)
    if (rows * w % kAlign == 0 && h % rows == 0) return rows;
  return 0;
}

// Where a pixel of the source is in a channel of the packed block; kNone if no tap reads it, or if it is in two places.
int64_t place_in(const Walk& walk, int64_t y, int64_t x) {
  auto residue = [](int64_t n, int64_t step) { return (n % step + step) % step; };
  const int64_t row = y / walk.step_h, column = walk.left + x / walk.step_w;
  int64_t place = Program::kNone;
  for (const Phase& p : walk.phases) {
    if (residue(p.offset_h - y, walk.step_h) || residue(p.offset_w - x, walk.step_w)) continue;
    if (place != Program::kNone || p.offset_h != y % walk.step_h || p.offset_w != x % walk.step_w ||
        row >= walk.tile_h + p.down || column >= walk.row_lanes())
      return Program::kNone;
    place = p.base + (row + p.up) * walk.pitch + column;
  }
  return place;
}

}  // namespace

// A part of a sum of convolutions: its source, and the weight as packed for it.
struct Program::Term {
  Conv2dGeometry geometry;
  Walk walk;
  Csr weight;
  int64_t in, layer;
  bool direct;               // reads the tensor itself
  bool is_dense;             // computed as if no weight were zero
  const TileKernels* tiles;  // the same, as products of tiles, if all terms of its sum have them
  bool shifts = false;       // its weight is packed for it
  bool two_copies = false;   // of the tensor, half a line apart
  bool written = false;      // whoever writes the tensor writes the packed source
  bool whole = true;         // all channels are packed at once
  bool copied = false;       // by another convolution that reads the same rows
  int64_t packed_floats = 0;
  int64_t packed = 0;  // where the packed source is in an image's memory
  int64_t block = 0, blocks = 0;
  std::unique_ptr<PackedWeight> kernel;
  std::unique_ptr<DenseWeight> dense;
  std::unique_ptr<TiledConv2d> tiled;  // one of the three

  int64_t channels() const { return walk.groups * walk.source_channels; }
  int64_t rows() const { return walk.groups * walk.rows; }
  // Whether it reads one pixel for every lane, and none outside of the image.
  bool pixels_alone() const { return walk.pointwise() && geometry.pad_top == 0 && geometry.pad_left == 0; }
  int64_t first_row(int64_t split) const { return dense ? dense->first_row(split) : kernel->first_row(split); }
};

struct Program::Conv {
  std::vector<Term> terms;
  int64_t out, residual;
  Epilogue epilogue;
  Blocking blocking;
  std::vector<float> bias;  // [rows]
  int64_t layer;
  int64_t layout = 0;          // of what it computes
  int64_t at = 0;              // where that is in an image's memory, as a whole or in part
  std::vector<Move> moves;     // of registers of the result, if that has another layout
  int64_t run_moves = 0;       // registers of a run
  std::vector<Halves> halves;  // the same, if it is a packed source
  int64_t unit = 1;            // registers of lanes that no strip divides
  int64_t parts = 1;           // strips of a row
  int64_t strips = 0, splits = 0;
  int64_t shared_strips = 0;  // where threads share an image: as many for every one

  bool pointwise() const {
    return std::all_of(terms.begin(), terms.end(), [](const Term& term) { return term.walk.pointwise(); });
  }
  bool in_tiles() const {
    return std::all_of(terms.begin(), terms.end(), [](const Term& term) { return term.tiles; });
  }
  // Tensors of which a lane reads that lane alone.
  std::vector<int64_t> own() const {
    std::vector<int64_t> tensors;
    for (const Term& term : terms)
      if (term.direct && term.walk.pointwise()) tensors.push_back(term.in);
    return tensors;
  }
};

// What an image's tensors are in, one after another.
class Program::Memory {
 public:
  explicit Memory(int64_t floats) : memory_(floats) { std::memset(data(), 0, floats * sizeof(float)); }
  float* data() { return memory_.data(); }

 private:
  HugeMemory memory_;
};

Program::Program(std::vector<Size> tensors, std::vector<Size> inputs, std::vector<Size> outputs)
    : inputs_(std::move(inputs)), outputs_(std::move(outputs)) {
  for (const Size& size : tensors) tensors_.push_back({size, layout_of(size.h, size.w, false)});
}

Program::~Program() = default;

int64_t Program::layout_of(int64_t h, int64_t w, bool flat) {
  for (size_t i = 0; i < layouts_.size(); ++i)
    if (layouts_[i].h == h && layouts_[i].w == w && layouts_[i].flat == flat) return i;
  layouts_.push_back({h, w, flat});
  return layouts_.size() - 1;
}

void Program::add_layer(Layer layer) {
  for (int64_t tensor : layer.reads)
    if (tensor >= 0) tensors_.at(tensor).last = layers_.size();
  layers_.push_back(std::move(layer));
}

float* Program::data(const Frame& frame, int64_t tensor) const { return frame.memory + tensors_[tensor].at; }

// Floats from the first row of a channel to another.
int64_t Program::row_at(int64_t tensor, int64_t y) const {
  const Layout& layout = this->layout(tensor);
  const int64_t rows = layout.h / layout.runs;  // of a run
  return y / rows * run_stride(tensor) + y % rows * layout.pitch;
}

// The image that the frame is about. y: a row that is right even if rows are not equally far apart.
Images Program::images(const Frame& frame, int64_t tensor, int64_t y) const {
  if (tensor < 0) {
    Images images = (*frame.inputs)[-1 - tensor];
    images.data += (frame.image + frame.at) * images.image;
    return images;
  }
  const Layout& layout = this->layout(tensor);
  const int64_t row = row_stride(tensor);
  return {data(frame, tensor) + frame.at * layout.step + row_at(tensor, y) - y * row, 0, layout.channel, row, 1};
}

float* Program::lanes(const Frame& frame, int64_t tensor, int64_t channel, int64_t run) const {
  return data(frame, tensor) + run * run_stride(tensor) + channel * layout(tensor).channel;
}

void Program::add_load(int64_t in, int64_t out) {
  tensors_[out].even = true;
  auto add_steps = [=, this] {
    const Size& size = tensors_[out].size;
    // The walk of a pointwise convolution, of which only the copying is done.
    Walk walk = forward_walk({1, size.channels, size.h, size.w, 1, size.h, size.w, 1, 1, 1, 1, 0, 0, 1, 1, 1}, {}, {});
    walk.tile_h = size.h;
    walk.tile_w = size.w;
    walk.pitch = row_stride(out);
    walk.channel_stride = layout(out).channel;
    walk.phases[0].base = 0;
    walk.reused = true;
    add_step(size.h, out, for_each_image([=, this](const Frame& frame, int64_t first, int64_t last) {
               clear_beside(frame, out, first, last);
             }));
    add_copy(
        walk, in, {0, size.channels}, [=, this](const Frame& frame) { return data(frame, out); }, layout(out).step);
  };
  add_layer({{in}, out, kNone, add_steps});
}

// Copies rows of `in` into the packed block of a walk for one tap, some of them at a time that are equally far apart
// here and there. The rest as of add_copy.
Program::Work Program::copy_rows(Walk walk, int64_t in, Range channels, std::function<float*(const Frame&)> block,
                                 int64_t step, const Layout* flat) const {
  const int64_t to_rows = flat ? flat->rows : walk.tile_h, from_rows = in >= 0 ? layout(in).rows : 0;  // of a run
  return [=, this](const Frame& frame, int64_t first, int64_t last) {
    Walk part = walk;
    Images& from = part.source = images(frame, in);
    float* const data = from.data;
    const bool apart = from_rows && walk.step_h % from_rows;
    if (from_rows) from.row = apart ? layout(in).pitch : run_stride(in) / from_rows;
    // The last image's row goes on to the end.
    if (step) part.row = frame.at + 1 < frame.count ? step : walk.row_lanes() - frame.at * step;
    if (flat) part.row = part.pitch = flat->w;
    Phase& p = part.phases[0];
    for (int64_t y = first, next; y < last; y = next) {
      const int64_t row = y * walk.step_h;
      next = std::min(last, (y / to_rows + 1) * to_rows);
      if (apart) {
        next = std::min(next, y + ceil_div(from_rows - row % from_rows, walk.step_h));
        from.data = data + row_at(in, row) - row * from.row;
      }
      p.base = walk.phases[0].base + y / to_rows * walk.pitch + y % to_rows * part.pitch;
      p.up = -y;
      p.down = next - walk.tile_h;
      pack_source(part, {0, 0, 0, walk.grid_h, walk.grid_w}, {channels.first, channels.count},
                  block(frame) + frame.at * step);
    }
  };
}

// Copies channels of `in` into the packed block of a walk. step: floats from an image to the next, where they are side
// by side in it. flat: its layout, if that has runs of several rows.
void Program::add_copy(Walk walk, int64_t in, Range channels, std::function<float*(const Frame&)> block, int64_t step,
                       bool zeros_alone, const Layout* flat) {
  // Rows of one register are better off as neighbours, but for threads that write to both halves of a plane.
  const bool by_rows = walk.pitch > walk.channel_stride;
  const bool uneven = flat || (in >= 0 && layout(in).rows);
  auto plain = [=, this](const Frame& frame, int64_t first, int64_t last) {
    Walk part = walk;
    part.source = images(frame, in);
    float* to = block(frame) + frame.at * step;
    // The last image's row goes on to the end.
    if (step) part.row = frame.at + 1 < frame.count ? step : walk.row_lanes() - frame.at * step;
    Channels some{channels.first, channels.count};
    const TileAt tile{0, 0, 0, walk.grid_h, walk.grid_w};
    if (by_rows) {
      for (Phase& p : part.phases) {
        // With the first and last rows come those beyond them.
        const int64_t begin = first == 0 ? -p.up : first;
        const int64_t end = last == walk.tile_h ? last + p.down : last;
        p.base += (begin + p.up) * walk.pitch;
        p.up = -begin;
        p.down = end - walk.tile_h;
      }
    } else {
      some = {channels.first + first, last - first};
      to += first * walk.channel_stride;
    }
    zeros_alone ? pack_zeros(part, tile, some, to) : pack_source(part, tile, some, to);
  };
  Work copy = uneven ? copy_rows(walk, in, channels, block, step, flat) : Work(plain);
  // What the tail reads of a tensor that is one image's is copied when that image has it.
  const bool tail = std::exchange(in_tail_, in_tail_ && (in < 0 || side_by_side(in)));
  add_step(by_rows || uneven ? walk.tile_h : channels.count, kNone, for_each_image(std::move(copy)));
  in_tail_ = tail;
}

void Program::add_conv2d(const Conv2dGeometry& g, const Csr& weight, bool dense, int64_t in, int64_t out,
                         int64_t residual, const Epilogue& epilogue, const Blocking& blocking) {
  auto conv = std::make_unique<Conv>(Conv{{}, out, residual, epilogue, blocking});
  const bool direct = in >= 0 && g.stride_h == 1 && g.stride_w == 1 && g.in_h == g.out_h && g.in_w == g.out_w;
  const TileKernels* const tiles = dense && TiledConv2d::suits(g) ? kernels().tiles : nullptr;
  // What is pruned hides what is infinite, which other ways to compute all products do not do: not for most of them.
  const bool is_dense = dense && 2 * weight.nnz > g.out_channels * g.in_channels * g.kernel_h * g.kernel_w;
  conv->terms.push_back({g, forward_walk(g, {}, {}), weight, in, int64_t(layers_.size()), direct, is_dense, tiles});
  conv->terms[0].walk.reused = true;
  conv->bias.resize(g.out_channels);
  if (epilogue.bias) std::copy_n(epilogue.bias, g.out_channels, conv->bias.begin());
  const Walk& walk = conv->terms[0].walk;
  Layout& layout = layouts_[tensors_.at(out).layout];
  // Zeros to the right of a row serve as those to the left of the next, if the source has no pixels there.
  const int64_t most = std::max(walk.left, walk.right), both = walk.left + walk.right;
  const bool shared = ceil_div(g.in_w, walk.step_w) <= g.out_w + most - walk.left;
  // A packed copy of rows has its own.
  int64_t& side = direct ? layout.side : layout.packed_side;
  side = std::max(side, shared ? most : both);
  if (direct && (walk.phases[0].up || walk.phases[0].down || both)) {
    layout.up = std::max(layout.up, walk.phases[0].up);
    layout.down = std::max(layout.down, walk.phases[0].down);
    tensors_.at(in).halo = true;
  }
  std::vector<int64_t> reads{in};
  if (residual != kNone) reads.push_back(residual);
  conv->layer = layers_.size();
  Conv* const made = conv.get();
  convs_.push_back(std::move(conv));
  // In the place of its residual, unless it needs that to the end.
  add_layer({reads, out, residual == in ? kNone : residual, [=, this] { add_conv_steps(*made); }});
}

std::vector<int64_t> Program::count_readers() const {
  std::vector<int64_t> readers(tensors_.size());
  for (const Layer& layer : layers_)
    for (int64_t tensor : layer.reads)
      if (tensor >= 0) ++readers[tensor];
  return readers;
}

// A convolution that is nothing but another's residual becomes a part of its sum: its result needs no memory.
void Program::join_residuals() {
  const std::vector<int64_t> readers = count_readers();
  for (auto& conv : convs_)
    for (auto& other : convs_) {
      const Epilogue& e = other->epilogue;
      if (conv->residual != other->out || readers[other->out] != 1 || other->residual != kNone || e.low != -kInfinity ||
          e.high != kInfinity)
        continue;
      for (Term& term : other->terms) conv->terms.push_back(std::move(term));
      other->terms.clear();
      for (size_t r = 0; r < conv->bias.size(); ++r) conv->bias[r] += other->bias[r];
      conv->residual = kNone;
      Layer &layer = layers_[conv->layer], &joined = layers_[other->layer];
      layer.reads = {conv->terms[0].in};
      layer.in_place = kNone;
      for (int64_t tensor : joined.reads) {
        layer.reads.push_back(tensor);
        if (tensor >= 0) tensors_[tensor].last = std::max(tensors_[tensor].last, conv->layer);
      }
      joined = {{}, kNone, kNone, [] {}};
      break;
    }
}

void Program::add_max_pool2d(const Pool2dGeometry& g, int64_t in, int64_t out) {
  if (in >= 0) tensors_[in].even = true;
  auto add_steps = [=, this] {
    auto pool = [=, this](const Frame& frame, int64_t first, int64_t last) {
      Scratch scratch;
      float* const row = scratch.get(pool_scratch(g));
      clear_beside(frame, out, first, last);
      for (int64_t y = first; y < last; ++y)
        kernels().max_pool_row(g, images(frame, in), images(frame, out, y), y, row);
    };
    add_step(g.out_h, out, for_each_image(pool));
    steps().back().backwards = is_far(in);
  };
  add_layer({{in}, out, kNone, add_steps});
}

void Program::add_avg_pool2d(const Pool2dGeometry& g, bool count_padding, int64_t in, int64_t out) {
  if (in >= 0) tensors_[in].even = true;
  auto add_steps = [=, this] {
    auto pool = [=, this](const Frame& frame, int64_t first, int64_t last) {
      Scratch scratch;
      float* const row = scratch.get(pool_scratch(g));
      clear_beside(frame, out, first, last);
      for (int64_t y = first; y < last; ++y)
        kernels().avg_pool_row(g, count_padding, images(frame, in), images(frame, out, y), y, row);
    };
    add_step(g.out_h, out, for_each_image(pool));
  };
  add_layer({{in}, out, kNone, add_steps});
}

// A layer that is f(frame, channel, run) for every channel of every run of what it writes.
void Program::add_runs(std::vector<int64_t> reads, int64_t writes, int64_t in_place,
                       std::function<void(const Frame&, int64_t, int64_t)> f) {
  auto add_steps = [=, this] {
    const int64_t channels = size(writes).channels;
    add_step(channels * layout(writes).runs, writes, [=](const Frame& frame, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) f(frame, i % channels, i / channels);
    });
  };
  add_layer({std::move(reads), writes, in_place, add_steps, true});
}

void Program::add_mean(int64_t in, int64_t out) {
  add_runs({in}, out, kNone, [=, this](const Frame& frame, int64_t c, int64_t) {
    const Layout& from = layout(in);
    float* const to = lanes(frame, out, c, 0);
    std::fill_n(to, layout(out).lanes, 0.0f);
    float sums[kAlign] = {};  // lanes without a pixel are zero
    for (int64_t run = 0; run < from.runs; ++run) {
      const float* const row = lanes(frame, in, c, run);
      const int64_t whole = from.lanes / kAlign * kAlign;
      for (int64_t i = 0; i < whole; i += kAlign)
        for (int64_t k = 0; k < kAlign; ++k) sums[k] += row[i + k];
      for (int64_t i = whole; i < from.lanes; ++i) sums[i - whole] += row[i];
    }
    const int64_t width = kAlign / from.images;
    for (int64_t i = 0; i < from.images; ++i) {
      double total = 0;
      for (int64_t k = i * width; k < (i + 1) * width; ++k) total += sums[k];
      to[i * layout(out).step] = total / (size(in).h * size(in).w);
    }
  });
}

void Program::add_elementwise(Elementwise e, int64_t in, int64_t out) {
  std::vector<int64_t> reads{in};
  for (int64_t tensor : {e.gate, e.other})
    if (tensor != kNone) reads.push_back(tensor);
  add_runs(reads, out, in, [=, this](const Frame& frame, int64_t c, int64_t run) {
    Pointwise p{e.scale.empty() ? 1 : e.scale[c],
                e.shift.empty() ? 0 : e.shift[c],
                e.other == kNone ? nullptr : lanes(frame, e.other, c, run),
                layout(out).mask.empty() ? nullptr : layout(out).mask.data(),
                e.low,
                e.high,
                e.activation};
    if (e.gate != kNone) p.scale *= *lanes(frame, e.gate, c, 0);
    kernels().pointwise(p, lanes(frame, out, c, run), lanes(frame, in, c, run), layout(out).lanes);
  });
  layers_.back().single = e.gate != kNone;
}

void Program::add_gather(const std::vector<int64_t>& in, const std::vector<int64_t>& channels, int64_t out) {
  std::vector<std::pair<int64_t, int64_t>> all, from;
  for (int64_t tensor : in)
    for (int64_t c = 0; c < size(tensor).channels; ++c) all.emplace_back(tensor, c);
  for (int64_t c : channels) from.push_back(all.at(c));
  add_runs(in, out, kNone, [=, this](const Frame& frame, int64_t c, int64_t run) {
    std::memcpy(lanes(frame, out, c, run), lanes(frame, from[c].first, from[c].second, run),
                layout(out).lanes * sizeof(float));
  });
}

void Program::add_store(int64_t in, int64_t output) {
  auto add_steps = [=, this] {
    const Size& size = tensors_[in].size;
    const int64_t rows = size.h / layout(in).runs;  // of a run
    auto run = [=, this](const Frame& frame, int64_t first, int64_t last) {
      const Images& to = (*frame.outputs)[output];
      float* const image = to.data + (frame.image + frame.at) * to.image;
      for (int64_t i = first; i < last; ++i) {
        const int64_t c = i % size.channels, run = i / size.channels;
        const float* const from = lanes(frame, in, c, run) + frame.at * layout(in).step;
        if (size.h * size.w == 1)
          image[c * to.channel] = *from;
        else
          kernels().scatter(image + c * to.channel + run * rows * to.row, to.row, to.col, from, layout(in).pitch, rows,
                            size.w);
      }
    };
    add_step(size.channels * layout(in).runs, kNone, for_each_image(run));
  };
  add_layer({{in}, kNone, kNone, add_steps});
}

// Whether what was written of a tensor first has left the second-level cache when the last of it is written.
bool Program::is_far(int64_t tensor) const {
  return tensor >= 0 && layout(tensor).runs * run_stride(tensor) >= kFarFloats;
}

// What of a source was written last is read first.
bool Program::reads_backwards(const Term& term) const {
  return term.direct && term.walk.pointwise() && is_far(term.in);
}

// Whether two images side by side take fewer registers than twice one, where no row is longer than a register.
bool Program::has_room(const Layout& layout) const {
  const int64_t pitch = layout.w + std::max(layout.side, layout.packed_side);
  return kernels().lanes == kAlign && kSideBySide * pitch <= kAlign &&
         kSideBySide * ceil_div((layout.h - 1) * pitch + layout.w, kAlign) > layout.h;
}

// The layers from which on all tensors have room for a second image. The only ones to read others are convolutions with
// a packed source.
void Program::choose_tail() {
  std::vector<const Conv*> convs(layers_.size());
  for (const auto& conv : convs_)
    if (!conv->terms.empty()) convs[conv->layer] = conv.get();
  auto fits = [&](size_t i) {
    const Layer& layer = layers_[i];
    if (layer.single || (layer.writes != kNone && !has_room(layout(layer.writes)))) return false;
    if (!convs[i]) return true;
    const bool by_rows = size(layer.writes).h > 1;
    return !convs[i]->in_tiles() && !is_paired(*convs[i]) &&
           (by_rows || convs[i]->own().size() == convs[i]->terms.size());
  };
  size_t first = layers_.size();
  while (first > 0 && fits(first - 1)) --first;
  if (std::none_of(convs.begin() + first, convs.end(), [](const Conv* conv) { return conv; })) return;
  std::vector<char> tail(layouts_.size()), written(tensors_.size());
  for (size_t i = first; i < layers_.size(); ++i) {
    if (layers_[i].writes == kNone) continue;
    written[layers_[i].writes] = true;
    tail[tensors_[layers_[i].writes].layout] = true;
  }
  for (size_t i = 0; i < layers_.size(); ++i) {
    if (i < first && layers_[i].writes != kNone && tail[tensors_[layers_[i].writes].layout]) return;
    for (int64_t tensor : layers_[i].reads)
      if (i >= first && !convs[i] && tensor >= 0 && !written[tensor]) return;
  }
  first_of_tail_ = first;
  for (size_t i = 0; i < layouts_.size(); ++i)
    if (tail[i]) layouts_[i].images = kSideBySide, layouts_[i].step = kAlign / kSideBySide;
}

void Program::set_layout(Layout& layout, bool single) const {
  if (layout.images > 1) {
    layout.side = std::max(layout.side, layout.packed_side);
    layout.shifting = layout.side > 0;
    layout.runs = layout.h;
    layout.pitch = layout.channel = layout.lanes = layout.lead = kAlign;
    layout.mask.resize(kStripVectors * kAlign);
    for (size_t i = 0; i < layout.mask.size(); ++i) layout.mask[i] = int64_t(i) % layout.step < layout.w ? -1 : 0;
    return;
  }
  if (layout.rows) {
    layout.pitch = layout.w;
    layout.runs = layout.h / layout.rows;
    layout.channel = layout.lanes = layout.rows * layout.w;
    return;
  }
  // Rows of whole lines, or of half a line more, let the taps of a 3 x 3 be loaded by whole lines.
  const int64_t lines = round_up(layout.w + layout.side, kAlign);
  const bool by_rows = layout.h > 1 && !layout.flat && (single || lines > kernels().lanes) &&
                       lines <= kMostWaste * (layout.w + layout.side);
  if (!by_rows) layout.side = std::max(layout.side, layout.packed_side);
  layout.pitch = layout.w + layout.side;
  const int64_t halves = round_up(layout.pitch, kAlign / 2);
  if (by_rows || (layout.side && halves <= kMostWaste * layout.pitch)) {
    layout.shifting = layout.side && layout.pitch <= kMostShifted;
    if (by_rows || layout.shifting) layout.pitch = by_rows ? lines : halves;
  }
  if (by_rows) {
    layout.runs = layout.h;
    layout.channel = layout.pitch;
    // Strips of several rows want rows of whole lines.
    layout.lanes = 2 * layout.pitch > kStripVectors * kAlign ? round_up(layout.w, kernels().lanes) : layout.pitch;
    layout.lead = round_up(layout.side, kAlign);
  } else {
    layout.lead = round_up(layout.up * layout.pitch + layout.side, kAlign);
    layout.lanes = round_up((layout.h - 1) * layout.pitch + layout.w, kernels().lanes);
    // What lies behind a plane serves the next as what lies before it.
    const int64_t behind = std::max(layout.lead, layout.down * layout.pitch + layout.side);
    layout.channel = round_up(layout.lanes + behind, kAlign);
    // An odd number of lines: the planes of a strip spread over all sets of a cache.
    if (layout.channel / kAlign % 2 == 0) layout.channel += kAlign;
  }
  if (layout.lanes * layout.runs == layout.h * layout.w) return;
  layout.mask.resize(by_rows ? std::max(kStripVectors * kAlign, layout.pitch) : layout.lanes);
  const int64_t rows = by_rows ? INT64_MAX : layout.h;
  for (size_t i = 0; i < layout.mask.size(); ++i)
    layout.mask[i] = int64_t(i) % layout.pitch < layout.w && int64_t(i) / layout.pitch < rows ? -1 : 0;
}

// Zeros between the rows of planes are lanes that are computed in vain. Tensors that no tap reaches beyond do without
// them, unless they are computed lane by lane with others that do not. Sums of products of a tensor's own lanes alone
// have its layout, others the one with zeros; they move to that of the result on the way to memory.
void Program::choose_layouts(bool single) {
  for (Layout& layout : layouts_) set_layout(layout, single);
  for (const auto& conv : convs_) {
    const bool by_rows = conv->in_tiles() || is_paired(*conv);
    if (by_rows && !conv->terms.empty()) tensors_[conv->out].even = true;
    if (by_rows && conv->residual != kNone) tensors_[conv->residual].even = true;
    for (const Term& term : conv->terms) {
      if (term.in >= 0 && (by_rows || !term.pixels_alone())) tensors_[term.in].even = true;
      if (term.direct || term.pixels_alone() || !conv->pointwise()) continue;
      tensors_[conv->out].even = true;
      for (int64_t tensor : conv->own()) tensors_[tensor].even = true;
    }
  }
  std::vector<char> flat(tensors_.size());
  for (size_t i = 0; i < flat.size(); ++i) {
    const Layout& padded = layout(i);
    // A register is in no more than kMoves rows.
    flat[i] = kernels().moves_lanes && !tensors_[i].halo && padded.images == 1 && padded.w >= kernels().lanes / 2;
    if (padded.runs > 1)
      flat[i] &= !tensors_[i].even && flat_rows(padded.h, padded.w) && padded.w < padded.lanes;
    else
      flat[i] &= round_up(padded.h * padded.w, kernels().lanes) < padded.lanes;
  }
  bool changed = true;
  auto agree = [&](const std::vector<int64_t>& some, bool may) {
    for (int64_t tensor : some) may &= bool(flat[tensor]);
    for (int64_t tensor : some)
      if (!may && std::exchange(flat[tensor], false)) changed = true;
    return may;
  };
  while (std::exchange(changed, false)) {
    for (const Layer& layer : layers_) {
      if (!layer.lanewise) continue;
      std::vector<int64_t> some{layer.writes};
      for (int64_t tensor : layer.reads)
        if (size(tensor).h == size(layer.writes).h && size(tensor).w == size(layer.writes).w) some.push_back(tensor);
      agree(some, true);
    }
    for (const auto& conv : convs_) {
      const std::vector<int64_t> own = conv->own();
      std::vector<int64_t> some = own;
      if (conv->residual != kNone) some.insert(some.end(), {conv->residual, conv->out});
      if (!agree(some, conv->pointwise()) && !own.empty()) agree({conv->out}, false);
    }
  }
  std::vector<int64_t> layouts(flat.size());
  for (size_t i = 0; i < flat.size(); ++i) {
    layouts[i] = tensors_[i].layout;
    if (!flat[i]) continue;
    const int64_t rows = layout(i).runs > 1 ? flat_rows(size(i).h, size(i).w) : 0;
    layouts[i] = layout_of(size(i).h, size(i).w, true);
    layouts_[layouts[i]].rows = rows;
  }
  for (const auto& conv : convs_) {
    const std::vector<int64_t> own = conv->own();
    const int64_t like = own.empty() ? conv->out : own[0];
    conv->layout = conv->pointwise() ? layouts[like] : tensors_[conv->out].layout;
  }
  for (size_t i = 0; i < flat.size(); ++i) tensors_[i].layout = layouts[i];
  for (Layout& layout : layouts_)
    if (layout.flat) set_layout(layout, single);
}

// A tensor that nothing but a convolution with a stride reads, row by row, is written as its packed source.
void Program::choose_halves() {
  const std::vector<int64_t> readers = count_readers();
  auto is_dense = [](const Term& term) { return term.is_dense; };
  for (auto& conv : convs_)
    for (auto& writer : convs_) {
      // Those pack their source in their own way, or for two images.
      if (conv->in_tiles() || is_paired(*conv) || conv->layer >= int64_t(first_of_tail_)) continue;
      if (writer->in_tiles() || writer->terms.empty() || readers[writer->out] != 1 || writer->residual != kNone)
        continue;
      const Layout& layout = this->layout(writer->out);
      const bool moves = layouts_[writer->layout].rows;  // it computes without the zeros between rows
      if (layout.runs == 1 || layout.rows || layout.lanes > kStripLanes) continue;
      if (moves ? layout.w % 2 || !even_parts(*writer) : writer->parts > 1) continue;
      if (std::any_of(writer->terms.begin(), writer->terms.end(), is_dense)) continue;
      for (Term& term : conv->terms) {
        if (term.direct || term.in != writer->out) continue;
        term.written = true;
        choose_blocks(*conv);
        tensors_[writer->out].packed = &term;
        term.written = moves ? choose_moves(*writer) : !halves_of(layout, term.walk).empty();
        if (term.written) continue;
        tensors_[writer->out].packed = nullptr;
        choose_blocks(*conv);
      }
    }
}

// The lowest place in an image's memory that is free while layers [first, last] run.
int64_t Program::reserve(int64_t floats, int64_t first, int64_t last) {
  floats = round_up(floats, kAlign);
  int64_t at = 0;
  for (const Use& use : uses_) {
    if (use.last < first || use.first > last) continue;
    if (at + floats <= use.at) break;
    at = std::max(at, use.at + use.floats);
  }
  const Use use{at, floats, first, last};
  uses_.insert(std::upper_bound(uses_.begin(), uses_.end(), use, [](auto& a, auto& b) { return a.at < b.at; }), use);
  floats_ = std::max(floats_, at + floats);
  return at;
}

// Largest first, each where memory is free from the layer that writes it to the last that reads it. What is written
// pixel by pixel is where nothing but the like has ever been, so that the zeros around it stay, unless that takes too
// much memory.
void Program::place_tensors() {
  for (const auto& conv : convs_) {
    Tensor& out = tensors_[conv->out];
    const bool moves = !conv->terms.empty() && !conv->in_tiles() && !is_paired(*conv) && conv->layout != out.layout;
    out.keeps_zeros = moves && !out.packed && layouts_[out.layout].rows == 0;
  }
  struct Place {
    int64_t layout, channels, floats, at;
    std::vector<Range> used;  // layers
  };
  std::vector<Place> kept;
  struct Buffer {
    int64_t first, last;
    std::vector<int64_t> tensors;  // one after another, in the same place
    bool halo = false;
    int64_t above = 0, floats = 0;
  };
  std::vector<Buffer> buffers;
  std::vector<int64_t> buffer_of(tensors_.size(), kNone);
  for (int64_t i = 0; i < int64_t(layers_.size()); ++i) {
    const auto& [reads, writes, in_place, add_steps, lanewise, single] = layers_[i];
    if (writes == kNone) continue;
    const bool over = in_place != kNone && in_place >= 0 && tensors_[in_place].last <= i;
    buffer_of[writes] = over ? buffer_of[in_place] : buffers.size();
    if (!over) buffers.push_back({i, i});
    Buffer& buffer = buffers[buffer_of[writes]];
    buffer.last = std::max(i, tensors_[writes].last);
    buffer.tensors.push_back(writes);
    buffer.halo |= tensors_[writes].halo;
  }
  for (Buffer& buffer : buffers) {
    if (const Term* packed = tensors_[buffer.tensors[0]].packed) {
      buffer.floats = packed->packed_floats;
      continue;
    }
    const Layout& layout = this->layout(buffer.tensors[0]);
    const int64_t run = run_stride(buffer.tensors[0]), rows = layout.runs > 1 && buffer.halo;
    buffer.above = layout.lead + rows * layout.up * run;
    buffer.floats = buffer.above + (layout.runs + rows * layout.down) * run + kAlign;
  }
  std::stable_sort(buffers.begin(), buffers.end(), [](auto& a, auto& b) { return a.floats > b.floats; });
  auto place = [&](const Buffer& buffer) {
    const auto& [size, layout, halo, even, keeps_zeros, packed, last, at] = tensors_[buffer.tensors[0]];
    if (!keeps_zeros) return reserve(buffer.floats, buffer.first, buffer.last);
    auto is_free = [&](const Place& p) {
      if (p.layout != layout || p.channels != size.channels || p.floats != buffer.floats) return false;
      return std::none_of(p.used.begin(), p.used.end(),
                          [&](const Range& r) { return r.first <= buffer.last && r.first + r.count > buffer.first; });
    };
    auto found = std::find_if(kept.begin(), kept.end(), is_free);
    if (found == kept.end()) {
      kept.push_back({layout, size.channels, buffer.floats, reserve(buffer.floats, 0, layers_.size())});
      found = kept.end() - 1;
    }
    found->used.push_back({buffer.first, buffer.last - buffer.first + 1});
    return found->at;
  };
  auto place_all = [&] {
    for (const Buffer& buffer : buffers) {
      const int64_t at = place(buffer) + buffer.above;
      for (int64_t tensor : buffer.tensors) {
        tensors_[tensor].at = at;
        if (Term* packed = tensors_[tensor].packed) packed->packed = at;
      }
    }
  };
  place_all();
  int64_t most = 0;  // of the two largest tensors that live at once
  for (int64_t i = 0; i < int64_t(layers_.size()); ++i) {
    int64_t first = 0, second = 0;
    for (const Buffer& buffer : buffers) {
      if (buffer.first > i || buffer.last < i) continue;
      const Size& size = tensors_[buffer.tensors[0]].size;
      second = std::max(second, std::min(first, size.channels * size.h * size.w));
      first = std::max(first, size.channels * size.h * size.w);
    }
    most = std::max(most, first + second);
  }
  auto with_packed = [&] {  // sources
    const std::vector<Use> uses = uses_;
    const int64_t floats = floats_;
    for (const auto& conv : convs_)
      for (const Term& term : conv->terms)
        if (!term.direct && !term.written && !conv->in_tiles()) reserve(term.packed_floats, conv->layer, conv->layer);
    uses_ = uses;
    return std::exchange(floats_, floats);
  };
  if (kept.empty() || with_packed() <= most * 7 / 4) return;  // a bit less than two of them: other copies come on top
  for (Tensor& tensor : tensors_) tensor.keeps_zeros = false;
  uses_.clear();
  floats_ = 0;
  place_all();
}

// The work of a layer that writes a tensor, or kNone. What was in its memory before is not zero around it.
Program::Work Program::with_zeros(int64_t items, int64_t writes, Work work) const {
  if (writes == kNone || !tensors_[writes].halo) return work;
  return [=, this](const Frame& frame, int64_t first, int64_t last) {
    clear_around(frame, writes, first == 0, last == items);
    work(frame, first, last);
  };
}

// What is done to an image, where that has the others' tensors beside its own.
Program::Work Program::for_each_image(Work work) const {
  if (!in_tail_) return work;
  return [=](Frame frame, int64_t first, int64_t last) {
    for (frame.at = 0; frame.at < frame.count; ++frame.at) work(frame, first, last);
  };
}

void Program::add_step(int64_t items, int64_t writes, Work work) {
  steps().push_back({items, with_zeros(items, writes, std::move(work))});
}

// Zeros that taps find beyond an image's rows, and what is beside or between these that no layer writes, as a part of
// those above.
void Program::clear_around(const Frame& frame, int64_t tensor, bool above, bool below) const {
  const Layout& layout = this->layout(tensor);
  const int64_t run = run_stride(tensor), channels = tensors_[tensor].size.channels;
  float* const image = data(frame, tensor);
  if (layout.runs > 1) {
    if (above) {
      std::fill(image - layout.up * run - layout.lead, image, 0.0f);
      if (layout.lanes < layout.channel)
        kernels().clear(image + layout.lanes, layout.channel, layout.runs * channels, layout.channel - layout.lanes);
    }
    if (below) std::fill_n(image + layout.runs * run, layout.down * run + kAlign, 0.0f);
  } else if (above) {
    std::fill(image - layout.lead, image, 0.0f);
    kernels().clear(image + layout.lanes, layout.channel, channels, layout.channel - layout.lanes);
  }
}

// Zeros to the right of rows, for writers of an image's pixels alone. The last image's go on to the end.
void Program::clear_beside(const Frame& frame, int64_t tensor, int64_t first, int64_t last) const {
  const Layout& layout = this->layout(tensor);
  if (layout.rows) return;
  float* const image = data(frame, tensor) + frame.at * layout.step;
  for (int64_t y = first; y < last; ++y) {
    int64_t to = layout.runs > 1 ? layout.lanes : y + 1 == layout.h ? layout.lanes - y * layout.pitch : layout.pitch;
    if (layout.images > 1) to = frame.at + 1 < frame.count ? layout.step : to - frame.at * layout.step;
    if (to == layout.w) continue;
    kernels().clear(image + y * row_stride(tensor) + layout.w, layout.channel, tensors_[tensor].size.channels,
                    to - layout.w);
  }
}

void Program::finish(bool single) {
  join_residuals();
  first_of_tail_ = layers_.size();
  if (!single) choose_tail();
  choose_layouts(single);
  for (auto& conv : convs_) {
    choose_blocks(*conv);
    choose_strips(*conv);
  }
  choose_halves();
  place_tensors();
  for (const Layer& layer : layers_) {
    const size_t number = &layer - layers_.data();
    in_tail_ = number >= first_of_tail_;
    layer.add_steps();
    for (std::vector<Step>* some : {&steps_, &tail_})
      for (Step& step : *some)
        if (step.layer == kNone) step.layer = number;
    if (layer.writes != kNone && layout(layer.writes).runs > 1) alone_ = steps_.size();
  }
  uses_ = {};
}

// Taps that share lines of a tensor want long strips, and so do long rows, whose channels are neighbours.
int64_t Program::strip_vectors(const Conv& conv) const {
  const int64_t few = kernels().strip_lanes / kAlign;
  const Layout& layout = layouts_[conv.layout];
  bool many = !layout.flat && layout.pitch > few * kAlign;
  for (const Term& term : conv.terms) many |= term.direct && !term.walk.pointwise();
  const int64_t vectors = many ? kStripVectors : few;
  if (!conv.blocking.other_strips) return vectors;
  return vectors == kStripVectors ? kStripVectors / 2 : kStripVectors;
}

// Whether a run of what it reads stays in the first-level cache, and spmm can have as much in hand.
bool Program::fits_whole(const Conv& conv) const {
  const Layout& layout = layouts_[conv.layout];
  return layout.lanes == kernels().whole_lanes &&
         std::all_of(conv.terms.begin(), conv.terms.end(), [&](const Term& term) {
           return !term.is_dense && term.walk.groups == 1 && term.channels() * layout.lanes <= first_level_floats();
         });
}

void Program::choose_strips(Conv& conv) {
  const Layout& layout = layouts_[conv.layout];
  const int64_t wanted = strip_vectors(conv), most = wanted + wanted / 4;
  auto even = [=](int64_t vectors) { return std::max(ceil_div(vectors, most), (vectors + wanted / 2) / wanted); };
  const int64_t row = ceil_div(layout.runs > 1 ? layout.lanes : std::min(layout.lanes, layout.pitch), kAlign);
  if (layout.runs > 1) {
    if (row > most && !(layout.rows && fits_whole(conv))) conv.parts = even(row);
    conv.strips = conv.shared_strips = ceil_div(layout.runs, std::max<int64_t>(1, wanted / row)) * conv.parts;
    return;
  }
  bool shifts = false;
  for (const Term& term : conv.terms) shifts |= term.shifts;
  if (shifts) conv.unit = layout.pitch % kAlign ? 2 * layout.pitch / kAlign : row;
  const int64_t vectors = ceil_div(layout.lanes, kAlign);
  // Whole rows; where one is a register, strips may be as long as any.
  const int64_t rows = conv.unit == 1 ? most : std::max<int64_t>(1, wanted / conv.unit);
  conv.strips = shifts ? ceil_div(vectors, rows * conv.unit) : even(vectors);
  conv.shared_strips = conv.strips == 1 ? 1 : std::min(round_up(conv.strips, kTeam), ceil_div(vectors, conv.unit));
  // Bits must not depend on who computes them.
  auto sums = [&](int64_t strips) {
    std::vector<int64_t> sums;  // of every register of lanes
    for (int64_t i = 0; i < strips; ++i)
      for (int64_t lane = 0, lanes = strip(conv, i, strips).lanes; lane < lanes; lane += kernels().lanes)
        sums.push_back(kernels().sums(lanes, lane));
    return sums;
  };
  if (sums(conv.strips) != sums(conv.shared_strips)) conv.shared_strips = conv.strips;
}

// Whether every part of a run begins with an even register.
bool Program::even_parts(const Conv& conv) const {
  for (int64_t part = 0; part < conv.parts; ++part)
    if (strip(conv, part, conv.strips).lane / kernels().lanes % 2) return false;
  return true;
}

Program::Strip Program::strip(const Conv& conv, int64_t index, int64_t strips) const {
  const Layout& layout = layouts_[conv.layout];
  if (layout.runs == 1) {
    const int64_t units = ceil_div(ceil_div(layout.lanes, kAlign), conv.unit), unit = conv.unit * kAlign;
    const int64_t begin = units * index / strips * unit, end = units * (index + 1) / strips * unit;
    return {index, 0, 1, begin, std::min(layout.lanes, end) - begin};
  }
  const int64_t vectors = ceil_div(layout.lanes, kAlign), part = index % conv.parts, rows = index / conv.parts;
  const int64_t of = strips / conv.parts, row = layout.runs * rows / of;
  const int64_t lane = ceil_div(vectors * part, conv.parts) * kAlign;
  const int64_t end = std::min(layout.lanes, ceil_div(vectors * (part + 1), conv.parts) * kAlign);
  return {index, row, layout.runs * (rows + 1) / of - row, lane, end - lane};
}

// What is dense and wide can do with fewer products.
bool Program::is_paired(const Conv& conv) const {
  return conv.terms.size() == 1 && conv.residual == kNone && conv.terms[0].is_dense &&
         PairedConv2d::suits(conv.terms[0].geometry);
}

void Program::add_paired_steps(const Conv& conv) {
  const Term& term = conv.terms[0];
  Epilogue epilogue = conv.epilogue;
  epilogue.bias = conv.bias.data();
  auto paired = std::make_shared<PairedConv2d>(term.geometry, term.weight, epilogue);
  auto run = [=, this, in = term.in, out = conv.out](const Frame& frame, int64_t first, int64_t last) {
    clear_beside(frame, out, first * PairedConv2d::kRows, std::min(last * PairedConv2d::kRows, size(out).h));
    paired->run(images(frame, in), images(frame, out), first, last);
  };
  add_step(paired->items(), conv.out, run);
}

namespace {

// Whether rows of a packed source have nothing behind the last lane, for taps to the left.
bool ends_with_zeros(const Walk& walk) {
  if (walk.left == 0 || walk.right > 0) return false;
  return std::all_of(walk.phases.begin(), walk.phases.end(),
                     [&](const Phase& p) { return ceil_div(walk.source_w - p.offset_w, walk.step_w) <= walk.grid_w; });
}

// Where every other row begins in the middle of a line, taps an odd number of rows from their lanes read phases that
// are so many rows off, so that all lines are whole.
void move_odd_rows(Walk& walk) {
  std::vector<Phase> phases;
  for (Tap& tap : walk.parts[0].taps) {
    const Phase& old = walk.phases[tap.phase];
    const int64_t rows = tap.dy % 2 ? tap.dy : 0, offset_h = old.offset_h + rows * walk.step_h;
    auto same = [&](const Phase& p) { return p.offset_h == offset_h && p.offset_w == old.offset_w; };
    tap.dy -= rows;
    tap.phase = std::find_if(phases.begin(), phases.end(), same) - phases.begin();
    if (tap.phase == int64_t(phases.size())) phases.push_back({offset_h, old.offset_w, 0, 0, 0});
    Phase& p = phases[tap.phase];
    p.up = std::max(p.up, -tap.dy);
    p.down = std::max(p.down, tap.dy);
  }
  walk.phases = std::move(phases);
}

}  // namespace

// How the sources of a convolution lie, and how many of their channels are in hand at once.
void Program::choose_blocks(Conv& conv) {
  const Layout& layout = layouts_[conv.layout];
  const bool by_rows = layout.runs > 1;
  for (Term& term : conv.terms) {
    Walk& walk = term.walk;
    walk.tile_h = walk.grid_h;
    walk.tile_w = walk.grid_w;
    walk.pitch = layout.pitch;
    // Sums are shifted within whole rows, which strips of another length may divide.
    const bool may_shift = kernels().shifts_sums && conv.blocking.pairs && !conv.blocking.other_strips;
    term.shifts = may_shift && layout.shifting && (term.direct ? walk.left || walk.right : ends_with_zeros(walk)) &&
                  !term.is_dense;
    walk.lead = term.direct ? 0 : round_up(walk.left, kAlign) - walk.left;
    if (term.shifts && !term.direct && layout.pitch % kAlign) move_odd_rows(walk);
    place_phases(walk);
    term.block = term.channels();
    term.two_copies = term.shifts && term.direct && !by_rows && layout.pitch % kAlign;
    if (walk.groups == 1) {
      const int64_t lanes = strip_vectors(conv) * kAlign, channels = term.channels();
      const int64_t floats = first_level_floats() / (term.two_copies ? 2 : 1);
      const int64_t fit = block_channels(walk, term.weight, lanes, kRowNnz, floats);
      const int64_t most = std::clamp<int64_t>(fit * conv.blocking.channels, 1, channels);
      term.block = ceil_div(channels, ceil_div(channels, most));
    }
    term.blocks = ceil_div(term.channels(), term.block);
    if (term.direct) {
      walk.phases[0].base = term.shifts ? kAlign : 0;  // pairs may read what is before the first tap's lanes
      walk.pitch = row_stride(term.in);
      walk.channel_stride = layout.channel;
      continue;
    }
    term.whole = term.written || conv.terms.size() > 1 || layout.images > 1 ||
                 term.channels() * walk.channel_stride <= kPackedFloats;
    const int64_t channels = term.whole ? term.channels() : term.block;
    int64_t floats = channels * walk.channel_stride;
    if (by_rows) {
      const int64_t images = (layout.images - 1) * layout.step + layout.w;
      walk.channel_stride = layout.rows ? layout.channel : round_up(walk.left + images + walk.right, kAlign);
      walk.pitch = channels * walk.channel_stride;
      floats = 0;
      for (Phase& p : walk.phases) {
        p.base = floats + walk.lead;
        floats += (p.up + layout.runs + p.down) * walk.pitch;
      }
    }
    term.packed_floats = floats + walk.lead + walk.row_lanes() + kAlign;
  }
}

// Band by band, one term on top of the other.
void Program::add_tiled_steps(Conv& conv) {
  int64_t bands = 1;
  for (Term& term : conv.terms) {
    const bool first = &term == &conv.terms.front(), last = &term == &conv.terms.back();
    Epilogue epilogue;
    if (first) epilogue.bias = conv.bias.data();
    if (last) epilogue.low = conv.epilogue.low, epilogue.high = conv.epilogue.high;
    term.tiled = std::make_unique<TiledConv2d>(*term.tiles, term.geometry, term.weight, epilogue);
    term.weight = {};
    bands = std::max(bands, term.tiled->bands());
  }
  auto cut = [&](int64_t bands) {
    return with_zeros(bands, conv.out, [=, &conv, this](const Frame& frame, int64_t first, int64_t last) {
      const Images y = images(frame, conv.out);
      for (int64_t band = first; band < last; ++band) {
        const int64_t h = size(conv.out).h, begin = h * band / bands, end = h * (band + 1) / bands;
        clear_beside(frame, conv.out, begin, end);
        Images start = conv.residual == kNone ? y : images(frame, conv.residual);
        bool starts = conv.residual != kNone;
        for (const Term& term : conv.terms) {
          term.tiled->run(images(frame, term.in), starts ? &start : nullptr, y, begin, end);
          start = y;
          starts = true;
        }
      }
    });
  };
  const int64_t shared = std::min(round_up(bands, kTeam), size(conv.out).h);
  steps().push_back({bands, cut(bands)});
  steps().back().backwards = is_far(conv.terms[0].in);
  if (shared == bands) return;
  steps().back().shared_items = shared;
  steps().back().shared_run = cut(shared);
}

void Program::add_conv_steps(Conv& conv) {
  if (conv.in_tiles()) return add_tiled_steps(conv);
  if (is_paired(conv)) return add_paired_steps(conv);
  const Layout& layout = layouts_[conv.layout];
  const bool elsewhere = conv.layout != tensors_[conv.out].layout;
  const Term* const packed = tensors_[conv.out].packed;
  conv.at = tensors_[conv.out].at;
  if (elsewhere)
    choose_moves(conv);
  else if (packed)
    conv.halves = halves_of(layout, packed->walk);
  for (Term& term : conv.terms) {
    if (term.two_copies) shift_half_lines(term, conv.layer);
    // It waits until all images that are computed at once have theirs.
    const bool waits = layout.images > 1 && !side_by_side(term.in);
    if (!term.direct && !term.written && !term.copied)
      term.packed = reserve(term.packed_floats, waits ? 0 : conv.layer, conv.layer);
  }
  conv.splits = std::clamp<int64_t>(ceil_div(kFewestTasks, conv.shared_strips), 1, ceil_div(conv.terms[0].rows(), 64));
  for (Term& term : conv.terms) {
    const Part& part = term.walk.parts[0];
    if (term.is_dense)
      term.dense = std::make_unique<DenseWeight>(term.walk, part, term.weight, term.block, conv.splits);
    else
      term.kernel = std::make_unique<PackedWeight>(term.walk, part, term.weight, term.block, conv.splits, true, true,
                                                   term.shifts);
    term.weight = {};
  }
  // f(frame, strip, splits) for items of the convolution, cut into so many strips. A strip's splits of the rows follow
  // each other.
  auto each_strip = [&conv, this](int64_t strips, const Frame& frame, int64_t first, int64_t last, const auto& f) {
    for (int64_t at = first, end; at < last; at = end) {
      end = std::min(last, (at / conv.splits + 1) * conv.splits);
      f(frame, strip(conv, at / conv.splits, strips), Range{at % conv.splits, end - at});
    }
  };
  // work(strips, frame, first, last)
  auto add = [&](auto work) {
    auto cut = [&](int64_t strips) {
      auto some = [=](const Frame& frame, int64_t first, int64_t last) { work(strips, frame, first, last); };
      return with_zeros(strips * conv.splits, elsewhere || packed ? kNone : conv.out, some);
    };
    steps().push_back({conv.strips * conv.splits, cut(conv.strips)});
    if (conv.shared_strips == conv.strips) return;
    steps().back().shared_items = conv.shared_strips * conv.splits;
    steps().back().shared_run = cut(conv.shared_strips);
  };
  int64_t nnz = 0, blocks = 0;
  bool whole = true;
  for (const Term& term : conv.terms) {
    nnz += term.kernel ? term.kernel->size() : 0;
    blocks += term.blocks;
    whole &= term.direct || term.whole;
  }
  // Where weights come from far away and sums do not, all strips have a block behind them before the next begins.
  const bool by_blocks = nnz >= kFarWeights && size(conv.out).channels * layout.channel * layout.runs <= kNearFloats;
  const int64_t together = by_blocks ? 1 : blocks;
  // Sums of some blocks are a thread's own if nothing comes between them and the others.
  const bool own_parts = (packed || elsewhere) && blocks > 1 && whole && !by_blocks && conv.residual == kNone;
  if ((elsewhere || packed) && blocks > 1 && !own_parts)
    conv.at = reserve(size(conv.out).channels * layout.channel * layout.runs, conv.layer, conv.layer);
  // Neither are registers that go elsewhere written with all of the zeros around them.
  auto add_zeros = [=, this, out = conv.out] {
    if (packed)
      add_copy(
          packed->walk, out, {0, packed->channels()},
          [at = packed->packed](const Frame& frame) { return frame.memory + at; }, 0, true);
    else if (elsewhere && !tensors_[out].keeps_zeros)
      add_step(size(out).h, out,
               [=, this](const Frame& frame, int64_t first, int64_t last) { clear_beside(frame, out, first, last); });
  };
  const bool in_tail = in_tail_;
  for (Term& term : conv.terms) {
    if (term.direct || term.written || term.copied) continue;
    auto block = [=, at = term.packed](const Frame& frame) { return (in_tail ? frame.tail : frame.memory) + at; };
    const Layout* const flat = layout.rows ? &layout : nullptr;
    if (term.whole) {
      add_copy(term.walk, term.in, {0, term.channels()}, block, layout.step, false, flat);
      continue;
    }
    // Block by block, so that the packed source stays in a cache.
    for (int64_t b = 0; b < term.blocks; ++b) {
      const int64_t first = b * term.block;
      add_copy(term.walk, term.in, {first, std::min(term.block, term.channels() - first)}, block, 0, false, flat);
      add([=, &conv, &term, this](int64_t strips, const Frame& frame, int64_t first, int64_t last) {
        each_strip(strips, frame, first, last, [&](const Frame& frame, const Strip& strip, Range splits) {
          run_conv(conv, term, frame, frame.memory + term.packed, {b, 1}, strip, splits);
        });
      });
    }
    return add_zeros();
  }
  const Work copy = copy_beside(conv);
  add([=, &conv, this](int64_t strips, const Frame& frame, int64_t first, int64_t last) {
    for (int64_t begin = 0; begin < blocks; begin += together)
      each_strip(strips, frame, first, last, [&](const Frame& frame, const Strip& strip, Range splits) {
        Scratch scratch;
        float* const parts = own_parts ? scratch.get(size(conv.out).channels * strip.rows * strip.lanes) : nullptr;
        int64_t at = begin;  // from the term's first block on
        for (const Term& term : conv.terms) {
          const Walk& walk = term.walk;
          const float* source =
              term.direct ? data(frame, term.in) - walk.phases[0].up * walk.pitch - walk.left - walk.phases[0].base
                          : frame.memory + term.packed;
          const int64_t from = std::max<int64_t>(0, at), to = std::min(term.blocks, at + together);
          if (from < to)
            run_conv(conv, term, frame, source + from * term.block * walk.channel_stride, {from, to - from}, strip,
                     splits, parts);
          at -= term.blocks;
        }
        if (copy && begin == 0 && splits.first == 0 && strip.lane == 0) copy(frame, strip.row, strip.row + strip.rows);
      });
  });
  steps().back().backwards = !by_blocks && reads_backwards(conv.terms[0]);
  add_zeros();
}

// Copies what a later convolution with a stride wants packed of the tensor that this one reads, for some of its runs:
// it is in a cache then. Null if there is none.
Program::Work Program::copy_beside(const Conv& conv) {
  const Term& own = conv.terms[0];
  if (conv.terms.size() > 1 || !own.direct || !own.walk.pointwise() || !is_far(own.in)) return nullptr;
  const Layout& from = layout(own.in);
  const int64_t rows = from.h / from.runs;
  if (from.runs == 1) return nullptr;
  for (auto& later : convs_) {
    if (later->layer <= conv.layer || later->layer >= int64_t(first_of_tail_)) continue;
    if (later->in_tiles() || is_paired(*later)) continue;
    for (Term& term : later->terms) {
      const Walk& walk = term.walk;
      if (term.in != own.in || term.direct || !term.pixels_alone() || !term.whole || term.copied) continue;
      const Layout& to = layouts_[later->layout];
      if (to.runs == 1) continue;  // some rows of many planes are no faster
      term.copied = true;
      term.packed = reserve(term.packed_floats, conv.layer, later->layer);
      auto block = [at = term.packed](const Frame& frame) { return frame.memory + at; };
      const Work copy = copy_rows(walk, own.in, {0, term.channels()}, block, 0, to.rows ? &to : nullptr);
      return [=, step = walk.step_h](const Frame& frame, int64_t first, int64_t last) {
        copy(frame, ceil_div(first * rows, step), ceil_div(last * rows, step));
      };
    }
  }
  return nullptr;
}

// Where the lanes that a convolution computes go in planes of another layout, or, even and odd columns apart, in the
// packed source of another convolution, with the zeros behind its rows. False if that is impossible.
bool Program::choose_moves(Conv& conv) const {
  const Layout& from = layouts_[conv.layout];
  const Term* const packed = tensors_[conv.out].packed;
  const int64_t width = kernels().lanes, rows = from.h / from.runs;
  if (packed && packed->walk.step_w != 2) return false;
  conv.run_moves = round_up(from.lanes / width, packed ? 2 : 1);
  conv.moves.assign(from.runs * conv.run_moves * Results::kMoves, {});
  for (int64_t run = 0; run < from.runs; ++run)
    for (int64_t lane = 0; lane < from.lanes; ++lane) {
      const int64_t y = run * rows + lane / from.pitch, x = lane % from.pitch;
      if (x >= from.w || lane / from.pitch >= rows) continue;
      int64_t at, in = lane % width, index = run * conv.run_moves + lane / width, zeros = 0;
      if (packed) {
        if ((at = place_in(packed->walk, y, x)) == kNone) return false;
        index += lane % 2 - lane / width % 2;
        in = lane % (2 * width) / 2;
        if (x + 2 >= from.w) zeros = packed->walk.row_lanes() - (x / 2 + 1);
        if (in + zeros >= width) return false;
      } else {
        at = row_at(conv.out, y) + x;
      }
      Move *move = &conv.moves[index * Results::kMoves], *const end = move + Results::kMoves;
      while (move < end && move->lanes && move->at != at - in) ++move;
      if (move == end) return false;
      *move = {int32_t(at - in), move->lanes | 1u << in, ((1u << zeros) - 1) << (in + 1)};
    }
  return true;
}

// Where even and odd columns go in a packed source; empty if that has no place for them, or more than for a row's.
std::vector<Halves> Program::halves_of(const Layout& from, const Walk& walk) const {
  const int64_t width = kernels().lanes, twos = ceil_div(from.lanes, 2 * width);  // of a row's registers
  if (walk.step_w != 2 || walk.row_lanes() != twos * width) return {};
  std::vector<Halves> halves;
  for (int64_t y = 0; y < from.h; ++y) {
    const int64_t even = place_in(walk, y, 0), odd = place_in(walk, y, 1);
    if (even == kNone || odd == kNone) return {};
    for (int64_t i = 0; i < twos; ++i) halves.push_back({int32_t(even + i * width), int32_t(odd + i * width)});
  }
  return halves;
}

// Every other row begins in the middle of a line: those are read from a copy that lies half a line off.
void Program::shift_half_lines(Term& term, int64_t layer) {
  constexpr int64_t kPieces = 16;
  const Layout& layout = this->layout(term.in);
  const int64_t from = tensors_[term.in].at - layout.lead, floats = layout.lead + term.channels() * layout.channel;
  const int64_t to = reserve(floats + kAlign, layer, layer) + kAlign / 2;
  term.walk.phases[0].base += std::max<int64_t>(0, from - to);  // offsets are not negative
  for (Tap& tap : term.walk.parts[0].taps)
    if (tap.dy % 2) tap.elsewhere = to - from;
  add_step(kPieces, kNone, [=](const Frame& frame, int64_t first, int64_t last) {
    const int64_t begin = floats * first / kPieces, end = floats * last / kPieces;
    std::memcpy(frame.memory + to + begin, frame.memory + from + begin, (end - begin) * sizeof(float));
  });
}

// Adds blocks of a term to a strip; `source` is that of the first. parts: where sums of some blocks are, if not where
// all of them are.
void Program::run_conv(const Conv& conv, const Term& term, const Frame& frame, const float* source, Range blocks,
                       const Strip& strip, Range splits, float* parts) const {
  const Layout& layout = layouts_[conv.layout];
  const Term* const packed = tensors_[conv.out].packed;
  const bool elsewhere = !conv.moves.empty();
  const int64_t lanes = strip.rows * strip.lanes, width = kernels().lanes;
  Results out{nullptr, parts ? lanes : layout.channel};
  out.start_stride = out.stride;
  out.jump = parts ? strip.lanes : size(conv.out).channels * layout.channel;
  Tile tile{source + strip.row * term.walk.pitch + strip.lane, {}};
  tile.whole = layout.rows && strip.lanes == layout.lanes;
  if (strip.rows > 1) tile.run = strip.lanes, tile.jump = term.walk.pitch;
  const bool ahead = layout.runs > 1 && strip.index > 0 && reads_backwards(term);
  for (int64_t b = blocks.first; b < blocks.first + blocks.count; ++b) {
    const bool first = b == 0 && &term == &conv.terms.front();
    const bool last = b + 1 == term.blocks && &term == &conv.terms.back();
    if (last && elsewhere) {
      out.stride = packed ? packed->walk.channel_stride : this->layout(conv.out).channel;
      out.moves = conv.moves.data() + (strip.row * conv.run_moves + strip.lane / width) * Results::kMoves;
      out.splits = packed;
    } else if (last && packed) {
      out.stride = packed->walk.channel_stride;
      out.halves = conv.halves.data() + strip.row * ceil_div(layout.lanes, 2 * width);
    }
    out.mask = last && !elsewhere && !layout.mask.empty() ? layout.mask.data() + strip.lane : nullptr;
    out.low = last ? conv.epilogue.low : -kInfinity;
    out.high = last ? conv.epilogue.high : kInfinity;
    if (ahead) {
      const Strip before = this->strip(conv, strip.index - 1, conv.strips);
      const int64_t channels = std::min(term.block, term.channels() - b * term.block),
                    at = (before.row - strip.row) * term.walk.pitch + before.lane - strip.lane;
      tile.soon = {tile.lanes + at, layout.channel, channels, term.walk.pitch, before.rows, before.lanes};
    }
    for (int64_t split = splits.first; split < splits.first + splits.count; ++split) {
      const int64_t row = term.first_row(split);
      const int64_t at = row * layout.channel + strip.row * out.jump + strip.lane;
      float* const partial = parts ? parts + row * lanes : frame.memory + conv.at + at;
      out.data = partial;
      if (out.moves || out.halves) out.data = data(frame, conv.out) + row * out.stride;
      out.bias = first ? conv.bias.data() + row : nullptr;
      out.start = !first ? partial : conv.residual == kNone ? nullptr : data(frame, conv.residual) + at;
      if (term.dense) {
        kernels().gemm(tile, term.dense->panels(b, split), out, lanes);
        continue;
      }
      Rows rows = term.kernel->rows(0, b, split);
      rows.far = strip.row + strip.lane == 0 && term.kernel->size() >= kFarWeights;
      kernels().spmm(tile, rows, out, lanes);
    }
    tile.lanes += term.block * term.walk.channel_stride;
  }
}

// f(a convolution's weight in the form that runs), if it is in one that holds its values.
template <class F>
bool Program::of_weight(int64_t layer, const F& f) const {
  for (const auto& conv : convs_)
    for (const Term& term : conv->terms)
      if (term.layer == layer) return term.tiled ? f(*term.tiled) : term.kernel && f(*term.kernel);
  return false;
}

bool Program::values(int64_t layer, const Csr& weight, float* to) const {
  return of_weight(layer, [&](const auto& packed) { return packed.values(weight, to); });
}

bool Program::holds(int64_t layer, const Csr& weight) const {
  return of_weight(layer, [&](const auto& packed) { return packed.holds(weight); });
}

// Threads that go through the same steps and share the items of each. Every thread has its share, the same in every
// step, so that it finds in its caches what it wrote, and takes from the others' when it is done; then it waits until
// all items are done. Whoever waits has none in hand, so this ends however few threads there are in truth.
class Program::Team {
 public:
  explicit Team(int64_t size) : size_(size), shares_(size) {}
  int64_t size() const { return size_; }

  // What one thread knows.
  class Member {
   public:
    Member(Team& team, int64_t rank) : team_(team), rank_(rank) {}

    // f(first, last) for some of the items; returns when all are done.
    template <class F>
    void share(int64_t items, const F& f) {
      if (team_.size_ == 1) return f(int64_t(0), items);
      ++round_;
      all_ += items;
      for (int64_t i = 0; i < team_.size_; ++i)
        for (Range some; (some = team_.take(round_, items, (rank_ + i) % team_.size_)).count > 0;) {
          f(some.first, some.first + some.count);
          team_.done_.fetch_add(some.count, std::memory_order_release);
        }
      for (int64_t tries = 0; team_.done_.load(std::memory_order_acquire) < all_; ++tries)
        if (tries > 1000) std::this_thread::yield();
    }

   private:
    Team& team_;
    const int64_t rank_;
    int64_t round_ = 0, all_ = 0;  // steps so far, and their items
  };

 private:
  static constexpr int64_t kRound = int64_t(1) << 32, kTakes = 8;  // of a share, one after another
  // The step in which it was last taken from, times kRound, plus how many of its items are taken.
  struct alignas(64) Share {
    std::atomic<int64_t> taken = 0;
  };

  Range take(int64_t round, int64_t items, int64_t owner) {
    const int64_t begin = items * owner / size_, count = items * (owner + 1) / size_ - begin;
    std::atomic<int64_t>& taken = shares_[owner].taken;
    int64_t old = taken.load(std::memory_order_relaxed);
    while (old / kRound <= round) {
      const int64_t first = old / kRound < round ? 0 : old % kRound;
      const int64_t some = std::min(count - first, ceil_div(count, kTakes));
      if (some <= 0) break;
      if (taken.compare_exchange_weak(old, round * kRound + first + some, std::memory_order_relaxed))
        return {begin + first, some};
    }
    return {0, 0};
  }

  const int64_t size_;
  std::vector<Share> shares_;
  std::atomic<int64_t> done_ = 0;
};

std::unique_ptr<Program::Memory> Program::take_memory() {
  {
    const std::lock_guard lock(mutex_);
    if (!free_.empty()) {
      auto memory = std::move(free_.back());
      free_.pop_back();
      return memory;
    }
  }
  return std::make_unique<Memory>(floats_);
}

void Program::give_back(std::unique_ptr<Memory> memory) {
  const std::lock_guard lock(mutex_);
  free_.push_back(std::move(memory));
}

void Program::run(const std::vector<Images>& inputs, const std::vector<Images>& outputs, int64_t images, bool share,
                  double* seconds) {
  using Clock = std::chrono::steady_clock;
  const int64_t threads = torch::stable::get_num_threads();
  const size_t shared = share ? alone_ : 0;  // steps of a whole image that threads share
  const int64_t at_once = tail_.empty() ? 1 : kSideBySide;
  const int64_t teams = alone_ == 0 ? 1 : std::clamp<int64_t>(threads / kTeam, 1, std::max<int64_t>(1, images));
  auto first_of = [=](int64_t all, int64_t team) { return all * team / teams; };
  std::deque<Team> members;
  std::vector<std::vector<std::unique_ptr<Memory>>> memory(teams);  // of the images at hand
  for (int64_t team = 0; team < teams; ++team) {
    const int64_t size = first_of(threads, team + 1) - first_of(threads, team);
    const int64_t count = first_of(images, team + 1) - first_of(images, team);
    members.emplace_back(size);
    for (int64_t i = 0; i < std::min(size, count); ++i) memory[team].push_back(take_memory());
  }
  auto run = [&](int64_t team, int64_t rank) {
    const int64_t size = members[team].size();
    const int64_t begin = first_of(images, team), end = first_of(images, team + 1);
    Team::Member member(members[team], rank);
    std::vector<double> spent(layers_.size());
    auto run_step = [&](const Step& step, const Frame& frame, int64_t first, int64_t last, bool together) {
      const Work& work = together && step.shared_run ? step.shared_run : step.run;
      const auto start = Clock::now();
      if (!step.backwards) work(frame, first, last);
      for (int64_t i = step.backwards ? last : first; i-- > first;) work(frame, i, i + 1);
      spent[step.layer] += std::chrono::duration<double>(Clock::now() - start).count();
    };
    auto run_alone = [&](const Step& step, const Frame& frame) { run_step(step, frame, 0, step.items, false); };
    auto run_together = [&](const Step& step, const Frame& frame) {
      member.share(step.shared_run ? step.shared_items : step.items,
                   [&](int64_t first, int64_t last) { run_step(step, frame, first, last, true); });
    };
    auto frame = [&](int64_t image, int64_t i, int64_t count = 1) {
      float* const data = memory[team][i]->data();
      return Frame{data, data, &inputs, &outputs, begin + image, count};
    };
    // Steps [from, to) of an image; those of the tail, of all images of a frame.
    auto image_steps = [&](const Frame& frame, size_t from, size_t to, const auto& run) {
      for (size_t s = from; s < to; ++s) run(steps_[s], frame);
    };
    auto tail_steps = [&](const Frame& frame, const auto& run) {
      for (const Step& step : tail_) run(step, frame);
    };
    auto all_steps = [&](const Frame& images, const auto& run) {
      Frame one = images;
      for (one.at = 0; one.at < images.count; ++one.at) image_steps(one, 0, steps_.size(), run);
      tail_steps(images, run);
    };
    const int64_t count = end - begin, each = count / (size * at_once);  // images at once, for every member
    int64_t next = each * size * at_once;
    if (shared == 0) {
      member.share(each * size, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) all_steps(frame(i * at_once, rank, at_once), run_alone);
      });
    } else if (tail_.empty()) {
      for (int64_t at = 0; at < next; at += size) {
        for (int64_t i = 0; i < size; ++i) image_steps(frame(at + i, i), 0, shared, run_together);
        member.share(size, [&](int64_t first, int64_t last) {
          for (int64_t i = first; i < last; ++i) image_steps(frame(at + i, i), shared, steps_.size(), run_alone);
        });
      }
    } else {
      next = 0;
    }
    const bool apart = shared == 0 && !tail_.empty();  // up to the tail, which wants more than one
    for (int64_t some; next < count; next += some) {
      some = std::min(apart ? size : at_once, count - next);
      auto images = [&](int64_t i) { return frame(next + i, i, std::min(at_once, some - i)); };
      if (some == 1 || !apart) {
        all_steps(images(0), run_together);
        continue;
      }
      member.share(some, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          Frame one = images(i / at_once * at_once);
          one.at = i % at_once;
          one.memory = memory[team][i]->data();
          image_steps(one, 0, steps_.size(), run_alone);
        }
      });
      for (int64_t i = 0; i < some; i += at_once) tail_steps(images(i), run_together);
    }
    if (!seconds) return;
    const std::lock_guard lock(mutex_);
    for (size_t layer = 0; layer < spent.size(); ++layer) seconds[layer] += spent[layer];
  };
  parallel(threads, [&](int64_t first, int64_t last) {
    for (int64_t team = 0; team < teams; ++team)
      for (int64_t rank = 0; rank < members[team].size(); ++rank) {
        const int64_t thread = first_of(threads, team) + rank;
        if (first <= thread && thread < last) run(team, rank);
      }
  });
  for (auto& some : memory)
    for (auto& m : some) give_back(std::move(m));
}

}  // namespace sparsekit
