// One form of forward, input gradient and weight gradient, and how it is cut into tiles and packed.
//
// All three read a source through small integer shifts: forward shifts x by the taps of the kernel, the input gradient
// shifts dy (one part of the target per residue of the stride), the weight gradient multiplies dy with the shifts of
// forward. A Walk is that common form.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "ops.h"

namespace sparsekit {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Chosen by measurement (benchmarks/layers.py) for 32 KB of first-level cache; 48 KB would gain nothing by more.
constexpr int64_t kBlockFloats = 7 * 1024;  // that a strip reads while they stay there
constexpr int64_t kMostShifted = 80;        // lanes of a row that is shifted, for one strip holds all of it
constexpr double kMostWaste = 1.15;         // of lanes, that rows of whole lines may cost
constexpr int64_t kStripLanes = 64;         // that spmm holds in registers; sddmm holds twice as many

struct Tap {
  int64_t phase, dy, dx;  // phase < 0: the tap does not touch this part
  int64_t elsewhere = 0;  // floats from the packed block to the copy of it that the tap reads
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
  // one row to the next. In an engine a packed block may also hold row after row of all channels: pitch is then that of
  // all of them.
  int64_t grid_h, grid_w, tile_h, tile_w, pitch, channel_stride;
  int64_t lead = 0;       // floats before the first pixel of a phase
  int64_t row = 0;        // floats of a channel's row in the packed block, unless they are all that there are
  bool shifting = false;  // PackedWeight may use it
  bool direct = false;    // the source itself serves as packed block
  bool reused = false;    // the packed block is not zero where no tile has had a pixel

  int64_t tiles_h() const { return ceil_div(grid_h, tile_h); }
  int64_t tiles_w() const { return ceil_div(grid_w, tile_w); }
  int64_t row_lanes() const { return row ? row : std::min(pitch, channel_stride); }  // of a channel's row
  int64_t tiles() const { return images * tiles_h() * tiles_w(); }
  bool pointwise() const { return parts.size() == 1 && parts[0].taps.size() == 1; }
  // Whether results are too large for the caches.
  bool large() const { return images * groups * rows * target_h * target_w >= kStreamFloats; }
  // Floats from one row of results to the next, where they are not written in place.
  int64_t result_stride() const { return round_up((tile_h - 1) * pitch + tile_w, kAlign) + kAlign; }
};

struct TileAt {
  int64_t image, y, x, h, w;
  int64_t lanes(const Walk& walk) const { return (h - 1) * walk.pitch + w; }
};

// Source channels [first, first + count).
struct Channels {
  int64_t first, count;
};

// Copy the lanes of all parts, rows [channel, channel + count), to the target. Row c of part p starts at
// lanes[p].data + c * lanes[p].stride.
struct Lanes {
  const float* data;
  int64_t stride;
};

TileAt tile_at(const Walk& walk, int64_t index);

bool aligned(const float* p, int64_t stride);

// Pointwise walks have no neighbourhood: let as many pixels as possible be one long row.
void merge_rows(Walk& walk);

// Lane count and pitch of the tile. `lanes_wanted` bounds the tile; of the heights within it, the one that computes and
// copies the fewest lanes per pixel wins, where `overhead` is the work per row of the weight and tile, in lanes. shift:
// rows may be whole lines, so that taps beside their lanes need not be loaded from there.
void choose_tile(Walk& walk, int64_t lanes_wanted, int64_t overhead, bool shift = false);

// Where the phases lie in a channel of the packed block, and how long a channel is, for the tile and pitch at hand.
void place_phases(Walk& walk);

// Floats of a channel that a strip of `lanes` reads.
int64_t strip_floats(const Walk& walk, int64_t lanes);

// The lanes are the pixels of y.
Walk forward_walk(const Conv2dGeometry& g, const Images& x, const Images& y);

// One part per residue of the stride.
Walk input_grad_walk(const Conv2dGeometry& g, const Images& dy, const Images& dx);

Channels channels_of(const Walk& walk, int64_t group, int64_t block, int64_t block_channels);

// Copy the source pixels of a tile into `block`, which starts zeroed.
void pack_source(const Walk& walk, const TileAt& tile, Channels channels, float* block);

// The zeros around the pixels of the only tile alone, for whoever writes these, and what is to the right of every row.
void pack_zeros(const Walk& walk, const TileAt& tile, Channels channels, float* block);

// Where what a tap reads of a channel of the packed block begins.
inline int64_t offset_of(const Walk& walk, const Tap& tap, int64_t channel) {
  const Phase& p = walk.phases[tap.phase];
  return channel * walk.channel_stride + p.base + (tap.dy + p.up) * walk.pitch + walk.left + tap.dx + tap.elsewhere;
}

// The source memory of a tile.
Soon source_of(const Walk& walk, const TileAt& tile, Channels channels);

// The block of channels that the microkernels read: packed into `scratch`, or the source itself.
const float* block_at(const Walk& walk, const TileAt& tile, Channels channels, float* scratch);

// Whether lanes and target memory have the same layout, so that results need no copy.
bool writes_in_place(const Walk& walk);

float* target_at(const Walk& walk, const TileAt& tile, int64_t channel);

void write_target(const Walk& walk, const TileAt& tile, int64_t channel, int64_t count,
                  const std::vector<Lanes>& lanes);

// Adds to the target; nothing where parts are empty.
void add_target(const Walk& walk, const TileAt& tile, int64_t channel, int64_t count, const std::vector<Lanes>& lanes);

// Target pixels into lanes, which start zeroed, so that lanes that are no pixels stay zero.
void pack_target(const Walk& walk, const TileAt& tile, int64_t channel, int64_t count, float* lanes, int64_t stride);

// Channels per block: what a strip reads of it fits the first-level cache, unless rows would have too few non-zeros.
int64_t block_channels(const Walk& walk, const Csr& csr, int64_t lanes, int64_t row_nnz, int64_t floats = kBlockFloats);

}  // namespace sparsekit
