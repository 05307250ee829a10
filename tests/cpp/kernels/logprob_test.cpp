#include "modularbase/kernels/logprob.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "modularbase/core/errors.h"

using namespace modularbase;
using namespace modularbase::kernels;

namespace {

std::vector<float> random_row(std::int64_t n, float sigma, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, sigma);
  std::vector<float> row(static_cast<std::size_t>(n));
  for (float& value : row) value = normal(random);
  return row;
}

/// ln softmax(row)[target] in double, straight from the definition.
double expected(const float* row, std::int64_t n, TokenId target) {
  const double largest = *std::max_element(row, row + n);
  double sum = 0.0;
  for (std::int64_t i = 0; i < n; ++i) sum += std::exp(row[i] - largest);
  return row[target] - largest - std::log(sum);
}

// The vector exp is good to some 1e-7 of each term, the float result to half a unit in its last
// place: 4e-6 at -64.
double tolerance(double value) {
  return 1e-6 + std::abs(value) * 2e-7;
}

}  // namespace

TEST_CASE("target_logprob equals its definition, whatever the length and the spread") {
  unsigned seed = 0;
  for (const std::int64_t n : {1, 2, 7, 16, 63, 64, 65, 1023, 1025, 5000, 49152}) {
    for (const float sigma : {0.01f, 2.0f, 30.0f}) {
      const std::vector<float> row = random_row(n, sigma, ++seed);
      for (const std::int64_t target : {std::int64_t{0}, n / 2, n - 1}) {
        CAPTURE(n);
        CAPTURE(sigma);
        const auto id = static_cast<TokenId>(target);
        const double want = expected(row.data(), n, id);
        CHECK(std::abs(target_logprob(row.data(), n, id) - want) <= tolerance(want));
      }
    }
  }
}

TEST_CASE("a sum over many equal terms does not lose them") {
  const std::vector<float> row(1 << 20, 3.0f);  // in float alone the sum would stall
  CHECK(target_logprob(row.data(), 1 << 20, 5) ==
        doctest::Approx(-std::log(1048576.0)).epsilon(1e-7));
}

TEST_CASE("large logits do not overflow, and excluded tokens count for nothing") {
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<float> row = {3e38f, -inf, 3e38f, -3e38f};
  CHECK(target_logprob(row.data(), 4, 0) == doctest::Approx(-std::log(2.0)));
  CHECK(target_logprob(row.data(), 4, 1) == -inf);
}

TEST_CASE("the nodes give every row's own target") {
  constexpr std::int64_t kVocab = 333, kRows = 7;
  Backend backend("cpu", 3);
  Graph graph(24);
  GraphBuilder g(graph);
  Tensor logits = g.input("logits", GGML_TYPE_F32, kVocab, kRows);
  Tensor targets = g.input("targets", GGML_TYPE_I32, kRows);
  Tensor out = g.output(target_logprob_node(g, logits, targets), "logprobs");
  Tensor reference = g.output(target_logprob_reference(g, logits, targets), "reference");
  for (const Tensor found : {out, reference}) {
    CHECK(found->ne[0] == 1);
    CHECK(found->ne[1] == kRows);
  }
  graph.allocate(backend);
  const std::vector<float> rows = random_row(kVocab * kRows, 3.0f, 9);
  const std::vector<TokenId> ids = {0, 332, 5, 5, 100, 17, 300};
  ggml_backend_tensor_set(logits, rows.data(), 0, ggml_nbytes(logits));
  ggml_backend_tensor_set(targets, ids.data(), 0, ggml_nbytes(targets));
  graph.compute(backend);
  for (std::size_t i = 0; i < kRows; ++i) {
    const double want = expected(rows.data() + i * kVocab, kVocab, ids[i]);
    CHECK(std::abs(static_cast<const float*>(out->data)[i] - want) <= tolerance(want));
    // The reference sums in float: a few units of the sum's last place.
    CHECK(std::abs(static_cast<const float*>(reference->data)[i] - want) <= 4 * tolerance(want));
  }
  Tensor wrong = g.input("wrong", GGML_TYPE_I32, kRows + 1);
  CHECK_THROWS_AS(target_logprob_node(g, logits, wrong), Error);
}
