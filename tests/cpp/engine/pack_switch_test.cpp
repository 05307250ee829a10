// Requests that go on with a newer generation of their pack while they run.
#include <atomic>

#include "cpp/engine/pack_engine.h"
#include "modularbase/core/errors.h"

using namespace modularbase;
using namespace modularbase::testing;

namespace {

constexpr std::int64_t kTokens = 200;

/// A request for what "pack" means, which is this generation.
RequestSpec long_answer(GenerationId id, unsigned seed = 1, std::size_t n_prompt = 70) {
  return with_packs(greedy(random_ids(seed, n_prompt), kTokens), {{id, 1.0f, "pack"}});
}

/// Runs until it has some tokens, so that a switch comes in its middle.
TicketPtr started(Engine& engine, RequestSpec spec) {
  const TicketPtr ticket = engine.submit(std::move(spec));
  REQUIRE_FALSE(ticket->wait_tokens(3, kPatience).empty());
  return ticket;
}

void load(PackEngine& tiny, std::initializer_list<GenerationId> ids) {
  for (const GenerationId id : ids) REQUIRE(tiny.engine.packs().load(id, Clock::now() + kPatience));
}

/// The same weights in a file that differs: another generation that acts alike.
GenerationId open_twin(PackEngine& tiny, std::uint32_t seed) {
  GgufWriter twin = strong_pack(seed);
  twin.remove_entry("modularbase-pack.manifest");
  twin.add_string("modularbase-pack.manifest", "{\"twin\": 1}");
  tiny.files.emplace_back(twin.image());
  return tiny.engine.packs().open(tiny.files.back().path(), "", "twin");
}

/// A context so long that requests outlast what the test does meanwhile.
TinyShape long_context() {
  TinyShape shape;
  shape.n_ctx = 4096;
  return shape;
}

}  // namespace

TEST_CASE("a running request goes on with the new generation, and says where it began") {
  PackEngine tiny(tiny_options(), long_context());
  const GenerationId a = tiny.open(1), b = tiny.open(2);
  load(tiny, {a, b});
  const Alone old = run_alone(tiny.engine, long_answer(a));
  const Alone young = run_alone(tiny.engine, long_answer(b));
  RequestSpec endless = long_answer(a);
  endless.max_tokens = 3000;
  const TicketPtr ticket = started(tiny.engine, endless);
  CHECK(tiny.engine.switch_packs("pack", b) == 1);
  CHECK(tiny.engine.packs().status(a).n_leases == 0);
  CHECK(tiny.engine.packs().status(b).n_leases == 1);
  ticket->wait_tokens(static_cast<std::size_t>(kTokens), kPatience);
  ticket->cancel();
  const RequestResult result = finished(ticket);
  REQUIRE(result.pack_switches.size() == 1);
  const PackSwitch& change = result.pack_switches[0];
  CHECK(change.from == tiny.engine.packs().status(a).digest);
  CHECK(change.to == tiny.engine.packs().status(b).digest);
  CHECK(change.n_generated >= 3);
  const Ids ids = ids_of(result);
  const auto n_same = std::min<std::size_t>(static_cast<std::size_t>(change.n_generated),
                                            std::min(old.n_sure, ids.size()));
  CHECK(
      std::equal(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(n_same), old.ids.begin()));
  CHECK_FALSE(std::equal(old.ids.begin(), old.ids.end(), ids.begin()));

  // Nobody meets its KV: others answer as if it had never run.
  CHECK(same_tokens(ids_of(finished(tiny.engine.submit(long_answer(a)))), old));
  CHECK(same_tokens(ids_of(finished(tiny.engine.submit(long_answer(b)))), young));
  CHECK_FALSE(tiny.has_leases());
}

TEST_CASE("a generation of the same weights takes over without a trace in the tokens") {
  PackEngine tiny;
  const GenerationId a = tiny.open(1), twin = open_twin(tiny, 1);
  CHECK(twin != a);
  load(tiny, {a, twin});
  const Alone alone = run_alone(tiny.engine, long_answer(a));
  for (int i = 0; i < 3; ++i) {
    const TicketPtr ticket = tiny.engine.submit(long_answer(a));
    std::this_thread::sleep_for(std::chrono::milliseconds(i));
    tiny.engine.switch_packs("pack", twin);
    CHECK(same_tokens(ids_of(finished(ticket)), alone));
    tiny.engine.switch_packs("pack", a);
  }
}

TEST_CASE("mixed keys and values are not remembered, what lies below the packs is") {
  PackEngine tiny(with_blocks(64));  // packs at layers 0 and 1: the lower group is theirs, too
  const GenerationId a = tiny.open(1, {.sites = {1}}), b = tiny.open(2, {.sites = {1}});
  load(tiny, {a, b});
  const TicketPtr ticket = started(tiny.engine, long_answer(a));
  const bool moved = tiny.engine.switch_packs("pack", b) == 1;
  const RequestResult result = finished(ticket);
  REQUIRE(moved == !result.pack_switches.empty());
  if (!moved) return;  // it had ended already
  Ids prompt = random_ids(1, 70);
  const Ids answer = ids_of(result);
  prompt.insert(prompt.end(), answer.begin(), answer.end());
  for (const GenerationId id : {a, b}) {
    const RequestResult next = finished(tiny.engine.submit(with_packs(greedy(prompt, 4), {{id}})));
    CHECK(next.n_cached <= 64);  // at most the prompt's whole block, of the old one
    CHECK(next.n_cached_lower >= static_cast<std::int64_t>(prompt.size()) - 1);
  }
}

