#include "engine/paired_conv.h"

#include <algorithm>
#include <cstring>

#include "cpu/walk.h"

namespace sparsekit {
namespace {

// Chosen by measurement (benchmarks/peers.py).
constexpr int64_t kFewestTerms = 16;        // of a group
constexpr int64_t kFewestPairs = 16;        // of a row
constexpr int64_t kBandFloats = 96 * 1024;  // of the second-level cache
constexpr int64_t kTogether = 4;            // rows of results, of which pairs of two follow each other
constexpr int64_t kReadAhead = 6;           // rows of the source, which come from far away if they are the input's

// Whether all numbers are so small that no sum of a few, nor their products with others, is infinite.
bool all_tame(const float* x, int64_t count) {
  constexpr int32_t kHuge = (127 + 58) << 23;  // bits of 2^58
  int32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    most = std::max(most, bits & INT32_MAX);
  }
  return most < kHuge;
}

// to[part * step + row * to_row + i] = from[row * parts * lanes + parts * i + part] for `lanes` i; parts are even.
void deal(const float* from, int64_t rows, int64_t parts, int64_t lanes, float* to, int64_t to_row, int64_t step) {
  const Kernels& k = kernels();
  if (parts == 2) return k.split(to, to + step, to_row, from, 2 * lanes, rows, lanes, lanes, lanes);
  const int64_t half = parts / 2 * lanes;
  Scratch scratch;
  float* const halves[] = {scratch.get(rows * half), scratch.get(rows * half)};
  k.split(halves[0], halves[1], half, from, 2 * half, rows, half, half, half);
  for (int64_t odd = 0; odd < 2; ++odd) {
    float* const first = to + odd * step;
    if (parts % 4 == 0) {
      deal(halves[odd], rows, parts / 2, lanes, first, to_row, 2 * step);
    } else {
      for (int64_t p = 0; p < parts / 2; ++p)
        k.gather(first + 2 * p * step, to_row, halves[odd] + p, half, parts / 2, rows, lanes, lanes);
    }
  }
}

}  // namespace

std::vector<PairedConv2d::Group> PairedConv2d::groups_of(int64_t taps, int64_t stride) {
  std::vector<Group> groups;
  for (int64_t first = 0; first < std::min(stride, taps); ++first)
    for (int64_t tap = first; tap < taps;) {
      groups.push_back({tap, ceil_div(taps - tap, stride) < 3 ? 1 : 3});
      tap += groups.back().taps * stride;
    }
  return groups;
}

// Rows that are further from each other than one are not in groups.
std::vector<PairedConv2d::Group> PairedConv2d::groups_of_rows(const Conv2dGeometry& g) {
  return groups_of(g.kernel_h, g.dilation_h == 1 ? g.stride_h : g.kernel_h);
}

int64_t PairedConv2d::band_rows(const Conv2dGeometry& g) {
  return kRows / 2 + ((g.kernel_h - 1) * g.dilation_h + g.stride_h) / (2 * g.stride_h);
}

bool PairedConv2d::suits(const Conv2dGeometry& g) {
  if (g.groups != 1 || g.dilation_w != 1 || g.out_w < 2 * kFewestPairs || g.in_channels * g.kernel_h < kFewestTerms)
    return false;
  int64_t products = 0, vectors = 2 * g.stride_w;
  for (const Group& group : groups_of(g.kernel_w, g.stride_w)) products += group.taps + 1, vectors += 4;
  return 4 * products <= 3 * 2 * g.kernel_w &&
         vectors * g.in_channels * 2 * g.stride_h * band_rows(g) * ceil_div(g.out_w, 2) <= kBandFloats;
}

PairedConv2d::PairedConv2d(const Conv2dGeometry& g, const Csr& weight, const Epilogue& epilogue)
    : g_(g),
      bias_(g.out_channels),
      low_(epilogue.low),
      high_(epilogue.high),
      pairs_(ceil_div(g.out_w, 2)),
      sequence_(layout(round_up(pairs_ + column(g.kernel_w - 1 + g.stride_w).shift, kAlign))),
      sum_(layout(pairs_)) {
  if (epilogue.bias) std::copy_n(epilogue.bias, g.out_channels, bias_.begin());
  const int64_t columns = g.in_channels * g.kernel_h * g.kernel_w;
  std::vector<float> dense(g.out_channels * columns);
  for (int64_t r = 0; r < g.out_channels; ++r)
    for (int64_t j = weight.crow[r]; j < weight.crow[r + 1]; ++j)
      dense[r * columns + weight.col[j]] = weight.values[weight.permutation ? weight.permutation[j] : j];
  tame_ = all_tame(dense.data(), dense.size());
  for (const Group& group : groups_of(g.kernel_w, g.stride_w)) add_columns(group);
  for (const Group& group : groups_of_rows(g)) add_rows(saving_, group);
  for (int64_t i = 0; i < g.kernel_w; ++i) {
    std::vector<float> one(g.kernel_w);
    one[i] = 1;
    all_.own.push_back({{column(i), column(i + g.stride_w)}, {one, one}});
  }
  for (int64_t i = 0; i < g.kernel_h; ++i) add_rows(all_, {i, 1});
  pack(saving_, sum_, dense);
  pack(all_, sequence_, dense);
}

