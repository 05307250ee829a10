#include "modularbase/sampling/logprobs.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "modularbase/core/errors.h"

using namespace modularbase;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<float> random_row(std::mt19937& words, std::size_t n_vocab) {  // with ties
  std::normal_distribution<float> normal(0.0f, 2.5f);
  std::vector<float> row(n_vocab);
  for (float& logit : row) logit = std::round(normal(words) * 16.0f) / 16.0f;
  return row;
}

bool ahead(const std::vector<float>& row, TokenId a, TokenId b) {
  return row[a] != row[b] ? row[a] > row[b] : a < b;
}

}  // namespace

TEST_CASE("row_logprobs agrees with double precision") {
  std::mt19937 words(4);
  for (const std::size_t n_vocab : {1u, 17u, 1000u, 49153u}) {
    const auto row = random_row(words, n_vocab);
    double sum = 0.0;
    for (const float logit : row) sum += std::exp(static_cast<double>(logit));
    const auto chosen = static_cast<TokenId>(words() % n_vocab);
    const auto logprobs = row_logprobs(row, chosen, 20);
    // Half a unit of the float result near 16, and 2^-21 for the exponentials and their sum.
    CHECK(std::fabs(logprobs.chosen.logprob - (row[chosen] - std::log(sum))) < 1.5e-6);
    REQUIRE(logprobs.top.size() == std::min<std::size_t>(20, n_vocab));
    for (std::size_t i = 0; i < logprobs.top.size(); ++i) {
      const auto [id, logprob] = logprobs.top[i];
      CHECK(std::fabs(logprob - (row[id] - std::log(sum))) < 1.5e-6);
      const auto n_ahead =
          std::count_if(row.begin(), row.end(), [&, place = id](const float& other) {
            return ahead(row, static_cast<TokenId>(&other - row.data()), place);
          });
      CHECK(n_ahead == static_cast<std::ptrdiff_t>(i));
    }
  }
  CHECK(row_logprobs(std::vector<float>(3), 1, 0).top.empty());
  CHECK_THROWS_AS(row_logprobs(std::vector<float>(3), 3, 1), InvalidRequestError);
  CHECK_THROWS_AS(row_logprobs(std::vector<float>{1.0f, kNan}, 0, 1), Error);
}
