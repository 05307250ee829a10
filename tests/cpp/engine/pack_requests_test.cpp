// Requests with packs give what they give alone, whatever runs beside them.
#include <cmath>

#include "cpp/engine/pack_engine.h"
#include "modularbase/core/errors.h"

using namespace modularbase;
using namespace modularbase::testing;
using kernels::MergePolicy;

namespace {

constexpr std::uint32_t kPacks = 8;

void open_all(PackEngine& tiny) {
  for (std::uint32_t seed = 1; seed <= kPacks; ++seed) {
    CHECK(tiny.open(seed) == static_cast<GenerationId>(seed));
  }
}

/// One with each pack, the plain base, and two that mix.
std::vector<RequestSpec> mixed_requests() {
  std::vector<RequestSpec> specs;
  for (int i = 1; i <= static_cast<int>(kPacks); ++i) {
    const auto n = static_cast<std::size_t>(7 * i);
    specs.push_back(with_packs(greedy(random_ids(static_cast<unsigned>(i), n), 16), {{i, 1.0f}}));
  }
  specs.push_back(greedy(random_ids(20, 40), 16));
  specs.push_back(with_packs(greedy(random_ids(21, 33), 16), {{2, 0.5f}, {7, 1.5f}}));
  specs.push_back(with_packs(greedy(random_ids(22, 5), 16), {{4, 1}, {3, 1}, {8, 0.2f}, {1, 2}}));
  specs.push_back(greedy(random_ids(23, 3), 16));
  return specs;
}

std::vector<Alone> all_alone(const std::vector<RequestSpec>& specs) {
  PackEngine tiny;
  open_all(tiny);
  std::vector<Alone> alone;
  for (const RequestSpec& spec : specs) alone.push_back(run_alone(tiny.engine, spec));
  check_sure(alone);
  return alone;
}

void check_together(const std::vector<RequestSpec>& specs, const std::vector<Alone>& alone,
                    const EngineOptions& options) {
  PackEngine tiny(options);
  open_all(tiny);
  std::vector<TicketPtr> tickets;
  for (const RequestSpec& spec : specs) tickets.push_back(tiny.engine.submit(spec));
  for (std::size_t i = 0; i < specs.size(); ++i) {
    CAPTURE(i);
    CHECK(same_tokens(ids_of(finished(tickets[i])), alone[i]));
  }
  CHECK_FALSE(tiny.has_leases());
}

EngineOptions with(const std::function<void(EngineOptions&)>& change) {
  EngineOptions options = tiny_options();
  change(options);
  return options;
}

std::string refused_field(Engine& engine, const RequestSpec& spec) {
  try {
    engine.submit(spec);
  } catch (const InvalidRequestError& e) {
    return e.field;
  }
  return "accepted";
}

}  // namespace

TEST_CASE("a pack changes the answer, a pack of weight 0 does not") {
  PackEngine tiny;
  open_all(tiny);
  const RequestSpec plain = greedy(random_ids(1, 30), 16);
  const Alone base = run_alone(tiny.engine, plain);
  const Alone first = run_alone(tiny.engine, with_packs(plain, {{1, 1.0f}}));
  const Alone second = run_alone(tiny.engine, with_packs(plain, {{2, 1.0f}}));
  CHECK(first.ids != base.ids);
  CHECK(second.ids != base.ids);
  CHECK(first.ids != second.ids);
  CHECK(run_alone(tiny.engine, with_packs(plain, {{1, 0.5f}})).ids != first.ids);
  const auto answer_of = [&](const std::vector<PackUse>& packs) {
    return ids_of(finished(tiny.engine.submit(with_packs(plain, packs))));
  };
  CHECK(same_tokens(answer_of({{1, 0.0f}}), base));
  CHECK(same_tokens(answer_of({{1, 0.0f}, {2, 0.0f}}), base));
  CHECK(same_tokens(answer_of({{1, 1.0f}, {2, 0.0f}}), first));
  CHECK(same_tokens(ids_of(finished(tiny.engine.submit(with_packs(plain, {})))), base));
}

