#pragma once

#include <cstdint>

#include "modularbase/engine/options.h"
#include "modularbase/kv/kv_cache.h"
#include "modularbase/models/model.h"

namespace modularbase {

/// Exact blocks that a budget has room for; with 0, those of two sequences of n_ctx.
/// \throws InvalidRequestError when there is room for none, or for too many to count.
std::int64_t resolve_n_blocks(std::int64_t budget_bytes, std::size_t block_bytes,
                              std::int64_t n_ctx);

/// What there is beside exact blocks. Layers whose key bias is far larger than the others' (some
/// qwen2) keep their keys in 8 bits: rounded to 4, what such a key says drowns in what its bias
/// does.
/// \throws InvalidRequestError when the model cannot have it.
KvTiers resolve_tiers(const ResolvedOptions& options, const Model& model, const Backend& backend);

/// The longest sequence that so many exact blocks' bytes have room for.
std::int64_t n_kv_tokens(const KvGroups& groups, const KvTiers& tiers, std::int64_t n_blocks,
                         const ResolvedOptions& options);

}  // namespace modularbase
