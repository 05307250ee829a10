#pragma once

#include <cstdint>
#include <span>

namespace modularbase::kernels {

/// Minimises x' G x / 2 - h' x for lower <= x <= upper by coordinate descent from the x given.
/// G is [n, n], symmetric with a positive diagonal, h [n]; lower is above zero.
void solve_bounded(std::span<const double> gram, std::span<const double> target, double lower,
                   double upper, std::span<double> x);

/// Solves G X = B by Cholesky's factorisation, in place: G, [n, n] and symmetric, is destroyed, and
/// B, n rows of n_columns, becomes X. False if G is not positive definite.
bool solve_positive(std::span<double> gram, std::int64_t n, std::span<double> right,
                    std::int64_t n_columns);

}  // namespace modularbase::kernels
