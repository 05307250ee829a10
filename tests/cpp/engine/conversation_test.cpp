// Conversations: what is kept between requests, plans for it, and many callers at once (for the
// thread sanitizer).
#include <atomic>
#include <cmath>

#include "cpp/engine/tiny_engine.h"
#include "modularbase/core/errors.h"

using namespace modularbase;
using namespace modularbase::testing;

namespace {

constexpr std::size_t kPromptTokens = 330;

RequestSpec turn(ConversationId id, const Ids& prompt, std::int64_t max_tokens = 4) {
  RequestSpec spec = greedy(prompt, max_tokens);
  spec.conversation = id;
  return spec;
}

/// All but the last 128 tokens important, of these some in a span.
PastPlan plan_for(std::size_t n_tokens) {
  PastPlan plan{.n_positions = 0,
                .tiers = std::vector<Tier>(n_tokens - 128, Tier::kImportant),
                .spans = {{20, 60, 4}},
                .max_error = 100.0f};
  std::fill_n(plan.tiers.begin() + 20, 60, Tier::kRedundant);
  return plan;
}

std::string refused_plan(Engine& engine, ConversationId id, const PastPlan& plan) {
  try {
    engine.compact(id, plan);
  } catch (const InvalidRequestError& error) {
    return error.field;
  }
  return "";
}

}  // namespace

TEST_CASE("a conversation keeps what it computed, also where its next prompt turns off earlier") {
  TinyEngine tiny;
  const ConversationId id = tiny.engine.open_conversation();
  Ids prompt = random_ids(1, 100);
  const Ids answer = ids_of(finished(tiny.engine.submit(turn(id, prompt))));
  prompt.insert(prompt.end(), answer.begin(), answer.end());
  prompt.push_back(7);
  const RequestResult next = finished(tiny.engine.submit(turn(id, prompt)));
  CHECK(next.n_cached == 103);  // the last token of the answer had not been computed
  prompt.resize(60);
  CHECK(finished(tiny.engine.submit(turn(id, prompt))).n_cached == 59);
  CHECK(tiny.engine.context_state(id).n_rebuilt == 0);
  tiny.engine.close_conversation(id);
  CHECK_THROWS_AS(tiny.engine.context_state(id), InvalidRequestError);
  CHECK_THROWS_AS(tiny.engine.close_conversation(id), InvalidRequestError);
}

TEST_CASE("a plan is carried out, and counted") {
  TinyEngine tiny(tiered());
  const ConversationId id = tiny.engine.open_conversation();
  const Ids prompt = random_ids(2, kPromptTokens);
  finished(tiny.engine.submit(turn(id, prompt)));
  const ContextState before = tiny.engine.context_state(id);
  const CompactionReport report = tiny.engine.compact(id, plan_for(prompt.size()));
  CHECK(report.outcome == CompactionReport::Outcome::kDone);
  CHECK(report.refused.empty());
  const ContextState after = tiny.engine.context_state(id);
  CHECK(after.n_tokens == before.n_tokens);
  CHECK(after.n_compacted == 192);
  REQUIRE(after.spans.size() == 1);
  CHECK(after.spans[0].n_slots == 4);
  CHECK(after.redundant_bytes > 0);
  CHECK(after.key_bytes + after.important_bytes + after.redundant_bytes + after.own_bytes <
        before.own_bytes + before.important_bytes + before.key_bytes);
  // What turns off within the compacted part has nothing to go on from.
  CHECK(finished(tiny.engine.submit(turn(id, random_ids(3, 80)))).n_cached == 0);
  CHECK(tiny.engine.context_state(id).n_rebuilt > 0);
}

