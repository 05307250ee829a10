#include "modularbase/sampling/sampling_params.h"

#include <cmath>
#include <limits>
#include <sstream>
#include <string>

#include "modularbase/core/errors.h"

namespace modularbase {
namespace {

template <typename T>
std::string text(T value) {
  std::ostringstream out;
  out << value;
  return out.str();
}

/// Written so that NaN, which compares false to everything, is refused.
template <typename T>
void require_range(const char* field, T value, T lowest, T highest) {
  if (value >= lowest && value <= highest) return;
  throw InvalidRequestError(field, "a number from " + text(lowest) + " to " + text(highest),
                            text(value));
}

void require_bias(TokenId token, float bias, std::int64_t n_vocab) {
  const std::string field = "logit_bias[" + std::to_string(token) + "]";
  if (token < 0 || token >= n_vocab) {
    throw InvalidRequestError(field, "a token id below " + std::to_string(n_vocab),
                              std::to_string(token));
  }
  // -infinity is a ban; +infinity would leave nothing to compare.
  if (!(bias <= std::numeric_limits<float>::max())) {
    throw InvalidRequestError(field, "a finite number or -infinity", text(bias));
  }
}

}  // namespace

void SamplingParams::validate(std::int64_t n_vocab) const {
  if (n_vocab <= 0) {
    throw InvalidRequestError("n_vocab", "a positive number", std::to_string(n_vocab));
  }
  require_range("temperature", temperature, 0.0f, 100.0f);
  require_range("top_k", top_k, -1, std::numeric_limits<int>::max());
  require_range("top_p", top_p, 0.0f, 1.0f);
  require_range("min_p", min_p, 0.0f, 1.0f);
  require_range("typical_p", typical_p, 0.0f, 1.0f);
  require_range("repeat_penalty", repeat_penalty, 0.01f, 100.0f);
  require_range("repeat_last_n", repeat_last_n, 0, 1 << 20);
  require_range("frequency_penalty", frequency_penalty, -100.0f, 100.0f);
  require_range("presence_penalty", presence_penalty, -100.0f, 100.0f);
  for (const auto& [token, bias] : logit_bias) require_bias(token, bias, n_vocab);
}

}  // namespace modularbase
