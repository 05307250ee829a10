#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "modularbase/core/types.h"

namespace modularbase {

/// Prompt-lookup drafting: where the request's own context has already seen how the text now ends,
/// proposes the tokens that followed then. Of the suffixes of max_ngram down to min_ngram tokens
/// the longest that occurs earlier counts, at its most recent occurrence. O(max_ngram) a token,
/// amortised. Source: Saxena, "Prompt Lookup Decoding", 2023.
class NgramDraft {
 public:
  /// \throws InvalidRequestError unless 1 <= min_ngram <= max_ngram <= 16 and 1 <= max_draft <=
  /// 1024.
  NgramDraft(int min_ngram, int max_ngram, int max_draft);

  void append(TokenId token);
  /// The proposed next tokens, none if the suffix is new or drafting rests. Valid until the next
  /// call.
  std::span<const TokenId> draft();
  /// How many of the proposed tokens were accepted; to be called after the step's tokens were
  /// appended. Full success doubles the next draft, failure shortens it to one more than was
  /// accepted; drafts that fail from the first token make drafting rest for 1, 3, 7, ... tokens, up
  /// to 31, until one succeeds again.
  /// \throws Error unless 0 <= accepted <= proposed.
  void report(int accepted, int proposed);

 private:
  /// Where each n-gram of one length ended last; open addressing, compared token by token.
  struct Index {
    int n;
    std::vector<std::int32_t> ends;  // -1: free
    std::size_t n_used = 0;
  };

  std::uint64_t hash_ending_at(std::size_t end, int n) const;
  std::size_t slot_of(const Index& index, std::size_t end) const;
  void remember(Index& index, std::size_t end);
  void grow(Index& index);

  std::vector<TokenId> tokens_;
  std::vector<Index> indexes_;  // longest n first
  std::vector<TokenId> draft_;
  int max_draft_;
  int next_length_;
  int rest_ = 0;       // tokens to let pass after the next total failure
  int n_resting_ = 0;  // tokens still to let pass
};

}  // namespace modularbase
