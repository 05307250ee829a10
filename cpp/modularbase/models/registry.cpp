#include "modularbase/models/registry.h"

#include "modularbase/core/errors.h"

namespace modularbase {
namespace {

struct Family {
  const char* name;  // general.architecture
  void (*load)(Model& model, WeightLoader& weights);
};
constexpr Family kFamilies[] = {
    {"llama", load_llama},
    {"qwen2", load_qwen2},
    {"qwen3", load_qwen3},
};

const Family& find_family(const GgufFile& file) {
  const std::string name = file.required_string("general.architecture");
  std::string known;
  for (const Family& family : kFamilies) {
    if (name == family.name) return family;
    known += known.empty() ? family.name : std::string(", ") + family.name;
  }
  throw BaseLoadError(file.path(), "general.architecture", "one of " + known, name);
}

}  // namespace

std::string layer_tensor(std::size_t layer, const char* name) {
  return "blk." + std::to_string(layer) + "." + name;
}

void load_decoder(Model& model, WeightLoader& weights) {
  const ModelConfig& c = model.config;
  const std::int64_t q_dim = c.n_head * c.head_dim;
  const std::int64_t kv_dim = c.n_head_kv * c.head_dim;
  model.token_embd = weights.matrix("token_embd.weight", c.n_embd, c.n_vocab);
  model.output_norm = weights.vector("output_norm.weight", c.n_embd);
  model.output.weight = weights.optional_matrix("output.weight", c.n_embd, c.n_vocab);
  if (!model.output.weight) model.output.weight = model.token_embd;
  model.layers.resize(static_cast<std::size_t>(c.n_layer));
  for (std::size_t i = 0; i < model.layers.size(); ++i) {
    Attention& attention = model.layers[i].attention;
    attention.norm = weights.vector(layer_tensor(i, "attn_norm.weight"), c.n_embd);
    attention.q.weight = weights.matrix(layer_tensor(i, "attn_q.weight"), c.n_embd, q_dim);
    attention.k.weight = weights.matrix(layer_tensor(i, "attn_k.weight"), c.n_embd, kv_dim);
    attention.v.weight = weights.matrix(layer_tensor(i, "attn_v.weight"), c.n_embd, kv_dim);
    attention.output.weight =
        weights.matrix(layer_tensor(i, "attn_output.weight"), q_dim, c.n_embd);
    FeedForward& ffn = model.layers[i].feed_forward;
    ffn.norm = weights.vector(layer_tensor(i, "ffn_norm.weight"), c.n_embd);
    ffn.gate.weight = weights.matrix(layer_tensor(i, "ffn_gate.weight"), c.n_embd, c.n_ff);
    ffn.up.weight = weights.matrix(layer_tensor(i, "ffn_up.weight"), c.n_embd, c.n_ff);
    ffn.down.weight = weights.matrix(layer_tensor(i, "ffn_down.weight"), c.n_ff, c.n_embd);
  }
}

std::unique_ptr<Model> load_model(const GgufFile& file, const Backend& backend, DType dtype) {
  const Family& family = find_family(file);
  auto model = std::make_unique<Model>();
  model->config = read_model_config(file);
  WeightLoader weights(file, backend, dtype);
  family.load(*model, weights);
  model->memory = weights.finish();
  return model;
}

}  // namespace modularbase
