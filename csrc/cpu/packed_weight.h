#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/walk.h"

namespace sparsekit {

// The weight as the microkernels read it: per group, block of channels and split of the rows, slots of (offset, value).
class PackedWeight {
 public:
  // For spmm (with values), or for sddmm (without; slots are filled up to a multiple of 4 with offsets of no meaning).
  // together: one list for the rows of all groups, over a source that holds all channels. shifting: taps one column
  // beside their lanes are added by shifting their sums (Rows::pairs), so that whole lines are loaded; rows of lanes
  // must be whole registers, with zeros at their ends.
  PackedWeight(const Walk& walk, const Part& part, const Csr& csr, int64_t block_channels, int64_t splits,
               bool with_values, bool together = false, bool shifting = false)
      : rows_(together ? walk.rows * walk.groups : walk.rows),
        groups_(together ? 1 : walk.groups),
        blocks_(std::max<int64_t>(1, ceil_div(walk.source_channels, block_channels))),
        block_channels_(block_channels),
        splits_(splits),
        taps_(part.taps.size()),
        columns_(walk.source_channels * taps_),
        shifting_(shifting),
        lefts_(shifting && walk.right == 0),
        group_rows_(walk.rows),
        group_floats_(together ? walk.source_channels * walk.channel_stride : 0) {
    const int64_t lists = groups_ * blocks_;
    begin_.resize(lists * rows_ + 1);
    order_.resize(lists * rows_ + Rows::kAhead);
    slot_.resize(lists * rows_);
    length_.resize(lists * rows_);
    std::vector<int32_t> offsets(columns_);
    if (shifting_) {
      beside_.resize(offsets.size());
      pairs_.resize(lists);
    }
    for (int64_t t = 0; t < taps_; ++t) {
      const Tap& tap = part.taps[t];
      const int64_t first = tap.phase < 0 ? -1 : offset_of(walk, tap, 0),
                    step = tap.phase < 0 ? 0 : walk.channel_stride;
      for (int64_t c = 0, in_block = 0; c < walk.source_channels; ++c, ++in_block) {
        if (in_block == block_channels) in_block = 0;
        offsets[c * taps_ + t] = first + in_block * step;
        if (shifting_) beside_[c * taps_ + t] = tap.phase < 0 ? 0 : tap.dx;
      }
    }
    count(csr, offsets);
    if (shifting_) {
      const Phase& p = walk.phases[0];
      centre_ = p.base + p.up * walk.pitch + walk.left;
      pair(csr);
    }
    sort(with_values ? 1 : 4);
    offsets_.reset(new uint32_t[size()]);                   // set by fill, every one of them
    if (with_values) values_.reset(new float[size() + 4]);  // read four at a time
    fill(csr, offsets);
  }

  int64_t blocks() const { return blocks_; }
  int64_t size() const { return begin_.back(); }
  int64_t first_row(int64_t split) const { return rows_ * split / splits_; }

  // The rows [first_row(split), first_row(split + 1)) of a group, over one block of channels.
  Rows rows(int64_t group, int64_t block, int64_t split) const {
    const int64_t start = (group * blocks_ + block) * rows_ + first_row(split);
    return {begin_.data() + start,
            order_.data() + start,
            offsets_.get(),
            values_.get(),
            first_row(split + 1) - first_row(split),
            shifting_ ? pairs_[group * blocks_ + block] : 0,
            lefts_};
  }

  // Whether it has all values that it was made of, given the rest of the CSR.
  bool holds(const Csr& csr) const { return all_taps_ && values_ && made_of(csr); }

  // They, in the order of the CSR; false if it does not hold them.
  bool values(const Csr& csr, float* to) const {
    if (!holds(csr)) return false;
    auto kept = [](int64_t) { return true; };
    parallel(csr.rows, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        each_segment(csr, r, [&](int64_t list, int64_t j, int64_t end) {
          each_place(csr, list, j, end, kept, [&](int64_t j, int64_t at, bool) { to[j] = values_[at]; });
        });
    });
    return true;
  }

