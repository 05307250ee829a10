#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "modularbase/core/types.h"
#include "modularbase/kernels/pack_rows.h"
#include "modularbase/kv/kv_past.h"
#include "modularbase/packs/pack_status.h"
#include "modularbase/sampling/logprobs.h"
#include "modularbase/sampling/sampling_params.h"

namespace modularbase {

using Clock = std::chrono::steady_clock;

enum class RequestKind { kGenerate, kScore, kHidden };

/// How hidden states are reduced.
enum class Pooling { kNone, kMean, kLast };

/// One pack of a request.
struct PackUse {
  GenerationId generation = 0;
  float weight = 1.0f;
  std::string name = {};  // it may go on with what that comes to mean; empty: with nothing else
};
/// Packs that a request runs with; none: the plain base.
struct PackChoice {
  std::vector<PackUse> packs;
};

/// Which tokens a request's packs act on.
enum class Activation {
  kPrompt,    // all
  kFromHere,  // from the last token of the prompt on: the base's KV of the prompt is used as it is
};

/// Names a sequence that is kept between requests.
using ConversationId = std::uint64_t;

/// One request as its caller states it.
struct RequestSpec {
  RequestKind kind = RequestKind::kGenerate;
  std::vector<TokenId> prompt;
  std::vector<PackChoice> pack_choices;  // the first that can be had; empty: the plain base
  kernels::MergePolicy policy = kernels::MergePolicy::kBlend;
  Activation activation = Activation::kPrompt;
  ConversationId conversation = 0;  // goes on from what that keeps, and is kept by it; 0: neither
  std::vector<Tier> tiers;          // of the first tokens of the prompt; others are important
  // Where summarised spans of the conversation start that are computed again before what is new;
  // others are left out, and those that memory is too short for.
  std::vector<std::int32_t> rehydrate;
  // kGenerate
  SamplingParams sampling;
  std::int64_t max_tokens = -1;   // -1: until a stop token or the end of the context
  std::vector<TokenId> stop_ids;  // end-of-generation tokens; empty: none stops it
  int n_logprobs = -1;            // -1: none; n: the chosen token's and the n largest
  int n_draft = 0;                // most tokens drafted a step by prompt lookup; 0: no speculation
  std::optional<Clock::time_point> deadline;
  // kHidden
  int layer = 0;  // residual stream entering this layer; n_layer + 1: after the output norm
  Pooling pooling = Pooling::kNone;
  // While others generate: at most so many rows a step, in the step of theirs, so that nobody
  // waits for this request. 0: steps of its own. After the output norm only.
  int n_rows_beside = 0;
};

enum class FinishReason { kStop, kLength, kCancelled, kDeadline, kDone };

struct RequestTimings {
  double queue_us = 0.0;    // submitted -> first step
  double prefill_us = 0.0;  // first step -> first token
  double decode_us = 0.0;   // first token -> last token
};

struct GeneratedToken {
  TokenId id;
  float logprob;                           // of this token; 0 when not asked for
  std::vector<TokenLogprob> top_logprobs;  // n_logprobs largest
};

/// A generation that a running request left for the one that replaced it.
struct PackSwitch {
  std::int64_t n_generated = 0;  // tokens before it
  std::string from;              // digests
  std::string to;
};

/// What a request has produced so far.
struct RequestResult {
  std::vector<GeneratedToken> tokens;
  std::optional<FinishReason> finish_reason;  // set when finished without an error
  std::vector<float> logprobs;                // kScore: of prompt[1..]
  std::vector<float> hidden;  // kHidden: [n_embd, n_prompt], or [n_embd] when pooled
  std::int64_t n_prompt = 0;
  std::int64_t n_cached = 0;        // prompt tokens that were not computed again
  std::int64_t n_cached_lower = 0;  // prompt tokens that the layers up to the first site knew
  std::int64_t n_rehydrated = 0;    // summarised tokens that were computed again
  std::int64_t n_drafted = 0;       // speculation: tokens proposed
  std::int64_t n_accepted = 0;      // and kept
  std::int64_t pack_choice = -1;    // the one it ran with; -1: not decided, or none was asked for
  std::vector<std::string> pack_errors;   // why the choices before it could not be had
  std::vector<PackSwitch> pack_switches;  // not empty: its KV is of several generations
  /// Mean cosine between what its packs add, a layer [n_layer]; NaN where fewer than two do. Empty
  /// for fewer than two packs.
  std::vector<float> pack_conflict;
  RequestTimings timings;
};

/// The caller's hold on a request. Thread-safe; the engine thread is the only writer.
class Ticket {
 public:
  /// Waits until there are more than n_seen tokens or the request has finished, at most timeout.
  /// Returns the tokens after the first n_seen. \throws what made the request fail.
  std::vector<GeneratedToken> wait_tokens(std::size_t n_seen, std::chrono::milliseconds timeout);
  /// Waits for the end, at most timeout; false when it has not ended. \throws what made the request
  /// fail.
  bool wait_finished(std::chrono::milliseconds timeout);
  bool finished() const;
  /// A copy of what is there now.
  RequestResult result() const;
  /// Takes effect at the next step edge; a finished request stays as it is.
  void cancel() { cancelled_.store(true, std::memory_order_relaxed); }
  bool cancelled() const { return cancelled_.load(std::memory_order_relaxed); }

  /// Engine side.
  void update(const std::function<void(RequestResult&)>& change);
  void finish(FinishReason reason);
  void fail(std::exception_ptr error);

 private:
  void rethrow_locked() const;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  RequestResult result_;
  std::exception_ptr error_;
  bool finished_ = false;
  std::atomic<bool> cancelled_{false};
};

using TicketPtr = std::shared_ptr<Ticket>;

}  // namespace modularbase
