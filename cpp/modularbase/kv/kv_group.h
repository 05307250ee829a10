#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "modularbase/kv/block_pool.h"
#include "modularbase/kv/kv_memory.h"
#include "modularbase/kv/prefix_index.h"

namespace modularbase {

/// Block of positions [64 i, 64 i + 64) at index i.
using BlockTable = std::vector<BlockId>;

/// The layers whose KV depends on the same things: their blocks, the blocks' memory, and what is
/// remembered of finished prefixes. Engine thread only.
class KvGroup {
 public:
  KvGroup(const KvGeometry& geometry, std::int64_t n_blocks, const Backend& backend);

  const KvMemory& memory() const { return memory_; }
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
  /// Remembers that the table's first positions hold the KV of keys.
  void publish(std::span<const PrefixKey> keys, const BlockTable& table);
  void forget_prefixes() { index_.clear(); }

 private:
  std::optional<BlockId> allocate();

  BlockPool pool_;
  PrefixIndex index_;
  KvMemory memory_;
};

}  // namespace modularbase
