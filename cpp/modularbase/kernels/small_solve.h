#pragma once

#include <cstdint>
#include <span>

namespace modularbase::kernels {

/// Minimises x' G x / 2 - h' x for lower <= x <= upper by coordinate descent from the x given.
///
/// Args:
///   gram: G, [n, n], symmetric with a positive diagonal.
///   target: h, [n].
void solve_bounded(std::span<const double> gram, std::span<const double> target, double lower,
                   double upper, std::span<double> x);

/// Solves G X = B by Cholesky's factorisation, in place.
///
/// Args:
///   gram: G, [n, n], symmetric and positive definite; destroyed.
///   right: B, n rows of n_columns; becomes X.
///
/// Returns: false if G is not positive definite.
bool solve_positive(std::span<double> gram, std::int64_t n, std::span<double> right,
                    std::int64_t n_columns);

}  // namespace modularbase::kernels
