#include "engine/tiled_conv.h"

#include <algorithm>
#include <atomic>
#include <cmath>

namespace sparsekit {
namespace {

// Chosen by measurement (benchmarks/peers.py).
constexpr int64_t kFewestPairs = 8;           // of channels, or else taps are the terms
constexpr int64_t kBandNumbers = 160 * 1024;  // of the second-level cache, for a band's source
constexpr int64_t kFewestLanes = 32;          // of a plane
constexpr int64_t kNarrowest = 5;             // so that TileLanes::kPieces are enough
constexpr int64_t kRows = TileWeight::kRows;
constexpr int64_t kNone = -1;  // no element of the weight

bool is_small(float x) { return std::abs(x) < std::ldexp(1.0f, kMostExponent); }  // and not NaN

int64_t floor_div(int64_t n, int64_t by) { return n < 0 ? -ceil_div(-n, by) : n / by; }

}  // namespace

TiledConv2d::Reach TiledConv2d::reach(int64_t tap, int64_t dilation, int64_t pad, int64_t stride) {
  const int64_t at = tap * dilation - pad, step = floor_div(at, stride);
  return {at - step * stride, step};
}

bool TiledConv2d::by_taps(const Conv2dGeometry& g) {
  return g.in_channels < 2 * kFewestPairs && g.dilation_h == 1 &&
         g.in_channels * g.kernel_w * g.kernel_h >= 2 * kFewestPairs;
}

bool TiledConv2d::suits(const Conv2dGeometry& g) {
  if (g.groups != 1 || g.out_channels < kTile || g.out_w < kNarrowest || g.out_h * g.out_w < kFewestLanes) return false;
  return by_taps(g) ? 4 * g.out_w >= 3 * round_up(g.out_w, kTile) : g.in_channels >= 2 * kFewestPairs;
}

TiledConv2d::TiledConv2d(const TileKernels& tiles, const Conv2dGeometry& g, const Csr& weight, const Epilogue& epilogue)
    : g_(g), tiles_(tiles), low_(epilogue.low), high_(epilogue.high), by_taps_(by_taps(g)), bias_(g.out_channels) {
  if (epilogue.bias) std::copy_n(epilogue.bias, g.out_channels, bias_.begin());
  by_taps_ ? choose_taps() : choose_channels();
  pack(weight);
  while (bands_ < g.out_h && kParts * layout(ceil_div(g.out_h, bands_)).part > kBandNumbers) ++bands_;
}

// Terms are the taps of a row of the kernel, two by two, and those left over of two channels, of all rows.
void TiledConv2d::choose_taps() {
  for (int64_t c = 0; c < g_.in_channels; ++c)
    for (int64_t kx = 0; kx + 1 < g_.kernel_w; kx += 2) row_terms_.push_back({{c, kx}, {c, kx + 1}});
  for (int64_t c = 0; c < g_.in_channels && g_.kernel_w % 2; c += 2)
    row_terms_.push_back({{c, g_.kernel_w - 1}, {c + 1, g_.kernel_w - 1}});
  pairs_ = row_terms_.size();
  pitch_ = round_up(g_.out_w, kTile);
  const int64_t count = g_.kernel_h * pairs_;
  depth_ = ceil_div(count, ceil_div(count, kTile));
  for (int64_t pair = 0; pair < round_up(count, depth_); ++pair) {
    if (pair % depth_ == 0) chunks_.push_back({0, 0, 0, pair});
    const auto& [a, b] = row_terms_[pair % pairs_];
    terms_.push_back({element(a.channel, pair / pairs_, a.kx), element(b.channel, pair / pairs_, b.kx)});
  }
}

// Terms are channels, two by two.
void TiledConv2d::choose_channels() {
  std::vector<Chunk> taps;  // by kernel_h and kernel_w
  int64_t widest = 0;
  for (int64_t ky = 0; ky < g_.kernel_h; ++ky)
    for (int64_t kx = 0; kx < g_.kernel_w; ++kx) {
      const Reach y = reach(ky, g_.dilation_h, g_.pad_top, g_.stride_h);
      const Reach x = reach(kx, g_.dilation_w, g_.pad_left, g_.stride_w);
      up_ = std::max(up_, -y.step), down_ = std::max(down_, y.step);
      left_ = std::max(left_, -x.step), right_ = std::max(right_, x.step);
      widest = std::max(widest, ceil_div(g_.in_w - x.residue, g_.stride_w));
      auto same = [&](const Phase& p) { return p.residue_h == y.residue && p.residue_w == x.residue; };
      const int64_t phase = std::find_if(phases_.begin(), phases_.end(), same) - phases_.begin();
      if (phase == int64_t(phases_.size())) phases_.push_back({y.residue, x.residue});
      taps.push_back({phase, y.step, x.step, 0});
    }
  // Zeros behind a row are those before the next, too.
  const int64_t farthest = g_.out_w + right_;
  pitch_ = std::max(std::min(widest, farthest) + left_, farthest);
  const int64_t twos = ceil_div(g_.in_channels, 2), chunks = ceil_div(twos, kTile);
  depth_ = ceil_div(twos, chunks);
  pairs_ = chunks * depth_;
  // All taps of some channels, one after another: they read the same lines.
  for (int64_t first = 0; first < pairs_; first += depth_)
    for (size_t tap = 0; tap < taps.size(); ++tap) {
      chunks_.push_back(taps[tap]);
      chunks_.back().pair = first;
      for (int64_t pair = first; pair < first + depth_; ++pair) {
        const int64_t ky = tap / g_.kernel_w, kx = tap % g_.kernel_w;
        terms_.push_back({element(2 * pair, ky, kx), element(2 * pair + 1, ky, kx)});
      }
    }
}

int64_t TiledConv2d::element(int64_t c, int64_t ky, int64_t kx) const {
  const bool exists = c < g_.in_channels && ky < g_.kernel_h && kx < g_.kernel_w;
  return exists ? (c * g_.kernel_h + ky) * g_.kernel_w + kx : kNone;
}

TiledConv2d::Layout TiledConv2d::layout(int64_t rows) const {
  Layout at{};
  if (by_taps_) {
    const int64_t source_rows = (rows - 1) * g_.stride_h + g_.kernel_h;
    at.pair = at.lanes = pitch_;
    at.row = pairs_ * at.pair;
    at.part = source_rows * at.row + (chunks_.size() * depth_ - g_.kernel_h * pairs_) * at.pair;
  } else {
    at.row = at.lanes = pitch_;
    at.pair = left_ + (up_ + rows + down_) * pitch_;
    at.phase = pairs_ * at.pair;
    at.first = left_ + up_ * pitch_;
    at.part = phases_.size() * at.phase + right_;
  }
  at.part = round_up(at.part + 2 * kTile, kTile);
  return at;
}

// Of a row's weight for the first of two terms, in values_; that for the second is kTile further.
int64_t TiledConv2d::place(int64_t row, int64_t pair) const {
  const int64_t chunks = chunks_.size(), chunk = row / kRows * chunks + pair / depth_;
  return (chunk * kRows + row % kRows) * 2 * kTile + pair % depth_;
}

void TiledConv2d::pack(const Csr& weight) {
  const int64_t rows = round_up(g_.out_channels, kRows), chunks = chunks_.size();
  values_.reset(new float[rows * chunks * 2 * kTile]);  // set below, every one of them
  std::vector<int64_t> places;                          // of the first row's
  for (size_t pair = 0; pair < terms_.size(); ++pair) places.push_back(place(0, pair));
  std::atomic<bool> has_parts = true;
  parallel(rows, [&](int64_t first, int64_t last) {
    std::vector<float> dense(columns());
    for (int64_t r = first; r < last; ++r) {
      for (int64_t c = 0; c < chunks; ++c) std::fill_n(values_.get() + place(r, c * depth_), 2 * kTile, 0.0f);
      if (r >= g_.out_channels) continue;
      std::fill(dense.begin(), dense.end(), 0.0f);
      for (int64_t j = weight.crow[r]; j < weight.crow[r + 1]; ++j)
        dense[weight.col[j]] = weight.values[weight.permutation ? weight.permutation[j] : j];
      if (!std::all_of(dense.begin(), dense.end(), is_small)) has_parts = false;
      for (size_t pair = 0; pair < terms_.size(); ++pair) {
        float* const to = values_.get() + place(r, 0) + places[pair];
        if (terms_[pair].a != kNone) to[0] = dense[terms_[pair].a];
        if (terms_[pair].b != kNone) to[kTile] = dense[terms_[pair].b];
      }
    }
  });
  has_parts_ = has_parts;
}

bool TiledConv2d::holds(const Csr& weight) const {
  if (weight.rows != g_.out_channels) return false;
  std::atomic<bool> fits = true;
  parallel(weight.rows, [&](int64_t first, int64_t last) {
    bool all = true;
    for (int64_t j = weight.crow[first]; j < weight.crow[last]; ++j) all &= weight.col[j] < columns();
    if (!all) fits = false;
  });
  return fits;
}

bool TiledConv2d::values(const Csr& weight, float* to) const {
  if (!holds(weight)) return false;
  std::vector<int64_t> places(columns());  // of the first row's
  for (size_t pair = 0; pair < terms_.size(); ++pair) {
    if (terms_[pair].a != kNone) places[terms_[pair].a] = place(0, pair);
    if (terms_[pair].b != kNone) places[terms_[pair].b] = place(0, pair) + kTile;
  }
  parallel(weight.rows, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const float* const row = values_.get() + place(r, 0);
      for (int64_t j = weight.crow[r]; j < weight.crow[r + 1]; ++j) to[j] = row[places[weight.col[j]]];
    }
  });
  return true;
}

