#include "modularbase/sampling/sampler.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "modularbase/core/errors.h"
#include "modularbase/sampling/logprobs.h"
#include "cpp/sampling/allocation_count.h"

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

std::vector<float> random_row(std::mt19937& words, std::size_t n_vocab) {
  std::normal_distribution<float> normal(0.0f, 2.5f);
  const bool on_grid = words() % 3 == 0;  // many ties
  std::vector<float> row(n_vocab);
  for (float& logit : row) {
    logit = normal(words);
    if (on_grid) logit = std::round(logit * 2.0f) / 2.0f;
  }
  return row;
}

float pick(std::mt19937& words, std::initializer_list<float> values) {
  return values.begin()[words() % values.size()];
}

SamplingParams random_params(std::mt19937& words, std::size_t n_vocab) {
  SamplingParams params;
  params.temperature = pick(words, {0.0f, 0.1f, 0.8f, 1.0f, 2.0f});
  params.top_k = static_cast<int>(pick(words, {0, -1, 1, 2, 10, 40, 200}));
  params.top_p = pick(words, {1.0f, 1.0f, 0.95f, 0.5f});
  params.min_p = pick(words, {0.0f, 0.05f, 0.3f});
  params.typical_p = pick(words, {1.0f, 1.0f, 0.9f, 0.4f});
  params.repeat_last_n = static_cast<int>(pick(words, {0, 3, 64}));
  params.repeat_penalty = pick(words, {1.0f, 1.3f, 0.8f});
  params.frequency_penalty = pick(words, {0.0f, 0.4f, -0.3f});
  params.presence_penalty = pick(words, {0.0f, 0.7f});
  for (auto n = words() % 4; n > 0; --n) {
    params.logit_bias[static_cast<TokenId>(words() % n_vocab)] = pick(words, {-kInfinity, -3.0f, 2.0f});
  }
  params.seed = words();
  return params;
}

bool ahead(const std::vector<float>& row, TokenId a, TokenId b) {
  return row[a] != row[b] ? row[a] > row[b] : a < b;
}

struct Shortlist {
  Ids ids;
  std::vector<float> logits;
  LogitsView view() const { return {ids, logits}; }
};

/// The least that answers the query, and now and then some tokens more.
Shortlist shortlist_for(const HeadQuery& query, const std::vector<float>& row, std::mt19937& words) {
  Ids order(row.size());
  for (std::size_t i = 0; i < row.size(); ++i) order[i] = static_cast<TokenId>(i);
  std::sort(order.begin(), order.end(), [&](TokenId a, TokenId b) { return ahead(row, a, b); });
  Ids ids = query.forced;
  for (std::size_t rank = 0; rank < order.size(); ++rank) {
    const bool asked = query.all || rank < static_cast<std::size_t>(query.top_k) ||
                       row[order[0]] - row[order[rank]] <= query.max_drop;
    if (asked || words() % 50 == 0) ids.push_back(order[rank]);
  }
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  Shortlist shortlist{ids, {}};
  for (const TokenId id : ids) shortlist.logits.push_back(row[id]);
  return shortlist;
}

/// The whole chain in double precision, one token at a time. `seen` holds the penalty window.
TokenId naive_sample(const SamplingParams& params, const std::vector<float>& logits, const Ids& seen,
                     double uniform) {
  std::vector<float> row = logits;
  for (const auto& [id, bias] : params.logit_bias) row[id] += bias;
  std::map<TokenId, int> counts;
  for (const TokenId id : seen) ++counts[id];
  for (const auto& [id, count] : counts) {
    row[id] = row[id] <= 0 ? row[id] * params.repeat_penalty : row[id] / params.repeat_penalty;
    row[id] -= static_cast<float>(count) * params.frequency_penalty + params.presence_penalty;
  }
  Ids kept(row.size());
  for (std::size_t i = 0; i < row.size(); ++i) kept[i] = static_cast<TokenId>(i);
  const auto by_logit = [&](TokenId a, TokenId b) { return ahead(row, a, b); };
  const auto top = [&] { return row[*std::min_element(kept.begin(), kept.end(), by_logit)]; };
  const auto weight = [&](TokenId id) { return std::exp(static_cast<double>(row[id]) - top()); };
  const auto probabilities = [&] {
    std::map<TokenId, double> p;
    const double max = top();
    double sum = 0.0;
    for (const TokenId id : kept) sum += p[id] = std::exp(row[id] - max);
    for (auto& [id, value] : p) value /= sum;
    return p;
  };
  const auto cut = [&](auto suffices) {
    auto p = probabilities();
    double sum = 0.0;
    std::size_t n = 0;
    do { sum += p[kept[n++]]; } while (n < kept.size() && !suffices(sum));
    kept.resize(n);
  };
  if (params.top_k > 0) {
    std::sort(kept.begin(), kept.end(), by_logit);
    kept.resize(std::min(kept.size(), static_cast<std::size_t>(params.top_k)));
  }
  if (params.typical_p < 1.0f) {
    auto p = probabilities();
    double entropy = 0.0;
    for (const auto& [id, value] : p) entropy -= value > 0 ? value * std::log(value) : 0.0;
    std::map<TokenId, double> distance;  // rounded so that equal distances stay equal
    for (const auto& [id, value] : p) {
      distance[id] = value > 0 ? std::round(std::fabs(-std::log(value) - entropy) * 1e9) : 1e300;
    }
    std::sort(kept.begin(), kept.end(), by_logit);
    std::stable_sort(kept.begin(), kept.end(),
                     [&](TokenId a, TokenId b) { return distance[a] < distance[b]; });
    cut([&](double sum) { return sum > params.typical_p; });
  }
  if (params.top_p < 1.0f) {
    std::sort(kept.begin(), kept.end(), by_logit);
    cut([&](double sum) { return sum >= params.top_p; });
  }
  if (params.min_p > 0.0f) {
    const double least = params.min_p * (1.0 - 1e-6);
    const double max = top();
    std::erase_if(kept, [&](TokenId id) { return std::exp(row[id] - max) < least; });
  }
  if (params.temperature == 0.0f) return *std::min_element(kept.begin(), kept.end(), by_logit);
  std::map<TokenId, double> p;
  double sum = 0.0;
  for (const TokenId id : kept) sum += p[id] = std::pow(weight(id), 1.0 / params.temperature);
  double running = 0.0;
  for (const TokenId id : kept) {
    running += p[id];
    if (p[id] > 0 && running >= uniform * sum) return id;
  }
  return kept.back();
}

