#include "modularbase/sampling/sampler.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpp/sampling/allocation_count.h"
#include "modularbase/core/errors.h"

using namespace modularbase;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

using Ids = std::vector<TokenId>;

SamplingParams plain(float temperature) {  // no cuts
  SamplingParams params;
  params.temperature = temperature;
  params.top_k = 0;
  params.top_p = 1.0f;
  params.min_p = 0.0f;
  return params;
}

/// Chi-square of draws against expected probabilities.
double chi_square(const SamplingParams& params, const std::vector<float>& row,
                  const std::vector<double>& expected) {
  constexpr int kDraws = 20000;
  Sampler sampler(params, std::ssize(row));
  std::vector<int> n_drawn(row.size());
  for (int i = 0; i < kDraws; ++i) ++n_drawn[static_cast<std::size_t>(sampler.sample({{}, row}))];
  double sum = 0.0;
  for (std::size_t i = 0; i < row.size(); ++i) {
    const double mean = kDraws * expected[i];
    if (mean == 0.0) CHECK(n_drawn[i] == 0);
    if (mean > 0.0) sum += (n_drawn[i] - mean) * (n_drawn[i] - mean) / mean;
  }
  return sum;
}

std::vector<float> logs(std::vector<float> p) {
  for (float& value : p) value = std::log(value);
  return p;
}

std::string refused_field(const SamplingParams& params) {
  try {
    Sampler sampler(params, 100);
  } catch (const InvalidRequestError& error) {
    return error.field;
  }
  return "";
}

}  // namespace

TEST_CASE("head_query asks for as little as the params allow") {
  const auto query_of = [](const SamplingParams& params, const Ids& prompt) {
    Sampler sampler(params, 49152);
    sampler.accept_prompt(prompt);
    return sampler.head_query();
  };
  SamplingParams params;
  params.temperature = 0.0f;
  auto query = query_of(params, {5, 3, 5});
  CHECK((!query.all && query.top_k == 1 && query.max_drop == 0.0f && query.forced.empty()));
  params.presence_penalty = 1.0f;
  params.logit_bias = {{9, -1.0f}, {3, 1.0f}};
  query = query_of(params, {5, 3, 5});
  CHECK((!query.all && query.top_k == 4 && query.forced == Ids{3, 5, 9}));
  params.temperature = 0.8f;
  CHECK(query_of(params, {5, 3, 5}).top_k == 43);
  params.top_k = 510;
  CHECK(query_of(params, {5, 3, 5}).all);

  auto min_p = plain(1.0f);
  min_p.min_p = 0.1f;
  query = query_of(min_p, {5});
  CHECK((!query.all && query.top_k == 1));
  CHECK(query.max_drop == doctest::Approx(std::log(10.0)).epsilon(0.01));  // and the slack of 1/64
  CHECK(query.max_drop > std::log(10.0));
  min_p.presence_penalty = 1.0f;
  min_p.frequency_penalty = 0.5f;
  min_p.logit_bias = {{9, -3.0f}};
  CHECK(query_of(min_p, {5, 5}).max_drop == doctest::Approx(std::log(10.0) + 5.0).epsilon(0.01));
  min_p.repeat_penalty = 1.1f;  // lowers by an unknown amount
  CHECK(query_of(min_p, {5}).all);
  CHECK(query_of(plain(1.0f), {}).all);
}

