// The microkernels that exist once per ISA, behind one table of pointers.
//
// They work on a packed tile: every channel of a block of input channels occupies `channel stride` floats, in which the
// tile's output pixels are contiguous lanes. A kept weight is an offset into the tile and a value: its products are
// value * tile[offset + lane]. Slot s owns the non-zeros [begin[s], begin[s + 1]) of output channel order[s]; slots are
// sorted by length, so that the loops over non-zeros end where the branch predictor expects.
#pragma once

#include <cstdint>

#include "ops.h"

namespace sparsekit {

struct Rows {
  static constexpr int64_t kAhead = 8;  // slots

  const int32_t* begin;     // [count + 1]
  const int32_t* order;     // [count + kAhead], row of every slot; those behind the last are prefetched only
  const uint32_t* offsets;  // [nnz], in floats, into the tile
  const float* values;      // [nnz]
  int64_t count;
  // Every slot begins with so many pairs of non-zeros that belong one lane to the left and to the right of their
  // offsets, or both to the left; for spmm with Kernels::shifts_sums, over rows of lanes that are whole registers and
  // end with a zero.
  int64_t pairs = 0;
  bool lefts = false;
  bool far = false;  // offsets and values come from memory so far away that they are prefetched
};

// A weight of which all is kept, or as good as all: panels of kRows rows of results, and for each [terms][kRows]
// values. Term k of every row is an offset into the tile; rows that fill up the last panel have values of zero.
struct Panels {
  static constexpr int64_t kRows = 6;

  const uint32_t* offsets;  // [terms], in floats
  const float* values;
  int64_t terms, rows;  // rows without those that fill up
};

// A weight for two by two neighbouring results at once (PairedConv2d), in parts, one after another: what is added to
// both rows, what is added to the first and subtracted from the second, what the first gets besides, and what the
// second does. A part has terms of two products p and q each: the first result of a row is the sum of p + q over
// `mixed` terms, and of p over those behind; the second that of p - q, and of q. Panels of kRows rows of the weight,
// and for each [terms][p, q][kRows] values; rows that fill up the last panel have values of zero.
struct PairedPanels {
  static constexpr int64_t kRows = 6;

  // Lanes a + scale * b of the tile, or a where the scale is 0; in floats.
  struct Source {
    uint32_t a, b;
    float scale;
  };
  struct Part {
    int64_t mixed, terms;
  };

  const Source* sources;  // [terms][p, q], of all parts
  const float* values;
  Part parts[4];
  int64_t terms, rows;  // rows without those that fill up

