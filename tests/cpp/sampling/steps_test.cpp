#include "modularbase/sampling/steps.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "modularbase/sampling/exponential.h"
#include "modularbase/sampling/row_scan.h"

using namespace modularbase;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

using Ids = std::vector<TokenId>;

Candidates candidates_of(const std::vector<float>& logits) {
  Candidates candidates;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    candidates.items.push_back({static_cast<TokenId>(i), logits[i], 0.0f});
  }
  return candidates;
}

Ids ids_of(const Candidates& candidates) {
  Ids ids;
  for (const Candidate& c : candidates.items) ids.push_back(c.id);
  return ids;
}

/// Rows with ties (a grid of 0.25) as well as rows without.
std::vector<float> random_logits(std::mt19937& words, std::size_t n) {
  std::normal_distribution<float> normal(0.0f, 3.0f);
  const bool on_grid = words() % 2 == 0;
  std::vector<float> logits(n);
  for (float& logit : logits) {
    logit = normal(words);
    if (on_grid) logit = std::round(logit * 4.0f) / 4.0f;
  }
  return logits;
}

std::vector<double> naive_softmax(const std::vector<float>& logits) {
  std::vector<double> p(logits.begin(), logits.end());
  const double max = *std::max_element(p.begin(), p.end());
  double sum = 0.0;
  for (double& value : p) sum += value = std::exp(value - max);
  for (double& value : p) value /= sum;
  return p;
}

Ids naive_order(const std::vector<double>& key) {  // by falling key
  Ids ids(key.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(), [&](TokenId a, TokenId b) { return key[a] > key[b]; });
  return ids;
}

Ids naive_top_p(const std::vector<float>& logits, double top_p) {
  const auto p = naive_softmax(logits);
  const Ids order = naive_order(std::vector<double>(logits.begin(), logits.end()));
  double sum = 0.0;
  std::size_t n = 0;
  while (n < order.size() && sum < top_p) sum += p[order[n++]];
  return Ids(order.begin(),
             order.begin() + static_cast<std::ptrdiff_t>(std::max<std::size_t>(n, 1)));
}

Ids naive_typical(const std::vector<float>& logits, double typical_p) {
  const auto p = naive_softmax(logits);
  double entropy = 0.0;
  for (const double value : p) entropy -= value * std::log(value);
  // From the sorted row, as in llama.cpp; rounded so that equal distances stay equal in double.
  Ids order = naive_order(std::vector<double>(logits.begin(), logits.end()));
  const auto distance = [&](TokenId id) {
    return std::round(std::fabs(-std::log(p[id]) - entropy) * 1e9);
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](TokenId a, TokenId b) { return distance(a) < distance(b); });
  double sum = 0.0;
  std::size_t n = 0;
  while (n < order.size() && sum <= typical_p) sum += p[order[n++]];
  order.resize(n);
  return order;
}

}  // namespace

TEST_CASE("exp_nonpositive follows std::exp within 2 units in the last place") {
  for (float x = 0.0f; x > -86.5f; x -= 0.0037f) {
    const double exact = std::exp(static_cast<double>(x));
    // A unit in the last place of a float is at most 2^-23 of its value.
    CHECK(std::fabs(exp_nonpositive(x) - exact) <= 2.0 * 0x1p-23 * exact);
  }
  CHECK(exp_nonpositive(0.0f) == 1.0f);
  CHECK(exp_nonpositive(-87.0f) == 0.0f);
  CHECK(exp_nonpositive(-kInfinity) == 0.0f);
}

TEST_CASE("adjusted_logit: bias, then repeat, then frequency and presence") {
  SamplingParams params;
  params.repeat_penalty = 2.0f;
  params.frequency_penalty = 0.5f;
  params.presence_penalty = 0.25f;
  CHECK(adjusted_logit(4.0f, {7, 0.0f, 3}, params) == 4.0f / 2.0f - 3 * 0.5f - 0.25f);
  CHECK(adjusted_logit(-4.0f, {7, 0.0f, 1}, params) == -4.0f * 2.0f - 0.5f - 0.25f);
  CHECK(adjusted_logit(4.0f, {7, -6.0f, 1}, params) ==
        -2.0f * 2.0f - 0.5f - 0.25f);  // bias flips the sign
  CHECK(adjusted_logit(4.0f, {7, 1.5f, 0}, params) == 5.5f);
  CHECK(adjusted_logit(4.0f, {7, -kInfinity, 2}, params) == -kInfinity);
}

TEST_CASE("softmax agrees with double precision") {
  std::mt19937 words(1);
  for (int round = 0; round < 50; ++round) {
    const auto logits = random_logits(words, 1 + words() % 3000);
    auto candidates = candidates_of(logits);
    softmax(candidates);
    const auto expected = naive_softmax(logits);
    for (std::size_t i = 0; i < logits.size(); ++i) {
      // The logit difference is rounded to 2^-24 of up to 32, the exponential to 2^-22.
      CHECK(std::fabs(candidates.items[i].p - expected[i]) <= 2.5e-6 * expected[i]);
    }
  }
}

