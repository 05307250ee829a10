#include "modularbase/kv/kv_cache.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <random>

using namespace modularbase;
using kernels::kBlockTokens;

namespace {

using Ids = std::vector<TokenId>;

constexpr KvGeometry kGeometry{.n_layer = 1, .n_head_kv = 1, .head_dim = 16, .type = GGML_TYPE_F16};

const KvGroups kOneGroup{kGeometry, std::nullopt};

struct TestCache {
  explicit TestCache(std::int64_t n_blocks, bool prefix_cache = true)
      : backend("cpu", 1), cache(kOneGroup, {}, n_blocks, backend, prefix_cache) {}
  Backend backend;
  KvCache cache;

  /// The value that stands for the KV of a position.
  std::uint16_t& at(const KvSequence& sequence, std::int64_t position) {
    const std::int64_t block = sequence.lower[static_cast<std::size_t>(position / kBlockTokens)];
    const kernels::KvTierLayer tier = cache.lower().memory().layer(0).tiers[kernels::kExactTier];
    std::byte* tile = tier.k + static_cast<std::size_t>(block) * tier.block_stride;
    return reinterpret_cast<std::uint16_t*>(tile)[position % kBlockTokens * kGeometry.head_dim];
  }
  /// Computes the KV of [n_tokens, n): here, each position's token id.
  void compute(KvSequence& sequence, const Ids& ids, std::int64_t n) {
    for (std::int64_t i = sequence.n_tokens; i < n; ++i) {
      at(sequence, i) = static_cast<std::uint16_t>(ids[static_cast<std::size_t>(i)]);
    }
    sequence.set_valid(n);
  }
  bool holds(const KvSequence& sequence, const Ids& ids) {
    for (std::int64_t i = 0; i < sequence.n_tokens; ++i) {
      if (at(sequence, i) != ids[static_cast<std::size_t>(i)]) return false;
    }
    return true;
  }
  std::int64_t attach(KvSequence& sequence, const Ids& ids) {
    cache.attach_prefix(sequence, ids, {});
    CHECK(sequence.n_lower == sequence.n_tokens);
    return sequence.n_tokens;
  }
  void check_bytes() {
    const std::int64_t n_used = cache.n_blocks() - cache.n_free_blocks();
    CHECK(cache.used_bytes() == static_cast<std::size_t>(n_used) * kGeometry.block_bytes());
  }
};

Ids range(TokenId first, std::size_t n) {
  Ids ids(n);
  for (std::size_t i = 0; i < n; ++i) ids[i] = first + static_cast<TokenId>(i);
  return ids;
}

}  // namespace

TEST_CASE("room is made in whole blocks, all of it or none") {
  TestCache test(3);
  KvSequence sequence;
  CHECK(test.cache.reserve(sequence, 1));
  CHECK(sequence.lower.size() == 1);
  CHECK(test.cache.reserve(sequence, kBlockTokens));
  CHECK(sequence.lower.size() == 1);
  CHECK(test.cache.reserve(sequence, kBlockTokens + 1));
  CHECK(sequence.lower.size() == 2);
  const std::vector<BlockId> before = sequence.lower;
  CHECK_FALSE(test.cache.reserve(sequence, 3 * kBlockTokens + 1));
  CHECK(sequence.lower == before);
  CHECK(test.cache.n_free_blocks() == 1);
  test.check_bytes();
  test.cache.release(sequence);
  CHECK(sequence.lower.empty());
  CHECK(test.cache.n_free_blocks() == 3);
  CHECK(test.cache.used_bytes() == 0);
}

TEST_CASE("a known prefix: whole blocks are shared, the partly matching one is copied") {
  TestCache test(8);
  const Ids ids = range(1, 150);
  KvSequence writer;
  REQUIRE(test.cache.reserve(writer, 150));
  test.compute(writer, ids, 150);
  test.cache.publish(writer, ids, {});

  Ids branch = range(1, 100);
  branch.resize(130, 999);
  KvSequence reader;
  CHECK(test.attach(reader, branch) == 100);
  REQUIRE(reader.lower.size() == 2);
  CHECK(reader.lower[0] == writer.lower[0]);
  CHECK(reader.lower[1] != writer.lower[1]);
  CHECK(test.holds(reader, branch));

  // What the branch writes stays its own.
  REQUIRE(test.cache.reserve(reader, 130));
  test.compute(reader, branch, 130);
  CHECK(test.holds(writer, ids));
  CHECK(test.holds(reader, branch));
}

