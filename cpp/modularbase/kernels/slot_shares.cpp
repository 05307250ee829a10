#include "modularbase/kernels/slot_shares.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "modularbase/kernels/simd.h"

namespace modularbase::kernels {
namespace {

using simd::kLanes;
using simd::Vec;

constexpr std::int64_t kHeldOutEvery = 4;
constexpr float kNoKey = -1e30f;  // far below any score, finite so that differences are too

/// Adds the log counts to a row of scores; the columns after the last key get kNoKey.
/// Returns the maximum; NaN if a score is not finite.
float finish_scores(const float* log_counts, std::int64_t n_keys, std::int64_t stride,
                    float* scores) {
  Vec most = simd::set1(kNoKey), check = simd::zero();
  std::fill(scores + n_keys, scores + stride, kNoKey);
  for (std::int64_t k = 0; k < stride; k += kLanes) {
    const Vec score = simd::load(scores + k) + simd::load(log_counts + k);
    most = simd::max(most, score);
    check = simd::fma(score, simd::zero(), check);  // NaN, once anything is not finite
    simd::store(scores + k, score);
  }
  float maxima[kLanes], checks[kLanes];
  simd::store(maxima, most);
  simd::store(checks, check);
  return *std::max_element(maxima, maxima + kLanes) +
         std::accumulate(checks, checks + kLanes, 0.0f);
}

/// Scores become softmax(scores). Returns ln sum exp(score).
float softmax(float max, std::int64_t stride, float* scores) {
  Vec sums = simd::zero();
  for (std::int64_t k = 0; k < stride; k += kLanes) {
    const Vec exponent = simd::load(scores + k) - simd::set1(max);
    const Vec weight = simd::exp(simd::max(exponent, simd::set1(kLeastExponent)));
    sums = sums + weight;
    simd::store(scores + k, weight);
  }
  float lanes[kLanes];
  simd::store(lanes, sums);
  const float sum = std::accumulate(lanes, lanes + kLanes, 0.0f);
  for (std::int64_t k = 0; k < stride; k += kLanes)
    simd::store(scores + k, simd::load(scores + k) * simd::set1(1.0f / sum));
  return max + std::log(sum);
}

}  // namespace

void transpose_keys(const SlotFitArgs& args, SlotFitRoom& room) {
  const auto n = static_cast<std::int64_t>(room.distinct.size());
  room.keys.reshape(args.head_dim, n);
  for (std::int64_t k = 0; k < n; ++k) {
    const float* key = args.keys + room.distinct[static_cast<std::size_t>(k)] * args.head_dim;
    for (std::int64_t d = 0; d < args.head_dim; ++d) room.keys.row(d)[k] = key[d];
  }
}

std::int64_t order_queries(const SlotFitArgs& args, SlotFitRoom& room) {
  const std::int64_t n = args.n_queries, n_held_out = n / kHeldOutEvery;
  room.queries.reshape(n, args.head_dim);
  room.log_mass.resize(static_cast<std::size_t>(n));
  std::int64_t next_fitted = 0, next_held_out = n - n_held_out;
  for (std::int64_t q = 0; q < n; ++q) {
    const bool held_out = q % kHeldOutEvery == kHeldOutEvery - 1;
    const std::int64_t to = held_out ? next_held_out++ : next_fitted++;
    const float* query = args.queries + q * args.head_dim;
    for (std::int64_t d = 0; d < args.head_dim; ++d)
      room.queries.row(to)[d] = query[d] * args.scale;
    room.log_mass[static_cast<std::size_t>(to)] = args.log_mass[q];
  }
  return n - n_held_out;
}

std::optional<float> scores_to_shares(SlotFitRoom& room) {
  PaddedMatrix& weights = room.weights;
  const std::int64_t n_keys = weights.n_columns(), stride = weights.stride();
  room.log_shares.resize(static_cast<std::size_t>(weights.n_rows()));
  float top = kNoKey;
  for (std::int64_t q = 0; q < weights.n_rows(); ++q) {
    const float max = finish_scores(room.log_counts.data(), n_keys, stride, weights.row(q));
    if (!std::isfinite(max)) return std::nullopt;
    const auto at = static_cast<std::size_t>(q);
    room.log_shares[at] = std::min(softmax(max, stride, weights.row(q)) - room.log_mass[at], 0.0f);
    top = std::max(top, room.log_shares[at]);
  }
  for (std::int64_t q = 0; q < weights.n_rows(); ++q) {
    float* row = weights.row(q);
    const Vec share = simd::set1(std::exp(room.log_shares[static_cast<std::size_t>(q)] - top));
    const Vec least = simd::set1(std::exp(kLeastExponent));
    for (std::int64_t k = 0; k < stride; k += kLanes)
      simd::store(row + k, simd::max(simd::load(row + k) * share, least));
    std::fill(row + n_keys, row + stride, 0.0f);
  }
  return std::exp(top);
}

void attention_received(const SlotFitArgs& args, SlotFitRoom& room, float* received) {
  room.distinct.resize(static_cast<std::size_t>(args.n_keys));
  std::iota(room.distinct.begin(), room.distinct.end(), 0);
  transpose_keys(args, room);
  order_queries(args, room);
  multiply(room.queries, room.keys, room.weights);
  std::vector<float> sums(static_cast<std::size_t>(room.weights.stride()), 0.0f);
  for (std::int64_t q = 0; q < args.n_queries; ++q) {
    const Vec log_mass = simd::set1(room.log_mass[static_cast<std::size_t>(q)]);
    for (std::int64_t k = 0; k < room.weights.stride(); k += kLanes) {
      const Vec exponent = simd::min(simd::load(room.weights.row(q) + k) - log_mass, simd::zero());
      const Vec share = simd::exp(simd::max(exponent, simd::set1(kLeastExponent)));
      float* sum = &sums[static_cast<std::size_t>(k)];
      simd::store(sum, simd::load(sum) + share);
    }
  }
  std::copy_n(sums.begin(), args.n_keys, received);
}

}  // namespace modularbase::kernels
