#include "modularbase/sampling/ngram_draft.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "modularbase/core/errors.h"

using namespace modularbase;

namespace {

using Ids = std::vector<TokenId>;

void append_all(NgramDraft& draft, const Ids& tokens) {
  for (const TokenId token : tokens) draft.append(token);
}

Ids drafted(NgramDraft& draft) {
  const auto tokens = draft.draft();
  return Ids(tokens.begin(), tokens.end());
}

/// Tries every length and every place.
Ids naive_draft(const Ids& tokens, int min_ngram, int max_ngram, std::size_t length) {
  for (std::ptrdiff_t n = max_ngram; n >= min_ngram; --n) {
    for (std::ptrdiff_t end = std::ssize(tokens) - 1; end >= n;
         --end) {  // one past the earlier n-gram
      if (!std::equal(tokens.end() - n, tokens.end(), tokens.begin() + end - n)) continue;
      Ids context = tokens, draft;
      for (std::size_t i = 0; i < length; ++i) {
        draft.push_back(context[static_cast<std::size_t>(end) + i]);
        context.push_back(draft.back());
      }
      return draft;
    }
  }
  return {};
}

}  // namespace

TEST_CASE("the longest suffix wins, at its most recent place") {
  NgramDraft draft(1, 3, 2);
  append_all(draft, {1, 2, 3, 10, 11, 9, 2, 3, 20, 21, 9, 3, 30, 31, 8, 1, 2, 3});
  CHECK(drafted(draft) == Ids{10, 11});
  NgramDraft shorter(1, 2, 2);
  append_all(shorter, {1, 2, 3, 10, 11, 9, 2, 3, 20, 21, 9, 3, 30, 31, 8, 1, 2, 3});
  CHECK(drafted(shorter) == Ids{20, 21});
}

TEST_CASE("a new suffix and an empty context draft nothing") {
  NgramDraft draft(2, 3, 4);
  CHECK(drafted(draft).empty());
  append_all(draft, {1, 2, 3, 4, 1});
  CHECK(drafted(draft).empty());
}

TEST_CASE("a loop is drafted at full length") {
  NgramDraft draft(1, 3, 4);
  append_all(draft, {5, 6, 5, 6, 5});
  CHECK(drafted(draft) == Ids{6, 5, 6, 5});
}

TEST_CASE("agrees with a search of the whole context") {
  std::mt19937 words(1);
  for (int round = 0; round < 40; ++round) {
    const int min_ngram = 1 + static_cast<int>(words() % 3);
    const int max_ngram = min_ngram + static_cast<int>(words() % 3);
    const auto n_kinds = 2 + words() % 12;
    NgramDraft draft(min_ngram, max_ngram, 4);
    Ids tokens;
    for (int i = 0; i < 400; ++i) {
      tokens.push_back(static_cast<TokenId>(words() % n_kinds));
      draft.append(tokens.back());
      REQUIRE(drafted(draft) == naive_draft(tokens, min_ngram, max_ngram, 4));
    }
  }
}

TEST_CASE("the length follows what is accepted") {
  NgramDraft draft(1, 2, 16);
  append_all(draft, Ids(10, 7));
  CHECK(drafted(draft).size() == 4);
  draft.report(4, 4);
  CHECK(drafted(draft).size() == 8);
  draft.report(8, 8);
  draft.report(16, 16);
  CHECK(drafted(draft).size() == 16);
  draft.report(2, 16);
  CHECK(drafted(draft).size() == 3);
}

TEST_CASE("drafting rests longer with every total failure, until a success") {
  NgramDraft draft(1, 2, 4);
  append_all(draft, Ids(10, 7));
  const auto n_until_next = [&] {
    int n = 0;
    for (; drafted(draft).empty(); ++n) draft.append(7);
    return n;
  };
  for (const int rest : {1, 3, 7, 15, 31, 31}) {
    draft.report(0, 1);
    CHECK(n_until_next() == rest);
  }
  CHECK(drafted(draft).size() == 1);
  draft.report(1, 1);
  CHECK(drafted(draft).size() == 2);
  draft.report(0, 2);
  CHECK(n_until_next() == 1);
}

TEST_CASE("senseless arguments are refused by name") {
  CHECK_THROWS_AS(NgramDraft(0, 3, 4), InvalidRequestError);
  CHECK_THROWS_AS(NgramDraft(3, 2, 4), InvalidRequestError);
  CHECK_THROWS_AS(NgramDraft(1, 17, 4), InvalidRequestError);
  CHECK_THROWS_AS(NgramDraft(1, 2, 0), InvalidRequestError);
  NgramDraft draft(1, 2, 4);
  CHECK_THROWS_AS(draft.report(3, 2), Error);
  CHECK_THROWS_AS(draft.report(-1, 2), Error);
}
