// Prefixes that requests share, and KV memory that is too small for all who run.
#include "cpp/engine/tiny_engine.h"

using namespace modularbase;
using namespace modularbase::testing;

namespace {

EngineOptions without_prefixes(EngineOptions options) {
  options.prefix_cache = "off";
  return options;
}

Ids joined(Ids a, const Ids& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

/// Every block is free or remembered once nothing runs.
void check_no_block_lost(const Engine& engine) {
  const EngineStats stats = engine.stats();
  CHECK(stats.n_running == 0);
  CHECK(stats.n_waiting == 0);
  CHECK(stats.n_free_blocks + stats.n_cached_blocks == engine.info().n_kv_blocks);
}

struct Competing {
  std::vector<RequestSpec> specs;
  std::vector<Alone> alone;
};

/// Requests that each fit six blocks alone but not together.
Competing competing_requests() {
  Competing competing;
  TinyEngine tiny;
  for (unsigned i = 0; i < 5; ++i) {
    competing.specs.push_back(greedy(random_ids(300 + i, 40 + 15 * i), 130));
    competing.alone.push_back(run_alone(tiny.engine, competing.specs.back()));
  }
  return competing;
}

/// Rows that a run computes when nobody gives blocks back: each token but the last of a request.
std::int64_t n_rows_without_preemption(const Competing& competing) {
  std::int64_t n = 0;
  for (std::size_t i = 0; i < competing.specs.size(); ++i) {
    n += std::ssize(competing.specs[i].prompt) + std::ssize(competing.alone[i].ids) - 1;
  }
  return n;
}

/// Room for 8 blocks, and steps of two rows.
EngineOptions eight_blocks() {
  EngineOptions options = with_blocks(8);
  options.n_batch = 2;
  return options;
}

constexpr std::int64_t kBlockerRows = 504;

/// Takes all eight blocks while the others are handed in, so that both start in the same step.
RequestSpec blocker() {
  return scoring(random_ids(400, kBlockerRows + 1));
}

/// One block, and after 5 + 54 steps a second one.
RequestSpec growing() {
  return greedy(random_ids(401, 10), 100);
}

constexpr std::int64_t kGrowingRows = 10 + 99;
constexpr std::int64_t kVictimTokens = 440;  // seven blocks; some 118 rows are done when they go

/// Runs a request of kVictimTokens that loses its blocks in its middle.
RequestResult run_preempted(Engine& engine, const RequestSpec& spec, std::int64_t n_rows) {
  const TicketPtr first = engine.submit(blocker());
  const TicketPtr second = engine.submit(growing());
  const RequestResult result = finished(engine.submit(spec));
  finished(first);
  CHECK(finished(second).tokens.size() == 100);
  CHECK(engine.stats().n_rows > kBlockerRows + kGrowingRows + n_rows);  // it did lose them
  return result;
}

}  // namespace

TEST_CASE("a repeated prompt is taken from the cache and gives the same tokens") {
  TinyEngine tiny;
  const RequestSpec spec = greedy(random_ids(1, 200), 16);
  const Alone alone = run_alone(tiny.engine, spec);
  const RequestResult again = finished(tiny.engine.submit(spec));
  CHECK(again.n_cached == 199);  // the last token is always computed
  CHECK(same_tokens(ids_of(again), alone));
  check_no_block_lost(tiny.engine);

  TinyEngine off(without_prefixes(tiny_options()));
  CHECK(same_tokens(ids_of(finished(off.engine.submit(spec))), alone));
  const RequestResult uncached = finished(off.engine.submit(spec));
  CHECK(uncached.n_cached == 0);
  CHECK(same_tokens(ids_of(uncached), alone));
  CHECK(off.engine.stats().n_free_blocks == off.engine.info().n_kv_blocks);
}

TEST_CASE("an engine without packs keeps all layers in one group and answers the same") {
  const RequestSpec spec = greedy(random_ids(1, 200), 16);
  TinyEngine tiny;
  EngineOptions options = tiny_options();
  options.pack_budget_bytes = 0;
  TinyEngine without(options);
  CHECK(tiny.engine.info().first_site == 0);
  CHECK(without.engine.info().first_site == -1);
  CHECK(without.engine.info().kv_bytes < tiny.engine.info().kv_bytes);  // no rows to restart from
  const Alone alone = run_alone(tiny.engine, spec);
  CHECK(same_tokens(ids_of(finished(without.engine.submit(spec))), alone));
  const RequestResult again = finished(without.engine.submit(spec));
  CHECK(again.n_cached == 199);
  CHECK(again.n_cached_lower == 199);
  CHECK(same_tokens(ids_of(again), alone));
  CHECK(without.engine.stats().n_mid_rows == 0);
  check_no_block_lost(without.engine);
}

TEST_CASE("requests that branch from one prefix, at once, do not write into each other's blocks") {
  const Ids prefix = random_ids(2, 100);  // a whole block and a part
  std::vector<RequestSpec> specs;
  std::vector<Alone> alone;
  for (unsigned i = 0; i < 4; ++i) {
    specs.push_back(greedy(joined(prefix, random_ids(20 + i, 3)), 20));
    TinyEngine fresh;
    alone.push_back(run_alone(fresh.engine, specs.back()));
  }
  TinyEngine tiny;
  finished(tiny.engine.submit(greedy(prefix, 1)));
  for (int round = 0; round < 2; ++round) {  // the second time their own ends are known too
    std::vector<TicketPtr> tickets;
    for (const RequestSpec& spec : specs) tickets.push_back(tiny.engine.submit(spec));
    for (std::size_t i = 0; i < specs.size(); ++i) {
      CAPTURE(i);
      const RequestResult result = finished(tickets[i]);
      CHECK(result.n_cached >= 100);
      CHECK(same_tokens(ids_of(result), alone[i]));
    }
  }
  check_no_block_lost(tiny.engine);
}

TEST_CASE("forgotten prefixes are computed again") {
  TinyEngine tiny;
  const RequestSpec spec = greedy(random_ids(3, 150), 4);
  const Alone alone = run_alone(tiny.engine, spec);
  CHECK(tiny.engine.stats().n_cached_blocks == 3);
  tiny.engine.forget_prefixes();
  const RequestResult again = finished(tiny.engine.submit(spec));
  CHECK(again.n_cached == 0);
  CHECK(same_tokens(ids_of(again), alone));
}

TEST_CASE("old prefixes make room for new ones") {
  TinyEngine tiny(with_blocks(3));
  for (unsigned i = 0; i < 12; ++i) {
    CHECK(finished(tiny.engine.submit(greedy(random_ids(500 + i, 120), 30))).tokens.size() == 30);
    check_no_block_lost(tiny.engine);
  }
}

TEST_CASE("who gives blocks back goes on later with the same tokens") {
  const Competing competing = competing_requests();
  for (const bool prefixes : {true, false}) {
    CAPTURE(prefixes);
    EngineOptions options = with_blocks(6);
    if (!prefixes) options = without_prefixes(options);
    TinyEngine tiny(options);
    std::vector<TicketPtr> tickets;
    for (const RequestSpec& spec : competing.specs) tickets.push_back(tiny.engine.submit(spec));
    for (std::size_t i = 0; i < tickets.size(); ++i) {
      CAPTURE(i);
      const RequestResult result = finished(tickets[i]);
      CHECK(result.finish_reason == FinishReason::kLength);
      CHECK(same_tokens(ids_of(result), competing.alone[i]));
    }
    check_no_block_lost(tiny.engine);
    if (!prefixes) {  // what was given back was computed again
      CHECK(tiny.engine.stats().n_rows > n_rows_without_preemption(competing));
    }
  }
}

TEST_CASE("a score that loses its blocks starts again and answers once") {
  const RequestSpec spec = scoring(random_ids(4, kVictimTokens));
  TinyEngine roomy;
  const RequestResult expected = finished(roomy.engine.submit(spec));
  TinyEngine tiny(eight_blocks());
  const RequestResult result = run_preempted(tiny.engine, spec, kVictimTokens - 1);
  REQUIRE(result.logprobs.size() == kVictimTokens - 1);
  for (std::size_t i = 0; i < result.logprobs.size(); ++i) {
    CHECK(std::abs(result.logprobs[i] - expected.logprobs[i]) < kTieGap);
  }
  check_no_block_lost(tiny.engine);
}

TEST_CASE("hidden states that lose their blocks start again") {
  const RequestSpec spec = hidden_states(random_ids(5, kVictimTokens), 1);
  TinyEngine roomy;
  const std::vector<float> expected = finished(roomy.engine.submit(spec)).hidden;
  TinyEngine tiny(eight_blocks());
  const std::vector<float> found = run_preempted(tiny.engine, spec, kVictimTokens).hidden;
  REQUIRE(found.size() == expected.size());
  float worst = 0.0f;
  for (std::size_t i = 0; i < found.size(); ++i) {
    worst = std::max(worst, std::abs(found[i] - expected[i]));
  }
  CHECK(worst < kTieGap);
  check_no_block_lost(tiny.engine);
}

TEST_CASE("hidden states never leave a prefix behind: the layers above have no keys") {
  const Ids prompt = random_ids(6, kVictimTokens);
  TinyEngine fresh;
  const Alone alone = run_alone(fresh.engine, greedy(prompt, 8));
  TinyEngine tiny(eight_blocks());
  SUBCASE("finished") {
    finished(tiny.engine.submit(hidden_states(prompt, 1)));
  }
  SUBCASE("cancelled while they wait for the blocks they lost") {
    const TicketPtr first = tiny.engine.submit(blocker());
    const TicketPtr second = tiny.engine.submit(growing());
    const TicketPtr hidden = tiny.engine.submit(hidden_states(prompt, 1));
    second->wait_tokens(60, kPatience);  // with 54 it needs its second block
    hidden->cancel();
  }
  const RequestResult result = finished(tiny.engine.submit(greedy(prompt, 8)));
  CHECK(result.n_cached == 0);
  CHECK(same_tokens(ids_of(result), alone));
}
