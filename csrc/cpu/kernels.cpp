// The microkernels, compiled once per ISA. Nothing here is parallel: a caller's thread owns the whole tile.
//
// spmm keeps a strip of output lanes in registers and runs over the row's non-zeros: one broadcast and one FMA per
// register, with the tile as memory operand. sddmm keeps a strip of dY in registers, so each non-zero is a dot product
// whose partial sums are one register; kLanes of them are transposed and added at once. Both are bound by one load per
// FMA, hence tiles that fit the first-level cache.

#include "cpu/kernels.h"

#include "cpu/vec.h"

namespace sparsekit::SPARSEKIT_ISA {
namespace {

// Registers of lanes per strip, and at most. More would not lower the load rate much and would need a larger tile.
constexpr int kStrip = kLanes == 16 ? 4 : 8;
constexpr int kMostStrip = kLanes == 16 ? 5 : 8;
constexpr int kWholeStrip = kLanes == 16 ? 7 : 0;  // two rows of 56 pixels, or four of 28; of plain strips alone
constexpr bool kShiftsSums = kLanes == 16;
constexpr bool kMovesLanes = kLanes == 16;
constexpr int kLineFloats = 16;              // in a cache line
constexpr int kLine = kLineFloats / kLanes;  // its registers
constexpr int kFarAhead = 256;               // non-zeros, that their prefetch is ahead
constexpr int kFarFloats = 1024;  // the same, of planes that are read one after the other: CPUs look ahead less

inline void prefetch_far(const float* p) { __builtin_prefetch(p + kFarFloats, 0, 2); }

inline Vec some(const float* p, int64_t lanes) { return lanes == kLanes ? load(p) : load(p, lanes); }
inline void put(float* p, Vec v, int64_t lanes) { lanes == kLanes ? store(p, v) : store(p, v, lanes); }

#if defined(__AVX512F__)
template <bool kZeros>
void put_moved(float* p, Vec v, const Move& move) {
  store_lanes(p + move.at, kZeros ? keep(v, Mask(move.lanes)) : v, kZeros ? move.lanes | move.zeros : move.lanes);
}
#else
template <bool kZeros>
void put_moved(float*, Vec, const Move&) {}
#endif

// Where N registers go. Most go to one place.
template <int N, bool kZeros>
struct Places {
  explicit Places(const Move* moves) : moves(moves) {
    for (int v = 0; v < N; ++v) {
      first[v] = moves[v * Results::kMoves];
      apart |= moves[v * Results::kMoves + 1].lanes != 0;
    }
  }

  void put(float* p, const Vec* registers) const {
    for (int v = 0; v < N; ++v) put_moved<kZeros>(p, registers[v], first[v]);
    if (!apart) return;
    for (int v = 0; v < N; ++v)
      for (int i = 1; i < Results::kMoves && moves[v * Results::kMoves + i].lanes; ++i)
        put_moved<kZeros>(p, registers[v], moves[v * Results::kMoves + i]);
  }

  const Move* moves;
  Move first[N ? N : 1];
  bool apart = false;
};

// The share of a strip in what is wanted soon.
Soon share_of(Soon soon, int64_t strip, int64_t strips) {
  const int64_t first = soon.channels * strip / strips;
  soon.channels = soon.channels * (strip + 1) / strips - first;
  soon.data = soon.channels > 0 && soon.data ? soon.data + first * soon.channel : nullptr;
  return soon;
}

// Prefetches a strip's share of what is wanted soon, a few lines with every row of the weight.
class Ahead {
 public:
  // In a strip, the weight has `rows` rows.
  Ahead(const Soon& soon, int64_t rows) : soon_(soon) {
    if (!soon.data || rows == 0) return;
    left_ = soon.channels * soon.rows * ((soon.floats + kLineFloats - 1) / kLineFloats);
    per_step_ = (left_ + rows - 1) / rows;
  }

  void step() {
    for (int64_t i = 0; i < per_step_ && left_ > 0; ++i, --left_) {
      __builtin_prefetch(soon_.data + row_ * soon_.row + float_, 0, 2);
      if ((float_ += kLineFloats) < soon_.floats) continue;
      float_ = 0;
      if (++row_ < soon_.rows) continue;
      row_ = 0;
      soon_.data += soon_.channel;
    }
  }

