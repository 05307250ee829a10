#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "modularbase/kv/kv_group.h"

namespace modularbase {

/// The model's layers in one group, or in two around a split.
struct KvGroups {
  KvGeometry lower;
  std::optional<KvGeometry> upper;  // none: lower is all layers

  /// Of both groups.
  std::size_t block_bytes() const;
};

/// A kv head of the model.
struct KvHead {
  int layer = 0;
  int head = 0;
  bool operator==(const KvHead&) const = default;
};

/// What there is beside exact blocks.
struct KvTiers {
  bool has_important = false;
  bool has_redundant = false;
  std::vector<bool> wide_keys =
      {};  // of the model's layers: 4 bits would lose too much of their keys
  // Slots would lose what these look up: they keep a redundant token's keys and values in 4 bits.
  std::vector<KvHead> detail_heads = {};
  bool in_rows = false;  // 4-bit tiles are made of ggml's rows, for graphs of its ops
};

/// A tier's blocks of the layers of a group.
TierGeometry important_blocks(const KvGeometry& group, const KvTiers& tiers);
TierGeometry redundant_blocks(const KvGeometry& group, const KvTiers& tiers);
TierGeometry detail_blocks(const KvGeometry& group, const KvTiers& tiers);

/// Layers 0..split below, with their mid rows [n_embd]; the others above. With none above there is
/// nothing to restart: one group.
KvGroups split_groups(const KvGeometry& all, std::int64_t split, std::int64_t n_embd);

/// What a sequence's KV depends on beside its tokens, as numbers that mean equal or not: packs in
/// force. 0 is the plain base.
struct KvContext {
  /// Packs that changed on the way: nobody else can have the same KV, so none of it is shared.
  static constexpr std::uint32_t kMixed = ~std::uint32_t{0};

  std::uint32_t lower = 0;  // of the lower group: not 0 only for packs that reach below the split
  std::uint32_t upper = 0;
  std::int64_t from = 0;  // positions before it have the plain base's KV
};

/// One sequence's place in the cache.
struct KvSequence {
  BlockTable lower;
  BlockTable upper;           // empty when there is one group
  KvPast past;                // what is left of its first positions, where they were compacted
  std::int64_t n_lower = 0;   // positions whose KV is valid in the lower group
  std::int64_t n_tokens = 0;  // in both; at most n_lower

  /// Both groups hold the first n positions and no others.
  void set_valid(std::int64_t n) { n_lower = n_tokens = n; }
};

/// The KV of all sequences, in one or two groups of layers. Keeps true: every block of a sequence
/// is held by it; a block that more than one holds is never written again; a block is shared only
/// by sequences with the same tokens under the same context of its group. Engine thread only.
class KvCache {
 public:
  /// The budget is that of n_blocks exact blocks.
  KvCache(const KvGroups& groups, const KvTiers& tiers, std::int64_t n_blocks,
          const Backend& backend, bool prefix_cache);

  const KvGroup& lower() const { return lower_; }
  /// Null when there is one group.
  const KvGroup* upper() const { return upper_ ? &*upper_ : nullptr; }
  std::int64_t n_blocks() const { return lower_.n_blocks(); }  // of each group
  /// Of the group that has fewer.
  std::int64_t n_free_blocks() const;
  /// Of the group that has more.
  std::int64_t n_cached_blocks() const;
  std::size_t used_bytes() const { return budget_.n_used(); }
  std::size_t budget_bytes() const { return budget_.n_bytes(); }

  /// Takes what is already known of a prompt into an empty sequence, in each group what it knows:
  /// whole blocks shared, a partly matching one copied. At most tokens.size() - 1 tokens, so that
  /// there is a row to compute.
  void attach_prefix(KvSequence& sequence, std::span<const TokenId> tokens,
                     const KvContext& context);
  /// Room for n_tokens positions, forgetting old prefixes when need be. False when memory is short
  /// (then the sequence keeps what it had).
  bool reserve(KvSequence& sequence, std::int64_t n_tokens);
  /// Remembers the sequence's valid positions (whole blocks only while it goes on writing).
  void publish(const KvSequence& sequence, std::span<const TokenId> tokens,
               const KvContext& context);
  void publish_whole_blocks(const KvSequence& sequence, std::span<const TokenId> tokens,
                            const KvContext& context);
  /// The same keys and values once more: all blocks are shared. What is written next goes into a
  /// block of its own after truncate().
  KvSequence fork(const KvSequence& sequence);
  void release(KvSequence& sequence);
  /// Only the first n positions stay valid, at least all that were compacted, and later ones can be
  /// written: a block that others hold, too, is copied. False where memory is short.
  bool truncate(KvSequence& sequence, std::int64_t n);
  void forget_prefixes();

  /// A block of a tier in each group for a sequence's past; nothing where memory is short.
  bool allocate(PastBlock& block);
  void retain(const PastBlock& block);
  void release(const PastBlock& block);
  /// Gives back a block of a sequence's table, whose tokens lie elsewhere.
  void forget_block(KvSequence& sequence, std::int64_t index);
  /// Of a tier, in both groups.
  std::size_t block_bytes(kernels::KvTier tier) const;
  std::size_t past_bytes(const KvPast& past) const;

  /// One layer of all blocks that a sequence's first positions lie in: what a device has of it to
  /// the host (HostBytes).
  void download(const KvSequence& sequence, std::int64_t n_positions, int layer) const;
  /// One layer of a block from the host to the device that has it.
  void upload(const PastBlock& block, int layer) const;
  void forget_copies() const;

  bool has_details() const { return has_details_; }
  /// Of a block's keys and values in both groups; mid rows are not among them.
  std::size_t stored_bytes(kernels::KvTier tier) const;

 private:
  template <class Attempt>
  bool with_room(const Attempt& attempt);

  KvBudget budget_;
  KvGroup lower_;
  std::optional<KvGroup> upper_;
  bool prefix_cache_;
  bool has_tiers_;
  bool has_details_;
};

}  // namespace modularbase
