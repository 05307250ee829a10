#include "modularbase/kernels/slot_fit.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <span>

#include "modularbase/kernels/slot_shares.h"
#include "modularbase/kernels/small_solve.h"

namespace modularbase::kernels {
namespace {

constexpr double kMostFactor = 20.085536923187668;  // e^3: of a slot's weight to its key's own
constexpr double kMassRidge = 1e-6;                 // of the Gram matrix's mean diagonal
constexpr double kValueRidge = 1e-2;                // likewise; towards the selected values

bool all_finite(const float* numbers, std::int64_t n) {
  return std::all_of(numbers, numbers + n, [](float number) { return std::isfinite(number); });
}

bool usable(const SlotFitArgs& args) {
  return args.n_keys > 0 && args.n_queries > 0 && args.n_slots > 0 && args.n_slots <= args.n_keys &&
         std::isfinite(args.scale) && all_finite(args.keys, args.n_keys * args.head_dim) &&
         all_finite(args.values, args.n_keys * args.head_dim) &&
         all_finite(args.queries, args.n_queries * args.head_dim) &&
         all_finite(args.log_mass, args.n_queries);
}

/// One fit; its stages in the order in which they run.
class Fit {
 public:
  Fit(const SlotFitArgs& args, SlotFitRoom& room) : args_(args), room_(room) {}

  std::optional<SlotFit> run() {
    merge_equal_keys();
    transpose_keys(args_, room_);
    n_fitted_ = order_queries(args_, room_);
    multiply(room_.queries, room_.keys, room_.weights);
    const std::optional<float> top_share = scores_to_shares(room_);
    if (!top_share) return std::nullopt;
    multiply(room_.weights, room_.values, room_.targets);
    if (!select_keys()) return std::nullopt;
    if (n_slots_ < n_distinct()) {
      fit_weights();
      if (!fit_values()) return std::nullopt;
    }
    return result(*top_share);
  }

 private:
  std::int64_t n_distinct() const { return static_cast<std::int64_t>(room_.distinct.size()); }
  double value_scale() const { return static_cast<double>(room_.values.row(0)[args_.head_dim]); }

  void merge_equal_keys();
  bool select_keys();
  void fit_weights();
  bool fit_values();
  void mix();
  double load_gram(double relative_ridge);
  std::optional<SlotFit> result(float top_share);
  void measure(float top_share, SlotFit& fit);

  const SlotFitArgs& args_;
  SlotFitRoom& room_;
  std::int64_t n_fitted_ = 0;
  std::int64_t n_slots_ = 0;  // that stand for something
};

/// Lists the distinct keys with their counts and mean values.
void Fit::merge_equal_keys() {
  const auto row_bytes = static_cast<std::size_t>(args_.head_dim) * sizeof(float);
  const auto compare = [&](std::int64_t a, std::int64_t b) {
    return std::memcmp(args_.keys + a * args_.head_dim, args_.keys + b * args_.head_dim, row_bytes);
  };
  std::vector<std::int64_t> order(static_cast<std::size_t>(args_.n_keys));
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
    const int sign = compare(a, b);
    return sign != 0 ? sign < 0 : a < b;
  });
  room_.distinct.clear();
  room_.log_counts.assign(order.size() + 2 * PaddedMatrix::kColumnBlock, 0.0f);
  room_.values.reshape(args_.n_keys, args_.head_dim + 1);
  double squares = 0.0;
  for (std::size_t i = 0, end; i < order.size(); i = end) {
    float* mean = room_.values.row(n_distinct());
    for (end = i; end < order.size() && compare(order[i], order[end]) == 0; ++end) {
      const float* value = args_.values + order[end] * args_.head_dim;
      for (std::int64_t d = 0; d < args_.head_dim; ++d) mean[d] += value[d];
    }
    const auto count = static_cast<float>(end - i);
    for (std::int64_t d = 0; d < args_.head_dim; ++d) mean[d] /= count;
    squares += std::inner_product(mean, mean + args_.head_dim, mean, 0.0);
    room_.log_counts[room_.distinct.size()] = std::log(count);
    room_.distinct.push_back(order[i]);
  }
  const double length = std::sqrt(squares / static_cast<double>(n_distinct()));
  for (std::int64_t k = 0; k < n_distinct(); ++k)
    room_.values.row(k)[args_.head_dim] = length > 0.0 ? static_cast<float>(length) : 1.0f;
}

