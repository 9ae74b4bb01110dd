#include "cpu/walk.h"

#include <algorithm>

namespace sparsekit {
namespace {

// Of a single image, at least, unless tiles would be too small for the registers: threads that share an image then pack
// a part of it each. Not the number of threads, on which results must not depend.
constexpr int64_t kSingleTiles = 2;

constexpr int64_t kWriteAhead = 4;  // channels, of a target that is not written in place

int64_t floor_div(int64_t n, int64_t by) { return n >= 0 ? n / by : -ceil_div(-n, by); }

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

}  // namespace

TileAt tile_at(const Walk& walk, int64_t index) {
  const int64_t column = index % walk.tiles_w(), rest = index / walk.tiles_w();
  const int64_t row = rest % walk.tiles_h();
  const int64_t y = row * walk.tile_h, x = column * walk.tile_w;
  return {rest / walk.tiles_h(), y, x, std::min(walk.tile_h, walk.grid_h - y), std::min(walk.tile_w, walk.grid_w - x)};
}

bool aligned(const float* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % (kAlign * sizeof(float)) == 0 && stride % kAlign == 0;
}

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

void choose_tile(Walk& walk, int64_t lanes_wanted, int64_t overhead, bool shift) {
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
  const int64_t lines = round_up(walk.pitch, kAlign);
  if (shift && walk.phases.size() == 1 && halo > 0 && walk.tile_w == walk.grid_w && lines <= kMostShifted &&
      lines <= kMostWaste * walk.pitch) {
    walk.shifting = true;
    walk.pitch = lines;
    walk.lead = round_up(std::max<int64_t>(walk.left, 1), kAlign) - walk.left;
  }
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
  if (halo > 0 && !walk.shifting &&
      ceil_div(whole + walk.tile_w, kAlign) == ceil_div(rows_between + walk.tile_w, kAlign))
    walk.pitch = round_up(walk.pitch, kAlign);
  place_phases(walk);
}

void place_phases(Walk& walk) {
  // Pairs of taps (Rows::pairs) read one float on both sides, even where nothing is wanted of it.
  const int64_t halo = walk.left + std::max<int64_t>(walk.right, walk.shifting);
  int64_t base = walk.lead;
  for (Phase& p : walk.phases) {
    p.base = base;
    // Who writes zeros to the right of all rows must not write into the next channel: another may be at that.
    const int64_t last = walk.reused ? std::max(walk.tile_w, walk.pitch - halo) : walk.tile_w;
    const int64_t pixels = (walk.tile_h - 1) * walk.pitch + last, rows = (p.up + p.down) * walk.pitch;
    // With a lead, lanes of no meaning may be where the next phase has the zeros before its first pixel.
    base += round_up(halo + rows + (walk.lead ? pixels : round_up(pixels, kAlign)), kAlign);
  }
  if (walk.shifting) base += kAlign;  // the last register of lanes ends within the channel
  base = round_up(base, kAlign);
  // Where a strip is a part of the tile: an odd number of lines, so that its channels spread over all sets of the
  // cache.
  const bool several_strips = base > 4 * kAlign;
  walk.channel_stride = std::max(kAlign, several_strips && base / kAlign % 2 == 0 ? base + kAlign : base);
}

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
  return walk;
}

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
  return walk;
}

Channels channels_of(const Walk& walk, int64_t group, int64_t block, int64_t block_channels) {
  const int64_t begin = block * block_channels;
  return {group * walk.source_channels + begin, std::min(block_channels, walk.source_channels - begin)};
}

