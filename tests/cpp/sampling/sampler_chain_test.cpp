#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <vector>

#include "modularbase/sampling/sampler.h"

using namespace modularbase;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

using Ids = std::vector<TokenId>;

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
    params.logit_bias[static_cast<TokenId>(words() % n_vocab)] =
        pick(words, {-kInfinity, -3.0f, 2.0f});
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
Shortlist shortlist_for(const HeadQuery& query, const std::vector<float>& row,
                        std::mt19937& words) {
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
TokenId naive_sample(const SamplingParams& params, const std::vector<float>& logits,
                     const Ids& seen, double uniform) {
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
    do {
      sum += p[kept[n++]];
    } while (n < kept.size() && !suffices(sum));
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