TEST_CASE("attention that spans received, where the window knows it") {
  TinyEngine tiny(tiered());
  const ConversationId id = tiny.engine.open_conversation();
  const Ids prompt = random_ids(4, kPromptTokens);
  finished(tiny.engine.submit(turn(id, prompt)));
  const std::vector<SlotSpan> spans{{0, 40, 0}, {40, 100, 0}};
  for (const int layer : {0, 1}) {
    const auto received = tiny.engine.attention_received(id, spans, layer);
    REQUIRE(received.size() == 2);
    // Shares of the attention of queries that see some 300 tokens.
    CHECK(received[0] * 40 + received[1] * 100 < 1.0f);
    CHECK(received[0] > 1e-5f);
  }
  const auto too_late = tiny.engine.attention_received(id, {{300, 33, 0}}, 0);
  CHECK(std::isnan(too_late[0]));
  CHECK_THROWS_AS(tiny.engine.attention_received(id, spans, 99), InvalidRequestError);
}

TEST_CASE("queries of a prompt's earlier chunks count in every layer") {
  const auto received = [](int n_batch) {
    EngineOptions options = tiered();
    options.n_batch = n_batch;
    TinyEngine tiny(options);
    const ConversationId id = tiny.engine.open_conversation();
    // The last chunk of 64 has 10 rows of the window's 128.
    finished(tiny.engine.submit(turn(id, random_ids(4, 330), 1)));
    std::vector<float> shares;
    for (const int layer : {0, 1}) {
      const auto of_layer = tiny.engine.attention_received(id, {{0, 40, 0}, {40, 100, 0}}, layer);
      shares.insert(shares.end(), of_layer.begin(), of_layer.end());
    }
    return shares;
  };
  const std::vector<float> whole = received(512);
  const std::vector<float> chunked = received(64);
  for (std::size_t i = 0; i < whole.size(); ++i) {
    CHECK(chunked[i] == doctest::Approx(whole[i]).epsilon(0.01));  // queries are F16
  }
}

TEST_CASE("plans that make no sense are refused") {
  TinyEngine tiny(tiered());
  const ConversationId id = tiny.engine.open_conversation();
  PastPlan plan = plan_for(kPromptTokens);
  plan.spans = {{20, 60, 61}};
  CHECK(refused_plan(tiny.engine, id, plan) == "spans");
  plan.spans = {{20, 60, 4}, {70, 10, 1}};
  CHECK(refused_plan(tiny.engine, id, plan) == "spans");
  plan.spans = {{-1, 60, 4}};
  CHECK(refused_plan(tiny.engine, id, plan) == "spans");
  CHECK(refused_plan(tiny.engine, id + 1, plan_for(kPromptTokens)) == "conversation");
  TinyEngine exact;
  CHECK(refused_plan(exact.engine, exact.engine.open_conversation(), plan_for(kPromptTokens)) ==
        "kv");
}

TEST_CASE("an image goes on in another engine as the conversation does here") {
  TinyEngine tiny(tiered());
  TinyEngine other(tiered());
  const ConversationId id = tiny.engine.open_conversation();
  Ids prompt = random_ids(5, kPromptTokens);
  finished(tiny.engine.submit(turn(id, prompt)));
  tiny.engine.compact(id, plan_for(prompt.size()));
  ConversationImage image = tiny.engine.save_conversation(id);
  const ConversationId copy = other.engine.load_conversation(image);
  prompt.push_back(9);
  const RequestResult wanted = finished(tiny.engine.submit(turn(id, prompt)));
  const RequestResult found = finished(other.engine.submit(turn(copy, prompt)));
  CHECK(ids_of(found) == ids_of(wanted));
  CHECK(found.n_cached == wanted.n_cached);

  image.data.pop_back();
  CHECK_THROWS_AS(other.engine.load_conversation(image), InvalidRequestError);
  image.past.tiers.pop_back();
  CHECK_THROWS_AS(other.engine.load_conversation(image), InvalidRequestError);
}

TEST_CASE("an image takes the room of conversations that rest") {
  EngineOptions options = with_blocks(8);
  options.n_ctx = 500;
  TinyEngine tiny(options);
  const ConversationId id = tiny.engine.open_conversation();
  finished(tiny.engine.submit(turn(id, random_ids(7, kPromptTokens))));
  const ConversationImage image = tiny.engine.save_conversation(id);
  const ConversationId copy = tiny.engine.load_conversation(image);
  CHECK(tiny.engine.context_state(copy).n_tokens == image.n_valid);
  CHECK(tiny.engine.context_state(id).n_tokens == 0);
  CHECK(tiny.engine.context_state(id).n_rebuilt == image.n_valid);
}