// The band of rows [first, first + rows), by phases and channels. Whatever is read of it is written, in its order: what
// is split goes a bit too far.
bool TiledConv2d::split_channels(const Images& x, int64_t first, int64_t rows, const Layout& at, uint32_t* to) const {
  const SplitFrom zeros{nullptr, 0, 0};
  const int64_t source_rows = up_ + rows + down_, step_col = g_.stride_w * x.col;
  bool have_parts = true;
  Scratch scratch;
  float* gathered[2] = {};
  const int64_t width = round_up(pitch_, kAlign);
  if (step_col != 1)
    for (float*& plane : gathered) plane = scratch.get(source_rows * width);
  for (const Phase& phase : phases_) {
    const int64_t cols = std::min(ceil_div(g_.in_w - phase.residue_w, g_.stride_w), g_.out_w + right_);
    // Rows of the band that the image has.
    const int64_t have = ceil_div(g_.in_h - phase.residue_h, g_.stride_h), top = first - up_;
    const int64_t begin = std::clamp<int64_t>(-top, 0, source_rows);
    const int64_t end = std::clamp<int64_t>(have - top, begin, source_rows);
    const int64_t row = step_col == 1 ? g_.stride_h * x.row : width;
    for (int64_t pair = 0; pair < pairs_; ++pair, to += at.pair) {
      SplitFrom from[2] = {zeros, zeros};
      for (int64_t i = 0; i < 2 && 2 * pair + i < g_.in_channels; ++i) {
        const float* data = x.data + (2 * pair + i) * x.channel +
                            ((top + begin) * g_.stride_h + phase.residue_h) * x.row + phase.residue_w * x.col;
        if (step_col != 1 && begin < end && cols > 0) {
          kernels().gather(gathered[i], width, data, g_.stride_h * x.row, step_col, end - begin, cols, width);
          data = gathered[i];
        }
        from[i] = {data, 0, cols};
      }
      uint32_t* const plane = to + left_;
      if (left_) tiles_.split(zeros, zeros, 0, 1, left_, to, at.part);
      tiles_.split(zeros, zeros, 0, begin, pitch_, plane, at.part);
      have_parts &= tiles_.split(from[0], from[1], row, end - begin, pitch_, plane + begin * pitch_, at.part);
      tiles_.split(zeros, zeros, 0, source_rows - end, pitch_, plane + end * pitch_, at.part);
    }
  }
  tiles_.split(zeros, zeros, 0, 1, right_ + kTile, to, at.part);
  return have_parts;
}

