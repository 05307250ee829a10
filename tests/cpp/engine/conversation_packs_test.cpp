// Conversations whose packs change: keys and values of one generation are nothing to another.
#include "cpp/engine/pack_engine.h"

using namespace modularbase;
using namespace modularbase::testing;

namespace {

constexpr std::size_t kPromptTokens = 330;
constexpr std::int64_t kAnswerTokens = 24;

RequestSpec turn(ConversationId id, const Ids& prompt, GenerationId pack) {
  RequestSpec spec = with_packs(greedy(prompt, kAnswerTokens), {{pack, 1.0f, "pack"}});
  spec.conversation = id;
  return spec;
}

TinyShape long_context() {
  TinyShape shape;
  shape.n_ctx = 4096;
  return shape;
}

/// Three packs that differ, all resident, and a conversation.
struct PackConversation : PackEngine {
  explicit PackConversation(const EngineOptions& options) : PackEngine(options, long_context()) {
    for (std::uint32_t seed = 1; seed <= 3; ++seed) {
      packs.push_back(open(seed));
      REQUIRE(engine.packs().load(packs.back(), Clock::now() + kPatience));
    }
    id = engine.open_conversation();
  }

  void compact(std::size_t n_tokens) {
    PastPlan plan{.n_positions = 0,
                  .tiers = std::vector<Tier>(n_tokens - 128, Tier::kImportant),
                  .spans = {{20, 60, 4}},
                  .max_error = 100.0f};
    std::fill_n(plan.tiers.begin() + 20, 60, Tier::kRedundant);
    REQUIRE(engine.compact(id, plan).outcome == CompactionReport::Outcome::kDone);
    REQUIRE(engine.context_state(id).spans.size() == 1);
  }
  /// What a conversation answers that knows nothing of the prompt.
  Alone fresh(const Ids& prompt, GenerationId pack) {
    engine.forget_prefixes();
    const ConversationId other = engine.open_conversation();
    const Alone alone = run_alone(engine, turn(other, prompt, pack));
    engine.close_conversation(other);
    return alone;
  }
  /// A turn in whose middle the name comes to mean another pack.
  void run_and_switch(const Ids& prompt, GenerationId from, GenerationId to) {
    RequestSpec spec = turn(id, prompt, from);
    spec.max_tokens = 2000;
    const TicketPtr ticket = engine.submit(std::move(spec));
    REQUIRE_FALSE(ticket->wait_tokens(3, kPatience).empty());
    REQUIRE(engine.switch_packs("pack", to) == 1);
    const std::size_t n_seen = ticket->result().tokens.size();
    ticket->wait_tokens(n_seen + 3, kPatience);
    ticket->cancel();
    finished(ticket);
  }

  std::vector<GenerationId> packs;
  ConversationId id = 0;
};

}  // namespace

TEST_CASE("a compacted conversation whose pack is swapped is computed again") {
  PackConversation tiny(tiered());
  Ids prompt = random_ids(1, kPromptTokens);
  finished(tiny.engine.submit(turn(tiny.id, prompt, tiny.packs[0])));
  tiny.compact(prompt.size());
  prompt.push_back(7);
  const Alone wanted = tiny.fresh(prompt, tiny.packs[1]);
  const std::int64_t n_before = tiny.engine.context_state(tiny.id).n_tokens;
  const RequestResult found = finished(tiny.engine.submit(turn(tiny.id, prompt, tiny.packs[1])));
  CHECK(same_tokens(ids_of(found), wanted));
  const ContextState state = tiny.engine.context_state(tiny.id);
  CHECK(state.n_rebuilt == n_before);
  CHECK(state.spans.empty());
  CHECK_FALSE(same_tokens(ids_of(found), tiny.fresh(prompt, tiny.packs[0])));
}

TEST_CASE("a conversation whose pack was swapped in the middle of a turn is computed again") {
  PackConversation tiny(tiered());
  Ids prompt = random_ids(2, kPromptTokens);
  tiny.run_and_switch(prompt, tiny.packs[0], tiny.packs[1]);
  tiny.compact(prompt.size());
  prompt.push_back(7);
  for (const GenerationId pack : {tiny.packs[0], tiny.packs[1]}) {
    const Alone wanted = tiny.fresh(prompt, pack);
    const std::int64_t n_before = tiny.engine.context_state(tiny.id).n_rebuilt;
    CHECK(same_tokens(ids_of(finished(tiny.engine.submit(turn(tiny.id, prompt, pack)))), wanted));
    CHECK(tiny.engine.context_state(tiny.id).n_rebuilt > n_before);
  }
}

TEST_CASE("others go on from what an image brought, from the middle of the model, too") {
  PackConversation from(tiered()), tiny(tiered());
  Ids prompt = random_ids(5, 200);
  RequestSpec first = greedy(prompt, 4);
  first.conversation = from.id;
  finished(from.engine.submit(std::move(first)));
  const ConversationImage image = from.engine.save_conversation(from.id);
  from.engine.forget_prefixes();
  const Alone wanted =
      run_alone(from.engine, with_packs(greedy(prompt, kAnswerTokens), {{from.packs[0]}}));

  RequestSpec next = greedy(prompt, 4);
  next.conversation = tiny.engine.load_conversation(image);
  finished(tiny.engine.submit(std::move(next)));
  const RequestResult found =
      finished(tiny.engine.submit(with_packs(greedy(prompt, kAnswerTokens), {{tiny.packs[0]}})));
  CHECK(found.n_cached == 0);
  CHECK(found.n_cached_lower >= 128);
  CHECK(same_tokens(ids_of(found), wanted));
}

TEST_CASE("of two turns whose packs changed on the way, neither goes on from the other's") {
  EngineOptions options = tiered();
  options.n_sequences = 1;
  PackConversation tiny(options);
  Ids prompt = random_ids(3, kPromptTokens);
  tiny.run_and_switch(prompt, tiny.packs[0], tiny.packs[1]);
  prompt.push_back(7);
  const Alone wanted = tiny.fresh(prompt, tiny.packs[2]);

  const TicketPtr in_front = tiny.engine.submit(greedy(random_ids(4, 8), 3000));
  REQUIRE_FALSE(in_front->wait_tokens(1, kPatience).empty());
  const TicketPtr ticket = tiny.engine.submit(turn(tiny.id, prompt, tiny.packs[0]));
  tiny.engine.switch_packs("pack", tiny.packs[2]);
  in_front->cancel();
  CHECK(same_tokens(ids_of(finished(ticket)), wanted));
  CHECK(tiny.engine.context_state(tiny.id).n_rebuilt > 0);
}
