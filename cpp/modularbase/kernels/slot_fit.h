#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "modularbase/kernels/padded_matrix.h"
#include "modularbase/kernels/slot_select.h"

namespace modularbase::kernels {

/// A span of one kv head's cache, and queries that stand for those to come.
struct SlotFitArgs {
  std::int64_t head_dim;
  std::int64_t n_keys;
  std::int64_t n_queries;
  std::int64_t n_slots;   // at most n_keys
  const float* keys;      // [head_dim, n_keys], rotated by position as in the cache
  const float* values;    // [head_dim, n_keys]
  const float* queries;   // [head_dim, n_queries]: of all query heads that share this kv head, from
                          // positions after the span: those inside it see their neighbours most
  const float* log_mass;  // [n_queries]: ln sum exp(score) of everything the query saw
  float scale;            // of scores: 1 / sqrt(head_dim)
};

/// The log weight of a slot that stands for nothing; finite, so that differences are too.
inline constexpr float kEmptySlot = -1e4f;

/// Keys that stand for a span: a slot's score is that of its key plus its log weight.
struct SlotFit {
  std::vector<float> keys;         // [head_dim, n_slots]
  std::vector<float> values;       // [head_dim, n_slots]
  std::vector<float> log_weights;  // [n_slots]
  // On queries the fit did not see: the length of the difference that the slots make to the span's
  // part of the attention output, over the length of that part. The part is, per query, the sum of
  // weighted values and the sum of weights, times the values' root mean square. 1: as dropping it.
  float error;
  float share;  // root mean square of these queries' share of attention that the span has
};

/// Memory that fits share one after the other.
struct SlotFitRoom {
  std::vector<std::int64_t> distinct;  // [n_keys] the first of each group of equal keys
  std::vector<float> log_counts;       // [n_keys] ln of a group's size
  PaddedMatrix keys;                   // [head_dim, n_keys], transposed to [d][key]
  PaddedMatrix queries;                // [n_queries, head_dim]: held-out ones last
  std::vector<float> log_mass;         // [n_queries] in that order
  std::vector<float> log_shares;       // [n_queries]
  PaddedMatrix weights;                // [n_queries, n_keys]: shares of the query's attention
  PaddedMatrix values;                 // [n_keys, head_dim + 1]: values, and their length
  PaddedMatrix targets;                // [n_queries, head_dim + 1]: weights x values
  ColumnSelection selection;
  std::vector<std::int64_t> picks;  // [n_slots] of the distinct keys
  PaddedMatrix slot_weights;        // [n_queries, n_slots]
  PaddedMatrix mixed;               // [n_queries, n_slots]: slot weights as the span's shares
  PaddedMatrix slot_values;         // [n_slots, head_dim + 1]
  PaddedMatrix outputs;             // [n_queries, head_dim + 1]: slot weights x slot values
  PaddedMatrix products;            // Gram matrices and right sides, before they are doubles
  std::vector<double> gram, right, factors;
};

/// Fits slots to a span (Attention Matching, Zweiger et al. 2026, arXiv 2602.16284, with each query
/// weighted by the share of its attention that the span has): keys are selected so that their
/// attention weights span the output, log weights fitted to the mass, values to the output.
///
/// Equal keys count as one. A span of at most n_slots different keys is reproduced exactly.
///
/// Nothing where numbers are not finite, there are no keys, queries or slots, or more slots than
/// keys.
std::optional<SlotFit> fit_slots(const SlotFitArgs& args, SlotFitRoom& room);

/// The attention that each key received, summed over the queries: [n_keys]. Reads neither values
/// nor n_slots. A query adds at least e^-30 and at most 1 to a key, whatever the numbers.
void attention_received(const SlotFitArgs& args, SlotFitRoom& room, float* received);

}  // namespace modularbase::kernels
