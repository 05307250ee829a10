#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "modularbase/core/types.h"

namespace modularbase {

struct TokenLogprob {
  TokenId id;
  float logprob;
};

struct RowLogprobs {
  TokenLogprob chosen;
  std::vector<TokenLogprob> top;  // by falling logprob, equal ones by rising id
};

/// Log-softmax of a dense row [n_vocab] as the model gave it, before penalties, cuts and
/// temperature: the chosen token and the n_top largest.
/// \throws Error as Sampler::sample does. InvalidRequestError for a token outside the row.
RowLogprobs row_logprobs(std::span<const float> logits, TokenId chosen, std::size_t n_top);

}  // namespace modularbase