TEST_CASE("eight packs, mixtures and the plain base in one batch, each as if alone") {
  const std::vector<RequestSpec> specs = mixed_requests();
  const std::vector<Alone> alone = all_alone(specs);
  check_together(specs, alone, tiny_options());
  check_together(specs, alone, threaded());
  for (const int n_batch : {1, 7}) {
    check_together(specs, alone, with([&](auto& o) { o.n_batch = n_batch; }));
  }
  check_together(specs, alone, with([](auto& o) { o.n_sequences = 2; }));
  check_together(specs, alone, with([](auto& o) { o.head = "full"; }));
  check_together(specs, alone, with_slots(4));  // not all fit at once
}

TEST_CASE("fused sites and ggml's ops give the same") {
  // ggml rounds x to F16 before W_in and W_out, and scales of blocks to F16. Of packs whose effect
  // is as large as the base's that moves log-probabilities by up to 0.008 (seen); gaps by twice it.
  constexpr float kRounding = 0.02f;
  PackEngine fused, reference(with([](auto& o) { o.sites = "reference"; }));
  open_all(fused);
  open_all(reference);
  std::size_t n_sure = 0;
  for (const RequestSpec& spec : mixed_requests()) {
    RequestSpec score = scoring(random_ids(static_cast<unsigned>(spec.prompt.size()), 60));
    score.pack_choices = spec.pack_choices;
    const auto a = finished(fused.engine.submit(score)).logprobs;
    const auto b = finished(reference.engine.submit(score)).logprobs;
    REQUIRE(a.size() == b.size());
    for (std::size_t i = 0; i < a.size(); ++i) CHECK(std::abs(a[i] - b[i]) < kRounding);
    const Alone alone = run_alone(fused.engine, spec, 2 * kRounding);
    CHECK(same_tokens(ids_of(finished(reference.engine.submit(spec))), alone));
    n_sure += alone.n_sure;
  }
  CHECK(n_sure > 80);
}

TEST_CASE("every type of expert, in one step with the others") {
  const std::vector<ggml_type> types{GGML_TYPE_Q4_0, GGML_TYPE_Q4_K, GGML_TYPE_Q8_0, GGML_TYPE_F16};
  PackEngine one, all;
  std::vector<RequestSpec> specs;
  std::vector<Alone> alone;
  for (const ggml_type type : types) {
    StrongPack pack;
    pack.expert_type = type;
    const GenerationId id = one.open(3, pack);
    CHECK(all.open(3, pack) == id);
    specs.push_back(with_packs(greedy(random_ids(5, 20), 12), {{id, 1.0f}}));
    alone.push_back(run_alone(one.engine, specs.back()));
  }
  specs.push_back(with_packs(greedy(random_ids(6, 20), 12), {{1, 1.0f}, {2, 1.0f}, {4, 1.0f}}));
  alone.push_back(run_alone(one.engine, specs.back()));
  check_sure(alone);
  std::vector<TicketPtr> tickets;
  for (const RequestSpec& spec : specs) tickets.push_back(all.engine.submit(spec));
  for (std::size_t i = 0; i < specs.size(); ++i) {
    CHECK(same_tokens(ids_of(finished(tickets[i])), alone[i]));
  }
}

TEST_CASE("policies join packs in their own way, and tell of conflict") {
  PackEngine tiny;
  open_all(tiny);
  std::vector<Ids> answers;
  for (const auto policy :
       {MergePolicy::kBlend, MergePolicy::kBest, MergePolicy::kPriority, MergePolicy::kTies}) {
    RequestSpec spec = with_packs(greedy(random_ids(1, 30), 24), {{1, 0.8f}, {2, 1.0f}});
    spec.policy = policy;
    const RequestResult result = finished(tiny.engine.submit(spec));
    answers.push_back(ids_of(result));
    REQUIRE(result.pack_conflict.size() == 2);
    for (const float conflict : result.pack_conflict) CHECK(std::abs(conflict) <= 1.0f);
  }
  for (std::size_t i = 0; i < answers.size(); ++i) {
    for (std::size_t j = i + 1; j < answers.size(); ++j) {
      CAPTURE(i);
      CAPTURE(j);
      CHECK(answers[i] != answers[j]);
    }
  }
  const RequestSpec single = with_packs(greedy(random_ids(1, 30), 4), {{1, 1.0f}});
  CHECK(finished(tiny.engine.submit(single)).pack_conflict.empty());
}