 private:
  Soon soon_;
  int64_t row_ = 0, float_ = 0, left_ = 0, per_step_ = 0;
};

// Independent sums of a strip of so many registers, so that FMAs do not wait for each other: eight for two units of a
// latency of four cycles.
constexpr int sums_of(int64_t vectors) {
  return vectors >= 6 || (vectors >= 5 && kRegisters < 32) ? 1 : vectors >= 2 ? 2 : 4;
}

// Into how many strips of about kStrip registers spmm cuts so many: equally long, so that the last is not a short one.
int64_t strips_of(int64_t vectors) {
  const int64_t fewest = (vectors + kMostStrip - 1) / kMostStrip, even = (vectors + kStrip / 2) / kStrip;
  return even > fewest ? even : fewest;
}

int64_t sums(int64_t lanes, int64_t lane) {
  const int64_t vectors = (lanes + kLanes - 1) / kLanes, strips = strips_of(vectors);
  int64_t strip = 0;
  while (vectors * (strip + 1) / strips <= lane / kLanes) ++strip;
  return sums_of(vectors * (strip + 1) / strips - vectors * strip / strips);
}

// What a strip of spmm does, known at compile time: rows can be so short that every branch counts.
enum Does : unsigned {
  kStarts = 1,
  kHasBias = 2,
  kFinishes = 4,  // clamps or masks
  kHasPairs = 8,
  kAhead = 16,      // prefetches what is wanted soon
  kStreams = 32,    // with kStarts, kCounts and kAhead only
  kCounts = 64,     // starts from what counts, as bits say; with kStarts, kStreams and kAhead only
  kMoves = 128,     // with kFinishes; not with kStreams and kCounts
  kHalves = 256,    // with kFinishes; not with kStreams and kCounts; with kMoves, not with runs
  kAnything = 512,  // asks at run time, but for these two; can have a short last register
  kWhole = 1024     // of more registers than others; not with kHasPairs
};

// A strip of N registers, `tail` lanes in the last. All lanes are neighbours, or those of kRun registers if that is not
// 0. What is constant is copied to locals: stores of registers may alias anything, as far as the compiler knows.
template <int N, int kRun, unsigned kDoes>
void spmm_strip(const Tile& tile, Ahead ahead, const Rows& rows, const Results& results, const int64_t first_lane,
                const int64_t tail) {
  constexpr int kSums = sums_of(N);
  constexpr float kInfinity = __builtin_inff();
  constexpr bool kAsks = (kDoes & kAnything) != 0;
  const int64_t count = rows.count, pairs = kShiftsSums && (kAsks || kDoes & kHasPairs) ? rows.pairs : 0;
  const int64_t stride = results.stride, start_stride = results.start_stride;
  const int32_t* const order = rows.order;
  const int32_t* const begin = rows.begin;
  const uint32_t* offsets = rows.offsets + begin[0];
  const float* values = rows.values + begin[0];
  const float* const lanes = tile.lanes + first_lane;
  float* const out = kDoes & (kMoves | kHalves) ? results.data : results.data + first_lane;
  const float* const start = results.start ? results.start + first_lane : nullptr;
  const uint8_t* const counts = kAsks || kDoes & kCounts ? results.counts : nullptr;
  const int64_t counts_stride = results.counts_stride;
  const float* const bias = results.bias;
  const int32_t* const mask = results.mask ? results.mask + first_lane : nullptr;
  const Move* const moves = results.moves + (kDoes & kMoves ? first_lane / kLanes * Results::kMoves : 0);
  const bool far = (kAsks || kDoes & kAhead) && rows.far, lefts = rows.lefts;
  const bool starts = kAsks ? start != nullptr : kDoes & kStarts;
  const bool has_bias = kAsks ? bias != nullptr : (kDoes & kHasBias) != 0;
  const bool capped = results.high < kInfinity;
  const bool finishes = kAsks ? mask || capped || results.low > -kInfinity : (kDoes & kFinishes) != 0;
  const bool whole = !kAsks || tail == kLanes;
  const bool stream = kAsks ? results.stream && whole : (kDoes & kStreams) != 0;
  const bool read_elsewhere = starts && (start != out || results.stream || kDoes & kMoves);
  const Vec low = broadcast(results.low), high = broadcast(results.high);
  // Where a register is, from the first of its row on.
  const int64_t tile_jump = tile.jump, jump = results.jump;
  constexpr int kTogether = kRun ? kRun : N, kTwos = (kTogether + 1) / 2, kAllTwos = N / kTogether * kTwos;
  Halves halves[kAllTwos];
  for (int i = 0; i < kAllTwos && kDoes & kHalves && !(kDoes & kMoves); ++i)
    halves[i] = results.halves[first_lane / (2 * kLanes) + i];
  const Places<kDoes & kMoves ? (kDoes & kHalves ? 2 * kAllTwos : N) : 0, (kDoes & kHalves) != 0> places(moves);
  auto in_tile = [=](int v) { return v / kTogether * tile_jump + v % kTogether * kLanes; };
  auto in_row = [=](int v) { return v / kTogether * jump + v % kTogether * kLanes; };
  // Mostly, all lanes are kept but some in the last register of a run.
  Mask kept[N];
  bool only_ends = true;
  for (int v = 0; v < N; ++v) {
    kept[v] = mask_of(mask ? mask + v * kLanes : nullptr);
    if ((v + 1) % kTogether) only_ends &= keeps_all(kept[v]);
  }
  for (int64_t r = 0; r < count; ++r) {
    const int64_t row = order[r], soon = order[r + Rows::kAhead];
    if (kAsks || kDoes & kAhead) ahead.step();
    if (kDoes & kMoves) {
      for (int v = 0; v < N; ++v) __builtin_prefetch(out + soon * stride + places.first[v].at, 1);
    } else if (kDoes & kHalves) {
      for (const Halves& two : halves) {
        __builtin_prefetch(out + soon * stride + two.even, 1);
        __builtin_prefetch(out + soon * stride + two.odd, 1);
      }
    } else if (kAsks ? !results.stream : !(kDoes & kStreams)) {
      for (int v = 0; v < N; v += kLine) __builtin_prefetch(out + soon * stride + in_row(v), 1);
    }
    if (read_elsewhere) {
      for (int v = 0; v < N; v += kLine) __builtin_prefetch(start + soon * start_stride + in_row(v));
      // What follows in the row is the next strip, or the next tile.
      for (int v = 0; v < N; v += kLine) __builtin_prefetch(start + row * start_stride + in_row(v) + N * kLanes, 0, 2);
    }
    for (int64_t i = 0, length = far ? begin[r + 1] - begin[r] : 0; i < length; i += kLineFloats) {
      __builtin_prefetch(offsets + kFarAhead + i, 0, 2);
      __builtin_prefetch(values + kFarAhead + i, 0, 2);
    }
    Vec sum[kSums][N];
    const Vec first = has_bias ? broadcast(bias[row]) : zero();
    for (int s = 0; s < kSums; ++s)
      for (int v = 0; v < N; ++v) sum[s][v] = s == 0 ? first : zero();
    if (starts) {
      const float* const from = start + row * start_stride;
      for (int v = 0; v < N; ++v) {
        Vec x = whole || v + 1 < N ? load(from + in_row(v)) : load(from + in_row(v), tail);
        if (counts) x = where_positive(x, counts + row * counts_stride, first_lane + in_row(v));
        sum[kSums - 1][v] = kSums == 1 && has_bias ? add(x, first) : x;
      }
    }
#if defined(__AVX512F__)
    if (kAsks ? pairs > 0 : (kDoes & kHasPairs) != 0) {
      Vec from_left[N], from_right[N];
      for (int v = 0; v < N; ++v) from_left[v] = from_right[v] = zero();
      auto add_pair = [&](Vec w0, Vec w1, uint32_t offset0, uint32_t offset1) {
        const float* const x0 = lanes + offset0;
        const float* const x1 = lanes + offset1;
        for (int v = 0; v < N; ++v) from_left[v] = fma(w0, load(x0 + in_tile(v)), from_left[v]);
        for (int v = 0; v < N; ++v) from_right[v] = fma(w1, load(x1 + in_tile(v)), from_right[v]);
      };
      for (int64_t twos = pairs >> 1; twos > 0; --twos, offsets += 4, values += 4) {
        const Weights w = load4(values);
        add_pair(lane<0>(w), lane<1>(w), offsets[0], offsets[1]);
        add_pair(lane<2>(w), lane<3>(w), offsets[2], offsets[3]);
      }
      if (pairs & 1) {
        add_pair(broadcast(values[0]), broadcast(values[1]), offsets[0], offsets[1]);
        offsets += 2, values += 2;
      }
      for (int v = 0; v < N; ++v) {
        if (lefts) {
          from_left[v] = add(from_left[v], from_right[v]);
        } else {
          sum[kSums - 1][v] =
              add(sum[kSums - 1][v], shift_in_first(from_right[v], v + 1 < N ? from_right[v + 1] : zero()));
        }
        sum[0][v] = add(sum[0][v], shift_in_last(v ? from_left[v - 1] : zero(), from_left[v]));
      }
    }
#endif
    const int64_t left = begin[r + 1] - begin[r] - 2 * pairs;
    if (left & 1) {
      const Vec w = broadcast(*values);
      const float* const x = lanes + *offsets;
      for (int v = 0; v < N; ++v) sum[0][v] = fma(w, load(x + in_tile(v)), sum[0][v]);
      ++offsets, ++values;
    }
    if (left & 2) {
      const Vec w0 = broadcast(values[0]), w1 = broadcast(values[1]);
      const float* const x0 = lanes + offsets[0];
      const float* const x1 = lanes + offsets[1];
      for (int v = 0; v < N; ++v) sum[0][v] = fma(w0, load(x0 + in_tile(v)), sum[0][v]);
      for (int v = 0; v < N; ++v) sum[1 % kSums][v] = fma(w1, load(x1 + in_tile(v)), sum[1 % kSums][v]);
      offsets += 2, values += 2;
    }
    for (int64_t fours = left >> 2; fours > 0; --fours, offsets += 4, values += 4) {
      const Weights w = load4(values);
      const float* const x0 = lanes + offsets[0];
      const float* const x1 = lanes + offsets[1];
      const float* const x2 = lanes + offsets[2];
      const float* const x3 = lanes + offsets[3];
      const Vec w0 = lane<0>(w), w1 = lane<1>(w), w2 = lane<2>(w), w3 = lane<3>(w);
      for (int v = 0; v < N; ++v) sum[0][v] = fma(w0, load(x0 + in_tile(v)), sum[0][v]);
      for (int v = 0; v < N; ++v) sum[1 % kSums][v] = fma(w1, load(x1 + in_tile(v)), sum[1 % kSums][v]);
      for (int v = 0; v < N; ++v) sum[2 % kSums][v] = fma(w2, load(x2 + in_tile(v)), sum[2 % kSums][v]);
      for (int v = 0; v < N; ++v) sum[3 % kSums][v] = fma(w3, load(x3 + in_tile(v)), sum[3 % kSums][v]);
    }
    for (int s = 1; s < kSums; ++s)
      for (int v = 0; v < N; ++v) sum[0][v] = add(sum[0][v], sum[s][v]);
    if (finishes) {
      for (int v = 0; v < N; ++v) sum[0][v] = max(low, sum[0][v]);
      if (capped)
        for (int v = 0; v < N; ++v) sum[0][v] = min(high, sum[0][v]);
      if (!only_ends) {
        for (int v = 0; v < N; ++v) sum[0][v] = keep(sum[0][v], kept[v]);
      } else if (mask) {
        for (int v = kTogether - 1; v < N; v += kTogether) sum[0][v] = keep(sum[0][v], kept[v]);
      }
    }
    float* const to = out + row * stride;
    if constexpr ((kDoes & kHalves) != 0) {
      Vec split[2 * kAllTwos];
      for (int i = 0; i < kAllTwos; ++i) {
        const int v = i / kTwos * kTogether + i % kTwos * 2;
        const Vec a = sum[0][v], b = i % kTwos * 2 + 1 < kTogether ? sum[0][v + 1] : zero();
        if (kDoes & kMoves) {
          split[2 * i] = even_lanes(a, b), split[2 * i + 1] = odd_lanes(a, b);
        } else {
          store(to + halves[i].even, even_lanes(a, b));
          store(to + halves[i].odd, odd_lanes(a, b));
        }
      }
      if (kDoes & kMoves) places.put(to, split);
      continue;
    }
    if (kDoes & kMoves) {
      places.put(to, sum[0]);
      continue;
    }
    for (int v = 0; v < N; ++v) {
      if (stream) {
        stream_store(to + in_row(v), sum[0][v]);
      } else {
        whole || v + 1 < N ? store(to + in_row(v), sum[0][v]) : store(to + in_row(v), sum[0][v], tail);
      }
    }
  }
}

using SpmmStrip = decltype(&spmm_strip<1, 0, 0>);

// The strip that does what `does` says; its bits above kBit are those of kDoes.
template <int N, int kRun, unsigned kDoes = 0, unsigned kBit = kAhead>
SpmmStrip strip_that(unsigned does) {
  if constexpr (kBit == 0) {
    return spmm_strip<N, kRun, kDoes>;
  } else if constexpr ((kBit == kHasPairs && (!kShiftsSums || kDoes & kWhole)) ||
                       (kBit == kFinishes && kDoes & (kMoves | kHalves))) {
    return strip_that<N, kRun, kDoes, kBit / 2>(does);
  } else {
    return does & kBit ? strip_that<N, kRun, kDoes | kBit, kBit / 2>(does) : strip_that<N, kRun, kDoes, kBit / 2>(does);
  }
}

// The same for kStreams and kCounts; what counts is what it starts from.
template <int N, int kRun>
SpmmStrip rare_strip_that(unsigned does) {
  switch (does & (kStarts | kAhead | kStreams | kCounts)) {
    case kStreams:
      return spmm_strip<N, kRun, kStreams>;
    case kStreams | kStarts:
      return spmm_strip<N, kRun, kStreams | kStarts>;
    case kStreams | kAhead:
      return spmm_strip<N, kRun, kStreams | kAhead>;
    case kStreams | kStarts | kAhead:
      return spmm_strip<N, kRun, kStreams | kStarts | kAhead>;
    case kCounts | kStarts:
      return spmm_strip<N, kRun, kCounts | kStarts>;
    case kCounts | kStarts | kAhead:
      return spmm_strip<N, kRun, kCounts | kStarts | kAhead>;
    case kCounts | kStarts | kStreams:
      return spmm_strip<N, kRun, kCounts | kStarts | kStreams>;
    default:
      return spmm_strip<N, kRun, kCounts | kStarts | kStreams | kAhead>;
  }
}

// Of `vectors` registers in runs of `run`, for some runs only (see runs_at_once).
template <int N = kMostStrip, int kRun = 0>
SpmmStrip strip_of(int64_t vectors, int64_t run, unsigned does) {
  constexpr int kNext = kRun ? 2 * kRun : kLineFloats / kLanes;
  if (vectors == N && (kRun ? run == kRun : run >= N)) {
    if (does & kAnything) return spmm_strip<N, kRun, kAnything>;
    if (does & (kStreams | kCounts)) return rare_strip_that<N, kRun>(does);
    if constexpr (kMovesLanes && kRun == 0) {
      if (does & kMoves && does & kHalves) return strip_that<N, kRun, kMoves | kHalves | kFinishes>(does);
    }
    if constexpr (kMovesLanes) {
      if (does & kMoves) return strip_that<N, kRun, kMoves | kFinishes>(does);
    }
    if (does & kHalves) return strip_that<N, kRun, kHalves | kFinishes>(does);
    return strip_that<N, kRun>(does);
  }
  if constexpr (kNext < N && N % kNext == 0) {
    if (vectors == N) return strip_of<N, kNext>(vectors, run, does);
  }
  if constexpr (N > 1) return strip_of<N - 1, 0>(vectors, run, does);
  return nullptr;
}

// How many runs of so many registers a strip can hold.
int64_t runs_at_once(int64_t run) {
  for (int64_t known = kLineFloats / kLanes; 2 * known <= kMostStrip; known *= 2)
    if (run == known) return kMostStrip / run;
  return 1;
}

void spmm(const Tile& tile, const Rows& rows, const Results& results, int64_t lanes) {
  const bool clamps = results.low > -__builtin_inff() || results.high < __builtin_inff();
  unsigned does = (results.start ? kStarts : 0) | (results.bias ? kHasBias : 0) |
                  (results.mask || clamps ? kFinishes : 0) | (rows.pairs ? kHasPairs : 0) |
                  (tile.soon.data || rows.far ? kAhead : 0) | (results.moves ? kMoves : 0) |
                  (results.halves || results.splits ? kHalves : 0);
  const bool rare = does & (kHasBias | kFinishes | kHasPairs) && (results.stream || results.counts);
  if (rare) does |= kAnything;
  if (results.stream) does |= kStreams;
  if (results.counts) does |= kCounts;
  if (tile.run < lanes) {
    const int64_t runs = lanes / tile.run, vectors = tile.run / kLanes, most = runs_at_once(vectors);
    const int64_t strips = (runs + most - 1) / most;
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t first = runs * strip / strips, count = runs * (strip + 1) / strips - first;
      const Tile part{tile.lanes + first * tile.jump, share_of(tile.soon, strip, strips), tile.run, tile.jump};
      Results to = results;
      if (to.moves)
        to.moves += first * vectors * Results::kMoves;
      else
        to.data += first * results.jump;
      if (to.start) to.start += first * results.jump;
      if (to.counts) to.counts += first * results.jump / 8;
      if (to.mask) to.mask += first * tile.run;
      if (to.halves) to.data = results.data, to.halves += first * ((vectors + 1) / 2);
      if (count == 1) {
        spmm(part, rows, to, tile.run);
      } else {
        strip_of(count * vectors, vectors, does)(part, Ahead(part.soon, rows.count), rows, to, 0, kLanes);
      }
    }
    return;
  }
  if constexpr (kWholeStrip > 0) {
    constexpr unsigned kPlain = kStarts | kHasBias | kFinishes | kAhead;
    if (tile.whole && lanes == kWholeStrip * kLanes && (does & ~kPlain) == 0)
      return strip_that<kWholeStrip, 0, kWhole>(does)(tile, Ahead(tile.soon, rows.count), rows, results, 0, kLanes);
  }
  const int64_t all = (lanes + kLanes - 1) / kLanes, strips = strips_of(all);
  auto cut = [&](int64_t strip) {
    const int64_t first = all * strip / strips;
    return does & kHalves && strip < strips ? first + first % 2 : first;
  };
  for (int64_t strip = 0; strip < strips; ++strip) {
    const int64_t first = cut(strip), vectors = cut(strip + 1) - first;
    const int64_t begin = first * kLanes, left = lanes - begin;
    const int64_t tail = left >= vectors * kLanes ? kLanes : left - (vectors - 1) * kLanes;
    const Ahead ahead(share_of(tile.soon, strip, strips), rows.count);
    strip_of(vectors, vectors, tail < kLanes ? kAnything : does)(tile, ahead, rows, results, begin, tail);
  }
  if (results.stream) stream_fence();
}

// N registers of lanes of R rows at once: what is loaded from the tile serves all of them, so that FMAs are the bound.
template <int R, int N>
void gemm_strip(const float* lanes, const uint32_t* offsets, const float* values, int64_t terms, const Results& results,
                int64_t row, int64_t rows, int64_t first_lane, int64_t tail) {
  float* const out = results.data + row * results.stride;
  const int64_t stride = results.stride;
  for (int r = 0; r < R && !results.moves; ++r)
    for (int v = 0; v < N; v += kLine)
      __builtin_prefetch(out + (r < rows ? r : 0) * stride + first_lane + v * kLanes, 1);
  Vec sum[R][N];
  for (int r = 0; r < R; ++r) {
    const Vec first = results.bias && r < rows ? broadcast(results.bias[row + r]) : zero();
    for (int v = 0; v < N; ++v) sum[r][v] = first;
    if (!results.start || r >= rows) continue;
    const float* const start = results.start + (row + r) * results.start_stride + first_lane;
    for (int v = 0; v < N; ++v) sum[r][v] = add(first, some(start + v * kLanes, v + 1 < N ? kLanes : tail));
  }
  for (int64_t k = 0; k < terms; ++k, values += Panels::kRows) {
    const float* const from = lanes + offsets[k];
    Vec x[N];
    for (int v = 0; v < N; ++v) x[v] = load(from + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const Vec w = broadcast(values[r]);
      for (int v = 0; v < N; ++v) sum[r][v] = fma(w, x[v], sum[r][v]);
    }
  }
  const Vec low = broadcast(results.low), high = broadcast(results.high);
  for (int v = 0; v < N; ++v) {
    const Mask kept = mask_of(results.mask ? results.mask + first_lane + v * kLanes : nullptr);
    for (int r = 0; r < R; ++r) {
      if (r >= rows) break;
      const Vec y = keep(min(high, max(low, sum[r][v])), kept);
      if (results.moves) {
        Places<1, false>(results.moves + (first_lane / kLanes + v) * Results::kMoves).put(out + r * stride, &y);
      } else {
        put(out + r * stride + first_lane + v * kLanes, y, v + 1 < N ? kLanes : tail);
      }
    }
  }
}

void gemm(const Tile& tile, const Panels& panels, const Results& results, int64_t lanes) {
  constexpr int kMost = kRegisters >= 32 ? 4 : 2, kRows = Panels::kRows;
  constexpr decltype(&gemm_strip<kRows, 1>) kStrips[] = {gemm_strip<kRows, 1>, gemm_strip<kRows, 2>,
                                                         gemm_strip<kRows, (kMost > 2 ? 3 : 1)>,
                                                         gemm_strip<kRows, (kMost > 2 ? 4 : 1)>};
  const int64_t run = tile.run < lanes ? tile.run : lanes;
  Results to = results;
  for (int64_t at = 0, jump = 0; at < lanes; at += run, jump += tile.jump) {
    const int64_t all = (run + kLanes - 1) / kLanes, strips = (all + kMost - 1) / kMost;
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t first = all * strip / strips, vectors = all * (strip + 1) / strips - first;
      const int64_t begin = first * kLanes, left = run - begin;
      const int64_t tail = left >= vectors * kLanes ? kLanes : left - (vectors - 1) * kLanes;
      for (int64_t row = 0; row < panels.rows; row += kRows) {
        const float* const values = panels.values + row * panels.terms;
        const int64_t rows = panels.rows - row < kRows ? panels.rows - row : kRows;
        kStrips[vectors - 1](tile.lanes + jump + begin, panels.offsets, values, panels.terms, to, row, rows, begin,
                             tail);
      }
    }
    if (to.moves)
      to.moves += run / kLanes * Results::kMoves;
    else
      to.data += results.jump;
    if (to.start) to.start += results.jump;
    if (to.mask) to.mask += run;
  }
}

