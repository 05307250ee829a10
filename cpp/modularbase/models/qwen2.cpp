// Qwen2 and Qwen2.5: split-half rotation, biases on q, k and v.
#include "modularbase/models/registry.h"

namespace modularbase {

void load_qwen2(Model& model, WeightLoader& weights) {
  ModelConfig& c = model.config;
  c.rope_style = kernels::RopeStyle::kNeox;
  load_decoder(model, weights);
  for (std::size_t i = 0; i < model.layers.size(); ++i) {
    Attention& attention = model.layers[i].attention;
    const std::int64_t kv_dim = c.n_head_kv * c.head_dim;
    attention.q.bias = weights.vector(layer_tensor(i, "attn_q.bias"), c.n_head * c.head_dim);
    attention.k.bias = weights.vector(layer_tensor(i, "attn_k.bias"), kv_dim);
    attention.v.bias = weights.vector(layer_tensor(i, "attn_v.bias"), kv_dim);
  }
}

}  // namespace modularbase
