#include "modularbase/kv/compaction.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <random>

using namespace modularbase;
using kernels::kBlockTokens;

namespace {

constexpr std::int64_t kHeadDim = 64;
constexpr std::int64_t kHeadsKv = 2;
constexpr std::int64_t kHeads = 4;
constexpr KvGeometry kAll{3, kHeadsKv, kHeadDim, GGML_TYPE_F16};
const KvTiers kTiers{
    .has_important = true, .has_redundant = true, .wide_keys = {}, .detail_heads = {}};
// Layer 2 keeps the tokens of spans, layer 1 of one head; the lower group has no such layer.
const KvTiers kDetails{.has_important = true,
                       .has_redundant = true,
                       .wide_keys = {},
                       .detail_heads = {{1, 1}, {2, 0}, {2, 1}}};

/// A cache of two groups, and a sequence in it with random keys and values.
struct TestPast {
  explicit TestPast(std::int64_t n_tokens, std::int64_t n_blocks = 64,
                    const KvTiers& tiers = kTiers)
      : backend("cpu", 1),
        cache(split_groups(kAll, 0, 32), tiers, n_blocks, backend, true),
        tokens(static_cast<std::size_t>(n_tokens) + 1) {
    for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<TokenId>(i);
    REQUIRE(cache.reserve(sequence, n_tokens));
    for (int layer = 0; layer < kAll.n_layer; ++layer) {
      const kernels::KvLayer kv = view(layer);
      for (std::size_t at = 0; at < sequence.lower.size(); ++at) {
        const BlockId block = layer > 0 ? sequence.upper[at] : sequence.lower[at];
        for (std::int64_t head = 0; head < kHeadsKv; ++head) fill(kv, block, head);
      }
    }
    sequence.set_valid(n_tokens);
    for (std::int32_t p = 0; p < n_tokens; ++p) {
      for (int layer = 0; layer < kAll.n_layer; ++layer) remember(p, layer);
    }
  }

  kernels::KvLayer view(int layer) const {
    return (layer > 0 ? *cache.upper() : cache.lower()).layer(layer);
  }
  void fill(const kernels::KvLayer& kv, BlockId block, std::int64_t head) {
    std::vector<float> rows(static_cast<std::size_t>(kHeadDim * kBlockTokens));
    const kernels::KvTierLayer& exact = kv.tiers[kernels::kExactTier];
    for (std::byte* tile : {kv.key_tile(kernels::kExactTier, block, head),
                            kv.value_tile(kernels::kExactTier, block, head)}) {
      for (float& value : rows) value = normal(random);
      kernels::write_tile(exact.k_format, rows.data(), kHeadDim, tile);
    }
  }
  /// Puts a number over all of a token's key, or value, in one head.
  void write(std::int32_t position, int layer, std::int64_t head, bool is_key, float number) {
    const kernels::KvLayer kv = view(layer);
    const auto at = static_cast<std::size_t>(position / kBlockTokens);
    const BlockId block = layer > 0 ? sequence.upper[at] : sequence.lower[at];
    std::byte* tile = is_key ? kv.key_tile(kernels::kExactTier, block, head)
                             : kv.value_tile(kernels::kExactTier, block, head);
    const std::vector<float> row(static_cast<std::size_t>(kHeadDim), number);
    kernels::write_row(kv.tiers[kernels::kExactTier].k_format, row.data(), kHeadDim,
                       position % static_cast<std::int32_t>(kBlockTokens), tile);
  }
  void remember(std::int32_t position, int layer) {
    TileReader reader(view(layer));
    const auto at = static_cast<std::size_t>(position / kBlockTokens);
    const TokenPlace place{kernels::kExactTier, layer > 0 ? sequence.upper[at] : sequence.lower[at],
                           position % static_cast<std::int32_t>(kBlockTokens)};
    for (std::int64_t head = 0; head < kHeadsKv; ++head) {
      const float* key = reader.key(place, head);
      const float* value = reader.value(place, head);
      auto& kept = written[{position, layer, head}];
      kept.insert(kept.end(), key, key + kHeadDim);
      kept.insert(kept.end(), value, value + kHeadDim);
    }
  }

