// The fused nodes of a site against the same in ggml's ops.
#include "modularbase/adapters/pack_site.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <set>

#include "modularbase/packs/file_pack.h"
#include "tools/temp_file.h"
#include "tools/tiny_pack.h"

using namespace modularbase;
using kernels::MergePolicy;
using testing::tiny_pack_file;
using testing::TinyPack;

namespace {

constexpr std::int64_t kEmbd = 64;
constexpr int kLayer = 2;  // the second site of a tiny pack

/// Whether every product by ids that lie in inputs names a matrix once a row: ggml's CUDA counts on
/// it, its CPU does not.
bool ids_are_distinct(Tensor node, std::set<Tensor>& seen) {
  if (!node || !seen.insert(node).second) return true;
  if (node->op == GGML_OP_MUL_MAT_ID && node->src[2]->view_src &&
      node->src[2]->view_src->op == GGML_OP_NONE) {
    const Tensor ids = node->src[2];  // I32 [n, n_rows]
    const auto* values = static_cast<const std::int32_t*>(ids->data);
    for (std::int64_t row = 0; row < ids->ne[1]; ++row, values += ids->ne[0]) {
      if (std::set(values, values + ids->ne[0]).size() < static_cast<std::size_t>(ids->ne[0])) {
        return false;
      }
    }
  }
  return std::all_of(node->src, node->src + GGML_MAX_SRC,
                     [&](Tensor source) { return ids_are_distinct(source, seen); });
}

/// A pool with two random packs, in slots 1 and 2, and a batch of rows.
class SiteTest {
 public:
  explicit SiteTest(const TinyPack& shape, int n_threads = 2)
      : backend_("cpu", n_threads), pool_(geometry(shape), 3, backend_) {
    for (int slot = 1; slot < 3; ++slot) {
      TinyPack pack = shape;
      pack.seed = static_cast<std::uint32_t>(slot);
      const testing::TempFile file(tiny_pack_file(pack).image());
      pool_.write(slot, *FilePack::open(file.path(), "", "tiny", {kEmbd, 4}));
    }
  }

  PackSet pack_set(std::vector<std::pair<int, float>> slots,
                   MergePolicy policy = MergePolicy::kBlend) {
    PackSet set{.entries = {}, .policy = policy};
    for (const auto& [slot, weight] : slots) set.entries.push_back({&pool_, slot, weight, 0.5f});
    return set;
  }

  /// h behind the site for rows that use these packs; h before it is zero.
  std::vector<float> run(const std::vector<const PackSet*>& sets, bool is_fused) {
    const auto n_rows = static_cast<std::int64_t>(sets.size());
    PackBatch batch;
    batch.fill(sets, sets.size(), {});
    Graph graph(256);
    GraphBuilder g(graph);
    Tensor x = g.input("x", GGML_TYPE_F32, kEmbd, n_rows);
    Tensor h = g.input("h", GGML_TYPE_F32, kEmbd, n_rows);
    FusedPackSites fused(batch, batch.key(), {});
    ReferencePackSites reference(batch, batch.padded_key(), {});
    LayerHook& hook = is_fused ? static_cast<LayerHook&>(fused) : reference;
    Tensor out = g.output(hook.after_ffn(g, x, h, kLayer), "out");
    graph.allocate(backend_);
    if (!is_fused) {
      reference.fill_inputs();
      std::set<Tensor> seen;
      CHECK(ids_are_distinct(out, seen));
    }
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    std::vector<float> values(static_cast<std::size_t>(kEmbd * n_rows));
    for (float& value : values) value = normal(random);
    ggml_backend_tensor_set(x, values.data(), 0, ggml_nbytes(x));
    values.assign(values.size(), 0.0f);
    ggml_backend_tensor_set(h, values.data(), 0, ggml_nbytes(h));
    conflict_ = batch.conflict(4);
    conflict_copy_.assign(conflict_.begin(), conflict_.end());
    graph.compute(backend_);
    conflict_copy_.assign(conflict_.begin(), conflict_.end());
    ggml_backend_tensor_get(out, values.data(), 0, ggml_nbytes(out));
    return values;
  }
  const std::vector<float>& conflict() const { return conflict_copy_; }

 private:
  static PackGeometry geometry(const TinyPack& shape) {
    const testing::TempFile file(tiny_pack_file(shape).image());
    return PackFile::open(file.path()).geometry();
  }

  Backend backend_;
  SlotPool pool_;
  std::span<float> conflict_;
  std::vector<float> conflict_copy_;
};

double relative_error(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0.0, size = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference += std::pow(a[i] - b[i], 2);
    size += std::pow(b[i], 2);
  }
  return std::sqrt(difference / size);
}

std::vector<float> row(const std::vector<float>& values, std::size_t i) {
  return {values.begin() + static_cast<std::ptrdiff_t>(i * kEmbd),
          values.begin() + static_cast<std::ptrdiff_t>((i + 1) * kEmbd)};
}

}  // namespace

