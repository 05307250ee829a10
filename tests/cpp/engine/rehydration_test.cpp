// Summarised tokens that are computed again.
#include <cmath>

#include "cpp/engine/tiny_engine.h"

using namespace modularbase;
using namespace modularbase::testing;

namespace {

constexpr std::size_t kPromptTokens = 330;

RequestSpec turn(ConversationId id, const Ids& prompt) {
  RequestSpec spec = greedy(prompt, 6);
  spec.conversation = id;
  spec.n_logprobs = 0;
  return spec;
}

/// Key tokens but for spans of few slots, which lose nearly all.
PastPlan summary_of(const std::vector<SlotSpan>& spans) {
  PastPlan plan{.n_positions = 0,
                .tiers = std::vector<Tier>(kPromptTokens - 128, Tier::kKey),
                .spans = spans,
                .max_error = 100.0f};
  for (const SlotSpan& span : spans) {
    std::fill_n(plan.tiers.begin() + span.start, span.n_tokens, Tier::kRedundant);
  }
  return plan;
}

/// A conversation whose first turn is over, and its next prompt.
struct Begun {
  Begun(Engine& owner, const std::vector<SlotSpan>& spans)
      : engine(owner), id(owner.open_conversation()), prompt(random_ids(2, kPromptTokens)) {
    const Ids answer = ids_of(finished(engine.submit(turn(id, prompt))));
    if (!spans.empty()) engine.compact(id, summary_of(spans));
    prompt.insert(prompt.end(), answer.begin(), answer.end());
    const Ids next = random_ids(3, 20);
    prompt.insert(prompt.end(), next.begin(), next.end());
  }
  RequestResult go_on(const std::vector<std::int32_t>& rehydrate) {
    RequestSpec spec = turn(id, prompt);
    spec.rehydrate = rehydrate;
    return finished(engine.submit(spec));
  }
  Engine& engine;
  ConversationId id;
  Ids prompt;
};

float first_logprob_gap(const RequestResult& a, const RequestResult& b) {
  return std::abs(a.tokens[0].logprob - b.tokens[0].logprob);
}

}  // namespace

TEST_CASE("rehydrated spans answer as if they had never been summarised") {
  TinyEngine tiny(tiered());
  const RequestResult exact = Begun(tiny.engine, {}).go_on({});
  const std::vector<SlotSpan> spans{{20, 30, 1}, {50, 40, 1}, {100, 70, 1}};
  const RequestResult lost = Begun(tiny.engine, spans).go_on({});
  CHECK(first_logprob_gap(lost, exact) > kTieGap);

  Begun begun(tiny.engine, spans);
  const RequestResult found = begun.go_on({100, 20, 50, 7});
  CHECK(found.n_rehydrated == 140);
  CHECK(found.n_cached == exact.n_cached);
  CHECK(first_logprob_gap(found, exact) < kTieGap);
  CHECK(ids_of(found) == ids_of(exact));
  const ContextState state = tiny.engine.context_state(begun.id);
  CHECK(state.spans.empty());
  CHECK(std::ranges::count(state.tiers, Tier::kImportant) == 140);
  CHECK(std::ranges::count(state.tiers, Tier::kRedundant) == 0);
}

TEST_CASE("what is not asked for stays summarised, and what came back can be summarised again") {
  TinyEngine tiny(tiered());
  Begun begun(tiny.engine, {{20, 30, 1}, {100, 70, 1}});
  CHECK(begun.go_on({100}).n_rehydrated == 70);
  ContextState state = tiny.engine.context_state(begun.id);
  REQUIRE(state.spans.size() == 1);
  CHECK(state.spans[0].start == 20);
  const std::size_t key_bytes = state.key_bytes;
  const auto report = tiny.engine.compact(begun.id, summary_of({{100, 70, 2}}));
  CHECK(report.outcome == CompactionReport::Outcome::kDone);
  CHECK(report.refused.empty());
  state = tiny.engine.context_state(begun.id);
  CHECK(state.spans.size() == 2);
  CHECK(std::ranges::count(state.tiers, Tier::kRedundant) == 100);
  CHECK(state.important_bytes == 0);
  CHECK(state.key_bytes == key_bytes);
}

TEST_CASE("where memory is short, spans stay summarised and the request goes on") {
  // The prompt's 6 blocks, the summary and the next turn fit; a block for the span does not.
  TinyEngine tiny(tiered(with_blocks(7)));
  Begun begun(tiny.engine, {{20, 30, 1}});
  const RequestResult result = begun.go_on({20});
  CHECK(result.finish_reason == FinishReason::kLength);
  CHECK(result.n_rehydrated == 0);
}

TEST_CASE("a cancelled rehydration leaves the summary, and nothing else") {
  TinyEngine tiny(tiered());
  Begun begun(tiny.engine, {{20, 30, 1}});
  RequestSpec spec = turn(begun.id, begun.prompt);
  spec.rehydrate = {20};
  const TicketPtr ticket = tiny.engine.submit(spec);
  ticket->cancel();
  REQUIRE(ticket->wait_finished(kPatience));
  const std::size_t n_spans = tiny.engine.context_state(begun.id).spans.size();
  CHECK(n_spans == (ticket->result().n_rehydrated > 0 ? 0 : 1));
  tiny.engine.close_conversation(begun.id);
  tiny.engine.forget_prefixes();
  finished(tiny.engine.submit(greedy(random_ids(9, 10), 1)));
  tiny.engine.forget_prefixes();
  finished(tiny.engine.submit(greedy(random_ids(8, 10), 1)));
  CHECK(tiny.engine.stats().n_free_blocks + 1 >= tiny.engine.info().n_kv_blocks);
}