TEST_CASE("the last token is never taken from the cache, so that there is a row to compute") {
  TestCache test(8);
  const Ids ids = range(1, 2 * kBlockTokens);
  KvSequence writer;
  REQUIRE(test.cache.reserve(writer, std::ssize(ids)));
  test.compute(writer, ids, std::ssize(ids));
  test.cache.publish(writer, ids, {});
  KvSequence again;
  CHECK(test.attach(again, ids) == 2 * kBlockTokens - 1);
  CHECK(again.lower[1] != writer.lower[1]);
  KvSequence one;
  CHECK(test.attach(one, Ids{1}) == 0);
  CHECK(one.lower.empty());
}

TEST_CASE("a sequence that goes on writing publishes whole blocks only") {
  TestCache test(8);
  const Ids ids = range(1, 100);
  KvSequence writer;
  REQUIRE(test.cache.reserve(writer, 100));
  test.compute(writer, ids, 100);
  test.cache.publish_whole_blocks(writer, ids, {});
  CHECK(test.cache.n_cached_blocks() == 1);
  KvSequence reader;
  CHECK(test.attach(reader, ids) == kBlockTokens);
}

TEST_CASE("remembered blocks make room, the ones in use do not") {
  TestCache test(3);
  const Ids ids = range(1, 2 * kBlockTokens);
  KvSequence first;
  REQUIRE(test.cache.reserve(first, std::ssize(ids)));
  test.compute(first, ids, std::ssize(ids));
  test.cache.publish(first, ids, {});
  KvSequence second;
  CHECK_FALSE(test.cache.reserve(second, 2 * kBlockTokens));
  test.cache.release(first);
  CHECK(test.cache.n_free_blocks() == 1);
  CHECK(test.cache.reserve(second, 3 * kBlockTokens));
  CHECK(test.cache.n_cached_blocks() == 0);
}

TEST_CASE("without a block for the copy, the whole blocks are taken and nothing is lost") {
  TestCache test(2);
  const Ids ids = range(1, 100);
  KvSequence writer;
  REQUIRE(test.cache.reserve(writer, 100));
  test.compute(writer, ids, 100);
  test.cache.publish(writer, ids, {});
  test.cache.release(writer);
  KvSequence reader;
  CHECK(test.attach(reader, ids) == kBlockTokens);
  test.cache.release(reader);
  test.cache.forget_prefixes();
  CHECK(test.cache.n_free_blocks() == 2);
}

TEST_CASE("switched off, nothing is remembered") {
  TestCache test(4, false);
  const Ids ids = range(1, 100);
  KvSequence writer;
  REQUIRE(test.cache.reserve(writer, 100));
  test.compute(writer, ids, 100);
  test.cache.publish_whole_blocks(writer, ids, {});
  test.cache.publish(writer, ids, {});
  test.cache.release(writer);
  CHECK(test.cache.n_cached_blocks() == 0);
  CHECK(test.cache.n_free_blocks() == 4);
  KvSequence reader;
  CHECK(test.attach(reader, ids) == 0);
}

TEST_CASE(
    "random sequences come, grow, branch and go: each reads its own tokens, no block is lost") {
  TestCache test(24);
  std::mt19937 random(11);
  struct Running {
    KvSequence kv;
    Ids ids;
  };
  std::vector<Running> running;
  for (int round = 0; round < 2000; ++round) {
    if (running.size() < 4) {
      Running next;
      // Two token ids and few lengths: prefixes meet often.
      for (std::size_t n = 1 + random() % 200; n > 0; --n) {
        next.ids.push_back(1 + static_cast<TokenId>(n % 50 == 0 ? random() % 2 : 0));
      }
      test.attach(next.kv, next.ids);
      REQUIRE(test.holds(next.kv, next.ids));
      running.push_back(std::move(next));
    }
    Running& one = running[random() % running.size()];
    const bool ends = random() % 3 == 0;
    if (!ends && test.cache.reserve(one.kv, std::ssize(one.ids))) {
      test.compute(one.kv, one.ids, std::ssize(one.ids));
      test.cache.publish_whole_blocks(one.kv, one.ids, {});
      one.ids.push_back(1 + static_cast<TokenId>(random() % 2));
    } else {
      test.cache.publish(one.kv, one.ids, {});
      test.cache.release(one.kv);
      std::swap(one, running.back());
      running.pop_back();
    }
    for (const Running& other : running) REQUIRE(test.holds(other.kv, other.ids));
    test.check_bytes();
  }
  for (Running& one : running) test.cache.release(one.kv);
  CHECK(test.cache.n_free_blocks() + test.cache.n_cached_blocks() == 24);
  test.cache.forget_prefixes();
  CHECK(test.cache.n_free_blocks() == 24);
}
