#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "modularbase/core/types.h"
#include "modularbase/sampling/steps.h"

namespace modularbase {

/// One pass over a row of logits that keeps the largest of every 64: enough to find the largest
/// tokens of a whole vocabulary while reading only a few blocks again. Buffers are reused from row
/// to row.
class RowScan {
 public:
  /// Looks at a row, which must stay where it is while the methods below are used.
  /// \throws Error if a logit is NaN or +infinity (with their number) or all are -infinity.
  void scan(std::span<const float> logits);

  float max() const { return max_; }
  /// The first place of the largest logit.
  std::size_t argmax() const;
  /// A lower bound of the k-th largest logit, such that few more than k reach it. -infinity when k
  /// is large.
  float reached_by(std::size_t k);
  /// Replaces the candidates by all tokens whose logit reaches the threshold, in the order of the
  /// row. Empty ids: a token's id is its place.
  void collect(std::span<const TokenId> ids, float threshold, Candidates& candidates) const;

 private:
  std::span<const float> logits_;
  std::vector<float> block_max_;  // [ceil(n / 64)]
  std::vector<float> ranked_;     // a copy for reached_by to reorder
  float max_ = 0.0f;
};

}  // namespace modularbase
