#include "modularbase/kv/kv_group.h"

#include <utility>

#include "modularbase/core/errors.h"

namespace modularbase {

using kernels::kBlockTokens;
using kernels::KvTier;

KvGroup::KvGroup(const KvGeometry& geometry, std::int64_t n_blocks, KvBudget& budget,
                 const Backend& backend)
    : budget_(budget),
      pool_(n_blocks, geometry.block_bytes(), budget),
      index_(pool_, kBlockTokens),
      memory_(geometry, n_blocks, backend) {}

void KvGroup::add_tier(KvTier tier, TierGeometry geometry, std::int64_t n_blocks,
                       const Backend& backend) {
  const std::size_t block_bytes = geometry.block_bytes();
  tiers_[tier] =
      std::make_unique<TierBlocks>(TierBlocks{BlockPool(n_blocks, block_bytes, budget_),
                                              TierMemory(std::move(geometry), n_blocks, backend)});
}

kernels::KvLayer KvGroup::layer(int layer) const {
  kernels::KvLayer all = memory_.layer(layer);
  for (int tier = 0; tier < kernels::kNKvTiers; ++tier) {
    if (tiers_[tier]) all.tiers[tier] = tiers_[tier]->memory.layer(layer);
  }
  return all;
}

std::size_t KvGroup::used_bytes() const {
  const auto of = [](const BlockPool& pool) {
    return static_cast<std::size_t>(pool.n_blocks() - pool.n_free()) * pool.block_bytes();
  };
  std::size_t n = of(pool_);
  for (const auto& tier : tiers_) n += tier ? of(tier->pool) : 0;
  return n;
}

TierBlocks& KvGroup::tier_blocks(KvTier tier) const {
  if (!tiers_[tier]) throw Error("kv tier " + std::to_string(tier) + ": not in this cache");
  return *tiers_[tier];
}

BlockPool& KvGroup::pool(KvTier tier) {
  return tier == kernels::kExactTier ? pool_ : tier_blocks(tier).pool;
}

std::size_t KvGroup::block_bytes(KvTier tier) const {
  if (tier == kernels::kExactTier) return pool_.block_bytes();
  return tiers_[tier] ? tiers_[tier]->pool.block_bytes() : 0;
}

std::span<std::byte> KvGroup::block_data(KvTier tier, BlockId block) const {
  return tier == kernels::kExactTier ? memory_.block_data(block)
                                     : tier_blocks(tier).memory.block_data(block);
}

TileTables KvGroup::tables(KvTier tier, int layer) const {
  return tiers_[tier] ? tiers_[tier]->memory.tables(layer) : TileTables{};
}

void KvGroup::download(KvTier tier, BlockId block, int layer) const {
  if (tier == kernels::kExactTier) return memory_.download(block, layer);
  tier_blocks(tier).memory.download(block, layer);
}

void KvGroup::upload(KvTier tier, BlockId block, int layer) const {
  if (tier == kernels::kExactTier) return memory_.upload(block, layer);
  tier_blocks(tier).memory.upload(block, layer);
}

void KvGroup::download(KvTier tier, BlockId block) const {
  const KvGeometry& geometry = memory_.geometry();
  for (std::int64_t i = 0; i < geometry.n_layer; ++i) {
    download(tier, block, static_cast<int>(geometry.first_layer + i));
  }
}

void KvGroup::upload(KvTier tier, BlockId block) const {
  const KvGeometry& geometry = memory_.geometry();
  for (std::int64_t i = 0; i < geometry.n_layer; ++i) {
    upload(tier, block, static_cast<int>(geometry.first_layer + i));
  }
}

void KvGroup::forget_copies() const {
  memory_.forget_copies();
  for (const auto& tier : tiers_) {
    if (tier) tier->memory.forget_copies();
  }
}

std::optional<BlockId> KvGroup::allocate(KvTier tier) {
  auto block = pool(tier).allocate();
  while (!block && index_.evict_one()) block = pool(tier).allocate();
  return block;
}

void KvGroup::release(KvTier tier, BlockId block) {
  pool(tier).release(block);
  if (pool(tier).n_holders(block) > 0) return;
  if (tier == kernels::kExactTier) {
    memory_.discard(block);
  } else {
    tier_blocks(tier).memory.discard(block);
  }
}

std::int64_t KvGroup::attach(BlockTable& table, std::span<const PrefixKey> keys) {
  PrefixMatch match = index_.match(keys);
  table = std::move(match.shared);
  std::int64_t n_tokens = static_cast<std::int64_t>(table.size()) * kBlockTokens;
  if (match.n_partial > 0) {
    pool_.retain(match.partial);  // so that making room for the copy cannot forget the source
    if (const auto copy = allocate(kernels::kExactTier)) {
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
    const auto block = allocate(kernels::kExactTier);
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
    if (table.back() != kNoBlock) pool_.release(table.back());
    table.pop_back();
  }
}

bool KvGroup::truncate(BlockTable& table, std::int64_t n) {
  trim(table, static_cast<std::size_t>((n + kBlockTokens - 1) / kBlockTokens));
  const std::int64_t n_last = n % kBlockTokens;
  if (n_last == 0 || pool_.n_holders(table.back()) == 1) return true;
  const auto copy = allocate(kernels::kExactTier);
  if (!copy) return false;
  memory_.copy_tokens(table.back(), *copy, n_last);
  pool_.release(std::exchange(table.back(), *copy));
  return true;
}

void KvGroup::publish(std::span<const PrefixKey> keys, const BlockTable& table) {
  index_.insert(keys, table);
}

}  // namespace modularbase
