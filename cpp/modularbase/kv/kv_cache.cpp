#include "modularbase/kv/kv_cache.h"

#include <algorithm>

namespace modularbase {
namespace {

/// The first n tokens under a context that begins at position `from`. A mixed one can share only
/// whole blocks of the plain base before that: what lies behind in the same block is still written.
std::vector<PrefixKey> keys_of(std::span<const TokenId> tokens, std::int64_t n,
                               std::uint32_t context, std::int64_t from) {
  if (context == KvContext::kMixed) n = std::min(n, from - from % kernels::kBlockTokens);
  std::vector<PrefixKey> keys(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < keys.size(); ++i) {
    keys[i] = prefix_key(static_cast<std::int64_t>(i) < from ? 0 : context, tokens[i]);
  }
  return keys;
}

}  // namespace

std::size_t KvGroups::block_bytes() const {
  return lower.block_bytes() + (upper ? upper->block_bytes() : 0);
}

KvGroups split_groups(const KvGeometry& all, std::int64_t split, std::int64_t n_embd) {
  const std::int64_t n_lower = split + 1;
  if (n_lower == all.n_layer) return {all, std::nullopt};
  KvGroups groups{all, all};
  groups.lower.n_layer = n_lower;
  groups.lower.mid_width = n_embd;
  groups.upper->first_layer = n_lower;
  groups.upper->n_layer = all.n_layer - n_lower;
  return groups;
}

KvCache::KvCache(const KvGroups& groups, std::int64_t n_blocks, const Backend& backend,
                 bool prefix_cache)
    : lower_(groups.lower, n_blocks, backend), prefix_cache_(prefix_cache) {
  if (groups.upper) upper_.emplace(*groups.upper, n_blocks, backend);
}

std::int64_t KvCache::n_free_blocks() const {
  const std::int64_t n = lower_.n_free_blocks();
  return upper_ ? std::min(n, upper_->n_free_blocks()) : n;
}

std::int64_t KvCache::n_cached_blocks() const {
  const std::int64_t n = lower_.n_cached_blocks();
  return upper_ ? std::max(n, upper_->n_cached_blocks()) : n;
}

std::size_t KvCache::used_bytes() const {
  return lower_.used_bytes() + (upper_ ? upper_->used_bytes() : 0);
}

void KvCache::attach_prefix(KvSequence& sequence, std::span<const TokenId> tokens,
                            const KvContext& context) {
  if (!prefix_cache_ || tokens.size() < 2) return;
  const auto n_most = static_cast<std::int64_t>(tokens.size()) - 1;
  sequence.set_valid(
      lower_.attach(sequence.lower, keys_of(tokens, n_most, context.lower, context.from)));
  if (!upper_) return;
  // No further than the lower group: the sequence writes both from there on.
  sequence.n_tokens = upper_->attach(
      sequence.upper, keys_of(tokens, sequence.n_lower, context.upper, context.from));
}

bool KvCache::reserve(KvSequence& sequence, std::int64_t n_tokens) {
  const std::size_t n_before = sequence.lower.size();
  if (!lower_.reserve(sequence.lower, n_tokens)) return false;
  if (!upper_ || upper_->reserve(sequence.upper, n_tokens)) return true;
  lower_.trim(sequence.lower, n_before);
  return false;
}

void KvCache::publish(const KvSequence& sequence, std::span<const TokenId> tokens,
                      const KvContext& context) {
  if (!prefix_cache_) return;
  lower_.publish(keys_of(tokens, sequence.n_lower, context.lower, context.from), sequence.lower);
  if (!upper_) return;
  upper_->publish(keys_of(tokens, sequence.n_tokens, context.upper, context.from), sequence.upper);
}

void KvCache::publish_whole_blocks(const KvSequence& sequence, std::span<const TokenId> tokens,
                                   const KvContext& context) {
  KvSequence whole = sequence;
  whole.n_lower -= whole.n_lower % kernels::kBlockTokens;
  whole.n_tokens -= whole.n_tokens % kernels::kBlockTokens;
  publish(whole, tokens, context);
}

void KvCache::release(KvSequence& sequence) {
  lower_.trim(sequence.lower, 0);
  if (upper_) upper_->trim(sequence.upper, 0);
  sequence.set_valid(0);
}

void KvCache::forget_prefixes() {
  lower_.forget_prefixes();
  if (upper_) upper_->forget_prefixes();
}

}  // namespace modularbase