Ids last_of(const Ids& tokens, int n) {
  const auto n_last = std::min(tokens.size(), static_cast<std::size_t>(n));
  return Ids(tokens.end() - static_cast<std::ptrdiff_t>(n_last), tokens.end());
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

TEST_CASE("the chain agrees with a naive one, and a shortlist with the dense row") {
  std::mt19937 words(1);
  for (int round = 0; round < 3000; ++round) {
    CAPTURE(round);
    const std::size_t n_vocab = 20 + words() % 700;
    const SamplingParams params = random_params(words, n_vocab);
    Sampler dense(params, static_cast<std::int64_t>(n_vocab)), shortlisted = dense;
    Random random(*params.seed);
    Ids context(words() % 40);
    for (TokenId& id : context) id = static_cast<TokenId>(words() % n_vocab);
    dense.accept_prompt(context);
    shortlisted.accept_prompt(context);
    for (int step = 0; step < 4; ++step) {
      const auto row = random_row(words, n_vocab);
      const auto shortlist = shortlist_for(shortlisted.head_query(), row, words);
      const TokenId token = dense.sample({{}, row});
      REQUIRE(shortlisted.sample(shortlist.view()) == token);
      const Ids seen = last_of(context, params.has_penalties() ? params.repeat_last_n : 0);
      REQUIRE(naive_sample(params, row, seen, random.uniform()) == token);
      dense.accept(token);
      shortlisted.accept(token);
      context.push_back(token);
    }
  }
}

TEST_CASE("a query with a draft suffices for every row of the draft") {
  std::mt19937 words(2);
  for (int round = 0; round < 1000; ++round) {
    const std::size_t n_vocab = 600 + words() % 100;
    SamplingParams params = random_params(words, n_vocab);
    if (round % 2 == 0) {  // min_p alone, the rule that random params rarely meet
      params.top_k = 0;
      params.top_p = params.typical_p = 1.0f;
      params.min_p = 0.2f;
    }
    Sampler dense(params, static_cast<std::int64_t>(n_vocab)), drafted = dense;
    Ids draft(4);
    for (TokenId& id : draft) id = static_cast<TokenId>(words() % n_vocab);
    const HeadQuery query = drafted.head_query(draft);
    for (const TokenId next : draft) {
      auto row = random_row(words, n_vocab);
      row[draft[0]] = 9.0f;  // the largest, so that its penalties matter
      REQUIRE(drafted.sample(shortlist_for(query, row, words).view()) == dense.sample({{}, row}));
      drafted.accept(next);
      dense.accept(next);
    }
  }
}

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

TEST_CASE("draws follow the probabilities") {
  const auto row = logs({0.4f, 0.3f, 0.15f, 0.1f, 0.05f});
  // Beyond 18.5 lies 0.1 % of chi-square with 4 degrees of freedom; 13.8 with 2; 10.8 with 1.
  CHECK(chi_square([] { auto p = plain(1.0f); p.seed = 11; return p; }(), row, {0.4, 0.3, 0.15, 0.1, 0.05}) < 18.5);
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
  const auto row = random_row(words, 5000);
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
      const auto n_ahead = std::count_if(row.begin(), row.end(), [&, place = id](const float& other) {
        return ahead(row, static_cast<TokenId>(&other - row.data()), place);
      });
      CHECK(n_ahead == static_cast<std::ptrdiff_t>(i));
    }
  }
  CHECK(row_logprobs(std::vector<float>(3), 1, 0).top.empty());
  CHECK_THROWS_AS(row_logprobs(std::vector<float>(3), 3, 1), InvalidRequestError);
  CHECK_THROWS_AS(row_logprobs(std::vector<float>{1.0f, kNan}, 0, 1), Error);
}