  /// The largest error of a tier's tokens, in units of the values' spread.
  double worst_error(Tier tier) {
    double worst = 0.0;
    for (int layer = 0; layer < kAll.n_layer; ++layer) {
      TileReader reader(view(layer));
      for (const PastBlock& block : sequence.past.blocks) {
        if (block.tier != tier || block.memory == kernels::kRedundantTier) continue;
        for (std::size_t i = 0; i < block.positions.size(); ++i) {
          if (!(block.visible >> i & 1)) continue;
          const TokenPlace place{block.memory, layer > 0 ? block.upper : block.lower,
                                 static_cast<std::int32_t>(i)};
          for (std::int64_t head = 0; head < kHeadsKv; ++head) {
            if (!view(layer).tiers[block.memory].has(head)) continue;
            const auto& kept = written.at({block.positions[i], layer, head});
            const float* key = reader.key(place, head);
            const float* value = reader.value(place, head);
            for (std::size_t d = 0; d < kHeadDim; ++d) {
              worst = std::max<double>(worst, std::abs(key[d] - kept[d]));
              worst = std::max<double>(worst, std::abs(value[d] - kept[kHeadDim + d]));
            }
          }
        }
      }
    }
    return worst;
  }

  std::size_t counted_bytes() const {
    std::size_t n = cache.past_bytes(sequence.past);
    for (const BlockId block : sequence.lower) {
      if (block != kNoBlock) n += cache.block_bytes(kernels::kExactTier);
    }
    return n;
  }

  Backend backend;
  KvCache cache;
  KvSequence sequence;
  std::vector<TokenId> tokens;
  std::map<std::tuple<std::int32_t, int, std::int64_t>, std::vector<float>> written;
  std::mt19937 random{11};
  std::normal_distribution<float> normal;
};

PastPlan plan_of(std::int64_t n, Tier tier) {
  return {.n_positions = n,
          .tiers = std::vector<Tier>(static_cast<std::size_t>(n), tier),
          .spans = {},
          .max_error = 1.0f};
}

Compaction::Progress finish(Compaction& compaction) {
  for (;;) {
    const auto progress = compaction.work();
    if (progress != Compaction::Progress::kMore) return progress;
  }
}

void compact(TestPast& test, const PastPlan& plan, const FitQueries& queries = {}) {
  Compaction compaction(test.cache, test.sequence, plan, queries, kHeads);
  REQUIRE(finish(compaction) == Compaction::Progress::kReady);
  compaction.commit(test.sequence);
}

/// Random queries, and what they would see if the span were all there is.
struct TestQueries {
  explicit TestQueries(std::int64_t n_layer, float mass) {
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    queries.resize(static_cast<std::size_t>(kHeadDim * kHeads * kRows * n_layer));
    for (std::uint16_t& q : queries) q = ggml_fp32_to_fp16(normal(random));
    log_mass.assign(static_cast<std::size_t>(kHeads * kRows * n_layer), mass);
    window = {queries.data(), log_mass.data(), kRows, 1};
  }
  static constexpr std::int32_t kRows = 32;
  std::vector<std::uint16_t> queries;
  std::vector<float> log_mass;
  kernels::QueryWindow window{};
};

}  // namespace

TEST_CASE("key tokens stay bit for bit, important ones to 4 bits, in both groups") {
  TestPast test(400);
  PastPlan plan = plan_of(320, Tier::kImportant);
  for (std::size_t p = 0; p < 320; p += 3) plan.tiers[p] = Tier::kKey;
  compact(test, plan);
  CHECK(test.worst_error(Tier::kKey) == 0.0);
  // Of normal values, a block of 32 reaches 3.5: a step is some 0.45, and after the rotation a
  // component may be off by a few half steps.
  CHECK(test.worst_error(Tier::kImportant) < 1.0);
  CHECK(test.worst_error(Tier::kImportant) > 0.01);
  CHECK(test.sequence.past.n_positions == 320);
  CHECK(test.sequence.lower[4] == kNoBlock);
  CHECK(test.sequence.lower[5] != kNoBlock);
  CHECK(test.cache.used_bytes() == test.counted_bytes());
  test.cache.release(test.sequence);
  CHECK(test.cache.used_bytes() == 0);
}

TEST_CASE("what was given up half way changes nothing and holds nothing") {
  TestPast test(256);
  const std::size_t used = test.cache.used_bytes();
  const BlockTable before = test.sequence.lower;
  for (int n = 0; n < 5; ++n) {
    Compaction compaction(test.cache, test.sequence, plan_of(192, Tier::kImportant), {}, kHeads);
    for (int i = 0; i < n; ++i) compaction.work();
  }
  CHECK(test.cache.used_bytes() == used);
  CHECK(test.sequence.lower == before);
  CHECK(test.sequence.past.empty());
}

