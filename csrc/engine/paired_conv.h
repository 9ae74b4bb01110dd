// A dense convolution with fewer products: Winograd's F(2 x 2, 3 x 3) (Lavin and Gray, arXiv 1509.09308, section 4).
//
// Two neighbours y0 and y1 and three taps g0 .. g2 read d0 .. d3, and four products are enough, not six:
//
//   y0 = m0 + m1 + m2     m0 = g0 (d0 - d2)                 m1 = (g0 + g1 + g2) / 2 (d1 + d2)
//   y1 = m3 + m1 - m2     m3 = g2 (d3 - d1)                 m2 = (g0 - g1 + g2) / 2 (d2 - d1)
//
// Kernels of more taps are several of these groups, and with a stride there are some for every residue of it; a tap
// that is left over takes two products, m0 = g0 d0 and m3 = g0 d1. So it is along rows, and of these along columns:
// results are computed two by two. All of it is summed over channels.
//
// Differences are not for inputs that are infinite, NaN or huge: near those, every tap takes a product for each result.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/conv2d.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace sparsekit {

class PairedConv2d {
 public:
  // Whether that pays: enough products are saved, sums of them are long enough, and the second-level cache holds what
  // they read.
  static bool suits(const Conv2dGeometry& g);

  // Copies the weight and the bias.
  PairedConv2d(const Conv2dGeometry& g, const Csr& weight, const Epilogue& epilogue);

  static constexpr int64_t kRows = 8;  // of results whose inputs are made ready at once
  int64_t items() const { return ceil_div(g_.out_h, kRows); }

  // Rows [kRows * first, kRows * last) of an image.
  void run(const Images& x, const Images& y, int64_t first, int64_t last) const;

 private:
  // Three taps or one, from one column or row of the kernel on; the next is a stride further.
  struct Group {
    int64_t first, taps;
  };
  // Every other of the pixels that a tap reads: every 2 * stride_w columns of a padded row, from a column on.
  struct Lanes {
    int64_t sequence, shift;
  };
  // What products read: lanes a + scale * b.
  struct Sum {
    Lanes a, b;
    float scale;
  };
  // Two products of a row: what they read, and how the taps of a row of the kernel make their weights.
  struct Term {
    Lanes reads[2];
    std::vector<float> factors[2];
  };
  // What a part of PairedPanels reads: row a + scale * row b, below the first that the upper result reads, and how rows
  // of the kernel make its weights.
  struct Rows {
    int64_t a, b;
    float scale;
    std::vector<float> factors;
  };
  // As of PairedPanels.
  struct Weight {
    std::vector<Term> mixed, own;
    std::vector<Rows> parts[4];
    std::vector<PairedPanels::Source> sources;
    std::vector<float> values;
    int64_t terms = 0;
  };
  // The padded rows of a band, as [sequence or sum][channel][row % (2 * stride_h)][row / (2 * stride_h)][lanes].
  struct Layout {
    int64_t lanes, row, channel, all;  // floats
  };

  static std::vector<Group> groups_of(int64_t taps, int64_t stride);
  static std::vector<Group> groups_of_rows(const Conv2dGeometry& g);
  static int64_t band_rows(const Conv2dGeometry& g);  // of each residue
  Layout layout(int64_t lanes) const;
  Lanes column(int64_t i) const { return {i % (2 * g_.stride_w), i / (2 * g_.stride_w)}; }
  int64_t row_at(const Layout& layout, int64_t row) const {
    return row % (2 * g_.stride_h) * layout.row + row / (2 * g_.stride_h) * layout.lanes;
  }
  void add_columns(const Group& group);
  void add_rows(Weight& weight, const Group& group) const;
  void pack(Weight& weight, const Layout& layout, const std::vector<float>& dense) const;
  bool fill(const Images& x, int64_t first, int64_t rows, float* sequences, float* sums) const;
  void multiply(const Weight& weight, const float* tile, const Images& y, int64_t row, int64_t rows) const;

  const Conv2dGeometry g_;
  std::vector<float> bias_;
  const float low_, high_;
  const int64_t pairs_;  // of a row of results
  Layout sequence_, sum_;
  bool tame_;  // the weight
  std::vector<Sum> sums_;
  Weight saving_, all_;  // of sums, and of sequences
};

}  // namespace sparsekit