  // Move sums that are in packed order to the order of the CSR.
  void unpack(const Csr& csr, const float* packed, float* grad) const {
    parallel(csr.rows, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        float* to = grad + csr.crow[r];
        for (int64_t b = 0; b < blocks_; ++b) {
          const int64_t i = list(r, b);
          to = std::copy_n(packed + begin_[slot_[i]], length_[i], to);
        }
      }
    });
  }

 private:
  int64_t list(int64_t row, int64_t block) const { return (row / rows_ * blocks_ + block) * rows_ + row % rows_; }

  // f(list, first, end) for the non-zeros of a row in every block.
  template <class F>
  void each_segment(const Csr& csr, int64_t row, const F& f) const {
    int64_t j = csr.crow[row];
    const int64_t end = csr.crow[row + 1];
    for (int64_t b = 0; b < blocks_; ++b) {
      const int64_t stop = (b + 1) * block_channels_ * taps_;
      const int64_t first = j;
      if (b + 1 == blocks_) {
        j = end;
      } else {
        while (j < end && csr.col[j] < stop) ++j;
      }
      f(list(row, b), first, j);
    }
  }

  void count(const Csr& csr, const std::vector<int32_t>& offsets) {
    all_taps_ = std::find(offsets.begin(), offsets.end(), -1) == offsets.end();
    parallel(csr.rows, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        each_segment(csr, r, [&](int64_t list, int64_t j, int64_t end) {
          int64_t n = end - j;
          if (!all_taps_)
            for (n = 0; j < end; ++j) n += offsets[csr.col[j]] >= 0;
          length_[list] = n;
        });
    });
  }

  // Taps of a row segment at one column to the left and to the right.
  struct Beside {
    int32_t left = 0, right = 0;
  };

  Beside beside(const Csr& csr, int64_t j, int64_t end) const {
    Beside count;
    for (; j < end; ++j) {
      const int64_t dx = beside_[csr.col[j]];
      count.left += dx == -1;
      count.right += dx == 1;
    }
    return count;
  }

  // How many values of zero make so many pairs of these.
  int32_t missing(const Beside& count, int32_t pairs) const {
    if (lefts_) return 2 * pairs - std::min(count.left, 2 * pairs);
    return 2 * pairs - std::min(count.left, pairs) - std::min(count.right, pairs);
  }

  // As many pairs of a left and a right tap, or of two left ones, as a row has on average; rows that have fewer get
  // values of zero, what they have more of is loaded where it is. A constant number, for the branch predictor.
  void pair(const Csr& csr) {
    std::vector<Beside> counts(length_.size());
    parallel(csr.rows, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        each_segment(csr, r, [&](int64_t list, int64_t j, int64_t end) { counts[list] = beside(csr, j, end); });
    });
    for (int64_t l = 0; l < groups_ * blocks_; ++l) {
      const int64_t first = l * rows_, last = first + rows_;
      int64_t taps = 0;
      for (int64_t r = first; r < last; ++r) taps += counts[r].left + counts[r].right;
      const int32_t pairs = pairs_[l] = taps / (2 * std::max<int64_t>(1, rows_));
      for (int64_t r = first; r < last; ++r) length_[r] += missing(counts[r], pairs);
    }
  }

  void sort(int64_t multiple) {
    int32_t total = 0;
    for (int64_t l = 0; l < groups_ * blocks_; ++l)
      for (int64_t split = 0; split < splits_; ++split) {
        const int64_t start = l * rows_ + first_row(split), rows = first_row(split + 1) - first_row(split);
        int32_t* order = order_.data() + start;
        const int32_t* length = length_.data() + start;
        // A counting sort, longest first.
        int32_t longest = 0;
        for (int64_t r = 0; r < rows; ++r) longest = std::max(longest, length[r]);
        std::vector<int32_t> position(longest + 2);
        for (int64_t r = 0; r < rows; ++r) ++position[longest - length[r] + 1];
        for (int32_t n = 0; n < longest; ++n) position[n + 1] += position[n];
        for (int64_t r = 0; r < rows; ++r) order[position[longest - length[r]]++] = r;
        for (int64_t s = 0; s < rows; ++s) {
          begin_[start + s] = total;
          total += round_up(length[order[s]], multiple);
        }
        for (int64_t s = 0; s < rows; ++s) slot_[start + order[s]] = start + s;
      }
    begin_.back() = total;
  }

  // Whether its lists have as many non-zeros as they would have of this CSR, where all taps are kept.
  bool made_of(const Csr& csr) const {
    bool same = csr.rows == rows_ * groups_;
    for (int64_t j = 0; j < csr.nnz; ++j) same &= csr.col[j] < columns_;
    for (int64_t r = 0; same && r < csr.rows; ++r)
      each_segment(csr, r,
                   [&](int64_t list, int64_t j, int64_t end) { same &= length_[list] == length(csr, list, j, end); });
    return same;
  }

  int32_t length(const Csr& csr, int64_t list, int64_t j, int64_t end) const {
    if (!shifting_) return end - j;
    return end - j + missing(beside(csr, j, end), pairs_[list / rows_]);
  }

  // f(j, at, pair) for the non-zeros of a list that are kept(column): where they are among the slots, and whether they
  // are of a pair. Of pairs, left and right taps take turns, if there are right ones; the others follow.
  template <class Kept, class F>
  void each_place(const Csr& csr, int64_t list, int64_t j, int64_t end, const Kept& kept, const F& f) const {
    int64_t to = begin_[slot_[list]];
    if (!shifting_) {
      for (; j < end; ++j)
        if (kept(csr.col[j])) f(j, to++, false);
      return;
    }
    const int64_t pairs = pairs_[list / rows_];
    int64_t left = 0, right = 0, rest = to + 2 * pairs;
    for (; j < end; ++j) {
      if (!kept(csr.col[j])) continue;
      const int64_t dx = beside_[csr.col[j]];
      if (dx == -1 && left < (lefts_ ? 2 * pairs : pairs)) {
        f(j, to + (lefts_ ? 1 : 2) * left++, true);
      } else if (dx == 1 && right < pairs) {
        f(j, to + 2 * right++ + 1, true);
      } else {
        f(j, rest++, false);
      }
    }
  }

  void fill(const Csr& csr, const std::vector<int32_t>& offsets) {
    auto kept = [&](int64_t column) { return offsets[column] >= 0; };
    parallel(csr.rows, [&](int64_t first, int64_t last) {
      uint32_t* const to_offsets = offsets_.get();
      float* const to_values = values_.get();
      for (int64_t r = first; r < last; ++r) {
        const int64_t group = r / group_rows_ * group_floats_;
        each_segment(csr, r, [&](int64_t list, int64_t j, int64_t end) {
          if (shifting_) fill_pairs(csr, offsets, group, list, j, end);
          const int64_t slot = slot_[list];
          std::fill(to_offsets + begin_[slot] + length_[list], to_offsets + begin_[slot + 1], 0);
          each_place(csr, list, j, end, kept, [&](int64_t j, int64_t at, bool pair) {
            to_offsets[at] = offsets[csr.col[j]] + group - (pair ? beside_[csr.col[j]] : 0);
            if (to_values) to_values[at] = csr.values[csr.permutation ? csr.permutation[j] : j];
          });
        });
      }
    });
  }

  // What pairs read until a tap of their side is found: a pixel that the row reads anyway, if there is one, for an Inf
  // of another would make NaN of zero.
  void fill_pairs(const Csr& csr, const std::vector<int32_t>& offsets, int64_t group, int64_t list, int64_t j,
                  int64_t end) {
    constexpr int64_t kNone = -1;
    int64_t any = kNone, left = kNone, right = kNone;
    for (; j < end; ++j) {
      const int64_t column = csr.col[j], offset = offsets[column] + group;
      if (offsets[column] < 0) continue;
      any = offset;
      if (beside_[column] == -1) left = offset;
      if (beside_[column] == 1) right = offset;
    }
    const int64_t to_left = any == kNone ? centre_ : (left == kNone ? any : left) + 1;
    const int64_t to_right = any == kNone ? centre_ : (right == kNone ? any : right) - 1;
    const int64_t first = begin_[slot_[list]], count = 2 * pairs_[list / rows_];
    for (int64_t i = 0; i < count; ++i) offsets_[first + i] = lefts_ || i % 2 == 0 ? to_left : to_right;
    std::fill_n(values_.get() + first, count, 0.0f);
  }

  int64_t rows_, groups_, blocks_, block_channels_, splits_, taps_, columns_;
  bool shifting_, lefts_;              // lefts: no tap is to the right of its lane
  bool all_taps_ = true;               // none reads nothing but zeros beside the image
  uint32_t centre_ = 0;                // offset of the lanes themselves, in the first channel
  std::vector<int8_t> beside_;         // per column of the CSR, the column of its tap
  std::vector<int32_t> pairs_;         // per group and block
  int64_t group_rows_, group_floats_;  // between the groups of one list
  std::vector<int32_t> begin_, order_, slot_, length_;
  std::unique_ptr<uint32_t[]> offsets_;
  std::unique_ptr<float[]> values_;
};

}  // namespace sparsekit
