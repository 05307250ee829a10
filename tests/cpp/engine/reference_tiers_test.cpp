// Engines on ggml's ops: contexts in tiers as with the fused attention, up to rounding.
#include <cmath>
#include <memory>

#include "cpp/engine/tiny_engine.h"
#include "tools/device_memory.h"

using namespace modularbase;
using namespace modularbase::testing;

namespace {

// What is rounded to 4 bits falls to the neighbouring step here and there, and spans get other
// slots for it: some 1e-2 of a single token's log-probability, and 5e-3 of their mean. Tokens stay
// the same where the runner-up is further away than ever seen of one.
constexpr double kMeanTolerance = 2e-2;
// With kv="q8_0" they round otherwise: ggml's ops also the keys and values of the rows themselves.
constexpr double kMeanTolerance8 = 1e-1;
constexpr float kClearGap = 0.2f;
constexpr std::size_t kPromptTokens = 470;

using Heads = std::vector<std::pair<int, int>>;

EngineOptions with_kv(const char* kv, const char* attention, Heads details = {}) {
  EngineOptions options = tiny_options();
  options.kv = kv;
  options.attention = attention;
  options.kv_detail_heads = std::move(details);
  return options;
}

TinyShape longer() {
  TinyShape shape;
  shape.n_ctx = 2048;
  shape.n_layer = 3;
  return shape;
}

RequestSpec turn(ConversationId id, const Ids& prompt) {
  RequestSpec spec = greedy(prompt, 12);
  spec.conversation = id;
  spec.n_logprobs = 2;
  return spec;
}

/// Key tokens first, then a span, then important ones; the window stays.
PastPlan plan_for(std::size_t n_tokens) {
  PastPlan plan{.n_positions = 0,
                .tiers = std::vector<Tier>(n_tokens - 128, Tier::kImportant),
                .spans = {{40, 90, 6}},
                .max_error = 100.0f};
  std::fill_n(plan.tiers.begin(), 40, Tier::kKey);
  std::fill_n(plan.tiers.begin() + 40, 90, Tier::kRedundant);
  return plan;
}

/// Equal tokens with log-probabilities near each other, up to a near tie that fell otherwise.
void check_same(const RequestResult& found, const RequestResult& expected,
                double tolerance = kMeanTolerance) {
  REQUIRE(found.tokens.size() == expected.tokens.size());
  double sum = 0.0;
  std::size_t n_same = 0;
  while (n_same < found.tokens.size() && found.tokens[n_same].id == expected.tokens[n_same].id) {
    sum += std::abs(found.tokens[n_same].logprob - expected.tokens[n_same].logprob);
    ++n_same;
  }
  REQUIRE(n_same > 0);
  CHECK(sum / static_cast<double>(n_same) < tolerance);
  if (n_same == found.tokens.size()) return;
  const auto& top = expected.tokens[n_same].top_logprobs;
  CHECK(top[0].logprob - top[1].logprob < kClearGap);
}

void check_conversation(const char* kv, const Heads& details) {
  TinyEngine fused(with_kv(kv, "fused", details), longer());
  TinyEngine reference(with_kv(kv, "reference", details), longer());
  Ids prompt = random_ids(32, kPromptTokens);
  const ConversationId a = fused.engine.open_conversation();
  const ConversationId b = reference.engine.open_conversation();
  check_same(finished(reference.engine.submit(turn(b, prompt))),
             finished(fused.engine.submit(turn(a, prompt))));

  const std::vector<SlotSpan> spans{{40, 90, 0}, {200, 50, 0}};
  for (int layer = 0; layer < 3; ++layer) {
    const auto expected = fused.engine.attention_received(a, spans, layer);
    const auto found = reference.engine.attention_received(b, spans, layer);
    for (std::size_t i = 0; i < spans.size(); ++i) {
      CHECK(found[i] == doctest::Approx(expected[i]).epsilon(0.01));  // queries are F16
    }
  }

  for (auto [engine, id] : {std::pair{&fused.engine, a}, std::pair{&reference.engine, b}}) {
    const CompactionReport report = engine->compact(id, plan_for(prompt.size()));
    REQUIRE(report.outcome == CompactionReport::Outcome::kDone);
    REQUIRE(report.refused.empty());
  }
  const Ids more = random_ids(7, 40);
  prompt.insert(prompt.end(), more.begin(), more.end());
  const RequestResult expected = finished(fused.engine.submit(turn(a, prompt)));
  const RequestResult found = finished(reference.engine.submit(turn(b, prompt)));
  CHECK(found.n_cached == expected.n_cached);
  check_same(found, expected);
  const ContextState state = reference.engine.context_state(b);
  CHECK(state.redundant_bytes == fused.engine.context_state(a).redundant_bytes);
  CHECK(state.redundant_bytes > 0);
}

}  // namespace

