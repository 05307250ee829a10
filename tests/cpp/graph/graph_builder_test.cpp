#include "modularbase/graph/graph_builder.h"

#include <doctest/doctest.h>

#include <atomic>
#include <string>
#include <vector>

#include "modularbase/core/errors.h"

using namespace modularbase;

namespace {

/// Counts its calls and adds one to every element of its share of rows.
class AddOne final : public CustomNode {
 public:
  explicit AddOne(std::atomic<int>& n_resets) : n_resets_(n_resets) {}
  void run(ggml_tensor* dst, int ith, int nth) override {
    const auto* x = static_cast<const float*>(dst->src[0]->data);
    auto* y = static_cast<float*>(dst->data);
    for (std::int64_t i = ith; i < ggml_nelements(dst); i += nth) y[i] = x[i] + 1.0f;
  }
  void reset() override { ++n_resets_; }

 private:
  std::atomic<int>& n_resets_;
};

struct Shapes {
  Graph graph{16};
  GraphBuilder g{graph};
  Tensor named(const char* name, std::int64_t ne0, std::int64_t ne1 = 1) {
    return g.input(name, GGML_TYPE_F32, ne0, ne1);
  }
};

}  // namespace

TEST_CASE("a wrong shape is an error that names the tensor, not an abort") {
  Shapes s;
  Tensor x = s.named("x", 8, 3);
  CHECK_THROWS_WITH_AS(s.g.rms_norm(x, s.named("norm", 7), 1e-5f),
                       "norm: expected shape [8, 1], found [7, 1]", Error);
  CHECK_THROWS_WITH_AS(s.g.rms_norm(x, s.named("norm", 8, 2), 1e-5f),
                       "norm: expected shape [8, 1], found [8, 2]", Error);
  CHECK_THROWS_WITH_AS(s.g.mul_mat(s.named("weight", 9, 4), x),
                       "weight: expected shape [8, *], found [9, 4]", Error);
  CHECK_THROWS_WITH_AS(s.g.add(x, s.named("bias", 9)), "bias: expected shape [8, 1], found [9, 1]",
                       Error);
  CHECK_THROWS_WITH_AS(s.g.add(x, s.named("bias", 8, 2)),
                       "bias: expected shape [8, 3], found [8, 2]", Error);
}

TEST_CASE("results have the shapes that the header promises") {
  Shapes s;
  Tensor x = s.named("x", 8, 3);
  const auto shape = [](Tensor t) { return std::vector<std::int64_t>{t->ne[0], t->ne[1]}; };
  using Shape = std::vector<std::int64_t>;
  CHECK(shape(s.g.rms_norm(x, s.named("norm", 8), 1e-5f)) == Shape{8, 3});
  CHECK(shape(s.g.mul_mat(s.named("weight", 8, 5), x)) == Shape{5, 3});
  CHECK(shape(s.g.add(x, s.named("bias", 8))) == Shape{8, 3});
  CHECK(shape(s.g.get_rows(x, s.g.input("ids", GGML_TYPE_I32, 2))) == Shape{8, 2});
}

TEST_CASE("names are llama.cpp's, and building computes nothing") {
  Shapes s;
  Tensor x = s.named("x", 8, 3);
  CHECK(std::string(s.g.tag(x, "ffn_inp", 3)->name) == "ffn_inp-3");
  CHECK(x->data == nullptr);
  CHECK(s.graph.n_bytes() == 0);
}

TEST_CASE("custom nodes run on every thread and are reset before each computation") {
  Backend backend("cpu", 3);
  Shapes s;
  std::atomic<int> n_resets{0};
  Tensor x = s.named("x", 10, 7);
  Tensor once = s.g.custom(std::make_unique<AddOne>(n_resets), 10, 7, {x});
  Tensor twice = s.g.output(s.g.custom(std::make_unique<AddOne>(n_resets), 10, 7, {once}), "y");
  s.graph.allocate(backend);
  CHECK(s.graph.n_bytes() > 0);
  const std::vector<float> values(70, 0.5f);
  for (int run = 1; run <= 2; ++run) {
    ggml_backend_tensor_set(x, values.data(), 0, ggml_nbytes(x));
    s.graph.compute(backend);
    CHECK(n_resets == 2 * run);
    const auto* y = static_cast<const float*>(twice->data);
    CHECK(std::vector<float>(y, y + 70) == std::vector<float>(70, 2.5f));
  }
}
