#include "modularbase/kv/past_layout.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <tuple>

using namespace modularbase;
using kernels::kBlockTokens;
using kernels::kDetailTier;
using kernels::kExactTier;
using kernels::kImportantTier;
using kernels::kRedundantTier;

namespace {

/// A sequence whose blocks hold only names: of each place, whose token or slot it is.
struct Named {
  KvSequence sequence;
  std::map<std::tuple<int, BlockId, std::int32_t>, std::int32_t> names;
  BlockId n_blocks = 0;
  bool has_details = false;

  explicit Named(std::int64_t n_tokens) {
    for (std::int64_t p = 0; p < n_tokens; p += kBlockTokens) {
      sequence.lower.push_back(n_blocks);
      sequence.upper.push_back(1000 + n_blocks);
      for (std::int32_t i = 0; i < kBlockTokens; ++i) {
        names[{kExactTier, n_blocks, i}] = static_cast<std::int32_t>(p) + i;
      }
      ++n_blocks;
    }
    sequence.set_valid(n_tokens);
  }

  std::int32_t name(const TokenPlace& place) const {
    return names.at({place.memory, place.block, place.index});
  }

  /// Makes the new past, as a compaction would, and checks where all that comes into it is from.
  void apply(const PastPlan& plan, const std::vector<std::int32_t>& n_slots) {
    NewPast made = arrange(sequence, locate(sequence, plan), plan, n_slots);
    KvPast& past = sequence.past;
    past.n_positions = plan.n_positions;
    past.blocks = std::move(made.kept);
    for (NewPastBlock& added : made.blocks) {
      REQUIRE(added.sources.size() == added.block.positions.size());
      added.block.lower = n_blocks;
      added.block.upper = 1000 + n_blocks;
      for (std::size_t i = 0; i < added.sources.size(); ++i) {
        const PastSource& source = added.sources[i];
        CHECK(source.position == added.block.positions[i]);
        if (source.span >= 0) {
          CHECK(plan.spans[static_cast<std::size_t>(source.span)].start == source.position);
        } else {
          CHECK(name(source.lower) == source.position);
          CHECK(source.upper.block == 1000 + source.lower.block);
        }
        names[{added.block.memory, n_blocks, static_cast<std::int32_t>(i)}] = source.position;
      }
      ++n_blocks;
      past.blocks.push_back(std::move(added.block));
    }
    past.tiers = std::move(made.tiers);
    past.spans = std::move(made.spans);
    const auto n = static_cast<std::size_t>(plan.n_positions / kBlockTokens);
    std::fill_n(sequence.lower.begin(), n, kNoBlock);
    std::fill_n(sequence.upper.begin(), n, kNoBlock);
  }

  /// Every position is in one block of its tier, or in a span, which has the slots it says.
  void check() const {
    const KvPast& past = sequence.past;
    std::map<std::int32_t, Tier> seen;
    std::map<std::int32_t, int> n_slots;
    std::set<std::int32_t> details;
    for (const PastBlock& block : past.blocks) {
      CHECK(block.visible != 0);
      const bool is_summary = block.memory == kRedundantTier || block.memory == kDetailTier;
      CHECK((block.tier == Tier::kRedundant) == is_summary);
      if (block.tier == Tier::kKey) CHECK(block.memory == kExactTier);
      for (std::size_t i = 0; i < kBlockTokens; ++i) {
        if (!(block.visible >> i & 1)) continue;
        REQUIRE(i < block.positions.size());
        const std::int32_t position = block.positions[i];
        CHECK(name({block.memory, block.lower, static_cast<std::int32_t>(i)}) == position);
        if (block.memory == kRedundantTier) {
          ++n_slots[position];
        } else if (block.memory == kDetailTier) {
          CHECK(details.insert(position).second);
        } else {
          const Tier tier = past.tiers[static_cast<std::size_t>(position)];
          CHECK((tier == block.tier || (tier == Tier::kImportant && block.memory == kExactTier)));
          CHECK(seen.emplace(position, tier).second);
        }
      }
    }
    for (const SlotSpan& span : past.spans) {
      CHECK(n_slots[span.start] == span.n_slots);
      for (std::int32_t p = span.start; p < span.start + span.n_tokens; ++p) {
        CHECK(seen.emplace(p, Tier::kRedundant).second);
        CHECK(details.count(p) == (has_details ? 1 : 0));
      }
    }
    REQUIRE(static_cast<std::int64_t>(seen.size()) == past.n_positions);
    for (std::size_t p = 0; p < past.tiers.size(); ++p) {
      CHECK(seen.at(static_cast<std::int32_t>(p)) == past.tiers[p]);
    }
  }
};

bool is_full(const PastBlock& block) {
  return block.positions.size() == kBlockTokens && ~block.visible == 0;
}

PastPlan all(Tier tier, std::int64_t n) {
  return {
      .n_positions = n, .tiers = std::vector<Tier>(static_cast<std::size_t>(n), tier), .spans = {}};
}

}  // namespace

TEST_CASE("important tokens fill 4-bit blocks, and what is left over waits among exact ones") {
  Named named(512);
  PastPlan plan = all(Tier::kImportant, 128);
  std::fill_n(plan.tiers.begin(), 16, Tier::kKey);
  named.apply(plan, {});
  named.check();
  const auto& blocks = named.sequence.past.blocks;
  REQUIRE(blocks.size() == 2);
  CHECK(blocks[0].tier == Tier::kKey);
  CHECK(blocks[0].memory == kExactTier);
  CHECK(blocks[0].positions.size() == 16 + 48);
  CHECK(blocks[1].memory == kImportantTier);
  CHECK(is_full(blocks[1]));
}

