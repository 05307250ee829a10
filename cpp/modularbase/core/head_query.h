#pragma once

#include <vector>

#include "modularbase/core/types.h"

namespace modularbase {

/// What a sampler must know of one row of logits. The certified head returns exact logits for at
/// least these tokens; every token it leaves out is proven to be none of them.
struct HeadQuery {
  bool none = false;      // nothing: nobody samples from the row
  bool all = false;       // the whole row (logprobs, temperature sampling without a cut)
  int top_k = 1;          // the top_k largest logits
  float max_drop = 0.0f;  // and every token within max_drop of the largest (min_p: -temp-free ln p)
  std::vector<TokenId> forced;  // and these (penalised or biased tokens)
};

}  // namespace modularbase
