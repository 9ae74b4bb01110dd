// How a walk is cut into tiles, and how a tile's source lies in shared memory. No torch and no CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace sparsekit::cuda {

constexpr int kLanes = 32, kWarps = 8;

inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A tile is `images` x `rows` x `cols` target pixels, and its source a plane for every channel and residue of the
// steps. A plane is stored with its zeros, rows `pitch` apart and images `image_pitch`, so that what a tap reads for
// slot s is at s + offsets[tap]: slots are places in the plane, and those between two rows are computed, but not
// stored. Zeros to the right of a row are those to the left of the next, zeros below an image those above the next.
//
// Where each pixel reads one other pixel of the channel alone (no taps), tiles are cut from all images' pixels in a
// row, and a slot is a pixel.
struct Tile {
  bool has_taps;
  int32_t images, rows, cols, pitch, image_pitch;
  int32_t plane, elements;            // of one residue, and of a channel
  int32_t tiles_n, tiles_y, tiles_x;  // with no taps, tiles_x alone
  int32_t low_y, low_x;               // where a plane begins, relative to the tile
  int32_t residues;
  int32_t residue_y[kMaxTaps], residue_x[kMaxTaps];
  int32_t offsets[kMaxTaps];
  int64_t tiles() const { return static_cast<int64_t>(tiles_n) * tiles_y * tiles_x; }
};

inline int32_t floor_div(int32_t a, int32_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

inline bool has_taps(const Walk& w) {
  return w.taps > 1 || !w.used || w.dy[0] < 0 || w.dx[0] < 0 || (w.rows - 1) * w.step_y + w.dy[0] >= w.source_h ||
         (w.cols - 1) * w.step_x + w.dx[0] >= w.source_w;
}

// Tiles of at most `slots` slots.
inline Tile tile_of(const Walk& w, int32_t slots) {
  Tile t{};
  t.has_taps = has_taps(w);
  t.images = t.rows = t.tiles_n = t.tiles_y = 1;
  if (!t.has_taps) {
    t.cols = t.pitch = t.image_pitch = t.plane = t.elements = slots;
    t.tiles_x = static_cast<int32_t>(div_up(static_cast<int64_t>(w.batch) * w.rows * w.cols, slots));
    t.residues = 1;
    return t;
  }
  // Tap t reads row (j + qy) * step_y + residue of the source.
  int32_t high_y = 0, high_x = 0, count = 0;
  bool first = true;
  for (int k = 0; k < w.taps; ++k) {
    if (!(w.used >> k & 1)) continue;
    const int32_t qy = floor_div(w.dy[k], w.step_y), qx = floor_div(w.dx[k], w.step_x);
    const int32_t ry = w.dy[k] - qy * w.step_y, rx = w.dx[k] - qx * w.step_x;
    t.low_y = first ? qy : std::min(t.low_y, qy), high_y = first ? qy : std::max(high_y, qy);
    t.low_x = first ? qx : std::min(t.low_x, qx), high_x = first ? qx : std::max(high_x, qx);
    first = false;
    int r = 0;
    while (r < count && (t.residue_y[r] != ry || t.residue_x[r] != rx)) ++r;
    if (r == count) t.residue_y[count] = ry, t.residue_x[count++] = rx;
    t.offsets[k] = r;  // completed below
  }
  t.residues = std::max(count, 1);
  const int32_t span_y = high_y - t.low_y, span_x = high_x - t.low_x;
  // Columns and rows of a plane that lie outside of the source on both sides, in every residue. No more than the span:
  // rows are at least as far apart as they are long.
  const int32_t source_rows = static_cast<int32_t>(div_up(w.source_h, w.step_y));
  const int32_t source_cols = static_cast<int32_t>(div_up(w.source_w, w.step_x));
  const auto shared = [](int32_t low, int32_t high, int32_t targets, int32_t sources) {
    return std::clamp(std::min(-low, targets - 1 + high - (sources - 1)), 0, high - low);
  };
  t.cols = w.cols;
  if (w.cols > slots) t.cols = static_cast<int32_t>(div_up(w.cols, div_up(w.cols, slots)));
  const bool whole_rows = t.cols == w.cols;
  t.pitch = t.cols + span_x - (whole_rows ? shared(t.low_x, high_x, w.cols, source_cols) : 0);
  t.rows = std::min(w.rows, (slots - t.cols) / t.pitch + 1);
  t.rows = static_cast<int32_t>(div_up(w.rows, div_up(w.rows, t.rows)));
  const bool whole_images = whole_rows && t.rows == w.rows;
  t.image_pitch = (t.rows + span_y - (whole_images ? shared(t.low_y, high_y, w.rows, source_rows) : 0)) * t.pitch;
  const int32_t of_image = (t.rows - 1) * t.pitch + t.cols;
  if (whole_images) {
    t.images = std::min(w.batch, (slots - of_image) / t.image_pitch + 1);
    t.images = static_cast<int32_t>(div_up(w.batch, div_up(w.batch, t.images)));
  }
  t.plane = (t.images - 1) * t.image_pitch + (t.rows + span_y - 1) * t.pitch + t.cols + span_x;
  t.elements = t.plane * t.residues;
  for (int k = 0; k < w.taps; ++k) {
    if (!(w.used >> k & 1)) continue;
    const int32_t qy = floor_div(w.dy[k], w.step_y), qx = floor_div(w.dx[k], w.step_x);
    t.offsets[k] = t.offsets[k] * t.plane + (qy - t.low_y) * t.pitch + qx - t.low_x;
  }
  t.tiles_n = static_cast<int32_t>(div_up(w.batch, t.images));
  t.tiles_y = static_cast<int32_t>(div_up(w.rows, t.rows));
  t.tiles_x = static_cast<int32_t>(div_up(w.cols, t.cols));
  return t;
}

}  // namespace sparsekit::cuda
