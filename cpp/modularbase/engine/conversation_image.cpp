#include "modularbase/engine/conversation_image.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <span>
#include <string>

#include "modularbase/core/errors.h"

namespace modularbase {
namespace {

constexpr std::int64_t kBlock = kernels::kBlockTokens;

std::int64_t n_own_blocks(std::int64_t n_valid, const KvPast& past) {
  return (n_valid + kBlock - 1) / kBlock - past.n_positions / kBlock;
}

/// The mid rows of a block; others may go on from them. Nothing where the layers are one group.
struct MidRows {
  MidRows(const KvCache& cache, BlockId block) : tensor(cache.lower().memory().mid()) {
    if (!tensor) return;
    n_bytes = static_cast<std::size_t>(tensor->ne[0] * kBlock) * sizeof(float);
    offset = static_cast<std::size_t>(block) * n_bytes;
  }
  Tensor tensor;
  std::size_t offset = 0;
  std::size_t n_bytes = 0;
};

std::size_t own_block_bytes(const KvCache& cache) {
  return cache.stored_bytes(kernels::kExactTier) + MidRows(cache, 0).n_bytes;
}

// The table may have more blocks than are valid: of rows that were never computed.
template <class Visit, class VisitMid>
void each_block(const KvCache& cache, const KvSequence& kv, std::int64_t n_valid,
                const Visit& visit, const VisitMid& visit_mid) {
  const auto both = [&](kernels::KvTier tier, BlockId lower, BlockId upper) {
    visit(cache.lower(), tier, lower);
    if (cache.upper()) visit(*cache.upper(), tier, upper);
  };
  for (const PastBlock& block : kv.past.blocks) both(block.memory, block.lower, block.upper);
  const auto first = static_cast<std::size_t>(kv.past.n_positions / kBlock);
  const auto end = first + static_cast<std::size_t>(n_own_blocks(n_valid, kv.past));
  for (std::size_t i = first; i < end; ++i) {
    both(kernels::kExactTier, kv.lower[i], kv.upper.empty() ? kNoBlock : kv.upper[i]);
    if (const MidRows mid(cache, kv.lower[i]); mid.tensor) visit_mid(mid);
  }
}

[[noreturn]] void refuse(const std::string& field, const std::string& expected,
                         const std::string& found) {
  throw InvalidRequestError("conversation " + field, expected, found);
}

void check_number(const char* field, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value >= low && value <= high) return;
  refuse(field, std::to_string(low) + ".." + std::to_string(high), std::to_string(value));
}

void check_block(const PastBlock& block, const KvCache& cache, std::int64_t n_positions) {
  check_number("block memory", block.memory, 0, kernels::kNKvTiers - 1);
  check_number("block tier", static_cast<int>(block.tier), 0, static_cast<int>(Tier::kRedundant));
  if (cache.block_bytes(block.memory) == 0) refuse("block memory", "a tier of this engine", "none");
  check_number("block positions", std::ssize(block.positions), 1, kBlock);
  if (std::bit_width(block.visible) >
      std::bit_width(~std::uint64_t{0} >> (64 - block.positions.size()))) {
    refuse("block visible", "bits of its positions", std::to_string(block.visible));
  }
  for (const std::int32_t position : block.positions) {
    check_number("position", position, 0, n_positions - 1);
  }
}

void check(const KvCache& cache, const ConversationImage& image) {
  const KvPast& past = image.past;
  check_number("n_valid", image.n_valid, 0, std::ssize(image.tokens));
  check_number("n_positions", past.n_positions, 0, image.n_valid);
  if (past.n_positions % kBlock != 0) {
    refuse("n_positions", "whole blocks", std::to_string(past.n_positions));
  }
  check_number("tiers", std::ssize(past.tiers), past.n_positions, past.n_positions);
  std::int64_t end = 0;
  for (const SlotSpan& span : past.spans) {
    check_number("span start", span.start, end, past.n_positions - 1);
    check_number("span tokens", span.n_tokens, 1, past.n_positions - span.start);
    end = span.start + span.n_tokens;
  }
  std::size_t n_bytes =
      static_cast<std::size_t>(n_own_blocks(image.n_valid, past)) * own_block_bytes(cache);
  for (const PastBlock& block : past.blocks) {
    check_block(block, cache, past.n_positions);
    n_bytes += cache.stored_bytes(block.memory);
  }
  if (image.data.size() != n_bytes) {
    refuse("data", std::to_string(n_bytes) + " bytes", std::to_string(image.data.size()));
  }
}

}  // namespace

ConversationImage save_conversation(const KvCache& cache, const Conversation& kept) {
  ConversationImage image;
  image.tokens = kept.tokens;
  const bool is_of_base = kept.context.lower == 0 && kept.context.upper == 0;
  if (!is_of_base) return image;
  image.n_valid = kept.kv.n_tokens;
  image.past = kept.kv.past;
  const auto append = [&](const KvGroup& group, kernels::KvTier tier, BlockId block) {
    group.download(tier, block);
    const std::span<std::byte> bytes = group.block_data(tier, block);
    image.data.insert(image.data.end(), bytes.begin(), bytes.end());
  };
  each_block(cache, kept.kv, image.n_valid, append, [&](const MidRows& mid) {
    const std::size_t at = image.data.size();
    image.data.resize(at + mid.n_bytes);
    ggml_backend_tensor_get(mid.tensor, image.data.data() + at, mid.offset, mid.n_bytes);
  });
  cache.forget_copies();
  return image;
}

void load_conversation(KvCache& cache, const ConversationImage& image, Conversation& kept) {
  check(cache, image);
  KvSequence kv;
  kv.past.n_positions = image.past.n_positions;
  const auto n_compacted = static_cast<std::size_t>(image.past.n_positions / kBlock);
  kv.lower.assign(n_compacted, kNoBlock);
  if (cache.upper()) kv.upper.assign(n_compacted, kNoBlock);
  bool has_room = cache.reserve(kv, image.n_valid);
  for (PastBlock block : image.past.blocks) {
    has_room = has_room && cache.allocate(block);
    if (has_room) kv.past.blocks.push_back(std::move(block));
  }
  if (!has_room) {
    cache.release(kv);
    throw KvCacheFullError(static_cast<std::int64_t>(image.data.size()),
                           static_cast<std::int64_t>(cache.budget_bytes()));
  }
  kv.past.tiers = image.past.tiers;
  kv.past.spans = image.past.spans;
  const std::byte* from = image.data.data();
  const auto restore = [&](const KvGroup& group, kernels::KvTier tier, BlockId block) {
    const std::span<std::byte> bytes = group.block_data(tier, block);
    std::memcpy(bytes.data(), from, bytes.size());
    group.upload(tier, block);
    from += bytes.size();
  };
  each_block(cache, kv, image.n_valid, restore, [&](const MidRows& mid) {
    ggml_backend_tensor_set(mid.tensor, from, mid.offset, mid.n_bytes);
    from += mid.n_bytes;
  });
  cache.forget_copies();
  kv.set_valid(image.n_valid);
  kept.tokens = image.tokens;
  kept.kv = std::move(kv);
  kept.context = {};
}

}  // namespace modularbase
