#pragma once

#include <cstdint>
#include <map>
#include <optional>

#include "modularbase/core/types.h"

namespace modularbase {

/// How a request's tokens are chosen. Names, meanings and defaults are those of llama.cpp.
struct SamplingParams {
  float temperature = 0.8f;     // 0: greedy; the lowest id wins a tie
  int top_k = 40;               // keep the k largest; <= 0: off
  float top_p = 0.95f;          // keep the likeliest that together reach p; 1: off
  float min_p = 0.05f;          // keep what is at least p times as likely as the likeliest; 0: off
  float typical_p = 1.0f;       // keep the most typical that together exceed p; 1: off
  float repeat_penalty = 1.0f;  // divides positive, multiplies negative logits of seen tokens
  int repeat_last_n = 64;       // tokens, prompt included, the penalties look back at; 0: off
  float frequency_penalty = 0.0f;       // subtracted once for every time a token was seen
  float presence_penalty = 0.0f;        // subtracted from every token that was seen
  std::map<TokenId, float> logit_bias;  // added before all else; -infinity rules a token out
  std::optional<std::uint64_t> seed;    // absent: a random one

  /// \throws InvalidRequestError naming the first field that makes no sense.
  void validate(std::int64_t n_vocab) const;

  bool has_penalties() const {
    return repeat_last_n > 0 &&
           (repeat_penalty != 1.0f || frequency_penalty != 0.0f || presence_penalty != 0.0f);
  }
};

}  // namespace modularbase
