#pragma once

#include "modularbase/kernels/slot_fit.h"

namespace modularbase::kernels {

inline constexpr float kLeastExponent = -30.0f;  // smaller weights only make denormal numbers

/// Fills room.keys with the keys of room.distinct.
void transpose_keys(const SlotFitArgs& args, SlotFitRoom& room);

/// Fills room.queries and room.log_mass: every fourth query is held out of the fit and comes last.
/// Scores are products with these queries. Returns how many are not held out; of fewer than
/// four queries all are fitted to, and all count as held out.
std::int64_t order_queries(const SlotFitArgs& args, SlotFitRoom& room);

/// Turns room.weights from scores into each key's share of a query's whole attention, in units of
/// the largest share that the span has of any query's.
/// Returns that largest share; nothing if numbers are not finite.
std::optional<float> scores_to_shares(SlotFitRoom& room);

}  // namespace modularbase::kernels
