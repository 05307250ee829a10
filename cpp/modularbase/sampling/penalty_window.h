#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "modularbase/core/types.h"

namespace modularbase {

struct TokenCount {
  TokenId id;
  int count;
};

/// How often each token occurs among the last n accepted.
class PenaltyWindow {
 public:
  explicit PenaltyWindow(std::size_t last_n);

  void accept(TokenId token);
  /// Every token of the window, by rising id.
  std::span<const TokenCount> counts() const { return counts_; }

 private:
  std::vector<TokenCount>::iterator find(TokenId token);

  std::size_t last_n_;
  std::size_t oldest_ = 0;
  std::vector<TokenId> ring_;
  std::vector<TokenCount> counts_;  // sorted: at this size moving beats hashing
};

}  // namespace modularbase
