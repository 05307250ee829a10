#include "modularbase/kernels/small_solve.h"

#include <algorithm>
#include <cmath>

namespace modularbase::kernels {
namespace {

constexpr int kMaxSweeps = 100;
constexpr double kSettled = 1e-5;  // change of a coordinate, relative to its size

/// G = L L'; L in the lower triangle.
bool factorise(std::span<double> gram, std::size_t n) {
  for (std::size_t j = 0; j < n; ++j) {
    double* pivot = &gram[j * n];
    double diagonal = pivot[j];
    for (std::size_t k = 0; k < j; ++k) diagonal -= pivot[k] * pivot[k];
    if (!(diagonal > 0.0)) return false;
    pivot[j] = std::sqrt(diagonal);
    for (std::size_t i = j + 1; i < n; ++i) {
      double* row = &gram[i * n];
      double sum = row[j];
      for (std::size_t k = 0; k < j; ++k) sum -= row[k] * pivot[k];
      row[j] = sum / pivot[j];
    }
  }
  return true;
}

/// y -= factor * x
void subtract(double factor, const double* x, double* y, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) y[i] -= factor * x[i];
}

}  // namespace

void solve_bounded(std::span<const double> gram, std::span<const double> target, double lower,
                   double upper, std::span<double> x) {
  const std::size_t n = x.size();
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    double change = 0.0;
    for (std::size_t i = 0; i < n; ++i) {
      const double* row = &gram[i * n];
      double slope = -target[i];
      for (std::size_t j = 0; j < n; ++j) slope += row[j] * x[j];
      const double next = std::clamp(x[i] - slope / row[i], lower, upper);
      change = std::max(change, std::abs(next - x[i]) / next);
      x[i] = next;
    }
    if (change < kSettled) return;
  }
}

bool solve_positive(std::span<double> gram, std::int64_t n, std::span<double> right,
                    std::int64_t n_columns) {
  const auto size = static_cast<std::size_t>(n), width = static_cast<std::size_t>(n_columns);
  if (!factorise(gram, size)) return false;
  for (std::size_t i = 0; i < size; ++i) {
    double* row = &right[i * width];
    for (std::size_t k = 0; k < i; ++k) subtract(gram[i * size + k], &right[k * width], row, width);
    for (std::size_t c = 0; c < width; ++c) row[c] /= gram[i * size + i];
  }
  for (std::size_t i = size; i-- > 0;) {
    double* row = &right[i * width];
    for (std::size_t k = i + 1; k < size; ++k)
      subtract(gram[k * size + i], &right[k * width], row, width);
    for (std::size_t c = 0; c < width; ++c) row[c] /= gram[i * size + i];
  }
  return true;
}

}  // namespace modularbase::kernels
