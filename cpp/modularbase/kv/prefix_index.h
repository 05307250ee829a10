#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "modularbase/core/types.h"
#include "modularbase/kv/block_pool.h"

namespace modularbase {

/// A token under the context that its KV depends on beside the tokens before it: context << 32 |
/// token. Context 0 is the plain base.
using PrefixKey = std::uint64_t;

inline PrefixKey prefix_key(std::uint32_t context, TokenId token) {
  return PrefixKey{context} << 32 | static_cast<std::uint32_t>(token);
}

/// What of a prompt is already in the cache.
struct PrefixMatch {
  std::vector<BlockId> shared;  // whole blocks, to be shared as they are; retained for the caller
  BlockId partial = -1;  // a block whose first n_partial tokens match, to be copied; not retained
  std::int64_t n_partial = 0;
};

/// Remembers which blocks hold the KV of which prefixes: a tree of blocks, each under the block
/// before it. Holds one reference on every block it remembers; forgets least recently used
/// leaves when asked. Engine thread only.
class PrefixIndex {
 public:
  PrefixIndex(BlockPool& pool, std::int64_t block_tokens);
  ~PrefixIndex();

  /// The longest known prefix of keys.
  PrefixMatch match(std::span<const PrefixKey> keys);
  /// Remembers keys, whose KV lies in blocks (the last one may be partly filled).
  void insert(std::span<const PrefixKey> keys, std::span<const BlockId> blocks);
  /// Forgets the least recently used leaf that only the index holds; without one, a block that only
  /// the index holds, and all behind it. False when there is none.
  bool evict_one();
  void clear();

  std::int64_t n_blocks() const { return n_blocks_; }

 private:
  struct Node;
  using Leaf = std::pair<std::uint64_t, Node*>;  // last use, node

  void touch(Node& node);
  void forget(Node& leaf);
  void forget_all_from(Node& node);
  Node& add_child(Node& parent, std::span<const PrefixKey> keys, BlockId block);

  BlockPool& pool_;
  const std::int64_t block_tokens_;
  std::unique_ptr<Node> root_;
  std::set<Leaf> leaves_;
  std::uint64_t clock_ = 0;
  std::int64_t n_blocks_ = 0;
};

}  // namespace modularbase