TEST_CASE("at the edge of min_p the query covers what rounding may let in") {
  // Near 2^15 floats are 1/512 apart or more: penalties, bias and the cut each round by half that.
  std::mt19937 random(17);
  std::uniform_real_distribution<float> uniform(0.1f, 1.0f);
  for (unsigned round = 0; round < 500; ++round) {
    auto params = plain(1.0f);
    params.seed = round;
    params.min_p = 0.3f + 0.6f * uniform(random);
    params.presence_penalty = uniform(random);
    params.frequency_penalty = uniform(random);
    params.logit_bias = {{0, -3.0f * uniform(random)}};
    const float top = 20000.0f + 45000.0f * uniform(random);
    const double fall = params.presence_penalty + params.frequency_penalty - params.logit_bias[0];
    std::vector<float> row = {top};
    float edge = static_cast<float>(top - fall + std::log(params.min_p)) - 0.05f;
    for (; row.size() < 60; edge = std::nextafter(edge, kInfinity)) row.push_back(edge);

    Sampler dense(params, std::ssize(row)), listed(params, std::ssize(row));
    dense.accept_prompt(Ids{0});
    listed.accept_prompt(Ids{0});
    const HeadQuery query = listed.head_query();
    REQUIRE(!query.all);
    Ids ids;
    std::vector<float> logits;
    for (std::size_t i = 0; i < row.size(); ++i) {
      if (static_cast<double>(row[i]) < static_cast<double>(top) - query.max_drop) continue;
      ids.push_back(static_cast<TokenId>(i));
      logits.push_back(row[i]);
    }
    for (int i = 0; i < 10; ++i) REQUIRE(dense.sample({{}, row}) == listed.sample({ids, logits}));
  }
}

TEST_CASE("draws follow the probabilities") {
  const auto row = logs({0.4f, 0.3f, 0.15f, 0.1f, 0.05f});
  // Beyond 18.5 lies 0.1 % of chi-square with 4 degrees of freedom; 13.8 with 2; 10.8 with 1.
  CHECK(chi_square(
            [] {
              auto p = plain(1.0f);
              p.seed = 11;
              return p;
            }(),
            row, {0.4, 0.3, 0.15, 0.1, 0.05}) < 18.5);
  auto params = plain(0.5f);
  params.seed = 12;
  const double z = 0.16 + 0.09 + 0.0225 + 0.01 + 0.0025;  // temperature 0.5 squares
  CHECK(chi_square(params, row, {0.16 / z, 0.09 / z, 0.0225 / z, 0.01 / z, 0.0025 / z}) < 18.5);
  params = plain(1.0f);
  params.seed = 13;
  params.top_k = 3;
  CHECK(chi_square(params, row, {0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0}) < 13.8);
  params.top_k = 0;
  params.top_p = 0.6f;
  CHECK(chi_square(params, row, {0.4 / 0.7, 0.3 / 0.7, 0, 0, 0}) < 10.8);
  params.top_p = 1.0f;
  params.min_p = 0.3f;
  CHECK(chi_square(params, row, {0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0}) < 13.8);
}

TEST_CASE("one seed, one stream") {
  Random random(42);
  // The stream of mt19937 is fixed by the C++ standard; 42 gives 1608637542 and 3421126067 first.
  CHECK(random.uniform() == (1608637542.0 + 3421126067.0 * 0x1p32) * 0x1p-64);
#ifdef __GLIBCXX__
  std::mt19937 words(42);
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  Random ours(42);
  for (int i = 0; i < 1000; ++i) REQUIRE(ours.uniform() == uniform(words));
#endif
  CHECK(Random(1).uniform() != Random(1 + (1ull << 32)).uniform());
  CHECK(Sampler(plain(1.0f), 10).seed() != Sampler(plain(1.0f), 10).seed());  // random if absent
}

TEST_CASE("greedy: the lowest id wins a tie") {
  std::vector<float> row(1000, -1.0f);
  row[300] = row[77] = row[900] = 2.0f;
  SamplingParams params;
  params.temperature = 0.0f;
  Sampler sampler(params, 1000);
  CHECK(sampler.sample({{}, row}) == 77);
  const Ids ids = {300, 900};
  const std::vector<float> logits = {2.0f, 2.0f};
  CHECK(sampler.sample({ids, logits}) == 300);
}

TEST_CASE("the penalty window holds the last repeat_last_n tokens, prompt included") {
  SamplingParams params;
  params.temperature = 0.0f;
  params.frequency_penalty = 1.0f;
  params.repeat_last_n = 3;
  Sampler sampler(params, 10);
  const auto best_of = [&](std::vector<float> row) { return sampler.sample({{}, row}); };
  sampler.accept_prompt(Ids{1, 2, 2, 2});
  CHECK(best_of({0, 0.5f, 3.2f, 0, 0, 0, 0, 0, 0, 0}) == 1);  // 1 has left, 2 counts three times
  sampler.accept(4);
  CHECK(best_of({0, 0.5f, 3.2f, 0, 0, 0, 0, 0, 0, 0}) == 2);  // 2 counts two times
  sampler.accept(4);
  sampler.accept(4);
  CHECK(sampler.head_query().forced == Ids{4});
}

