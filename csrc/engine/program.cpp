#include "engine/program.h"

#if defined(__linux__)
#include <unistd.h>
#endif

#include <algorithm>
#include <cstring>
#include <deque>
#include <thread>

#include "cpu/packed_weight.h"
#include "cpu/parallel.h"
#include "cpu/pool2d.h"
#include "cpu/walk.h"

namespace sparsekit {
namespace {

// Chosen by measurement (benchmarks/peers.py).
constexpr int64_t kStripVectors = 4, kMostStripVectors = 5;  // registers of lanes that spmm holds
constexpr int64_t kFewestTasks = 4;            // of a layer, by splitting its rows, for threads that share an image
constexpr int64_t kRowNnz = 13;                // non-zeros of a row in a block of channels, at least
constexpr double kMostWaste = 1.15;            // of lanes, that aligned rows may cost
constexpr int64_t kPackedFloats = 320 * 1024;  // of a packed source that the second-level cache holds as a whole
constexpr int64_t kCopyChannels = 32;          // that a thread copies at once

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

}  // namespace

// A part of a sum of convolutions: its source, and the weight as packed for it.
struct Program::Term {
  Walk walk;
  Csr weight;
  int64_t in;
  bool direct;         // reads the tensor itself
  int64_t packed = 0;  // else: where the packed source is in an image's memory
  int64_t block = 0, blocks = 0;
  std::unique_ptr<PackedWeight> kernel;

  int64_t channels() const { return walk.groups * walk.source_channels; }
  int64_t rows() const { return walk.groups * walk.rows; }
};

struct Program::Conv {
  std::vector<Term> terms;
  int64_t out, residual;
  Epilogue epilogue;
  std::vector<float> bias;  // [rows]
  int64_t layer;
  int64_t unit = 1;  // registers of lanes that no strip divides
  int64_t strips = 0, splits = 0;
};

// What an image's tensors are in, zero where no tensor has pixels.
class Program::Memory {
 public:
  explicit Memory(int64_t floats) : data_(scratch_.get(floats)) { std::memset(data_, 0, floats * sizeof(float)); }
  float* data() { return data_; }