// N registers of lanes of R rows of the weight at once. Those that there are not compute what the first does.
template <int R, int N>
void product_strip(const float* weight, int64_t weight_row, int64_t rows, const float* x, int64_t x_row, int64_t terms,
                   float* to, int64_t to_row) {
  const float* row[R];
  for (int r = 0; r < R; ++r) row[r] = weight + (r < rows ? r : 0) * weight_row;
  Vec sum[R][N];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < N; ++v) sum[r][v] = zero();
  for (int64_t k = 0; k < terms; ++k, x += x_row) {
    Vec factor[N];
    for (int v = 0; v < N; ++v) factor[v] = load(x + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const Vec w = broadcast(row[r][k]);
      for (int v = 0; v < N; ++v) sum[r][v] = fma(w, factor[v], sum[r][v]);
    }
  }
  for (int r = 0; r < R && r < rows; ++r)
    for (int v = 0; v < N; ++v) {
      float* const at = to + r * to_row + v * kLanes;
      store(at, add(load(at), sum[r][v]));
    }
}

void add_products(const float* weight, int64_t weight_row, int64_t rows, const float* x, int64_t x_row, int64_t terms,
                  float* to, int64_t to_row, int64_t lanes) {
  // As many sums as there are registers for, and enough that FMAs do not wait for each other.
  constexpr int kMost = kRegisters >= 32 ? 4 : 2, kRows = 6, kMany = 12;
  for (int64_t lane = 0; lane < lanes;) {
    const int64_t vectors = (lanes - lane) / kLanes;
    const int n = vectors >= kMost ? kMost : vectors >= 2 ? 2 : 1, step = n == 1 ? kMany : kRows;
    const auto strip = n == kMost ? product_strip<kRows, kMost>
                       : n == 2   ? product_strip<kRows, 2>
                                  : product_strip<kMany, 1>;
    for (int64_t r = 0; r < rows; r += step)
      strip(weight + r * weight_row, weight_row, rows - r, x + lane, x_row, terms, to + r * to_row + lane, to_row);
    lane += n * kLanes;
  }
}

