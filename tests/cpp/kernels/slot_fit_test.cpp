#include "modularbase/kernels/slot_fit.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <random>
#include <tuple>
#include <vector>

using namespace modularbase::kernels;

namespace {

using Rows = std::vector<std::vector<double>>;

/// A span whose keys lie in clusters, and queries that look for some of them.
struct Span {
  std::int64_t head_dim, n_keys, n_queries;
  std::vector<float> keys, values, queries, log_mass;

  Span(std::int64_t dim, std::int64_t n, std::int64_t n_q, unsigned seed)
      : head_dim(dim), n_keys(n), n_queries(n_q) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const std::int64_t n_clusters = 6;
    std::vector<float> centres(static_cast<std::size_t>(n_clusters * dim));
    for (float& value : centres) value = normal(random);
    const auto near = [&](std::int64_t cluster, float spread, std::vector<float>& rows) {
      for (std::int64_t d = 0; d < dim; ++d)
        rows.push_back(centres[static_cast<std::size_t>(cluster * dim + d)] +
                       spread * normal(random));
    };
    for (std::int64_t k = 0; k < n; ++k) {
      near(k % n_clusters, 0.5f, keys);
      near(k % n_clusters, 0.7f, values);
    }
    for (std::int64_t q = 0; q < n_q; ++q) near((q * q) % n_clusters, 1.0f, queries);
    log_mass.assign(static_cast<std::size_t>(n_q), 0.0f);
    for (std::int64_t q = 0; q < n_q; ++q) {  // the span has 5 % to 70 % of the attention
      const std::vector<double> scores = score_row(q);
      double mass = 0.0;
      for (const double score : scores) mass += std::exp(score);
      log_mass[static_cast<std::size_t>(q)] =
          static_cast<float>(std::log(mass)) + std::abs(normal(random)) + 0.35f;
    }
  }

  SlotFitArgs args(std::int64_t n_slots) const {
    return {.head_dim = head_dim,
            .n_keys = n_keys,
            .n_queries = n_queries,
            .n_slots = n_slots,
            .keys = keys.data(),
            .values = values.data(),
            .queries = queries.data(),
            .log_mass = log_mass.data(),
            .scale = scale()};
  }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(head_dim)); }

  std::vector<double> score_row(std::int64_t q) const { return score_row(q, keys); }
  std::vector<double> score_row(std::int64_t q, const std::vector<float>& rows) const {
    std::vector<double> scores;
    for (std::size_t at = 0; at < rows.size(); at += static_cast<std::size_t>(head_dim)) {
      double sum = 0.0;
      for (std::int64_t d = 0; d < head_dim; ++d) {
        sum += static_cast<double>(queries[static_cast<std::size_t>(q * head_dim + d)]) *
               static_cast<double>(rows[at + static_cast<std::size_t>(d)]);
      }
      scores.push_back(sum * static_cast<double>(scale()));
    }
    return scores;
  }

  /// Per query the span's part of the output: weighted values, and the mass times `length`.
  Rows parts(const std::vector<float>& k, const std::vector<float>& v,
             const std::vector<float>& log_weights, double length) const {
    Rows out;
    for (std::int64_t q = 0; q < n_queries; ++q) {
      std::vector<double> part(static_cast<std::size_t>(head_dim) + 1, 0.0);
      const std::vector<double> scores = score_row(q, k);
      for (std::size_t i = 0; i < scores.size(); ++i) {
        const double weight = std::exp(scores[i] + static_cast<double>(log_weights[i]) -
                                       static_cast<double>(log_mass[static_cast<std::size_t>(q)]));
        for (std::size_t d = 0; d + 1 < part.size(); ++d)
          part[d] += weight * static_cast<double>(v[i * (part.size() - 1) + d]);
        part.back() += weight * length;
      }
      out.push_back(part);
    }
    return out;
  }

  double value_length() const {
    double squares = 0.0;
    for (const float value : values)
      squares += static_cast<double>(value) * static_cast<double>(value);
    return std::sqrt(squares / static_cast<double>(n_keys));
  }

  /// The definition of SlotFit::error, for any slots.
  double error(const std::vector<float>& k, const std::vector<float>& v,
               const std::vector<float>& log_weights) const {
    const std::vector<float> ones(static_cast<std::size_t>(n_keys), 0.0f);
    const Rows wanted = parts(keys, values, ones, value_length());
    const Rows found = parts(k, v, log_weights, value_length());
    double differences = 0.0, lengths = 0.0;
    for (std::size_t q = 0; q < wanted.size(); ++q) {
      if (q % 4 != 3 && wanted.size() >= 4) continue;
      for (std::size_t d = 0; d < wanted[q].size(); ++d) {
        differences += std::pow(found[q][d] - wanted[q][d], 2);
        lengths += std::pow(wanted[q][d], 2);
      }
    }
    return std::sqrt(differences / lengths);
  }
  double error(const SlotFit& fit) const { return error(fit.keys, fit.values, fit.log_weights); }
};

