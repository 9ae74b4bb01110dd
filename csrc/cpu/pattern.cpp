// Rows are read by many threads, eight bytes at a time, for most of them are zero. The transposed order is a counting
// sort of what they found, one group of channels after the other.

#include "cpu/pattern.h"

#include <cstring>
#include <vector>

#include "cpu/parallel.h"

namespace sparsekit {
namespace {

constexpr int64_t kWord = sizeof(uint64_t);

// f(column) for every byte of a row that is not 0: true need not be 1 in a mask that was some other tensor's memory.
template <class F>
void each_set(const uint8_t* row, int64_t columns, const F& f) {
  int64_t i = 0;
  for (; i + kWord <= columns; i += kWord) {
    uint64_t word;
    std::memcpy(&word, row + i, kWord);
    while (word) {
      const int64_t byte = __builtin_ctzll(word) / 8;
      f(i + byte);
      word &= ~(uint64_t{0xff} << 8 * byte);
    }
  }
  for (; i < columns; ++i)
    if (row[i]) f(i);
}

// f(row) for rows in pieces that are worth a thread.
template <class F>
void each_row(const MaskSize& size, const F& f) {
  constexpr int64_t kPiece = 1 << 16;
  const int64_t rows = ceil_div(kPiece, std::max<int64_t>(1, size.columns()));
  parallel(ceil_div(size.rows, rows), [&](int64_t first, int64_t last) {
    for (int64_t r = first * rows; r < std::min(last * rows, size.rows); ++r) f(r);
  });
}

}  // namespace

void count_rows(const MaskSize& size, const uint8_t* mask, int32_t* crow) {
  crow[0] = 0;
  each_row(size, [&](int64_t r) {
    int32_t count = 0;
    for (const uint8_t *p = mask + r * size.columns(), *end = p + size.columns(); p < end; ++p) count += *p != 0;
    crow[r + 1] = count;
  });
  for (int64_t r = 0; r < size.rows; ++r) crow[r + 1] += crow[r];
}

void fill_pattern(const MaskSize& size, const uint8_t* mask, const int32_t* crow, int32_t* col, int32_t* t_crow,
                  int32_t* t_col, int32_t* permutation) {
  each_row(size, [&](int64_t r) {
    int32_t* to = col + crow[r];
    each_set(mask + r * size.columns(), size.columns(), [&](int64_t c) { *to++ = static_cast<int32_t>(c); });
  });
  const int64_t rows = size.rows / size.groups, channels = size.channels / size.groups;
  std::vector<int32_t> channel_of(size.columns()), tap_of(size.columns()), at(channels);
  for (int64_t c = 0; c < size.columns(); ++c) {
    channel_of[c] = static_cast<int32_t>(c / size.taps);
    tap_of[c] = static_cast<int32_t>(c % size.taps);
  }
  t_crow[0] = 0;
  for (int64_t g = 0; g < size.groups; ++g) {
    int32_t* const starts = t_crow + g * channels;
    std::fill(at.begin(), at.end(), 0);
    const int64_t first = g * rows, last = first + rows;
    for (int64_t j = crow[first]; j < crow[last]; ++j) ++at[channel_of[col[j]]];
    for (int64_t c = 0; c < channels; ++c) starts[c + 1] = starts[c] + at[c];
    std::copy_n(starts, channels, at.begin());
    for (int64_t r = first; r < last; ++r)
      for (int64_t j = crow[r]; j < crow[r + 1]; ++j) {
        const int32_t to = at[channel_of[col[j]]]++;
        t_col[to] = static_cast<int32_t>((r - first) * size.taps) + tap_of[col[j]];
        permutation[to] = static_cast<int32_t>(j);
      }
  }
}

}  // namespace sparsekit
