#pragma once

#include <cstdint>
#include <string>

#include "modularbase/io/gguf_file.h"
#include "modularbase/kernels/attention.h"

namespace modularbase {

/// The numbers of a decoder-only transformer, read from GGUF metadata and checked against each
/// other.
struct ModelConfig {
  std::string family;  // general.architecture
  std::int64_t n_vocab = 0;
  std::int64_t n_ctx_train = 0;
  std::int64_t n_embd = 0;
  std::int64_t n_layer = 0;
  std::int64_t n_ff = 0;
  std::int64_t n_head = 0;
  std::int64_t n_head_kv = 0;
  std::int64_t head_dim = 0;
  float norm_eps = 0.0f;

  kernels::RopeStyle rope_style = kernels::RopeStyle::kNormal;
  std::int64_t rope_dim = 0;
  float rope_freq_base = 0.0f;
  float rope_freq_scale = 1.0f;  // 1 / linear scaling factor

  std::int64_t qkv_dim() const { return (n_head + 2 * n_head_kv) * head_dim; }
};

/// \throws BaseLoadError on a missing, ill-typed or inconsistent field.
ModelConfig read_model_config(const GgufFile& file);

}  // namespace modularbase