  int64_t scratch() const { return 2 * terms * 2 * 16; }  // two registers, of the widest, of what p and q read
};

// Source memory that will be wanted soon: runs of `floats`, `rows` of them in each of `channels` channels. The
// microkernels prefetch it on the way: a core that waits for memory does nothing else.
struct Soon {
  const float* data;  // null: nothing
  int64_t channel, channels, row, rows, floats;
};

// A block of channels as the microkernels read it: a packed copy, or the source itself. Its lanes, and those of
// results, are neighbours, or for spmm in runs: `run` of them, a multiple of 16, and the next run `jump` floats on from
// the last. whole: spmm is to hold all of them at once, if they are Kernels::whole_lanes and results stay neighbours.
struct Tile {
  const float* lanes;
  Soon soon;
  int64_t run = INT64_MAX, jump = 0;
  bool whole = false;
};

// Lanes of a register that go to a place of their own: lane i of those whose bits are set to `at` + i, in floats.
// zeros: lanes in whose places zeros are written, for Results::splits.
struct Move {
  int32_t at = 0;
  uint32_t lanes = 0, zeros = 0;
};

// Where even and odd lanes of two registers go, from data + row * stride on: a register of each, without gaps.
struct Halves {
  int32_t even, odd;
};

// Where results of spmm go, and what is done to them on the way. Null pointers stand for zeros.
struct Results {
  float* data;
  int64_t stride;      // floats from one row to the next
  const float* bias;   // [rows]
  const float* start;  // what the sums start from, besides the bias; may be `data` itself
  int64_t start_stride;
  const int32_t* mask;  // [lanes], 0 where a zero is written instead, else -1; null: nowhere
  bool stream;          // write past the caches; wants rows aligned to 64 bytes; not with runs
  float low, high;      // bounds that results are clamped to; infinite where there are none
  int64_t jump = 0;     // of data and start
  // A bit for every float of a row of `start`, for spmm: where it is 0, so is what the sum starts from; and bytes from
  // one row to the next. Null: all of it counts.
  const uint8_t* counts = nullptr;
  int64_t counts_stride = 0;
  // Where the lanes of a row go, seen from data + row * stride: kMoves for every register, those without lanes last.
  // Lanes in none of them are not written. For Kernels::moves_lanes; not with mask, stream or counts. Null: to their
  // own places. splits: those are the places of every two registers' even lanes and of their odd ones; the last
  // register may be alone, as if one of zeros followed; for spmm, not with runs.
  static constexpr int kMoves = 3;
  const Move* moves = nullptr;
  bool splits = false;
  // For every two registers of a run, of which the last may be alone, as if one of zeros followed; for spmm. Not with
  // stream, counts and moves; `start` may still be `data`. Null: lanes stay neighbours.
  const Halves* halves = nullptr;
};

enum class Activation : int64_t { none, sigmoid, silu, hardsigmoid, hardswish };

// activation(clamp(scale * x + shift + other)), elementwise.
struct Pointwise {
  float scale, shift;
  const float* other;   // null: zeros
  const int32_t* mask;  // as of Results
  float low, high;
  Activation activation;
};

// Two running sums, spread over lanes.
struct SpreadSums {
  alignas(64) float a[16] = {}, b[16] = {};
};

// A channel of BatchNorm's gradient. g is dy, with relu only where the result was positive, else 0: the bits of
// `positive` say where, or, if there are none, x * scale + shift.
struct NormGrad {
  float mean, scale, shift;
  bool relu;
  float of_x = 0, constant = 0;  // dx = scale * g + of_x * (x - mean) + constant
};

// Images, at most, of which dots has all sums in registers.
constexpr int64_t kDotImages = 4;

// Channels that pooling of rows has in hand at once.
constexpr int64_t kPoolChannels = 4;

// Taps of a kernel of max pooling, at most; also the tap of a window that has no pixel.
constexpr int kMostTaps = 255;

// How max_pool_plane and its gradient split the rows of a plane by their columns' residues of the stride.
struct PoolSplit {
  int64_t row, margin;  // floats of a part, and of them those before the first column
  int64_t floats;       // in all
};

struct TileKernels;

struct Kernels {
  const char* name;
  int64_t lanes;        // of a register
  bool shifts_sums;     // whether spmm takes Rows::pairs: shifting registers by a lane is cheap
  bool moves_lanes;     // whether spmm and gemm take Results::moves
  int64_t strip_lanes;  // that spmm holds in few registers, so that many channels of them fit the first-level cache
  int64_t whole_lanes;  // that it can hold for Tile::whole; 0: it has no use for that

  // As how many sums, side by side, spmm computes the results of a lane, of so many in all: that decides on their bits.
  int64_t (*sums)(int64_t lanes, int64_t lane);

  // results[r][lane] = clamp(bias[r] + start[r][lane] + sum of value * tile[offset + lane]), over `lanes` lanes. NaN
  // stays NaN. Touches no lane of results and start beyond `lanes`; may read the tile up to the next multiple of 16.
  void (*spmm)(const Tile& tile, const Rows& rows, const Results& results, int64_t lanes);

  // The same for a dense weight. Does not stream.
  void (*gemm)(const Tile& tile, const Panels& panels, const Results& results, int64_t lanes);

  // to[r * to_row + lane] += sum over k of weight[r * weight_row + k] * x[k * x_row + lane], over `lanes` lanes, a
  // multiple of 16.
  void (*add_products)(const float* weight, int64_t weight_row, int64_t rows, const float* x, int64_t x_row,
                       int64_t terms, float* to, int64_t to_row, int64_t lanes);

  // to[i * to_row + r] += sum over k of weight[r * weight_row + k] * x[i * x_row + k], for 1 to kDotImages images i.
  void (*dots)(const float* weight, int64_t weight_row, int64_t rows, const float* x, int64_t x_row, int64_t images,
               int64_t terms, float* to, int64_t to_row);

  // Of runs of `run` lanes, one behind the other, each gives two rows of results, results.jump floats from one to the
  // next: of row r of the weight, results 2 * lane and 2 * lane + 1 of both are clamp(bias[r] + the lane's four
  // results), for the first `height` rows and `width` results of a row. Wants a bias, has no start and no mask, does
  // not stream. scratch: PairedPanels::scratch() floats.
  void (*paired)(const float* tile, const PairedPanels& panels, const Results& results, int64_t lanes, int64_t run,
                 int64_t height, int64_t width, float* scratch);

  // grad[j] += sum over lanes of dy[r][lane] * tile[offset_j + lane]. Reads no lane of dy beyond `lanes`. The number of
  // non-zeros of every slot must be a multiple of 4.
  void (*sddmm)(const Tile& tile, const Rows& rows, const float* dy, int64_t dy_stride, int64_t lanes, float* grad);

  // to[r * to_row + c] = from[r * from_row + c * from_col]. Where a row has room for as many floats, its last register
  // is written as a whole, with zeros behind the columns.
  void (*gather)(float* to, int64_t to_row, const float* from, int64_t from_row, int64_t from_col, int64_t rows,
                 int64_t cols, int64_t room);

