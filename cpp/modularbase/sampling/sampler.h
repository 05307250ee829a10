#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "modularbase/core/head_query.h"
#include "modularbase/core/types.h"
#include "modularbase/sampling/penalty_window.h"
#include "modularbase/sampling/random.h"
#include "modularbase/sampling/row_scan.h"
#include "modularbase/sampling/sampling_params.h"
#include "modularbase/sampling/steps.h"

namespace modularbase {

/// The logits a sampler sees: dense (ids empty, logits [n_vocab]) or the exact shortlist of a
/// certified head (ids ascending, logits in the same order).
struct LogitsView {
  std::span<const TokenId> ids;
  std::span<const float> logits;
};

/// Chooses one request's tokens by the chain in steps.h. The choice depends on the params, the
/// seed, the accepted tokens and the number of earlier calls, and is the same from a dense row as
/// from any shortlist that answers head_query(). Does not allocate once its buffers have grown.
class Sampler {
 public:
  /// \throws InvalidRequestError
  Sampler(const SamplingParams& params, std::int64_t n_vocab);

  /// The penalties look at the last repeat_last_n tokens, prompt included, as llama.cpp's server
  /// does.
  /// \throws InvalidRequestError for an id outside the vocabulary.
  void accept_prompt(std::span<const TokenId> prompt);
  /// What must be known exactly of the next row. With a draft, the answer also suffices for the
  /// rows after any beginning of the draft has been accepted. Valid until the next call.
  const HeadQuery& head_query(std::span<const TokenId> draft = {});
  /// Does not accept the token it returns.
  /// \throws Error if a logit is NaN or +infinity, if none is finite, or if the view cannot answer
  /// the query.
  TokenId sample(const LogitsView& view);
  void accept(TokenId token);

  /// The seed in use: the request's, or the random one it was given.
  std::uint64_t seed() const { return seed_; }

 private:
  void require_token(const char* field, TokenId token) const;
  void update_adjustments();
  float largest_fall(std::size_t n_draft) const;
  std::span<const float> adjusted(const LogitsView& view);
  void select(std::span<const TokenId> ids);

  SamplingParams params_;
  std::int64_t n_vocab_;
  std::uint64_t seed_;
  Random random_;
  PenaltyWindow window_;
  std::vector<TokenAdjustment> adjustments_;  // by rising id; of the tokens accepted so far
  bool adjustments_stale_ = true;
  HeadQuery query_;
  std::vector<float> row_;  // the logits after bias and penalties
  RowScan scan_;
  Candidates candidates_;
};

}  // namespace modularbase
