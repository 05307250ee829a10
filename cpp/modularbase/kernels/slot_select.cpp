#include "modularbase/kernels/slot_select.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "modularbase/kernels/simd.h"

namespace modularbase::kernels {
namespace {

using simd::kLanes;
using simd::Vec;

constexpr float kRidge = 1e-3f;  // of the columns' mean squared length

float dot(const float* a, const float* b, std::int64_t n) {  // n: a multiple of the lanes
  Vec sum = simd::zero();
  for (std::int64_t i = 0; i < n; i += kLanes)
    sum = simd::fma(simd::load(a + i), simd::load(b + i), sum);
  float lanes[kLanes], total = 0.0f;
  simd::store(lanes, sum);
  for (const float lane : lanes) total += lane;
  return total;
}

/// Four rows -= factors[i] * b; out[i] = the squared length of each.
void subtract_rows(const float* factors, const float* b, float* rows, std::int64_t stride,
                   float* out) {
  Vec squares[4] = {simd::zero(), simd::zero(), simd::zero(), simd::zero()};
  for (std::int64_t c = 0; c < stride; c += kLanes) {
    const Vec step = simd::load(b + c);
    for (int r = 0; r < 4; ++r) {
      float* at = rows + r * stride + c;
      const Vec value = simd::load(at) - simd::set1(factors[r]) * step;
      squares[r] = simd::fma(value, value, squares[r]);
      simd::store(at, value);
    }
  }
  simd::sum_lanes4(squares[0], squares[1], squares[2], squares[3], out);
}

void add_squares(const float* row, std::int64_t n, float* sums) {
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const Vec value = simd::load(row + i);
    simd::store(sums + i, simd::fma(value, value, simd::load(sums + i)));
  }
}

}  // namespace

bool ColumnSelection::select(const PaddedMatrix& columns, const PaddedMatrix& targets,
                             std::int64_t n_rows, std::span<std::int64_t> picks) {
  n_rows_ = n_rows;
  const auto n_picks = static_cast<std::int64_t>(picks.size());
  directions_.reshape(n_picks, n_rows);
  start(columns, targets);
  for (std::int64_t i = 0; i < n_picks; ++i) {
    const std::int64_t column = best_column();
    if (column < 0) return false;
    picks[static_cast<std::size_t>(i)] = column;
    left_[static_cast<std::size_t>(column)] = -1.0f;  // picked
    make_direction(columns, column, i);
    explain(columns, targets, directions_.row(i));
  }
  return true;
}

void ColumnSelection::start(const PaddedMatrix& columns, const PaddedMatrix& targets) {
  multiply_transposed(columns, targets, n_rows_, correlations_);
  const std::size_t n =
      static_cast<std::size_t>(std::max(columns.stride(), correlations_.padded_rows()));
  left_.assign(n, 0.0f);
  explained_.assign(n, 0.0f);
  along_.assign(n, 0.0f);
  targets_along_.assign(static_cast<std::size_t>(targets.stride()), 0.0f);
  for (std::int64_t q = 0; q < n_rows_; ++q)
    add_squares(columns.row(q), columns.stride(), left_.data());
  double total = 0.0;
  for (const float length : left_) total += static_cast<double>(length);
  ridge_ = std::max(kRidge * static_cast<float>(total / static_cast<double>(columns.n_columns())),
                    std::numeric_limits<float>::min());
  for (std::int64_t k = 0; k < correlations_.padded_rows(); k += 4)
    subtract_rows(&along_[static_cast<std::size_t>(k)], targets_along_.data(), correlations_.row(k),
                  correlations_.stride(), &explained_[static_cast<std::size_t>(k)]);
}

std::int64_t ColumnSelection::best_column() const {
  std::int64_t best = -1;
  float most = -1.0f;
  for (std::int64_t k = 0; k < correlations_.n_rows(); ++k) {
    const auto at = static_cast<std::size_t>(k);
    const float gain = explained_[at] / (left_[at] + ridge_);
    if (left_[at] >= 0.0f && gain > most) {
      most = gain;
      best = k;
    }
  }
  return best;
}

/// The column without what the earlier directions hold of it, as the next direction.
void ColumnSelection::make_direction(const PaddedMatrix& columns, std::int64_t column,
                                     std::int64_t n_picked) {
  float* direction = directions_.row(n_picked);
  for (std::int64_t q = 0; q < n_rows_; ++q) direction[q] = columns.row(q)[column];
  const std::int64_t n = directions_.stride();
  for (std::int64_t i = 0; i < n_picked; ++i) {
    const float* earlier = directions_.row(i);
    const Vec shared = simd::set1(dot(direction, earlier, n));
    for (std::int64_t q = 0; q < n; q += kLanes)
      simd::store(direction + q, simd::load(direction + q) - shared * simd::load(earlier + q));
  }
  const float scale = 1.0f / std::sqrt(dot(direction, direction, n) + ridge_);
  for (std::int64_t q = 0; q < n_rows_; ++q) direction[q] *= scale;
}

/// Takes what the newest direction explains out of the columns and the targets.
void ColumnSelection::explain(const PaddedMatrix& columns, const PaddedMatrix& targets,
                              const float* direction) {
  combine_rows(direction, columns, n_rows_, along_.data());
  combine_rows(direction, targets, n_rows_, targets_along_.data());
  for (std::int64_t k = 0; k < correlations_.padded_rows(); k += 4)
    subtract_rows(&along_[static_cast<std::size_t>(k)], targets_along_.data(), correlations_.row(k),
                  correlations_.stride(), &explained_[static_cast<std::size_t>(k)]);
  for (std::int64_t k = 0; k < correlations_.n_rows(); ++k) {
    const auto at = static_cast<std::size_t>(k);
    if (left_[at] >= 0.0f) left_[at] = std::max(0.0f, left_[at] - along_[at] * along_[at]);
  }
}

}  // namespace modularbase::kernels
