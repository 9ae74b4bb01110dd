// Sparse convolution on the CPU: forward, input gradient and masked weight gradient, as one kind of walk.
//
// All three read a source through small integer shifts: forward shifts x by the taps of the kernel, the input gradient
// shifts dy (one part of the target per residue of the stride), the weight gradient multiplies dy with the shifts of
// forward. A Walk is that common form. It is cut into tiles of output pixels; a thread copies the source pixels of a
// tile into a packed block of channels (zero padding included, a strided source split by residue), so that every kept
// weight becomes one offset into the block, and hands it to the microkernels; a pointwise walk over aligned rows reads
// the source itself. Every output is reduced by one thread in an order that depends on the shapes alone, so results do
// not depend on the number of threads. Bound by memory below about 10 % of kept weights, by loads per FMA above.

#include "cpu/conv2d.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

namespace sparsekit {
namespace {

// Chosen by measurement (benchmarks/layers.py) for 32 KB of first-level and 1 MB of second-level cache; 48 KB and 2 MB
// would gain nothing by other sizes.
constexpr int64_t kTileLanes = 256;          // at most, in a tile
constexpr int64_t kDirectLanes = 512;        // the same, where the source is not packed
constexpr int64_t kStripLanes = 64;          // that spmm holds in registers; sddmm holds twice as many
constexpr int64_t kTileFloats = 128 * 1024;  // of packed source that stay in the second-level cache
constexpr int64_t kStreamFloats = 3 << 20;   // of a target that is too large for the caches
constexpr int64_t kBlockFloats = 7 * 1024;   // that a strip reads while they stay in the first-level cache

// Of a single image, at least, unless tiles would be too small for the registers: threads that share an image then pack
// a part of it each. Not the number of threads, on which results must not depend.
constexpr int64_t kSingleTiles = 2;

constexpr int64_t kWriteAhead = 4;  // channels, of a target that is not written in place

constexpr float kInfinity = std::numeric_limits<float>::infinity();

constexpr int64_t kAlign = 16;  // floats in a cache line, and in the widest register

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
int64_t floor_div(int64_t n, int64_t by) { return n >= 0 ? n / by : -ceil_div(-n, by); }

template <class F>
void parallel(int64_t count, const F& f) {
  if (count > 0) torch::stable::parallel_for(0, count, 1, f);
}

// Tasks [0, count): every thread has its share, the same in every layer, so that it finds in its caches what it wrote
// last, and takes from the others' when it is done, since cores that share clock, caches and memory with strangers are
// not equally fast. What a task computes must not depend on who runs it.
class Queue {
 public:
  explicit Queue(int64_t count)
      : count_(count),
        threads_(std::max<int64_t>(1, std::min<int64_t>(count, torch::stable::get_num_threads()))),
        run_(std::max<int64_t>(1, count / (8 * threads_))),
        shares_(threads_) {
    for (int64_t i = 0; i < threads_; ++i) shares_[i].taken = first_of(i);
  }

  // One thread's view of the queue: the task at hand, and the one that this thread will have after it.
  class Worker {
   public:
    Worker(Queue& queue, int64_t thread) : queue_(queue), thread_(thread) {
      next_ = after();
      advance();
    }
    bool done() const { return task_ < 0; }
    bool last() const { return next_ < 0; }
    int64_t task() const { return task_; }
    int64_t next() const { return next_; }
    void advance() {
      task_ = next_;
      if (task_ >= 0) next_ = after();
    }

   private:
    int64_t after() {
      if (at_ == end_) std::tie(at_, end_) = queue_.take(thread_);
      return at_ == end_ ? -1 : at_++;
    }

    Queue& queue_;
    const int64_t thread_;
    int64_t at_ = 0, end_ = 0, task_ = -1, next_ = -1;
  };

