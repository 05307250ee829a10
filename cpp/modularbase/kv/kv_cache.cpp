#include "modularbase/kv/kv_cache.h"

namespace modularbase {

using kernels::kBlockTokens;

KvCache::KvCache(const KvGeometry& geometry, std::int64_t n_blocks, const Backend& backend,
                 bool prefix_cache)
    : pool_(n_blocks),
      index_(pool_, kBlockTokens),
      memory_(geometry, n_blocks, backend),
      prefix_cache_(prefix_cache) {}

std::size_t KvCache::used_bytes() const {
  return static_cast<std::size_t>(pool_.n_blocks() - pool_.n_free()) *
         memory_.geometry().block_bytes();
}

std::optional<BlockId> KvCache::allocate() {
  auto block = pool_.allocate();
  if (!block && index_.evict_one()) block = pool_.allocate();
  return block;
}

std::int64_t KvCache::attach_prefix(KvSequence& sequence, std::span<const TokenId> tokens) {
  if (!prefix_cache_ || tokens.size() < 2) return 0;
  PrefixMatch match = index_.match(tokens.first(tokens.size() - 1));
  sequence.blocks = std::move(match.shared);
  sequence.n_tokens = static_cast<std::int64_t>(sequence.blocks.size()) * kBlockTokens;
  if (match.n_partial > 0) {
    pool_.retain(match.partial);  // so that making room for the copy cannot forget the source
    if (const auto copy = allocate()) {
      memory_.copy_tokens(match.partial, *copy, match.n_partial);
      sequence.blocks.push_back(*copy);
      sequence.n_tokens += match.n_partial;
    }
    pool_.release(match.partial);
  }
  return sequence.n_tokens;
}

bool KvCache::reserve(KvSequence& sequence, std::int64_t n_tokens) {
  const auto n_needed = static_cast<std::size_t>((n_tokens + kBlockTokens - 1) / kBlockTokens);
  const std::size_t n_before = sequence.blocks.size();
  while (sequence.blocks.size() < n_needed) {
    const auto block = allocate();
    if (!block) {
      while (sequence.blocks.size() > n_before) {
        pool_.release(sequence.blocks.back());
        sequence.blocks.pop_back();
      }
      return false;
    }
    sequence.blocks.push_back(*block);
  }
  return true;
}

void KvCache::publish(const KvSequence& sequence, std::span<const TokenId> tokens) {
  if (!prefix_cache_) return;
  index_.insert(tokens.first(static_cast<std::size_t>(sequence.n_tokens)), sequence.blocks);
}

void KvCache::publish_whole_blocks(const KvSequence& sequence, std::span<const TokenId> tokens) {
  if (!prefix_cache_) return;
  const auto n = static_cast<std::size_t>(sequence.n_tokens / kBlockTokens * kBlockTokens);
  index_.insert(tokens.first(n), sequence.blocks);
}

void KvCache::release(KvSequence& sequence) {
  for (const BlockId block : sequence.blocks) pool_.release(block);
  sequence = {};
}

}  // namespace modularbase