TEST_CASE("a conversation goes on after a compaction with slots as with the fused attention") {
  check_conversation("tiered", {});
}

TEST_CASE("the same with heads that keep details, in one group or the other") {
  check_conversation("tiered", {{0, 0}, {0, 1}});
  check_conversation("tiered", {{1, 1}, {2, 0}});
}

TEST_CASE("requests outside conversations, rounded to 8 bits and to 4 behind the window") {
  for (const auto& [kv, tolerance] :
       {std::pair{"q8_0", kMeanTolerance8}, std::pair{"q4_0", kMeanTolerance}}) {
    CAPTURE(kv);
    TinyEngine fused(with_kv(kv, "fused"), longer());
    TinyEngine reference(with_kv(kv, "reference"), longer());
    RequestSpec spec = greedy(random_ids(3, 700), 12);
    spec.n_logprobs = 2;
    const RequestResult expected = finished(fused.engine.submit(spec));
    check_same(finished(reference.engine.submit(spec)), expected, tolerance);
  }
}

TEST_CASE("several conversations with compacted pasts in one batch of ggml's ops") {
  TinyEngine tiny(with_kv("tiered", "reference"), longer());
  std::vector<ConversationId> ids;
  std::vector<Ids> prompts;
  for (unsigned i = 0; i < 3; ++i) {
    ids.push_back(tiny.engine.open_conversation());
    prompts.push_back(random_ids(30 + i, kPromptTokens - 40 * i));
    finished(tiny.engine.submit(turn(ids[i], prompts[i])));
    tiny.engine.compact(ids[i], plan_for(prompts[i].size()));
    prompts[i].push_back(5);
  }
  std::vector<RequestResult> alone;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    alone.push_back(finished(tiny.engine.submit(turn(ids[i], prompts[i]))));
  }
  std::vector<TicketPtr> together;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    together.push_back(tiny.engine.submit(turn(ids[i], prompts[i])));
  }
  for (std::size_t i = 0; i < ids.size(); ++i) check_same(finished(together[i]), alone[i]);
}

TEST_CASE("in a device's memory a conversation is compacted, saved and loaded with the same bits") {
  const EngineOptions options = with_kv("tiered", "reference", {{1, 0}, {2, 0}, {2, 1}});
  TinyEngine host(options, longer());
  const auto on_device = [&] {
    const DeviceMemory device;
    return std::make_unique<TinyEngine>(options, longer());
  };
  const auto device = on_device();
  Ids prompt = random_ids(12, kPromptTokens);
  const auto run = [&](Engine& engine) {
    const ConversationId id = engine.open_conversation();
    finished(engine.submit(turn(id, prompt)));
    const auto received = engine.attention_received(id, {{40, 90, 0}}, 1);
    REQUIRE(engine.compact(id, plan_for(prompt.size())).outcome ==
            CompactionReport::Outcome::kDone);
    return std::pair{id, received};
  };
  const auto [expected_id, expected] = run(host.engine);
  const auto [found_id, found] = run(device->engine);
  CHECK(found == expected);

  const ConversationImage image = device->engine.save_conversation(found_id);
  const auto other = on_device();
  const ConversationId copy = other->engine.load_conversation(image);
  prompt.push_back(3);
  const RequestResult wanted = finished(host.engine.submit(turn(expected_id, prompt)));
  for (auto [engine, id] :
       {std::pair{&device->engine, found_id}, std::pair{&other->engine, copy}}) {
    const RequestResult result = finished(engine->submit(turn(id, prompt)));
    CHECK(result.n_cached == wanted.n_cached);
    CHECK(ids_of(result) == ids_of(wanted));
    CHECK(result.tokens[0].logprob == wanted.tokens[0].logprob);
  }
}
