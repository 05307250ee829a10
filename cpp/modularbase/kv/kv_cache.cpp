#include "modularbase/kv/kv_cache.h"

#include <algorithm>
#include <utility>

namespace modularbase {

using kernels::KvTier;
using kernels::TileFormat;

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

// The tiles of a group's heads, by layer: of those that keep details, or of the others.
std::vector<std::vector<std::int32_t>> tiles_of(const KvGeometry& group, const KvTiers& tiers,
                                                bool has_details) {
  std::vector<std::vector<std::int32_t>> tiles(static_cast<std::size_t>(group.n_layer));
  for (std::size_t i = 0; i < tiles.size(); ++i) {
    const int layer = static_cast<int>(group.first_layer) + static_cast<int>(i);
    std::int32_t n_tiles = 0;
    for (int head = 0; head < static_cast<int>(group.n_head_kv); ++head) {
      const bool is_detail =
          std::ranges::find(tiers.detail_heads, KvHead{layer, head}) != tiers.detail_heads.end();
      tiles[i].push_back(is_detail == has_details ? n_tiles++ : -1);
    }
  }
  return tiles;
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

TierGeometry important_blocks(const KvGeometry& group, const KvTiers& tiers) {
  TierGeometry geometry{group.n_head_kv, group.head_dim, group.first_layer, {}, {}, false, {}};
  for (std::int64_t layer = 0; layer < group.n_layer; ++layer) {
    const auto index = static_cast<std::size_t>(group.first_layer + layer);
    const bool is_wide = index < tiers.wide_keys.size() && tiers.wide_keys[index];
    const TileFormat narrow = tiers.in_rows ? TileFormat::kQ4KeyRows : TileFormat::kQ4Keys;
    geometry.k_formats.push_back(is_wide ? TileFormat::kQ8Keys : narrow);
  }
  geometry.v_format = tiers.in_rows ? TileFormat::kQ4ValueRows : TileFormat::kQ4Values;
  return geometry;
}

TierGeometry redundant_blocks(const KvGeometry& group, const KvTiers& tiers) {
  const std::vector<TileFormat> formats(static_cast<std::size_t>(group.n_layer),
                                        TileFormat::kQ8Keys);
  TierGeometry geometry{
      group.n_head_kv, group.head_dim, group.first_layer, formats, TileFormat::kQ8_0, true, {}};
  geometry.tiles = tiles_of(group, tiers, false);
  return geometry;
}

TierGeometry detail_blocks(const KvGeometry& group, const KvTiers& tiers) {
  TierGeometry geometry = important_blocks(group, tiers);
  geometry.tiles = tiles_of(group, tiers, true);
  return geometry;
}

KvCache::KvCache(const KvGroups& groups, const KvTiers& tiers, std::int64_t n_blocks,
                 const Backend& backend, bool prefix_cache)
    : budget_(static_cast<std::size_t>(n_blocks) * groups.block_bytes()),
      lower_(groups.lower, n_blocks, budget_, backend),
      prefix_cache_(prefix_cache),
      has_tiers_(tiers.has_important || tiers.has_redundant),
      has_details_(tiers.has_redundant && !tiers.detail_heads.empty()) {
  if (groups.upper) upper_.emplace(*groups.upper, n_blocks, budget_, backend);
  const auto add = [&](KvTier tier, const auto& geometry_of) {
    const TierGeometry lower = geometry_of(groups.lower, tiers);
    std::size_t block_bytes = lower.block_bytes();
    if (groups.upper) block_bytes += geometry_of(*groups.upper, tiers).block_bytes();
    const auto n =
        static_cast<std::int64_t>(budget_.n_bytes() / std::max<std::size_t>(1, block_bytes));
    lower_.add_tier(tier, lower, n, backend);
    if (upper_) upper_->add_tier(tier, geometry_of(*groups.upper, tiers), n, backend);
  };
  if (tiers.has_important) add(kernels::kImportantTier, important_blocks);
  if (tiers.has_redundant) add(kernels::kRedundantTier, redundant_blocks);
  if (has_details_) add(kernels::kDetailTier, detail_blocks);
}

std::int64_t KvCache::n_free_blocks() const {
  const std::int64_t n = lower_.n_free_blocks();
  return upper_ ? std::min(n, upper_->n_free_blocks()) : n;
}

std::int64_t KvCache::n_cached_blocks() const {
  const std::int64_t n = lower_.n_cached_blocks();
  return upper_ ? std::max(n, upper_->n_cached_blocks()) : n;
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

// Where tiers share the budget, what one group lacks the other may have to forget.
template <class Attempt>
bool KvCache::with_room(const Attempt& attempt) {
  while (!attempt()) {
    if (!has_tiers_) return false;
    if (!lower_.forget_oldest() && !(upper_ && upper_->forget_oldest())) return false;
  }
  return true;
}

bool KvCache::reserve(KvSequence& sequence, std::int64_t n_tokens) {
  const std::size_t n_before = sequence.lower.size();
  return with_room([&] {
    if (!lower_.reserve(sequence.lower, n_tokens)) return false;
    if (!upper_ || upper_->reserve(sequence.upper, n_tokens)) return true;
    lower_.trim(sequence.lower, n_before);
    return false;
  });
}

void KvCache::publish(const KvSequence& sequence, std::span<const TokenId> tokens,
                      const KvContext& context) {
  if (!prefix_cache_ || !sequence.past.empty()) return;  // what was compacted is nobody else's
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

KvSequence KvCache::fork(const KvSequence& sequence) {
  for (std::size_t i = 0; i < sequence.lower.size(); ++i) {
    if (sequence.lower[i] == kNoBlock) continue;
    lower_.retain(kernels::kExactTier, sequence.lower[i]);
    if (upper_) upper_->retain(kernels::kExactTier, sequence.upper[i]);
  }
  for (const PastBlock& block : sequence.past.blocks) retain(block);
  return sequence;
}

void KvCache::release(KvSequence& sequence) {
  lower_.trim(sequence.lower, 0);
  if (upper_) upper_->trim(sequence.upper, 0);
  for (const PastBlock& block : sequence.past.blocks) release(block);
  sequence.past = {};
  sequence.set_valid(0);
}

bool KvCache::truncate(KvSequence& sequence, std::int64_t n) {
  const bool done = with_room([&] {
    return lower_.truncate(sequence.lower, n) && (!upper_ || upper_->truncate(sequence.upper, n));
  });
  if (done) sequence.set_valid(n);
  return done;
}

bool KvCache::allocate(PastBlock& block) {
  return with_room([&] {
    const auto lower = lower_.allocate(block.memory);
    if (!lower) return false;
    const auto upper = upper_ ? upper_->allocate(block.memory) : std::optional(kNoBlock);
    if (!upper) {
      lower_.release(block.memory, *lower);
      return false;
    }
    block.lower = *lower;
    block.upper = *upper;
    return true;
  });
}

void KvCache::retain(const PastBlock& block) {
  lower_.retain(block.memory, block.lower);
  if (upper_) upper_->retain(block.memory, block.upper);
}

void KvCache::release(const PastBlock& block) {
  lower_.release(block.memory, block.lower);
  if (upper_) upper_->release(block.memory, block.upper);
}

void KvCache::forget_block(KvSequence& sequence, std::int64_t index) {
  const auto at = static_cast<std::size_t>(index);
  lower_.release(kernels::kExactTier, std::exchange(sequence.lower[at], kNoBlock));
  if (upper_) upper_->release(kernels::kExactTier, std::exchange(sequence.upper[at], kNoBlock));
}

std::size_t KvCache::block_bytes(KvTier tier) const {
  return lower_.block_bytes(tier) + (upper_ ? upper_->block_bytes(tier) : 0);
}

std::size_t KvCache::stored_bytes(KvTier tier) const {
  return lower_.block_data(tier, 0).size() + (upper_ ? upper_->block_data(tier, 0).size() : 0);
}

void KvCache::download(const KvSequence& sequence, std::int64_t n_positions, int layer) const {
  const bool is_upper = upper_ && upper_->memory().geometry().holds(layer);
  const KvGroup& group = is_upper ? *upper_ : lower_;
  for (const PastBlock& block : sequence.past.blocks) {
    group.download(block.memory, is_upper ? block.upper : block.lower, layer);
  }
  const BlockTable& table = is_upper ? sequence.upper : sequence.lower;
  for (auto p = sequence.past.n_positions; p < n_positions; p += kernels::kBlockTokens) {
    const auto at = static_cast<std::size_t>(p / kernels::kBlockTokens);
    group.download(kernels::kExactTier, table[at], layer);
  }
}

void KvCache::upload(const PastBlock& block, int layer) const {
  const bool is_upper = upper_ && upper_->memory().geometry().holds(layer);
  (is_upper ? *upper_ : lower_).upload(block.memory, is_upper ? block.upper : block.lower, layer);
}

void KvCache::forget_copies() const {
  lower_.forget_copies();
  if (upper_) upper_->forget_copies();
}

std::size_t KvCache::past_bytes(const KvPast& past) const {
  std::size_t n = 0;
  for (const PastBlock& block : past.blocks) n += block_bytes(block.memory);
  return n;
}

void KvCache::forget_prefixes() {
  lower_.forget_prefixes();
  if (upper_) upper_->forget_prefixes();
}

}  // namespace modularbase
