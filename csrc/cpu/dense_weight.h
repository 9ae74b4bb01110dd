#pragma once

#include <vector>

#include "cpu/packed_weight.h"

namespace sparsekit {

// A weight of one group as gemm reads it: per block of channels and split of the rows, panels of the values of all
// taps.
class DenseWeight {
 public:
  DenseWeight(const Walk& walk, const Part& part, const Csr& csr, int64_t block_channels, int64_t splits)
      : rows_(walk.rows), splits_(splits), block_terms_(block_channels * part.taps.size()) {
    for (int64_t c = 0; c < walk.source_channels; ++c)
      for (const Tap& tap : part.taps) offsets_.push_back(offset_of(walk, tap, c % block_channels));
    const int64_t terms = offsets_.size();
    for (int64_t split = 0; split < splits; ++split) {
      begin_.push_back(values_.size());
      const int64_t first = first_row(split), last = first_row(split + 1);
      values_.resize(values_.size() + round_up(last - first, Panels::kRows) * terms);
      for (int64_t r = first; r < last; ++r)
        for (int64_t j = csr.crow[r]; j < csr.crow[r + 1]; ++j)
          values_[place(split, r - first, csr.col[j])] = csr.values[csr.permutation ? csr.permutation[j] : j];
    }
  }

  int64_t first_row(int64_t split) const { return rows_ * split / splits_; }

  // The rows [first_row(split), first_row(split + 1)) over one block of channels.
  Panels panels(int64_t block, int64_t split) const {
    const int64_t first = block * block_terms_;
    return {offsets_.data() + first, values_.data() + place(split, 0, first), terms_of(block),
            first_row(split + 1) - first_row(split)};
  }

 private:
  int64_t terms_of(int64_t block) const {
    return std::min<int64_t>(block_terms_, offsets_.size() - block * block_terms_);
  }

  // Of the value of a term in a row of a split.
  int64_t place(int64_t split, int64_t row, int64_t term) const {
    const int64_t block = term / block_terms_, rows = round_up(first_row(split + 1) - first_row(split), Panels::kRows);
    const int64_t panel = row / Panels::kRows * Panels::kRows;
    return begin_[split] + block * block_terms_ * rows + panel * terms_of(block) + term % block_terms_ * Panels::kRows +
           row % Panels::kRows;
  }

  int64_t rows_, splits_, block_terms_;
  std::vector<int64_t> begin_;  // per split
  std::vector<uint32_t> offsets_;
  std::vector<float> values_;
};

}  // namespace sparsekit
