// Requests whose packs are not there: what they wait for, what they fall back to, how they end.
#include "cpp/engine/pack_engine.h"
#include "modularbase/core/errors.h"

using namespace modularbase;
using namespace modularbase::testing;

namespace {

RequestSpec short_request(unsigned seed) {
  return greedy(random_ids(seed, 20), 8);
}

// Long enough that an engine which does not wait has begun; too short to slow the tests down.
void a_moment() {
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
}

void touch(const std::string& path) {
  std::FILE* file = std::fopen(path.c_str(), "ab");
  REQUIRE(file != nullptr);
  std::fputc(0, file);
  std::fclose(file);
}

}  // namespace

TEST_CASE("who waits for room holds up nobody: neither the base nor packs that are there") {
  PackEngine tiny(with_slots(1));
  const GenerationId here = tiny.open(1), waited_for = tiny.open(2);
  std::vector<PackLease> lease = tiny.lease(here);
  const TicketPtr waiting = tiny.engine.submit(with_packs(short_request(1), {{waited_for}}));
  for (unsigned seed = 2; seed < 6; ++seed) {
    CHECK(finished(tiny.engine.submit(short_request(seed))).tokens.size() == 8);
    CHECK(finished(tiny.engine.submit(with_packs(short_request(seed), {{here}}))).pack_choice == 0);
  }
  CHECK_FALSE(waiting->finished());
  CHECK(tiny.engine.stats().n_waiting == 1);
  lease.clear();
  const RequestResult result = finished(waiting);
  CHECK(result.tokens.size() == 8);
  CHECK(result.pack_choice == 0);
  CHECK(result.pack_errors.empty());
}

TEST_CASE("who waits long for room is not overtaken for ever") {
  PackEngine tiny(with_slots(1));
  const GenerationId here = tiny.open(1), waited_for = tiny.open(2);
  std::vector<PackLease> lease = tiny.lease(here);
  const TicketPtr waiting = tiny.engine.submit(with_packs(short_request(1), {{waited_for}}));
  std::this_thread::sleep_for(std::chrono::milliseconds(600));
  const TicketPtr late = tiny.engine.submit(with_packs(short_request(2), {{here}}));
  CHECK(finished(tiny.engine.submit(short_request(3))).tokens.size() == 8);
  CHECK_FALSE(late->finished());  // else they could follow each other without end
  lease.clear();
  finished(waiting);
  finished(late);
}

TEST_CASE("no room before the deadline is an error that names the pack; others go on") {
  PackEngine tiny(with_slots(1));
  const GenerationId here = tiny.open(1), waited_for = tiny.open(2);
  const std::vector<PackLease> lease = tiny.lease(here);
  RequestSpec spec = with_packs(short_request(1), {{waited_for}});
  spec.deadline = Clock::now() + std::chrono::milliseconds(50);
  const TicketPtr waiting = tiny.engine.submit(spec);
  CHECK(finished(tiny.engine.submit(with_packs(short_request(2), {{here}}))).tokens.size() == 8);
  try {
    waiting->wait_finished(kPatience);
    FAIL("it was given room");
  } catch (const BudgetExceededError& e) {
    CHECK(e.pack_id == "pack 2");
    CHECK(e.needed_bytes == strong_slot_bytes());
    CHECK(e.budget_bytes == strong_slot_bytes());
  }
}

TEST_CASE("a pack that is forgotten while a request waits for its room") {
  EngineOptions options = with_slots(1);
  options.n_sequences = 1;
  TinyShape shape;
  shape.n_ctx = 16384;
  PackEngine tiny(options, shape);
  const std::vector<PackLease> lease = tiny.lease(tiny.open(1));
  const GenerationId waited_for = tiny.open(2);
  RequestSpec spec = with_packs(short_request(1), {{waited_for}});
  spec.deadline = Clock::now() + std::chrono::milliseconds(300);
  const TicketPtr waiting = tiny.engine.submit(spec);
  a_moment();
  const TicketPtr running = tiny.engine.submit(greedy(random_ids(2, 5), -1));  // the only one
  running->wait_tokens(0, kPatience);
  tiny.engine.packs().retire(waited_for);
  CHECK_THROWS_AS(waiting->wait_finished(kPatience), PackNotFoundError);
  running->cancel();
  finished(running);
}

TEST_CASE("what can never fit is told at once") {
  PackEngine tiny(with_slots(2));
  const GenerationId a = tiny.open(1), b = tiny.open(2), c = tiny.open(3);
  const auto submit = [&](std::vector<PackUse> packs) {
    return tiny.engine.submit(with_packs(short_request(1), std::move(packs)));
  };
  CHECK_THROWS_AS(submit({{a}, {b}, {c}})->wait_finished(kPatience), BudgetExceededError);
  REQUIRE(tiny.engine.packs().load(a, Clock::now() + kPatience));
  tiny.engine.packs().pin(a);
  CHECK_THROWS_AS(submit({{b}, {c}})->wait_finished(kPatience), BudgetExceededError);
  CHECK(finished(submit({{a}, {c}})).tokens.size() == 8);
  CHECK(finished(submit({{b}})).tokens.size() == 8);
}