// The same by rows, channels and twos of taps.
bool TiledConv2d::split_taps(const Images& x, int64_t first, int64_t rows, const Layout& at, uint32_t* to) const {
  const SplitFrom zeros{nullptr, 0, 0};
  const int64_t source_rows = (rows - 1) * g_.stride_h + g_.kernel_h;
  const int64_t stride = g_.stride_w, cols = ceil_div(g_.in_w, stride), room = round_up(cols, kAlign);
  const Kernels& k = kernels();
  bool have_parts = true;
  Scratch scratch;
  float* const plain = x.channel == 1 ? scratch.get(g_.in_channels * g_.in_w) : nullptr;  // a row with channels apart
  float* const residues = stride > 1 ? scratch.get(g_.in_channels * stride * room) : nullptr;
  for (int64_t r = 0; r < source_rows; ++r, to += at.row) {
    const int64_t y = first * g_.stride_h - g_.pad_top + r;
    // Rows that no tap reads may hold anything, and terms that do not exist read it.
    if (y < 0 || y >= g_.in_h || r % g_.stride_h >= g_.kernel_h) {
      tiles_.split(zeros, zeros, 0, pairs_, pitch_, to, at.part);
      continue;
    }
    Images row = x;
    row.data += y * x.row;
    if (plain) {
      k.transpose(plain, g_.in_w, row.data, x.col, g_.in_w, g_.in_channels);
      row = {plain, 0, g_.in_w, 0, 1};
    }
    if (stride == 2 && row.col == 1) {
      k.split(residues, residues + room, 2 * room, row.data, row.channel, g_.in_channels, cols, g_.in_w / 2, room);
    } else {
      for (int64_t i = 0; i < stride && stride > 1; ++i)
        k.gather(residues + i * room, stride * room, row.data + i * row.col, row.channel, stride * row.col,
                 g_.in_channels, ceil_div(g_.in_w - i, stride), room);
    }
    auto from = [&](const RowTerm& term) {
      if (term.channel >= g_.in_channels) return zeros;
      const Reach tap = reach(term.kx, g_.dilation_w, g_.pad_left, stride);
      const float* data =
          stride > 1 ? residues + (term.channel * stride + tap.residue) * room : row.data + term.channel * row.channel;
      return SplitFrom{data, -tap.step, ceil_div(g_.in_w - tap.residue, stride)};
    };
    for (int64_t pair = 0; pair < pairs_; ++pair)
      have_parts &= tiles_.split(from(row_terms_[pair].first), from(row_terms_[pair].second), 0, 1, pitch_,
                                 to + pair * at.pair, at.part);
  }
  tiles_.split(zeros, zeros, 0, 1, at.part - source_rows * at.row, to, at.part);
  return have_parts;
}

