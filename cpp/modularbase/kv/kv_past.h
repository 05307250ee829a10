#pragma once

#include <cstdint>
#include <vector>

#include "modularbase/core/types.h"
#include "modularbase/kernels/attention.h"

namespace modularbase {

inline constexpr BlockId kNoBlock = -1;

/// How much of a token's keys and values is kept once it has left the window.
enum class Tier : std::uint8_t {
  kKey,        // all
  kImportant,  // 4 bits
  kRedundant,  // a share of a few slots
};

/// One block of a sequence's compacted past, in each group of layers. Never written again.
struct PastBlock {
  kernels::KvTier memory;  // which blocks it is one of
  Tier tier;               // of its tokens; in exact ones, important tokens may wait for a block
  BlockId lower = kNoBlock;
  BlockId upper = kNoBlock;             // none when there is one group
  std::uint64_t visible = 0;            // bit i: token or slot i counts
  std::vector<std::int32_t> positions;  // of its tokens; of slots, where their span starts
};

/// Consecutive redundant tokens that share slots.
struct SlotSpan {
  std::int32_t start = 0;
  std::int32_t n_tokens = 0;
  std::int32_t n_slots = 0;  // wanted, or had
};

/// What is left of a sequence's first positions.
struct KvPast {
  std::int64_t n_positions = 0;   // a multiple of a block's tokens; later ones lie in the table
  std::vector<PastBlock> blocks;  // all a later token sees of them, in no order
  std::vector<Tier> tiers;        // of each position
  std::vector<SlotSpan> spans;    // the redundant ones, in order

  bool empty() const { return n_positions == 0; }
};

}  // namespace modularbase
