// Two groups of layers: what each shares depends on its own context.
#include <doctest/doctest.h>

#include <algorithm>
#include <random>

#include "modularbase/kv/kv_cache.h"

using namespace modularbase;
using kernels::kBlockTokens;

namespace {

using Ids = std::vector<TokenId>;

constexpr KvGeometry kAll{.n_layer = 3, .n_head_kv = 1, .head_dim = 16, .type = GGML_TYPE_F16};
constexpr std::int64_t kSplit = 0;
constexpr std::int64_t kWidth = 4;
constexpr int kUpperLayer = 2;

std::uint32_t at_position(const KvContext& context, std::uint32_t value, std::int64_t position) {
  return position < context.from ? 0 : value;
}

struct Running {
  KvSequence kv;
  Ids ids;
  KvContext context;
};

/// A cache whose KV of a position says which token and which context it is of.
class TestCache {
 public:
  explicit TestCache(std::int64_t n_blocks)
      : backend_("cpu", 1),
        cache(split_groups(kAll, kSplit, kWidth), {}, n_blocks, backend_, true) {}

  Running attach(Ids ids, const KvContext& context) {
    Running running{{}, std::move(ids), context};
    cache.attach_prefix(running.kv, running.ids, context);
    check(running);
    return running;
  }
  /// The positions that the lower group knows, up to n, in the upper one.
  void restart(Running& running, std::int64_t n) {
    for (std::int64_t& i = running.kv.n_tokens; i < std::min(n, running.kv.n_lower); ++i) {
      upper(running.kv, i) = upper_value(running, i);
    }
  }
  /// Positions in both groups.
  void compute(Running& running, std::int64_t n) {
    REQUIRE(running.kv.n_tokens == running.kv.n_lower);
    for (std::int64_t i = running.kv.n_tokens; i < n; ++i) {
      lower(running.kv, i) = lower_value(running, i);
      mid(running.kv, i) = lower_value(running, i);
      upper(running.kv, i) = upper_value(running, i);
    }
    running.kv.set_valid(n);
  }
  Running finished(const Ids& ids, const KvContext& context) {
    Running running = attach(ids, context);
    REQUIRE(cache.reserve(running.kv, std::ssize(ids)));
    restart(running, std::ssize(ids));
    compute(running, std::ssize(ids));
    cache.publish(running.kv, running.ids, context);
    return running;
  }
  /// Every valid position holds its own token's KV under its own context.
  void check(const Running& running) {
    REQUIRE(running.kv.n_tokens <= running.kv.n_lower);
    for (std::int64_t i = 0; i < running.kv.n_lower; ++i) {
      REQUIRE(lower(running.kv, i) == lower_value(running, i));
      REQUIRE(mid(running.kv, i) == static_cast<float>(lower_value(running, i)));
    }
    for (std::int64_t i = 0; i < running.kv.n_tokens; ++i) {
      REQUIRE(upper(running.kv, i) == upper_value(running, i));
    }
  }
  void check_idle() {
    for (const KvGroup* group : {&cache.lower(), cache.upper()}) {
      CHECK(group->n_free_blocks() + group->n_cached_blocks() == group->n_blocks());
    }
  }

 private:
  static std::uint16_t value(TokenId token, std::uint32_t context) {
    return static_cast<std::uint16_t>(token + 1000 * static_cast<TokenId>(context));
  }
  static TokenId token(const Running& running, std::int64_t i) {
    return running.ids[static_cast<std::size_t>(i)];
  }
  static std::uint16_t lower_value(const Running& running, std::int64_t i) {
    return value(token(running, i), at_position(running.context, running.context.lower, i));
  }
  static std::uint16_t upper_value(const Running& running, std::int64_t i) {
    return value(token(running, i), at_position(running.context, running.context.upper, i));
  }
  static std::uint16_t& in(const kernels::KvLayer& layer, const BlockTable& table,
                           std::int64_t position) {
    const std::int64_t block = table[static_cast<std::size_t>(position / kBlockTokens)];
    const kernels::KvTierLayer& tier = layer.tiers[kernels::kExactTier];
    std::byte* tile = tier.v + static_cast<std::size_t>(block) * tier.block_stride;
    return reinterpret_cast<std::uint16_t*>(tile)[position % kBlockTokens * kAll.head_dim];
  }
  std::uint16_t& lower(const KvSequence& kv, std::int64_t position) {
    return in(cache.lower().memory().layer(kSplit), kv.lower, position);
  }
  std::uint16_t& upper(const KvSequence& kv, std::int64_t position) {
    return in(cache.upper()->memory().layer(kUpperLayer), kv.upper, position);
  }
  float& mid(const KvSequence& kv, std::int64_t position) {
    const std::int64_t block = kv.lower[static_cast<std::size_t>(position / kBlockTokens)];
    const std::int64_t row = block * kBlockTokens + position % kBlockTokens;
    return static_cast<float*>(cache.lower().memory().mid()->data)[row * kWidth + kWidth - 1];
  }

