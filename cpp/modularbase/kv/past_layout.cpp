#include "modularbase/kv/past_layout.h"

#include <algorithm>
#include <bit>
#include <iterator>

namespace modularbase {
namespace {

using kernels::kBlockTokens;
using kernels::KvTier;

// A 4-bit block that shows fewer tokens than this is not worth its bytes: they are rounded again
// together with others, which costs some precision once more.
constexpr int kFewTokens = 56;

constexpr std::uint64_t bit(std::size_t i) {
  return std::uint64_t{1} << i;
}

constexpr std::uint64_t first_bits(std::size_t n) {
  return n == kBlockTokens ? ~std::uint64_t{0} : bit(n) - 1;
}

PastSource source_in(const PastBlock& block, std::size_t i) {
  const auto index = static_cast<std::int32_t>(i);
  return {{block.memory, block.lower, index},
          {block.memory, block.upper, index},
          block.positions[i],
          -1};
}

// Whether a block holds something for all layers to see as tokens.
bool holds_tokens(const PastBlock& block) {
  return block.memory == kernels::kExactTier || block.memory == kernels::kImportantTier;
}

// Whether what is seen of a block is rather put into a new one, where there are others like it.
bool is_open(const PastBlock& block, std::uint64_t visible) {
  const bool is_rounded =
      block.memory == kernels::kImportantTier || block.memory == kernels::kDetailTier;
  return std::popcount(visible) < (is_rounded ? kFewTokens : kBlockTokens);
}

/// Gathers what each tier's new blocks are made of.
class Arrangement {
 public:
  Arrangement(const KvSequence& sequence, const LocatedPast& located, const PastPlan& plan,
              std::span<const std::int32_t> n_slots)
      : sequence_(sequence),
        located_(located),
        plan_(plan),
        tiers_(located.tiers),
        fitted_(tiers_.size()) {
    for (std::size_t i = 0; i < plan.spans.size(); ++i) settle(i, n_slots[i]);
    // A redundant token without a span, of old or new, has nothing that could stand for it.
    for (std::size_t p = 0; p < tiers_.size(); ++p) {
      const bool is_left = located.holders[p] >= 0 || is_in_table(p);
      if (is_left && tiers_[p] == Tier::kRedundant && !fitted_[p]) tiers_[p] = Tier::kImportant;
    }
  }

  NewPast finish() {
    take_from_table();
    for (std::size_t b = 0; b < sequence_.past.blocks.size(); ++b) take_moved(b);
    for (const PastBlock& block : sequence_.past.blocks) {
      if (block.memory != kernels::kExactTier) keep_or_reopen(block);
    }
    let_the_rest_wait();
    for (const PastBlock& block : sequence_.past.blocks) {
      if (block.memory == kernels::kExactTier) keep_or_reopen(block);
    }
    add_blocks(exact_, Tier::kKey, kernels::kExactTier);
    add_blocks(important_, Tier::kImportant, kernels::kImportantTier);
    add_blocks(slots_, Tier::kRedundant, kernels::kRedundantTier);
    add_blocks(details_, Tier::kRedundant, kernels::kDetailTier);
    std::ranges::sort(result_.spans, {}, &SlotSpan::start);
    result_.tiers = std::move(tiers_);
    if (moves()) renumber();
    return std::move(result_);
  }

 private:
  bool is_in_table(std::size_t p) const {
    return static_cast<std::int64_t>(p) >= sequence_.past.n_positions;
  }

  bool moves() const { return !plan_.moves.empty(); }
  bool is_forgotten(std::int32_t p) const {
    return moves() && plan_.moves[static_cast<std::size_t>(p)] < 0;
  }

