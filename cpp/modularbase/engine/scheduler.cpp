#include "modularbase/engine/scheduler.h"

#include <algorithm>

#include "modularbase/core/errors.h"

namespace modularbase {
namespace {

// A running sequence waits for the whole step, so that prompts are cut finer while others decode.
constexpr std::int64_t kPromptRowsBesideDecoding = 256;
// Every row of these has an output: bounds the logits held at once.
constexpr std::int64_t kPromptOnlyRows = 128;

// Scoring does not run the last token: nothing asks what comes after it.
std::int64_t n_rows_wanted(const Sequence& sequence) {
  return sequence.n_pending() - (sequence.spec.kind == RequestKind::kScore ? 1 : 0);
}

StepSpan next_rows(const Sequence& sequence, std::int64_t n_rows) {
  const auto rows = std::span<const TokenId>(sequence.tokens)
                        .subspan(static_cast<std::size_t>(sequence.kv.n_tokens),
                                 static_cast<std::size_t>(n_rows));
  const bool has_packs = !sequence.pack_set.entries.empty();
  return {&sequence.kv,
          sequence.id,
          sequence.kv.n_tokens,
          rows,
          has_packs ? &sequence.pack_set : nullptr,
          sequence.kv_context.from,
          sequence.window};
}

}  // namespace

bool Scheduler::schedule(StepPlan& plan) {
  admit();
  for (const auto& sequence : running_) tiers_.compact(*sequence);
  plan.clear();
  planned_.clear();
  planned_mid_.clear();
  last_was_prompt_only_ = !last_was_prompt_only_ && plan_prompt_only(plan);
  if (!last_was_prompt_only_) plan_generation(plan);
  const auto is_empty = [&] { return planned_.empty() && planned_mid_.empty(); };
  if (is_empty()) last_was_prompt_only_ = plan_prompt_only(plan);
  return !is_empty();
}

void Scheduler::admit() {
  packs_.begin_round(packs_changed_);
  auto it = waiting_.begin();
  while (may_admit_ && it != waiting_.end() &&
         running_.size() < static_cast<std::size_t>(limits_.n_sequences)) {
    switch (packs_.admit(**it)) {
      case PackAdmission::Verdict::kWaits:
        ++it;  // who waits for a load holds nobody up
        continue;
      case PackAdmission::Verdict::kFailed:
        failed_.push_back(std::move(*it));
        it = waiting_.erase(it);
        continue;
      case PackAdmission::Verdict::kReady:
        break;
    }
    if (!take_blocks(**it)) {
      may_admit_ = false;
      break;
    }
    running_.push_back(std::move(*it));
    it = waiting_.erase(it);
  }
  packs_changed_ = it != waiting_.end();  // for those that were not asked
}

bool Scheduler::take_blocks(Sequence& sequence) {
  if (!tiers_.take(sequence)) return false;
  // Scores and hidden states need every row computed, so they take nothing from the prefix cache.
  if (sequence.spec.kind == RequestKind::kGenerate && sequence.kv.n_tokens == 0) {
    cache_.attach_prefix(sequence.kv, sequence.tokens, sequence.kv_context);
  }
  while (!cache_.reserve(sequence.kv, n_tokens_at_start(sequence))) {
    if (make_room()) continue;
    const bool stands_alone = running_.empty() && sequence.kv.n_tokens > 0;
    cache_.release(sequence.kv);
    if (stands_alone) continue;  // what it had is all that was in its way
    tiers_.conversations().drop(sequence);
    return false;
  }
  if (sequence.window) sequence.window->begin_at(sequence.kv.n_tokens);
  sequence.to_rehydrate = rehydration_runs(sequence.kv.past, sequence.spec.rehydrate);
  if (!sequence.started) {
    sequence.started = true;
    sequence.started_at = Clock::now();
    sequence.ticket->update([&](RequestResult& result) {
      result.n_cached = sequence.kv.n_tokens;
      result.n_cached_lower = sequence.kv.n_lower;
    });
  }
  return true;
}

void Scheduler::preempt(Sequence& sequence) {
  sequence.draft.clear();
  if (sequence.spec.kind != RequestKind::kGenerate) {  // its rows will all be computed again
    sequence.hidden.clear();
    sequence.ticket->update([](RequestResult& result) { result.logprobs.clear(); });
  }
  if (sequence.spec.conversation == 0) {
    waiting_.push_front(remove(sequence));
  } else {
    waiting_.push_front(discard(sequence));
  }
}

// A sequence that is compacted as it grows never needs exact blocks for all its tokens.
std::int64_t Scheduler::n_tokens_at_start(const Sequence& sequence) const {
  const auto n_tokens = static_cast<std::int64_t>(sequence.tokens.size()) + 1;
  if (sequence.spec.kind != RequestKind::kGenerate || !tiers_.compacts()) return n_tokens;
  return std::min(n_tokens, sequence.kv.n_tokens + limits_.n_batch);
}

// What nobody computes with right now goes before those who do give way.
bool Scheduler::make_room() {
  return tiers_.forget_oldest();
}

bool Scheduler::reserve(Sequence& sequence, std::int64_t n_tokens) {
  while (!cache_.reserve(sequence.kv, n_tokens)) {
    if (make_room()) continue;
    if (running_.size() == 1) return fail(sequence);
    Sequence& last = *running_.back();
    preempt(last);
    if (&last == &sequence) return false;
  }
  return true;
}

// Alone, and still short of memory: its key tokens are more than the budget has room for.
bool Scheduler::fail(Sequence& sequence) {
  const auto n_exact =
      std::ranges::count_if(sequence.kv.lower, [](BlockId block) { return block != kNoBlock; });
  const auto n_bytes =
      cache_.past_bytes(sequence.kv.past) +
      static_cast<std::size_t>(n_exact + 1) * cache_.block_bytes(kernels::kExactTier);
  sequence.error = std::make_exception_ptr(KvCacheFullError(
      static_cast<std::int64_t>(n_bytes), static_cast<std::int64_t>(cache_.budget_bytes())));
  failed_.push_back(discard(sequence));
  return false;
}

void Scheduler::plan_generation(StepPlan& plan) {
  std::int64_t n_prompt_rows = limits_.n_batch;
  const std::int64_t n_decoding = this->n_decoding();
  if (n_decoding > 0) {
    n_prompt_rows =
        std::max<std::int64_t>(1, std::min(n_prompt_rows - n_decoding, kPromptRowsBesideDecoding));
  }
  // In order of arrival: only sequences behind the current one are ever preempted for it.
  for (std::size_t i = 0; i < running_.size(); ++i) {
    Sequence& sequence = *running_[i];
    if (n_decoding > 0 && sequence.spec.n_rows_beside > 0) plan_states(plan, sequence);
    if (sequence.spec.kind != RequestKind::kGenerate) continue;
    sequence.draft.clear();
    if (begin_rehydration(sequence)) {
      n_prompt_rows -= plan_rehydration(plan, sequence, n_prompt_rows);
      continue;
    }
    std::int64_t n_rows = sequence.n_pending();
    if (sequence.is_decoding()) {
      if (sequence.drafter) add_draft(*sequence.drafter, sequence);
      n_rows += std::ssize(sequence.draft);
    } else {
      const std::int64_t n_mid = sequence.n_mid_pending();
      n_rows = std::min(n_mid > 0 ? n_mid : n_rows, n_prompt_rows);
      n_prompt_rows -= n_rows;
    }
    if (n_rows == 0) continue;
    if (!reserve(sequence, sequence.kv.n_tokens + n_rows)) return;
    if (sequence.n_mid_pending() > 0) {
      add_mid_span(plan, sequence, n_rows);
      continue;
    }
    add_span(plan, sequence, n_rows);
    if (n_rows == sequence.n_pending()) add_outputs(plan, sequence);
  }
}

// Runs that there is no memory for stay summarised.
bool Scheduler::begin_rehydration(Sequence& sequence) {
  while (!sequence.rehydration && !sequence.to_rehydrate.empty()) {
    auto run = std::make_unique<Rehydration>(cache_, sequence.kv, sequence.to_rehydrate.back());
    if (run->reserve()) {
      sequence.rehydration = std::move(run);
    } else {
      sequence.to_rehydrate.pop_back();
    }
  }
  return sequence.rehydration != nullptr;
}

// Returns how many rows it plans.
std::int64_t Scheduler::plan_rehydration(StepPlan& plan, Sequence& sequence, std::int64_t n_most) {
  const Rehydration& run = *sequence.rehydration;
  const std::int64_t n_rows = std::min(run.n_left(), n_most);
  if (n_rows == 0) return 0;
  StepSpan span = next_rows(sequence, 0);
  span.sequence = &run.view();
  span.pos0 = run.view().n_tokens;
  span.tokens = std::span<const TokenId>(sequence.tokens)
                    .subspan(static_cast<std::size_t>(span.pos0), static_cast<std::size_t>(n_rows));
  span.window = nullptr;
  plan.spans.push_back(span);
  plan.n_rows += n_rows;
  planned_.push_back(&sequence);
  return n_rows;
}

// A draft is a guess: it takes no blocks from others, least of all from its own sequence.
void Scheduler::add_draft(NgramDraft& drafter, Sequence& sequence) {
  auto draft = drafter.draft();
  if (sequence.spec.max_tokens > 0) {  // the last token wanted comes from the row before it
    const auto n_left = static_cast<std::size_t>(sequence.spec.max_tokens - sequence.n_generated);
    draft = draft.first(std::min(draft.size(), n_left - 1));
  }
  const std::int64_t n_tokens = std::ssize(sequence.tokens);
  while (!draft.empty() && !cache_.reserve(sequence.kv, n_tokens + std::ssize(draft))) {
    draft = draft.first(draft.size() / 2);
  }
  sequence.draft.assign(draft.begin(), draft.end());
}

void Scheduler::add_span(StepPlan& plan, Sequence& sequence, std::int64_t n_rows) {
  // Drafted rows lie behind the tokens only while the step runs; commit takes back what was not
  // accepted.
  sequence.tokens.insert(sequence.tokens.end(), sequence.draft.begin(), sequence.draft.end());
  plan.spans.push_back(next_rows(sequence, n_rows));
  plan.n_rows += n_rows;
  planned_.push_back(&sequence);
}

void Scheduler::add_mid_span(StepPlan& plan, Sequence& sequence, std::int64_t n_rows) {
  plan.mid_spans.push_back(next_rows(sequence, n_rows));
  plan.n_mid_rows += n_rows;
  planned_mid_.push_back(&sequence);
}

void Scheduler::add_outputs(StepPlan& plan, Sequence& sequence) {
  const HeadQuery& query = sequence.sampler.head_query(sequence.draft);
  const auto n_out = static_cast<std::int64_t>(sequence.draft.size()) + 1;
  const std::size_t first = plan.out_rows.size();
  plan.add_last_outputs(n_out, query);
  if (sequence.spec.n_logprobs < 0) return;
  for (std::size_t at = first; at < plan.out_rows.size(); ++at) plan.queries[at].all = true;
}

// Its blocks were reserved when it was admitted.
void Scheduler::plan_states(StepPlan& plan, Sequence& sequence) {
  const std::int64_t n_rows =
      std::min<std::int64_t>(sequence.n_pending(), sequence.spec.n_rows_beside);
  add_span(plan, sequence, n_rows);
  plan.add_last_outputs(n_rows, {.none = true, .forced = {}});
  plan.wants_states = true;
}

std::int64_t Scheduler::n_decoding() const {
  return std::count_if(running_.begin(), running_.end(),
                       [](const auto& s) { return s->is_decoding(); });
}

bool Scheduler::plan_prompt_only(StepPlan& plan) {
  const bool others_decode = n_decoding() > 0;
  for (const auto& running : running_) {
    Sequence& sequence = *running;
    if (sequence.spec.kind == RequestKind::kGenerate) continue;
    if (others_decode && sequence.spec.n_rows_beside > 0) continue;
    const std::int64_t n_rows = std::min<std::int64_t>(
        {n_rows_wanted(sequence), kPromptOnlyRows, static_cast<std::int64_t>(limits_.n_batch)});
    const std::int64_t pos0 = sequence.kv.n_tokens;
    add_span(plan, sequence, n_rows);
    if (sequence.spec.kind == RequestKind::kHidden) {
      plan.output = StepOutput::kHidden;
      plan.hidden_layer = sequence.spec.layer;
      return true;
    }
    plan.output = StepOutput::kTargetLogprobs;
    for (std::int64_t row = 0; row < n_rows; ++row) {
      plan.out_rows.push_back(static_cast<std::int32_t>(row));
      plan.targets.push_back(sequence.tokens[static_cast<std::size_t>(pos0 + row + 1)]);
    }
    return true;
  }
  return false;
}

std::unique_ptr<Sequence> Scheduler::remove(Sequence& sequence) {
  if (sequence.spec.conversation != 0) {
    tiers_.conversations().keep(sequence);
    return take_out(sequence);
  }
  // A graph that ended at a layer left the layers above it without keys and values.
  if (sequence.spec.kind != RequestKind::kHidden) {
    cache_.publish(sequence.kv, sequence.tokens, sequence.kv_context);
  }
  return discard(sequence);
}

std::unique_ptr<Sequence> Scheduler::discard(Sequence& sequence) {
  cache_.release(sequence.kv);
  tiers_.conversations().drop(sequence);
  return take_out(sequence);
}

std::unique_ptr<Sequence> Scheduler::take_out(Sequence& sequence) {
  may_admit_ = true;
  sequence.rehydration.reset();
  const auto at = std::find_if(running_.begin(), running_.end(),
                               [&](const auto& running) { return running.get() == &sequence; });
  auto removed = std::move(*at);
  running_.erase(at);
  return removed;
}

std::int64_t Scheduler::switch_packs(const NewMeaning& meaning) {
  const auto has_moved = [&](const auto& sequence) { return packs_.follow(*sequence, meaning); };
  return std::ranges::count_if(running_, has_moved) + std::ranges::count_if(waiting_, has_moved);
}

std::vector<std::unique_ptr<Sequence>> Scheduler::remove_if(bool (*drop)(const Sequence&)) {
  std::vector<std::unique_ptr<Sequence>> removed;
  for (std::size_t i = running_.size(); i-- > 0;) {
    if (drop(*running_[i])) removed.push_back(remove(*running_[i]));
  }
  for (auto it = waiting_.begin(); it != waiting_.end();) {
    if (drop(**it)) {
      removed.push_back(std::move(*it));
      it = waiting_.erase(it);
      may_admit_ = packs_changed_ = true;  // another one may be the first now
    } else {
      ++it;
    }
  }
  return removed;
}

}  // namespace modularbase