  // f(worker) on every thread.
  template <class F>
  void run(const F& f) {
    if (count_ == 0) return;
    parallel(threads_, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        Worker worker(*this, i);
        if (!worker.done()) f(worker);
      }
    });
  }

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> taken;
  };

  int64_t first_of(int64_t thread) const { return count_ * thread / threads_; }

  // A run of tasks from a thread's own share, else from another's; empty at the end.
  std::pair<int64_t, int64_t> take(int64_t thread) {
    for (int64_t i = 0; i < threads_; ++i) {
      const int64_t owner = (thread + i) % threads_, end = first_of(owner + 1);
      if (shares_[owner].taken.load(std::memory_order_relaxed) >= end) continue;
      const int64_t begin = shares_[owner].taken.fetch_add(run_, std::memory_order_relaxed);
      if (begin < end) return {begin, std::min(begin + run_, end)};
    }
    return {0, 0};
  }

  const int64_t count_, threads_, run_;
  std::vector<Share> shares_;
};

constexpr uintptr_t kHugePage = 2 << 20;

// Fresh memory comes page by page, and a fault costs more than filling the page: ask for huge ones.
void use_huge_pages(float* data, int64_t floats) {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = reinterpret_cast<uintptr_t>(data + floats) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// A thread's own memory, kept between calls.
class Scratch {
 public:
  float* get(int64_t floats) {
    if (floats > size_) {
      size_ = round_up(floats, kHugePage / sizeof(float));
      memory_.reset(static_cast<float*>(std::aligned_alloc(kHugePage, size_ * sizeof(float))));
      use_huge_pages(memory_.get(), size_);
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

thread_local Scratch tile_scratch, result_scratch;

struct Tap {
  int64_t phase, dy, dx;  // phase < 0: the tap does not touch this part
};

// The source pixels (y * step_h + offset_h, x * step_w + offset_w), and the rows that taps reach above and below.
struct Phase {
  int64_t offset_h, offset_w, up, down;
  int64_t base;  // of its first float in a channel of the packed block
};

// The target pixels (y * target_step_h + offset_h, x * target_step_w + offset_w): those that see the same taps.
struct Part {
  int64_t offset_h, offset_w;
  std::vector<Tap> taps;
  bool empty = true;  // no tap touches it: all zero
};

struct Walk {
  Images source;
  int64_t source_h, source_w, step_h, step_w;
  Images target;
  int64_t target_h, target_w, target_step_h, target_step_w, images;
  int64_t groups, source_channels, rows;  // channels and rows are per group
  std::vector<Part> parts;
  std::vector<Phase> phases;
  int64_t left = 0, right = 0;  // columns that taps reach beyond the grid's

  // The lanes are a grid of grid_h x grid_w pixels of every part, cut into tiles of tile_h x tile_w, pitch lanes from
  // one row to the next.
  int64_t grid_h, grid_w, tile_h, tile_w, pitch, channel_stride;
  bool direct = false;  // the source itself serves as packed block

  int64_t tiles_h() const { return ceil_div(grid_h, tile_h); }
  int64_t tiles_w() const { return ceil_div(grid_w, tile_w); }
  int64_t tiles() const { return images * tiles_h() * tiles_w(); }
  // Floats from one row of results to the next, where they are not written in place.
  int64_t result_stride() const { return round_up((tile_h - 1) * pitch + tile_w, kAlign) + kAlign; }
};

struct TileAt {
  int64_t image, y, x, h, w;
  int64_t lanes(const Walk& walk) const { return (h - 1) * walk.pitch + w; }
};

TileAt tile_at(const Walk& walk, int64_t index) {
  const int64_t column = index % walk.tiles_w(), rest = index / walk.tiles_w();
  const int64_t row = rest % walk.tiles_h();
  const int64_t y = row * walk.tile_h, x = column * walk.tile_w;
  return {rest / walk.tiles_h(), y, x, std::min(walk.tile_h, walk.grid_h - y), std::min(walk.tile_w, walk.grid_w - x)};
}

int64_t add_phase(Walk& walk, int64_t offset_h, int64_t offset_w) {
  for (size_t i = 0; i < walk.phases.size(); ++i)
    if (walk.phases[i].offset_h == offset_h && walk.phases[i].offset_w == offset_w) return i;
  walk.phases.push_back({offset_h, offset_w, 0, 0, 0});
  return walk.phases.size() - 1;
}

void add_tap(Walk& walk, Part& part, int64_t offset_h, int64_t offset_w, int64_t dy, int64_t dx) {
  const int64_t phase = add_phase(walk, offset_h, offset_w);
  walk.phases[phase].up = std::max(walk.phases[phase].up, -dy);
  walk.phases[phase].down = std::max(walk.phases[phase].down, dy);
  walk.left = std::max(walk.left, -dx);
  walk.right = std::max(walk.right, dx);
  part.taps.push_back({phase, dy, dx});
  part.empty = false;
}

bool aligned(const float* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % (kAlign * sizeof(float)) == 0 && stride % kAlign == 0;
}

// Pointwise walks have no neighbourhood: let as many pixels as possible be one long row.
void merge_rows(Walk& walk) {
  if (walk.phases.size() != 1 || walk.parts.size() != 1 || walk.left || walk.right) return;
  if (walk.phases[0].up || walk.phases[0].down) return;
  if (walk.step_h != 1 || walk.step_w != 1 || walk.source_h != walk.target_h || walk.source_w != walk.target_w) return;
  auto dense_rows = [&](const Images& t) { return t.row == walk.target_w * t.col; };
  if (!dense_rows(walk.source) || !dense_rows(walk.target)) return;
  walk.target_w *= walk.target_h;
  walk.target_h = walk.images;
  walk.images = 1;
  walk.source.row = walk.source.image;
  walk.target.row = walk.target.image;
  if (dense_rows(walk.source) && dense_rows(walk.target)) {
    walk.target_w *= walk.target_h;
    walk.target_h = 1;
  }
  walk.source_h = walk.grid_h = walk.target_h;
  walk.source_w = walk.grid_w = walk.target_w;
  // Aligned rows need no packing: a kept weight is an offset into the source.
  walk.direct = walk.source.col == 1 && walk.source.row % kAlign == 0 && walk.grid_w % kAlign == 0 &&
                aligned(walk.source.data, walk.source.channel) &&
                walk.source.channel * walk.source_channels < INT32_MAX;
}

// Lane count and pitch of the tile. `lanes_wanted` bounds the tile; of the heights within it, the one that computes and
// copies the fewest lanes per pixel wins, where `overhead` is the work per row of the weight and tile, in lanes.
void choose_tile(Walk& walk, int64_t lanes_wanted, int64_t overhead) {
  const int64_t halo = walk.left + walk.right;
  int64_t pieces = ceil_div(walk.grid_w + halo, lanes_wanted), align = 2 * kAlign;
  if (walk.images * walk.grid_h == 1 && walk.grid_w >= kSingleTiles * kStripLanes)
    pieces = round_up(pieces, kSingleTiles), align = kAlign;
  walk.tile_w = walk.grid_w;
  if (pieces > 1) walk.tile_w = std::min(walk.grid_w, round_up(ceil_div(walk.grid_w, pieces), align));
  walk.pitch = walk.tile_w + halo;
  if (walk.direct) {
    walk.tile_h = 1;
    walk.phases[0].base = 0;
    walk.channel_stride = walk.source.channel;
    return;
  }
  // The zeros to the right of a row can be those to the left of the next, if the source has nothing there.
  const int64_t shared = std::min(walk.left, walk.right);
  if (walk.tile_w == walk.grid_w && ceil_div(walk.source_w, walk.step_w) <= walk.grid_w + walk.right - shared)
    walk.pitch -= shared;
  walk.tile_h = 1;
  double best = 0;
  const bool single = walk.images * pieces == 1 && walk.grid_h * walk.pitch >= kSingleTiles * kStripLanes;
  const int64_t highest = single ? ceil_div(walk.grid_h, kSingleTiles) : walk.grid_h;
  for (int64_t h = 1; h <= highest && (h == 1 || (h - 1) * walk.pitch + walk.tile_w <= lanes_wanted); ++h) {
    int64_t copied = 0;
    for (const Phase& p : walk.phases) copied += (h + p.up + p.down) * walk.pitch;
    const double computed = 16.0 * (round_up((h - 1) * walk.pitch + walk.tile_w, kAlign) + overhead);
    const double cost = (computed + copied) * ceil_div(walk.grid_h, h);
    if (h == 1 || cost < best) best = cost, walk.tile_h = h;
  }
  // Rows that begin with a cache line, where they need no more registers: a third of the taps of a 3 x 3 are then
  // aligned.
  const int64_t rows_between = (walk.tile_h - 1) * walk.pitch, whole = (walk.tile_h - 1) * round_up(walk.pitch, kAlign);
  if (halo > 0 && ceil_div(whole + walk.tile_w, kAlign) == ceil_div(rows_between + walk.tile_w, kAlign))
    walk.pitch = round_up(walk.pitch, kAlign);
  int64_t base = 0;
  for (Phase& p : walk.phases) {
    p.base = base;
    const int64_t lanes = round_up((walk.tile_h - 1) * walk.pitch + walk.tile_w, kAlign);
    base += round_up((p.up + p.down) * walk.pitch + halo + lanes, kAlign);
  }
  // Where a strip is a part of the tile: an odd number of lines, so that its channels spread over all sets of the
  // cache.
  const bool several_strips = base > 4 * kAlign;
  walk.channel_stride = std::max(kAlign, several_strips && base / kAlign % 2 == 0 ? base + kAlign : base);
}

// Floats of a channel that a strip of `lanes` reads.
int64_t strip_floats(const Walk& walk, int64_t lanes) {
  int64_t floats = 0;
  for (const Phase& p : walk.phases) floats += std::min(lanes, walk.tile_h * walk.pitch) + (p.up + p.down) * walk.pitch;
  return std::max<int64_t>(1, std::min(floats, walk.channel_stride));
}

Walk forward_walk(const Conv2dGeometry& g, const Images& x, const Images& y) {
  Walk walk{x, g.in_h, g.in_w, g.stride_h, g.stride_w, y, g.out_h, g.out_w, 1, 1, g.batch, g.groups};
  walk.source_channels = g.in_channels / g.groups;
  walk.rows = g.out_channels / g.groups;
  walk.grid_h = g.out_h;
  walk.grid_w = g.out_w;
  Part part{0, 0};
  for (int64_t ky = 0; ky < g.kernel_h; ++ky)
    for (int64_t kx = 0; kx < g.kernel_w; ++kx) {
      const int64_t h = ky * g.dilation_h - g.pad_top, w = kx * g.dilation_w - g.pad_left;
      const int64_t dy = floor_div(h, g.stride_h), dx = floor_div(w, g.stride_w);
      add_tap(walk, part, h - dy * g.stride_h, w - dx * g.stride_w, dy, dx);
    }
  walk.parts.push_back(std::move(part));
  merge_rows(walk);
  return walk;
}

// One part per residue of the stride.
Walk input_grad_walk(const Conv2dGeometry& g, const Images& dy, const Images& dx) {
  Walk walk{dy, g.out_h, g.out_w, 1, 1, dx, g.in_h, g.in_w, g.stride_h, g.stride_w, g.batch, g.groups};
  walk.source_channels = g.out_channels / g.groups;
  walk.rows = g.in_channels / g.groups;
  walk.grid_h = ceil_div(g.in_h, g.stride_h);
  walk.grid_w = ceil_div(g.in_w, g.stride_w);
  for (int64_t a = 0; a < std::min(g.stride_h, g.in_h); ++a)
    for (int64_t b = 0; b < std::min(g.stride_w, g.in_w); ++b) {
      Part part{a, b};
      for (int64_t ky = 0; ky < g.kernel_h; ++ky)
        for (int64_t kx = 0; kx < g.kernel_w; ++kx) {
          const int64_t h = a + g.pad_top - ky * g.dilation_h, w = b + g.pad_left - kx * g.dilation_w;
          if (h % g.stride_h || w % g.stride_w) {
            part.taps.push_back({-1, 0, 0});
          } else {
            add_tap(walk, part, 0, 0, h / g.stride_h, w / g.stride_w);
          }
        }
      walk.parts.push_back(std::move(part));
    }
  merge_rows(walk);
  return walk;
}

// The weight as the microkernels read it: per group, block of channels and split of the rows, slots of (offset, value).
class PackedWeight {
 public:
  // For spmm (with values), or for sddmm (without; slots are filled up to a multiple of 4 with offsets of no meaning).
  PackedWeight(const Walk& walk, const Part& part, const Csr& csr, int64_t block_channels, int64_t splits,
               bool with_values)
      : rows_(walk.rows),
        groups_(walk.groups),
        blocks_(std::max<int64_t>(1, ceil_div(walk.source_channels, block_channels))),
        block_channels_(block_channels),
        splits_(splits),
        taps_(part.taps.size()) {
    const int64_t lists = walk.groups * blocks_;
    begin_.resize(lists * walk.rows + 1);
    order_.resize(lists * walk.rows);
    slot_.resize(lists * walk.rows);
    length_.resize(lists * walk.rows);
    std::vector<int32_t> offset_of(walk.source_channels * taps_);
    for (int64_t c = 0; c < walk.source_channels; ++c)
      for (int64_t t = 0; t < taps_; ++t) {
        const Tap& tap = part.taps[t];
        if (tap.phase < 0) {
          offset_of[c * taps_ + t] = -1;
          continue;
        }
        const Phase& p = walk.phases[tap.phase];
        offset_of[c * taps_ + t] =
            c % block_channels * walk.channel_stride + p.base + (tap.dy + p.up) * walk.pitch + walk.left + tap.dx;
      }
    count(csr, offset_of);
    sort(with_values ? 1 : 4);
    offsets_.resize(size());
    if (with_values) values_.resize(size() + 4);  // read four at a time
    fill(csr, offset_of);
  }

  int64_t blocks() const { return blocks_; }
  int64_t size() const { return begin_.back(); }
  int64_t first_row(int64_t split) const { return rows_ * split / splits_; }

  // The rows [first_row(split), first_row(split + 1)) of a group, over one block of channels.
  Rows rows(int64_t group, int64_t block, int64_t split) const {
    const int64_t start = (group * blocks_ + block) * rows_ + first_row(split);
    return {begin_.data() + start, order_.data() + start, offsets_.data(), values_.data(),
            first_row(split + 1) - first_row(split)};
  }

  // Move sums that are in packed order to the order of the CSR.
  void unpack(const Csr& csr, const float* packed, float* grad) const {
    parallel(csr.rows, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        float* to = grad + csr.crow[r];
        for (int64_t b = 0; b < blocks_; ++b) {
          const int64_t i = list(r, b);
          to = std::copy_n(packed + begin_[slot_[i]], length_[i], to);
        }
      }
    });
  }

 private:
  int64_t list(int64_t row, int64_t block) const { return (row / rows_ * blocks_ + block) * rows_ + row % rows_; }

  // f(list, first, end) for the non-zeros of a row in every block.
  template <class F>
  void each_segment(const Csr& csr, int64_t row, const F& f) const {
    int64_t j = csr.crow[row];
    const int64_t end = csr.crow[row + 1];
    for (int64_t b = 0; b < blocks_; ++b) {
      const int64_t stop = (b + 1) * block_channels_ * taps_;
      const int64_t first = j;
      if (b + 1 == blocks_) {
        j = end;
      } else {
        while (j < end && csr.col[j] < stop) ++j;
      }
      f(list(row, b), first, j);
    }
  }

  void count(const Csr& csr, const std::vector<int32_t>& offset_of) {
    const bool all_taps = std::find(offset_of.begin(), offset_of.end(), -1) == offset_of.end();
    parallel(csr.rows, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        each_segment(csr, r, [&](int64_t list, int64_t j, int64_t end) {
          int64_t n = end - j;
          if (!all_taps)
            for (n = 0; j < end; ++j) n += offset_of[csr.col[j]] >= 0;
          length_[list] = n;
        });
    });
  }

  void sort(int64_t multiple) {
    int32_t total = 0;
    for (int64_t l = 0; l < groups_ * blocks_; ++l)
      for (int64_t split = 0; split < splits_; ++split) {
        const int64_t start = l * rows_ + first_row(split), rows = first_row(split + 1) - first_row(split);
        int32_t* order = order_.data() + start;
        const int32_t* length = length_.data() + start;
        // A counting sort, longest first.
        int32_t longest = 0;
        for (int64_t r = 0; r < rows; ++r) longest = std::max(longest, length[r]);
        std::vector<int32_t> position(longest + 2);
        for (int64_t r = 0; r < rows; ++r) ++position[longest - length[r] + 1];
        for (int32_t n = 0; n < longest; ++n) position[n + 1] += position[n];
        for (int64_t r = 0; r < rows; ++r) order[position[longest - length[r]]++] = r;
        for (int64_t s = 0; s < rows; ++s) {
          begin_[start + s] = total;
          total += round_up(length[order[s]], multiple);
        }
        for (int64_t s = 0; s < rows; ++s) slot_[start + order[s]] = start + s;
      }
    begin_.back() = total;
  }

  void fill(const Csr& csr, const std::vector<int32_t>& offset_of) {
    parallel(csr.rows, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        each_segment(csr, r, [&](int64_t list, int64_t j, int64_t end) {
          int64_t to = begin_[slot_[list]];
          for (; j < end; ++j) {
            const int32_t offset = offset_of[csr.col[j]];
            if (offset < 0) continue;
            offsets_[to] = offset;
            if (!values_.empty()) values_[to] = csr.values[csr.permutation ? csr.permutation[j] : j];
            ++to;
          }
        });
    });
  }

  int64_t rows_, groups_, blocks_, block_channels_, splits_, taps_;
  std::vector<int32_t> begin_, order_, slot_, length_;
  std::vector<uint32_t> offsets_;
  std::vector<float> values_;
};

