#include "modularbase/kv/block_pool.h"

#include <doctest/doctest.h>

#include <set>

#include "modularbase/core/errors.h"

using namespace modularbase;

TEST_CASE("every block is handed out once, then none") {
  BlockPool pool(5);
  std::set<BlockId> blocks;
  for (int i = 0; i < 5; ++i) blocks.insert(pool.allocate().value());
  CHECK(blocks.size() == 5);
  CHECK(!pool.allocate());
  CHECK(pool.n_free() == 0);
}

TEST_CASE("a block is free again only when its last holder lets go") {
  BlockPool pool(1);
  const BlockId block = pool.allocate().value();
  pool.retain(block);
  pool.release(block);
  CHECK(!pool.allocate());
  pool.release(block);
  CHECK(pool.allocate() == block);
}

TEST_CASE("misuse is an error, not a corrupted pool") {
  BlockPool pool(2);
  CHECK_THROWS_AS(pool.release(0), Error);
  CHECK_THROWS_AS(pool.retain(1), Error);
  CHECK(pool.n_free() == 2);
}
