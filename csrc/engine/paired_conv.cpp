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
constexpr int64_t kTogether = 2;            // rows of results whose lanes follow each other

// Whether all numbers are so small that no sum of a few, nor their products with others, is infinite.
bool all_tame(const float* x, int64_t count) {
  constexpr int32_t kHuge = (127 + 60) << 23;  // bits of 2^60
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

std::vector<PairedConv2d::Group> PairedConv2d::groups_of(const Conv2dGeometry& g) {
  std::vector<Group> groups;
  for (int64_t first = 0; first < std::min(g.stride_w, g.kernel_w); ++first)
    for (int64_t column = first; column < g.kernel_w;) {
      const int64_t taps = ceil_div(g.kernel_w - column, g.stride_w) < 3 ? 1 : 3;
      groups.push_back({column, taps});
      column += taps * g.stride_w;
    }
  return groups;
}

int64_t PairedConv2d::band_rows(const Conv2dGeometry& g) {
  return kRows + (g.kernel_h - 1) * g.dilation_h / g.stride_h;
}

bool PairedConv2d::suits(const Conv2dGeometry& g) {
  if (g.groups != 1 || g.dilation_w != 1 || g.out_w < 2 * kFewestPairs || g.in_channels * g.kernel_h < kFewestTerms)
    return false;
  int64_t products = 0, vectors = 2 * g.stride_w;
  for (const Group& group : groups_of(g)) products += group.taps + 1, vectors += 4;
  return 4 * products <= 3 * 2 * g.kernel_w &&
         vectors * g.in_channels * g.stride_h * band_rows(g) * ceil_div(g.out_w, 2) <= kBandFloats;
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
  for (const Group& group : groups_of(g)) add(group);
  for (int64_t i = 0; i < g.kernel_w; ++i) {
    std::vector<float> one(g.kernel_w);
    one[i] = 1;
    all_.own.push_back({{column(i), column(i + g.stride_w)}, {one, one}});
  }
  pack(saving_, sum_, dense);
  pack(all_, sequence_, dense);
}

PairedConv2d::Layout PairedConv2d::layout(int64_t lanes) const {
  const int64_t residue = band_rows(g_) * lanes, channel = g_.stride_h * residue;
  return {lanes, residue, channel, round_up(g_.in_channels * channel, kAlign) + kAlign};
}

void PairedConv2d::add(const Group& group) {
  auto d = [&](int64_t tap) { return column(group.column + tap * g_.stride_w); };
  auto sum = [&](Lanes a, Lanes b, float scale) {
    sums_.push_back({a, b, scale});
    return Lanes{int64_t(sums_.size()) - 1, 0};
  };
  // Factors of a row's taps, given those of the group's.
  auto of = [&](std::vector<float> taps) {
    std::vector<float> factors(g_.kernel_w);
    for (size_t tap = 0; tap < taps.size(); ++tap) factors[group.column + tap * g_.stride_w] = taps[tap];
    return factors;
  };
  if (group.taps == 3) {
    saving_.mixed.push_back({{sum(d(1), d(2), 1), sum(d(2), d(1), -1)}, {of({0.5, 0.5, 0.5}), of({0.5, -0.5, 0.5})}});
    saving_.own.push_back({{sum(d(0), d(2), -1), sum(d(3), d(1), -1)}, {of({1}), of({0, 0, 1})}});
  } else {
    saving_.own.push_back({{sum(d(0), d(0), 0), sum(d(1), d(1), 0)}, {of({1}), of({1})}});
  }
}

void PairedConv2d::pack(Weight& weight, const Layout& layout, const std::vector<float>& dense) const {
  constexpr int64_t kPanel = PairedPanels::kRows;
  const int64_t rows = g_.in_channels * g_.kernel_h;
  weight.terms = rows * (weight.mixed.size() + weight.own.size());
  weight.values.resize(2 * round_up(g_.out_channels, kPanel) * weight.terms);
  auto add_terms = [&](const std::vector<Term>& terms) {
    for (int64_t row = 0; row < rows; ++row)
      for (const Term& term : terms)
        for (int64_t i = 0; i < 2; ++i) {
          const auto [from, shift] = term.reads[i];
          const int64_t at = weight.offsets.size(), y = row % g_.kernel_h * g_.dilation_h;
          weight.offsets.push_back(from * layout.all + row / g_.kernel_h * layout.channel +
                                   y % g_.stride_h * layout.row + y / g_.stride_h * layout.lanes + shift);
          for (int64_t r = 0; r < g_.out_channels; ++r) {
            const float* const taps = dense.data() + (r * rows + row) * g_.kernel_w;
            double value = 0;
            for (int64_t x = 0; x < g_.kernel_w; ++x)
              if (term.factors[i][x] != 0) value += double(term.factors[i][x]) * taps[x];
            weight.values[(r / kPanel * 2 * weight.terms + at) * kPanel + r % kPanel] = value;
          }
        }
  };
  add_terms(weight.mixed);
  add_terms(weight.own);
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
    float* const to = sequences + row % g_.stride_h * sequence_.row + row / g_.stride_h * sequence_.lanes;
    if (first + row < 0 || first + row >= g_.in_h) {
      for (int64_t i = 0; i < columns; ++i)
        k.clear(to + i * sequence_.all, sequence_.channel, g_.in_channels, sequence_.lanes);
      continue;
    }
    const float* const from = x.data + (first + row) * x.row;
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
          g_.in_channels * g_.stride_h * band_rows(g_), pairs_);
    sums += sum_.all;
  }
  return true;
}

// Rows [row, row + rows) of an image, whose lanes follow each other.
void PairedConv2d::multiply(const Weight& weight, const float* tile, const Images& y, int64_t row, int64_t rows) const {
  const int64_t mixed = weight.mixed.size() * g_.in_channels * g_.kernel_h;
  const PairedPanels panels{weight.offsets.data(), weight.values.data(), mixed, weight.terms, g_.out_channels};
  Results out{y.data + row * y.row, y.channel, bias_.data()};
  out.low = low_;
  out.high = high_;
  out.jump = y.row;
  Scratch scratch;
  kernels().paired(tile, panels, out, rows * pairs_, pairs_, g_.out_w, scratch.get(panels.scratch()));
}

void PairedConv2d::run(const Images& x, const Images& y, int64_t first, int64_t last) const {
  Scratch scratch;
  float* const sequences = scratch.get(2 * g_.stride_w * sequence_.all);
  float* const sums = scratch.get(sums_.size() * sum_.all);
  for (int64_t top = first * kRows; top < std::min(last * kRows, g_.out_h); top += kRows) {
    const int64_t rows = std::min(kRows, g_.out_h - top);
    const bool saves = fill(x, top * g_.stride_h - g_.pad_top,
                            (rows - 1) * g_.stride_h + (g_.kernel_h - 1) * g_.dilation_h + 1, sequences, sums);
    const int64_t step = saves ? kTogether : 1;
    for (int64_t row = 0; row < rows; row += step) {
      if (saves) {
        multiply(saving_, sums + row * sum_.lanes, y, top + row, std::min(step, rows - row));
      } else {
        multiply(all_, sequences + row * sequence_.lanes, y, top + row, 1);
      }
    }
  }
}

}  // namespace sparsekit
