// What packs share of a prompt's KV, and what they must not.
#include "cpp/engine/pack_engine.h"

using namespace modularbase;
using namespace modularbase::testing;

namespace {

constexpr std::size_t kPrompt = 300;

RequestSpec long_prompt(std::vector<PackUse> packs) {
  return with_packs(greedy(random_ids(1, kPrompt), 12), std::move(packs));
}

RequestSpec from_here(RequestSpec spec) {
  spec.activation = Activation::kFromHere;
  return spec;
}

EngineOptions without_prefixes(EngineOptions options = tiny_options()) {
  options.prefix_cache = "off";
  return options;
}

TinyShape four_layers() {
  TinyShape shape;
  shape.n_layer = 4;
  return shape;
}

EngineOptions split_at(int first_site) {
  EngineOptions options = tiny_options();
  options.first_site = first_site;
  return options;
}

void check_cached(const RequestResult& result, std::int64_t n_cached, std::int64_t n_lower) {
  CHECK(result.n_cached == n_cached);
  CHECK(result.n_cached_lower == n_lower);
}

}  // namespace

TEST_CASE("another pack takes the lower layers' KV of a known prompt, and none above") {
  PackEngine fresh(without_prefixes()), tiny(with_blocks(64));  // room to remember all
  for (const std::uint32_t seed : {1, 2}) CHECK(fresh.open(seed) == tiny.open(seed));
  check_cached(finished(tiny.engine.submit(long_prompt({{1}}))), 0, 0);
  for (const std::vector<PackUse>& packs :
       {std::vector<PackUse>{{2}}, {{1, 0.5f}}, {{1}, {2}}, {}}) {
    const RequestResult result = finished(tiny.engine.submit(long_prompt(packs)));
    check_cached(result, 0, kPrompt - 1);
    CHECK(same_tokens(ids_of(result), run_alone(fresh.engine, long_prompt(packs))));
  }
  for (const std::vector<PackUse>& packs : {std::vector<PackUse>{{1}}, {{1}, {2}}, {}}) {
    const RequestResult again = finished(tiny.engine.submit(long_prompt(packs)));
    check_cached(again, kPrompt - 1, kPrompt - 1);
    CHECK(same_tokens(ids_of(again), run_alone(fresh.engine, long_prompt(packs))));
  }
}

TEST_CASE("packs of one set under another policy share nothing above") {
  PackEngine tiny, fresh(without_prefixes());
  for (const std::uint32_t seed : {1, 2}) CHECK(fresh.open(seed) == tiny.open(seed));
  finished(tiny.engine.submit(long_prompt({{1}, {2}})));
  RequestSpec ties = long_prompt({{1}, {2}});
  ties.policy = kernels::MergePolicy::kTies;
  const RequestResult result = finished(tiny.engine.submit(ties));
  check_cached(result, 0, kPrompt - 1);
  CHECK(same_tokens(ids_of(result), run_alone(fresh.engine, ties)));
}

TEST_CASE("a new content never reads the KV of the one that it replaces") {
  PackEngine tiny(with_slots(1)), fresh(without_prefixes());
  const GenerationId old = tiny.open(1);
  const Alone before = run_alone(tiny.engine, long_prompt({{old}}));
  tiny.engine.packs().retire(old);
  const GenerationId current = tiny.open(2);
  CHECK(current != old);
  const RequestResult result = finished(tiny.engine.submit(long_prompt({{current}})));
  check_cached(result, 0, kPrompt - 1);
  const GenerationId same = fresh.open(2);
  const Alone expected = run_alone(fresh.engine, long_prompt({{same}}));
  CHECK(same_tokens(ids_of(result), expected));
  CHECK(expected.ids != before.ids);
  // Back to the first content: its generation was forgotten, so it starts anew.
  tiny.engine.packs().retire(current);
  const GenerationId back = tiny.open(1);
  CHECK(back != old);
  const RequestResult returned = finished(tiny.engine.submit(long_prompt({{back}})));
  check_cached(returned, 0, kPrompt - 1);
  CHECK(same_tokens(ids_of(returned), before));
}

TEST_CASE("a running request keeps its generation while another takes its place") {
  PackEngine tiny, fresh(without_prefixes());
  const GenerationId old = tiny.open(1);
  fresh.open(1);
  fresh.open(2);
  const RequestSpec endless = with_packs(greedy(random_ids(3, 20), 400), {{old}});
  const TicketPtr running = tiny.engine.submit(endless);
  running->wait_tokens(0, kPatience);
  tiny.engine.packs().retire(old);
  const GenerationId current = tiny.open(2);
  const RequestSpec next = with_packs(greedy(random_ids(3, 20), 30), {{current}});
  CHECK(same_tokens(ids_of(finished(tiny.engine.submit(next))), run_alone(fresh.engine, next)));
  CHECK(same_tokens(ids_of(finished(running)), run_alone(fresh.engine, endless)));
  CHECK(tiny.engine.packs().status().packs.size() == 1);
}

