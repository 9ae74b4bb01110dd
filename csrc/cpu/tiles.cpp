#include "cpu/tiles.h"

#include <immintrin.h>

#include <algorithm>

namespace sparsekit::amx {
namespace {

constexpr int64_t kNumbers = kTile * kTile;  // of a tile
constexpr int64_t kRows = TileWeight::kRows, kTogether = kRows / kTile;

// Pairs of numbers, split.
struct Split {
  __m512i parts[kParts];
};

__m512 rounded(__m512 x) {
  const __m512i up = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
  return _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(0xffff0000)));
}

// most: becomes the largest magnitude, as its bits times two.
Split split_pairs(__m512 a, __m512 b, __m512i& most) {
  auto together = [](__m512 a, __m512 b) {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(a), 16), high = _mm512_castps_si512(b);
    return _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi32(0xffff0000), 0xf8);  // low | (high & mask)
  };
  const __m512 a0 = rounded(a), b0 = rounded(b), a_left = _mm512_sub_ps(a, a0), b_left = _mm512_sub_ps(b, b0);
  const __m512 a1 = rounded(a_left), b1 = rounded(b_left);
  most = _mm512_max_epu32(most, _mm512_slli_epi32(_mm512_castps_si512(a), 1));
  most = _mm512_max_epu32(most, _mm512_slli_epi32(_mm512_castps_si512(b), 1));
  return {together(a0, b0), together(a1, b1), together(_mm512_sub_ps(a_left, a1), _mm512_sub_ps(b_left, b1))};
}

bool have_parts(__m512i most) {
  constexpr uint32_t kLimit = (127 + kMostExponent) << 24;
  return _mm512_cmpge_epu32_mask(most, _mm512_set1_epi32(kLimit)) == 0;
}

__m512 lanes_of(const SplitFrom& from, const float* row, int64_t lane) {
  const int64_t first = lane - from.first;
  if (first >= 0 && first + kTile <= from.count) return _mm512_loadu_ps(row + first);
  const int64_t begin = std::max<int64_t>(0, -first), end = std::min<int64_t>(kTile, from.count - first);
  if (begin >= end) return _mm512_setzero_ps();
  return _mm512_maskz_loadu_ps((1u << end) - (1u << begin), row + first);
}

bool split(const SplitFrom& a, const SplitFrom& b, int64_t row, int64_t rows, int64_t lanes, uint32_t* to,
           int64_t part) {
  const SplitFrom from_a = a, from_b = b;
  const int64_t count_a = a.data ? a.count : 0, count_b = b.data ? b.count : 0;
  __m512i most = _mm512_setzero_si512();
  for (int64_t r = 0; r < rows; ++r, to += lanes)
    for (int64_t i = 0; i < lanes; i += kTile) {
      const Split s = split_pairs(lanes_of({nullptr, from_a.first, count_a}, from_a.data + r * row, i),
                                  lanes_of({nullptr, from_b.first, count_b}, from_b.data + r * row, i), most);
      for (int64_t p = 0; p < kParts; ++p) _mm512_storeu_si512(to + p * part + i, s.parts[p]);
    }
  return have_parts(most);
}

// A set of rows of the weight as tiles: [chunks][kParts][kTogether].
void split_weight(const TileWeight& weight, int64_t set, uint32_t* to) {
  const float* values = weight.values + set * weight.chunks * kRows * 2 * kTile;
  __m512i most = _mm512_setzero_si512();  // its maker knows it
  for (int64_t c = 0; c < weight.chunks; ++c, to += kParts * kTogether * kNumbers)
    for (int64_t r = 0; r < kRows; ++r, values += 2 * kTile) {
      const Split s = split_pairs(_mm512_loadu_ps(values), _mm512_loadu_ps(values + kTile), most);
      for (int64_t p = 0; p < kParts; ++p) _mm512_store_si512(to + p * kTogether * kNumbers + r * kTile, s.parts[p]);
    }
}

// Tile instructions may read it: not every compiler's intrinsics say so.
void written(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

struct alignas(64) Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Sums that wait to be written, [columns][kRows][kTile].
struct Pending {
  const float* sums;
  const TileLanes* lanes;
  int64_t columns, first_row, rows;
};

void put(const Pending& pending, const Results& results) {
  const __m512 low = _mm512_set1_ps(results.low), high = _mm512_set1_ps(results.high);
  const float* const start = results.start;
  const float* const bias = results.bias + pending.first_row;
  const int64_t stride = results.stride, start_stride = results.start_stride;
  for (int64_t c = 0; c < pending.columns; ++c) {
    const float* const sums = pending.sums + c * kRows * kTile;
    for (const TileLanes::Piece& piece : pending.lanes[c].pieces) {
      const __mmask16 lanes = piece.lanes;
      if (lanes == 0) break;
      float* to = results.data + pending.first_row * stride + piece.to;
      const float* from = start ? start + pending.first_row * start_stride + piece.from : nullptr;
      for (int64_t r = 0; r < pending.rows; ++r, to += stride) {
        __m512 sum = _mm512_add_ps(_mm512_load_ps(sums + r * kTile), _mm512_set1_ps(bias[r]));
        if (from) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes, from + r * start_stride));
        _mm512_mask_storeu_ps(to, lanes, _mm512_min_ps(high, _mm512_max_ps(low, sum)));
      }
    }
  }
}