std::optional<SlotFit> fit(const SlotFitArgs& args) {
  SlotFitRoom room;
  return fit_slots(args, room);
}

/// The keys with the largest root mean square weight, unchanged.
double error_of_heaviest(const Span& span, std::size_t n_slots) {
  std::vector<double> squares(static_cast<std::size_t>(span.n_keys), 0.0);
  for (std::int64_t q = 0; q < span.n_queries; ++q) {
    const std::vector<double> scores = span.score_row(q);
    for (std::size_t k = 0; k < scores.size(); ++k) {
      squares[k] += std::exp(
          2.0 * (scores[k] - static_cast<double>(span.log_mass[static_cast<std::size_t>(q)])));
    }
  }
  std::vector<std::size_t> order(squares.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](std::size_t a, std::size_t b) { return squares[a] > squares[b]; });
  std::vector<float> keys, values;
  for (std::size_t i = 0; i < n_slots; ++i) {
    const auto first = static_cast<std::ptrdiff_t>(order[i]) * span.head_dim;
    keys.insert(keys.end(), span.keys.begin() + first, span.keys.begin() + first + span.head_dim);
    values.insert(values.end(), span.values.begin() + first,
                  span.values.begin() + first + span.head_dim);
  }
  return span.error(keys, values, std::vector<float>(n_slots, 0.0f));
}

/// Forward selection from its definition: every candidate is tried against what is left.
std::vector<std::int64_t> naive_selection(const PaddedMatrix& columns, const PaddedMatrix& targets,
                                          std::int64_t n_rows, std::size_t n_picks) {
  const auto rows = static_cast<std::size_t>(n_rows);
  const auto to_columns = [&](const PaddedMatrix& matrix) {
    Rows out(static_cast<std::size_t>(matrix.n_columns()), std::vector<double>(rows));
    for (std::size_t c = 0; c < out.size(); ++c)
      for (std::size_t q = 0; q < rows; ++q)
        out[c][q] = static_cast<double>(matrix.row(static_cast<std::int64_t>(q))[c]);
    return out;
  };
  const auto dot = [](const std::vector<double>& a, const std::vector<double>& b) {
    return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
  };
  const auto remove = [&](const std::vector<double>& direction, Rows& from) {
    for (std::vector<double>& column : from) {
      const double shared = dot(direction, column);
      for (std::size_t q = 0; q < rows; ++q) column[q] -= shared * direction[q];
    }
  };
  Rows candidates = to_columns(columns), left = to_columns(targets);
  double ridge = 0.0;
  for (const auto& column : candidates) ridge += 1e-3 * dot(column, column);
  ridge /= static_cast<double>(candidates.size());
  std::vector<std::int64_t> picks;
  while (picks.size() < n_picks) {
    double most = -1.0;
    std::int64_t best = 0;
    for (std::size_t c = 0; c < candidates.size(); ++c) {
      const auto index = static_cast<std::int64_t>(c);
      if (std::find(picks.begin(), picks.end(), index) != picks.end()) continue;
      double gain = 0.0;
      for (const auto& target : left) gain += std::pow(dot(candidates[c], target), 2);
      gain /= dot(candidates[c], candidates[c]) + ridge;
      if (gain > most) {
        most = gain;
        best = index;
      }
    }
    picks.push_back(best);
    std::vector<double> direction = candidates[static_cast<std::size_t>(best)];
    const double length = std::sqrt(dot(direction, direction) + ridge);
    for (double& value : direction) value /= length;
    remove(direction, candidates);
    remove(direction, left);
  }
  return picks;
}

}  // namespace

