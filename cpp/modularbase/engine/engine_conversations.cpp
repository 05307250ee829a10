// What callers ask of conversations.
#include "modularbase/engine/engine_errand.h"

namespace modularbase {
namespace {

// What nobody computes with right now gives way, as it does to requests.
void load_with_room(KvCache& cache, ContextTiers& tiers, const ConversationImage& image,
                    Conversation& kept) {
  for (;;) {
    try {
      return load_conversation(cache, image, kept);
    } catch (const KvCacheFullError&) {
      if (!tiers.forget_oldest()) throw;
    }
  }
}

}  // namespace

// Starts a job on the engine thread, and waits for its end.
template <class Start>
CompactionReport Engine::reported(Start start) {
  std::promise<CompactionReport> promise;
  std::future<CompactionReport> report = promise.get_future();
  on_engine_thread([&] {
    start(std::move(promise));
    return true;
  });
  return report.get();
}

ConversationId Engine::open_conversation() {
  return on_engine_thread([&] {
    tiers_->conversations().open(++n_conversations_);
    return n_conversations_;
  });
}

void Engine::close_conversation(ConversationId id) {
  on_engine_thread([&] {
    tiers_->close(id);
    return true;
  });
}

ConversationId Engine::fork_conversation(ConversationId id) {
  return on_engine_thread([&] {
    tiers_->conversations().fork(resting(id), ++n_conversations_);
    return n_conversations_;
  });
}

// Engine thread only.
const Conversation& Engine::resting(ConversationId id) {
  const Conversation* kept = tiers_->conversations().find(id);
  if (kept && !kept->is_running) return *kept;
  throw InvalidRequestError("conversation", "an open one that does not run", std::to_string(id));
}

ContextState Engine::context_state(ConversationId id) {
  return on_engine_thread([&] { return tiers_->state(id); });
}

ConversationImage Engine::save_conversation(ConversationId id) {
  return on_engine_thread([&] { return modularbase::save_conversation(*cache_, resting(id)); });
}

ConversationId Engine::load_conversation(const ConversationImage& image) {
  return on_engine_thread([&] {
    const ConversationId id = ++n_conversations_;
    tiers_->conversations().open(id);
    try {
      load_with_room(*cache_, *tiers_, image, *tiers_->conversations().find(id));
    } catch (...) {
      tiers_->close(id);
      throw;
    }
    return id;
  });
}

std::vector<float> Engine::attention_received(ConversationId id, const std::vector<SlotSpan>& spans,
                                              int layer) {
  check_layer(layer);
  return on_engine_thread([&] { return tiers_->attention_received(id, spans, layer); });
}

std::vector<float> Engine::expected_attention(ConversationId id, const std::vector<SlotSpan>& spans,
                                              int layer) {
  check_layer(layer);
  return on_engine_thread([&] { return tiers_->expected_attention(id, spans, layer); });
}

void Engine::check_layer(int layer) const {
  if (layer >= 0 && layer < info_.n_layer) return;
  throw InvalidRequestError("layer", "0.." + std::to_string(info_.n_layer - 1),
                            std::to_string(layer));
}

CompactionReport Engine::compact(ConversationId id, PastPlan plan) {
  check_plan(plan);
  return reported([&](std::promise<CompactionReport> report) {
    tiers_->state(id);  // there is one
    tiers_->start(id, std::move(plan), std::move(report));
  });
}

CompactionReport Engine::forget(ConversationId id, const std::vector<PositionRange>& ranges) {
  return reported([&](std::promise<CompactionReport> report) {
    tiers_->start_forgetting(id, ranges, std::move(report));
  });
}

void Engine::check_plan(const PastPlan& plan) const {
  if (options_.tiers.mode != KvMode::kTiered) {
    throw InvalidRequestError("kv", "tiered, to compact by a plan", "another");
  }
  std::int64_t end = 0;
  for (const SlotSpan& span : plan.spans) {
    const std::int64_t n_planned = std::ssize(plan.tiers);
    if (span.start < end || span.n_tokens < 1 || span.start + span.n_tokens > n_planned ||
        span.n_slots < 0 || span.n_slots > span.n_tokens) {
      throw InvalidRequestError("spans", "in order, within the plan, with at most a slot a token",
                                "start " + std::to_string(span.start) + ", tokens " +
                                    std::to_string(span.n_tokens) + ", slots " +
                                    std::to_string(span.n_slots));
    }
    end = span.start + span.n_tokens;
  }
}

}  // namespace modularbase
