// Llama 1-3, SmolLM2, TinyLlama, Mistral: adjacent-pair rotation, optional biases, llama 3's
// frequency divisors.
#include "modularbase/models/registry.h"

namespace modularbase {

void load_llama(Model& model, WeightLoader& weights) {
  ModelConfig& c = model.config;
  c.rope_style = kernels::RopeStyle::kNormal;
  load_decoder(model, weights);
  model.rope_factors = weights.optional_vector("rope_freqs.weight", c.rope_dim / 2);
  for (std::size_t i = 0; i < model.layers.size(); ++i) {
    Attention& attention = model.layers[i].attention;
    const std::int64_t kv_dim = c.n_head_kv * c.head_dim;
    attention.q.bias =
        weights.optional_vector(layer_tensor(i, "attn_q.bias"), c.n_head * c.head_dim);
    attention.k.bias = weights.optional_vector(layer_tensor(i, "attn_k.bias"), kv_dim);
    attention.v.bias = weights.optional_vector(layer_tensor(i, "attn_v.bias"), kv_dim);
    attention.output.bias = weights.optional_vector(layer_tensor(i, "attn_output.bias"), c.n_embd);
  }
}

}  // namespace modularbase