TEST_CASE("columns are picked as by trying all of them") {
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  for (const std::int64_t n : {3, 20, 45}) {
    PaddedMatrix columns, targets;
    columns.reshape(40, n);
    targets.reshape(40, 5);
    for (std::int64_t q = 0; q < 40; ++q) {
      for (std::int64_t k = 0; k < n; ++k) columns.row(q)[k] = std::exp(normal(random));
      for (std::int64_t d = 0; d < 5; ++d) targets.row(q)[d] = normal(random);
    }
    ColumnSelection selection;
    std::vector<std::int64_t> picks(static_cast<std::size_t>((n + 2) / 3));
    REQUIRE(selection.select(columns, targets, 31, picks));
    CHECK(picks == naive_selection(columns, targets, 31, picks.size()));
  }
}

TEST_CASE("as many slots as keys reproduce attention") {
  for (const std::int64_t dim : {16, 64, 80}) {
    const Span span(dim, 37, 24, 5);
    const auto slots = fit(span.args(37));
    REQUIRE(slots);
    CHECK(span.error(*slots) < 1e-4);
    CHECK(slots->error < 1e-4f);
  }
}

TEST_CASE("equal keys become one slot of their number and mean value") {
  Span span(16, 60, 24, 6);
  for (std::int64_t k = 1; k < 40; ++k)  // the first 40 are equal
    std::copy_n(span.keys.begin(), span.head_dim, span.keys.begin() + k * span.head_dim);
  const auto slots = fit(span.args(21));
  REQUIRE(slots);
  CHECK(std::count(slots->log_weights.begin(), slots->log_weights.end(), std::log(40.0f)) == 1);
  CHECK(std::count(slots->log_weights.begin(), slots->log_weights.end(), 0.0f) == 20);
  CHECK(span.error(*slots) < 1e-4);
}

TEST_CASE("a span of one key over and over needs one slot; the others are empty") {
  Span span(32, 50, 20, 7);
  for (std::int64_t k = 1; k < span.n_keys; ++k)
    std::copy_n(span.keys.begin(), span.head_dim, span.keys.begin() + k * span.head_dim);
  const auto slots = fit(span.args(4));
  REQUIRE(slots);
  CHECK(slots->log_weights ==
        std::vector<float>{std::log(50.0f), kEmptySlot, kEmptySlot, kEmptySlot});
  CHECK(span.error(*slots) < 1e-4);
}

TEST_CASE("fitted slots beat dropping the span, and its heaviest keys unchanged") {
  for (unsigned seed = 10; seed < 20; ++seed) {
    const Span span(32, 128, 96, seed);
    const auto slots = fit(span.args(12));
    REQUIRE(slots);
    CHECK(span.error(*slots) < 0.5);  // 1: as dropping it
    CHECK(span.error(*slots) < 0.7 * error_of_heaviest(span, 12));
  }
}

TEST_CASE("the error reported is that of the definition, and the share, too") {
  for (const std::int64_t n_queries : {2, 24, 61}) {
    const Span span(48, 70, n_queries, 21);
    const auto slots = fit(span.args(9));
    REQUIRE(slots);
    CHECK(static_cast<double>(slots->error) == doctest::Approx(span.error(*slots)).epsilon(1e-3));
    double squares = 0.0, count = 0.0;
    for (std::int64_t q = 0; q < n_queries; ++q) {
      if (q % 4 != 3 && n_queries >= 4) continue;
      double share = 0.0;
      for (const double score : span.score_row(q))
        share += std::exp(score - static_cast<double>(span.log_mass[static_cast<std::size_t>(q)]));
      squares += share * share;
      count += 1.0;
    }
    CHECK(static_cast<double>(slots->share) ==
          doctest::Approx(std::sqrt(squares / count)).epsilon(1e-3));
  }
}