// R rows of the weight at once, for N images. Rows that there are not compute what the first does.
template <int R, int N>
void dots_strip(const float* weight, int64_t weight_row, int64_t rows, const float* x, int64_t x_row, int64_t terms,
                float* to, int64_t to_row) {
  const float* row[R];
  for (int r = 0; r < R; ++r) row[r] = weight + (r < rows ? r : 0) * weight_row;
  Vec sum[R][N];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < N; ++i) sum[r][i] = zero();
  for (int64_t k = 0; k < terms; k += kLanes) {
    const int64_t count = terms - k < kLanes ? terms - k : kLanes;
    Vec factor[N];
    for (int i = 0; i < N; ++i) factor[i] = some(x + i * x_row + k, count);
    for (int r = 0; r < R; ++r) {
      const Vec w = some(row[r] + k, count);
      for (int i = 0; i < N; ++i) sum[r][i] = fma(w, factor[i], sum[r][i]);
    }
  }
  for (int r = 0; r < R && r < rows; ++r)
    for (int i = 0; i < N; ++i) {
      alignas(64) float lanes[kLanes];
      store(lanes, sum[r][i]);
      for (int half = kLanes / 2; half > 0; half /= 2)
        for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
      to[i * to_row + r] += lanes[0];
    }
}

void dots(const float* weight, int64_t weight_row, int64_t rows, const float* x, int64_t x_row, int64_t images,
          int64_t terms, float* to, int64_t to_row) {
  constexpr int kSums = 8;  // so that FMAs do not wait for each other
  constexpr decltype(&dots_strip<1, 1>) kStrips[] = {dots_strip<kSums, 1>, dots_strip<kSums / 2, 2>,
                                                     dots_strip<kSums / 2, 3>, dots_strip<kSums / 4, 4>};
  const int64_t most = kDotImages, step = images == 1 ? kSums : images < most ? kSums / 2 : kSums / 4;
  for (int64_t r = 0; r < rows; r += step)
    kStrips[images - 1](weight + r * weight_row, weight_row, rows - r, x, x_row, terms, to + r, to_row);
}

// Where a register of results of `paired` goes.
struct PairedPlace {
  int64_t at;     // from the first result of a row of the weight on, in the first of two rows of results
  bool whole;     // all of it, to neighbours
  int64_t count;  // rows of results that there are: two, but perhaps in the last run
};

// N registers of lanes of R rows of the weight: half of the sums are for either result of a row. x: what the terms
// read.
template <int R, int N>
void paired_strip(const float* x, const PairedPanels& panels, const float* values, const Results& results, int64_t row,
                  int64_t rows, const PairedPlace (&places)[2 * N], float* parts) {
  float* const out = results.data + row * results.stride;
  for (int i = 0; i < 2 * N; i += kLine)
    for (int64_t y = 0; y < places[i].count; ++y) {
      const float* const first = out + y * results.jump + places[i].at;
      const int64_t stride = results.stride;
      for (int r = 0; r < R; ++r) __builtin_prefetch(first + (r < rows ? r : 0) * stride, 1);
    }
  // start(i, r, v): what is added to result i of a row; finish(i, r, v, sum).
  auto add_part = [&](const PairedPanels::Part& part, const auto& start, const auto& finish) {
    Vec sum[2][R][N];
    for (int i = 0; i < 2; ++i)
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < N; ++v) sum[i][r][v] = zero();
    auto add_product = [](Vec(&sums)[R][N], const float* from, const float* w) {
      for (int r = 0; r < R; ++r) {
        const Vec factor = broadcast(w[r]);
        for (int v = 0; v < N; ++v) sums[r][v] = fma(factor, load(from + v * kLanes), sums[r][v]);
      }
    };
    auto add_terms = [&](int64_t count) {
      const float *from = x, *w = values;
      for (int64_t k = 0; k < count; ++k, from += 2 * N * kLanes, w += 2 * PairedPanels::kRows) {
        add_product(sum[0], from, w);
        add_product(sum[1], from + N * kLanes, w + PairedPanels::kRows);
      }
      x = from, values = w;
    };
    add_terms(part.mixed);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < N; ++v) {
        const Vec p = sum[0][r][v], q = sum[1][r][v];
        sum[0][r][v] = add(start(0, r, v), add(p, q));
        sum[1][r][v] = add(start(1, r, v), fma(broadcast(-1), q, p));
      }
    add_terms(part.terms - part.mixed);
    for (int i = 0; i < 2; ++i)
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < N; ++v) finish(i, r, v, sum[i][r][v]);
  };
  alignas(64) float held[2][2][R][N][kLanes];  // of both rows of results
  add_part(
      panels.parts[0], [&](int, int r, int) { return broadcast(results.bias[r < rows ? row + r : row]); },
      [&](int i, int r, int v, Vec sum) { store(held[0][i][r][v], sum); });
  add_part(
      panels.parts[1], [](int, int, int) { return zero(); },
      [&](int i, int r, int v, Vec sum) {
        const Vec both = load(held[0][i][r][v]);
        store(held[0][i][r][v], add(both, sum));
        store(held[1][i][r][v], fma(broadcast(-1), sum, both));
      });
  const Vec low = broadcast(results.low), high = broadcast(results.high);
  for (int y = 0; y < 2; ++y) {
    auto& mine = held[y];
    add_part(
        panels.parts[2 + y], [&](int i, int r, int v) { return load(mine[i][r][v]); },
        [&](int i, int r, int v, Vec sum) { store(mine[i][r][v], min(high, max(low, sum))); });
    for (int r = 0; r < R && r < rows; ++r)
      for (int v = 0; v < N; ++v) {
        const Vec a = load(mine[0][r][v]), b = load(mine[1][r][v]);
        for (int half = 0; half < 2; ++half) {
          const PairedPlace& place = places[2 * v + half];
          if (y >= place.count) continue;
          float* const part = parts + ((y * 2 * N + 2 * v + half) * R + r) * kLanes;
          float* const to = place.whole ? out + r * results.stride + y * results.jump + place.at : part;
          store(to, half ? zip_second(a, b) : zip_first(a, b));
        }
      }
  }
}

// The strip's part of what the terms read is brought together first, for all rows of the weight.
template <int R, int N>
void paired_strips(const float* tile, const PairedPanels& panels, const Results& results, int64_t first_lane,
                   int64_t lanes, int64_t run, int64_t height, int64_t width, float* scratch) {
  constexpr int kRows = PairedPanels::kRows;
  const PairedPanels::Source* const sources = panels.sources;
  const float* const strip = tile + first_lane;
  for (int64_t i = 0, reads = 2 * panels.terms; i < reads; ++i) {
    const auto [a, b, scale] = sources[i];
    float* const to = scratch + i * N * kLanes;
    for (int v = 0; v < N; ++v) {
      const Vec x = load(strip + a + v * kLanes);
      store(to + v * kLanes, scale == 0 ? x : fma(broadcast(scale), load(strip + b + v * kLanes), x));
    }
  }
  float parts[2][2 * N][R][kLanes];
  PairedPlace places[2 * N];
  for (int i = 0; i < 2 * N; ++i) {
    const int64_t first = 2 * first_lane + i * kLanes, y = first / (2 * run) * 2, col = first % (2 * run);
    places[i] = {y * results.jump + col, col + kLanes <= width && first + kLanes <= 2 * lanes,
                 height - y < 2 ? height - y : 2};
  }
  for (int64_t row = 0; row < panels.rows; row += R) {
    const float* const values = panels.values + row / kRows * kRows * 2 * panels.terms + row % kRows;
    paired_strip<R, N>(scratch, panels, values, results, row, panels.rows - row, places, parts[0][0][0]);
    for (int i = 0; i < 2 * N; ++i) {
      if (places[i].whole) continue;
      for (int64_t r = row; r < row + R && r < panels.rows; ++r)
        for (int64_t k = 0, first = 2 * first_lane + i * kLanes; k < kLanes && first + k < 2 * lanes; ++k) {
          const int64_t col = (first + k) % (2 * run), y = (first + k) / (2 * run) * 2;
          for (int64_t second = 0; second < 2 && col < width && y + second < height; ++second)
            results.data[r * results.stride + (y + second) * results.jump + col] = parts[second][i][r - row][k];
        }
    }
  }
}

