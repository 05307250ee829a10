// Tokens taken out of a conversation: what is behind moves up, and need not be computed again.
#include <cmath>

#include "cpp/engine/tiny_engine.h"
#include "modularbase/core/errors.h"

using namespace modularbase;
using namespace modularbase::testing;

namespace {

constexpr std::size_t kPromptTokens = 400;

RequestSpec turn(ConversationId id, const Ids& prompt) {
  RequestSpec spec = greedy(prompt, 6);
  spec.conversation = id;
  spec.n_logprobs = 0;
  spec.tiers.assign(prompt.size(), Tier::kKey);  // nothing is rounded on the way
  return spec;
}

/// A conversation whose first turn is over.
struct Begun {
  explicit Begun(Engine& owner)
      : engine(owner), id(owner.open_conversation()), tokens(random_ids(2, kPromptTokens)) {
    const Ids answer = ids_of(finished(engine.submit(turn(id, tokens))));
    tokens.insert(tokens.end(), answer.begin(), answer.end());
  }
  CompactionReport forget(const std::vector<PositionRange>& ranges) {
    const CompactionReport report = engine.forget(id, ranges);
    if (report.outcome != CompactionReport::Outcome::kDone) return report;
    for (auto range = ranges.rbegin(); range != ranges.rend(); ++range) {
      tokens.erase(tokens.begin() + range->start, tokens.begin() + range->start + range->n_tokens);
    }
    return report;
  }
  RequestResult go_on() {
    Ids prompt = tokens;
    const Ids next = random_ids(3, 20);
    prompt.insert(prompt.end(), next.begin(), next.end());
    return finished(engine.submit(turn(id, prompt)));
  }
  Engine& engine;
  ConversationId id;
  Ids tokens;
};

std::string refused(Engine& engine, ConversationId id, const std::vector<PositionRange>& ranges) {
  try {
    engine.forget(id, ranges);
  } catch (const InvalidRequestError& error) {
    return error.field;
  }
  return "";
}

}  // namespace

// With one layer, keys and values depend on their own token alone: moved ones are those of a
// sequence that never had the others, but for the rounding of a key (F16) that is turned twice.
TEST_CASE("what moves up answers as if the rest had never been said") {
  TinyShape shape;
  shape.n_layer = 1;
  TinyEngine tiny(tiered(), shape);
  for (const auto& ranges : {std::vector<PositionRange>{{64, 64}},
                             std::vector<PositionRange>{{20, 30}, {100, 7}, {130, 140}}}) {
    Begun begun(tiny.engine);
    const RequestResult before = begun.go_on();
    REQUIRE(begun.forget(ranges).outcome == CompactionReport::Outcome::kDone);
    const RequestResult result = begun.go_on();
    CHECK(result.n_cached >= std::ssize(begun.tokens) / 64 * 64 - 64);
    TinyEngine fresh(tiered(), shape);
    Begun other(fresh.engine);
    other.tokens = begun.tokens;
    fresh.engine.close_conversation(other.id);
    other.id = fresh.engine.open_conversation();
    const RequestResult expected = other.go_on();
    CHECK(std::abs(result.tokens[0].logprob - expected.tokens[0].logprob) < kTieGap);
    CHECK(std::abs(result.tokens[0].logprob - before.tokens[0].logprob) > kTieGap);
    CHECK(ids_of(result) == ids_of(expected));
  }
}

TEST_CASE("tiers and summaries move along, or are forgotten with their tokens") {
  TinyEngine tiny(tiered());
  Begun begun(tiny.engine);
  PastPlan plan{.n_positions = 0,
                .tiers = std::vector<Tier>(kPromptTokens - 64, Tier::kImportant),
                .spans = {{30, 20, 2}, {100, 40, 3}, {200, 50, 4}},
                .max_error = 100.0f};
  for (const SlotSpan& span : plan.spans) {
    std::fill_n(plan.tiers.begin() + span.start, span.n_tokens, Tier::kRedundant);
  }
  std::fill_n(plan.tiers.begin(), 16, Tier::kKey);
  REQUIRE(tiny.engine.compact(begun.id, plan).refused.empty());
  CHECK(begun.forget({{90, 60}}).outcome == CompactionReport::Outcome::kDone);
  const ContextState state = tiny.engine.context_state(begun.id);
  CHECK(state.n_tokens == 320);  // of 405 - 60, whole blocks
  CHECK(state.n_compacted == 320);
  REQUIRE(state.spans.size() == 2);
  CHECK(state.spans[0].start == 30);
  CHECK(state.spans[1].start == 140);
  CHECK(state.spans[1].n_tokens == 50);
  CHECK(std::ranges::count(state.tiers, Tier::kRedundant) == 70);
  CHECK(state.tiers[15] == Tier::kKey);
  CHECK(state.tiers[140] == Tier::kRedundant);
  CHECK(state.tiers[190] == Tier::kImportant);
  const RequestResult result = begun.go_on();
  CHECK(result.n_cached == 320);
  CHECK(tiny.engine.context_state(begun.id).n_rebuilt == 0);
  // And they can be computed again at their new place.
  RequestSpec spec = turn(begun.id, begun.tokens);
  spec.prompt = begun.tokens;
  spec.prompt.push_back(5);
  spec.rehydrate = {140};
  CHECK(finished(tiny.engine.submit(spec)).n_rehydrated == 50);
}

TEST_CASE("ranges that cannot be forgotten") {
  TinyEngine tiny(tiered());
  Begun begun(tiny.engine);
  CHECK(refused(tiny.engine, begun.id, {{380, 10}}) == "ranges");  // behind the whole blocks
  CHECK(refused(tiny.engine, begun.id, {{50, 10}, {40, 5}}) == "ranges");
  CHECK(refused(tiny.engine, begun.id, {{50, 0}}) == "ranges");
  CHECK(refused(tiny.engine, begun.id, {{-5, 10}}) == "ranges");
  CHECK(refused(tiny.engine, begun.id + 1, {{50, 10}}) == "conversation");
  PastPlan plan{.n_positions = 0,
                .tiers = std::vector<Tier>(256, Tier::kImportant),
                .spans = {{100, 40, 3}},
                .max_error = 100.0f};
  std::fill_n(plan.tiers.begin() + 100, 40, Tier::kRedundant);
  REQUIRE(tiny.engine.compact(begun.id, plan).refused.empty());
  CHECK(refused(tiny.engine, begun.id, {{90, 20}}) == "ranges");  // a part of a summary
  const ConversationId empty = tiny.engine.open_conversation();
  CHECK(tiny.engine.forget(empty, {{0, 10}}).outcome == CompactionReport::Outcome::kCancelled);
}

TEST_CASE("where there is no memory for the copy, the conversation stays as it is") {
  TinyEngine tiny(tiered(with_blocks(8)));
  Begun begun(tiny.engine);
  CHECK(begun.forget({{64, 20}}).outcome == CompactionReport::Outcome::kNoRoom);
  CHECK(tiny.engine.context_state(begun.id).n_compacted == 0);
  CHECK(begun.go_on().n_cached == std::ssize(begun.tokens) - 1);
}