TEST_CASE("what is left over is rounded at once where no exact block has room for it") {
  Named named(512);
  PastPlan plan = all(Tier::kImportant, 192);
  std::fill_n(plan.tiers.begin(), 40, Tier::kKey);
  plan.spans = {{40, 44, 2}};
  std::fill_n(plan.tiers.begin() + 40, 44, Tier::kRedundant);
  named.apply(plan, {2});
  named.check();
  std::map<kernels::KvTier, std::vector<std::size_t>> n_tokens;
  for (const PastBlock& block : named.sequence.past.blocks) {
    n_tokens[block.memory].push_back(block.positions.size());
  }
  CHECK(n_tokens[kExactTier] == std::vector<std::size_t>{40});
  CHECK(n_tokens[kImportantTier] == std::vector<std::size_t>{64, 44});
}

TEST_CASE("open blocks are filled by what comes next, full ones stay as they are") {
  Named named(512);
  named.apply(all(Tier::kImportant, 64), {});
  PastPlan plan = all(Tier::kImportant, 192);
  std::fill(plan.tiers.begin() + 64, plan.tiers.begin() + 80, Tier::kKey);
  named.apply(plan, {});
  named.check();
  CHECK(named.sequence.past.blocks[0].lower == 8);  // the one that was full
  plan = all(Tier::kImportant, 256);
  std::fill(plan.tiers.begin() + 64, plan.tiers.begin() + 80, Tier::kKey);
  named.apply(plan, {});
  named.check();
  const auto n_open = std::ranges::count_if(named.sequence.past.blocks,
                                            [](const PastBlock& b) { return !is_full(b); });
  CHECK(n_open == 0);  // 48 important tokens wait beside the 16 that are key
}

TEST_CASE("nothing comes back from a lower tier") {
  Named named(256);
  named.apply(all(Tier::kImportant, 128), {});
  named.apply(all(Tier::kKey, 192), {});
  named.check();
  const auto& tiers = named.sequence.past.tiers;
  CHECK(std::all_of(tiers.begin(), tiers.begin() + 128,
                    [](Tier t) { return t == Tier::kImportant; }));
  CHECK(std::all_of(tiers.begin() + 128, tiers.end(), [](Tier t) { return t == Tier::kKey; }));
}

TEST_CASE("a span becomes slots, or stays important where its fit was refused") {
  Named named(512);
  named.apply(all(Tier::kImportant, 128), {});
  PastPlan plan = all(Tier::kImportant, 256);
  plan.spans = {{10, 60, 4}, {100, 90, 6}};
  for (const SlotSpan& span : plan.spans) {
    std::fill_n(plan.tiers.begin() + span.start, span.n_tokens, Tier::kRedundant);
  }
  named.apply(plan, {4, -1});
  named.check();
  REQUIRE(named.sequence.past.spans.size() == 1);
  CHECK(named.sequence.past.tiers[10] == Tier::kRedundant);
  CHECK(named.sequence.past.tiers[100] == Tier::kImportant);
  // The second try may find it good; the slots there are gather with the new ones.
  named.apply(plan, {-1, 6});
  named.check();
  CHECK(named.sequence.past.spans.size() == 2);
}

TEST_CASE("a redundant token without a span is important: nothing would stand for it") {
  Named named(256);
  named.apply(all(Tier::kRedundant, 128), {});
  named.check();
  CHECK(named.sequence.past.tiers[5] == Tier::kImportant);
}

TEST_CASE("any series of plans keeps every token once") {
  std::mt19937 random(7);
  const auto below = [&](int n) { return std::uniform_int_distribution<int>(0, n - 1)(random); };
  for (int run = 0; run < 60; ++run) {
    Named named(1024);
    named.has_details = run % 2 == 1;
    std::int64_t n = 0;
    for (int round = 0; round < 8; ++round) {
      n = std::min<std::int64_t>(1024, n + below(4) * kBlockTokens);
      PastPlan plan = all(Tier::kImportant, n);
      plan.has_details = named.has_details;
      for (std::int64_t p = 0; p < n;) {
        const std::int64_t end = std::min<std::int64_t>(n, p + 1 + below(90));
        const auto tier = static_cast<Tier>(below(3));
        std::fill(plan.tiers.begin() + p, plan.tiers.begin() + end, tier);
        const bool gets_span = tier == Tier::kRedundant && below(4) > 0;
        const auto length = static_cast<std::int32_t>(end - p);
        if (gets_span) {
          plan.spans.push_back(
              {static_cast<std::int32_t>(p), length, std::min(length, 1 + below(9))});
        }
        p = end;
      }
      const LocatedPast located = locate(named.sequence, plan);
      std::vector<std::int32_t> n_slots;
      for (const SlotSpan& span : plan.spans) {
        const bool is_fitted = is_whole(located, span) && below(3) > 0;
        n_slots.push_back(is_fitted ? span.n_slots : -1);
      }
      const std::vector<Tier> before = named.sequence.past.tiers;
      named.apply(plan, n_slots);
      named.check();
      for (std::size_t p = 0; p < before.size(); ++p) {
        CHECK(named.sequence.past.tiers[p] >= before[p]);
      }
    }
  }
}