// Source channels [first, first + count).
struct Channels {
  int64_t first, count;
};

Channels channels_of(const Walk& walk, int64_t group, int64_t block, int64_t block_channels) {
  const int64_t begin = block * block_channels;
  return {group * walk.source_channels + begin, std::min(block_channels, walk.source_channels - begin)};
}

// Copy the source pixels of a tile into `block`, which starts zeroed.
void pack_source(const Walk& walk, const TileAt& tile, Channels channels, float* block) {
  const Kernels& k = kernels();
  const Images& s = walk.source;
  const int64_t count = channels.count;
  for (const Phase& p : walk.phases) {
    // The rows [top, bottom) and columns [from, to) of the packed phase that exist in the source.
    const int64_t x0 = tile.x - walk.left, y0 = tile.y - p.up, rows = walk.tile_h + p.up + p.down;
    const int64_t width = ceil_div(walk.source_w - p.offset_w, walk.step_w);
    const int64_t height = ceil_div(walk.source_h - p.offset_h, walk.step_h);
    const int64_t from = std::clamp<int64_t>(-x0, 0, walk.pitch),
                  to = std::clamp<int64_t>(width - x0, from, walk.pitch);
    const int64_t top = from < to ? std::clamp<int64_t>(-y0, 0, rows) : rows;
    const int64_t bottom = std::clamp<int64_t>(height - y0, top, rows);
    const int64_t col = walk.step_w * s.col, row = walk.step_h * s.row;
    const float* first = s.data + tile.image * s.image + channels.first * s.channel +
                         ((y0 + top) * walk.step_h + p.offset_h) * s.row +
                         ((x0 + from) * walk.step_w + p.offset_w) * s.col;
    float* phase = block + p.base;
    // Zero columns stay where the first tile had them, unless tiles are narrower than the target; zero rows move.
    const bool columns_move = walk.tile_w < walk.grid_w;
    if (top > 0 || bottom < rows || columns_move)
      for (int64_t c = 0; c < count; ++c) {
        float* packed = phase + c * walk.channel_stride;
        std::fill(packed, packed + top * walk.pitch, 0.0f);
        std::fill(packed + bottom * walk.pitch, packed + rows * walk.pitch, 0.0f);
        if (columns_move && (from > 0 || to < walk.pitch))
          for (int64_t r = top; r < bottom; ++r) {
            std::fill(packed + r * walk.pitch, packed + r * walk.pitch + from, 0.0f);
            std::fill(packed + r * walk.pitch + to, packed + (r + 1) * walk.pitch, 0.0f);
          }
      }
    float* packed = phase + top * walk.pitch + from;
    if (s.channel == 1) {
      for (int64_t r = 0; r < bottom - top; ++r)
        k.transpose(packed + r * walk.pitch, walk.channel_stride, first + r * row, col, to - from, count);
    } else if (bottom - top == 1) {
      k.gather(packed, walk.channel_stride, first, s.channel, col, count, to - from);
    } else {
      for (int64_t c = 0; c < count; ++c)
        k.gather(packed + c * walk.channel_stride, walk.pitch, first + c * s.channel, row, col, bottom - top,
                 to - from);
    }
  }
}