TEST_CASE("a plan with spans given up after any of its steps changes nothing and holds nothing") {
  TestPast test(320, 64, kDetails);
  const TestQueries queries_of(2, 6.0f);
  FitQueries queries{&queries_of.window, &queries_of.window, {}};
  for (std::int32_t row = 0; row < TestQueries::kRows; ++row) queries.rows.push_back(row);
  PastPlan plan = plan_of(192, Tier::kImportant);
  plan.max_error = 10.0f;
  plan.spans = {{20, 60, 4}, {100, 40, 0}};
  for (const SlotSpan& span : plan.spans) {
    std::fill_n(plan.tiers.begin() + span.start, span.n_tokens, Tier::kRedundant);
  }
  const std::size_t used = test.cache.used_bytes();
  const BlockTable before = test.sequence.lower;
  int n_steps = 0;
  for (bool is_ready = false; !is_ready; ++n_steps) {
    Compaction compaction(test.cache, test.sequence, plan, queries, kHeads);
    for (int i = 0; i < n_steps; ++i) {
      is_ready = compaction.work() == Compaction::Progress::kReady;
    }
    CHECK(compaction.refused().empty());
  }
  CHECK(n_steps == 2 * kAll.n_layer + 1);  // each layer is fitted and built
  CHECK(test.cache.used_bytes() == used);
  CHECK(test.sequence.lower == before);
  CHECK(test.sequence.past.empty());
  compact(test, plan, queries);  // and it can still be carried out
  CHECK(test.sequence.past.spans.size() == 2);
  CHECK(test.cache.used_bytes() == test.counted_bytes());
}

TEST_CASE("without memory for the new blocks the old ones stay") {
  TestPast test(256, 4);  // all of the budget
  Compaction compaction(test.cache, test.sequence, plan_of(192, Tier::kImportant), {}, kHeads);
  CHECK(finish(compaction) == Compaction::Progress::kShort);
  CHECK(test.sequence.past.empty());
  CHECK(test.cache.used_bytes() == test.cache.budget_bytes());
}

TEST_CASE("a prefix that others know outlives its compaction") {
  TestPast test(256);
  test.cache.publish_whole_blocks(test.sequence, test.tokens, {});
  compact(test, plan_of(192, Tier::kImportant));
  KvSequence other;
  test.cache.attach_prefix(other, test.tokens, {});
  CHECK(other.n_tokens == 256);
  CHECK(other.past.empty());
  test.cache.publish(test.sequence, test.tokens, {});  // does nothing: it is nobody else's
  test.cache.release(other);
  test.cache.release(test.sequence);
  test.cache.forget_prefixes();
  CHECK(test.cache.used_bytes() == 0);
}

TEST_CASE("old prefixes make room for new blocks") {
  TestPast test(192, 5);
  test.cache.publish_whole_blocks(test.sequence, test.tokens, {});
  test.cache.release(test.sequence);
  KvSequence other;
  REQUIRE(test.cache.reserve(other, 256));  // forgets one of the three
  other.set_valid(256);
  std::swap(test.sequence, other);
  Compaction compaction(test.cache, test.sequence, plan_of(128, Tier::kImportant), {}, kHeads);
  CHECK(finish(compaction) == Compaction::Progress::kReady);
}

TEST_CASE("a span is fitted to queries, and refused without them or beyond the error allowed") {
  TestPast test(256);
  const TestQueries lower(1, 6.0f);
  const TestQueries upper(2, 6.0f);
  FitQueries queries{&lower.window, &upper.window, {}};
  for (std::int32_t row = 0; row < TestQueries::kRows; ++row) queries.rows.push_back(row);
  PastPlan plan = plan_of(128, Tier::kImportant);
  plan.spans = {{20, 80, 8}};
  std::fill_n(plan.tiers.begin() + 20, 80, Tier::kRedundant);

  const auto error_of = [&](const FitQueries& given) {
    Compaction compaction(test.cache, test.sequence, plan, given, kHeads);
    finish(compaction);
    REQUIRE(compaction.refused().size() == 1);
    return compaction.refused()[0].error;
  };
  CHECK(std::isinf(error_of({})));
  plan.max_error = 1e-6f;
  CHECK(error_of(queries) > plan.max_error);

  plan.max_error = 10.0f;
  compact(test, plan, queries);
  REQUIRE(test.sequence.past.spans.size() == 1);
  CHECK(test.sequence.past.tiers[20] == Tier::kRedundant);
  CHECK(test.cache.used_bytes() == test.counted_bytes());
}

TEST_CASE("what slots stand for is not summarised again, not even as nothing") {
  TestPast test(320);
  const TestQueries queries_of(2, 6.0f);
  FitQueries queries{&queries_of.window, &queries_of.window, {}};
  for (std::int32_t row = 0; row < TestQueries::kRows; ++row) queries.rows.push_back(row);
  PastPlan plan = plan_of(192, Tier::kImportant);
  plan.max_error = 10.0f;
  plan.spans = {{20, 80, 8}};
  std::fill_n(plan.tiers.begin() + 20, 80, Tier::kRedundant);
  compact(test, plan, queries);
  plan.spans = {{30, 10, 0}, {90, 20, 2}};
  std::fill_n(plan.tiers.begin() + 90, 20, Tier::kRedundant);
  Compaction compaction(test.cache, test.sequence, plan, queries, kHeads);
  REQUIRE(finish(compaction) == Compaction::Progress::kReady);
  CHECK(compaction.refused().size() == 2);
  compaction.commit(test.sequence);
  REQUIRE(test.sequence.past.spans.size() == 1);
  CHECK(test.sequence.past.spans[0].n_tokens == 80);
  CHECK(test.sequence.past.tiers[105] == Tier::kImportant);
}

