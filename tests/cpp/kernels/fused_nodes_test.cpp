// The kernels as graph nodes: what the graph adds to them is shapes, weights that are looked up
// when the graph runs, and counters that start again.
#include "modularbase/kernels/fused_nodes.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "cpp/kernels/exact_layer.h"
#include "modularbase/core/errors.h"
#include "modularbase/kernels/attention_scratch.h"

using namespace modularbase;
using namespace modularbase::kernels;

namespace {

// F32 sums of at most 100 products near 1, against double.
constexpr double kTolerance = 2e-5;

/// A context of weights in memory, and a graph over them that runs on three threads.
class NodeTest {
 public:
  NodeTest() : backend_("cpu", 3), graph_(64), weights_(make_tensor_context(8)), g(graph_) {}

  /// Outside the graph, as a model's weights are.
  Tensor weight(std::int64_t n_in, std::int64_t n_out = 1) {
    Tensor tensor = ggml_new_tensor_2d(weights_.get(), GGML_TYPE_F32, n_in, n_out);
    ggml_format_name(tensor, "weight-%d", static_cast<int>(n_weights_++));
    inputs_.push_back(tensor);
    return tensor;
  }
  Tensor input(std::int64_t ne0, std::int64_t ne1) {
    Tensor tensor = g.input("input", GGML_TYPE_F32, ne0, ne1);
    ggml_set_output(tensor);  // else later nodes may take its memory, and the check reads it
    inputs_.push_back(tensor);
    return tensor;
  }
  void run() {
    if (n_weights_ > 0 && !weight_memory_) {
      weight_memory_ = backend_.allocate(weights_.get(), "weights");
    }
    if (graph_.n_bytes() == 0) graph_.allocate(backend_);
    std::normal_distribution<float> normal;
    for (Tensor tensor : inputs_) {
      auto* values = static_cast<float*>(tensor->data);
      for (std::int64_t i = 0; i < ggml_nelements(tensor); ++i) values[i] = normal(random_);
    }
    graph_.compute(backend_);
  }

 private:
  Backend backend_;
  Graph graph_;
  ContextPtr weights_;
  std::vector<Tensor> inputs_;
  BufferPtr weight_memory_;
  std::size_t n_weights_ = 0;
  std::mt19937 random_{3};

 public:
  GraphBuilder g;
};

float at(Tensor tensor, std::int64_t i, std::int64_t row) {
  return static_cast<const float*>(tensor->data)[row * tensor->ne[0] + i];
}

/// (W x)[out] of one row, in double.
double product(Tensor weight, Tensor x, std::int64_t out, std::int64_t row) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < x->ne[0]; ++i) {
    sum += static_cast<double>(at(weight, i, out)) * at(x, i, row);
  }
  return sum;
}

template <typename Expected>
double worst_error(Tensor y, Expected expected) {
  double worst = 0.0;
  for (std::int64_t row = 0; row < y->ne[1]; ++row) {
    for (std::int64_t i = 0; i < y->ne[0]; ++i) {
      const double error = std::abs(at(y, i, row) - expected(i, row));
      worst = error > worst || std::isnan(error) ? error : worst;
    }
  }
  return worst;
}

}  // namespace

TEST_CASE("three weights side by side, one of them with a bias") {
  NodeTest test;
  Tensor x = test.input(40, 9);
  const std::vector<Tensor> weights = {test.weight(40, 24), test.weight(40, 8), test.weight(40, 8)};
  Tensor bias = test.weight(8);
  Tensor y = test.g.output(
      linear_node(test.g, {weights, {nullptr, bias, nullptr}, Epilogue::kNone}, x, nullptr), "y");
  CHECK(y->ne[0] == 40);
  CHECK(y->ne[1] == 9);
  for (int run = 0; run < 2; ++run) {  // the work counter must start again
    test.run();
    CHECK(worst_error(y, [&](std::int64_t i, std::int64_t row) {
            if (i < 24) return product(weights[0], x, i, row);
            if (i < 32) return product(weights[1], x, i - 24, row) + at(bias, i - 24, 0);
            return product(weights[2], x, i - 32, row);
          }) < kTolerance);
  }
}

TEST_CASE("a product onto a residual, and a gated pair") {
  NodeTest test;
  Tensor x = test.input(100, 5);
  Tensor weight = test.weight(100, 48);
  Tensor residual = test.input(48, 5);
  Tensor sum = test.g.output(
      linear_node(test.g, {{weight}, {nullptr}, Epilogue::kAddResidual}, x, residual), "sum");
  Tensor gate = test.weight(100, 48);
  Tensor up = test.weight(100, 48);
  Tensor gated = test.g.output(
      linear_node(test.g, {{gate, up}, {nullptr, nullptr}, Epilogue::kSwiGlu}, x, nullptr),
      "gated");
  CHECK(gated->ne[0] == 48);
  test.run();
  CHECK(worst_error(sum, [&](std::int64_t i, std::int64_t row) {
          return product(weight, x, i, row) + at(residual, i, row);
        }) < kTolerance);
  // The product of two sums near 10: ten times the tolerance of one.
  CHECK(worst_error(gated, [&](std::int64_t i, std::int64_t row) {
          const double g = product(gate, x, i, row);
          return g / (1.0 + std::exp(-g)) * product(up, x, i, row);
        }) < 10 * kTolerance);
}