namespace {

// The rows of all channels, or the channels of all rows: `count` times `rows` of them, in the order of the source.
struct Runs {
  int64_t count, to, from, rows, to_row, from_row;
};

Runs runs_of(const Walk& walk, int64_t rows, int64_t channels) {
  const int64_t channel = walk.source.channel, row = walk.step_h * walk.source.row;
  if (rows == 1 || channel < row) return {rows, walk.pitch, row, channels, walk.channel_stride, channel};
  return {channels, walk.channel_stride, channel, rows, walk.pitch, row};
}

// From a row's first pixel to that of its neighbour in memory, if zeros may be written between.
int64_t room_of(const Walk& walk) { return walk.reused ? walk.row_lanes() : 0; }

// What a phase has of a tile: `rows` x `cols` pixels from `from` on, which go to `to`, in every channel.
struct Piece {
  float* to;
  const float* from;
  int64_t rows, cols;
};

// Writes the zeros where the source has no pixels. between: those to the right of rows are not its matter.
Piece piece_of(const Walk& walk, const Phase& p, const TileAt& tile, Channels channels, bool between, float* block) {
  const Images& s = walk.source;
  // The rows [top, bottom) and columns [from, to) of the packed phase that exist in the source.
  const int64_t x0 = tile.x - walk.left, y0 = tile.y - p.up, rows = walk.tile_h + p.up + p.down;
  const int64_t width = ceil_div(walk.source_w - p.offset_w, walk.step_w);
  const int64_t height = ceil_div(walk.source_h - p.offset_h, walk.step_h);
  const int64_t lanes = walk.row_lanes();
  const int64_t from = std::clamp<int64_t>(-x0, 0, lanes), to = std::clamp<int64_t>(width - x0, from, lanes);
  const int64_t above = ceil_div(std::max<int64_t>(0, -p.offset_h), walk.step_h);  // rows before the first pixel's
  const int64_t top = from < to ? std::clamp<int64_t>(above - y0, 0, rows) : rows;
  const int64_t bottom = std::clamp<int64_t>(height - y0, top, rows);
  float* phase = block + p.base;
  auto clear = [&](int64_t row, int64_t end, int64_t col, int64_t cols, bool one = false) {
    if (row >= end || cols <= 0) return;
    const Runs runs = runs_of(walk, end - row, one ? 1 : channels.count);
    for (int64_t i = 0; i < runs.count; ++i)
      kernels().clear(phase + row * walk.pitch + col + i * runs.to, runs.to_row, runs.rows, cols);
  };
  clear(0, top, 0, lanes);
  clear(bottom, rows, 0, lanes);
  // Zero columns stay where the first tile had them, unless tiles are narrower than the target; zero rows move.
  if (walk.tile_w < walk.grid_w || walk.reused) {
    if (between || (s.channel != 1 && round_up(to - from, kernels().lanes) == room_of(walk))) {
      // What lies between the pixels of two neighbours is written with those of the first: rows of a channel, or
      // channels of a row. The first has none before it.
      const bool by_rows = walk.pitch > walk.channel_stride;
      clear(top, by_rows ? bottom : std::min(top + 1, bottom), 0, from, by_rows);
    } else {
      clear(top, bottom, 0, from);
      clear(top, bottom, to, lanes - to);
    }
  }
  // Behind the last row: what taps find there; behind others it is what the next begins with.
  if (walk.reused && p.down >= 0) clear(rows - 1, rows, lanes, walk.tile_w + walk.left + walk.right - lanes);
  return {phase + top * walk.pitch + from,
          s.data + tile.image * s.image + channels.first * s.channel + ((y0 + top) * walk.step_h + p.offset_h) * s.row +
              ((x0 + from) * walk.step_w + p.offset_w) * s.col,
          bottom - top, to - from};
}

}  // namespace