// The source memory of a tile.
Soon source_of(const Walk& walk, const TileAt& tile, Channels channels) {
  const Images& s = walk.source;
  if (s.col != 1) return {};
  const int64_t y = tile.y * walk.step_h, x = tile.x * walk.step_w;
  const int64_t rows = std::min(walk.source_h - y, tile.h * walk.step_h);
  const int64_t floats = std::min(walk.source_w - x, tile.w * walk.step_w);
  if (rows <= 0 || floats <= 0) return {};  // taps alone reach the source
  const float* first = s.data + tile.image * s.image + channels.first * s.channel + y * s.row + x;
  if (floats == s.row) return {first, s.channel, channels.count, 0, 1, rows * floats};
  return {first, s.channel, channels.count, s.row, rows, floats};
}

// The block of channels that the microkernels read: packed into `scratch`, or the source itself.
const float* block_at(const Walk& walk, const TileAt& tile, Channels channels, float* scratch) {
  if (walk.direct) return source_of(walk, tile, channels).data;
  pack_source(walk, tile, channels, scratch);
  return scratch;
}

// Whether lanes and target memory have the same layout, so that results need no copy.
bool writes_in_place(const Walk& walk) {
  return walk.target_step_h == 1 && walk.target_step_w == 1 && walk.target.col == 1 &&
         (walk.tile_h == 1 || walk.target.row == walk.pitch);
}

