#include "modularbase/kernels/pack_route.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

using namespace modularbase;
using namespace modularbase::kernels;

namespace {

constexpr std::int64_t kEmbd = 43;  // no multiple of a vector
constexpr std::int64_t kInner = 256;
constexpr std::int64_t kExperts = 8;
constexpr std::int64_t kUsed = 2;
constexpr std::int64_t kSlots = 3;
constexpr std::int64_t kExpertsPerSlot = 11;  // matrices lie further apart than there are experts
constexpr float kEps = 1e-5f;

/// The small tensors of a site in three slots, and rows that use them.
class RouteTest {
 public:
  RouteTest() : ctx_(ggml_init({.mem_size = 1 << 20, .mem_buffer = nullptr, .no_alloc = false})) {
    const auto make = [&](ggml_type type, std::int64_t ne0, std::int64_t ne1, std::int64_t ne2) {
      return ggml_new_tensor_3d(ctx_.get(), type, ne0, ne1, ne2);
    };
    site_.in = make(GGML_TYPE_F16, kEmbd, kInner, kSlots);
    site_.norm = make(GGML_TYPE_F32, kInner, kSlots, 1);
    site_.router = make(GGML_TYPE_F32, kInner, kExperts, kSlots);
    site_.token_gate = make(GGML_TYPE_F32, kEmbd, kSlots, 1);
    site_.token_bias = make(GGML_TYPE_F32, 1, kSlots, 1);
    site_.expert_gate = make(GGML_TYPE_I8, 4, 2, kExpertsPerSlot * kSlots);
    site_.expert_up = make(GGML_TYPE_I8, 4, 2, kExpertsPerSlot * kSlots);
    site_.expert_ids = make(GGML_TYPE_I32, kExperts, kSlots, 1);
    site_.n_expert_used = kUsed;
    site_.norm_eps = kEps;
    for (Tensor t : {site_.norm, site_.router, site_.token_gate, site_.token_bias}) fill(t);
    for (std::int64_t slot = 0; slot < kSlots; ++slot) {
      for (std::int64_t e = 0; e < kExperts; ++e) {
        ids()[slot * kExperts + e] = static_cast<std::int32_t>(kExpertsPerSlot * slot + e);
      }
    }
  }

  void run(int n_threads = 1) {
    const std::int64_t n_uses = std::ssize(rows);
    x = random_floats(kEmbd * 5);
    z_in = random_floats(kInner * n_uses);
    z = z_in;
    routes.resize(n_uses, kUsed);
    for (int ith = 0; ith < n_threads; ++ith) {
      pack_route({&site_, &uses_, x.data(), z.data(), &routes}, ith, n_threads);
    }
  }

  const SiteWeights& site() const { return site_; }
  const PackUses& uses() const { return uses_; }
  float* router(std::int64_t slot, std::int64_t expert) {
    return floats(site_.router) + (slot * kExperts + expert) * kInner;
  }
  static float* floats(Tensor t) { return static_cast<float*>(t->data); }
  std::int32_t* ids() { return static_cast<std::int32_t*>(site_.expert_ids->data); }

  std::vector<std::int32_t> rows{4, 0, 1, 4, 3};
  std::vector<SlotRun> runs{{1, 0, 2}, {2, 2, 3}};
  PackRoutes routes;
  std::vector<float> x, z_in, z;

 private:
  void fill(Tensor t) {
    const auto values = random_floats(ggml_nelements(t));
    std::copy(values.begin(), values.end(), floats(t));
  }
  std::vector<float> random_floats(std::int64_t n) {
    std::normal_distribution<float> normal(0.0f, 0.3f);
    std::vector<float> values(static_cast<std::size_t>(n));
    for (float& value : values) value = normal(random_);
    return values;
  }
  struct Free {
    void operator()(ggml_context* ctx) const { ggml_free(ctx); }
  };
  std::unique_ptr<ggml_context, Free> ctx_;
  std::mt19937 random_{2};
  SiteWeights site_{};
  PackUses uses_{rows, runs, {}};
};

double dot(const float* a, const float* b, std::int64_t n) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

/// Use u of a test, in double precision.
struct Expected {
  std::vector<double> z;
  std::vector<std::size_t> experts;
  std::vector<double> gains;
  double factor;
};

Expected expected_of(RouteTest& test, std::int64_t use, std::int64_t slot) {
  Expected expected;
  const float* in = test.z_in.data() + use * kInner;
  const double scale = 1.0 / std::sqrt(dot(in, in, kInner) / kInner + static_cast<double>(kEps));
  const float* norm = RouteTest::floats(test.site().norm) + slot * kInner;
  for (std::int64_t i = 0; i < kInner; ++i) {
    expected.z.push_back(scale * static_cast<double>(in[i]) * static_cast<double>(norm[i]));
  }
  std::vector<double> r;
  for (std::int64_t e = 0; e < kExperts; ++e) {
    double logit = 0.0;
    for (std::int64_t i = 0; i < kInner; ++i) {
      logit +=
          expected.z[static_cast<std::size_t>(i)] * static_cast<double>(test.router(slot, e)[i]);
    }
    r.push_back(std::exp(logit));
  }
  const auto first = static_cast<std::size_t>(std::ranges::max_element(r) - r.begin());
  std::vector<double> rest = r;
  rest[first] = -1.0;
  const auto second = static_cast<std::size_t>(std::ranges::max_element(rest) - rest.begin());
  expected.experts = {first, second};
  expected.gains = {r[first] / (r[first] + r[second]), r[second] / (r[first] + r[second])};
  const float* x = test.x.data() + test.rows[static_cast<std::size_t>(use)] * kEmbd;
  const double gate = dot(RouteTest::floats(test.site().token_gate) + slot * kEmbd, x, kEmbd) +
                      static_cast<double>(RouteTest::floats(test.site().token_bias)[slot]);
  expected.factor = 2.0 / (1.0 + std::exp(-gate));
  return expected;
}

}  // namespace

