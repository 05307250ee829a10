// Without a hook or a split the graph is the plain base, node for node.
#include "modularbase/graph/layer_hook.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "modularbase/kernels/attention_scratch.h"
#include "modularbase/models/model.h"
#include "tools/temp_file.h"
#include "tools/tiny_gguf.h"

using namespace modularbase;
using testing::TinyGguf;

namespace {

constexpr std::int64_t kRows = 5;

/// Hands back what it got, or adds x to it; notes what it was called with.
class TestHook final : public LayerHook {
 public:
  explicit TestHook(bool adds) : adds_(adds) {}
  Tensor after_ffn(GraphBuilder& g, Tensor x, Tensor h, int layer) override {
    calls.push_back(std::string(x->name) + " " + h->name + " " + std::to_string(layer));
    return adds_ ? g.tag(g.add(h, x), "hooked", layer) : h;
  }
  std::vector<std::string> calls;

 private:
  bool adds_;
};

std::string describe(const ggml_tensor* node) {
  std::string text = std::string(ggml_op_name(node->op)) + " " + node->name;
  for (const std::int64_t ne : node->ne) text += " " + std::to_string(ne);
  for (const ggml_tensor* source : node->src) {
    if (source) text += std::string(" <") + ggml_op_name(source->op) + " " + source->name;
  }
  return text;
}

class HookTest {
 public:
  HookTest()
      : temp_(TinyGguf().writer.image()),
        file_(GgufFile::open(temp_.path())),
        backend_("cpu", 1),
        model_(load_model(file_, backend_, DType::kKeep)),
        all_({2, 2, 32, GGML_TYPE_F16}, 1, budget_, backend_),
        lower_({1, 2, 32, GGML_TYPE_F16, 0, 64}, 1, budget_, backend_),
        upper_({1, 2, 32, GGML_TYPE_F16, 1, 0}, 1, budget_, backend_) {}

  /// The nodes of the whole forward pass, in the order of execution.
  std::vector<std::string> nodes(KernelPath path, LayerHook* hook, TapPoint* tap = nullptr) {
    Graph graph(256);
    GraphBuilder g(graph);
    FusedAttention attention(model_->config, {{&all_, &batch_, &scratch_}});
    const ForwardArgs args{.linear_path = path,
                           .attention = &attention,
                           .hook = hook,
                           .mid = nullptr,
                           .tap = tap,
                           .token_ids = g.input("token_ids", GGML_TYPE_I32, kRows),
                           .out_rows = g.input("out_rows", GGML_TYPE_I32, 2)};
    g.output(model_->build_normed(g, args), "result_norm");
    return nodes_of(graph);
  }

  /// The same, split behind the attention of layer 0.
  std::vector<std::string> split_nodes(LayerHook* hook, std::int64_t n_rows,
                                       std::int64_t n_mid_rows) {
    Graph graph(256);
    GraphBuilder g(graph);
    FusedAttention attention(model_->config,
                             {{&lower_, &batch_, &scratch_}, {&upper_, &batch_, &scratch_}});
    MidRows mid{0, lower_.memory().mid(), nullptr, nullptr};
    ForwardArgs args{.linear_path = KernelPath::kFused,
                     .attention = &attention,
                     .hook = hook,
                     .mid = &mid,
                     .tap = nullptr,
                     .token_ids = nullptr,
                     .out_rows = g.input("out_rows", GGML_TYPE_I32, 2)};
    if (n_rows > 0) {
      args.token_ids = g.input("token_ids", GGML_TYPE_I32, n_rows);
      mid.write_ids = g.input("mid_write_ids", GGML_TYPE_I64, n_rows);
    }
    if (n_mid_rows > 0) mid.read_ids = g.input("mid_read_ids", GGML_TYPE_I32, n_mid_rows);
    g.output(model_->build_normed(g, args), "result_norm");
    return nodes_of(graph);
  }

 private:
  static std::vector<std::string> nodes_of(const Graph& graph) {
    std::vector<std::string> found;
    for (int i = 0; i < ggml_graph_n_nodes(graph.cgraph()); ++i) {
      found.push_back(describe(ggml_graph_node(graph.cgraph(), i)));
    }
    return found;
  }

  testing::TempFile temp_;
  GgufFile file_;
  Backend backend_;
  std::unique_ptr<Model> model_;
  KvBudget budget_{std::size_t{1} << 30};
  KvGroup all_;  // all layers in one group
  KvGroup lower_;
  KvGroup upper_;
  kernels::AttentionBatch batch_{};
  kernels::AttentionScratch scratch_;
};

std::vector<std::string> ops_of(const std::vector<std::string>& nodes) {
  std::vector<std::string> ops;
  for (const std::string& node : nodes) ops.push_back(node.substr(0, node.find(' ')));
  return ops;
}

}  // namespace

