// A layer whose key bias drowns what its keys say (as in some qwen2) keeps them in 8 bits.
#include <cmath>
#include <cstring>

#include "cpp/engine/tiny_engine.h"

using namespace modularbase;
using namespace modularbase::testing;

namespace {

constexpr std::size_t kPromptTokens = 600;  // a running sequence compacts 256 and more of them
constexpr float kLarge = 10.0f;

void multiply(testing::Tensor& tensor, float factor) {
  std::vector<float> values(tensor.data.size() / sizeof(float));
  std::memcpy(values.data(), tensor.data.data(), tensor.data.size());
  for (float& value : values) value *= factor;
  std::memcpy(tensor.data.data(), values.data(), tensor.data.size());
}

/// Layer 1 has ten times the key bias. The others look at the past, but nothing comes of it: so the
/// key biases of two can be large, too, to hide that of layer 1, and the model says the same.
Bytes model(bool is_hidden) {
  TinyShape shape;
  shape.family = "qwen2";
  shape.n_layer = 4;
  shape.n_ctx = 1024;
  TinyGguf gguf(shape);
  multiply(gguf.tensor("blk.1.attn_k.bias"), kLarge);
  for (const std::string layer : {"0", "2", "3"}) {
    multiply(gguf.tensor("blk." + layer + ".attn_output.weight"), 0.0f);
    if (is_hidden && layer != "0") multiply(gguf.tensor("blk." + layer + ".attn_k.bias"), kLarge);
  }
  return gguf.writer.image();
}

struct Run {
  Run(const Bytes& image, const std::string& kv) : file(image), engine(file.path(), of(kv)) {}
  static EngineOptions of(const std::string& kv) {
    EngineOptions options = tiny_options();
    options.kv = kv;
    options.pack_budget_bytes = 0;
    return options;
  }

  /// ln p of every token behind a prompt.
  std::vector<double> logprobs(unsigned seed) {
    RequestSpec spec = greedy(random_ids(seed, kPromptTokens), 1);
    spec.n_logprobs = TinyShape().n_vocab;
    const RequestResult result = finished(engine.submit(std::move(spec)));
    std::vector<double> of_token(TinyShape().n_vocab);
    for (const auto& top : result.tokens.at(0).top_logprobs) {
      of_token.at(static_cast<std::size_t>(top.id)) = top.logprob;
    }
    return of_token;
  }

  TempFile file;
  Engine engine;
};

double mean_divergence(Run& exact, Run& rounded) {
  constexpr unsigned kPrompts = 8;
  double sum = 0.0;
  for (unsigned seed = 0; seed < kPrompts; ++seed) {
    const std::vector<double> p = exact.logprobs(seed), q = rounded.logprobs(seed);
    for (std::size_t i = 0; i < p.size(); ++i) sum += std::exp(p[i]) * (p[i] - q[i]);
  }
  return sum / kPrompts;
}

std::size_t important_bytes(Run& run) {
  const ConversationId id = run.engine.open_conversation();
  RequestSpec spec = greedy(random_ids(1, kPromptTokens), 1);
  spec.conversation = id;
  finished(run.engine.submit(std::move(spec)));
  return run.engine.context_state(id).important_bytes;
}

}  // namespace

TEST_CASE("keys under a large bias are kept in 8 bits, and less is lost than with 4") {
  const Bytes plain = model(false), hidden = model(true);
  Run exact(plain, "f16"), wide(plain, "q4_0"), narrow(hidden, "q4_0");
  REQUIRE(exact.logprobs(0) == Run(hidden, "f16").logprobs(0));
  CHECK(important_bytes(wide) > important_bytes(narrow));
  const double wide_loss = mean_divergence(exact, wide);
  const double narrow_loss = mean_divergence(exact, narrow);
  MESSAGE("KL with 8 bits ", wide_loss, ", with 4 bits ", narrow_loss);
  CHECK(wide_loss > 0.0);
  CHECK(narrow_loss > 2.0 * wide_loss);
}
