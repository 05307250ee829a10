// One caller: what each kind of request gives, where requests end, and which are refused.
#include "modularbase/engine/engine.h"

#include "cpp/engine/tiny_engine.h"
#include "modularbase/core/errors.h"

using namespace modularbase;
using namespace modularbase::testing;

namespace {

template <typename Make>
std::string refused_field(Make make) {
  try {
    make();
  } catch (const InvalidRequestError& error) {
    return error.field;
  }
  return "nothing";
}

RequestSpec with(RequestSpec spec, const std::function<void(RequestSpec&)>& change) {
  change(spec);
  return spec;
}

std::string refused_option(const std::function<void(EngineOptions&)>& change) {
  EngineOptions options = tiny_options();
  change(options);
  return refused_field([&] { TinyEngine tiny(options); });
}

}  // namespace

TEST_CASE("generation gives tokens, log-probabilities and counts") {
  TinyEngine tiny;
  RequestSpec spec = greedy(random_ids(1, 70), 9);
  spec.n_logprobs = 3;
  const RequestResult result = finished(tiny.engine.submit(spec));
  CHECK(result.finish_reason == FinishReason::kLength);
  CHECK(result.n_prompt == 70);
  CHECK(result.n_cached == 0);
  REQUIRE(result.tokens.size() == 9);
  for (const GeneratedToken& token : result.tokens) {
    REQUIRE(token.top_logprobs.size() == 3);
    CHECK(token.top_logprobs[0].id == token.id);  // greedy
    CHECK(token.logprob == token.top_logprobs[0].logprob);
    CHECK(token.logprob < 0.0f);
  }
  CHECK(result.timings.prefill_us > 0.0);
  CHECK(result.timings.decode_us > 0.0);
}

TEST_CASE("scores are the log-probabilities that generation reports") {
  TinyEngine tiny;
  RequestSpec spec = greedy(random_ids(2, 150), 20);
  spec.n_logprobs = 0;
  const RequestResult generated = finished(tiny.engine.submit(spec));
  Ids all = spec.prompt;
  for (const GeneratedToken& token : generated.tokens) all.push_back(token.id);
  const RequestResult scored = finished(tiny.engine.submit(scoring(all)));
  CHECK(scored.finish_reason == FinishReason::kDone);
  REQUIRE(scored.logprobs.size() == all.size() - 1);
  for (std::size_t i = 0; i < generated.tokens.size(); ++i) {
    // Tiles of rows against single rows: near 1e-4, see kTieGap.
    CHECK(std::abs(scored.logprobs[149 + i] - generated.tokens[i].logprob) < kTieGap);
  }
}

TEST_CASE("hidden states: all rows, their mean, the last") {
  TinyEngine tiny;
  const auto n_embd = static_cast<std::size_t>(tiny.engine.info().n_embd);
  const Ids prompt = random_ids(3, 300);  // several chunks
  for (int layer = 0; layer <= 3; ++layer) {
    const auto states = [&](Pooling pooling) {
      return finished(tiny.engine.submit(hidden_states(prompt, layer, pooling))).hidden;
    };
    const std::vector<float> rows = states(Pooling::kNone);
    REQUIRE(rows.size() == 300 * n_embd);
    CHECK(states(Pooling::kLast) == std::vector<float>(rows.end() - 64, rows.end()));
    const std::vector<float> mean = states(Pooling::kMean);
    REQUIRE(mean.size() == n_embd);
    for (std::size_t i = 0; i < n_embd; ++i) {
      double sum = 0.0;
      for (std::size_t row = 0; row < 300; ++row) sum += rows[row * n_embd + i];
      CHECK(mean[i] == static_cast<float>(sum / 300.0));
    }
  }
}

