// A convolution as products of tiles (cpu/tiles.h), as if none of its weights were zero.
//
// Its source is split once for every band of rows, as [part][phase][pair of terms][lanes], or, where there are so few
// channels that their taps are the terms, as [part][row][pair of terms][lanes]: from there every tap is an offset.
// Inputs that are huge or not finite have no parts: a plain loop computes the rows of results that read them.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/conv2d.h"
#include "cpu/parallel.h"
#include "cpu/tiles.h"

namespace sparsekit {

class TiledConv2d {
 public:
  // Whether tiles would be full enough.
  static bool suits(const Conv2dGeometry& g);

  // Copies the weight and the bias.
  TiledConv2d(const TileKernels& tiles, const Conv2dGeometry& g, const Csr& weight, const Epilogue& epilogue);

  int64_t bands() const { return bands_; }  // that the second-level cache holds

  // Rows [first, last) of an image. start: what is added, or null; its size is y's.
  void run(const Images& x, const Images* start, const Images& y, int64_t first, int64_t last) const;

  // Whether it has the values that it was made of, given the rest of the weight.
  bool holds(const Csr& weight) const;
  // They; false if it does not hold them.
  bool values(const Csr& weight, float* to) const;

 private:
  // The pixels of the input whose rows and columns leave these when divided by the stride.
  struct Phase {
    int64_t residue_h, residue_w;
  };
  // Two terms of the sum, as elements of the weight's row; kNone for one that does not exist.
  struct Pair {
    int64_t a, b;
  };
  // The same of a row of the kernel, where taps are the terms.
  struct RowTerm {
    int64_t channel, kx;
  };
  // Where a tap reads, along rows or columns: so many steps of the stride from where the lane is, in a phase.
  struct Reach {
    int64_t residue, step;
  };
  // How a band of rows of results is split; in numbers of 32 bits.
  struct Layout {
    int64_t lanes, pair, row, phase, part, first;
  };

  // Pairs of terms whose weights are in hand at once: where the first is in the source, seen from a lane.
  struct Chunk {
    int64_t phase, row, column, pair;
  };

  static bool by_taps(const Conv2dGeometry& g);
  static Reach reach(int64_t tap, int64_t dilation, int64_t pad, int64_t stride);
  int64_t columns() const { return g_.in_channels * g_.kernel_h * g_.kernel_w; }
  int64_t element(int64_t c, int64_t ky, int64_t kx) const;
  void choose_taps();
  void choose_channels();
  int64_t place(int64_t row, int64_t pair) const;
  void pack(const Csr& weight);
  Layout layout(int64_t rows) const;
  bool split_channels(const Images& x, int64_t first, int64_t rows, const Layout& at, uint32_t* to) const;
  bool split_taps(const Images& x, int64_t first, int64_t rows, const Layout& at, uint32_t* to) const;
  bool has_parts(const Images& x, int64_t row) const;
  bool run_in_tiles(const Images& x, const Images* start, const Images& y, int64_t first, int64_t last,
                    bool always) const;
  void run_exactly(const Images& x, const Images* start, const Images& y, int64_t first, int64_t last) const;

  const Conv2dGeometry g_;
  const TileKernels& tiles_;
  const float low_, high_;
  const bool by_taps_;
  std::vector<float> bias_;
  std::unique_ptr<float[]> values_;  // as of TileWeight
  bool has_parts_ = true;            // the weight
  std::vector<Phase> phases_;
  std::vector<std::pair<RowTerm, RowTerm>> row_terms_;
  std::vector<Chunk> chunks_;
  std::vector<Pair> terms_;                           // [chunks][depth]
  int64_t depth_ = 0, pairs_ = 0;                     // of a chunk; of a phase, or of a row
  int64_t pitch_ = 0;                                 // lanes from a row to the next
  int64_t up_ = 0, down_ = 0, left_ = 0, right_ = 0;  // how far taps reach, in rows and columns of a phase
  int64_t bands_ = 1;
};

}  // namespace sparsekit
