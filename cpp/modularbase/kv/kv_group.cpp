#include "modularbase/kv/kv_group.h"

namespace modularbase {

using kernels::kBlockTokens;

KvGroup::KvGroup(const KvGeometry& geometry, std::int64_t n_blocks, const Backend& backend)
    : pool_(n_blocks), index_(pool_, kBlockTokens), memory_(geometry, n_blocks, backend) {}

std::size_t KvGroup::used_bytes() const {
  return static_cast<std::size_t>(pool_.n_blocks() - pool_.n_free()) *
         memory_.geometry().block_bytes();
}

std::optional<BlockId> KvGroup::allocate() {
  auto block = pool_.allocate();
  if (!block && index_.evict_one()) block = pool_.allocate();
  return block;
}

std::int64_t KvGroup::attach(BlockTable& table, std::span<const PrefixKey> keys) {
  PrefixMatch match = index_.match(keys);
  table = std::move(match.shared);
  std::int64_t n_tokens = static_cast<std::int64_t>(table.size()) * kBlockTokens;
  if (match.n_partial > 0) {
    pool_.retain(match.partial);  // so that making room for the copy cannot forget the source
    if (const auto copy = allocate()) {
      memory_.copy_tokens(match.partial, *copy, match.n_partial);
      table.push_back(*copy);
      n_tokens += match.n_partial;
    }
    pool_.release(match.partial);
  }
  return n_tokens;
}

bool KvGroup::reserve(BlockTable& table, std::int64_t n_tokens) {
  const auto n_needed = static_cast<std::size_t>((n_tokens + kBlockTokens - 1) / kBlockTokens);
  const std::size_t n_before = table.size();
  while (table.size() < n_needed) {
    const auto block = allocate();
    if (!block) {
      trim(table, n_before);
      return false;
    }
    table.push_back(*block);
  }
  return true;
}

void KvGroup::trim(BlockTable& table, std::size_t n_blocks) {
  while (table.size() > n_blocks) {
    pool_.release(table.back());
    table.pop_back();
  }
}

void KvGroup::publish(std::span<const PrefixKey> keys, const BlockTable& table) {
  index_.insert(keys, table);
}

}  // namespace modularbase
