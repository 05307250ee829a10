// Policies by hand, on deltas of four elements.
#include "modularbase/kernels/pack_merge.h"

#include <doctest/doctest.h>

#include <cmath>
#include <vector>

using namespace modularbase::kernels;

namespace {

constexpr std::int64_t kEmbd = 4;
constexpr std::int64_t kLayer = 2;

using Row = std::vector<float>;

struct Share {
  Row delta;
  float weight;
  float scale;
  float factor;  // token gate
};

struct Merged {
  Row out;
  float conflict;
};

/// h + what the packs of one row add, each in a pool of its own; a row without packs before it.
Merged merge(const std::vector<Share>& packs, MergePolicy policy, Row h = {0, 0, 0, 0}) {
  std::vector<std::int32_t> first{0, 0, static_cast<std::int32_t>(packs.size())};
  std::vector<PackShare> shares;
  std::vector<PackDeltas> pools;
  for (const Share& pack : packs) {
    shares.push_back({static_cast<std::int32_t>(pools.size()), 0, pack.weight, pack.scale});
    pools.push_back({pack.delta.empty() ? nullptr : pack.delta.data(), &pack.factor});
  }
  const std::vector<MergePolicy> policies{MergePolicy::kBlend, policy};
  std::vector<float> conflict((kLayer + 1) * 2, 7.0f);
  const PackShares all{first, shares, policies, conflict.data(), 2, {}};
  Row both{1, 2, 3, 4};  // h of the row without packs
  both.insert(both.end(), h.begin(), h.end());
  Row out(both.size(), -1.0f);
  for (const int ith : {0, 1}) {
    pack_merge({&all, pools, kEmbd, kLayer, both.data(), out.data()}, ith, 2);
  }
  CHECK(Row(out.begin(), out.begin() + 4) == Row{1, 2, 3, 4});
  CHECK(std::isnan(conflict[kLayer * 2]));
  for (std::size_t i = 0; i < kLayer * 2; ++i) CHECK(conflict[i] == 7.0f);  // other layers' rows
  return {{out.begin() + 4, out.end()}, conflict[kLayer * 2 + 1]};
}

// Numbers that F32 holds exactly.
const Share kA{{1, 2, -4, 0}, 0.5f, 2.0f, 1.0f};    // adds {1, 2, -4, 0}
const Share kB{{2, -2, -2, 8}, 0.25f, 1.0f, 2.0f};  // adds {1, -1, -1, 4}

}  // namespace

TEST_CASE("blend: h and the weighted sum") {
  CHECK(merge({}, MergePolicy::kBlend, {1, 1, 1, 1}).out == Row{1, 1, 1, 1});
  CHECK(merge({kA}, MergePolicy::kBlend, {1, 1, 1, 1}).out == Row{2, 3, -3, 1});
  CHECK(merge({kA, kB}, MergePolicy::kBlend, {0, 0, 0, 1}).out == Row{2, 1, -5, 5});
}

TEST_CASE("best: the one with the largest weight x gate, at its own weight") {
  // Both have weight x gate 0.5: the first.
  CHECK(merge({kA, kB}, MergePolicy::kBest).out == Row{1, 2, -4, 0});
  Share b = kB;
  b.factor = 4.0f;  // 0.25 * 4 > 0.5
  CHECK(merge({kA, b}, MergePolicy::kBest).out == Row{2, -2, -2, 8});
  CHECK(merge({kB}, MergePolicy::kBest).out == Row{1, -1, -1, 4});
}

TEST_CASE("priority: the first whose gate is open, else the one with the largest gate") {
  Share a = kA, b = kB;
  CHECK(merge({a, b}, MergePolicy::kPriority).out == Row{1, 2, -4, 0});
  a.factor = 0.75f;
  CHECK(merge({a, b}, MergePolicy::kPriority).out == Row{1, -1, -1, 4});
  b.factor = 0.5f;
  CHECK(merge({a, b}, MergePolicy::kPriority).out == Row{0.75f, 1.5f, -3, 0});
}

TEST_CASE("a pack of weight zero is never the one that is kept") {
  Share off = kA;
  off.weight = 0.0f;
  for (const auto policy : {MergePolicy::kBest, MergePolicy::kPriority, MergePolicy::kTies}) {
    CHECK(merge({off, kB}, policy).out == Row{1, -1, -1, 4});
  }
  Share closed = kB;
  closed.factor = 0.5f;  // adds a quarter, with the smaller gate
  CHECK(merge({off, closed}, MergePolicy::kPriority).out == Row{0.25f, -0.25f, -0.25f, 1});
}

TEST_CASE("ties: the weighted sum of those that agree with its sign") {
  // Elements: both agree; 2 against -1; both agree; only b moves it.
  CHECK(merge({kA, kB}, MergePolicy::kTies).out == Row{2, 2, -5, 4});
  Share c = kA;
  c.delta = {-2, 0, 0, -4};  // with a and b: the first element and the last have no sign
  CHECK(merge({kA, kB, c}, MergePolicy::kTies).out == Row{0, 2, -5, 0});
}

TEST_CASE("a pool without a site at the layer adds nothing") {
  Share absent = kA;
  absent.delta.clear();
  for (const auto policy : {MergePolicy::kBlend, MergePolicy::kBest, MergePolicy::kTies}) {
    const Merged merged = merge({absent, kB}, policy);
    CHECK(merged.out == Row{1, -1, -1, 4});
    CHECK(std::isnan(merged.conflict));
  }
}

TEST_CASE("conflict: the mean cosine between what the packs add") {
  CHECK(std::isnan(merge({}, MergePolicy::kBlend).conflict));
  CHECK(std::isnan(merge({kA}, MergePolicy::kBlend).conflict));
  const double ab = 6.0 / std::sqrt(21.0 * 76.0);
  CHECK(static_cast<double>(merge({kA, kB}, MergePolicy::kBest).conflict) ==
        doctest::Approx(ab).epsilon(1e-6));
  Share negative = kB;
  negative.scale = -1.0f;  // adds the opposite
  CHECK(static_cast<double>(merge({kA, negative}, MergePolicy::kBlend).conflict) ==
        doctest::Approx(-ab).epsilon(1e-6));
  CHECK(static_cast<double>(merge({kA, kB, kA}, MergePolicy::kBlend).conflict) ==
        doctest::Approx((2 * ab + 1) / 3).epsilon(1e-6));
  Share nothing = kB;
  nothing.delta = {0, 0, 0, 0};
  CHECK(merge({kA, nothing}, MergePolicy::kBlend).conflict == 0.0f);
}