  Backend backend_;

 public:
  KvCache cache;
};

Ids range(TokenId first, std::size_t n) {
  Ids ids(n);
  for (std::size_t i = 0; i < n; ++i) ids[i] = first + static_cast<TokenId>(i);
  return ids;
}

constexpr KvContext kBase{};
constexpr KvContext kPackA{.lower = 0, .upper = 1, .from = 0};
constexpr KvContext kPackB{.lower = 0, .upper = 2, .from = 0};
constexpr KvContext kDeepPack{.lower = 3, .upper = 3, .from = 0};

}  // namespace

TEST_CASE("the layers are split with the mid rows below, and not split behind the last") {
  const KvGroups groups = split_groups(kAll, 0, 4);
  CHECK(groups.lower.n_layer == 1);
  CHECK(groups.lower.mid_width == 4);
  REQUIRE(groups.upper);
  CHECK(groups.upper->first_layer == 1);
  CHECK(groups.upper->n_layer == 2);
  CHECK(groups.upper->mid_width == 0);
  CHECK(groups.block_bytes() == kAll.block_bytes() + std::size_t{4 * 4} * kBlockTokens);
  const KvGroups whole = split_groups(kAll, 2, 4);
  CHECK_FALSE(whole.upper);
  CHECK(whole.block_bytes() == kAll.block_bytes());
}

TEST_CASE("another context takes the lower group's blocks and none of the upper one's") {
  TestCache test(8);
  const Ids ids = range(1, 150);
  Running writer = test.finished(ids, kBase);
  Running reader = test.attach(ids, kPackA);
  CHECK(reader.kv.n_lower == 149);
  CHECK(reader.kv.n_tokens == 0);
  CHECK(reader.kv.upper.empty());
  CHECK(reader.kv.lower[1] == writer.kv.lower[1]);
  CHECK(reader.kv.lower[2] != writer.kv.lower[2]);  // a copy: the last token writes into it
  REQUIRE(test.cache.reserve(reader.kv, 150));
  CHECK(reader.kv.upper.size() == 3);
  test.restart(reader, 100);  // half way
  test.check(reader);
  test.cache.publish(reader.kv, reader.ids, reader.context);

  CHECK(test.attach(ids, kPackA).kv.n_tokens == 100);
  CHECK(test.attach(ids, kPackB).kv.n_tokens == 0);
  test.check(writer);
}

TEST_CASE("before a context begins its KV is the plain base's") {
  TestCache test(8);
  const Ids ids = range(1, 150);
  test.finished(ids, kBase);
  const Running reader = test.attach(ids, {.lower = 0, .upper = 1, .from = 70});
  CHECK(reader.kv.n_tokens == 70);
  CHECK(reader.kv.n_lower == 149);
  const Running deep = test.attach(ids, {.lower = 3, .upper = 3, .from = 70});
  CHECK(deep.kv.n_tokens == 70);
  CHECK(deep.kv.n_lower == 70);
}

TEST_CASE("what the upper group knows beyond the lower one is not taken") {
  TestCache test(6);
  const Ids ids = range(1, 3 * kBlockTokens);
  // Twice in the lower group, once in the upper one: only the lower one has to forget.
  Running first = test.finished(ids, kPackA);
  test.cache.release(first.kv);
  Running second = test.finished(ids, {.lower = 3, .upper = kPackA.upper, .from = 0});
  test.cache.release(second.kv);
  Running other = test.attach(range(900, 2), kBase);
  REQUIRE(test.cache.reserve(other.kv, 1));
  CHECK(test.cache.lower().n_cached_blocks() == 5);
  CHECK(test.cache.upper()->n_cached_blocks() == 3);
  const Running reader = test.attach(ids, kPackA);
  CHECK(reader.kv.n_lower == 2 * kBlockTokens);
  CHECK(reader.kv.n_tokens == 2 * kBlockTokens);
  CHECK(reader.kv.upper.size() == 2);
}

