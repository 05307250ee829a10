#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "modularbase/kv/block_pool.h"
#include "modularbase/kv/kv_memory.h"
#include "modularbase/kv/kv_past.h"
#include "modularbase/kv/prefix_index.h"
#include "modularbase/kv/tier_memory.h"

namespace modularbase {

/// Block of positions [64 i, 64 i + 64) at index i; kNoBlock where they were compacted.
using BlockTable = std::vector<BlockId>;

/// Blocks of a tier of a group of layers.
struct TierBlocks {
  BlockPool pool;
  TierMemory memory;
};

/// The layers whose KV depends on the same things: their blocks, the blocks' memory, and what is
/// remembered of finished prefixes. Engine thread only.
class KvGroup {
 public:
  KvGroup(const KvGeometry& geometry, std::int64_t n_blocks, KvBudget& budget,
          const Backend& backend);
  /// Blocks for compacted pasts, as many as the budget has room for.
  void add_tier(kernels::KvTier tier, TierGeometry geometry, std::int64_t n_blocks,
                const Backend& backend);

  const KvMemory& memory() const { return memory_; }
  /// A layer's memory in all tiers, as the host sees it.
  kernels::KvLayer layer(int layer) const;
  /// The same as graphs see it, but for the exact tier; tiers made of ggml's rows only.
  TileTables tables(kernels::KvTier tier, int layer) const;
  /// Its number among the group's.
  int index_of(int layer) const { return layer - static_cast<int>(memory_.geometry().first_layer); }
  std::int64_t n_blocks() const { return pool_.n_blocks(); }
  std::int64_t n_free_blocks() const { return pool_.n_free(); }
  std::int64_t n_cached_blocks() const { return index_.n_blocks(); }
  std::size_t used_bytes() const;

  /// Takes what is known of keys into an empty table: whole blocks shared, a partly matching one
  /// copied. Returns how many positions.
  std::int64_t attach(BlockTable& table, std::span<const PrefixKey> keys);
  /// Room for n_tokens positions, forgetting old prefixes when need be; all of it or none.
  bool reserve(BlockTable& table, std::int64_t n_tokens);
  /// Gives back the blocks behind the first n_blocks.
  void trim(BlockTable& table, std::size_t n_blocks);
  /// Gives back the blocks behind the first n positions; a last one that is not full and that
  /// others hold, too, is copied. False where there is no block for the copy.
  bool truncate(BlockTable& table, std::int64_t n);
  /// Remembers that the table's first positions hold the KV of keys.
  void publish(std::span<const PrefixKey> keys, const BlockTable& table);
  void forget_prefixes() { index_.clear(); }
  /// Forgets the prefix that was used longest ago; false when there is none to forget.
  bool forget_oldest() { return index_.evict_one(); }

  /// A block of a tier, forgetting old prefixes when need be.
  std::optional<BlockId> allocate(kernels::KvTier tier);
  void retain(kernels::KvTier tier, BlockId block) { pool(tier).retain(block); }
  /// The memory of one that nobody else holds is given back to the system.
  void release(kernels::KvTier tier, BlockId block);
  std::size_t block_bytes(kernels::KvTier tier) const;
  /// The keys and values of a block, as the host sees them.
  std::span<std::byte> block_data(kernels::KvTier tier, BlockId block) const;
  /// A layer of a block: what a device has of it to the host, or back (HostBytes).
  void download(kernels::KvTier tier, BlockId block, int layer) const;
  void upload(kernels::KvTier tier, BlockId block, int layer) const;
  /// The same of all layers.
  void download(kernels::KvTier tier, BlockId block) const;
  void upload(kernels::KvTier tier, BlockId block) const;
  void forget_copies() const;

 private:
  BlockPool& pool(kernels::KvTier tier);
  TierBlocks& tier_blocks(kernels::KvTier tier) const;

  KvBudget& budget_;
  BlockPool pool_;
  PrefixIndex index_;
  KvMemory memory_;
  std::unique_ptr<TierBlocks> tiers_[kernels::kNKvTiers];  // null: not there, or the exact one
};

}  // namespace modularbase
