#include "modularbase/sampling/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "modularbase/core/errors.h"

namespace modularbase {
namespace {

constexpr std::int64_t kMaxShortlist = 512;  // beyond it the whole row costs no more
constexpr float kMaxDrop = 16.0f;
// Changing a logit and comparing it takes at most 8 float roundings, each off by 2^-9 for logits
// below 2^16.
constexpr float kRoundingSlack = 1.0f / 64.0f;

/// Without typical_p every cut keeps the largest logit, so greedy needs none of them.
bool is_argmax(const SamplingParams& params) {
  return params.temperature == 0.0f && params.typical_p >= 1.0f;
}

/// Only min_p cuts: it needs no sum over the vocabulary.
bool only_min_p(const SamplingParams& params) {
  return params.top_k <= 0 && params.typical_p >= 1.0f && params.top_p >= 1.0f &&
         params.min_p > 0.0f;
}

SamplingParams validated(const SamplingParams& params, std::int64_t n_vocab) {
  params.validate(n_vocab);
  return params;
}

}  // namespace

Sampler::Sampler(const SamplingParams& params, std::int64_t n_vocab)
    : params_(validated(params, n_vocab)),
      n_vocab_(n_vocab),
      seed_(params.seed ? *params.seed : random_seed()),
      random_(seed_),
      window_(params.has_penalties() ? static_cast<std::size_t>(params.repeat_last_n) : 0) {}

void Sampler::require_token(const char* field, TokenId token) const {
  if (token >= 0 && token < n_vocab_) return;
  throw InvalidRequestError(field, "token ids from 0 to " + std::to_string(n_vocab_ - 1),
                            std::to_string(token));
}

void Sampler::accept_prompt(std::span<const TokenId> prompt) {
  for (const TokenId token : prompt) require_token("prompt", token);
  const auto last_n = static_cast<std::size_t>(params_.repeat_last_n);
  for (const TokenId token : prompt.last(std::min(prompt.size(), last_n))) window_.accept(token);
  adjustments_stale_ = true;
}

void Sampler::accept(TokenId token) {
  require_token("token", token);
  window_.accept(token);
  adjustments_stale_ = true;
}

void Sampler::update_adjustments() {
  if (!adjustments_stale_) return;
  adjustments_stale_ = false;
  adjustments_.clear();
  auto bias = params_.logit_bias.begin();
  const auto bias_end = params_.logit_bias.end();
  for (const TokenCount& seen : window_.counts()) {
    for (; bias != bias_end && bias->first < seen.id; ++bias) {
      adjustments_.push_back({bias->first, bias->second, 0});
    }
    const bool both = bias != bias_end && bias->first == seen.id;
    adjustments_.push_back({seen.id, both ? bias->second : 0.0f, seen.count});
    if (both) ++bias;
  }
  for (; bias != bias_end; ++bias) adjustments_.push_back({bias->first, bias->second, 0});
}

/// The most by which bias and penalties can lower any logit; infinity where that depends on the
/// logit.
float Sampler::largest_fall(std::size_t n_draft) const {
  float fall = 0.0f;
  for (const TokenAdjustment& a : adjustments_) fall = std::max(fall, -a.bias);
  if (!params_.has_penalties() || (window_.counts().empty() && n_draft == 0)) return fall;
  if (params_.repeat_penalty > 1.0f) return std::numeric_limits<float>::infinity();
  int most = 0;
  for (const TokenCount& seen : window_.counts()) most = std::max(most, seen.count);
  return fall + std::max(0.0f, params_.presence_penalty) +
         std::max(0.0f, params_.frequency_penalty) *
             static_cast<float>(most + static_cast<int>(n_draft));
}

// Why the query suffices. Let F be the m tokens whose logits change; the others keep theirs.
//
// top_k, and greedy as k = 1: before a kept token outside F there are fewer than k tokens outside F
// and at most m of F, whatever their changes, so it is among the k + m largest of the row as it
// came. All later cuts act within the k kept, so nothing else is needed.
//
// min_p alone: let r be the largest logit as it came and d the most that F can fall. Then the
// largest after the changes is at least r - d, a kept token is at least r - d + ln(min_p), and
// outside F that is its logit as it came.
//
// A draft's tokens can only join F. Old ones may leave the window, but a larger F does no harm.
const HeadQuery& Sampler::head_query(std::span<const TokenId> draft) {
  update_adjustments();
  auto& forced = query_.forced;
  forced.clear();
  for (const TokenAdjustment& a : adjustments_) forced.push_back(a.id);
  if (params_.has_penalties() && !draft.empty()) {
    forced.insert(forced.end(), draft.begin(), draft.end());
    std::sort(forced.begin(), forced.end());
    forced.erase(std::unique(forced.begin(), forced.end()), forced.end());
  }
  query_.max_drop = 0.0f;
  std::int64_t top_k = 1;
  if (is_argmax(params_)) {
    top_k = 1 + std::ssize(forced);
  } else if (params_.top_k > 0) {
    top_k = params_.top_k + std::ssize(forced);
  } else if (only_min_p(params_)) {
    query_.max_drop = largest_fall(draft.size()) - std::log(params_.min_p) + kRoundingSlack;
  } else {
    top_k = n_vocab_;
  }
  query_.all =
      top_k > kMaxShortlist || std::ssize(forced) > kMaxShortlist || query_.max_drop > kMaxDrop;
  if (query_.all) query_.max_drop = 0.0f;
  query_.top_k = static_cast<int>(std::min(top_k, n_vocab_));
  return query_;
}

std::span<const float> Sampler::adjusted(const LogitsView& view) {
  const bool dense = view.ids.empty();
  const auto expected = dense ? static_cast<std::size_t>(n_vocab_) : view.ids.size();
  if (view.logits.size() != expected) {
    throw Error("logits: expected " + std::to_string(expected) + ", found " +
                std::to_string(view.logits.size()));
  }
  update_adjustments();
  if (adjustments_.empty()) return view.logits;
  row_.assign(view.logits.begin(), view.logits.end());
  for (const TokenAdjustment& a : adjustments_) {
    auto place = static_cast<std::size_t>(a.id);
    if (!dense) {
      const auto found = std::lower_bound(view.ids.begin(), view.ids.end(), a.id);
      if (found == view.ids.end() || *found != a.id) {
        throw Error("logits: the shortlist lacks token " + std::to_string(a.id) +
                    ", which the query asked for");
      }
      place = static_cast<std::size_t>(found - view.ids.begin());
    }
    row_[place] = adjusted_logit(row_[place], a, params_);
  }
  return row_;
}

/// Fills the candidates with those of the scanned row that the first cut keeps.
void Sampler::select(std::span<const TokenId> ids) {
  float threshold = -std::numeric_limits<float>::infinity();
  if (params_.top_k > 0) {
    threshold = scan_.reached_by(static_cast<std::size_t>(params_.top_k));
  } else if (only_min_p(params_)) {
    threshold = min_p_threshold(scan_.max(), params_.min_p);
  }
  scan_.collect(ids, threshold, candidates_);
  if (params_.top_k > 0) keep_top_k(candidates_, static_cast<std::size_t>(params_.top_k));
}

TokenId Sampler::sample(const LogitsView& view) {
  scan_.scan(adjusted(view));
  if (is_argmax(params_)) {
    const std::size_t place = scan_.argmax();
    return view.ids.empty() ? static_cast<TokenId>(place) : view.ids[place];
  }
  select(view.ids);
  keep_typical(candidates_, params_.typical_p);
  keep_top_p(candidates_, params_.top_p);
  keep_min_p(candidates_, params_.min_p);
  if (params_.temperature == 0.0f) return largest(candidates_);
  apply_temperature(candidates_, params_.temperature);
  return draw(candidates_, random_.uniform());
}

}  // namespace modularbase
