#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "modularbase/engine/sequence.h"

namespace modularbase {

/// A sequence between two requests.
struct Conversation {
  std::vector<TokenId> tokens;  // kv.n_tokens of them are in the cache
  KvSequence kv;
  KvContext context;
  std::unique_ptr<SequenceWindow> window;  // null: none has run, or nothing of it becomes slots
  bool is_running = false;                 // a request has its kv
  bool is_closed = false;                  // to be forgotten when that ends
  std::int64_t n_rebuilt = 0;  // tokens computed again, since what was kept did not suit
  std::uint64_t last_use = 0;
};

/// The conversations of an engine: what their next request may go on from. Keeps true: a
/// conversation's kv is here, or with the one request that runs for it. Engine thread only.
class Conversations {
 public:
  /// has_windows: spans may become slots.
  Conversations(KvCache& cache, std::int64_t n_head, bool has_windows);

  void open(ConversationId id);
  /// A second one that goes on from what the first keeps, under an id of its own.
  void fork(const Conversation& kept, ConversationId id);
  /// Forgets it, at once or when its request ends. False when there is none.
  bool close(ConversationId id);
  /// Null when there is none.
  Conversation* find(ConversationId id);

  /// Gives a sequence what its conversation keeps of its tokens under its context: the common
  /// beginning, if that holds all that was compacted, else nothing. False when it runs already.
  bool take(Sequence& sequence);
  /// Keeps what a sequence has, up to the last valid position.
  void keep(Sequence& sequence);
  /// The sequence has ended, or waits, with nothing to keep.
  void drop(Sequence& sequence);
  /// Gives back the memory of the conversation that has not run for longest; false if none has any.
  bool forget_oldest();

 private:
  KvCache& cache_;
  const std::int64_t n_head_;
  const bool has_windows_;
  std::map<ConversationId, Conversation> all_;
  std::uint64_t clock_ = 0;
};

}  // namespace modularbase