 private:
  Scratch scratch_;
  float* const data_;
};

Program::Program(std::vector<Size> tensors, std::vector<Size> inputs, std::vector<Size> outputs)
    : inputs_(std::move(inputs)), outputs_(std::move(outputs)) {
  for (const Size& size : tensors) tensors_.push_back({size, layout_of(size.h, size.w)});
}

Program::~Program() = default;

int64_t Program::layout_of(int64_t h, int64_t w) {
  for (size_t i = 0; i < layouts_.size(); ++i)
    if (layouts_[i].h == h && layouts_[i].w == w) return i;
  layouts_.push_back({h, w});
  return layouts_.size() - 1;
}

void Program::add_layer(Layer layer) {
  for (int64_t tensor : layer.reads)
    if (tensor >= 0) tensors_.at(tensor).last = layers_.size();
  layers_.push_back(std::move(layer));
}

float* Program::data(const Frame& frame, int64_t tensor) const { return frame.memory + tensors_[tensor].at; }

Images Program::images(const Frame& frame, int64_t tensor) const {
  if (tensor < 0) {
    Images images = (*frame.inputs)[-1 - tensor];
    images.data += frame.image * images.image;
    return images;
  }
  const Layout& layout = this->layout(tensor);
  return {data(frame, tensor), 0, layout.channel, layout.pitch, 1};
}

void Program::add_load(int64_t in, int64_t out) {
  auto add_steps = [=, this] {
    const Layout& layout = this->layout(out);
    const Size& size = tensors_[out].size;
    // The walk of a pointwise convolution, of which only the copying is done.
    Walk walk = forward_walk({1, size.channels, size.h, size.w, 1, size.h, size.w, 1, 1, 1, 1, 0, 0, 1, 1, 1}, {}, {});
    walk.tile_h = size.h;
    walk.tile_w = size.w;
    walk.pitch = layout.pitch;
    walk.channel_stride = layout.channel;
    walk.phases[0].base = 0;
    steps_.push_back(
        {size.channels, kCopyChannels, [=, this, &layout](const Frame& frame, int64_t first, int64_t last) {
           copy(walk, frame, in, {first, last - first}, data(frame, out) + first * layout.channel);
         }});
  };
  add_layer({{in}, out, kNone, add_steps});
}

// Channels of `in` into the packed block of a walk.
void Program::copy(Walk walk, const Frame& frame, int64_t in, Range channels, float* block) const {
  walk.source = images(frame, in);
  pack_source(walk, {0, 0, 0, walk.grid_h, walk.grid_w}, {channels.first, channels.count}, block);
}

void Program::add_conv2d(const Conv2dGeometry& g, const Csr& weight, int64_t in, int64_t out, int64_t residual,
                         const Epilogue& epilogue) {
  auto conv = std::make_unique<Conv>(Conv{{}, out, residual, epilogue});
  const bool direct = in >= 0 && g.stride_h == 1 && g.stride_w == 1 && g.in_h == g.out_h && g.in_w == g.out_w;
  conv->terms.push_back({forward_walk(g, {}, {}), weight, in, direct});
  conv->bias.resize(g.out_channels);
  if (epilogue.bias) std::copy_n(epilogue.bias, g.out_channels, conv->bias.begin());
  const Walk& walk = conv->terms[0].walk;
  Layout& layout = layouts_[tensors_.at(out).layout];
  // Zeros to the right of a row serve as those to the left of the next, if the source has no pixels there.
  const int64_t most = std::max(walk.left, walk.right), both = walk.left + walk.right;
  const bool shared = ceil_div(g.in_w, walk.step_w) <= g.out_w + most - walk.left;
  layout.side = std::max(layout.side, shared ? most : both);
  if (direct) {
    layout.up = std::max(layout.up, walk.phases[0].up);
    layout.down = std::max(layout.down, walk.phases[0].down);
  }
  std::vector<int64_t> reads{in};
  if (residual != kNone) reads.push_back(residual);
  conv->layer = layers_.size();
  Conv* const made = conv.get();
  convs_.push_back(std::move(conv));
  // In the place of its residual, unless it needs that to the end.
  add_layer({reads, out, residual == in ? kNone : residual, [=, this] { add_conv_steps(*made); }});
}

// A convolution that is nothing but another's residual becomes a part of its sum: its result needs no memory.
void Program::join_residuals() {
  std::vector<int64_t> readers(tensors_.size());
  for (const Layer& layer : layers_)
    for (int64_t tensor : layer.reads)
      if (tensor >= 0) ++readers[tensor];
  for (auto& conv : convs_)
    for (auto& other : convs_) {
      const Epilogue& e = other->epilogue;
      if (conv->residual != other->out || readers[other->out] != 1 || other->residual != kNone || e.low != -kInfinity ||
          e.high != kInfinity)
        continue;
      for (Term& term : other->terms) conv->terms.push_back(std::move(term));
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
  auto add_steps = [=, this] {
    steps_.push_back({g.out_h, 1, [=, this](const Frame& frame, int64_t first, int64_t last) {
                        thread_local Scratch scratch;
                        float* const row = scratch.get(pool_scratch(g));
                        for (int64_t y = first; y < last; ++y)
                          kernels().max_pool_row(g, images(frame, in), images(frame, out), y, row);
                      }});
  };
  add_layer({{in}, out, kNone, add_steps});
}

void Program::add_avg_pool2d(const Pool2dGeometry& g, bool count_padding, int64_t in, int64_t out) {
  auto add_steps = [=, this] {
    steps_.push_back({g.out_h, 1, [=, this](const Frame& frame, int64_t first, int64_t last) {
                        thread_local Scratch scratch;
                        float* const row = scratch.get(pool_scratch(g));
                        for (int64_t y = first; y < last; ++y)
                          kernels().avg_pool_row(g, count_padding, images(frame, in), images(frame, out), y, row);
                      }});
  };
  add_layer({{in}, out, kNone, add_steps});
}

// A layer that is f(frame, channel) for every channel.
void Program::add_channels(std::vector<int64_t> reads, int64_t writes, int64_t in_place, int64_t channels,
                           std::function<void(const Frame&, int64_t)> f) {
  auto add_steps = [=, this] {
    steps_.push_back({channels, kCopyChannels, [=](const Frame& frame, int64_t first, int64_t last) {
                        for (int64_t c = first; c < last; ++c) f(frame, c);
                      }});
  };
  add_layer({std::move(reads), writes, in_place, add_steps});
}

float* Program::plane(const Frame& frame, int64_t tensor, int64_t channel) const {
  return data(frame, tensor) + channel * layout(tensor).channel;
}

void Program::add_mean(int64_t in, int64_t out) {
  add_channels({in}, out, kNone, size(in).channels, [=, this](const Frame& frame, int64_t c) {
    const float* const from = plane(frame, in, c);
    float sums[kAlign] = {};  // lanes without a pixel are zero
    for (int64_t i = 0; i < layout(in).lanes; i += kAlign)
      for (int64_t k = 0; k < kAlign; ++k) sums[k] += from[i + k];
    double total = 0;
    for (float sum : sums) total += sum;
    *plane(frame, out, c) = total / (size(in).h * size(in).w);
  });
}

void Program::add_elementwise(Elementwise e, int64_t in, int64_t out) {
  std::vector<int64_t> reads{in};
  for (int64_t tensor : {e.gate, e.other})
    if (tensor != kNone) reads.push_back(tensor);
  add_channels(reads, out, in, size(in).channels, [=, this](const Frame& frame, int64_t c) {
    Pointwise p{e.scale.empty() ? 1 : e.scale[c],
                e.shift.empty() ? 0 : e.shift[c],
                e.other == kNone ? nullptr : plane(frame, e.other, c),
                layout(out).mask.empty() ? nullptr : layout(out).mask.data(),
                e.low,
                e.high,
                e.activation};
    if (e.gate != kNone) p.scale *= *plane(frame, e.gate, c);
    kernels().pointwise(p, plane(frame, out, c), plane(frame, in, c), layout(out).lanes);
  });
}

void Program::add_gather(const std::vector<int64_t>& in, const std::vector<int64_t>& channels, int64_t out) {
  std::vector<std::pair<int64_t, int64_t>> all, from;
  for (int64_t tensor : in)
    for (int64_t c = 0; c < size(tensor).channels; ++c) all.emplace_back(tensor, c);
  for (int64_t c : channels) from.push_back(all.at(c));
  add_channels(in, out, kNone, from.size(), [=, this](const Frame& frame, int64_t c) {
    std::memcpy(plane(frame, out, c), plane(frame, from[c].first, from[c].second), layout(out).lanes * sizeof(float));
  });
}

void Program::add_store(int64_t in, int64_t output) {
  add_channels({in}, kNone, kNone, size(in).channels, [=, this](const Frame& frame, int64_t c) {
    const Images& to = (*frame.outputs)[output];
    kernels().scatter(to.data + frame.image * to.image + c * to.channel, to.row, to.col, plane(frame, in, c),
                      layout(in).pitch, size(in).h, size(in).w);
  });
}

void Program::set_layouts() {
  for (Layout& layout : layouts_) {
    layout.pitch = layout.w + layout.side;
    // Rows of whole lines, or of half a line more, let the taps of a 3 x 3 be loaded by whole lines.
    for (const int64_t unit : {kAlign, kAlign / 2}) {
      const int64_t whole = round_up(layout.pitch, unit);
      if (!layout.side || whole > kMostStripVectors * kAlign || whole > kMostWaste * layout.pitch) continue;
      layout.pitch = whole;
      layout.shifting = true;
      break;
    }
    layout.lead = round_up(layout.up * layout.pitch + layout.side, kAlign);
    layout.lanes = round_up((layout.h - 1) * layout.pitch + layout.w, kAlign);
    // What lies behind a plane serves the next as what lies before it.
    layout.channel = layout.lanes + std::max(layout.lead, round_up(layout.down * layout.pitch + layout.side, kAlign));
    // An odd number of lines: the planes of a strip spread over all sets of a cache.
    if (layout.channel / kAlign % 2 == 0) layout.channel += kAlign;
    if (layout.lanes == layout.h * layout.w) continue;
    layout.mask.resize(layout.lanes);
    for (int64_t i = 0; i < layout.lanes; ++i)
      layout.mask[i] = i % layout.pitch < layout.w && i / layout.pitch < layout.h ? -1 : 0;
  }
}

int64_t Program::reserve(int64_t floats) {
  floats_ += round_up(floats, kAlign);
  return floats_ - round_up(floats, kAlign);
}

// Tensors share memory with those of their own layout only, so that zeros around images stay zero.
void Program::place_tensors() {
  struct Place {
    int64_t layout, channels = 0, at = 0;
    bool busy = false;
  };
  std::vector<Place> places;
  std::vector<int64_t> place_of(tensors_.size(), kNone);
  // The free place of the layout that suits best: the smallest that is large enough, else the largest.
  auto choose = [&](const Tensor& tensor) -> int64_t {
    const int64_t wanted = tensor.size.channels;
    int64_t best = kNone;
    auto worse = [&](int64_t a, int64_t b) { return a >= wanted ? b >= wanted && b < a : b > a; };
    for (size_t i = 0; i < places.size(); ++i) {
      if (places[i].busy || places[i].layout != tensor.layout) continue;
      if (best == kNone || worse(places[best].channels, places[i].channels)) best = i;
    }
    if (best != kNone) return best;
    places.push_back({tensor.layout});
    return places.size() - 1;
  };
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    auto dies = [&](int64_t tensor) { return tensor >= 0 && tensor != kNone && tensors_[tensor].last <= int64_t(i); };
    if (layer.writes != kNone) {
      const Tensor& tensor = tensors_[layer.writes];
      const int64_t place = dies(layer.in_place) ? place_of[layer.in_place] : choose(tensor);
      places[place].channels = std::max(places[place].channels, tensor.size.channels);
      places[place].busy = true;
      place_of[layer.writes] = place;
    }
    for (int64_t tensor : layer.reads)
      if (dies(tensor) && !(layer.writes != kNone && place_of[tensor] == place_of[layer.writes]))
        places[place_of[tensor]].busy = false;
    if (dies(layer.writes)) places[place_of[layer.writes]].busy = false;
  }
  for (Place& place : places) {
    const Layout& layout = layouts_[place.layout];
    place.at = reserve(layout.lead + place.channels * layout.channel) + layout.lead;
  }
  for (size_t i = 0; i < tensors_.size(); ++i)
    if (place_of[i] != kNone) tensors_[i].at = places[place_of[i]].at;
}

void Program::finish() {
  join_residuals();
  set_layouts();
  place_tensors();
  int64_t most = 0;
  for (const Layout& layout : layouts_) most = std::max(most, layout.lanes);
  zeros_ = reserve(most);
  for (const Layer& layer : layers_) layer.add_steps();
}

void Program::add_conv_steps(Conv& conv) {
  const Layout& layout = this->layout(conv.out);
  const int64_t vectors = layout.lanes / kAlign;
  conv.strips = std::max(ceil_div(vectors, kMostStripVectors), (vectors + kStripVectors / 2) / kStripVectors);
  std::vector<Shifting> shifting(conv.terms.size());
  for (size_t t = 0; t < conv.terms.size(); ++t) {
    Term& term = conv.terms[t];
    Walk& walk = term.walk;
    walk.tile_h = walk.grid_h;
    walk.tile_w = walk.grid_w;
    walk.pitch = layout.pitch;
    if (term.direct) {
      walk.phases[0].base = 0;
      walk.channel_stride = layout.channel;
      if (layout.shifting && (walk.left || walk.right)) shifting[t] = shift(conv, term);
    } else {
      walk.lead = round_up(walk.left, kAlign) - walk.left;
      place_phases(walk);
    }
  }
  conv.splits = std::clamp<int64_t>(ceil_div(kFewestTasks, conv.strips), 1, ceil_div(conv.terms[0].rows(), 64));
  for (size_t t = 0; t < conv.terms.size(); ++t) {
    Term& term = conv.terms[t];
    term.block = term.walk.groups > 1
                     ? term.channels()
                     : block_channels(term.walk, term.weight, kStripLanes, kRowNnz, first_level_floats());
    term.blocks = ceil_div(term.channels(), term.block);
    term.kernel = std::make_unique<PackedWeight>(term.walk, term.walk.parts[0], term.weight, term.block, conv.splits,
                                                 true, true, shifting[t]);
    term.weight = {};
  }
  // Copies channels [from, from + count) of a term's source.
  auto add_copy = [&](const Term& term, int64_t from, int64_t count) {
    steps_.push_back(
        {count, ceil_div(count, kFewestTasks), [&term, this, from](const Frame& frame, int64_t first, int64_t last) {
           copy(term.walk, frame, term.in, {from + first, last - first},
                frame.memory + term.packed + first * term.walk.channel_stride);
         }});
  };
  // f(strip, splits) for items [first, last), of which a strip's splits of the rows follow each other.
  auto add = [&](auto f) {
    steps_.push_back({conv.strips * conv.splits, 1, [&conv, f](const Frame& frame, int64_t first, int64_t last) {
                        for (int64_t at = first, end; at < last; at = end) {
                          end = std::min(last, (at / conv.splits + 1) * conv.splits);
                          f(frame, at / conv.splits, Range{at % conv.splits, end - at});
                        }
                      }});
  };
  Term& only = conv.terms[0];
  if (conv.terms.size() == 1 && !only.direct && only.channels() * only.walk.channel_stride > kPackedFloats) {
    // Block by block, so that the packed source stays in a cache.
    only.packed = reserve(only.block * only.walk.channel_stride + only.walk.pitch);
    for (int64_t b = 0; b < only.blocks; ++b) {
      add_copy(only, b * only.block, std::min(only.block, only.channels() - b * only.block));
      add([&conv, &only, this, b](const Frame& frame, int64_t strip, Range splits) {
        run_conv(conv, only, frame, frame.memory + only.packed, {b, 1}, strip, splits);
      });
    }
    return;
  }
  for (Term& term : conv.terms) {
    if (term.direct) continue;
    term.packed = reserve(term.channels() * term.walk.channel_stride + term.walk.pitch);
    add_copy(term, 0, term.channels());
  }
  add([&conv, this](const Frame& frame, int64_t strip, Range splits) {
    for (const Term& term : conv.terms) {
      const Walk& walk = term.walk;
      const float* source =
          term.direct ? data(frame, term.in) - walk.phases[0].up * walk.pitch - walk.left : frame.memory + term.packed;
      run_conv(conv, term, frame, source, {0, term.blocks}, strip, splits);
    }
  });
}

// Makes strips of whole rows.
Shifting Program::shift(Conv& conv, Term& term) {
  Walk& walk = term.walk;
  const Layout& layout = this->layout(conv.out);
  conv.unit = layout.pitch % kAlign ? 2 * layout.pitch / kAlign : layout.pitch / kAlign;
  conv.strips = ceil_div(layout.lanes / kAlign, std::max<int64_t>(1, kStripVectors / conv.unit) * conv.unit);
  const int64_t pixels = tensors_[term.in].at, from = pixels - layout.lead;
  if (layout.pitch % kAlign) {
    // Every other row begins in the middle of a line: these are read from a copy that lies half a line off.
    const int64_t floats = layout.lead + term.channels() * layout.channel;
    const int64_t to = reserve(floats + kAlign) + kAlign / 2;
    for (Tap& tap : walk.parts[0].taps)
      if (tap.dy % 2) tap.elsewhere = to - from;
    steps_.push_back({1, 1, [=](const Frame& frame, int64_t, int64_t) {
                        std::memcpy(frame.memory + to, frame.memory + from, floats * sizeof(float));
                      }});
  }
  return {true, zeros_ - (pixels - walk.phases[0].up * walk.pitch - walk.left)};
}

// Adds blocks of a term to a strip; `source` is that of the first.
void Program::run_conv(const Conv& conv, const Term& term, const Frame& frame, const float* source, Range blocks,
                       int64_t strip, Range splits) const {
  const Layout& layout = this->layout(conv.out);
  const int64_t units = ceil_div(layout.lanes / kAlign, conv.unit), lanes = conv.unit * kAlign;
  const int64_t begin = units * strip / conv.strips * lanes;
  const int64_t end = std::min(layout.lanes, units * (strip + 1) / conv.strips * lanes);
  Results out{nullptr, layout.channel};
  out.start_stride = layout.channel;
  source += begin;
  for (int64_t b = blocks.first; b < blocks.first + blocks.count; ++b) {
    const bool first = b == 0 && &term == &conv.terms.front();
    const bool last = b + 1 == term.blocks && &term == &conv.terms.back();
    out.mask = last && !layout.mask.empty() ? layout.mask.data() + begin : nullptr;
    out.low = last ? conv.epilogue.low : -kInfinity;
    out.high = last ? conv.epilogue.high : kInfinity;
    for (int64_t split = splits.first; split < splits.first + splits.count; ++split) {
      const int64_t row = term.kernel->first_row(split), at = row * layout.channel + begin;
      out.data = data(frame, conv.out) + at;
      out.bias = first ? conv.bias.data() + row : nullptr;
      out.start = !first ? out.data : conv.residual == kNone ? nullptr : data(frame, conv.residual) + at;
      kernels().spmm({source, {}}, term.kernel->rows(0, b, split), out, end - begin);
    }
    source += term.block * term.walk.channel_stride;
  }
}

// An image that all threads work on: each takes tasks of a step until there are none, then waits until all are done.
// Whoever waits has no task in hand, so this ends however few threads there are in truth.
class Program::Together {
 public:
  explicit Together(const std::vector<Step>& steps) : steps_(steps) {
    for (const Step& step : steps) turns_.emplace_back(ceil_div(step.items, step.chunk));
  }

