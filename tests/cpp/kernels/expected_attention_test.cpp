#include "modularbase/kernels/expected_attention.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

using namespace modularbase::kernels;

namespace {

constexpr std::int64_t kDim = 32, kKeys = 37, kHeads = 3, kRows = 41;
constexpr std::int32_t kFirst = 90, kAhead = 100;

using Row = std::vector<double>;

struct Case {
  RopeStyle style;
  std::int64_t rope_dim;
};

/// Random numbers, all of which come in the same order, whatever the case.
struct Numbers {
  std::vector<float> keys, values, queries, frequencies;
  std::vector<std::int32_t> positions;

  explicit Numbers(const Case& c) {
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < kDim * kKeys; ++i) keys.push_back(normal(random));
    for (std::int64_t i = 0; i < kDim * kKeys; ++i) values.push_back(normal(random));
    // A mean that is not zero: else nothing is left of it after many turns.
    for (std::int64_t i = 0; i < kDim * kHeads * kRows; ++i)
      queries.push_back(1.0f + normal(random));
    for (std::int64_t row = 0; row < kRows; ++row) {
      positions.push_back(kFirst - static_cast<std::int32_t>(kRows) +
                          static_cast<std::int32_t>(row));
    }
    for (std::int64_t i = 0; i < c.rope_dim / 2; ++i) {
      frequencies.push_back(static_cast<float>(std::pow(100.0, -2.0 * i / c.rope_dim)));
    }
    frequencies.back() = 0.0f;  // a pair that never turns
  }

  ExpectedAttentionArgs args(const Case& c) const {
    return {.head_dim = kDim,
            .n_keys = kKeys,
            .n_heads = kHeads,
            .n_rows = kRows,
            .keys = keys.data(),
            .values = values.data(),
            .queries = queries.data(),
            .positions = positions.data(),
            .first_ahead = kFirst,
            .n_ahead = kAhead,
            .frequencies = frequencies.data(),
            .rope_dim = c.rope_dim,
            .style = c.style,
            .scale = 0.25f};
  }
};

Row turned(const Numbers& n, const Case& c, const Row& x, double by) {
  Row y = x;
  const std::int64_t half = c.rope_dim / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    const auto a = static_cast<std::size_t>(c.style == RopeStyle::kNormal ? 2 * i : i);
    const auto b = static_cast<std::size_t>(c.style == RopeStyle::kNormal ? 2 * i + 1 : i + half);
    const double angle = by * n.frequencies[static_cast<std::size_t>(i)];
    y[a] = x[a] * std::cos(angle) - x[b] * std::sin(angle);
    y[b] = x[a] * std::sin(angle) + x[b] * std::cos(angle);
  }
  return y;
}

/// Step by step as the paper has it: turn back, mean and covariance, the mean of all turns.
std::vector<double> direct(const Numbers& n, const Case& c) {
  std::vector<double> expected(kKeys, 0.0);
  for (std::int64_t head = 0; head < kHeads; ++head) {
    std::vector<Row> rows;
    Row mean(kDim, 0.0);
    for (std::int64_t row = 0; row < kRows; ++row) {
      const float* q = n.queries.data() + (row * kHeads + head) * kDim;
      const Row back = turned(n, c, Row(q, q + kDim), -n.positions[static_cast<std::size_t>(row)]);
      Row ahead(kDim, 0.0);
      for (int at = 0; at < kAhead; ++at) {
        const Row there = turned(n, c, back, kFirst + at);
        for (std::size_t d = 0; d < kDim; ++d) ahead[d] += there[d] / kAhead;
      }
      for (std::size_t d = 0; d < kDim; ++d) mean[d] += ahead[d] / kRows;
      rows.push_back(std::move(ahead));
    }
    std::vector<double> weights;
    double sum = 0.0;
    for (std::int64_t key = 0; key < kKeys; ++key) {
      const float* k = n.keys.data() + key * kDim;
      double score = 0.0, spread = 0.0;
      for (std::size_t d = 0; d < kDim; ++d) score += mean[d] * k[d] * 0.25;
      for (std::size_t a = 0; a < kDim; ++a) {
        for (std::size_t b = 0; b < kDim; ++b) {
          double covariance = 0.0;
          for (const Row& row : rows) covariance += (row[a] - mean[a]) * (row[b] - mean[b]) / kRows;
          spread += k[a] * covariance * k[b] * 0.25 * 0.25;
        }
      }
      weights.push_back(std::exp(score + spread / 2.0));
      sum += weights.back();
    }
    for (std::size_t key = 0; key < kKeys; ++key) {
      double squares = 0.0;
      for (std::size_t d = 0; d < kDim; ++d) squares += std::pow(n.values[key * kDim + d], 2);
      expected[key] += weights[key] / sum * std::sqrt(squares) / kHeads;
    }
  }
  return expected;
}

}  // namespace

TEST_CASE("expected attention is what the closed form gives, for both ways to pair dims") {
  for (const Case& c : {Case{RopeStyle::kNormal, kDim}, Case{RopeStyle::kNeox, kDim},
                        Case{RopeStyle::kNeox, kDim / 2}}) {
    const Numbers numbers(c);
    ExpectedAttentionRoom room;
    std::vector<float> found(kKeys);
    for (int again = 0; again < 2; ++again) {
      expected_attention(numbers.args(c), room, found.data());
    }
    const std::vector<double> wanted = direct(numbers, c);
    for (std::size_t key = 0; key < kKeys; ++key) {
      // Exponents of some 10, of floats: 1e-6 of them.
      CHECK(found[key] == doctest::Approx(wanted[key]).epsilon(1e-4));
    }
  }
}

TEST_CASE("a query that is not a number makes nothing of it one") {
  const Case c{RopeStyle::kNeox, kDim};
  Numbers numbers(c);
  numbers.queries[5] = std::numeric_limits<float>::quiet_NaN();
  ExpectedAttentionRoom room;
  std::vector<float> found(kKeys);
  expected_attention(numbers.args(c), room, found.data());
  for (const float value : found) CHECK(std::isnan(value));
}