  void settle(std::size_t i, std::int32_t n_slots) {
    const SlotSpan& span = plan_.spans[i];
    if (n_slots < 0) return;
    std::fill_n(fitted_.begin() + span.start, span.n_tokens, true);
    std::fill_n(tiers_.begin() + span.start, span.n_tokens, Tier::kRedundant);
    result_.spans.push_back({span.start, span.n_tokens, n_slots});
    if (plan_.has_details && n_slots > 0) {
      const auto first = located_.places.begin() + span.start;
      details_.insert(details_.end(), first, first + span.n_tokens);
    }
    for (std::int32_t slot = 0; slot < n_slots; ++slot) {
      const TokenPlace place{kernels::kRedundantTier, kNoBlock, slot};
      slots_.push_back({place, place, span.start, static_cast<std::int32_t>(i)});
    }
  }

  void take_from_table() {
    for (auto p = static_cast<std::size_t>(sequence_.past.n_positions); p < tiers_.size(); ++p) {
      const bool is_token = tiers_[p] != Tier::kRedundant;
      if (is_token && !is_forgotten(static_cast<std::int32_t>(p))) {
        tokens_of(tiers_[p]).push_back(located_.places[p]);
      }
    }
    std::ranges::copy(sequence_.past.spans, std::back_inserter(result_.spans));
  }

  std::vector<PastSource>& tokens_of(Tier tier) { return tier == Tier::kKey ? exact_ : important_; }

  // Whether a token of a block is of the tier that the block is for; others wait there at most.
  bool belongs(const PastBlock& block, std::int32_t position) const {
    const Tier tier = tiers_[static_cast<std::size_t>(position)];
    return tier == (block.memory == kernels::kExactTier ? Tier::kKey : Tier::kImportant);
  }

  // The tokens of an old block that another tier gets.
  void take_moved(std::size_t b) {
    const PastBlock& block = sequence_.past.blocks[b];
    if (!holds_tokens(block)) return;
    for (std::size_t i = 0; i < block.positions.size(); ++i) {
      const std::int32_t p = block.positions[i];
      if (!(block.visible & bit(i)) || is_forgotten(p) || belongs(block, p)) continue;
      const Tier tier = tiers_[static_cast<std::size_t>(p)];
      if (tier != Tier::kRedundant) tokens_of(tier).push_back(source_in(block, i));
    }
  }

  std::uint64_t staying(const PastBlock& block) const {
    std::uint64_t bits = 0;
    for (std::size_t i = 0; i < block.positions.size(); ++i) {
      const std::int32_t p = block.positions[i];
      const bool stays = !holds_tokens(block) || belongs(block, p);
      if (stays && !is_forgotten(p)) bits |= block.visible & bit(i);
    }
    return bits;
  }

  std::vector<PastSource>& list(KvTier memory) {
    switch (memory) {
      case kernels::kRedundantTier:
        return slots_;
      case kernels::kDetailTier:
        return details_;
      case kernels::kImportantTier:
        return important_;
      default:
        return exact_;
    }
  }

  void keep_or_reopen(const PastBlock& block) {
    const std::uint64_t visible = staying(block);
    if (visible == 0) return;
    auto& sources = list(block.memory);
    if (!moves() && (sources.empty() || !is_open(block, visible))) {
      result_.kept.push_back(block);
      result_.kept.back().visible = visible;
      return;
    }
    for (std::size_t i = 0; i < block.positions.size(); ++i) {
      if (visible & bit(i)) sources.push_back(source_in(block, i));
    }
  }

  void add_blocks(std::vector<PastSource>& sources, Tier tier, KvTier memory) {
    std::ranges::stable_sort(sources, {}, &PastSource::position);
    for (std::size_t first = 0; first < sources.size(); first += kBlockTokens) {
      const std::size_t n = std::min<std::size_t>(kBlockTokens, sources.size() - first);
      NewPastBlock added{{.memory = memory, .tier = tier, .positions = {}}, {}};
      for (std::size_t i = first; i < first + n; ++i) {
        added.sources.push_back(sources[i]);
        added.block.positions.push_back(sources[i].position);
      }
      added.block.visible = first_bits(n);
      result_.blocks.push_back(std::move(added));
    }
  }

