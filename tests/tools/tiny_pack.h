#pragma once

#include <ggml.h>

#include <random>
#include <string>
#include <vector>

#include "tools/gguf_writer.h"

namespace modularbase::testing {

/// What a random pack file is made of.
struct TinyPack {
  std::uint32_t n_embd = 64;
  std::uint32_t d_inner = 256;
  std::uint32_t d_ff = 256;
  std::uint32_t n_expert = 8;
  std::vector<std::uint32_t> sites = {1, 2};
  ggml_type adapter_type = GGML_TYPE_F16;
  ggml_type expert_type = GGML_TYPE_Q4_0;
  bool has_token_gate = true;
  std::uint32_t seed = 5;
};

inline Bytes random_weights(ggml_type type, std::int64_t n_in, std::int64_t n_rows,
                            std::mt19937& random) {
  std::normal_distribution<float> normal(0.0f, 0.1f);
  std::vector<float> values(static_cast<std::size_t>(n_in * n_rows));
  for (float& value : values) value = normal(random);
  Bytes bytes(ggml_row_size(type, n_in) * static_cast<std::size_t>(n_rows));
  ggml_quantize_chunk(type, values.data(), bytes.data(), 0, n_rows, n_in, nullptr);
  return bytes;
}

/// A sound pack with random weights; a test spoils what it wants to see refused.
inline GgufWriter tiny_pack_file(const TinyPack& pack = {}) {
  std::mt19937 random(pack.seed);
  GgufWriter writer;
  const std::string prefix = "modularbase-pack.";
  writer.add_string("general.architecture", "modularbase-pack");
  writer.add_u32(prefix + "format_version", 1);
  writer.add_u32(prefix + "n_embd", pack.n_embd);
  writer.add_u32(prefix + "d_inner", pack.d_inner);
  writer.add_u32(prefix + "d_ff", pack.d_ff);
  writer.add_u32(prefix + "n_expert", pack.n_expert);
  writer.add_u32(prefix + "n_expert_used", 2);
  writer.add_array<std::uint32_t>(prefix + "sites", kU32, pack.sites);
  writer.add_f32(prefix + "norm_eps", 1e-5f);
  writer.add_f32(prefix + "scale", 0.5f);
  writer.add_string(prefix + "manifest", "{}");
  for (std::size_t i = 0; i < pack.sites.size(); ++i) {
    const auto add = [&](const std::string& name, ggml_type type,
                         const std::vector<std::uint64_t>& ne) {
      std::uint64_t n_rows = 1;
      for (std::size_t d = 1; d < ne.size(); ++d) n_rows *= ne[d];
      writer.add_tensor("site." + std::to_string(i) + "." + name, static_cast<std::uint32_t>(type),
                        ne,
                        random_weights(type, static_cast<std::int64_t>(ne[0]),
                                       static_cast<std::int64_t>(n_rows), random));
    };
    const std::uint64_t n_embd = pack.n_embd, d_inner = pack.d_inner, d_ff = pack.d_ff;
    add("in.weight", pack.adapter_type, {n_embd, d_inner});
    add("norm.weight", GGML_TYPE_F32, {d_inner});
    add("router.weight", GGML_TYPE_F32, {d_inner, pack.n_expert});
    add("expert_gate.weight", pack.expert_type, {d_inner, d_ff, pack.n_expert});
    add("expert_up.weight", pack.expert_type, {d_inner, d_ff, pack.n_expert});
    add("expert_down.weight", pack.expert_type, {d_ff, d_inner, pack.n_expert});
    add("out.weight", pack.adapter_type, {d_inner, n_embd});
    if (!pack.has_token_gate) continue;
    add("token_gate.weight", GGML_TYPE_F32, {n_embd});
    add("token_gate.bias", GGML_TYPE_F32, {1});
  }
  return writer;
}

}  // namespace modularbase::testing
