// The same request gives the same tokens, whatever else runs and however the work is cut.
#include "cpp/engine/tiny_engine.h"

using namespace modularbase;
using namespace modularbase::testing;

namespace {

std::vector<RequestSpec> greedy_requests() {
  std::vector<RequestSpec> specs;
  for (unsigned i = 0; i < 7; ++i) specs.push_back(greedy(random_ids(100 + i, 1 + 47 * i), 24));
  specs.back().n_draft = 8;
  return specs;
}

/// Also some that draw. Their prompts stay below a tile of rows (8), where our kernels give the
/// same bits in every batch: a draw depends on every probability, not on the gap of two.
std::vector<RequestSpec> mixed_requests() {
  std::vector<RequestSpec> specs = greedy_requests();
  for (unsigned i = 0; i < 3; ++i) {
    RequestSpec spec = greedy(random_ids(200 + i, 3 + 2 * i), 24);
    spec.sampling.temperature = 0.7f;
    spec.sampling.top_k = i == 0 ? 0 : 5;  // 0: the whole row is asked for
    spec.sampling.repeat_penalty = i == 2 ? 1.1f : 1.0f;
    spec.sampling.seed = i;
    specs.push_back(std::move(spec));
  }
  return specs;
}

std::vector<Alone> all_alone(const std::vector<RequestSpec>& specs) {
  TinyEngine tiny;
  std::vector<Alone> alone;
  std::size_t n_sure = 0;
  for (const RequestSpec& spec : specs) {
    alone.push_back(run_alone(tiny.engine, spec));
    n_sure += alone.back().n_sure;
  }
  REQUIRE(n_sure * 5 > specs.size() * 24 * 4);  // or the comparison says little
  return alone;
}

void check_together(const std::vector<RequestSpec>& specs, const EngineOptions& options) {
  const std::vector<Alone> alone = all_alone(specs);
  TinyEngine tiny(options);
  std::vector<TicketPtr> tickets;
  for (const RequestSpec& spec : specs) tickets.push_back(tiny.engine.submit(spec));
  for (std::size_t i = 0; i < specs.size(); ++i) {
    CAPTURE(i);
    CHECK(same_tokens(ids_of(finished(tickets[i])), alone[i]));
  }
}

EngineOptions with(const std::function<void(EngineOptions&)>& change) {
  EngineOptions options = tiny_options();
  change(options);
  return options;
}

}  // namespace

TEST_CASE("alone and in a batch of ten") {
  check_together(mixed_requests(), tiny_options());
  check_together(mixed_requests(), threaded());
}

TEST_CASE("with chunks of any size") {
  for (const int n_batch : {1, 7, 64}) {
    CAPTURE(n_batch);
    check_together(mixed_requests(), with([&](auto& o) { o.n_batch = n_batch; }));
  }
}

TEST_CASE("with few running at once") {
  check_together(mixed_requests(), with([](auto& o) { o.n_sequences = 2; }));
}

TEST_CASE("with ggml's ops and the full head instead of our kernels") {
  check_together(greedy_requests(), with([](auto& o) { o.attention = "reference"; }));
  check_together(greedy_requests(), with([](auto& o) { o.linear = "reference"; }));
  check_together(mixed_requests(), with([](auto& o) { o.head = "full"; }));
}

TEST_CASE("after a neighbour was cancelled") {
  const std::vector<RequestSpec> specs = mixed_requests();
  const std::vector<Alone> alone = all_alone(specs);
  TinyEngine tiny;
  std::vector<TicketPtr> tickets;
  for (const RequestSpec& spec : specs) tickets.push_back(tiny.engine.submit(spec));
  tickets[0]->wait_tokens(2, kPatience);
  for (const std::size_t i : {std::size_t{0}, std::size_t{4}}) tickets[i]->cancel();
  for (std::size_t i = 0; i < specs.size(); ++i) {
    CAPTURE(i);
    const RequestResult result = finished(tickets[i]);
    if (result.finish_reason == FinishReason::kLength) {
      CHECK(same_tokens(ids_of(result), alone[i]));
    } else {
      CHECK(result.finish_reason == FinishReason::kCancelled);
      CHECK((i == 0 || i == 4));
    }
  }
}

TEST_CASE("drafted tokens do not change the answer, and some are accepted") {
  TinyEngine tiny;
  RequestSpec spec = greedy(random_ids(9, 30), 150);
  for (const TokenId id : {7, 8, 9}) spec.sampling.logit_bias[id] = 100.0f;  // so that it repeats
  const Ids alone = ids_of(finished(tiny.engine.submit(spec)));
  spec.n_draft = 6;  // seven rows, below a tile: the same bits
  const RequestResult result = finished(tiny.engine.submit(spec));
  CHECK(ids_of(result) == alone);
  CHECK(result.n_accepted > 0);
  CHECK(result.n_accepted < result.n_drafted);
}

TEST_CASE("a draft that does not fit the KV memory is shortened, not waited for") {
  TinyEngine tiny(with_blocks(4));
  RequestSpec spec = greedy(random_ids(9, 10), -1);
  spec.sampling.logit_bias[7] = 1000.0f;  // every draft is right
  spec.n_draft = 64;
  const TicketPtr ticket = tiny.engine.submit(spec);
  const bool ended = ticket->wait_finished(std::chrono::minutes(1));  // some 50 steps
  if (!ended) ticket->cancel();
  REQUIRE(ended);
  CHECK(ids_of(ticket->result()) == Ids(256 - 10, 7));
  CHECK(ticket->result().n_accepted > 200);
}

TEST_CASE("a draft that does not fit takes no blocks from others") {
  EngineOptions options = with_blocks(4);
  options.prefix_cache = "off";
  TinyEngine tiny(options);
  RequestSpec drafting = greedy(random_ids(9, 10), 115);
  drafting.sampling.logit_bias[7] = 1000.0f;
  drafting.n_draft = 64;
  const RequestSpec other = greedy(random_ids(10, 60), 60);  // two blocks each
  const TicketPtr first = tiny.engine.submit(drafting);
  const TicketPtr second = tiny.engine.submit(other);
  const RequestResult drafted = finished(first);
  CHECK(ids_of(drafted) == Ids(115, 7));
  CHECK(finished(second).tokens.size() == 60);
  // Each row once, but for the drafted ones that were not accepted.
  const std::int64_t n_wasted = drafted.n_drafted - drafted.n_accepted;
  CHECK(tiny.engine.stats().n_rows == 10 + 115 - 1 + n_wasted + 60 + 60 - 1);
}