PairedConv2d::Layout PairedConv2d::layout(int64_t lanes) const {
  const int64_t residue = band_rows(g_) * lanes, channel = 2 * g_.stride_h * residue;
  return {lanes, residue, channel, round_up(g_.in_channels * channel, kAlign) + kAlign};
}

void PairedConv2d::add_columns(const Group& group) {
  auto d = [&](int64_t tap) { return column(group.first + tap * g_.stride_w); };
  auto sum = [&](Lanes a, Lanes b, float scale) {
    sums_.push_back({a, b, scale});
    return Lanes{int64_t(sums_.size()) - 1, 0};
  };
  // Factors of a row's taps, given those of the group's.
  auto of = [&](std::vector<float> taps) {
    std::vector<float> factors(g_.kernel_w);
    for (size_t tap = 0; tap < taps.size(); ++tap) factors[group.first + tap * g_.stride_w] = taps[tap];
    return factors;
  };
  if (group.taps == 3) {
    saving_.mixed.push_back({{sum(d(1), d(2), 1), sum(d(2), d(1), -1)}, {of({0.5, 0.5, 0.5}), of({0.5, -0.5, 0.5})}});
    saving_.own.push_back({{sum(d(0), d(2), -1), sum(d(3), d(1), -1)}, {of({1}), of({0, 0, 1})}});
  } else {
    saving_.own.push_back({{sum(d(0), d(0), 0), sum(d(1), d(1), 0)}, {of({1}), of({1})}});
  }
}

// The same for rows.
void PairedConv2d::add_rows(Weight& weight, const Group& group) const {
  auto add = [&](int64_t part, int64_t a, int64_t b, float scale, std::vector<float> taps) {
    auto row = [&](int64_t tap) { return group.first * g_.dilation_h + tap * g_.stride_h; };
    std::vector<float> factors(g_.kernel_h);
    for (size_t tap = 0; tap < taps.size(); ++tap) factors[group.first + tap * g_.stride_h] = taps[tap];
    weight.parts[part].push_back({row(a), row(b), scale, std::move(factors)});
  };
  if (group.taps == 3) {
    add(0, 1, 2, 1, {0.5, 0.5, 0.5});
    add(1, 2, 1, -1, {0.5, -0.5, 0.5});
    add(2, 0, 2, -1, {1});
    add(3, 3, 1, -1, {0, 0, 1});
  } else {
    add(2, 0, 0, 0, {1});
    add(3, 1, 1, 0, {1});
  }
}

void PairedConv2d::pack(Weight& weight, const Layout& layout, const std::vector<float>& dense) const {
  constexpr int64_t kPanel = PairedPanels::kRows;
  const int64_t taps = g_.kernel_h * g_.kernel_w;
  for (const auto& part : weight.parts)
    weight.terms += part.size() * g_.in_channels * (weight.mixed.size() + weight.own.size());
  weight.values.resize(2 * round_up(g_.out_channels, kPanel) * weight.terms);
  auto add = [&](const Rows& rows, int64_t c, const Lanes& lanes, const std::vector<float>& factors) {
    const int64_t at = weight.sources.size(), from = lanes.sequence * layout.all + c * layout.channel + lanes.shift;
    weight.sources.push_back(
        {uint32_t(from + row_at(layout, rows.a)), uint32_t(from + row_at(layout, rows.b)), rows.scale});
    for (int64_t r = 0; r < g_.out_channels; ++r) {
      const float* const kernel = dense.data() + (r * g_.in_channels + c) * taps;
      double value = 0;
      for (int64_t y = 0; y < g_.kernel_h; ++y)
        for (int64_t x = 0; x < g_.kernel_w; ++x)
          if (const double factor = double(rows.factors[y]) * factors[x]; factor != 0)
            value += factor * kernel[y * g_.kernel_w + x];
      weight.values[(r / kPanel * 2 * weight.terms + at) * kPanel + r % kPanel] = value;
    }
  };
  for (const auto& part : weight.parts)
    for (const auto* terms : {&weight.mixed, &weight.own})
      for (const Rows& rows : part)
        for (int64_t c = 0; c < g_.in_channels; ++c)
          for (const Term& term : *terms)
            for (int64_t i = 0; i < 2; ++i) add(rows, c, term.reads[i], term.factors[i]);
}

