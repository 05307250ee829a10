#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "modularbase/engine/context_tiers.h"
#include "modularbase/engine/pack_admission.h"
#include "modularbase/engine/sequence.h"
#include "modularbase/engine/step_plan.h"

namespace modularbase {

/// What the scheduler may spend on a step.
struct SchedulerLimits {
  int n_batch;      // rows
  int n_sequences;  // running at once
};

/// Decides which rows the next step computes. Waiting requests are admitted in order of arrival,
/// those whose packs are there before those that wait for a load;
/// each running sequence gets its next token's row first, prompts share what is left in chunks. A
/// prompt whose beginning only the lower layers know first runs that through the upper ones.
/// When blocks run out, the sequence that came last gives its blocks back and waits; it goes on
/// later from its tokens. Engine thread only.
class Scheduler {
 public:
  Scheduler(KvCache& cache, ContextTiers& tiers, PackAdmission packs, const SchedulerLimits& limits)
      : cache_(cache), tiers_(tiers), packs_(std::move(packs)), limits_(limits) {}

  void add(std::unique_ptr<Sequence> sequence) {
    waiting_.push_back(std::move(sequence));
    packs_changed_ = true;
  }
  /// A load ended, or room for packs came free.
  void packs_changed() { packs_changed_ = true; }
  bool has_work() const { return !waiting_.empty() || !running_.empty(); }
  std::size_t n_waiting() const { return waiting_.size(); }
  std::size_t n_running() const { return running_.size(); }

  /// Fills the plan; false when nothing can run: nothing is running, and what waits waits for
  /// packs.
  bool schedule(StepPlan& plan);
  /// The sequences of the last plan, one per span.
  const std::vector<Sequence*>& planned() const { return planned_; }
  /// The same for its mid_spans.
  const std::vector<Sequence*>& planned_mid() const { return planned_mid_; }

  /// Takes a running sequence out, its blocks published as prefix, or kept by its conversation, and
  /// released.
  std::unique_ptr<Sequence> remove(Sequence& sequence);
  /// The same without publishing: after a failure its blocks may hold anything.
  std::unique_ptr<Sequence> discard(Sequence& sequence);
  /// Takes out every sequence for which `drop` is true, waiting or running.
  std::vector<std::unique_ptr<Sequence>> remove_if(bool (*drop)(const Sequence&));
  /// What asked for a name goes on with what it means now; returns how many did at once.
  std::int64_t switch_packs(const NewMeaning& meaning);
  /// Takes out the sequences that cannot go on (error says why): their packs cannot be had, or
  /// memory.
  std::vector<std::unique_ptr<Sequence>> take_failed() { return std::exchange(failed_, {}); }

 private:
  void admit();
  bool take_blocks(Sequence& sequence);
  void plan_generation(StepPlan& plan);
  bool plan_prompt_only(StepPlan& plan);
  bool begin_rehydration(Sequence& sequence);
  std::int64_t plan_rehydration(StepPlan& plan, Sequence& sequence, std::int64_t n_most);
  bool reserve(Sequence& sequence, std::int64_t n_tokens);
  void preempt(Sequence& sequence);
  void add_draft(NgramDraft& drafter, Sequence& sequence);
  void add_span(StepPlan& plan, Sequence& sequence, std::int64_t n_rows);
  void add_mid_span(StepPlan& plan, Sequence& sequence, std::int64_t n_rows);
  void add_outputs(StepPlan& plan, Sequence& sequence);
  void plan_states(StepPlan& plan, Sequence& sequence);
  std::int64_t n_decoding() const;

  std::unique_ptr<Sequence> take_out(Sequence& sequence);
  bool make_room();
  bool fail(Sequence& sequence);
  std::int64_t n_tokens_at_start(const Sequence& sequence) const;

  KvCache& cache_;
  ContextTiers& tiers_;
  PackAdmission packs_;
  const SchedulerLimits limits_;
  std::deque<std::unique_ptr<Sequence>> waiting_;
  std::vector<std::unique_ptr<Sequence>> running_;  // in order of arrival
  std::vector<std::unique_ptr<Sequence>> failed_;
  std::vector<Sequence*> planned_;
  std::vector<Sequence*> planned_mid_;
  bool last_was_prompt_only_ = false;
  bool packs_changed_ = false;
  bool may_admit_ =
      true;  // false: the first waiting one did not fit, and no blocks came free since
};

}  // namespace modularbase
