// The engine thread: take requests, schedule a step, run it, commit what it gave.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>

#include "modularbase/core/errors.h"
#include "modularbase/engine/engine.h"

namespace modularbase {
namespace {

double micros(Clock::duration duration) {
  return std::chrono::duration<double, std::micro>(duration).count();
}

constexpr auto kStallCheck = std::chrono::milliseconds(10);
// Between two looks at the inbox, when nobody else has work.
constexpr auto kIdleWork = std::chrono::milliseconds(5);

bool is_cancelled(const Sequence& sequence) {
  return sequence.ticket->cancelled();
}

bool is_late(const Sequence& sequence) {
  return sequence.spec.deadline && Clock::now() > *sequence.spec.deadline;
}

bool always(const Sequence&) {
  return true;
}

}  // namespace

void Engine::run() {
  while (take_inbox()) {
    run_errands(true);
    drop_ended();
    is_stalled_ = !scheduler_->schedule(plan_);
    for (auto& sequence : scheduler_->take_failed()) {
      endings_.push_back({std::move(sequence->ticket), FinishReason::kDone, sequence->error});
    }
    if (!is_stalled_) step();
    settle();
    work_on_plans();
  }
  run_errands(false);
  tiers_->cancel_all();
  for (auto& sequence : scheduler_->remove_if(always)) {
    endings_.push_back({std::move(sequence->ticket), FinishReason::kCancelled});
  }
  settle();
}

bool Engine::take_inbox() {
  std::unique_lock lock(mutex_);
  const auto has_news = [&] {
    return stopping_ || !inbox_.empty() || !errands_.empty() || packs_changed_;
  };
  if (tiers_->has_work()) {
    // there is no time to wait
  } else if (is_stalled_ && scheduler_->has_work()) {
    wake_.wait_for(lock, kStallCheck, has_news);  // cancellations and deadlines tell nobody
  } else {
    wake_.wait(lock, [&] { return has_news() || scheduler_->has_work(); });
  }
  if (std::exchange(packs_changed_, false)) scheduler_->packs_changed();
  for (auto& sequence : inbox_) scheduler_->add(std::move(sequence));
  inbox_.clear();
  std::ranges::move(errands_, std::back_inserter(due_errands_));
  errands_.clear();
  if (forget_prefixes_) cache_->forget_prefixes();
  forget_prefixes_ = false;
  tapped_ = tap_ && tap_->is_open() ? tap_ : nullptr;
  return !stopping_;
}

void Engine::run_errands(bool is_open) {
  for (const auto& errand : due_errands_) errand(is_open);
  due_errands_.clear();
}

// Who decodes waits no longer for plans than for a step.
void Engine::work_on_plans() {
  if (!tiers_->has_work()) return;
  tiers_->work(scheduler_->n_running() > 0 ? step_time_ : kIdleWork);
}

void Engine::drop_ended() {
  for (auto& sequence : scheduler_->remove_if(is_cancelled)) {
    endings_.push_back({std::move(sequence->ticket), FinishReason::kCancelled});
  }
  for (auto& sequence : scheduler_->remove_if(is_late)) {
    auto error = sequence->waits_for_room && !sequence->has_packs ? no_room_error(*sequence)
                                                                  : std::exception_ptr();
    endings_.push_back({std::move(sequence->ticket), FinishReason::kDeadline, std::move(error)});
  }
  if (!endings_.empty()) settle();  // nobody waits a step for an end that is known
}

std::exception_ptr Engine::no_room_error(const Sequence& sequence) const {
  const PackUse& first = sequence.spec.pack_choices[sequence.pack_choice].packs[0];
  try {
    const PackStatus pack = packs_->status(first.generation);
    throw BudgetExceededError(pack.name, pack.n_bytes, options_.pack_budget_bytes,
                              "no room came free before the deadline");
  } catch (...) {  // or the generation was forgotten meanwhile
    return std::current_exception();
  }
}

// Who sees a request's end sees statistics that no longer count it.
void Engine::settle() {
  publish_stats();
  for (Ending& ending : endings_) {
    if (ending.error) {
      ending.ticket->fail(std::move(ending.error));
    } else {
      ending.ticket->finish(ending.reason);
    }
  }
  endings_.clear();
}

void Engine::step() {
  ++n_steps_;
  n_rows_ += plan_.n_rows;
  n_mid_rows_ += plan_.n_mid_rows;
  plan_.tap_layer = tapped_ ? tapped_->layer() : -1;
  const std::vector<Sequence*>& planned = scheduler_->planned();
  const std::vector<Sequence*>& planned_mid = scheduler_->planned_mid();
  const auto started_at = Clock::now();
  try {
    runner_->run(plan_);
    step_time_ = Clock::now() - started_at;
  } catch (...) {
    for (Sequence* sequence : planned) fail(*sequence);
    for (Sequence* sequence : planned_mid) fail(*sequence);
    return;
  }
  add_conflicts();
  if (tapped_) tapped_->push(plan_, runner_->tapped());
  for (std::size_t i = 0; i < planned_mid.size(); ++i) {
    planned_mid[i]->kv.n_tokens += std::ssize(plan_.mid_spans[i].tokens);
  }
  std::size_t first_output = 0;
  for (std::size_t i = 0; i < planned.size(); ++i) {
    Sequence& sequence = *planned[i];
    const auto n_rows = static_cast<std::int64_t>(plan_.spans[i].tokens.size());
    const std::size_t n_outputs = sequence.n_outputs(n_rows);
    try {
      commit(sequence, first_output, n_rows);
    } catch (...) {
      fail(sequence);
    }
    first_output += n_outputs;
  }
}

// The calling catch block's exception becomes the request's; the other requests go on.
void Engine::fail(Sequence& sequence) {
  endings_.push_back(
      {scheduler_->discard(sequence)->ticket, FinishReason::kDone, std::current_exception()});
}

void Engine::commit(Sequence& sequence, std::size_t first_output, std::int64_t n_rows) {
  switch (sequence.spec.kind) {
    case RequestKind::kScore:
      return commit_score(sequence, n_rows);
    case RequestKind::kHidden:
      return commit_hidden(sequence, first_output, n_rows);
    case RequestKind::kGenerate:
      break;
  }
  if (sequence.rehydration) return commit_rehydration(sequence, n_rows);
  if (n_rows == sequence.n_pending()) {
    commit_generation(sequence, first_output);
  } else {
    sequence.kv.set_valid(sequence.kv.n_tokens + n_rows);
  }
}

void Engine::commit_rehydration(Sequence& sequence, std::int64_t n_rows) {
  Rehydration& run = *sequence.rehydration;
  run.add_computed(n_rows);
  if (run.n_left() > 0) return;
  run.commit(sequence.kv);
  sequence.ticket->update(
      [&](RequestResult& result) { result.n_rehydrated += sequence.to_rehydrate.back().n_tokens; });
  sequence.rehydration.reset();
  sequence.to_rehydrate.pop_back();
}

void Engine::commit_generation(Sequence& sequence, std::size_t first_output) {
  const std::size_t n_draft = sequence.draft.size();
  sequence.tokens.resize(sequence.tokens.size() - n_draft);
  new_tokens_.clear();
  std::optional<FinishReason> reason;
  std::size_t n_accepted = 0;
  for (;; ++n_accepted) {
    reason = append_token(sequence, runner_->logits(first_output + n_accepted));
    const bool accepted =
        n_accepted < n_draft && sequence.tokens.back() == sequence.draft[n_accepted];
    if (reason || !accepted) break;
  }
  // The last token's KV is not there yet; of a stopped sequence, whose stop token was not appended,
  // all is.
  const bool stopped = reason == FinishReason::kStop;
  sequence.kv.set_valid(std::ssize(sequence.tokens) - (stopped ? 0 : 1));
  if (sequence.drafter && n_draft > 0) {
    sequence.drafter->report(static_cast<int>(n_accepted), static_cast<int>(n_draft));
  }
  if (!sequence.prompt_published) {
    sequence.prompt_published = true;
    cache_->publish_whole_blocks(sequence.kv, sequence.tokens, sequence.kv_context);
  }
  if (sequence.first_token_at == Clock::time_point{}) sequence.first_token_at = Clock::now();
  show_tokens(sequence, n_accepted);
  if (reason) finish(sequence, *reason);
}

void Engine::show_tokens(Sequence& sequence, std::size_t n_accepted) {
  sequence.ticket->update([&](RequestResult& result) {
    result.tokens.insert(result.tokens.end(), std::make_move_iterator(new_tokens_.begin()),
                         std::make_move_iterator(new_tokens_.end()));
    result.n_drafted += static_cast<std::int64_t>(sequence.draft.size());
    result.n_accepted += static_cast<std::int64_t>(n_accepted);
  });
}

std::optional<FinishReason> Engine::append_token(Sequence& sequence, const LogitsView& logits) {
  const RequestSpec& spec = sequence.spec;
  const TokenId token = sequence.sampler.sample(logits);
  if (std::find(spec.stop_ids.begin(), spec.stop_ids.end(), token) != spec.stop_ids.end()) {
    return FinishReason::kStop;
  }
  GeneratedToken generated{token, 0.0f, {}};
  if (spec.n_logprobs >= 0) {
    RowLogprobs row = row_logprobs(logits.logits, token, static_cast<std::size_t>(spec.n_logprobs));
    generated.logprob = row.chosen.logprob;
    generated.top_logprobs = std::move(row.top);
  }
  new_tokens_.push_back(std::move(generated));
  sequence.sampler.accept(token);
  sequence.tokens.push_back(token);
  if (sequence.drafter) sequence.drafter->append(token);
  ++sequence.n_generated;
  if (sequence.n_generated == spec.max_tokens) return FinishReason::kLength;
  const auto n_tokens = static_cast<std::int64_t>(sequence.tokens.size());
  if (n_tokens >= std::min(info_.n_ctx, info_.n_kv_tokens)) return FinishReason::kLength;
  return std::nullopt;
}

void Engine::commit_score(Sequence& sequence, std::int64_t n_rows) {
  sequence.kv.set_valid(sequence.kv.n_tokens + n_rows);
  const auto logprobs = runner_->target_logprobs();
  sequence.ticket->update([&](RequestResult& result) {
    result.logprobs.insert(result.logprobs.end(), logprobs.begin(), logprobs.end());
  });
  if (sequence.n_pending() == 1) finish(sequence, FinishReason::kDone);
}

void Engine::commit_hidden(Sequence& sequence, std::size_t first_output, std::int64_t n_rows) {
  sequence.kv.set_valid(sequence.kv.n_tokens + n_rows);
  const auto rows = plan_.output == StepOutput::kHidden
                        ? runner_->hidden()
                        : runner_->states(first_output, static_cast<std::size_t>(n_rows));
  sequence.hidden.insert(sequence.hidden.end(), rows.begin(), rows.end());
  if (sequence.n_pending() > 0) return;
  const auto n_embd = static_cast<std::size_t>(info_.n_embd);
  const std::size_t n = sequence.hidden.size() / n_embd;
  std::vector<float> pooled;
  if (sequence.spec.pooling == Pooling::kLast) {
    pooled.assign(sequence.hidden.end() - static_cast<std::ptrdiff_t>(n_embd),
                  sequence.hidden.end());
  } else if (sequence.spec.pooling == Pooling::kMean) {
    std::vector<double> sum(n_embd, 0.0);
    for (std::size_t i = 0; i < sequence.hidden.size(); ++i) sum[i % n_embd] += sequence.hidden[i];
    for (const double value : sum)
      pooled.push_back(static_cast<float>(value / static_cast<double>(n)));
  } else {
    pooled = std::move(sequence.hidden);
  }
  sequence.ticket->update([&](RequestResult& result) { result.hidden = std::move(pooled); });
  finish(sequence, FinishReason::kDone);
}

// Which packs fight, and where: of the rows of this step.
void Engine::add_conflicts() {
  const auto conflict = runner_->pack_conflict();
  if (conflict.empty()) return;
  const auto n_layer = static_cast<std::size_t>(info_.n_layer);
  const std::size_t n_rows = conflict.size() / n_layer;
  std::size_t row = 0;
  const auto add = [&](Sequence& sequence, const StepSpan& span) {
    sequence.conflict_sum.resize(n_layer);
    sequence.n_conflict.resize(n_layer);
    for (std::size_t i = 0; i < span.tokens.size(); ++i, ++row) {
      for (std::size_t layer = 0; layer < n_layer; ++layer) {
        const float value = conflict[layer * n_rows + row];
        if (std::isnan(value)) continue;
        sequence.conflict_sum[layer] += value;
        ++sequence.n_conflict[layer];
      }
    }
  };
  const auto& planned = scheduler_->planned();
  const auto& planned_mid = scheduler_->planned_mid();
  for (std::size_t i = 0; i < planned.size(); ++i) add(*planned[i], plan_.spans[i]);
  for (std::size_t i = 0; i < planned_mid.size(); ++i) add(*planned_mid[i], plan_.mid_spans[i]);
}

void Engine::finish(Sequence& sequence, FinishReason reason) {
  const auto now = Clock::now();
  const auto removed = scheduler_->remove(sequence);
  const bool generated = removed->spec.kind == RequestKind::kGenerate;
  const auto prefilled_at = generated ? removed->first_token_at : now;
  removed->ticket->update([&](RequestResult& result) {
    result.timings = {micros(removed->started_at - removed->submitted_at),
                      micros(prefilled_at - removed->started_at), micros(now - prefilled_at)};
    if (removed->pack_set.entries.size() < 2) return;
    for (std::size_t layer = 0; layer < removed->n_conflict.size(); ++layer) {
      const auto n = static_cast<double>(removed->n_conflict[layer]);
      result.pack_conflict.push_back(static_cast<float>(removed->conflict_sum[layer] / n));
    }
  });
  endings_.push_back({std::move(removed->ticket), reason});
}

void Engine::publish_stats() {
  const std::lock_guard lock(mutex_);
  stats_.n_waiting = scheduler_->n_waiting();
  stats_.n_running = scheduler_->n_running();
  stats_.n_free_blocks = cache_->n_free_blocks();
  stats_.n_cached_blocks = cache_->n_cached_blocks();
  stats_.graph_bytes = runner_->graph_bytes();
  stats_.n_head_fallbacks = runner_->n_head_fallbacks();
  stats_.n_steps = n_steps_;
  stats_.n_rows = n_rows_;
  stats_.n_mid_rows = n_mid_rows_;
}

}  // namespace modularbase