TEST_CASE("hidden states may share the steps of those who generate") {
  TinyEngine tiny(tiny_options(), {.n_ctx = 16384});
  const auto n_embd = static_cast<std::size_t>(tiny.engine.info().n_embd);
  const std::int64_t layer = tiny.engine.info().n_layer + 1;
  RequestSpec states = hidden_states(random_ids(3, 21), static_cast<int>(layer));
  const std::vector<float> expected = finished(tiny.engine.submit(states)).hidden;
  const Alone alone = run_alone(tiny.engine, greedy(random_ids(4, 20), 40));

  states.n_rows_beside = 4;
  const TicketPtr running = tiny.engine.submit(greedy(random_ids(4, 20), 16000));  // outlasts it
  REQUIRE(running->wait_tokens(0, kPatience).size() > 0);
  const std::int64_t n_steps = tiny.engine.stats().n_steps;
  const std::vector<float> found = finished(tiny.engine.submit(states)).hidden;
  CHECK(tiny.engine.stats().n_steps - n_steps >= 6);  // 21 rows, 4 a step
  running->cancel();
  Ids generated = ids_of(finished(running));
  generated.resize(std::min(generated.size(), alone.n_sure));
  CHECK(std::equal(generated.begin(), generated.end(), alone.ids.begin()));
  REQUIRE(found.size() == 21 * n_embd);
  for (std::size_t i = 0; i < found.size(); ++i) {
    CHECK(found[i] == doctest::Approx(expected[i]).epsilon(kTieGap));
  }
  CHECK(finished(tiny.engine.submit(states)).hidden.size() == 21 * n_embd);  // beside nobody
}

TEST_CASE("a stop token ends the request and is not shown") {
  TinyEngine tiny;
  RequestSpec spec = greedy(random_ids(4, 20), 12);
  const Ids free_run = ids_of(finished(tiny.engine.submit(spec)));
  spec.stop_ids = {free_run[5]};
  const RequestResult result = finished(tiny.engine.submit(spec));
  CHECK(result.finish_reason == FinishReason::kStop);
  const auto first = std::find(free_run.begin(), free_run.end(), free_run[5]);
  CHECK(ids_of(result) == Ids(free_run.begin(), first));
}

TEST_CASE("a request ends where the context does") {
  EngineOptions options = tiny_options();
  options.n_ctx = 100;
  TinyEngine tiny(options);
  const RequestResult result = finished(tiny.engine.submit(greedy(random_ids(5, 90), -1)));
  CHECK(result.finish_reason == FinishReason::kLength);
  CHECK(result.tokens.size() == 10);
  CHECK(finished(tiny.engine.submit(greedy(random_ids(5, 99), 1))).tokens.size() == 1);
  try {
    tiny.engine.submit(greedy(random_ids(5, 90), 11));
    FAIL("expected an error");
  } catch (const ContextLengthError& error) {
    CHECK(error.n_tokens == 101);
    CHECK(error.n_ctx == 100);
  }
  CHECK_THROWS_AS(tiny.engine.submit(greedy(random_ids(5, 100), -1)), ContextLengthError);
  CHECK_THROWS_AS(tiny.engine.submit(scoring(random_ids(5, 101))), ContextLengthError);
}

TEST_CASE("a request ends where the KV memory does, and one that can never fit is refused") {
  TinyEngine tiny(with_blocks(2));
  REQUIRE(tiny.engine.info().n_kv_blocks == 2);
  const RequestResult result = finished(tiny.engine.submit(greedy(random_ids(6, 100), -1)));
  CHECK(result.finish_reason == FinishReason::kLength);
  CHECK(result.tokens.size() == 28);
  try {
    tiny.engine.submit(greedy(random_ids(6, 100), 29));
    FAIL("expected an error");
  } catch (const KvCacheFullError& error) {
    CHECK(error.limit_bytes == static_cast<std::int64_t>(tiny.engine.info().kv_bytes));
    CHECK(error.needed_bytes == error.limit_bytes / 2 * 3);
  }
}

TEST_CASE("requests that make no sense are refused by field, and the engine goes on") {
  TinyEngine tiny;
  Engine& engine = tiny.engine;
  const RequestSpec good = greedy({1, 2, 3}, 2);
  const auto refused = [&](const std::function<void(RequestSpec&)>& change) {
    return refused_field([&] { engine.submit(with(good, change)); });
  };
  CHECK(refused([](auto& s) { s.prompt.clear(); }) == "prompt");
  CHECK(refused([](auto& s) { s.prompt = {1, -1}; }) == "prompt");
  CHECK(refused([](auto& s) { s.prompt = {512}; }) == "prompt");
  CHECK(refused([](auto& s) { s.max_tokens = 0; }) == "max_tokens");
  CHECK(refused([](auto& s) { s.max_tokens = -2; }) == "max_tokens");
  CHECK(refused([](auto& s) { s.n_draft = -1; }) == "n_draft");
  CHECK(refused([](auto& s) { s.n_draft = 65; }) == "n_draft");
  CHECK(refused([](auto& s) { s.n_logprobs = -2; }) == "n_logprobs");
  CHECK(refused([](auto& s) { s.n_logprobs = 513; }) == "n_logprobs");
  CHECK(refused([](auto& s) { s.sampling.temperature = -1.0f; }) == "temperature");
  CHECK(refused([](auto& s) { s.sampling.logit_bias[512] = 1.0f; }) == "logit_bias[512]");
  CHECK(refused_field([&] { engine.submit(scoring({1})); }) == "prompt");
  CHECK(refused_field([&] { engine.submit(hidden_states({1}, -1)); }) == "layer");
  CHECK(refused_field([&] { engine.submit(hidden_states({1}, 4)); }) == "layer");
  RequestSpec states = hidden_states({1}, 1);
  states.n_rows_beside = 2;  // only the last states come from a step that generates
  CHECK(refused_field([&] { engine.submit(states); }) == "n_rows_beside");
  CHECK(finished(engine.submit(good)).tokens.size() == 2);
}

