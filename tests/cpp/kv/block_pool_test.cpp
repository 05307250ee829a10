#include "modularbase/kv/block_pool.h"

#include <doctest/doctest.h>

#include <set>

#include "modularbase/core/errors.h"

using namespace modularbase;

TEST_CASE("every block is handed out once, then none") {
  KvBudget budget(5);
  BlockPool pool(5, 1, budget);
  std::set<BlockId> blocks;
  for (int i = 0; i < 5; ++i) blocks.insert(pool.allocate().value());
  CHECK(blocks.size() == 5);
  CHECK(!pool.allocate());
  CHECK(pool.n_free() == 0);
}

TEST_CASE("a block is free again only when its last holder lets go") {
  KvBudget budget(1);
  BlockPool pool(1, 1, budget);
  const BlockId block = pool.allocate().value();
  pool.retain(block);
  pool.release(block);
  CHECK(!pool.allocate());
  pool.release(block);
  CHECK(pool.allocate() == block);
}

TEST_CASE("misuse is an error, not a corrupted pool") {
  KvBudget budget(2);
  BlockPool pool(2, 1, budget);
  CHECK_THROWS_AS(pool.release(0), Error);
  CHECK_THROWS_AS(pool.retain(1), Error);
  CHECK(pool.n_free() == 2);
}

TEST_CASE("blocks of several pools share a budget in bytes") {
  KvBudget budget(100);
  BlockPool large(8, 40, budget);
  BlockPool small(8, 15, budget);
  const auto first = large.allocate();
  REQUIRE(large.allocate());
  CHECK_FALSE(large.allocate());
  REQUIRE(small.allocate());
  CHECK_FALSE(small.allocate());
  CHECK(budget.n_used() == 95);
  large.retain(*first);
  large.release(*first);
  CHECK(budget.n_used() == 95);
  large.release(*first);
  CHECK(budget.n_used() == 55);
  CHECK(small.allocate());
}
