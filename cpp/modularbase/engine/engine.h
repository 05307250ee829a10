#pragma once

#include <condition_variable>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "modularbase/engine/activation_tap.h"
#include "modularbase/engine/context_tiers.h"
#include "modularbase/engine/conversation_image.h"
#include "modularbase/engine/model_runner.h"
#include "modularbase/engine/pack_admission.h"
#include "modularbase/engine/scheduler.h"
#include "modularbase/engine/stats.h"
#include "modularbase/io/gguf_file.h"

namespace modularbase {

/// A resident base serving requests from any thread. One engine thread owns everything below it
/// (scheduler, cache, runner); callers only exchange specs and tickets with it.
class Engine {
 public:
  /// \throws BaseLoadError, InvalidRequestError, DeviceError.
  Engine(const std::string& path, const EngineOptions& options);
  ~Engine();

  /// Checks the request and queues it. \throws InvalidRequestError, ContextLengthError,
  /// KvCacheFullError.
  TicketPtr submit(RequestSpec spec);
  /// Cancels what runs and stops the engine thread. Later submits throw CancelledError. Idempotent.
  void close();
  /// Forgets all remembered prefixes before the next step.
  void forget_prefixes();

  /// From the next step on, every row that enters a layer is put into a ring, until the tap or the
  /// engine is closed. One at a time.
  /// \throws InvalidRequestError for the options, or when there is one; ChannelError for the ring;
  /// CancelledError when the engine is closed.
  std::shared_ptr<ActivationTap> tap(const TapOptions& options);

  /// Lets the requests for text that asked for a name (PackUse::name) go on with a generation,
  /// where it is resident: those that run from the next step edge on, those that are queued from
  /// their beginning. Waits for that edge and returns how many moved.
  /// \throws CancelledError when the engine is closed; InvalidRequestError as packs().
  std::int64_t switch_packs(const std::string& name, GenerationId to);

  /// A sequence to be kept between requests (RequestSpec::conversation), until it is closed.
  /// \throws CancelledError when the engine is closed, as the next ones do.
  ConversationId open_conversation();
  /// \throws InvalidRequestError when there is no such conversation, as the next two do.
  void close_conversation(ConversationId id);
  /// A second one that goes on from the same keys and values, which both share.
  /// \throws InvalidRequestError also for a conversation that runs.
  ConversationId fork_conversation(ConversationId id);
  /// What it keeps between its requests.
  ContextState context_state(ConversationId id);
  /// \throws InvalidRequestError also for a conversation that runs.
  ConversationImage save_conversation(ConversationId id);
  /// \throws as load_conversation.
  ConversationId load_conversation(const ConversationImage& image);
  /// As ContextTiers::attention_received.
  std::vector<float> attention_received(ConversationId id, const std::vector<SlotSpan>& spans,
                                        int layer);
  /// As ContextTiers::expected_attention.
  std::vector<float> expected_attention(ConversationId id, const std::vector<SlotSpan>& spans,
                                        int layer);
  /// Carries out a plan for its past, between the steps of other requests, and returns when that is
  /// done or given up: a request of this conversation cancels it.
  /// \throws InvalidRequestError for the plan, or an engine without tiers.
  CompactionReport compact(ConversationId id, PastPlan plan);
  /// Takes ranges out of its tokens, as ContextTiers::start_forgetting; otherwise as compact().
  CompactionReport forget(ConversationId id, const std::vector<PositionRange>& ranges);

  /// \throws InvalidRequestError when the engine was loaded without a budget for packs.
  PackResidency& packs();

  EngineInfo info() const { return info_; }
  EngineStats stats() const;

 private:
  void check(const RequestSpec& spec) const;
  void check_packs(const RequestSpec& spec) const;
  void check_context(const RequestSpec& spec) const;
  void check_memory(const RequestSpec& spec, std::int64_t n_total) const;
  void check_plan(const PastPlan& plan) const;
  const Conversation& resting(ConversationId id);
  void check_layer(int layer) const;
  void run();
  bool take_inbox();
  void run_errands(bool is_open);
  void work_on_plans();
  void drop_ended();
  std::exception_ptr no_room_error(const Sequence& sequence) const;
  void step();
  void commit(Sequence& sequence, std::size_t first_output, std::int64_t n_rows);
  void commit_rehydration(Sequence& sequence, std::int64_t n_rows);
  void commit_generation(Sequence& sequence, std::size_t first_output);
  void commit_score(Sequence& sequence, std::int64_t n_rows);
  void commit_hidden(Sequence& sequence, std::size_t first_output, std::int64_t n_rows);
  std::optional<FinishReason> append_token(Sequence& sequence, const LogitsView& logits);
  void show_tokens(Sequence& sequence, std::size_t n_accepted);
  void finish(Sequence& sequence, FinishReason reason);
  void fail(Sequence& sequence);
  void settle();
  void add_conflicts();
  void publish_stats();
  int tap_layer(const TapOptions& options) const;

  /// How a request ended: with a reason, or with an error.
  struct Ending {
    TicketPtr ticket;
    FinishReason reason;
    std::exception_ptr error = nullptr;
  };

  /// Does something on the engine thread before its next step, and returns what it gives.
  /// \throws what it throws; CancelledError when the engine is closed.
  template <class Errand>
  std::invoke_result_t<Errand> on_engine_thread(Errand errand);
  template <class Start>
  CompactionReport reported(Start start);

  const ResolvedOptions options_;
  mutable std::mutex mutex_;  // guards inbox_ and what follows it; outlives the loader of packs
  std::condition_variable wake_;
  GgufFile file_;  // outlives the model: weights may be mapped from it
  Backend backend_;
  std::unique_ptr<Model> model_;
  EngineInfo info_;
  std::unique_ptr<KvCache> cache_;
  std::unique_ptr<PackResidency> packs_;  // null: no packs; outlives the leases of sequences
  std::unique_ptr<ModelRunner> runner_;
  std::unique_ptr<ContextTiers> tiers_;
  std::unique_ptr<Scheduler> scheduler_;
  StepPlan plan_;
  std::vector<GeneratedToken> new_tokens_;
  std::vector<Ending> endings_;
  std::shared_ptr<ActivationTap> tapped_;  // the engine thread's hold on tap_; null: no tap
  std::vector<std::function<void(bool is_open)>> due_errands_;
  std::int64_t n_steps_ = 0;
  std::int64_t n_rows_ = 0;
  std::int64_t n_mid_rows_ = 0;

  bool is_stalled_ = false;      // all that is there waits for packs
  Clock::duration step_time_{};  // of the last step

  std::vector<std::unique_ptr<Sequence>> inbox_;
  std::vector<std::function<void(bool is_open)>> errands_;
  bool stopping_ = false;
  bool packs_changed_ = false;
  bool forget_prefixes_ = false;
  std::shared_ptr<ActivationTap> tap_;  // the last one that was opened
  std::uint64_t n_submitted_ = 0;
  ConversationId n_conversations_ = 0;
  EngineStats stats_;

  std::once_flag joined_;
  std::thread thread_;  // last: starts when everything is there
};

}  // namespace modularbase
