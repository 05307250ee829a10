#include "modularbase/models/rope_frequencies.h"

#include <ggml-backend.h>

#include <cmath>
#include <cstddef>

namespace modularbase {

std::vector<float> rope_frequencies(const Model& model) {
  const ModelConfig& c = model.config;
  std::vector<float> factors(static_cast<std::size_t>(c.rope_dim / 2), 1.0f);
  if (model.rope_factors) {
    ggml_backend_tensor_get(model.rope_factors, factors.data(), 0, factors.size() * sizeof(float));
  }
  std::vector<float> frequencies(factors.size());
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(c.rope_dim);
    frequencies[i] = static_cast<float>(std::pow(static_cast<double>(c.rope_freq_base), exponent) *
                                        c.rope_freq_scale / factors[i]);
  }
  return frequencies;
}

}  // namespace modularbase