float* target_at(const Walk& walk, const TileAt& tile, int64_t channel) {
  const Images& t = walk.target;
  return t.data + tile.image * t.image + channel * t.channel + tile.y * walk.target_step_h * t.row +
         tile.x * walk.target_step_w * t.col;
}

// Copy the lanes of all parts, rows [channel, channel + count), to the target. Row c of part p starts at
// lanes[p].data + c * lanes[p].stride.
struct Lanes {
  const float* data;
  int64_t stride;
};

void write_target(const Walk& walk, const TileAt& tile, int64_t channel, int64_t count,
                  const std::vector<Lanes>& lanes) {
  const Kernels& k = kernels();
  const Images& t = walk.target;
  float* const corner = target_at(walk, tile, channel);
  const int64_t step_h = walk.target_step_h, step_w = walk.target_step_w;
  struct Piece {
    int64_t at, h, w;  // where a part begins in a channel of the target, and how much of it there is
  };
  std::vector<Piece> pieces;
  for (const Part& p : walk.parts)
    pieces.push_back({p.offset_h * t.row + p.offset_w * t.col,
                      std::min(tile.h, ceil_div(walk.target_h - p.offset_h, step_h) - tile.y),
                      std::min(tile.w, ceil_div(walk.target_w - p.offset_w, step_w) - tile.x)});
  if (t.channel == 1) {
    for (size_t i = 0; i < pieces.size(); ++i)
      for (int64_t r = 0; r < pieces[i].h; ++r)
        k.transpose(corner + pieces[i].at + r * step_h * t.row, step_w * t.col, lanes[i].data + r * walk.pitch,
                    lanes[i].stride, count, pieces[i].w);
    return;
  }
  const bool pairs = step_w == 2 && t.col == 1 && walk.target_w > 1;
  const int64_t rows = std::min(walk.target_h - tile.y * step_h, tile.h * step_h), row_floats = tile.w * step_w * t.col;
  for (int64_t c = 0; c < count; ++c) {
    const float* ahead = corner + (c + kWriteAhead) * t.channel;
    if (c + kWriteAhead < count)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t f = 0; f < row_floats; f += kAlign) __builtin_prefetch(ahead + r * t.row + f, 1);
    for (size_t i = 0; i < pieces.size(); ++i) {
      const auto [at, h, w] = pieces[i];
      float* to = corner + c * t.channel + at;
      const float* from = lanes[i].data + c * lanes[i].stride;
      if (pairs) {
        ++i;
        k.interleave(to, step_h * t.row, from, lanes[i].data + c * lanes[i].stride, walk.pitch, walk.pitch, h,
                     w + pieces[i].w);
      } else {
        k.scatter(to, step_h * t.row, step_w * t.col, from, walk.pitch, h, w);
      }
    }
  }
}