void pack_source(const Walk& walk, const TileAt& tile, Channels channels, float* block) {
  const Kernels& k = kernels();
  const Images& s = walk.source;
  const int64_t count = channels.count, col = walk.step_w * s.col, row = walk.step_h * s.row;
  for (size_t i = 0; i < walk.phases.size(); ++i) {
    const Piece piece = piece_of(walk, walk.phases[i], tile, channels, false, block);
    if (i + 1 < walk.phases.size() && walk.step_w == 2 && s.col == 1) {
      // Even and odd columns of the same rows are read at once.
      const Phase &p = walk.phases[i], &q = walk.phases[i + 1];
      if (p.offset_h == q.offset_h && p.up == q.up && p.down == q.down) {
        const Piece other = piece_of(walk, q, tile, channels, false, block);
        const Piece &even = p.offset_w ? other : piece, &odd = p.offset_w ? piece : other;
        if (even.rows == odd.rows && odd.from == even.from + 1) {
          const Runs runs = runs_of(walk, even.rows, count);
          for (int64_t j = 0; j < runs.count; ++j)
            k.split(even.to + j * runs.to, odd.to + j * runs.to, runs.to_row, even.from + j * runs.from, runs.from_row,
                    runs.rows, even.cols, odd.cols, room_of(walk));
          ++i;
          continue;
        }
      }
    }
    if (s.channel == 1) {
      for (int64_t r = 0; r < piece.rows; ++r)
        k.transpose(piece.to + r * walk.pitch, walk.channel_stride, piece.from + r * row, col, piece.cols, count);
    } else {
      const Runs runs = runs_of(walk, piece.rows, count);
      for (int64_t j = 0; j < runs.count; ++j)
        k.gather(piece.to + j * runs.to, runs.to_row, piece.from + j * runs.from, runs.from_row, col, runs.rows,
                 piece.cols, room_of(walk));
    }
  }
}

void pack_zeros(const Walk& walk, const TileAt& tile, Channels channels, float* block) {
  for (const Phase& p : walk.phases) piece_of(walk, p, tile, channels, true, block);
}

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

const float* block_at(const Walk& walk, const TileAt& tile, Channels channels, float* scratch) {
  if (walk.direct) return source_of(walk, tile, channels).data;
  pack_source(walk, tile, channels, scratch);
  return scratch;
}

bool writes_in_place(const Walk& walk) {
  return walk.target_step_h == 1 && walk.target_step_w == 1 && walk.target.col == 1 &&
         (walk.tile_h == 1 || (walk.target.row == walk.pitch && !walk.shifting));
}

float* target_at(const Walk& walk, const TileAt& tile, int64_t channel) {
  const Images& t = walk.target;
  return t.data + tile.image * t.image + channel * t.channel + tile.y * walk.target_step_h * t.row +
         tile.x * walk.target_step_w * t.col;
}

namespace {

// Where a part begins in a channel of the target, from the tile's corner on, and how much of it there is.
struct PartAt {
  int64_t at, h, w;
};

PartAt part_at(const Walk& walk, const Part& p, const TileAt& tile) {
  return {p.offset_h * walk.target.row + p.offset_w * walk.target.col,
          std::min(tile.h, ceil_div(walk.target_h - p.offset_h, walk.target_step_h) - tile.y),
          std::min(tile.w, ceil_div(walk.target_w - p.offset_w, walk.target_step_w) - tile.x)};
}

}  // namespace

