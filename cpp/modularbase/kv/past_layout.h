#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "modularbase/kv/kv_cache.h"
#include "modularbase/kv/tile_reader.h"

namespace modularbase {

/// What a sequence's past shall become. Nothing comes back from a lower tier: where the plan asks
/// for more than is left, what is left stays.
struct PastPlan {
  std::int64_t n_positions = 0;  // all valid; at least those of the past there is
  std::vector<Tier> tiers;       // of each position
  std::vector<SlotSpan> spans;  // of the redundant tokens, in order; without one they are important
  float max_error = 0.0f;       // of a fit's output: beyond it, a span stays important
  bool has_details = false;     // some heads keep the tokens that slots stand for
  // Where each position goes, in order; -1: it is forgotten. Empty: all stay where they are.
  std::vector<std::int32_t> moves = {};

  /// After the moves.
  std::int64_t n_positions_left() const;
};

/// A token or slot on its way into a new block.
struct PastSource {
  TokenPlace lower;
  TokenPlace upper;
  std::int32_t position = 0;  // before any move; of a slot: where its span starts
  std::int32_t span = -1;  // of a new slot: which of the plan's, and places[].index is its number
};

/// Where the positions of a plan lie now, and what each can become.
struct LocatedPast {
  std::vector<PastSource> places;     // of each position; meaningless for one that slots stand for
  std::vector<std::int32_t> holders;  // which of the old blocks; -1: the table, or slots
  std::vector<Tier> tiers;            // no better than what is left of it
};
LocatedPast locate(const KvSequence& sequence, const PastPlan& plan);

/// Whether all tokens of a span can still be fitted.
bool is_whole(const LocatedPast& located, const SlotSpan& span);

/// A block to be filled.
struct NewPastBlock {
  PastBlock block;
  std::vector<PastSource> sources;
};

/// The past that a plan makes of the old one: blocks that stay, perhaps seen less of, and new ones.
struct NewPast {
  std::vector<PastBlock> kept;
  std::vector<NewPastBlock> blocks;
  std::vector<Tier> tiers;
  std::vector<SlotSpan> spans;
};
/// n_slots: of each of the plan's spans, how many it got; -1 where it stays important.
NewPast arrange(const KvSequence& sequence, const LocatedPast& located, const PastPlan& plan,
                std::span<const std::int32_t> n_slots);

}  // namespace modularbase