  // 4 bits need whole blocks: what is left over waits where exact blocks have room for it. Else it
  // is rounded, and rounded again with what comes next.
  void let_the_rest_wait() {
    std::ranges::stable_sort(important_, {}, &PastSource::position);
    const auto n_left = std::ssize(important_) % kBlockTokens;
    if (n_left > exact_room()) return;
    exact_.insert(exact_.end(), important_.end() - n_left, important_.end());
    important_.erase(important_.end() - n_left, important_.end());
  }

  // Tokens that exact blocks can take beside those that they must.
  std::ptrdiff_t exact_room() const {
    std::ptrdiff_t n = std::ssize(exact_);
    for (const PastBlock& block : sequence_.past.blocks) {
      if (block.memory != kernels::kExactTier) continue;
      const std::uint64_t visible = staying(block);
      if (moves() || is_open(block, visible)) n += std::popcount(visible);
    }
    return (kBlockTokens - n % kBlockTokens) % kBlockTokens;
  }

  // From the old positions to the new ones.
  void renumber() {
    const auto moved = [&](std::int32_t p) { return plan_.moves[static_cast<std::size_t>(p)]; };
    for (NewPastBlock& made : result_.blocks) {
      std::ranges::transform(made.block.positions, made.block.positions.begin(), moved);
    }
    std::erase_if(result_.spans, [&](const SlotSpan& span) { return moved(span.start) < 0; });
    for (SlotSpan& span : result_.spans) span.start = moved(span.start);
    std::vector<Tier> left;
    for (std::size_t p = 0; p < result_.tiers.size(); ++p) {
      if (plan_.moves[p] >= 0) left.push_back(result_.tiers[p]);
    }
    result_.tiers = std::move(left);
  }

  const KvSequence& sequence_;
  const LocatedPast& located_;
  const PastPlan& plan_;
  std::vector<Tier> tiers_;
  std::vector<bool> fitted_;
  std::vector<PastSource> exact_;
  std::vector<PastSource> important_;
  std::vector<PastSource> slots_;
  std::vector<PastSource> details_;
  NewPast result_;
};

}  // namespace

std::int64_t PastPlan::n_positions_left() const {
  if (moves.empty()) return n_positions;
  return std::ranges::count_if(moves, [](std::int32_t to) { return to >= 0; });
}

LocatedPast locate(const KvSequence& sequence, const PastPlan& plan) {
  const KvPast& past = sequence.past;
  const auto n = static_cast<std::size_t>(plan.n_positions);
  LocatedPast located{std::vector<PastSource>(n), std::vector<std::int32_t>(n, -1), plan.tiers};
  for (std::size_t p = 0; p < past.tiers.size(); ++p) {
    located.tiers[p] = std::max(located.tiers[p], past.tiers[p]);
  }
  for (std::size_t b = 0; b < past.blocks.size(); ++b) {
    const PastBlock& block = past.blocks[b];
    if (!holds_tokens(block)) continue;
    for (std::size_t i = 0; i < block.positions.size(); ++i) {
      if (!(block.visible & bit(i))) continue;
      const auto p = static_cast<std::size_t>(block.positions[i]);
      located.places[p] = source_in(block, i);
      located.holders[p] = static_cast<std::int32_t>(b);
    }
  }
  for (auto p = static_cast<std::size_t>(past.n_positions); p < n; ++p) {
    const std::size_t at = p / kBlockTokens;
    const auto index = static_cast<std::int32_t>(p % kBlockTokens);
    located.places[p] = {
        {kernels::kExactTier, sequence.lower[at], index},
        {kernels::kExactTier, sequence.upper.empty() ? kNoBlock : sequence.upper[at], index},
        static_cast<std::int32_t>(p),
        -1};
  }
  return located;
}

bool is_whole(const LocatedPast& located, const SlotSpan& span) {
  for (std::int32_t p = span.start; p < span.start + span.n_tokens; ++p) {
    if (located.places[static_cast<std::size_t>(p)].lower.block == kNoBlock) return false;
  }
  return true;
}

NewPast arrange(const KvSequence& sequence, const LocatedPast& located, const PastPlan& plan,
                std::span<const std::int32_t> n_slots) {
  return Arrangement(sequence, located, plan, n_slots).finish();
}

}  // namespace modularbase
