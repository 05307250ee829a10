#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "modularbase/kv/block_pool.h"
#include "modularbase/kv/kv_memory.h"
#include "modularbase/kv/prefix_index.h"

namespace modularbase {

/// One sequence's place in the cache.
struct KvSequence {
  std::vector<BlockId> blocks;  // block of positions [64 i, 64 i + 64) at index i
  std::int64_t n_tokens = 0;    // positions whose KV is valid
};

/// Blocks, their memory, and what is remembered of finished prefixes. Keeps true: every block of a
/// sequence is held by it; a block that more than one holds is never written again. Engine thread
/// only.
class KvCache {
 public:
  KvCache(const KvGeometry& geometry, std::int64_t n_blocks, const Backend& backend,
          bool prefix_cache);

  KvMemory& memory() { return memory_; }
  std::int64_t n_blocks() const { return pool_.n_blocks(); }
  std::int64_t n_free_blocks() const { return pool_.n_free(); }
  std::int64_t n_cached_blocks() const { return index_.n_blocks(); }
  std::size_t used_bytes() const;

  /// Takes what is already known of a prompt into an empty sequence: whole blocks shared, a partly
  /// matching one copied. At most tokens.size() - 1 tokens, so that there is a row to compute.
  /// Returns how many.
  std::int64_t attach_prefix(KvSequence& sequence, std::span<const TokenId> tokens);
  /// Room for n_tokens positions, forgetting old prefixes when need be. False when memory is short
  /// (then the sequence keeps what it had).
  bool reserve(KvSequence& sequence, std::int64_t n_tokens);
  /// Remembers the sequence's valid positions (whole blocks only while it goes on writing).
  void publish(const KvSequence& sequence, std::span<const TokenId> tokens);
  void publish_whole_blocks(const KvSequence& sequence, std::span<const TokenId> tokens);
  void release(KvSequence& sequence);
  void forget_prefixes() { index_.clear(); }

 private:
  std::optional<BlockId> allocate();

  BlockPool pool_;
  PrefixIndex index_;
  KvMemory memory_;
  bool prefix_cache_;
};

}  // namespace modularbase