void write_target(const Walk& walk, const TileAt& tile, int64_t channel, int64_t count,
                  const std::vector<Lanes>& lanes) {
  const Kernels& k = kernels();
  const Images& t = walk.target;
  float* const corner = target_at(walk, tile, channel);
  const int64_t step_h = walk.target_step_h, step_w = walk.target_step_w;
  std::vector<PartAt> pieces;
  for (const Part& p : walk.parts) pieces.push_back(part_at(walk, p, tile));
  if (t.channel == 1) {
    for (size_t i = 0; i < pieces.size(); ++i)
      for (int64_t r = 0; r < pieces[i].h; ++r)
        k.transpose(corner + pieces[i].at + r * step_h * t.row, step_w * t.col, lanes[i].data + r * walk.pitch,
                    lanes[i].stride, count, pieces[i].w);
    return;
  }
  const bool pairs = step_w == 2 && t.col == 1 && walk.target_w > 1;
  const int64_t rows = std::min(walk.target_h - tile.y * step_h, tile.h * step_h), row_floats = tile.w * step_w * t.col;
  // Rows that follow each other in a target that is too large for the caches are put together, and written past them.
  const bool streams = t.col == 1 && walk.tile_w == walk.grid_w && t.row == walk.target_w && walk.large();
  Scratch scratch;
  float* const together = streams ? scratch.get(rows * walk.target_w) : nullptr;
  for (int64_t c = 0; c < count; ++c) {
    const float* ahead = corner + (c + kWriteAhead) * t.channel;
    if (!streams && c + kWriteAhead < count)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t f = 0; f < row_floats; f += kAlign) __builtin_prefetch(ahead + r * t.row + f, 1);
    for (size_t i = 0; i < pieces.size(); ++i) {
      const auto [at, h, w] = pieces[i];
      float* to = (streams ? together : corner + c * t.channel) + at;
      const float* from = lanes[i].data + c * lanes[i].stride;
      if (pairs) {
        ++i;
        k.interleave(to, step_h * t.row, from, lanes[i].data + c * lanes[i].stride, walk.pitch, walk.pitch, h,
                     w + pieces[i].w);
      } else {
        k.scatter(to, step_h * t.row, step_w * t.col, from, walk.pitch, h, w);
      }
    }
    if (streams) k.stream(corner + c * t.channel, together, rows * walk.target_w);
  }
  if (streams) k.finish_streams();
}

void add_target(const Walk& walk, const TileAt& tile, int64_t channel, int64_t count, const std::vector<Lanes>& lanes) {
  const Images& t = walk.target;
  for (size_t i = 0; i < walk.parts.size(); ++i) {
    if (walk.parts[i].empty) continue;
    const auto [at, h, w] = part_at(walk, walk.parts[i], tile);
    float* const to = target_at(walk, tile, channel) + at;
    for (int64_t c = 0; c < count; ++c) {
      const float* ahead = to + (c + kWriteAhead) * t.channel;
      if (c + kWriteAhead < count)
        for (int64_t r = 0; r < h; ++r)
          for (int64_t f = 0; f < w * walk.target_step_w; f += kAlign)
            __builtin_prefetch(ahead + r * walk.target_step_h * t.row + f, 1);
      kernels().add_spread(to + c * t.channel, walk.target_step_h * t.row, walk.target_step_w * t.col,
                           lanes[i].data + c * lanes[i].stride, walk.pitch, h, w);
    }
  }
}

void pack_target(const Walk& walk, const TileAt& tile, int64_t channel, int64_t count, float* lanes, int64_t stride) {
  const Kernels& k = kernels();
  const Images& t = walk.target;
  const float* from = target_at(walk, tile, channel);
  if (t.channel == 1) {
    for (int64_t r = 0; r < tile.h; ++r)
      k.transpose(lanes + r * walk.pitch, stride, from + r * t.row, t.col, tile.w, count);
  } else {
    for (int64_t c = 0; c < count; ++c)
      k.gather(lanes + c * stride, walk.pitch, from + c * t.channel, t.row, t.col, tile.h, tile.w, 0);
  }
  if (walk.tile_w < walk.grid_w && tile.h > 1)
    for (int64_t c = 0; c < count; ++c)
      for (int64_t r = 0; r + 1 < tile.h; ++r)
        std::fill(lanes + c * stride + r * walk.pitch + tile.w, lanes + c * stride + (r + 1) * walk.pitch, 0.0f);
}

int64_t block_channels(const Walk& walk, const Csr& csr, int64_t lanes, int64_t row_nnz, int64_t floats) {
  const int64_t fits = floats / strip_floats(walk, lanes);
  const double per_channel = double(csr.nnz) / std::max<int64_t>(1, csr.rows * walk.source_channels);
  const int64_t enough = per_channel > 0 ? int64_t(row_nnz / per_channel) + 1 : walk.source_channels;
  const int64_t channels = std::max<int64_t>(1, walk.source_channels);
  const int64_t most = std::clamp<int64_t>(std::max(fits, enough), 1, channels);
  return ceil_div(channels, ceil_div(channels, most));
}

}  // namespace sparsekit
