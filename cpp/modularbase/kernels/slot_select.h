#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "modularbase/kernels/padded_matrix.h"

namespace modularbase::kernels {

/// Which columns of a matrix span its targets best: forward selection by orthogonal least squares
/// (Chen, Billings & Luo 1989). Each pick is the column that, with those picked before it, leaves
/// the least of the targets unexplained. Keeps its memory between calls.
class ColumnSelection {
 public:
  /// Fills picks, at most n_keys, in the order in which columns are picked. Of columns [n_queries,
  /// n_keys] and targets [n_queries, n_targets] the first n_rows rows count. False if the numbers
  /// are not finite.
  bool select(const PaddedMatrix& columns, const PaddedMatrix& targets, std::int64_t n_rows,
              std::span<std::int64_t> picks);

 private:
  void start(const PaddedMatrix& columns, const PaddedMatrix& targets);
  std::int64_t best_column() const;
  void make_direction(const PaddedMatrix& columns, std::int64_t column, std::int64_t n_picked);
  void explain(const PaddedMatrix& columns, const PaddedMatrix& targets, const float* direction);

  std::int64_t n_rows_ = 0;
  float ridge_ = 0.0f;         // keeps columns that are nearly explained from being picked
  PaddedMatrix directions_;    // [n_picks, n_rows]: the picked columns, made orthogonal
  PaddedMatrix correlations_;  // [n_keys, n_targets]: of each column with what is left to explain
  std::vector<float> explained_;  // [n_keys] squared length of each column's correlations
  std::vector<float> left_;       // [n_keys] squared length of each column orthogonal to the picked
  std::vector<float> along_;      // [n_keys] of each column along the newest direction
  std::vector<float> targets_along_;  // [n_targets]
};

}  // namespace modularbase::kernels