/// Picks the keys of the slots, and lists their weights and values.
bool Fit::select_keys() {
  n_slots_ = std::min(args_.n_slots, n_distinct());
  room_.picks.resize(static_cast<std::size_t>(n_slots_));
  std::iota(room_.picks.begin(), room_.picks.end(), 0);
  if (n_slots_ < n_distinct() &&
      !room_.selection.select(room_.weights, room_.targets, n_fitted_, room_.picks))
    return false;
  room_.slot_weights.reshape(args_.n_queries, n_slots_);
  for (std::int64_t q = 0; q < args_.n_queries; ++q) {
    const float* weights = room_.weights.row(q);
    for (std::int64_t i = 0; i < n_slots_; ++i)
      room_.slot_weights.row(q)[i] = weights[room_.picks[static_cast<std::size_t>(i)]];
  }
  room_.slot_values.reshape(n_slots_, args_.head_dim + 1);
  for (std::int64_t i = 0; i < n_slots_; ++i) {
    const float* value = room_.values.row(room_.picks[static_cast<std::size_t>(i)]);
    std::copy_n(value, args_.head_dim + 1, room_.slot_values.row(i));
  }
  room_.factors.assign(static_cast<std::size_t>(n_slots_), 1.0);
  return true;
}

/// Turns room.products into room.gram and adds a ridge, given in units of the mean diagonal.
/// Returns the ridge that was added.
double Fit::load_gram(double relative_ridge) {
  const auto n = static_cast<std::size_t>(n_slots_);
  room_.gram.resize(n * n);
  double trace = 0.0;
  for (std::size_t i = 0; i < n; ++i) {
    std::copy_n(room_.products.row(static_cast<std::int64_t>(i)), n, &room_.gram[i * n]);
    trace += room_.gram[i * n + i];
  }
  const double ridge = relative_ridge * trace / static_cast<double>(n);
  for (std::size_t i = 0; i < n; ++i) room_.gram[i * n + i] += ridge;
  return ridge;
}

/// Fits the factors of the slots' weights to the mass of the span.
void Fit::fit_weights() {
  multiply_transposed(room_.slot_weights, room_.slot_weights, n_fitted_, room_.products);
  load_gram(kMassRidge);
  multiply_transposed(room_.slot_weights, room_.targets, n_fitted_, room_.products);
  room_.right.resize(static_cast<std::size_t>(n_slots_));
  for (std::int64_t i = 0; i < n_slots_; ++i) {
    const auto product = static_cast<double>(room_.products.row(i)[args_.head_dim]);
    room_.right[static_cast<std::size_t>(i)] = product / value_scale();
  }
  solve_bounded(room_.gram, room_.right, 1.0 / kMostFactor, kMostFactor, room_.factors);
  for (std::int64_t q = 0; q < args_.n_queries; ++q) {
    float* weights = room_.slot_weights.row(q);
    for (std::int64_t i = 0; i < n_slots_; ++i)
      weights[i] *= static_cast<float>(room_.factors[static_cast<std::size_t>(i)]);
  }
}

/// room.mixed: the slots' weights, scaled so that they add up to the true mass of the span. Values
/// are fitted to this: an error of the mass is not theirs to mend.
void Fit::mix() {
  room_.mixed.reshape(n_fitted_, n_slots_);
  for (std::int64_t q = 0; q < n_fitted_; ++q) {
    const float* weights = room_.slot_weights.row(q);
    const float sum = std::accumulate(weights, weights + n_slots_, 0.0f);
    const float mass = room_.targets.row(q)[args_.head_dim] / static_cast<float>(value_scale());
    for (std::int64_t i = 0; i < n_slots_; ++i) room_.mixed.row(q)[i] = weights[i] * (mass / sum);
  }
}

