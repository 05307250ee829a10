#pragma once

#include <memory>

#include "modularbase/models/model.h"

namespace modularbase {

/// A family fills the model's weights from the loader; one file a family.
void load_llama(Model& model, WeightLoader& weights);
void load_qwen2(Model& model, WeightLoader& weights);
void load_qwen3(Model& model, WeightLoader& weights);

/// What the families share: embeddings, output norm and head (tied when the file has no
/// output.weight), and the layers' norms and matrices without biases.
void load_decoder(Model& model, WeightLoader& weights);
std::string layer_tensor(std::size_t layer, const char* name);

}  // namespace modularbase