TEST_CASE("drafted tokens do not change the answer with a pack") {
  PackEngine tiny;
  open_all(tiny);
  RequestSpec spec = with_packs(greedy(random_ids(9, 30), 100), {{5, 1.0f}});
  for (const TokenId id : {7, 8, 9}) spec.sampling.logit_bias[id] = 100.0f;  // so that it repeats
  const Ids alone = ids_of(finished(tiny.engine.submit(spec)));
  spec.n_draft = 6;  // seven rows, below a tile: the same bits
  const RequestResult result = finished(tiny.engine.submit(spec));
  CHECK(ids_of(result) == alone);
  CHECK(result.n_accepted > 0);
  CHECK(result.n_accepted < result.n_drafted);
}

TEST_CASE("a score under packs is what generation under them says") {
  PackEngine tiny;
  open_all(tiny);
  const std::vector<PackUse> packs{{3, 0.5f}, {6, 1.0f}};
  const Ids prompt = random_ids(12, 40);
  RequestSpec spec = with_packs(greedy(prompt, 12), packs);
  spec.n_logprobs = 1;
  const RequestResult generated = finished(tiny.engine.submit(spec));
  Ids all = prompt;
  for (const GeneratedToken& token : generated.tokens) all.push_back(token.id);
  const TicketPtr beside = tiny.engine.submit(with_packs(greedy(prompt, 30), {{1, 1.0f}}));
  const RequestResult score = finished(tiny.engine.submit(with_packs(scoring(all), packs)));
  const RequestResult plain = finished(tiny.engine.submit(scoring(all)));
  finished(beside);
  REQUIRE(score.logprobs.size() == all.size() - 1);
  float difference = 0.0f;
  for (std::size_t i = 0; i < generated.tokens.size(); ++i) {
    const std::size_t at = prompt.size() - 1 + i;
    CHECK(std::abs(score.logprobs[at] - generated.tokens[i].logprob) < kTieGap);
    difference += std::abs(score.logprobs[at] - plain.logprobs[at]);
  }
  CHECK(difference > 1.0f);
  CHECK_FALSE(tiny.has_leases());
}

TEST_CASE("hidden states differ behind the first site, and not before") {
  PackEngine tiny;
  const GenerationId id = tiny.open(1, {.sites = {1}});
  const Ids prompt = random_ids(13, 40);
  for (const int layer : {0, 1, 2, 3}) {
    CAPTURE(layer);
    const RequestSpec spec = hidden_states(prompt, layer);
    const auto base = finished(tiny.engine.submit(spec)).hidden;
    const auto packed = finished(tiny.engine.submit(with_packs(spec, {{id, 1.0f}}))).hidden;
    REQUIRE(packed.size() == base.size());
    CHECK((packed == base) == (layer < 2));
    CHECK(finished(tiny.engine.submit(with_packs(spec, {{id, 1.0f}}))).hidden == packed);
  }
}

TEST_CASE("what makes no sense is refused by name") {
  PackEngine tiny, reference(with([](auto& o) { o.sites = "reference"; }));
  open_all(tiny);
  const RequestSpec plain = greedy(random_ids(1, 5), 2);
  const auto refused = [&](std::vector<PackUse> packs) {
    return refused_field(tiny.engine, with_packs(plain, std::move(packs)));
  };
  CHECK(refused({{1}, {2}, {3}, {4}, {5}}) == "packs");
  CHECK(refused({{1}, {1}}) == "packs");
  CHECK(refused({{1, -1.0f}}) == "packs weight");
  CHECK(refused({{1, NAN}}) == "packs weight");
  CHECK(refused({{1, 0.0f}, {2, 0.0f}}) == "accepted");
  CHECK(refused({{1, 3e38f}, {2, 3e38f}}) == "packs weight");
  RequestSpec best = with_packs(plain, {{1}, {2}});
  best.policy = MergePolicy::kBest;
  CHECK(refused_field(tiny.engine, best) == "accepted");
  CHECK(refused_field(reference.engine, best) == "policy");
  RequestSpec score = with_packs(scoring(random_ids(1, 5)), {{1}});
  score.activation = Activation::kFromHere;
  CHECK(refused_field(tiny.engine, score) == "activation");
  TinyEngine none(with([](auto& o) { o.pack_budget_bytes = 0; }));
  CHECK(refused_field(none.engine, with_packs(plain, {{1}})) == "packs");
  CHECK_THROWS_AS(none.engine.packs(), InvalidRequestError);
}