/// Moves the selected values to where the slots' output is nearest to the span's.
bool Fit::fit_values() {
  const auto dim = static_cast<std::size_t>(args_.head_dim);
  mix();
  multiply_transposed(room_.mixed, room_.mixed, n_fitted_, room_.products);
  const double ridge = load_gram(kValueRidge);
  multiply_transposed(room_.mixed, room_.targets, n_fitted_, room_.products);
  room_.right.resize(static_cast<std::size_t>(n_slots_) * dim);
  for (std::int64_t i = 0; i < n_slots_; ++i) {
    const float *product = room_.products.row(i), *value = room_.slot_values.row(i);
    double* right = &room_.right[static_cast<std::size_t>(i) * dim];
    for (std::size_t d = 0; d < dim; ++d)
      right[d] = static_cast<double>(product[d]) + ridge * static_cast<double>(value[d]);
  }
  if (!solve_positive(room_.gram, n_slots_, room_.right, args_.head_dim)) return false;
  for (std::int64_t i = 0; i < n_slots_; ++i)
    std::copy_n(&room_.right[static_cast<std::size_t>(i) * dim], dim, room_.slot_values.row(i));
  return true;
}

/// The error on the queries that were held out, and the span's share of their attention.
void Fit::measure(float top_share, SlotFit& fit) {
  multiply(room_.slot_weights, room_.slot_values, room_.outputs);
  const std::int64_t first = n_fitted_ < args_.n_queries ? n_fitted_ : 0;
  double differences = 0.0, lengths = 0.0, masses = 0.0;
  for (std::int64_t q = first; q < args_.n_queries; ++q) {
    const float *output = room_.outputs.row(q), *target = room_.targets.row(q);
    for (std::int64_t d = 0; d <= args_.head_dim; ++d) {
      const double wanted = static_cast<double>(target[d]);
      const double difference = static_cast<double>(output[d]) - wanted;
      differences += difference * difference;
      lengths += wanted * wanted;
    }
    const double mass = static_cast<double>(target[args_.head_dim]) / value_scale();
    masses += mass * mass;
  }
  fit.error = static_cast<float>(std::sqrt(differences / lengths));
  const auto n = static_cast<double>(args_.n_queries - first);
  fit.share = static_cast<float>(std::sqrt(masses / n) * static_cast<double>(top_share));
}

std::optional<SlotFit> Fit::result(float top_share) {
  const auto n = static_cast<std::size_t>(args_.n_slots);
  const auto n_floats = n * static_cast<std::size_t>(args_.head_dim);
  SlotFit fit{std::vector<float>(n_floats, 0.0f), std::vector<float>(n_floats, 0.0f),
              std::vector<float>(n, kEmptySlot), 0.0f, 0.0f};
  for (std::int64_t i = 0; i < n_slots_; ++i) {
    const auto slot = static_cast<std::size_t>(i);
    const auto pick = static_cast<std::size_t>(room_.picks[slot]);
    const float* key = args_.keys + room_.distinct[pick] * args_.head_dim;
    std::copy_n(key, args_.head_dim, fit.keys.begin() + i * args_.head_dim);
    std::copy_n(room_.slot_values.row(i), args_.head_dim, fit.values.begin() + i * args_.head_dim);
    fit.log_weights[slot] =
        static_cast<float>(std::log(room_.factors[slot])) + room_.log_counts[pick];
  }
  measure(top_share, fit);
  const bool finite = std::isfinite(fit.error) && std::isfinite(fit.share) &&
                      all_finite(fit.values.data(), args_.n_slots * args_.head_dim) &&
                      all_finite(fit.log_weights.data(), args_.n_slots);
  if (!finite) return std::nullopt;
  return fit;
}

}  // namespace

std::optional<SlotFit> fit_slots(const SlotFitArgs& args, SlotFitRoom& room) {
  if (!usable(args)) return std::nullopt;
  return Fit(args, room).run();
}

}  // namespace modularbase::kernels
