// Mask to compressed structure on the CPU: what sparsekit/formats.py calls a Pattern.
#pragma once

#include <cstdint>

namespace sparsekit {

// A mask of rows x (channels x taps) bytes, of which 0 is false; channels and rows are counted in all groups, a row
// sees the channels of its own.
struct MaskSize {
  int64_t rows, channels, taps, groups;
  int64_t columns() const { return channels / groups * taps; }
};

// crow: [rows + 1].
void count_rows(const MaskSize& size, const uint8_t* mask, int32_t* crow);

// Given crow: col, t_col and permutation [nnz], t_crow [channels + 1].
void fill_pattern(const MaskSize& size, const uint8_t* mask, const int32_t* crow, int32_t* col, int32_t* t_crow,
                  int32_t* t_col, int32_t* permutation);

}  // namespace sparsekit
