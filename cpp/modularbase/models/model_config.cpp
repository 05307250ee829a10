#include "modularbase/models/model_config.h"

#include "modularbase/core/errors.h"

namespace modularbase {
namespace {

// Far above any model this engine can hold, far below what could overflow a product of two of them.
constexpr std::int64_t kMaxDim = 1 << 24;
constexpr std::int64_t kMaxHeadDim = 256;  // the attention kernel's widest tile

void read_rope(const GgufFile& file, const std::string& prefix, ModelConfig& config) {
  config.rope_dim = file.optional_int(prefix + "rope.dimension_count", 2, config.head_dim)
                        .value_or(config.head_dim);
  config.rope_freq_base =
      static_cast<float>(file.optional_float(prefix + "rope.freq_base").value_or(10000.0));
  const std::string type = file.optional_string(prefix + "rope.scaling.type").value_or("none");
  if (type != "none" && type != "linear") {
    throw BaseLoadError(file.path(), prefix + "rope.scaling.type", "none or linear", type);
  }
  double factor = file.optional_float(prefix + "rope.scaling.factor").value_or(1.0);
  if (type == "none") factor = 1.0;
  if (!(factor > 0.0) || !(config.rope_freq_base > 0.0f)) {
    throw BaseLoadError(file.path(), prefix + "rope", "positive frequency base and scaling factor",
                        std::to_string(config.rope_freq_base) + ", " + std::to_string(factor));
  }
  config.rope_freq_scale = static_cast<float>(1.0 / factor);
  if (config.rope_dim % 2 != 0) {
    throw BaseLoadError(file.path(), prefix + "rope.dimension_count", "an even number",
                        std::to_string(config.rope_dim));
  }
}

void read_heads(const GgufFile& file, const std::string& prefix, ModelConfig& config) {
  config.n_head = file.required_int(prefix + "attention.head_count", 1, kMaxDim);
  config.n_head_kv = file.optional_int(prefix + "attention.head_count_kv", 1, config.n_head)
                         .value_or(config.n_head);
  if (config.n_head % config.n_head_kv != 0) {
    throw BaseLoadError(file.path(), prefix + "attention.head_count_kv",
                        "a divisor of head_count " + std::to_string(config.n_head),
                        std::to_string(config.n_head_kv));
  }
  config.head_dim = file.optional_int(prefix + "attention.key_length", 1, kMaxHeadDim)
                        .value_or(config.n_embd / config.n_head);
  const std::int64_t value_dim =
      file.optional_int(prefix + "attention.value_length", 1, kMaxHeadDim)
          .value_or(config.head_dim);
  if (config.head_dim < 1 || config.head_dim > kMaxHeadDim || value_dim != config.head_dim) {
    throw BaseLoadError(file.path(), prefix + "attention.key_length",
                        "equal key and value lengths in 1.." + std::to_string(kMaxHeadDim),
                        std::to_string(config.head_dim) + " and " + std::to_string(value_dim));
  }
}

std::int64_t vocabulary_size(const GgufFile& file) {
  const GgufTensor* embedding = file.find_tensor("token_embd.weight");
  if (!embedding) {
    throw BaseLoadError(file.path(), "tensor token_embd.weight", "present", "missing");
  }
  return embedding->ne[1];
}

}  // namespace

ModelConfig read_model_config(const GgufFile& file) {
  ModelConfig config;
  config.family = file.required_string("general.architecture");
  const std::string prefix = config.family + ".";
  if (file.optional_int(prefix + "expert_count", 0, kMaxDim).value_or(0) > 0) {
    throw BaseLoadError(file.path(), prefix + "expert_count", "0 (a dense model)",
                        "a mixture of experts");
  }
  config.n_vocab = vocabulary_size(file);
  config.n_ctx_train = file.required_int(prefix + "context_length", 1, INT32_MAX);
  config.n_embd = file.required_int(prefix + "embedding_length", 1, kMaxDim);
  config.n_layer = file.required_int(prefix + "block_count", 1, 1024);
  config.n_ff = file.required_int(prefix + "feed_forward_length", 1, kMaxDim);
  config.norm_eps =
      static_cast<float>(file.required_float(prefix + "attention.layer_norm_rms_epsilon"));
  if (!(config.norm_eps >= 0.0f && config.norm_eps < 1.0f)) {
    throw BaseLoadError(file.path(), prefix + "attention.layer_norm_rms_epsilon", "within [0, 1)",
                        std::to_string(config.norm_eps));
  }
  read_heads(file, prefix, config);
  read_rope(file, prefix, config);
  return config;
}

}  // namespace modularbase
