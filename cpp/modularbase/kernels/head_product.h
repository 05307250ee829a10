#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "modularbase/kernels/certified_head.h"

namespace modularbase::kernels {

/// One row of x in the form the full product of this weight type reads it.
struct ProductInput {
  const float* x = nullptr;       // [n_embd]
  std::vector<std::byte> packed;  // x as the weight type's vec_dot takes it; unused with linear()
  std::vector<float>
      multiplied;  // [n_embd] the numbers that are multiplied with the weights: x as it was rounded
};

/// True if the product of this file can be computed for the weight type.
bool head_product_supported(ggml_type type);

void prepare_product_input(const HeadWeight& head, const float* x, ProductInput& input);

/// |computed logit - w . multiplied| <= this * |w| |multiplied|, for any order of summation.
double product_error(const HeadWeight& head);

/// Logits of a few tokens, bit for bit those of the full product.
void product_logits(const HeadWeight& head, const ProductInput& input, std::span<const TokenId> ids,
                    float* logits);

}  // namespace modularbase::kernels