TEST_CASE("no small change of a value brings the fit nearer: it is a minimum") {
  // The objective from its definition, on the queries that are fitted to: weights as shares of the
  // slots' own sum, times the span's mass, and the ridge towards the selected values.
  const Span span(8, 40, 64, 22);
  const auto slots = fit(span.args(6));
  REQUIRE(slots);
  const std::vector<float> zeros(40, 0.0f);
  const Rows wanted = span.parts(span.keys, span.values, zeros, 1.0);
  Rows weights;  // [query][slot]
  double trace = 0.0;
  for (std::int64_t q = 0; q < span.n_queries; ++q) {
    if (q % 4 == 3) continue;
    std::vector<double> row = span.score_row(q, slots->keys);
    double sum = 0.0;
    for (std::size_t i = 0; i < row.size(); ++i)
      sum += row[i] = std::exp(row[i] + static_cast<double>(slots->log_weights[i]));
    for (double& weight : row) weight *= wanted[static_cast<std::size_t>(q)].back() / sum;
    for (const double weight : row) trace += weight * weight;
    weights.push_back(row);
  }
  const double ridge = 1e-2 * trace / 6.0;
  for (std::size_t i = 0; i < 6; ++i) {
    const auto key = std::search(span.keys.begin(), span.keys.end(),
                                 slots->keys.begin() + static_cast<std::ptrdiff_t>(i) * 8,
                                 slots->keys.begin() + static_cast<std::ptrdiff_t>(i + 1) * 8);
    for (std::size_t d = 0; d < 8; ++d) {
      const auto selected = span.values[static_cast<std::size_t>(key - span.keys.begin()) + d];
      double slope = ridge * static_cast<double>(slots->values[i * 8 + d] - selected);
      double size = std::abs(slope);
      for (std::size_t row = 0; row < weights.size(); ++row) {
        double difference = -wanted[row / 3 * 4 + row % 3][d];
        for (std::size_t j = 0; j < 6; ++j)
          difference += weights[row][j] * static_cast<double>(slots->values[j * 8 + d]);
        slope += weights[row][i] * difference;
        size += std::abs(weights[row][i] * difference);
      }
      CHECK(std::abs(slope) < 1e-3 * size);
    }
  }
}

TEST_CASE("what is not finite gives nothing") {
  const float bad[] = {NAN, INFINITY, -INFINITY};
  for (const float value : bad) {
    for (const std::size_t at : {0, 100, 319}) {
      Span keys(16, 20, 20, 8), values(16, 20, 20, 8), queries(16, 20, 20, 8), mass(16, 20, 20, 8);
      keys.keys[at] = values.values[at] = queries.queries[at] = mass.log_mass[at / 16] = value;
      CHECK_FALSE(fit(keys.args(4)));
      CHECK_FALSE(fit(values.args(4)));
      CHECK_FALSE(fit(queries.args(4)));
      CHECK_FALSE(fit(mass.args(4)));
    }
  }
  Span huge(16, 20, 20, 8);  // finite, but its scores are not
  std::fill(huge.keys.begin(), huge.keys.end(), 1e30f);
  huge.keys[0] = 2e30f;
  std::fill(huge.queries.begin(), huge.queries.end(), 1e30f);
  CHECK_FALSE(fit(huge.args(4)));
}

TEST_CASE("counts that cannot be are refused") {
  const Span span(16, 20, 20, 8);
  for (const auto& [n_keys, n_queries, n_slots] :
       std::vector<std::tuple<int, int, int>>{{0, 20, 1}, {20, 0, 4}, {20, 20, 0}, {20, 20, 21}}) {
    SlotFitArgs args = span.args(n_slots);
    args.n_keys = n_keys;
    args.n_queries = n_queries;
    CHECK_FALSE(fit(args));
  }
}