  // to[r * to_row + c] = 0
  void (*clear)(float* to, int64_t to_row, int64_t rows, int64_t cols);

  // to[r * to_row + c * to_col] = from[r * from_row + c]
  void (*scatter)(float* to, int64_t to_row, int64_t to_col, const float* from, int64_t from_row, int64_t rows,
                  int64_t cols);

  // to[r * to_row + c * to_col] += from[r * from_row + c]
  void (*add_spread)(float* to, int64_t to_row, int64_t to_col, const float* from, int64_t from_row, int64_t rows,
                     int64_t cols);

  // to[r * to_row + c] = c even ? even[r * even_row + c / 2] : odd[r * odd_row + c / 2]
  void (*interleave)(float* to, int64_t to_row, const float* even, const float* odd, int64_t even_row, int64_t odd_row,
                     int64_t rows, int64_t cols);

  // The inverse for even_cols + odd_cols columns, of which the counts differ by at most one or the longer is cut short:
  // even[r * to_row + c] = from[r * from_row + 2 * c], odd[r * to_row + c] = from[r * from_row + 2 * c + 1]. room: as
  // of gather.
  void (*split)(float* even, float* odd, int64_t to_row, const float* from, int64_t from_row, int64_t rows,
                int64_t even_cols, int64_t odd_cols, int64_t room);

  // Row y of max pooling, all channels of one image; a window's pixels outside of the image do not count, NaN wins. The
  // layouts are NCHW and channels_last; NCHW to channels_last is not there. scratch: pool_scratch(g) floats.
  void (*max_pool_row)(const Pool2dGeometry& g, const Images& in, const Images& out, int64_t y, float* scratch);

  // The same for average pooling, NCHW only. count_padding: the zeros around an image count as its pixels.
  void (*avg_pool_row)(const Pool2dGeometry& g, bool count_padding, const Images& in, const Images& out, int64_t y,
                       float* scratch);

  // Max pooling of one plane, NCHW, and which tap of every window is the largest: see max_pool2d_taps. scratch:
  // split.floats floats.
  void (*max_pool_plane)(const Pool2dGeometry& g, const PoolSplit& split, const float* x, float* y, uint8_t* taps,
                         float* scratch);

  // Its gradient. stream: as of Results, for stride_w = 2 and rows of whole lines.
  void (*max_pool_grad_plane)(const Pool2dGeometry& g, const PoolSplit& split, const float* dy, const uint8_t* taps,
                              float* dx, float* scratch, bool stream);

  // to[r * to_row + i] = a[r * from_row + i] + scale * b[r * from_row + i], for `lanes` i; may work in place.
  void (*sum)(float* to, int64_t to_row, const float* a, const float* b, int64_t from_row, float scale, int64_t rows,
              int64_t lanes);

  // to[lane] = p(from[lane]) over `lanes` lanes, whole registers; `to` may be `from`. NaN stays NaN.
  void (*pointwise)(const Pointwise& p, float* to, const float* from, int64_t lanes);

  // Adds x - mean and (x - mean)^2 of n floats.
  void (*moments)(const float* x, int64_t n, float mean, SpreadSums& sums);

  // y = x * scale + shift + other * other_scale, at least 0 with relu; NaN stays NaN. other may be null, and positive,
  // which gets a bit for every y, 0 where it is 0 or less and behind the last, up to a multiple of 16. stream: as of
  // Results. soon: floats from x to what will be read next.
  void (*normalize)(float* y, const float* x, const float* other, int64_t n, float scale, float shift,
                    float other_scale, bool relu, bool stream, uint8_t* positive, int64_t soon);

  // Adds g and g * (x - mean).
  void (*norm_sums)(const NormGrad& grad, const float* dy, const float* x, const uint8_t* positive, int64_t n,
                    SpreadSums& sums);
  // Writes g too, if it is not null. soon: as of normalize, from dy too.
  void (*norm_input_grad)(const NormGrad& grad, const float* dy, const float* x, const uint8_t* positive, int64_t n,
                          float* dx, float* g, bool stream, int64_t soon);

  // to[i] = from[i], past the caches.
  void (*stream)(float* to, const float* from, int64_t n);

  // What normalize, norm_input_grad and stream wrote is there for other threads.
  void (*finish_streams)();

  // to[c * to_row + r] = from[r * from_row + c]
  void (*transpose)(float* to, int64_t to_row, const float* from, int64_t from_row, int64_t rows, int64_t cols);

  const TileKernels* tiles = nullptr;  // products of tiles, where the CPU has units for them
};

namespace generic {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace zen4 {
extern const Kernels kernels;
}
#endif

// The table in use; dispatch.cpp sets it.
const Kernels& kernels();

}  // namespace sparsekit
