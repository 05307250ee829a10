#include "modularbase/sampling/logprobs.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>

#include "modularbase/core/errors.h"
#include "modularbase/sampling/exponential.h"
#include "modularbase/sampling/row_scan.h"

namespace modularbase {
namespace {

/// Sum of e^(logit - max): lanes for speed, short runs of them in float for accuracy.
double sum_exponentials(std::span<const float> logits, float max) {
  constexpr std::size_t kLanes = 16;
  constexpr std::size_t kRun = 64 * kLanes;
  double sum = 0.0;
  while (logits.size() >= kLanes) {
    const std::size_t n = std::min(kRun, logits.size() / kLanes * kLanes);
    std::array<float, kLanes> partial{};
    for (std::size_t i = 0; i < n; i += kLanes) {
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        partial[lane] += exp_nonpositive(logits[i + lane] - max);
      }
    }
    for (const float part : partial) sum += part;
    logits = logits.subspan(n);
  }
  for (const float logit : logits) sum += exp_nonpositive(logit - max);
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
