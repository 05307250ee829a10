#pragma once

#include <cstdint>
#include <vector>

#include "modularbase/kernels/attention.h"
#include "modularbase/kernels/padded_matrix.h"

namespace modularbase::kernels {

/// Keys and values of one kv head, and the last queries of the query heads that share it.
struct ExpectedAttentionArgs {
  std::int64_t head_dim;
  std::int64_t n_keys;
  std::int64_t n_heads;           // query heads
  std::int64_t n_rows;            // queries of each
  const float* keys;              // [head_dim, n_keys], rotated by position as in the cache
  const float* values;            // [head_dim, n_keys]
  const float* queries;           // [head_dim, n_heads, n_rows], rotated by position
  const std::int32_t* positions;  // [n_rows] where the queries were asked
  std::int32_t first_ahead;       // the queries to come are asked from this position on ...
  std::int32_t n_ahead;           // ... at so many
  const float* frequencies;       // [rope_dim / 2] what a pair turns from a position to the next
  std::int64_t rope_dim;
  RopeStyle style;
  float scale;  // of scores: 1 / sqrt(head_dim)
};

/// Memory that calls share one after the other.
struct ExpectedAttentionRoom {
  PaddedMatrix keys;     // [head_dim, n_keys], transposed to [d][key]
  PaddedMatrix queries;  // [n_rows, head_dim] of one head
  PaddedMatrix scores;   // [n_rows, n_keys]
  std::vector<float> mean, spread, shares;
  std::vector<float> cos, sin;  // [rope_dim / 2]
};

/// How much each key matters to queries to come, were they drawn as the last ones were (Devoto et
/// al. 2025, arXiv:2510.00636): the share of their attention that it gets among the keys given,
/// times the length of its value, as a mean over the query heads: expected [n_keys].
///
/// Queries are turned back and on to the mean of their turns at the positions ahead. Of those, as a
/// normal distribution, E exp(q.k) = exp(mean(q.k) + var(q.k) / 2).
void expected_attention(const ExpectedAttentionArgs& args, ExpectedAttentionRoom& room,
                        float* expected);

}  // namespace modularbase::kernels
