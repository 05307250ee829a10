#include "modularbase/kv/forgetting.h"

#include <algorithm>

namespace modularbase {
namespace {

constexpr std::int64_t kBlock = kernels::kBlockTokens;

std::int64_t whole_blocks(std::int64_t n) {
  return n / kBlock * kBlock;
}

bool overlaps(const PositionRange& range, const SlotSpan& span) {
  return range.start < span.start + span.n_tokens && span.start < range.start + range.n_tokens;
}

bool contains(const PositionRange& range, const SlotSpan& span) {
  return range.start <= span.start && span.start + span.n_tokens <= range.start + range.n_tokens;
}

}  // namespace

bool can_forget(const KvSequence& sequence, std::span<const PositionRange> ranges) {
  std::int64_t end = 0;
  for (const PositionRange& range : ranges) {
    if (range.start < end || range.n_tokens < 1) return false;
    end = range.start + range.n_tokens;
    const bool cuts = std::ranges::any_of(sequence.past.spans, [&](const SlotSpan& span) {
      return overlaps(range, span) && !contains(range, span);
    });
    if (cuts) return false;
  }
  return end <= whole_blocks(sequence.n_tokens);
}

PastPlan plan_forgetting(const KvSequence& sequence, std::span<const PositionRange> ranges) {
  PastPlan plan{.n_positions = whole_blocks(sequence.n_tokens),
                .tiers = sequence.past.tiers,
                .spans = {},
                .moves = {}};
  plan.tiers.resize(static_cast<std::size_t>(plan.n_positions), Tier::kKey);
  plan.moves.assign(plan.tiers.size(), 0);
  for (const PositionRange& range : ranges) {
    std::fill_n(plan.moves.begin() + range.start, range.n_tokens, -1);
  }
  std::int32_t n_left = 0;
  for (std::int32_t& to : plan.moves) {
    if (to >= 0) to = n_left++;
  }
  // What slots stand for cannot be left out in part.
  std::int64_t n = whole_blocks(n_left);
  for (auto span = sequence.past.spans.rbegin(); span != sequence.past.spans.rend(); ++span) {
    const std::int64_t start = plan.moves[static_cast<std::size_t>(span->start)];
    if (start >= 0 && start < n && start + span->n_tokens > n) n = whole_blocks(start);
  }
  for (std::int32_t& to : plan.moves) {
    if (to >= n) to = -1;
  }
  return plan;
}

}  // namespace modularbase
