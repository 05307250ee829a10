#include "modularbase/models/weights.h"

#include <doctest/doctest.h>

#include <cstring>

#include "modularbase/core/errors.h"
#include "modularbase/models/model.h"
#include "tools/temp_file.h"
#include "tools/tiny_gguf.h"

using namespace modularbase;
using testing::TinyGguf;
using testing::TinyShape;

namespace {

struct Loaded {
  explicit Loaded(const TinyGguf& gguf, DType dtype = DType::kKeep)
      : temp(gguf.writer.image()),
        file(GgufFile::open(temp.path())),
        backend("cpu", 1),
        model(load_model(file, backend, dtype)) {}
  testing::TempFile temp;
  GgufFile file;
  Backend backend;
  std::unique_ptr<Model> model;
};

/// What loading complains about: "field: expected / found".
template <typename Change>
std::string refused(Change change, const TinyShape& shape = {}, DType dtype = DType::kKeep) {
  TinyGguf gguf(shape);
  change(gguf);
  try {
    const Loaded loaded(gguf, dtype);
  } catch (const BaseLoadError& error) {
    return error.field + ": " + error.expected + " / " + error.found;
  }
  return "nothing";
}

std::string without(const std::string& name, const char* family = "llama") {
  return refused([&](TinyGguf& g) { g.remove_tensor(name); }, TinyShape{.family = family});
}

}  // namespace

TEST_CASE("every family loads what it needs, and only that") {
  const Loaded llama{TinyGguf()};
  CHECK(llama.model->layers.size() == 2);
  CHECK(llama.model->layers[0].attention.q.bias == nullptr);
  CHECK(llama.model->layers[0].attention.q_norm == nullptr);
  CHECK(llama.model->config.rope_style == kernels::RopeStyle::kNormal);
  const Loaded qwen2{TinyGguf({.family = "qwen2"})};
  CHECK(qwen2.model->layers[1].attention.v.bias != nullptr);
  CHECK(qwen2.model->config.rope_style == kernels::RopeStyle::kNeox);
  const Loaded qwen3{TinyGguf({.family = "qwen3"})};
  CHECK(qwen3.model->layers[1].attention.k_norm != nullptr);
  CHECK(qwen3.model->layers[1].attention.v.bias == nullptr);
}

TEST_CASE("the head is the embedding when the file has no other") {
  const Loaded tied{TinyGguf({.tied = true})};
  CHECK(tied.model->output.weight == tied.model->token_embd);
  const Loaded untied{TinyGguf()};
  CHECK(untied.model->output.weight != untied.model->token_embd);
}

TEST_CASE("kept weights stay in the file, converted ones do not") {
  const Loaded kept{TinyGguf()};
  CHECK(kept.model->memory.n_bytes_mapped == kept.model->memory.n_bytes);
  const GgufTensor* source = kept.file.find_tensor("blk.1.ffn_down.weight");
  REQUIRE(source);
  CHECK(kept.model->layers[1].feed_forward.down.weight->data ==
        kept.file.tensor_bytes(*source).data());

  const Loaded converted(TinyGguf(), DType::kF16);
  const ggml_tensor* weight = converted.model->layers[1].feed_forward.down.weight;
  CHECK(weight->type == GGML_TYPE_F16);
  const auto* from = reinterpret_cast<const float*>(
      converted.file.tensor_bytes(*converted.file.find_tensor("blk.1.ffn_down.weight")).data());
  const auto* to = static_cast<const ggml_fp16_t*>(weight->data);
  bool same = true;
  for (std::int64_t i = 0; i < ggml_nelements(weight); ++i) {
    same = same && to[i] == ggml_fp32_to_fp16(from[i]);
  }
  CHECK(same);
  CHECK(converted.model->output_norm->type == GGML_TYPE_F32);  // vectors always are
  CHECK(converted.model->memory.n_bytes < kept.model->memory.n_bytes);
}

TEST_CASE("a missing tensor is an error that names it") {
  for (const char* name : {"output_norm.weight", "blk.0.attn_norm.weight", "blk.1.attn_q.weight",
                           "blk.0.attn_k.weight", "blk.0.attn_v.weight", "blk.0.attn_output.weight",
                           "blk.0.ffn_norm.weight", "blk.0.ffn_gate.weight", "blk.1.ffn_up.weight",
                           "blk.1.ffn_down.weight"}) {
    CHECK(without(name) == std::string("tensor ") + name + ": present / missing");
  }
  CHECK(without("blk.1.attn_k.bias", "qwen2") == "tensor blk.1.attn_k.bias: present / missing");
  CHECK(without("blk.0.attn_q_norm.weight", "qwen3") ==
        "tensor blk.0.attn_q_norm.weight: present / missing");
}

TEST_CASE("a wrong shape is an error that names the tensor and both shapes") {
  const auto reshaped = [](const std::string& name, std::vector<std::uint64_t> ne) {
    return refused([&](TinyGguf& g) { g.tensor(name).ne = std::move(ne); });
  };
  CHECK(reshaped("blk.0.attn_q.weight", {128, 64}) ==
        "tensor blk.0.attn_q.weight shape: [64, 128, 1, 1] / [128, 64, 1, 1]");
  CHECK(reshaped("blk.1.ffn_norm.weight", {32, 2}) ==
        "tensor blk.1.ffn_norm.weight shape: [64, 1, 1, 1] / [32, 2, 1, 1]");
  CHECK(reshaped("output.weight", {64, 256, 2}) ==
        "tensor output.weight shape: [64, 512, 1, 1] / [64, 256, 2, 1]");
  CHECK(refused([](TinyGguf& g) { g.add_vector("rope_freqs.weight", 15, 1.0f); }) ==
        "tensor rope_freqs.weight shape: [16, 1, 1, 1] / [15, 1, 1, 1]");
}

TEST_CASE("a tensor that nothing reads is an error, and so is an unknown family") {
  CHECK(refused([](TinyGguf& g) { g.add_vector("blk.0.attn_q_norm.weight", 32, 1.0f); }) ==
        "tensor blk.0.attn_q_norm.weight: a tensor of this family / one that nothing reads");
  CHECK(refused([](TinyGguf&) {}, {.family = "gemma"}) ==
        "general.architecture: one of llama, qwen2, qwen3 / gemma");
}

TEST_CASE("a value too large for F16 is refused, not made infinite") {
  const auto huge = [](TinyGguf& g) {
    const float value = 65520.0f;  // the first that rounds to infinity
    std::memcpy(g.tensor("blk.0.ffn_up.weight").data.data(), &value, sizeof value);
  };
  CHECK(refused(huge, {}, DType::kF16) ==
        "tensor blk.0.ffn_up.weight: values within the range of F16 / "
        "a value that overflows (use bf16 or f32)");
  CHECK(refused(huge, {}, DType::kBF16) == "nothing");
}

TEST_CASE("dtypes have names") {
  CHECK(parse_dtype("auto") == DType::kAuto);
  CHECK(parse_dtype("bf16") == DType::kBF16);
  CHECK_THROWS_AS(parse_dtype("F16"), InvalidRequestError);
}
