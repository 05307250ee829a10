#include "modularbase/kernels/expected_attention.h"

#include <algorithm>
#include <cmath>

#include "modularbase/kernels/rope.h"

namespace modularbase::kernels {
namespace {

// From a query's own turn to the mean of its turns at n positions from `first` on: the mean of
// n equal steps around a circle, in closed form.
void set_turn(const ExpectedAttentionArgs& args, std::int32_t position,
              ExpectedAttentionRoom& room) {
  const double n = args.n_ahead;
  const double middle = args.first_ahead + (n - 1.0) / 2.0;
  for (std::size_t i = 0; i < room.cos.size(); ++i) {
    const double step = args.frequencies[i];
    const double half = std::sin(step / 2.0);
    const double length = half == 0.0 ? 1.0 : std::sin(n * step / 2.0) / (n * half);
    const double angle = (middle - position) * step;
    room.cos[i] = static_cast<float>(length * std::cos(angle));
    room.sin[i] = static_cast<float>(length * std::sin(angle));
  }
}

// Room's queries become those of one head, as they are to come, times the scale.
void load_queries(const ExpectedAttentionArgs& args, std::int64_t head,
                  ExpectedAttentionRoom& room) {
  room.queries.reshape(args.n_rows, args.head_dim);
  for (std::int64_t row = 0; row < args.n_rows; ++row) {
    float* to = room.queries.row(row);
    const float* from = args.queries + (row * args.n_heads + head) * args.head_dim;
    for (std::int64_t d = 0; d < args.head_dim; ++d) to[d] = from[d] * args.scale;
    set_turn(args, args.positions[row], room);
    rope_rotate(to, room.cos.data(), room.sin.data(), args.rope_dim, args.style);
  }
}

// The logarithm of what each key is expected to draw, in room.mean.
void expect_scores(ExpectedAttentionRoom& room) {
  const std::int64_t n_rows = room.scores.n_rows(), n_keys = room.scores.n_columns();
  room.mean.assign(static_cast<std::size_t>(n_keys), 0.0f);
  room.spread.assign(static_cast<std::size_t>(n_keys), 0.0f);
  float* mean = room.mean.data();
  float* spread = room.spread.data();
  const float share = 1.0f / static_cast<float>(n_rows);
  for (std::int64_t row = 0; row < n_rows; ++row) {
    const float* scores = room.scores.row(row);
    for (std::int64_t k = 0; k < n_keys; ++k) mean[k] += share * scores[k];
  }
  for (std::int64_t row = 0; row < n_rows; ++row) {
    const float* scores = room.scores.row(row);
    for (std::int64_t k = 0; k < n_keys; ++k) {
      const float difference = scores[k] - mean[k];
      spread[k] += share * difference * difference;
    }
  }
  for (std::int64_t k = 0; k < n_keys; ++k) mean[k] += 0.5f * spread[k];
}

void add_softmax(ExpectedAttentionRoom& room) {
  const float most = *std::ranges::max_element(room.mean);
  double sum = 0.0;
  for (float& value : room.mean) {
    value = std::exp(value - most);
    sum += value;
  }
  const auto factor = static_cast<float>(1.0 / sum);
  for (std::size_t k = 0; k < room.mean.size(); ++k) room.shares[k] += room.mean[k] * factor;
}

float length(const float* values, std::int64_t n) {
  double squares = 0.0;
  for (std::int64_t i = 0; i < n; ++i) squares += static_cast<double>(values[i]) * values[i];
  return static_cast<float>(std::sqrt(squares));
}

}  // namespace

void expected_attention(const ExpectedAttentionArgs& args, ExpectedAttentionRoom& room,
                        float* expected) {
  if (args.n_keys == 0) return;
  room.cos.resize(static_cast<std::size_t>(args.rope_dim / 2));
  room.sin.resize(room.cos.size());
  room.shares.assign(static_cast<std::size_t>(args.n_keys), 0.0f);
  room.keys.reshape(args.head_dim, args.n_keys);
  for (std::int64_t k = 0; k < args.n_keys; ++k) {
    const float* key = args.keys + k * args.head_dim;
    for (std::int64_t d = 0; d < args.head_dim; ++d) room.keys.row(d)[k] = key[d];
  }
  for (std::int64_t head = 0; head < args.n_heads; ++head) {
    load_queries(args, head, room);
    multiply(room.queries, room.keys, room.scores);
    expect_scores(room);
    add_softmax(room);
  }
  const float share = 1.0f / static_cast<float>(args.n_heads);
  for (std::int64_t k = 0; k < args.n_keys; ++k) {
    const float value_length = length(args.values + k * args.head_dim, args.head_dim);
    expected[k] = share * room.shares[static_cast<std::size_t>(k)] * value_length;
  }
}

}  // namespace modularbase::kernels