// The sums of a set of rows of the weight times `Columns` of lanes. Tiles 0 to 3 are sums, 4 and 5 the weight, 6 and 7
// the source. What waits is written while other units compute.
template <int Columns>
void multiply_columns(const TileWeight& weight, const uint32_t* panel, const TileSource& source, const TileLanes* lanes,
                      float* sums, const Pending& pending, const Results& results) {
  const int64_t pair = source.pair * 4, part = source.part;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t c = 0; c < weight.chunks; ++c, panel += kParts * kTogether * kNumbers) {
    const uint32_t* const x0 = source.data + weight.offsets[c] + lanes[0].source;
    const uint32_t* const x1 = source.data + weight.offsets[c] + lanes[Columns - 1].source;
    const int64_t next = c + 1 < weight.chunks ? weight.offsets[c + 1] - weight.offsets[c] : 0;
    auto prefetch_next = [&](int64_t p) {
      for (int64_t i = 0; i < kTile; ++i) {
        __builtin_prefetch(x0 + p * part + next + i * source.pair);
        if (Columns == 2) __builtin_prefetch(x1 + p * part + next + i * source.pair);
      }
    };
// Numbers of tiles are part of the instruction.
#define SPARSEKIT_LOAD_WEIGHT(p)                          \
  _tile_loadd(4, panel + (p) * kTogether * kNumbers, 64); \
  _tile_loadd(5, panel + ((p) * kTogether + 1) * kNumbers, 64)
#define SPARSEKIT_LOAD_SOURCE(p)         \
  _tile_loadd(6, x0 + (p) * part, pair); \
  if (Columns == 2) _tile_loadd(7, x1 + (p) * part, pair)
#define SPARSEKIT_MULTIPLY()                 \
  _tile_dpbf16ps(0, 4, 6);                   \
  if (Columns == 2) _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6);                   \
  if (Columns == 2) _tile_dpbf16ps(3, 5, 7)
    SPARSEKIT_LOAD_WEIGHT(0);
    SPARSEKIT_LOAD_SOURCE(2);
    SPARSEKIT_MULTIPLY();
    SPARSEKIT_LOAD_SOURCE(1);
    SPARSEKIT_MULTIPLY();
    prefetch_next(0);
    SPARSEKIT_LOAD_WEIGHT(1);
    SPARSEKIT_MULTIPLY();
    SPARSEKIT_LOAD_SOURCE(0);
    SPARSEKIT_MULTIPLY();
    prefetch_next(1);
    SPARSEKIT_LOAD_WEIGHT(2);
    SPARSEKIT_MULTIPLY();
    SPARSEKIT_LOAD_WEIGHT(0);
    SPARSEKIT_MULTIPLY();
    prefetch_next(2);
#undef SPARSEKIT_LOAD_WEIGHT
#undef SPARSEKIT_LOAD_SOURCE
#undef SPARSEKIT_MULTIPLY
    if (c == weight.chunks * 2 / 3) put(pending, results);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(2, sums + kNumbers, 64);
  if (Columns == 1) return;
  _tile_stored(1, sums + kTogether * kNumbers, 64);
  _tile_stored(3, sums + (kTogether + 1) * kNumbers, 64);
}

void multiply(const TileWeight& weight, const TileSource& source, const TileLanes* lanes, int64_t count,
              const Results& results, float* scratch) {
  Config config;
  for (int i = 0; i < 8; ++i) {
    config.bytes[i] = i == 4 || i == 5 ? weight.depth * 4 : 64;
    config.rows[i] = i >= 6 ? weight.depth : kTile;
  }
  written(&config);
  _tile_loadconfig(&config);
  uint32_t* const panel = reinterpret_cast<uint32_t*>(scratch);
  alignas(64) float sums[2][2 * kRows * kTile];  // those of two columns, and those of two that wait
  Pending pending{};
  for (int64_t set = 0, turn = 0; set < weight.sets(); ++set) {
    split_weight(weight, set, panel);
    written(panel);
    const int64_t first = set * kRows, rows = std::min(kRows, weight.rows - first);
    for (int64_t i = 0; i < count; i += 2, turn ^= 1) {
      const int64_t columns = std::min<int64_t>(2, count - i);
      const auto multiply_some = columns == 2 ? multiply_columns<2> : multiply_columns<1>;
      multiply_some(weight, panel, source, lanes + i, sums[turn], pending, results);
      pending = {sums[turn], lanes + i, columns, first, rows};
    }
  }
  put(pending, results);
  _tile_release();
}

}  // namespace

extern const TileKernels kernels = {split, multiply};

}  // namespace sparsekit::amx
