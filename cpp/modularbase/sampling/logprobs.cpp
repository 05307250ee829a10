#include "modularbase/sampling/logprobs.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "modularbase/core/errors.h"
#include "modularbase/sampling/exponential.h"
#include "modularbase/sampling/row_scan.h"

namespace modularbase {
namespace {

/// Sum of e^(logit - max); short runs in float for speed, their sums in double for accuracy.
double sum_exponentials(std::span<const float> logits, float max) {
  constexpr std::size_t kRun = 1024;
  double sum = 0.0;
  for (std::size_t begin = 0; begin < logits.size(); begin += kRun) {
    const std::size_t end = std::min(logits.size(), begin + kRun);
    float run = 0.0f;
#pragma omp simd reduction(+ : run)
    for (std::size_t i = begin; i < end; ++i) run += exp_nonpositive(logits[i] - max);
    sum += run;
  }
  return sum;
}

}  // namespace

RowLogprobs row_logprobs(std::span<const float> logits, TokenId chosen, std::size_t n_top) {
  if (chosen < 0 || static_cast<std::size_t>(chosen) >= logits.size()) {
    throw InvalidRequestError("token", "token ids below " + std::to_string(logits.size()),
                              std::to_string(chosen));
  }
  RowScan scan;
  scan.scan(logits);
  const double log_sum = scan.max() + std::log(sum_exponentials(logits, scan.max()));
  const auto logprob = [=](float logit) { return static_cast<float>(logit - log_sum); };
  RowLogprobs row{{chosen, logprob(logits[static_cast<std::size_t>(chosen)])}, {}};
  if (n_top == 0) return row;
  Candidates candidates;
  scan.collect({}, scan.reached_by(n_top), candidates);
  keep_top_k(candidates, n_top);
  for (const Candidate& c : candidates.items) row.top.push_back({c.id, logprob(c.logit)});
  return row;
}

}  // namespace modularbase
