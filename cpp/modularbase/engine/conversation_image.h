#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "modularbase/engine/conversations.h"

namespace modularbase {

/// A conversation apart from its engine: what it keeps, and the bytes of its blocks, in the order
/// of past.blocks and then of its own blocks, each the lower group's and then the upper's, own ones
/// with their mid rows. The block ids in it mean nothing.
struct ConversationImage {
  std::vector<TokenId> tokens;
  std::int64_t n_valid = 0;
  KvPast past;
  std::vector<std::byte> data;
};

/// Copies a conversation that does not run. Only the tokens of one that packs had a part in:
/// another engine cannot tell whether its packs are the same.
ConversationImage save_conversation(const KvCache& cache, const Conversation& kept);

/// Puts an image into an empty conversation. \throws InvalidRequestError when it is not one of a
/// cache like this, KvCacheFullError when there is no room; the conversation then stays empty.
void load_conversation(KvCache& cache, const ConversationImage& image, Conversation& kept);

}  // namespace modularbase
