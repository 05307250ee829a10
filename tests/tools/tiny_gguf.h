#pragma once

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "tools/gguf_writer.h"

namespace modularbase::testing {

/// A model small enough to run thousands of steps in a test, with every shape different.
struct TinyShape {
  std::string family = "llama";  // llama, qwen2 (biases) or qwen3 (q and k norms)
  std::uint32_t n_vocab = 512;
  std::uint32_t n_ctx = 512;
  std::uint32_t n_embd = 64;
  std::uint32_t n_layer = 2;
  std::uint32_t n_ff = 96;
  std::uint32_t n_head = 4;
  std::uint32_t n_head_kv = 2;
  std::uint32_t head_dim = 32;
  bool tied = false;
  unsigned seed = 1;
};

/// Random F32 weights, with metadata but without a tokenizer: the C++ engine works on token ids.
class TinyGguf {
 public:
  explicit TinyGguf(const TinyShape& shape = {}) : shape_(shape), random_(shape.seed) {
    add_metadata();
    // Logits with a standard deviation near 2: a peaked distribution, as real ones are.
    add_matrix("token_embd.weight", shape.n_embd, shape.n_vocab, 0.25f);
    add_vector("output_norm.weight", shape.n_embd, 1.0f);
    if (!shape.tied) add_matrix("output.weight", shape.n_embd, shape.n_vocab, 0.25f);
    for (std::uint32_t layer = 0; layer < shape.n_layer; ++layer) add_layer(layer);
  }

  GgufWriter writer;

  testing::Tensor& tensor(const std::string& name) { return writer.tensor(name); }
  void remove_tensor(const std::string& name) { writer.remove_tensor(name); }
  void set_u32(const std::string& name, std::uint32_t value) {
    remove_entry(name);
    writer.add_u32(shape_.family + "." + name, value);
  }
  void set_f32(const std::string& name, float value) {
    remove_entry(name);
    writer.add_f32(shape_.family + "." + name, value);
  }
  void remove_entry(const std::string& name) { writer.remove_entry(shape_.family + "." + name); }
  void add_matrix(std::string name, std::uint32_t n_in, std::uint32_t n_out, float sigma) {
    add(std::move(name), {n_in, n_out}, 0.0f, sigma);
  }
  void add_vector(std::string name, std::uint32_t n, float mean) {
    add(std::move(name), {n}, mean, 0.3f);
  }

 private:
  void add_metadata() {
    writer.add_string("general.architecture", shape_.family);
    set_u32("context_length", shape_.n_ctx);
    set_u32("embedding_length", shape_.n_embd);
    set_u32("block_count", shape_.n_layer);
    set_u32("feed_forward_length", shape_.n_ff);
    set_u32("attention.head_count", shape_.n_head);
    set_u32("attention.head_count_kv", shape_.n_head_kv);
    set_u32("attention.key_length", shape_.head_dim);
    set_u32("attention.value_length", shape_.head_dim);
    set_f32("attention.layer_norm_rms_epsilon", 1e-5f);
    set_u32("rope.dimension_count", shape_.head_dim);
    set_f32("rope.freq_base", 10000.0f);
  }

  void add_layer(std::uint32_t layer) {
    const std::string prefix = "blk." + std::to_string(layer) + ".";
    const TinyShape& s = shape_;
    const std::uint32_t q_dim = s.n_head * s.head_dim;
    const std::uint32_t kv_dim = s.n_head_kv * s.head_dim;
    add_vector(prefix + "attn_norm.weight", s.n_embd, 1.0f);
    add_matrix(prefix + "attn_q.weight", s.n_embd, q_dim, 0.2f);
    add_matrix(prefix + "attn_k.weight", s.n_embd, kv_dim, 0.2f);
    add_matrix(prefix + "attn_v.weight", s.n_embd, kv_dim, 0.2f);
    add_matrix(prefix + "attn_output.weight", q_dim, s.n_embd, 0.1f);
    add_vector(prefix + "ffn_norm.weight", s.n_embd, 1.0f);
    add_matrix(prefix + "ffn_gate.weight", s.n_embd, s.n_ff, 0.2f);
    add_matrix(prefix + "ffn_up.weight", s.n_embd, s.n_ff, 0.2f);
    add_matrix(prefix + "ffn_down.weight", s.n_ff, s.n_embd, 0.1f);
    if (s.family == "qwen2") {
      add_vector(prefix + "attn_q.bias", q_dim, 0.0f);
      add_vector(prefix + "attn_k.bias", kv_dim, 0.0f);
      add_vector(prefix + "attn_v.bias", kv_dim, 0.0f);
    }
    if (s.family == "qwen3") {
      add_vector(prefix + "attn_q_norm.weight", s.head_dim, 1.0f);
      add_vector(prefix + "attn_k_norm.weight", s.head_dim, 1.0f);
    }
  }

  void add(std::string name, std::vector<std::uint64_t> ne, float mean, float sigma) {
    std::size_t n = 1;
    for (const std::uint64_t dim : ne) n *= dim;
    std::normal_distribution<float> normal(mean, sigma);
    std::vector<float> values(n);
    for (float& value : values) value = normal(random_);
    writer.add_f32_tensor(std::move(name), std::move(ne), values);
  }

  TinyShape shape_;
  std::mt19937 random_;
};

}  // namespace modularbase::testing