// Rows [first, first + rows) of an image; returns whether sums of them may be used.
bool PairedConv2d::fill(const Images& x, int64_t first, int64_t rows, float* sequences, float* sums) const {
  const int64_t columns = 2 * g_.stride_w, floats = columns * sequence_.lanes;
  const int64_t width = std::min(g_.in_w, floats - g_.pad_left);
  const Kernels& k = kernels();
  Scratch scratch;
  float* const padded = scratch.get(g_.in_channels * floats);
  std::fill_n(padded, g_.in_channels * floats, 0.0f);
  bool tame = tame_;
  for (int64_t row = 0; row < rows; ++row) {
    float* const to = sequences + row_at(sequence_, row);
    if (first + row < 0 || first + row >= g_.in_h) {
      for (int64_t i = 0; i < columns; ++i)
        k.clear(to + i * sequence_.all, sequence_.channel, g_.in_channels, sequence_.lanes);
      continue;
    }
    const float* const from = x.data + (first + row) * x.row;
    if (first + row + kReadAhead < g_.in_h) {
      // Channels that are neighbours are parts of the same rows.
      for (int64_t c = 0; c < (x.channel == 1 ? 1 : g_.in_channels); ++c)
        for (int64_t i = 0; i < g_.in_w * x.col; i += kAlign)
          __builtin_prefetch(from + kReadAhead * x.row + c * x.channel + i, 0, 2);
    }
    if (x.channel == 1) {
      k.transpose(padded + g_.pad_left, floats, from, x.col, width, g_.in_channels);
    } else {
      k.gather(padded + g_.pad_left, floats, from, x.channel, x.col, g_.in_channels, width, width);
    }
    tame = tame && all_tame(padded, g_.in_channels * floats);
    deal(padded, g_.in_channels, columns, sequence_.lanes, to, sequence_.channel, sequence_.all);
  }
  if (!tame) return false;
  for (const auto& [a, b, scale] : sums_) {
    k.sum(sums, sum_.lanes, sequences + a.sequence * sequence_.all + a.shift,
          sequences + b.sequence * sequence_.all + b.shift, sequence_.lanes, scale,
          g_.in_channels * 2 * g_.stride_h * band_rows(g_), pairs_);
    sums += sum_.all;
  }
  return true;
}

// Rows [row, row + rows) of an image; the lanes of two follow those of the two before.
void PairedConv2d::multiply(const Weight& weight, const float* tile, const Images& y, int64_t row, int64_t rows) const {
  PairedPanels panels{weight.sources.data(), weight.values.data(), {}, weight.terms, g_.out_channels};
  for (int i = 0; i < 4; ++i) {
    const int64_t count = weight.parts[i].size() * g_.in_channels;
    panels.parts[i] = {int64_t(count * weight.mixed.size()),
                       int64_t(count * (weight.mixed.size() + weight.own.size()))};
  }
  Results out{y.data + row * y.row, y.channel, bias_.data()};
  out.low = low_;
  out.high = high_;
  out.jump = y.row;
  Scratch scratch;
  kernels().paired(tile, panels, out, ceil_div(rows, 2) * pairs_, pairs_, rows, g_.out_w,
                   scratch.get(panels.scratch()));
}

void PairedConv2d::run(const Images& x, const Images& y, int64_t first, int64_t last) const {
  Scratch scratch;
  float* const sequences = scratch.get(2 * g_.stride_w * sequence_.all);
  float* const sums = scratch.get(sums_.size() * sum_.all);
  for (int64_t top = first * kRows; top < std::min(last * kRows, g_.out_h); top += kRows) {
    const int64_t rows = std::min(kRows, g_.out_h - top);
    const bool saves = fill(x, top * g_.stride_h - g_.pad_top,
                            (rows - 1) * g_.stride_h + (g_.kernel_h - 1) * g_.dilation_h + 1, sequences, sums);
    const int64_t step = saves ? kTogether : 2;
    for (int64_t row = 0; row < rows; row += step) {
      const float* const tile = saves ? sums + row / 2 * sum_.lanes : sequences + row / 2 * sequence_.lanes;
      multiply(saves ? saving_ : all_, tile, y, top + row, std::min(step, rows - row));
    }
  }
}

}  // namespace sparsekit