TEST_CASE("a request that waits begins with what its name has come to mean") {
  EngineOptions options = tiny_options();
  options.n_sequences = 1;
  PackEngine tiny(options, long_context());
  const GenerationId a = tiny.open(1), b = tiny.open(2), c = tiny.open(3);
  load(tiny, {a, b, c});
  const Alone young = run_alone(tiny.engine, long_answer(c));
  RequestSpec endless = greedy(random_ids(9, 10), 3000);
  const TicketPtr first = started(tiny.engine, endless);
  const TicketPtr second = tiny.engine.submit(long_answer(a));
  CHECK(tiny.engine.switch_packs("pack", b) == 0);
  CHECK(tiny.engine.switch_packs("pack", c) == 0);
  first->cancel();
  const RequestResult result = finished(second);
  REQUIRE(result.pack_switches.size() == 2);
  CHECK(result.pack_switches[1].n_generated == 0);
  CHECK(result.pack_switches[1].to == tiny.engine.packs().status(c).digest);
  CHECK(same_tokens(ids_of(result), young));
  CHECK(finished(tiny.engine.submit(long_answer(a))).pack_switches.empty());
}

TEST_CASE("scores, other names, and what is not resident stay as they are") {
  PackEngine tiny(with_slots(2), long_context());
  const GenerationId a = tiny.open(1), b = tiny.open(2), c = tiny.open(3);
  load(tiny, {a, b});
  const auto endless = [&](std::vector<PackUse> packs) {
    return started(tiny.engine, with_packs(greedy(random_ids(3, 20), 3000), std::move(packs)));
  };
  const auto ended = [&](const TicketPtr& ticket) {
    ticket->cancel();
    return finished(ticket);
  };
  for (const std::vector<PackUse>& packs :
       {std::vector<PackUse>{{a}}, {{a, 1.0f, "other"}}, {{a, 1.0f, "pack"}, {b}}}) {
    const TicketPtr ticket = endless(packs);
    CHECK(tiny.engine.switch_packs("pack", b) == 0);  // of the last, it would have b twice
    CHECK(ended(ticket).pack_switches.empty());
  }
  const TicketPtr ticket = endless({{a, 1.0f, "pack"}});
  CHECK(tiny.engine.switch_packs("pack", c) == 0);  // in no slot
  CHECK(tiny.engine.switch_packs("pack", b) == 1);
  CHECK(ended(ticket).pack_switches.size() == 1);
  const TicketPtr scored =
      tiny.engine.submit(with_packs(scoring(random_ids(1, 3000)), {{a, 1.0f, "pack"}}));
  tiny.engine.switch_packs("pack", b);
  CHECK(finished(scored).pack_switches.empty());
}

TEST_CASE("a request that loses its blocks after a switch goes on with the new generation") {
  PackEngine tiny(with_blocks(5), long_context());
  const GenerationId a = tiny.open(1), b = tiny.open(2);
  load(tiny, {a, b});
  const TicketPtr first = tiny.engine.submit(greedy(random_ids(5, 60), 150));
  const TicketPtr second = started(tiny.engine, long_answer(a, 2, 30));
  tiny.engine.switch_packs("pack", b);
  CHECK(ids_of(finished(first)).size() == 150);
  CHECK(ids_of(finished(second)).size() == static_cast<std::size_t>(kTokens));
  CHECK_FALSE(tiny.has_leases());
  const EngineStats stats = tiny.engine.stats();
  CHECK(stats.n_free_blocks + stats.n_cached_blocks == tiny.engine.info().n_kv_blocks);
}

TEST_CASE("a closed engine switches nothing") {
  PackEngine tiny;
  const GenerationId b = tiny.open(2);
  tiny.engine.close();
  CHECK_THROWS_AS(tiny.engine.switch_packs("pack", b), CancelledError);
}

TEST_CASE("switches to and fro while requests come and go") {
  PackEngine tiny(threaded());
  const GenerationId a = tiny.open(1), b = tiny.open(2);
  load(tiny, {a, b});
  std::atomic<bool> stop{false};
  std::jthread switcher([&] {
    for (int i = 0; !stop; ++i) {
      tiny.engine.switch_packs("pack", i % 2 == 0 ? b : a);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  std::vector<TicketPtr> tickets;
  for (unsigned i = 0; i < 6; ++i) {
    RequestSpec spec = long_answer(i % 2 == 0 ? a : b, i, 20);
    spec.max_tokens = 60;
    tickets.push_back(tiny.engine.submit(std::move(spec)));
  }
  std::size_t n_switches = 0;
  for (const TicketPtr& ticket : tickets) {
    const RequestResult result = finished(ticket);
    CHECK(result.tokens.size() == 60);
    n_switches += result.pack_switches.size();
  }
  stop = true;
  switcher.join();
  CHECK(n_switches > 0);
  CHECK_FALSE(tiny.has_leases());
}
