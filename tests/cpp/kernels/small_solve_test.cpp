#include "modularbase/kernels/small_solve.h"

#include <doctest/doctest.h>

#include <cmath>
#include <random>
#include <vector>

#include "modularbase/kernels/padded_matrix.h"

using namespace modularbase::kernels;

namespace {

/// X'X + ridge of random X: [n, n].
std::vector<double> random_gram(std::size_t n, double ridge, std::mt19937& random) {
  std::normal_distribution<double> normal;
  std::vector<double> x((n + 3) * n), gram(n * n, 0.0);
  for (double& value : x) value = normal(random);
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j < n; ++j) {
      for (std::size_t k = 0; k < n + 3; ++k) gram[i * n + j] += x[k * n + i] * x[k * n + j];
    }
    gram[i * n + i] += ridge;
  }
  return gram;
}

PaddedMatrix random_matrix(std::int64_t n_rows, std::int64_t n_columns, std::mt19937& random) {
  std::normal_distribution<float> normal;
  PaddedMatrix matrix;
  matrix.reshape(n_rows, n_columns);
  for (std::int64_t i = 0; i < n_rows; ++i)
    for (std::int64_t j = 0; j < n_columns; ++j) matrix.row(i)[j] = normal(random);
  return matrix;
}

}  // namespace

TEST_CASE("a positive system is solved to the rounding of doubles") {
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  for (const std::size_t n : {1, 2, 7, 32, 65}) {
    const std::size_t width = n % 5 + 1;
    const std::vector<double> gram = random_gram(n, 0.1, random);
    std::vector<double> right(n * width);
    for (double& value : right) value = normal(random);
    std::vector<double> factor = gram, x = right;
    REQUIRE(
        solve_positive(factor, static_cast<std::int64_t>(n), x, static_cast<std::int64_t>(width)));
    for (std::size_t i = 0; i < n; ++i) {
      for (std::size_t c = 0; c < width; ++c) {
        double product = 0.0;
        for (std::size_t j = 0; j < n; ++j) product += gram[i * n + j] * x[j * width + c];
        CHECK(product == doctest::Approx(right[i * width + c]).epsilon(1e-8));
      }
    }
  }
}

TEST_CASE("a system that is not positive definite is refused") {
  std::vector<double> right{1.0, 1.0};
  std::vector<double> singular{1.0, 1.0, 1.0, 1.0};
  CHECK_FALSE(solve_positive(singular, 2, right, 1));
  std::vector<double> nan{NAN, 0.0, 0.0, 1.0};
  CHECK_FALSE(solve_positive(nan, 2, right, 1));
}

TEST_CASE("the bounded minimum satisfies the conditions of optimality") {
  std::mt19937 random(2);
  std::normal_distribution<double> normal;
  const double lower = 0.05, upper = 20.0;
  for (const std::size_t n : {1, 2, 8, 32}) {
    const std::vector<double> gram = random_gram(n, 1.0, random);
    std::vector<double> target(n), x(n, 1.0);
    for (double& value : target) value = 10.0 * normal(random);
    solve_bounded(gram, target, lower, upper, x);
    for (std::size_t i = 0; i < n; ++i) {
      double slope = -target[i];
      for (std::size_t j = 0; j < n; ++j) slope += gram[i * n + j] * x[j];
      slope /= gram[i * n + i];  // in units of x; descent stops at changes of 1e-5 of a coordinate
      CHECK(x[i] >= lower);
      CHECK(x[i] <= upper);
      if (x[i] > lower) CHECK(slope < 1e-2);
      if (x[i] < upper) CHECK(slope > -1e-2);
    }
  }
}

TEST_CASE("products of padded matrices are those of their elements") {
  std::mt19937 random(3);
  PaddedMatrix product, transposed;
  for (const std::int64_t n : {1, 5, 16, 33, 48}) {
    const PaddedMatrix a = random_matrix(n + 2, n, random);
    const PaddedMatrix b = random_matrix(n, n + 1, random);
    const PaddedMatrix c = random_matrix(n + 2, 2 * n, random);
    multiply(a, b, product);
    multiply_transposed(a, c, n + 1, transposed);
    std::vector<float> combined(static_cast<std::size_t>(c.stride()));
    combine_rows(a.row(0), c, n, combined.data());
    for (std::int64_t i = 0; i < n; ++i) {
      double expected = 0.0, expected_transposed = 0.0, expected_combined = 0.0;
      for (std::int64_t k = 0; k < n; ++k)
        expected += static_cast<double>(a.row(i)[k]) * static_cast<double>(b.row(k)[n - i]);
      for (std::int64_t k = 0; k < n + 1; ++k)
        expected_transposed += static_cast<double>(a.row(k)[i]) * static_cast<double>(c.row(k)[i]);
      for (std::int64_t k = 0; k < n; ++k)
        expected_combined += static_cast<double>(a.row(0)[k]) * static_cast<double>(c.row(k)[i]);
      // Sums of up to 49 products of size 1 in single precision.
      CHECK(std::abs(static_cast<double>(product.row(i)[n - i]) - expected) < 1e-4);
      CHECK(std::abs(static_cast<double>(transposed.row(i)[i]) - expected_transposed) < 1e-4);
      CHECK(std::abs(static_cast<double>(combined[static_cast<std::size_t>(i)]) -
                     expected_combined) < 1e-4);
    }
  }
}