// Target pixels into lanes, which start zeroed, so that lanes that are no pixels stay zero.
void pack_target(const Walk& walk, const TileAt& tile, int64_t channel, int64_t count, float* lanes, int64_t stride) {
  const Kernels& k = kernels();
  const Images& t = walk.target;
  const float* from = target_at(walk, tile, channel);
  if (t.channel == 1) {
    for (int64_t r = 0; r < tile.h; ++r)
      k.transpose(lanes + r * walk.pitch, stride, from + r * t.row, t.col, tile.w, count);
  } else {
    for (int64_t c = 0; c < count; ++c)
      k.gather(lanes + c * stride, walk.pitch, from + c * t.channel, t.row, t.col, tile.h, tile.w);
  }
  if (walk.tile_w < walk.grid_w && tile.h > 1)
    for (int64_t c = 0; c < count; ++c)
      for (int64_t r = 0; r + 1 < tile.h; ++r)
        std::fill(lanes + c * stride + r * walk.pitch + tile.w, lanes + c * stride + (r + 1) * walk.pitch, 0.0f);
}

// Channels per block: what a strip reads of it fits the first-level cache, unless rows would have too few non-zeros.
int64_t block_channels(const Walk& walk, const Csr& csr, int64_t lanes, int64_t row_nnz) {
  const int64_t fits = kBlockFloats / strip_floats(walk, lanes);
  const double per_channel = double(csr.nnz) / std::max<int64_t>(1, csr.rows * walk.source_channels);
  const int64_t enough = per_channel > 0 ? int64_t(row_nnz / per_channel) + 1 : walk.source_channels;
  const int64_t channels = std::max<int64_t>(1, walk.source_channels);
  const int64_t most = std::clamp<int64_t>(std::max(fits, enough), 1, channels);
  return ceil_div(channels, ceil_div(channels, most));
}

}  // namespace

