#include "modularbase/kv/prefix_index.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <random>

using namespace modularbase;

namespace {

constexpr std::int64_t kBlock = 4;

std::vector<BlockId> take(BlockPool& pool, std::size_t n) {
  std::vector<BlockId> blocks;
  for (std::size_t i = 0; i < n; ++i) blocks.push_back(pool.allocate().value());
  return blocks;
}

void give_back(BlockPool& pool, const std::vector<BlockId>& blocks) {
  for (const BlockId block : blocks) pool.release(block);
}

std::vector<PrefixKey> range(PrefixKey first, std::size_t n) {
  std::vector<PrefixKey> tokens(n);
  for (std::size_t i = 0; i < n; ++i) tokens[i] = first + i;
  return tokens;
}

}  // namespace

TEST_CASE("whole blocks are shared, the partly matching one is offered for copying") {
  KvBudget budget(8);
  BlockPool pool(8, 1, budget);
  PrefixIndex index(pool, kBlock);
  const auto tokens = range(0, 10);
  const auto blocks = take(pool, 3);
  index.insert(tokens, blocks);

  const PrefixMatch match = index.match(range(0, 7));
  CHECK(match.shared == std::vector<BlockId>{blocks[0]});
  CHECK(match.partial == blocks[1]);
  CHECK(match.n_partial == 3);
  CHECK(pool.n_holders(blocks[0]) == 3);  // the writer, the index, this match
  CHECK(pool.n_holders(blocks[1]) == 2);  // the writer, the index
}

TEST_CASE("nothing is shared between different prefixes") {
  KvBudget budget(8);
  BlockPool pool(8, 1, budget);
  PrefixIndex index(pool, kBlock);
  index.insert(range(0, 8), take(pool, 2));
  auto other = range(0, 8);
  other[0] = 99;
  const PrefixMatch match = index.match(other);
  CHECK(match.shared.empty());
  CHECK(match.n_partial == 0);
}

TEST_CASE("nothing is shared between different contexts, whatever the tokens") {
  CHECK(prefix_key(0, 5) == 5);
  CHECK(prefix_key(7, -1) == 0x7ffffffff);  // a token never reaches into the context
  KvBudget budget(8);
  BlockPool pool(8, 1, budget);
  PrefixIndex index(pool, kBlock);
  const auto keys = [](std::uint32_t context) {
    std::vector<PrefixKey> found;
    for (TokenId token = 0; token < 6; ++token) {
      found.push_back(prefix_key(token < 5 ? 0 : context, token));
    }
    return found;
  };
  index.insert(keys(1), take(pool, 2));
  CHECK(index.match(keys(1)).n_partial == 2);
  CHECK(index.match(keys(2)).n_partial == 1);  // as far as both were without a context
  CHECK(index.match(keys(2)).shared.size() == 1);
}

TEST_CASE("a longer continuation takes the place of a partly filled leaf") {
  KvBudget budget(8);
  BlockPool pool(8, 1, budget);
  PrefixIndex index(pool, kBlock);
  const auto shorter = take(pool, 1);
  index.insert(range(0, 2), shorter);
  const auto longer = take(pool, 1);
  index.insert(range(0, 3), longer);
  CHECK(index.n_blocks() == 1);
  CHECK(pool.n_holders(shorter[0]) == 1);
  CHECK(index.match(range(0, 3)).partial == longer[0]);
}

TEST_CASE("the least recently used leaf goes first, and never a block someone holds") {
  KvBudget budget(3);
  BlockPool pool(3, 1, budget);
  PrefixIndex index(pool, kBlock);
  const auto a = take(pool, 1);
  index.insert(range(0, 4), a);
  const auto b = take(pool, 1);
  index.insert(range(100, 4), b);
  const auto held = take(pool, 1);
  index.insert(range(200, 4), held);
  give_back(pool, a);
  give_back(pool, b);
  index.match(range(0, 2));  // partial: touches a without holding it
  CHECK(index.evict_one());
  CHECK(pool.n_holders(b[0]) == 0);
  CHECK(index.evict_one());
  CHECK(pool.n_holders(a[0]) == 0);
  CHECK(!index.evict_one());
  CHECK(pool.n_holders(held[0]) == 2);
}

TEST_CASE("a block that nobody holds goes although others behind it are held") {
  KvBudget budget(8);
  BlockPool pool(8, 1, budget);
  PrefixIndex index(pool, kBlock);
  const auto blocks = take(pool, 4);
  index.insert(range(0, 16), blocks);
  pool.release(blocks[0]);  // as when a sequence's first blocks were compacted
  pool.release(blocks[1]);
  CHECK(index.evict_one());
  CHECK(index.n_blocks() == 1);  // the two behind it are out of reach
  CHECK(pool.n_free() == 5);
  CHECK(index.evict_one());
  CHECK(index.n_blocks() == 0);
  CHECK(pool.n_free() == 6);
  CHECK(pool.n_holders(blocks[3]) == 1);
  CHECK_FALSE(index.evict_one());
}

TEST_CASE("clear forgets everything, also blocks that someone holds") {
  KvBudget budget(8);
  BlockPool pool(8, 1, budget);
  PrefixIndex index(pool, kBlock);
  const auto blocks = take(pool, 3);
  index.insert(range(0, 12), blocks);
  index.clear();
  CHECK(index.n_blocks() == 0);
  CHECK(index.match(range(0, 12)).shared.empty());
  CHECK(pool.n_free() == 5);  // the writer still holds its own
  give_back(pool, blocks);
  CHECK(pool.n_free() == 8);
}

TEST_CASE("random inserts, matches and evictions: what is shared holds exactly those tokens") {
  // Each block remembers what its writer put there; a match must only return blocks whose content
  // is the prefix asked for, and the pool must end empty.
  KvBudget budget(64);
  BlockPool pool(64, 1, budget);
  PrefixIndex index(pool, kBlock);
  std::map<BlockId, std::vector<PrefixKey>> content;
  std::mt19937 random(7);
  for (int round = 0; round < 3000; ++round) {
    std::vector<PrefixKey> tokens(1 + random() % 20);
    for (PrefixKey& token : tokens) token = static_cast<PrefixKey>(random() % 2);
    const PrefixMatch match = index.match(tokens);
    std::size_t at = 0;
    for (const BlockId block : match.shared) {
      const std::vector<PrefixKey> expected(
          tokens.begin() + static_cast<std::ptrdiff_t>(at),
          tokens.begin() + static_cast<std::ptrdiff_t>(at + kBlock));
      REQUIRE(content[block] == expected);
      at += kBlock;
    }
    for (std::int64_t i = 0; i < match.n_partial; ++i) {
      REQUIRE(content[match.partial][static_cast<std::size_t>(i)] ==
              tokens[at + static_cast<std::size_t>(i)]);
    }
    std::vector<BlockId> blocks = match.shared;
    bool complete = true;
    while (blocks.size() * kBlock < tokens.size()) {
      auto block = pool.allocate();
      if (!block && index.evict_one()) block = pool.allocate();
      if (!block) {
        complete = false;
        break;
      }
      const std::size_t first = blocks.size() * kBlock;
      const std::size_t last = std::min(tokens.size(), first + kBlock);
      content[*block].assign(tokens.begin() + static_cast<std::ptrdiff_t>(first),
                             tokens.begin() + static_cast<std::ptrdiff_t>(last));
      blocks.push_back(*block);
    }
    if (complete) index.insert(tokens, blocks);
    give_back(pool, blocks);
  }
  index.clear();
  CHECK(index.n_blocks() == 0);
  CHECK(pool.n_free() == 64);
}