TEST_CASE("queries that give the span no attention do not steer the fit") {
  const Span span(32, 64, 48, 9);
  Span more = span;
  std::mt19937 random(9);
  std::normal_distribution<float> normal;
  for (int q = 0; q < 4; ++q) {  // a group of four leaves the others held out as they were
    for (std::int64_t d = 0; d < span.head_dim; ++d) more.queries.push_back(normal(random));
    more.log_mass.push_back(80.0f);
  }
  more.n_queries += 4;
  const auto with = fit(more.args(8)), without = fit(span.args(8));
  REQUIRE(with);
  REQUIRE(without);
  CHECK(with->keys == without->keys);
  CHECK(with->error == doctest::Approx(without->error).epsilon(1e-3));

  Span faint = span;  // what counts is the span's share of one query's attention against another's
  for (float& mass : faint.log_mass) mass += 60.0f;
  const auto same = fit(faint.args(8));
  REQUIRE(same);
  CHECK(same->keys == without->keys);
  CHECK(same->error == doctest::Approx(without->error).epsilon(1e-3));

  Span none = span;  // nobody looks at the span at all
  std::fill(none.log_mass.begin(), none.log_mass.end(), 1e4f);
  const auto unseen = fit(none.args(8));
  REQUIRE(unseen);
  CHECK(unseen->share < 1e-9f);
}

TEST_CASE("one key is its own slot") {
  const Span span(64, 1, 8, 11);
  const auto slots = fit(span.args(1));
  REQUIRE(slots);
  CHECK(slots->keys == span.keys);
  CHECK(slots->values == span.values);
  CHECK(slots->log_weights == std::vector<float>{0.0f});
}

TEST_CASE("any size: slots are keys of the span, weights are bounded, memory can be shared") {
  std::mt19937 random(12);
  SlotFitRoom shared;
  for (unsigned i = 0; i < 150; ++i) {
    const std::int64_t dims[] = {1, 7, 16, 64, 80, 128};
    const std::int64_t dim = dims[random() % 6];
    const Span span(dim, 1 + random() % 150, 1 + random() % 60, i);
    const auto n_slots = static_cast<std::int64_t>(1 + random() % span.n_keys);
    const auto slots = fit_slots(span.args(n_slots), shared);
    REQUIRE(slots);
    const auto alone = fit(span.args(n_slots));
    REQUIRE(alone);
    CHECK(slots->values == alone->values);
    CHECK(slots->log_weights == alone->log_weights);
    CHECK(std::isfinite(slots->error));
    for (std::int64_t slot = 0; slot < n_slots; ++slot) {
      CHECK(std::abs(slots->log_weights[static_cast<std::size_t>(slot)]) <= 3.0001f);
      bool found = false;
      for (std::int64_t k = 0; k < span.n_keys && !found; ++k)
        found = std::equal(slots->keys.begin() + slot * dim, slots->keys.begin() + (slot + 1) * dim,
                           span.keys.begin() + k * dim);
      CHECK(found);
    }
  }
}

TEST_CASE("the attention that keys receive is summed over the queries") {
  const Span span(48, 70, 30, 13);
  SlotFitRoom room;
  std::vector<float> received(70);
  attention_received(span.args(1), room, received.data());
  std::vector<double> expected(70, 0.0);
  for (std::int64_t q = 0; q < span.n_queries; ++q) {
    const std::vector<double> scores = span.score_row(q);
    for (std::size_t k = 0; k < 70; ++k)
      expected[k] +=
          std::exp(scores[k] - static_cast<double>(span.log_mass[static_cast<std::size_t>(q)]));
  }
  for (std::size_t k = 0; k < 70; ++k)  // exp and products in single precision
    CHECK(static_cast<double>(received[k]) == doctest::Approx(expected[k]).epsilon(1e-4));
}