TEST_CASE("room is there in both groups or neither is touched") {
  TestCache test(3);
  const Ids ids = range(1, kBlockTokens + 1);
  Running writer = test.finished(ids, kBase);  // two blocks in each
  Running reader = test.attach(ids, kPackA);   // one block of the lower group is shared
  const KvSequence before = reader.kv;
  CHECK(before.lower.size() == 1);
  CHECK_FALSE(test.cache.reserve(reader.kv, kBlockTokens + 1));  // the upper group has one free
  CHECK(reader.kv.lower == before.lower);
  CHECK(reader.kv.upper == before.upper);
  CHECK(test.cache.lower().n_free_blocks() == 1);
  CHECK(test.cache.upper()->n_free_blocks() == 1);
  CHECK(test.cache.n_free_blocks() == 1);
  test.cache.release(writer.kv);
  CHECK(test.cache.reserve(reader.kv, kBlockTokens + 1));  // forgets in the group that is short
  CHECK(test.cache.lower().n_cached_blocks() == 2);
  CHECK(test.cache.upper()->n_cached_blocks() == 1);
  CHECK(test.cache.n_cached_blocks() == 2);
}

TEST_CASE("random sequences under random contexts: each reads its own KV, no block is lost") {
  TestCache test(20);
  std::mt19937 random(5);
  const auto draw = [&](std::uint32_t n) { return static_cast<std::int64_t>(random() % n); };
  std::vector<Running> running;
  std::int64_t n_restarted = 0;
  std::int64_t n_shared = 0;
  for (int round = 0; round < 3000; ++round) {
    if (running.size() < 4) {
      Ids ids(static_cast<std::size_t>(1 + draw(200)), 1);  // few ids: prefixes meet often
      for (std::size_t i = 49; i < ids.size(); i += 50) ids[i] += static_cast<TokenId>(draw(2));
      KvContext context = std::vector{kBase, kPackA, kPackB, kDeepPack}[random() % 4];
      context.from = draw(3) * 60;
      running.push_back(test.attach(std::move(ids), context));
      n_shared += running.back().kv.n_tokens;
    }
    Running& one = running[random() % running.size()];
    const bool ends = draw(4) == 0;
    if (!ends && test.cache.reserve(one.kv, std::ssize(one.ids))) {
      if (one.kv.n_tokens < one.kv.n_lower) {
        n_restarted += one.kv.n_lower - one.kv.n_tokens;
        test.restart(one, one.kv.n_tokens + 1 + draw(120));
      } else {
        test.compute(one, std::ssize(one.ids));
        test.cache.publish_whole_blocks(one.kv, one.ids, one.context);
        one.ids.push_back(1 + static_cast<TokenId>(draw(2)));
      }
    } else {
      test.cache.publish(one.kv, one.ids, one.context);
      test.cache.release(one.kv);
      std::swap(one, running.back());
      running.pop_back();
    }
    if (draw(100) == 0) test.cache.forget_prefixes();
    for (const Running& other : running) test.check(other);
  }
  CHECK(n_restarted > 10000);  // or the rounds say little
  CHECK(n_shared > 10000);
  for (Running& one : running) test.cache.release(one.kv);
  test.check_idle();
  test.cache.forget_prefixes();
  CHECK(test.cache.lower().n_free_blocks() == 20);
  CHECK(test.cache.upper()->n_free_blocks() == 20);
}

TEST_CASE("a mixed context shares nothing but whole blocks of the plain base before it") {
  TestCache t(64);
  const Ids ids = range(0, 200);
  constexpr std::uint32_t kMixed = KvContext::kMixed;
  Running mixed = t.finished(ids, {.lower = 0, .upper = kMixed, .from = 0});
  t.cache.release(mixed.kv);
  for (const KvContext& context :
       {kPackA, kBase, KvContext{.lower = 0, .upper = kMixed, .from = 0}}) {
    Running next = t.attach(ids, context);
    CHECK(next.kv.n_lower == 199);
    CHECK(next.kv.n_tokens == 0);
    t.cache.release(next.kv);
  }
  const Ids others = range(300, 200);
  Running deep = t.finished(others, {.lower = kMixed, .upper = kMixed, .from = 150});
  t.cache.release(deep.kv);
  Running base = t.attach(others, kBase);
  CHECK(base.kv.n_lower == 128);
  CHECK(base.kv.n_tokens == 128);
  t.cache.release(base.kv);
  t.check_idle();
}
