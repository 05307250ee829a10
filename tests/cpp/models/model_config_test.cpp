#include "modularbase/models/model_config.h"

#include <doctest/doctest.h>

#include "modularbase/core/errors.h"
#include "tools/temp_file.h"
#include "tools/tiny_gguf.h"

using namespace modularbase;
using testing::TinyGguf;
using testing::TinyShape;

namespace {

ModelConfig config_of(const TinyGguf& gguf) {
  const testing::TempFile file(gguf.writer.image());
  return read_model_config(GgufFile::open(file.path()));
}

/// The field that reading a changed file complains about.
template <typename Change>
std::string refused(Change change) {
  TinyGguf gguf;
  change(gguf);
  try {
    config_of(gguf);
  } catch (const BaseLoadError& error) {
    return error.field;
  }
  return "nothing";
}

}  // namespace

TEST_CASE("the numbers of a model come from its metadata and its embedding") {
  const ModelConfig c = config_of(TinyGguf());
  const TinyShape shape;
  CHECK(c.family == "llama");
  CHECK(c.n_vocab == shape.n_vocab);
  CHECK(c.n_ctx_train == shape.n_ctx);
  CHECK(c.n_embd == shape.n_embd);
  CHECK(c.n_layer == shape.n_layer);
  CHECK(c.n_ff == shape.n_ff);
  CHECK(c.n_head == shape.n_head);
  CHECK(c.n_head_kv == shape.n_head_kv);
  CHECK(c.head_dim == shape.head_dim);
  CHECK(c.qkv_dim() == (4 + 2 * 2) * 32);
  CHECK(c.norm_eps == 1e-5f);
  CHECK(c.rope_dim == shape.head_dim);
  CHECK(c.rope_freq_base == 10000.0f);
  CHECK(c.rope_freq_scale == 1.0f);
}

TEST_CASE("what a file leaves out follows from the rest") {
  TinyGguf gguf;
  for (const char* name : {"attention.head_count_kv", "attention.key_length",
                           "attention.value_length", "rope.dimension_count", "rope.freq_base"}) {
    gguf.remove_entry(name);
  }
  const ModelConfig c = config_of(gguf);
  CHECK(c.n_head_kv == 4);
  CHECK(c.head_dim == 64 / 4);
  CHECK(c.rope_dim == 64 / 4);
  CHECK(c.rope_freq_base == 10000.0f);
}

TEST_CASE("linear rope scaling divides the frequencies, and only when it is asked for") {
  TinyGguf gguf;
  gguf.set_f32("rope.scaling.factor", 4.0f);
  CHECK(config_of(gguf).rope_freq_scale == 1.0f);
  gguf.writer.add_string("llama.rope.scaling.type", "linear");
  CHECK(config_of(gguf).rope_freq_scale == 0.25f);
}

TEST_CASE("missing and senseless numbers are refused by field") {
  const auto without = [](const char* name) {
    return refused([&](TinyGguf& g) { g.remove_entry(name); });
  };
  const auto with = [](const char* name, std::uint32_t value) {
    return refused([&](TinyGguf& g) { g.set_u32(name, value); });
  };
  for (const char* name :
       {"context_length", "embedding_length", "block_count", "feed_forward_length",
        "attention.head_count", "attention.layer_norm_rms_epsilon"}) {
    CHECK(without(name) == std::string("llama.") + name);
  }
  for (const char* name :
       {"context_length", "embedding_length", "block_count", "feed_forward_length",
        "attention.head_count", "attention.head_count_kv", "attention.key_length"}) {
    CHECK(with(name, 0) == std::string("llama.") + name);
  }
  CHECK(with("block_count", 1025) == "llama.block_count");
  CHECK(with("embedding_length", (1u << 24) + 1) == "llama.embedding_length");
  CHECK(with("attention.head_count_kv", 3) == "llama.attention.head_count_kv");
  CHECK(with("attention.head_count_kv", 8) == "llama.attention.head_count_kv");
  CHECK(with("attention.key_length", 257) == "llama.attention.key_length");
  CHECK(with("attention.value_length", 16) == "llama.attention.key_length");
  CHECK(with("rope.dimension_count", 33) == "llama.rope.dimension_count");
  CHECK(with("rope.dimension_count", 31) == "llama.rope.dimension_count");
  CHECK(with("expert_count", 8) == "llama.expert_count");
}

TEST_CASE("senseless fractions and unknown kinds are refused by field") {
  const auto with = [](const char* name, float value) {
    return refused([&](TinyGguf& g) { g.set_f32(name, value); });
  };
  CHECK(with("attention.layer_norm_rms_epsilon", -1.0f) ==
        "llama.attention.layer_norm_rms_epsilon");
  CHECK(with("attention.layer_norm_rms_epsilon", NAN) == "llama.attention.layer_norm_rms_epsilon");
  CHECK(with("rope.freq_base", 0.0f) == "llama.rope");
  CHECK(with("rope.freq_base", NAN) == "llama.rope");
  CHECK(refused([](TinyGguf& g) {
          g.writer.add_string("llama.rope.scaling.type", "linear");
          g.set_f32("rope.scaling.factor", 0.0f);
        }) == "llama.rope");
  CHECK(refused([](TinyGguf& g) { g.writer.add_string("llama.rope.scaling.type", "yarn"); }) ==
        "llama.rope.scaling.type");
  CHECK(refused([](TinyGguf& g) { g.remove_tensor("token_embd.weight"); }) ==
        "tensor token_embd.weight");
}
