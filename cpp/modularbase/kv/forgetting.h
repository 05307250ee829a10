#pragma once

#include <cstdint>
#include <span>

#include "modularbase/kv/past_layout.h"

namespace modularbase {

/// Consecutive positions.
struct PositionRange {
  std::int32_t start = 0;
  std::int32_t n_tokens = 0;
};

/// Whether a sequence can forget ranges: in order, in its whole blocks, and no summary is cut.
bool can_forget(const KvSequence& sequence, std::span<const PositionRange> ranges);

/// The plan after which a sequence is as if the ranges' tokens had not been said, but for what
/// later ones took from them: what lies behind moves up. All of it is then compacted; tokens at the
/// end that would not fill a block are left out, to be computed again.
PastPlan plan_forgetting(const KvSequence& sequence, std::span<const PositionRange> ranges);

}  // namespace modularbase