void paired(const float* tile, const PairedPanels& panels, const Results& results, int64_t lanes, int64_t run,
            int64_t height, int64_t width, float* scratch) {
  constexpr int kRows = PairedPanels::kRows, kSome = kRegisters >= 32 ? kRows : kRows / 2;
  for (int64_t lane = 0; lane < lanes; lane += 2 * kLanes) {
    if (lane + kLanes >= lanes) {
      paired_strips<kRows, 1>(tile, panels, results, lane, lanes, run, height, width, scratch);
    } else {
      paired_strips<kSome, 2>(tile, panels, results, lane, lanes, run, height, width, scratch);
    }
  }
}

#if defined(__AVX512F__)

// Rows of a 16 x 16 block become columns; four rounds of pairwise exchanges at distance 1, 2, 4, 8.
inline void transpose_block(Vec (&m)[16]) {
  Vec t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(m[i], m[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(m[i], m[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    m[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    m[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    m[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    m[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 16; i += 8) {
    for (int k = 0; k < 4; ++k) {
      t[i + k] = _mm512_shuffle_f32x4(m[i + k], m[i + k + 4], 0x88);
      t[i + k + 4] = _mm512_shuffle_f32x4(m[i + k], m[i + k + 4], 0xdd);
    }
  }
  for (int k = 0; k < 8; ++k) {
    m[k] = _mm512_shuffle_f32x4(t[k], t[k + 8], 0x88);
    m[k + 8] = _mm512_shuffle_f32x4(t[k], t[k + 8], 0xdd);
  }
}

// Adds groups of kLanes / 4 results of sum4: lane 4 * i + k is the whole sum of sum k of m[i].
inline Vec fold(const Vec (&m)[4]) {
  const Vec a = add(_mm512_shuffle_f32x4(m[0], m[1], 0x88), _mm512_shuffle_f32x4(m[0], m[1], 0xdd));
  const Vec b = add(_mm512_shuffle_f32x4(m[2], m[3], 0x88), _mm512_shuffle_f32x4(m[2], m[3], 0xdd));
  return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// In every 128-bit quarter, lane k is the sum of that quarter of the k-th argument.
inline Vec sum4(Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Vec cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  return add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
}

#elif defined(__AVX2__)

inline void transpose_block(Vec (&m)[8]) {
  Vec t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(m[i], m[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(m[i], m[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    m[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    m[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    m[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    m[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int k = 0; k < 4; ++k) t[k] = m[k], t[k + 4] = m[k + 4];
  for (int k = 0; k < 4; ++k) {
    m[k] = _mm256_permute2f128_ps(t[k], t[k + 4], 0x20);
    m[k + 4] = _mm256_permute2f128_ps(t[k], t[k + 4], 0x31);
  }
}

inline Vec fold(const Vec (&m)[2]) {
  return add(_mm256_permute2f128_ps(m[0], m[1], 0x20), _mm256_permute2f128_ps(m[0], m[1], 0x31));
}

inline Vec sum4(Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const Vec cd = add(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  return add(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
}

#else

inline void transpose_block(Vec (&m)[kLanes]) {
  for (int i = 0; i < kLanes; ++i)
    for (int k = 0; k < i; ++k) {
      const float x = m[i][k];
      m[i][k] = m[k][i];
      m[k][i] = x;
    }
}

inline Vec fold(const Vec (&m)[1]) { return m[0]; }

inline Vec sum4(Vec a, Vec b, Vec c, Vec d) {
  Vec m[4] = {a, b, c, d};
  transpose_block(m);
  return add(add(m[0], m[1]), add(m[2], m[3]));
}

#endif

// Partial sums of four non-zeros share a register; kLanes / 4 such registers, across rows, are folded at once.
class PartialSums {
 public:
  explicit PartialSums(float* grad) : grad_(grad) {}

  void push(Vec a, Vec b, Vec c, Vec d) {
    store(queue_ + count_ * kLanes, sum4(a, b, c, d));
    if (++count_ < kLanes / 4) return;
    store(grad_, add(load(grad_), folded()));
    grad_ += kLanes;
    count_ = 0;
  }

  void finish() {
    if (count_ == 0) return;
    for (int i = count_; i < kLanes / 4; ++i) store(queue_ + i * kLanes, zero());
    store(grad_, add(load(grad_, 4 * count_), folded()), 4 * count_);
  }

 private:
  Vec folded() const {
    Vec m[kLanes / 4];
    for (int i = 0; i < kLanes / 4; ++i) m[i] = load(queue_ + i * kLanes);
    return fold(m);
  }

  alignas(64) float queue_[kLanes / 4 * kLanes];
  float* grad_;
  int count_ = 0;
};

template <int N>
void sddmm_strip(const float* tile, Ahead ahead, const Rows& rows, const float* dy, int64_t dy_stride, int64_t tail,
                 float* grad) {
  const uint32_t* offsets = rows.offsets;
  PartialSums sums(grad);
  for (int64_t r = 0; r < rows.count; ++r) {
    int64_t j = rows.begin[r];
    const int64_t end = rows.begin[r + 1];
    ahead.step();
    if (j == end) continue;
    const float* from = dy + rows.order[r] * dy_stride;
    const float* soon = dy + rows.order[r + Rows::kAhead] * dy_stride;
    for (int f = 0; f < N * kLanes; f += kLineFloats) __builtin_prefetch(soon + f);
    // What follows in the row is the next strip, or the next tile: dY too large for the caches is waited for else.
    for (int f = 0; f < N * kLanes; f += kLineFloats) __builtin_prefetch(from + N * kLanes + f, 0, 2);
    Vec d[N];
    for (int v = 0; v < N - 1; ++v) d[v] = load(from + v * kLanes);
    d[N - 1] = tail == kLanes ? load(from + (N - 1) * kLanes) : load(from + (N - 1) * kLanes, tail);
    for (; j < end; j += 4) {
      const float* x[4] = {tile + offsets[j], tile + offsets[j + 1], tile + offsets[j + 2], tile + offsets[j + 3]};
      Vec sum[4];
      for (int k = 0; k < 4; ++k) sum[k] = mul(d[0], load(x[k]));
      for (int v = 1; v < N; ++v)
        for (int k = 0; k < 4; ++k) sum[k] = fma(d[v], load(x[k] + v * kLanes), sum[k]);
      sums.push(sum[0], sum[1], sum[2], sum[3]);
    }
  }
  sums.finish();
}

constexpr decltype(&sddmm_strip<1>) kSddmmStrips[] = {sddmm_strip<1>, sddmm_strip<2>, sddmm_strip<3>, sddmm_strip<4>,
                                                      sddmm_strip<5>, sddmm_strip<6>, sddmm_strip<7>, sddmm_strip<8>};

void sddmm(const Tile& tile, const Rows& rows, const float* dy, int64_t dy_stride, int64_t lanes, float* grad) {
  constexpr int kStripDy = 8;
  grad += rows.begin[0];
  for (int64_t begin = 0; begin < lanes; begin += kStripDy * kLanes) {
    const int64_t left = lanes - begin;
    const int64_t vectors = left >= kStripDy * kLanes ? kStripDy : (left + kLanes - 1) / kLanes;
    const int64_t tail = left >= kStripDy * kLanes ? kLanes : left - (vectors - 1) * kLanes;
    const float* x = tile.lanes + begin;
    const int64_t strips = (lanes + kStripDy * kLanes - 1) / (kStripDy * kLanes);
    const Ahead ahead(share_of(tile.soon, begin / (kStripDy * kLanes), strips), rows.count);
    const float* d = dy + begin;
    kSddmmStrips[vectors - 1](x, ahead, rows, d, dy_stride, tail, grad);
  }
}

void interleave(float* to, int64_t to_row, const float* even, const float* odd, int64_t even_row, int64_t odd_row,
                int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r, to += to_row, even += even_row, odd += odd_row) {
    for (int64_t c = 0; c < cols; c += 2 * kLanes) {
      const int64_t n = cols - c < 2 * kLanes ? cols - c : 2 * kLanes;
      const Vec a = some(even + c / 2, (n + 1) / 2), b = some(odd + c / 2, n / 2);
      put(to + c, zip_first(a, b), n < kLanes ? n : kLanes);
      if (n > kLanes) put(to + c + kLanes, zip_second(a, b), n - kLanes);
    }
  }
}

// Lane i is from[i * stride], for n lanes.
inline Vec every(const float* from, int64_t stride, int64_t n) {
  if (stride == 1) return some(from, n);
  if (stride == 2) {
    const int64_t floats = 2 * n - 1;
    const Vec low = some(from, floats < kLanes ? floats : kLanes);
    return even_lanes(low, floats > kLanes ? load(from + kLanes, floats - kLanes) : zero());
  }
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = from[i * stride];
  return load(lanes);
}

void split(float* even, float* odd, int64_t to_row, const float* from, int64_t from_row, int64_t rows,
           int64_t even_cols, int64_t odd_cols, int64_t room) {
  const int64_t floats = 2 * even_cols - 1 > 2 * odd_cols ? 2 * even_cols - 1 : 2 * odd_cols;
  auto left = [](int64_t n) { return n < 0 ? 0 : n < kLanes ? n : kLanes; };
  for (int64_t r = 0; r < rows; ++r, even += to_row, odd += to_row, from += from_row) {
    int64_t c = 0;
    for (; c + kLanes <= even_cols && c + kLanes <= odd_cols; c += kLanes) {
      const Vec low = load(from + 2 * c), high = load(from + 2 * c + kLanes);
      store(even + c, even_lanes(low, high));
      store(odd + c, odd_lanes(low, high));
    }
    for (; 2 * c < floats; c += kLanes) {
      const Vec low = some(from + 2 * c, left(floats - 2 * c));
      const Vec high = some(from + 2 * c + kLanes, left(floats - 2 * c - kLanes));
      put(even + c, even_lanes(low, high), c + kLanes <= room ? kLanes : left(even_cols - c));
      put(odd + c, odd_lanes(low, high), c + kLanes <= room ? kLanes : left(odd_cols - c));
    }
  }
}

void gather(float* to, int64_t to_row, const float* from, int64_t from_row, int64_t from_col, int64_t rows,
            int64_t cols, int64_t room) {
  for (int64_t r = 0; r < rows; ++r, to += to_row, from += from_row) {
    int64_t c = 0;
    if (from_col == 1) {
      for (; c + kLanes <= cols; c += kLanes) store(to + c, load(from + c));
    } else if (from_col == 2) {
      // A register more than its last float is read from.
      for (; c + kLanes < cols; c += kLanes) store(to + c, even_lanes(load(from + 2 * c), load(from + 2 * c + kLanes)));
    }
    for (; c < cols; c += kLanes) {
      const int64_t n = cols - c < kLanes ? cols - c : kLanes, floats = 2 * n - 1;
      const float* const p = from + c * from_col;
      const Vec v = from_col != 2     ? every(p, from_col, n)
                    : floats > kLanes ? even_lanes(load(p), load(p + kLanes, floats - kLanes))
                                      : even_lanes(some(p, floats), zero());
      put(to + c, v, c + kLanes <= room ? kLanes : n);
    }
  }
}

void clear(float* to, int64_t to_row, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r, to += to_row) {
    for (int64_t c = 0; c < cols; c += kLanes) put(to + c, zero(), cols - c < kLanes ? cols - c : kLanes);
  }
}

void scatter(float* to, int64_t to_row, int64_t to_col, const float* from, int64_t from_row, int64_t rows,
             int64_t cols) {
  if (to_col == 1) return gather(to, to_row, from, from_row, 1, rows, cols, 0);
  for (int64_t r = 0; r < rows; ++r, to += to_row, from += from_row) {
    for (int64_t c = 0; c < cols; ++c) to[c * to_col] = from[c];
  }
}

void add_spread(float* to, int64_t to_row, int64_t to_col, const float* from, int64_t from_row, int64_t rows,
                int64_t cols) {
  for (int64_t r = 0; r < rows; ++r, to += to_row, from += from_row) {
    int64_t c = 0;
    constexpr int64_t kHalf = kLanes / 2;
    for (; to_col == 2 && c < cols; c += kHalf) {
      // What lies behind the last column may be another thread's.
      const int64_t n = cols - c < kHalf ? cols - c : kHalf, reach = c + kHalf < cols ? kLanes : 2 * n - 1;
      // -0 changes nothing that it is added to.
      const Vec spread = zip_first(load(from + c, n), broadcast(-0.f));
      put(to + 2 * c, add(some(to + 2 * c, reach), spread), reach);
    }
    for (; c < cols; ++c) to[c * to_col] += from[c];
  }
}

void transpose(float* to, int64_t to_row, const float* from, int64_t from_row, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int64_t height = rows - r < kLanes ? rows - r : kLanes;
    for (int64_t c = 0; c < cols; c += kLanes) {
      const int64_t width = cols - c < kLanes ? cols - c : kLanes;
      const float* block = from + r * from_row + c;
      Vec m[kLanes];
      if (width == kLanes) {
        for (int i = 0; i < kLanes; ++i) m[i] = i < height ? load(block + i * from_row) : zero();
      } else {
        for (int i = 0; i < kLanes; ++i) m[i] = i < height ? load(block + i * from_row, width) : zero();
      }
      transpose_block(m);
      float* corner = to + c * to_row + r;
      if (height == kLanes) {
        for (int i = 0; i < width; ++i) store(corner + i * to_row, m[i]);
      } else {
        for (int i = 0; i < width; ++i) store(corner + i * to_row, m[i], height);
      }
    }
  }
}

// Windows [first, last) of a kernel's taps that lie inside of [0, size), for the window that starts at `start`.
struct Taps {
  int64_t first, last;
  Taps(int64_t start, int64_t taps, int64_t dilation, int64_t size) {
    first = start < 0 ? (-start + dilation - 1) / dilation : 0;
    const int64_t room = size - start;
    last = room <= 0 ? 0 : (room + dilation - 1) / dilation;
    if (last > taps) last = taps;
  }
};

constexpr float kLowest = -__builtin_inff();

// Channels are the lanes; where the target is NCHW, blocks of pixels are transposed on their way out.
void max_pool_row_channels_last(const Pool2dGeometry& g, const Images& in, const Images& out, int64_t y) {
  const int64_t top = y * g.stride_h - g.pad_top;
  const Taps down(top, g.kernel_h, g.dilation_h, g.in_h);
  for (int64_t x = 0; x < g.out_w; x += kLanes) {
    const int64_t pixels = g.out_w - x < kLanes ? g.out_w - x : kLanes;
    for (int64_t c = 0; c < g.channels; c += kLanes) {
      const int64_t count = g.channels - c < kLanes ? g.channels - c : kLanes;
      Vec best[kLanes];
      for (int64_t i = 0; i < pixels; ++i) {
        const int64_t left = (x + i) * g.stride_w - g.pad_left;
        const Taps across(left, g.kernel_w, g.dilation_w, g.in_w);
        Vec m = broadcast(kLowest);
        for (int64_t ky = down.first; ky < down.last; ++ky) {
          const float* row = in.data + (top + ky * g.dilation_h) * in.row + left * in.col + c;
          for (int64_t kx = across.first; kx < across.last; ++kx) {
            const float* from = row + kx * g.dilation_w * in.col;
            m = max_or_nan(count == kLanes ? load(from) : load(from, count), m);
          }
        }
        best[i] = m;
      }
      if (out.channel == 1) {
        float* to = out.data + y * out.row + x * out.col + c;
        for (int64_t i = 0; i < pixels; ++i, to += out.col)
          count == kLanes ? store(to, best[i]) : store(to, best[i], count);
      } else {
        for (int64_t i = pixels; i < kLanes; ++i) best[i] = zero();
        transpose_block(best);
        float* to = out.data + y * out.row + x + c * out.channel;
        for (int64_t i = 0; i < count; ++i, to += out.channel)
          pixels == kLanes ? store(to, best[i]) : store(to, best[i], pixels);
      }
    }
  }
}

struct Largest {
  static constexpr float kNothing = kLowest;
  static Vec join(Vec a, Vec b) { return max_or_nan(a, b); }
};
struct Sum {
  static constexpr float kNothing = 0;
  static Vec join(Vec a, Vec b) { return add(a, b); }
};

// Pixels are the lanes: each column of the window's rows is joined, then neighbouring columns are, a few channels at a
// time: what was stored a moment ago cannot be loaded yet in other registers than those it came from. finish(row) comes
// last.
template <class How, class Finish>
void pool_row_nchw(const Pool2dGeometry& g, const Images& in, const Images& out, int64_t y, float* scratch,
                   const Finish& finish) {
  const int64_t top = y * g.stride_h - g.pad_top;
  const Taps down(top, g.kernel_h, g.dilation_h, g.in_h);
  const int64_t reach = (g.out_w - 1) * g.stride_w + (g.kernel_w - 1) * g.dilation_w + 1;
  const int64_t width = reach > g.pad_left + g.in_w ? reach : g.pad_left + g.in_w;
  // There are floats enough behind what is wanted.
  auto taps = [&](const float* from, int64_t n) {
    return g.stride_w == 2 ? even_lanes(load(from), load(from + kLanes)) : every(from, g.stride_w, n);
  };
  for (int64_t i = 0; i < kPoolChannels * width; ++i) scratch[i] = How::kNothing;
  for (int64_t first = 0; first < g.channels; first += kPoolChannels) {
    const int64_t end = first + kPoolChannels < g.channels ? first + kPoolChannels : g.channels;
    float* columns = scratch;
    for (int64_t c = first; c < end && down.first < down.last; ++c, columns += width) {
      const float* const image = in.data + c * in.channel + (top + down.first * g.dilation_h) * in.row;
      for (int64_t x = 0; x < g.in_w; x += kLanes) {
        const int64_t n = g.in_w - x < kLanes ? g.in_w - x : kLanes;
        const float* from = image + x;
        Vec v = some(from, n);
        for (int64_t ky = down.first + 1; ky < down.last; ++ky)
          v = How::join(some(from += g.dilation_h * in.row, n), v);
        put(columns + g.pad_left + x, v, n);
      }
    }
    columns = scratch;
    for (int64_t c = first; c < end; ++c, columns += width) {
      float* const to = out.data + c * out.channel + y * out.row;
      for (int64_t x = 0; x < g.out_w; x += kLanes) {
        const int64_t n = g.out_w - x < kLanes ? g.out_w - x : kLanes;
        const float* from = columns + x * g.stride_w;
        Vec v = taps(from, n);
        for (int64_t kx = 1; kx < g.kernel_w; ++kx) v = How::join(taps(from += g.dilation_w, n), v);
        put(to + x, v, n);
      }
      finish(to);
    }
  }
}

// A row of `cols` floats from those at even and odd places.
inline void join(float* to, const float* even, const float* odd, int64_t cols, bool stream) {
  if (!stream) return interleave(to, 0, even, odd, 0, 0, 1, cols);
  for (int64_t c = 0; c < cols; c += 2 * kLanes) {
    const Vec a = load(even + c / 2), b = load(odd + c / 2);
    stream_store(to + c, zip_first(a, b));
    if (c + kLanes < cols) stream_store(to + c + kLanes, zip_second(a, b));
  }
}

// Where the taps of a row of a kernel are, one after the other: column i of the windows' row reads column i + shift of
// the part of the residue.
struct TapPlace {
  int64_t stride, step, shift, residue;
  explicit TapPlace(const Pool2dGeometry& g)
      : stride(g.stride_w),
        step(g.dilation_w),
        shift(-((g.pad_left + stride - 1) / stride)),
        residue(-g.pad_left - shift * stride) {}
  void next() {
    for (residue += step; residue >= stride; residue -= stride) ++shift;
  }
};

// Rows are split into their columns' residues of the stride, so that what a tap reads, and what it gives, are
// neighbours: residue r of row y begins at (y * stride + r) * split.row, column 0 of it `margin` floats later.
void max_pool_plane(const Pool2dGeometry& g, const PoolSplit& split, const float* x, float* y, uint8_t* taps,
                    float* scratch) {
  const int64_t stride = g.stride_w, row_floats = split.row, margin = split.margin;
  const TapPlace start(g);
  float* const rows = scratch;
  // The first column of taps that lies in the image, for every window of a row.
  float* const first = rows + g.in_h * stride * row_floats;
  for (int64_t i = 0, left = -g.pad_left; i < row_floats; ++i, left += stride) {
    first[i] = left < g.in_w ? 0 : -1;
    if (left >= 0) continue;
    const Taps across(left, g.kernel_w, g.dilation_w, g.in_w);
    first[i] = across.first < across.last ? across.first : -1;
  }
  int64_t known = 0;  // rows that are split
  for (int64_t out = 0; out < g.out_h; ++out) {
    const int64_t top = out * g.stride_h - g.pad_top;
    const Taps down(top, g.kernel_h, g.dilation_h, g.in_h);
    for (; known < g.in_h && known <= top + (down.last - 1) * g.dilation_h; ++known)
      for (int64_t r = 0; r < stride; ++r) {
        float* const part = rows + (known * stride + r) * row_floats;
        for (int64_t i = 0; i < row_floats; i += kLanes) store(part + i, broadcast(kLowest));
        const int64_t cols = (g.in_w - r + stride - 1) / stride;
        const float* const row = x + known * g.in_w + r;
        for (int64_t c = 0; c < cols; c += kLanes) {
          const int64_t n = cols - c < kLanes ? cols - c : kLanes;
          prefetch_far(row + c * stride), prefetch_far(row + c * stride + kLanes);
          put(part + margin + c, every(row + c * stride, stride, n), n);
        }
      }
    const Vec above = broadcast(down.first * g.kernel_w), none = broadcast(-1);
    for (int64_t i = 0; i < g.out_w; i += kLanes) {
      const int64_t n = g.out_w - i < kLanes ? g.out_w - i : kLanes;
      const Vec across = load(first + i);
      Vec largest = broadcast(kLowest), tap = broadcast(kMostTaps), number = above;
      if (down.first < down.last) tap = where_more(across, none, add(across, above), tap);
      for (int64_t ky = down.first; ky < down.last; ++ky) {
        const float* const row = rows + (top + ky * g.dilation_h) * stride * row_floats + margin + i;
        TapPlace at = start;
        for (int64_t kx = 0; kx < g.kernel_w; ++kx, at.next()) {
          const Vec v = load(row + at.residue * row_floats + at.shift);
          tap = where_more(v, largest, number, tap);
          largest = where_more(v, largest, v, largest);
          number = add(number, broadcast(1));
        }
      }
      put(y + out * g.out_w + i, largest, n);
      put_bytes(taps + out * g.out_w + i, tap, n);
    }
  }
}

void max_pool_grad_plane(const Pool2dGeometry& g, const PoolSplit& split, const float* dy, const uint8_t* taps,
                         float* dx, float* scratch, bool stream) {
  const int64_t stride = g.stride_w, row_floats = split.row, margin = split.margin;
  const TapPlace start(g);
  float* const rows = scratch;
  // Of a row of windows: the tap whose pixel is the largest, and dy.
  float* const tap_row = rows + g.in_h * stride * row_floats + margin;
  float* const grad_row = tap_row + row_floats + margin;
  for (int64_t i = -margin; i < row_floats; ++i) tap_row[i] = kMostTaps, grad_row[i] = 0;
  int64_t zeroed = 0, written = 0;  // rows
  auto write_until = [&](int64_t end) {
    for (; written < end; ++written) {
      const float* const part = rows + written * stride * row_floats + margin;
      float* const row = dx + written * g.in_w;
      if (stride == 2) {
        join(row, part, part + row_floats, g.in_w, stream);
      } else {
        for (int64_t c = 0; c < g.in_w; ++c) row[c] = part[c % stride * row_floats + c / stride];
      }
    }
  };
  auto zero_until = [&](int64_t end) {
    for (; zeroed < end; ++zeroed)
      for (int64_t i = 0; i < stride * row_floats; i += kLanes) store(rows + zeroed * stride * row_floats + i, zero());
  };
  for (int64_t out = 0; out < g.out_h; ++out) {
    const int64_t top = out * g.stride_h - g.pad_top;
    const Taps down(top, g.kernel_h, g.dilation_h, g.in_h);
    if (down.first >= down.last) continue;
    const int64_t end = top + (down.last - 1) * g.dilation_h + 1;
    zero_until(end);
    write_until(top < end ? top : end);
    for (int64_t i = 0; i < g.out_w; i += kLanes) {
      const int64_t n = g.out_w - i < kLanes ? g.out_w - i : kLanes;
      put(tap_row + i, some_bytes(taps + out * g.out_w + i, n), n);
      put(grad_row + i, some(dy + out * g.out_w + i, n), n);
    }
    for (int64_t ky = down.first; ky < down.last; ++ky) {
      TapPlace at = start;
      for (int64_t kx = 0; kx < g.kernel_w; ++kx, at.next()) {
        float* const part = rows + ((top + ky * g.dilation_h) * stride + at.residue) * row_floats + margin;
        const Vec tap = broadcast(ky * g.kernel_w + kx);
        for (int64_t c = 0; c * stride + at.residue < g.in_w; c += kLanes) {
          const int64_t window = c - at.shift;
          store(part + c, add(load(part + c), where_equal(load(tap_row + window), tap, load(grad_row + window))));
        }
      }
    }
  }
  zero_until(g.in_h);
  write_until(g.in_h);
  if (stream) stream_fence();
}

void max_pool_row(const Pool2dGeometry& g, const Images& in, const Images& out, int64_t y, float* scratch) {
  if (in.channel == 1) return max_pool_row_channels_last(g, in, out, y);
  pool_row_nchw<Largest>(g, in, out, y, scratch, [](float*) {});
}

// Pixels that a mean is taken over, along one side; padding counts, what rounding up adds beyond it does not.
int64_t counted(int64_t at, int64_t kernel, int64_t stride, int64_t pad, int64_t size, bool count_padding) {
  const int64_t start = at * stride - pad, limit = count_padding ? size + pad : size;
  const int64_t end = start + kernel < limit ? start + kernel : limit;
  return end - (start < 0 && !count_padding ? 0 : start);
}

void avg_pool_row(const Pool2dGeometry& g, bool count_padding, const Images& in, const Images& out, int64_t y,
                  float* scratch) {
  const int64_t rows = counted(y, g.kernel_h, g.stride_h, g.pad_top, g.in_h, count_padding);
  pool_row_nchw<Sum>(g, in, out, y, scratch, [&](float* to) {
    for (int64_t x = 0; x < g.out_w; ++x)
      to[x] /= rows * counted(x, g.kernel_w, g.stride_w, g.pad_left, g.in_w, count_padding);
  });
}

// e^x to about an ulp for |x| <= 87, the bounds beyond them.
Vec exp(Vec x) {
  x = max(broadcast(-87), min(broadcast(87), x));
  const Vec n = round(mul(x, broadcast(1.44269504f)));
  Vec r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.f / 5040);
  constexpr float kFactors[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1, 1};
  for (const float factor : kFactors) p = fma(p, r, broadcast(factor));
  return scale(p, n);
}

template <Activation activation>
Vec activate(Vec x) {
  if constexpr (activation == Activation::sigmoid || activation == Activation::silu) {
    const Vec below = add(broadcast(1), exp(mul(x, broadcast(-1))));
    return div(activation == Activation::silu ? x : broadcast(1), below);
  }
  if constexpr (activation == Activation::hardsigmoid || activation == Activation::hardswish) {
    const Vec gate = max(broadcast(0), min(broadcast(6), add(x, broadcast(3))));
    return div(activation == Activation::hardswish ? mul(x, gate) : gate, broadcast(6));
  }
  return x;
}

void sum(float* to, int64_t to_row, const float* a, const float* b, int64_t from_row, float scale, int64_t rows,
         int64_t lanes) {
  const Vec factor = broadcast(scale);
  for (int64_t r = 0; r < rows; ++r, to += to_row, a += from_row, b += from_row)
    for (int64_t i = 0; i < lanes; i += kLanes) {
      const int64_t n = lanes - i < kLanes ? lanes - i : kLanes;
      put(to + i, fma(factor, some(b + i, n), some(a + i, n)), n);
    }
}

template <Activation activation>
void pointwise_as(const Pointwise& p, float* to, const float* from, int64_t lanes) {
  const Vec factor = broadcast(p.scale), shift = broadcast(p.shift), low = broadcast(p.low), high = broadcast(p.high);
  for (int64_t i = 0; i < lanes; i += kLanes) {
    Vec v = fma(load(from + i), factor, p.other ? add(shift, load(p.other + i)) : shift);
    v = activate<activation>(max(low, min(high, v)));
    store(to + i, p.mask ? keep(v, mask_of(p.mask + i)) : v);
  }
}

void pointwise(const Pointwise& p, float* to, const float* from, int64_t lanes) {
  switch (p.activation) {
    case Activation::none:
      return pointwise_as<Activation::none>(p, to, from, lanes);
    case Activation::sigmoid:
      return pointwise_as<Activation::sigmoid>(p, to, from, lanes);
    case Activation::silu:
      return pointwise_as<Activation::silu>(p, to, from, lanes);
    case Activation::hardsigmoid:
      return pointwise_as<Activation::hardsigmoid>(p, to, from, lanes);
    case Activation::hardswish:
      return pointwise_as<Activation::hardswish>(p, to, from, lanes);
  }
}

// Writes registers that follow each other to memory, past the caches if asked to. What does not begin with a cache line
// is shifted until it does; where registers cannot be, it is stored as usual.
class Writer {
 public:
  Writer(float* to, bool stream) : to_(to), stream_(stream) {
    before_ = -(int64_t)((uintptr_t)to / sizeof(float)) & (kLanes - 1);
    if (before_ == 0) return;
#if defined(__AVX512F__)
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    lanes_ = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)before_));
#else
    stream_ = false;
#endif
  }

  // Lanes [0, lanes) of v are floats [i, i + lanes), fewer than a register in the last only; i goes up by registers.
  inline void put(int64_t i, Vec v, int64_t lanes) {
    if (!stream_) return lanes == kLanes ? store(to_ + i, v) : store(to_ + i, v, lanes);
    if (before_ == 0) return lanes == kLanes ? stream_store(to_ + i, v) : store(to_ + i, v, lanes);
#if defined(__AVX512F__)
    if (i == 0) {
      store(to_, v, lanes < before_ ? lanes : before_);
    } else {
      const int64_t known = kLanes - before_ + lanes;
      float* const line = to_ + i - kLanes + before_;
      const Vec joined = _mm512_permutex2var_ps(last_, lanes_, v);
      known >= kLanes ? stream_store(line, joined) : store(line, joined, known);
    }
    last_ = v;
    at_ = i, left_ = lanes - before_;
#endif
  }

  void finish() {
#if defined(__AVX512F__)
    if (left_ > 0) store(to_ + at_ + before_, _mm512_permutex2var_ps(last_, lanes_, zero()), left_);
#endif
  }

 private:
  float* const to_;
  bool stream_;
  int64_t before_;  // floats before the first cache line, or register
#if defined(__AVX512F__)
  __m512i lanes_;
  Vec last_ = zero();
  int64_t at_ = 0, left_ = 0;  // floats of the last register that are not written yet
#endif
};

// to[i] = f(i, lanes) for registers of n floats.
template <class F>
inline void each_register(float* to, int64_t n, bool stream, const F& f) {
  Writer writer(to, stream);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) writer.put(i, f(i, kLanes), kLanes);
  if (i < n) writer.put(i, f(i, n - i), n - i);
  writer.finish();
}

void stream(float* to, const float* from, int64_t n) {
  each_register(to, n, true, [=](int64_t i, int64_t lanes) { return some(from + i, lanes); });
}

// f(i, lanes, a, b) for every register of n floats adds to two running sums.
template <class F>
inline void add_up(int64_t n, SpreadSums& sums, const F& f) {
  constexpr int kAtOnce = 4;
  Vec a[kAtOnce], b[kAtOnce];
  a[0] = load(sums.a), b[0] = load(sums.b);
  for (int k = 1; k < kAtOnce; ++k) a[k] = b[k] = zero();
  int64_t i = 0;
  for (; i + kAtOnce * kLanes <= n; i += kAtOnce * kLanes)
    for (int k = 0; k < kAtOnce; ++k) f(i + k * kLanes, kLanes, a[k], b[k]);
  for (; i < n; i += kLanes) f(i, n - i < kLanes ? n - i : kLanes, a[0], b[0]);
  store(sums.a, add(add(a[0], a[1]), add(a[2], a[3])));
  store(sums.b, add(add(b[0], b[1]), add(b[2], b[3])));
}

void moments(const float* x, int64_t n, float mean, SpreadSums& sums) {
  const Vec minus = broadcast(-mean);
  add_up(n, sums, [=](int64_t i, int64_t lanes, Vec& a, Vec& b) {
    prefetch_far(x + i);
    const Vec d = only(add(some(x + i, lanes), minus), lanes);
    a = add(a, d);
    b = fma(d, d, b);
  });
}

void normalize(float* y, const float* x, const float* other, int64_t n, float scale, float shift, float other_scale,
               bool relu, bool stream, uint8_t* positive, int64_t soon) {
  const Vec factor = broadcast(scale), summand = broadcast(shift), low = broadcast(relu ? 0 : kLowest);
  const Vec other_factor = broadcast(other_scale);
  if (positive && n > 0) positive[(n - 1) / 16 * 2 + 1] = 0;  // registers may end before it
  each_register(y, n, stream, [=](int64_t i, int64_t lanes) {
    __builtin_prefetch(x + i + soon, 0, 2);
    Vec v = fma(some(x + i, lanes), factor, summand);
    if (other) prefetch_far(other + i), v = fma(some(other + i, lanes), other_factor, v);
    if (positive) put_positive(positive, i, lanes == kLanes ? v : only(v, lanes));
    return max(low, v);
  });
}

// A register of NormGrad's g.
inline Vec through_relu(Vec dy, Vec x, const NormGrad& grad, const uint8_t* positive, int64_t i) {
  if (positive) return where_positive(dy, positive, i);
  return grad.relu ? where_positive(dy, fma(x, broadcast(grad.scale), broadcast(grad.shift))) : dy;
}

void norm_sums(const NormGrad& grad, const float* dy, const float* x, const uint8_t* positive, int64_t n,
               SpreadSums& sums) {
  const NormGrad norm = grad;
  const Vec minus = broadcast(-grad.mean);
  add_up(n, sums, [=](int64_t i, int64_t lanes, Vec& a, Vec& b) {
    prefetch_far(x + i), prefetch_far(dy + i);
    const Vec value = some(x + i, lanes), g = through_relu(some(dy + i, lanes), value, norm, positive, i);
    a = add(a, g);
    b = fma(g, only(add(value, minus), lanes), b);
  });
}

void norm_input_grad(const NormGrad& grad, const float* dy, const float* x, const uint8_t* positive, int64_t n,
                     float* dx, float* g, bool stream, int64_t soon) {
  const NormGrad norm = grad;
  const Vec minus = broadcast(-grad.mean), factor = broadcast(grad.scale), of_x = broadcast(grad.of_x);
  const Vec constant = broadcast(grad.constant);
  Writer through(g, stream);
  each_register(dx, n, stream, [&](int64_t i, int64_t lanes) {
    __builtin_prefetch(x + i + soon, 0, 2), __builtin_prefetch(dy + i + soon, 0, 2);
    const Vec value = some(x + i, lanes), of_y = through_relu(some(dy + i, lanes), value, norm, positive, i);
    if (g) through.put(i, of_y, lanes);
    return fma(factor, of_y, fma(of_x, add(value, minus), constant));
  });
  through.finish();
}

#define SPARSEKIT_STRING_(x) #x
#define SPARSEKIT_STRING(x) SPARSEKIT_STRING_(x)

}  // namespace

extern const Kernels kernels = {SPARSEKIT_STRING(SPARSEKIT_ISA),
                                kLanes,
                                kShiftsSums,
                                kMovesLanes,
                                kLanes == 16 ? 64 : 32,
                                kWholeStrip * kLanes,
                                sums,
                                spmm,
                                gemm,
                                add_products,
                                dots,
                                paired,
                                sddmm,
                                gather,
                                clear,
                                scatter,
                                add_spread,
                                interleave,
                                split,
                                max_pool_row,
                                avg_pool_row,
                                max_pool_plane,
                                max_pool_grad_plane,
                                sum,
                                pointwise,
                                moments,
                                normalize,
                                norm_sums,
                                norm_input_grad,
                                stream,
                                stream_fence,
                                transpose};

}  // namespace sparsekit::SPARSEKIT_ISA
