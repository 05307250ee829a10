#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "modularbase/core/types.h"
#include "modularbase/sampling/sampling_params.h"

namespace modularbase {

// The steps of llama.cpp's default chain, with min_keep 0 and the steps that are off by default
// (DRY, top-n-sigma, XTC, dynamic temperature) left out:
//   logit_bias, penalties, top_k, typical_p, top_p, min_p, temperature, draw.
// Every step but the first two is a function of the candidates alone. Equal logits are ordered by
// ascending token id, where llama.cpp leaves the order open.

/// What logit_bias and the penalties do to one token.
struct TokenAdjustment {
  TokenId id;
  float bias;
  int count;  // times seen in the penalty window
};

struct Candidate {
  TokenId id;
  float logit;
  float p;  // set by softmax
};

struct Candidates {
  std::vector<Candidate> items;
  bool sorted = false;  // by falling logit, equal ones by rising id
};

/// The bias, then the repeat penalty, then the frequency and presence penalties.
float adjusted_logit(float logit, const TokenAdjustment& adjustment, const SamplingParams& params);

/// The logit a candidate needs for min_p, max being the largest.
float min_p_threshold(float max, float min_p);

// All below: candidates must not be empty and at least one logit must be finite; none is NaN or
// +infinity.

/// Sets every p.
void softmax(Candidates& candidates);
/// The k largest, sorted; k >= 1.
void keep_top_k(Candidates& candidates, std::size_t k);
/// The candidates whose surprise is nearest to the entropy, nearest first, until their
/// probabilities exceed typical_p. Source: Meister et al., "Locally Typical Sampling",
/// arXiv:2202.00666.
void keep_typical(Candidates& candidates, float typical_p);
/// The likeliest candidates, sorted, until their probabilities reach top_p.
void keep_top_p(Candidates& candidates, float top_p);
/// Drops what is less than min_p times as likely as the likeliest, keeping the order.
void keep_min_p(Candidates& candidates, float min_p);
/// Divides by the temperature, which must be above 0. The largest logit becomes 0, which leaves the
/// probabilities alone and keeps a tiny temperature from overflowing.
void apply_temperature(Candidates& candidates, float temperature);
/// The candidate at which the running sum of probabilities, in the order given, reaches uniform.
TokenId draw(Candidates& candidates, double uniform);
/// The largest logit; the lowest id among equals.
TokenId largest(const Candidates& candidates);

}  // namespace modularbase