void TiledConv2d::run(const Images& x, const Images* start, const Images& y, int64_t first, int64_t last) const {
  if (has_parts_ && run_in_tiles(x, start, y, first, last, false)) return;
  // Which rows are computed in which way must not depend on the band.
  for (int64_t row = first, end; row < last; row = end) {
    const bool exactly = !has_parts_ || !has_parts(x, row);
    for (end = row + 1; end < last && exactly == (!has_parts_ || !has_parts(x, end));) ++end;
    exactly ? run_exactly(x, start, y, row, end) : (void)run_in_tiles(x, start, y, row, end, true);
  }
}

// Whether all numbers that a row of results reads, and perhaps some beside them, are sums of parts.
bool TiledConv2d::has_parts(const Images& x, int64_t row) const {
  for (int64_t ky = 0; ky < g_.kernel_h; ++ky) {
    const int64_t in_y = row * g_.stride_h + ky * g_.dilation_h - g_.pad_top;
    if (in_y < 0 || in_y >= g_.in_h) continue;
    for (int64_t c = 0; c < g_.in_channels; ++c)
      for (int64_t i = 0; i < g_.in_w; ++i)
        if (!is_small(x.data[c * x.channel + in_y * x.row + i * x.col])) return false;
  }
  return true;
}

// Returns whether it has done so: if not always, only where all numbers have parts.
bool TiledConv2d::run_in_tiles(const Images& x, const Images* start, const Images& y, int64_t first, int64_t last,
                               bool always) const {
  const int64_t rows = last - first;
  const Layout at = layout(rows);
  Scratch scratch;
  uint32_t* const source = reinterpret_cast<uint32_t*>(scratch.get(kParts * at.part + kTile));
  const bool have_parts =
      by_taps_ ? split_taps(x, first, rows, at, source) : split_channels(x, first, rows, at, source);
  if (!have_parts && !always) return false;
  std::vector<TileLanes> lanes;
  lanes.reserve(ceil_div(rows * pitch_, kTile));
  if (by_taps_) {
    // Two by two rows: they read mostly the same.
    for (int64_t top = 0; top < rows; top += 2)
      for (int64_t i = 0; i < g_.out_w; i += kTile)
        for (int64_t r = top; r < std::min(top + 2, rows); ++r) {
          const int64_t n = std::min(kTile, g_.out_w - i);
          lanes.push_back(
              {r * g_.stride_h * at.row + i, {{r * y.row + i, start ? r * start->row + i : 0, (1u << n) - 1}}});
        }
  } else {
    int64_t r = 0, c = 0;
    for (int64_t lane = 0; lane < (rows - 1) * pitch_ + g_.out_w; lane += kTile) {
      lanes.push_back({at.first + lane, {}});
      TileLanes::Piece* piece = lanes.back().pieces;
      for (int64_t i = 0; i < kTile; ++i, ++c) {
        if (c == pitch_) c = 0, ++r;
        if (r >= rows || c >= g_.out_w) continue;
        const int64_t to = r * y.row + c - i, from = start ? r * start->row + c - i : 0;
        if (piece->lanes && (piece->to != to || piece->from != from)) ++piece;
        *piece = {to, from, piece->lanes | 1u << i};
      }
    }
  }
  std::vector<int64_t> offsets;
  for (const Chunk& c : chunks_) offsets.push_back(c.phase * at.phase + c.row * at.row + c.column + c.pair * at.pair);
  const TileWeight weight{values_.get(), offsets.data(), int64_t(chunks_.size()), depth_, g_.out_channels};
  Results results{y.data + first * y.row, y.channel, bias_.data()};
  if (start) results.start = start->data + first * start->row, results.start_stride = start->channel;
  results.low = low_;
  results.high = high_;
  tiles_.multiply(weight, {source, at.part, at.pair}, lanes.data(), lanes.size(), results,
                  scratch.get(weight.scratch()));
  return true;
}