TEST_CASE("choices are tried in order, and why the others were not taken is told") {
  PackEngine tiny;
  const GenerationId spoilt = tiny.open(1);
  touch(tiny.files.back().path());
  const GenerationId good = tiny.open(2);
  const RequestSpec plain = short_request(1);
  const Alone expected = run_alone(tiny.engine, with_packs(plain, {{good}}));
  RequestSpec spec = with_packs(with_packs(plain, {{99}}), {{good}, {spoilt}});
  const RequestResult result = finished(tiny.engine.submit(with_packs(spec, {{good}})));
  CHECK(same_tokens(ids_of(result), expected));
  CHECK(result.pack_choice == 2);
  REQUIRE(result.pack_errors.size() == 2);
  CHECK(result.pack_errors[0].find("99") != std::string::npos);
  CHECK(result.pack_errors[1].find(tiny.files.front().path()) != std::string::npos);

  const RequestResult base = finished(tiny.engine.submit(with_packs(spec, {})));
  CHECK(base.pack_choice == 2);
  CHECK(base.pack_errors.size() == 2);
  CHECK(same_tokens(ids_of(base), run_alone(tiny.engine, plain)));

  CHECK_THROWS_AS(tiny.engine.submit(spec)->wait_finished(kPatience), PackFormatError);
  CHECK(finished(tiny.engine.submit(plain)).pack_choice == -1);
  CHECK_FALSE(tiny.has_leases());
}

TEST_CASE("requests that end before their time give their packs back") {
  PackEngine tiny;
  const GenerationId a = tiny.open(1), b = tiny.open(2);
  const RequestSpec endless = with_packs(greedy(random_ids(1, 20), 480), {{a}, {b}});
  const TicketPtr cancelled = tiny.engine.submit(endless);
  cancelled->wait_tokens(0, kPatience);
  cancelled->cancel();
  CHECK(finished(cancelled).finish_reason == FinishReason::kCancelled);
  CHECK_FALSE(tiny.has_leases());

  RequestSpec late = endless;
  late.deadline = Clock::now() + std::chrono::milliseconds(5);
  CHECK(finished(tiny.engine.submit(late)).finish_reason == FinishReason::kDeadline);
  CHECK_FALSE(tiny.has_leases());

  const TicketPtr first = tiny.engine.submit(endless);
  first->wait_tokens(0, kPatience);
  CHECK_THROWS_AS(tiny.engine.packs().evict(a), BudgetExceededError);
  tiny.engine.close();
  CHECK(finished(first).finish_reason == FinishReason::kCancelled);
  CHECK_FALSE(tiny.has_leases());
}

TEST_CASE("who loses its KV blocks keeps its packs, and gives the same answer") {
  std::vector<RequestSpec> specs;
  for (unsigned i = 0; i < 5; ++i) {
    const GenerationId id = static_cast<GenerationId>(i) % 3 + 1;
    specs.push_back(with_packs(greedy(random_ids(300 + i, 40 + 15 * i), 100), {{id}}));
  }
  const auto open = [](PackEngine& tiny) {
    for (std::uint32_t seed = 1; seed <= 3; ++seed) tiny.open(seed);
  };
  PackEngine roomy;
  open(roomy);
  std::vector<Alone> alone;
  for (const RequestSpec& spec : specs) alone.push_back(run_alone(roomy.engine, spec));
  PackEngine tight(with_slots(2, with_blocks(6)));  // neither blocks nor slots for all
  open(tight);
  std::vector<TicketPtr> tickets;
  for (const RequestSpec& spec : specs) tickets.push_back(tight.engine.submit(spec));
  std::int64_t n_least_rows = 0;
  for (std::size_t i = 0; i < specs.size(); ++i) {
    CAPTURE(i);
    CHECK(same_tokens(ids_of(finished(tickets[i])), alone[i]));
    n_least_rows += std::ssize(specs[i].prompt) + 100 - 1;
  }
  CHECK(tight.engine.stats().n_rows > n_least_rows);  // some were preempted
  CHECK_FALSE(tight.has_leases());
}

TEST_CASE("two hundred requests, eight packs and room for two") {
  PackEngine tiny(with_slots(2));
  for (std::uint32_t seed = 1; seed <= 8; ++seed) tiny.open(seed);
  std::vector<TicketPtr> tickets;
  std::mt19937 random(4);
  for (unsigned i = 0; i < 200; ++i) {
    const auto a = static_cast<GenerationId>(random() % 8 + 1);
    const auto b = static_cast<GenerationId>(random() % 8 + 1);
    std::vector<PackUse> packs{{a}};
    if (b != a && i % 3 == 0) packs.push_back({b});
    tickets.push_back(tiny.engine.submit(with_packs(greedy(random_ids(i, 4), 3), packs)));
  }
  for (const TicketPtr& ticket : tickets) CHECK(finished(ticket).tokens.size() == 3);
  CHECK_FALSE(tiny.has_leases());
  CHECK(tiny.engine.packs().status().used_bytes <= 2 * strong_slot_bytes());
}
