#include "modularbase/engine/context_tiers.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "modularbase/core/errors.h"

namespace modularbase {
namespace {

constexpr std::int64_t kBlock = kernels::kBlockTokens;
// The first tokens of a sequence draw attention whatever they say: they stay exact (Xiao et al.,
// arXiv:2309.17453).
constexpr std::int64_t kSinkTokens = 16;
// A running sequence is compacted so many positions at a time: the work is a small part of the
// steps that made them, and blocks are filled.
constexpr std::int64_t kCompactedAtOnce = 4 * kBlock;

// How far queries are expected ahead (arXiv:2510.00636).
constexpr std::int32_t kTokensAhead = 512;

std::int64_t whole_blocks(std::int64_t n) {
  return std::max<std::int64_t>(0, n) / kBlock * kBlock;
}

}  // namespace

ContextTiers::ContextTiers(KvCache& cache, const TierRules& rules, std::int64_t n_head,
                           KeyShift shift)
    : cache_(cache),
      rules_(rules),
      n_head_(n_head),
      shift_(std::move(shift)),
      conversations_(cache, n_head, rules.mode == KvMode::kTiered) {}

ContextTiers::~ContextTiers() {
  cancel_all();
}

void ContextTiers::cancel_all() {
  while (!jobs_.empty()) finish(CompactionReport::Outcome::kCancelled);
}

bool ContextTiers::take(Sequence& sequence) {
  cancel(sequence.spec.conversation);
  return conversations_.take(sequence);
}

bool ContextTiers::forget_oldest() {
  cancel_all();
  return conversations_.forget_oldest();
}

void ContextTiers::close(ConversationId id) {
  cancel(id);
  if (!conversations_.close(id)) {
    throw InvalidRequestError("conversation", "an open one", std::to_string(id));
  }
}

Tier ContextTiers::tier_of(const Sequence& sequence, std::int64_t position) const {
  if (position < kSinkTokens) return Tier::kKey;
  const auto at = static_cast<std::size_t>(position);
  if (rules_.mode == KvMode::kImportant || at >= sequence.spec.tiers.size()) {
    return Tier::kImportant;
  }
  return std::min(sequence.spec.tiers[at],
                  Tier::kImportant);  // slots come when the request is over
}

void ContextTiers::compact(Sequence& sequence) {
  if (rules_.mode == KvMode::kExact || sequence.spec.kind != RequestKind::kGenerate) return;
  KvSequence& kv = sequence.kv;
  if (kv.n_lower != kv.n_tokens || sequence.rehydration) return;
  const std::int64_t n = whole_blocks(kv.n_tokens - rules_.n_window);
  if (n - kv.past.n_positions < kCompactedAtOnce) return;
  if (kv.past.empty()) cache_.publish_whole_blocks(kv, sequence.tokens, sequence.kv_context);
  PastPlan plan{.n_positions = n, .tiers = {}, .spans = {}};
  for (std::int64_t p = 0; p < n; ++p) plan.tiers.push_back(tier_of(sequence, p));
  run(kv, std::move(plan));
}

// All at once; where memory is short, the sequence stays as it is.
void ContextTiers::run(KvSequence& kv, PastPlan plan) {
  Compaction compaction(cache_, kv, std::move(plan), {}, n_head_);
  Compaction::Progress progress = Compaction::Progress::kMore;
  while (progress == Compaction::Progress::kMore) progress = compaction.work();
  if (progress == Compaction::Progress::kReady) compaction.commit(kv);
}

void ContextTiers::start(ConversationId id, PastPlan plan, std::promise<CompactionReport> report) {
  cancel(id);
  jobs_.push_back({id, std::move(plan), {}, std::move(report), nullptr, {}});
}

void ContextTiers::start_forgetting(ConversationId id, std::vector<PositionRange> ranges,
                                    std::promise<CompactionReport> report) {
  const Conversation& kept = conversation(id);
  const bool is_there = !kept.is_running && kept.kv.n_tokens > 0 && !ranges.empty();
  if (is_there && !can_forget(kept.kv, ranges)) {
    throw InvalidRequestError("ranges",
                              "in order, in whole blocks of what is kept, and whole spans",
                              std::to_string(ranges.size()) + " of another kind");
  }
  cancel(id);
  if (!is_there) return report.set_value({CompactionReport::Outcome::kCancelled, {}, 0.0});
  jobs_.push_back({id, {}, std::move(ranges), std::move(report), nullptr, {}});
}

// The plan may know more, or less, than is there now.
bool ContextTiers::begin(Job& job) {
  Conversation* kept = conversations_.find(job.id);
  if (!kept || kept->is_running) return false;
  if (kept->kv.past.empty()) cache_.publish_whole_blocks(kept->kv, kept->tokens, kept->context);
  if (!job.forgotten.empty()) {
    job.compaction = std::make_unique<Compaction>(
        cache_, kept->kv, plan_forgetting(kept->kv, job.forgotten), FitQueries{}, n_head_, &shift_);
    return true;
  }
  const std::int64_t n_valid = whole_blocks(kept->kv.n_tokens);
  PastPlan plan = std::exchange(job.plan, {});
  const std::int64_t n_planned = whole_blocks(std::ssize(plan.tiers));
  plan.n_positions = std::max(kept->kv.past.n_positions, std::min(n_planned, n_valid));
  plan.tiers.resize(static_cast<std::size_t>(plan.n_positions), Tier::kImportant);
  std::erase_if(plan.spans, [&](const SlotSpan& span) {
    return span.start + span.n_tokens > plan.n_positions;
  });
  FitQueries queries;
  if (kept->window && !plan.spans.empty()) {
    const SlotSpan& last = plan.spans.back();
    queries = {&kept->window->lower(), &kept->window->upper(),
               kept->window->rows(last.start + last.n_tokens, kept->kv.n_tokens)};
  }
  job.compaction =
      std::make_unique<Compaction>(cache_, kept->kv, std::move(plan), std::move(queries), n_head_);
  return true;
}

void ContextTiers::work(Clock::duration most) {
  const auto started_at = Clock::now();
  while (!jobs_.empty()) {
    Job& job = jobs_.front();
    if (!job.compaction && !begin(job)) {
      finish(CompactionReport::Outcome::kCancelled);
      continue;
    }
    const Compaction::Progress progress = advance(job);
    if (progress == Compaction::Progress::kReady) finish(CompactionReport::Outcome::kDone);
    if (progress == Compaction::Progress::kShort) finish(CompactionReport::Outcome::kNoRoom);
    if (Clock::now() - started_at >= most) return;
  }
}

Compaction::Progress ContextTiers::advance(Job& job) {
  const auto started_at = Clock::now();
  const Compaction::Progress progress = job.compaction->work();
  if (progress == Compaction::Progress::kReady) {
    Conversation& kept = *conversations_.find(job.id);
    job.compaction->commit(kept.kv);
    if (!job.forgotten.empty()) end_forgetting(kept, job.forgotten);
  }
  const auto duration = Clock::now() - started_at;
  job.report.work_us += std::chrono::duration<double, std::micro>(duration).count();
  return progress;
}

// The queries of the window were turned for their old positions.
void ContextTiers::end_forgetting(Conversation& kept, const std::vector<PositionRange>& ranges) {
  for (auto range = ranges.rbegin(); range != ranges.rend(); ++range) {
    const auto first = kept.tokens.begin() + range->start;
    kept.tokens.erase(first, first + range->n_tokens);
  }
  if (kept.window) kept.window->begin_at(kept.kv.n_tokens);
}

void ContextTiers::finish(CompactionReport::Outcome outcome) {
  Job& job = jobs_.front();
  job.report.outcome = outcome;
  if (job.compaction) job.report.refused = job.compaction->refused();
  job.compaction.reset();
  job.promise.set_value(std::move(job.report));
  jobs_.pop_front();
}

void ContextTiers::cancel(ConversationId id) {
  for (std::size_t i = jobs_.size(); i-- > 0;) {
    if (jobs_[i].id != id) continue;
    std::swap(jobs_[i], jobs_.front());
    finish(CompactionReport::Outcome::kCancelled);
    return;
  }
}

Conversation& ContextTiers::conversation(ConversationId id) {
  Conversation* kept = conversations_.find(id);
  if (!kept) throw InvalidRequestError("conversation", "an open one", std::to_string(id));
  return *kept;
}

ContextState ContextTiers::state(ConversationId id) {
  const Conversation& kept = conversation(id);
  const KvPast& past = kept.kv.past;
  ContextState state{.n_tokens = kept.kv.n_tokens,
                     .n_compacted = past.n_positions,
                     .n_rebuilt = kept.n_rebuilt,
                     .tiers = past.tiers,
                     .spans = past.spans};
  for (const PastBlock& block : past.blocks) {
    const std::size_t n_bytes = cache_.block_bytes(block.memory);
    (block.tier == Tier::kKey         ? state.key_bytes
     : block.tier == Tier::kImportant ? state.important_bytes
                                      : state.redundant_bytes) += n_bytes;
  }
  const auto n_own = std::ranges::count_if(kept.kv.lower, [](BlockId b) { return b != kNoBlock; });
  state.own_bytes = static_cast<std::size_t>(n_own) * cache_.block_bytes(kernels::kExactTier);
  if (kept.window) state.query_bytes = kept.window->n_bytes();
  return state;
}

std::vector<float> ContextTiers::attention_received(ConversationId id,
                                                    const std::vector<SlotSpan>& spans, int layer) {
  return look_at(conversation(id), spans, layer,
                 [](SpanFitter& fitter, const LayerView& view, const std::vector<std::int32_t>&,
                    std::span<float> seen) { fitter.receive(view, seen); });
}

std::vector<float> ContextTiers::expected_attention(ConversationId id,
                                                    const std::vector<SlotSpan>& spans, int layer) {
  Conversation& kept = conversation(id);
  const auto n_tokens = static_cast<std::int32_t>(kept.kv.n_tokens);
  return look_at(kept, spans, layer,
                 [&](SpanFitter& fitter, const LayerView& view, std::vector<std::int32_t> asked,
                     std::span<float> seen) {
                   fitter.expect(view, {std::move(asked), n_tokens, kTokensAhead}, shift_, seen);
                 });
}

std::vector<float> ContextTiers::look_at(Conversation& kept, const std::vector<SlotSpan>& spans,
                                         int layer, const Look& look) {
  std::int64_t end = 0;
  for (const SlotSpan& span : spans) {
    if (span.start < 0 || span.n_tokens < 1) {
      throw InvalidRequestError("spans", "tokens of the conversation", std::to_string(span.start));
    }
    end = std::max<std::int64_t>(end, std::int64_t{span.start} + span.n_tokens);
  }
  std::vector<float> seen(spans.size(), std::numeric_limits<float>::quiet_NaN());
  if (!kept.window || kept.is_running || end > kept.kv.n_tokens) return seen;
  const FitQueries queries{&kept.window->lower(), &kept.window->upper(),
                           kept.window->rows(end, kept.kv.n_tokens)};
  if (queries.rows.empty()) return seen;
  PastPlan everything{
      .n_positions = std::max(end, kept.kv.past.n_positions), .tiers = {}, .spans = spans};
  everything.tiers.resize(static_cast<std::size_t>(everything.n_positions), Tier::kKey);
  const LocatedPast located = locate(kept.kv, everything);
  const KvGroup* upper = cache_.upper();
  const bool is_upper = upper && upper->memory().geometry().holds(layer);
  const KvGroup& group = is_upper ? *upper : cache_.lower();
  SpanFitter fitter(everything, located, queries, n_head_);
  cache_.download(kept.kv, everything.n_positions, layer);
  look(fitter, {group.layer(layer), is_upper, group.index_of(layer), 0},
       kept.window->positions(end, kept.kv.n_tokens), seen);
  cache_.forget_copies();
  return seen;
}

}  // namespace modularbase
