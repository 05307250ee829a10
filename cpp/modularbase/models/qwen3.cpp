// Qwen3: split-half rotation, RMSNorm of every q and k head before it.
#include "modularbase/models/registry.h"

namespace modularbase {

void load_qwen3(Model& model, WeightLoader& weights) {
  ModelConfig& c = model.config;
  c.rope_style = kernels::RopeStyle::kNeox;
  load_decoder(model, weights);
  for (std::size_t i = 0; i < model.layers.size(); ++i) {
    Attention& attention = model.layers[i].attention;
    attention.q_norm = weights.vector(layer_tensor(i, "attn_q_norm.weight"), c.head_dim);
    attention.k_norm = weights.vector(layer_tensor(i, "attn_k_norm.weight"), c.head_dim);
  }
}

}  // namespace modularbase
