// Products of float32 matrices on units for bfloat16 (AMX), without losing what float32 has.
//
// A float32 is the sum of three bfloat16: it rounded, what is left rounded, and what is left then, with nothing left;
// the units take denormals for zeros, so that of numbers below 2^-110 a part may be lost. Of the nine products of two
// such sums six are computed; the others are below a thousandth of float32's last bit. What is infinite or NaN has no
// such parts, and where products overflow, so may those of parts, to both sides: whoever splits numbers learns whether
// all are small enough.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace sparsekit {

constexpr int64_t kTile = 16;      // rows of a tile, and columns of 32 bits
constexpr int64_t kParts = 3;      // of a number
constexpr int kMostExponent = 64;  // numbers have parts if they are less than two to this

// Terms of the sum go two by two, a and b: what is split of them lies together, as two bfloat16 in 32 bits.
struct TileWeight {
  static constexpr int64_t kRows = 2 * kTile;  // that are in hand at once

  const float* values;     // [sets of kRows][chunks][kRows][a, b][kTile], with zeros in the place of what is not there
  const int64_t* offsets;  // [chunks], of a chunk's first pair of terms in the source, in numbers of 32 bits
  int64_t chunks, depth;   // pairs of a chunk, at most kTile
  int64_t rows;

  int64_t sets() const { return (rows + kRows - 1) / kRows; }
  int64_t scratch() const { return chunks * kParts * kRows * kTile; }  // floats
};

// What is split: parts one after another, each with pairs of terms one after another.
struct TileSource {
  const uint32_t* data;
  int64_t part, pair;  // numbers of 32 bits from one to the next
};

// Lanes of the source that make a column of tiles, and where their results go: lane i of those whose bits are set to
// data + `to` + i, with `from` in place of `to` for what sums start from. Pieces without lanes come last.
struct TileLanes {
  static constexpr int kPieces = 4;
  struct Piece {
    int64_t to, from;
    uint32_t lanes;
  };
  int64_t source;
  Piece pieces[kPieces];
};

// Numbers in memory: lane i is data[i - first] for `count` of them, 0 elsewhere. Null: zeros.
struct SplitFrom {
  const float* data;
  int64_t first, count;
};

struct TileKernels {
  // Splits `rows` rows of `lanes` pairs each, `row` numbers from one to the next in a and b, without a gap between them
  // in `to`; may write up to kTile pairs behind. Returns whether all have their parts.
  bool (*split)(const SplitFrom& a, const SplitFrom& b, int64_t row, int64_t rows, int64_t lanes, uint32_t* to,
                int64_t part);

  // results = clamp(bias + start + weight * source), for `count` times kTile lanes. Uses data, stride, bias, start,
  // start_stride, low and high of the results.
  void (*multiply)(const TileWeight& weight, const TileSource& source, const TileLanes* lanes, int64_t count,
                   const Results& results, float* scratch);
};

namespace amx {
extern const TileKernels kernels;
}

}  // namespace sparsekit