TEST_CASE("keep_top_k sorts and breaks ties by id, from a row scan or from all candidates") {
  std::mt19937 words(2);
  RowScan scan;
  for (int round = 0; round < 500; ++round) {
    const auto logits = random_logits(words, 1 + words() % 3000);
    const std::size_t k = 1 + words() % 60;
    Ids expected = naive_order(std::vector<double>(logits.begin(), logits.end()));
    expected.resize(std::min(k, expected.size()));
    auto all = candidates_of(logits);
    keep_top_k(all, k);
    CHECK(ids_of(all) == expected);
    Candidates scanned;
    scan.scan(logits);
    scan.collect({}, scan.reached_by(k), scanned);
    keep_top_k(scanned, k);
    CHECK(ids_of(scanned) == expected);
    CHECK(scan.argmax() == static_cast<std::size_t>(expected.front()));
    keep_top_k(scanned, 2);  // already sorted: only cut
    CHECK(scanned.items.size() == std::min<std::size_t>(2, expected.size()));
  }
}

TEST_CASE("keep_top_p agrees with a naive reference, sorted or not") {
  std::mt19937 words(3);
  for (int round = 0; round < 500; ++round) {
    const auto logits = random_logits(words, 1 + words() % 1000);
    const float top_p = static_cast<float>(words() % 100) / 100.0f;
    const Ids expected = naive_top_p(logits, top_p);
    auto unsorted = candidates_of(logits);
    keep_top_p(unsorted, top_p);
    CHECK(ids_of(unsorted) == expected);
    CHECK(unsorted.sorted);
    auto sorted = candidates_of(logits);
    keep_top_k(sorted, logits.size());
    keep_top_p(sorted, top_p);
    CHECK(ids_of(sorted) == expected);
  }
  auto untouched = candidates_of({1.0f, 2.0f});
  keep_top_p(untouched, 1.0f);
  CHECK(ids_of(untouched) == Ids{0, 1});
}

TEST_CASE("keep_typical agrees with a naive reference") {
  std::mt19937 words(4);
  for (int round = 0; round < 500; ++round) {
    const auto logits = random_logits(words, 1 + words() % 300);
    const float typical_p = static_cast<float>(words() % 100) / 100.0f;
    auto candidates = candidates_of(logits);
    keep_typical(candidates, typical_p);
    CHECK(ids_of(candidates) == naive_typical(logits, typical_p));
  }
  auto masked = candidates_of({-kInfinity, 1.0f, -kInfinity, 1.0f});  // 0 * ln 0 counts as 0
  keep_typical(masked, 0.9f);
  CHECK(ids_of(masked) == Ids{1, 3});
}

TEST_CASE("keep_min_p keeps the order and what is likely enough") {
  std::mt19937 words(5);
  for (int round = 0; round < 500; ++round) {
    const auto logits = random_logits(words, 1 + words() % 300);
    const float min_p = static_cast<float>(1 + words() % 100) / 100.0f;
    const auto p = naive_softmax(logits);
    const double max = *std::max_element(p.begin(), p.end());
    Ids expected;
    for (std::size_t i = 0; i < p.size(); ++i) {
      // The margin is the rounding of a float logit around 16; the largest itself always stays.
      if (p[i] >= min_p * max * (1.0 - 1e-6)) expected.push_back(static_cast<TokenId>(i));
    }
    auto candidates = candidates_of(logits);
    keep_min_p(candidates, min_p);
    CHECK(ids_of(candidates) == expected);
  }
}

TEST_CASE("apply_temperature scales and survives tiny temperatures") {
  auto candidates = candidates_of({1.0f, 3.0f, 2.0f});
  apply_temperature(candidates, 0.5f);
  softmax(candidates);
  const auto expected = naive_softmax({2.0f, 6.0f, 4.0f});
  for (std::size_t i = 0; i < 3; ++i) {
    CHECK(candidates.items[i].p == doctest::Approx(expected[i]).epsilon(1e-6));
  }
  auto tiny = candidates_of({1000.0f, 1001.0f});
  apply_temperature(tiny, 1e-42f);
  CHECK(draw(tiny, 0.999) == 1);
}

TEST_CASE("draw inverts the running sum") {
  const float half = std::log(0.5f), quarter = std::log(0.25f);
  const auto at = [&](double uniform) {
    auto candidates = candidates_of({-kInfinity, quarter, half, quarter, -kInfinity});
    return draw(candidates, uniform);
  };
  CHECK(at(0.0) == 1);  // not token 0, which has no probability
  CHECK(at(0.24) == 1);
  CHECK(at(0.26) == 2);
  CHECK(at(0.74) == 2);
  CHECK(at(0.76) == 3);
  CHECK(at(0x1.fffffffffffffp-1) == 3);
}

TEST_CASE("largest takes the lowest id of equals whatever the order") {
  Candidates candidates;
  candidates.items = {{9, 1.0f, 0.0f}, {5, 2.0f, 0.0f}, {3, 2.0f, 0.0f}, {7, 2.0f, 0.0f}};
  CHECK(largest(candidates) == 3);
}