TEST_CASE("pack_route: norm, the two likeliest experts and the token gate of each use's slot") {
  for (const int n_threads : {1, 2, 3, 8}) {
    RouteTest test;
    test.run(n_threads);
    for (std::int64_t use = 0; use < 5; ++use) {
      CAPTURE(use);
      const Expected expected = expected_of(test, use, use < 2 ? 1 : 2);
      // Sums of 256 products in F32: errors some 1e-6 of numbers near 1.
      for (std::int64_t i = 0; i < kInner; ++i) {
        REQUIRE(static_cast<double>(test.z[static_cast<std::size_t>(use * kInner + i)]) ==
                doctest::Approx(expected.z[static_cast<std::size_t>(i)]).epsilon(1e-5));
      }
      for (std::int64_t k = 0; k < kUsed; ++k) {
        const auto at = static_cast<std::size_t>(use * kUsed + k);
        const auto rank = static_cast<std::size_t>(k);
        CHECK(static_cast<std::size_t>(test.routes.experts[at]) == expected.experts[rank]);
        CHECK(static_cast<double>(test.routes.gains[at]) ==
              doctest::Approx(expected.gains[rank]).epsilon(1e-5));
      }
      CHECK(static_cast<double>(test.routes.factors[static_cast<std::size_t>(use)]) ==
            doctest::Approx(expected.factor).epsilon(1e-5));
    }
  }
}

TEST_CASE("pack_route: of equal logits the lower number, and equal gains") {
  RouteTest test;
  // Slot 1: all experts equal. Slot 2: the last three are equal, and less likely than the others.
  for (std::int64_t e = 1; e < kExperts; ++e) {
    std::copy_n(test.router(1, 0), kInner, test.router(1, e));
  }
  std::fill_n(test.router(2, 0), kInner * kExperts, 0.0f);
  for (std::int64_t e = 0; e < kExperts; ++e) test.router(2, e)[7] = e == 6 ? 1.0f : 0.0f;
  test.run();
  for (std::size_t use = 0; use < 2; ++use) {
    CHECK(test.routes.experts[2 * use] == 0);
    CHECK(test.routes.experts[2 * use + 1] == 1);
    CHECK(test.routes.gains[2 * use] == 0.5f);
    CHECK(test.routes.gains[2 * use + 1] == 0.5f);
  }
  for (std::size_t use = 2; use < 5; ++use) {
    const bool is_liked = test.z[use * kInner + 7] > 0.0f;
    CHECK(test.routes.experts[2 * use] == (is_liked ? 6 : 0));
    CHECK(test.routes.experts[2 * use + 1] == (is_liked ? 0 : 1));
  }
}

TEST_CASE("pack_route: huge logits give gains of 1 and 0, and zero weights the factor 1") {
  RouteTest test;
  for (std::int64_t i = 0; i < kInner * kExperts; ++i) test.router(1, 0)[i] *= 1e6f;
  std::fill_n(RouteTest::floats(test.site().token_gate) + 2 * kEmbd, kEmbd, 0.0f);
  RouteTest::floats(test.site().token_bias)[2] = 0.0f;
  test.run();
  CHECK(test.routes.gains[0] == 1.0f);
  CHECK(test.routes.gains[1] == 0.0f);
  for (std::size_t use = 2; use < 5; ++use) CHECK(test.routes.factors[use] == 1.0f);
}

TEST_CASE("group_by_expert: every choice once, beside those of the same matrix") {
  RouteTest test;
  test.routes.resize(5, kUsed);
  test.routes.experts = {3, 1, 1, 0, /* slot 2 */ 7, 3, 3, 2, 7, 3};
  const ExpertGroups& found = group_by_expert(test.routes, test.uses(), test.site(),
                                              test.site().expert_gate, test.site().expert_up);
  struct Group {
    std::int64_t slot, expert;
    std::vector<std::int32_t> choices;
  };
  const std::vector<Group> expected = {{1, 0, {3}}, {1, 1, {1, 2}},    {1, 3, {0}},
                                       {2, 2, {7}}, {2, 3, {5, 6, 9}}, {2, 7, {4, 8}}};
  REQUIRE(found.groups.size() == expected.size());
  const auto matrix = [](Tensor t, const Group& group) {
    return static_cast<const char*>(t->data) +
           static_cast<std::size_t>(kExpertsPerSlot * group.slot + group.expert) * t->nb[2];
  };
  std::int32_t next = 0;
  for (std::size_t g = 0; g < expected.size(); ++g) {
    CAPTURE(g);
    CHECK(found.groups[g].weight == matrix(test.site().expert_gate, expected[g]));
    CHECK(found.groups[g].up_weight == matrix(test.site().expert_up, expected[g]));
    CHECK(found.groups[g].first == next);
    REQUIRE(found.groups[g].n == std::ssize(expected[g].choices));
    for (const std::int32_t choice : expected[g].choices) {
      CHECK(found.choices[static_cast<std::size_t>(next)] == choice);
      CHECK(found.uses[static_cast<std::size_t>(next)] == choice / kUsed);
      ++next;
    }
  }
  CHECK(group_by_expert(test.routes, test.uses(), test.site(), test.site().expert_gate, nullptr)
            .groups[0]
            .up_weight == nullptr);
}
