#include "modularbase/engine/conversations.h"

#include <algorithm>
#include <utility>

namespace modularbase {
namespace {

std::int64_t n_common(const std::vector<TokenId>& a, const std::vector<TokenId>& b) {
  return std::ranges::mismatch(a, b).in1 - a.begin();
}

// Packs that changed on the way make keys and values that are nobody else's.
bool is_same(const KvContext& a, const KvContext& b) {
  return a.upper != KvContext::kMixed && a.lower == b.lower && a.upper == b.upper &&
         a.from == b.from;
}

}  // namespace

Conversations::Conversations(KvCache& cache, std::int64_t n_head, bool has_windows)
    : cache_(cache), n_head_(n_head), has_windows_(has_windows) {}

void Conversations::open(ConversationId id) {
  all_[id];
}

void Conversations::fork(const Conversation& kept, ConversationId id) {
  Conversation& twin = all_[id];
  twin.tokens = kept.tokens;
  twin.kv = cache_.fork(kept.kv);
  twin.context = kept.context;
  twin.last_use = ++clock_;
}

bool Conversations::close(ConversationId id) {
  const auto it = all_.find(id);
  if (it == all_.end()) return false;
  if (it->second.is_running) {
    it->second.is_closed = true;
    return true;
  }
  cache_.release(it->second.kv);
  all_.erase(it);
  return true;
}

Conversation* Conversations::find(ConversationId id) {
  const auto it = all_.find(id);
  return it == all_.end() || it->second.is_closed ? nullptr : &it->second;
}

bool Conversations::take(Sequence& sequence) {
  Conversation* kept = find(sequence.spec.conversation);
  if (!kept) return true;
  if (kept->is_running) return false;
  kept->is_running = true;
  kept->last_use = ++clock_;
  if (has_windows_ && !kept->window)
    kept->window = std::make_unique<SequenceWindow>(cache_, n_head_);
  sequence.window = kept->window.get();
  const std::int64_t n_most = std::ssize(sequence.tokens) - 1;  // there is a row to compute
  const std::int64_t n =
      std::min({n_common(kept->tokens, sequence.tokens), kept->kv.n_tokens, n_most});
  const bool suits = is_same(kept->context, sequence.kv_context) && n >= kept->kv.past.n_positions;
  if (suits && cache_.truncate(kept->kv, n)) {
    sequence.kv = std::exchange(kept->kv, {});
    return true;
  }
  kept->n_rebuilt += kept->kv.n_tokens;
  cache_.release(kept->kv);
  return true;
}

void Conversations::keep(Sequence& sequence) {
  Conversation& kept = all_.at(sequence.spec.conversation);
  kept.is_running = false;
  kept.last_use = ++clock_;
  kept.tokens = sequence.tokens;
  kept.kv = std::exchange(sequence.kv, {});
  kept.context = sequence.kv_context;
  if (kept.is_closed) close(sequence.spec.conversation);
}

void Conversations::drop(Sequence& sequence) {
  const auto it = all_.find(sequence.spec.conversation);
  if (it == all_.end()) return;
  it->second.is_running = false;
  if (it->second.is_closed) close(it->first);
}

bool Conversations::forget_oldest() {
  Conversation* oldest = nullptr;
  for (auto& [id, kept] : all_) {
    const bool has_memory = !kept.kv.lower.empty();
    if (has_memory && (!oldest || kept.last_use < oldest->last_use)) oldest = &kept;
  }
  if (!oldest) return false;
  oldest->n_rebuilt += oldest->kv.n_tokens;
  cache_.release(oldest->kv);
  return true;
}

}  // namespace modularbase