TEST_CASE("an image leaves out blocks of rows that were never computed") {
  const Backend backend("cpu", 1);
  const KvGeometry all{2, 1, 32, GGML_TYPE_F16};
  KvCache cache(split_groups(all, 0, 32), {}, 8, backend, false);
  Conversation kept;
  kept.tokens = random_ids(7, 300);
  REQUIRE(cache.reserve(kept.kv, 300));  // and then it was cancelled
  kept.kv.set_valid(70);
  const ConversationImage image = save_conversation(cache, kept);
  CHECK(image.data.size() == 2 * cache.block_bytes(kernels::kExactTier));
  cache.release(kept.kv);
  Conversation copy;
  load_conversation(cache, image, copy);
  CHECK(copy.kv.n_tokens == 70);
  CHECK(copy.kv.lower.size() == 2);
}

TEST_CASE(
    "many conversations at once, compacted while others run, and given up by their next turn") {
  TinyEngine tiny(tiered(threaded()));
  std::atomic<int> n_done{0};
  std::vector<std::jthread> callers;
  for (unsigned caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&tiny, &n_done, caller] {
      const ConversationId id = tiny.engine.open_conversation();
      Ids prompt = random_ids(20 + caller, 200);
      for (int i = 0; i < 4; ++i) {
        const TicketPtr ticket = tiny.engine.submit(turn(id, prompt));
        if (!ticket->wait_finished(kPatience)) return;
        std::jthread planner([&tiny, id, n = prompt.size()] {
          if (n > 260) tiny.engine.compact(id, plan_for(n));
        });
        if (i % 2 == 0) planner.join();
        tiny.engine.context_state(id);
        prompt.resize(prompt.size() + 40, static_cast<TokenId>(caller + 1));
      }
      tiny.engine.close_conversation(id);
      ++n_done;
    });
  }
  callers.clear();
  CHECK(n_done == 3);
}

TEST_CASE("an engine that closes cancels the plans that wait") {
  TinyEngine tiny(tiered());
  const ConversationId id = tiny.engine.open_conversation();
  const Ids prompt = random_ids(6, kPromptTokens);
  finished(tiny.engine.submit(turn(id, prompt)));
  std::jthread closer([&] { tiny.engine.close(); });
  try {
    const auto outcome = tiny.engine.compact(id, plan_for(prompt.size())).outcome;
    CHECK(outcome != CompactionReport::Outcome::kNoRoom);
  } catch (const CancelledError&) {
  }
}

TEST_CASE("forks share what they keep, and go on each by itself") {
  TinyEngine tiny(tiered());
  const ConversationId id = tiny.engine.open_conversation();
  Ids prompt = random_ids(2, kPromptTokens);
  finished(tiny.engine.submit(turn(id, prompt)));
  CHECK(tiny.engine.compact(id, plan_for(prompt.size())).refused.empty());
  const ConversationId twin = tiny.engine.fork_conversation(id);
  const auto next = [&](ConversationId which, TokenId token) {
    Ids longer = prompt;
    longer.push_back(token);
    return finished(tiny.engine.submit(turn(which, longer)));
  };
  const RequestResult first = next(id, 5);
  const RequestResult other = next(twin, 9);
  const RequestResult same = next(twin, 5);
  CHECK(first.n_cached == std::ssize(prompt));
  CHECK(other.n_cached == std::ssize(prompt));
  CHECK(ids_of(same) == ids_of(first));
  CHECK(tiny.engine.context_state(twin).spans.size() == 1);
  tiny.engine.close_conversation(id);
  CHECK(ids_of(next(twin, 9)) == ids_of(other));
  CHECK_THROWS_AS(tiny.engine.fork_conversation(id), InvalidRequestError);
}