void TiledConv2d::run_exactly(const Images& x, const Images* start, const Images& y, int64_t first,
                              int64_t last) const {
  const int64_t taps = g_.kernel_h * g_.kernel_w;
  std::vector<float> sums(g_.out_w);
  auto add = [&](int64_t row, int64_t element, float value) {
    if (element == kNone || value == 0) return;  // what is pruned hides what is infinite
    const int64_t c = element / taps, ky = element % taps / g_.kernel_w, kx = element % g_.kernel_w;
    const int64_t in_y = row * g_.stride_h + ky * g_.dilation_h - g_.pad_top;
    if (in_y < 0 || in_y >= g_.in_h) return;
    for (int64_t i = 0; i < g_.out_w; ++i)
      if (const int64_t in_x = i * g_.stride_w + kx * g_.dilation_w - g_.pad_left; in_x >= 0 && in_x < g_.in_w)
        sums[i] += value * x.data[c * x.channel + in_y * x.row + in_x * x.col];
  };
  for (int64_t r = 0; r < g_.out_channels; ++r)
    for (int64_t row = first; row < last; ++row) {
      std::fill(sums.begin(), sums.end(), bias_[r]);
      for (size_t pair = 0; pair < terms_.size(); ++pair) {
        const float* const value = values_.get() + place(r, pair);
        add(row, terms_[pair].a, value[0]);
        add(row, terms_[pair].b, value[kTile]);
      }
      for (int64_t i = 0; i < g_.out_w; ++i) {
        float sum = sums[i];
        if (start) sum += start->data[r * start->channel + row * start->row + i];
        // NaN stays NaN.
        if (sum < low_) sum = low_;
        if (sum > high_) sum = high_;
        y.data[r * y.channel + row * y.row + i] = sum;
      }
    }
}

}  // namespace sparsekit