TEST_CASE("fused nodes compute what ggml's ops compute") {
  for (const ggml_type adapter : {GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_F32}) {
    for (const ggml_type expert : {GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_K}) {
      CAPTURE(ggml_type_name(adapter));
      CAPTURE(ggml_type_name(expert));
      TinyPack shape;
      shape.adapter_type = adapter;
      shape.expert_type = expert;
      SiteTest test(shape);
      const PackSet one = test.pack_set({{1, 1.0f}});
      const PackSet two = test.pack_set({{2, 0.7f}});
      const PackSet both = test.pack_set({{2, 0.25f}, {1, 0.75f}});
      const std::vector<const PackSet*> rows{&one, nullptr, &both, &two, &one, &both, nullptr};
      const auto fused = test.run(rows, true);
      const auto reference = test.run(rows, false);
      // ggml rounds x to the weights' type (8 bits for quantised ones); so do we, where the CPU
      // multiplies so; BF16 rounds worst.
      const bool is_bf16 = adapter == GGML_TYPE_BF16;
      CHECK(relative_error(fused, reference) < (is_bf16 ? 2e-2 : 1e-2));
      for (const float value : row(fused, 1)) CHECK(value == 0.0f);
      CHECK(relative_error(row(fused, 0), row(reference, 0)) < 2e-2);
      CHECK(std::abs(row(reference, 0)[0]) > 0.0f);
    }
  }
}

TEST_CASE("few rows with one pack each, in place, and many agree with ggml's ops") {
  SiteTest test({});
  const PackSet one = test.pack_set({{1, 1.0f}});
  const PackSet two = test.pack_set({{2, 0.7f}});
  const std::vector<const PackSet*> few{nullptr, &two, &one, nullptr, &one};
  const auto in_place = test.run(few, true);
  CHECK(relative_error(in_place, test.run(few, false)) < 1e-2);  // x is rounded to 8 bits
  for (const float value : row(in_place, 0)) CHECK(value == 0.0f);
  std::vector<const PackSet*> many(kernels::kFewUses, &one);
  many.insert(many.end(), few.begin(), few.end());
  const auto merged = test.run(many, true);
  CHECK(relative_error(merged, test.run(many, false)) < 1e-2);
  CHECK(test.conflict().empty());
}

TEST_CASE("a row's packs do not depend on the rows beside it") {
  SiteTest test({});
  const PackSet one = test.pack_set({{1, 1.0f}});
  const PackSet both = test.pack_set({{2, 0.25f}, {1, 0.75f}});
  const auto alone = test.run({&one}, true);
  const auto beside = test.run({&one, &both, &one, nullptr, &both}, true);
  CHECK(row(beside, 0) == alone);
}

TEST_CASE("a blend is the weighted sum of its packs") {
  SiteTest test({});
  const PackSet one = test.pack_set({{1, 1.0f}});
  const PackSet two = test.pack_set({{2, 1.0f}});
  const PackSet both = test.pack_set({{1, 0.25f}, {2, 0.75f}});
  const auto a = test.run({&one}, true), b = test.run({&two}, true), sum = test.run({&both}, true);
  for (std::size_t i = 0; i < sum.size(); ++i) {
    CHECK(sum[i] == doctest::Approx(0.25f * a[i] + 0.75f * b[i]).epsilon(1e-4));
  }
  REQUIRE(test.conflict().size() == 4);
  double dot = 0, aa = 0, bb = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    dot += a[i] * b[i];
    aa += a[i] * a[i];
    bb += b[i] * b[i];
  }
  CHECK(test.conflict()[kLayer] == doctest::Approx(dot / std::sqrt(aa * bb)).epsilon(1e-3));
  CHECK(std::isnan(test.conflict()[0]));
}

TEST_CASE("best keeps one pack, ties only agreeing signs") {
  TinyPack shape;
  shape.has_token_gate = false;
  SiteTest test(shape);
  const PackSet one = test.pack_set({{1, 0.4f}});
  const PackSet two = test.pack_set({{2, 0.6f}});
  const PackSet best = test.pack_set({{1, 0.4f}, {2, 0.6f}}, MergePolicy::kBest);
  const PackSet first = test.pack_set({{1, 0.4f}, {2, 0.6f}}, MergePolicy::kPriority);
  const PackSet ties = test.pack_set({{1, 0.4f}, {2, 0.6f}}, MergePolicy::kTies);
  const auto a = test.run({&one}, true), b = test.run({&two}, true);
  CHECK(relative_error(test.run({&best}, true), b) < 1e-6);
  CHECK(relative_error(test.run({&first}, true), a) < 1e-6);  // no gates: the first one's is open
  const auto merged = test.run({&ties}, true);
  for (std::size_t i = 0; i < a.size(); ++i) {
    const float sum = a[i] + b[i];
    const bool agree = a[i] * b[i] > 0;
    const float larger = std::abs(a[i]) > std::abs(b[i]) ? a[i] : b[i];
    CHECK(merged[i] == doctest::Approx(agree ? sum : larger).epsilon(1e-4));
  }
}