// A walk that is cut into tiles, with the weight packed for them: all that does not depend on where the images are.
class PreparedWalk {
 public:
  PreparedWalk(Walk walk, const Csr& csr) : walk_(std::move(walk)) {
    const int64_t channels = std::max<int64_t>(1, walk_.source_channels);
    const int64_t fits = kTileFloats / channels / kStripLanes * kStripLanes;
    choose_tile(walk_, walk_.direct ? kDirectLanes : std::clamp(fits, kStripLanes, kTileLanes), 16);
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
      weights_.emplace_back(walk_, part, csr, block_, splits_, true);
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
      std::memset(scratch, 0, source_floats * sizeof(float));
      int64_t packed = -1;
      float* result = nullptr;
      std::vector<Lanes> lanes;
      if (!in_place) {
        result = result_scratch.get(results_);
        std::memset(result, 0, stride * sizeof(float));
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
            kernels().spmm(source, weights_[w++].rows(group, b, split), out, tile.lanes(walk));
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
  use_huge_pages(dx.data, g.batch * g.in_channels * g.in_h * g.in_w);
  PreparedWalk(input_grad_walk(g, dy, dx), weight_t).run(dy.data, dx.data, {});
}

void conv2d_values_grad(const Conv2dGeometry& g, const Csr& weight, const Images& dy, const Images& x, float* grad) {
  Walk walk = forward_walk(g, x, dy);
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
  parallel(chunks, [&](int64_t begin, int64_t end) {
    std::memset(partial.get() + begin * size, 0, (end - begin) * size * sizeof(float));
  });
  const int64_t stride = walk.result_stride();
  Queue(chunks * walk.groups * splits).run([&](Queue::Worker& worker) {
    const int64_t source_floats = walk.direct ? 0 : block * walk.channel_stride;
    float* scratch = tile_scratch.get(source_floats);
    std::memset(scratch, 0, source_floats * sizeof(float));
    float* copy = nullptr;
    if (!writes_in_place(walk)) {
      const int64_t copied = ceil_div(walk.rows, splits) * stride;
      copy = result_scratch.get(copied);
      std::memset(copy, 0, copied * sizeof(float));
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