TEST_CASE("without a hook: the nodes of the plain base and no other") {
  HookTest test;
  const std::vector<std::string> layer = {
      "RMS_NORM", "MUL",    "CUSTOM",  // norm, q|k|v
      "CUSTOM",   "CUSTOM",            // rotate and store, attend
  };
  const std::vector<std::string> feed_forward = {
      "CUSTOM",              // output onto the residual
      "RMS_NORM", "MUL",     // norm
      "CUSTOM",   "CUSTOM",  // gate and up, down onto the residual
  };
  std::vector<std::string> expected = {"GET_ROWS"};
  const auto append = [&](const std::vector<std::string>& ops) {
    expected.insert(expected.end(), ops.begin(), ops.end());
  };
  append(layer);
  append(feed_forward);
  append(layer);
  append({"GET_ROWS", "GET_ROWS"});  // only the rows whose output is wanted go on
  append(feed_forward);
  append({"RMS_NORM", "MUL"});
  CHECK(ops_of(test.nodes(KernelPath::kFused, nullptr)) == expected);
}

TEST_CASE("a hook that adds nothing leaves the graph as it is, node for node") {
  HookTest test;
  for (const KernelPath path : {KernelPath::kFused, KernelPath::kReference}) {
    TestHook hook(false);
    CHECK(test.nodes(path, &hook) == test.nodes(path, nullptr));
    CHECK(hook.calls == std::vector<std::string>{"ffn_norm-0 l_out-0 0", "ffn_norm-1 l_out-1 1"});
  }
}

TEST_CASE("a tap adds a copy of what enters its layer, and nothing else") {
  HookTest test;
  TestHook hook(true);
  const std::vector<std::string> plain = test.nodes(KernelPath::kFused, &hook);
  for (const int layer : {0, 1}) {
    TapPoint tap{layer};
    std::vector<std::string> nodes = test.nodes(KernelPath::kFused, &hook, &tap);
    REQUIRE(tap.rows != nullptr);
    const auto copy = std::find_if(nodes.begin(), nodes.end(), [](const std::string& node) {
      return node.find(" tapped ") != std::string::npos;
    });
    REQUIRE(copy != nodes.end());
    CHECK(copy->find(layer == 0 ? "<GET_ROWS" : "<ADD hooked-0") != std::string::npos);
    nodes.erase(copy);
    CHECK(ops_of(nodes) == ops_of(plain));
  }
}

TEST_CASE("what a hook adds is what the next layer reads") {
  HookTest test;
  TestHook hook(true);
  const std::vector<std::string> plain = test.nodes(KernelPath::kFused, nullptr);
  const std::vector<std::string> hooked = test.nodes(KernelPath::kFused, &hook);
  CHECK(hooked.size() == plain.size() + 2);
  std::vector<std::string> readers;
  for (const std::string& node : hooked) {
    if (node.find("<ADD hooked-0") != std::string::npos) readers.push_back(node);
  }
  REQUIRE(readers.size() == 2);  // the next layer's norm, and its residual at the wanted rows
  CHECK(readers[0].starts_with("RMS_NORM"));
  CHECK(readers[1].starts_with("GET_ROWS"));
}

TEST_CASE("split, without rows that restart: one node more, which keeps the rows") {
  HookTest test;
  std::vector<std::string> nodes = test.split_nodes(nullptr, kRows, 0);
  const auto keeps = std::find_if(nodes.begin(), nodes.end(), [](const std::string& node) {
    return node.starts_with("SET_ROWS");
  });
  REQUIRE(keeps != nodes.end());
  CHECK(keeps->find("<CUSTOM ffn_inp-0") != std::string::npos);
  nodes.erase(keeps);
  CHECK(ops_of(nodes) == ops_of(test.nodes(KernelPath::kFused, nullptr)));
}

TEST_CASE("rows that restart join behind the attention of the split's layer") {
  HookTest test;
  TestHook hook(true);
  const std::vector<std::string> nodes = test.split_nodes(&hook, kRows, 3);
  const auto has = [&](const std::string& name, const std::string& shape) {
    return std::any_of(nodes.begin(), nodes.end(), [&](const std::string& node) {
      return node.find(" " + name + " " + shape + " ") != std::string::npos;
    });
  };
  CHECK(has("ffn_inp-0", "64 5"));
  CHECK(has("ffn_norm-0", "64 8"));
  CHECK(has("hooked-0", "64 8"));
  CHECK(has("attn_norm-1", "64 8"));
  CHECK(has("kqv_out-1", "128 8"));
}

TEST_CASE("with only rows that restart, the layers below are not there") {
  HookTest test;
  const std::vector<std::string> nodes = test.split_nodes(nullptr, 0, 3);
  CHECK(ops_of(nodes) == std::vector<std::string>{"GET_ROWS", "RMS_NORM", "MUL", "CUSTOM",
                                                  "CUSTOM",  // its FFN
                                                  "RMS_NORM", "MUL", "CUSTOM", "CUSTOM", "CUSTOM",
                                                  "GET_ROWS", "GET_ROWS", "CUSTOM", "RMS_NORM",
                                                  "MUL", "CUSTOM", "CUSTOM", "RMS_NORM", "MUL"});
}
