#include "modularbase/graph/backend.h"

#include <doctest/doctest.h>

#include <cstring>

#include "modularbase/core/errors.h"
#include "modularbase/graph/graph_builder.h"

using namespace modularbase;

TEST_CASE("an unknown or absent device is an error that names it") {
  CHECK_THROWS_WITH_AS(Backend("tpu", 1), "device: expected 'auto', 'cpu' or 'cuda', found 'tpu'",
                       DeviceError);
  CHECK(Backend("cpu", 2).is_cpu());
  CHECK(Backend("cpu", 2).n_threads() == 2);
  CHECK(Backend("cpu", 1).name() == "CPU");
}

TEST_CASE("memory is given to every tensor of a context") {
  const Backend backend("cpu", 1);
  const ContextPtr ctx = make_tensor_context(2);
  Tensor a = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, 5, 3);
  Tensor b = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F16, 7);
  const BufferPtr buffer = backend.allocate(ctx.get(), "a test");
  std::memset(a->data, 1, ggml_nbytes(a));
  std::memset(b->data, 2, ggml_nbytes(b));
  CHECK(*static_cast<char*>(a->data) == 1);
}

TEST_CASE("memory that cannot be had is an error that says for what") {
  const Backend backend("cpu", 1);
  const ContextPtr ctx = make_tensor_context(1);
  ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, std::int64_t{1} << 30, std::int64_t{1} << 28);
  CHECK_THROWS_WITH_AS(backend.allocate(ctx.get(), "a test"), "CPU: could not allocate a test",
                       DeviceError);
}

TEST_CASE("a graph with an operation that the device lacks is an error, and nothing is computed") {
  const Backend backend("cpu", 1);
  Graph graph(4);
  GraphBuilder g(graph);
  Tensor weight = g.input("weight", GGML_TYPE_F32, 4, 3);
  Tensor x =
      g.input("x", GGML_TYPE_F16, 4, 5);  // ggml's CPU wants F32, or the type of its dot product
  g.output(ggml_mul_mat(g.ctx(), weight, x), "product");
  CHECK_THROWS_WITH_AS(graph.allocate(backend), "CPU: cannot compute MUL_MAT (node 'product')",
                       DeviceError);
}