TEST_CASE("wrong shapes are errors that name the tensor") {
  NodeTest test;
  Tensor x = test.input(40, 9);
  Tensor weight = test.weight(41, 8);
  CHECK_THROWS_WITH_AS(linear_node(test.g, {{weight}, {nullptr}, Epilogue::kNone}, x, nullptr),
                       "weight-0: expected shape [40, *], found [41, 8]", Error);
  Tensor good = test.weight(40, 8);
  CHECK_THROWS_AS(linear_node(test.g, {{good}, {nullptr}, Epilogue::kAddResidual}, x, x), Error);
  const KvLayer kv = exact_layer(TileFormat::kF16, nullptr, nullptr, 1, 16);
  const AttentionOp op{.batch = nullptr,
                       .scratch = nullptr,
                       .kv = kv,
                       .layer = 0,
                       .n_head = 2,
                       .rope_dim = 16,
                       .style = RopeStyle::kNormal,
                       .q_norm = nullptr,
                       .k_norm = nullptr,
                       .norm_eps = 0.0f};
  CHECK_THROWS_AS(rope_store_node(test.g, op, x), Error);  // 40, not (2 + 2) * 16
  const HeadWeight head{GGML_TYPE_F32, nullptr, 41, 8, nullptr};
  CHECK_THROWS_AS(certified_head_node(test.g, {&head, nullptr, nullptr, nullptr}, x), Error);
}

TEST_CASE("a row stored by one node is attended to by the next") {
  constexpr std::int64_t kHeadDim = 16, kRows = 5;
  NodeTest test;
  std::vector<std::uint16_t> keys(kBlockTokens * kHeadDim), values(keys.size());
  const KvLayer kv = exact_layer(TileFormat::kF16, keys.data(), values.data(), 1, kHeadDim);
  const std::int32_t block = 0;
  const AttentionSpan span{0, kRows, 0, &block};
  // No rotation: angles of zero.
  const std::vector<float> cos(kRows * kHeadDim / 2, 1.0f), sin(cos.size(), 0.0f);
  const AttentionBatch batch{&span, 1, kRows, cos.data(), sin.data()};
  AttentionScratch scratch;
  scratch.plan(batch, 2, 1, kHeadDim);
  const AttentionOp op{.batch = &batch,
                       .scratch = &scratch,
                       .kv = kv,
                       .layer = 0,
                       .n_head = 2,
                       .rope_dim = kHeadDim,
                       .style = RopeStyle::kNeox,
                       .q_norm = nullptr,
                       .k_norm = nullptr,
                       .norm_eps = 0.0f};
  Tensor qkv = test.input(4 * kHeadDim, kRows);
  Tensor stored = rope_store_node(test.g, op, qkv);
  Tensor out = test.g.output(attention_node(test.g, op, stored), "out");
  CHECK(out->ne[0] == 2 * kHeadDim);
  for (int run = 0; run < 2; ++run) {
    test.run();
    // Keys and values are kept in F16: 11 bits of values near 1.
    CHECK(worst_error(out, [&](std::int64_t i, std::int64_t row) {
            const std::int64_t head = i / kHeadDim;
            double sum = 0.0, value = 0.0;
            for (std::int64_t position = 0; position <= row; ++position) {
              double dot = 0.0;
              for (std::int64_t d = 0; d < kHeadDim; ++d) {
                dot += static_cast<double>(at(qkv, head * kHeadDim + d, row)) *
                       at(qkv, 2 * kHeadDim + d, position);
              }
              const double weight = std::exp(dot / 4.0);  // sqrt(kHeadDim)
              sum += weight;
              value += weight * at(qkv, 3 * kHeadDim + i % kHeadDim, position);
            }
            return value / sum;
          }) < 4e-3);
  }
}

TEST_CASE("the certified head as nodes answers anew in every run") {
  constexpr std::int64_t kEmbd = 64, kVocab = 700;
  NodeTest test;
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<float> values(kEmbd * kVocab);
  for (float& value : values) value = normal(random);
  const HeadWeight head{GGML_TYPE_F32, values.data(), kEmbd, kVocab, nullptr};
  const auto screen = HeadScreen::build(head, 1);
  REQUIRE(screen);
  std::vector<HeadQuery> queries(2);
  queries[1].top_k = 5;
  HeadWorkspacePtr workspace = make_head_workspace();
  Tensor x = test.input(kEmbd, 2);
  test.g.expand(
      certified_head_node(test.g, {&head, screen.get(), queries.data(), workspace.get()}, x));
  for (int run = 0; run < 3; ++run) {
    test.run();
    REQUIRE(head_rows(*workspace).size() == 2);
    for (std::size_t row = 0; row < 2; ++row) {
      const HeadRow& found = head_rows(*workspace)[row];
      REQUIRE(found.certified);
      double best = -1e30;
      for (std::int64_t id = 0; id < kVocab; ++id) {
        double logit = 0.0;
        for (std::int64_t i = 0; i < kEmbd; ++i) {
          logit += static_cast<double>(values[static_cast<std::size_t>(id * kEmbd + i)]) *
                   at(x, i, static_cast<std::int64_t>(row));
        }
        best = std::max(best, logit);
      }
      const float largest = *std::max_element(found.logits.begin(), found.logits.end());
      CHECK(std::abs(largest - best) < kTolerance);
    }
  }
}