TEST_CASE("a query that is not a number: the span stays important") {
  TestPast test(256);
  TestQueries bad(2, 6.0f);
  bad.queries[7] = 0x7fff;
  FitQueries queries{&bad.window, &bad.window, {0, 1, 2, 3, 4, 5, 6, 7}};
  PastPlan plan = plan_of(128, Tier::kImportant);
  plan.spans = {{20, 80, 8}};
  plan.max_error = 10.0f;
  std::fill_n(plan.tiers.begin() + 20, 80, Tier::kRedundant);
  compact(test, plan, queries);
  CHECK(test.sequence.past.spans.empty());
  CHECK(test.sequence.past.tiers[20] == Tier::kImportant);
}

TEST_CASE("keys or values that are not numbers: their span stays important, others do not") {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    for (const bool is_key : {true, false}) {
      TestPast test(256);
      test.write(30, 1, 0, is_key, bad);
      const TestQueries queries_of(2, 6.0f);
      FitQueries queries{&queries_of.window, &queries_of.window, {}};
      for (std::int32_t row = 0; row < TestQueries::kRows; ++row) queries.rows.push_back(row);
      PastPlan plan = plan_of(128, Tier::kImportant);
      plan.max_error = 1e6f;
      plan.spans = {{20, 40, 8}, {70, 40, 8}};
      for (const SlotSpan& span : plan.spans) {
        std::fill_n(plan.tiers.begin() + span.start, span.n_tokens, Tier::kRedundant);
      }
      Compaction compaction(test.cache, test.sequence, plan, queries, kHeads);
      REQUIRE(finish(compaction) == Compaction::Progress::kReady);
      REQUIRE(compaction.refused().size() == 1);
      CHECK(compaction.refused()[0].span.start == 20);
      CHECK(std::isinf(compaction.refused()[0].error));
      compaction.commit(test.sequence);
      REQUIRE(test.sequence.past.spans.size() == 1);
      CHECK(test.sequence.past.spans[0].start == 70);
      CHECK(test.sequence.past.tiers[30] == Tier::kImportant);
      CHECK(test.sequence.past.tiers[70] == Tier::kRedundant);
      CHECK(test.cache.used_bytes() == test.counted_bytes());
    }
  }
}

TEST_CASE("heads that keep details have no slots, and 4 bits of every token that the others fit") {
  TestPast test(320, 64, kDetails);
  const TestQueries queries_of(2, 6.0f);
  FitQueries queries{&queries_of.window, &queries_of.window, {}};
  for (std::int32_t row = 0; row < TestQueries::kRows; ++row) queries.rows.push_back(row);
  PastPlan plan = plan_of(192, Tier::kImportant);
  plan.spans = {{20, 100, 6}};
  plan.max_error = 10.0f;
  std::fill_n(plan.tiers.begin() + 20, 100, Tier::kRedundant);
  compact(test, plan, queries);
  REQUIRE(test.sequence.past.spans.size() == 1);
  CHECK(test.view(0).tiers[kernels::kRedundantTier].has(1));
  CHECK(test.view(0).tiers[kernels::kDetailTier].k == nullptr);
  CHECK(test.view(1).tiers[kernels::kRedundantTier].has(0));
  CHECK(!test.view(1).tiers[kernels::kRedundantTier].has(1));
  CHECK(!test.view(1).tiers[kernels::kDetailTier].has(0));
  CHECK(test.view(1).tiers[kernels::kDetailTier].has(1));
  CHECK(test.view(2).tiers[kernels::kRedundantTier].k == nullptr);
  // Keys and values in 8 bits and a scale of 16 for every 32, and a log weight, of three heads.
  CHECK(test.cache.block_bytes(kernels::kRedundantTier) ==
        3 * kBlockTokens * (2 * kHeadDim * 34 / 32 + 4));
  CHECK(test.worst_error(Tier::kRedundant) < 1.0);  // as of important tokens
  CHECK(test.worst_error(Tier::kRedundant) > 0.01);
  CHECK(test.cache.used_bytes() == test.counted_bytes());
  test.cache.release(test.sequence);
  CHECK(test.cache.used_bytes() == 0);
}
