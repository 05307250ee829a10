#include "modularbase/sampling/steps.h"

#include <algorithm>
#include <cmath>

#include "modularbase/sampling/exponential.h"

namespace modularbase {
namespace {

bool larger(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

float max_logit(const Candidates& candidates) {
  const auto& items = candidates.items;
  if (candidates.sorted) return items.front().logit;
  float max = items.front().logit;
  for (const Candidate& c : items) max = c.logit > max ? c.logit : max;
  return max;
}

/// Sets p to e^(logit - max) and returns their sum.
double exponentiate(Candidates& candidates) {
  const float max = max_logit(candidates);
  for (Candidate& c : candidates.items) c.p = exp_nonpositive(c.logit - max);
  double sum = 0.0;
  for (const Candidate& c : candidates.items) sum += c.p;
  return sum;
}

/// Keeps the candidates that come first in the order until their probabilities suffice. A heap,
/// since often few of a whole vocabulary are kept: O(n + kept log n).
template <typename Before, typename Suffices>
void keep_until(std::vector<Candidate>& items, Before before, Suffices suffices) {
  const auto after = [&](const Candidate& a, const Candidate& b) { return before(b, a); };
  std::make_heap(items.begin(), items.end(), after);
  auto heap_end = items.end();
  double sum = 0.0;
  do {
    std::pop_heap(items.begin(), heap_end, after);
    sum += (--heap_end)->p;
  } while (heap_end != items.begin() && !suffices(sum));
  std::reverse(heap_end, items.end());
  items.erase(items.begin(), heap_end);
}

}  // namespace

float adjusted_logit(float logit, const TokenAdjustment& adjustment, const SamplingParams& params) {
  logit += adjustment.bias;
  if (adjustment.count == 0) return logit;
  logit = logit <= 0.0f ? logit * params.repeat_penalty : logit / params.repeat_penalty;
  return logit - (static_cast<float>(adjustment.count) * params.frequency_penalty +
                  params.presence_penalty);
}

float min_p_threshold(float max, float min_p) {
  return max + std::log(min_p);
}

void softmax(Candidates& candidates) {
  const double scale = 1.0 / exponentiate(candidates);
  for (Candidate& c : candidates.items) c.p = static_cast<float>(c.p * scale);
}

void keep_top_k(Candidates& candidates, std::size_t k) {
  auto& items = candidates.items;
  if (!candidates.sorted) {
    if (k < items.size()) {
      std::nth_element(items.begin(), items.begin() + static_cast<std::ptrdiff_t>(k), items.end(),
                       larger);
      items.resize(k);
    }
    std::sort(items.begin(), items.end(), larger);
    candidates.sorted = true;
  }
  if (k < items.size()) items.resize(k);
}

void keep_typical(Candidates& candidates, float typical_p) {
  if (typical_p >= 1.0f) return;
  softmax(candidates);
  // With p = e^logit / Z, surprise is ln Z - logit and entropy is ln Z - the expected logit: their
  // distance is that of the logit from the expected logit.
  const double max = max_logit(candidates);
  double expected = 0.0;
  for (const Candidate& c : candidates.items) {
    if (c.p > 0.0f) expected += c.p * (c.logit - max);
  }
  const auto distance = [=](const Candidate& c) { return std::fabs(c.logit - max - expected); };
  keep_until(
      candidates.items,
      [&](const Candidate& a, const Candidate& b) {
        const double at_a = distance(a), at_b = distance(b);
        return at_a != at_b ? at_a < at_b : larger(a, b);
      },
      [=](double sum) { return sum > typical_p; });
  candidates.sorted = false;
}

void keep_top_p(Candidates& candidates, float top_p) {
  if (top_p >= 1.0f) return;
  softmax(candidates);
  const auto suffices = [=](double sum) { return sum >= top_p; };
  auto& items = candidates.items;
  if (!candidates.sorted) {
    keep_until(items, larger, suffices);
    candidates.sorted = true;
    return;
  }
  double sum = 0.0;
  const auto last = std::find_if(items.begin(), items.end(),
                                 [&](const Candidate& c) { return suffices(sum += c.p); });
  if (last != items.end()) items.erase(last + 1, items.end());
}

void keep_min_p(Candidates& candidates, float min_p) {
  if (min_p <= 0.0f) return;
  const float threshold = min_p_threshold(max_logit(candidates), min_p);
  std::erase_if(candidates.items, [=](const Candidate& c) { return c.logit < threshold; });
}

void apply_temperature(Candidates& candidates, float temperature) {
  const float max = max_logit(candidates);
  for (Candidate& c : candidates.items) c.logit = (c.logit - max) / temperature;
}

TokenId draw(Candidates& candidates, double uniform) {
  const double target = exponentiate(candidates) * uniform;
  double sum = 0.0;
  TokenId last = candidates.items.front().id;
  for (const Candidate& c : candidates.items) {
    if (c.p <= 0.0f) continue;  // never a token that was ruled out, even for uniform = 0
    sum += c.p;
    last = c.id;
    if (sum >= target) break;
  }
  return last;
}

TokenId largest(const Candidates& candidates) {
  const auto& items = candidates.items;
  return std::min_element(items.begin(), items.end(), larger)->id;
}

}  // namespace modularbase
