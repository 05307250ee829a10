#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <thread>
#include <vector>

#include "modularbase/engine/engine.h"
#include "tools/temp_file.h"
#include "tools/tiny_gguf.h"

namespace modularbase::testing {

using Ids = std::vector<TokenId>;

// Far longer than any request of these tests takes, even under a sanitizer on a busy machine.
inline constexpr std::chrono::minutes kPatience{5};
// Batches cut prompts differently, and tiles of rows round differently from single rows: logits
// may move by some 1e-4 (one rounding of an F16 key). A token whose runner-up is nearer may differ.
inline constexpr float kTieGap = 2e-3f;

/// One compute thread: ggml's threads spin for each other after every node, which takes seconds a
/// request when the machine has other work. Two groups of layers, of one layer each.
inline EngineOptions tiny_options() {
  EngineOptions options;
  options.dtype = "keep";
  options.n_threads = 1;
  options.first_site = 0;
  return options;
}

inline EngineOptions tiered(EngineOptions options = tiny_options()) {
  options.kv = "tiered";
  return options;
}

/// Two where there are two cores, for what threads may get wrong.
inline EngineOptions threaded(EngineOptions options = tiny_options()) {
  options.n_threads = std::thread::hardware_concurrency() > 1 ? 2 : 1;
  return options;
}

/// An engine on a tiny random model in a file of its own.
struct TinyEngine {
  explicit TinyEngine(const EngineOptions& options = tiny_options(), const TinyShape& shape = {})
      : file(TinyGguf(shape).writer.image()), engine(file.path(), options) {}
  TempFile file;
  Engine engine;
};

/// Options that leave room for exactly n KV blocks of the default tiny model (F16).
inline EngineOptions with_blocks(std::int64_t n, EngineOptions options = tiny_options()) {
  const TinyShape shape;
  const std::int64_t n_elements = 2 * shape.n_layer * shape.n_head_kv * shape.head_dim;
  const std::int64_t n_mid_bytes = std::int64_t{shape.n_embd} * 4;
  options.kv_budget_bytes = n * kernels::kBlockTokens * (n_elements * 2 + n_mid_bytes);
  return options;
}

inline Ids random_ids(unsigned seed, std::size_t n) {
  std::mt19937 random(seed);
  Ids ids(n);
  for (TokenId& id : ids) id = static_cast<TokenId>(random() % TinyShape().n_vocab);
  return ids;
}

inline RequestSpec greedy(Ids prompt, std::int64_t max_tokens) {
  RequestSpec spec;
  spec.prompt = std::move(prompt);
  spec.sampling.temperature = 0.0f;
  spec.max_tokens = max_tokens;
  return spec;
}

inline RequestSpec scoring(Ids prompt) {
  RequestSpec spec;
  spec.kind = RequestKind::kScore;
  spec.prompt = std::move(prompt);
  return spec;
}

inline RequestSpec hidden_states(Ids prompt, int layer, Pooling pooling = Pooling::kNone) {
  RequestSpec spec;
  spec.kind = RequestKind::kHidden;
  spec.prompt = std::move(prompt);
  spec.layer = layer;
  spec.pooling = pooling;
  return spec;
}

inline RequestResult finished(const TicketPtr& ticket) {
  REQUIRE(ticket->wait_finished(kPatience));
  return ticket->result();
}

inline Ids ids_of(const RequestResult& result) {
  Ids ids;
  for (const GeneratedToken& token : result.tokens) ids.push_back(token.id);
  return ids;
}

/// What a request gives when nothing else runs, and how many of its tokens come before the first
/// near tie. Draws count whole: see the tests that make them.
struct Alone {
  Ids ids;
  std::size_t n_sure = 0;
};

inline Alone run_alone(Engine& engine, RequestSpec spec, float tie_gap = kTieGap) {
  const bool draws = spec.sampling.temperature > 0.0f;
  spec.n_logprobs = 2;
  const RequestResult result = finished(engine.submit(std::move(spec)));
  Alone alone{ids_of(result)};
  for (const GeneratedToken& token : result.tokens) {
    const float gap = token.top_logprobs[0].logprob - token.top_logprobs[1].logprob;
    if (!draws && gap < tie_gap) break;
    ++alone.n_sure;
  }
  return alone;
}

/// Equal length, and equal tokens up to the first near tie.
inline bool same_tokens(const Ids& found, const Alone& alone) {
  return found.size() == alone.ids.size() &&
         std::equal(alone.ids.begin(),
                    alone.ids.begin() + static_cast<std::ptrdiff_t>(alone.n_sure), found.begin());
}

}  // namespace modularbase::testing