TEST_CASE("from here on: the base's KV of the whole prompt is used as it is") {
  PackEngine tiny, fresh(without_prefixes());
  for (const std::uint32_t seed : {1, 2}) CHECK(fresh.open(seed) == tiny.open(seed));
  const Alone base = run_alone(tiny.engine, long_prompt({}));
  for (const GenerationId id : {1, 2}) {
    const RequestSpec spec = from_here(long_prompt({{id}}));
    const RequestResult result = finished(tiny.engine.submit(spec));
    check_cached(result, kPrompt - 1, kPrompt - 1);
    const Alone expected = run_alone(fresh.engine, spec);
    CHECK(same_tokens(ids_of(result), expected));
    CHECK(expected.ids != base.ids);
    CHECK(expected.ids != run_alone(fresh.engine, long_prompt({{id}})).ids);
  }
  // Another prompt that goes on from there: positions from the last of the old prompt are not the
  // base's.
  RequestSpec longer = long_prompt({});
  const RequestResult answer = finished(tiny.engine.submit(from_here(long_prompt({{1}}))));
  for (const GeneratedToken& token : answer.tokens) longer.prompt.push_back(token.id);
  CHECK(same_tokens(ids_of(finished(tiny.engine.submit(longer))), run_alone(fresh.engine, longer)));
}

TEST_CASE("from here on, of a prompt of one token, is a pack for the whole prompt") {
  PackEngine tiny(without_prefixes());
  const RequestSpec spec = with_packs(greedy(random_ids(2, 1), 20), {{tiny.open(1)}});
  CHECK(ids_of(finished(tiny.engine.submit(from_here(spec)))) ==
        ids_of(finished(tiny.engine.submit(spec))));
}

TEST_CASE("packs below the split share nothing, and rows that restart beside them stay right") {
  const StrongPack deep{.sites = {0, 2}}, high{.sites = {2, 3}};
  PackEngine fresh(without_prefixes(split_at(0)), four_layers()), tiny(split_at(2), four_layers());
  for (PackEngine* engine : {&fresh, &tiny}) {
    CHECK(engine->open(1, deep) == 1);
    CHECK(engine->open(2, high) == 2);
    CHECK(engine->open(3, high) == 3);
  }
  const auto run = [&](std::vector<PackUse> packs, std::int64_t n_cached, std::int64_t n_lower) {
    const RequestSpec spec = long_prompt(std::move(packs));
    const RequestResult result = finished(tiny.engine.submit(spec));
    check_cached(result, n_cached, n_lower);
    CHECK(same_tokens(ids_of(result), run_alone(fresh.engine, spec)));
  };
  constexpr std::int64_t kKnown = kPrompt - 1;
  run({{2}}, 0, 0);
  run({{1}}, 0, 0);  // what the lower layers know is not what it needs
  run({{1}}, kKnown, kKnown);
  run({{3}}, 0, kKnown);
  run({{1}, {3}}, 0, 0);
  run({}, 0, kKnown);
  const TicketPtr a = tiny.engine.submit(long_prompt({{2}, {3}}));   // restarts
  const TicketPtr b = tiny.engine.submit(long_prompt({{1, 0.7f}}));  // from the start
  const TicketPtr c = tiny.engine.submit(long_prompt({{3, 0.5f}}));  // restarts
  CHECK(same_tokens(ids_of(finished(a)), run_alone(fresh.engine, long_prompt({{2}, {3}}))));
  CHECK(same_tokens(ids_of(finished(b)), run_alone(fresh.engine, long_prompt({{1, 0.7f}}))));
  CHECK(same_tokens(ids_of(finished(c)), run_alone(fresh.engine, long_prompt({{3, 0.5f}}))));
}

TEST_CASE("rows that restart give the same with ggml's ops for the sites") {
  const StrongPack high{.sites = {2, 3}};
  EngineOptions options = split_at(2);
  options.sites = "reference";
  PackEngine fresh(without_prefixes(options), four_layers()), tiny(options, four_layers());
  for (const std::uint32_t seed : {1, 2}) CHECK(fresh.open(seed, high) == tiny.open(seed, high));
  for (const std::vector<PackUse>& packs :
       {std::vector<PackUse>{}, {{1}}, {{2}}, {{1}, {2}}, {{1}}}) {
    const RequestResult result = finished(tiny.engine.submit(long_prompt(packs)));
    CHECK(same_tokens(ids_of(result), run_alone(fresh.engine, long_prompt(packs))));
  }
}
