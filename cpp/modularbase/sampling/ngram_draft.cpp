#include "modularbase/sampling/ngram_draft.h"

#include <algorithm>
#include <string>

#include "modularbase/core/errors.h"

namespace modularbase {
namespace {

constexpr int kFirstDraft = 4;
constexpr int kLongestRest = 31;

void require(const char* field, int value, int lowest, int highest) {
  if (value >= lowest && value <= highest) return;
  throw InvalidRequestError(
      field, "a number from " + std::to_string(lowest) + " to " + std::to_string(highest),
      std::to_string(value));
}

}  // namespace

NgramDraft::NgramDraft(int min_ngram, int max_ngram, int max_draft)
    : max_draft_(max_draft), next_length_(std::min(kFirstDraft, max_draft)) {
  require("max_ngram", max_ngram, 1, 16);
  require("min_ngram", min_ngram, 1, max_ngram);
  require("max_draft", max_draft, 1, 1024);
  constexpr std::size_t kFirstSlots = 64;
  for (int n = max_ngram; n >= min_ngram; --n) {
    indexes_.push_back({n, std::vector<std::int32_t>(kFirstSlots, -1)});
  }
  draft_.reserve(static_cast<std::size_t>(max_draft));
}

void NgramDraft::append(TokenId token) {
  // The n-grams that end here become findable only now that a token follows them: a suffix never
  // finds itself.
  if (!tokens_.empty()) {
    for (Index& index : indexes_) {
      if (tokens_.size() >= static_cast<std::size_t>(index.n)) remember(index, tokens_.size() - 1);
    }
  }
  tokens_.push_back(token);
  if (n_resting_ > 0) --n_resting_;
}

std::span<const TokenId> NgramDraft::draft() {
  draft_.clear();
  if (n_resting_ > 0) return draft_;
  for (const Index& index : indexes_) {
    if (tokens_.size() <= static_cast<std::size_t>(index.n)) continue;
    const std::int32_t end = index.ends[slot_of(index, tokens_.size() - 1)];
    if (end < 0) continue;
    // Past the last token the copy reads its own output, so a loop is drafted at full length.
    const auto period = tokens_.size() - 1 - static_cast<std::size_t>(end);
    for (std::size_t i = 0; i < static_cast<std::size_t>(next_length_); ++i) {
      draft_.push_back(i < period ? tokens_[static_cast<std::size_t>(end) + 1 + i]
                                  : draft_[i - period]);
    }
    break;
  }
  return draft_;
}

void NgramDraft::report(int accepted, int proposed) {
  if (accepted < 0 || accepted > proposed) {
    throw Error("draft: " + std::to_string(accepted) + " tokens accepted of " +
                std::to_string(proposed) + " proposed");
  }
  if (proposed == 0) return;
  next_length_ = std::min(max_draft_, accepted == proposed ? 2 * next_length_ : accepted + 1);
  rest_ = accepted > 0 ? 0 : std::min(kLongestRest, 2 * rest_ + 1);
  n_resting_ = rest_;
}

std::uint64_t NgramDraft::hash_ending_at(std::size_t end, int n) const {
  std::uint64_t hash = 0;
  for (int i = 0; i < n; ++i) {
    hash = (hash + static_cast<std::uint32_t>(tokens_[end - static_cast<std::size_t>(i)]) + 1) *
           0x9e3779b97f4a7c15u;
    hash ^= hash >> 32;
  }
  return hash;
}

/// The slot that holds the n-gram ending at end, or the free slot where it belongs.
std::size_t NgramDraft::slot_of(const Index& index, std::size_t end) const {
  const auto last = tokens_.begin() + static_cast<std::ptrdiff_t>(end) + 1;
  const std::size_t mask = index.ends.size() - 1;
  for (std::size_t slot = hash_ending_at(end, index.n) & mask;; slot = (slot + 1) & mask) {
    if (index.ends[slot] < 0) return slot;
    const auto other = tokens_.begin() + index.ends[slot] + 1;
    if (std::equal(last - index.n, last, other - index.n)) return slot;
  }
}

void NgramDraft::remember(Index& index, std::size_t end) {
  if (2 * (index.n_used + 1) > index.ends.size()) grow(index);
  std::int32_t& entry = index.ends[slot_of(index, end)];
  if (entry < 0) ++index.n_used;
  entry = static_cast<std::int32_t>(end);
}

void NgramDraft::grow(Index& index) {
  std::vector<std::int32_t> old(2 * index.ends.size(), -1);
  old.swap(index.ends);
  for (const std::int32_t end : old) {
    if (end >= 0) index.ends[slot_of(index, static_cast<std::size_t>(end))] = end;
  }
}

}  // namespace modularbase