TEST_CASE("senseless params are refused by name") {
  const auto with = [](auto change) {
    SamplingParams params;
    change(params);
    return refused_field(params);
  };
  CHECK(refused_field({}) == "");
  CHECK(with([](auto& p) { p.temperature = -0.1f; }) == "temperature");
  CHECK(with([](auto& p) { p.temperature = kNan; }) == "temperature");
  CHECK(with([](auto& p) { p.temperature = kInfinity; }) == "temperature");
  CHECK(with([](auto& p) { p.top_k = -2; }) == "top_k");
  CHECK(with([](auto& p) { p.top_p = 1.1f; }) == "top_p");
  CHECK(with([](auto& p) { p.min_p = -0.1f; }) == "min_p");
  CHECK(with([](auto& p) { p.typical_p = kNan; }) == "typical_p");
  CHECK(with([](auto& p) { p.repeat_penalty = 0.0f; }) == "repeat_penalty");
  CHECK(with([](auto& p) { p.repeat_last_n = -1; }) == "repeat_last_n");
  CHECK(with([](auto& p) { p.frequency_penalty = 1000.0f; }) == "frequency_penalty");
  CHECK(with([](auto& p) { p.presence_penalty = kNan; }) == "presence_penalty");
  CHECK(with([](auto& p) { p.logit_bias[100] = 1.0f; }) == "logit_bias[100]");
  CHECK(with([](auto& p) { p.logit_bias[-1] = 1.0f; }) == "logit_bias[-1]");
  CHECK(with([](auto& p) { p.logit_bias[3] = kNan; }) == "logit_bias[3]");
  CHECK(with([](auto& p) { p.logit_bias[3] = kInfinity; }) == "logit_bias[3]");
  CHECK_THROWS_AS(Sampler(SamplingParams{}, 0), InvalidRequestError);
  Sampler sampler(SamplingParams{}, 100);
  CHECK_THROWS_AS(sampler.accept(100), InvalidRequestError);
  CHECK_THROWS_AS(sampler.accept_prompt(Ids{1, -1}), InvalidRequestError);
}

TEST_CASE("rows that cannot be sampled are errors, not tokens") {
  Sampler sampler(SamplingParams{}, 70);
  std::vector<float> row(70, 1.0f);
  row[3] = row[69] = kNan;
  row[5] = kInfinity;
  CHECK_THROWS_WITH_AS(sampler.sample({{}, row}), "logits: 3 of 70 are NaN or +infinity", Error);
  CHECK_THROWS_AS(sampler.sample({{}, std::vector<float>(70, -kInfinity)}), Error);
  CHECK_THROWS_AS(sampler.sample({{}, std::vector<float>(69)}), Error);
  CHECK_THROWS_AS(sampler.sample({Ids{1, 2}, std::vector<float>(1)}), Error);
  SamplingParams biased;
  biased.logit_bias[4] = 1.0f;
  CHECK_THROWS_AS(Sampler(biased, 70).sample({Ids{3, 5}, std::vector<float>(2)}), Error);
}

TEST_CASE("sampling does not allocate once warm") {
  std::mt19937 words(3);
  std::normal_distribution<float> normal(0.0f, 2.5f);
  std::vector<float> row(5000);
  for (float& logit : row) logit = normal(words);
  for (int kind = 0; kind < 3; ++kind) {
    SamplingParams params = kind == 0 ? SamplingParams{} : plain(kind == 1 ? 0.0f : 1.0f);
    params.frequency_penalty = 0.1f;
    params.seed = 1;
    Sampler sampler(params, 5000);
    const auto run = [&](int n) {
      for (; n > 0; --n) {
        sampler.head_query();
        sampler.accept(sampler.sample({{}, row}));
      }
    };
    run(100);  // longer than the window
    const int before = allocation_count();
    run(100);
    CHECK(allocation_count() == before);
  }
}