TEST_CASE("options that make no sense are refused by field") {
  CHECK(refused_option([](auto& o) { o.n_ctx = -1; }) == "n_ctx");
  CHECK(refused_option([](auto& o) { o.n_ctx = 513; }) == "n_ctx");
  CHECK(refused_option([](auto& o) { o.kv_budget_bytes = -1; }) == "kv_budget_bytes");
  CHECK(refused_option([](auto& o) { o.kv_budget_bytes = 1; }) == "kv_budget_bytes");
  CHECK(refused_option([](auto& o) { o.pack_budget_bytes = -1; }) == "pack_budget_bytes");
  CHECK(refused_option([](auto& o) { o.first_site = -2; }) == "first_site");
  CHECK(refused_option([](auto& o) { o.first_site = 2; }) == "first_site");
  CHECK(refused_option([](auto& o) { o.n_batch = 0; }) == "n_batch");
  CHECK(refused_option([](auto& o) { o.n_sequences = 0; }) == "n_sequences");
  CHECK(refused_option([](auto& o) { o.n_threads = -1; }) == "n_threads");
  CHECK(refused_option([](auto& o) { o.n_threads = 100000; }) == "n_threads");
  CHECK(refused_option([](auto& o) { o.dtype = "f17"; }) == "dtype");
  CHECK(refused_option([](auto& o) { o.kv = "f32"; }) == "kv");
  CHECK(refused_option([](auto& o) { o.kv_window_tokens = 64; }) == "kv_window_tokens");
  CHECK(refused_option([](auto& o) { o.attention = "slow"; }) == "attention");
  CHECK(refused_option([](auto& o) { o.linear = "slow"; }) == "linear");
  CHECK(refused_option([](auto& o) { o.head = "none"; }) == "head");
  CHECK(refused_option([](auto& o) { o.prefix_cache = "true"; }) == "prefix_cache");
  EngineOptions options = tiny_options();
  options.device = "tpu";
  CHECK_THROWS_AS(TinyEngine{options}, DeviceError);
}

TEST_CASE("a request past its deadline ends without an error") {
  TinyEngine tiny;
  RequestSpec spec = greedy(random_ids(7, 20), 100);
  spec.deadline = Clock::now() - std::chrono::seconds(1);
  const RequestResult result = finished(tiny.engine.submit(spec));
  CHECK(result.finish_reason == FinishReason::kDeadline);
  CHECK(result.tokens.empty());
}

TEST_CASE("statistics no longer count a request whose end has been seen") {
  TinyEngine tiny;
  std::int64_t n_steps = 0;
  for (int i = 0; i < 200; ++i) {
    finished(tiny.engine.submit(greedy({i}, 1)));
    const EngineStats stats = tiny.engine.stats();
    REQUIRE(stats.n_running == 0);
    REQUIRE(stats.n_waiting == 0);
    REQUIRE(stats.n_steps == ++n_steps);
    REQUIRE(stats.n_rows == n_steps);
    REQUIRE(stats.n_free_blocks + stats.n_cached_blocks == tiny.engine.info().n_kv_blocks);
  }
}

TEST_CASE("a closed engine refuses, and closing again does nothing") {
  TinyEngine tiny;
  tiny.engine.close();
  tiny.engine.close();
  CHECK_THROWS_AS(tiny.engine.submit(greedy({1}, 1)), CancelledError);
  CHECK(tiny.engine.stats().n_running == 0);
}
