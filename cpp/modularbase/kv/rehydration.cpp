#include "modularbase/kv/rehydration.h"

#include <algorithm>
#include <utility>

namespace modularbase {

using kernels::kBlockTokens;

namespace {

// The bits of a block whose positions a predicate takes.
template <class Takes>
std::uint64_t bits_where(const PastBlock& block, const Takes& takes) {
  std::uint64_t bits = 0;
  for (std::size_t i = 0; i < block.positions.size(); ++i) {
    if (takes(block.positions[i])) bits |= std::uint64_t{1} << i;
  }
  return bits;
}

}  // namespace

std::vector<SlotSpan> rehydration_runs(const KvPast& past, std::span<const std::int32_t> starts) {
  std::vector<SlotSpan> runs;
  for (const SlotSpan& span : past.spans) {
    if (std::ranges::find(starts, span.start) == starts.end()) continue;
    if (!runs.empty() && runs.back().start + runs.back().n_tokens == span.start) {
      runs.back().n_tokens += span.n_tokens;
    } else {
      runs.push_back({span.start, span.n_tokens, 0});
    }
  }
  std::ranges::reverse(runs);
  return runs;
}

// A slot's position is where its span starts, and spans do not overlap.
Rehydration::Rehydration(KvCache& cache, const KvSequence& sequence, const SlotSpan& run)
    : cache_(cache), run_(run) {
  view_.past.n_positions = run.start;
  for (PastBlock block : sequence.past.blocks) {
    block.visible &= bits_where(block, [&](std::int32_t p) { return p < run.start; });
    if (block.visible != 0) view_.past.blocks.push_back(std::move(block));
  }
  view_.set_valid(run.start);
  const auto n_before = static_cast<std::size_t>(run.start / kBlockTokens);
  view_.lower.assign(n_before, kNoBlock);
  if (!sequence.upper.empty()) view_.upper.assign(n_before, kNoBlock);
}

Rehydration::~Rehydration() {
  view_.past = {};
  cache_.release(view_);
}

bool Rehydration::reserve() {
  return cache_.reserve(view_, end());
}

void Rehydration::commit(KvSequence& sequence) {
  drop_summary(sequence);
  add_blocks(sequence.past);
  std::fill_n(sequence.past.tiers.begin() + run_.start, run_.n_tokens, Tier::kImportant);
  std::erase_if(sequence.past.spans, [&](const SlotSpan& span) {
    return span.start >= run_.start && span.start < end();
  });
}

void Rehydration::drop_summary(KvSequence& sequence) {
  for (PastBlock& block : sequence.past.blocks) {
    if (block.tier != Tier::kRedundant) continue;
    const auto is_of_run = [&](std::int32_t p) { return p >= run_.start && p < end(); };
    block.visible &= ~bits_where(block, is_of_run);
    if (block.visible == 0) cache_.release(block);
  }
  std::erase_if(sequence.past.blocks, [](const PastBlock& block) { return block.visible == 0; });
}

// The table's blocks become blocks of the past; of the first and the last, the run's tokens are
// seen.
void Rehydration::add_blocks(KvPast& past) {
  for (auto at = static_cast<std::size_t>(run_.start / kBlockTokens); at < view_.lower.size();
       ++at) {
    PastBlock block{.memory = kernels::kExactTier,
                    .tier = Tier::kImportant,
                    .lower = std::exchange(view_.lower[at], kNoBlock),
                    .positions = {}};
    if (!view_.upper.empty()) block.upper = std::exchange(view_.upper[at], kNoBlock);
    for (std::int64_t i = 0; i < kBlockTokens; ++i) {
      block.positions.push_back(
          static_cast<std::int32_t>(static_cast<std::int64_t>(at) * kBlockTokens + i));
    }
    block.visible = bits_where(block, [&](std::int32_t p) { return p >= run_.start && p < end(); });
    past.blocks.push_back(std::move(block));
  }
}

}  // namespace modularbase