  void run(const Frame& frame) {
    parallel(torch::stable::get_num_threads(), [&](int64_t thread, int64_t) {
      for (size_t i = 0; i < steps_.size(); ++i) {
        Turn& turn = turns_[i];
        const Step& step = steps_[i];
        for (Queue::Worker task(turn.queue, thread, false); !task.done(); task.advance()) {
          const int64_t first = task.task() * step.chunk;
          step.run(frame, first, std::min(step.items, first + step.chunk));
          turn.done.fetch_add(1, std::memory_order_release);
        }
        for (int64_t tries = 0; turn.done.load(std::memory_order_acquire) < turn.tasks; ++tries)
          if (tries > 1000) std::this_thread::yield();
      }
    });
  }

 private:
  struct Turn {
    explicit Turn(int64_t tasks) : tasks(tasks), queue(tasks, 1) {}
    const int64_t tasks;
    Queue queue;
    std::atomic<int64_t> done = 0;
  };
  const std::vector<Step>& steps_;
  std::deque<Turn> turns_;
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

void Program::run(const std::vector<Images>& inputs, const std::vector<Images>& outputs, int64_t images) {
  const int64_t threads = torch::stable::get_num_threads(), alone = images / threads * threads;
  Queue queue(alone, 1);
  parallel(std::min(threads, alone), [&](int64_t thread, int64_t) {
    auto memory = take_memory();
    for (Queue::Worker image(queue, thread, false); !image.done(); image.advance())
      for (const Step& step : steps_) step.run({memory->data(), &inputs, &outputs, image.task()}, 0, step.items);
    give_back(std::move(memory));
  });
  for (int64_t image = alone; image < images; ++image) {
    auto memory = take_memory();
    Together(steps_).run({memory->data(), &inputs, &outputs, image});
    give_back(std::move(memory));
  }
}

}  // namespace sparsekit
