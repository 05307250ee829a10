#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <future>
#include <memory>
#include <vector>

#include "modularbase/engine/conversations.h"
#include "modularbase/kv/compaction.h"
#include "modularbase/kv/forgetting.h"

namespace modularbase {

/// How the engine keeps what a sequence's window has left behind.
enum class KvMode {
  kExact,      // as it was written
  kImportant,  // in 4 bits
  kTiered,     // as requests and plans say
};

struct TierRules {
  KvMode mode = KvMode::kExact;
  std::int64_t n_window = 128;  // last tokens, which stay exact
};

/// What became of a plan.
struct CompactionReport {
  enum class Outcome { kDone, kCancelled, kNoRoom };
  Outcome outcome = Outcome::kDone;
  std::vector<RefusedSpan> refused;
  double work_us = 0.0;
};

/// What a conversation keeps, and where.
struct ContextState {
  std::int64_t n_tokens = 0;     // valid in the cache
  std::int64_t n_compacted = 0;  // of these, no longer in blocks of their own
  std::int64_t n_rebuilt = 0;
  std::vector<Tier> tiers;      // of the compacted ones
  std::vector<SlotSpan> spans;  // of the redundant ones among them
  std::size_t key_bytes = 0;    // of the compacted ones, by tier
  std::size_t important_bytes = 0;
  std::size_t redundant_bytes = 0;
  std::size_t own_bytes = 0;    // of the others
  std::size_t query_bytes = 0;  // what is kept for fits

  /// Of all its keys and values.
  std::size_t total_bytes() const {
    return key_bytes + important_bytes + redundant_bytes + own_bytes;
  }
};

/// Compacts sequences: those that run as they grow, kept conversations as their callers plan.
/// Engine thread only.
class ContextTiers {
 public:
  ContextTiers(KvCache& cache, const TierRules& rules, std::int64_t n_head, KeyShift shift);
  /// The plans that wait are cancelled.
  ~ContextTiers();

  Conversations& conversations() { return conversations_; }
  /// As Conversations::take; a plan that is being carried out is cancelled.
  bool take(Sequence& sequence);
  /// As Conversations::forget_oldest.
  bool forget_oldest();
  void close(ConversationId id);

  /// Whether running sequences are compacted.
  bool compacts() const { return rules_.mode != KvMode::kExact; }
  /// Before a step: what a running sequence has left behind its window goes into the tiers that
  /// need no fit.
  void compact(Sequence& sequence);
  /// Carries out a plan for a kept conversation when there is time.
  void start(ConversationId id, PastPlan plan, std::promise<CompactionReport> report);
  /// Takes ranges out of a kept conversation's tokens when there is time; what lies behind moves
  /// up. Where their keys and values are not there, nothing is done (cancelled).
  /// \throws InvalidRequestError when there is no such conversation, or for the ranges.
  void start_forgetting(ConversationId id, std::vector<PositionRange> ranges,
                        std::promise<CompactionReport> report);
  bool has_work() const { return !jobs_.empty(); }
  void cancel_all();
  /// Works on plans for about so long, at least for one layer.
  void work(Clock::duration most);

  /// \throws InvalidRequestError when there is no such conversation.
  ContextState state(ConversationId id);
  /// The mean share of attention that the last queries of one layer give to a token of each span
  /// (n_slots is not looked at); NaN where that is not known, as of a running conversation.
  /// \throws InvalidRequestError as state(), and for spans that are not there.
  std::vector<float> attention_received(ConversationId id, const std::vector<SlotSpan>& spans,
                                        int layer);
  /// The same of queries to come, were they as the last ones: of the attention that all the spans
  /// get, times the values' lengths (kernels::expected_attention).
  std::vector<float> expected_attention(ConversationId id, const std::vector<SlotSpan>& spans,
                                        int layer);

 private:
  /// How spans look to the window's queries, which were asked at these positions.
  using Look = std::function<void(SpanFitter&, const LayerView&,
                                  std::vector<std::int32_t> positions, std::span<float> seen)>;
  std::vector<float> look_at(Conversation& kept, const std::vector<SlotSpan>& spans, int layer,
                             const Look& look);
  Conversation& conversation(ConversationId id);
  struct Job {
    ConversationId id;
    PastPlan plan;
    std::vector<PositionRange> forgotten;  // not empty: instead of the plan
    std::promise<CompactionReport> promise;
    std::unique_ptr<Compaction> compaction;  // once begun
    CompactionReport report;
  };
  void cancel(ConversationId id);
  bool begin(Job& job);
  void end_forgetting(Conversation& kept, const std::vector<PositionRange>& ranges);
  Compaction::Progress advance(Job& job);
  void finish(CompactionReport::Outcome outcome);
  Tier tier_of(const Sequence& sequence, std::int64_t position) const;
  void run(KvSequence& kv, PastPlan plan);

  KvCache& cache_;
  const TierRules rules_;
  const std::int64_t n_head_;
  KeyShift shift_;
  Conversations conversations_;
  std::deque<Job> jobs_;
};

}  // namespace modularbase
